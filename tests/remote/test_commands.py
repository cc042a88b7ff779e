"""Commands on a root in S3, beside the same commands on a local root."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from tests.cli.conftest import make_data
from tests.cli.test_evaluate_and_steer import with_questions
from tests.conftest import quick_evaluations, unrendered_figures
from tests.test_documentation import commands_of
from tlcapture.errors import InputError
from tlcapture.storage.remote import roots as remote_roots

Run = Callable[..., Result]
_TIMES = re.compile(rb'\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[0-9.]*(?:\+00:00|Z)?|\d{19}|"crc32":"[0-9a-f ]+"')
_REPENG = Path(__file__).parents[1] / "other_tools" / "repeng.gguf"
# What a user would type, in turn, in a root with the prompt sets and traits of `make_data`.
_COMMANDS = (
    "extract --model MODEL --methods mean_diff --component residual",
    "evaluate --model MODEL --methods mean_diff --component residual --traits tone/loud --layers 1",
    "steer --traits tone/loud --layers 1 --coefficients 2",
    "capture --prompt-set short --attention --logit-lens --layer-internals all --max-new-tokens 6",
    "capture --prompt-set other --samples 2 --temperature 1 --max-new-tokens 4 --format compact --attention",
    "capture --prompt-set other --max-new-tokens 4 --ablate tone/loud@all --variant calm",
    "capture --prompt-set short --replay --logit-lens --lens-top 3",
    "project --prompt-set short --format compact",
    "compare default/other default/other@calm",
    "traits import REPENG --trait tone/given",
    "capture --prompt-set short --overwrite --max-new-tokens 5 --attention",
    "project --prompt-set short --centered --traits tone/warm",
    "project --prompt-set short,other --dynamics-only",
    "compare default/other default/other@calm --skip-existing",
)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    from tlcapture.cli.main import main

    monkeypatch.delenv("TLCAPTURE_ROOT", raising=False)

    def invoke(*words: object, code: int = 0) -> Result:
        result = CliRunner().invoke(main, [str(word) for word in words], catch_exceptions=False)
        assert result.exit_code == code, result.output
        return result

    return invoke


def contents(found: dict[str, bytes]) -> dict[str, bytes]:
    """Files by name, those of archives apart, without locks and records of runs, times and checksums of times."""
    kept: dict[str, bytes] = {}
    for name, data in found.items():
        if data.startswith(b"PK"):  # it has a checksum of the times in it
            archive = zipfile.ZipFile(io.BytesIO(data))
            kept |= {f"{name}/{each}": archive.read(each) for each in archive.namelist()}
        elif "/runs/" not in name and "/.locks/" not in name:
            kept[name] = data
    return {name: _TIMES.sub(b"TIME", data) for name, data in kept.items()}


def of_folder(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def of_bucket(s3: Any, url: str) -> dict[str, bytes]:
    start = len(url.removeprefix("s3://")) + 1
    return {path[start:]: data for path, data in s3.cat(s3.find(url)).items()}


def put_datasets(s3: Any, url: str, folder: Path) -> None:
    with_questions(make_data(folder))
    s3.put(f"{folder}/datasets", f"{url}/datasets", recursive=True)


def test_every_command_leaves_the_files_in_s3_that_it_leaves_on_a_disk(
    run: Run, s3: Any, bucket: str, tmp_path: Path, tiny_folder: Path
) -> None:
    local = tmp_path / "local"
    put_datasets(s3, bucket, local)
    for command in _COMMANDS:
        for root in (local, bucket):
            with quick_evaluations():
                named = command.replace("MODEL", str(tiny_folder)).replace("REPENG", str(_REPENG))
                run(*named.split(), "--root", root)
    ours, theirs = contents(of_folder(local)), contents(of_bucket(s3, bucket))
    assert theirs.keys() ^ ours.keys() == set()
    assert [name for name, data in ours.items() if theirs[name] != data] == []
    assert len(ours) > 60


_captured: dict[str, bytes] = {}  # the objects of the root of `captured`


@pytest.fixture
def captured(run: Run, s3: Any, bucket: str, tmp_path: Path, tiny_folder: Path) -> str:
    """A root in S3 with vectors, and captures of the set `short`."""
    if not _captured:
        put_datasets(s3, bucket, tmp_path / "local")
        run("extract", "--model", tiny_folder, "--methods", "mean_diff", "--component", "residual", "--root", bucket)
        run("capture", "--prompt-set", "short", "--attention", "--logit-lens", "--max-new-tokens", 6, "--root", bucket)
        _captured.update(of_bucket(s3, bucket))
        remote_roots._mounts.clear()
    else:
        s3.pipe({f"{bucket}/{name}": data for name, data in _captured.items()})
    return bucket


def test_what_exists_is_skipped_and_what_was_removed_is_made_again(run: Run, s3: Any, captured: str) -> None:
    before = of_bucket(s3, captured)
    again = ("capture", "--prompt-set", "short", "--skip-existing", "--attention", "--max-new-tokens", 6, "--root")
    assert "3 prompts skipped: nothing was missing" in run(*again, captured).output
    s3.rm_file(f"{captured}/experiments/default/analysis/per_token/short/2_attention.json")
    raw = f"{captured}/experiments/default/inference/raw/residual/short/3.pt"
    changed = s3.info(raw)["ETag"]
    remote_roots.refresh(remote_roots.root_folder(captured))
    assert "wrote 1 file " in run(*again, captured).output
    assert s3.info(raw)["ETag"] == changed
    after = of_bucket(s3, captured)
    record = json.loads(after[max(name for name in after if "/runs/" in name and name not in before)])
    assert (record["arguments"]["root"], record["folder"]) == (captured, f"{captured}/experiments/default")
    assert {name for name in after if "/runs/" not in name} == {name for name in before if "/runs/" not in name}
    assert run("capture", "--prompt-set", "short", "--max-new-tokens", 6, "--root", captured)
    assert s3.info(raw)["ETag"] != changed  # its date is another one


def test_a_dry_run_writes_nothing(run: Run, s3: Any, captured: str) -> None:
    before = of_bucket(s3, captured)
    output = run("capture", "--prompt-set", "other", "--dry-run", "--root", captured).output
    assert "1 prompt" in output and "free on the device" not in output  # which a store does not tell
    assert of_bucket(s3, captured) == before


def test_shards_capture_a_set_together(run: Run, s3: Any, captured: str) -> None:
    words = ["capture", "--experiment", "two", "--prompt-set", "short", "--max-new-tokens", 6, "--no-project"]
    for shard in ("1/2", "2/2"):
        run(*words, "--shard", shard, "--model", _model(s3, captured), "--root", captured)
    raw = "experiments/two/inference/raw/residual/short"
    assert {name for name in of_bucket(s3, captured) if name.startswith(raw)} == {f"{raw}/{n}.pt" for n in (1, 2, 3)}
    kept = (".index", ".json")  # what is known of files, and the last summary
    assert not [name for name in of_bucket(s3, captured) if ".locks" in name and not name.endswith(kept)]


def _model(s3: Any, url: str) -> str:
    return str(json.loads(s3.cat_file(f"{url}/experiments/default/config.json"))["inference_model"])


def test_the_python_api_and_the_page_read_and_write(s3: Any, captured: str, tiny_folder: Path) -> None:
    from starlette.testclient import TestClient

    from tlcapture import Experiment, capture, load_model
    from tlcapture.page.server import page_app
    from tlcapture.storage.remote.roots import root_folder

    assert Experiment.list(captured) == ["default"]
    exp = Experiment("default", captured)
    cap = exp.captures["short"]["1"]
    assert cap.residual(1, "residual_out").shape[1] == 32
    assert torch.isfinite(torch.as_tensor(cap.project("tone/loud").trajectory)).all()
    assert set(exp.to_pandas("short")["prompt_id"].astype(str)) == {"1", "2", "3"}
    live = next(iter(capture(load_model(str(tiny_folder)), ["hello"], max_new_tokens=3)))
    saved = live.save(f"{captured}/experiments/default")
    assert f"experiments/default/inference/raw/residual/adhoc/{saved.prompt_id}.pt" in of_bucket(s3, captured)
    with pytest.raises(InputError, match=r"only --root can be a URL"):
        live.save(f"{captured}/x.pt")
    page = TestClient(page_app(root_folder(captured)), base_url="http://localhost")
    assert page.get("/api/root").json() == {"folder": captured, "option": f" --root {captured}"}
    assert page.get("/api/default/sets/short/1/attention").status_code == 200
    assert page.get("/api/default/sets/short/2/lens/1").status_code == 200
    assert "adhoc" in page.get("/api/experiments").json()[0]["prompt_sets"]


def test_the_page_shows_what_another_machine_captured(s3: Any, captured: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from starlette.testclient import TestClient

    from tlcapture.page import server
    from tlcapture.storage.remote.roots import root_folder

    monkeypatch.setattr(server, "FRESH", 0.0)
    page = TestClient(server.page_app(root_folder(captured)), base_url="http://localhost")
    assert [each["name"] for each in page.get("/api/experiments").json()] == ["default"]
    for path in s3.find(f"{captured}/experiments/default"):
        s3.copy(path, path.replace("/default/", "/copy/"))
    assert [each["name"] for each in page.get("/api/experiments").json()] == ["copy", "default"]


def test_notes_of_the_page_are_objects_of_the_store(s3: Any, captured: str) -> None:
    from starlette.testclient import TestClient

    from tlcapture.page.server import page_app
    from tlcapture.storage.remote.roots import root_folder

    page, own = TestClient(page_app(root_folder(captured)), base_url="http://127.0.0.1:8765"), "http://127.0.0.1:8765"
    path, headers = "/api/default/sets/short/1/notes", {"Origin": own}
    note = page.post(path, json={"start": 1, "stop": 2, "text": "here"}, headers=headers).json()
    changed = page.put(f"{path}/{note['id']}", json={"revision": 1, "text": "there"}, headers=headers).json()
    name = f"{captured}/experiments/default/notes/short/1_{note['id']}.json"
    assert json.loads(s3.cat_file(name)) == changed
    s3.pipe_file(name, json.dumps({**changed, "revision": 3, "text": "of another machine"}).encode())
    again = page.put(f"{path}/{note['id']}", json={"revision": 2, "text": "lost"}, headers=headers)
    assert (again.status_code, json.loads(s3.cat_file(name))["text"]) == (409, "of another machine")
    assert page.put(f"{path}/{note['id']}", json={"revision": 3}, headers=headers).json() == {}
    assert not s3.exists(name)


def test_what_cannot_be_read_is_kept_until_it_may_be_replaced(run: Run, s3: Any, captured: str) -> None:
    raw = f"{captured}/experiments/default/inference/raw/residual/short/2.pt"
    projection = f"{captured}/experiments/default/inference/tone/loud/residual_stream/short/2.json"
    words = ("capture", "--prompt-set", "short", "--attention", "--max-new-tokens", 6, "--root", captured)
    for path in (raw, projection):
        s3.pipe_file(path, b'"mine"')
    remote_roots.refresh(remote_roots.root_folder(captured))
    said = run(*words, code=1).output
    assert f"failed: short/2: {raw if raw in said else 's3://' + raw}" in said.replace("s3://s3://", "s3://")
    assert "/cache/" not in said
    assert (s3.cat_file(raw), s3.cat_file(projection)) == (b'"mine"', b'"mine"')
    assert "failed: short/2: s3://" in run("project", "--prompt-set", "short", "--root", captured, code=1).output
    run(*words, "--overwrite")
    assert zipfile.ZipFile(io.BytesIO(s3.cat_file(raw))).testzip() is None
    assert json.loads(s3.cat_file(projection))["metadata"]["prompt_id"] == "2"


def test_pictures_are_drawn_and_a_shell_opens_what_is_in_the_store(
    run: Run, captured: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[dict[str, Any]] = []
    monkeypatch.setattr("tlcapture.cli.shell._start", lambda namespace, banner: found.extend([namespace, banner]))
    run("shell", "--root", captured)
    namespace, banner = found
    assert len(namespace["captures"]["short"]["1"].response.tokens) == 6
    assert namespace["exp"].model.n_layers == 3
    assert captured in str(banner) or "/cache/" not in str(banner)
    with unrendered_figures():
        output = run("view", "--png", tmp_path / "pictures", "--root", captured).output
        run("project", "--prompt-set", "short", "--plot", tmp_path / "plots", "--root", captured)
    assert f"of short in {tmp_path / 'pictures'}" in output
    assert len(list((tmp_path / "pictures").rglob("*.png"))) >= 3
    assert len(list((tmp_path / "plots").rglob("*.png"))) >= 3


@pytest.mark.parametrize("form", ["parquet", "safetensors", "json"])
def test_an_experiment_is_exported_in_other_formats_and_imported(
    run: Run, s3: Any, captured: str, tmp_path: Path, form: str
) -> None:
    run(
        "export",
        "--to",
        tmp_path / "out",
        "--activations",
        "all",
        "--points",
        "all",
        "--format",
        form,
        "--root",
        captured,
    )
    run("import", tmp_path / "out", "--experiment", "back", "--root", captured)
    found = {name: data for name, data in contents(of_bucket(s3, captured)).items() if "data.pkl" not in name}
    back = {name.replace("/back/", "/default/"): data for name, data in found.items() if "experiments/back/inf" in name}
    assert len(back) > 20
    assert back == {name: data for name, data in found.items() if name in back}


def test_an_experiment_is_exported_viewed_and_imported(run: Run, s3: Any, captured: str, tmp_path: Path) -> None:
    assert "left out" not in run("view", "--export", tmp_path / "page.html", "--root", captured).output
    run("export", "--to", tmp_path / "out", "--activations", "all", "--root", captured)
    run("import", tmp_path / "out", "--experiment", "back", "--root", captured)
    found = of_bucket(s3, captured)
    back = contents({name: found[name] for name in found if name.startswith("experiments/back/inference/tone")})
    assert len(back) == 6
    assert back == {
        name.replace("/default/", "/back/"): data
        for name, data in contents(found).items()
        if name.startswith("experiments/default/inference/tone")
    }
    assert not [name for name in found if ".incomplete" in name or ".tmp" in name]


def test_an_import_that_was_killed_is_refused_and_can_be_repeated(
    run: Run, s3: Any, captured: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run("export", "--to", tmp_path / "out", "--root", captured)
    s3.pipe_file(f"{captured}/experiments/back/.incomplete", b"")
    s3.pipe_file(f"{captured}/experiments/back/runs/1.json", b"{}")
    monkeypatch.setattr(remote_roots, "_mounts", {})
    assert "its import is not complete" in run("view", "--experiment", "back", "--root", captured, code=2).output
    run("import", tmp_path / "out", "--experiment", "back", "--root", captured)
    assert f"{captured}/experiments/back/runs/1.json".removeprefix("s3://") not in s3.find(captured)
    run("list", "--experiment", "back", "--root", captured)


def test_a_capture_that_is_killed_leaves_whole_files_and_is_resumed(
    run: Run, s3: Any, captured: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`kill -9` while it writes: every object is a whole file, and --skip-existing makes the others."""
    words = ["capture", "--prompt-set", "many", "--attention", "--logit-lens", "--max-new-tokens", "8"]
    prompts = [{"id": str(n), "text": f"prompt number {n}"} for n in range(16)]
    s3.pipe_file(f"{captured}/datasets/inference/many.json", json.dumps({"name": "many", "prompts": prompts}).encode())
    raw = f"{captured}/experiments/default/inference/raw/residual/many"
    command = [sys.executable, "-m", "tlcapture", *words, "--root", captured, "--batch-size", "1"]
    # No fork, in which fsspec's older versions wait for the thread of this process.
    environment = {**os.environ, "TLCAPTURE_CACHE": str(tmp_path / "another cache")}
    with (tmp_path / "output").open("w") as output:
        running = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
        while running.poll() is None and not (s3.exists(raw) and len(s3.find(raw)) > 2):
            time.sleep(0.02)
        running.kill()
    assert running.wait() == -signal.SIGKILL, (tmp_path / "output").read_text()
    assert s3.exists(f"{captured}/experiments/default/.locks/captures-of-many.lock")
    for name, data in of_bucket(s3, captured).items():
        if name.endswith(".json"):
            json.loads(data)
        elif name.endswith(".pt"):
            assert zipfile.ZipFile(io.BytesIO(data)).testzip() is None
    assert len(s3.find(raw)) < 16
    monkeypatch.setattr(remote_roots, "_mounts", {})  # as in another process
    run(*words, "--skip-existing", "--root", captured)
    names = [path.rpartition("/")[2] for path in s3.find(raw)]
    assert sorted(names) == sorted(f"{n}.pt" for n in range(16))
    assert not s3.exists(f"{captured}/experiments/default/.locks/captures-of-many.lock")
    for kind in ("attention", "logit_lens"):
        found = s3.glob(f"{captured}/experiments/default/analysis/per_token/many/*_{kind}.json")
        assert len(found) == 16


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("capture --prompt x --executor ray", "--executor ray needs a root that is a folder on every node, not s3://"),
        (
            "capture --prompt x --log-file s3://b/x.log",
            "invalid value for '--log-file': s3://b/x.log: expected a local path",
        ),
        (
            "export --to s3://b/out",
            "invalid value for '--to': s3://b/out: expected a local path: only --root can be a URL",
        ),
        ("view --export s3://b/x.html", "s3://b/x.html: expected a local path"),
        ("view --png s3://b/x", "s3://b/x: expected a local path"),
        ("project --plot s3://b/x", "s3://b/x: expected a local path"),
        ("import s3://b/x", "s3://b/x: expected a local path"),
        ("view --experiment none", "no experiment 'none': expected the folder s3://"),
        ("capture --prompt-set none", "no prompt set 'none': looked for s3://"),
    ],
)
def test_what_a_remote_root_cannot_do_is_refused_in_one_line(
    run: Run, s3: Any, bucket: str, words: str, said: str
) -> None:
    s3.pipe_file(f"{bucket}/experiments/default/config.json", b"{}")
    result = run(*words.split(), "--root", bucket, code=2)
    assert said in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert "/cache/" not in result.output


def test_settings_and_variables_name_a_remote_root(
    run: Run, s3: Any, captured: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = b'seed = 1\n[list]\nexperiment = "default"\n[capture]\nmax-new-tokens = 2\n'
    s3.pipe_file(f"{captured}/tlcapture.toml", settings)
    monkeypatch.setattr(remote_roots, "_mounts", {})
    assert "short" in run("list", "--root", captured).output
    run("capture", "--prompt-set", "other", "--root", captured)
    records = {name: json.loads(data) for name, data in of_bucket(s3, captured).items() if "/runs/" in name}
    assert records[max(records)]["arguments"]["max_new_tokens"] == 2
    monkeypatch.setenv("TLCAPTURE_ROOT", captured)
    assert "short" in run("list").output
    assert "--root" not in run("list").output
    monkeypatch.delenv("TLCAPTURE_ROOT")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tlcapture.toml").write_text(f'root = "{captured}"\n')
    assert "default" in run("list").output


def test_the_examples_of_the_page_run(
    run: Run, s3: Any, bucket: str, tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (Path(__file__).parents[2] / "docs" / "remote-roots.md").read_text(encoding="utf-8")
    text = text.replace("s3://my-bucket/work", bucket)
    s3.pipe_file(f"{bucket}/tlcapture.toml", f'model = "{tiny_folder}"\n'.encode())
    monkeypatch.chdir(tmp_path)
    for language, block in re.findall(r"```(bash|python)\n(.*?)```", text, re.DOTALL):
        if language == "python":
            exec(block, {})
        for words in commands_of(f"```bash\n{block}```") if language == "bash" else ():
            run(*words)
    assert (tmp_path / "tides.html").stat().st_size > 10_000
    assert "experiments/tides/inference/raw/residual/adhoc/1.pt" in of_bucket(s3, bucket)
