"""Giving out work to the workers of a Ray cluster until all of it is done, whoever dies on the way."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from tlcapture.cluster.actor import Result
from tlcapture.cluster.collecting import contents_of, place
from tlcapture.cluster.pool import LACKS_MODEL, PREPARES, READY, STARTS, TAKES_MODEL, Crew, Member, Piece
from tlcapture.errors import ClusterError, InputError, TlcaptureError
from tlcapture.logger import get_logger
from tlcapture.runs.display import Progress
from tlcapture.runs.executors import Work
from tlcapture.runs.run import Run
from tlcapture.text import first_line

_log = get_logger(__name__)

_POLL = 0.5  # seconds between two looks at the workers
_TRIES = 3  # how often a piece of work is given out before it counts as failed
_MOST_DEATHS = 10  # in a row, beyond one for each worker
_PATIENCE = 300  # seconds for the first worker to start


class Shift:
    """Gives out pieces until all are done."""

    def __init__(self, crew: Crew, pieces: deque[Piece], work: Work, run: Run, progress: Progress):
        self._crew = crew
        self._ray = crew.ray
        self._pieces = pieces
        self._work = work
        self._run = run
        self._progress = progress
        self._n_pieces = len(pieces)
        self._n_done = 0
        self._began: float | None = None
        self._deaths = 0  # since the last piece that was done
        self._last_ready = time.monotonic()

    def run(self) -> None:
        """Give out all pieces; tells the reporter for how long workers were at work, their start apart."""
        try:
            while self._pieces or any(member.piece for member in self._crew.members):
                self._step()
            seconds = 0.0 if self._began is None else time.monotonic() - self._began
            cluster = {"workers": len(self._crew.members), "pieces": self._n_pieces, "seconds": round(seconds, 3)}
            self._run.display.uses(cluster=cluster)
        except BaseException as reason:
            if isinstance(reason, KeyboardInterrupt | TlcaptureError):
                self._wind_up()
            raise

    def _step(self) -> None:
        waiting = {member.waiting_for: member for member in self._crew.members if member.waiting_for is not None}
        ready, _ = self._ray.wait(list(waiting), num_returns=1, timeout=_POLL)
        for reference in ready:
            self._take(waiting[reference], reference)
        self._give_out()
        self._look()
        if not any(member.stage == READY for member in self._crew.members):
            if time.monotonic() - self._last_ready > _PATIENCE:
                raise InputError(f"no worker of the Ray cluster has started within {_PATIENCE} s")

    def _take(self, member: Member, reference: Any) -> None:
        """Take what a worker hands over: that it sees the root, or the result of a piece."""
        member.waiting_for = None
        piece, member.piece = member.piece, None
        try:
            value = self._ray.get(reference)
        except self._ray.exceptions.RayActorError as error:
            self._bury(member, piece, error)
            return
        if piece is None:
            self._welcome(member, value)
            return
        self._accept(member, piece, value)

    def _welcome(self, member: Member, said: Any) -> None:
        """Take a worker in, step by step: it sees the root, it has the model's files, it has loaded the model."""
        actor, stage = member.actor, member.stage
        if stage == STARTS:
            self._crew.check(said)
            member.place = said
            member.stage, member.waiting_for = LACKS_MODEL, actor.lacks_model.remote()
        elif stage == LACKS_MODEL and said:
            member.stage, member.waiting_for = TAKES_MODEL, actor.take_model.remote(self._crew.model_contents)
        elif stage in (LACKS_MODEL, TAKES_MODEL):
            member.stage, member.waiting_for = PREPARES, actor.prepare.remote()
        elif said is not None:
            raise said
        else:
            member.stage = READY
            self._last_ready = time.monotonic()

    def _accept(self, member: Member, piece: Piece, result: Result) -> None:
        self._keep(result)
        if result.error is not None:
            raise result.error
        self._n_done += 1
        self._deaths = 0
        seconds = time.monotonic() - member.since
        rate = f"{result.done.n_tokens / seconds:.0f} tokens/s, " if result.done.n_tokens else ""
        self._progress.advance(done=f"{member}: {piece.label}, {rate}{self._n_done} of {self._n_pieces} pieces")

    def _keep(self, result: Result) -> None:
        done = result.done
        if result.files is not None:
            done = place(self._run.layout, result.files, done)
        self._run.add(done)

    def _bury(self, member: Member, piece: Piece | None, error: Exception) -> None:
        """Replace a worker that died, and put what it had in hand back: as it was, or in halves where it died twice."""
        _log.warning("%s died: %s", member, first_line(error))
        self._deaths += 1
        if self._deaths > _MOST_DEATHS + len(self._crew.members):
            raise ClusterError(f"{self._deaths} workers died in a row, the last one so: {first_line(error)}")
        self._crew.replace(member)
        if piece is None:
            return
        piece.tries += 1
        n_prompts = len(self._work.split(piece.task, 1))
        if piece.tries >= _TRIES and n_prompts == 1:
            self._run.failed(piece.label, f"its worker died {piece.tries} times: {first_line(error)}")
            return
        self._run.report.retried.append(piece.label)
        self._run.line(f"{member} died; its work is run again: {piece.label}")
        if piece.tries < _TRIES - 1 or n_prompts == 1:
            self._pieces.appendleft(piece)
            return
        halves = self._work.split(piece.task, (n_prompts + 1) // 2)
        self._n_pieces += len(halves) - 1
        self._pieces.extendleft(Piece(half, self._work.label(half), _TRIES - 2) for half in halves)

    def _give_out(self) -> None:
        for member in self._crew.members:
            if member.stage == READY and member.waiting_for is None and self._pieces:
                self._began = self._began or time.monotonic()
                member.piece = self._pieces.popleft()
                member.since = time.monotonic()
                process = member.place.process if member.place else None
                _log.debug("%s, process %s, takes %s", member, process, member.piece.label)
                task = member.piece.task
                given = contents_of(self._run.layout, self._work.inputs(task)) if self._crew.collects else {}
                member.waiting_for = member.actor.do.remote(task, given)

    def _look(self) -> None:
        """Count what workers have done since the last look."""
        asked = [(member, member.actor.state.remote()) for member in self._crew.members if member.stage == READY]
        for member, reference in asked:
            with suppress(self._ray.exceptions.RayError):
                state = self._ray.get(reference, timeout=_POLL)
                self._run.display.uses(**state.facts)
                self._progress.advance(state.units - member.counted)
                member.counted = state.units
        hands = (f"{each.number}: {each.piece.label if each.piece else each.stage}" for each in self._crew.members)
        self._progress.state(f"{self._run.report.n_prompts} prompts done; {', '.join(hands)}")
        self._progress.advance()

    def _wind_up(self) -> None:
        """Have every worker finish the prompt in hand, and keep what they did."""
        busy: Sequence[Member] = [member for member in self._crew.members if member.piece is not None]
        with suppress(self._ray.exceptions.RayError):
            self._ray.get([member.actor.stop.remote() for member in busy], timeout=_PATIENCE)
            for result in self._ray.get([member.waiting_for for member in busy], timeout=_PATIENCE):
                self._keep(result)
