"""Placement of a safetensors checkpoint, read from file headers alone. Knows bytes and names; opens no tensor."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlsync.errors import CheckpointError, first_few
from rlsync.layout.geometry import Placement, TensorSpec

# Beside weights that a run has saved, in any form: CRC-32 of what was written to their files.
CHECKSUMS = "checksums.json"
SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
_DTYPES = {
    "F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
}  # fmt: skip
_NAMES = {torch_name: name for name, torch_name in _DTYPES.items()}
# A header larger than this is not a header (the safetensors format allows 100 MB).
_MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a checkpoint and where its bytes lie: ``[begin, end)`` of ``file``."""

    spec: TensorSpec
    file: Path
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class Holding:
    """What one holder has of a model, and where in files: ``stored`` by buffer of the placement."""

    placement: Placement
    stored: Mapping[str, StoredTensor]


def read_checkpoint(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of the safetensors checkpoint in ``folder`` by name.

    Reads headers only and checks them against file sizes and the index. Raises CheckpointError naming file and tensor; also where
    transformers and vLLM would load different files of the folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder; give a Hugging Face folder with safetensors files")
    weight_map, files = _weight_files(folder)
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        for stored in _read_header(file):
            if stored.spec.name in tensors:
                raise CheckpointError(f"{stored.spec.name} is stored in {tensors[stored.spec.name].file.name} and in {file.name}")
            tensors[stored.spec.name] = stored
    absent = sorted(name for name in weight_map if name not in tensors)
    if absent:
        raise CheckpointError(f"{folder / INDEX_NAME}: lists {len(absent)} tensors that no file holds: {first_few(absent)}")
    return tensors


def _weight_files(folder: Path) -> tuple[dict[str, str], list[Path]]:
    """The index (empty without one) and the files to read.

    transformers loads model.safetensors, and the index only where that is not there. vLLM loads the files of the index, and every file
    where there is none. A folder in which that makes a difference is refused. Mistral's consolidated files have other tensor names.
    """
    index, single = folder / INDEX_NAME, folder / SINGLE_NAME
    found = sorted(path for path in folder.glob("*.safetensors") if not path.name.startswith("consolidated"))
    weight_map = _read_index(index) if index.exists() else {}
    files = [folder / name for name in sorted(set(weight_map.values()))] if index.exists() else found
    if not files:
        raise CheckpointError(f"{folder}: no *.safetensors file and no {INDEX_NAME}; rlsync loads safetensors checkpoints only")
    if single.is_file() and files != [single]:
        others = [file.name for file in files if file != single]
        raise CheckpointError(
            f"{folder}: transformers loads {SINGLE_NAME} alone, vLLM {'the files of ' + INDEX_NAME if index.exists() else 'all files'}: "
            f"{first_few(others)}; keep one of the two"
        )
    return weight_map, files


def _read_index(index: Path) -> dict[str, str]:
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{index}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{index}: unreadable index ({error}); write or download it again") from None
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: unreadable index: no weight_map of tensors to files; write or download it again")
    for name, file in weight_map.items():
        # vLLM looks for weights in the folder itself only.
        if not isinstance(file, str) or file in ("", "..") or file != Path(file).name:
            raise CheckpointError(f"{index}: {name} is in {file!r}, which is not the name of a file in {index.parent}")
    return weight_map


def _read_header(file: Path) -> list[StoredTensor]:
    """Tensors of one file, in the order of their bytes. They fill it without gap or overlap, as the safetensors library demands."""
    try:
        size = os.path.getsize(file)
        with file.open("rb") as stream:
            header_bytes = int.from_bytes(stream.read(8), "little")
            if size < 8 or header_bytes > min(_MAX_HEADER_BYTES, size - 8):
                raise CheckpointError(f"{file}: truncated safetensors file: {size} bytes, header of {header_bytes} bytes announced")
            header = json.loads(stream.read(header_bytes).decode("utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{file}: file is missing, though {INDEX_NAME} lists it") from None
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: unreadable safetensors header: {error}") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{file}: unreadable safetensors header: a {type(header).__name__} instead of names and tensors")
    header.pop("__metadata__", None)
    entries = [_entry(file, name, entry) for name, entry in header.items()]
    data = size - 8 - header_bytes
    stored, cursor = [], 0
    for spec, begin, end in sorted(entries, key=lambda entry: (entry[1], entry[2])):
        if end > data:
            ends = 8 + header_bytes + end
            raise CheckpointError(f"{file}: truncated safetensors file: {spec.name} ends at byte {ends}, the file has {size}")
        if begin != cursor:
            raise CheckpointError(f"{file}: damaged safetensors header: {spec.name} begins at byte {begin} of the data, expected {cursor}")
        if end - begin != spec.nbytes:
            raise CheckpointError(f"{file}: {spec.name} {spec.shape} {spec.dtype} is {spec.nbytes} bytes, its header gives {end - begin}")
        stored.append(StoredTensor(spec, file, 8 + header_bytes + begin, 8 + header_bytes + end))
        cursor = end
    if cursor != data:
        raise CheckpointError(f"{file}: damaged safetensors file: its tensors are {cursor} bytes, its data {data}")
    return stored


def _entry(file: Path, name: str, entry: Any) -> tuple[TensorSpec, int, int]:
    """Spec, begin and end of one entry of a header; positions count from the end of the header."""
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    except (TypeError, KeyError, ValueError):
        raise CheckpointError(f"{file}: damaged safetensors header: {name} has no dtype, shape and data_offsets") from None
    if not all(type(number) is int and number >= 0 for number in (*shape, begin, end)):
        raise CheckpointError(f"{file}: damaged safetensors header: {name} has shape {list(shape)} and data_offsets {[begin, end]}")
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise CheckpointError(f"{file}: {name} has dtype {dtype}, which rlsync does not know")
    return TensorSpec(name, _DTYPES[dtype], shape), begin, end


def encode_header(tensors: Sequence[TensorSpec]) -> tuple[bytes, dict[str, int]]:
    """Header of a new file that holds ``tensors`` in this order, and the byte at which each begins."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    cursor, begins = 0, {}
    for tensor in tensors:
        entries[tensor.name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [cursor, cursor + tensor.nbytes],
        }
        begins[tensor.name] = cursor
        cursor += tensor.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    return header, {name: len(header) + begin for name, begin in begins.items()}
