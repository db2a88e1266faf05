"""What a conversion writes: files of their final size with everything in them but the elements of tensors, and where those belong.

Owns the form of each file. Copies nothing; ``conversion`` does.
"""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from rlsync.bridge.adapter_folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS, adapter_config
from rlsync.bridge.checkpoint_folder import TRACKER, rank_writers, shards_folder, write_durably
from rlsync.bridge.model_folder import CONFIG_NAME, copy_files, travelling_files, with_dtype
from rlsync.convert.loading import restricted_to
from rlsync.convert.sources import Source
from rlsync.convert.torch_dist import COMMON, CONFIG, CONFIG_CONTENT, METADATA, WRITTEN_FORM, placed_keys
from rlsync.copy.files import shard_files, write_index, write_small_file
from rlsync.errors import CheckpointError
from rlsync.layout.geometry import DTYPE_BYTES, BufferSpec, Placement, TensorSpec, whole_tensors
from rlsync.layout.safetensors import StoredTensor, encode_header
from rlsync.layout.topology import Topology
from rlsync.layout.torch_files import read_torch_file, write_checksums
from rlsync.models import Flavour
from rlsync.models.lora import PREFIX
from rlsync.models.placement import megatron_placement
from rlsync.models.shards import CHECKPOINT_VERSION, RANK_STATE_FILE, chunk_keys, local_names, weights_only_state
from rlsync.models.stored import FileTensor, file_placement
from rlsync.plan.buckets import grouped

# Of the tensors in a file with several archives.
_ALIGNMENT = 64


class Target(Protocol):
    """A file that a conversion writes.

    Attributes:
        path: in the folder that is written.
        placement: what it holds of the model.
    """

    @property
    def path(self) -> str: ...
    @property
    def placement(self) -> Placement: ...
    def create(self, file: Path) -> None:
        """Write everything but the elements of tensors, whose bytes are zero."""

    def stored(self, file: Path) -> Mapping[str, StoredTensor]:
        """Where the buffers of ``placement`` lie in a file that was created."""

    def seal(self, file: Path) -> None:
        """Write what depends on the elements, when all are there."""


def copied_bytes(target: Target) -> int:
    """Bytes of the elements of a file that come from the source; all others are padding."""
    item_bytes = {buffer.name: DTYPE_BYTES[buffer.dtype] for buffer in target.placement.buffers}
    return sum(piece.box.size * item_bytes[piece.buffer] for piece in target.placement.pieces)


@dataclass(frozen=True, slots=True)
class SafetensorsFile:
    """One file of a Hugging Face checkpoint."""

    path: str
    placement: Placement
    tensors: tuple[TensorSpec, ...]

    def create(self, file: Path) -> None:
        header, _ = encode_header(self.tensors)
        with file.open("wb") as stream:
            stream.write(header)
            stream.truncate(len(header) + sum(t.nbytes for t in self.tensors))

    def stored(self, file: Path) -> Mapping[str, StoredTensor]:
        _, begins = encode_header(self.tensors)
        return {t.name: StoredTensor(t, file, begins[t.name], begins[t.name] + t.nbytes) for t in self.tensors}

    def seal(self, file: Path) -> None:
        """Nothing: the format has no checksums."""


@dataclass(frozen=True, slots=True)
class RankFile:
    """``model_optim_rng.pt`` of one rank of a Megatron run, with weights alone.

    Attributes:
        chunks: for each virtual chunk the names in it, and the buffer of ``placement`` that each is.
        padded_vocab: rows of the vocabulary over all tensor ranks.
        scaling: of the adapters that the file holds; None for weights.
    """

    path: str
    placement: Placement
    topology: Topology
    step: int
    chunks: tuple[tuple[tuple[str, str], ...], ...]
    padded_vocab: int
    scaling: float | None = None

    def create(self, file: Path) -> None:
        # Never touched, and skipped where they are written: they take no memory.
        empty = {b.name: torch.empty(b.shape, dtype=getattr(torch, b.dtype)) for b in self.placement.buffers}
        keys = chunk_keys(self.topology.vpp_size)
        chunks = {key: {name: empty[buffer] for name, buffer in chunk} for key, chunk in zip(keys, self.chunks, strict=True)}
        with torch.serialization.skip_data():
            torch.save(weights_only_state(asdict(self.topology), self.step, self.padded_vocab, chunks, scaling=self.scaling), file)

    def stored(self, file: Path) -> Mapping[str, StoredTensor]:
        content = read_torch_file(file)
        keys = chunk_keys(self.topology.vpp_size)
        return {buffer: content[key][name].stored(buffer) for key, chunk in zip(keys, self.chunks, strict=True) for name, buffer in chunk}

    def seal(self, file: Path) -> None:
        write_checksums(file)


@dataclass(frozen=True, slots=True)
class HfFolder:
    """A Hugging Face checkpoint of a source."""

    source: Source
    dtype: str
    max_shard_bytes: int

    def targets(self) -> tuple[Target, ...]:
        files = self._files()
        return tuple(
            SafetensorsFile(name, file_placement(name, [files[spec.name] for spec in group]), group)
            for name, group in self._cut(files).items()
        )

    def _files(self) -> dict[str, FileTensor]:
        """Tensors of the files by name: the model's in ``dtype``, then those that are kept as they are."""
        source = self.source
        files = list(source.stored_form.file_tensors(source.model, source.model.tensors(self.dtype)))
        kept = [entry.spec for entry in source.kept.values()]
        pieces = whole_tensors("", kept).pieces
        return {file.spec.name: file for file in (*files, *(FileTensor(spec, (piece,)) for spec, piece in zip(kept, pieces, strict=True)))}

    def _cut(self, files: Mapping[str, FileTensor]) -> dict[str, tuple[TensorSpec, ...]]:
        return shard_files([file.spec for file in files.values()], self.max_shard_bytes)

    def finish(self, folder: Path) -> None:
        """Write what a folder has beside its weights, as the last of all. Durable."""
        _write_model_files(self.source, folder, self.dtype)
        write_index(folder, self._cut(self._files()), durable=True)


@dataclass(frozen=True, slots=True)
class AdapterFolder:
    """The adapters of a source as PEFT and vLLM read them, in one file with a tensor for each factor."""

    source: Source
    dtype: str

    def targets(self) -> tuple[Target, ...]:
        tensors = tuple(replace(t, name=f"{PREFIX}{t.name}", dtype=self.dtype) for t in self.source.tensors())
        whole = whole_tensors(ADAPTER_WEIGHTS, tensors)
        pieces = tuple(replace(piece, tensor=piece.tensor.removeprefix(PREFIX)) for piece in whole.pieces)
        return (SafetensorsFile(ADAPTER_WEIGHTS, replace(whole, pieces=pieces), tensors),)

    def finish(self, folder: Path) -> None:
        """As of :class:`HfFolder`."""
        _write_adapter_config(self.source, folder)


@dataclass(frozen=True, slots=True)
class MegatronFolder:
    """An ``actor`` folder with the shards of a source under a layout: ``iter_XXXXXXX`` and its tracker. Beside those of adapters lies
    their configuration, which says what they are of.

    Attributes:
        flavour: the spec that names the parameters.
        make_vocab_size_divisible_by: the vocabulary is padded to a multiple of this times TP.
    """

    source: Source
    dtype: str
    topology: Topology
    flavour: Flavour
    make_vocab_size_divisible_by: int

    def targets(self) -> tuple[Target, ...]:
        model, topology, adapters = self.source.model, self.topology, self.source.adapters
        scaling = None if adapters is None else adapters.spec.scaling
        padded = model.padded_vocab(topology.tp_size, self.make_vocab_size_divisible_by)
        shards = shards_folder(Path(), self.source.step)
        made: list[Target] = []
        for folder, rank in rank_writers(topology).items():
            path = (shards / folder / RANK_STATE_FILE).as_posix()
            placement = megatron_placement(
                model,
                topology,
                rank,
                flavour=self.flavour,
                dtype=self.dtype,
                make_vocab_size_divisible_by=self.make_vocab_size_divisible_by,
                adapters=adapters,
            )
            chunks: list[list[tuple[str, str]]] = [[] for _ in range(topology.vpp_size)]
            for name in local_names(model, topology, rank, adapters):
                chunks[name.chunk].append((name.te if self.flavour == "te" else name.local, name.bound.name(self.flavour)))
            made.append(RankFile(path, placement, topology, self.source.step, tuple(map(tuple, chunks)), padded, scaling))
        return tuple(made)

    def finish(self, folder: Path) -> None:
        """As of :class:`HfFolder`; the tracker, which makes it complete, comes last."""
        _write_model_files(self.source, folder, self.dtype)
        if self.source.adapters is not None:
            _write_adapter_config(self.source, folder)
        write_durably(folder / TRACKER, str(self.source.step))


@dataclass(frozen=True, slots=True)
class DistributedFile:
    """One ``.distcp`` file of Megatron's ``torch_dist``: what torch.save writes of each tensor, one after the other."""

    path: str
    placement: Placement

    def places(self) -> Iterator[tuple[BufferSpec, int, int]]:
        """Of each buffer where in the file its archive begins and ends."""
        end = 0
        for buffer in self.placement.buffers:
            head, tail = _around_elements(buffer.shape, buffer.dtype)
            begin = -(-end // _ALIGNMENT) * _ALIGNMENT
            end = begin + len(head) + buffer.size * DTYPE_BYTES[buffer.dtype] + len(tail)
            yield buffer, begin, end

    def create(self, file: Path) -> None:
        with file.open("wb") as stream:
            for buffer, begin, end in self.places():
                head, tail = _around_elements(buffer.shape, buffer.dtype)
                for at, content in ((begin, head), (end - len(tail), tail)):
                    stream.seek(at)
                    stream.write(content)

    def stored(self, file: Path) -> Mapping[str, StoredTensor]:
        found = {}
        for buffer, begin, end in self.places():
            head, tail = _around_elements(buffer.shape, buffer.dtype)
            spec = TensorSpec(buffer.name, buffer.dtype, buffer.shape)
            found[buffer.name] = StoredTensor(spec, file, begin + len(head), end - len(tail))
        return found

    def seal(self, file: Path) -> None:
        for _, begin, end in self.places():
            write_checksums(file, begin=begin, end=end)


@cache
def _around_elements(shape: tuple[int, ...], dtype: str) -> tuple[bytes, bytes]:
    """What torch.save writes before and behind the elements of a tensor, their checksums zero."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "archive.pt"
        with torch.serialization.skip_data():
            torch.save(torch.empty(shape, dtype=getattr(torch, dtype)), path)
        stored = read_torch_file(path).stored("")
        with path.open("rb") as stream:
            head = stream.read(stored.begin)
            stream.seek(stored.end)
            return head, stream.read()


@dataclass(frozen=True, slots=True)
class DistributedFolder:
    """A folder of Megatron's ``torch_dist``, which has whole tensors and is loaded under any layout.

    Attributes:
        flavour: the spec of the layers that will load it, which decides the keys of some norms.
    """

    source: Source
    dtype: str
    flavour: Flavour
    make_vocab_size_divisible_by: int
    max_shard_bytes: int

    def targets(self) -> tuple[DistributedFile, ...]:
        padded = self.source.model.padded_vocab(1, self.make_vocab_size_divisible_by)
        whole = placed_keys(self.source.model, self.flavour, self.dtype, padded)
        specs = [TensorSpec(b.name, b.dtype, b.shape) for b in whole.buffers]
        groups = grouped(specs, {spec.name: {"file": spec.nbytes} for spec in specs}, {"file": self.max_shard_bytes})
        folder = shards_folder(Path(), self.source.step)
        names = {spec.name: (folder / f"__{number}_0.distcp").as_posix() for number, group in enumerate(groups) for spec in group}
        return tuple(
            DistributedFile(path, replace(restricted_to(whole, {name for name in names if names[name] == path}), holder=path))
            for path in dict.fromkeys(names.values())
        )

    def finish(self, folder: Path) -> None:
        """As of :class:`MegatronFolder`; ``metadata.json`` makes the shards complete."""
        _write_model_files(self.source, folder, self.dtype)
        shards = shards_folder(folder, self.source.step)
        write_small_file(shards / METADATA, pickle.dumps(self._metadata()), durable=True)
        common = {"iteration": self.source.step, "checkpoint_version": CHECKPOINT_VERSION, "content_metadata": WRITTEN_FORM}
        with (shards / COMMON).open("wb") as stream:
            torch.save(common, stream)
            stream.flush()
            os.fsync(stream.fileno())
        write_durably(shards / CONFIG, json.dumps(CONFIG_CONTENT))
        write_durably(folder / TRACKER, str(self.source.step))

    def _metadata(self) -> Metadata:
        """Which key has which tensor, and where it is, as torch's distributed checkpoints say it."""
        tensors: dict[str, Any] = {}
        places: dict[MetadataIndex, _StorageInfo] = {}
        for file in self.targets():
            for buffer, begin, end in file.places():
                first, size = torch.Size([0] * len(buffer.shape)), torch.Size(buffer.shape)
                properties = TensorProperties(dtype=getattr(torch, buffer.dtype))
                tensors[buffer.name] = TensorStorageMetadata(properties, size, [ChunkStorageMetadata(first, size)])
                places[MetadataIndex(buffer.name, first, 0)] = _StorageInfo(Path(file.path).name, begin, end - begin)
        return Metadata(tensors, {name: (name,) for name in tensors}, places)


Output = HfFolder | AdapterFolder | MegatronFolder | DistributedFolder


def _write_model_files(source: Source, folder: Path, dtype: str) -> None:
    copy_files(source.model_folder, travelling_files(source.model_folder, but=folder), folder, durable=True)
    # The dtype of adapters is not the model's.
    text = source.config_text if source.adapters is not None else with_dtype(source.config_text, dtype)
    write_small_file(folder / CONFIG_NAME, text.encode("utf-8"), durable=True)


def _write_adapter_config(source: Source, folder: Path) -> None:
    assert source.adapters is not None, "only of adapters"
    content = adapter_config(source.adapters, source.base_name or str(source.model_folder.resolve()))
    write_small_file(folder / ADAPTER_CONFIG, (json.dumps(content, indent=2) + "\n").encode(), durable=True)


def reserve(file: Path) -> None:
    """Have the disk keep room for all of a file, so that no write into it can fail for want of it. Durable.

    Raises CheckpointError where there is none.
    """
    try:
        descriptor = os.open(file, os.O_RDWR)
        try:
            os.posix_fallocate(descriptor, 0, os.fstat(descriptor).st_size)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise CheckpointError(
            f"{file}: no room for its {file.stat().st_size} bytes ({error.strerror}); free some and start again"
        ) from None
