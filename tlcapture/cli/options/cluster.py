"""Options that choose where the work is done: in this process, or by workers of a Ray cluster.

Commands get an executor and never import the cluster.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import click

from tlcapture.cli.options.grouping import option
from tlcapture.cli.options.types import Count, Finite

if TYPE_CHECKING:
    from tlcapture.runs.executors import Executor

_CPUS = 1.0  # per worker, where nothing else is asked for


@dataclass(frozen=True)
class ClusterOptions:
    """Which executor does the work, and how a Ray cluster is used."""

    executor: str = option(
        "--executor",
        type=click.Choice(["local", "ray"]),
        default="local",
        show_default=True,
        help="Where the work is done: in this process, or by workers of a Ray cluster.",
    )
    ray_address: str | None = option(
        "--ray-address", metavar="ADDRESS", help="Address of a running Ray cluster.  [default: start one here]"
    )
    workers: int | None = option("--workers", type=Count(), help="Number of Ray workers.  [default: as many as fit]")
    gpus_per_worker: float | None = option(
        "--gpus-per-worker",
        type=Finite(min=0),
        help="GPUs per Ray worker; 0 runs the model on CPUs.  [default: 1, or --n-devices, where the cluster has GPUs]",
    )
    cpus_per_worker: float = option(
        "--cpus-per-worker",
        type=Finite(min=0, min_open=True),
        default=_CPUS,
        show_default=True,
        help="CPUs, and threads, per Ray worker.",
    )
    collect: bool = option(
        "--collect", is_flag=True, help="Have Ray workers send their files back; needed if they cannot see --root."
    )

    def make_executor(self, batch_size: int | None = None, *, can_collect: bool = True) -> Executor:
        """The executor that was asked for; `can_collect` says whether the command's files can be sent back.

        Raises:
            click.UsageError: the options do not go together.
        """
        if self.collect and not can_collect:
            raise click.UsageError(
                "--collect works with project and with captures that keep raw activations: other commands need to "
                "see existing files"
            )
        if self.executor == "local":
            self._check_local()
            from tlcapture.runs.executors import LocalExecutor

            return LocalExecutor()
        from tlcapture.cluster.executor import RayExecutor

        return RayExecutor(
            address=self.ray_address,
            workers=self.workers,
            cpus_per_worker=self.cpus_per_worker,
            gpus_per_worker=self.gpus_per_worker,
            collect=self.collect,
            batch_size=batch_size,
        )

    def _check_local(self) -> None:
        given = {
            "--ray-address": self.ray_address is not None,
            "--workers": self.workers is not None,
            "--gpus-per-worker": self.gpus_per_worker is not None,
            "--cpus-per-worker": self.cpus_per_worker != _CPUS,
            "--collect": self.collect,
        }
        for name, is_given in given.items():
            if is_given:
                raise click.UsageError(f"{name} needs --executor ray")
