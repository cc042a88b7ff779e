"""Small experiments of the tiny Llama, made by the commands on an engine: vectors, one capture, every view of it.

`tests/stored/{engine}-{version}/` keeps captures, vectors and projections of two of them: of HookedTransformer under
TransformerLens 3, and of the bridge under 4. Each environment reads what the other made.

    python -m tests.stored_experiments    # stores the one of this environment's first engine anew
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from click.testing import CliRunner, Result

from tests import tiny
from tests.cli.conftest import make_prompt_set, make_trait
from tlcapture.cli.main import main
from tlcapture.storage.files import read_json, write_json

STORED = Path(__file__).parent / "stored"
MODEL = "tiny-llama"  # what stored files call the model: its folder lies elsewhere each time
RESIDUALS = "inference/raw/residual/short/1.pt"
INTERNALS = "inference/raw/internals/short/1_L1.pt"
PROJECTION = "inference/tone/loud/residual_stream/short/1.json"
VECTORS = "extraction/tone/loud/vectors"
ATTENTION = "analysis/per_token/short/1_attention.json"
LOGIT_LENS = "analysis/per_token/short/1_logit_lens.json"
VIEWS = ("--prompt-set", "short", "--attention", "--logit-lens", "--layer-internals", 1)
PROJECT = ("--layer", 1, "--method", "mean_diff")


def make_data(root: Path) -> None:
    make_prompt_set(root, "short", ["hi"])
    make_trait(root, "tone/loud", "LOUD", "soft")


def make_experiment(root: Path, model: Path, engine: str) -> Path:
    """The folder of an experiment that was extracted and captured on an engine."""
    make_data(root)
    folder = root / "experiments" / "exp"
    folder.mkdir(parents=True)
    write_json(folder / "config.json", {"use_chat_template": False})
    runs_on = ("--model", model, "--engine", engine, "--device", "cpu")
    command(root, "extract", *runs_on, "--traits", "tone/loud", "--methods", "mean_diff", "--component", "residual")
    greedy = ("--max-new-tokens", 4, "--temperature", 0, "--save-dtype", "float32")
    command(root, "capture", *runs_on, *VIEWS, *greedy, *PROJECT)
    return folder


def command(root: Path, name: str, *words: object) -> Result:
    line = [name, "--experiment", "exp", "--root", root, *words]
    result = CliRunner().invoke(main, [str(word) for word in line], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result


def store(folder: Path, to: Path) -> None:
    """Keep what another environment is to read, without what is of this machine alone."""
    for path in [folder / RESIDUALS, folder / PROJECTION, *(folder / VECTORS).iterdir()]:
        kept = to / path.relative_to(folder)
        kept.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".json":
            write_json(kept, _renamed(read_json(path)))
        else:
            torch.save(_renamed(torch.load(path, weights_only=True)), kept)


def _renamed(value: Any) -> Any:
    """A file's content with the model's folder called `MODEL`."""
    if not isinstance(value, dict):
        return value
    named = ("inference_model", "extraction_model", "model")
    return {key: MODEL if key in named else _renamed(inner) for key, inner in value.items()}


def store_this_environments() -> None:
    engine = tiny.ENGINES[0]
    with tempfile.TemporaryDirectory() as temporary:
        root, model = Path(temporary), Path(temporary) / MODEL
        tiny.hf_model("llama").save_pretrained(model)
        tiny.tokenizer().save_pretrained(model)
        to = STORED / f"{engine}-{version('transformer_lens')}"
        shutil.rmtree(to, ignore_errors=True)
        store(make_experiment(root, model, engine), to)
        sys.stdout.write(f"{to}\n")


if __name__ == "__main__":
    store_this_environments()
