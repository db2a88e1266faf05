"""A conversion from its check to the rename that makes it complete: plans, copies, the journal by which it goes on where it was stopped.

Files are written beside the folder that is asked for, in ``.NAME.conversion``, which holds

    request.json    what is converted from what to what
    journal         a line for each file that was made and each bucket that the disk has
    folder/         what becomes the folder, by one rename
    lock            held while a conversion runs
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from multiprocessing import get_context
from pathlib import Path

import torch

from rlsync import __version__
from rlsync.bridge.checkpoint_folder import sync_folder, write_durably
from rlsync.convert.filling import Filling, copy_all, plan_filling
from rlsync.convert.sources import Form, Source, open_source
from rlsync.convert.targets import HfFolder, MegatronFolder, Output, Target, copied_bytes, reserve
from rlsync.copy.files import MappedTensors
from rlsync.errors import CheckpointError, ConfigError
from rlsync.layout.geometry import DTYPE_BYTES
from rlsync.layout.topology import Topology
from rlsync.models import Flavour, check_config
from rlsync.models.base_keys import DTYPES

BUCKET_BYTES = 256 * 2**20
MAX_SHARD_BYTES = 5 * 2**30
# Room beside what is written, for what a file system keeps for itself.
_SPARE_BYTES = 64 * 2**20
_PR_SET_PDEATHSIG = 1  # of prctl
# How often workers are asked for their progress.
_REPORT_S = 0.5
# In the working folder: what becomes the target.
_STAGED = "folder"


@dataclass(frozen=True, slots=True)
class Request:
    """What is to be converted.

    Attributes:
        source: see ``rlsync.convert.sources.open_source``; ``model_folder`` as well.
        target: the folder to write; not there, or empty.
        form: of what is written.
        topology: layout of Megatron's shards; counts with that form only.
        dtype: of the parameters that are written; None: as in the source.
        flavour: the spec that names Megatron's parameters; None: as in the source, of Hugging Face files "local".
        make_vocab_size_divisible_by: Megatron's vocabulary is padded to a multiple of this times TP.
        bucket_bytes: most bytes of a file that are copied before the journal says so, or the largest tensor.
        max_shard_bytes: most bytes of a Hugging Face file, but for a tensor that is larger.
    """

    source: Path
    target: Path
    form: Form
    model_folder: Path | None = None
    topology: Topology = field(default_factory=Topology)
    dtype: str | None = None
    flavour: Flavour | None = None
    make_vocab_size_divisible_by: int = 1
    bucket_bytes: int = BUCKET_BYTES
    max_shard_bytes: int = MAX_SHARD_BYTES


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a conversion is: bytes that the disk has, of all; ``resumed`` were there when it began."""

    done_bytes: int
    total_bytes: int
    resumed_bytes: int


@dataclass(frozen=True, slots=True)
class Converted:
    """What was made: numbers and forms for a closing line."""

    source: Source
    output: Output
    num_files: int
    progress: Progress


def convert(request: Request, *, workers: int = 1, report: Callable[[Progress], None] = lambda progress: None) -> Converted:
    """Convert a checkpoint. An earlier conversion of the same that was stopped goes on from the last bucket that the disk has.

    Memory is a bucket in each of ``workers`` processes. ``report`` is called after every bucket.

    Raises, before a tensor is copied: what ``open_source`` raises; ConfigError for a layout that does not fit the model; CheckpointError
    where the target is there, another conversion is writing it, or the disk has too little room.
    """
    source, output = prepare(request)
    targets = output.targets()
    # All of them, so that what is wrong is found before anything is written.
    plans = [plan_filling(source.tensors(), source.holdings, target.placement, bucket_bytes=request.bucket_bytes) for target in targets]
    _check_target(request.target)
    with _working_folder(request.target) as folder:
        journal = Journal.open(folder, _identity(request, source))
        _make_files(folder, targets, journal)
        progress = Progress(journal.done_bytes, sum(map(copied_bytes, targets)), journal.done_bytes)
        report(progress)
        for done_bytes in _copied(request, targets, plans, journal, workers):
            progress = replace(progress, done_bytes=done_bytes)
            report(progress)
        numbers = [range(len(filling.plan.buckets)) for filling in plans]
        lacking = [t.path for i, t in enumerate(targets) if not {(i, n) for n in numbers[i]} <= journal.buckets.keys()]
        assert not lacking, f"never copied: {lacking}"
        output.finish(folder / _STAGED)
        _sync(folder / _STAGED)
        _publish(folder / _STAGED, request.target)
    shutil.rmtree(folder)
    return Converted(source, output, len(targets), progress)


def prepare(request: Request) -> tuple[Source, Output]:
    """The checkpoint that is read, and what is to be made of it; reads headers only. Raises as :func:`convert`."""
    source = open_source(request.source, request.model_folder)
    dtype = source.dtype() if request.dtype is None else request.dtype
    if dtype not in DTYPES:
        raise ConfigError(f"{request.source}: weights in {dtype} are not converted, only in {', '.join(DTYPES)}")
    if request.form == "hf":
        if source.form != "hf" and not source.kept and not any(source.model_folder.glob("*.safetensors*")):
            kept = ", ".join(f"{name}*" for name in source.model.family.kept(source.model.values))
            if kept:
                raise CheckpointError(f"{source.folder}: shards hold no {kept}, which the model has; name a folder with them by --model")
        return source, HfFolder(source, dtype, request.max_shard_bytes)
    findings = check_config(json.loads(source.config_text), request.topology)
    if findings:
        raise ConfigError("; ".join(findings))
    flavour = request.flavour or source.flavour or "local"
    return source, MegatronFolder(source, dtype, request.topology, flavour, request.make_vocab_size_divisible_by)


class Journal:
    """Which files were made and which buckets are on the disk. Several processes may add to one; each sees what it read and added."""

    def __init__(self, folder: Path) -> None:
        """``folder`` is the working folder of a conversion."""
        self.folder, self._path = folder, folder / "journal"
        self.made: set[int] = set()
        self.buckets: dict[tuple[int, int], int] = {}
        self.read()

    def read(self) -> None:
        """Take in what others have added."""
        for line in self._path.read_text().splitlines() if self._path.is_file() else ():
            kind, *numbers = line.split(" ")
            if kind == "made" and len(numbers) == 2:
                self.made.add(int(numbers[0]))
            elif kind == "bucket" and len(numbers) == 4:
                self.buckets[int(numbers[0]), int(numbers[1])] = int(numbers[2])

    @classmethod
    def open(cls, folder: Path, identity: str) -> Journal:
        """The journal of a working folder; what was done for another request, or with other files, is removed."""
        request = folder / "request.json"
        if not request.is_file() or request.read_text() != identity:
            request.unlink(missing_ok=True)
            shutil.rmtree(folder / _STAGED, ignore_errors=True)
            (folder / "journal").unlink(missing_ok=True)
            (folder / _STAGED).mkdir()
            write_durably(request, identity)
        return cls(folder)

    @property
    def done_bytes(self) -> int:
        return sum(self.buckets.values())

    def add_made(self, target: int) -> None:
        self.made.add(target)
        self._add(f"made {target}")

    def add_bucket(self, target: int, bucket: int, nbytes: int) -> None:
        self.buckets[target, bucket] = nbytes
        self._add(f"bucket {target} {bucket} {nbytes}")

    def _add(self, line: str) -> None:
        with self._path.open("ab", buffering=0) as stream:
            # In one write, which others' do not come between; a line that was cut has no full stop.
            stream.write(f"\n{line} .\n".encode())
            os.fsync(stream.fileno())


def _identity(request: Request, source: Source) -> str:
    """All that decides what a file of a conversion is to hold."""
    files = {str(path): [path.stat().st_size, path.stat().st_mtime_ns] for path in source.files()}
    said = {**asdict(request), "rlsync": __version__, "torch": torch.__version__, "config": source.config_text, "files": files}
    return json.dumps({key: str(value) if isinstance(value, Path) else value for key, value in said.items()}, indent=1)


def _check_target(target: Path) -> None:
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise CheckpointError(f"{target} is there and not an empty folder; choose another, or remove it")


@contextmanager
def _working_folder(target: Path) -> Iterator[Path]:
    """``.NAME.conversion`` beside the target, for this process alone. It stays where the conversion does not end."""
    folder = target.absolute().parent / f".{target.name}.conversion"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise CheckpointError(f"{error.filename or folder}: cannot be written ({error.strerror}); choose a folder that can") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise CheckpointError(f"another conversion to {target} is running; wait for it, or stop it") from None
    else:
        yield folder
    finally:
        os.close(descriptor)


def _make_files(folder: Path, targets: Sequence[Target], journal: Journal) -> None:
    """Make the files that were not made, and keep room for them. Raises CheckpointError where the disk has too little."""
    absent = [index for index in range(len(targets)) if index not in journal.made]
    needed = sum(copied_bytes(targets[index]) for index in absent) + _SPARE_BYTES if absent else 0
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise CheckpointError(
            f"{folder.parent} has {free / 2**30:.1f} GiB free, and the conversion writes {needed / 2**30:.1f} GiB; free some, or choose "
            "another disk"
        )
    for index in absent:
        file = folder / _STAGED / targets[index].path
        file.parent.mkdir(parents=True, exist_ok=True)
        targets[index].create(file)
        reserve(file)
        journal.add_made(index)


def _copied(request: Request, targets: Sequence[Target], plans: Sequence[Filling], journal: Journal, workers: int) -> Iterator[int]:
    """Copy every bucket that the journal lacks; yields how many bytes it has, as they come."""
    if workers == 1:
        for index, target in enumerate(targets):
            for _ in _copy_part(target, plans[index], journal, index, 0, 1):
                yield journal.done_bytes
        return
    # A file is divided among workers where there are fewer files.
    parts = -(-workers // len(targets))
    with ProcessPoolExecutor(workers, get_context("spawn"), initializer=_begin_worker, initargs=(os.getpid(),)) as pool:
        left = {
            pool.submit(_worker_part, request, journal.folder, index, part, parts) for index in range(len(targets)) for part in range(parts)
        }
        try:
            while left:
                done, left = wait(left, timeout=_REPORT_S, return_when=FIRST_EXCEPTION)
                for task in done:
                    task.result()
                journal.read()
                yield journal.done_bytes
        finally:
            pool.shutdown(cancel_futures=True)


def _begin_worker(parent: int) -> None:
    # Whoever goes on after a kill must be alone.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    torch.set_num_threads(1)


@cache
def _prepared(request: Request) -> tuple[Source, tuple[Target, ...]]:
    """Of a worker process, which lives as long as the conversion."""
    source, output = prepare(request)
    return source, output.targets()


def _worker_part(request: Request, folder: Path, index: int, part: int, parts: int) -> None:
    source, targets = _prepared(request)
    filling = plan_filling(source.tensors(), source.holdings, targets[index].placement, bucket_bytes=request.bucket_bytes)
    for _ in _copy_part(targets[index], filling, Journal(folder), index, part, parts):
        pass


def _copy_part(target: Target, filling: Filling, journal: Journal, index: int, part: int, parts: int) -> Iterator[None]:
    """Copy one in ``parts`` of the buckets of a file that the journal lacks; yields when the disk has one, and the journal says so."""
    buckets = filling.plan.buckets
    left = [number for number in range(part, len(buckets), parts) if (index, number) not in journal.buckets]
    if not left:
        return
    item_bytes = {buffer.name: DTYPE_BYTES[buffer.dtype] for buffer in target.placement.buffers}
    written = MappedTensors(target.stored(journal.folder / _STAGED / target.path), writable=True)
    read = filling.open()
    for number in left:
        copy_all(buckets[number].copies, read, written)
        for mapped in (written, *read):
            mapped.let_pages_go()
        journal.add_bucket(index, number, sum(copy.size * item_bytes[copy.destination_buffer] for copy in buckets[number].copies))
        yield


def _sync(folder: Path) -> None:
    """Have the disk know the names in a folder and below."""
    for path in (folder, *(path for path in folder.rglob("*") if path.is_dir())):
        sync_folder(path)


def _publish(staged: Path, target: Path) -> None:
    try:
        os.rename(staged, target.absolute())
    except OSError as error:
        raise CheckpointError(f"{target} cannot be made ({error.strerror}); what was converted is in {staged}") from None
    sync_folder(target.absolute().parent)
