"""An actor beside the driver that all workers report to: their progress, and which process began which piece.

When a worker dies, its marks here tell which piece it died of.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

_QUIET = 2.0  # seconds without a report after which it is asked whether a worker's node is dead


@dataclass(frozen=True)
class State:
    """The state that a worker reports.

    Attributes:
        process: Ray's name of its process, which is never used again.
        node: Ray's name of its node.
        doing: the label of its piece, or what it prepares.
        units: the units of work that it counted since it started.
        facts: what it recorded for the run.
    """

    process: str
    node: str
    doing: str
    units: int
    facts: Mapping[str, Any]


@dataclass(frozen=True)
class News:
    """The news since the driver's last reading.

    Attributes:
        units: the units of work that workers have counted.
        facts: what workers recorded for the run.
        doing: what workers are doing, as one line.
        silent: seconds since the last report of each worker that ever reported, by its number.
        gone: the numbers of the workers whose nodes Ray has found dead.
        again: the name of a worker that died and the label of its piece, for each piece that was restarted.
    """

    units: int
    facts: Mapping[str, Any]
    doing: str
    silent: Mapping[int, float]
    gone: frozenset[int]
    again: list[tuple[str, str]]


@dataclass
class Board:
    """The class of the Ray actor."""

    _by_piece: dict[int, dict[str, str]] = field(default_factory=dict)  # names of workers, by their processes
    _again: list[tuple[str, str]] = field(default_factory=list)
    _states: dict[int, State] = field(default_factory=dict)
    _heard: dict[int, float] = field(default_factory=dict)
    _units: int = 0
    _writers: set[str] = field(default_factory=set)
    _is_stopping: bool = False

    def begin(self, piece: int, label: str, worker: str, process: str, writer: str) -> None:
        """Record that a worker's process begins a piece; a process that began it before has died."""
        self._writers.add(writer)
        before = self._by_piece.setdefault(piece, {})
        if before and process not in before:
            self._again.append((list(before.values())[-1], label))
        before[process] = worker

    @classmethod
    def start(cls, ray: Any) -> tuple[str, Any]:
        """Start the actor beside the driver, whose node the run does not outlive; its name, and the actor.

        Workers find it by its name: Ray complains of arguments that a restarted worker may not find any more.
        """
        name = f"tlcapture-{secrets.token_hex(8)}"
        here = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
            ray.get_runtime_context().get_node_id(), soft=False
        )
        how = {"name": name, "num_cpus": 0, "max_restarts": -1, "max_task_retries": -1, "scheduling_strategy": here}
        return name, ray.remote(**how)(cls).remote()

    def begun(self, piece: int) -> int:
        """The number of processes that have begun a piece."""
        return len(self._by_piece.get(piece, ()))

    def writers(self) -> frozenset[str]:
        """All processes that have begun a piece, as the names of their temporary files name them."""
        return frozenset(self._writers)

    def report(self, number: int, state: State) -> bool:
        """Note the state of a worker; returns whether it is to stop."""
        before = self._states.get(number)
        self._units += state.units - (before.units if before and before.process == state.process else 0)
        self._states[number], self._heard[number] = state, time.monotonic()
        return self._is_stopping

    def stop(self) -> None:
        """Let workers stop when they report next."""
        self._is_stopping = True

    def read(self) -> News:
        """The reports, and the pieces that were restarted since the last call."""
        states = sorted(self._states.items())
        again, units, self._again, self._units = self._again, self._units, [], 0
        facts = {name: value for _, state in states for name, value in state.facts.items()}
        doing = ", ".join(f"{number}: {state.doing}" for number, state in states)
        silent = {number: time.monotonic() - heard for number, heard in self._heard.items()}
        return News(units, facts, doing, silent, self._gone(silent), again)

    def _gone(self, silent: Mapping[int, float]) -> frozenset[int]:
        """The workers that have been silent for a while and whose nodes are dead."""
        quiet = [number for number, seconds in silent.items() if seconds > _QUIET]
        if not quiet:
            return frozenset()
        import ray

        alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        return frozenset(number for number in quiet if self._states[number].node not in alive)
