"""A bench's result as tables. Knows the JSON object and nothing else."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

_PHASES = ("pause", "gather", "data", "verify", "finalize", "commit", "resume", "whole")
# Of a log; a table is cut where a terminal would cut it otherwise.
_CONSOLE_WIDTH = 180


def show(result: Mapping[str, Any]) -> None:
    """Print to standard output."""
    console = Console(highlight=False, width=None if sys.stdout.isatty() else _CONSOLE_WIDTH)
    console.print(_head(result))
    console.print(_times(result))
    for case in result["cases"]:
        if case["error"]:
            console.print(f"{case['name']}: {case['error']}", markup=False)
    if result["comparisons"]:
        console.print(_against(result))


def _head(result: Mapping[str, Any]) -> str:
    floors, workers = result["floors"], result["workers"]
    speeds = [f"{min(floors['same_gb_per_s'].values()):.0f} GB/s on the same device"]
    if floors["peer_gb_per_s"]:
        speeds.append(f"{max(floors['peer_gb_per_s'].values()):.0f} GB/s from another GPU")
    most = max(w["same_bytes"] + w["peer_bytes"] for w in workers)
    return (
        f"{result['model']}, {result['placement']}, actor layers {result['layers']}: "
        f"{len(workers)} engine worker(s) receive up to {most / 1e9:.3f} GB each; "
        f"{', '.join(speeds)} (bytes that arrive): floor {_ms(floors['floor_s'])} ms"
    )


def _times(result: Mapping[str, Any]) -> Table:
    table = Table(title=f"ms, median of {result['steps']} warm steps", title_justify="left", box=SIMPLE, padding=(0, 1, 0, 0))
    for name in ("case", "transport", "sink"):
        table.add_column(name, no_wrap=True)
    for name in (*_PHASES, "p10-p90", "data/floor", "whole-floor", "MB", "redundancy", "extra MiB"):
        table.add_column(name, justify="right")
    for case in result["cases"]:
        report, median = case["report"], case.get("median", {})
        name = case["name"] + ("" if case["right"] else " FAILED" if case["error"] else " WRONG")
        words = [report.get("transport", case["remark"]), "+".join(report.get("sinks", []))]
        if not median:
            table.add_row(name, *words)
            continue
        phases = [_ms(median[phase]) if phase in median else "" for phase in _PHASES]
        spread = f"{_ms(case['p10']['whole'])}-{_ms(case['p90']['whole'])}"
        has_floor = "data_over_floor" in case
        ratios = [spread, *((f"{case['data_over_floor']:.2f}", _ms(case["whole_minus_floor_s"])) if has_floor else ("", ""))]
        ratios.append(f"{report['bytes'] / 1e6:.1f}" if report else "")
        redundancy = f"{max(report['redundancy'].values()):.2f}" if report else ""
        table.add_row(name, *words, *phases, *ratios, redundancy, _extra(case["extra_memory"]))
    return table


def _against(result: Mapping[str, Any]) -> Table:
    table = Table(title="times as long as rlsync", title_justify="left", box=SIMPLE, padding=(0, 1, 0, 0))
    for name in ("case", "peer"):
        table.add_column(name)
    for name in ("transfer", "with gather", "whole"):
        table.add_column(name, justify="right")
    for row in result["comparisons"]:
        table.add_row(row["case"], row["peer"], *(f"{row[key]:.1f}" for key in ("transfer", "with_gather", "whole")))
    return table


def _extra(memory: Mapping[str, Any]) -> str:
    """The driver's word where it was asked, else what the workers said."""
    if memory["gpu_bytes"]:
        return f"{max(memory['gpu_bytes'].values()) / 2**20:.0f}"
    return "" if memory["report_bytes"] is None else f"{memory['report_bytes'] / 2**20:.0f}"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.1f}"
