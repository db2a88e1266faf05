"""Placement of a safetensors checkpoint, read from file headers alone. Knows bytes and names; opens no tensor."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rlsync.errors import CheckpointError
from rlsync.layout.geometry import TensorSpec

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


def read_checkpoint(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of the safetensors checkpoint in ``folder`` by name.

    Reads headers only and checks them against file sizes and the index. Raises CheckpointError naming file and tensor.
    """
    folder = Path(folder)
    index = folder / INDEX_NAME
    if index.exists():
        weight_map = _read_index(index)
        files = [folder / name for name in sorted(set(weight_map.values()))]
    else:
        weight_map, files = {}, sorted(folder.glob("*.safetensors"))
        if len(files) > 1 and (folder / "model.safetensors") in files:
            files = [folder / "model.safetensors"]
    if not files:
        raise CheckpointError(f"{folder}: no *.safetensors file and no {INDEX_NAME}; rlsync loads safetensors checkpoints only")
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        for stored in _read_header(file):
            if stored.spec.name in tensors:
                raise CheckpointError(f"{stored.spec.name} is stored in {tensors[stored.spec.name].file.name} and in {file.name}")
            tensors[stored.spec.name] = stored
    absent = sorted(name for name in weight_map if name not in tensors)
    if absent:
        raise CheckpointError(f"{index}: lists {len(absent)} tensors that no file holds: {', '.join(absent[:20])}")
    return tensors


def _read_index(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise CheckpointError(f"{index}: unreadable index ({type(error).__name__}: {error})") from None
    assert isinstance(weight_map, dict), index
    return weight_map


def _read_header(file: Path) -> list[StoredTensor]:
    try:
        size = os.path.getsize(file)
        with file.open("rb") as stream:
            header_bytes = int.from_bytes(stream.read(8), "little")
            if size < 8 or header_bytes > min(_MAX_HEADER_BYTES, size - 8):
                raise CheckpointError(f"{file}: truncated safetensors file: {size} bytes, header of {header_bytes} bytes announced")
            header = json.loads(stream.read(header_bytes))
    except FileNotFoundError:
        raise CheckpointError(f"{file}: file is missing, though {INDEX_NAME} lists it") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{file}: unreadable safetensors header: {error}") from None
    header.pop("__metadata__", None)
    stored = []
    for name, entry in header.items():
        if entry["dtype"] not in _DTYPES:
            raise CheckpointError(f"{file}: {name} has dtype {entry['dtype']}, which rlsync does not know")
        begin, end = (8 + header_bytes + offset for offset in entry["data_offsets"])
        spec = TensorSpec(name, _DTYPES[entry["dtype"]], tuple(entry["shape"]))
        if end > size:
            raise CheckpointError(f"{file}: truncated safetensors file: {name} ends at byte {end}, the file has {size}")
        if end - begin != spec.nbytes:
            raise CheckpointError(f"{file}: {name} {spec.shape} {spec.dtype} needs {spec.nbytes} bytes, its header gives {end - begin}")
        stored.append(StoredTensor(spec, file, begin, end))
    return stored


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
