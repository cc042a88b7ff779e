"""Conversations, several prompts, standard input and files, and thinking, from the command line."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from tests.test_chat_templates import AGAIN, ANSWER, PUBLISHED, SYSTEM, USER
from tlcapture.captures.capture import Capture
from tlcapture.explore.experiment import Experiment
from tlcapture.page.contents import Contents
from tlcapture.storage.files import read_json
from tlcapture.traits.projections.files import ProjectionFile

Run = Callable[..., Result]
TURNS = [SYSTEM, USER, ANSWER, AGAIN]


@pytest.fixture
def talks(data: Path) -> Path:
    """The prompt set `talks` of a conversation and a text."""
    path = data / "datasets/inference/talks.json"
    prompts = [{"id": 1, "messages": TURNS}, {"id": 2, "text": "what?"}]
    path.write_text(json.dumps({"name": "talks", "prompts": prompts}))
    return path


def adhoc(root: Path, prompt_id: str = "1") -> Capture:
    return Capture.open(root / f"experiments/exp/inference/raw/residual/adhoc/{prompt_id}.pt")


def texts_of(found: Capture) -> list[tuple[str, str | None, str]]:
    return [
        (span.kind, span.role, "".join(found.tokens[slice(*span.found)]))
        for span in found.spans
        if span.found is not None
    ]


def with_template(name: str, folder: Path, tiny_folder: Path) -> Path:
    """The tiny model with a published chat template."""
    shutil.copytree(tiny_folder, folder)
    (folder / "chat_template.jinja").write_text(PUBLISHED[name])
    return folder


@pytest.mark.filterwarnings("ignore:.*by default")
def test_spans_are_in_raw_files_projections_frames_and_on_the_page(
    capture: Run, extract: Run, data: Path, talks: Path
) -> None:
    extract()
    assert capture("--attention", prompts=("--prompt-set", "talks")).exit_code == 0
    layout = data / "experiments/exp"
    raw = layout / "inference/raw/residual/talks/1.pt"
    stored = torch.load(raw, weights_only=True)
    found = Capture.open(raw)
    assert stored["spans"] == [span.to_json() for span in found.spans]
    turns = [(role, text.strip()) for kind, role, text in texts_of(found) if kind == "turn"]
    assert turns == [(each["role"], each["content"].strip()) for each in TURNS]
    assert found.metadata["messages"] == TURNS
    assert found.metadata["system_prompt"] == SYSTEM["content"]

    projection = json.loads((layout / "inference/tone/loud/residual_stream/talks/1.json").read_bytes())
    assert projection["spans"] == stored["spans"]
    content = ProjectionFile.parse(projection, raw)
    trajectory = [*content.trajectory[0], *content.trajectory[1]]
    by_span = projection["dynamics"]["by_span"]
    with_tokens = [span for span in found.spans if span.found is not None and span.kind != "template"]
    assert [(each["kind"], each["start"]) for each in by_span] == [(span.kind, span.start) for span in with_tokens]
    for each in by_span:
        values = trajectory[each["start"] : each["stop"]]
        assert each["mean"] == pytest.approx(sum(values) / len(values), rel=1e-4, abs=1e-5)

    in_python = Experiment("exp", data).captures["talks"]["1"].by_span("tone/loud")
    assert [each["mean"] for each in in_python] == pytest.approx([each["mean"] for each in by_span], rel=1e-4)

    frame = Experiment("exp", data).to_pandas("talks", traits="tone/loud")
    rows = frame[frame.prompt_id == 1]
    for span in found.spans:
        start, stop = span.found or (0, 0)
        part = rows[(rows.token_idx >= start) & (rows.token_idx < stop)]
        assert set(part["span"]) == {span.kind}
        assert set(part["role"].dropna()) == {span.role} - {None}
    assert Contents(data).prompt("exp", "talks", "1")["spans"] == stored["spans"]


def test_dynamics_of_spans_are_recomputed_from_a_projection_file(
    capture: Run, extract: Run, tlcapture: Run, projected: Path
) -> None:
    extract()
    capture()
    path = projected / "1.json"
    before = read_json(path)
    path.write_text(json.dumps({**before, "dynamics": {**before["dynamics"], "by_span": None}}))
    result = tlcapture("project", "--experiment", "exp", "--prompt-set", "short", "--dynamics-only")
    assert result.exit_code == 0, result.output
    after = json.loads(path.read_bytes())["dynamics"]["by_span"]
    for one, other in zip(before["dynamics"]["by_span"], after, strict=True):
        assert one.keys() == other.keys()
        assert one["mean"] == pytest.approx(other["mean"], rel=1e-4, abs=1e-5)


def test_files_from_before_spans_are_read_and_projected(
    capture: Run, extract: Run, tlcapture: Run, raw: Path, projected: Path, data: Path
) -> None:
    extract()
    capture()
    stored = torch.load(raw / "1.pt", weights_only=True)
    del stored["spans"]
    torch.save(stored, raw / "1.pt")
    assert Capture.open(raw / "1.pt").spans == ()
    assert tlcapture("project", "--experiment", "exp", "--prompt-set", "short").exit_code == 0
    content = json.loads((projected / "1.json").read_bytes())
    assert "spans" not in content
    assert "by_span" not in content["dynamics"]
    frame = Experiment("exp", data).to_pandas("short", traits="tone/loud")
    assert frame[frame.prompt_id == "1"]["span"].isna().all()
    assert frame[frame.prompt_id == "2"]["span"].notna().all()


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        ({"stop": 10_000}, "spans: one ends at token 10000 of"),
        ({"role": "<script>"}, "role"),
        ({"start": 5, "stop": 5}, "expected at least one token"),
        ({"start": -1}, "expected a number of at least 0, found -1"),
    ],
)
def test_spans_that_do_not_fit_the_tokens_are_refused(
    capture: Run, raw: Path, damage: dict[str, Any], reason: str
) -> None:
    capture()
    stored = torch.load(raw / "1.pt", weights_only=True)
    stored["spans"][-1].update(damage)
    torch.save(stored, raw / "1.pt")
    with pytest.raises(Exception, match=reason) as caught:
        Capture.open(raw / "1.pt")
    assert str(raw / "1.pt") in str(caught.value)


def test_the_same_id_with_other_messages_is_another_prompt(capture: Run, data: Path, talks: Path) -> None:
    words = ("--skip-existing",)
    assert "wrote 2 files" in capture(*words, prompts=("--prompt-set", "talks")).output
    assert "wrote 0 files" in capture(*words, prompts=("--prompt-set", "talks")).output
    changed = [SYSTEM, USER, {**ANSWER, "content": "Rain does."}, AGAIN]  # the text that is shown is the same
    talks.write_text(json.dumps([{"id": 1, "messages": changed}, {"id": 2, "text": "what?"}]))
    assert "wrote 1 file" in capture(*words, prompts=("--prompt-set", "talks")).output
    found = Capture.open(data / "experiments/exp/inference/raw/residual/talks/1.pt")
    assert "Rain does." in found.prompt.text


def test_a_system_prompt_of_the_command_line_takes_the_place_of_the_message(
    capture: Run, data: Path, talks: Path
) -> None:
    assert capture("--system-prompt", "Be kind.", prompts=("--prompt-set", "talks")).exit_code == 0
    found = Capture.open(data / "experiments/exp/inference/raw/residual/talks/1.pt")
    assert ("turn", "system", "Be kind.") in texts_of(found)
    assert SYSTEM["content"] not in found.prompt.text
    assert (
        "wrote 0 files"
        in capture("--system-prompt", "Be kind.", "--skip-existing", prompts=("--prompt-set", "talks")).output
    )
    assert "wrote 1 file" in capture("--skip-existing", "--limit", 1, prompts=("--prompt-set", "talks")).output


def test_a_replay_and_projections_alone_know_the_conversation(
    capture: Run, extract: Run, data: Path, talks: Path
) -> None:
    extract()
    only = ("--projections-only", "--skip-existing")
    assert capture(*only, prompts=("--prompt-set", "talks")).exit_code == 0
    assert "wrote 0 files" in capture(*only, prompts=("--prompt-set", "talks")).output
    path = data / "experiments/exp/inference/tone/loud/residual_stream/talks/1.json"
    alone = json.loads(path.read_bytes())
    assert [each["role"] for each in alone["spans"] if each["kind"] == "turn"] == [each["role"] for each in TURNS]
    talks.write_text(json.dumps([{"id": 1, "messages": [USER]}, {"id": 2, "text": "what?"}]))
    assert "wrote 0 files" not in capture(*only, prompts=("--prompt-set", "talks")).output
    shutil.rmtree(data / "experiments/exp/inference")
    capture(prompts=("--prompt-set", "talks"))
    raw = data / "experiments/exp/inference/raw/residual/talks/1.pt"
    before = raw.read_bytes()
    assert capture("--replay", "--logit-lens", "--attention", prompts=("--prompt-set", "talks")).exit_code == 0
    assert raw.read_bytes() == before


def test_prompts_are_numbered_on_and_the_same_text_keeps_its_id(capture: Run, data: Path) -> None:
    capture(prompts=("--prompt", "one", "--prompt", "two"))
    assert [adhoc(data, str(n)).metadata["prompt_text"] for n in (1, 2)] == ["one", "two"]
    before = (data / "experiments/exp/inference/raw/residual/adhoc/1.pt").read_bytes()
    capture("--skip-existing", prompts=("--prompt", "three", "--prompt", "two", "--prompt", "three"))
    folder = data / "experiments/exp/inference/raw/residual/adhoc"
    assert sorted(path.name for path in folder.glob("*.pt")) == ["1.pt", "2.pt", "3.pt"]
    assert adhoc(data, "3").metadata["prompt_text"] == "three"
    assert (folder / "1.pt").read_bytes() == before
    (folder / "4.pt").write_bytes(b"of another tool")
    capture(prompts=("--prompt", "five"))
    assert (folder / "4.pt").read_bytes() == b"of another tool"
    assert adhoc(data, "5").metadata["prompt_text"] == "five"


def test_prompts_come_from_standard_input_and_from_files(
    tlcapture: Run, capture: Run, data: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    from tlcapture.cli.main import main

    words = ["capture", "--experiment", "exp", "--model", str(tiny_folder), "--max-new-tokens", "2", "--prompt", "-"]
    assert CliRunner().invoke(main, words, input="from a pipe\nof two lines\n").exit_code == 0
    assert adhoc(data).metadata["prompt_text"] == "from a pipe\nof two lines"
    (tmp_path / "p.txt").write_text("from a file\n")
    (tmp_path / "c.json").write_text(json.dumps({"messages": TURNS}))
    capture(prompts=("--prompt-file", tmp_path / "p.txt", "--prompt-file", tmp_path / "c.json"))
    assert adhoc(data, "2").metadata["prompt_text"] == "from a file"
    assert adhoc(data, "3").metadata["messages"] == TURNS
    capture(prompts=("--prompt-file", tmp_path / "c.json"))
    assert not (data / "experiments/exp/inference/raw/residual/adhoc/4.pt").exists()
    (tmp_path / "c.jsonl").write_text(f"{json.dumps({'messages': TURNS})}\n\n{json.dumps([USER])}\n")
    capture(prompts=("--prompt-file", tmp_path / "c.jsonl"))
    assert adhoc(data, "4").metadata["messages"] == [USER]
    assert not (data / "experiments/exp/inference/raw/residual/adhoc/5.pt").exists()


def test_the_prompts_of_the_command_line_are_a_set_that_is_replayed_and_captured_again(
    capture: Run, data: Path, tmp_path: Path
) -> None:
    turns = tmp_path / "turns.json"
    turns.write_text(json.dumps(TURNS))
    given = ("--prompt", "one", "--prompt-file", turns, "--system-prompt", "Be brief.")
    assert capture("--no-project", prompts=given).exit_code == 0
    before = [adhoc(data, n) for n in ("1", "2")]
    again = capture("--replay", "--attention", prompts=("--prompt-set", "adhoc"))  # as the page advises
    assert again.exit_code == 0, again.output
    kept = data / "experiments/exp/analysis/per_token/adhoc"
    assert sorted(path.name for path in kept.iterdir()) == ["1_attention.json", "2_attention.json"]
    skipped = capture("--skip-existing", "--no-project", prompts=("--prompt-set", "adhoc"))
    assert "2 prompts skipped" in skipped.output, skipped.output
    assert capture("--no-project", "--limit", "1", prompts=("--prompt-set", "adhoc")).exit_code == 0
    assert [adhoc(data, n).token_ids for n in ("1", "2")] == [each.token_ids for each in before]
    (data / "experiments/exp/inference/raw/residual/adhoc/1.pt").write_bytes(b"damaged")
    done = capture("--replay", "--attention", prompts=("--prompt-set", "adhoc"))
    assert done.exit_code == 1
    assert "failed: adhoc/1: its prompt cannot be read" in done.stderr
    assert "no prompt set 'adhoc'" in capture("--experiment", "new", prompts=("--prompt-set", "adhoc")).stderr


def test_windows_line_endings_and_byte_order_marks_are_no_part_of_a_prompt(
    capture: Run, data: Path, tmp_path: Path
) -> None:
    files = {
        "crlf.txt": b"one\r\ntwo\r\n\r\n",
        "lf.txt": b"one\ntwo\n",
        "mark.txt": b"\xef\xbb\xbfone\ntwo",
        "c.JSON": b'[{"role": "user",\r\n"content": "three"}]\r\n',
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    result = capture(prompts=[word for name in files for word in ("--prompt-file", tmp_path / name)])
    assert result.exit_code == 0, result.output
    assert [adhoc(data, prompt_id).metadata["prompt_text"] for prompt_id in ("1", "2")] == ["one\ntwo", "three"]
    assert adhoc(data, "2").metadata["messages"] == [{"role": "user", "content": "three"}]
    assert len(list((data / "experiments/exp/inference/raw/residual/adhoc").glob("*.pt"))) == 2


@pytest.mark.parametrize(
    ("redirection", "message"),
    [("<&-", "--prompt -: standard input is closed"), ("</dev/null", "--prompt -: text: text is empty")],
)
def test_a_closed_or_empty_standard_input_is_one_clear_line(tmp_path: Path, redirection: str, message: str) -> None:
    command = f"{sys.executable} -m tlcapture capture --root {tmp_path} --experiment exp --prompt - {redirection}"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, f"error: {message}\n")


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        (b"\xff\xfe", "a.txt", "a.txt: not UTF-8 text"),
        (b"  \n", "a.txt", "a.txt: text: text is empty"),
        (b"[", "a.json", "a.json: line 1, column 2: not valid JSON"),
        (b"3", "a.json", "expected a list of messages"),
        (b'{"messages": [], "tools": []}', "a.json", 'an object with "messages" alone, found messages, tools'),
        (b"\xef\xbb\xbf[]", "a.json", "a.json: messages: expected at least one"),  # a BOM is read over in all JSON
        (b"[]", "a.json", "a.json: messages: expected at least one"),
        (b'["a"]\n[', "a.jsonl", "a.jsonl:2: line 1, column 2: not valid JSON"),
        (b'[]\n{"prompt": "x"}', "a.jsonl", 'a.jsonl:2: expected a list of messages, or an object with "messages"'),
        (b'["a"]', "a.json", 'a.json: message 1: expected {"role", "content"}, found \'a\''),
        (b'[{"role": "user"}]', "a.json", "message 1: content: expected a text, found null"),
        (b'[{"role": "user", "content": "x", "weight": NaN}]', "a.json", "not valid JSON"),
    ],
)
def test_a_file_that_is_no_prompt_is_refused(
    capture: Run, data: Path, tmp_path: Path, content: bytes, name: str, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    result = capture(prompts=("--prompt-file", tmp_path / name))
    assert result.exit_code == 2
    assert message in result.stderr
    assert not (data / "experiments").exists()


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ({"id": 1, "messages": [USER], "text": "x"}, "both messages and text: leave out one of them"),
        ({"id": 1, "messages": "x"}, "messages: expected a list"),
        ({"id": 1, "messages": [SYSTEM, USER], "system_prompt": "x"}, "both system_prompt and a system message"),
        ({"id": 1, "messages": [{"role": "user", "content": "\ud800"}]}, "not valid JSON: no low surrogate in string"),
    ],
)
def test_a_conversation_that_is_not_valid_is_refused(
    capture: Run, talks: Path, prompt: dict[str, Any], message: str
) -> None:
    talks.write_text(json.dumps([prompt]))
    result = capture(prompts=("--prompt-set", "talks"))
    assert result.exit_code == 2
    assert message in result.stderr


def test_thinking_and_values_for_the_template_are_recorded_and_part_of_the_prompt(
    tlcapture: Run, data: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    model = with_template("qwen3", tmp_path / "qwen3", tiny_folder)
    words = ("capture", "--experiment", "exp", "--model", model, "--prompt", "hi", "--max-new-tokens", 2)
    assert tlcapture(*words, "--thinking", "off").exit_code == 0
    found = adhoc(data)
    assert found.metadata["template_args"] == {"enable_thinking": False}
    assert found.metadata["thinking"]["markers"] == "reasoning_content"
    assert found.prompt.text.endswith("<think>\n\n</think>\n\n")
    assert "wrote 0 files" in tlcapture(*words, "--thinking", "off", "--skip-existing").output
    assert "wrote 0 files" in tlcapture(*words, "--template-arg", "enable_thinking=false", "--skip-existing").output
    assert "wrote 1 file" in tlcapture(*words, "--skip-existing").output
    assert "template_args" not in adhoc(data).metadata
    for wrong, message in (
        (("--template-arg", "enable_thinking"), "is not KEY=VALUE"),
        (("--template-arg", "colour=1"), "reads no value of this name"),
        (("--template-arg", "think=1"), "reads no value of this name"),  # the template writes the word
        (("--template-arg", "message=1"), "reads no value of this name"),  # which it sets itself
        (("--template-arg", "tokenize=true"), "tokenize: tlcapture sets it itself"),
        (("--template-arg", "add_generation_prompt=false"), "add_generation_prompt: tlcapture sets it itself"),
        (("--template-arg", "messages=[]"), "messages: tlcapture sets it itself"),
        (("--template-arg", "tools=3"), "tools: the model's chat template fails (TypeError: 'int' object is not"),
        (("--template-arg", "enable_thinking=\udcff"), "expected a JSON value"),
        (("--thinking", "off", "--no-chat-template"), "--thinking is for a chat template"),
    ):
        result = tlcapture(*words, *wrong)
        assert (result.exit_code, message in result.stderr) == (2, True), result.output
    tlcapture(*words, "--template-arg", "enable_thinking=NaN")
    assert adhoc(data).metadata["template_args"] == {"enable_thinking": "NaN"}  # JSON has no such number


def test_a_response_that_ends_within_its_thinking_is_said(
    tlcapture: Run, data: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    model = with_template("deepseek_r1_distill", tmp_path / "r1", tiny_folder)
    words = ("capture", "--experiment", "exp", "--model", model, "--temperature", 0)
    result = tlcapture(*words, "--prompt", "hi", "--max-new-tokens", 3)
    said = "adhoc/1: the response ends within thinking, without an answer: raise --max-new-tokens\n"
    assert said in result.output
    kinds = [(span.kind, span.role) for span in adhoc(data).spans if span.kind != "template"]
    assert kinds == [("turn", "user"), ("thinking", "assistant")]
    estimate = json.loads(tlcapture(*words, "--prompt", "hey", "--dry-run", "--json").stdout.splitlines()[-1])
    short = json.loads(
        tlcapture(*words, "--prompt", "hey", "--dry-run", "--json", "--max-new-tokens", 50).stdout.splitlines()[-1]
    )
    assert estimate["estimate"]["bytes"] > 5 * short["estimate"]["bytes"]
    tlcapture(*words, "--prompt", "hey")
    with_a_switch = with_template("nemotron_3_nano", tmp_path / "nemotron", tiny_folder)
    words = ("--experiment", "other", "--model", with_a_switch, "--max-new-tokens", 3)
    result = tlcapture("capture", *words, "--prompt", "hi", "--prompt", "ho")
    assert "2 prompts (adhoc/1, adhoc/2): responses end within thinking, without an answer: " in result.output
    assert "raise --max-new-tokens, or try --thinking off" in result.output
    assert adhoc(data, "2").metadata["max_new_tokens"] == 256 - len(adhoc(data, "2").prompt.tokens)


def test_what_a_template_drops_is_said(
    tlcapture: Run, data: Path, tiny_folder: Path, talks: Path, tmp_path: Path
) -> None:
    thought = {"role": "assistant", "content": "<think>hm</think>Rivers carry salt."}
    talks.write_text(json.dumps([{"id": 1, "messages": [USER, thought, {**AGAIN, "name": "Ada"}]}]))
    model = with_template("qwen3", tmp_path / "qwen3", tiny_folder)
    words = ("capture", "--experiment", "exp", "--model", model, "--prompt-set", "talks", "--max-new-tokens", 1)
    result = tlcapture(*words)
    assert (
        "the chat template leaves out 'name' and the thinking of earlier messages (metadata: dropped)" in result.output
    )
    found = Capture.open(data / "experiments/exp/inference/raw/residual/talks/1.pt")
    assert found.metadata["dropped"] == ["thinking of message 2", "name of message 3"]


@pytest.mark.parametrize(
    ("name", "thinking"),
    [("qwen3", ()), ("qwen3", ("--thinking", "off")), ("deepseek_r1_distill", ())],
)
def test_a_longer_response_by_default_is_no_other_setting(
    tlcapture: Run, tiny_folder: Path, tmp_path: Path, name: str, thinking: tuple[str, ...]
) -> None:
    """The context of 256 tokens has no room for the 1,024 of the default."""
    model = with_template(name, tmp_path / name, tiny_folder)
    words = ("capture", "--experiment", "exp", "--model", model, "--prompt", "hi", "--temperature", 0, *thinking)
    assert tlcapture(*words).exit_code == 0
    again = tlcapture(*words, "--skip-existing")
    assert "nothing was missing" in again.output
    assert "another temperature" not in again.output
    other = tlcapture(*words, "--skip-existing", "--max-new-tokens", 7)
    assert (
        "kept the capture of prompt 1 made with another temperature, seed, sampling or --max-new-tokens" in other.output
    )


@pytest.mark.parametrize("only", [(), ("--projections-only",)])
def test_a_dry_run_counts_spans_and_messages(
    capture: Run, extract: Run, data: Path, talks: Path, only: tuple[str, ...]
) -> None:
    extract()
    turns = [{"role": role, "content": "so?"} for _ in range(5) for role in ("user", "assistant")]
    talks.write_text(json.dumps([{"id": 1, "messages": turns[:-1]}]))
    words = ("--tokens", "last", "--temperature", 0, *only)
    estimated = json.loads(capture(*words, "--dry-run", "--json", prompts=("--prompt-set", "talks")).stdout)
    capture(*words, prompts=("--prompt-set", "talks"))
    paths = [*(data / "experiments/exp/inference").rglob("1.*")]
    assert estimated["estimate"]["files"] == len(paths)
    assert 0.9 < estimated["estimate"]["bytes"] / sum(path.stat().st_size for path in paths) < 1.2
