"""An engine in this process's hands: the EngineHandle that owns an AsyncLLM, its event loop, its processes and its state.

States: ``clean`` serves the weights of one committed version; ``syncing`` makes new requests wait; ``dirty`` refuses
them until a complete sync or a restart. Knows no Ray: an actor that holds an Engine is an EngineHandle by forwarding.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import threading
import time
from collections.abc import Coroutine, Mapping, Sequence
from concurrent.futures import CancelledError
from importlib.metadata import entry_points
from typing import Any, TypeVar

import psutil

from rlsync.engine import compat
from rlsync.engine.plugin import BACKEND, register
from rlsync.engine.protocol import Completion, EngineHandle, PauseMode
from rlsync.errors import ConfigError, EngineDirtyError

__all__ = ["Completion", "Engine", "EngineHandle", "PauseMode"]

T = TypeVar("T")
_CLOSE_S = 15.0


class Engine:
    """Owns one vLLM engine and all its processes. Methods block and may be called from any thread.

    Args:
        engine_id: names the engine in errors and metrics.
        engine_args: fields of ``vllm.AsyncEngineArgs``; ``weight_transfer_config`` is added. ``load_format="dummy"`` starts
            it dirty: it serves after its first sync.
    """

    def __init__(self, engine_id: str, engine_args: Mapping[str, Any]) -> None:
        self.engine_id = engine_id
        self.num_workers = 0
        self._args = dict(engine_args)
        self._loop = asyncio.new_event_loop()
        self._thread: threading.Thread | None = None
        self._llm: Any = None
        self._changed = threading.Condition()
        self._state, self._reason, self._until = "dirty", "it is not started", 0.0
        self._epoch = 0  # grows with each mark_dirty
        self._version: int | None = None
        self._running: set[asyncio.Task[Any]] = set()
        self._asleep: frozenset[str] = frozenset()
        self._numbers = itertools.count()

    @property
    def state(self) -> str:
        """``clean``, ``syncing`` or ``dirty``."""
        return self._state

    @property
    def version(self) -> int | None:
        """Version that is served, or None for the weights of the start."""
        return self._version

    def start(self) -> None:
        """Start the engine's processes; returns when it can serve (tens of seconds). Raises ConfigError or vLLM's errors."""
        _check_plugin()
        register()
        self._thread = threading.Thread(target=self._loop.run_forever, name=f"rlsync-engine-{self.engine_id}", daemon=True)
        self._thread.start()
        try:
            self._call(self._start(), None)
        except BaseException:
            self.close()
            raise
        if self._args.get("load_format") == "dummy":
            self.mark_dirty("it was started with load_format=dummy and has had no sync")
        else:
            self._set("clean")

    async def _start(self) -> None:
        from vllm.config import WeightTransferConfig
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        args = AsyncEngineArgs(**self._args, weight_transfer_config=WeightTransferConfig(backend=BACKEND))
        self._llm = AsyncLLM.from_engine_args(args)
        parallel = self._llm.vllm_config.parallel_config
        self.num_workers = parallel.world_size * parallel.data_parallel_size

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Mapping[str, Any],
        *,
        seeds: Sequence[int] | None = None,
        timeout_s: float | None = None,
    ) -> list[tuple[Completion, ...]]:
        """Continue every prompt (token ids), ``sampling["n"]`` times each; waits while a sync is going on.

        Args:
            sampling: fields of ``vllm.SamplingParams``. Text is not made unless ``detokenize`` says so.
            seeds: of each prompt; what is drawn then depends on the seed alone and not on what was drawn before.
            timeout_s: bound of the whole call, or None.

        Raises EngineDirtyError where the engine's last sync did not commit, also when that happens meanwhile.
        """
        self._await_clean()
        return self._call(self._generate(prompts, sampling, seeds), timeout_s)

    async def _generate(
        self, prompts: Sequence[Sequence[int]], sampling: Mapping[str, Any], seeds: Sequence[int] | None
    ) -> list[tuple[Completion, ...]]:
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        fields = {"detokenize": False, "logprobs": 0, **sampling, "output_kind": RequestOutputKind.FINAL_ONLY}
        seeded = [{}] * len(prompts) if seeds is None else [{"seed": seed} for seed in seeds]
        tasks = [
            asyncio.ensure_future(self._generate_one(p, SamplingParams(**fields, **seed))) for p, seed in zip(prompts, seeded, strict=True)
        ]
        self._running.update(tasks)
        try:
            return list(await asyncio.gather(*tasks))
        except asyncio.CancelledError:
            if self._state == "dirty":
                raise self._refusal() from None
            raise
        finally:
            for task in tasks:
                task.cancel()
            self._running.difference_update(tasks)

    async def _generate_one(self, prompt: Sequence[int], params: Any) -> tuple[Completion, ...]:
        version, final = self._version, None
        request_id = f"{self.engine_id}-{next(self._numbers)}"
        async for output in self._llm.generate({"prompt_token_ids": list(prompt)}, params, request_id):
            final = output
        assert final is not None and final.finished
        return tuple(self._completion(o, version) for o in sorted(final.outputs, key=lambda o: o.index))

    def _completion(self, output: Any, version: int | None) -> Completion:
        token_ids = tuple(output.token_ids)
        logprobs: tuple[float, ...] = ()
        if output.logprobs is not None:
            logprobs = tuple(float(entry[token].logprob) for token, entry in zip(token_ids, output.logprobs, strict=True))
        return Completion(token_ids, logprobs, output.finish_reason, version, self._version)

    # EngineHandle.

    def init_weight_transfer(self, init_info: dict[str, Any], timeout_s: float) -> None:
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest

        self._call(self._llm.init_weight_transfer_engine(WeightTransferInitRequest(init_info=init_info)), timeout_s)

    def pause(self, mode: PauseMode, timeout_s: float) -> None:
        if "weights" in self._asleep:
            raise ConfigError(f"engine {self.engine_id} sleeps without its weights; wake(['weights']) before a sync")
        # Without a word from the actor a sync that hangs is a sync that failed; three phases may follow the pause.
        self._set("syncing", until=time.monotonic() + 5 * timeout_s)
        self._call(self._llm.pause_generation(mode=mode, clear_cache=False), timeout_s)

    def update_weights(self, update_info: dict[str, Any], timeout_s: float) -> None:
        self._call(compat.run_update(self._llm, update_info, str(update_info["version"])), timeout_s)

    def reset_caches(self, timeout_s: float) -> None:
        self._call(self._reset_caches(), timeout_s)

    async def _reset_caches(self) -> None:
        # Kept requests are preempted: their keys and values are computed again with the new weights.
        if await self._llm.reset_prefix_cache(reset_running_requests=True) is False:
            raise RuntimeError(f"engine {self.engine_id} could not reset its prefix cache: requests hold blocks of it")
        await self._llm.reset_mm_cache()
        await self._llm.reset_encoder_cache()

    def resume(self, version: int, timeout_s: float) -> None:
        epoch = self._epoch
        if self._state != "syncing":
            raise self._refusal()
        self._call(self._llm.resume_generation(), timeout_s)
        with self._changed:
            # A call that outlived its sync must not undo mark_dirty.
            if self._epoch != epoch:
                raise self._refusal()
            self._version = version
            self._set("clean")

    def mark_dirty(self, reason: str) -> None:
        with self._changed:
            self._epoch += 1
            self._set("dirty", reason)
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._cancel_running)

    # Memory.

    def sleep(self, level: int, timeout_s: float) -> None:
        """Give device memory back: level 1 keeps the weights in host memory, level 2 drops them and makes the engine dirty.

        Raises ConfigError where the platform cannot (CPU).
        """
        if not compat.can_sleep():
            raise ConfigError(f"engine {self.engine_id}: this platform has no sleep mode; leave the engine awake during training")
        self._call(self._llm.sleep(level), timeout_s)
        self._asleep = frozenset({"weights", "kv_cache"})
        if level >= 2:
            self.mark_dirty("its weights were dropped by sleep level 2, and no sync has followed")

    def wake(self, tags: Sequence[str], timeout_s: float) -> None:
        """Take memory again for ``weights`` or ``kv_cache``; a sync goes between the two."""
        self._call(self._llm.wake_up(list(tags)), timeout_s)
        self._asleep -= frozenset(tags)

    def close(self) -> None:
        """End all processes of the engine, stopped ones too. Idempotent."""
        if self._loop.is_closed():
            return
        self._set("dirty", "it is closed")
        if self._llm is not None:
            children = _descendants(self._llm)
            segments = _segments(children)
            with contextlib.suppress(TimeoutError):
                self._call(self._shut_down(), 2 * _CLOSE_S)
            _end(children, segments)
            self._llm = None
        if self._thread is not None:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
        self._loop.close()

    async def _shut_down(self) -> None:
        self._cancel_running()
        await compat.shut_down(self._llm, _CLOSE_S)

    # Common.

    def _call(self, coroutine: Coroutine[Any, Any, T], timeout_s: float | None) -> T:
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result(timeout_s)
        except TimeoutError:
            if future.done():
                raise
            future.cancel()
            raise TimeoutError(f"engine {self.engine_id} did not answer within {timeout_s:g} s") from None
        except CancelledError:
            raise self._refusal() from None

    def _await_clean(self) -> None:
        with self._changed:
            while self._state == "syncing" and time.monotonic() < self._until:
                self._changed.wait(self._until - time.monotonic())
            if self._state == "syncing":
                self._state, self._reason = "dirty", "a sync neither committed nor failed in time"
            if self._state == "dirty":
                raise self._refusal()

    def _refusal(self) -> EngineDirtyError:
        return EngineDirtyError(f"engine {self.engine_id} refuses to generate: {self._reason}; sync it completely or restart it")

    def _set(self, state: str, reason: str = "", until: float = 0.0) -> None:
        with self._changed:
            self._state, self._reason, self._until = state, reason, until
            self._changed.notify_all()

    def _cancel_running(self) -> None:
        for task in self._running:
            task.cancel()


def _check_plugin() -> None:
    """The engine's processes find the receiver through the installed entry point only."""
    if not any(e.name == BACKEND for e in entry_points(group="vllm.general_plugins")):
        raise ConfigError("rlsync is not installed in this environment, so vLLM cannot find its plug-in; run: pip install -e . --no-deps")
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and BACKEND not in allowed.split(","):
        raise ConfigError(f"VLLM_PLUGINS={allowed} keeps vLLM from loading the plug-in; add {BACKEND} to it or unset it")


def _descendants(llm: Any) -> list[psutil.Process]:
    found: list[psutil.Process] = []
    for core in compat.core_processes(llm):
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(core.pid)
            found += [process, *process.children(recursive=True)]
    return found


def _segments(processes: list[psutil.Process]) -> set[str]:
    """Shared memory that vLLM's CPU workers make for their collectives, and remove only when they end by themselves."""
    found = set()
    for process in processes:
        with contextlib.suppress(psutil.Error):
            found |= {m.path for m in process.memory_maps() if m.path.startswith(compat.SHM_PREFIX)}
    return found


def _end(processes: list[psutil.Process], segments: set[str]) -> None:
    """vLLM asks its processes to end; those that cannot answer, being stopped, are killed, and what they left is removed."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, timeout=_CLOSE_S)
    for segment in segments:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(segment)
