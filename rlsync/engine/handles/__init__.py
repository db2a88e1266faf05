"""Engine handles: the protocol by which WeightSyncer drives an engine, and the data of its calls and of generation. Imports no vLLM."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from rlsync.errors import EngineCallError, error_text

PauseMode = Literal["abort", "wait", "keep"]


@dataclass(frozen=True, slots=True)
class PicturePrompt:
    """A prompt with pictures in it.

    Attributes:
        token_ids: with one placeholder (``image_token_id`` of config.json) for each picture, as a chat template writes it. The engine
            repeats it as often as the picture has features, by the processor in the model's folder.
        pictures: ``PIL.Image.Image`` in RGB, in the order of their placeholders.
    """

    token_ids: tuple[int, ...]
    pictures: tuple[Any, ...]


# Token ids alone, or with pictures.
Prompt = Sequence[int] | PicturePrompt


@dataclass(frozen=True, slots=True)
class SyncOrder:
    """Arguments of ``EngineHandle.sync``.

    Attributes:
        pause_mode: what happens to running requests; see ``EngineHandle.pause``.
        sync: identifies this sync in ``pause`` and ``mark_dirty``.
        update_info: for ``update_weights``.
        version: for ``resume``.
        phase_s: deadline of the pause, and of the resume, in seconds.
        update_s: deadline of the update, in seconds.
    """

    pause_mode: PauseMode
    sync: str
    update_info: Mapping[str, Any]
    version: int
    phase_s: float
    update_s: float

    @property
    def timeout_s(self) -> float:
        """Deadline of all three, in seconds."""
        return 2 * self.phase_s + self.update_s


class EngineHandle(Protocol):
    """An engine as WeightSyncer drives it, on actor rank 0. Calls block for at most ``timeout_s`` seconds, and may come from any thread.

    ``Engine``, ``RayEngine`` and ``HttpEngine`` are handles. One of your own needs ``state``, ``init_weight_transfer``, ``sync`` and
    ``mark_dirty``, where ``sync`` may be ``sync_in_turn``.

    Attributes:
        engine_id: names the engine in errors and metrics; unique among the engines of a syncer.
        num_workers: worker processes of the engine, data-parallel replicas included.
    """

    engine_id: str
    num_workers: int

    @property
    def state(self) -> str:
        """``clean`` (serves a committed version), ``syncing``, or ``dirty`` (holds no committed version, and refuses to generate)."""
        ...

    @property
    def version(self) -> int | None:
        """The version that is served; None for the weights that the engine was started with."""
        ...

    def init_weight_transfer(self, init_info: dict[str, Any], timeout_s: float) -> None:
        """vLLM's ``init_weight_transfer_engine``: every worker connects to the coordinator, with ``init_info`` as the fields of
        ``rlsync.engine.worker.InitInfo``. Returns when all peers of the run are connected."""
        ...

    def sync(self, order: SyncOrder) -> float:
        """``pause``, ``update_weights`` and ``resume`` in one call, because each round trip to a remote engine costs time.

        Returns the seconds that ``resume`` took. Raises EngineCallError naming the call that failed. No further call is begun after a
        failure, nor after ``mark_dirty`` of this sync.
        """
        ...

    def pause(self, mode: PauseMode, sync: str, timeout_s: float) -> None:
        """Enter ``syncing``: new requests wait, and running ones are aborted, awaited or kept as ``mode`` says.

        Returns when the engine computes nothing more. Raises EngineDirtyError where ``mark_dirty`` has been called for ``sync``.
        """
        ...

    def update_weights(self, update_info: dict[str, Any], timeout_s: float) -> None:
        """One sync in all workers of this engine; returns when the workers of all engines have committed and this engine's caches (prefix,
        multimodal, encoder) are reset. ``update_info``: fields of ``rlsync.engine.worker.UpdateInfo``, and ``keeps_caches``."""
        ...

    def resume(self, version: int | None, timeout_s: float) -> None:
        """Become ``clean`` at ``version`` (None: the weights of the start) and serve requests again."""
        ...

    def mark_dirty(self, reason: str, sync: str = "") -> None:
        """Become ``dirty``: refuse requests, with this reason, until a later sync commits. Does not block, and may be called while other
        calls of the sync named ``sync`` are in progress."""
        ...


def sync_in_turn(engine: EngineHandle, order: SyncOrder) -> float:
    """``EngineHandle.sync`` of a handle that has ``pause``, ``update_weights`` and ``resume``, and no quicker way to all three."""
    return call_in_turn(
        {
            "pause": lambda: engine.pause(order.pause_mode, order.sync, order.phase_s),
            "update": lambda: engine.update_weights(dict(order.update_info), order.update_s),
            "resume": lambda: engine.resume(order.version, order.phase_s),
        }
    )


def call_in_turn(calls: Mapping[str, Callable[[], object]]) -> float:
    """Make the named calls of a sync one after the other. Returns the seconds of the last. Raises EngineCallError for one that fails."""
    began_s = time.monotonic()
    for name, call in calls.items():
        began_s = time.monotonic()
        try:
            call()
        except Exception as error:
            raise EngineCallError(name, error_text(error)) from error
    return time.monotonic() - began_s


@dataclass(frozen=True, slots=True)
class Completion:
    """One sampled continuation of a prompt.

    Attributes:
        token_ids: sampled tokens.
        logprobs: log-probability of each sampled token, as vLLM's ``logprobs_mode`` defines it; empty where none were asked for.
        finish_reason: vLLM's: ``stop``, ``length``, or ``abort`` where a pause cut the request off.
        version: of the weights that sampled the first token; None for those that the engine was started with.
        last_version: of the weights that sampled the last token, which differs for a request that went through a sync. Where vLLM does not
            report them (before 0.32, and over HTTP) both are the engine's versions when the request was admitted and when it ended, so
            that one which waited out a sync seems older than it is.
        routes: experts of each token, integers of shape (tokens, layers, topk); prompt and continuation without the last token, which no
            forward pass has seen. From an ``Engine`` started with ``enable_return_routed_experts``, else None.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: str
    version: int | None
    last_version: int | None
    routes: Any = None
