"""Output of a run: a progress bar on terminals, one line per step, a closing summary.

Knows metric names only; the numbers are on disk already (``metrics``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from rlsync.cli.lines import WIDTH, wrapped

# (heading, metric, how a step's line shows it, width), in the order of the line; docs/metrics.md says what they mean.
Columns = tuple[tuple[str, str, str, int], ...]
GRPO_COLUMNS: Columns = (
    ("reward", "rollout/reward_scores", ".3f", 8),
    ("equal", "rollout/fraction_of_groups_with_equal_rewards", ".0%", 6),
    ("length", "rollout/response_length", ".1f", 7),
    ("loss", "actor/training/actor/final_loss", "+.4f", 9),
    ("grad", "actor/training/actor/grad_norm", ".2f", 8),
    ("logp diff", "rollout/logprob_diff_mean", ".1e", 10),
    ("tok/s", "perf/throughput", ".0f", 7),
    ("sync s", "sync/seconds", ".2f", 7),
    ("step s", "time/step", ".1f", 7),
)
_MEMORY = (
    "perf/actor_host_memory_gb", "perf/engine_host_memory_gb", "perf/max_memory_allocated_gb", "perf/device_memory_gb",
)  # fmt: skip
_HEADING_EVERY = 25
_EDGE_STEPS = 5
_NAME_WIDTH = 28


class Screen:
    """Progress of ``total_steps`` steps, of which ``start_step`` are already done. Use as a context manager."""

    def __init__(
        self, total_steps: int, columns: Columns = GRPO_COLUMNS, *, name: str = "GRPO", start_step: int = 0, console: Console | None = None
    ) -> None:
        self._console = Console() if console is None else console
        self._total, self._columns = total_steps, columns
        self._num_lines = 0
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
        self._task = self._progress.add_task(name, total=total_steps, completed=start_step)

    def __enter__(self) -> Screen:
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._progress.stop()

    def phase(self, name: str) -> None:
        """Name the current phase beside the bar."""
        self._progress.update(self._task, description=name)

    def note(self, text: str) -> None:
        """Print text above the bar, wrapped at the terminal's width, or at ``WIDTH`` columns without a terminal."""
        width = self._console.width if self._console.is_terminal else WIDTH
        self._console.print(wrapped(text, width), markup=False, highlight=False, soft_wrap=True)

    def component(self, name: str, seconds: float, detail: str = "") -> None:
        """Print the seconds that a component took to start."""
        self.note(f"  {name:<{_NAME_WIDTH}}{seconds:6.1f} s  {detail}".rstrip())

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Print the line of a finished step; headings precede every ``_HEADING_EVERY``-th."""
        first = 2 * len(str(self._total)) + 1
        if self._num_lines % _HEADING_EVERY == 0:
            self._line(f"{'step':>{first}}", *(f"{heading:>{width}}" for heading, _, _, width in self._columns))
        self._num_lines += 1
        shown = (("-" if metrics.get(name) is None else format(metrics[name], form), width) for _, name, form, width in self._columns)
        self._line(f"{f'{step}/{self._total}':>{first}}", *(f"{text:>{width}}" for text, width in shown))
        self._progress.update(self._task, completed=step)

    def _line(self, *cells: str) -> None:
        self._console.print("".join(cells), markup=False, highlight=False, soft_wrap=True)

    def summary(self, history: Sequence[Mapping[str, Any]], folder: Path, *, title: str = "finished") -> None:
        """Print the closing summary; ``history`` as in ``MetricsLog.history``."""
        self.note(title)
        rows = summary_rows(history, folder)
        width = max(_NAME_WIDTH, *(len(name) + 1 for name, _ in rows))
        for name, value in rows:
            self.note(f"  {name:<{width}}{value}")


def summary_rows(history: Sequence[Mapping[str, Any]], folder: Path) -> list[tuple[str, str]]:
    """Name and value of each line of the closing summary."""

    def values(name: str) -> list[float]:
        return [line[name] for line in history if line.get(name) is not None]

    rows = [("steps", str(len(history)))]
    rewards = values("rollout/reward_scores")
    # The first and the last steps have none in common, or a rise would be averaged away.
    edge = min(_EDGE_STEPS, len(rewards) // 2)
    if edge:
        first, last = sum(rewards[:edge]) / edge, sum(rewards[-edge:]) / edge
        rows.append(("mean reward", f"{first:.3f} (first {edge}) -> {last:.3f} (last {edge}), {last - first:+.3f}"))
    elif rewards:
        rows.append(("mean reward", f"{rewards[0]:.3f} (one step)"))
    equal = values("rollout/fraction_of_groups_with_equal_rewards")
    if equal:
        without = sum(share == 1.0 for share in equal)
        none = f"; no gradient in {without} of {len(equal)} steps, as all had them" if without else ""
        rows.append(("groups with equal rewards", f"{sum(equal) / len(equal):.0%}{none}"))
    if differences := values("rollout/logprob_diff_mean"):
        rows.append(("logp diff, engine and actor", f"{max(differences):.1e}, the largest mean of a step"))
    for name in ("time/step", "time/sync_weights", "time/rollout", "time/reward", "time/actor/inference", "time/actor/training"):
        if seconds := values(name):
            rows.append((name, f"{sum(seconds) / len(seconds):.2f} s a step, {sum(seconds):.0f} s in all"))
    if speeds := values("rollout/tokens_per_s"):
        rows.append(("rollout/tokens_per_s", f"{sum(speeds) / len(speeds):.0f}"))
    for name in _MEMORY:
        if sizes := values(name):
            rows.append((name, f"{max(sizes):.2f}"))
    return [*rows, ("results", str(folder))]
