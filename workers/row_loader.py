"""Rows of files to batches of what they become: the order of batches over all epochs, rows that take the place of others, processes that
work ahead, and a position that resumes at the exact batch.

Knows neither what a row becomes nor Ray: ``sft_data`` has training examples, ``picture_prompts`` prompts of GRPO.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from rlsync.errors import CheckpointError, ConfigError
from workers.problems import OnBadSample
from workers.row_files import BadRow, Integers, RowFiles

# Rows tried in the place of one that is left out. So many in a row that cannot be used are no accident.
_NUM_SUBSTITUTES = 32
# Substitutes come from this many rows around, so that a Parquet file is not read all over for each.
_NEIGHBOURHOOD = 1024
# Examples that a loader process hands over at once: each time costs a millisecond, and more of large pictures would fill its memory.
_HANDED_OVER = 16

# Prompts of a validation whose pictures are in memory together, beside those of the part that is read ahead.
PROMPTS_AT_ONCE = 256

# Metrics of ``RowLoader.take_left_out``.
LEFT_OUT = ("data/left_out_bad", "data/left_out_too_long")

# What a row becomes.
T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class TooLong(BadRow):
    """A row that has more tokens than an example may have."""


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A row that was not used, and why."""

    where: str
    reason: str
    too_long: bool


@dataclass(frozen=True, slots=True)
class Drawn(Generic[T_co]):
    """What a loader process made of one place of a batch: an example, None if there is none, and the rows that were tried before."""

    example: T_co | None
    left_out: tuple[LeftOut, ...] = ()


class ExampleSource(Protocol[T_co]):
    """Where examples come from. An item says everything that one example is made of, wherever that is done.

    Attributes:
        num_items: in an epoch.
        notes: what the user should know about the data.
    """

    num_items: int
    notes: tuple[str, ...]

    def items(self, epoch: int, *, shuffle: bool, seed: int) -> Sequence[Any]:
        """The ``num_items`` items of an epoch, in an order that depends on (seed, epoch) only."""
        ...

    def draw(self, item: Any) -> Drawn[T_co]:
        """The example of an item. Called by loader processes, too."""
        ...

    def fingerprint(self) -> str:
        """Hash of the data."""
        ...


class RowSource(ABC, Generic[T]):
    """An example a row. A row that cannot be used has a row nearby in its place, if it is to be skipped.

    Args:
        on_bad_sample, on_too_long: whether such rows are skipped, or end the run.
        most: only the first this many rows; None: all.
    """

    def __init__(self, files: RowFiles, *, on_bad_sample: OnBadSample, on_too_long: OnBadSample, most: int | None = None) -> None:
        self._files = files
        self._skips = {False: on_bad_sample == "skip", True: on_too_long == "skip"}
        self.num_items = len(files) if most is None else min(most, len(files))
        self.notes: tuple[str, ...] = ()

    @abstractmethod
    def encode(self, content: Any, where: str, folder: Path) -> T:
        """The example of a row's content. Raises BadRow or TooLong."""

    def items(self, epoch: int, *, shuffle: bool, seed: int) -> Sequence[Integers]:
        order = self._files.order(epoch, shuffle=shuffle, seed=seed)
        order = order[order < self.num_items] if self.num_items < len(order) else order
        return _RowItems(order, epoch, seed, substitutes=any(self._skips.values()))

    def draw(self, item: Integers) -> Drawn[T]:
        left_out: list[LeftOut] = []
        for row in item:
            where, content = self._files.read(int(row))
            try:
                return Drawn(self.encode(content, where, self._files.folder(int(row))), tuple(left_out))
            except BadRow as reason:
                left_out.append(LeftOut(where, str(reason), isinstance(reason, TooLong)))
                if not self._skips[left_out[-1].too_long]:
                    break
        return Drawn(None, tuple(left_out))

    def fingerprint(self) -> str:
        return self._files.fingerprint()


class _RowItems(Sequence[Integers]):
    """For each place of an epoch its row and, where rows may be skipped, those that may take its place."""

    def __init__(self, order: Integers, epoch: int, seed: int, *, substitutes: bool) -> None:
        self._order, self._epoch, self._seed, self._substitutes = order, epoch, seed, substitutes

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, place: Any) -> Any:
        if not self._substitutes:
            return self._order[place : place + 1]
        near = np.random.Generator(np.random.PCG64((self._seed, self._epoch, place)))
        steps = near.integers(1, max(2, min(_NEIGHBOURHOOD, len(self._order))), _NUM_SUBSTITUTES)
        return self._order[np.concatenate([[place], (place + steps) % len(self._order)])]


class _Drawing(Dataset[list[Drawn[T]]]):
    """A source as torch's loader asks it."""

    def __init__(self, source: ExampleSource[T]) -> None:
        self._source = source

    def __getitem__(self, items: Any) -> list[Drawn[T]]:
        return [self._source.draw(item) for item in items]


class _Share(Sampler[Any]):
    """Items of one replica's share of each global batch over all epochs, up to ``at_once`` of a batch together; a short last batch is
    dropped, unless ``keep_last``. Begins with batch ``first``."""

    def __init__(
        self,
        source: ExampleSource[Any],
        batch_size: int,
        share: range,
        *,
        at_once: int,
        num_epochs: int,
        shuffle: bool,
        seed: int,
        keep_last: bool,
    ) -> None:
        self._source, self.batch_size, self.share, self._at_once = source, batch_size, share, at_once
        self.num_epochs, self.shuffle, self.seed = num_epochs, shuffle, seed
        self.batches_per_epoch = -(-source.num_items // batch_size) if keep_last else source.num_items // batch_size
        self.first = 0

    @property
    def num_batches(self) -> int:
        return self.batches_per_epoch * self.num_epochs

    def __iter__(self) -> Iterator[Any]:
        done_epochs, done_batches = divmod(self.first, max(1, self.batches_per_epoch))
        for epoch in range(done_epochs, self.num_epochs):
            items = self._source.items(epoch, shuffle=self.shuffle, seed=self.seed)
            for batch in range(done_batches if epoch == done_epochs else 0, self.batches_per_epoch):
                places = self._places(batch)
                for start in range(0, len(places), self._at_once):
                    yield [items[place] for place in places[start : start + self._at_once]]

    def _places(self, batch: int) -> range:
        """Of the share of a batch of an epoch, in the epoch's items."""
        begin, end = (min(batch * self.batch_size + place, self._source.num_items) for place in (self.share.start, self.share.stop))
        return range(begin, end)

    def num_calls(self, batch: int) -> int:
        """How often items come for a batch of all epochs."""
        return -(-len(self._places(batch % self.batches_per_epoch)) // self._at_once)


@dataclass(frozen=True, slots=True)
class _Packed:
    """Drawn examples between processes. Their pixels are one tensor, as each tensor costs the receiver a connection to the sender.

    Attributes:
        drawn: without patches.
        grids: ``image_grid_thw`` of each; None for those without pictures.
        num_patches: of each.
        pixel_values: of all of them; None where there are none.
    """

    drawn: tuple[Drawn[Any], ...]
    grids: tuple[list[list[int]] | None, ...]
    num_patches: tuple[int, ...]
    pixel_values: Tensor | None


def _pack(drawn: Sequence[Drawn[Any]]) -> _Packed:
    """What it is given without the memory that each example has for its patches. Examples with patches are dataclasses with both fields."""
    pixels, grids = ([getattr(one.example, name, None) for one in drawn] for name in ("pixel_values", "image_grid_thw"))
    found = [values for values in pixels if values is not None]
    return _Packed(
        tuple(one if values is None else _with_patches(one, None, None) for one, values in zip(drawn, pixels, strict=True)),
        tuple(None if grid is None else grid.tolist() for grid in grids),
        tuple(0 if values is None else len(values) for values in pixels),
        torch.cat(found) if found else None,
    )


def _unpack(packed: _Packed) -> Iterator[Drawn[Any]]:
    """What ``_pack`` was given."""
    if packed.pixel_values is None:
        yield from packed.drawn
        return
    for one, grid, pixels in zip(packed.drawn, packed.grids, packed.pixel_values.split(list(packed.num_patches)), strict=True):
        # In memory of its own: whoever pickles an example would pickle what it shares, too.
        yield one if grid is None else _with_patches(one, pixels.clone(), torch.tensor(grid))


def _with_patches(one: Drawn[Any], pixels: Tensor | None, grid: Tensor | None) -> Drawn[Any]:
    example: Any = one.example
    return replace(one, example=replace(example, pixel_values=pixels, image_grid_thw=grid))


def check_position(saved: Mapping[str, Any], present: Mapping[str, Any]) -> None:
    """Raise CheckpointError where a position was saved in other data, or another order of it, than the present one."""
    if saved != present:
        changed = ", ".join(f"{name} {saved.get(name)} -> {present[name]}" for name in present if saved.get(name) != present[name])
        raise CheckpointError(
            f"data position was saved with other settings ({changed}); restore them, or remove data/data.pt of the checkpoint to start "
            "the data from the beginning"
        )


def _batches(loader: DataLoader[Any], order: _Share, first: int) -> Generator[list[Drawn[Any]]]:
    """Batches from number ``first`` on. Those of other processes are fetched while the caller works on the one before.

    Refers to no RowLoader, so that its processes end with the last reference to it. A garbage collection that finds both would take away
    the queues by which torch tells processes to end, and torch waits 5 s for each before it kills them.
    """
    numbers, order.first = range(first, order.num_batches), first
    calls, packed = iter(loader), loader.num_workers > 0

    def batch(number: int) -> list[Drawn[Any]]:
        parts = (next(calls) for _ in range(order.num_calls(number)))
        return [drawn for part in parts for drawn in (_unpack(part) if packed else part)]

    if not packed:
        yield from map(batch, numbers)
        return
    with ThreadPoolExecutor(1, thread_name_prefix="rlsync-data") as thread:
        coming = thread.submit(batch, numbers[0])
        for number in numbers:
            found = coming.result()
            if number + 1 in numbers:
                coming = thread.submit(batch, number + 1)
            yield found


class RowLoader(Generic[T]):
    """A replica's share of each global batch, over all epochs, with a position that can be saved and restored exactly.

    ``len`` is the number of global batches of the whole run. Iterating gives lists of ``batch_size // dp_size`` examples and
    continues after the last one handed out. Batches and position depend neither on ``num_workers`` nor, but for who gets which
    examples, on ``dp_size``; the state of any replica is that of all.

    Args:
        num_workers: processes that read rows and decode pictures ahead of the step; 0: done when a batch is asked for.
        keep_last: a short last batch of an epoch is handed out, too.
        batch_key: the configuration key of ``batch_size``, for errors and in the position.
        too_long: what a user can do about rows that are too long.

    Raises:
        ConfigError: the data is smaller than a batch, or the batch cannot be split; while iterating, a row that cannot be used and is
            not to be skipped, by file and row.
    """

    def __init__(
        self,
        source: ExampleSource[T],
        batch_size: int,
        *,
        dp_rank: int = 0,
        dp_size: int = 1,
        num_epochs: int = 1,
        shuffle: bool = True,
        seed: int = 1234,
        num_workers: int = 0,
        keep_last: bool = False,
        batch_key: str = "actor.global_batch_size",
        too_long: str = "data.on_too_long=skip leaves such rows out",
    ) -> None:
        if batch_size % dp_size:
            raise ConfigError(f"{batch_key} ({batch_size}) cannot be split over {dp_size} data-parallel ranks")
        size = batch_size // dp_size
        share = range(dp_rank * size, (dp_rank + 1) * size)
        # A part of a batch each, so that all processes work on the batch that is next.
        at_once = min(_HANDED_OVER, -(-size // num_workers)) if num_workers else 1
        self._source, self._batch_key = source, batch_key
        self._ways_out = {False: "data.on_bad_sample=skip leaves such rows out", True: too_long}
        self._order = _Share(
            source, batch_size, share, at_once=at_once, num_epochs=num_epochs, shuffle=shuffle, seed=seed, keep_last=keep_last
        )
        if self._order.num_batches == 0:
            raise ConfigError(
                f"Train dataloader is empty! The data makes {source.num_items} examples, fewer than {batch_key} "
                f"({batch_size}), over {num_epochs} epochs"
            )
        self._loader = DataLoader(
            _Drawing(source),
            batch_size=None,
            sampler=self._order,
            collate_fn=_pack if num_workers else list,
            num_workers=num_workers,
            # As many as a batch has, while the batch before waits in this process.
            prefetch_factor=-(-size // (num_workers * at_once)) if num_workers else None,
            # The loader draws seeds for its processes; not from the random state of training.
            generator=torch.Generator(),
        )
        self._handed_out = 0
        self._drawn: Generator[list[Drawn[T]]] | None = None
        self._num_left_out = {False: 0, True: 0}

    @property
    def batches_per_epoch(self) -> int:
        return self._order.batches_per_epoch

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know about the data."""
        return self._source.notes

    def take_left_out(self) -> dict[str, int]:
        """Metrics: rows of this share that were left out since the last call, because they cannot be used and because of their length.
        Others were in their place."""
        taken, self._num_left_out = self._num_left_out, {False: 0, True: 0}
        return dict(zip(LEFT_OUT, (taken[False], taken[True]), strict=True))

    def __len__(self) -> int:
        return self._order.num_batches

    def __iter__(self) -> Iterator[list[T]]:
        while self._handed_out < len(self):
            if self._drawn is None:
                self._drawn = _batches(self._loader, self._order, self._handed_out)
            try:
                examples = [self._taken(drawn) for drawn in next(self._drawn)]
            except BaseException:
                self._end_processes()
                raise
            self._handed_out += 1
            if self._handed_out == len(self):
                self._end_processes()
            yield examples

    def state_dict(self) -> dict[str, Any]:
        """Position after the last batch handed out, and what it is a position in; plain containers."""
        return {"order": self._identity(), "handed_out": self._handed_out}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue after the batch at which ``state_dict`` was taken, without reading what lies before it. More epochs than then, and
        another number of replicas, are allowed.

        Raises:
            CheckpointError: the state belongs to other data, batch size, seed or shuffling.
        """
        check_position(state["order"], self._identity())
        self._end_processes()
        self._handed_out = state["handed_out"]

    def _end_processes(self) -> None:
        """Those that work ahead; others begin at the position then."""
        if self._drawn is not None:
            self._drawn.close()
            self._drawn = None

    def _taken(self, drawn: Drawn[T]) -> T:
        for row in drawn.left_out:
            self._num_left_out[row.too_long] += 1
        if drawn.example is None:
            last = drawn.left_out[-1]
            tried = f" ({len(drawn.left_out)} rows were tried)" if len(drawn.left_out) > 1 else ""
            raise ConfigError(f"{last.where}: {last.reason}{tried}. {self._ways_out[last.too_long]}")
        return drawn.example

    def _identity(self) -> dict[str, int | str]:
        order = self._order
        return {
            "num_examples": self._source.num_items,
            self._batch_key.rpartition(".")[2]: order.batch_size,
            "seed": order.seed,
            "shuffle": int(order.shuffle),
            "data": self._source.fingerprint(),
        }


class _ChosenRows(Generic[T]):
    """An example a row, of rows that can be used."""

    def __init__(self, rows: Sequence[int], read: Callable[[int], T | LeftOut]) -> None:
        self._rows, self._read, self.num_items = rows, read, len(rows)
        self.notes: tuple[str, ...] = ()

    def items(self, epoch: int, *, shuffle: bool, seed: int) -> Sequence[int]:
        return self._rows

    def draw(self, item: int) -> Drawn[T]:
        found = self._read(item)
        return Drawn(None, (found,)) if isinstance(found, LeftOut) else Drawn(found)

    def fingerprint(self) -> str:
        return ""


def in_parts(rows: Sequence[int], read: Callable[[int], T | LeftOut], *, most: int, num_workers: int) -> Iterator[list[T]]:
    """What ``read`` makes of each row, in their order, up to ``most`` together; ``num_workers`` processes read the next part while the
    caller works on one.

    Raises ConfigError by file and row where one cannot be read any more.
    """
    return iter(RowLoader(_ChosenRows(rows, read), most, shuffle=False, num_workers=num_workers, keep_last=True))
