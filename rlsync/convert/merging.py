"""Adapters that are merged on the way of a conversion: the base comes into memory in fp32, and the sum is rounded once into the file."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from rlsync.bridge.adapter_folder import ADAPTER_CONFIG, base_copies, other_base
from rlsync.convert.loading import LoadPlan, LoadPlanner, copy_all
from rlsync.convert.sources import Source, base_folder, open_source
from rlsync.copy.cpu import region
from rlsync.copy.files import MappedTensors
from rlsync.errors import ConfigError
from rlsync.layout.geometry import DTYPE_BYTES, BufferSpec, Piece, Placement, contiguous_strides, whole_tensors
from rlsync.models.lora import EMBEDDING_A, EMBEDDING_B, A, B, module_of
from rlsync.plan.planner import Bucket, Copy

_ROUNDED = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class FilePlan:
    """What goes into one file, bucket by bucket.

    Attributes:
        load: the copies into the file's tensors, and of bases into fp32 buffers beside it.
        sums: by tensor with an adapter the buffers of its base, and the piece of the file that each belongs to.
        item_bytes: by buffer of a copy, of an element in the file.
    """

    load: LoadPlan
    sums: Mapping[str, Sequence[tuple[str, Piece]]]
    item_bytes: Mapping[str, int]

    @property
    def buckets(self) -> tuple[Bucket, ...]:
        return self.load.plan.buckets

    def nbytes(self, number: int) -> int:
        """Of a bucket, in the file."""
        return sum(copy.size * self.item_bytes[copy.destination_buffer] for copy in self.buckets[number].copies)


class FilePlanner:
    """Plans how files are filled from one source, whose tables are made once for all of them."""

    def __init__(self, source: Source) -> None:
        merged = None if source.merged is None else source.merged.adapters
        self._adapted = frozenset[str]() if merged is None else merged.modules
        self._loads = LoadPlanner(source.tensors(), source.holdings)

    def plan(self, placement: Placement, *, bucket_bytes: int) -> FilePlan:
        """How a file with this placement is filled. Raises PlacementError where something is missing."""
        item_bytes = {buffer.name: DTYPE_BYTES[buffer.dtype] for buffer in placement.buffers}
        apart = [piece for piece in placement.pieces if module_of(piece.tensor) in self._adapted]
        sums: dict[str, list[tuple[str, Piece]]] = {}
        bases: list[tuple[BufferSpec, Piece]] = []
        for number, piece in enumerate(apart):
            spec = BufferSpec(f"base {number}", "float32", piece.box.shape)
            sums.setdefault(piece.tensor, []).append((spec.name, piece))
            bases.append((spec, Piece(piece.tensor, piece.box, spec.name, 0, contiguous_strides(spec.shape))))
            item_bytes[spec.name] = item_bytes[piece.buffer]
        left = {piece.buffer for piece in apart}
        buffers = [replace(b, has_gaps=b.has_gaps or b.name in left) for b in placement.buffers]
        moved = replace(
            placement,
            buffers=(*buffers, *(spec for spec, _ in bases)),
            pieces=(*(piece for piece in placement.pieces if piece.tensor not in sums), *(piece for _, piece in bases)),
        )
        return FilePlan(self._loads.plan(moved, bucket_bytes=bucket_bytes), sums, item_bytes)


class Factors:
    """The factors of a source of adapters, read one by one."""

    def __init__(self, source: Source) -> None:
        """Raises PlacementError where some are missing."""
        assert source.adapters is not None, "only of adapters"
        tensors = source.tensors()
        self._shapes = {tensor.name: tensor.shape for tensor in tensors}
        self._scaling = source.adapters.spec.scaling
        whole = whole_tensors("factors", (replace(tensor, dtype="float32") for tensor in tensors))
        load = LoadPlanner(tensors, source.holdings).plan(whole)
        self._copies: dict[str, list[Copy]] = {}
        for bucket in load.plan.buckets:
            for copy in bucket.copies:
                self._copies.setdefault(copy.tensor, []).append(copy)
        self._read: list[MappedTensors] = load.open()

    def add(self, base: torch.Tensor, piece: Piece) -> torch.Tensor:
        """``base``, the fp32 elements of a piece, and the adapter of its tensor there, as ``merged`` of live models has it."""
        module, (rows, columns) = module_of(piece.tensor), map(slice, piece.box.start, piece.box.stop)
        left, right = f"{module}{B}", f"{module}{A}"
        if left not in self._shapes:
            into, out = self._whole(f"{module}{EMBEDDING_A}"), self._whole(f"{module}{EMBEDDING_B}")
            return base.addmm_(into.t()[rows], out.t()[:, columns], alpha=self._scaling)
        return base.addmm_(self._whole(left)[rows], self._whole(right)[:, columns], alpha=self._scaling)

    def let_pages_go(self) -> None:
        for mapped in self._read:
            mapped.let_pages_go()

    def _whole(self, name: str) -> torch.Tensor:
        factor = torch.empty(self._shapes[name], dtype=torch.float32)
        copy_all(self._copies[name], self._read, {name: factor})
        return factor


def check_base(adapters: Source, base: Source) -> None:
    """Raise ConfigError where weights that lie beside adapters, in a folder of PEFT, are others than the base's."""
    assert adapters.adapters is not None, "only of adapters"
    saved = MappedTensors(base_copies(adapters.adapters, adapters.folder))
    for name, held in _weights(base, saved):
        check_base_copy(saved[name], held, name, adapters.folder)


def check_named_base(adapters: Source, base: Source) -> str | None:
    """A warning where adapters say that they are of another model than ``base``, which is not here to be compared; None otherwise.

    Raises ConfigError where the folder that they name is here, and the smallest weights that they change are others in it.
    """
    assert adapters.adapters is not None, "only of adapters"
    name, folders = adapters.base_name, (base.folder, base.model_folder)
    named = base_folder(name)
    if name is None or (named is not None and named.resolve() in {folder.resolve() for folder in folders}):
        return None
    if named is None or not any(named.glob("*.safetensors")):
        return other_base(name, *folders)
    adapted = [tensor for tensor in base.tensors() if module_of(tensor.name) in adapters.adapters.modules]
    least = min(math.prod(tensor.shape) for tensor in adapted)
    smallest = [tensor.name for tensor in adapted if math.prod(tensor.shape) == least]
    theirs = dict(_weights(open_source(named), {smallest[0], smallest[-1]}))
    for tensor, held in _weights(base, {smallest[0], smallest[-1]}):
        # In the coarsest of both dtypes: either may have been rounded.
        if tensor not in theirs or not any(torch.equal(held.to(dtype), theirs[tensor].to(dtype)) for dtype in _ROUNDED):
            raise ConfigError(
                f"{adapters.folder} says that it adapts {named}, where {tensor} is another than in {base.folder}: merge it into the model "
                f"that it was trained on, or, if this one is meant, name it as base_model_name_or_path in its {ADAPTER_CONFIG}"
            )
    return None


def _weights(source: Source, names: Collection[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """Those of these weights that a source has, whole and in fp32, one by one."""
    tensors = source.tensors()
    wanted = [replace(tensor, dtype="float32") for tensor in tensors if tensor.name in names]
    load = LoadPlanner(tensors, source.holdings).plan(whole_tensors("base", wanted))
    read = load.open()
    for tensor in wanted:
        held = torch.empty(tensor.shape, dtype=torch.float32)
        mine = (copy for bucket in load.plan.buckets for copy in bucket.copies if copy.tensor == tensor.name)
        copy_all(mine, read, {tensor.name: held})
        yield tensor.name, held


def check_base_copy(copy: torch.Tensor, held: torch.Tensor, name: str, folder: Path) -> None:
    """Raise ConfigError where a weight that lies beside adapters, or a part of it, is not the one that they are added to here. In the
    coarser of both dtypes: the base that PEFT has loaded may have been rounded."""
    if copy.shape != held.shape or not (torch.equal(copy.to(held.dtype), held) or torch.equal(held.to(copy.dtype), copy)):
        raise ConfigError(
            f"{folder} holds another {name} beside its adapters than the base they are added to: PEFT would put it into the base. Take "
            "the base that the adapters were trained on, or save them with save_embedding_layers=False if theirs is not wanted"
        )


def fill_bucket(plan: FilePlan, number: int, read: Sequence[MappedTensors], written: MappedTensors, factors: Factors | None) -> None:
    """Bring one bucket into its file; the pages of all files stay mapped."""
    bucket = plan.buckets[number]
    sums = [entry for tensor in bucket.tensors for entry in plan.sums.get(tensor.name, ())]
    bases = {name: torch.empty(piece.box.shape, dtype=torch.float32) for name, piece in sums}
    tensors = {name: written[name] for name in {copy.destination_buffer for copy in bucket.copies} - bases.keys()}
    copy_all(bucket.copies, read, {**tensors, **bases})
    for name, piece in sums:
        assert factors is not None, "sums are of adapters"
        region(written[piece.buffer], piece.offset, piece.box.shape, piece.strides).copy_(factors.add(bases.pop(name), piece))
