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

import psutil
import pytest

from tests.cli.conftest import make_prompt_set, make_trait
from tests.faults.commands import Command, contents
from tlcapture.models.loading import load_model

TEXTS = [f"tell me {'more ' * number}of it" for number in range(12)]


# The cluster has a process of its own, so that drivers may be forks of the tests' process: Ray survives no fork.
_CLUSTER = """
import sys
import ray
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
cluster.add_node(num_cpus=1)
print("at", cluster.address, flush=True)
added = []
for word in sys.stdin:
    if word == "add\\n":
        added.append(cluster.add_node(num_cpus=1, num_gpus=2))
        print("done", added[0].all_processes["raylet"][0].process.pid, flush=True)
    else:
        cluster.remove_node(added.pop(), allow_graceful=word == "release\\n")
        print("done 0", flush=True)
cluster.shutdown()
"""


class SimulatedCluster:
    """A cluster of two nodes with one CPU each on this machine; a third, with two GPUs as well, comes and goes."""

    def __init__(self, process: subprocess.Popen[str]):
        self._process = process
        self.address = self._answer("at ").split()[1]
        self._third = 0  # the process of the third node

    def with_third_node(self) -> None:
        """Add the third node, unless it is there."""
        if not self._third:
            self._tell("add")

    def lose_third_node(self, *, gracefully: bool = False) -> None:
        """End all processes of the third node, if it is there: at once, or so that Ray knows of it."""
        if self._third:
            self._tell("release" if gracefully else "kill")

    def is_on_third_node(self, process: int) -> bool:
        """Whether a process is a worker of the third node."""
        return any(parent.pid == self._third for parent in psutil.Process(process).parents())

    def _tell(self, word: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{word}\n")
        self._process.stdin.flush()
        self._third = int(self._answer("done").split()[1])

    def _answer(self, start: str) -> str:
        assert self._process.stdout is not None
        return next(line for line in self._process.stdout if line.startswith(start))


@pytest.fixture(scope="session")
def cluster() -> Iterator[SimulatedCluster]:
    """A cluster that runs until the end of these tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "token")  # as Ray tells the children of the process that starts a cluster
        patch.setenv("RAY_prestart_worker_first_driver", "0")  # processes that no test would use
        words = [sys.executable, "-c", _CLUSTER]
        with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdin is not None
            yield SimulatedCluster(process)
            process.stdin.close()
            process.wait(timeout=60)


@pytest.fixture
def ray_address(cluster: SimulatedCluster) -> str:
    """The address of the cluster while it has two nodes."""
    cluster.lose_third_node()
    return cluster.address


@pytest.fixture(scope="session")
def busy_template(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Path:
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
        "capture", "--root", root, "--experiment", "exp", "--prompt-set", "busy", "--max-new-tokens", 120,
        "--batch-size", 2, "--attention", "--logit-lens",
    )  # fmt: skip


@pytest.fixture(scope="session")
def by_one_process(busy_template: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The files of a local run that uses one thread, as workers do."""
    root = Path(shutil.copytree(busy_template, tmp_path_factory.mktemp("local") / "root"))
    done = Command(root.parent / "output", *words_of(root), "--model", busy_template / "model").end()
    assert done.code == 0, done.stderr
    return contents(root / "experiments" / "exp")


@pytest.fixture
def busy(busy_template: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(busy_template, tmp_path / "root"))
