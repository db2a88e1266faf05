"""SyncConfig, the settings of a connection. Plain data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_type_hints

from rlsync.errors import ConfigError
from rlsync.plan.transports import TRANSPORTS
from rlsync.plan.verification import OFF

LoraSync = Literal["merged", "adapter"]
LORA: tuple[LoraSync, ...] = get_args(LoraSync)
# Nobody can dial these, and nothing should listen on networks that nobody named.
_EVERY_ADDRESS = ("", "*", "0.0.0.0", "::")


def _setting(default: Any, doc: str, **limits: float) -> Any:
    """A field with its meaning and, for a number, its ``limits`` (min, above, max, below), for whoever prints or checks them."""
    return field(default=default, metadata={"doc": doc, "limits": limits})


@dataclass(frozen=True, slots=True)
class SyncConfig:
    """Settings of a connection, the same on all actor ranks.

    Attributes:
        bucket_bytes: most bytes of a bucket that one worker takes or one actor rank gives; at least its largest tensor, which is never
            split. What ``nccl`` carries from parameters to parameters travels in steps of
            so many bytes, and of ``rlsync.plan.links.MOST_STEP_BYTES`` at most.
        num_slots: slots of the ring, and of the memory for messages at both ends. With 2, one bucket is filled while the one before
            it is loaded.
        timeout_s: deadline of each phase: connect, begin, transfer, commit, resume.
        sink: how workers take bytes in: ``direct`` into the live parameters, ``layerwise`` through vLLM's post-processing,
            ``loaders`` as HF tensors through vLLM's own loaders. ``auto`` is the first that is right for each module.
        verify: which regions are summed up where they come from and where they end: ``off``, ``full``, or ``sampled``: all in
            the first sync and in each after one that failed, and each region at least once in
            ``rlsync.plan.verification.SAMPLE_PERIOD`` consecutive ones.
        transport: how bytes get to the workers: ``ipc`` out of the actor's GPU memory, which workers of its host map; ``shm``
            through shared memory; ``nccl`` as messages from GPU to GPU, no two of them the same; ``gloo`` as messages through
            host memory. ``auto`` is for each worker the first of these that reaches it. See ``rlsync.plan.transports``.
        staging: what ``ipc`` reads: ``auto`` the parameters where they lie, and a ring in GPU memory instead of those that cannot be
            mapped, or leave between syncs and are on another GPU than their reader; ``always`` the ring.
        pause_mode: what happens to requests in flight: ``abort``, ``wait`` for them, or ``keep`` and go on with new weights.
        bind_host: address on which rank 0 listens for actor ranks and engine workers; those of other hosts have to reach it.
        lora: how engines get low-rank adapters: ``merged`` into the weights, or ``adapter``: beside the base, which is sent once, in the
            slots of engines that were started with ``enable_lora``. The source says the same.
    """

    bucket_bytes: int = _setting(
        256 * 2**20,
        "most bytes that a worker takes, or an actor rank gives, at a time; at least a whole tensor",
        min=1,
    )
    num_slots: int = _setting(2, "staging buckets in flight; with 1, filling and reading alternate", min=1)
    timeout_s: float = _setting(600.0, "deadline of each phase of a sync", above=0)
    sink: Literal["auto", "direct", "layerwise", "loaders"] = _setting(
        "auto",
        "how workers take weights in: direct: into live parameters; layerwise: through vLLM's post-processing; loaders: through vLLM's "
        "loaders; auto: of each module the first that is right",
    )
    transport: Literal["auto", "ipc", "shm", "nccl", "gloo"] = _setting(
        "auto", "how bytes travel; auto: ipc from GPU to GPU of a host, shm on a host without, nccl or gloo to workers on other hosts"
    )
    staging: Literal["auto", "always"] = _setting(
        "auto",
        "what ipc reads: always: a ring in GPU memory that parameters are copied to; auto: the parameters themselves, and a ring for those "
        "that cannot be mapped, or are offloaded and on another GPU",
    )
    verify: Literal["off", "sampled", "full"] = _setting(
        "sampled",
        "checksums that are compared before a version is served; full: all; sampled: all in the first sync and after a failed one, else a "
        "sixteenth; off: none",
    )
    pause_mode: Literal["abort", "wait", "keep"] = _setting(
        "abort", "requests that run when a sync begins; abort: they end; wait: the sync waits for them; keep: they go on with new weights"
    )
    bind_host: str = _setting("127.0.0.1", "address on which actor rank 0 listens; engines on other hosts must reach it")
    lora: LoraSync = _setting(
        "merged", "adapters of actor.lora: merged into the weights that are sent; or adapter: they alone are sent, beside the base"
    )

    def __post_init__(self) -> None:
        for key in ("bucket_bytes", "num_slots"):
            if type(number := getattr(self, key)) is not int:
                raise ConfigError(f"weight_sync.{key} is {number!r}; it must be a whole number")
        if self.bucket_bytes < 1:
            raise ConfigError(f"weight_sync.bucket_bytes is {self.bucket_bytes}; it must be positive")
        if self.num_slots < 1:
            raise ConfigError(f"weight_sync.num_slots is {self.num_slots}; it must be at least 1, and 2 to overlap filling and loading")
        if not self.timeout_s > 0:
            raise ConfigError(f"weight_sync.timeout_s is {self.timeout_s}; it must be positive")
        if self.bind_host in _EVERY_ADDRESS:
            raise ConfigError(f"weight_sync.bind_host is {self.bind_host!r}, which is every address; name the one that engines can reach")
        for key, kind in get_type_hints(SyncConfig).items():
            # Transports are rows of a table, to which others can be added.
            known = ("auto", *TRANSPORTS) if key == "transport" else get_args(kind)
            if known and getattr(self, key) not in known:
                raise ConfigError(f"weight_sync.{key} is {getattr(self, key)!r}; known are {', '.join(known)}")
        if self.lora == "adapter" and self.verify == OFF:
            raise ConfigError(
                "weight_sync.lora is adapter and verify is off: by checksums alone is it known that engines still have the base, which is "
                "sent once; set verify to sampled"
            )
        if self.lora == "adapter" and self.sink == "loaders":
            raise ConfigError(
                "weight_sync.lora is adapter and sink is loaders, which takes whole checkpoints, without adapters; set sink to auto"
            )
