"""Vectors of other tools: files that these tools wrote, layer conventions against Hugging Face, and what is refused."""

from __future__ import annotations

import json
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import Result
from safetensors.torch import load_file, save_file

from tests import tiny
from tests.cli.conftest import Run
from tlcapture.errors import NoSpaceError
from tlcapture.names import Trait
from tlcapture.storage.experiments.layout import Layout
from tlcapture.storage.files import Written, read_json
from tlcapture.traits.vector_files import VectorFiles
from tlcapture.traits.vector_sources.other_tools import read_tool_vectors
from tlcapture.traits.vectors import read_vector, write_vector

FILES = Path(__file__).parents[1] / "other_tools"  # written by the tools themselves: see write.py there
EXPECTED = load_file(FILES / "expected.safetensors")
N, D = tiny.N_LAYERS, tiny.D_MODEL
LOUD = Trait("tone", "loud")


@pytest.fixture
def bring(tlcapture: Run, data: Path, tiny_folder: Path) -> Run:
    """`tlcapture traits import` of a file as `tone/loud` of an experiment of the tiny model."""

    def run(path: Path, *words: object) -> Result:
        common = ("--experiment", "exp", "--trait", "tone/loud", "--model", tiny_folder)
        return tlcapture("traits", "import", path, *common, *words)

    return run


def files(root: Path) -> VectorFiles:
    return VectorFiles(Layout(root, "exp"), LOUD)


def imported(root: Path, component: str = "residual") -> dict[int, torch.Tensor]:
    """The imported vectors by layer."""
    found = files(root)
    layers = found.available(component).get("imported", [])
    return {layer: read_vector(found, component, "imported", layer).vector for layer in layers}


def saved(path: Path, value: Any) -> Path:
    if path.suffix == ".npz":
        np.savez(path, **value)
    elif path.suffix == ".npy":
        np.save(path, value)
    else:
        (save_file if path.suffix == ".safetensors" else torch.save)(value, path)
    return path


def table(n_rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n_rows, D, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("name", "component", "expected", "tool"),
    [
        ("loud_response_avg_diff.pt", "residual", EXPECTED["hidden_states"][1:], "persona-vectors"),
        ("repeng.gguf", "residual", EXPECTED["hidden_states"][1:], "repeng"),
        ("steering_vectors_decoder_block.pt", "residual", EXPECTED["blocks"], "steering-vectors"),
        ("steering_vectors_self_attn.pt", "attn_out", EXPECTED["attn_out"], "steering-vectors"),
    ],
)
def test_a_file_that_the_tool_wrote_is_read_at_the_layers_at_which_the_tool_read(
    bring: Run, root: Path, name: str, component: str, expected: torch.Tensor, tool: str
) -> None:
    result = bring(FILES / name)
    assert result.exit_code == 0, result.output
    found = imported(root, component)
    assert list(found) == list(range(N))
    for layer, vector in found.items():
        assert torch.allclose(vector, expected[layer], atol=1e-5)
    metadata = files(root).metadata(component, "imported")
    assert (
        metadata["hook"]
        == {"residual": "blocks.{L}.hook_resid_post", "attn_out": "blocks.{L}.hook_attn_out"}[component]
    )
    assert (metadata["methods"], metadata["num_layers"], metadata["hidden_dim"]) == (["imported"], N, D)
    source = metadata["imported"]
    assert (source["tool"], source["file"]) == (tool, name)
    is_hidden_states = tool == "persona-vectors"
    assert source["convention"] == {"attn_out": None}.get(
        component, "hidden_states" if is_hidden_states else "resid_post"
    )
    assert source["file_layers"] == [layer + is_hidden_states for layer in range(N)]
    assert "next: tlcapture project --experiment exp --all-prompt-sets --traits tone/loud" in result.output


def test_what_is_special_about_a_file_is_said(bring: Run, root: Path) -> None:
    persona = bring(FILES / "loud_response_avg_diff.pt")
    assert "left out: row 0 is the embedding" in persona.stdout
    assert "4 vectors for 3 layers: read as --convention hidden_states" in persona.stderr
    assert "layer 2 was read from Hugging Face's last hidden state, which has passed the final norm" in persona.stderr
    assert "passed the final norm" in bring(FILES / "repeng.gguf", "--overwrite").stderr
    assert "passed the final norm" not in bring(FILES / "steering_vectors_decoder_block.pt", "--overwrite").stderr
    attn = bring(FILES / "steering_vectors_self_attn.pt")
    assert "models that norm it first" in attn.stderr
    assert "--component attn_out" in attn.stdout


@pytest.mark.parametrize("name", ["layers.npz", "table.npz", "table.npy"])
def test_arrays_of_numpy_are_read_as_tensors_are(name: str, tmp_path: Path) -> None:
    rows = table(3)
    arrays = {"layers.npz": {f"layer_{n}": row.numpy() for n, row in enumerate(rows)}, "table.npz": {"v": rows.numpy()}}
    found = read_tool_vectors(saved(tmp_path / name, arrays.get(name, rows.numpy())))
    assert list(found.rows) == [0, 1, 2]
    assert all(torch.equal(found.rows[n], row) for n, row in enumerate(rows))
    assert found.is_table == name.startswith("table")


@pytest.mark.parametrize("convention", ["hidden_states", "resid_post", "resid_pre"])
@pytest.mark.parametrize(
    "form", ["table.pt", "numbers.pt", "list.pt", "names.safetensors", "one.safetensors", "hooks.pt"]
)
def test_projections_onto_an_imported_vector_equal_those_of_hugging_faces_hidden_states(
    bring: Run, capture: Run, tlcapture: Run, root: Path, tmp_path: Path, form: str, convention: str
) -> None:
    """Each convention by its definition: v[L] = a difference of hidden_states[L + 1], L counted from 0."""
    with torch.no_grad():
        loud, soft = (
            torch.stack(tiny.hf_model("llama")(ids, output_hidden_states=True).hidden_states)[:, 0, -1]
            for ids in (torch.tensor([[0, 40, 41]]), torch.tensor([[0, 50, 51]]))
        )
    states = loud - soft
    rows = {"hidden_states": states, "resid_post": states[1:], "resid_pre": states[:-1]}[convention]
    names = {"resid_pre": "blocks.{}.hook_resid_pre", "resid_post": "blocks.{}.hook_resid_post"}.get(
        convention, "h.{}.x"
    )
    content = {
        "table.pt": rows,
        "list.pt": list(rows),
        "numbers.pt": dict(enumerate(rows)),
        "names.safetensors": {f"layer_{number}": row.clone() for number, row in enumerate(rows)},
        "one.safetensors": {"vectors": rows.clone()},
        "hooks.pt": {names.format(number): row for number, row in enumerate(rows)},
    }[form]
    if form == "table.pt":
        assert capture("--no-project", "--save-dtype", "float32").exit_code == 0
    result = bring(saved(tmp_path / form, content), "--convention", convention)
    assert result.exit_code == 0, result.output
    found = imported(root)
    assert list(found) == list(range(N - (convention == "resid_pre")))
    for layer, vector in found.items():
        assert torch.allclose(vector, states[layer + 1])
    if form != "table.pt":
        return
    words = ("--experiment", "exp", "--prompt-set", "short", "--traits", "tone/loud", "--layer", 1)
    assert tlcapture("project", *words).exit_code == 0
    layout = Layout(root, "exp")
    capture_file = torch.load(layout.residual("short", "1"), weights_only=True)
    value = read_json(layout.projection(LOUD, "residual", "short", "1"))
    ids = [id_ for part in ("prompt", "response") for id_ in capture_file[part]["token_ids"]]
    with torch.no_grad():
        hidden = tiny.hf_model("llama")(torch.tensor([ids]), output_hidden_states=True).hidden_states
    expected = hidden[2][0] @ torch.nn.functional.normalize(states[2], dim=0)
    scores = [token[1][2] for part in ("prompt", "response") for token in value["projections"][part]]
    assert torch.allclose(torch.tensor(scores), expected, atol=1e-3)
    source = value["metadata"]["vector_source"]
    assert (source["method"], source["origin"]["imported"]["convention"]) == ("imported", convention)


def test_the_other_commands_and_the_page_take_imported_vectors(
    bring: Run, extract: Run, tlcapture: Run, root: Path, capture: Run
) -> None:
    from tlcapture.page.contents import Contents

    assert bring(FILES / "repeng.gguf").exit_code == 0
    exp = ("--experiment", "exp", "--traits", "tone/loud")
    listed = tlcapture("traits", "list", "--experiment", "exp")
    assert "imported from repeng.gguf (resid_post)" in listed.output
    assert tlcapture("evaluate", *exp).exit_code == 0
    rows = read_json(Layout(root, "exp").evaluation)["all_results"]
    assert [(row["method"], row["layer"]) for row in rows] == [("imported", layer) for layer in range(N)]
    assert set(files(root).metadata("residual", "imported")["held_out_calibration"]) == {"imported"}
    assert not files(root).metadata_file("residual").exists()
    folder = root / "datasets" / "traits" / "tone" / "loud"
    (folder / "steering.json").write_text(
        json.dumps({"questions": [{"id": "1", "question": "a?", "positive": "b", "negative": "c"}]})
    )
    assert tlcapture("steer", *exp, "--layers", 1, "--coefficients", "0.1").exit_code == 0
    runs = read_json(Layout(root, "exp").steering(LOUD))["runs"]
    assert [run["config"]["methods"] for run in runs] == [["imported"]]
    assert capture().exit_code == 0
    assert (
        read_json(Layout(root, "exp").projection(LOUD, "residual", "short", "1"))["metadata"]["vector_source"]["method"]
        == "imported"
    )
    shown = Contents(root).vectors("exp", "tone", "loud")
    assert shown["components"]["residual"]["metadata"]["imported"]["file"] == "repeng.gguf"
    assert tlcapture("view", "--experiment", "exp", "--export", root / "page.html").exit_code == 0


def test_traits_that_were_imported_without_examples_do_not_keep_others_from_being_scored(
    bring: Run, tlcapture: Run, root: Path
) -> None:
    assert bring(FILES / "repeng.gguf", "--trait", "persona/evil").exit_code == 0
    alone = tlcapture("evaluate", "--experiment", "exp")
    assert alone.exit_code == 2 and "datasets/traits/persona/evil" in alone.stderr
    assert bring(FILES / "repeng.gguf", "--trait", "tone/loud").exit_code == 0
    evaluated = tlcapture("evaluate", "--experiment", "exp")
    assert evaluated.exit_code == 0, evaluated.output
    assert "left out: no examples to score the imported vectors of persona/evil" in evaluated.stderr
    questions = [{"question": "a?", "positive": "b", "negative": "c"}]
    (root / "datasets" / "traits" / "tone" / "loud" / "steering.json").write_text(json.dumps(questions))
    steer = ("steer", "--experiment", "exp", "--layers", 1, "--coefficients", "0.1")
    steered = tlcapture(*steer)
    assert steered.exit_code == 0, steered.output
    assert "left out: no examples for trait 'persona/evil'" in steered.stderr
    for command in (("evaluate", "--experiment", "exp"), steer):
        named = tlcapture(*command, "--traits", "persona/evil")
        assert named.exit_code != 0
        assert "no examples for trait 'persona/evil'" in named.stderr


def test_imported_and_extracted_vectors_do_not_replace_each_other(
    bring: Run, extract: Run, tlcapture: Run, root: Path
) -> None:
    assert extract().exit_code == 0
    before = {path.name: path.read_bytes() for path in files(root).path.iterdir()}
    assert bring(FILES / "repeng.gguf").exit_code == 0
    assert {name: (files(root).path / name).read_bytes() for name in before} == before
    assert list(files(root).available("residual")) == ["probe", "mean_diff", "gradient", "imported"]
    mine = {path.name: path.read_bytes() for path in files(root).path.glob("imported*")}
    assert extract("--position", "all_mean").exit_code == 0  # replaces the extracted ones
    assert {path.name: path.read_bytes() for path in files(root).path.glob("imported*")} == mine
    assert tlcapture("evaluate", "--experiment", "exp", "--traits", "tone/loud").exit_code == 0
    assert set(files(root).metadata("residual")["held_out_calibration"]) == {"probe", "mean_diff", "gradient"}
    assert set(files(root).metadata("residual", "imported")["held_out_calibration"]) == {"imported"}
    rows = read_json(Layout(root, "exp").evaluation)["all_results"]
    assert {row["method"] for row in rows if row["component"] == "residual"} == {
        "probe",
        "mean_diff",
        "gradient",
        "imported",
    }
    assert all(
        "imported" in row["cosine_to_methods"]
        for row in rows
        if (row["component"], row["method"]) == ("residual", "probe")
    )


def test_importing_over_imported_vectors_needs_overwrite_and_leaves_no_mixture(
    bring: Run, root: Path, tmp_path: Path
) -> None:
    assert bring(FILES / "repeng.gguf").exit_code == 0
    before = imported(root)
    one = saved(tmp_path / "one.pt", {1: torch.ones(D)})
    refused = bring(one, "--convention", "resid_post")
    assert refused.exit_code == 2
    assert "tone/loud has imported residual vectors already, at layers 0 to 2: pass --overwrite" in refused.stderr
    assert all(torch.equal(vector, before[layer]) for layer, vector in imported(root).items())
    assert bring(one, "--convention", "resid_post", "--overwrite").exit_code == 0
    assert list(imported(root)) == [1]


def test_an_import_that_was_stopped_is_resumed_by_the_same_command(
    bring: Run, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(files: VectorFiles, component: str, method: str, layer: int, vector: torch.Tensor) -> Written:
        if layer == 2:
            raise NoSpaceError("x.pt: cannot be written")
        return write_vector(files, component, method, layer, vector)

    with monkeypatch.context() as patch:
        patch.setattr("tlcapture.commands.import_vectors.write_vector", full)
        stopped = bring(FILES / "repeng.gguf")
    assert "resume: " in stopped.stderr and "--overwrite" not in stopped.stderr
    assert list(imported(root)) == [0, 1]
    assert bring(FILES / "repeng.gguf").exit_code == 0
    assert list(imported(root)) == [0, 1, 2]


def test_an_experiment_without_a_model_takes_vectors_and_says_that_they_are_unchecked(
    tlcapture: Run, root: Path
) -> None:
    words = ("--experiment", "new", "--trait", "tone/loud")
    result = tlcapture("traits", "import", FILES / "loud_response_avg_diff.pt", *words)
    assert result.exit_code == 2
    assert "could be counted in several ways: give --convention" in result.stderr
    result = tlcapture("traits", "import", FILES / "loud_response_avg_diff.pt", *words, "--convention", "hidden_states")
    assert result.exit_code == 0
    assert "the experiment has no model yet (--model NAME): width and layers" in result.stderr
    found = VectorFiles(Layout(root, "new"), LOUD)
    assert found.available("residual") == {"imported": [0, 1, 2]}
    assert found.metadata("residual", "imported")["num_layers"] == N


def gguf(path: Path, *, architecture: str = "controlvector", hint: str = "llama", tensors: dict[str, Any]) -> Path:
    """A GGUF file, version 3, of float32 vectors; written by hand after its specification."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    fields = {"general.architecture": architecture, "controlvector.model_hint": hint}
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(fields))
    head += b"".join(text(name) + struct.pack("<I", 8) + text(value) for name, value in fields.items())
    offset, data = 0, b""
    for name, tensor in tensors.items():
        shape = list(reversed(tensor.shape))
        head += text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, 0, offset)
        part = tensor.float().numpy().tobytes()
        data += part + bytes(-len(part) % 32)
        offset = len(data)
    path.write_bytes(head + bytes(-len(head) % 32) + data)
    return path


def test_layers_that_count_from_the_end_and_layers_beyond_the_model(bring: Run, root: Path, tmp_path: Path) -> None:
    rows = table(3)
    path = gguf(tmp_path / "x.gguf", tensors={"direction.-1": rows[0], "direction.0": rows[1], "direction.7": rows[2]})
    result = bring(path)
    assert result.exit_code == 0, result.output
    found = imported(root)
    assert list(found) == [0, 2]
    assert torch.equal(found[2], rows[0])
    assert torch.equal(found[0], rows[1])
    assert "left out: layers 7 lie beyond the model's 3 layers" in result.stdout
    last = saved(tmp_path / "x.pt", {-1: rows[0], 1: rows[1]})
    assert bring(last, "--convention", "hidden_states", "--overwrite").exit_code == 0
    assert torch.equal(imported(root)[2], rows[0])
    assert torch.equal(imported(root)[0], rows[1])


@pytest.mark.parametrize(
    ("name", "layer"), [("-1", 2), ("layer_-1", 2), ("h.-2", 1), ("layer -3", 0), ("layer-1", 1), ("h.1", 1)]
)
def test_a_minus_counts_from_the_end_unless_it_joins_a_word_to_a_number(
    bring: Run, root: Path, tmp_path: Path, name: str, layer: int
) -> None:
    assert bring(saved(tmp_path / "x.pt", {name: table(1)[0]}), *POST).exit_code == 0
    assert list(imported(root)) == [layer]


@pytest.mark.parametrize(
    ("name", "component", "layer"),
    [
        ("hidden_states.1", "residual", 0), ("residual_in_L1", "residual", 0), ("residual_out_L1", "residual", 1),
        ("blocks.1.hook_attn_out", "attn_out", 1), ("model.layers.1.self_attn.o_proj", "attn_out", 1),
    ],
)  # fmt: skip
def test_names_that_say_an_activation_need_no_convention(
    bring: Run, root: Path, tmp_path: Path, name: str, component: str, layer: int
) -> None:
    assert bring(saved(tmp_path / "x.pt", {name: table(1)[0]})).exit_code == 0
    assert list(imported(root, component)) == [layer]


@pytest.mark.parametrize("scale", [1e-35, 1e-15, 1e20, 1e37])
def test_the_squares_of_a_vector_that_is_read_are_within_float32(
    bring: Run, root: Path, tmp_path: Path, scale: float
) -> None:
    vectors = table(N)
    assert bring(saved(tmp_path / "x.pt", vectors * scale), *POST).exit_code == 0
    for layer, vector in imported(root).items():
        unit = torch.nn.functional.normalize(vector, dim=0)
        assert torch.allclose(unit, torch.nn.functional.normalize(vectors[layer], dim=0), atol=1e-5)


def test_another_architecture_in_a_control_vector_is_said(bring: Run, tmp_path: Path) -> None:
    result = bring(gguf(tmp_path / "x.gguf", hint="qwen2", tensors={"direction.1": table(1)[0]}))
    assert result.exit_code == 0
    assert "the file says that its vectors come from a qwen2 model, the experiment's is llama" in result.stderr


class Malicious:
    """Unpickled, it makes a file in the current folder."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("made-by-a-pickle"),))


def broken(value: torch.Tensor, number: float) -> torch.Tensor:
    changed = value.clone()
    changed[1] = number
    return changed


def cut(path: Path, source: Path, keep: float) -> Path:
    data = source.read_bytes()
    path.write_bytes(data[: int(keep * len(data))])
    return path


def vector_under(name: str) -> Callable[[Path], Path]:
    """Saves a vector under a name."""
    return lambda folder: saved(folder / "x.pt", {name: table(1)[0]})


POST, HIDDEN = ("--convention", "resid_post"), ("--convention", "hidden_states")
BAD: dict[str, tuple[Callable[[Path], Path], tuple[str, ...], str]] = {
    "no such file": (lambda f: f / "x.pt", (), "no such file"),
    "another width": (lambda f: saved(f / "x.pt", torch.ones(3, 8)), POST, "has width 8, expected 32"),
    "NaN": (lambda f: saved(f / "x.pt", broken(table(3), torch.nan)), POST, "layer 1: the vector is zero, or"),
    "zero": (lambda f: saved(f / "x.pt", broken(table(3), 0.0)), POST, "layer 1: the vector is zero, or"),
    "one vector": (lambda f: saved(f / "x.pt", table(1)[0]), POST, "save it as {layer: vector}"),
    "rank 3": (lambda f: saved(f / "x.pt", table(3)[None]), POST, "expected a float tensor [n_layers, d_model]"),
    "rank 2 by layer": (lambda f: saved(f / "x.pt", {0: table(2), 1: table(2)}), POST, "layer 0: expected a one-dim"),
    "integers": (lambda f: saved(f / "x.pt", torch.ones(3, D, dtype=torch.int64)), POST, "expected a float tensor"),
    "as many rows as layers": (lambda f: saved(f / "x.pt", table(3)), (), "could be counted in several ways"),
    "no embedding row": (lambda f: saved(f / "x.pt", table(3)), HIDDEN, "3 rows, expected 4"),
    "an embedding row": (lambda f: saved(f / "x.pt", table(4)), POST, "4 rows, expected 3 for resid_post"),
    "another depth": (lambda f: saved(f / "x.pt", table(13)), HIDDEN, "13 rows, expected 4"),
    "numbers of layers": (lambda f: saved(f / "x.pt", {1: table(1)[0]}), (), "could be counted in several ways"),
    "two numbers": (lambda f: saved(f / "x.pt", {"h.1.2": table(1)[0]}), POST, "does not hold one layer number"),
    "no number": (lambda f: saved(f / "x.pt", {"vector": table(1)[0]}), POST, "does not hold one layer number"),
    "the same layer twice": (lambda f: saved(f / "x.pt", {"a.1": table(1)[0], 1: table(1)[0]}), POST, "second entry"),
    "an MLP": (lambda f: saved(f / "x.pt", {"blocks.1.hook_mlp_out": table(1)[0]}), POST, "is not supported"),
    **{
        " ".join((name, *words)): (vector_under(name), words, f"{name!r} names an activation that is not supported")
        for name in (
            "blocks.1.attn.hook_z", "blocks.1.attn.hook_q", "model.layers.1.self_attn.q_proj", "h.1.attn.c_attn",
            "after_attn_L1", "blocks.1.hook_resid_mid", "hook_embed_1", "model.layers.1.mixer", "h.1.ffn",
        )
        for words in ((), POST)
    },
    "hidden states by name": (
        lambda f: saved(f / "x.pt", {"hidden_states.1": table(1)[0]}), POST, "holds vectors of hidden_states: leave",
    ),
    "another point by name": (
        lambda f: saved(f / "x.pt", {"residual_in_L1": table(1)[0]}), POST, "holds vectors of resid_pre: leave out",
    ),
    "another hook": (lambda f: saved(f / "x.pt", {"blocks.1.hook_resid_pre": table(1)[0]}), POST, "leave out --conv"),
    "only the embedding": (lambda f: saved(f / "x.pt", {0: table(1)[0]}), ("--convention", "resid_pre"), "belongs to"),
    "only beyond": (lambda f: saved(f / "x.pt", {9: table(1)[0]}), POST, "layers 9 lie beyond the model's 3 layers"),
    "nothing": (lambda f: saved(f / "x.pt", {}), POST, "no vectors in it"),
    "a pickle with code": (lambda f: saved(f / "x.pt", Malicious()), (), "not opened for safety"),
    "a plain pickle": (lambda f: _pickled(f / "x.pt", Malicious()), (), "not a file of vectors"),
    "a truncated .pt": (lambda f: cut(f / "x.pt", FILES / "loud_response_avg_diff.pt", 0.6), (), "cannot be read"),
    "a truncated GGUF": (lambda f: cut(f / "x.gguf", FILES / "repeng.gguf", 0.8), (), "cannot be read"),
    "the start of a GGUF": (lambda f: cut(f / "x.gguf", FILES / "repeng.gguf", 0.1), (), "cannot be read"),
    "a truncated safetensors": (
        lambda f: cut(f / "x.safetensors", FILES / "expected.safetensors", 0.5), (), "cannot be read",
    ),
    "not a GGUF": (lambda f: cut(f / "x.gguf", FILES / "write.py", 1), (), "not a GGUF file"),
    "a model in GGUF": (
        lambda f: gguf(f / "x.gguf", architecture="llama", tensors={"output.weight": table(1)[0]}), (),
        "a GGUF file of 'llama', expected one of 'controlvector'",
    ),
    "another name in GGUF": (lambda f: gguf(f / "x.gguf", tensors={"bias": table(1)[0]}), (), "not named direction.L"),
    "GGUF counted otherwise": (lambda f: FILES / "repeng.gguf", HIDDEN, "leave out --convention"),
    "the same layer twice in GGUF": (
        lambda f: gguf(f / "x.gguf", tensors={"direction.1": table(1)[0], "direction.01": table(1)[0]}), (),
        "is the second entry of layer 1",
    ),
    "a layer type of another kind": (
        lambda f: saved(f / "x.pt", {"layer_activations": {1: table(1)[0]}, "layer_type": ["mlp"]}), (),
        "cannot be imported",
    ),
    "a table by a layer number": (lambda f: saved(f / "x.pt", {1: table(3)}), POST, "layer 1: expected a one-dim"),
    "a table of an MLP": (lambda f: saved(f / "x.pt", {"mlp_out": table(3)}), POST, "names an activation that is not"),
    "a table of inputs": (lambda f: saved(f / "x.pt", {"resid_pre": table(3)}), POST, "leave out --convention"),
    "a table by a layer's name": (
        lambda f: saved(f / "x.pt", {"layer_1": table(3)}), POST, "layer 1: expected a one-dim",
    ),
    "an MLP's steering vector": (lambda f: FILES / "steering_vectors_mlp.pt", (), "'mlp' cannot be imported"),
    "residual as attention": (
        lambda f: FILES / "steering_vectors_decoder_block.pt", ("--component", "attn_out"), "leave out --component",
    ),
    "attention with a convention": (
        lambda f: FILES / "steering_vectors_self_attn.pt", POST, "--convention is for vectors of the residual stream",
    ),
    "arrays of objects": (
        lambda f: saved(f / "x.npz", {"1": np.array([Malicious()], dtype=object)}), (), "Object arrays cannot be",
    ),
    "a truncated .npy": (lambda f: cut(f / "x.npy", FILES / "repeng.gguf", 0.1), (), "cannot be read"),
    "text": (lambda f: cut(f / "x.txt", FILES / "write.py", 1), (), "not a file of vectors"),
    "a folder": (lambda f: f, (), "expected a file of vectors, found a folder: pass a file in it\n"),
    "a folder of files": (lambda f: saved(f / "x.pt", table(3)).parent, (), "pass a file in it, such as x.pt"),
}  # fmt: skip


def _pickled(path: Path, value: Any) -> Path:
    path.write_bytes(pickle.dumps(value))
    return path


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_imported_is_refused_in_one_line_and_nothing_is_written(
    bring: Run, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    make, words, said = BAD[case]
    (tmp_path / "given").mkdir()
    monkeypatch.chdir(tmp_path)
    result = bring(make(tmp_path / "given"), *words)
    assert result.exit_code in (1, 2)
    assert said in result.stderr
    assert result.stderr.startswith("error: ")
    assert len(result.stderr.splitlines()) == 1
    assert not (root / "experiments").exists()
    assert not list(tmp_path.rglob("made-by-a-pickle"))


def test_another_model_than_the_experiments_is_refused(bring: Run, tlcapture: Run, root: Path) -> None:
    assert bring(FILES / "repeng.gguf").exit_code == 0
    words = ("--experiment", "exp", "--trait", "tone/other", "--model", "smollm2")
    result = tlcapture("traits", "import", FILES / "repeng.gguf", *words)
    assert result.exit_code == 2
    assert "uses extraction_model" in result.stderr
