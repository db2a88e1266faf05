"""A bench's result as a PNG: a bar for each case, made of its phases, and the floor as a line. Knows the JSON object and matplotlib."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

# Phases that follow one another, so that a bar is as long as the whole step; ``rest`` is what no phase counts.
_PHASES = ("pause", "gather", "data", "verify", "finalize", "commit", "resume")
_COLOURS = ("#b0b0b0", "#e39b34", "#2f6fb7", "#7ab0df", "#57a773", "#9b8ac4", "#d0d0d0", "#ededed")


def draw(result: Mapping[str, Any], path: Path) -> str | None:
    """Write the chart; why there is none, where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        return f"no chart was drawn: {error}; pip install matplotlib"
    cases = [case for case in result["cases"] if case.get("median")]
    figure = Figure(figsize=(9, 1.6 + 0.5 * len(cases)), layout="constrained")
    axes = figure.subplots()
    names = [case["name"] for case in cases]
    left = [0.0] * len(cases)
    for phase, colour in zip((*_PHASES, "rest"), _COLOURS, strict=True):
        widths = [1e3 * (_rest(case["median"]) if phase == "rest" else case["median"].get(phase, 0.0)) for case in cases]
        axes.barh(names, widths, left=left, color=colour, label=phase)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    floor_ms = 1e3 * result["floors"]["floor_s"]
    axes.axvline(floor_ms, color="black", linestyle="--", linewidth=1, label=f"floor {floor_ms:.1f} ms")
    axes.invert_yaxis()
    axes.set_xlabel(f"ms from pause to resume, median of {result['steps']} warm steps")
    axes.set_title(f"{result['model']}, {result['placement']}, actor {_sizes(result['actor'])}, rollout {_sizes(result['rollout'])}")
    axes.legend(fontsize=8, ncols=3)
    figure.savefig(path, dpi=150)
    return None


def _rest(median: Mapping[str, float]) -> float:
    return max(0.0, median["whole"] - sum(median.get(phase, 0.0) for phase in _PHASES))


def _sizes(sizes: Mapping[str, int]) -> str:
    return " ".join(f"{name.removesuffix('_size').removeprefix('num_')}={value}" for name, value in sizes.items())
