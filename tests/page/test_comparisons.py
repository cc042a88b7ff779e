"""Comparisons on the page: values of the files, summaries over a set, and files that are wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from tests.page.conftest import HOSTILE, N_LAYERS, N_PROMPT, TOKENS, TRAIT, write
from tlcapture.commands.comparing.summary import SavedComparisons
from tlcapture.errors import InputError, StorageError
from tlcapture.page.contents import Contents
from tlcapture.page.export import export_page
from tlcapture.page.missing import MissingError
from tlcapture.page.server import page_app

OTHER = "exp@lora"


def comparison(prompt: int, sample: int | None = None, shift: float = 1.0) -> dict[str, Any]:
    n = len(TOKENS)
    trait = {"layer": 1, "method": "probe", "difference": [0.0, *[shift] * (n - 1)], "mean_a": 2.0, "mean_b": 2 + shift}
    return {
        "a": "exp/odd",
        "b": "exp/odd@lora",
        "tokens": TOKENS,
        "n_prompt_tokens": N_PROMPT,
        "traits": {TRAIT: trait},
        "residual": {"cosine": [[0.5, 0.25, 1.0]] * n, "norm_ratio": [None, *[[1.0, 2.0, None]] * (n - 1)]},
        "kl": [0.0, 0.0, 0.1, 0.5, 0.2, None],
        "continuations": {"a": [HOSTILE], "b": ["b"]},
        "metadata": {
            "prompt_set": "odd",
            "prompt_id": str(prompt),
            "n_layers": N_LAYERS,
            **({} if sample is None else {"sample": sample}),
        },
    }


@pytest.fixture
def compared(page_root: Path) -> Path:
    folder = page_root / "experiments" / "exp" / "analysis" / "compare" / OTHER / "odd"
    for prompt in (1, 2):
        write(folder / f"{prompt}.json", comparison(prompt, shift=float(prompt)))
    return folder


def test_comparisons_are_listed_and_shown_as_they_are(page_root: Path, compared: Path) -> None:
    contents = Contents(page_root)
    assert contents.comparisons("exp") == [{"other": OTHER, "prompt_set": "odd"}]
    assert contents.comparison("exp", OTHER, "odd", "1") == comparison(1)


def test_a_summary_is_of_all_prompts_and_counts_the_samples_of_one_once(page_root: Path, compared: Path) -> None:
    for sample, shift in ((1, 3.0), (2, 7.0)):
        write(compared / f"3.s{sample}.json", comparison(3, sample, shift))
    found = Contents(page_root).compared_set("exp", OTHER, "odd")
    assert (found["n_prompts"], found["n_files"], found["n_cut"]) == (3, 4, 4)
    assert found["ids"] == ["1", "2", "3.s1", "3.s2"]
    assert found["traits"][TRAIT]["mean"] == pytest.approx((1 + 2 + 5) / 3)
    assert found["traits"][TRAIT]["n"] == 3
    assert found["kl"]["mean"] == pytest.approx((0.1 + 0.5 + 0.2) / 3)
    assert found["cosine"] == [0.5, 0.25, 1.0]
    assert found["norm_ratio"] == [1.0, 2.0, None]
    assert [each["index"] for each in found["tokens"]][:4] == [3, 3, 3, 3]


def test_the_comparisons_of_a_set_are_read_again_only_when_a_file_changes(
    page_root: Path, compared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    reads = SavedComparisons.__getitem__
    monkeypatch.setattr(SavedComparisons, "__getitem__", lambda files, name: read.append(name) or reads(files, name))
    contents = Contents(page_root)
    first = contents.compared_set("exp", OTHER, "odd")
    assert contents.compared_set("exp", OTHER, "odd") == first and read == ["1", "2"]
    write(compared / "1.json", comparison(1, shift=5.0))
    assert contents.compared_set("exp", OTHER, "odd")["traits"][TRAIT]["mean"] == 3.5 and read == ["1", "2"] * 2
    raw = page_root / "experiments/exp/inference/raw/residual"
    shutil.copytree(raw / "odd", raw / "odd@lora")  # the other captures, which may be newer ones
    contents.compared_set("exp", OTHER, "odd")
    assert len(read) == 6


def test_captures_that_share_no_token_of_the_response_are_counted(page_root: Path, compared: Path) -> None:
    apart = comparison(3, shift=9.0)
    apart["n_prompt_tokens"] = len(apart["tokens"])
    write(compared / "3.json", apart)
    found = Contents(page_root).compared_set("exp", OTHER, "odd")
    assert (found["n_files"], found["n_apart"]) == (3, 1)
    assert found["traits"][TRAIT]["mean"] == pytest.approx((1 + 2 + 9) / 3), "of whole responses"


def test_a_damaged_file_is_a_problem_of_the_set_and_an_error_of_its_own(page_root: Path, compared: Path) -> None:
    broken = comparison(2)
    broken["kl"] = broken["kl"][:-1]
    write(compared / "2.json", broken)
    contents = Contents(page_root)
    (problem,) = contents.compared_set("exp", OTHER, "odd")["problems"]
    assert problem.endswith("not a valid comparison file: kl has 5 tokens, but tokens has 6")
    with pytest.raises(StorageError, match="kl has 5 tokens"):
        contents.comparison("exp", OTHER, "odd", "2")


def test_what_was_not_compared_names_the_command(page_root: Path) -> None:
    contents = Contents(page_root)
    assert contents.comparisons("exp") == []
    for ask in (
        lambda: contents.compared_set("exp", OTHER, "odd"),
        lambda: contents.comparison("exp", OTHER, "odd", "1"),
    ):
        with pytest.raises(MissingError) as caught:
            ask()
        assert caught.value.command == ""
        assert "capture its prompts again" in caught.value.what
    raw = page_root / "experiments/exp/inference/raw/residual"
    shutil.copytree(raw / "odd", raw / "odd@lora")
    assert contents.uncompared("exp", "odd")["command"] == "tlcapture compare exp/odd exp/odd@lora"


@pytest.mark.parametrize("other", ["..", "a/b", "exp@", "exp@../x", "+odd", "exp+"])
def test_a_name_that_leads_out_is_refused(other: str, page_root: Path) -> None:
    with pytest.raises(InputError, match="does not name captures that were compared"):
        Contents(page_root).comparison("exp", other, "odd", "1")


def test_the_server_and_an_exported_page_have_comparisons(page_root: Path, compared: Path, tmp_path: Path) -> None:
    client = TestClient(page_app(page_root), base_url="http://127.0.0.1:8765")
    assert client.get("/api/exp/compared").json() == [{"other": OTHER, "prompt_set": "odd"}]
    assert client.get("/api/exp/compared/exp%40lora/odd/1").json() == json.loads(json.dumps(comparison(1)))
    target = tmp_path / "page.html"
    assert export_page(page_root, "exp", ["odd"], target) == []
    text = target.read_text(encoding="utf-8")
    for path in ("exp/compared", f"exp/compared/{OTHER}/odd", f"exp/compared/{OTHER}/odd/2"):
        assert f'id="data:{path}"' in text
    assert HOSTILE not in text
