"""What runs of every kind have in common: set-up, the loop of steps, checkpoints, validations, and the end of every process.

Owns their order. A kind of run (``grpo_runner``, ``sft_runner``) says what is prepared, how its actor starts, and what one step is.
"""

from __future__ import annotations

import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch

from rlsync.bridge.checkpoint_folder import latest_checkpoint, publish_checkpoint, remove_remains, set_aside_later, stage_checkpoint
from rlsync.cli.lines import wrapped
from rlsync.errors import CheckpointError, GradientError, RlsyncError
from rlsync.sync import SyncReport
from workers.actor import ActorRank
from workers.cluster import Cluster
from workers.colocation import Colocation
from workers.config import AnyConfig, config_as_dict
from workers.metrics_log import MetricsLog, Plot, check_loggers
from workers.results import ResultsFolder
from workers.resume import DATA_STATE, Beginning, find_beginning, note_on_ranks, write_settings
from workers.screen import Columns, Screen
from workers.worker_group import WorkerGroup


class Prepared(Protocol):
    """Inputs of a run, read and checked before any process starts."""

    @property
    def beginning(self) -> Beginning: ...

    @property
    def hf_config(self) -> Mapping[str, Any]: ...

    @property
    def notes(self) -> tuple[str, ...]: ...

    @property
    def num_steps(self) -> int:
        """Steps that the data has."""
        ...


ConfigT = TypeVar("ConfigT", bound=AnyConfig)
PreparedT = TypeVar("PreparedT", bound=Prepared)


class Runner(ABC, Generic[ConfigT, PreparedT]):
    """One run. ``run`` starts all processes, trains, and ends every process that it started, whatever the outcome.

    Attributes:
        NAME: of the run, beside the progress bar.
        RANK: the class of its actor's ranks.
        COLUMNS: the line of a step.
        PLOT: what is drawn of the run.
    """

    NAME: str
    RANK: type[ActorRank]
    COLUMNS: Columns
    PLOT: Plot

    def __init__(self, config: ConfigT) -> None:
        self._config = config
        self._connected = False
        # Step and staged folder of a checkpoint that ranks are writing while training goes on.
        self._unpublished: tuple[int, Path] | None = None

    def run(self) -> None:
        """Train until the last step or a KeyboardInterrupt; no process is left either way.

        Raises RlsyncError (ConfigError or CheckpointError before any process is started, where that can be).
        """
        config, beginning = self._config, find_beginning(self._config)
        most = config.runner.max_steps
        if 0 <= most <= beginning.step:
            done = "" if beginning.resume is None else f" and {beginning.resume} has done {beginning.step} steps"
            print(wrapped(f"runner.max_steps is {most}{done}: there is nothing to do, and nothing was started"))
            return
        check_loggers(config.runner.logger)
        with ExitStack() as stack:
            self._results = stack.enter_context(ResultsFolder(config, beginning.resume))
            for note in (*beginning.notes, *self._results.notes):
                print(wrapped(note), flush=True)
            self._prepared = self._prepare(beginning)
            all_steps = self._prepared.num_steps
            self._total = all_steps if most < 0 else min(most, all_steps)
            self._screen = stack.enter_context(Screen(self._total, self.COLUMNS, name=self.NAME, start_step=beginning.step))
            for note in self._prepared.notes:
                self._screen.note(note)
            if self._total <= beginning.step:
                self._screen.note(f"all {self._total} steps of the data are done: there is nothing to do, and nothing was started")
                return
            self._enter(stack)
            with self._coming_up("Ray"):
                cluster = stack.enter_context(Cluster.start(config.cluster.num_nodes, log_folder=self._log_folder()))
            try:
                self._group = stack.enter_context(WorkerGroup(config, cluster, self.RANK))
                if (on_ranks := note_on_ranks(self._prepared.beginning, self._group.topology.world_size)) is not None:
                    self._screen.note(on_ranks)
                self._screen.note(f"starting {self._group.description}")
                self._start()
                self._train(stack.enter_context(self._open_log()))
            except RlsyncError:
                self._screen.note(f"failed; the workers' logs are in {cluster.logs}")
                raise

    # What a kind of run says.

    @abstractmethod
    def _prepare(self, beginning: Beginning) -> PreparedT:
        """Read and check the inputs. Raises ConfigError or CheckpointError."""

    def _enter(self, stack: ExitStack) -> None:
        """Start processes of the run's own, which end with the stack."""

    @abstractmethod
    def _start(self) -> None:
        """Start-up before the first step: processes, weights, optimizer."""

    @abstractmethod
    def _step(self, step: int, seconds: dict[str, float]) -> tuple[dict[str, float], list[dict[str, float]]]:
        """One step: its metrics, and those of each optimizer update (``MetricsLog.log``); seconds of its phases go to ``seconds``."""

    @abstractmethod
    def _speeds(self, metrics: Mapping[str, float], seconds: Mapping[str, float]) -> dict[str, float]:
        """Tokens per second of a step."""

    @abstractmethod
    def _data_state(self) -> Mapping[str, Any]:
        """Position in the data after the last step, which ``torch.load`` may read with ``weights_only``."""

    def _validate(self, step: int) -> dict[str, float]:
        """``val/*`` metrics with the weights after ``step``. Training goes on as without it: no position in the data, seed or random
        state is another one afterwards."""
        return {}

    @property
    def _updates_per_step(self) -> int:
        return 1

    # Set-up.

    def _start_workers(self, *, load_initial: bool, engines_up: Callable[[], None] = lambda: None) -> None:
        """Start engines and actor. Where they take turns on their GPUs, ``engines_up`` is called before the engines sleep."""
        self._screen.phase("starting engines and actor" if self._config.has_engines else "starting actor")
        self._colocation = Colocation(self._group.colocation_plan, self._group)
        for note in self._group.colocation_plan.notes:
            self._screen.note(note)

        def engines_first() -> None:
            engines_up()
            self._colocation.first_sleep()

        self._group.start(
            load_initial=load_initial,
            engines_first=engines_first if self._colocation.alternate else None,
            on_ready=self._screen.component,
        )

    def _begin(self) -> None:
        """Create the optimizer, and load the checkpoint to resume."""
        beginning = self._prepared.beginning
        resume = beginning.resume
        with self._coming_up("optimizer" if resume is None else "optimizer and checkpoint"):
            self._on_ranks("begin", None if resume is None else str(resume / "actor"), "actor.seed" not in beginning.changed)

    @contextmanager
    def _coming_up(self, name: str) -> Iterator[None]:
        self._screen.phase(f"starting {name}")
        began = time.monotonic()
        yield
        self._screen.component(name, time.monotonic() - began)

    def _open_log(self) -> MetricsLog:
        """The log of this run. Metrics and checkpoints of steps that a resumed run repeats are kept aside."""
        config, start_step = self._config, self._prepared.beginning.step
        log = MetricsLog(
            config.runner.logger, config_as_dict(config), self.PLOT, n_minibatches=self._updates_per_step, start_step=start_step
        )  # fmt: skip
        for note in log.notes:
            self._screen.note(note)
        if remains := remove_remains(self._results.path / "checkpoints"):
            self._screen.note(f"removed what killed saves had left: {', '.join(path.name for path in remains)}")
        for path in set_aside_later(self._results.path / "checkpoints", start_step):
            self._screen.note(f"a checkpoint of a step that this run repeats is set aside: {path}")
        return log

    def _log_folder(self) -> Path | None:
        logger = self._config.runner.logger
        assert logger.log_path is not None, "load_config derives it"
        return Path(logger.log_path).absolute() / "worker_logs" if self._config.runner.per_worker_log else None

    def _synced(self, version: int, seconds: dict[str, float]) -> SyncReport:
        """Connect the engines where they are not, and sync them; they can answer then."""
        self._colocation.before_sync()
        if not self._connected:
            with self._coming_up("connection"):
                self._group.connect()
            self._connected = True
        self._screen.phase("sync")
        with timed(seconds, "time/sync_weights"):
            report: SyncReport = self._on_ranks("sync", version)[0]
        self._colocation.after_sync()
        return report

    # The loop.

    def _train(self, log: MetricsLog) -> None:
        self._log, title = log, "failed"
        try:
            if self._prepared.beginning.step == 0 and self._validates(0):
                self._screen.validation(0, log.log(0, self._timed_validation(0)))
            for step in range(self._prepared.beginning.step + 1, self._total + 1):
                self._whole_step(step, log)
            if self._unpublished is not None:
                self._screen.phase("save")
                self._publish()
            title = "finished"
        except (KeyboardInterrupt, SystemExit):
            title = "interrupted"
            raise
        finally:
            if self._unpublished is not None:
                self._screen.note(f"checkpoint {self._unpublished[0]} is not complete; those before it are")
            if log.history:
                self._screen.summary(log.history, log.folder, title=title)
            if title != "finished":
                self._screen.note(self._way_on())

    def _way_on(self) -> str:
        """What a run that ended early goes on from."""
        newest = latest_checkpoint(self._results.path / "checkpoints")
        if newest is None:
            return f"no checkpoint is complete in {self._results.path}: a start begins anew"
        return f"runner.resume_dir=auto goes on after {newest.name} in {newest.parent}"

    def _whole_step(self, step: int, log: MetricsLog) -> None:
        """One step with its checkpoint and its validation, if due, and its line in all logs."""
        seconds: dict[str, float] = {}
        try:
            with timed(seconds, "time/step"):
                metrics, updates = self._step(step, seconds)
                with timed(seconds, "time/memory"):
                    memory = self._group.memory()
        except GradientError as error:
            raise GradientError(f"step {step}: {error}") from error
        # One save at a time: the copies of all are in the same memory.
        is_written = self._unpublished is not None and (self._saves(step) or all(self._on_ranks("is_saved")))
        if is_written or self._saves(step):
            self._screen.phase("save")
            with timed(seconds, "time/save"):
                if is_written:
                    self._publish()
                if self._saves(step):
                    self._save(step)
        validation: dict[str, float] = {}
        try:
            if self._validates(step):
                validation = self._timed_validation(step)
        finally:
            # Also where the validation fails: the step's checkpoint is complete by then, and a resume goes on behind it.
            speeds = self._speeds(metrics, seconds)
            self._screen.step(step, log.log(step, {**metrics, **speeds, **memory, **seconds, **validation}, updates))
        if validation:
            self._screen.validation(step, validation)

    def _validates(self, step: int) -> bool:
        """Whether a validation follows this step; step 0 is before the first one."""
        runner = self._config.runner
        due = self._is_due(step, runner.val_check_interval) if step else runner.val_before_train
        return due and bool(self._config.data.val_data_paths)

    def _timed_validation(self, step: int) -> dict[str, float]:
        seconds: dict[str, float] = {}
        self._screen.phase("validation")
        with timed(seconds, "time/validation"):
            metrics = self._validate(step)
        return {**metrics, **seconds}

    def _saves(self, step: int) -> bool:
        return self._is_due(step, self._config.runner.save_interval)

    def _is_due(self, step: int, interval: int) -> bool:
        """Whether something that is done every ``interval`` steps and at the last one is done after this step."""
        return interval > 0 and (step % interval == 0 or step == self._total)

    def _save(self, step: int) -> None:
        """Write a checkpoint, or with ``actor.megatron.async_save`` begin to: ranks write it while training goes on."""
        with self._writing(step) as root:
            staged = stage_checkpoint(root, step)
            self._on_ranks("save", str(staged / "actor"), step)
            (staged / DATA_STATE).parent.mkdir()
            save_durably(self._data_state(), staged / DATA_STATE)
            write_settings(staged, self._config, self._prepared.hf_config, self._group.topology.world_size)
        self._unpublished = step, staged
        if not self._config.actor.megatron.async_save:
            self._publish()

    def _publish(self) -> None:
        """Give the checkpoint that was written last its name, when all of it is on the disk."""
        assert self._unpublished is not None, "save first"
        step, staged = self._unpublished
        with self._writing(step):
            if self._config.actor.megatron.async_save:
                self._on_ranks("finish_save")
            publish_checkpoint(staged, keep_last_n=self._config.runner.keep_last_n)
        self._unpublished = None

    @contextmanager
    def _writing(self, step: int) -> Iterator[Path]:
        root = self._results.path / "checkpoints"
        try:
            yield root
        except OSError as error:
            raise CheckpointError(
                f"checkpoint {step} cannot be written to {root}: {error.strerror}; the checkpoints before it are complete"
            ) from error

    def _on_ranks(self, method: str, *arguments: object) -> list:
        return self._group.on_ranks(method, *arguments)


def save_durably(content: Any, path: Path) -> None:
    """``torch.save``; the disk has the file when this returns, as the name of its checkpoint is there soon."""
    with path.open("wb") as stream:
        torch.save(content, stream)
        stream.flush()
        os.fsync(stream.fileno())


@contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Put the seconds of the block under ``name``, also where it fails."""
    began = time.monotonic()
    try:
        yield
    finally:
        seconds[name] = time.monotonic() - began
