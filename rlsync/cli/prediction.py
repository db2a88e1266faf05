"""Seconds of a sync on paper: the floor that links set, and what was measured on top of it. Numbers; knows no plan and no GPU.

Constants are fits to benches on H200s with idle engines and direct sinks, of 0.5 to 15 GB a worker; benchmarks/RESULTS.md has the
numbers, and a test holds the predictions to them. What has not been measured so is not predicted, with the reason.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np

from rlsync.errors import ConfigError
from rlsync.plan.links import LINK_NAMES
from rlsync.plan.outline import Integers

# Names of --link, in the order of LINK_NAMES.
LINKS = ("gpu", "nvlink", "nic")
# In place: beyond the floor of each link, and once.
_BEYOND = np.array([1.07, 1.045, 1.045])
_LAUNCH_S = 0.3e-3
# A step of messages: beyond its bytes, and the least that one takes.
_STEP_S, _LEAST_STEP_S = 0.13e-3, 0.64e-3
# Pause, begin, verify, finalize, commit and resume: of all engines, and more with each. One engine was measured since a sync is one call.
_AROUND_S, _ENGINE_S = 5e-3, 2e-3


@dataclass(frozen=True, slots=True)
class Prediction:
    """Seconds.

    Attributes:
        floor_s: of the holder with the highest: bytes that it takes, or gives to others, by link / speed of the link, one after the other.
        data_s: of the data phase of a warm step, as ``rlsync bench`` measures it; whole_s: from pause to resume.
        limit: the holder with the floor, and what it does.
    """

    floor_s: float
    data_s: float
    whole_s: float
    limit: str


def links_of(text: str) -> dict[str, float]:
    """``nvlink=370e9,nic=44e9``: bytes per second that arrive at one GPU, by LINKS. Raises ConfigError for what it cannot read."""
    found: dict[str, float] = {}
    for part in text.split(","):
        name, _, value = part.partition("=")
        try:
            speed = float(value)
        except ValueError:
            speed = 0.0
        if name not in LINKS or not 0 < speed < float("inf"):
            raise ConfigError(f"--link {text!r}: cannot read {part!r}; write {', '.join(f'{n}=BYTES_PER_SECOND' for n in LINKS)}")
        if name in found:
            raise ConfigError(f"--link {text!r}: {name} is given twice")
        found[name] = speed
    return found


def predicted(
    links: Mapping[str, float],
    given: Integers,
    taken: Integers,
    names: tuple[tuple[str, ...], tuple[str, ...]],
    *,
    num_steps: int,
    num_engines: int,
) -> Prediction:
    """The prediction for a sync whose bytes are read in place, or travel in messages.

    Args:
        given, taken: bytes by source and by destination, and link; ``names`` of both.
        num_steps: of messages, or 0 where all is read in place.
    """
    speeds = np.array([links.get(name, float("inf")) for name in LINKS])
    # What stays on a GPU is one copy, which counts where it is taken.
    away = given * (np.arange(len(LINKS)) > 0)
    seconds = np.concatenate([taken / speeds, away / speeds])
    floors = seconds.sum(axis=1)
    most = int(floors.argmax())
    floor_s = float(floors[most])
    if num_steps:
        data_s = _LAUNCH_S + num_steps * max(_LEAST_STEP_S, floor_s / num_steps * float(_BEYOND[1]) + _STEP_S)
    else:
        data_s = _LAUNCH_S + float((seconds @ _BEYOND).max())
    destinations = len(taken)
    limit = f"{names[1][most]} takes" if most < destinations else f"{names[0][most - destinations]} gives"
    return Prediction(floor_s, data_s, data_s + _AROUND_S + num_engines * _ENGINE_S, limit)


def unpredictable(links: Mapping[str, float], bytes_by_link: tuple[int, ...], transports: Collection[str], is_staged: bool) -> str:
    """Why seconds cannot be said, or ""."""
    missing = [name for name, nbytes in zip(LINKS, bytes_by_link, strict=True) if nbytes and name not in links]
    if missing:
        where = ", ".join(LINK_NAMES[LINKS.index(name)] for name in missing)
        return (
            f"bytes go over links whose speed is not known ({where}): add {', '.join(f'{n}=BYTES_PER_SECOND' for n in missing)} to --link"
        )
    if set(transports) not in ({"ipc"}, {"nccl"}):
        return f"only ipc and nccl were measured on GPUs, and here it is {' and '.join(sorted(set(transports)))}"
    if is_staged:
        return "bytes go through staging rings, which took 1.6 to 8 times the floor by size and number of slots (benchmarks/RESULTS.md)"
    return ""
