"""The workers of a Ray cluster that share a piece of work: started, checked, replaced when they die, sent home."""

from __future__ import annotations

import secrets
import time
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from tlcapture.cluster.actor import Place, WorkerActor
from tlcapture.cluster.collecting import given_files
from tlcapture.errors import InputError
from tlcapture.runs.executors import Work
from tlcapture.storage.layout import Layout

# How far a worker is that has just started.
STARTS, LACKS_MODEL, TAKES_MODEL, PREPARES, READY = "starts", "lacks model", "takes model", "prepares", "ready"


@dataclass(frozen=True)
class Cluster:
    """How the cluster is asked for: `address` of one that runs (`None` starts one here), and what a worker takes."""

    address: str | None = None
    workers: int | None = None
    cpus_per_worker: float = 1.0
    gpus_per_worker: float = 0.0
    collect: bool = False


@dataclass
class Piece:
    """A part of the work, and how often it was given out."""

    task: Any
    label: str
    tries: int = 0


@dataclass
class Member:
    """A worker: its actor, what it has in hand, and how much it had done when it was last looked at."""

    number: int
    actor: Any
    stage: str = STARTS
    waiting_for: Any = None
    piece: Piece | None = None
    place: Place | None = None
    counted: int = 0
    since: float = field(default_factory=time.monotonic)

    def __str__(self) -> str:
        return f"worker {self.number}" + (f" on {self.place.node}" if self.place else "")


class Probe:
    """A file in the root that every worker must see."""

    def __init__(self, root: Path):
        self.path = root.resolve() / f".tlcapture-{secrets.token_hex(8)}"
        self.content = secrets.token_bytes(16)

    def __enter__(self) -> Probe:
        try:
            self.path.write_bytes(self.content)
        except OSError as error:
            raise InputError(f"{self.path.parent}: cannot be written to: {error.strerror}") from None
        return self

    def __exit__(self, *error: object) -> None:
        with suppress(OSError):
            self.path.unlink()


class Crew:
    """The workers there are; one that dies is replaced."""

    def __init__(self, ray: Any, work: Work, layout: Layout, cluster: Cluster, probe: Probe, size: int):
        self.ray = ray
        self._cluster = cluster
        self._probe = probe
        threads = max(1, int(cluster.cpus_per_worker))
        model: Any = work.model  # a ModelLoader
        load = None if model is None else model.silent()
        self._files = None if model is None else model.files()
        given = ray.put(given_files([layout, *work.reads])) if cluster.collect else None
        self._arguments = (_absolute(layout), work.make, work.unit, load, self._files, threads, given)
        self._kind = ray.remote(
            num_cpus=cluster.cpus_per_worker, num_gpus=cluster.gpus_per_worker, max_concurrency=2, max_restarts=0
        )(WorkerActor)
        self.members = [self._start(number) for number in range(size)]

    def _start(self, number: int) -> Member:
        member = Member(number, self._kind.remote(*self._arguments))
        member.waiting_for = member.actor.place.remote(self._probe.path, self._probe.content)
        return member

    @cached_property
    def model_contents(self) -> dict[str, Any]:
        """The model's files, put into the object store when a first worker lacks them."""
        assert self._files is not None
        return {name: self.ray.put(self._files.send(name)) for name in self._files.sizes}

    def replace(self, member: Member) -> None:
        self.members[self.members.index(member)] = self._start(member.number)

    def check(self, place: Place) -> None:
        """Raise `InputError` for a worker that would write where nobody looks."""
        if not place.sees_root and not self._cluster.collect:
            raise InputError(
                f"a worker on {place.node} does not see {self._probe.path.parent}: give a --root that all nodes of the "
                "cluster share, or pass --collect to have files sent back"
            )

    @property
    def collects(self) -> bool:
        return self._cluster.collect

    def dismiss(self) -> None:
        for member in self.members:
            with suppress(Exception):  # it may be dead, and the cluster gone
                self.ray.kill(member.actor)


def _absolute(layout: Layout) -> Layout:
    return Layout(layout.root.resolve(), layout.experiment)
