"""Shapes in signatures are checked while the tests run; models and experiments that tests share."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from functools import cache, wraps
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from hypothesis import settings
from jaxtyping import install_import_hook

from tests import typechecking  # the hook names it

gc.set_threshold(1_000_000)  # imports make objects that stay

# More threads than one would mostly wait for each other, since most models are tiny. It must be known before torch is
# imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Where there is no GPU, Triton interprets its kernels; it must be known before anything imports Triton.
if not os.environ.get("TLCAPTURE_TEST_DEVICE", "cpu").startswith("cuda"):
    os.environ.setdefault("TRITON_INTERPRET", "1")

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test reaches for the network, nor waits for it

# Machines are noisy, and time is not what properties are about; CI tries the same examples every time.
settings.register_profile("patient", deadline=None, derandomize="CI" in os.environ, max_examples=50)
settings.register_profile("thorough", settings.get_profile("patient"), max_examples=100)
settings.load_profile("patient")

_CHECKED = [
    "tlcapture.captures",
    "tlcapture.comparison",
    "tlcapture.extraction",
    "tlcapture.generation",
    "tlcapture.models",
    "tlcapture.traits",
    "tlcapture.views",
]
install_import_hook(_CHECKED, "tests.typechecking.check")

from tests import tiny  # noqa: E402  the hook has to be there first
from tests.evidence import Evidence  # noqa: E402

collect_ignore = ["fresh"]  # tests of an installed package: `make test-fresh`

_STOPPED = (130, 143)  # a command in the tests' process takes their Ctrl-C and SIGTERM for its own

EVIDENCE = pytest.StashKey[Evidence]()

# Files whose tests share what takes long to make run in one process, and what takes longest runs first, so that the
# processes of `make test` end together.
_GROUPS = {
    "tests/cluster": "cluster",
    "tests/integration": "embedded-model",
    "tests/faults": "faults",
    "tests/test_parity.py": "tiny-models",
    "tests/fast": "tiny-models",
    "tests/test_doctor.py": "tiny-models",
    "tests/test_generation.py": "tiny-models",
    "tests/cli": "commands",
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--reliability", type=Path, metavar="FILE", help="write what the tests saw to this page")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--reliability") and config.getoption("numprocesses", None):
        raise pytest.UsageError("--reliability gathers what one process saw: leave out -n")
    if config.getoption("--reliability"):
        settings.load_profile("thorough")
    config.stash[EVIDENCE] = Evidence()


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    path = session.config.getoption("--reliability")
    if path is not None and exitstatus == 0:
        session.config.stash[EVIDENCE].write(path)


def pytest_runtest_setup() -> None:
    typechecking.begin_test()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = list(dict.fromkeys(_GROUPS.values()))
    groups = {item: _group(item.nodeid) for item in items}
    items.sort(key=lambda item: order.index(groups[item]) if groups[item] in order else len(order))


def pytest_collection_finish() -> None:
    """Leave what is imported by now out of garbage collections, which would go through a million objects each time."""
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)


@pytest.hookimpl(optionalhook=True)  # environments without pytest-xdist do not know it
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Give all tests of a group to one process, in the order of collection."""
    from xdist.scheduler import LoadScopeScheduling

    class ByGroup(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return _group(nodeid)

    return ByGroup(config, log)


def _group(nodeid: str) -> str:
    """The group of a test; most files are a group of their own."""
    file = nodeid.split("::")[0]
    return next((group for path, group in _GROUPS.items() if file.startswith(path)), file)


@pytest.hookimpl(wrapper=True)
def pytest_report_to_serializable() -> Generator[None, Any, Any]:
    """Lone surrogates, which some tests are about, in a form in which one process can tell them to another."""
    return _encodable((yield))


def _encodable(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, dict):
        return {_encodable(key): _encodable(each) for key, each in value.items()}
    return type(value)(map(_encodable, value)) if isinstance(value, list | tuple) else value


@pytest.fixture(scope="module")
def quick_collections() -> None:
    """Leave what exists by now out of garbage collections, which every out-of-memory error of the module asks for."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def evidence(request: pytest.FixtureRequest) -> Evidence:
    """Where a test says what it saw, for docs/reliability.md."""
    return request.config.stash[EVIDENCE]


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder of Hugging Face weights of a tiny Llama with a chat template.

    Commands load it once for each set of options. A test that loads it itself, with a `load_model` that it imported
    when it was collected, gets a model of its own.
    """
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    tiny.hf_model("llama").save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tlcapture.models.loading.load_model", loading_once(str(folder)))
        yield folder


def loading_once(model: str) -> Callable[..., Any]:
    """`load_model`, which returns the model of an earlier call with the same options where it is the one named."""
    from tlcapture.models.loading import load_model

    load_again = cache(load_model)

    @wraps(load_model)
    def load(name: str = "smollm2", *words: Any, warn: Any = None, **options: Any) -> Any:
        if name == model:
            return load_again(name, *words, **options)
        return load_model(name, *words, warn=warn, **options)

    return load


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty root that commands use without being told."""
    monkeypatch.setenv("TLCAPTURE_ROOT", str(tmp_path))
    return tmp_path


@pytest.fixture
def tlcapture(root: Path) -> Callable[..., Result]:
    """Run a command line in the root; its result has exit_code, stdout, stderr."""
    from tlcapture.cli.main import main

    def run(*words: object) -> Result:
        result = CliRunner().invoke(main, [str(word) for word in words], catch_exceptions=False)
        if result.exit_code in _STOPPED:
            pytest.exit("a signal that was sent to the tests", returncode=result.exit_code)
        return result

    return run


@contextmanager
def quick_evaluations() -> Iterator[None]:
    """Let `evaluate` draw fewer samples, make its reference of short responses, and the gradient take fewer steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tlcapture.commands.evaluating.reference.NEW_TOKENS", 2)
        patch.setattr("tlcapture.extraction.baselines.RESAMPLES", 100)
        patch.setattr("tlcapture.extraction.cross_validation.RELABELLINGS", 60)
        patch.setattr("tlcapture.extraction.methods.STEPS", 60)
        yield


@contextmanager
def unrendered_figures() -> Iterator[None]:
    """Let commands draw figures but not render them, which takes longer than everything else that they do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("matplotlib.figure.Figure.savefig", lambda figure, file, **_: file.write(b"\x89PNG"))
        yield


@pytest.fixture(scope="session")
def smollm2() -> Any:
    """The embedded model on the engine that `auto` takes, loaded once."""
    from tlcapture.models.loading import load_model

    return load_model("smollm2", engine=tiny.ENGINES[0], device="cpu")
