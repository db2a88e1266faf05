"""Draws the pictures of the documentation, for light and for dark pages: python scripts/draw.py. A test holds that they are up to date.

The data path is drawn by hand, the times are medians of the raw numbers in benchmarks/raw.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from xml.sax.saxutils import escape

ROOT = Path(__file__).resolve().parents[1]
IMAGES = ROOT / "docs" / "images"

# Ink, lines, faint ink, filled boxes, and three colours of bars, for a light and for a dark page.
THEMES: Mapping[str, Mapping[str, str]] = {
    "light": {
        "ink": "#1f2328", "line": "#57606a", "faint": "#656d76", "box": "#f6f8fa",
        "ours": "#0969da", "gather": "#d4a72c", "data": "#bc4c00", "rest": "#afb8c1",
    },
    "dark": {
        "ink": "#e6edf3", "line": "#8b949e", "faint": "#9198a1", "box": "#161b22",
        "ours": "#4493f8", "gather": "#d29922", "data": "#db6d28", "rest": "#6e7681",
    },
}  # fmt: skip


class Drawing:
    """An SVG of a width and a height in pixels, in one theme."""

    def __init__(self, width: int, height: int, theme: Mapping[str, str], title: str) -> None:
        self._theme = theme
        self._parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" '
            f'font-family="ui-sans-serif, -apple-system, Segoe UI, Helvetica, Arial, sans-serif" font-size="13">',
            f"<title>{escape(title)}</title>",
            f'<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
            f'<path d="M0 0 L8 4 L0 8 z" fill="{theme["line"]}"/></marker></defs>',
        ]

    def text(
        self, x: float, y: float, words: str, *, colour: str = "ink", anchor: str = "start", bold: bool = False, size: int = 13
    ) -> None:
        weight = ' font-weight="600"' if bold else ""
        style = f'fill="{self._theme[colour]}" text-anchor="{anchor}" font-size="{size}"{weight}'
        self._parts.append(f'<text x="{x:g}" y="{y:g}" {style}>{escape(words)}</text>')

    def box(self, x: float, y: float, width: float, height: float, *, fill: str = "box", stroke: str | None = "line") -> None:
        edge = "" if stroke is None else f' stroke="{self._theme[stroke]}"'
        self._parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{4 if stroke else 0}" fill="{self._theme[fill]}"{edge}/>'
        )

    def arrow(self, x0: float, y0: float, x1: float, y1: float, *, dashed: bool = False) -> None:
        dash = ' stroke-dasharray="4 3"' if dashed else ""
        self._parts.append(
            f'<line x1="{x0:g}" y1="{y0:g}" x2="{x1:g}" y2="{y1:g}" stroke="{self._theme["line"]}" stroke-width="1.5"{dash} '
            'marker-end="url(#tip)"/>'
        )

    def svg(self) -> str:
        return "\n".join([*self._parts, "</svg>"]) + "\n"


def data_path(theme: Mapping[str, str]) -> str:
    """From the actor's parameters to the engines'."""
    d = Drawing(860, 448, theme, "How a sync moves weights from Megatron ranks to vLLM workers")
    d.text(20, 26, "Megatron-Core actor, any TP / PP / VPP / DP", bold=True)
    for i in range(4):
        x = 20 + 150 * i
        d.box(x, 40, 130, 54)
        d.text(x + 65, 62, f"actor rank {i}", anchor="middle")
        d.text(x + 65, 81, "parameters", colour="faint", anchor="middle", size=12)
        d.arrow(x + 65, 94, x + 65, 142)
    d.text(640, 62, "Each rank copies the regions", colour="faint", size=12)
    d.text(640, 79, "that are its part of the plan.", colour="faint", size=12)
    d.text(640, 96, "Nothing is gathered.", colour="faint", size=12)
    d.box(20, 144, 580, 92)
    d.text(34, 165, "one of, for each worker", bold=True, size=12)
    rows = (
        ("ipc", "parameters are read where they lie, in the actor's GPU memory"),
        ("shm", "a ring of buckets in host memory"),
        ("nccl, gloo", "packed messages, shard to shard, between GPUs or hosts"),
    )
    for i, (name, meaning) in enumerate(rows):
        d.text(34, 186 + 18 * i, name, colour="ours", bold=True)
        d.text(120, 186 + 18 * i, meaning, size=12)
    d.text(640, 166, "A worker receives the bytes it", colour="faint", size=12)
    d.text(640, 183, "holds, once, in its own layout.", colour="faint", size=12)
    for i in range(4):
        x = 20 + 150 * i
        d.arrow(x + 65, 236, x + 65, 284)
        d.box(x, 286, 130, 54)
        d.text(x + 65, 308, f"engine {i // 2}, worker {i % 2}", anchor="middle")
        d.text(x + 65, 327, "vLLM parameters", colour="faint", anchor="middle", size=12)
    d.text(640, 302, "Strided copies into the live", colour="faint", size=12)
    d.text(640, 319, "parameters; checksums of both", colour="faint", size=12)
    d.text(640, 336, "sides before anybody serves.", colour="faint", size=12)
    d.text(20, 366, "unmodified vLLM with the rlsync plug-in", bold=True)
    d.box(20, 382, 820, 54)
    d.text(34, 404, "coordinator, a thread of actor rank 0", bold=True, size=12)
    d.text(34, 423, "connect once: record, plan, prove", size=12)
    d.text(262, 423, "each step: pause, transfer, verify, commit(version) on all engines or on none, resume", size=12)
    return d.svg()


_COLLOCATED, _APART, _NCCL = (
    "2026-11-21-7b-collocated",
    "2026-11-21-7b-disaggregated-all-ways",
    "2026-11-21-7b-disaggregated-nccl",
)
# Title, and (file of benchmarks/raw, name of its case, words) from the top.
PANELS: tuple[tuple[str, tuple[tuple[str, str, str], ...]], ...] = (
    (
        "actor and engine on the same 2 GPUs",
        (
            (_COLLOCATED, "auto params", "rlsync, ipc"),
            (_COLLOCATED, "gather-broadcast", "gather and broadcast, as verl and slime do"),
            (_COLLOCATED, "vllm-ipc", "vLLM's own transfer, ipc packed"),
        ),
    ),
    (
        "2 GPUs to 2 others",
        (
            (_APART, "ipc auto", "rlsync, ipc"),
            (_NCCL, "nccl", "rlsync, nccl"),
            (_APART, "vllm-nccl", "vLLM's own transfer, nccl packed"),
            (_APART, "gather-broadcast", "gather and broadcast, as verl and slime do"),
        ),
    ),
)


def medians(file: str, case: str) -> dict[str, float]:
    """Median of each phase of a case over its steps, in ms."""
    cases = json.loads((ROOT / "benchmarks" / "raw" / f"{file}.json").read_text())["cases"]
    (steps,) = (found["steps"] for found in cases if found["name"] == case)
    return {phase: 1000 * statistics.median(step[phase] for step in steps) for phase in steps[0]}


def sync_times(theme: Mapping[str, str]) -> str:
    """A sync of rlsync beside what others take for the same weights."""
    bars = [(title, [(words, medians(file, case)) for file, case, words in rows]) for title, rows in PANELS]
    longest = max(times["whole"] for _, rows in bars for _, times in rows)
    left, width, row = 300, 460, 30
    height = 70 + sum(34 + row * len(rows) for _, rows in bars)
    d = Drawing(860, height, theme, "Time of a sync of Qwen2.5-7B on H200s, from the pause to the last engine that serves again")
    d.text(20, 24, "Qwen2.5-7B, bf16, H200: from the pause to the last engine that serves again, ms (median of 10)", bold=True)
    for i, (colour, words) in enumerate((("gather", "gather"), ("data", "transfer"), ("rest", "all else"))):
        d.box(left + 100 * i, 36, 12, 12, fill=colour, stroke=None)
        d.text(left + 100 * i + 18, 47, words, colour="faint", size=12)
    y = 62.0
    for title, rows in bars:
        d.text(20, y + 20, title, colour="faint", size=12)
        y += 28
        for words, times in rows:
            ours = words.startswith("rlsync")
            d.text(left - 10, y + 17, words, anchor="end", colour="ours" if ours else "ink", bold=ours)
            gather, data = times.get("gather", 0.0), times["data"]
            x = float(left)
            for colour, part in (("gather", gather), ("data", data), ("rest", times["whole"] - gather - data)):
                d.box(x, y + 4, round(width * part / longest, 1), 18, fill=colour, stroke=None)
                x += round(width * part / longest, 1)
            d.text(x + 8, y + 18, f"{times['whole']:.1f}")
            y += row
        y += 6
    return d.svg()


PICTURES: Mapping[str, Callable[[Mapping[str, str]], str]] = {"data-path": data_path, "sync-times": sync_times}


def drawn() -> dict[Path, str]:
    """Every picture by its file."""
    return {IMAGES / f"{name}-{theme}.svg": draw(colours) for name, draw in PICTURES.items() for theme, colours in THEMES.items()}


if __name__ == "__main__":
    IMAGES.mkdir(exist_ok=True)
    for path, svg in drawn().items():
        path.write_text(svg, encoding="utf-8")
