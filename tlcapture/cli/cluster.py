"""Options that say who does the work: this process, or workers of a Ray cluster."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from tlcapture.cli.options import together

if TYPE_CHECKING:
    from tlcapture.runs.executors import Executor

_NAMES = ("executor", "ray_address", "workers", "gpus_per_worker", "cpus_per_worker", "collect")

cluster_options = together(
    click.option(
        "--executor",
        type=click.Choice(["local", "ray"]),
        default="local",
        show_default=True,
        help="Who does the work: this process, or workers of a Ray cluster.",
    ),
    click.option("--ray-address", metavar="ADDRESS", help="Of a running Ray cluster.  [default: one is started here]"),
    click.option("--workers", type=click.IntRange(min=1), help="Ray workers.  [default: as many as fit]"),
    click.option(
        "--gpus-per-worker", type=click.FloatRange(min=0), default=0.0, show_default=True, help="GPUs of a Ray worker."
    ),
    click.option(
        "--cpus-per-worker",
        type=click.FloatRange(min=0, min_open=True),
        default=1.0,
        show_default=True,
        help="CPUs, and threads, of a Ray worker.",
    ),
    click.option("--collect", is_flag=True, help="Have Ray workers send files back, where they do not see --root."),
)


def take_executor(options: dict[str, Any], batch_size: int | None = None, *, collects: bool = True) -> Executor:
    """Take the options of this module out of a command's, and make the executor they ask for.

    `collects`: whether the command's files can be sent back.
    """
    chosen = {name: options.pop(name) for name in _NAMES}
    if chosen["collect"] and not collects:
        raise click.UsageError(
            "--collect goes with project and with captures that keep raw activations: all else has to see what is there"
        )
    if chosen["executor"] == "local":
        named = [name for name in ("ray_address", "workers", "gpus_per_worker", "collect") if chosen[name]]
        if named:
            option = named[0].replace("_", "-")
            raise click.UsageError(f"--{option} goes with --executor ray")
        from tlcapture.runs.executors import LocalExecutor

        return LocalExecutor()
    from tlcapture.cluster.executor import RayExecutor
    from tlcapture.cluster.pool import Cluster

    cluster = Cluster(
        address=chosen["ray_address"],
        workers=chosen["workers"],
        cpus_per_worker=chosen["cpus_per_worker"],
        gpus_per_worker=chosen["gpus_per_worker"],
        collect=chosen["collect"],
    )
    return RayExecutor(cluster, batch_size)
