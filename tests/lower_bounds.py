"""The lower bounds in setup.cfg, tried: the tests that use a package, with the oldest version that is allowed.

    python -m tests.lower_bounds            # all of them (make test-bounds)
    python -m tests.lower_bounds ray peft   # some

The requirements are tried together, each package of an extra alone. Their versions are installed in folders of
build/bounds, which come first on PYTHONPATH, with other versions of what they need where they do not take those of the
environment. A bound that those do not take has to be raised. torch is tried on a GPU machine (benchmarks/GPU.md).
"""

from __future__ import annotations

import configparser
import os
import shutil
import subprocess
import sys
from importlib.metadata import Distribution, PackageNotFoundError, distributions, version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

TOP = Path(__file__).parents[1]
FOLDERS = TOP / "build" / "bounds"
REQUIREMENTS = "requirements"
NOT_HERE = ("torch", "triton", "nvidia-")
PYTEST = ("-m", "pytest", "-q", "-p", "no:cacheprovider")
SITE = ("-m", "sphinx", "--fail-on-warning", "--quiet", "docs", "build/bounds-site")
EXTRAS = ("", "boto3")  # the server of the tests of s3fs has to take the same botocore
# Plugins of other packages may need a newer version of one than its bound.
ENVIRONMENT = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
# What is run with the lower bound of each package of an extra, and of all requirements together.
COMMANDS: dict[str, tuple[str, ...]] = {
    REQUIREMENTS: (
        *PYTEST, "tests/test_models.py", "tests/test_parity.py", "tests/test_sources.py", "tests/test_gguf_files.py",
        "tests/test_figures.py",
        "tests/test_projection_frames.py", "tests/test_locks.py", "tests/test_storage.py", "tests/traits", "tests/page",
        "tests/input/test_json_files.py", "tests/cli/test_capture.py", "tests/cli/test_import_vectors.py",
        "tests/integration/test_page.py", "tests/extraction/test_intervals.py",
    ),
    "circuitsvis": (*PYTEST, "tests/test_html.py", "tests/test_live.py", "tests/test_ipython.py"),
    "ipython": (*PYTEST, "tests/test_ipython.py"),
    "ray": (*PYTEST, "tests/cluster"),
    "nnsight": ("benchmarks/bench.py", "--quick", "--only", "w1"),
    "beartype": (*PYTEST, "tests/views", "tests/test_generation.py"),
    "hypothesis": (*PYTEST, "tests/input/test_json_files.py", "tests/traits/test_dynamics.py"),
    "import-linter": ("-c", "from importlinter.cli import lint_imports_command; lint_imports_command()"),
    **dict.fromkeys(("s3fs", "moto"), (*PYTEST, "tests/remote")),
    "mypy": ("-m", "mypy"),
    "peft": (*PYTEST, "tests/test_adapters.py"),
    **dict.fromkeys(("axe-playwright-python", "playwright"), (*PYTEST, "tests/integration/test_page.py")),
    "pytest": (*PYTEST, "tests/test_rounding.py", "tests/cli/test_output.py"),
    "pytest-xdist": (
        *PYTEST, "-p", "xdist", "--numprocesses", "2", "--dist", "loadscope", "--no-loadscope-reorder",
        "tests/test_rounding.py",
    ),
    "ruff": ("-m", "ruff", "check", "."),
    **dict.fromkeys(("furo", "myst-parser", "sphinx"), SITE),
    "build": ("-m", "build", "--no-isolation", "--outdir", "build/bounds-dist", "."),
    "twine": ("-m", "twine", "check", "--strict", "build/bounds-dist/*"),
}  # fmt: skip


def bounds() -> dict[str, dict[str, str]]:
    """The lower bound of each package, those of the requirements together and those of the extras alone."""
    config = configparser.ConfigParser()
    config.read(TOP / "setup.cfg")
    extras = config["options.extras_require"]
    alone = [_bound(line) for extra in extras for line in extras[extra].split("\n") if line.strip()]
    required = config["options"]["install_requires"].split()
    return {REQUIREMENTS: dict(map(_bound, required)), **{name: {name: bound} for name, bound in alone}}


def main(names: list[str]) -> int:
    """Try the bounds of `names`, or all; returns the exit status."""
    status = 0
    for name, versions in bounds().items():
        if names and name not in names:
            continue
        folder = FOLDERS / name
        shutil.rmtree(folder, ignore_errors=True)
        tried = [each for each in versions.items() if each[0] not in NOT_HERE and not _is_installed(*each)]
        _install(folder, [f"{each}=={bound}" for each, bound in tried])
        print(f"{name}: {', '.join(_versions(folder)) or 'the installed version'}", flush=True)
        if replaced := _replaced(folder, tried):
            print(f"{name}: failed: others need a newer {', '.join(replaced)}: raise its bound", flush=True)
            status = 1
            continue
        path = os.pathsep.join([str(folder), str(TOP)])
        done = subprocess.run(
            [sys.executable, *COMMANDS[name]], cwd=TOP, env={**os.environ, **ENVIRONMENT, "PYTHONPATH": path}
        )
        print(f"{name}: {'failed' if done.returncode else 'works'}", flush=True)
        status = status or done.returncode
    return status


def _bound(line: str) -> tuple[str, str]:
    requirement = Requirement(line)
    (bound,) = (each.version for each in requirement.specifier if each.operator == ">=")
    return requirement.name, bound


def _is_installed(name: str, bound: str) -> bool:
    try:
        return Requirement(f"{name}=={bound}").specifier.contains(version(name))
    except PackageNotFoundError:
        return False


def _install(folder: Path, wanted: list[str]) -> None:
    """Install packages in a folder, and what they need where neither it nor the environment has a version they take."""
    while wanted:
        words = ["-m", "pip", "install", "--quiet", "--no-deps", "--upgrade", "--target", str(folder), *wanted]
        subprocess.run([sys.executable, *words], check=True)
        there = [*distributions(path=sys.path), *distributions(path=[str(folder)])]  # the folder's come first in use
        found = {canonicalize_name(each.name): each for each in there}
        wanted = sorted({need for each in distributions(path=[str(folder)]) for need in _unmet(each, found)})


def _unmet(package: Distribution, found: dict[str, Distribution]) -> list[str]:
    needs = [Requirement(line) for line in package.requires or ()]
    needs = [
        each for each in needs if each.marker is None or any(each.marker.evaluate({"extra": name}) for name in EXTRAS)
    ]
    needs = [each for each in needs if not each.name.startswith(NOT_HERE)]
    return [
        f"{each.name}{each.specifier}"
        for each in needs
        if (there := found.get(canonicalize_name(each.name))) is None
        or not each.specifier.contains(there.version, prereleases=True)
    ]


def _replaced(folder: Path, tried: list[tuple[str, str]]) -> list[str]:
    """The packages that another version has replaced, which a package needs that is tried with them."""
    found: dict[str, set[str]] = {}
    for each in distributions(path=[str(folder)]):
        found.setdefault(canonicalize_name(each.name), set()).add(each.version)
    at = {name: found[canonicalize_name(name)] for name, _ in tried}
    return [name for name, bound in tried if any(Version(each) != Version(bound) for each in at[name])]


def _versions(folder: Path) -> list[str]:
    return sorted(f"{each.name} {each.version}" for each in distributions(path=[str(folder)]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
