"""The page in a real browser, on captures of the embedded model and on hostile ones."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from tests.browser import Watched, browser, server
from tests.conftest import quick_evaluations, unrendered_figures
from tests.input.test_capture_index import made as tiny_capture
from tests.page.conftest import HOSTILE, write, write_experiment
from tests.page.conftest import TOKENS as HOSTILE_TOKENS
from tests.page.test_comparisons import comparison
from tlcapture.captures.capture import Capture
from tlcapture.cli.main import main
from tlcapture.page.export import export_page
from tlcapture.storage.experiments.layout import Layout
from tlcapture.storage.files import write_tensors

TRAIT = "style/formality"
VIEWS = ("dynamics", "layers", "lens", "attention", "internals", "vectors", "compare", "difference")
HERE = f"experiment=exp&set=single_trait&prompt=1&trait={TRAIT}"


@pytest.fixture(scope="module")
def page_root(embedded_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The experiment of the embedded model with an evaluation and steering results.

    It has no reference of ordinary prompts, which takes long to make and which the page does not show.
    """
    root = tmp_path_factory.mktemp("page")
    shutil.copytree(embedded_root, root, dirs_exist_ok=True)
    words = ["evaluate", "--experiment", "exp", "--root", str(root), "--component", "residual"]
    with quick_evaluations(), unrendered_figures(), pytest.MonkeyPatch.context() as patch:
        patch.setattr("tlcapture.commands.evaluate.keep_reference", lambda *args: None)
        done = CliRunner().invoke(main, words, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    run = {"config": {"layers": [8], "methods": ["mean_diff"], "coefficients": [0.2], "component": "residual"},
           "result": {"trait_mean": 71.0, "coherence_mean": 93.0, "null": [float(n) for n in range(21)]}}  # fmt: skip
    results = {"baseline": {"trait_mean": 40.0, "coherence_mean": 100.0}, "runs": [run]}
    write(root / "experiments" / "exp" / "steering" / TRAIT / "results.json", results)
    write_internals(root)
    write_comparisons(root)
    return root


def write_internals(root: Path) -> None:
    """Internals of a layer of prompt 1: the activations of an MLP, as a replay would store them."""
    layout = Layout(root, "exp")
    capture = Capture.open(layout.residual("single_trait", "1"))
    post = torch.randn(len(capture.tokens), 64, generator=torch.Generator().manual_seed(0))
    content = {"tokens": capture.tokens, "token_ids": capture.token_ids, "blocks.3.mlp.hook_post": post}
    write_tensors(layout.internals("single_trait", "1", 3), content)


def write_comparisons(root: Path) -> None:
    """The captures of the experiment compared with those of `other`, a copy that differs as `changed` says."""
    shutil.copytree(root / "experiments" / "exp", root / "experiments" / "other")
    done = CliRunner().invoke(main, ["compare", "exp", "other", "--root", str(root)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    for path in (root / "experiments/exp/analysis/compare/other/single_trait").glob("*.json"):
        write(path, changed(json.loads(path.read_text(encoding="utf-8"))))


def changed(content: dict[str, Any]) -> dict[str, Any]:
    """A comparison in which tokens differ more and more, and the last layer most."""
    n = len(content["tokens"])
    content["kl"] = [0.01 * index for index in range(n)]
    content["residual"]["cosine"] = [[1 - index * layer / 10_000 for layer in range(30)] for index in range(n)]
    for trait in content["traits"].values():
        trait["difference"] = [(-1) ** index * 0.1 * index for index in range(n)]
        trait["mean_b"] = trait["mean_a"] + 1.5
    return content


@pytest.fixture(scope="module")
def hostile_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An experiment with hostile tokens, and `kept`, whose projections of prompt 1 lack layer 0 and two points."""
    root = write_experiment(tmp_path_factory.mktemp("hostile"))
    write(root / "experiments/exp/analysis/compare/exp@lora/odd/1.json", comparison(1))
    points = {point: torch.ones(2, 4) for point in ("residual_in", "after_attn", "residual_out")}
    parts = {part: {"activations": dict.fromkeys(range(3), points)} for part in ("prompt", "response")}
    write_tensors(root / "experiments/exp/inference/raw/residual/odd/1.pt", parts)
    kept = Path(shutil.copytree(root / "experiments" / "exp", root / "experiments" / "kept"))
    path = kept / "inference/style/odd/residual_stream/odd/1.json"
    content = json.loads(path.read_text())
    for part, tokens in content["projections"].items():
        content["projections"][part] = [[None, token[1][2:], token[2][2:]] for token in tokens]
    content["metadata"] |= {"layers": [1, 2], "sublayers": ["residual_out"]}
    write(path, content)
    for name, entries in (("attention", "attention"), ("logit_lens", "predictions")):
        path = kept / f"analysis/per_token/odd/1_{name}.json"
        content = {"layers": [1, 2], **json.loads(path.read_text())}
        for entry in content[entries]:
            others = entry["by_layer"][1:]
            entry["by_layer"] = [None, *others] if name == "attention" else others
        write(path, content)
    return root


@pytest.fixture(scope="module")
def context() -> Iterator[Any]:
    with browser() as launched:
        yield launched.new_context(viewport={"width": 1366, "height": 900}, accept_downloads=True)


@pytest.fixture(scope="module")
def address(page_root: Path) -> Iterator[str]:
    with server(page_root, "exp") as (base, _):
        yield base


@pytest.fixture(scope="module")
def hostile_address(hostile_root: Path) -> Iterator[str]:
    with server(hostile_root, "exp") as (base, _):
        yield base


@pytest.fixture(scope="module")
def opened(context: Any, address: str) -> Watched:
    return Watched(context, address)


@pytest.fixture(scope="module")
def opened_hostile(context: Any, hostile_address: str) -> Watched:
    return Watched(context, hostile_address)


@pytest.fixture
def page(opened: Watched) -> Iterator[Watched]:
    """A page, loaded once for all tests, since it keeps its state in its address."""
    yield opened
    finished(opened)


@pytest.fixture
def hostile(opened_hostile: Watched) -> Iterator[Watched]:
    """A page on hostile tokens, loaded once too."""
    yield opened_hostile
    finished(opened_hostile)


def finished(watched: Watched) -> None:
    """Leave the page for the next test; fails if it logged an error or sent a request to another host."""
    watched.page.evaluate("document.querySelector('dialog').close(); document.activeElement.blur()")
    wrong, watched.wrong = watched.wrong, []
    assert wrong == []


def projection_file(root: Path, prompt: int = 1, trait: str = TRAIT) -> dict[str, Any]:
    folder = root / "experiments" / "exp" / "inference" / trait / "residual_stream" / "single_trait"
    return dict(json.loads((folder / f"{prompt}.json").read_text(encoding="utf-8")))


def analysis_file(root: Path, kind: str) -> dict[str, Any]:
    folder = root / "experiments" / "exp" / "analysis" / "per_token" / "single_trait"
    return dict(json.loads((folder / f"1_{kind}.json").read_text(encoding="utf-8")))


def trajectory(content: dict[str, Any]) -> list[float]:
    """A file's projections at the vector's layer, on the scale of its training examples where it has one."""
    source, parts = content["metadata"]["vector_source"], content["projections"]
    raw = [token[source["layer"]][-1] for token in [*parts["prompt"], *parts["response"]]]
    return [scaled(content, value) for value in raw]


def scaled(content: dict[str, Any], value: float) -> float:
    """A projection on the scale of its vector's training examples, where it has one."""
    scale = content["metadata"]["vector_source"].get("calibration")
    if not scale:
        return value
    return float((value - scale["negative_mean"]) / (scale["positive_mean"] - scale["negative_mean"]))


@pytest.mark.parametrize("view", VIEWS)
def test_each_view_shows_a_capture_of_the_embedded_model(page: Watched, view: str) -> None:
    page.open(f"view={view}&{HERE}")
    assert page.page.query_selector(".empty") is None
    assert page.page.query_selector_all(".plot[data-drawn=yes]")
    assert page.page.get_attribute(f"#views button:nth-child({VIEWS.index(view) + 2})", "aria-selected") == "true"


def test_trajectories_equal_those_of_the_files(page: Watched, page_root: Path) -> None:
    page.open(f"view=dynamics&{HERE}")
    drawn = {trace["name"]: trace["y"] for trace in page.traces() if trace["mode"] == "lines"}
    for trait in ("behavioral/refusal", TRAIT):
        expected = trajectory(projection_file(page_root, trait=trait))
        assert drawn[trait][1:] == pytest.approx(
            expected[1:], rel=1e-5
        )  # the first may be off the scale, and is then left out
    content = projection_file(page_root)
    text = content["prompt"]["tokens"] + content["response"]["tokens"]
    shown = [span.text_content() for span in page.page.query_selector_all("#strip .token")]
    assert [token.rstrip("\n") for token in shown] == [token.replace("\n", "\u23ce") for token in text]


def test_tokens_are_marked_by_turn_and_answer(page: Watched, page_root: Path) -> None:
    page.open(f"view=dynamics&{HERE}")
    content = projection_file(page_root)
    for kind, name in (("turn", "user"), ("answer", "answer"), ("template", "template")):
        named = [each for each in content["spans"] if name in (each["kind"], each["role"]) and each["kind"] == kind]
        expected = [str(token) for each in named for token in range(each["start"], each["stop"])]
        shown = page.page.query_selector_all(f"#strip .token.of-{name}")
        assert [token.get_attribute("data-token") for token in shown] == expected
    legend = [each.text_content() for each in page.page.query_selector_all("#strip .legend span")]
    assert {"user", "answer", "template"} <= set(legend)
    (answer,) = [each["mean"] for each in content["dynamics"]["by_span"] if each["kind"] == "answer"]
    (told,) = re.findall(r"Means.*: .*answer (\S+)\.", page.text("#view"))
    assert float(told.replace(",", "").replace("\u2212", "-")) == pytest.approx(scaled(content, answer), rel=1e-3)


def test_velocity_and_acceleration_are_drawn_at_the_later_token(page: Watched, page_root: Path) -> None:
    page.open(f"view=dynamics&{HERE}")
    velocity, acceleration = page.traces(1)
    dynamics = projection_file(page_root)["dynamics"]
    assert (velocity["y"], velocity["x"][0]) == ([None, *dynamics["velocity"][1:]], 1)
    assert (acceleration["y"], acceleration["x"][0]) == ([None, *dynamics["acceleration"][1:]], 2)


def test_normalised_trajectories_have_mean_0_and_deviation_1(page: Watched) -> None:
    page.open(f"view=dynamics&{HERE}")
    page.page.click("text=normalise for comparison")
    page.settled()
    for trace in page.traces():
        if trace["mode"] == "lines":
            rest = trace["y"][1:]
            assert sum(rest) / len(rest) == pytest.approx(0, abs=1e-9)
            assert sum(value**2 for value in rest) / len(rest) == pytest.approx(1)


def test_layers_show_every_residual_point(page: Watched, page_root: Path) -> None:
    page.open(f"view=layers&{HERE}&point=all")
    parts = projection_file(page_root)["projections"]
    scores = [*parts["prompt"], *parts["response"]]
    for point in range(3):
        (heat,) = page.traces(point)
        assert [[row[layer][point] for row in scores] for layer in range(len(scores[0]))] == heat["z"]


def test_layers_that_were_not_kept_are_blank_and_skipped_by_the_keyboard(hostile: Watched, hostile_root: Path) -> None:
    path = hostile_root / "experiments/kept/inference/style/odd/residual_stream/odd/1.json"
    content = json.loads(path.read_text())
    scores = [*content["projections"]["prompt"], *content["projections"]["response"]]
    hostile.open("view=layers&experiment=kept&set=odd&prompt=1&trait=style/odd&token=3")
    (heat,), (profile,) = hostile.traces(0), hostile.traces(1)
    assert heat["z"] == [[None] * len(scores), *([row[layer][0] for row in scores] for layer in (1, 2))]
    assert (profile["x"], profile["y"]) == ([1, 2], [scores[3][1][0], scores[3][2][0]])
    assert "that the capture kept (1, 2)" in str(hostile.page.text_content("#view"))
    hostile.page.focus("#strip .token[tabindex='0']")
    for key, layer in (("ArrowDown", 1), ("ArrowUp", 2), ("ArrowUp", 2), ("ArrowDown", 1)):
        hostile.press(key)
        assert f"at layer {layer}, residual_out: " in str(hostile.page.text_content("#status"))


def test_layers_of_attention_and_lens_that_were_not_kept_are_said(hostile: Watched) -> None:
    where = "experiment=kept&set=odd&prompt=1&trait=style/odd&token=3"
    hostile.open(f"view=lens&{where}&layer=0")
    assert "Kept: layers 1, 2." in hostile.text(".cells .note")
    assert [row.text_content() for row in hostile.page.query_selector_all(".cells tbody th")] == ["2", "1"]
    assert hostile.traces()[0]["y"] == [1, 2]
    assert "Layer 1 after token 3" in hostile.text(".top p"), "the kept layer below or else the first"
    hostile.page.click("td[data-token='3'][data-layer='2']")
    hostile.settled()
    hostile.page.wait_for_selector("text=Layer 2 after token 3")
    hostile.open(f"view=attention&{where}&layer=0&head=1")
    assert "kept: layers 1, 2" in hostile.text(".controls")
    assert hostile.traces()[0]["z"][0] == [None, None]
    assert "layer 1, head 1" in hostile.text("#view")


def test_the_lens_shows_ranks_and_lists_the_top_fifty_on_a_click(page: Watched, page_root: Path) -> None:
    page.open(f"view=lens&{HERE}")
    entry = analysis_file(page_root, "logit_lens")["predictions"][3]
    page.open(f"view=lens&{HERE}&token=3")
    page.page.click("td[data-token='3'][data-layer='20']")
    page.settled()
    layer = entry["by_layer"][20]
    page.page.wait_for_selector("text=Layer 20 after token 3")
    rows = page.page.query_selector_all(".top tbody tr")
    assert len(rows) == 50
    assert rows[0].query_selector_all("td")[1].text_content() == layer["top_k"][0]["token"].replace("\n", "\u23ce")
    assert f"rank {layer['actual_rank']}" in page.text(".top p")
    assert "layer=20" in page.page.url


def test_attention_shows_all_heads_of_the_chosen_token(page: Watched, page_root: Path) -> None:
    page.open(f"view=attention&{HERE}&token=7&layer=4&head=2&measure=first")
    patterns = analysis_file(page_root, "attention")["attention"][7]["by_layer"]
    (grid,) = page.traces(0)
    assert grid["z"] == [[head[0] for head in layer] for layer in patterns]
    (bars,) = page.traces(1)
    assert bars["y"] == patterns[4][2]


def test_vectors_show_evaluation_steering_and_selection(page: Watched, page_root: Path) -> None:
    page.open(f"view=vectors&{HERE}")
    path = page_root / "experiments" / "exp" / "extraction" / "extraction_evaluation.json"
    rows = [row for row in json.loads(path.read_text())["all_results"] if row["trait"] == TRAIT]
    by_layer = sorted(rows, key=lambda row: row["layer"])
    assert page.traces(0)[0]["z"] == [[row["val_effect_size"] for row in by_layer]]
    assert page.traces(1)[0]["z"][0] == [row["val_auroc"] for row in by_layer]
    assert page.traces(1)[0]["y"][-1] == "shuffled, p95"
    assert page.traces(1)[0]["z"][-1] == [row["null_auroc_p95"] for row in by_layer]
    evaluation = json.loads(path.read_text())
    assert evaluation["best_vectors"][TRAIT]["verdict"] in page.text("#view")
    gains = 3 if len(evaluation["cross_trait"]) > 1 else 2
    assert page.traces(gains)[0]["y"] == [0, 31.0]
    assert page.traces(gains)[1]["y"][:2] == [0, 20]
    assert page.traces(gains + 1)[0]["y"] == [100.0, 93.0]
    assert "mean_diff at layer 8, 31, because its steering run changes the trait most" in page.text("#view")


def test_all_views_follow_the_chosen_token(page: Watched) -> None:
    page.open(f"view=dynamics&{HERE}")
    page.page.click("#strip .token[data-token='9']")
    page.settled()
    for number, view in enumerate(VIEWS, start=1):
        page.press(str(number))
        assert "token=9" in page.page.url
        if view in ("dynamics", "layers", "lens", "attention"):
            assert page.text("#status").startswith("token 9 ")
            assert page.page.get_attribute("#strip .chosen", "data-token") == "9"
    assert [each.get_attribute("data-token") for each in page.page.query_selector_all("#view .chosen")]  # Compare


def test_the_keyboard_moves_token_layer_head_prompt_and_view(page: Watched) -> None:
    page.open(f"view=attention&{HERE}&token=5&layer=3")
    page.page.focus("#strip .token[tabindex='0']")
    page.press("ArrowRight", "ArrowRight", "ArrowLeft", "ArrowUp", "ArrowUp", "ArrowDown", "]", "]", "[")
    assert all(part in page.page.url for part in ("token=6", "layer=4", "head=1"))
    page.press("n")
    assert "prompt=2" in page.page.url
    page.press("p", "2")
    assert all(part in page.page.url for part in ("prompt=1", "view=layers"))
    page.page.keyboard.press("?")
    page.page.wait_for_selector("dialog[open] >> text=next and previous prompt")


def test_the_address_restores_the_view(page: Watched, context: Any, address: str) -> None:
    page.open(f"view=dynamics&{HERE}")
    page.page.focus("#strip .token[tabindex='0']")
    page.press("2", "ArrowRight", "ArrowRight", "ArrowUp")
    other = Watched(context, address)
    other.page.goto(page.page.url)
    other.settled()
    assert other.page.url == page.page.url
    assert other.text("#status") == page.text("#status")
    assert other.wrong == []
    other.page.close()
    page.page.go_back()
    page.settled()
    assert "view=layers" not in page.page.url


def test_pickers_filter_while_typing(page: Watched) -> None:
    page.open(f"view=dynamics&{HERE}")
    page.press("t")
    page.page.keyboard.type("refu")
    page.page.keyboard.press("Enter")
    page.settled()
    assert "trait=behavioral%2Frefusal" in page.page.url
    page.press("/")
    page.page.keyboard.type("no such prompt")
    page.page.wait_for_selector("text=no match")


def test_the_page_opens_on_the_overview_and_a_click_opens_the_prompt(page: Watched) -> None:
    page.open("experiment=exp&set=single_trait")
    assert "view=overview" in page.page.url
    head = [each.inner_text().split()[0] for each in page.page.query_selector_all(".overview thead th")]
    assert head[:5] == ["prompt", "stands", "rise", "chance", "answer"]
    assert set(head[5:]) == {"refusal", "formality"}
    page.page.click(".overview tbody tr:nth-child(2) .answer")
    page.settled()
    assert all(part in page.page.url for part in ("view=dynamics", "prompt=2"))


def test_the_overview_is_sorted_filtered_and_returns_to_the_view(page: Watched) -> None:
    def column(name: str) -> list[str]:
        at = [each.inner_text().split()[0] for each in page.page.query_selector_all(".overview thead th")].index(name)
        return [
            row.query_selector_all("th, td")[at].inner_text()
            for row in page.page.query_selector_all(".overview tbody tr")
        ]

    page.open(f"view=lens&{HERE}")
    page.press("/")
    page.page.click(".overview th:has-text('formality') button")
    page.settled()
    rises = [float(text.replace("\u2212", "-")) for text in column("formality")]
    assert rises == sorted(rises, reverse=True)
    assert page.page.get_attribute(".overview th:has-text('formality')", "aria-sort") == "descending"
    page.page.click(".overview th:has-text('formality') button")
    page.settled()
    assert [float(text.replace("\u2212", "-")) for text in column("formality")] == rises[::-1]
    second = page.page.inner_text(".overview tbody tr:has(button:has-text('2 ')) .answer").split()[0:3]
    page.page.fill("#find", " ".join(second))
    page.settled()
    assert [text.split()[0] for text in column("prompt")] == ["2"]
    page.page.press("#find", "Enter")
    page.settled()
    assert all(part in page.page.url for part in ("view=lens", "prompt=2"))


def test_compared_trajectories_are_aligned_at_the_first_response_token(page: Watched, page_root: Path) -> None:
    page.open(f"view=compare&{HERE}")
    names = {trace["name"]: trace for trace in page.traces()}
    first = projection_file(page_root, 1)
    trace = names["A: exp/single_trait/1"]
    assert trace["x"][0] == -first["prompt"]["n_tokens"]
    assert trace["y"][0] is None  # an attention sink
    assert trace["y"][1:] == pytest.approx(trajectory(first)[1:], rel=1e-5)
    other = trajectory(projection_file(page_root, 2))
    assert names["B: exp/single_trait/2"]["y"][1:] == pytest.approx(other[1:], rel=1e-5)
    page.page.click("text=mean of the set")
    page.settled()
    mean = {each["name"]: each for each in page.traces()}["A: mean of exp/single_trait"]
    at = dict(zip(mean["x"], mean["y"], strict=True))
    each = [
        trajectory(projection_file(page_root, n))[projection_file(page_root, n)["prompt"]["n_tokens"]] for n in (1, 2)
    ]
    assert at[0] == pytest.approx(sum(each) / 2)


def test_differences_are_shown_by_token_and_by_layer(page: Watched, page_root: Path) -> None:
    path = page_root / "experiments/exp/analysis/compare/other/single_trait/1.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    page.open(f"view=difference&{HERE}")
    shown = [span.text_content().rstrip("\n") for span in page.page.query_selector_all("#view .token")]
    assert shown == [token.replace("\n", "\u23ce") for token in content["tokens"]]
    (line,), (heat,) = page.traces(0), page.traces(1)
    assert line["y"][1:] == content["traits"][TRAIT]["difference"][1:]
    assert heat["z"][29] == pytest.approx([1 - row[29] for row in content["residual"]["cosine"]])
    last = len(content["tokens"]) - 1
    assert page.text("#view .chips button").startswith(f"{last} ")  # the token that differs most
    assert "2 prompts" in page.text("#view")
    assert "1.5" in page.text("#view table")
    page.open(f"view=difference&{HERE}&quantity=kl&token=5")
    assert page.traces(0)[0]["y"][1:] == content["kl"][1:]
    assert page.page.get_attribute("#view .chosen", "data-token") == "5"


def test_figures_are_saved_as_png_and_svg(page: Watched) -> None:
    page.open(f"view=dynamics&{HERE}")
    page.page.hover(".figure")
    for kind, start in (("PNG", b"\x89PNG"), ("SVG", b"<svg")):
        with page.page.expect_download() as download:
            page.page.click(f".figure .save >> text={kind}")
        assert Path(download.value.path()).read_bytes().startswith(start)


def test_light_and_dark_differ_and_stay_in_the_address(page: Watched) -> None:
    seen = set()
    for theme in ("light", "dark"):
        page.open(f"view=dynamics&{HERE}&theme={theme}")
        seen.add(page.page.evaluate("getComputedStyle(document.body.querySelector('section')).backgroundColor"))
    assert len(seen) == 2


def test_hostile_tokens_are_escaped(hostile: Watched) -> None:
    for view in VIEWS:
        hostile.open(f"view={view}&experiment=exp&set=odd&prompt=1&trait=style/odd&token=2")
        hostile.page.mouse.move(400, 500)
        if view != "vectors":
            shown = [each.text_content() for each in hostile.page.query_selector_all(".token")]
            assert HOSTILE in shown
            assert HOSTILE_TOKENS[2] in shown
        assert hostile.page.query_selector("img") is None
        assert hostile.page.title() != "owned"


def test_missing_data_names_the_command(hostile: Watched, hostile_root: Path) -> None:
    for view, prompt, command in (
        ("lens", 2, "tlcapture capture --experiment exp --prompt-set odd --logit-lens --replay"),
        ("attention", 2, "tlcapture capture --experiment exp --prompt-set odd --attention --replay"),
        ("dynamics", 3, "tlcapture project --experiment exp --prompt-set odd"),
        ("vectors", 1, "tlcapture steer --experiment exp --traits style/odd"),
        ("difference", 2, "tlcapture compare exp/odd exp/odd@lora"),
    ):
        hostile.open(f"view={view}&experiment=exp&set=odd&prompt={prompt}&trait=style/odd")
        assert hostile.text(".empty code") == f"{command} --root {hostile_root.resolve()}"


def test_links_to_what_is_not_there_say_so_and_keep_their_address(hostile: Watched) -> None:
    for state, expected in (
        ("experiment=nix&set=odd&prompt=1", "no experiment nix"),
        ("experiment=exp&set=nix", "exp has no captures of a set nix; captured sets: odd"),
        ("experiment=exp&set=odd&prompt=77", "exp/odd has no capture 77; captured: 1, 2, 3"),
        ("experiment=exp&set=odd&prompt=1&trait=style/nix", "neither vectors of style/nix nor projections"),
    ):
        hostile.page.goto("about:blank")
        hostile.open(state)
        assert expected in hostile.text(".empty")
        assert hostile.page.url.endswith(state)
        assert hostile.page.query_selector_all("#pickers .picker")


def test_new_experiments_appear_without_a_reload(hostile: Watched, hostile_root: Path) -> None:
    hostile.open("view=overview&experiment=exp&set=odd&prompt=1&trait=style/odd")
    shutil.copytree(hostile_root / "experiments/kept", hostile_root / "experiments/later")
    try:
        known = "tl.source.experiments().then(all => all.map(each => each.name))"
        for _ in range(60):
            if "later" in hostile.page.evaluate(known):
                break
            hostile.page.wait_for_timeout(500)
        hostile.page.wait_for_timeout(500)  # the pickers are drawn anew, unless one is open
        hostile.settled()
        hostile.page.click("#pickers button[aria-label=experiment]")
        hostile.page.wait_for_selector("#pickers li:has-text('later')")
        hostile.page.keyboard.press("Escape")
    finally:
        shutil.rmtree(hostile_root / "experiments/later")


def test_a_prompt_without_vectors_shows_its_text(hostile: Watched, hostile_root: Path) -> None:
    bare, below = hostile_root / "experiments/bare", "analysis/per_token"
    shutil.copytree(hostile_root / "experiments/exp" / below, bare / below)
    raw = bare / "inference/raw/residual/odd/1.pt"
    raw.parent.mkdir(parents=True)
    tiny_capture().save(raw)
    hostile.page.goto("about:blank")
    try:
        for view in VIEWS:
            hostile.open(f"view={view}&experiment=bare&set=odd&prompt=1")
            told = hostile.text("#view")
            assert "404" not in told and "failed" not in told
            assert view in ("lens", "attention", "compare") or "--root" in hostile.text(".empty code")
            assert view in ("vectors", "compare", "difference") or "t0" in hostile.text("#strip")
    finally:
        shutil.rmtree(bare)


def test_tokens_are_reached_by_the_keyboard_and_arrows_scroll_elsewhere(page: Watched) -> None:
    page.open(f"view=dynamics&{HERE}")
    page.press("ArrowRight", "ArrowDown")
    assert "token=" not in page.page.url and "layer=" not in page.page.url
    page.page.focus("#strip .token[tabindex='0']")
    page.press("Enter")
    first = int(page.page.evaluate("tl.state.now.token"))
    page.press("ArrowRight")
    assert page.page.evaluate("[tl.state.now.token, Number(document.activeElement.dataset.token)]") == [first + 1] * 2


def test_a_long_prompt_is_folded_and_only_the_response_is_on_the_axes(page: Watched, page_root: Path) -> None:
    n_prompt = len(projection_file(page_root)["prompt"]["tokens"])
    n_tokens = n_prompt + len(projection_file(page_root)["response"]["tokens"])
    page.open(f"view=dynamics&{HERE}")
    folds = page.page.query_selector_all("#strip .fold")
    assert len(folds) == (n_prompt >= 60)
    for fold in folds:
        assert not page.page.is_visible("#strip .token[data-token='0']")
        fold.click()
    assert page.page.is_visible("#strip .token[data-token='0']")
    for view in ("dynamics", "layers", "lens", "attention", "compare", "difference"):
        page.open(f"view={view}&{HERE}&response=1")
        titles = "[...document.querySelectorAll('.plot')].filter(p => p.layout.xaxis.title?.text?.startsWith('token'))"
        ranges = page.page.evaluate(f"{titles}.map(p => p.layout.xaxis.range)")
        assert ranges
        first = 0 if view == "compare" else n_prompt
        assert all(each == [first - 0.5, n_tokens - n_prompt + first - 0.5] for each in ranges)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_on_the_strongest_colours_has_the_contrast_of_wcag_aa(page: Watched, theme: str) -> None:
    page.open(f"view=dynamics&{HERE}&theme={theme}")
    code = """() => {
      const { css, diverging, amount } = tl.colours;
      const numbers = (text) => text.match(/[0-9.]+/g).map(Number), plain = (name) => numbers(css(name)).slice(0, 3);
      const back = plain("--panel");
      const over = ([r, g, b, share]) => [r, g, b].map((value, at) => value * share + back[at] * (1 - share));
      const strongest = [diverging(-9, 1), diverging(9, 1), amount(9, 1)];
      const pairs = strongest.map((each) => [plain("--text"), over(numbers(each))]);
      return [...pairs, [plain("--faint"), back], [plain("--warn"), back]];
    }"""
    for front, back in page.page.evaluate(code):
        light, dark = sorted((luminance(front), luminance(back)), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5


def luminance(colour: list[float]) -> float:
    """The relative luminance of WCAG 2."""
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in (each / 255 for each in colour)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_an_exported_page_works_offline(context: Any, page_root: Path, tmp_path: Path) -> None:
    target = tmp_path / "page.html"
    export_page(page_root, "exp", ["single_trait"], target)
    page = Watched(context, target.as_uri())
    for view in VIEWS:
        page.open(f"view={view}&{HERE}&token=9")
        assert page.page.query_selector_all(".plot[data-drawn=yes]"), page.text("#view")
    page.open(f"view=lens&{HERE}&token=3&layer=20")
    page.page.wait_for_selector("text=Layer 20 after token 3")
    assert page.wrong == []
    page.page.close()


def test_an_exported_page_lists_omitted_data(context: Any, page_root: Path, tmp_path: Path) -> None:
    target = tmp_path / "page.html"
    left_out = export_page(page_root, "exp", ["single_trait"], target, mebibytes=1)
    assert "attention of single_trait/1" in left_out
    page = Watched(context, target.as_uri())
    page.open(f"view=attention&{HERE}")
    assert "attention of single_trait/1" in page.text("#left-out")
    assert page.text(".empty code") == f"tlcapture view --experiment exp --root {page_root.resolve()}"
    page.page.close()
