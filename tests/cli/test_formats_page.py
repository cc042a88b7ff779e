"""docs/formats.md: its tables are those of files that were written, and its examples run."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import Result
from safetensors import safe_open

from tlcapture import Experiment

Run = Callable[..., Result]
PAGE = Path("docs/formats.md").read_text(encoding="utf-8")
SECTION = dict(re.findall(r"^### (.+?)\n(.*?)(?=^###|\Z)", PAGE, re.MULTILINE | re.DOTALL))


def example(section: str) -> str:
    return "\n".join(line[4:] for line in SECTION[section].splitlines() if line.startswith("    ") or not line)


def described(section: str) -> dict[str, tuple[str, str]]:
    """Dtype and shape of each tensor in a section's table."""
    rows = re.findall(r"^\| `([\w.]+)`.*?\| (\w+) \| `(\[.*?\])` \|", SECTION[section], re.MULTILINE)
    return {name: (dtype, shape) for name, dtype, shape in rows}


@pytest.fixture
def files(extract: Run, capture: Run, analysis: Path, data: Path) -> dict[str, Path]:
    extract()
    assert capture("--attention", "--logit-lens", "--temperature", 0, "--format", "compact").exit_code == 0
    shards = data / "experiments" / "exp" / "analysis" / "projections" / "residual_stream" / "short"
    return {
        "Attention": analysis / "1_attention.safetensors",
        "Logit lens": analysis / "1_logit_lens.safetensors",
        "Projections": shards / "+" / "1.safetensors",
    }


def test_the_page_describes_what_is_written(files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    for section, path in files.items():
        sizes: dict[str, int] = {}
        with safe_open(path, "np") as file:
            names = {re.sub(r"\d+$", "L", name): name for name in file.keys()}  # noqa: SIM118  not a mapping
            assert set(names) == set(described(section)), section
            for named, (dtype, shape) in described(section).items():
                found = file.get_slice(names[named])
                assert found.get_dtype() == dtype, named
                axes = re.findall(r"\w+", shape)
                assert len(axes) == len(found.get_shape()), named
                for axis, size in zip(axes, found.get_shape(), strict=True):
                    assert axis == "n_bytes" or sizes.setdefault(axis, size) == size, (named, axis)
    monkeypatch.chdir(files["Attention"].parent)
    made: dict[str, object] = {}
    exec(example("Attention"), made)
    pattern = made["pattern"]
    assert isinstance(pattern, np.ndarray)
    np.testing.assert_allclose(pattern.sum(axis=-1), 1, rtol=1e-2)
    assert (np.triu(pattern, 1) == 0).all()
    monkeypatch.chdir(files["Projections"].parents[1])
    exec(example("Projections"), made)
    assert made["scores"].shape[1:] == (2, 3, 3)  # type: ignore[attr-defined]


def test_the_default_files_are_read_with_torch_and_python_alone(
    extract: Run, capture: Run, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extract("--traits", "tone/loud", "--methods", "mean_diff", "--component", "residual")
    assert capture("--attention", "--logit-lens", "--limit", 1).exit_code == 0
    monkeypatch.chdir(data / "experiments" / "exp")
    (block,) = re.findall(r"(?:^    .*\n|^\n(?=    ))*^    raw = .*\n(?:^    .*\n|^\n(?=    ))*", PAGE, re.MULTILINE)
    made: dict[str, Any] = {}
    exec(textwrap.dedent(block), made)
    cap = Experiment("exp", data).captures["short"][1]
    assert torch.equal(made["residual"], cap.residual(1).float())
    np.testing.assert_allclose(made["weights"], cap.attention(1).patterns[:, 5, :6], atol=1e-3)
    assert made["likeliest"]["token"] == cap.logit_lens().top_tokens[1][5][0]
    assert np.shape(made["scores"]) == (len(cap), cap.n_layers, 3)
