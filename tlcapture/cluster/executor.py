"""Work on a Ray cluster: every worker loads the model once and does one piece of work after another.

Needs the extra `ray`. The results are those of a local run with the same batches: each piece holds prompts of similar
length. The driver loads no weights; `driver` hands out the pieces.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tlcapture.cluster.actor import Shared
from tlcapture.cluster.driver import Driver
from tlcapture.errors import InputError, StorageError
from tlcapture.runs.executors import Work
from tlcapture.runs.received_files import experiment_inputs
from tlcapture.runs.run import Run
from tlcapture.storage.layout import Layout
from tlcapture.storage.locks import locked
from tlcapture.text import first_line

if TYPE_CHECKING:
    from tlcapture.models.loading import ModelOutline
    from tlcapture.runs.model_loader import ModelLoader

_PIECES_PER_WORKER = 2  # at least, so that no worker is idle long before the others
_MOST_PROMPTS = {"cpu": 16, "gpu": 64}  # in a piece, where no batch size is given
_CONNECT_TIMEOUT = 10  # seconds


@dataclass(frozen=True)
class Cluster:
    """The cluster to use and the resources of each worker.

    Attributes:
        address: of a running cluster; `None` starts one on this machine.
        workers: their number; `None` for as many as fit.
        gpus_per_worker: `None` for those that the model asks for, where the cluster has GPUs: one, unless it is spread.
        collect: whether workers send their files back, which need not see the root then.
    """

    address: str | None = None
    workers: int | None = None
    cpus_per_worker: float = 1.0
    gpus_per_worker: float | None = None
    collect: bool = False


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
            ClusterError: too many workers die in a row.
        """
        if not work.tasks:
            return
        with _connected(self._cluster) as ray, probe(run.layout.root) as (path, content):
            cpus, gpus = self._cluster.cpus_per_worker, self._gpus(ray.cluster_resources(), work, run)
            n_workers = self._n_workers(ray, gpus)
            pieces = work.pieces(self._most_prompts(work, n_workers, "gpu" if gpus else "cpu"))
            load, files = (None, None) if work.model is None else (work.model.silent(), work.model.files())
            inputs = experiment_inputs([run.layout, *work.reads]) if self._cluster.collect else None
            layout, threads = Layout(run.layout.root.resolve(), run.layout.experiment), max(1, int(cpus))
            shared = Shared(layout, work.make, work.unit, load, files, threads, inputs, path, content)
            n_workers = min(n_workers, len(pieces))
            run.line(f"{len(pieces)} batches for {n_workers} workers of a Ray cluster, {gpus:g} GPUs each")
            with run.progress(sum(map(work.size, work.tasks)), "Ray", work.unit) as progress:
                Driver(ray, shared, pieces, work, run, progress).run(n_workers, num_cpus=cpus, num_gpus=gpus)

    def _gpus(self, resources: dict[str, float], work: Work, run: Run) -> float:
        """The GPUs of a worker; says so where the cluster's are not used."""
        asked, there = self._cluster.gpus_per_worker, resources.get("GPU", 0)
        uses_gpu = there >= 1 and work.model is not None and work.model.device != "cpu"
        if uses_gpu and asked == 0:
            run.warn(
                f"the Ray cluster has {there:g} GPUs, which --gpus-per-worker 0 hides from its workers: the model runs "
                "on their CPUs, by default in float32"
            )
        if asked is not None:
            return asked
        return work.model.n_devices if uses_gpu and work.model is not None else 0

    def _n_workers(self, ray: Any, gpus: float) -> int:
        """The number of workers asked for, or as many as the nodes have room for."""
        cpus, resources = self._cluster.cpus_per_worker, ray.cluster_resources()
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        wanted = {"CPU": cpus, **({"GPU": gpus} if gpus else {})}
        fits = sum(min(int(node.get(name, 0) // each) for name, each in wanted.items()) for node in nodes)
        if not fits:
            raise InputError(
                f"the Ray cluster has {resources.get('CPU', 0):g} CPUs and {resources.get('GPU', 0):g} GPUs on "
                f"{len(nodes)} nodes: too few for a worker of {cpus:g} and {gpus:g} on one of them"
            )
        return min(self._cluster.workers or fits, fits)

    def _most_prompts(self, work: Work, n_workers: int, kind: str) -> int:
        """The prompts of a piece: as many as asked for, or as leave every worker enough pieces."""
        n_prompts = sum(map(work.n_prompts, work.tasks))
        return self._batch_size or max(1, min(_MOST_PROMPTS[kind], -(-n_prompts // (n_workers * _PIECES_PER_WORKER))))


@contextmanager
def _connected(cluster: Cluster) -> Iterator[Any]:
    # Ray's own messages about what died would stand between the lines of this program's output.
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", ".")
    try:
        import ray
    except ImportError:
        raise InputError('--executor ray needs Ray: run pip install "tlcapture[ray]"') from None
    started = not ray.is_initialized()
    if started:
        address = cluster.address or os.environ.get("RAY_ADDRESS")
        _check_reachable(address)
        options: dict[str, Any] = {"address": address, "log_to_driver": False, "logging_level": logging.ERROR}
        if address is None:
            needed = (cluster.workers or os.cpu_count() or 1) * cluster.cpus_per_worker
            options |= {"num_cpus": int(needed + 0.999), "include_dashboard": False}
        try:
            ray.init(**options)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise InputError(f"no Ray cluster at {address!r}: {first_line(error)}") from None
    try:
        yield ray
    finally:
        if started:
            ray.shutdown()


def _check_reachable(address: str | None) -> None:
    """Raise `InputError` where nothing listens at the address: Ray itself would try for minutes."""
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    if not (host and port.isdecimal()):
        return  # Ray starts a cluster here, or finds one by itself
    try:
        socket.create_connection((host, int(port)), timeout=_CONNECT_TIMEOUT).close()
    except (OSError, OverflowError) as error:
        raise InputError(f"no Ray cluster at {address!r}: {error}: start one with 'ray start --head'") from None


@contextmanager
def probe(root: Path) -> Iterator[tuple[Path, bytes]]:
    """A temporary file in the root and its content: it tells whether a worker sees the root, and the driver is there.

    The driver holds its lock, which the operating system releases when the driver ends.
    """
    path, content = root.resolve() / f".tlcapture-{secrets.token_hex(8)}", secrets.token_bytes(16)
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(path))
            path.write_bytes(content)
        except (OSError, StorageError) as error:
            reason = getattr(error, "strerror", None) or error
            raise InputError(f"{path.parent}: cannot be written to: {reason}") from None
        try:
            yield path, content
        finally:
            with suppress(OSError):
                path.unlink()
