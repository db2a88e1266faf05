"""An engine in a Ray actor: ``EngineActor`` is what the actor runs, ``RayEngine`` the handle that other processes hold.

The only file of rlsync that knows Ray, and it imports Ray when a handle is first used: rlsync works where Ray is not installed. The
handle needs no vLLM.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Any

from rlsync.engine import forking
from rlsync.engine.handles import Completion, PauseMode, Prompt, SyncOrder
from rlsync.engine.handles.prompts import Sampling
from rlsync.errors import RlsyncError
from rlsync.gc_pause import gc_paused

# Threads of the Ray actor, in which calls generate: no more at once, as others wait.
ENGINE_THREADS = 8
# And its threads for all else, of a concurrency group of their own: calls that generate wait for the end of a sync, and would otherwise
# keep the sync from coming to that end. An argument of ray.remote, as Ray takes groups with a class alone.
_CONTROL = "control"
CONTROL_GROUP = {_CONTROL: 8}
# For an actor to say how it is, and to end: vLLM gets two times 15 s itself.
ENGINE_STATE_S = 10.0
ENGINE_CLOSE_S = 40.0
# Calls end by themselves at their own deadline, one that generates after it has waited for a sign of life. An actor that has still not
# answered so much later is stopped or stuck.
ENGINE_GRACE_S = 20.0


class EngineActor:
    """Runs inside a Ray actor of several threads and forwards to the ``Engine`` that it owns.

    Args:
        engine_id, engine_args: as of ``rlsync.engine.handles.local.Engine``.
    """

    def __init__(self, engine_id: str, engine_args: Mapping[str, Any]) -> None:
        if forking.is_asked_for():
            # It imports vLLM while this process does.
            forking.EngineProcess.get_ready()
        # Here and not above: it imports vLLM, which only this process needs.
        with gc_paused(collect_after=False):
            from rlsync.engine.handles.local import Engine

        self._engine = Engine(engine_id, engine_args)

    def start(self) -> int:
        """Start vLLM; returns the number of its workers. Raises what ``Engine.start`` raises."""
        with self.explained("start"):
            self._engine.start()
        return self._engine.num_workers

    def call(self, method: str, *arguments: Any) -> Any:
        """One of the calls of an EngineHandle, or ``sleep``, ``wake`` or ``reset_caches``."""
        return getattr(self._engine, method)(*arguments)

    def state(self) -> str:
        """``clean``, ``syncing`` or ``dirty``."""
        return self._engine.state

    def failure_reason(self) -> str | None:
        """Why the engine must be replaced, or None."""
        return self._engine.failure_reason()

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, seeds: Sequence[int] | None, timeout_s: float | None
    ) -> list[tuple[Completion, ...]]:
        """``Engine.generate``."""
        with self.explained("generate"):
            return self._engine.generate(prompts, sampling, seeds=seeds, timeout_s=timeout_s)

    def stream(
        self, prompts: Sequence[Prompt], sampling: Sampling, seeds: Sequence[int] | None, timeout_s: float | None
    ) -> Iterator[list[tuple[int, tuple[Completion, ...]]]]:
        """``Engine.generate`` that yields (number of the prompt, completions) pairs as they end."""
        ended: SimpleQueue[tuple[int, tuple[Completion, ...]] | None] = SimpleQueue()
        with self.explained("generate"), ThreadPoolExecutor(1) as thread:
            call = thread.submit(
                self._engine.generate, prompts, sampling, seeds=seeds, timeout_s=timeout_s, on_result=lambda *pair: ended.put(pair)
            )
            call.add_done_callback(lambda _: ended.put(None))
            is_over = False
            while not is_over:
                batch = [ended.get()]
                while not ended.empty():
                    batch.append(ended.get())
                is_over = None in batch
                if pairs := [pair for pair in batch if pair is not None]:
                    yield pairs
            call.result()

    def close(self) -> None:
        """End vLLM's processes."""
        self._engine.close()

    @contextmanager
    def explained(self, what: str) -> Iterator[None]:
        """Wraps ``start`` and ``generate``. Subclasses that keep logs add the output of vLLM's processes to an exception."""
        yield


class ActorGoneError(RlsyncError):
    """The Ray actor of an engine has ended."""


class RayEngine:
    """An ``EngineHandle`` on an ``EngineActor``; can be sent to other Ray actors.

    Args:
        engine_id: names the engine in errors and metrics.
        num_workers: as ``EngineActor.start`` returned it.
        actor: Ray's handle of the actor, which has ``ENGINE_THREADS`` threads, and whose class was given to
            ``ray.remote(concurrency_groups=CONTROL_GROUP)``: Ray ends the process of one that was not at the first call.
    """

    def __init__(self, engine_id: str, num_workers: int, actor: Any) -> None:
        self.engine_id, self.num_workers, self.actor = engine_id, num_workers, actor
        self.version: int | None = None
        # Whether a call of the control group has been answered, so that the actor has the group.
        self._has_group = False

    @classmethod
    def launch(cls, engine_id: str, engine_args: Mapping[str, Any], *, timeout_s: float = 600.0, **options: Any) -> RayEngine:
        """Start an ``EngineActor`` with vLLM in it; blocks until it can serve (tens of seconds).

        Args:
            engine_args: fields of ``vllm.AsyncEngineArgs``.
            timeout_s: bound of the start.
            options: of the Ray actor (``num_gpus``, ``runtime_env``, ``scheduling_strategy``, ...). It takes no CPU without ``num_cpus``.

        Raises ConfigError and RlsyncError as ``Engine.start``, TimeoutError after ``timeout_s``; nothing is left of the actor then.
        """
        import ray

        actor_class = ray.remote(concurrency_groups=CONTROL_GROUP)(EngineActor)
        made = actor_class.options(**{"num_cpus": 0, "max_concurrency": ENGINE_THREADS, **options})
        engine = cls(engine_id, 0, made.remote(engine_id, dict(engine_args)))
        try:
            engine.num_workers = engine._answer("start", engine.actor.start.remote(), timeout_s)
        except BaseException:
            engine.close()
            raise
        return engine

    @property
    def state(self) -> str:
        """State of the engine, asked of its actor."""
        return str(self._control("state", ENGINE_STATE_S, "state"))

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        *,
        seeds: Sequence[int] | None = None,
        timeout_s: float | None = None,
    ) -> list[tuple[Completion, ...]]:
        """``Engine.generate``, which keeps ``timeout_s`` itself; TimeoutError ``ENGINE_GRACE_S`` later where the actor does not answer."""
        limit_s = None if timeout_s is None else timeout_s + ENGINE_GRACE_S
        answers: list[tuple[Completion, ...]] = self._answer(
            "generate", self.actor.generate.remote(prompts, sampling, seeds, timeout_s), limit_s
        )
        return answers

    def init_weight_transfer(self, init_info: dict[str, Any], timeout_s: float) -> None:
        self._call("init_weight_transfer", timeout_s, init_info)

    def sync(self, order: SyncOrder) -> float:
        seconds: float = self._control("sync", order.timeout_s, "call", "sync", order)
        self.version = order.version
        return seconds

    def pause(self, mode: PauseMode, sync: str, timeout_s: float) -> None:
        self._call("pause", timeout_s, mode, sync)

    def update_weights(self, update_info: dict[str, Any], timeout_s: float) -> None:
        self._call("update_weights", timeout_s, update_info)

    def resume(self, version: int | None, timeout_s: float) -> None:
        self._call("resume", timeout_s, version)
        self.version = version

    def mark_dirty(self, reason: str, sync: str = "") -> None:
        # Not awaited: the actor may be the one that is gone.
        self._begin("call", "mark_dirty", reason, sync)

    def close(self) -> None:
        """End the engine's processes and the actor, by force where they do not end. Idempotent."""
        import ray

        ray.wait([self._begin("close")], timeout=ENGINE_CLOSE_S)
        ray.kill(self.actor, no_restart=True)

    def _call(self, method: str, timeout_s: float, *arguments: Any) -> None:
        self._control(method, timeout_s, "call", method, *arguments, timeout_s)

    def _control(self, what: str, timeout_s: float, method: str, *arguments: Any) -> Any:
        """Result of a call that waits for none that generates; raises as ``_answer``."""
        try:
            answer = self._answer(what, self._begin(method, *arguments), timeout_s)
        except ActorGoneError as error:
            if self._has_group:
                raise
            raise ActorGoneError(
                f"{error}; if its class was not given to ray.remote(concurrency_groups=CONTROL_GROUP) of rlsync.engine.handles.ray, Ray "
                "has ended it at this call"
            ) from None
        self._has_group = True
        return answer

    def _begin(self, method: str, *arguments: Any) -> Any:
        """Start a call of the actor that waits for none that generates."""
        return getattr(self.actor, method).options(concurrency_group=_CONTROL).remote(*arguments)

    def _answer(self, method: str, reference: Any, timeout_s: float | None) -> Any:
        """Result of a call. Raises the actor's exception, TimeoutError, or RlsyncError where the actor is gone."""
        import ray

        try:
            return ray.get(reference, timeout=timeout_s)
        except ray.exceptions.GetTimeoutError:
            raise TimeoutError(f"engine {self.engine_id} did not answer {method} within {timeout_s:g} s") from None
        except ray.exceptions.RayActorError as error:
            raise ActorGoneError(f"the Ray actor of engine {self.engine_id} is gone: {error}") from None
        except ray.exceptions.RayTaskError as error:
            # Not as_instanceof_cause(): its text is Ray's, with ours somewhere inside.
            raise (error.cause if isinstance(error.cause, Exception) else error) from None
