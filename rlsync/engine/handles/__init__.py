"""Handles of engines, as the actor's side and the rollout loop use them: their protocol, and its data. Imports no vLLM."""

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
            makes it as many as the picture takes, by the processor in the model's folder.
        pictures: ``PIL.Image.Image`` in RGB, in the order of their placeholders.
    """

    token_ids: tuple[int, ...]
    pictures: tuple[Any, ...]


# Token ids alone, or with pictures.
Prompt = Sequence[int] | PicturePrompt


@dataclass(frozen=True, slots=True)
class SyncOrder:
    """What an engine has to do in one sync.

    Attributes:
        pause_mode: what becomes of running requests.
        sync: names the sync to ``pause`` and ``mark_dirty``.
        update_info: for the workers.
        version: that it serves afterwards.
        phase_s: deadline of a pause, and of a resume. update_s: of the update between.
    """

    pause_mode: PauseMode
    sync: str
    update_info: Mapping[str, Any]
    version: int
    phase_s: float
    update_s: float

    @property
    def timeout_s(self) -> float:
        return 2 * self.phase_s + self.update_s


class EngineHandle(Protocol):
    """An engine as WeightSyncer drives it from rank 0. Every call blocks, is bounded by ``timeout_s`` and may run in its own thread."""

    engine_id: str
    num_workers: int

    @property
    def state(self) -> str:
        """``clean``, ``syncing`` or ``dirty``."""
        ...

    @property
    def version(self) -> int | None:
        """Version that is served, or None for the weights of the start."""
        ...

    def init_weight_transfer(self, init_info: dict[str, Any], timeout_s: float) -> None:
        """Make every worker dial home; returns when all peers of the run are connected."""
        ...

    def sync(self, order: SyncOrder) -> float:
        """``pause``, ``update_weights`` and ``resume``, where the engine is: each way to it counts. Seconds that the last one took.

        Raises EngineCallError, which names the call that failed; none is begun behind that, nor behind ``mark_dirty`` of this sync.
        """
        ...

    def pause(self, mode: PauseMode, sync: str, timeout_s: float) -> None:
        """Enter ``syncing``: running requests are aborted, awaited or kept, new ones wait.

        Returns when nothing that is asked of the engine afterwards can find it running.
        ``sync`` names what the engine is paused for. Raises EngineDirtyError where ``mark_dirty`` has named it already.
        """
        ...

    def update_weights(self, update_info: dict[str, Any], timeout_s: float) -> None:
        """One sync in all workers, until the workers of all engines have committed.

        Then everything computed from the former weights is forgotten: prefix, multimodal and encoder caches.
        """
        ...

    def resume(self, version: int | None, timeout_s: float) -> None:
        """Become ``clean`` at ``version`` (None: the weights of the start) and serve."""
        ...

    def mark_dirty(self, reason: str, sync: str = "") -> None:
        """Refuse to serve, for this reason, until a later sync is complete. Calls of ``sync`` may still be in progress."""
        ...


def call_in_turn(calls: Mapping[str, Callable[[], object]]) -> float:
    """Make the calls of a sync, in their order. Seconds that the last one took. Raises EngineCallError for one that fails."""
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
    """One sampled continuation.

    ``token_ids`` and ``logprobs`` have equal length, unless no log-probabilities were asked for; one is that of the sampled
    token, as vLLM's ``logprobs_mode`` defines it. ``finish_reason`` is vLLM's: ``stop``, ``length``, or ``abort`` for what a pause cut
    off, with the tokens so far. ``version`` sampled the first token and ``last_version`` the last; they differ for requests that went
    through a sync. None means the weights the engine was started with. Where vLLM does not say (before 0.32, and over HTTP) they are
    the versions at admission and at completion, so that a request which waited out a sync is called older than it is.
    ``routes`` are the experts that prompt and continuation went to, but for the last token, which was never computed: an array
    (tokens, layers, topk) of integers, by an ``Engine`` that was started with ``enable_return_routed_experts``.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: str
    version: int | None
    last_version: int | None
    routes: Any = None
