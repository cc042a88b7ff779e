"""Shards are a partition, and runs that could write one file never run at once."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tlcapture.errors import InputError
from tlcapture.runs.exclusive import alone
from tlcapture.runs.run import Run
from tlcapture.runs.shards import Shard
from tlcapture.storage.layout import Layout

WHAT = "captures of short"


@given(st.integers(0, 60), st.integers(1, 20))
def test_the_shards_of_a_set_are_disjoint_and_together_all_of_it(n_prompts: int, count: int) -> None:
    prompts = list(range(n_prompts))
    shares = [Shard(number, count).of(prompts) for number in range(1, count + 1)]
    assert sorted(prompt for share in shares for prompt in share) == prompts
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize("text", ["0/3", "4/3", "1", "1/0", "-1/3", "a/b", "1/3/5", "", "1.5/2"])
def test_what_is_no_shard_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="is no shard: expected i/n with i from 1 to n"):
        Shard.parse(text)


def test_a_shard_is_read_as_it_is_written() -> None:
    assert str(Shard.parse(" 2/16 ")) == "2/16"


@contextmanager
def running(layout: Layout, shard: Shard | None, division: str = "shard") -> Iterator[None]:
    """Another run, in a thread of its own."""
    begun, end = threading.Event(), threading.Event()

    def run() -> None:
        with alone(Run.silent(layout), WHAT, shard, division):
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


def waits(layout: Layout, shard: Shard | None, division: str = "shard", patience: float = 0.5) -> bool:
    """Whether a run that begins now does not get to its work, and does when it may."""
    begun = threading.Event()

    def run() -> None:
        with alone(Run.silent(layout), WHAT, shard, division) as waited:
            assert waited or not has_waited
            begun.set()

    has_waited = False
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    has_waited = not begun.wait(patience)
    return has_waited


def test_shards_of_one_division_run_side_by_side(tmp_path: Path) -> None:
    layout = Layout(tmp_path, "exp")
    with running(layout, Shard(1, 3)), running(layout, Shard(3, 3)):
        assert not waits(layout, Shard(2, 3), patience=10)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (Shard(1, 2), Shard(1, 2)),
        (Shard(1, 2), None),
        (None, Shard(1, 2)),
        (None, None),
        (Shard(1, 2), Shard(2, 3)),
    ],
)
def test_what_may_write_one_file_waits(tmp_path: Path, first: Shard | None, second: Shard | None) -> None:
    layout = Layout(tmp_path, "exp")
    with running(layout, first):
        assert waits(layout, second)


def test_what_is_divided_otherwise_waits_too(tmp_path: Path) -> None:
    layout = Layout(tmp_path, "exp")
    with running(layout, Shard(1, 2)):
        assert waits(layout, Shard(2, 2), "projection")


def test_a_run_that_ended_holds_nobody_up(tmp_path: Path) -> None:
    layout = Layout(tmp_path, "exp")
    for shard in (Shard(1, 2), Shard(1, 3), None):
        with running(layout, shard):
            pass
    for shard in (Shard(2, 2), None, Shard(1, 3)):
        assert not waits(layout, shard, patience=10)
