"""The exported page: one file with the data that fits and a note about omitted data."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from tests.page.conftest import TOKENS, write_experiment
from tlcapture.errors import InputError
from tlcapture.page.export import export_page

_ELEMENT = re.compile(r'<script type="text/plain" id="data:([^"]*)">([^<]*)</script>')


def carried(page: str) -> dict[str, object]:
    return {path: json.loads(gzip.decompress(base64.b64decode(data))) for path, data in _ELEMENT.findall(page)}


def manifest(page: str) -> dict[str, object]:
    match = re.search(r'id="exported">([^<]*)<', page)
    assert match
    return dict(json.loads(base64.b64decode(match[1])))


def test_all_data_is_in_the_file(page_root: Path) -> None:
    target = page_root / "page.html"
    assert export_page(page_root, "exp", ["odd"], target) == []
    page = target.read_text(encoding="utf-8")
    found = carried(page)
    assert found["exp/sets/odd/1"]["tokens"] == TOKENS  # type: ignore[index]
    assert {f"exp/sets/odd/1/attention/{token}" for token in range(len(TOKENS))} < set(found)
    assert "exp/averages/odd/style/odd/residual" in found
    assert manifest(page)["missing"]["exp/sets/odd/2/lens"]["command"].endswith("--logit-lens --replay")  # type: ignore[index]


def test_a_trait_with_the_vectors_of_another_experiment_has_none_of_its_own(tmp_path: Path) -> None:
    folder = write_experiment(tmp_path) / "experiments/exp"
    shutil.copytree(folder / "inference/style/odd", folder / "inference/style/lent")
    target = tmp_path / "page.html"
    export_page(tmp_path, "exp", ["odd"], target)
    missing = manifest(target.read_text(encoding="utf-8"))["missing"]
    assert missing["exp/vectors/style/lent"]["what"] == "no vectors of style/lent"  # type: ignore[index]


def test_data_is_not_parsed_as_markup_and_only_the_scripts_of_the_page_can_run(page_root: Path) -> None:
    target = page_root / "page.html"
    export_page(page_root, "exp", ["odd"], target)
    page = target.read_text(encoding="utf-8")
    assert "'owned'" not in page
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)
    assert policy
    assert "default-src 'none'" in policy[1]
    assert "connect-src" not in policy[1]
    allowed = set(re.findall(r"'sha256-([^']*)'", policy[1]))
    scripts = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    digests = {base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts}
    assert digests == allowed


def test_data_that_does_not_fit_is_omitted_and_listed(page_root: Path) -> None:
    target = page_root / "page.html"
    left_out = export_page(page_root, "exp", ["odd"], target, mebibytes=0.003)
    assert "attention of odd/1" in left_out
    page = target.read_text(encoding="utf-8")
    assert "exp/sets/odd/1" in carried(page)
    assert "exp/sets/odd/1/attention/0" not in carried(page)
    assert "attention of odd/1" in str(manifest(page)["note"])


def test_a_limit_below_the_size_of_the_overview_is_an_error_and_writes_nothing(page_root: Path) -> None:
    target = page_root / "page.html"
    with pytest.raises(InputError, match="--max-size"):
        export_page(page_root, "exp", ["odd"], target, mebibytes=0.0001)
    assert not target.exists()


def test_the_command_exports_and_refuses_invalid_options(tlcapture: Callable[..., Result], root: Path) -> None:
    write_experiment(root)
    done = tlcapture("view", "--experiment", "exp", "--export", root / "page.html")
    assert done.exit_code == 0, done.output
    assert "wrote" in done.stdout
    assert (root / "page.html").stat().st_size > 4e6
    for words, expected in (
        (["--experiment", "nix"], "no experiment 'nix'"),
        (["--experiment", "exp", "--prompt-set", "nix"], "captured sets: odd"),
        (["--experiment", "exp", "--export", "a.html", "--port", "9000"], "--port applies to serving"),
    ):
        refused = tlcapture("view", *words)
        assert refused.exit_code == 2
        assert expected in refused.stderr


def test_the_command_writes_pictures(tlcapture: Callable[..., Result], root: Path) -> None:
    write_experiment(root)
    done = tlcapture("view", "--experiment", "exp", "--png", root / "pictures")
    assert done.exit_code == 0, done.output
    assert len(list((root / "pictures").rglob("*.png"))) == 2


def test_a_raw_file_of_another_tool_is_named_and_the_rest_is_exported(
    tlcapture: Callable[..., Result], root: Path
) -> None:
    write_experiment(root)
    raw = root / "experiments/exp/inference/raw/residual/odd/7.pt"
    raw.parent.mkdir(parents=True, exist_ok=True)
    raw.write_bytes(b"of another tool")
    done = tlcapture("view", "--experiment", "exp", "--export", root / "page.html")
    assert done.exit_code == 0
    (line,) = [line for line in done.stderr.splitlines() if "7.pt" in line]
    assert line.startswith(f"not shown: {raw}: ")
    assert "exp/sets/odd/1" in carried((root / "page.html").read_text())


READ = {
    "a projection": "inference/style/odd/residual_stream/odd/1.json",
    "attention": "analysis/per_token/odd/1_attention.json",
    "the logit lens": "analysis/per_token/odd/1_logit_lens.json",
    "internals": "inference/raw/internals/odd/1_L1.pt",
    "the evaluation": "extraction/extraction_evaluation.json",
    "steering": "steering/style/odd/results.json",
    "what vectors are of": "extraction/style/odd/vectors/metadata.json",
    "a comparison": "analysis/compare/exp@lora/odd/1.json",
    "a note": "notes/odd/1_0123456789ab.json",
}


@pytest.mark.parametrize("file", READ.values(), ids=READ.keys())
def test_every_damaged_file_is_named_on_the_terminal_and_on_the_page(
    tlcapture: Callable[..., Result], root: Path, file: str
) -> None:
    damaged = write_experiment(root) / "experiments/exp" / file
    damaged.parent.mkdir(parents=True, exist_ok=True)
    damaged.write_bytes(b"{damaged")
    done = tlcapture("view", "--experiment", "exp", "--export", root / "page.html")
    named = [line for line in done.stderr.splitlines() if str(damaged) in line]
    assert done.exit_code == 1, done.output
    assert len(named) == 1 and named[0].startswith(f"failed: {damaged}: "), done.stderr
    page = (root / "page.html").read_text(encoding="utf-8")
    told = json.dumps([carried(page), manifest(page)])
    assert f"experiments/exp/{file}: " in told and str(damaged) not in told
