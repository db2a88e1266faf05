"""What a bench is asked to do (the two sides, where they are, the cases), what a case measured, and the files that carry both between
the processes of a bench, as JSON. Knows sizes and settings; starts nothing.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec

from rlsync.errors import ConfigError, RlsyncError
from rlsync.layout.topology import Topology
from rlsync.models.lora import LoraSpec
from rlsync.sync.config import LORA, LoraSync, SyncConfig

PLACEMENTS = ("collocated", "disaggregated")
Layers = Literal["local", "te"]
# What the words of --mode are as weight_sync.staging. MOVED: the actor's weights are away between syncs, and then in other memory.
MOVED = "moved"
MODES = {"params": "auto", "ring": "always", MOVED: "auto"}
# Options whose every combination is a case, and their fields of SyncConfig.
LISTS = {
    "transport": "transport", "sink": "sink", "mode": "staging", "bucket-bytes": "bucket_bytes", "num-slots": "num_slots",
    "lora-sync": "lora",
}  # fmt: skip
_NUMBERS = ("bucket-bytes", "num-slots")
_POLL_S = 0.02


# Where a bench can be, for those who sync in other ways. ``beside`` is collocated GPUs of which one has an engine and no actor rank.
SCENES = ("cpu", "collocated", "beside", "disaggregated")


@dataclass(frozen=True, slots=True)
class Peer:
    """A way that others sync, the SCENES where it can be, and why not elsewhere. ``lora``: what it gives engines."""

    scenes: tuple[str, ...]
    why: str
    lora: LoraSync = "merged"


PEERS: Mapping[str, Peer] = {
    "gather-broadcast": Peer(
        ("cpu", "collocated", "disaggregated"), "on shared GPUs each engine worker takes tensors from an actor rank on its GPU"
    ),
    "vllm-nccl": Peer(("disaggregated",), "vLLM's nccl backend puts actor rank 0 and all engine workers into one NCCL group"),
    "vllm-ipc": Peer(("collocated",), "vLLM's ipc backend wants an actor rank on the GPU of each engine worker"),
    "vllm-folder": Peer(SCENES, "", "adapter"),
}
_SCENES_IN_WORDS = {
    "cpu": "without GPUs", "collocated": "collocated on GPUs", "disaggregated": "disaggregated on GPUs",
    "beside": "collocated, with engine workers on GPUs that have no actor rank",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Case:
    """One way of rlsync: fields of SyncConfig, and whether weights are offloaded and onloaded before every sync."""

    name: str
    settings: dict[str, Any]
    moves: bool = False

    @property
    def lora(self) -> LoraSync:
        """How engines get adapters in this case, and so which engines run it: those with slots for adapters take no merged weights."""
        return self.settings.get("lora", "merged")


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchSpec:
    """What benches of every kind say to all of their processes.

    Attributes:
        config: content of config.json.
        axes: fields of the actor's Topology.
        layers: of the actor: Megatron-Core's local ones or TransformerEngine's.
        folder: of this run: config.json, sockets, floors, results.
        devices: what CUDA_VISIBLE_DEVICES may name, in order; empty on CPU.
        start_s: until all processes are there.
        lora_r: rank of the actor's adapters, on all linear layers; 0 for none.
    """

    model: str
    config: dict[str, Any]
    axes: dict[str, int]
    layers: Layers
    steps: int
    warmup: int
    start_s: float
    folder: str
    devices: tuple[str, ...]
    seed: int = 0
    lora_r: int = 0

    @property
    def topology(self) -> Topology:
        return Topology(**self.axes)

    @property
    def lora(self) -> LoraSpec | None:
        """Scaled by a power of two, so that half precision rounds B the same before and after."""
        return LoraSpec(self.lora_r, 2.0 * self.lora_r) if self.lora_r else None

    @property
    def on_gpu(self) -> bool:
        return bool(self.devices)

    @property
    def outcome_path(self) -> Path:
        return Path(self.folder, "outcome.json")


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec(BenchSpec):
    """A bench of syncs.

    Attributes:
        engine_tp, engine_ep: workers of an engine, and those of them that share experts: 1 (each expert is cut) or all.
        actor_gpus, engine_gpus: indices into ``devices``, by actor rank, and by engine and worker rank.
        timeout_s: of each phase of a sync and each call of an engine.
        peer_bucket_bytes: what a peer gathers at a time.
    """

    num_engines: int
    engine_tp: int
    engine_ep: int
    placement: str
    cases: tuple[Case, ...]
    peers: tuple[str, ...]
    timeout_s: float
    actor_gpus: tuple[int, ...]
    engine_gpus: tuple[tuple[int, ...], ...]
    cuda_graphs: bool
    token: str
    peer_bucket_bytes: int = 512 * 2**20

    @property
    def hosts(self) -> tuple[tuple[LoraSync, int], ...]:
        """(how it gets adapters, number) of each engine process: every engine once for each way in which cases sync adapters."""
        used = {case.lora for case in self.cases} | {PEERS[name].lora for name in self.peers}
        return tuple((lora, engine) for lora in LORA if lora in used for engine in range(self.num_engines))

    @property
    def floors_path(self) -> Path:
        return Path(self.folder, "floors.json")

    def socket(self, host: int) -> str:
        return str(Path(self.folder, f"engine-{host}.sock"))


class Measured(msgspec.Struct, kw_only=True):
    """One case.

    Attributes:
        kind: ``rlsync`` or ``peer``.
        connect_s: until the first step could begin. connect: its parts, of rlsync alone, as ``WeightSyncer.connect_seconds``.
        reconnect_s: of rlsync, until the same peers were connected again, after all steps. reconnect: its parts.
        first: the first step, which allocates what later ones use again.
        steps: seconds by phase of the measured steps, in order.
        begin_s, end_s: from before the connection to after the last measured step, by the monotonic clock that all processes share.
        extra_torch_bytes: most that torch allocated in that time beyond what it had before, of an actor rank and of a worker.
        fingerprints: of all workers after each of two more steps, whose weights differ.
        report: SyncReport of the last step, of rlsync alone.
        lora: what engines got, where the actor has adapters.
        error: why there are no steps.
    """

    name: str
    kind: str
    lora: LoraSync = "merged"
    remark: str = ""
    settings: dict[str, Any] = {}
    connect_s: float = 0.0
    connect: dict[str, float] = {}
    reconnect_s: float = 0.0
    reconnect: dict[str, float] = {}
    first: dict[str, float] = {}
    steps: list[dict[str, float]] = []
    begin_s: float = 0.0
    end_s: float = 0.0
    extra_torch_bytes: dict[str, int] = {}
    fingerprints: list[str] = []
    report: dict[str, Any] = {}
    error: str = ""


def write(spec: Spec, path: Path) -> None:
    path.write_bytes(msgspec.json.encode(spec))


def read(path: str | Path) -> Spec:
    return msgspec.json.decode(Path(path).read_bytes(), type=Spec)


def await_file(path: Path, timeout_s: float) -> str:
    """The text of a file that another process writes, as soon as it is there. Raises RlsyncError after ``timeout_s``."""
    deadline_s = time.monotonic() + timeout_s
    while not path.exists():
        if time.monotonic() > deadline_s:
            raise RlsyncError(f"{path.name} was not written within {timeout_s:g} s; the process that writes it has failed")
        time.sleep(_POLL_S)
    return path.read_text(encoding="utf-8")


def write_file(path: Path, text: str) -> None:
    """So that nobody sees half of it."""
    part = path.with_suffix(".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def cases(options: Mapping[str, str | None], common: Mapping[str, Any]) -> tuple[Case, ...]:
    """Every combination of the values of LISTS, each a comma-separated list or None for the default.

    Raises ConfigError for a value that SyncConfig refuses.
    """
    lists = {name: _words(name, text) for name, text in options.items() if text is not None}
    made = []
    for values in itertools.product(*lists.values()):
        chosen = dict(zip(lists, values, strict=True))
        settings: dict[str, Any] = {LISTS[name]: _setting(name, value) for name, value in chosen.items()}
        SyncConfig(**settings, **common)
        # A number that all cases share says nothing.
        words = [
            f"{name} {value}" if name in _NUMBERS else value
            for name, value in chosen.items()
            if name not in _NUMBERS or len(lists[name]) > 1
        ]
        made.append(Case(" ".join(words) or "auto", {**settings, **common}, chosen.get("mode") == MOVED))
    return tuple(made)


def _setting(name: str, word: str) -> str | int:
    return int(word) if name in _NUMBERS else MODES[word] if name == "mode" else word


def _words(name: str, text: str) -> list[str]:
    words = text.split(",")
    if len(set(words)) != len(words) or "" in words:
        raise ConfigError(f"--{name} {text!r}: write different words with commas between them")
    if name == "mode" and (unknown := [word for word in words if word not in MODES]):
        raise ConfigError(f"--mode {unknown[0]!r}: known are {', '.join(MODES)}")
    if name in _NUMBERS and (wrong := [word for word in words if not (word.isascii() and word.isdigit())]):
        raise ConfigError(f"--{name} {wrong[0]!r}: write a whole number")
    return words


def scene(placement: str, devices: Sequence[str], actor_gpus: Sequence[int], engine_gpus: Sequence[Sequence[int]]) -> str:
    """Which of SCENES it is."""
    if not devices:
        return "cpu"
    alone = {gpu for gpus in engine_gpus for gpu in gpus} - set(actor_gpus)
    return "beside" if placement == "collocated" and alone else placement


def peers(text: str | None, scene: str, *, lora: LoraSync = "merged") -> tuple[str, ...]:
    """Names of PEERS; None is all that can be in this scene, and ``none`` is none. Raises ConfigError for one that cannot be.

    ``lora``: ``adapter`` where the actor has adapters, of which others are given in their own way alone.
    """
    possible = [name for name, peer in PEERS.items() if scene in peer.scenes and peer.lora == lora]
    if text is None:
        return tuple(possible)
    names = [] if text == "none" else text.split(",")
    for name in names:
        if name not in PEERS:
            raise ConfigError(f"--peers {name!r}: known are {', '.join(PEERS)}, or none")
        peer = PEERS[name]
        if peer.lora != lora:
            needed = "needs --lora, a rank of adapters" if lora == "merged" else "syncs weights without the adapters of --lora"
            raise ConfigError(f"--peers {name} {needed}; leave it out, or choose {', '.join(possible) or 'none'}")
        if name not in possible:
            where = " or ".join(_SCENES_IN_WORDS[known] for known in peer.scenes)
            raise ConfigError(
                f"--peers {name} works {where}, and this bench is {_SCENES_IN_WORDS[scene]}: {peer.why}; "
                f"leave it out, or choose {', '.join(possible) or 'none'}"
            )
    return tuple(dict.fromkeys(names))


def layers_of(asked: str, devices: Sequence[str]) -> Layers:
    """What ``--layers`` is here, as ``decoder_gpt`` of ``actor.spec_name`` is: "auto" takes TransformerEngine where it is installed.

    Raises ConfigError for "te" where it is not, or where there is no GPU.
    """
    has_te = bool(devices) and importlib.util.find_spec("transformer_engine") is not None
    if asked == "te" and not has_te:
        raise ConfigError("--layers te needs TransformerEngine and a CUDA device; install it, or use --layers local or auto")
    return "te" if has_te and asked != "local" else "local"


def devices_of(
    placement: str, num_actors: int, num_engines: int, engine_tp: int, devices: Sequence[str]
) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]:
    """GPUs of actor ranks and of engine workers: in order, the same ones where collocated. On CPU (no devices): numbers only.

    Raises ConfigError where there are too few.
    """
    first = num_actors if placement == "disaggregated" else 0
    engines = tuple(tuple(range(first + e * engine_tp, first + (e + 1) * engine_tp)) for e in range(num_engines))
    needed = max(num_actors, first + num_engines * engine_tp)
    if devices and needed > len(devices):
        raise ConfigError(
            f"{placement}: {num_actors} actor ranks and {num_engines * engine_tp} engine workers need {needed} GPUs, and "
            f"{len(devices)} are visible; make --actor or --rollout smaller, or use --placement collocated"
        )
    return tuple(range(num_actors)), engines
