"""Projection files that other programs wrote: read with the numbers they hold, or refused in one line by name."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from tests.page.conftest import TRAIT, write_experiment
from tests.page.test_export import carried
from tlcapture.errors import StorageError
from tlcapture.explore.experiment import Experiment
from tlcapture.names import Trait
from tlcapture.storage.experiments.layout import Layout
from tlcapture.storage.files import read_json
from tlcapture.traits.projections.token_scores import TokenScores

Run = Callable[..., Result]

UPWARDS = [10.0, 10.5, 11.0, 11.5, 12.0, 12.5]  # what `foreign` has at the vector's layer, 1


def rows(n_tokens: int, *, start: int = 0, n_points: int = 1, layers: tuple[int, ...] = (0, 1)) -> Any:
    """`[token][layer][point]`: half the token's number, ten times the layer's, and the point's."""
    return [
        [[0.5 * token + 10 * layer + point for point in range(n_points)] for layer in layers]
        for token in range(start, start + n_tokens)
    ]


def foreign(n_points: int = 1, layers: tuple[int, ...] = (0, 1)) -> dict[str, Any]:
    """A file with the numbers of the format alone."""
    parts = {"prompt": rows(2, n_points=n_points, layers=layers)}
    parts["response"] = rows(4, start=2, n_points=n_points, layers=layers)
    return {
        "prompt": {"tokens": ["a", "b"]},
        "response": {"tokens": ["c", "d", "e", "f"]},
        "projections": parts,
        "metadata": {"vector_source": {"layer": 1}},
    }


LACKING = object()


def changed(place: str, value: Any, content: dict[str, Any] | None = None) -> Any:
    """A file with another value at a place, `metadata.vector_source.layer` for example, or without one."""
    content = foreign() if content is None else content
    *before, last = place.split(".")
    at: Any = content
    for key in before:
        at = at[int(key)] if isinstance(at, list) else at.setdefault(key, {})
    if value is LACKING:
        del at[last]
    else:
        at[int(last) if isinstance(at, list) else last] = value
    return content


def text(content: Any = None) -> str:
    return json.dumps(foreign() if content is None else content)


def named(**names: Any) -> Any:
    return changed("metadata", {"vector_source": {"layer": 1}, **names})


READ: dict[str, tuple[Any, list[float]]] = {
    "numbers alone": (foreign(), UPWARDS),
    "null for every label": (
        {**foreign(), "spans": None, "dynamics": None, "layers": None}
        | {"metadata": {"vector_source": {"layer": 1, "trait": None, "calibration": None}, "warnings": None,
                        "prompt_id": None, "prompt_set": None, "sublayers": None, "interventions": None,
                        "definitions": None, "positions": None, "layers": None}}
        | {"prompt": {"tokens": ["a", "b"], "text": None, "n_tokens": None}}, UPWARDS,
    ),
    "further keys": ({**changed("projections.summary", "mean"), "tool": {"name": "x", "version": [1, 2]}}, UPWARDS),
    "a trait without its category": (changed("metadata.vector_source.trait", "odd"), UPWARDS),
    "numbers without a fraction": (changed("projections.prompt.0.1", [3]), [3.0, *UPWARDS[1:]]),
    "another list of points": (changed("metadata.vector_source.layer", 0, foreign(3)), [2, 2.5, 3, 3.5, 4, 4.5]),
    "layers 5 and 1 of 6": ({**foreign(layers=(5, 1)), "layers": [5, 1]}, UPWARDS),
    "layers in reverse": ({**foreign(layers=(1, 0)), "layers": [1, 0]}, UPWARDS),
    "layers as a number": ({**foreign(), "layers": 2}, UPWARDS),
    "dynamics of its own": ({**foreign(), "dynamics": {"commitment": [1], "peak_velocity": "high"}}, UPWARDS),
    "dynamics as a list": ({**foreign(), "dynamics": [1, 2]}, UPWARDS),
    "no prompt": (
        {**foreign(), "prompt": {"tokens": []}, "projections": {"prompt": [], "response": rows(4, start=2)}},
        UPWARDS[2:],
    ),
    "no response": (
        {**foreign(), "response": {"tokens": []}, "projections": {"prompt": rows(2), "response": []}}, UPWARDS[:2],
    ),
    "escape sequences": (changed("prompt.tokens", ["\x1b[31m", "\x00\u202e"]), UPWARDS),
    "a byte order mark": (b"\xef\xbb\xbf" + text().encode(), UPWARDS),
    "indented, with carriage returns": (json.dumps(foreign(), indent=2).replace("\n", "\r\n").encode(), UPWARDS),
    "attn_out": (changed("metadata.vector_source.component", "residual"), UPWARDS),
}  # fmt: skip

NO_LAYER = "metadata.vector_source.layer: expected a whole number, found"
REFUSED: dict[str, tuple[Any, str]] = {
    "no metadata": (changed("metadata", LACKING), "metadata: expected, but missing"),
    "metadata as a list": (changed("metadata", [{"layer": 1}]), "metadata: expected an object, found"),
    "several vectors": (changed("metadata.vector_source", [{"layer": 1}]), "metadata.vector_source: expected"),
    "no layer": (changed("metadata.vector_source", {}), "metadata.vector_source.layer: expected, but missing"),
    "a layer as text": (changed("metadata.vector_source.layer", "1"), NO_LAYER),
    "a layer as a float": (changed("metadata.vector_source.layer", 1.0), NO_LAYER),
    "a layer that is true": (changed("metadata.vector_source.layer", True), NO_LAYER),
    "a layer below 0": (changed("metadata.vector_source.layer", -1), "expected a number of at least 0, found -1"),
    "a layer too many": (changed("metadata.vector_source.layer", 2), "a vector of layer 2, but scores of 2 layers"),
    "an id of 31 digits": (changed("metadata.prompt_id", 10**30), "has more than 64 bits: write it as a text"),
    "a hash of 70 bits": ({**foreign(), "hash": 2**70}, "1180591620717411303424 has more than 64 bits"),
    "an id as a float": (changed("metadata.prompt_id", 1.0), "metadata.prompt_id: expected a whole number or a text"),
    "an id as a list": (changed("metadata.prompt_id", ["1"]), "metadata.prompt_id: expected a whole number or a text"),
    "another id": (named(prompt_id="99"), "its metadata names prompt 99: it was moved or renamed"),
    "another sample": (named(prompt_id="99", sample=2), "its metadata names prompt 99.s2: it was moved or renamed"),
    "an empty id": (named(prompt_id=""), "its metadata names prompt : it was moved or renamed"),
    "another set": (named(prompt_set="x", variant="y"), "its metadata names prompt set x@y: it was moved"),
    "another trait": (changed("metadata.vector_source.trait", "a/b"), "its metadata names trait a/b: it was moved"),
    "another component": (
        changed("metadata.vector_source.component", "attn_out"), "its metadata names component attn_out",
    ),
    "points of attention": (named(sublayers=["attn_out"]), "its metadata names component attn_out"),
    "points of its own": (named(sublayers=["mlp"]), "sublayers end with mlp, expected residual_out or attn_out"),
    "a point twice": (
        changed("metadata.sublayers", ["residual_out"] * 2, foreign(2)),
        "sublayers residual_out, residual_out: expected different names",
    ),
    "points as text": (named(sublayers="residual_out"), "metadata.sublayers: expected a list, found"),
    "other layers than it states": (
        {**foreign(), "layers": [0, 1], "metadata": {"vector_source": {"layer": 1}, "layers": [4, 5]}},
        "a vector of layer 1, but scores of layers 0, 1, and metadata states 4, 5",
    ),
    "layers as texts": ({**foreign(), "layers": ["0", "1"]}, "layers: expected different numbers of layers"),
    "a vector of no kept layer": ({**foreign(), "layers": [5, 9]}, "a vector of layer 1, but scores of layers 5, 9"),
    "tokens as numbers": (changed("prompt.tokens", [1, 2]), "prompt.tokens[0]: expected a text, found"),
    "tokens as one text": (changed("prompt.tokens", "ab"), "prompt.tokens: expected a list, found"),
    "a token too few": (changed("prompt.tokens", ["a"]), "2 for 1 tokens of the prompt"),
    "another number of tokens": (changed("prompt.n_tokens", 3), "n_tokens is 3, but tokens has 2"),
    "a response as text": (changed("response", "cdef"), "response: expected an object, found"),
    "one list of scores": (changed("projections", rows(6)), "projections: expected an object, found"),
    "a score per layer": (
        changed("projections.prompt", [[0.5, 1.5]] * 2), "projections.prompt[0][0]: expected a list, found",
    ),
    "a score per token": (changed("projections.prompt", [0.5, 1.5]), "projections.prompt[0]: expected a list"),
    "layers by name": (changed("projections.prompt.0", {"0": [1], "1": [2]}), "projections.prompt[0]: expected"),
    "scores of four axes": (changed("projections.prompt.0.1", [[1.0]]), "projections.prompt[0][1][0]: expected"),
    "a null among scores": (changed("projections.prompt.0.1", [None]), "projections.prompt[0][1][0]: expected"),
    "a token of null": (changed("projections.prompt.0", None), "projections.prompt[0]: expected a list, found"),
    "a layer of null": (changed("projections.prompt.0.1", None), "its tokens differ in their numbers of layers"),
    "a score as text": (changed("projections.prompt.0.1", ["1"]), "projections.prompt[0][1][0]: expected"),
    "a score above float32": (changed("projections.prompt.0.1", [1e300]), "projections.prompt[0][1][0]: expected"),
    "a layer short": (changed("projections.prompt.0", [[1.0]]), "its tokens differ in their numbers of layers"),
    "no scores at all": (
        {**foreign(), "projections": {"prompt": [[[], []]] * 2, "response": [[[], []]] * 4}},
        "its tokens have no scores",
    ),
    "spans of its own": ({**foreign(), "spans": [{"begin": 0, "end": 2}]}, "spans[0].kind: expected, but missing"),
    "a score of NaN": (text().replace("0.5", "NaN", 1).encode(), "not valid JSON: unexpected character"),
    "a score of infinity": (text().replace("0.5", "-Infinity", 1).encode(), "not valid JSON: no digit after sign"),
    "a score of 1e400": (text().replace("0.5", "1e400", 1).encode(), "not valid JSON: number is infinity"),
    "scores twice": (
        text().replace('"projections": ', '"projections": {}, "projections": ').encode(),
        "the key 'projections' occurs twice in one object: leave out one of them",
    ),
    "a layer twice": (
        text().replace('"layer": 1', '"layer": 0, "layer": 1').encode(), "the key 'layer' occurs twice in one object",
    ),
    "gzip": (gzip.compress(text().encode()), "not valid JSON: it is compressed by gzip: decompress it"),
    "UTF-16": (text().encode("utf-16"), "not valid JSON: it is UTF-16: save it as UTF-8"),
    "Latin-1": (text({**foreign(), "note": "X"}).encode().replace(b"X", b"\xe9"), "it is not UTF-8: save it as UTF-8"),
    "a Python literal": (repr(foreign()).encode(), "not valid JSON: unexpected character, expected a string key"),
    "two objects": (text().encode() * 2, "not valid JSON: unexpected content after document"),
    "a list of files": ([foreign()], "expected an object, found"),
    "an envelope": ({"data": foreign()}, "prompt: expected, but missing (and 3 more)"),
    "brackets without end": (b"[" * 100_000, "not valid JSON: depth limit exceeded"),
    "nothing": (b"", "not valid JSON: Input is a zero-length, empty document"),
    "null": (b"null", "expected an object, found"),
}  # fmt: skip


def put(path: Path, content: Any) -> None:
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())


def test_each_file_is_read_with_its_numbers_or_refused_by_name(tlcapture: Run, root: Path) -> None:
    """All files lie in one prompt set, so that none may stop the others."""
    write_experiment(root)
    layout, trait = Layout(root, "exp"), Trait.parse(TRAIT)
    shutil.rmtree(layout.folder / "inference")
    paths = {
        name: layout.projection(trait, "residual", "odd", number) for number, name in enumerate({**READ, **REFUSED})
    }
    next(iter(paths.values())).parent.mkdir(parents=True)
    for name, (content, _) in {**READ, **REFUSED}.items():
        put(paths[name], content)
    before = {name: path.read_bytes() for name, path in paths.items()}

    done = tlcapture("project", "--experiment", "exp", "--prompt-set", "odd", "--dynamics-only")
    assert done.exit_code == 1
    lines = {Path(line.split(": ")[2]).stem: line for line in done.stderr.splitlines() if line.startswith("failed: ")}
    for name, (_, message) in REFUSED.items():
        assert message in lines.pop(paths[name].stem), name
        assert paths[name].read_bytes() == before[name], name
    assert not lines
    for name, (content, expected) in READ.items():
        written = read_json(paths[name])
        given = json.loads(content.decode("utf-8-sig")) if isinstance(content, bytes) else content
        assert {**written, "dynamics": 0} == {**given, "dynamics": 0} | {
            "metadata": {**given["metadata"], "definitions": 2}
        }, name
        assert written["dynamics"]["velocity"] == [after - at for at, after in pairwise(expected)], name
        scores = TokenScores.read(paths[name])
        assert scores.trajectory.tolist() == expected, name
        assert (scores.prompt_set, scores.prompt_id, scores.trait) == ("odd", paths[name].stem, TRAIT), name

    target = root / "page.html"
    viewed = tlcapture("view", "--experiment", "exp", "--export", target)
    assert viewed.exit_code == 1
    found: dict[str, Any] = carried(target.read_text())
    for name, (_, expected) in READ.items():
        (shown,) = found[f"exp/sets/odd/{paths[name].stem}"]["projections"]
        assert shown["trajectory"] == expected, name
    told = [line for line in viewed.stderr.splitlines() if line.startswith("failed: ")]
    assert len(told) == len(set(told)) == len(REFUSED)
    assert tlcapture("list").exit_code == tlcapture("list", "--experiment", "exp").exit_code == 0

    exp = Experiment("exp", root)
    with pytest.raises(StorageError, match=r"residual_stream/odd/\d+\.json: "):
        exp.to_pandas("odd")
    for name in REFUSED:
        paths[name].unlink()
    frame = exp.to_pandas("odd")
    assert {
        name: frame[frame.prompt_id == path.stem].score.tolist() for name, path in paths.items() if name in READ
    } == {name: expected for name, (_, expected) in READ.items()}
