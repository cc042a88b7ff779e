"""Shards are a partition, and runs that could write the same file never run at the same time."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tlcapture.errors import InputError
from tlcapture.runs.prompt_shares import PromptShare
from tlcapture.runs.run import Run
from tlcapture.runs.run_lock import run_lock
from tlcapture.storage.experiments.layout import Layout

WHAT = "captures of short"


@given(st.integers(0, 60), st.integers(1, 20))
def test_the_shards_of_a_set_are_a_partition_into_equal_parts(n_prompts: int, count: int) -> None:
    prompts = list(range(n_prompts))
    shares = [PromptShare(number, count).of(prompts) for number in range(1, count + 1)]
    assert sorted(prompt for share in shares for prompt in share) == prompts
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize("text", ["0/3", "4/3", "1", "1/0", "-1/3", "a/b", "1/3/5", "", "1.5/2"])
def test_invalid_shards_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="is not a shard: expected i/n with i from 1 to n"):
        PromptShare.parse(text)


def test_a_shard_survives_parsing_and_printing() -> None:
    assert str(PromptShare.parse(" 2/16 ")) == "2/16"


@contextmanager
def running(layout: Layout, shard: PromptShare | None, division: str = "shard") -> Iterator[None]:
    """A run in another thread, which holds the lock until the context ends."""
    begun, end = threading.Event(), threading.Event()

    def run() -> None:
        with run_lock(Run.silent(layout), WHAT, shard, division):
            begun.set()
            assert end.wait(20)

    thread = threading.Thread(target=run)
    thread.start()
    assert begun.wait(20)
    try:
        yield
    finally:
        end.set()
        thread.join(20)


def waits(layout: Layout, shard: PromptShare | None, division: str = "shard", patience: float = 0.5) -> bool:
    """Whether a run that starts now has to wait."""
    begun = threading.Event()

    def run() -> None:
        with run_lock(Run.silent(layout), WHAT, shard, division) as waited:
            assert waited or not has_waited
            begun.set()

    has_waited = False
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    has_waited = not begun.wait(patience)
    return has_waited


def test_shards_of_one_division_run_at_the_same_time(tmp_path: Path) -> None:
    layout = Layout(tmp_path, "exp")
    with running(layout, PromptShare(1, 3)), running(layout, PromptShare(3, 3)):
        assert not waits(layout, PromptShare(2, 3), patience=10)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (PromptShare(1, 2), PromptShare(1, 2)),
        (PromptShare(1, 2), None),
        (None, PromptShare(1, 2)),
        (None, None),
        (PromptShare(1, 2), PromptShare(2, 3)),
    ],
)
def test_runs_that_could_write_the_same_file_wait(
    tmp_path: Path, first: PromptShare | None, second: PromptShare | None
) -> None:
    layout = Layout(tmp_path, "exp")
    with running(layout, first):
        assert waits(layout, second)


def test_shards_of_another_division_wait(tmp_path: Path) -> None:
    layout = Layout(tmp_path, "exp")
    with running(layout, PromptShare(1, 2)):
        assert waits(layout, PromptShare(2, 2), "projection")


def test_a_finished_run_blocks_no_other(tmp_path: Path) -> None:
    layout = Layout(tmp_path, "exp")
    for shard in (PromptShare(1, 2), PromptShare(1, 3), None):
        with running(layout, shard):
            pass
    for shard in (PromptShare(2, 2), None, PromptShare(1, 3)):
        assert not waits(layout, shard, patience=10)
