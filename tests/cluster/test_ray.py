"""Work on a real Ray cluster: the files of a local run, even where workers or the driver are killed."""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests import tiny
from tests.cli.conftest import make_prompt_set
from tests.cluster.conftest import SimulatedCluster, words_of
from tests.evidence import Evidence
from tests.faults.commands import Command, contents
from tests.test_adapters import needs_peft, write_adapter
from tlcapture.cluster import driver
from tlcapture.cluster.actor import Shared, WorkerActor

RAY = ("--executor", "ray", "--workers", "2")


def captured(root: Path) -> list[Path]:
    return list((root / "experiments" / "exp" / "inference" / "raw" / "residual" / "busy").glob("*.pt"))


def same_but_for_the_model_folder(found: dict[str, Any], expected: dict[str, Any]) -> bool:
    """Whether two experiments hold the same, except for the recorded name of the model's folder."""
    return json.dumps(plain(found), sort_keys=True) == json.dumps(plain(expected), sort_keys=True)


def process_ids(log: Path) -> list[int]:
    """The processes of the workers that were given a batch, the last one last."""
    return [int(found) for found in re.findall(r"process (\d+), takes", log.read_text())]


def wait_until_dead(processes: list[int]) -> None:
    deadline = time.monotonic() + 60
    while any(psutil.pid_exists(process) for process in processes):
        assert time.monotonic() < deadline, "a worker outlives its driver"
        time.sleep(0.01)


def n_response_tokens(captures: dict[str, Any]) -> int:
    raw = [value for name, value in captures.items() if name.startswith("inference/raw")]
    return sum(len(capture["response"]["token_ids"]) for capture in raw)


def plain(value: Any) -> Any:
    if isinstance(value, dict):
        named = ("inference_model", "extraction_model", "model")
        return {str(key): plain(each) for key, each in value.items() if key not in named}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    return hashlib.sha256(value).hexdigest() if isinstance(value, bytes) else value


@pytest.fixture
def run(ray_address: str, busy: Path, tmp_path: Path) -> Callable[..., Command]:
    """Start the capture on the cluster."""
    return lambda *words: Command(tmp_path / "output", *words_of(busy), *RAY, "--ray-address", ray_address, *words)


def can_mount_unseen() -> bool:
    return subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode == 0


def mount_unseen(folder: Path, content: Path) -> None:
    """Mount a disk in a folder that no other process sees there, with a copy of the content."""
    if ctypes.CDLL(None, use_errno=True).unshare(0x00020000):  # CLONE_NEWNS
        raise OSError(ctypes.get_errno(), "unshare")
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", folder], check=True)
    shutil.copytree(content, folder, dirs_exist_ok=True)


def test_a_cluster_writes_the_files_of_a_local_run(
    run: Callable[..., Command], busy: Path, by_one_process: dict[str, Any]
) -> None:
    done = run("--json").end()
    assert done.code == 0, done.stderr
    assert same_but_for_the_model_folder(contents(busy / "experiments" / "exp"), by_one_process)
    summary = json.loads(done.stdout)
    assert (summary["prompts"], summary["failures"], summary["retried"]) == (12, [], [])
    assert summary["new_tokens"] == n_response_tokens(by_one_process)
    assert summary["files"]["folders"]["inference/raw/residual/busy"]["files"] == 12
    assert (summary["cluster"]["workers"], summary["cluster"]["pieces"]) == (2, 6)
    assert summary["model"]["engine"] == tiny.ENGINES[0]
    assert done.stderr.count(" of 6 batches") == 6


def test_the_batch_of_a_killed_worker_is_run_again(
    run: Callable[..., Command], busy: Path, by_one_process: dict[str, Any], evidence: Evidence
) -> None:
    log = busy / "log"
    running = run("--log-file", str(log))
    running.wait_for(lambda: captured(busy))
    os.kill(process_ids(log)[-1], signal.SIGKILL)
    done = running.end()
    assert done.code == 0, done.stderr
    assert "died; its batch is run again: 2 prompts of busy" in done.stdout
    assert "1 batch run again because a worker died" in done.stdout
    assert same_but_for_the_model_folder(contents(busy / "experiments" / "exp"), by_one_process)
    evidence.survived(
        "a Ray worker killed in the middle", "kill -9 of one of two", "its batch is run again; the files of a local run"
    )


def test_a_killed_driver_is_resumed_with_skip_existing_which_keeps_a_file_that_it_cannot_read(
    run: Callable[..., Command], busy: Path, by_one_process: dict[str, Any], evidence: Evidence
) -> None:
    log = busy / "log"
    killed = run("--workers", 1, "--log-file", str(log))
    killed.wait_for(lambda: captured(busy))
    killed.send(signal.SIGKILL)
    assert killed.end().code == -signal.SIGKILL
    wait_until_dead(process_ids(log))  # the next run removes temporary files of dead processes only
    before = len(captured(busy))
    assert before < 12
    mine = with_an_unreadable_file(busy)
    resumed = run("--skip-existing", "--workers", 1, "--prompt-set", "busy,general/mine").end()
    assert resumed.code == 1, resumed.stderr
    assert f"failed: general/mine/2: {mine}: " in resumed.stderr
    assert mine.read_text() == "mine"
    mine.unlink()
    found = contents(busy / "experiments" / "exp")
    assert {name for name in found if "general/mine" in name and name.endswith(".pt")} == {
        f"inference/raw/residual/general/mine/{number}.pt" for number in (1, 3)
    }
    assert found["inference/tone/loud/residual_stream/general/mine/3.json"]["metadata"]["prompt_id"] == 3
    found = {name: value for name, value in found.items() if "general/mine" not in name}
    assert same_but_for_the_model_folder(found, by_one_process)
    evidence.survived(
        "the driver of a Ray cluster killed in the middle",
        f"kill -9 when {before} of 12 prompts were captured",
        "with --skip-existing the files of a local run",
    )


def stopped_cluster(raylet: int) -> list[psutil.Process]:
    """The processes of the cluster of a raylet, stopped: none can end a worker."""
    found = psutil.Process(raylet).parents()
    whole = next(each for each in found if any("gcs_server" in child.name() for child in each.children()))
    services = [each for each in whole.children() if each.name() in ("gcs_server", "raylet")]
    for each in services:
        each.suspend()
    return services


def test_a_worker_changes_no_file_once_its_driver_was_killed(
    cluster: SimulatedCluster, run: Callable[..., Command], busy: Path
) -> None:
    log = busy / "log"
    killed = run("--workers", 1, "--batch-size", 6, "--log-file", str(log))
    killed.wait_for(lambda: captured(busy))
    worker = process_ids(log)[-1]
    services = stopped_cluster(cluster.raylet_of(worker))
    try:
        killed.send(signal.SIGKILL)
        assert killed.end().code == -signal.SIGKILL
        before = whole_files(busy)
        time.sleep(4)  # in which it writes six prompts
        assert psutil.pid_exists(worker)
        assert whole_files(busy) == before
    finally:
        for each in services:
            each.resume()
    wait_until_dead([worker])
    assert whole_files(busy) == before


def whole_files(root: Path) -> dict[str, int]:
    files = (path for path in (root / "experiments").rglob("*") if path.is_file() and path.suffix != ".tmp")
    return {str(path): path.stat().st_mtime_ns for path in files}


def with_an_unreadable_file(root: Path) -> Path:
    """Add the set `general/mine` of three prompts, with a file in place of the capture of the second: the file."""
    path = root / "datasets" / "inference" / "general" / "mine.json"
    path.parent.mkdir()
    path.write_text(json.dumps([{"id": number, "text": f"say {number}"} for number in (1, 2, 3)]))
    file = root / "experiments" / "exp" / "inference" / "raw" / "residual" / "general" / "mine" / "2.pt"
    file.parent.mkdir(parents=True)
    file.write_text("mine")
    return file


def test_ctrl_c_keeps_what_workers_did(run: Callable[..., Command], busy: Path, by_one_process: dict[str, Any]) -> None:
    running = run("--workers", 1)
    running.wait_for(lambda: captured(busy))
    running.send(signal.SIGINT)
    done = running.end()
    assert done.code == 130, done.stderr
    assert "stopped by Ctrl-C; to resume: tlcapture capture" in done.stderr
    n_whole = len(captured(busy))
    assert 0 < n_whole < 12
    found = plain(contents(busy / "experiments" / "exp"))
    expected = plain(by_one_process)
    assert all(value == expected[name] for name, value in found.items())


@pytest.mark.parametrize("collect", [False, True])
def test_a_root_that_workers_do_not_see_is_refused_unless_files_are_sent_back(
    ray_address: str,
    busy: Path,
    tmp_path: Path,
    by_one_process: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    collect: bool,
) -> None:
    """The driver runs in a separate mount namespace, so that workers see an empty folder at its root."""
    if not can_mount_unseen():
        pytest.skip("mount namespaces cannot be made here")
    hidden, result = tmp_path / "hidden", tmp_path / "result"
    hidden.mkdir()
    (tmp_path / "cache").mkdir()
    monkeypatch.setenv("TLCAPTURE_CACHE", str(tmp_path / "cache"))

    def bring_out() -> None:
        shutil.copytree(hidden / "experiments" / "exp", result)
        (tmp_path / "left").write_text(str(list(hidden.glob(".tlcapture-*"))))

    cluster = ("--executor", "ray", "--workers", 1, "--ray-address", ray_address)
    words = (*words_of(hidden), *cluster, "--model", hidden / "model", "--allow-model-change")
    collected = ["--collect"] if collect else []
    command = Command(
        tmp_path / "output", *words, *collected, before=lambda: mount_unseen(hidden, busy), after=bring_out
    )
    done = command.end()
    assert "Traceback" not in done.stderr, done.stderr
    assert (tmp_path / "left").read_text() == "[]"
    if collect:
        assert done.code == 0, done.stderr
        assert same_but_for_the_model_folder(contents(result), by_one_process)
        assert json.loads((result / "config.json").read_bytes())["inference_model"] == str(hidden / "model")
        return
    assert done.code == 2, done.stderr
    assert "does not see" in done.stderr
    assert "pass --collect" in done.stderr
    assert not (result / "inference").exists()


def test_every_command_gives_the_same_on_a_cluster_as_locally(ray_address: str, busy: Path, tmp_path: Path) -> None:
    for trait in ("loud", "warm"):
        questions = [{"id": str(n), "question": f"q{n}?", "positive": "YES", "negative": "no"} for n in range(2)]
        path = busy / "datasets" / "traits" / "tone" / trait / "steering.json"
        path.write_text(json.dumps({"questions": questions}))
    first = Command(tmp_path / "output", *words_of(busy), "--limit", 3, "--max-new-tokens", 4, "--no-project").end()
    assert first.code == 0, first.stderr
    here = Path(shutil.copytree(busy, tmp_path / "here"))
    bad, others = "inference/tone/loud/residual_stream/busy/2.json", "inference/tone/loud/residual_stream/busy/1.json"
    steer = ("--steer", "tone/loud:+0.5@1")
    commands: list[tuple[object, ...]] = [
        ("extract", "--traits", "tone/loud,tone/warm", "--methods", "mean_diff", "--component", "residual"),
        ("evaluate", "--component", "residual", "--methods", "mean_diff"),
        ("steer", "--layers", "1", "--coefficients", "0.2", "--methods", "mean_diff"),
        ("capture", "--prompt-set", "busy", "--limit", "3", "--max-new-tokens", "4", "--batch-size", "2", *steer),
        ("project", "--prompt-set", "busy"),
    ]
    for name, *words in commands:
        common = ("--experiment", "exp", *words)
        if name == "project":  # a projection that cannot be read is kept, and named
            for root in (busy, here):
                (root / "experiments" / "exp" / bad).parent.mkdir(parents=True)
                (root / "experiments" / "exp" / bad).write_text('"mine"')
        local = Command(tmp_path / "output", name, "--root", here, *common).end()
        cluster = ("--executor", "ray", "--workers", "1", "--ray-address", ray_address)
        done = Command(tmp_path / "output", name, "--root", busy, *common, *cluster).end()
        assert done.code == local.code == (name == "project"), done.stderr + local.stderr
    assert f"failed: busy/2: {busy / 'experiments/exp' / bad}: " in done.stderr
    found, expected = (contents_of_json(root / "experiments" / "exp") for root in (busy, here))
    assert found == expected
    assert found[bad] == "mine"
    assert others in found
    steered = [name for name in found if "/residual/busy@steer-loud-0.5-L1-" in name]
    assert len(steered) == 3 and all(found[name]["metadata"]["interventions"] for name in steered)


def contents_of_json(experiment: Path) -> Any:
    for picture in experiment.rglob("*.png"):
        picture.unlink()
    return json.loads(json.dumps(without_times(plain(contents(experiment)))))


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        times = ("timestamp", "vector_timestamp", "projection_date", "comparison_date")
        return {key: without_times(each) for key, each in value.items() if key not in times}
    return [without_times(each) for each in value] if isinstance(value, list) else value


# Before tests that reach for Ray in the process of the tests: a fork of it cannot reach a cluster any more.
@needs_peft
def test_variants_and_comparisons_are_the_same_on_a_cluster(ray_address: str, busy: Path, tmp_path: Path) -> None:
    lora = write_adapter(tmp_path / "lora", str(busy / "model"))
    first = Command(tmp_path / "output", *words_of(busy), "--limit", 3, "--max-new-tokens", 4).end()
    assert first.code == 0, first.stderr
    here = Path(shutil.copytree(busy, tmp_path / "here"))
    capture = ("capture", "--experiment", "exp", "--responses-from", "exp", "--adapter", lora, "--batch-size", 1)
    for words in (capture, ("compare", "exp/busy", "exp/busy@lora")):
        local = Command(tmp_path / "output", *words, "--root", here).end()
        cluster = ("--executor", "ray", "--workers", "1", "--ray-address", ray_address)
        done = Command(tmp_path / "output", *words, "--root", busy, *cluster).end()
        assert done.code == local.code == 0, done.stderr + local.stderr
    found, expected = (contents_of_json(root / "experiments" / "exp") for root in (busy, here))
    assert found == expected
    compared = [name for name in found if name.startswith("analysis/compare/exp@lora/busy/")]
    assert len(compared) == 3
    assert all(found[name]["kl"][-1] > 0 for name in compared)


def test_samples_of_a_worker_with_a_gpu_are_those_of_a_local_run(
    cluster: SimulatedCluster, busy: Path, tmp_path: Path
) -> None:
    """It takes one, where the cluster has GPUs. There is one CPU beside the two of this cluster, so one worker."""
    cluster.with_third_node(cold=True)
    rules = ("--temperature", 1.5, "--top-p", 0.9, "--repetition-penalty", 1.2, "--stop", "q", "--samples", 2)
    words = (*words_of(busy), "--limit", 2, "--max-new-tokens", 9, "--batch-size", 3, *rules)
    local = Path(shutil.copytree(busy, tmp_path / "local"))
    alone = Command(tmp_path / "alone", *[local if word is busy else word for word in words]).end()
    ray = ("--executor", "ray", "--ray-address", cluster.address)
    done = Command(tmp_path / "ray", *words, *ray, "--json").end()
    assert (alone.code, done.code) == (0, 0), done.stderr
    assert sorted(path.name for path in captured(busy)) == ["1.s1.pt", "1.s2.pt", "2.s1.pt", "2.s2.pt"]
    assert same_but_for_the_model_folder(contents(busy / "experiments/exp"), contents(local / "experiments/exp"))
    found = json.loads(done.stdout)["cluster"]
    assert (found["workers"], found["gpus_per_worker"]) == (1, 1)
    assert "batches for 1 workers of a Ray cluster, with 1 GPU each" in done.stderr
    assert "hides" not in done.stderr
    assert "core_worker.cc" not in done.stderr, "Ray complains"
    asked = Command(tmp_path / "output", *words, *ray, "--n-devices", 3, "--overwrite").end()
    assert asked.code == 2
    assert "3 CPUs and 2 GPUs on 3 nodes: too few for a worker of 1 and 3 on one of them" in asked.stderr


def test_a_prompt_that_does_not_fit_in_a_worker_s_memory_is_refused_before_any_runs(
    ray_address: str, busy: Path, tmp_path: Path
) -> None:
    """The driver, which may be another machine, loads no model. Patterns of 200,000 tokens take terabytes."""
    config = busy / "model" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_bytes()), "max_position_embeddings": 10**6}))
    make_prompt_set(busy, "long", ["short", "x" * 200_000])
    words = ("capture", "--root", busy, "--experiment", "long", "--model", busy / "model", "--prompt-set", "long")
    kept = ("--attention", "--tokens", "last", "--max-new-tokens", 2, "--no-project", "--no-chat-template")
    ray = ("--executor", "ray", "--workers", 1, "--gpus-per-worker", 0, "--ray-address", ray_address)
    done = Command(tmp_path / "output", *words, *kept, *ray).end()
    assert done.code == 2, done.stderr
    assert re.search(r"error: long/2: 200003 tokens would take about [\d.]+ TiB of memory, .* are free: ", done.stderr)
    assert not list((busy / "experiments" / "long").rglob("*.pt"))


class UntilThirdNodeWorks:
    """Stops workers of other nodes as they begin, so that some work is left when one of the third node begins."""

    def __init__(self, cluster: SimulatedCluster, log: Path):
        self._cluster = cluster
        self._log = log
        self._stopped: set[int] = set()
        log.write_text("")

    def __call__(self) -> bool:
        for process in set(process_ids(self._log)) - self._stopped:
            if self._cluster.is_on_third_node(process):
                return True
            os.kill(process, signal.SIGSTOP)
            self._stopped.add(process)
        return False

    def let_others_go_on(self) -> None:
        for process in self._stopped:
            os.kill(process, signal.SIGCONT)


def test_a_node_that_is_lost_in_the_middle_leaves_no_prompt_out(
    cluster: SimulatedCluster, busy: Path, tmp_path: Path, by_one_process: dict[str, Any], evidence: Evidence
) -> None:
    experiment = busy / "experiments" / "exp"
    cluster.lose_third_node(gracefully=True)  # it may be a cold one
    on_three = ("--executor", "ray", "--workers", 3, "--gpus-per-worker", 0, "--ray-address", cluster.address)
    project = ("project", "--root", busy, "--experiment", "exp", "--prompt-set", "busy")
    for words in (words_of(busy), project):
        cluster.with_third_node()
        third_works = UntilThirdNodeWorks(cluster, busy / "log")
        command = (*words, *on_three, "--log-file", busy / "log")
        running = Command(tmp_path / "output", *command, before=lambda: vars(driver).update(_SILENCE=10))
        running.wait_for(third_works)
        cluster.lose_third_node()
        third_works.let_others_go_on()
        done = running.end()
        assert done.code == 0, done.stderr
        # Of a node that an earlier test had, the cluster may not have noticed yet that it is gone.
        hidden = re.search(r"the Ray cluster has [24] GPUs, which --gpus-per-worker 0 hides from its work", done.stderr)
        assert (hidden is not None) == (words != project), "there is no model that would run on a GPU"
        assert words == project or "died; its batch is run again: 2 prompts of busy" in done.stdout
        assert same_but_for_the_model_folder(contents(experiment), by_one_process)
        shutil.rmtree(experiment / "inference" / "tone")
    evidence.survived(
        "one of three nodes of a Ray cluster lost in the middle",
        "all its processes killed while it works",
        "all prompts captured; the files of a local run",
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--workers", "2"), "--workers needs --executor ray"),
        (("--collect",), "--collect needs --executor ray"),
        (("--executor", "ray", "--gpus-per-worker", "64"), "too few for a worker of 1 and 64"),
        (("--executor", "ray", "--cpus-per-worker", "64"), "too few for a worker of 64 and "),
    ],
)
def test_options_that_a_cluster_cannot_meet_are_refused(
    ray_address: str, busy: Path, words: tuple[str, ...], message: str, tlcapture: Any
) -> None:
    """These connect the tests' process itself, after the drivers above were forked from it."""
    address = ("--ray-address", ray_address) if "--executor" in words else ()
    result = tlcapture(*words_of(busy), *words, *address)
    assert result.exit_code == 2
    assert message in result.stderr


def test_without_ray_the_error_says_how_to_install_it(
    busy: Path, tlcapture: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    result = tlcapture(*words_of(busy), "--executor", "ray")
    assert result.exit_code == 2
    assert "needs Ray: run 'pip install ray'" in result.stderr


def test_an_address_without_a_cluster_is_an_error(busy: Path, tlcapture: Any) -> None:
    result = tlcapture(*words_of(busy), "--executor", "ray", "--ray-address", "127.0.0.1:1")
    assert result.exit_code == 2
    assert "no Ray cluster at '127.0.0.1:1'" in result.stderr.splitlines()[-1]


def shared(root: Path, make: Any, **others: Any) -> Shared:
    """What a worker in this process needs that sees a root."""
    from tlcapture.storage.experiments.layout import Layout

    every = {"load": None, "files": None, "threads": 1, "inputs": None, "presence": root}
    return Shared(Layout(root, "exp"), make, "token", **{**every, **others})  # type: ignore[arg-type]


class Idle:
    """A worker that needs nothing."""

    def __init__(self, run: Any, load: object):
        pass

    def prepare(self) -> None:
        pass


def test_a_worker_checks_its_driver_before_each_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TLCAPTURE_WRITERS", "TLCAPTURE_PROCESSES"):
        monkeypatch.setenv(name, "0")  # so that what the worker sets is undone
    from tlcapture.errors import NoSpaceError
    from tlcapture.storage.files import check_changes, remove, write_bytes
    from tlcapture.storage.locks import presence

    kept, new = tmp_path / "kept.json", tmp_path / "new.json"
    try:
        with presence(tmp_path) as path:
            actor = WorkerActor()
            assert actor.prepare([shared(tmp_path, Idle, presence=path)], {}).error is None
            write_bytes(kept, b"1")
        for change in (lambda: write_bytes(kept, b"2"), lambda: write_bytes(new, b"2"), lambda: remove([kept])):
            with pytest.raises(NoSpaceError, match=r"not changed: the run that this worker belongs to has ended"):
                change()
    finally:
        check_changes(lambda path: None)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"kept.json": b"1"}


def test_a_worker_leaves_the_other_processors_of_its_machine_to_other_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tlcapture.runs.background_writer import BackgroundWriter
    from tlcapture.runs.processes import Processes

    for name in ("TLCAPTURE_WRITERS", "TLCAPTURE_PROCESSES"):
        monkeypatch.setenv(name, "4")  # so that what the worker sets is undone
    monkeypatch.delenv("TLCAPTURE_WRITERS")
    monkeypatch.setattr("torch.set_num_threads", lambda number: None)
    monkeypatch.setattr("tlcapture.runs.background_writer.n_processors", lambda: 64)
    made = []

    class Worker(Idle):
        def __init__(self, run: Any, load: object):
            made.append((BackgroundWriter(run)._n_writers, Processes()._count))

    assert WorkerActor().prepare([shared(tmp_path, Worker, threads=4, inputs={})], {}).error is None
    assert made == [(2, 0)]
