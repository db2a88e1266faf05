"""Which devices each component of a run gets, from ``cluster.component_placement``. Pure: no Ray, no CUDA query.

Owns the syntax, the rule that actor and engines share either all devices or none, and the cut of engine devices into
engines. A device is a GPU, numbered over all nodes; on a machine without GPUs it is a process slot.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from rlsync.errors import ConfigError
from workers.config.grpo import RunConfig
from workers.config.tasks import AnyConfig

_COMPONENTS = ("actor", "rollout", "reward")
_RANGE = re.compile(r"(\d+)(?:-(\d+))?")


class PlacementMode(Enum):
    """COLLOCATED: actor and engines share the same devices, one side at a time. DISAGGREGATED: each has its own."""

    COLLOCATED = "collocated"
    DISAGGREGATED = "disaggregated"


@dataclass(frozen=True, slots=True)
class ComponentPlacement:
    """Device numbers of each component, ascending and contiguous. Actor rank i runs on ``actor[i]``."""

    mode: PlacementMode
    actor: tuple[int, ...]
    rollout: tuple[int, ...]
    reward: tuple[int, ...]

    def engines(self, tensor_parallel_size: int) -> tuple[tuple[int, ...], ...]:
        """Devices of each engine: consecutive groups of ``tensor_parallel_size``.

        Raises:
            ConfigError: the engine devices cannot be cut evenly.
        """
        if len(self.rollout) % tensor_parallel_size:
            raise ConfigError(
                f"cluster.component_placement gives rollout {len(self.rollout)} devices, "
                f"which rollout.tensor_parallel_size ({tensor_parallel_size}) must divide"
            )
        return tuple(self.rollout[i : i + tensor_parallel_size] for i in range(0, len(self.rollout), tensor_parallel_size))


def components_of(config: AnyConfig) -> tuple[str, ...]:
    """Components that a run has, and has to place."""
    if isinstance(config, RunConfig):
        return _COMPONENTS
    return ("actor", "rollout") if config.has_engines else ("actor",)


def resolve_placement(
    component_placement: Mapping[str, Any], num_devices: int | None, components: Sequence[str] = _COMPONENTS
) -> ComponentPlacement:
    """Parse and check ``cluster.component_placement``.

    Args:
        component_placement: component names (several may share a key: ``actor,rollout``) to ``all``, a number, a
            range ``0-3``, a comma list of both, or a list. A component's own key wins over one that it shares, so that an
            override may move it.
        num_devices: devices of the whole cluster, or None where there are no GPUs; numbers are then process slots and
            ``all`` has no meaning.
        components: those that the run has; the others have no devices.

    Raises:
        ConfigError: bad syntax, unknown, missing or doubled component, device out of range, a gap in a list, or
            actor and rollout sharing only some devices.
    """
    values: dict[str, Any] = {}
    for is_shared in (True, False):
        keys = [([part.strip() for part in names.split(",")], value) for names, value in component_placement.items()]
        placed = {}
        for name, value in ((name, value) for names, value in keys if (len(names) > 1) is is_shared for name in names):
            if name not in components:
                raise ConfigError(_unknown_component(name, components))
            if name in placed:
                raise ConfigError(f"cluster.component_placement names {name} twice")
            placed[name] = value
        values |= placed
    devices = {name: _devices(name, value, num_devices) for name, value in values.items()}
    missing = [name for name in components if name not in devices]
    if missing:
        raise ConfigError(f"cluster.component_placement must place {', '.join(missing)}; it places {', '.join(devices) or 'nothing'}")
    devices = {name: devices.get(name, ()) for name in _COMPONENTS}
    return ComponentPlacement(mode=_mode(devices["actor"], devices["rollout"]), **devices)


def _mode(actor: tuple[int, ...], rollout: tuple[int, ...]) -> PlacementMode:
    if actor == rollout:
        return PlacementMode.COLLOCATED
    shared = sorted(set(actor) & set(rollout))
    if shared:
        raise ConfigError(
            f"cluster.component_placement: actor on {device_range(actor)} and rollout on {device_range(rollout)} share only "
            f"{device_range(shared)}; they must share all devices or none"
        )
    return PlacementMode.DISAGGREGATED


def _devices(component: str, value: Any, num_devices: int | None) -> tuple[int, ...]:
    where = f"cluster.component_placement.{component}"
    if value == "all":
        if num_devices is None:
            raise ConfigError(f"{where}: `all` needs GPUs, and there are none; name process slots instead, e.g. 0-1")
        return tuple(range(num_devices))
    if isinstance(value, (Mapping, bool)) or (isinstance(value, str) and ":" in value):
        raise ConfigError(f"{where}: {value!r} is not supported; give device numbers: all, 3, 0-3 or 0,1,2")
    parts = value if isinstance(value, (list, tuple)) else [value]
    numbers = [n for part in parts for piece in str(part).split(",") for n in _range(where, piece.strip())]
    found = tuple(sorted(numbers))
    if not found:
        raise ConfigError(f"{where}: {value!r} names no device")
    if len(set(found)) != len(found):
        raise ConfigError(f"{where}: {value!r} names a device twice")
    if found[-1] - found[0] != len(found) - 1:
        raise ConfigError(f"{where}: {value!r} has a gap; devices must be contiguous")
    if num_devices is not None and found[-1] >= num_devices:
        raise ConfigError(f"{where}: device {found[-1]} does not exist; the cluster has {num_devices} (0-{num_devices - 1})")
    return found


def _range(where: str, piece: str) -> range:
    match = _RANGE.fullmatch(piece)
    if match is None:
        raise ConfigError(f"{where}: cannot read {piece!r}; write all, 3, 0-3 or 0,1,2")
    first, last = int(match[1]), int(match[2] if match[2] is not None else match[1])
    if last < first:
        raise ConfigError(f"{where}: {piece!r} runs backwards")
    return range(first, last + 1)


def _unknown_component(name: str, components: Sequence[str]) -> str:
    if name in _COMPONENTS:
        why = (
            "this run has no engines, which it has with validation.generate=True" if name == "rollout" else "it belongs to a reasoning run"
        )
        return f"cluster.component_placement: remove {name} (~cluster.component_placement.{name} does, too); {why}"
    if name == "inference":
        return "cluster.component_placement: remove inference; the actor recomputes log-probabilities itself"
    near = difflib.get_close_matches(name, components, n=1, cutoff=0.0)
    return f"cluster.component_placement: unknown component {name!r}; did you mean {near[0]!r}?"


def device_range(devices: Sequence[int]) -> str:
    """Contiguous devices as the configuration names them: ``3`` or ``0-3``."""
    return str(devices[0]) if len(devices) == 1 else f"{devices[0]}-{devices[-1]}"
