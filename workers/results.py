"""The results folder of a run: used by one run at a time, never overwriting an earlier run.

Owns the lock, the rule when a start continues in place and when it renames an earlier run, and the names of renamed files.
Knows no metric and no Ray.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import IO

from rlsync.errors import ConfigError
from workers.config import AnyConfig, RunConfig
from workers.judges import function_of
from workers.resume import run_folder

METRICS_FILE = "metrics.jsonl"
_PROBE_BYTES = 2**16


class ResultsFolder:
    """The results folder of one run, claimed: no other run can start in it until ``close``. Use as a context manager.

    Attributes:
        path: ``<output_dir>/<experiment_name>``.
        in_place: the run continues a checkpoint of this folder.
        notes: what the user should know.
    """

    def __init__(self, config: AnyConfig, resume: Path | None) -> None:
        """Claim the folder. Unless the run continues in place, the folder of an earlier run is renamed to ``<path>.<n>``.

        Args:
            resume: ``global_step_N`` folder that the run continues from, or None.

        Raises:
            ConfigError: the folder cannot be written, another run is in it, or this run reads files that would be set aside.
        """
        self.path = run_folder(config)
        self.in_place = continues_in_place(config, resume)
        self.notes: tuple[str, ...] = ()
        self._lock = _locked(self.path)
        try:
            aside = becomes_of_earlier_run(config, resume)
            if aside is not None:
                self._set_aside(aside)
            for folder, key in places_of_results(config).items():
                _probe(folder, key)
        except BaseException:
            self._lock.close()
            raise

    def __enter__(self) -> ResultsFolder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Release the folder. Idempotent."""
        self._lock.close()

    def _set_aside(self, aside: Path) -> None:
        os.rename(self.path, aside)
        self.notes = (f"an earlier run is set aside: {self.path} is now {aside}",)
        # A conversion says itself what it was made from, and takes long.
        converted = Path("converted_ckpts")
        if (aside / converted).is_dir():
            self.path.mkdir()
            os.rename(aside / converted, self.path / converted)


def continues_in_place(config: AnyConfig, resume: Path | None) -> bool:
    """Whether ``resume`` is a checkpoint of this run's own results folder."""
    return resume is not None and resume.resolve().parent == (run_folder(config) / "checkpoints").resolve()


def becomes_of_earlier_run(config: AnyConfig, resume: Path | None) -> Path | None:
    """The new path of an earlier run that a start would rename; None without an earlier run, or if it continues. Changes nothing.

    Raises ConfigError where that cannot be.
    """
    folder, log_path = run_folder(config), _log_path(config)
    if continues_in_place(config, resume):
        return None
    if not log_path.resolve().is_relative_to(folder.resolve()) and _holds_lines(log_path / METRICS_FILE):
        raise ConfigError(f"runner.logger.log_path {log_path} holds {METRICS_FILE} of another run; name another folder, or move the file")
    if not _is_used(folder, log_path):
        return None
    inputs = [path for path in _inputs(config, resume) if path.resolve().is_relative_to(folder.resolve())]
    if inputs:
        raise ConfigError(
            f"{folder} holds an earlier run, which a fresh start sets aside, but this run reads {inputs[0]} in it; set another "
            "runner.experiment_name, or runner.resume_dir to continue the earlier run"
        )
    return next_free(folder)


def next_free(path: Path, suffix: str = "") -> Path:
    """``<path>.<n><suffix>`` for the smallest n from 1 on that is not taken."""
    number = 1
    while (free := path.with_name(f"{path.name}.{number}{suffix}")).exists():
        number += 1
    return free


def places_of_results(config: AnyConfig) -> dict[Path, str]:
    """Folders that a run writes to, and the key of each."""
    return {_log_path(config): "runner.logger.log_path", run_folder(config): "runner.output_dir"}


def _log_path(config: AnyConfig) -> Path:
    assert config.runner.logger.log_path is not None, "load_config derives it"
    return Path(config.runner.logger.log_path).absolute()


def _locked(folder: Path) -> IO[str]:
    """A lock beside ``folder``, held until it is closed; not inherited by child processes."""
    path = folder.with_name(f".{folder.name}.lock")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+")
    except OSError as error:
        raise _unwritable(folder.parent, error, "runner.output_dir") from error
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        owner = file.read().strip()
        file.close()
        raise ConfigError(f"{folder} is in use by a run ({owner}); wait for it, or set another runner.experiment_name") from None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file


def _probe(folder: Path, key: str) -> None:
    """Raise ConfigError unless ``folder`` exists or can be made, and takes a file of a few kilobytes."""
    probe = folder / ".probe"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with probe.open("wb") as file:
            file.write(bytes(_PROBE_BYTES))
            file.flush()
            os.fsync(file.fileno())
        probe.unlink()
    except OSError as error:
        probe.unlink(missing_ok=True) if folder.is_dir() else None
        raise _unwritable(folder, error, key) from error


def check_writable(folder: Path, key: str = "runner.output_dir") -> None:
    """Raise ConfigError where a run could not make or write ``folder``, which ``key`` names; changes nothing."""
    nearest = next(path for path in (folder, *folder.parents) if path.exists())
    if not nearest.is_dir():
        raise _unwritable(folder, NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR)), key)
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise _unwritable(folder, PermissionError(errno.EACCES, os.strerror(errno.EACCES)), key)


def _unwritable(folder: Path, error: OSError, key: str) -> ConfigError:
    return ConfigError(f"results cannot be written to {folder}: {error.strerror}; set {key} to another folder")


def _is_used(folder: Path, log_path: Path) -> bool:
    """Whether a run left metrics or checkpoints, complete or not. Logs of a failed start do not count."""
    checkpoints = folder / "checkpoints"
    return any(_holds_lines(place / METRICS_FILE) for place in (folder, log_path)) or (checkpoints.is_dir() and any(checkpoints.iterdir()))


def _holds_lines(path: Path) -> bool:
    return path.is_file() and path.stat().st_size > 0


def _inputs(config: AnyConfig, resume: Path | None) -> Sequence[Path]:
    """Input files and folders that the run does not make itself."""
    made = [Path(section.path).absolute() for section in (config.arithmetic, config.pictures, config.seeded_model) if section is not None]
    actor, seeded = config.actor, config.seeded_model
    function = function_of(config.reward.reward_type) if isinstance(config, RunConfig) else None
    named = [
        config.model_path, actor.tokenizer.tokenizer_model, actor.megatron.ckpt_convertor.hf_model_path,
        actor.model.megatron_checkpoint, actor.lora.adapter_path, None if seeded is None else seeded.tokenizer,
        None if function is None else function[0], *config.data_paths,
    ]  # fmt: skip
    paths = [Path(name).absolute() for name in named if name is not None] + ([] if resume is None else [resume])
    return [path for path in paths if not any(path.is_relative_to(folder) for folder in made)]
