"""A conversion from its check to the rename that makes it complete: plans, copies, the journal by which it goes on where it was stopped.

Files are written beside the folder that is asked for, in ``.NAME.conversion``, which holds

    request.json    what is converted from what to what
    journal*        a line for each file that was made or sealed and each bucket that the disk has; one of each process that shares it
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
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ProcessPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Literal

import torch

from rlsync import __version__
from rlsync.bridge.adapter_folder import base_copies
from rlsync.bridge.checkpoint_folder import sync_folder, write_durably
from rlsync.convert.merging import Factors, FilePlan, FilePlanner, check_base, check_named_base, fill_bucket
from rlsync.convert.ranks import Ranks
from rlsync.convert.sources import Source, base_folder, holds_adapters, model_folder_of, open_adapter, open_source
from rlsync.convert.targets import AdapterFolder, DistributedFolder, HfFolder, MegatronFolder, Output, Target, copied_bytes, reserve
from rlsync.copy.files import MappedTensors
from rlsync.copy.writes import check_sums, read_sums
from rlsync.errors import CheckpointError, ConfigError
from rlsync.layout.safetensors import CHECKSUMS
from rlsync.layout.topology import Topology
from rlsync.models import Flavour, check_config
from rlsync.models.base_keys import DTYPES

# Of what is written: Hugging Face files, Megatron's torch format, whose files are ranks', or its torch_dist, which has whole tensors.
Form = Literal["hf", "megatron", "torch_dist"]
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
        source: see ``rlsync.convert.sources.open_source``; ``model_folder`` as well. It may hold adapters alone; ``model_folder`` is then
            that of the model which they adapt.
        target: the folder to write; not there, or empty.
        form: of what is written.
        adapter: a folder with adapters of ``source``, which are converted in the place of its weights, or merged into them.
        merge_lora: weights are written, with the adapters added in fp32 and rounded once.
        topology: layout of Megatron's shards; counts with that form only.
        dtype: of the parameters that are written; None: as in the source.
        flavour: the spec that names Megatron's parameters; None: as in the source, of Hugging Face files "local".
        make_vocab_size_divisible_by: Megatron's vocabulary is padded to a multiple of this times TP.
        bucket_bytes: most bytes of a file that are copied before the journal says so, or the largest tensor.
        max_shard_bytes: most bytes of a Hugging Face file or one of torch_dist, but for a tensor that is larger.
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
    adapter: Path | None = None
    merge_lora: bool = False


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a conversion is: bytes that the disk has, of all; ``resumed`` were there when it began."""

    done_bytes: int
    total_bytes: int
    resumed_bytes: int


@dataclass(frozen=True, slots=True)
class Converted:
    """What was made: numbers and forms for a closing line, and what the user should look at."""

    source: Source
    output: Output
    num_files: int
    progress: Progress
    warnings: tuple[str, ...] = ()


def convert(
    request: Request, *, workers: int = 1, ranks: Ranks | None = None, report: Callable[[Progress], None] = lambda progress: None
) -> Converted:
    """Convert a checkpoint. An earlier conversion of the same that was stopped goes on from the last bucket that the disk has.

    Memory is a bucket in each of ``workers`` processes, and twice as much of fp32 where adapters are merged. ``report`` is called after
    every bucket. With several ``ranks``, of one host or of several that see the same files, each calls it and fills a share of the files;
    they return when the target is there.

    Raises, before a tensor is copied: what ``open_source`` raises; ConfigError for a layout that does not fit the model; CheckpointError
    where the target is there, another conversion is writing it, the disk has too little room, or files are no longer what a run wrote. What
    one rank raises is raised on all.
    """
    ranks = Ranks.alone() if ranks is None else ranks
    # A link to a folder of another disk is written there: no folder can be given the link's name.
    try:
        request = replace(request, target=request.target.resolve())
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{request.target}: it leads nowhere: {error}") from None
    with ranks.together(), ExitStack() as stack:
        source, output = prepare(request)
        targets = output.targets()
        planner = FilePlanner(source)
        # All of them, so that what is wrong is found before anything is written.
        plans = [planner.plan(target.placement, bucket_bytes=request.bucket_bytes) for target in targets]
        factors = None if source.merged is None else Factors(source.merged)
        warnings = _check_base(request, source) if ranks.is_first else ()
        identity = _identity(request, source)
        ranks.same("request", identity)
        _check_sums(source, ranks)
        if ranks.is_first:
            _check_target(request.target)
            _make_files(stack.enter_context(_working_folder(request.target)), targets, identity)
        ranks.wait("the files are made")
        journal = Journal(_working_path(request.target), ranks.rank)
        progress = Progress(journal.done_bytes, sum(map(copied_bytes, targets)), journal.done_bytes)
        report(progress)

        def told() -> None:
            nonlocal progress
            progress = replace(progress, done_bytes=journal.done_bytes)
            report(progress)

        mine = ranks.share([copied_bytes(target) for target in targets])
        for _ in _filled(request, targets, plans, factors, journal, mine, workers):
            ranks.check()
            told()

        def told_of_others() -> None:
            journal.read()
            told()

        ranks.wait("all is copied", told_of_others)
        if ranks.is_first:
            told_of_others()
            _end(output, targets, plans, journal, request.target)
        ranks.leave()
    return Converted(source, output, len(targets), progress, warnings)


def _check_sums(source: Source, ranks: Ranks) -> None:
    """Raise CheckpointError where files are no longer what a run wrote. A folder without sums is taken as it is."""
    path, files = source.folder / CHECKSUMS, set(source.files())
    if path.is_file():
        sums = [one for one in read_sums(path) if one.file in files]
        check_sums(sums[ranks.rank :: ranks.size], path)
    if source.merged is not None:
        _check_sums(source.merged, ranks)


def _check_base(request: Request, source: Source) -> tuple[str, ...]:
    """Warnings of what is not known of the base of adapters. Raises ConfigError where weights that lie beside adapters are not the base's,
    or there is no base to compare them with, and where adapters are merged into another model than the one that they name."""
    adapters = source if source.merged is None else source.merged
    if adapters.adapters is not None and adapters.form == "hf" and base_copies(adapters.adapters, adapters.folder):
        check_base(adapters, source if source.merged is not None else _base_of(request, adapters))
    warning = None if source.merged is None else check_named_base(source.merged, source)
    return () if warning is None else (warning,)


def _base_of(request: Request, adapters: Source) -> Source:
    """The weights that adapters are of which are converted alone."""
    beside = None if request.adapter is None else request.source
    for folder in (beside, request.model_folder, base_folder(adapters.base_name)):
        if folder is not None and (any(folder.glob("*.safetensors")) or folder == beside):
            return open_source(folder, request.model_folder)
    raise ConfigError(
        f"{adapters.folder} holds weights of the base beside its adapters, and there is no base to compare them with: name its folder by "
        "--model, or save the adapters with save_embedding_layers=False"
    )


def _end(output: Output, targets: Sequence[Target], plans: Sequence[FilePlan], journal: Journal, target: Path) -> None:
    """Write what lies beside the weights, and give the folder its name."""
    lacking = [
        file.path
        for index, file in enumerate(targets)
        if index not in journal.sealed or not {(index, n) for n in range(len(plans[index].buckets))} <= journal.buckets.keys()
    ]
    assert not lacking, f"never copied: {lacking}"
    output.finish(journal.folder / _STAGED)
    _sync(journal.folder / _STAGED)
    _publish(journal.folder / _STAGED, target)
    shutil.rmtree(journal.folder)


def prepare(request: Request) -> tuple[Source, Output]:
    """The checkpoint that is read, and what is to be made of it; reads headers only. Raises as :func:`convert`."""
    source = source_of(request)
    dtype = source.dtype() if request.dtype is None else request.dtype
    if dtype not in DTYPES:
        raise ConfigError(f"{request.source}: weights in {dtype} are not converted, only in {', '.join(DTYPES)}")
    if request.form == "hf":
        if source.adapters is not None:
            return source, AdapterFolder(source, dtype)
        if source.form != "hf" and not source.kept and not any(source.model_folder.glob("*.safetensors*")):
            kept = ", ".join(f"{name}*" for name in source.model.family.kept(source.model.values))
            if kept:
                raise CheckpointError(f"{source.folder}: shards hold no {kept}, which the model has; name a folder with them by --model")
        return source, HfFolder(source, dtype, request.max_shard_bytes)
    findings = check_config(json.loads(source.config_text), request.topology)
    if findings:
        raise ConfigError("; ".join(findings))
    if request.form == "torch_dist":
        if source.adapters is not None:
            raise ConfigError("torch_dist is written of weights; of adapters write Megatron's torch format, or merge them by --merge-lora")
        flavour: Flavour = request.flavour or source.flavour or "te"
        return source, DistributedFolder(source, dtype, flavour, request.make_vocab_size_divisible_by, request.max_shard_bytes)
    if "num_experts" not in source.model.dims and request.topology.etp_size not in (1, request.topology.tp_size):
        raise ConfigError(f"etp_size is {request.topology.etp_size}; {source.model.architecture} has no experts, so it must be 1")
    flavour = request.flavour or source.flavour or "local"
    if source.adapters is not None and flavour != "local":
        raise ConfigError("adapters are called as in spec local beside layers of either spec; leave --spec te out")
    return source, MegatronFolder(source, dtype, request.topology, flavour, request.make_vocab_size_divisible_by)


def source_of(request: Request) -> Source:
    """What a request reads: weights, adapters, or weights into which adapters are merged. Raises as :func:`convert`."""
    adapter: Path | None = request.adapter
    base: Path | None = request.source
    if adapter is None and holds_adapters(request.source):
        adapter, base = request.source, request.model_folder
    if adapter is None:
        if request.merge_lora:
            raise ConfigError(f"{request.source} holds no adapters to merge; name their folder by --adapter")
        return open_source(request.source, request.model_folder)
    if not request.merge_lora:
        return open_adapter(adapter, request.model_folder or (None if base is None else model_folder_of(base)))
    if base is None:
        base = base_folder(open_adapter(adapter).base_name)
    if base is None:
        raise ConfigError(f"{adapter} does not name a folder with the weights that it adapts; name them by --model")
    weights = open_source(base, request.model_folder)
    adapters = open_adapter(adapter, weights.model_folder)
    return replace(weights, merged=adapters)


class Journal:
    """Which files were made and sealed, and which buckets are on the disk. Several processes may add to one; each sees what it read and
    added."""

    def __init__(self, folder: Path, rank: int = 0) -> None:
        """``folder`` is the working folder of a conversion, ``rank`` this process among those that share it: each has a file of its own,
        because hosts do not append to one."""
        self.folder, self.rank = folder, rank
        self.made: dict[int, int] = {}
        self.sealed: set[int] = set()
        self.buckets: dict[tuple[int, int], int] = {}
        self.read()

    def read(self) -> None:
        """Take in what others have added."""
        for line in (line for path in self.folder.glob("journal*") for line in path.read_text().splitlines()):
            kind, *numbers = line.split(" ")
            if kind == "made" and len(numbers) == 3:
                self.made[int(numbers[0])] = int(numbers[1])
            elif kind == "sealed" and len(numbers) == 2:
                self.sealed.add(int(numbers[0]))
            elif kind == "bucket" and len(numbers) == 4:
                self.buckets[int(numbers[0]), int(numbers[1])] = int(numbers[2])

    @classmethod
    def open(cls, folder: Path, identity: str, files: Sequence[str]) -> Journal:
        """The journal of a working folder that is to hold ``files``. What was done for another request, or with other files, is removed,
        and so is what lacks a file that was made: disks for work in progress are swept of files that nobody has touched for a while."""
        request = folder / "request.json"
        if not request.is_file() or request.read_text() != identity or cls._is_damaged(folder, files):
            request.unlink(missing_ok=True)
            shutil.rmtree(folder / _STAGED, ignore_errors=True)
            for journal in folder.glob("journal*"):
                journal.unlink()
            (folder / _STAGED).mkdir()
            write_durably(request, identity)
        return cls(folder)

    @property
    def done_bytes(self) -> int:
        return sum(self.buckets.values())

    @classmethod
    def _is_damaged(cls, folder: Path, files: Sequence[str]) -> bool:
        """Whether a file, or the line that says that it was made, is not there any more, or not whole; or a line is not what ``_add``
        writes."""
        try:
            journal = cls(folder)
            paths = {folder / _STAGED / files[target]: nbytes for target, nbytes in journal.made.items()}
        except (ValueError, IndexError):
            return True
        is_lost = any(not path.is_file() or path.stat().st_size != nbytes for path, nbytes in paths.items())
        return is_lost or not {target for target, _ in journal.buckets} <= journal.made.keys()

    def add_made(self, target: int, nbytes: int) -> None:
        self.made[target] = nbytes
        self._add(f"made {target} {nbytes}")

    def add_sealed(self, target: int) -> None:
        self.sealed.add(target)
        self._add(f"sealed {target}")

    def add_bucket(self, target: int, bucket: int, nbytes: int) -> None:
        self.buckets[target, bucket] = nbytes
        self._add(f"bucket {target} {bucket} {nbytes}")

    def _add(self, line: str) -> None:
        with (self.folder / ("journal" if self.rank == 0 else f"journal.{self.rank}")).open("ab", buffering=0) as stream:
            # In one write, which others' do not come between; a line that was cut has no full stop.
            stream.write(f"\n{line} .\n".encode())
            os.fsync(stream.fileno())


def _identity(request: Request, source: Source) -> str:
    """All that decides what a file of a conversion is to hold."""
    files = {str(path): [path.stat().st_size, path.stat().st_mtime_ns] for path in source.files()}
    said = {**asdict(request), "rlsync": __version__, "torch": torch.__version__, "config": source.config_text, "files": files}
    said["adapters"] = repr([each.adapters.spec for each in (source, source.merged) if each is not None and each.adapters is not None])
    return json.dumps({key: str(value) if isinstance(value, Path) else value for key, value in said.items()}, indent=1)


def _check_target(target: Path) -> None:
    if target.is_mount():
        raise CheckpointError(f"{target} is where a disk is mounted, and no folder can be given its name; choose a folder in it")
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise CheckpointError(f"{target} is there and not an empty folder; choose another, or remove it")


def _working_path(target: Path) -> Path:
    return target.absolute().parent / f".{target.name}.conversion"


@contextmanager
def _working_folder(target: Path) -> Iterator[Path]:
    """``.NAME.conversion`` beside the target, for this process alone. It stays where the conversion does not end."""
    folder = _working_path(target)
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


def _make_files(folder: Path, targets: Sequence[Target], identity: str) -> None:
    """Make the files that were not made, and keep room for them. Raises CheckpointError where the disk has too little."""
    journal = Journal.open(folder, identity, [target.path for target in targets])
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
        journal.add_made(index, file.stat().st_size)


def _filled(
    request: Request,
    targets: Sequence[Target],
    plans: Sequence[FilePlan],
    factors: Factors | None,
    journal: Journal,
    numbers: Sequence[int],
    workers: int,
) -> Iterator[None]:
    """Fill some of the files, as far as the journal says that they are not; yields when it has more."""
    left = [number for number in numbers if number not in journal.sealed]
    if workers == 1:
        for index in left:
            for _ in _copy_part(targets[index], plans[index], factors, journal, index, 0, 1):
                yield
            _seal(targets[index], journal, index)
        return
    # A file is divided among workers where there are fewer files.
    parts = -(-workers // max(1, len(left)))
    with ProcessPoolExecutor(workers, get_context("spawn"), initializer=_begin_worker, initargs=(os.getpid(),)) as pool:
        stages: tuple[list[Future[None]], ...] = ([], [])
        try:
            stages[0].extend(
                pool.submit(_worker_part, request, journal.folder, journal.rank, index, part, parts)
                for index in left
                for part in range(parts)
            )
            yield from _ended(stages[0], journal)
            stages[1].extend(pool.submit(_worker_seal, request, journal.folder, journal.rank, index) for index in left)
            yield from _ended(stages[1], journal)
        finally:
            pool.shutdown(cancel_futures=True)


def _ended(tasks: Iterable[Future[None]], journal: Journal) -> Iterator[None]:
    """Wait for tasks of workers; yields from time to time, when the journal has been read."""
    left = set(tasks)
    while left:
        done, left = wait(left, timeout=_REPORT_S, return_when=FIRST_EXCEPTION)
        for task in done:
            task.result()
        journal.read()
        yield


def _begin_worker(parent: int) -> None:
    # Whoever goes on after a kill must be alone.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    torch.set_num_threads(1)


@cache
def _prepared(request: Request) -> tuple[FilePlanner, tuple[Target, ...], Factors | None]:
    """Of a worker process, which lives as long as the conversion."""
    source, output = prepare(request)
    return FilePlanner(source), output.targets(), None if source.merged is None else Factors(source.merged)


def _worker_part(request: Request, folder: Path, rank: int, index: int, part: int, parts: int) -> None:
    planner, targets, factors = _prepared(request)
    plan = planner.plan(targets[index].placement, bucket_bytes=request.bucket_bytes)
    for _ in _copy_part(targets[index], plan, factors, Journal(folder, rank), index, part, parts):
        pass


def _worker_seal(request: Request, folder: Path, rank: int, index: int) -> None:
    _seal(_prepared(request)[1][index], Journal(folder, rank), index)


def _copy_part(
    target: Target, plan: FilePlan, factors: Factors | None, journal: Journal, index: int, part: int, parts: int
) -> Iterator[None]:
    """Copy one in ``parts`` of the buckets of a file that the journal lacks; yields when the disk has one, and the journal says so."""
    left = [number for number in range(part, len(plan.buckets), parts) if (index, number) not in journal.buckets]
    if not left:
        return
    written = MappedTensors(target.stored(journal.folder / _STAGED / target.path), writable=True)
    read = plan.load.open()
    for number in left:
        fill_bucket(plan, number, read, written, factors)
        for mapped in (written, *read, *(() if factors is None else (factors,))):
            mapped.let_pages_go()
        journal.add_bucket(index, number, plan.nbytes(number))
        yield


def _seal(target: Target, journal: Journal, index: int) -> None:
    """Write what depends on all elements of a file. Durable."""
    file = journal.folder / _STAGED / target.path
    target.seal(file)
    with file.open("rb") as stream:
        os.fsync(stream.fileno())
    journal.add_sealed(index)


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
