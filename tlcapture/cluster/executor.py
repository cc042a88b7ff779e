"""Work on a Ray cluster: batches go to workers as they become free, and again to another where a worker dies.

Needs the extra `ray`. Every worker loads the model once; the driver loads no weights. The results are those of a
local run with the same batches: each batch holds prompts of similar length.
"""

from __future__ import annotations

import logging
import os
import socket
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from tlcapture.cluster.pool import Batch, Cluster, Probe, WorkerPool
from tlcapture.cluster.scheduler import Scheduler
from tlcapture.errors import InputError
from tlcapture.runs.executors import Work
from tlcapture.runs.run import Run
from tlcapture.text import first_line

if TYPE_CHECKING:
    from tlcapture.models.loading import ModelOutline
    from tlcapture.runs.model_loader import ModelLoader

_BATCHES_PER_WORKER = 2  # at least, so that no worker is idle long before the others
_MOST_PROMPTS = {"cpu": 16, "gpu": 64}  # in a batch, where no batch size is given
_CONNECT_TIMEOUT = 10  # seconds


class RayExecutor:
    """Does the work with the workers of a Ray cluster."""

    def __init__(self, cluster: Cluster, batch_size: int | None = None):
        self._cluster = cluster
        self._batch_size = batch_size

    def known_model(self, load: ModelLoader) -> ModelOutline:
        """The model's outline: the driver loads no weights."""
        return load.outline

    def run(self, work: Work, run: Run) -> None:
        """Do all tasks on the cluster.

        Raises:
            InputError: no cluster was found, it is too small for a worker, or a worker does not see the root.
        """
        if not work.tasks:
            return
        with self._connected() as ray:
            n_workers = self._n_workers(ray)
            batches = self._batches(work, n_workers)
            with Probe(run.layout.root) as probe:
                pool = WorkerPool(ray, work, run.layout, self._cluster, probe, min(n_workers, len(batches)))
                run.line(f"{len(batches)} batches for {len(pool.workers)} workers of a Ray cluster")
                with run.progress(sum(map(work.size, work.tasks)), "Ray", work.unit) as progress:
                    try:
                        Scheduler(pool, batches, work, run, progress).run()
                    finally:
                        pool.shutdown()

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
        resources, cluster = ray.cluster_resources(), self._cluster
        fits = int(resources.get("CPU", 0) // cluster.cpus_per_worker) if cluster.cpus_per_worker else 1_000_000
        if cluster.gpus_per_worker:
            fits = min(fits, int(resources.get("GPU", 0) // cluster.gpus_per_worker))
        if not fits:
            raise InputError(
                f"the Ray cluster has {resources.get('CPU', 0):g} CPUs and {resources.get('GPU', 0):g} GPUs: too few "
                f"for a worker of {cluster.cpus_per_worker:g} and {cluster.gpus_per_worker:g}"
            )
        return min(cluster.workers or fits, fits)

    def _batches(self, work: Work, n_workers: int) -> deque[Batch]:
        """Batches of the size asked for, or as large as leaves every worker enough of them; the largest first."""
        most = self._batch_size
        if most is None:
            usual = _MOST_PROMPTS["gpu" if self._cluster.gpus_per_worker else "cpu"]
            fewest = n_workers * _BATCHES_PER_WORKER
            n_prompts = sum(len(work.split(task, 1)) for task in work.tasks)
            most = max(1, min(usual, -(-n_prompts // fewest)))
        parts = [part for task in work.tasks for part in work.split(task, most)]
        return deque(Batch(part, work.label(part)) for part in sorted(parts, key=work.size, reverse=True))


def _check_reachable(address: str | None) -> None:
    """Raise `InputError` where nothing listens at the address: Ray itself would try for minutes."""
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    if not (host and port.isdecimal()):
        return  # Ray starts a cluster here, or finds one by itself
    try:
        socket.create_connection((host, int(port)), timeout=_CONNECT_TIMEOUT).close()
    except (OSError, OverflowError) as error:
        raise InputError(f"no Ray cluster at {address!r}: {error}: start one with 'ray start --head'") from None
