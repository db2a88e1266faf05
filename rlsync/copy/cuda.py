"""The CUDA copier: strided copies bound to device memory once, replayed every step by one kernel launch.

Owns the tables on the device and the launch, and is the only importer of cupy. What the tables mean is in rlsync.copy.tables, what
the device makes of them in rlsync.copy.kernel. Knows no process group and opens no handles: a peer's memory comes as an address.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from rlsync.copy import kernel
from rlsync.copy.signals import heard_afterwards
from rlsync.copy.tables import PATTERN_BYTES, Move, Strided, Tables, build_tables, moved
from rlsync.errors import ConfigError, PlacementError

# A CUDA tensor (a view of any strides), or memory that this process reaches in another way.
View = torch.Tensor | Strided


class CudaCopyProgram:
    """Pairs of views and constants, copied by one launch on the device that was named.

    Means what rlsync.copy.cpu.CopyProgram means, bit for bit; but a NaN that is cast stays some NaN, because processors disagree
    about its bits.

    Everything is enqueued on one stream, and nothing here waits but ``checksums``: the caller makes the stream wait for whoever
    writes the sources, and synchronises before it counts on the destinations, moves sources or drops the program. Tensors are
    kept alive by the program; memory behind a Strided is not. Not collective.
    """

    __slots__ = (
        "_constants",
        "_device",
        "_kept",
        "_kernel",
        "_last_stream",
        "_lengths",
        "_num_blocks",
        "_num_bulk",
        "_num_pairs",
        "_sums",
        "_tables",
        "_uploaded",
    )

    def __init__(
        self,
        pairs: Iterable[tuple[View | None, View]],
        constants: Iterable[tuple[View, float]] = (),
        *,
        device: torch.device,
        summed: bool = False,
    ) -> None:
        """Build the tables and upload them; compile the kernel, if this machine has not yet.

        Args:
            pairs: (destination, source) of equal shape, of one dtype or with a cast between float32, bfloat16 and float16.
                Destinations lie on ``device``; sources there or on a GPU whose memory it can reach. Where the destination is
                None the source is only summed up. They must not overlap.
            constants: destinations and the constants to write there; no pair writes the same elements.
            device: a CUDA device. A mapping of another process's memory must have been opened in its context, wherever the
                memory itself lies.
            summed: runs compute a checksum for each pair.

        Raises ConfigError where CUDA or cupy is missing or peer memory is out of reach, PlacementError for pairs that differ.
        """
        pairs, constants = tuple(pairs), tuple(constants)
        self._device = _usable(device)
        self._kernel = _compiled(summed, self._device.index)
        self._kept = tuple(view for pair in (*pairs, *constants) for view in pair if isinstance(view, torch.Tensor))
        _refuse_elsewhere(self._device, [d for d, _ in (*pairs, *constants)])
        for peer in {s.device for _, s in pairs if isinstance(s, torch.Tensor) and s.is_cuda}:
            open_peer(self._device, peer)
        taken = [strided(destination) for destination, _ in constants]
        self._constants = _constants([(view.dtype, value) for view, (_, value) in zip(taken, constants, strict=True)], self._device)
        self._tables = build_tables(
            [(None if d is None else strided(d), strided(s)) for d, s in pairs],
            [(view, self._constants[i].data_ptr()) for i, view in enumerate(taken)],
            in_order=summed,
        )
        # The sums of the constants are made behind those of the pairs; nobody asks for them.
        self._num_pairs = len(pairs)
        self._lengths = torch.from_numpy(self._tables.lengths.view(np.int64)).to(self._device)
        self._sums = torch.zeros_like(self._lengths) if summed else None
        self._last_stream: torch.cuda.Stream | None = None
        chip = torch.cuda.get_device_properties(self._device)
        self._num_blocks = min(self.num_tasks, chip.multi_processor_count * kernel.BLOCKS_PER_MULTIPROCESSOR)
        self._num_bulk = self._tables.num_bulk if (chip.major, chip.minor) >= kernel.BULK_CAPABILITY else 0
        self._uploaded = _upload(self._tables, self._device)

    @property
    def nbytes(self) -> int:
        """Bytes that a run writes."""
        return self._tables.nbytes

    @property
    def num_tasks(self) -> int:
        """Pieces of work of a run, most of them 64 KiB."""
        return len(self._tables.tasks)

    @property
    def table_bytes(self) -> int:
        """Device memory that the tables take."""
        return sum(table.numel() for table in self._uploaded)

    def run(self, stream: torch.cuda.Stream | None = None) -> int:
        """Enqueue every copy on ``stream``, or on torch's current one of the device; returns the bytes that will be written."""
        stream = torch.cuda.current_stream(self._device) if stream is None else stream
        self._last_stream = stream
        if self._sums is not None:
            with torch.cuda.stream(stream):
                self._sums.copy_(self._lengths)
        if self.num_tasks:
            cupy = _cupy()
            memory = [*self._uploaded, self._lengths if self._sums is None else self._sums]
            arguments = [np.uint64(t.data_ptr()) for t in memory] + [np.int32(n) for n in (self._num_bulk, self.num_tasks)]
            with cupy.cuda.Device(self._device.index), cupy.cuda.Stream.from_external(stream):
                self._kernel((self._num_blocks,), (kernel.THREADS_PER_BLOCK,), tuple(arguments))
        return self.nbytes

    def checksums(self) -> list[int]:
        """The checksum of each pair, as of ``rlsync.copy.checksum``: of the source as the last run read it, in the destination's dtype.

        Elements count in the order of the pair's shape; dims that are not in the order of the memory of both sides make them slow.
        Waits for that run.
        """
        assert self._sums is not None, "the program was not made to sum"
        assert self._last_stream is not None, "nothing has run yet"
        with torch.cuda.stream(self._last_stream):
            return [int(value) for value in self._sums[: self._num_pairs].cpu().numpy().view(np.uint64)]

    def move_sources(self, moves: Sequence[Move]) -> None:
        """Read from elsewhere from now on, where the owner's memory has moved. No run may be under way.

        Raises PlacementError where memory moved by no multiple of 16 bytes.
        """
        self._tables = moved(self._tables, moves)
        tasks, _, dims = self._uploaded
        self._uploaded = tasks, _on_device(self._tables.pairs, self._device), dims


def strided(view: View) -> Strided:
    """Address, dtype, shape and strides of a CUDA tensor. Raises PlacementError for a tensor elsewhere."""
    if isinstance(view, Strided):
        return view
    if not view.is_cuda:
        raise PlacementError(f"a CUDA copy of a tensor on {view.device}: move it to a CUDA device, or copy it with rlsync.copy.cpu")
    return Strided(view.data_ptr(), str(view.dtype).removeprefix("torch."), tuple(view.shape), view.stride())


def _usable(device: torch.device) -> torch.device:
    """The device with its index. Raises ConfigError where it cannot be used."""
    if device.type != "cuda" or not torch.cuda.is_available():
        raise ConfigError(f"CUDA copies on {device} need a CUDA device; torch {torch.__version__} sees {torch.cuda.device_count()}")
    return torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)


def open_peer(device: torch.device, peer: torch.device) -> None:
    """Let kernels of ``device`` read what this process holds on ``peer``. Raises ConfigError where they cannot.

    Programs do so for tensors. Mappings of other processes' memory, opened in the context of ``device``, need nothing.
    """
    if device == peer:
        return
    if not torch.cuda.can_device_access_peer(device, peer):
        raise ConfigError(f"{device} cannot read memory of {peer}: no peer access between them; stage through host memory")
    # torch opens the way from the source's device to the destination's at the first copy, and remembers it. Opened behind its back
    # it would meet an error when it does the same.
    torch.empty(1, device=peer).copy_(torch.zeros(1, device=device))
    torch.cuda.current_stream(device).synchronize()


def _refuse_elsewhere(device: torch.device, destinations: Sequence[View | None]) -> None:
    away = {d.device for d in destinations if isinstance(d, torch.Tensor)} - {device}
    if away:
        raise PlacementError(f"a CUDA copy on {device} was given destinations on {', '.join(sorted(map(str, away)))}")


def _constants(values: Sequence[tuple[str, float]], device: torch.device) -> torch.Tensor:
    """PATTERN_BYTES of each constant in its dtype; uint8 (values, PATTERN_BYTES)."""
    table = torch.empty(len(values), PATTERN_BYTES, dtype=torch.uint8)
    for row, (name, value) in zip(table, values, strict=True):
        dtype = getattr(torch, name)
        row.copy_(torch.full((PATTERN_BYTES // dtype.itemsize,), value, dtype=dtype).view(torch.uint8))
    return table.to(device)


def _upload(tables: Tables, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tasks, pairs and dims."""
    return _on_device(tables.tasks, device), _on_device(tables.pairs, device), _on_device(tables.dims, device)


def _on_device(rows: npt.NDArray[np.void], device: torch.device) -> torch.Tensor:
    """The rows as bytes on the device; the copy is complete when this returns."""
    return torch.from_numpy(rows.view(np.uint8)).to(device)


def _cupy() -> Any:
    """The module, imported by whoever copies on CUDA only. Raises ConfigError where it is missing."""
    try:
        import cupy
    except ImportError as error:
        raise ConfigError(f"CUDA copies need cupy ({error}); install rlsync[cuda]") from error
    return cupy


def compile_ahead(device: torch.device) -> threading.Thread:
    """Begin to compile the kernels for a device, which takes seconds on a machine that has not had them yet. Returns at once.

    Whoever needs one before it is there waits for it, and hears what keeps it from being compiled: nothing is said of that here.
    """

    def run() -> None:
        with contextlib.suppress(Exception):
            index = _usable(device).index
            for summed in (False, True):
                _compiled(summed, index)

    thread = threading.Thread(target=run, name="rlsync-compiler", daemon=True)
    thread.start()
    return thread


_compiler = threading.Lock()


def _compiled(summed: bool, device_index: int) -> Any:
    """The kernel, loaded on a device. Compiled once, whoever else asks for it meanwhile."""
    with _compiler:
        return _compiled_once(summed, device_index)


@lru_cache
def _compiled_once(summed: bool, device_index: int) -> Any:
    """cupy keeps the machine code on disk."""
    cupy = _cupy()
    with heard_afterwards(), cupy.cuda.Device(device_index):
        compiled = cupy.RawKernel(kernel.source(), kernel.NAME, options=kernel.options(summed=summed))
        compiled.compile()
    return compiled
