"""Models by name: the hub cache before the network, an answer within seconds without one, revisions, GGUF files.

The hub is a local server with the two answers that a client needs, or one that never answers. Each load runs in a
process of its own, since the tests themselves are offline.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch

from tests import tiny
from tests.gguf_writer import write_gguf
from tlcapture.errors import ModelError
from tlcapture.models.checkpoints import embedded
from tlcapture.models.checkpoints.sources import check_name, commit_of, source_of
from tlcapture.models.loading import load_model

TOP = Path(__file__).parents[1]
COMMITS = {"main": "a" * 40, "v2": "b" * 40}
LOAD = f"""
from tlcapture.models.loading import load_model
for engine in {tiny.ENGINES!r}:
    model = load_model("org/tiny", engine=engine)
    print(model.name, model.revision)
"""
FIND = "from tlcapture.models.checkpoints.sources import source_of; print(source_of({name!r}))"
CHECK = "from tlcapture.models.checkpoints.sources import check_name; check_name({name!r})"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two checkpoints, which differ in their weights, by revision."""
    root = tmp_path_factory.mktemp("revisions")
    for revision, architecture in (("main", "llama"), ("v2", "qwen2")):
        tiny.hf_model(architecture).save_pretrained(root / revision)
        tiny.tokenizer().save_pretrained(root / revision)
    return {revision: root / revision for revision in COMMITS}


def put_in_cache(cache: Path, name: str, folder: Path, revision: str = "main") -> Path:
    """What the hub client leaves in its cache."""
    repository = cache / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True, exist_ok=True)
    (repository / "refs" / revision).write_text(COMMITS[revision])
    return Path(copytree(folder, repository / "snapshots" / COMMITS[revision]))


@dataclass
class Hub:
    """A server with a repository `org/tiny`, and the paths that it was asked for."""

    address: str
    asked: list[str] = field(default_factory=list)


@pytest.fixture
def hub(folders: dict[str, Path]) -> Iterator[Hub]:
    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self._reply(with_content=False)

        def do_GET(self) -> None:
            self._reply(with_content=True)

        def log_message(self, format: str, *args: object) -> None:
            pass

        def _reply(self, *, with_content: bool) -> None:
            found.asked.append(self.path)
            revisions = {**{commit: name for name, commit in COMMITS.items()}, **{name: name for name in COMMITS}}
            parts = self.path.partition("?")[0].strip("/").split("/")
            if parts[:4] == ["api", "models", "org", "tiny"] and len(parts) == 6 and parts[5] in revisions:
                revision = revisions[parts[5]]
                files = [{"rfilename": path.name} for path in folders[revision].iterdir()]
                listing = [
                    {"type": "file", "path": path.name, "size": path.stat().st_size, "oid": "0" * 40}
                    for path in folders[revision].iterdir()
                ]
                answer = {"id": "org/tiny", "sha": COMMITS[revision], "siblings": files}
                content = json.dumps(listing if parts[4] == "tree" else answer).encode()
                self._send(200, content, {"Content-Type": "application/json"}, with_content)
            elif parts[:3] == ["org", "tiny", "resolve"] and parts[3] in revisions:
                content = (folders[revisions[parts[3]]] / parts[4]).read_bytes()
                headers = {"ETag": f'"{parts[4]}-{len(content)}"', "X-Repo-Commit": COMMITS[revisions[parts[3]]]}
                self._send(200, content, headers, with_content)
            else:
                self._send(404, b"", {"X-Error-Code": "RevisionNotFound"}, with_content)

        def _send(self, status: int, content: bytes, headers: dict[str, str], with_content: bool) -> None:
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(key, value)
            self.end_headers()
            if with_content:
                self.wfile.write(content)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    found = Hub(f"http://127.0.0.1:{server.server_port}")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield found
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def silent() -> Iterator[str]:
    """The address of a server that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


def run_python(code: str, cache: Path, endpoint: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key not in ("HF_HUB_OFFLINE", "HF_TOKEN")}
    environment |= {"HF_ENDPOINT": endpoint, "HF_HUB_CACHE": str(cache), "HF_HOME": str(cache / "home")}
    environment |= {"PYTHONPATH": str(TOP), "HF_HUB_DISABLE_XET": "1"}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=environment)


def command(*words: str) -> str:
    return f"from tlcapture.cli.main import main; main({words!r})"


@pytest.mark.parametrize("kind", ["refused", "silent", "unknown host"])
def test_without_a_network_a_hub_name_is_refused_in_one_line_within_seconds(
    kind: str, silent: str, tmp_path: Path, folders: dict[str, Path]
) -> None:
    endpoint = {"refused": "http://127.0.0.1:1", "silent": silent, "unknown host": "http://no-such-host.invalid"}[kind]
    put_in_cache(tmp_path / "cache", "google/gemma-2-2b-it", folders["main"])
    put_in_cache(tmp_path / "cache", "openai/whisper", folders["main"])
    words = ("capture", "--experiment", "e", "--root", str(tmp_path), "--model", "google/gemma-2-2b", "--prompt", "hi")
    start = time.monotonic()
    done = run_python(command(*words), tmp_path / "cache", endpoint)
    assert time.monotonic() - start < 6  # 3 seconds, on a machine that is busy with other tests
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: model 'google/gemma-2-2b' is neither a folder nor in the hub cache")
    assert "'smollm2' (embedded)" in line
    assert line.endswith("in the hub cache: google/gemma-2-2b-it")
    assert not (tmp_path / "experiments").exists()


@dataclass(frozen=True)
class Loads:
    """What a process without a network did with cached models, in an experiment of its root."""

    done: subprocess.CompletedProcess[str]
    root: Path


@pytest.fixture(scope="module")
def loads(silent: str, tmp_path_factory: pytest.TempPathFactory, folders: dict[str, Path]) -> Loads:
    """The loads of `LOAD`, and then a capture with another revision, in one process: it takes long to import all."""
    root = tmp_path_factory.mktemp("loads")
    for revision, folder in folders.items():
        put_in_cache(root / "cache", "org/tiny", folder, revision)
    words = ["capture", "--experiment", "e", "--root", str(root), "--prompt", "hi", "--max-new-tokens", "2"]
    code = f"{LOAD}\n{command(*words, '--model', 'org/tiny', '--revision', 'v2')}"
    return Loads(run_python(code, root / "cache", silent), root)


def test_a_cached_model_loads_without_asking_the_network_and_its_commit_is_recorded(loads: Loads) -> None:
    n_engines = len(tiny.ENGINES)
    assert loads.done.stdout.split()[: 2 * n_engines] == ["org/tiny", COMMITS["main"]] * n_engines, loads.done.stderr


def test_the_cached_ref_wins_and_a_revision_that_is_not_cached_asks(
    hub: Hub, tmp_path: Path, folders: dict[str, Path]
) -> None:
    snapshot = put_in_cache(tmp_path, "org/tiny", folders["main"])
    assert found(hub, tmp_path, "org/tiny") == snapshot
    assert hub.asked == []
    assert found(hub, tmp_path, "org/tiny@v2") == snapshot.with_name(COMMITS["v2"])
    n_asked = len(hub.asked)
    assert n_asked
    for name in ("org/tiny@v2", f"org/tiny@{COMMITS['v2']}"):
        assert found(hub, tmp_path, name) == snapshot.with_name(COMMITS["v2"])
    assert found(hub, tmp_path, "org/tiny") == snapshot
    assert len(hub.asked) == n_asked


def test_a_model_that_is_not_cached_is_downloaded(hub: Hub, tmp_path: Path, folders: dict[str, Path]) -> None:
    snapshot = found(hub, tmp_path, "org/tiny")
    assert commit_of(str(snapshot)) == COMMITS["main"]
    for file in folders["main"].iterdir():
        if file.name != ".gitattributes":
            assert (snapshot / file.name).read_bytes() == file.read_bytes()


def test_an_incomplete_snapshot_is_completed_or_refused(hub: Hub, tmp_path: Path, folders: dict[str, Path]) -> None:
    snapshot = put_in_cache(tmp_path, "org/tiny", folders["main"])
    (snapshot / "model.safetensors").unlink()
    done = run_python(CHECK.format(name="org/tiny"), tmp_path, "http://127.0.0.1:1")
    assert "is incomplete in the hub cache, and http://127.0.0.1:1 cannot be reached" in done.stderr
    assert found(hub, tmp_path, "org/tiny") == snapshot
    assert (snapshot / "model.safetensors").read_bytes() == (folders["main"] / "model.safetensors").read_bytes()


def found(hub: Hub, cache: Path, name: str) -> Path:
    """The folder that a name leads to."""
    done = run_python(FIND.format(name=name), cache, hub.address)
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.strip())


@pytest.mark.parametrize("name", ["org/tiny@v3", "org/none"])
def test_what_the_hub_does_not_have_is_refused(name: str, hub: Hub, tmp_path: Path) -> None:
    done = run_python(CHECK.format(name=name), tmp_path, hub.address)
    assert "has no such model or revision" in done.stderr.splitlines()[-1]


def test_the_option_revision_is_part_of_the_recorded_name(loads: Loads) -> None:
    assert loads.done.returncode == 0, loads.done.stderr
    folder = loads.root / "experiments" / "e"
    assert json.loads((folder / "config.json").read_text())["inference_model"] == "org/tiny@v2"
    raw = torch.load(folder / "inference/raw/residual/adhoc/1.pt", weights_only=True)
    assert raw["metadata"]["model_revision"] == COMMITS["v2"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("./nowhere", "no such folder"),
        ("~/nowhere/at/all", "no such folder"),
        ("nowhere.gguf", "no such file: expected a GGUF file"),
        ("org/model@", "expected a branch, a tag or a commit after '@'"),
        ("org/model@../../elsewhere", "expected a branch, a tag or a commit after '@'"),
        ("smollm2@main", "has no revisions"),
        (f"{TOP}@main", "local files have no revisions"),
        (str(TOP / "docs"), "it has no config.json"),
        (str(TOP / "README.md"), "not a model"),
    ],
)
def test_a_name_that_cannot_be_a_model_is_refused_in_one_line(name: str, expected: str) -> None:
    for refusing in (check_name, source_of, load_model):
        with pytest.raises(ModelError) as caught:
            refusing(name)
        assert expected in str(caught.value)
        assert "\n" not in str(caught.value)


def test_only_folders_of_the_hub_cache_have_a_commit(tmp_path: Path, smollm2: Any) -> None:
    assert commit_of(str(tmp_path / ("c" * 40))) == "c" * 40
    assert commit_of(str(tmp_path)) is None
    assert smollm2.revision is None


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small GGUF file, written with the gguf package from the weights of a tiny Llama."""
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", tiny.hf_model("llama"))


@pytest.mark.parametrize("given", ["file", "folder"])
def test_a_gguf_file_or_its_folder_equals_the_weights_that_it_was_written_from(
    given: str, gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TLCAPTURE_CACHE", str(tmp_path))
    model = load_model(str(gguf if given == "file" else gguf.parent))
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    with torch.no_grad():
        expected = tiny.hf_model("llama")(ids).logits
    last = f"blocks.{model.n_layers - 1}.hook_resid_post"
    cache = model.step(ids, torch.ones_like(ids), model.start(1), {last}, want_logits=False).cache
    torch.testing.assert_close(model.unembed(cache[last]), expected, rtol=1e-4, atol=1e-4)
    (converted,) = {path.parent for path in tmp_path.rglob("config.json")}
    before = {path: path.stat().st_mtime_ns for path in converted.iterdir()}
    load_model(str(gguf))
    assert {path: path.stat().st_mtime_ns for path in converted.iterdir()} == before


@pytest.mark.parametrize("changed", ["weights", "metadata"])
def test_gguf_files_of_equal_name_and_size_are_not_confused(
    changed: str, gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TLCAPTURE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(embedded, "_HASHED", 2**12)  # of files that are larger than what is hashed
    other = tmp_path / gguf.name
    data = bytearray(gguf.read_bytes())
    if changed == "weights":
        data[-4:] = torch.tensor([0.5]).numpy().tobytes()
    else:
        at = data.index(b"tokenizer.ggml.eos_token_id") + len("tokenizer.ggml.eos_token_id") + 4
        data[at : at + 4] = (3).to_bytes(4, "little")
    other.write_bytes(data)
    assert source_of(str(other)) != source_of(str(gguf))


def test_a_damaged_gguf_file_and_a_folder_with_several_are_refused_in_one_line(gguf: Path, tmp_path: Path) -> None:
    damaged, whole = tmp_path / "damaged.gguf", gguf.read_bytes()
    for content, fault in (
        (whole[:1000], r"damaged or cut off \(1000 bytes\): fetch it again"),
        (whole[:-100], r"damaged or cut off \(\d+ bytes\): fetch it again"),
        (b"hello" * 99, "not a GGUF file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a pointer of Git LFS"),
        (whole[:4] + whole[7:3:-1] + whole[8:], "a GGUF file for big-endian machines, which is not read"),
        (whole.replace(b"llama", b"other"), "transformers cannot read this GGUF file"),
    ):
        damaged.write_bytes(content)
        with pytest.raises(ModelError, match=rf"damaged\.gguf: {fault}") as caught:
            source_of(str(damaged))
        assert "\n" not in str(caught.value)
    (tmp_path / "second.gguf").touch()
    with pytest.raises(ModelError, match=r"several GGUF files: name one: damaged\.gguf, second\.gguf"):
        check_name(str(tmp_path))


def test_a_misspelt_embedded_model_is_answered_by_its_name() -> None:
    with pytest.raises(ModelError, match="did you mean 'smollm2'"):
        source_of("smolm2")
