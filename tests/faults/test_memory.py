"""Too little memory: batches become smaller, and only a prompt that does not fit in memory fails."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest

from tests import tiny
from tests.cli.conftest import make_prompt_set
from tests.evidence import Evidence
from tests.faults.commands import Command, contents

LENGTH, TOO_LONG = 1200, 3900
WORDS = ("--experiment", "exp", "--prompt-set", "long", "--engine", "bridge", "--no-chat-template", "--temperature", 0)


@pytest.fixture(scope="module")
def long_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import transformers

    from tlcapture.models.loading import load_model

    folder = tmp_path_factory.mktemp("long")
    config = tiny.hf_model("llama").config
    longer = transformers.LlamaConfig(**{**config.to_dict(), "max_position_embeddings": 4096})
    transformers.AutoModelForCausalLM.from_config(longer).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    load_model(str(folder), engine="bridge")  # so that a fork has everything imported
    return folder


def limit_memory(megabytes: int) -> None:
    """Leave this process so much memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + megabytes * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def test_batches_are_halved_and_only_a_prompt_that_does_not_fit_fails(
    long_model: Path, tmp_path: Path, evidence: Evidence
) -> None:
    # Attention scores take 4 heads x 1200 x 1200 x 4 bytes = 23 MB per prompt, and 243 MB for the longest prompt.
    make_prompt_set(tmp_path, "long", ["a" * LENGTH, "b" * LENGTH, "c" * LENGTH, "d" * LENGTH, "e" * TOO_LONG])
    words = ("capture", *WORDS, "--model", long_model, "--max-new-tokens", 2)
    enough = Command(tmp_path / "output", *words, "--root", tmp_path, "--limit", 4, "--batch-size", 1).end()
    assert enough.code == 0, enough.stderr
    raw = tmp_path / "experiments" / "exp" / "inference" / "raw" / "residual" / "long"
    expected = {path.name: contents_of(path) for path in raw.glob("*.pt")}
    for path in raw.glob("*.pt"):
        path.unlink()
    log = tmp_path / "log.txt"
    command = (*words, "--root", tmp_path, "--batch-size", 5, "--log-file", log)
    ended = Command(tmp_path / "output", *command, before=lambda: limit_memory(400)).end()
    assert ended.code == 1, ended
    assert "Traceback" not in ended.stderr
    assert "failed: long/5: out of memory with 3901 prompt tokens, alone in its batch" in ended.stderr
    halved = log.read_text().count("out of memory: going on with batches of")
    assert halved >= 2
    assert {path.name for path in raw.glob("*.pt")} == {"1.pt", "2.pt", "3.pt", "4.pt"}
    assert {path.name: contents_of(path) for path in raw.glob("*.pt")} == expected
    evidence.survived(
        "memory runs out in a batch of 5 prompts, one of which does not fit on its own",
        "400 MB left to the process",
        f"batches halved {halved} times; that prompt fails by name, the results of the other four are unchanged",
    )


def contents_of(path: Path) -> list[int]:
    from tlcapture.captures.capture import Capture

    return Capture.open(path).token_ids


def test_an_empty_folder_has_no_contents(tmp_path: Path) -> None:
    assert contents(tmp_path) == {}
