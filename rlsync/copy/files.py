"""Tensors over the bytes of safetensors files: mapped for reading, written in place by one rank per file."""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType

import torch

from rlsync.copy.writes import DirectWrites, Writes
from rlsync.errors import CheckpointError, first_few
from rlsync.layout.geometry import TensorSpec
from rlsync.layout.safetensors import CHECKSUMS, INDEX_NAME, SINGLE_NAME, StoredTensor, encode_header
from rlsync.plan.buckets import grouped


class MappedTensors(Mapping[str, torch.Tensor]):
    """Tensors over mapped files, opened on first use. Only the pages that a copy touches are read.

    They are for reading, unless ``writable``: what is then written to them is written to the files.
    """

    def __init__(self, stored: Mapping[str, StoredTensor], *, writable: bool = False) -> None:
        self._stored, self._writable = stored, writable
        self._maps: dict[Path, mmap.mmap] = {}

    def __getitem__(self, name: str) -> torch.Tensor:
        entry = self._stored[name]
        dtype = getattr(torch, entry.spec.dtype)
        if entry.spec.size == 0:
            return torch.empty(entry.spec.shape, dtype=dtype)
        return torch.frombuffer(
            self._map(entry.file), dtype=dtype, count=entry.spec.size, offset=entry.begin
        ).view(entry.spec.shape)  # fmt: skip

    def open(self) -> None:
        """Map every file now, so that what cannot be opened is found before anything is copied."""
        for entry in self._stored.values():
            self._map(entry.file)

    def _map(self, file: Path) -> mmap.mmap:
        if file not in self._maps:
            with file.open("r+b" if self._writable else "rb") as stream:
                # Where it is private it is writable as well: torch wants writable memory, and nothing reaches the file.
                flags = mmap.MAP_SHARED if self._writable else mmap.MAP_PRIVATE
                self._maps[file] = mmap.mmap(stream.fileno(), 0, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        return self._maps[file]

    def let_pages_go(self) -> None:
        """Give memory back that the mapped pages take; the disk has what was written to them when this returns."""
        for mapped in self._maps.values():
            if self._writable:
                mapped.flush()
            mapped.madvise(mmap.MADV_DONTNEED)

    def raw(self, name: str) -> torch.Tensor:
        """The bytes of a tensor, 1-D uint8."""
        return self[name].reshape(-1).view(torch.uint8)

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)


class FileWriter:
    """Writes one safetensors file tensor by tensor, in any order, under a temporary name until it is complete.

    ``writes`` takes the bytes; by default at once, and not durably.
    """

    def __init__(self, path: Path, tensors: Sequence[TensorSpec], writes: Writes | None = None) -> None:
        self._path, self._partial = path, path.with_name(path.name + ".partial")
        self._writes = DirectWrites(durable=False) if writes is None else writes
        header, self._begins = encode_header(tensors)
        self._missing = {t.name for t in tensors}
        self._partial.write_bytes(b"")
        try:
            self._writes.put(self._partial, 0, torch.frombuffer(bytearray(header), dtype=torch.uint8))
        except BaseException:
            self._remove()
            raise

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write a whole contiguous tensor of any device at its place."""
        assert tensor.is_contiguous(), name
        self._missing.remove(name)
        self._writes.put(self._partial, self._begins[name], tensor.reshape(-1).view(torch.uint8))

    def __enter__(self) -> FileWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None) -> None:
        if kind is not None:
            self._remove()
            return
        assert not self._missing, f"{self._path}: {sorted(self._missing)[:5]} were never written"
        try:
            self._writes.close(self._partial, self._path)
        except BaseException:
            self._remove()
            raise

    def _remove(self) -> None:
        self._writes.discard(self._partial)
        self._partial.unlink(missing_ok=True)


def shard_files(tensors: Sequence[TensorSpec], max_shard_bytes: int) -> dict[str, tuple[TensorSpec, ...]]:
    """File name -> tensors of a checkpoint cut into files of at most ``max_shard_bytes`` or one tensor (HF's naming)."""
    groups = grouped(tensors, {t.name: {"file": t.nbytes} for t in tensors}, {"file": max_shard_bytes})
    if len(groups) == 1:
        return {SINGLE_NAME: groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups, 1)}


def prepare_folder(folder: Path) -> None:
    """Make a folder ready for new weights: an index, sums or a shard of older ones that stayed behind would be read beside them.

    Removes what rlsync and transformers write. Raises CheckpointError, before anything is removed, for weights under other names, which
    vLLM would load as well, and for what cannot be written to or replaced.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        older = [folder / INDEX_NAME, folder / CHECKSUMS, *folder.glob("model*.safetensors"), *folder.glob("model*.safetensors.partial")]
        foreign = sorted(path.name for path in folder.glob("*.safetensors") if path not in older)
        if foreign:
            raise CheckpointError(f"{folder}: vLLM would load {first_few(foreign)} there too; choose another folder, or remove them")
        for path in older:
            if path.is_dir() and not path.is_symlink():
                raise CheckpointError(f"{path}: is a folder, and a file is to be written there; choose another folder, or remove it")
        for path in older:
            path.unlink(missing_ok=True)
    except OSError as error:
        raise CheckpointError(f"{error.filename or folder}: cannot be written ({error.strerror}); choose a folder that can") from None


def write_small_file(path: Path, content: bytes, *, durable: bool = False) -> None:
    """Write a file; with ``durable`` the disk has its content on return."""
    with path.open("wb") as stream:
        stream.write(content)
        stream.flush()
        if durable:
            os.fsync(stream.fileno())


def write_index(folder: Path, files: Mapping[str, Sequence[TensorSpec]], *, durable: bool = False) -> None:
    """Write the index of a checkpoint of several files; a single file has none. ``durable`` as for :func:`write_small_file`."""
    if len(files) == 1:
        return
    index = {
        "metadata": {"total_size": sum(t.nbytes for group in files.values() for t in group)},
        "weight_map": {t.name: file for file, group in files.items() for t in group},
    }
    write_small_file(folder / INDEX_NAME, (json.dumps(index, indent=2) + "\n").encode(), durable=durable)
