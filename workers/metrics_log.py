"""Metrics of a run on disk and in loggers: ``metrics.jsonl``, ``config.yaml``, a plot, TensorBoard, wandb, swanlab, Prometheus.

Owns file names, step numbering and the loggers. Knows nothing of how a number came about (``metrics``, ``algorithms``) or of the screen
(``screen``). Loggers are imported only when named, and prometheus_client, which comes with Ray and vLLM, only where a port is configured.
"""

from __future__ import annotations

import errno
import importlib.util
import json
import math
import os
import re
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

from omegaconf import OmegaConf

from rlsync.errors import ConfigError, RlsyncError
from workers.config.schema import LoggerConfig
from workers.results import METRICS_FILE, next_free

CONFIG_FILE = "config.yaml"
TRAINING_PREFIX = "actor/training/"
# Where another module than the logger's own package is used, which has the name of the logger.
_LOGGER_MODULES = {"tensorboard": "torch.utils.tensorboard"}


@dataclass(frozen=True, slots=True)
class Plot:
    """A picture of a run: these metrics over the steps, those that any step has."""

    file: str
    names: tuple[str, ...]
    label: str


REWARDS = Plot("rewards.png", ("rollout/reward_scores", "val/reward"), "mean reward")
LOSSES = Plot("losses.png", ("train/lm_loss", "val/loss"), "mean loss of a token")


class MetricsLogger(Protocol):
    """A destination of metrics."""

    def log(self, metrics: Mapping[str, float], step: int) -> None: ...

    def close(self) -> None: ...


class MetricsLog:
    """All metrics of a run. Use as a context manager, or ``close()``. ``notes`` say what was kept aside.

    ``metrics.jsonl`` holds one object per step, complete once ``log`` has returned, so a killed run loses nothing.
    """

    def __init__(
        self, config: LoggerConfig, resolved: Mapping[str, Any], plot: Plot = REWARDS, *, n_minibatches: int = 1, start_step: int = 0
    ) -> None:
        """
        Args:
            config: ``runner.logger``, with ``log_path`` and ``experiment_name`` derived.
            resolved: the whole configuration as plain containers, written to ``config.yaml`` and given to loggers.
            plot: drawn when the log is closed.
            n_minibatches: optimizer updates per step; loggers number those from 1, not the steps. What is known before them is at 0.
            start_step: step a resumed run continues after; lines of later steps move to ``metrics.<n>.jsonl``, and another
                ``config.yaml`` to ``config.yaml.<n>``.

        Raises:
            ConfigError: a logger that is named is not installed, the port cannot be bound, or a file of the folder cannot be read. The
                files of an earlier run are as they were then, and nothing stays open.
        """
        assert config.log_path is not None, "load_config derives log_path"
        self.folder = Path(config.log_path)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._n_minibatches, self._plot = n_minibatches, plot
        self.notes: tuple[str, ...] = ()
        lines = read_metrics(self.folder)
        check_loggers(config)
        self._exporter = PrometheusExporter(config.prometheus_host, config.prometheus_port) if config.prometheus_port else None
        self._loggers: list[MetricsLogger] = [] if self._exporter is None else [self._exporter]
        try:
            # TensorBoard last: its writer changes what is shown of an earlier run, and only the others may fail for want of a network.
            for name in sorted(config.logger_backends, key="tensorboard".__eq__):
                self._loggers.append(
                    _open_logger(name, config, self.folder, resolved, start_step * n_minibatches + 1 if start_step else None)
                )
        except BaseException:
            for logger in self._loggers:
                logger.close()
            raise
        self._history = [line for line in lines if line["step"] <= start_step]
        self._keep_aside([line for line in lines if line["step"] > start_step])
        self._write_config(resolved)
        self._rewrite()
        # Without a buffer, in which a line that could not be written would wait for the next one.
        self._file = (self.folder / METRICS_FILE).open("ab", buffering=0)

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    @property
    def history(self) -> Sequence[Mapping[str, Any]]:
        """One mapping per step so far, those before a resume included; ``step`` is among its keys."""
        return self._history

    def log(self, step: int, metrics: Mapping[str, float], training: Sequence[Mapping[str, float]] = ()) -> dict[str, float]:
        """Write one step.

        Args:
            step: 1 for the first step; 0 for what is known before it.
            metrics: names to numbers.
            training: metrics of each optimizer update without the prefix ``actor/training/``. ``metrics.jsonl`` gets
                their mean; loggers get each one at index ``(step - 1) * n_minibatches + i + 1``, and ``metrics`` at the last of these,
                ``step * n_minibatches``: each index once and in order, as some loggers merge what comes to one twice.

        Returns:
            The object written, without ``step``.
        """
        updates = [{f"{TRAINING_PREFIX}{name}": value for name, value in update.items()} for update in training]
        written = {**metrics, **_means(updates)}
        record = {"step": step, **{name: _json_number(value) for name, value in written.items()}}
        self._history.append(record)
        self._append(json.dumps(record) + "\n")
        last = step * self._n_minibatches
        by_index = dict(enumerate(updates, start=last - self._n_minibatches + 1))
        by_index[last] = {**by_index.get(last, {}), **metrics}
        for logger in self._loggers:
            for index, numbers in by_index.items():
                logger.log(numbers, index)
        return written

    def show(self, metrics: Mapping[str, float]) -> None:
        """Export metrics that belong to no step, such as those of a failed sync, to Prometheus."""
        if self._exporter is not None:
            self._exporter.show(metrics)

    def close(self) -> None:
        """Draw the plot and close files and loggers. Idempotent."""
        if self._file.closed:
            return
        self._file.close()
        # The last that is pushed is the first; each also where one before it fails, as for want of a network.
        with ExitStack() as stack:
            stack.callback(self._draw)
            for logger in reversed(self._loggers):
                stack.callback(logger.close)

    def _draw(self) -> None:
        with _explained(self.folder / self._plot.file):
            draw(self._history, self._plot, self.folder / self._plot.file)

    def _append(self, line: str) -> None:
        data = line.encode()
        with _explained(self.folder / METRICS_FILE):
            if self._file.write(data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _keep_aside(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Copy lines of repeated steps to ``metrics.<n>.jsonl`` before ``_rewrite`` drops them."""
        if not lines:
            return
        aside = next_free(self.folder / "metrics", ".jsonl")
        _write_whole(aside, lines)
        self.notes += (f"metrics of steps {lines[0]['step']} to {lines[-1]['step']}, which this run repeats, are kept in {aside}",)

    def _write_config(self, resolved: Mapping[str, Any]) -> None:
        path, text = self.folder / CONFIG_FILE, OmegaConf.to_yaml(OmegaConf.create(_plain(resolved)))
        if path.is_file() and path.read_text(encoding="utf-8") != text:
            os.rename(path, next_free(path))
        path.write_text(text, encoding="utf-8")

    def _rewrite(self) -> None:
        """Reduce ``metrics.jsonl`` to the history."""
        _write_whole(self.folder / METRICS_FILE, self._history)


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RlsyncError(f"{path} cannot be written: {error.strerror}; what was written before is complete") from error


def read_metrics(folder: str | Path) -> list[dict[str, Any]]:
    """The lines of ``metrics.jsonl`` in a results folder; empty when there is none. A half-written last line is left out."""
    path = Path(folder) / METRICS_FILE
    if not path.is_file():
        return []
    lines = [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
    return [_parsed(line, f"{path}:{number}") for number, line in enumerate(lines, start=1)]


def _parsed(line: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
        return {**record, "step": int(record["step"])}
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{where} is no line of metrics ({type(error).__name__}: {error}); move the file away to begin another"
        ) from error


def _write_whole(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """Write a file atomically: after a kill it has the old content or the new."""
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write("".join(json.dumps(line) + "\n" for line in lines))
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def draw(history: Sequence[Mapping[str, Any]], plot: Plot, path: Path) -> None:
    """Plot metrics over steps; no file if no step reported one."""
    curves = {name: [(line["step"], line[name]) for line in history if line.get(name) is not None] for name in plot.names}
    if not any(curves.values()):
        return
    # The object interface without pyplot: no global state, and no display is looked for.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, points in curves.items():
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name)
    axes.set(xlabel="step", ylabel=plot.label)
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


class _TensorBoard:
    def __init__(self, folder: Path, purge_index: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # What a resumed run repeats is hidden then; the events stay in their files.
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=purge_index)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    def __init__(self, wandb: Any, config: LoggerConfig, folder: Path, resolved: Mapping[str, Any]) -> None:
        settings = None if config.wandb_proxy is None else wandb.Settings(https_proxy=config.wandb_proxy)
        self._run = wandb.init(
            project=config.project_name,
            name=config.experiment_name,
            entity=config.wandb_entity,
            dir=str(folder),
            config=_plain(resolved),
            settings=settings,
        )

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        self._run.finish()


class _Swanlab:
    def __init__(self, swanlab: Any, config: LoggerConfig, folder: Path, resolved: Mapping[str, Any]) -> None:
        self._swanlab = swanlab
        swanlab.init(
            project=config.project_name,
            experiment_name=config.experiment_name,
            mode=config.swanlab_mode,
            logdir=str(folder / "swanlab"),
            config=_plain(resolved),
        )

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self._swanlab.log(dict(metrics), step=step)

    def close(self) -> None:
        self._swanlab.finish()


def check_loggers(config: LoggerConfig) -> None:
    """Import every logger that is named, before anything is written. Raises ConfigError."""
    for name in config.logger_backends:
        _import_logger(name)


def find_logger(name: str) -> None:
    """Look for the package of a logger and import nothing. Raises ConfigError."""
    if importlib.util.find_spec(name) is None:
        raise _missing(name, "it is not installed")


def _import_logger(name: str) -> Any:
    try:
        return importlib.import_module(_LOGGER_MODULES.get(name, name))
    except ImportError as error:
        raise _missing(name, str(error)) from error


def _missing(name: str, reason: str) -> ConfigError:
    return ConfigError(f"runner.logger.logger_backends names {name}, which cannot be imported ({reason}): pip install {name}, or remove it")


def _open_logger(name: str, config: LoggerConfig, folder: Path, resolved: Mapping[str, Any], purge_index: int | None) -> MetricsLogger:
    module = _import_logger(name)
    if name == "tensorboard":
        return _TensorBoard(folder, purge_index)
    return (_Wandb if name == "wandb" else _Swanlab)(module, config, folder, resolved)


def _means(updates: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Means over the updates that have a number: a skipped update has no gradient norm."""
    if not updates:
        return {}
    numbers = {name: [update[name] for update in updates if not math.isnan(update[name])] for name in updates[0]}
    return {name: sum(values) / len(values) if values else math.nan for name, values in numbers.items()}


def _json_number(value: float) -> float | None:
    """JSON has no nan and no infinity; null says that there is no number."""
    return value if math.isfinite(value) else None


def _plain(value: Any) -> Any:
    """Nested containers as dicts and lists, which OmegaConf, wandb and swanlab all take."""
    if isinstance(value, Mapping):
        return {str(name): _plain(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return value


if TYPE_CHECKING:
    from prometheus_client import Gauge

_PREFIX = "rlsync_"


def check_exporter(host: str, port: int) -> None:
    """Raise ConfigError unless an exporter could listen there now."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise _cannot_listen(host, port, error) from error


def _cannot_listen(host: str, port: int, error: OSError) -> ConfigError:
    return ConfigError(f"runner.logger.prometheus_port: cannot listen on {host}:{port} ({error}); choose another port, or 0 for none")


class PrometheusExporter:
    """A gauge for each number, as ``rlsync_sync_gb_per_s`` for ``sync/gb_per_s``, at ``http://host:port/metrics``.

    A number that a step does not report keeps its last value.
    """

    def __init__(self, host: str, port: int) -> None:
        """Listen. Raises ConfigError if the address cannot be bound."""
        try:
            import prometheus_client as client
        except ImportError as error:
            raise ConfigError(
                f"runner.logger.prometheus_port needs prometheus_client, which cannot be imported ({error}): pip install prometheus-client"
            ) from error
        self._registry, self._make = client.CollectorRegistry(), client.Gauge
        self._gauges: dict[str, Gauge] = {}
        try:
            self._server, self._thread = client.start_http_server(port, addr=host, registry=self._registry)
        except OSError as error:
            raise _cannot_listen(host, port, error) from error

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Export these metrics, and ``step`` as ``rlsync_logged_step``."""
        self.show({**metrics, "logged_step": step})

    def show(self, metrics: Mapping[str, float]) -> None:
        """Export these metrics without a step."""
        for name, value in metrics.items():
            self._gauge(name).set(value)

    def _gauge(self, name: str) -> Gauge:
        exported = _PREFIX + re.sub(r"\W", "_", name)
        if exported not in self._gauges:
            self._gauges[exported] = self._make(exported, f"{name} of this run", registry=self._registry)
        return self._gauges[exported]

    def close(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
