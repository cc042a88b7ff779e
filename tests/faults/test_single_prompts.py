"""A prompt that fails does not stop the others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests import tiny
from tests.cli.conftest import make_prompt_set
from tests.evidence import Evidence
from tests.faults.commands import Command, contents

TEXTS = {"fine": "hello there", "nan": "Zebra", "long": "x" * 400, "refused": "secret", "also": "what?"}
WHY = {
    "nan": "the model's logits are NaN or inf at token",
    "long": "does not fit: ",
    "refused": "the model's chat template refuses the prompt",
}
TEMPLATE = (
    "{% for message in messages %}{% if 'secret' in message['content'] %}{{ raise_exception('no secrets') }}{% endif %}"
    "{% endfor %}" + tiny.CHAT_TEMPLATE
)


@pytest.fixture(scope="module")
def odd_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose embedding of the letter Z is NaN, and a chat template that refuses secrets."""
    import copy

    from tlcapture.models.loading import load_model

    folder = tmp_path_factory.mktemp("odd")
    model = copy.deepcopy(tiny.hf_model("llama"))
    tokenizer = tiny.tokenizer(chat_template=TEMPLATE)
    with torch.no_grad():
        model.model.embed_tokens.weight[tokenizer("Z", add_special_tokens=False)["input_ids"]] = torch.nan
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    load_model(str(folder))
    return folder


def test_prompts_that_fail_are_named_and_do_not_change_the_others(
    odd_model: Path, tmp_path: Path, evidence: Evidence
) -> None:
    def capture(name: str, ids: list[str]) -> tuple[int, str]:
        root = tmp_path / name
        make_prompt_set(root, "mixed", ["x"])
        prompts = [{"id": each, "text": TEXTS[each]} for each in ids]
        (root / "datasets" / "inference" / "mixed.json").write_text(json.dumps({"name": "mixed", "prompts": prompts}))
        words = ("--prompt-set", "mixed", "--model", odd_model, "--max-new-tokens", 5, "--temperature", 0)
        ended = Command(
            tmp_path / "output", "capture", "--root", root, "--experiment", "exp", *words, "--attention"
        ).end()
        assert "Traceback" not in ended.stderr
        return ended.code, ended.stderr

    code, stderr = capture("all", list(TEXTS))
    assert code == 1
    for name, reason in WHY.items():
        assert f"failed: mixed/{name}: {reason}" in stderr
    code, stderr = capture("sound", ["fine", "also"])
    assert (code, "failed" in stderr) == (0, False)
    both = [contents(tmp_path / name / "experiments" / "exp") for name in ("all", "sound")]
    assert both[0].keys() == both[1].keys()
    for file in both[0]:
        if file.endswith(".json"):
            assert both[0][file].get("tokens") == both[1][file].get("tokens")
    evidence.survived(
        "prompts that fail next to others",
        "NaN in the model for one letter, a prompt longer than the context, one that the chat template refuses",
        "each named with its reason, exit status 1; the results of the others are unchanged",
    )


def test_a_run_in_which_every_prompt_is_refused_makes_no_experiment(odd_model: Path, tmp_path: Path) -> None:
    words = ("--prompt", "a secret", "--model", odd_model)
    ended = Command(tmp_path / "output", "capture", "--root", tmp_path, "--experiment", "exp", *words).end()
    assert ended.code == 1
    assert "failed: adhoc/1: the model's chat template refuses the prompt (no secrets)" in ended.stderr
    assert not (tmp_path / "experiments").exists()
