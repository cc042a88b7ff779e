"""A Ray cluster of two workers on this machine, a tiny model, and prompts that keep it busy for some seconds."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import make_prompt_set, make_trait
from tests.cluster import start_worker
from tests.cluster.warm_workers import raylet_of, warm_workers
from tests.conftest import quick_evaluations, unrendered_figures
from tests.faults.commands import Command, contents
from tlcapture.models.loading import load_model

TEXTS = [f"tell me {'more ' * number}of it" for number in range(12)]


# The cluster has a process of its own, so that drivers may be forks of the tests' process: Ray survives no fork.
_CLUSTER = """
import sys
import ray
from ray.cluster_utils import Cluster
node = {"num_cpus": 1, "setup_worker_path": sys.argv[1]}
quiet = {"include_dashboard": False, "include_log_monitor": False, "no_monitor": True}
cluster = Cluster(initialize_head=True, head_node_args={**quiet, **node})
cluster.add_node(**node)
print("at", cluster.address, flush=True)
added = []
for word in sys.stdin:
    if word == "end\\n":
        break
    elif word in ("add\\n", "add cold\\n"):
        added.append(cluster.add_node(num_gpus=2, **node if word == "add\\n" else {}))
        print("done", added[0].all_processes["raylet"][0].process.pid, flush=True)
    else:
        cluster.remove_node(added.pop(), allow_graceful=word == "release\\n")
        print("done 0", flush=True)
cluster.shutdown()
"""


class SimulatedCluster:
    """A cluster of two nodes with one CPU each on this machine; a third, with two GPUs as well, comes and goes."""

    def __init__(self, process: subprocess.Popen[str], warm: Path):
        self._process = process
        self._warm = warm
        self.address = self._answer("at ").split()[1]
        self._third = 0  # the process of the third node

    def with_third_node(self, *, cold: bool = False) -> None:
        """Add the third node, unless it is there; if it is cold, its workers start as Ray starts them."""
        if cold:
            self.lose_third_node(gracefully=True)
        if not self._third:
            self._tell("add cold" if cold else "add")

    def lose_third_node(self, *, gracefully: bool = False) -> None:
        """End all processes of the third node, if it is there: at once, or so that Ray knows of it."""
        if self._third:
            self._tell("release" if gracefully else "kill")

    def is_on_third_node(self, process: int) -> bool:
        """Whether a process is a worker of the third node."""
        return self.raylet_of(process) == self._third

    def raylet_of(self, process: int) -> int:
        """The process of Ray that started a worker."""
        return raylet_of(self._warm, process)

    def _tell(self, word: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{word}\n")
        self._process.stdin.flush()
        self._third = int(self._answer("done").split()[1])

    def _answer(self, start: str) -> str:
        assert self._process.stdout is not None
        return next(line for line in self._process.stdout if line.startswith(start))


@pytest.fixture(scope="package", autouse=True)
def _quick_evaluations() -> Iterator[None]:
    with quick_evaluations(), unrendered_figures():
        yield


@pytest.fixture(scope="package")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimulatedCluster]:
    """A cluster that runs until the end of these tests."""
    warm = tmp_path_factory.mktemp("workers") / "socket"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "token")  # as Ray tells the children of the process that starts a cluster
        patch.setenv(start_worker.SOCKET, str(warm))
        patch.setenv("RAY_prestart_worker_first_driver", "0")  # processes that no test would use
        words = [sys.executable, "-c", _CLUSTER, start_worker.__file__]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        with subprocess.Popen(words, **pipes, text=True) as process, warm_workers(warm):
            yield SimulatedCluster(process, warm)
            process.communicate("end\n", timeout=60)


@pytest.fixture
def ray_address(cluster: SimulatedCluster) -> str:
    """The address of the cluster while it has two nodes."""
    cluster.lose_third_node()
    return cluster.address


@pytest.fixture(scope="package")
def busy_template(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path, cluster: SimulatedCluster) -> Path:
    """A root with a prompt set of twelve prompts, two traits, their vectors, and the model itself."""
    load_model(str(tiny_folder))  # so that a fork has everything imported
    import_module("ray")
    root = tmp_path_factory.mktemp("busy")
    shutil.copytree(tiny_folder, root / "model")
    make_prompt_set(root, "busy", TEXTS)
    _make_a_conversation_of_the_first(root / "datasets/inference/busy.json")
    for trait, words in (("loud", ("LOUD", "soft")), ("warm", ("warm", "cold"))):
        make_trait(root, f"tone/{trait}", *words)
    done = Command(root / "output", "extract", "--root", root, "--experiment", "exp", "--model", root / "model",
                   "--traits", "tone/loud,tone/warm").end()  # fmt: skip
    assert done.code == 0, done.stderr
    shutil.rmtree(root / "output")
    return root


def _make_a_conversation_of_the_first(path: Path) -> None:
    content = json.loads(path.read_bytes())
    first = content["prompts"][0]
    question = {"role": "user", "content": first.pop("text")}
    first["messages"] = [question, {"role": "assistant", "content": "yes"}, {"role": "user", "content": "why?"}]
    path.write_text(json.dumps(content))


def words_of(root: Path) -> tuple[object, ...]:
    return (
        "capture", "--root", root, "--experiment", "exp", "--prompt-set", "busy", "--max-new-tokens", 60,
        "--batch-size", 2, "--attention", "--logit-lens",
    )  # fmt: skip


@pytest.fixture(scope="package")
def by_one_process(busy_template: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The files of a local run that uses one thread, as workers do."""
    root = Path(shutil.copytree(busy_template, tmp_path_factory.mktemp("local") / "root"))
    done = Command(root.parent / "output", *words_of(root), "--model", busy_template / "model").end()
    assert done.code == 0, done.stderr
    return contents(root / "experiments" / "exp")


@pytest.fixture
def busy(busy_template: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(busy_template, tmp_path / "root"))
