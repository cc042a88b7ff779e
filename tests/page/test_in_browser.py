"""The page in a browser on a small experiment: matrices, heads, internals, notes, captures at work, accessibility."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.browser import Watched, browser, server
from tests.page.conftest import HOSTILE, N_HEADS, N_LAYERS, projection, write, write_experiment
from tests.page.test_comparisons import comparison
from tlcapture.captures.notes import Marked, add_note, read_notes
from tlcapture.commands.plots import PERSISTS
from tlcapture.explore.figures.drawing import trajectory_figure
from tlcapture.page.export import export_page
from tlcapture.storage.experiments.layout import Layout
from tlcapture.storage.files import write_tensors
from tlcapture.storage.locks import locked
from tlcapture.traits.projections.token_scores import TokenScores

LONG = [f" w{number}" for number in range(40)]
LONG[0], LONG[9], LONG[25], LONG[26] = "<bos>", HOSTILE, "שלום", "日本"
N_LONG_PROMPT = 20
SPANS = [
    {"kind": "turn", "role": "system", "start": 0, "stop": 8},
    {"kind": "turn", "role": "user", "start": 8, "stop": 20},
    {"kind": "answer", "role": "assistant", "start": 20, "stop": 40},
]
HERE = "experiment=exp&set=odd&prompt=4&trait=style/odd"


def weights() -> np.ndarray[Any, Any]:
    """`[layer, head, query, key]`, rounded as in files."""
    made = np.tril(np.random.default_rng(0).random((N_LAYERS, N_HEADS, 40, 40))) ** 4
    return np.vectorize(lambda value: float(f"{value:.4g}"))(made / made.sum(-1, keepdims=True))


WEIGHTS = weights()


def write_long(root: Path) -> None:
    """Prompt 4: forty tokens in three spans, with attention, internals of a layer with experts, and activations."""
    folder = root / "experiments" / "exp"
    entries = [
        {"token_idx": q, "context_size": q + 1, "by_layer": WEIGHTS[:, :, q, : q + 1].tolist()} for q in range(40)
    ]
    counts = {"n_prompt_tokens": N_LONG_PROMPT, "n_response_tokens": 20, "n_layers": N_LAYERS, "tokens": LONG}
    head = {"prompt_id": "4", "prompt_set": "odd", "n_heads": N_HEADS, **counts}
    write(folder / "analysis/per_token/odd/4_attention.json", {**head, "attention": entries})
    layers = [
        {"layer": layer, "top_k": [{"token": "a", "prob": 0.5}, {"token": "b", "prob": 0.2}], "actual_rank": 3,
         "actual_prob": 0.1} for layer in range(N_LAYERS)
    ]  # fmt: skip
    predictions = [{"token_idx": t, "actual_next_token": LONG[t + 1], "by_layer": layers} for t in range(39)]
    write(folder / "analysis/per_token/odd/4_logit_lens.json", {**counts, "top_k": 2, "predictions": predictions})
    content = projection(1)
    parts = {"prompt": LONG[:N_LONG_PROMPT], "response": LONG[N_LONG_PROMPT:]}
    for name, tokens in parts.items():
        content[name] = {"text": "".join(tokens), "tokens": tokens, "n_tokens": len(tokens)}
        content["projections"][name] = [[[float(t % 5), t % 7, t / 9]] * N_LAYERS for t in range(len(tokens))]
    content["dynamics"] |= {"velocity": [1.0] * 39, "acceleration": [0.0] * 38, "commitment_point": 25}
    content |= {"spans": SPANS, "metadata": {**content["metadata"], "prompt_id": "4"}}
    write(folder / "inference/style/odd/residual_stream/odd/4.json", content)
    ids = {"token_ids": list(range(40)), "tokens": LONG}
    generator = torch.Generator().manual_seed(0)
    of_part = {
        name: {
            point: torch.ones(len(tokens), 4) * at
            for at, point in enumerate(("residual_in", "after_attn", "residual_out"))
        }
        for name, tokens in parts.items()
    }
    write_tensors(
        folder / "inference/raw/residual/odd/4.pt",
        {
            name: {
                "activations": dict.fromkeys(range(N_LAYERS), of_part[name]),
                "token_ids": ids["token_ids"][: len(parts[name])]
                if name == "prompt"
                else ids["token_ids"][N_LONG_PROMPT:],
            }
            for name in parts
        },
    )
    post = torch.randn(40, 64, generator=generator)
    hooks = {"mlp.hook_post": post, "mlp.hook_router_scores": torch.randn(40, 5, generator=generator),
             "attn.hook_z": torch.randn(40, N_HEADS, 3, generator=generator)}  # fmt: skip
    write_tensors(
        folder / "inference/raw/internals/odd/4_L1.pt", {**ids, **{f"blocks.1.{name}": t for name, t in hooks.items()}}
    )


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = write_experiment(tmp_path_factory.mktemp("browser"))
    write(root / "experiments/exp/analysis/compare/exp@lora/odd/1.json", comparison(1))
    write_long(root)
    return root


@pytest.fixture(scope="module")
def context() -> Iterator[Any]:
    with browser() as launched:
        yield launched.new_context(viewport={"width": 1366, "height": 900}, accept_downloads=True)


@pytest.fixture(scope="module")
def address(root: Path) -> Iterator[str]:
    with server(root, "exp") as (base, _):
        yield base


@pytest.fixture(scope="module")
def opened(context: Any, address: str) -> Watched:
    return Watched(context, address)


@pytest.fixture
def page(opened: Watched) -> Iterator[Watched]:
    yield opened
    opened.page.evaluate("document.querySelector('dialog').close(); document.activeElement.blur()")
    wrong, opened.wrong = opened.wrong, []
    assert wrong == []


@pytest.fixture
def eager(context: Any, address: str) -> Iterator[Watched]:
    """A page that looks for new captures ten times a second, rather than every three seconds."""
    watched = Watched(context, address)
    watched.page.add_init_script(
        "const later = setTimeout; window.setTimeout = (f, ms, ...rest) => later(f, ms === 3000 ? 100 : ms, ...rest)"
    )
    yield watched
    watched.page.close()
    assert watched.wrong == []


def hovered(page: Watched, query: int, key: int, n: int = 40, m: int = 40) -> str:
    """What the page says of a cell under the mouse."""
    box = page.page.locator(".matrix canvas").first.bounding_box()
    assert box
    left, top = (92 + 7, 92 + 7)
    x = box["x"] + left + (key + 0.5) * (box["width"] - left - 1) / m
    y = box["y"] + top + (query + 0.5) * (box["height"] - top - 1) / n
    page.page.mouse.move(x, y)
    return page.text("#cell")


# -- attention ------------------------------------------------------------------------------------


def test_the_matrix_shows_the_weight_of_every_query_and_key(page: Watched) -> None:
    for state, expected in (("mean=1", WEIGHTS[1].mean(0)), ("mean=0&head=1", WEIGHTS[1, 1])):
        page.open(f"view=attention&mode=matrix&layer=1&{state}&{HERE}")
        page.page.locator(".matrix").scroll_into_view_if_needed()
        for query, key in ((30, 3), (39, 39), (22, 21)):
            told = hovered(page, query, key)
            assert told.startswith(f"query {query} ") and f" on {key} " in told
            assert float(told.rpartition(": ")[2]) == pytest.approx(expected[query, key], rel=5e-3)
        assert "cannot see" in hovered(page, 3, 30)


def test_the_matrix_is_one_canvas_and_coloured_by_weight(page: Watched) -> None:
    page.open(f"view=attention&mode=matrix&layer=1&mean=0&head=0&theme=light&{HERE}")
    code = """([query, key, n]) => {
      const canvas = document.querySelector('.matrix canvas'), ratio = devicePixelRatio, from = 99;
      const size = (canvas.width / ratio - from - 1) / n;
      const [x, y] = [key, query].map((at) => (from + (at + .5) * size) * ratio);
      return [...canvas.getContext('2d').getImageData(x, y, 1, 1).data];
    }"""
    shade = lambda query, key: sum(page.page.evaluate(code, [query, key, 40])[:3])  # noqa: E731
    row = WEIGHTS[1, 0, 30, 1:31]
    light, dark = int(row.argmin()) + 1, int(row.argmax()) + 1
    assert shade(30, light) > shade(30, dark)
    assert page.page.evaluate("document.querySelectorAll('#view *').length") < 300


def test_a_click_or_the_keyboard_chooses_the_query(page: Watched) -> None:
    page.open(f"view=attention&mode=matrix&layer=1&{HERE}&token=25")
    page.page.focus(".matrix canvas")
    for key in ("ArrowDown", "ArrowDown", "ArrowRight"):
        page.page.keyboard.press(key)
    assert page.text("#cell").startswith("query 27 ") and " on 1 " in page.text("#cell")
    page.press("Enter")
    assert page.page.evaluate("tl.state.now.token") == 27
    assert page.text("#status").startswith("token 27 ")
    hovered(page, 12, 4)
    box = page.page.locator(".matrix canvas").first.bounding_box()
    assert box
    page.page.mouse.click(box["x"] + 110, box["y"] + 99 + 12.5 * (box["height"] - 100) / 40)
    page.settled()
    assert page.page.evaluate("tl.state.now.token") == 12


def test_a_folded_prompt_has_a_column_for_each_span_with_its_whole_weight(page: Watched) -> None:
    page.open(f"view=attention&mode=matrix&layer=1&mean=0&head=0&fold=1&{HERE}")
    page.page.locator(".matrix").scroll_into_view_if_needed()
    # Columns: the first token, the rest of the system turn, the user turn, and 20 tokens of the response.
    told = hovered(page, 10, 2, 20, 23)
    assert "query 30 " in told and "user, 12 tokens" in told
    assert float(told.rpartition(": ")[2]) == pytest.approx(WEIGHTS[1, 0, 30, 8:20].sum(), rel=5e-3)
    assert "system, 7 tokens" in hovered(page, 10, 1, 20, 23)
    page.open(f"view=attention&mode=matrix&layer=1&mean=0&head=0&response=1&{HERE}")
    told = hovered(page, 10, 2, 20, 20)
    assert "query 30 " in told and " on 22 " in told


def test_a_window_shows_the_tokens_around_the_chosen_one(page: Watched) -> None:
    page.open(f"view=attention&mode=matrix&layer=0&window=10&token=30&{HERE}")
    assert "query 25 " in hovered(page, 0, 0, 10, 10)
    assert " on 34 " in hovered(page, 9, 9, 10, 10)


def test_heads_are_a_table_of_means_that_opens_a_head(page: Watched) -> None:
    page.open(f"view=attention&mode=heads&measure=distance&{HERE}")
    queries = range(N_LONG_PROMPT, 40)
    for layer in range(N_LAYERS):
        for head in range(N_HEADS):
            looked = [sum(WEIGHTS[layer, head, q, k] * (q - k) for k in range(q + 1)) for q in queries]
            told = page.text(f".heads td[data-layer='{layer}'][data-head='{head}']")
            assert float(told) == pytest.approx(np.mean(looked), rel=0.06)
    page.page.click(".heads td[data-layer='2'][data-head='1']")
    page.settled()
    assert page.page.evaluate("[tl.state.now.layer, tl.state.now.head, tl.state.now.mode]") == [2, 1, "matrix"]
    page.open(f"view=attention&mode=heads&measure=distance&{HERE}&layer=1&head=0")
    page.page.focus(".heads td[tabindex='0']")
    page.page.keyboard.press("ArrowUp")
    page.press("Enter")
    assert page.page.evaluate("[tl.state.now.layer, tl.state.now.head]") == [2, 0]


def test_a_matrix_of_two_thousand_tokens_is_drawn_at_once(page: Watched) -> None:
    page.open(f"view=attention&mode=matrix&{HERE}")
    code = """async () => {
      const n = 2000, queries = Array.from({ length: n }, (_, q) => q), tokens = queries.map((q) => `t${q}`);
      const weights = new Float32Array(n * (n + 1) / 2).map((_, index) => (index % 97) / 97);
      const box = document.createElement('div');
      document.querySelector('#view').append(box);
      const part = tl.attention.matrix.create(box), data = { tokens, labels: tokens, n_prompt_tokens: 5, spans: [] };
      const own = { attention: tl.source.attention, attentionMatrix: tl.source.attentionMatrix };
      tl.source.attention = async () => ({ n_heads: 1, n_layers: 1, present_layers: [0] });
      tl.source.attentionMatrix = async () => ({ queries, weights });
      const start = performance.now(), state = { ...tl.state.now, layer: 0, token: null, fold: false, response: false };
      await part.update({ ...state, window: '' }, new Set(), data);
      const took = performance.now() - start, canvas = box.querySelector('canvas');
      Object.assign(tl.source, own);
      const found = [took, canvas.width, box.querySelectorAll('*').length, box.textContent];
      box.remove();
      return found;
    }"""
    took, width, n_elements, text = page.page.evaluate(code)
    assert took < 8000  # half a second on a quiet machine
    assert width < 2000 and n_elements < 60
    assert "A pixel shows the largest of" in text


# -- internals ------------------------------------------------------------------------------------


def test_internals_show_what_layers_add_and_what_was_stored(page: Watched, root: Path) -> None:
    page.open(f"view=internals&{HERE}&token=30")
    attention, mlp = page.traces(0)
    assert (attention["y"], mlp["y"]) == ([2.0] * N_LAYERS, [2.0] * N_LAYERS)  # the norm of four ones
    file = torch.load(root / "experiments/exp/inference/raw/internals/odd/4_L1.pt", weights_only=True)
    post = file["blocks.1.mlp.hook_post"][30]
    first = page.page.query_selector_all(".tables table")[0].query_selector_all("tbody tr")[0].query_selector_all("td")
    assert int(first[0].inner_text()) == int(post.abs().argmax())
    assert float(first[1].inner_text()) == pytest.approx(post[post.abs().argmax()].item(), rel=1e-3)
    scores = file["blocks.1.mlp.hook_router_scores"]
    experts = page.page.query_selector_all(".tables table")[1].query_selector_all("tbody td:first-child")
    assert [int(each.inner_text()) for each in experts] == scores[30].argsort(descending=True).tolist()
    (router,) = page.traces(2)
    np.testing.assert_allclose(router["z"], scores.T.numpy(), rtol=1e-4)
    page.open(f"view=internals&{HERE}&token=30&added=trait")
    attention, mlp = page.traces(0)
    t = 30 - N_LONG_PROMPT
    assert attention["y"] == pytest.approx([t % 7 - t % 5] * N_LAYERS)
    assert mlp["y"] == pytest.approx([t / 9 - t % 7] * N_LAYERS)


def test_internals_that_are_missing_or_damaged_say_so(page: Watched, root: Path) -> None:
    page.open("view=internals&experiment=exp&set=odd&prompt=1&trait=style/odd")
    told = page.text("#view")
    assert "1.pt: cannot be read as a tensor file" in told
    assert "no internals of this prompt" in told and "--layer-internals all --replay --root" in told
    assert "failed" not in told
    page.wrong.clear()  # the browser logs the status


# -- the lens, terms and the trait ----------------------------------------------------------------


def test_rank_and_probability_have_a_hue_each_in_the_lens(page: Watched) -> None:
    seen = {}
    for by in ("probability", "rank"):
        page.open(f"view=lens&{HERE}&by={by}&token=30")
        colour = page.page.evaluate(
            "getComputedStyle(document.querySelector('.token[data-token=\"30\"]')).backgroundColor"
        )
        seen[by] = [float(part) for part in colour[colour.index("(") + 1 : -1].split(",")[:3]]
        assert page.page.query_selector("#status .scale")
        assert by in page.text("#status")
    assert seen["probability"] == [126, 70, 190] and seen["rank"] == [20, 130, 110]
    (heat,) = page.traces(0)
    assert heat["colorscale"][0][1] == "rgb(20,130,110)"


@pytest.mark.parametrize("view", ["layers", "lens", "attention", "internals", "vectors", "difference"])
def test_every_colour_bar_says_what_it_is_of(page: Watched, view: str) -> None:
    page.open(f"view={view}&{HERE.replace('prompt=4', 'prompt=1') if view == 'difference' else HERE}")
    code = """[...document.querySelectorAll('.plot')].flatMap((plot) => plot.data ?? [])
      .filter((trace) => trace.type === 'heatmap').map((trace) => trace.colorbar?.title?.text ?? null)"""
    titles = page.page.evaluate(code)
    assert titles and all(titles)


def test_the_stretch_in_which_a_trait_persists_is_drawn_thick_over_its_line(page: Watched, root: Path) -> None:
    """What figures of Python mark is the oracle."""
    folder = root / "experiments" / "exp" / "inference" / "style" / "odd" / "residual_stream"
    content = json.loads((folder / "odd" / "4.json").read_text())
    for token, point in enumerate(content["projections"]["response"]):
        point[:] = [[0.0, 0.0, 10.0 if 5 <= token < 12 else 1.0]] * N_LAYERS
    answer = {"kind": "answer", "role": "assistant", "start": 5, "stop": 12, "mean": 10.0, "peak_velocity": 9.0}
    content["dynamics"] |= {"persistence": 6, "commitment_point": None, "by_span": [answer]}
    content["metadata"] |= {"prompt_set": "lasting", "definitions": 2}
    content["metadata"]["vector_source"]["calibration"] = {"negative_mean": 1.0, "positive_mean": 5.0}
    write(folder / "lasting" / "4.json", content)
    expected = TokenScores.read(folder / "lasting" / "4.json")
    _, marked = trajectory_figure([expected]).data
    page.open(f"view=dynamics&{HERE.replace('odd&prompt', 'lasting&prompt')}")
    line, *others = page.traces()
    (thick,) = [each for each in others if each["name"] == "persists"]
    assert thick["x"] == list(marked.x)
    assert thick["y"] == list(marked.y)
    assert thick["line"]["color"] == line["line"]["color"]
    assert page.text("#marks") == f"Dashed: the response begins; {PERSISTS}."
    assert "Means, calibrated: answer 2.25." in page.text("#view")
    page.open(f"view=dynamics&{HERE}")
    assert page.text("#marks") == "Dashed: the response begins; diamond: commits."


def test_terms_are_defined_in_tooltips_that_the_keyboard_reaches(page: Watched) -> None:
    page.open(f"view=dynamics&{HERE}")
    terms = {
        each.inner_text(): each.get_attribute("title")
        for each in page.page.query_selector_all("#view abbr[tabindex='0']")
    }
    assert {"commitment", "persistence", "velocity"} <= set(terms) and all(terms.values())
    assert page.page.get_attribute("#view button:has-text('calibrated')", "title").startswith(
        "On the scale of the examples"
    )
    assert page.page.evaluate("tl.TERMS.fallback").startswith("Chosen by a rule alone")
    assert page.page.query_selector("#status .scale")


KNOWN = {"stands_out": True, "chance": 1.0, "answer": "", "n_samples": 0}
STANDS_OUT = {
    "rows": [{**KNOWN, "id": id, "captures": [id], "trait": trait, "rise": rise, "rises": {trait: rise}}
             for id, trait, rise in (("1", "style/odd", 9.0), ("4", "z/rising", 3.0))],
    "traits": ["style/odd", "z/rising"], "against": "the reference prompts", "findings": None, "doubts": [],
    "problems": [], "unread": [],
}  # fmt: skip


@pytest.fixture
def slow(context: Any, address: str) -> Iterator[tuple[Watched, list[Any]]]:
    """The page with a set that has three traits, and requests for its overview, which are answered when a test does."""
    page, waiting = Watched(context, address), []
    prompts = [{"id": id, "text": "", "attention": True, "logit_lens": True} for id in (1, 4)]
    listed = json.dumps({"name": "odd", "traits": ["a/first", "style/odd", "z/rising"], "prompts": prompts})
    page.page.route("**/api/exp/sets/odd", lambda route: route.fulfill(body=listed, content_type="application/json"))
    page.page.route("**/api/exp/overviews/**", lambda route: waiting.append(route))
    yield page, waiting
    page.page.close()


def answer(waiting: list[Any]) -> None:
    for route in waiting:
        route.fulfill(body=json.dumps(STANDS_OUT), content_type="application/json")


def test_the_trait_that_stands_out_in_the_prompt_is_chosen_first(slow: tuple[Watched, list[Any]]) -> None:
    page, waiting = slow
    page.page.unroute("**/api/exp/overviews/**")
    page.page.route("**/api/exp/overviews/**", lambda route: answer([route]))
    page.open("experiment=exp&set=odd&view=lens&prompt=4")
    assert "trait=z%2Frising" in page.page.url
    assert not waiting


def test_it_is_chosen_however_late_it_is_known_unless_a_trait_was_chosen(slow: tuple[Watched, list[Any]]) -> None:
    page, waiting = slow
    page.open("experiment=exp&set=odd&view=lens&prompt=4")
    assert "finding the trait" in page.text("#pickers") and "a/first" in page.text("#pickers")
    assert "trait=" not in page.page.url  # which somebody may copy
    page.page.evaluate("tl.state.set({ token: 3 })")
    page.settled()
    answer(waiting)
    page.page.wait_for_selector("#pickers button[aria-label=trait]:has-text('z/rising')")
    page.settled()
    assert "finding the trait" not in page.text("#pickers") and "trait=z%2Frising" in page.page.url


@pytest.mark.parametrize("chosen", ["a/first", "style/odd"])  # of which the first stood in
def test_a_trait_that_was_chosen_meanwhile_stays(slow: tuple[Watched, list[Any]], chosen: str) -> None:
    page, waiting = slow
    page.open("experiment=exp&set=odd&view=lens&prompt=4")
    page.page.click("#pickers button[aria-label=trait]")
    page.page.click(f"#pickers li:has-text('{chosen}')")
    page.settled()
    answer(waiting)
    page.page.wait_for_timeout(300)
    page.settled()
    assert page.page.evaluate("tl.state.now.trait") == chosen
    assert "finding the trait" not in page.text("#pickers")


def test_a_large_set_is_listed_before_it_is_known_what_stands_out(page: Watched) -> None:
    page.open(f"view=dynamics&{HERE}")
    page.page.evaluate("""() => {
      window.own = { overview: tl.source.overview, promptSet: tl.source.promptSet };
      const ids = Array.from({ length: 450 }, (_, number) => String(number + 1)), traits = ['style/odd'];
      const prompts = ids.map((id) => ({ id, text: `text ${id}` }));
      tl.source.promptSet = async () => ({ name: 'odd', traits, prompts });
      const rows = ids.map((id) => ({
        id, captures: [id], n_samples: 0, answer: `answer ${id}`, trait: 'style/odd', rise: 450 - id, chance: 400,
        stands_out: id < 50, rises: { 'style/odd': 450 - id },
      }));
      const found = { rows, traits, against: 'the other prompts', doubts: [], problems: [], unread: [] };
      tl.source.overview = () => new Promise((resolve) => { window.tell = () => resolve(found); });
      tl.state.set({ view: 'overview' });
    }""")
    page.settled()
    rows = "document.querySelectorAll('.overview tbody tr:not(.more)').length"
    assert page.page.evaluate(rows) == 200
    assert "the first 200 of 450 prompts" in page.text(".overview .more")
    assert "Reading what stands out in 450 captures" in page.text("#view")
    page.page.evaluate("document.querySelector('.scrolled').scrollTop = 1e6")
    page.page.wait_for_selector(".overview tbody tr:nth-child(202)", state="attached")
    while page.page.query_selector(".overview .more button"):
        page.page.evaluate("document.querySelector('.overview .more button').click()")
    assert page.page.evaluate(rows) == 450
    page.page.evaluate("window.tell()")
    page.page.wait_for_selector(".overview .answer:has-text('answer 449')", state="attached")
    assert page.page.evaluate(rows) == 450  # what was drawn stays
    assert "Reading" not in page.text("#view")
    assert "450 of 450 prompts; in 49 a trait stands out, by chance in 23" in page.text("#view .controls")
    page.page.click(".overview th.rise button")
    page.page.click(".overview th.rise button")
    page.page.wait_for_selector(".overview tbody tr:first-child:has-text('text 450')")
    assert page.page.evaluate(rows) == 200
    page.page.fill("#find", "text 33")
    page.page.wait_for_selector("#view .controls:has-text('14 of 450 prompts')")  # with 33 in the number
    page.page.evaluate("() => { Object.assign(tl.source, window.own); tl.state.set({ find: '', sort: '' }); }")
    page.settled()


# -- notes ----------------------------------------------------------------------------------------


def test_a_note_is_made_changed_and_removed_on_the_page(page: Watched, root: Path) -> None:
    layout = Layout(root, "exp")
    page.open(f"view=lens&{HERE}&token=25")
    page.page.click("#notes [data-add]")
    page.page.fill("#notes textarea", f"turns here {HOSTILE}")
    page.page.fill("#notes input[aria-label='to token']", "26")
    page.page.click("#notes button[type=submit]")
    page.page.wait_for_selector("#notes li")
    (note,) = read_notes(layout, "odd", "4").notes
    assert (note.start, note.stop, note.text, note.tokens) == (25, 27, f"turns here {HOSTILE}", LONG[25:27])
    assert HOSTILE in page.text("#notes li")
    noted = "[...document.querySelectorAll('#strip .noted')].map((each) => Number(each.dataset.token))"
    assert page.page.evaluate(noted) == [25, 26]
    page.page.click("#notes button:has-text('change')")
    page.page.fill("#notes textarea", "other words")
    page.page.keyboard.press("Control+Enter")
    page.page.wait_for_selector("#notes li:has-text('other words')")
    page.page.click("#notes button:has-text('remove')")
    page.page.wait_for_selector("#notes li", state="detached")
    assert read_notes(layout, "odd", "4").notes == []
    assert page.page.evaluate(noted) == []


def test_the_keyboard_makes_a_note_on_a_span(page: Watched, root: Path) -> None:
    page.open(f"view=lens&{HERE}&token=22")
    page.page.click("#strip .token[data-token='24']", modifiers=["Shift"])
    assert page.page.evaluate("document.activeElement.tagName") == "TEXTAREA"
    page.page.keyboard.type("a span, n p 3")
    page.page.keyboard.press("Control+Enter")
    page.page.wait_for_selector("#notes li")
    (note,) = read_notes(Layout(root, "exp"), "odd", "4").notes
    assert (note.start, note.stop, note.text) == (22, 25, "a span, n p 3")
    page.page.focus("#strip .token[tabindex='0']")
    page.page.keyboard.press("a")
    assert page.page.evaluate("document.activeElement.tagName") == "TEXTAREA"
    page.page.keyboard.press("Escape")
    assert page.page.query_selector("#notes textarea") is None
    shutil.rmtree(root / "experiments/exp/notes")


def test_notes_from_right_to_left_are_shown_so(page: Watched, root: Path) -> None:
    add_note(Layout(root, "exp"), "odd", "4", Marked.of(LONG, 25), "הערה: כאן")
    page.page.goto("about:blank")
    page.open(f"view=lens&{HERE}&token=25")
    page.page.wait_for_selector("#notes li p")
    assert page.page.evaluate("getComputedStyle(document.querySelector('#notes li p')).direction") == "rtl"
    assert page.page.evaluate("getComputedStyle(document.querySelector('.strip')).unicodeBidi") == "plaintext"
    shutil.rmtree(root / "experiments/exp/notes")


def test_notes_of_others_are_not_overwritten_and_the_page_says_so(page: Watched, root: Path) -> None:
    layout = Layout(root, "exp")
    note = add_note(layout, "odd", "4", Marked.of(LONG, 3), "as it was")
    page.page.goto("about:blank")
    page.open(f"view=lens&{HERE}&token=21")
    page.page.click("#notes button:has-text('change')")
    path = next((layout.folder / "notes/odd").glob(f"4_{note.id}.json"))
    write(path, {**json.loads(path.read_text()), "revision": 2, "text": "by another"})
    page.page.fill("#notes textarea", "mine")
    page.page.click("#notes button[type=submit]")
    page.page.wait_for_selector("#notes .warning:has-text('somebody has changed this note')")
    assert [each.text for each in read_notes(layout, "odd", "4").notes] == ["by another"]
    assert "by another" in page.text("#notes")
    shutil.rmtree(layout.folder / "notes")
    page.wrong.clear()  # the browser logs the refusal


def test_an_exported_page_shows_notes_matrices_heads_and_internals(context: Any, root: Path, tmp_path: Path) -> None:
    add_note(Layout(root, "exp"), "odd", "4", Marked.of(LONG, 25, 27), HOSTILE)
    target = tmp_path / "page.html"
    try:
        export_page(root, "exp", ["odd"], target)
    finally:
        shutil.rmtree(root / "experiments/exp/notes")
    page = Watched(context, target.as_uri())
    page.open(f"view=attention&mode=matrix&layer=1&mean=0&head=1&{HERE}")
    page.page.locator(".matrix").scroll_into_view_if_needed()
    assert float(hovered(page, 30, 3).rpartition(": ")[2]) == pytest.approx(WEIGHTS[1, 1, 30, 3], rel=5e-3)
    assert HOSTILE in page.text("#notes li")
    assert "an exported page takes no notes" in page.text("#notes")
    assert page.page.query_selector("#notes [data-add]") is None
    page.open(f"view=attention&mode=heads&{HERE}")
    assert page.page.query_selector(".heads td[data-head='1']")
    page.open(f"view=internals&{HERE}&token=30")
    assert len(page.page.query_selector_all(".tables table")) == 3
    assert page.wrong == []
    page.page.close()


# -- while a capture runs -------------------------------------------------------------------------


def test_captures_at_work_are_counted_and_appear_without_a_reload(eager: Watched, root: Path) -> None:
    page = eager
    layout = Layout(root, "exp")
    record = layout.run_record("20260103T000000Z-capture-2")
    content = {"status": "running", "command_line": "tlcapture capture --experiment exp --prompt-set odd",
               "planned": {"odd": {"new": 6, "kept": 0}}, "failures": []}  # fmt: skip
    folders = lambda n: {"files": {"folders": {"inference/raw/residual/odd": {"files": n, "bytes": 1}}}}  # noqa: E731
    page.open(f"view=overview&{HERE}")
    page.page.evaluate("window.loadedOnce = true")
    with locked(layout.lock("captures-of-odd")):
        write(record, {**content, **folders(4)})
        page.page.wait_for_selector(
            "#work:has-text('4 of 6 captures of odd are here; a run is making the other 2')", timeout=15_000
        )
        shutil.copyfile(layout.residual("odd", "3"), layout.residual("odd", "5"))
        write(record, {**content, **folders(5), "failures": [{"what": "odd/6", "reason": "x"}]})
        page.page.wait_for_selector("#work:has-text('5 of 6'):has-text('other 0, 1 failed')", timeout=15_000)
        page.page.wait_for_selector(".overview tbody th button:has-text('5 ')", timeout=15_000)
    layout.residual("odd", "5").unlink()
    write(record, {**content, **folders(4)})
    page.page.wait_for_selector("#work:has-text('4 of 6'):has-text('stopped before the other 2')", timeout=15_000)
    assert page.text("#work code") == "tlcapture capture --experiment exp --prompt-set odd --skip-existing"
    write(record, {**content, **folders(6), "status": "done"})
    page.page.wait_for_selector("#work", state="hidden", timeout=15_000)
    assert page.page.evaluate("window.loadedOnce")


def test_a_new_capture_does_not_disturb_what_is_read(eager: Watched, root: Path) -> None:
    page = eager
    layout = Layout(root, "exp")
    page.open(f"view=lens&{HERE}&token=30")
    page.page.focus("#strip .token[data-token='30']")
    page.page.evaluate("document.querySelector('#strip .token').same = true")
    shutil.copyfile(layout.residual("odd", "3"), layout.residual("odd", "5"))
    known = "tl.source.promptSet('exp', 'odd').then((found) => found.prompts.some((each) => each.id === '5'))"
    for _ in range(60):
        if page.page.evaluate(known):
            break
        page.page.wait_for_timeout(300)
    assert page.page.evaluate(known)
    page.settled()
    assert page.page.evaluate("document.querySelector('#strip .token').same === true")
    assert page.page.evaluate("document.activeElement.dataset.token") == "30"
    layout.residual("odd", "5").unlink()


def test_the_focus_stays_where_it_was_when_controls_are_drawn_anew(page: Watched) -> None:
    page.open(f"view=attention&mode=matrix&{HERE}")
    page.page.focus("#view select[aria-label=layer]")
    page.page.select_option("#view select[aria-label=layer]", "0")
    page.settled()
    assert page.page.evaluate("document.activeElement.getAttribute('aria-label')") == "layer"


def test_the_focus_returns_to_a_picker_of_which_an_option_was_taken(page: Watched) -> None:
    page.open(f"view=dynamics&{HERE}")
    page.page.focus("#pickers [aria-label=set]")
    page.page.keyboard.press("Enter")
    page.page.keyboard.press("Enter")
    page.settled()
    assert "prompt=1&" in page.page.url  # the header was drawn anew
    assert page.page.evaluate("document.activeElement.getAttribute('aria-label')") == "set"


def test_a_damaged_file_is_named(page: Watched, root: Path) -> None:
    path = root / "experiments/exp/analysis/per_token/odd/4_attention.json"
    whole = path.read_text()
    path.write_text(whole[: len(whole) // 2])
    page.page.goto("about:blank")
    try:
        for mode in ("matrix", "heads", "token"):
            page.open(f"view=attention&mode={mode}&{HERE}")
            assert "4_attention.json" in page.text(".empty"), mode
    finally:
        path.write_text(whole)
        page.wrong.clear()  # the browser logs the status


# -- accessibility --------------------------------------------------------------------------------

STATES = ["overview", "dynamics", "layers", "lens", "attention&mode=token", "attention&mode=matrix",
          "attention&mode=heads", "internals", "vectors", "compare", "difference"]  # fmt: skip


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("state", STATES)
def test_axe_finds_nothing_serious(page: Watched, root: Path, state: str, theme: str) -> None:
    if state == "attention&mode=token":
        add_note(Layout(root, "exp"), "odd", "4", Marked.of(LONG, 25, 27), "a note")
    page.open(
        f"view={state}&{HERE.replace('prompt=4', 'prompt=1') if state == 'difference' else HERE}&token=2&theme={theme}"
    )
    found = page.violations()
    if state == "attention&mode=token":
        shutil.rmtree(root / "experiments/exp/notes")
    serious = [
        f"{each['id']}: {node['html'][:160]} {node.get('failureSummary', '')[:300]}"
        for each in found
        if each["impact"] in ("serious", "critical")
        for node in each["nodes"]
    ]
    assert serious == []


@pytest.mark.parametrize("state", STATES)
def test_a_phone_s_width_needs_no_sideways_scrolling(page: Watched, state: str) -> None:
    page.page.set_viewport_size({"width": 390, "height": 800})
    try:
        page.open(f"view={state}&{HERE.replace('prompt=4', 'prompt=1') if state == 'difference' else HERE}&token=2")
        assert page.page.evaluate("document.documentElement.scrollWidth") <= 390
    finally:
        page.page.set_viewport_size({"width": 1366, "height": 900})
