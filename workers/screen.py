"""Output of a run: a progress bar on terminals, one line per step, a closing summary.

Knows metric names only; the numbers are on disk already (``metrics``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
SFT_COLUMNS: Columns = (
    ("loss", "train/lm_loss", ".4f", 9),
    ("grad", "train/grad_norm", ".2f", 8),
    ("lr", "train/learning_rate", ".1e", 9),
    ("tok/s", "perf/throughput", ".0f", 8),
    ("wait s", "time/data_wait", ".2f", 7),
    ("step s", "time/step", ".1f", 7),
)
# Metrics whose rise or fall the closing summary tells, and how it calls them.
_COURSES = (
    ("rollout/reward_scores", "mean reward"),
    ("train/lm_loss", "loss of a token"),
)
# Metrics of a validation, and which of its numbers is the best.
_VALIDATED: tuple[tuple[str, Callable[..., Any]], ...] = (("val/reward", max), ("val/loss", min), ("val/exact_match", max))
_TIMES = (
    "time/step", "time/sync_weights", "time/rollout", "time/reward", "time/actor/inference", "time/actor/training",
    "time/rollout_wait", "time/training", "time/data_wait",
)  # fmt: skip
# Shares of the updates of a step that were made.
_UPDATES = ("actor/training/actor/update_success", "train/update_success")
_MEMORY = (
    "perf/actor_host_memory_gb", "perf/engine_host_memory_gb", "perf/max_memory_allocated_gb", "perf/device_memory_gb",
)  # fmt: skip
_HEADING_EVERY = 25
_EDGE_STEPS = 5
_VALIDATION_SHOWN = 2
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

    def validation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Print the result of the validation that followed ``step``: its first ``val/`` metrics."""
        shown = [f"{name.removeprefix('val/').replace('_', ' ')} {value:.3f}" for name, value in metrics.items() if name.startswith("val/")]
        when = f"after step {step}" if step else "of the initial weights"
        self.note(f"validation {when}: {', '.join(shown[:_VALIDATION_SHOWN])}; {metrics['time/validation']:.1f} s")

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

    rows = [("steps", str(sum(line["step"] > 0 for line in history)))]
    for metric, name in _COURSES:
        numbers = values(metric)
        # The first and the last steps have none in common, or a rise would be averaged away.
        edge = min(_EDGE_STEPS, len(numbers) // 2)
        if edge:
            first, last = sum(numbers[:edge]) / edge, sum(numbers[-edge:]) / edge
            rows.append((name, f"{first:.3f} (first {edge}) -> {last:.3f} (last {edge}), {last - first:+.3f}"))
        elif numbers:
            rows.append((name, f"{numbers[0]:.3f} (one step)"))
    for metric, better in _VALIDATED:
        validated = [(line[metric], line["step"]) for line in history if line.get(metric) is not None]
        if validated:
            (first, at), (last, end) = validated[0], validated[-1]
            best, when = better(validated, key=lambda found: found[0])
            course = f"{first:.3f} (step {at}) -> {last:.3f} (step {end}), best {best:.3f} (step {when})"
            rows.append((metric, course if len(validated) > 1 else f"{last:.3f} (step {end})"))
    equal = values("rollout/fraction_of_groups_with_equal_rewards")
    if equal:
        without = sum(share == 1.0 for share in equal)
        none = f"; no gradient in {without} of {len(equal)} steps, as all had them" if without else ""
        rows.append(("groups with equal rewards", f"{sum(equal) / len(equal):.0%}{none}"))
    done = [done for name in _UPDATES for done in values(name)]
    if sum(done) < len(done):
        skipped = f"{1 - sum(done) / len(done):.0%}, as fp16 gradients overflowed"
        rows.append(("updates skipped", f"{skipped}; a fixed actor.optim.loss_scale never falls, null does" if not any(done) else skipped))
    if differences := values("rollout/logprob_diff_mean"):
        rows.append(("logp diff, engine and actor", f"{max(differences):.1e}, the largest mean of a step"))
    for name in _TIMES:
        if seconds := values(name):
            rows.append((name, f"{sum(seconds) / len(seconds):.2f} s a step, {sum(seconds):.0f} s in all"))
    if seconds := values("time/validation"):
        rows.append(("time/validation", f"{sum(seconds) / len(seconds):.2f} s each, {sum(seconds):.0f} s in all"))
    if idle := values("perf/idle"):
        rows.append(("perf/idle", f"{sum(idle) / len(idle):.0%} of the devices' time"))
    if speeds := values("rollout/tokens_per_s"):
        rows.append(("rollout/tokens_per_s", f"{sum(speeds) / len(speeds):.0f}"))
    for name in _MEMORY:
        if sizes := values(name):
            rows.append((name, f"{max(sizes):.2f}"))
    return [*rows, ("results", str(folder))]
