"""What is wrong with the files of a checkpoint: damaged, incomplete, or pointers to files that were not fetched.

Libraries that load checkpoints often tell neither the file nor the reason, and ignore a generation config that they
cannot read, with the stop tokens in it.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from tlcapture.text import first_line

_GIT_LFS = b"version https://git-lfs.github.com/spec/"
_JSON = ("config.json", "tokenizer_config.json", "tokenizer.json", "adapter_config.json", "generation_config.json")
_STOPS = "eos_token_id"
PLAIN_TYPES = {"torch.float64": "F64", "torch.float32": "F32", "torch.float16": "F16", "torch.bfloat16": "BF16"}
_LARGEST_HEADER = 100_000_000  # bytes; what safetensors takes


def damage(folder: Path) -> str | None:
    """The first file of a checkpoint's folder that is damaged, and how, in one line; `None` if none is known to be."""
    return next(filter(None, _damages(folder)), None)


def generation_config_fault(folder: Path) -> str | None:
    """Why stop tokens cannot be taken from a folder's generation config; `None` if they can or there is none."""
    path = folder / "generation_config.json"
    content, fault = _json(path) if path.exists() else ({}, None)
    if fault is not None:
        return fault
    stops = content.get(_STOPS)
    if stops is not None and not all(_is_id(each) for each in (stops if isinstance(stops, list) else [stops])):
        return f"{path}: {_STOPS} is {json.dumps(stops)}: expected the id of a token, or a list of ids"
    return None


def _damages(folder: Path) -> Iterator[str | None]:
    """What is wrong with one file after another; `None` for those that seem sound."""
    for name in _JSON:
        if (folder / name).exists():
            yield _json(folder / name)[1]
    for path in sorted([*folder.glob("*.jinja"), *folder.glob("additional_chat_templates/*.jinja")]):
        yield _text_fault(path)
    yield _names_of_templates_fault(folder / "tokenizer_config.json")
    for index in sorted(folder.glob("*.index.json")):
        yield from _missing_shards(index)
    yield from map(_safetensors_fault, sorted(folder.glob("*.safetensors")))
    yield from map(_bin_fault, sorted(folder.glob("*.bin")))


def stored_types(folder: Path) -> dict[str, str]:
    """The type of each weight in the files that transformers loads from a folder, as safetensors calls it.

    Files that cannot be read are left out: loading names them.
    """
    found: dict[str, str] = {}
    for path in sorted(folder.glob("model*.safetensors")):
        header = _header(path) or {}
        found |= {name: str(entry["dtype"]) for name, entry in header.items() if name != "__metadata__"}
    for path in [] if found else sorted(folder.glob("pytorch_model*.bin")):
        with suppress(OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError):
            weights = _weights(path)
            found |= {name: PLAIN_TYPES.get(str(each.dtype), str(each.dtype)) for name, each in weights.items()}
    return found


def weights_of(path: Path) -> Iterator[tuple[str, Any]]:
    """The names and weights in a file of a checkpoint, one after another; none where it cannot be read."""
    from safetensors import SafetensorError, safe_open

    with suppress(OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError, SafetensorError):
        if path.suffix == ".bin":
            yield from _weights(path).items()
            return
        with safe_open(path, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118  not a mapping
                yield name, opened.get_tensor(name)


def _weights(path: Path) -> Mapping[str, Any]:
    """The weights in a file of `torch.save`, mapped, where they are in the current format."""
    import torch

    with path.open("rb") as file:
        is_archive = file.read(2) == b"PK"
    content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_archive)
    if not isinstance(content, dict) or not all(isinstance(each, torch.Tensor) for each in content.values()):
        raise ValueError("expected weights by name")
    return content


def _bin_fault(path: Path) -> str | None:
    if fault := _pointer(path, _start(path)):
        return fault
    try:
        _weights(path)
    except pickle.UnpicklingError as error:
        if "Unsupported" in str(error) or "GLOBAL" in str(error):
            return f"{path}: it holds more than tensors, and is not opened for safety: use weights in safetensors"
    except ValueError as error:
        return f"{path}: not a file of weights: {first_line(error)}"
    except (OSError, RuntimeError, EOFError, KeyError, IndexError):
        pass
    else:
        return None
    return f"{path}: damaged or cut off ({path.stat().st_size} bytes): fetch it again"


def _json(path: Path) -> tuple[dict[str, Any], str | None]:
    """The object in a JSON file, and what is wrong with it."""
    start = _start(path)
    if fault := _pointer(path, start):
        return {}, fault
    try:
        content = json.loads(path.read_bytes().decode("utf-8"))
    except OSError as error:
        return {}, f"{path}: cannot be read: {error.strerror}"
    except UnicodeDecodeError:
        return {}, f"{path}: not UTF-8"
    except (ValueError, RecursionError) as error:
        return {}, f"{path}: not valid JSON: {error}"
    return (content, None) if isinstance(content, dict) else ({}, f"{path}: expected a JSON object")


def processor_template(folder: Path) -> str | None:
    """The chat template in a folder's `chat_template.json`, which only processors read; `None` without one."""
    path = folder / "chat_template.json"
    found = _json(path)[0].get("chat_template") if path.is_file() else None
    return found if isinstance(found, str) else None


def _text_fault(path: Path) -> str | None:
    try:
        path.read_bytes().decode("utf-8")
    except OSError as error:
        return f"{path}: cannot be read: {error.strerror}"
    except UnicodeDecodeError:
        return f"{path}: not UTF-8"
    return None


def _names_of_templates_fault(path: Path) -> str | None:
    templates = _json(path)[0].get("chat_template") if path.is_file() else None
    if not isinstance(templates, list) or all(
        isinstance(each, dict) and {"name", "template"} <= {*each} for each in templates
    ):
        return None
    return f'{path}: chat_template: expected a text, or a list of {{"name", "template"}}'


def _missing_shards(index: Path) -> Iterator[str]:
    content, fault = _json(index)
    names = content.get("weight_map")
    if fault or not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        yield fault or f"{index}: expected weight_map, the file of each weight"
        return
    for name in sorted(set(names.values())):
        if not (index.parent / name).is_file():
            yield f"{index.parent / name}: missing, but {index.name} names it"


def _safetensors_fault(path: Path) -> str | None:
    start = _start(path)
    if fault := _pointer(path, start):
        return fault
    try:
        size = path.stat().st_size
    except OSError as error:
        return f"{path}: cannot be read: {error.strerror}"
    length = int.from_bytes(start[:8], "little")
    if len(start) < 8 or length > _LARGEST_HEADER or 8 + length > size:
        return f"{path}: not a safetensors file, or cut off ({size} bytes)"
    header = _header(path)
    if header is None:
        return f"{path}: its header is damaged"
    end = max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
    return f"{path}: cut off: {size} bytes, expected {8 + length + end}" if size < 8 + length + end else None


def _header(path: Path) -> dict[str, Any] | None:
    """The header of a safetensors file; `None` for a damaged one."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(min(length, _LARGEST_HEADER)))
        entries = [entry for name, entry in header.items() if name != "__metadata__"]
        is_sound = all(isinstance(entry["data_offsets"][1], int) and entry["dtype"] for entry in entries)
        return dict(header) if is_sound else None
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None


def pointer_fault(path: Path) -> str | None:
    """What is wrong with a file that is a pointer of Git LFS; `None` for any other."""
    return _pointer(path, _start(path))


def _pointer(path: Path, start: bytes) -> str | None:
    is_pointer = start.startswith(_GIT_LFS)
    return f"{path}: a pointer of Git LFS, not the file itself: fetch it with git lfs pull" if is_pointer else None


def _start(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(len(_GIT_LFS))
    except OSError:
        return b""


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
