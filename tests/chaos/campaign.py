"""Causes faults, chosen by a seed, in syncs between two actor ranks and real vLLM engines, and holds rlsync to its promises.

    python -m tests.chaos.campaign --faults 100 --seed 7

After every fault: the call ends in time and with one error on every living rank, no engine serves what did not commit, none ever answers
from mixed weights, what was broken can be healed, and nothing is left behind. A violation ends the campaign; ``--only K`` repeats draw K.

Owns the command line, the order of the draws and the tally. It runs in namespaces of its own where it may, with a small /dev/shm that
can be filled up; elsewhere the fault that needs that is left out.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from tests.integration import hosts

if TYPE_CHECKING:
    from tests.chaos.drawing import Draw
    from tests.chaos.runner import Runner, Step

_SHM_SIZE = "512m"
# So many faults come one after another while an engine is missing.
_PATIENCE = 5
_OUTCOMES = ("refused", "committed", "started")


def run(words: Sequence[str]) -> None:
    """``main`` as a rank of a test; ends with its exit code where that is not 0."""
    if code := main(words):
        sys.exit(code)


def main(words: Sequence[str] | None = None) -> int:
    """Returns 0 when every promise was kept. ``words``: of the command line, by default that of this process."""
    options = _options(words)
    has_own_shm = _enter_namespaces()
    from tests.chaos.leaks import adopt_orphans
    from tests.integration.engine_source import ENGINE_ENV

    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", **ENGINE_ENV}
    adopt_orphans()
    with TemporaryDirectory(prefix="chaos-") as folder:
        return _run(options, Path(folder), has_own_shm)


def _options(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.campaign", description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--faults", type=int, default=100, help="how many faults are caused")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="what is left to chance follows from it; now by default")
    parser.add_argument("--only", type=int, help="cause this draw of the seed alone")
    parser.add_argument("--timeout", type=float, default=5.0, help="deadline of each phase of a sync, in seconds")
    parser.add_argument("--slack", type=float, default=4.0, help="what a call may take beyond that on this machine, in seconds")
    parser.add_argument("--engine-starts", type=int, help="leave out faults that cost more engines than this")
    parser.add_argument("--tp2", action="store_true", help="the second engine has two workers")
    parser.add_argument("--json", type=Path, help="write what happened to this file")
    return parser.parse_args(words)


def _enter_namespaces() -> bool:
    """Go on in mount and pid namespaces of our own: a /dev/shm of 512 MiB, and the end of every process with this one. Whether we may."""
    refusal = hosts.why_not(f"hosts.enter_namespaces(); hosts.mount_shm('{_SHM_SIZE}')")
    if refusal is not None:
        print(f"no namespaces of our own here, so that 'full /dev/shm' is left out: {refusal}", flush=True)
        return False
    hosts.enter_namespaces()
    hosts.fork_here()
    hosts.mount_shm(_SHM_SIZE)
    return True


def _run(options: argparse.Namespace, folder: Path, has_own_shm: bool) -> int:
    from tests.chaos.runner import Runner, Step, Violation
    from tests.models import save_tiny_model

    started_s = time.monotonic()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - started_s:7.1f} s] {text}", flush=True)

    chosen = _chosen(options, has_own_shm)
    say(f"seed {options.seed}: {len(chosen)} faults, deadline {options.timeout:g} s")
    folders = {letter: save_tiny_model(folder / letter, "qwen2", seed=seed) for letter, seed in (("a", 1), ("b", 2))}
    runner = Runner(folders, {"left": 1, "right": 2 if options.tp2 else 1}, options.timeout, options.slack, say)
    say("two engines answer")
    steps: list[Step] = []
    violation = None
    try:
        while chosen:
            draw, wait = _next(chosen, steps, runner)
            steps.append(Step(draw))
            runner.run(steps[-1], wait=wait)
            say(_line(steps[-1]))
        findings = runner.end()
        if findings:
            raise Violation("; ".join(findings))
    except Exception as error:
        violation = f"{type(error).__name__}: {error}"
        say(f"VIOLATION in {_line(steps[-1])}\n{violation}\nrepeat it: {_repeat(options, steps[-1])}")
        if not isinstance(error, Violation):
            raise
    finally:
        print(f"\n{table(steps)}\n", flush=True)
        say(f"seed {options.seed}: {len(steps)} faults, {runner.engines.starts} engines started, {runner.joined} joined while training")
        if options.json is not None:
            options.json.write_text(json.dumps(_record(options, runner, steps, violation), indent=1))
        if violation is not None:
            runner.end()
    return 0 if violation is None else 1


def _chosen(options: argparse.Namespace, has_own_shm: bool) -> list[Draw]:
    """The draws to go through. Those that need what this machine does not allow, or too many engines, are passed over."""
    from tests.chaos.drawing import draws

    def fits(draw: Draw) -> bool:
        return has_own_shm or draw.fault.name != "full /dev/shm"

    if options.only is not None:
        return [next(d for d in draws(options.seed) if d.number == options.only)]
    chosen: list[Draw] = []
    left = options.faults if options.engine_starts is None else options.engine_starts
    for draw in filter(fits, draws(options.seed)):
        if len(chosen) == options.faults:
            break
        if draw.fault.costs_engine:
            left -= 1
        if left >= 0 or not draw.fault.costs_engine:
            chosen.append(draw)
    return chosen


def _next(chosen: list[Draw], steps: list[Step], runner: Runner) -> tuple[Draw, bool]:
    """The next draw, and whether engines that are being started are waited for. Meanwhile a few faults come that cost none and let
    them start."""
    cheap = [d for d in chosen if not d.fault.costs_engine and not d.fault.keeps_from_starting]
    patient = not all(s.draw.fault.costs_engine is False for s in steps[-_PATIENCE:])
    meanwhile = bool(runner.engines.starting and cheap and patient)
    draw = cheap[0] if meanwhile else chosen[0]
    chosen.remove(draw)
    return draw, not meanwhile


def _line(step: Step) -> str:
    error = "" if step.error is None else f": {' '.join(step.error.split())[:160]}"
    healed = f", healed by {step.healed_by}" if step.healed_by else ""
    how = f" after {step.seconds:g} s, {step.samples} answers checked{healed}" if step.outcome else ""
    return f"#{step.draw.number} {step.draw} [{step.victim}] {step.outcome}{how}{error}"


def _repeat(options: argparse.Namespace, step: Step) -> str:
    tp2 = " --tp2" if options.tp2 else ""
    return f"python -m tests.chaos.campaign --seed {options.seed} --only {step.draw.number} --timeout {options.timeout:g}{tp2}"


def table(steps: list[Step]) -> str:
    """Counts by fault and phase: refused / committed, and the longest time to an error."""
    from tests.chaos.tap import MOMENTS

    phases = ("begin", *MOMENTS, "idle")
    counts = Counter((s.draw.fault.name, s.draw.phase, s.outcome) for s in steps)
    slowest: dict[str, float] = {}
    for step in steps:
        slowest[step.draw.fault.name] = max(slowest.get(step.draw.fault.name, 0.0), step.seconds)
    rows = [("fault", *phases, "slowest")]
    for fault, seconds in slowest.items():
        cells = [(counts[fault, p, "refused"], counts[fault, p, "committed"], counts[fault, p, "started"]) for p in phases]
        rows.append(
            (fault, *("+".join(f"{n}{mark}" for n, mark in zip(cell, "rcs", strict=True) if n) for cell in cells), f"{seconds:g} s")
        )
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


def _record(options: argparse.Namespace, runner: Runner, steps: list[Step], violation: str | None) -> dict[str, Any]:
    fields = ("victim", "outcome", "error", "seconds", "healed_by", "samples", "findings")
    rows = [
        {"number": s.draw.number, "fault": s.draw.fault.name, "phase": s.draw.phase, "moment": str(s.draw.moment)}
        | {name: getattr(s, name) for name in fields}
        for s in steps
    ]
    return {
        "seed": options.seed, "timeout_s": options.timeout, "limit_s": runner.limit_s, "engines_started": runner.engines.starts,
        "engines_joined": runner.joined, "violation": violation, "steps": rows,
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
