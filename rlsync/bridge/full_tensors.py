"""Full tensors of Hugging Face files out of the shards of all ranks: which ones this rank has anyway, which come by a plan, and which rank
writes them to which file.

Plans between placements, and what executes them. Knows neither live models nor ``AutoBridge``, who says which buffers are sources.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import torch
import torch.distributed as dist

from rlsync.copy.cpu import bind, region
from rlsync.copy.files import FileWriter, MappedTensors, shard_files
from rlsync.copy.writes import Writes
from rlsync.errors import CheckpointError
from rlsync.layout.geometry import Placement, TensorSpec, contiguous_strides, whole_tensors
from rlsync.layout.safetensors import StoredTensor
from rlsync.megatron.parallel import compute_device
from rlsync.models.stored import FileTensor, file_placement
from rlsync.plan.planner import Bucket, Copy, Plan, build_plan
from rlsync.transport.collectives import Exchange

# A saved model is cut into smaller files than this only where that is asked for.
LEAST_SHARD_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Export:
    """How this rank comes by full tensors: by copies from its own parameters where every rank holds all of them, else by a plan.

    ``files`` has for each tensor of the table that of the files it belongs to.
    """

    held: Mapping[str, Sequence[Copy]]
    plan: Plan
    files: Mapping[str, FileTensor]


@dataclass(frozen=True)
class Save:
    """Content of the weight files of a save: tensors in ``held`` are copies of this rank's own parameters, others come by ``plan``.

    Attributes:
        specs: by file, all tensors in it.
        files: by file, those that ranks have.
        kept: those that no rank has, in the folder of the bridge.
    """

    specs: Mapping[str, Sequence[TensorSpec]]
    files: Mapping[str, tuple[FileTensor, ...]]
    held: Mapping[str, Sequence[Copy]]
    kept: Mapping[str, StoredTensor]
    plan: Plan


def plan_export(tensors: Sequence[TensorSpec], placements: Sequence[Placement], files: Sequence[FileTensor], bucket_bytes: int) -> Export:
    """How this rank comes by all tensors of files. Not collective.

    Args:
        tensors: of the table, in layer order.
        placements: of all ranks.
        files: what of ``tensors`` becomes which tensor of a file.
        bucket_bytes: most bytes of tensors that are gathered at once.
    """
    held = _held_everywhere(tensors, placements, files)
    gathered = file_placement("export", _without(files, held))
    return Export(held, build_plan(tensors, placements, [gathered], bucket_bytes=bucket_bytes), _by_tensor(files))


def plan_save(
    tensors: Sequence[TensorSpec],
    placements: Sequence[Placement],
    stored: Sequence[FileTensor],
    kept: Mapping[str, StoredTensor],
    max_shard_bytes: int,
    bucket_bytes: int,
) -> Save:
    """Which file gets which tensors, by whom, and how that rank comes by them. Not collective, and equal on all ranks but for ``held``.

    Args:
        stored, kept: tensors of the files that ranks have, and those that none has.
        max_shard_bytes: most bytes of a file, but for a tensor that is larger.
        tensors, placements, bucket_bytes: as of ``plan_export``.
    """
    num_writers = dist.get_world_size()
    per_rank = -(-sum(t.nbytes for t in tensors) // num_writers)
    held, by_name = _held_everywhere(tensors, placements, stored), {file.spec.name: file for file in stored}
    written = [file.spec for file in stored] + [entry.spec for entry in kept.values()]
    specs = shard_files(written, min(max_shard_bytes, max(per_rank, LEAST_SHARD_BYTES)))
    files = {name: tuple(by_name[spec.name] for spec in group if spec.name in by_name) for name, group in specs.items()}
    plan = build_plan(
        _interleaved(files, tensors, num_writers),
        placements,
        [file_placement(name, _without(group, held)) for name, group in files.items()],
        bucket_bytes=bucket_bytes,
    )
    return Save(specs, files, held, kept, plan)


def writer_ranks(save: Save) -> list[int]:
    """The rank that writes each file, in the order of ``save.files``."""
    return [i % dist.get_world_size() for i in range(len(save.files))]


def files_of(rank: int, save: Save) -> list[str]:
    """The files that a rank writes."""
    return [name for name, writer in zip(save.files, writer_ranks(save), strict=True) if writer == rank]


class Arriving:
    """Tensors of files that are being put together from those of the table, bucket by bucket."""

    def __init__(self, files: Mapping[str, FileTensor], held: Mapping[str, Sequence[Copy]]) -> None:
        self._files, self._held = files, held
        self._missing = {file.spec.name: len(file.pieces) for file in files.values()}
        self.buffers: dict[str, torch.Tensor] = {}

    def begin(self, bucket: Bucket) -> bool:
        """Make room for what a bucket brings; False where it brings nothing here."""
        specs = [self._files[t.name].spec for t in bucket.tensors if t.name in self._files and t.name not in self._held]
        for spec in specs:
            if spec.name not in self.buffers:
                self.buffers[spec.name] = empty_tensor(spec)
        return bool(specs)

    def completed(self, tensor: TensorSpec) -> tuple[str, torch.Tensor] | None:
        """Name and content of the tensor of a file whose last part ``tensor`` is, which came with the last bucket."""
        name = self._files[tensor.name].spec.name
        self._missing[name] -= 1
        return None if self._missing[name] else (name, self.buffers.pop(name))


def _by_tensor(files: Iterable[FileTensor]) -> dict[str, FileTensor]:
    return {piece.tensor: file for file in files for piece in file.pieces}


def _without(files: Iterable[FileTensor], held: Mapping[str, Sequence[Copy]]) -> list[FileTensor]:
    return [file for file in files if file.pieces[0].tensor not in held]


def _held_everywhere(tensors: Sequence[TensorSpec], placements: Sequence[Placement], files: Sequence[FileTensor]) -> dict[str, list[Copy]]:
    """Tensors that are tensors of files, and of which every rank has all elements: by name the copies that make one of this rank's
    parameters."""
    names, sizes = {file.pieces[0].tensor for file in files if len(file.pieces) == 1}, {t.name: t.size for t in tensors}
    # Once for all replicas, who share what they hold; and of tensors that an earlier one lacks nobody asks again.
    for pieces in {id(placement.pieces): placement.pieces for placement in placements}.values():
        found: Counter[str] = Counter()
        for name, box in {(piece.tensor, piece.box) for piece in pieces if piece.tensor in names}:
            found[name] += box.size
        names = {name for name in names if found[name] == sizes[name]}
    held: dict[str, list[Copy]] = {name: [] for name in names}
    here = whole_tensors("here", [t for t in tensors if t.name in names])
    for bucket in build_plan(tensors, [placements[dist.get_rank()]], [here]).buckets:
        for copy in bucket.copies:
            held[copy.tensor].append(copy)
    return held


def in_place(tensor: TensorSpec, copies: Sequence[Copy], buffers: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """A tensor out of the buffers that hold it: a view where it lies in order in one of them, else new."""
    (first, *others) = copies
    if not others and first.source_strides in ((), (1,)):
        return region(buffers[first.source_buffer], first.source_offset, tensor.shape, contiguous_strides(tensor.shape))
    whole = empty_tensor(tensor)
    bind(copies, buffers, {tensor.name: whole}).run()
    return whole


def _interleaved(files: Mapping[str, Sequence[FileTensor]], tensors: Sequence[TensorSpec], num_writers: int) -> tuple[TensorSpec, ...]:
    """Tensors of the table in an order in which every writer always has something to do: round by round, one file per writer."""
    specs = {tensor.name: tensor for tensor in tensors}
    groups = [[specs[piece.tensor] for file in group for piece in file.pieces] for group in files.values()]
    order: list[TensorSpec] = []
    for begin in range(0, len(groups), num_writers):
        for row in zip_longest(*groups[begin : begin + num_writers]):
            order.extend(t for t in row if t is not None)
    return tuple(order)


def write_files(
    out_dir: Path, save: Save, mine: Sequence[str], exchange: Exchange, buffers: Mapping[str, torch.Tensor], writes: Writes
) -> Exception | None:
    """Write the files ``mine``: tensors that are kept from where they are, those that every rank holds from this rank's ``buffers``, others
    as they arrive.

    Collective: a rank that cannot write still takes part, so that nobody waits for it, and has no files then. Returns why it could not,
    for the caller to raise on all ranks; None where all is written. Raises at once what keeps it from taking part.
    """
    owner = {file.spec.name: name for name in mine for file in save.files[name]}
    files, kept = _by_tensor(file for name in mine for file in save.files[name]), MappedTensors(save.kept)
    arriving, writers, failures = Arriving(files, save.held), dict[str, FileWriter](), list[Exception]()
    with ExitStack() as stack:
        with _failing(failures):
            for name in mine:
                writers[name] = stack.enter_context(FileWriter(out_dir / name, save.specs[name], writes))
        for k, bucket in enumerate(save.plan.buckets):
            arriving.begin(bucket)
            exchange.deliver(k, [arriving.buffers] * len(save.files))
            for t in bucket.tensors:
                if t.name not in files:
                    continue
                stored = files[t.name].spec.name
                complete = None if t.name in save.held else arriving.completed(t)
                with _failing(failures):
                    if t.name in save.held and not failures:
                        complete = stored, in_place(t, save.held[t.name], buffers)
                    if complete is not None and not failures:
                        writers[owner[stored]].write(*complete)
        with _failing(failures):
            for file, spec in ((name, spec) for name in mine for spec in save.specs[name]):
                if spec.name in kept and not failures:
                    writers[file].write(spec.name, kept[spec.name])
        # Leaving the writers gives files their names, or removes them after a failure.
        with _failing(failures), stack.pop_all():
            if failures:
                raise failures[0]
    return _explained(failures[0], out_dir) if failures else None


@contextmanager
def _failing(failures: list[Exception]) -> Iterator[None]:
    """Keep what the block fails with, whatever it is, where this rank has to go on for the sake of others."""
    try:
        yield
    except Exception as error:
        failures.append(error)


def _explained(failure: Exception, out_dir: Path) -> Exception:
    if not isinstance(failure, OSError):
        return failure
    explained = CheckpointError(f"{failure.filename or out_dir}: cannot be written ({failure.strerror})")
    explained.__cause__ = failure
    return explained


def empty_tensor(spec: TensorSpec) -> torch.Tensor:
    """Uninitialised tensor of a spec on the compute device."""
    return torch.empty(spec.shape, dtype=getattr(torch, spec.dtype), device=compute_device())
