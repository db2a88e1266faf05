"""One thing that the doctor looked at. Plain data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "warning", "problem"]


@dataclass(frozen=True, slots=True)
class Finding:
    """``remedy`` says what to do where ``level`` is not ``ok``. A problem is what some run will certainly fail on."""

    level: Level
    text: str
    remedy: str = ""

    def __str__(self) -> str:
        return f"{self.level:<8} {self.text}" + (f"\n{'':<8}   -> {self.remedy}" if self.remedy else "")


def ok(text: str) -> Finding:
    return Finding("ok", text)


def amount(nbytes: int) -> str:
    """Bytes for people."""
    return f"{nbytes / 2**30:,.1f} GiB" if nbytes >= 2**30 else f"{nbytes / 2**20:,.1f} MiB"
