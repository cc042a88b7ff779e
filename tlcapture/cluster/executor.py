"""Work on a Ray cluster: every worker loads the model once and does one piece of work after another.

Needs the extra `ray`. The results are those of a local run with the same batches: each piece holds prompts of similar
length. The driver loads no weights; `driver` hands out the pieces.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tlcapture.cluster.driver import Driver
from tlcapture.errors import InputError
from tlcapture.runs.executors import Work
from tlcapture.runs.run import Run
from tlcapture.text import first_line

if TYPE_CHECKING:
    from tlcapture.models.loading import ModelOutline
    from tlcapture.runs.model_loader import ModelLoader

_PIECES_PER_WORKER = 2  # at least, so that no worker is idle long before the others
_MOST_PROMPTS = {"cpu": 16, "gpu": 64}  # in a piece, where no batch size is given
_CONNECT_TIMEOUT = 10  # seconds


@dataclass(frozen=True)
class RayExecutor:
    """Does the work with the workers of a Ray cluster.

    Attributes:
        address: of a running cluster; `None` starts one on this machine.
        workers: the number of workers; `None` for as many as fit.
        gpus_per_worker: `None` for as many as the model asks for: one unless it is spread, none without GPUs.
        collect: whether workers send their files back; they need not see the root then.
        batch_size: the most prompts of a piece; `None` for what leaves every worker enough pieces.
    """

    address: str | None = None
    workers: int | None = None
    cpus_per_worker: float = 1.0
    gpus_per_worker: float | None = None
    collect: bool = False
    batch_size: int | None = None

    def known_model(self, load: ModelLoader) -> ModelOutline:
        """The model's outline: the driver loads no weights."""
        return load.outline

    def run(self, work: Work, run: Run) -> None:
        """Do all tasks on the cluster.

        Raises:
            InputError: no cluster was found, it is too small for a worker, or a worker does not see the root.
            ClusterError: too many workers die in a row.
        """
        if not work.tasks:
            return
        with _connected(self) as ray:
            resources = {"CPU": self.cpus_per_worker, "GPU": self._gpus(ray, work, run)}
            n_workers = self._n_workers(ray, resources)
            most = min(_MOST_PROMPTS["gpu" if resources["GPU"] else "cpu"], work.share(n_workers * _PIECES_PER_WORKER))
            pieces = work.pieces(self.batch_size or most)
            n_workers = min(n_workers, len(pieces))
            gpus = f", with {resources['GPU']:g} GPU each" if resources["GPU"] else ""
            run.line(f"{len(pieces)} batches for {n_workers} workers of a Ray cluster{gpus}")
            Driver(ray, work, pieces, run).run(n_workers, resources, collect=self.collect)

    def _gpus(self, ray: Any, work: Work, run: Run) -> float:
        """The number of GPUs of a worker; warns if the cluster has GPUs that are not used."""
        asked, there = self.gpus_per_worker, ray.cluster_resources().get("GPU", 0)
        wanted = work.model.n_devices if there >= 1 and work.model is not None and work.model.device != "cpu" else 0
        if wanted and asked == 0:
            run.warn(
                f"the Ray cluster has {there:g} GPUs, which --gpus-per-worker 0 hides from its workers: the model runs "
                "on their CPUs, by default in float32"
            )
        return wanted if asked is None else asked

    def _n_workers(self, ray: Any, wanted: dict[str, float]) -> int:
        """The number of workers asked for, or as many as the nodes have room for."""
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        fits = sum(min(int(node.get(name, 0) // each) for name, each in wanted.items() if each) for node in nodes)
        if not fits:
            cpus, gpus = (sum(node.get(name, 0) for node in nodes) for name in ("CPU", "GPU"))
            raise InputError(
                f"the Ray cluster has {cpus:g} CPUs and {gpus:g} GPUs on {len(nodes)} nodes: too few for a worker of "
                f"{wanted['CPU']:g} and {wanted['GPU']:g} on one of them"
            )
        return min(self.workers or fits, fits)


@contextmanager
def _connected(cluster: RayExecutor) -> Iterator[Any]:
    # Ray's own messages about what died would stand between the lines of this program's output.
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", ".")
    try:
        import ray
    except ImportError:
        raise InputError("--executor ray needs Ray: run 'pip install ray'") from None
    if ray.is_initialized():
        yield ray
        return
    address = cluster.address or os.environ.get("RAY_ADDRESS")
    _check_reachable(address)
    here: dict[str, Any] = {"num_cpus": int((cluster.workers or os.cpu_count() or 1) * cluster.cpus_per_worker + 0.999)}
    options = {"address": address} if address else {"address": "local", "include_dashboard": False, **here}
    try:
        ray.init(logging_level=logging.ERROR, log_to_driver=False, **options)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise InputError(f"no Ray cluster at {address!r}: {first_line(error)}") from None
    try:
        yield ray
    finally:
        ray.shutdown()


def _check_reachable(address: str | None) -> None:
    """Raise `InputError` where nothing listens at the address: Ray itself would try for minutes."""
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    if host and port.isdecimal():  # otherwise Ray starts a cluster here, or finds one by itself
        try:
            socket.create_connection((host, int(port)), timeout=_CONNECT_TIMEOUT).close()
        except (OSError, OverflowError) as error:
            raise InputError(f"no Ray cluster at {address!r}: {error}: start one with 'ray start --head'") from None
