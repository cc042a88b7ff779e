"""Work on a Ray cluster: pieces of it go to workers as they come free, and again to others where one dies.

Needs the extra `ray`. Every worker loads the model once; the driver loads no weights. Results are those of
a local run in the same batches: each piece is a batch of prompts of like lengths.
"""

from __future__ import annotations

import logging
import os
import socket
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tlcapture.cluster.pool import Cluster, Crew, Piece, Probe
from tlcapture.cluster.scheduler import Shift
from tlcapture.errors import InputError
from tlcapture.runs.executors import ModelAccess, Work
from tlcapture.runs.model_loader import ModelLoader
from tlcapture.runs.run import Run
from tlcapture.text import first_line

_PIECES_PER_WORKER = 2  # at least so many, so that no worker ends long before the others
_MOST_PROMPTS = {"cpu": 16, "gpu": 64}  # in a piece, where no batch size is asked for
_PATIENCE_TO_CONNECT = 10  # seconds


class RayExecutor:
    """Does work by the workers of a cluster."""

    def __init__(self, cluster: Cluster, batch_size: int | None = None):
        self._cluster = cluster
        self._batch_size = batch_size

    def model_access(self, load: ModelLoader) -> ModelAccess:
        return ModelAccess(lambda: load.outline, load)

    def run(self, work: Work, run: Run) -> None:
        """Do the work.

        Raises:
            InputError: there is no cluster, it is too small for a worker, or a worker does not see the root.
        """
        if not work.tasks:
            return
        with self._connected() as ray:
            n_workers = self._n_workers(ray)
            pieces = self._pieces(work, n_workers)
            with Probe(run.layout.root) as probe:
                crew = Crew(ray, work, run.layout, self._cluster, probe, min(n_workers, len(pieces)))
                run.line(f"{len(pieces)} pieces of work for {len(crew.members)} workers of a Ray cluster")
                with run.progress(sum(map(work.size, work.tasks)), "Ray", work.unit) as progress:
                    try:
                        Shift(crew, pieces, work, run, progress).run()
                    finally:
                        crew.dismiss()

    @contextmanager
    def _connected(self) -> Iterator[Any]:
        try:
            import ray
        except ImportError:
            raise InputError('--executor ray needs Ray: run pip install "tlcapture[ray]"') from None
        started = not ray.is_initialized()
        address = self._cluster.address or os.environ.get("RAY_ADDRESS")
        if started:
            _check_reachable(address)
            options: dict[str, Any] = {"address": address, "log_to_driver": False}
            if address is None:
                needed = (self._cluster.workers or os.cpu_count() or 1) * self._cluster.cpus_per_worker
                options |= {"num_cpus": int(needed + 0.999), "include_dashboard": False}
            try:
                ray.init(logging_level=logging.ERROR, **options)
            except (ConnectionError, RuntimeError, ValueError) as error:
                raise InputError(f"no Ray cluster at {address!r}: {first_line(error)}") from None
        try:
            yield ray
        finally:
            if started:
                ray.shutdown()

    def _n_workers(self, ray: Any) -> int:
        there, cluster = ray.cluster_resources(), self._cluster
        fits = int(there.get("CPU", 0) // cluster.cpus_per_worker) if cluster.cpus_per_worker else 1_000_000
        if cluster.gpus_per_worker:
            fits = min(fits, int(there.get("GPU", 0) // cluster.gpus_per_worker))
        if not fits:
            raise InputError(
                f"the Ray cluster has {there.get('CPU', 0):g} CPUs and {there.get('GPU', 0):g} GPUs: too few for a "
                f"worker of {cluster.cpus_per_worker:g} and {cluster.gpus_per_worker:g}"
            )
        return min(cluster.workers or fits, fits)

    def _pieces(self, work: Work, n_workers: int) -> deque[Piece]:
        """Batches of the size asked for, or as large as leaves every worker enough of them; the largest first."""
        most = self._batch_size
        if most is None:
            usual = _MOST_PROMPTS["gpu" if self._cluster.gpus_per_worker else "cpu"]
            fewest = n_workers * _PIECES_PER_WORKER
            n_prompts = sum(len(work.split(task, 1)) for task in work.tasks)
            most = max(1, min(usual, -(-n_prompts // fewest)))
        parts = [part for task in work.tasks for part in work.split(task, most)]
        return deque(Piece(part, work.label(part)) for part in sorted(parts, key=work.size, reverse=True))


def _check_reachable(address: str | None) -> None:
    """Raise `InputError` where nobody listens: Ray itself would try for minutes."""
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    if not (host and port.isdecimal()):
        return  # one is started here, or Ray finds it by itself
    try:
        socket.create_connection((host, int(port)), timeout=_PATIENCE_TO_CONNECT).close()
    except (OSError, OverflowError) as error:
        raise InputError(f"no Ray cluster at {address!r}: {error}: start one with 'ray start --head'") from None
