"""The working copy of a root in an object store."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from click.testing import CliRunner

from tlcapture.cli.main import main
from tlcapture.errors import InputError, NoSpaceError, StorageError, TlcaptureError
from tlcapture.storage import files
from tlcapture.storage.experiments.config import read_config, update_config
from tlcapture.storage.experiments.layout import Layout, existing_experiments
from tlcapture.storage.remote import roots as remote_roots
from tlcapture.storage.remote import working_copies
from tlcapture.storage.remote.roots import local, refresh, root_folder

TOP = Path(__file__).parents[2]


@pytest.fixture
def memory(cache: Path) -> Any:
    """A store in this process."""
    store = fsspec.filesystem("memory")
    store.store.clear()
    yield store
    store.store.clear()


@pytest.fixture(params=["memory", "s3"])
def url(request: pytest.FixtureRequest) -> str:
    if request.param == "s3":
        return request.getfixturevalue("bucket")
    request.getfixturevalue("memory")
    return "memory://some/root"


def store_of(url: str) -> Any:
    return fsspec.core.url_to_fs(url, use_listings_cache=False)[0]


def put(url: str, name: str, data: bytes) -> None:
    store_of(url).pipe_file(f"{url}/{name}", data)


def test_what_others_write_is_read_and_what_is_written_others_read(url: str) -> None:
    put(url, "experiments/exp/config.json", b'{"inference_model": "one"}')
    layout = Layout(root_folder(url), "exp")
    assert existing_experiments(layout.root) == ["exp"]
    assert read_config(layout).inference_model == "one"
    update_config(layout, system_prompt="be brief")
    assert json.loads(store_of(url).cat_file(f"{url}/experiments/exp/config.json"))["system_prompt"] == "be brief"
    put(url, "experiments/exp/runs/1.json", b"{}")
    assert not layout.run_record("1").exists()
    refresh(layout.folder)
    assert files.read_json(layout.run_record("1")) == {}
    store_of(url).rm_file(f"{url}/experiments/exp/runs/1.json")
    refresh(layout.folder)
    assert not layout.run_record("1").exists()


def test_sizes_and_times_are_those_of_the_store_before_anything_is_read(bucket: str, s3: Any) -> None:
    put(bucket, "experiments/exp/runs/1.json", b"x" * 1234)
    path = Layout(root_folder(bucket), "exp").run_record("1")
    assert (path.stat().st_size, path.stat().st_blocks) == (1234, 0)
    assert path.stat().st_mtime == int(s3.info(f"{bucket}/experiments/exp/runs/1.json")["LastModified"].timestamp())
    before = path.stat().st_mtime_ns
    assert local(path).read_bytes() == b"x" * 1234
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (1234, before)


def test_a_version_is_downloaded_once_and_a_new_one_again(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    downloads: list[str] = []
    download = working_copies.Store.download
    monkeypatch.setattr(
        working_copies.Store, "download", lambda self, name, to: (downloads.append(name), download(self, name, to))[1]
    )
    put(bucket, "experiments/exp/runs/1.json", b"[1]")
    layout = Layout(root_folder(bucket), "exp")
    path = layout.run_record("1")
    assert [files.read_json(path) for _ in range(3)] == [[1]] * 3
    assert len(downloads) == 1
    remote_roots._mounts.clear()  # as in another process
    again = Layout(root_folder(bucket), "exp").run_record("1")
    assert again != path
    assert files.read_json(again) == [1]
    assert len(downloads) == 1
    put(bucket, "experiments/exp/runs/1.json", b"[2]")
    refresh(again)
    assert files.read_json(again) == [2]
    assert len(downloads) == 2
    assert files.read_json(files.write_json(again, [3]).path) == [3]
    assert len(downloads) == 2


def test_a_file_that_changes_while_it_is_downloaded_is_of_one_version(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    download = working_copies.Store.download

    def and_replace(self: Any, name: str, to: Path) -> None:
        download(self, name, to)
        if to.stat().st_size == 3:
            put(bucket, name, b"[1, 2]")

    monkeypatch.setattr(working_copies.Store, "download", and_replace)
    put(bucket, "experiments/exp/runs/1.json", b"[1]")
    path = Layout(root_folder(bucket), "exp").run_record("1")
    assert files.read_json(path) == [1, 2]
    assert path.stat().st_size == 6


def test_tensors_are_mapped_from_the_cache_and_outlive_a_replacement(bucket: str) -> None:
    path = Layout(root_folder(bucket), "exp").residual("set", 1)
    files.write_tensors(path, {"a": torch.arange(1000.0)})
    opened = files.read_tensors(path)
    files.write_tensors(path, {"a": torch.zeros(1000)})
    assert torch.equal(opened["a"], torch.arange(1000.0))
    assert torch.equal(files.read_tensors(path)["a"], torch.zeros(1000))


def test_a_write_that_fails_leaves_the_earlier_file(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import s3fs

    path = Layout(root_folder(bucket), "exp").run_record("1")
    files.write_json(path, "before")

    call = s3fs.S3FileSystem._call_s3

    async def fail(self: Any, method: str, *args: Any, **kwargs: Any) -> Any:
        if method == "put_object":
            raise OSError("the connection was reset")
        return await call(self, method, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(s3fs.S3FileSystem, "_call_s3", fail)
        with pytest.raises(StorageError, match=rf"{bucket}/experiments/exp/runs/1.json: cannot be written .*reset"):
            files.write_json(path, "after")
    assert files.read_json(path) == "before"
    assert store_of(bucket).cat_file(f"{bucket}/experiments/exp/runs/1.json") == b'"before"'
    assert [each.name for each in path.parent.iterdir()] == ["1.json"]


def test_an_upload_in_parts_is_there_when_it_is_complete_and_not_before(bucket: str, s3: Any, monkeypatch: Any) -> None:
    import s3fs

    seen: list[bool] = []
    complete = s3fs.S3FileSystem._call_s3

    async def watch(self: Any, method: str, *args: Any, **kwargs: Any) -> Any:
        if method == "complete_multipart_upload":
            seen.append(bool((await complete(self, "list_objects_v2", Bucket=kwargs["Bucket"])).get("Contents")))
        return await complete(self, method, *args, **kwargs)

    monkeypatch.setattr(s3fs.S3FileSystem, "_call_s3", watch)
    monkeypatch.setattr(s3, "put_file", partial(s3.put_file, chunksize=5 * 2**20))
    path = Layout(root_folder(bucket), "exp").residual("set", 1)
    content = os.urandom(11 * 2**20)
    files.write_bytes(path, content)
    assert seen == [False]
    assert s3.cat_file(f"{bucket}/experiments/exp/inference/raw/residual/set/1.pt") == content


def test_removed_files_are_removed_from_the_store(url: str) -> None:
    path = Layout(root_folder(url), "exp").run_record("1")
    files.write_json(path, 1)
    assert files.remove([path, path]) == 1
    assert store_of(url).find(url) == {} or store_of(url).find(url) == []
    refresh(path.parents[1])
    assert not path.exists()


def test_a_listing_that_began_before_a_write_does_not_undo_it(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = Layout(root_folder(bucket), "exp")
    files.write_json(layout.run_record("old"), 1)
    listed = working_copies.Store.objects

    def meanwhile(self: Any, below: str) -> Any:
        found = listed(self, below)
        files.write_json(layout.run_record("new"), 2)
        files.remove([layout.run_record("old")])
        return found

    monkeypatch.setattr(working_copies.Store, "objects", meanwhile)
    refresh(layout.folder)
    assert files.read_json(layout.run_record("new")) == 2
    assert not layout.run_record("old").exists()


def test_names_that_lead_out_and_names_of_folders_are_left_out(memory: Any) -> None:
    memory.store["/some/root/experiments/exp/../../../../escaped"] = memory_file(memory, b"x")
    memory.store["/some/root/experiments/exp/a"] = memory_file(memory, b"x")
    memory.store["/some/root/experiments/exp/a/b"] = memory_file(memory, b"x")
    layout = Layout(root_folder("memory://some/root"), "exp")
    inside = layout.root.parents[3]
    assert not [path for path in inside.rglob("*") if path.name == "escaped"]
    assert (layout.folder / "a").exists()


def memory_file(memory: Any, data: bytes) -> Any:
    memory.pipe_file("/elsewhere", data)
    return memory.store.pop("/elsewhere")


def test_a_full_disk_below_the_cache_is_named_with_what_moves_it(memory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    put("memory://some/root", "experiments/exp/config.json", b"{}")
    layout = Layout(root_folder("memory://some/root"), "exp")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(memory), "get_file", full)
    with pytest.raises(NoSpaceError, match=r"^memory://some/root/experiments/exp/config.json: .* TLCAPTURE_CACHE"):
        read_config(layout)


def test_a_root_that_ends_with_the_command_is_refused(cache: Path) -> None:
    result = CliRunner().invoke(main, ["list", "--root", "memory://some/root"])
    assert result.exit_code == 2
    assert "all in it is lost when the command ends" in result.stderr


def test_the_cache_is_kept_below_its_limit(bucket: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TLCAPTURE_REMOTE_CACHE", "1MiB")
    monkeypatch.setattr(working_copies, "_IN_USE", 0.0)
    layout = Layout(root_folder(bucket), "exp")
    names = [str(number) for number in range(12)]
    for name in names:
        files.write_bytes(layout.run_record(name), name.encode() * 300_000)
    for name in names:
        assert files.read_bytes(layout.run_record(name))[:2] == (name * 2).encode()[:2]
    kept = {(each.stat().st_ino): each.stat().st_blocks * 512 for each in cache.rglob("*") if each.is_file()}
    assert sum(kept.values()) < 2 * 2**20


def test_readers_in_many_threads_get_the_whole_file(bucket: str) -> None:
    put(bucket, "experiments/exp/runs/1.json", json.dumps(list(range(10_000))).encode())
    path = Layout(root_folder(bucket), "exp").run_record("1")
    found: list[Any] = []
    threads = [threading.Thread(target=lambda: found.append(files.read_json(path))) for _ in range(8)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert found == [list(range(10_000))] * 8


def test_many_small_files_of_a_folder_are_downloaded_together(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    for name in ("download", "download_all", "version"):
        whole = getattr(working_copies.Store, name)
        monkeypatch.setattr(
            working_copies.Store, name, lambda *words, name=name, whole=whole: (calls.append(name), whole(*words))[1]
        )
    store_of(bucket).pipe({f"{bucket}/experiments/exp/runs/{n}.json": str(n).encode() for n in range(100)})
    layout = Layout(root_folder(bucket), "exp")
    put(bucket, "experiments/exp/runs/17.json", b"1700")
    assert [files.read_json(layout.run_record(str(n))) for n in range(100)] == [*range(17), 1700, *range(18, 100)]
    assert len(calls) <= 10
    assert calls.count("download_all") == 2


def test_a_process_that_was_started_writes_to_the_store_too(bucket: str) -> None:
    path = Layout(root_folder(bucket), "exp").run_record("1")
    files.write_json(path, [1])
    code = (
        "import sys; from pathlib import Path; from tlcapture.storage import files\n"
        "path = Path(sys.argv[1]); value = files.read_json(path)\n"
        "files.write_json(path.with_name('2.json'), value + [2])"
    )
    env = {**os.environ, **remote_roots.in_other_processes(), "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code, str(path)], env=env, check=True, cwd=TOP)
    assert store_of(bucket).cat_file(f"{bucket}/experiments/exp/runs/2.json") == b"[1,2]"
    assert files.read_json(path.with_name("2.json")) == [1, 2]


def test_working_copies_of_processes_that_were_killed_are_removed(bucket: str, cache: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    left = cache / "remote" / "copies" / f"{working_copies.HOST}-{dead.pid}-0123"
    (left / "root").mkdir(parents=True)
    root_folder(bucket)
    assert not left.exists()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("nope://x/y", "nope:// is not a supported store: expected s3://, "),
        ("https://x/y", "https:// is not a supported store"),
        ("s3://", "expected s3://BUCKET or s3://BUCKET/PREFIX"),
        ("s3:///", "expected s3://BUCKET or s3://BUCKET/PREFIX"),
        ("s3://key:secret@bucket/x", "credentials do not belong in a URL"),
        ("s3://bucket/a/../b", "a part of its path is empty, '.' or '..'"),
        ("s3://bucket//b", "a part of its path is empty"),
    ],
)
def test_urls_that_are_not_roots_are_refused_in_one_line(given: str, said: str, cache: Path) -> None:
    with pytest.raises(InputError) as refused:
        root_folder(given)
    assert said in str(refused.value)
    assert "secret" not in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(("scheme", "needed"), [("s3", "s3fs"), ("gs", "gcsfs"), ("abfs", "adlfs")])
def test_a_missing_package_is_named(scheme: str, needed: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("s3fs", "gcsfs", "adlfs"):
        monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, scheme, raising=False)
    with pytest.raises(
        InputError, match=rf"^{scheme}://bucket: {needed} is needed to reach it: run 'pip install {needed}'$"
    ):
        root_folder(f"{scheme}://bucket")


def test_a_folder_and_a_file_url_are_used_as_they_are(tmp_path: Path) -> None:
    assert root_folder(tmp_path) == tmp_path
    assert root_folder(f"file://{tmp_path}") == tmp_path
    assert root_folder("~/x") == Path("~/x").expanduser()
    assert local(tmp_path / "x") == tmp_path / "x"


def test_a_cache_that_cannot_be_made_or_has_no_size_is_named(
    bucket: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    with monkeypatch.context() as patch:
        patch.setattr(remote_roots, "cache_folder", lambda: tmp_path / "file")
        with pytest.raises(StorageError, match=r"no working copy can be made .*Not a directory.*: set TLCAPTURE_CACHE"):
            root_folder(bucket)
    monkeypatch.setenv("TLCAPTURE_REMOTE_CACHE", "much")
    with pytest.raises(InputError, match=r"TLCAPTURE_REMOTE_CACHE: 'much' is not a size"):
        root_folder(bucket)
    assert not list((cache / "remote" / "copies").iterdir())


def _no_bucket(patch: pytest.MonkeyPatch) -> str:
    return "s3://there-is-no-such-bucket/x"


def _no_credentials(patch: pytest.MonkeyPatch) -> str:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        patch.delenv(name)
    patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    patch.setenv("HOME", "/nonexistent")
    return "s3://bucket/x"


def _no_network(patch: pytest.MonkeyPatch) -> str:
    patch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    patch.setenv("AWS_MAX_ATTEMPTS", "1")
    patch.setattr("s3fs.S3FileSystem.retries", 1)
    return "s3://bucket/x"


def _denied(patch: pytest.MonkeyPatch) -> str:
    async def deny(self: Any, *args: Any, **kwargs: Any) -> None:
        raise PermissionError("Access Denied")

    for name in ("_call_s3", "_find", "_lsdir", "_iterdir"):
        patch.setattr(f"s3fs.S3FileSystem.{name}", deny)
    return "s3://bucket/x"


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (_no_bucket, "does the bucket s3://there-is-no-such-bucket exist?"),
        (_no_credentials, "no credentials (Unable to locate credentials): set AWS_ACCESS_KEY_ID and"),
        (_no_network, "the store cannot be reached (Could not connect to the endpoint URL"),
        (_denied, "may not be listed with these credentials (Access Denied)"),
    ],
)
def test_a_store_that_cannot_be_listed_is_refused_in_one_line(
    fault: Callable[[pytest.MonkeyPatch], str], said: str, s3: Any, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = fault(monkeypatch)
    type(s3).clear_instance_cache()
    try:
        with pytest.raises(TlcaptureError) as refused:
            root_folder(url)
    finally:
        type(s3).clear_instance_cache()
    assert said in str(refused.value)
    assert str(refused.value).startswith("s3://")
    assert "\n" not in str(refused.value)
    assert not list((cache / "remote" / "copies").iterdir())


def test_local_roots_and_help_load_no_fsspec(tmp_path: Path) -> None:
    (tmp_path / "experiments" / "exp").mkdir(parents=True)
    code = (
        "import sys; from tlcapture import Experiment; from tlcapture.cli.main import main\n"
        f"Experiment('exp', {str(tmp_path)!r}).prompt_sets\n"
        f"for words in (['list', '--root', {str(tmp_path)!r}], ['capture', '--root', 's3://bucket/x', '--help']):\n"
        "    try:\n        main(words)\n    except SystemExit as end:\n        assert end.code == 0\n"
        "print([name for name in ('fsspec', 's3fs', 'botocore', 'aiohttp') if name in sys.modules])"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=TOP, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
