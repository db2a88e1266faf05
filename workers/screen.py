"""What a run shows: a progress bar where there is a terminal, one line per step, a closing summary.

Knows metric names only; the numbers are on disk already (``metrics``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

# (metric, how a step's line shows it), in the order of the line.
_LINE: tuple[tuple[str, Callable[[float], str]], ...] = (
    ("rollout/reward_scores", lambda v: f"reward {v:.3f}"),
    ("rollout/response_length", lambda v: f"length {v:.1f}"),
    ("actor/training/actor/final_loss", lambda v: f"loss {v:+.4f}"),
    ("actor/training/actor/grad_norm", lambda v: f"grad {v:.2f}"),
    ("rollout/logprob_diff_mean", lambda v: f"logprob diff {v:.1e}"),
    ("sync/seconds", lambda v: f"sync {v:.2f} s"),
    ("time/step", lambda v: f"step {v:.1f} s"),
)
_EDGE_STEPS = 5


class Screen:
    """Progress of ``total_steps`` steps, of which ``start_step`` are already done. Use as a context manager."""

    def __init__(self, total_steps: int, *, start_step: int = 0, console: Console | None = None) -> None:
        self._console = Console() if console is None else console
        self._total = total_steps
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        self._task = self._progress.add_task("GRPO", total=total_steps, completed=start_step)

    def __enter__(self) -> Screen:
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._progress.stop()

    def phase(self, name: str) -> None:
        """Say beside the bar what is going on."""
        self._progress.update(self._task, description=name)

    def note(self, text: str) -> None:
        """One line above the bar."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """The line of a finished step."""
        parts = [show(metrics[name]) for name, show in _LINE if metrics.get(name) is not None]
        self.note("  ".join((f"step {step:>{len(str(self._total))}}/{self._total}", *parts)))
        self._progress.update(self._task, completed=step)

    def summary(self, history: Sequence[Mapping[str, Any]], folder: Path, *, title: str = "finished") -> None:
        """What the run came to; ``history`` as in ``MetricsLog.history``."""
        table = Table(title=title, title_justify="left", show_header=False)
        for name, value in summary_rows(history, folder):
            table.add_row(name, value)
        self._console.print(table)


def summary_rows(history: Sequence[Mapping[str, Any]], folder: Path) -> list[tuple[str, str]]:
    """Name and value of each line of the closing summary."""
    rows = [("steps", str(len(history)))]
    rewards = [line["rollout/reward_scores"] for line in history if line.get("rollout/reward_scores") is not None]
    if rewards:
        edge = min(_EDGE_STEPS, len(rewards))
        first, last = sum(rewards[:edge]) / edge, sum(rewards[-edge:]) / edge
        rows.append(("mean reward", f"{first:.3f} (first {edge} steps) -> {last:.3f} (last {edge} steps), {last - first:+.3f}"))
    differences = [line["rollout/logprob_diff_mean"] for line in history if line.get("rollout/logprob_diff_mean") is not None]
    if differences:
        rows.append(("engine vs actor log-probability", f"largest mean difference of a step {max(differences):.1e}"))
    for name in ("time/step", "time/sync_weights", "time/rollout", "time/reward", "time/actor/inference", "time/actor/training"):
        seconds = [line[name] for line in history if line.get(name) is not None]
        if seconds:
            rows.append((name, f"{sum(seconds) / len(seconds):.2f} s a step, {sum(seconds):.0f} s in all"))
    return [*rows, ("results", str(folder))]
