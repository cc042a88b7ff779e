"""Where a model's files are, by its name: the embedded model, a folder, a GGUF file, or a repository on the hub.

    source_of("smollm2")                          # the folder of the embedded model
    source_of("~/models/mine")                    # a folder
    source_of("mine.gguf")                        # a folder with its converted weights
    source_of("google/gemma-2-2b-it@299a8560")    # the folder of a revision in the hub cache

A repository that is in the hub cache is taken from there, without asking the network: `main` is the commit that was
fetched last. Whatever is missing is downloaded once the hub has answered, for which it has a few seconds. Importing
this module loads no torch.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from tlcapture.errors import ModelError
from tlcapture.models.checkpoints import embedded
from tlcapture.models.checkpoints.hub import Revision, ask
from tlcapture.text import did_you_mean

_CONFIGS = ("config.json", "adapter_config.json")
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tokenizer_config.json")
_SMALL = ("*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken")
_WEIGHTS = ("*.safetensors", "*.bin")
_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_WHOLE = ("model.safetensors", "pytorch_model.bin", "adapter_model.safetensors", "adapter_model.bin")
_REPOSITORY = re.compile(r"[\w.-]+(/[\w.-]+)?")
_REVISION = re.compile(r"\w[\w.-]*(/\w[\w.-]*)*")
_COMMIT = re.compile(r"[0-9a-f]{40}")


def source_of(name: str, *, weights: bool = True) -> str:
    """The folder with the config, tokenizer and (unless `weights` is false) weights of a model.

    Raises:
        ModelError: there is no such folder or repository, it holds no model, or the hub does not answer.
    """
    found = _local_folder(name)
    if found is None:
        found = Repository.named(name).folder(weights=weights)
    return str(found)


def check_name(name: str) -> None:
    """Raise `ModelError` if a model cannot be there: a wrong folder, or a repository that nothing can fetch."""
    if name == embedded.NAME:
        embedded.gguf_file()
    elif _local_source(name) is None:
        Repository.named(name).check()


def commit_of(source: str) -> str | None:
    """The commit of a model's folder in the hub cache; `None` for any other folder."""
    name = Path(source).name
    return name if _COMMIT.fullmatch(name) else None


def _local_folder(name: str) -> Path | None:
    if name == embedded.NAME:
        return embedded.embedded_folder()
    path = _local_source(name)
    return embedded.converted(path) if path is not None and path.suffix == ".gguf" else path


def _local_source(name: str) -> Path | None:
    """A folder of weights or a GGUF file; `None` for the name of a repository."""
    path = Path(name).expanduser()
    if path.is_dir():
        return _checked_folder(path)
    if path.suffix == ".gguf":
        if path.is_file():
            return path
        raise ModelError(f"{path}: no such file: expected a GGUF file")
    if path.is_file():
        raise ModelError(f"{path}: not a model: expected a folder of Hugging Face weights, or a file with suffix .gguf")
    repository, at, revision = name.partition("@")
    if at and Path(repository).expanduser().exists():
        raise ModelError(f"{repository}: local files have no revisions: leave out {revision!r}")
    if not _REPOSITORY.fullmatch(repository) or name.startswith("."):
        raise ModelError(
            f"{path}: no such folder: expected {embedded.NAME!r}, a folder of Hugging Face weights, a GGUF file, or "
            "the name of a model on the hub"
        )
    return None


def _checked_folder(folder: Path) -> Path:
    """The folder, or the GGUF file in it where it has no config."""
    if any((folder / config).is_file() for config in _CONFIGS):
        return folder
    files = sorted(folder.glob("*.gguf"))
    if len(files) == 1:
        return files[0]
    if files:
        raise ModelError(f"{folder}: has several GGUF files: name one: {', '.join(path.name for path in files)}")
    raise ModelError(f"{folder}: not a folder of Hugging Face weights: it has no config.json")


@dataclass(frozen=True)
class Repository:
    """A repository on the hub at a revision: a branch, a tag or a commit."""

    name: str
    revision: str
    is_default: bool = False

    @classmethod
    def named(cls, name: str) -> Repository:
        """The repository of a name such as `org/model` or `org/model@revision`; without a revision, `main`."""
        repository, at, revision = name.partition("@")
        if at and not _REVISION.fullmatch(revision):
            raise ModelError(f"model {name!r}: expected a branch, a tag or a commit after '@'")
        if repository == embedded.NAME:
            raise ModelError(f"{embedded.NAME!r} is the embedded model, which has no revisions")
        return cls(repository, revision or "main", not at)

    def folder(self, *, weights: bool) -> Path:
        """The folder of its files in the hub cache; what is missing there is downloaded."""
        commit = self._cached_commit()
        if commit is not None and not _missing(self._snapshot(commit), weights=weights):
            return self._snapshot(commit)
        return self._downloaded(self._asked(commit), weights=weights)

    def check(self) -> None:
        """Raise `ModelError` if it is neither in the hub cache nor on a hub that answers."""
        commit = self._cached_commit()
        if commit is None or _missing(self._snapshot(commit), weights=True):
            self._asked(commit)

    def _cached_commit(self) -> str | None:
        """The commit of this revision in the hub cache."""
        reference = self._cache / "refs" / self.revision
        if reference.is_file():
            commit = reference.read_text(encoding="utf-8").strip()
            return commit if self._snapshot(commit).is_dir() else None
        is_commit = bool(_COMMIT.fullmatch(self.revision))
        return self.revision if is_commit and self._snapshot(self.revision).is_dir() else None

    def _asked(self, commit: str | None) -> Revision:
        """Ask the hub for this revision; `commit` is the commit of an incomplete copy in the cache."""
        try:
            return ask(self.name, commit or self.revision)
        except ModelError as error:
            where = "is incomplete in the hub cache" if commit else "is neither a folder nor in the hub cache"
            raise ModelError(f"model {str(self)!r} {where}, {error}; {self._instead()}") from None

    def _downloaded(self, found: Revision, *, weights: bool) -> Path:
        from huggingface_hub import snapshot_download

        # Weights may be there in both formats.
        kinds = _WEIGHTS[:1] if any(file.endswith(".safetensors") for file in found.files) else _WEIGHTS
        wanted = [*_SMALL, *(kinds if weights else ())]
        try:
            snapshot_download(self.name, revision=found.commit, allow_patterns=wanted, cache_dir=_cache_folder())
        except Exception as error:  # the hub client raises many kinds
            reason = " ".join(str(error).split())[:300]
            raise ModelError(f"model {str(self)!r} cannot be downloaded: {reason}") from None
        self._remember(found.commit)
        missing = _missing(self._snapshot(found.commit), weights=weights)
        if missing and missing != _NO_TOKENIZER:
            raise ModelError(f"model {str(self)!r} on the hub has no {missing}: expected Hugging Face weights")
        return self._snapshot(found.commit)

    def _remember(self, commit: str) -> None:
        """Record the commit of the revision, as the hub client does for a branch that it resolved itself."""
        if self.revision != commit:
            reference = self._cache / "refs" / self.revision
            reference.parent.mkdir(parents=True, exist_ok=True)
            reference.write_text(commit, encoding="utf-8")

    def _instead(self) -> str:
        """Advice on what to use instead: the embedded model, or similar names in the hub cache."""
        near = _near(self.name, cached_names())
        listed = f"; in the hub cache: {', '.join(near)}" if near else ""
        meant = did_you_mean(self.name, [embedded.NAME]).removeprefix(": ")
        return f"{meant} " * bool(meant) + f"{embedded.NAME!r} (embedded) and folders need no network{listed}"

    @property
    def _cache(self) -> Path:
        return _cache_folder() / f"models--{self.name.replace('/', '--')}"

    def _snapshot(self, commit: str) -> Path:
        return self._cache / "snapshots" / commit

    def __str__(self) -> str:
        return self.name if self.is_default else f"{self.name}@{self.revision}"


_NO_TOKENIZER = "tokenizer"


def _missing(folder: Path, *, weights: bool) -> str | None:
    """The part that a snapshot lacks to be loaded; `None` if it is complete."""
    found = [name for name in _CONFIGS if (folder / name).is_file()]
    if not found:
        return _CONFIGS[0]
    if weights and not _has_weights(folder):
        return "weights"
    has_tokenizer = found == ["adapter_config.json"] or any((folder / name).is_file() for name in _TOKENIZERS)
    return None if has_tokenizer else _NO_TOKENIZER


def _has_weights(folder: Path) -> bool:
    if any((folder / name).is_file() for name in _WHOLE):
        return True
    indexes = [folder / name for name in _INDEXES if (folder / name).is_file()]
    return any(all((folder / shard).is_file() for shard in _shards(index)) for index in indexes)


def _shards(index: Path) -> set[str]:
    """The files that an index of weights names."""
    try:
        content: Any = json.loads(index.read_text(encoding="utf-8"))
        return set(content["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {index.name + " is damaged"}


def cached_names() -> list[str]:
    """The names of the models in the hub cache, sorted."""
    folders = _cache_folder().glob("models--*/snapshots")
    return sorted(folder.parent.name.removeprefix("models--").replace("--", "/") for folder in folders)


def _near(name: str, names: list[str]) -> list[str]:
    """At most three names that resemble `name`, with or without the organisation."""
    keys: list[Callable[[str], str]] = [str.lower, lambda each: each.lower().rpartition("/")[2]]
    found: list[str] = []
    for key in keys:
        by_key = {key(each): each for each in names}
        found += [by_key[match] for match in get_close_matches(key(name), by_key, n=3, cutoff=0.5)]
    return list(dict.fromkeys(found))[:3]


def _cache_folder() -> Path:
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE).expanduser()
