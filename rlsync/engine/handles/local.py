"""An engine that this process owns: the EngineHandle that owns an AsyncLLM, its processes, and the shared memory that they leave behind.

Knows no Ray: an actor that holds an Engine is an EngineHandle by forwarding.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import entry_points
from typing import Any

import psutil

from rlsync.engine import forking
from rlsync.engine.compat import engine as compat
from rlsync.engine.compat import lora
from rlsync.engine.compat.features import check as check_features
from rlsync.engine.handles import Completion, PauseMode, PicturePrompt, Prompt, SyncOrder
from rlsync.engine.handles.adapters import AdapterRequests, Served
from rlsync.engine.handles.calls import Calls, Gate, sync_gated
from rlsync.engine.handles.prompts import Sampling, fields_of_each, plain_ids, seeds_of_each
from rlsync.engine.plugin import BACKEND, declare_owner, register
from rlsync.errors import ConfigError, RlsyncError

_CLOSE_S = 15.0
# Held while an engine that counts statistics starts: vLLM takes the metrics of all engines out of the process's registry and puts the new
# engine's in, and two engines at once would both put theirs in, which the registry refuses.
_STATISTICS = threading.Lock()
# What a sleeping engine gave back, in the order in which it is taken again.
_TAGS = ("weights", "kv_cache")


class Engine:
    """Owns one vLLM engine and all its processes. Methods block and may be called from any thread.

    Args:
        engine_id: names the engine in errors and metrics.
        engine_args: fields of ``vllm.AsyncEngineArgs`` but ``weight_transfer_config``, which is added; ``max_num_batched_tokens`` and
            ``max_num_seqs`` are by default those of ``vllm.LLM``. ``load_format="dummy"`` starts it dirty: it serves after its first
            sync. With ``enable_lora`` it takes the adapters of ``weight_sync.lora=adapter``, and a request runs to its end on those of
            the version that it began with.

    Raises ConfigError where ``engine_args`` has ``weight_transfer_config``.
    """

    def __init__(self, engine_id: str, engine_args: Mapping[str, Any]) -> None:
        if "weight_transfer_config" in engine_args:
            raise ConfigError(f"engine {engine_id}: weight_transfer_config is that of rlsync, which is added; leave it out")
        self.engine_id = engine_id
        self.num_workers = 0
        self._args = dict(engine_args)
        self._gate = Gate(engine_id, "it is not started")
        self._calls = Calls(self._gate)
        self._llm: Any = None
        self._vocab_size = 0
        self._processes = Processes(engine_id)
        self._asleep: frozenset[str] = frozenset()
        self._numbers = itertools.count()
        # Of a pause that is left to the update that follows.
        self._pause_mode: PauseMode | None = None
        # The rest of an update that the workers have committed, waited for by the resume that follows. Of the event loop.
        self._ending: asyncio.Future[None] | None = None
        # Whether the engine's core has gone on by itself at the end of the last update.
        self._has_resumed = False
        self._adapters: AdapterRequests | None = None

    @property
    def state(self) -> str:
        """``clean``, ``syncing`` or ``dirty``."""
        return self._gate.state

    @property
    def version(self) -> int | None:
        """Version that is served, or None for the weights of the start."""
        return self._gate.version

    def start(self) -> None:
        """Start the engine's processes, once; returns when it can serve (tens of seconds). Raises ConfigError or vLLM's errors.

        Several engines of one process start side by side with ``disable_log_stats``, and one after the other without.
        """
        if self._calls.closed:
            raise ConfigError(f"engine {self.engine_id} is closed; make another one")
        if self._calls.started:
            raise ConfigError(f"engine {self.engine_id} is started already")
        _check_plugin()
        register()
        declare_owner()
        self._calls.start()
        try:
            self._calls.run(self._start(), None)
        except BaseException:
            self.close()
            raise
        if self._args.get("load_format") == "dummy":
            self.mark_dirty("it was started with load_format=dummy and has had no sync")
        else:
            self._gate.open()

    async def _start(self) -> None:
        from vllm.config import WeightTransferConfig
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.usage.usage_lib import UsageContext
        from vllm.v1.engine.async_llm import AsyncLLM

        if compat.runs_on_cpu():
            compat.look_at_models_here()
            if forking.is_asked_for():
                compat.start_cores_with(forking.EngineContext)
        else:
            compat.spawn_where_forks_have_no_gpu()
        args = AsyncEngineArgs(**self._args, weight_transfer_config=WeightTransferConfig(backend=BACKEND))
        # Rollouts come as many at once: without a context vLLM would schedule 2,048 tokens a step.
        config = args.create_engine_config(usage_context=UsageContext.LLM_CLASS)
        # As its workers would at connect, before they start.
        check_features(config)
        if config.lora_config is not None:
            self._adapters = AdapterRequests(config.lora_config.max_loras)
        with contextlib.nullcontext() if args.disable_log_stats else _STATISTICS:
            self._llm = AsyncLLM.from_vllm_config(
                config, enable_log_requests=args.enable_log_requests, disable_log_stats=args.disable_log_stats
            )
        self._vocab_size = config.model_config.get_vocab_size()
        parallel = self._llm.vllm_config.parallel_config
        self.num_workers = parallel.world_size * parallel.data_parallel_size
        self._processes.look(self._llm)

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        *,
        seeds: Sequence[int] | None = None,
        timeout_s: float | None = None,
        on_result: Callable[[int, tuple[Completion, ...]], None] | None = None,
    ) -> list[tuple[Completion, ...]]:
        """Continue every prompt, ``sampling["n"]`` times each; waits while a sync is going on.

        Args:
            sampling: fields of ``vllm.SamplingParams``, the same of all prompts or a mapping for each. Text is not made unless
                ``detokenize`` says so.
            seeds: of each prompt; what is drawn then depends on the seed alone and not on what was drawn before.
            timeout_s: bound of the whole call, or None.
            on_result: called with the number of a prompt and its completions as soon as these have ended, in a thread of the engine.

        Raises EngineDirtyError where the engine's last sync did not commit, also when that happens meanwhile, and where ``timeout_s``
        passed and a process of it is stopped; TimeoutError where the engine is only slow: it ends the requests and stays clean;
        ConfigError where ``sampling`` has a field that vLLM has not or a value that it does not take, where a prompt has not one
        placeholder for each of its pictures, or the model takes none, where it is empty or has ids that the model has no token for, and
        where mappings of ``sampling`` or ``seeds`` are not as many as the prompts. Raises what ``on_result`` raises.
        """
        self._gate.wait(timeout_s)
        if self._asleep:
            raise ConfigError(f"engine {self.engine_id} sleeps without its {self._sleeps_without()}; wake it before it generates")
        from vllm.sampling_params import RequestOutputKind

        from rlsync.engine.compat.sampling import sampling_params

        chosen = fields_of_each(self.engine_id, sampling, len(prompts))
        always = {"output_kind": RequestOutputKind.FINAL_ONLY}
        fields = {id(one): {"detokenize": False, "logprobs": 0, **one, **always} for one in chosen}
        try:
            params = sampling_params([fields[id(one)] for one in chosen], seeds_of_each(self.engine_id, seeds, len(prompts)))
        except ConfigError as error:
            raise ConfigError(f"engine {self.engine_id}: {error}") from error.__cause__
        inputs = [self._input(prompt) for prompt in prompts]
        requests = [self._generate_one(each, p) for each, p in zip(inputs, params, strict=True)]
        return self._calls.run_requests(requests, timeout_s, lambda: self._llm.is_paused(), on_result)

    def _input(self, prompt: Prompt) -> dict[str, Any]:
        """The prompt as vLLM takes it. Raises ConfigError where pictures and placeholders do not match."""
        token_ids, pictures = (prompt.token_ids, prompt.pictures) if isinstance(prompt, PicturePrompt) else (prompt, ())
        ids = plain_ids(self.engine_id, token_ids, self._vocab_size)
        placeholder = compat.picture_placeholder(self._llm)
        if placeholder is None and pictures:
            raise ConfigError(f"engine {self.engine_id}: a prompt has {len(pictures)} pictures, and its model takes none")
        found = 0 if placeholder is None else ids.count(placeholder)
        if found != len(pictures):
            raise ConfigError(
                f"engine {self.engine_id}: a prompt has {len(pictures)} pictures and {found} placeholders (token {placeholder}); "
                "it takes one for each picture, which the engine makes as long as the picture is"
            )
        return {"prompt_token_ids": ids, **({"multi_modal_data": {"image": list(pictures)}} if pictures else {})}

    async def _generate_one(self, prompt: dict[str, Any], params: Any) -> tuple[Completion, ...]:
        if self._adapters is None:
            return await self._stream(prompt, params, None)
        async with self._adapters.running() as served:
            return await self._stream(prompt, params, served)

    async def _stream(self, prompt: dict[str, Any], params: Any, served: Served | None) -> tuple[Completion, ...]:
        """One request to its end, on the adapters that are given."""
        from vllm.v1.engine.exceptions import EngineDeadError

        version, final = self._gate.version, None
        request_id = f"{self.engine_id}-{next(self._numbers)}"
        adapter = lora.request(served.adapter_id, f"{self.engine_id} {served.adapter_id}") if served and served.adapter_id else None
        try:
            async for output in self._llm.generate(prompt, params, request_id, lora_request=adapter):
                final = output
        except EngineDeadError:
            self._gate.shut("a process of it has ended")
            raise
        assert final is not None and final.finished
        outputs = sorted(final.outputs, key=lambda o: o.index)
        if served is not None:
            # vLLM's labels are of the engine, which may serve another version by now.
            return tuple(replace(self._completion(o, None, final), version=served.version, last_version=served.version) for o in outputs)
        return tuple(self._completion(o, version, final) for o in outputs)

    def _completion(self, output: Any, version: int | None, request: Any = None) -> Completion:
        token_ids = tuple(output.token_ids)
        logprobs: tuple[float, ...] = ()
        if output.logprobs is not None:
            logprobs = tuple(float(entry[token].logprob) for token, entry in zip(token_ids, output.logprobs, strict=True))
        labels = compat.sampled_by(output)
        first, last = (version, self._gate.version) if labels is None else map(_version, labels)
        return Completion(token_ids, logprobs, output.finish_reason, first, last, compat.routes_of(request, output))

    # EngineHandle.

    def init_weight_transfer(self, init_info: dict[str, Any], timeout_s: float) -> None:
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest

        init_info = {**init_info, "serves_adapters": self._adapters is not None}
        self._calls.run(self._llm.init_weight_transfer_engine(WeightTransferInitRequest(init_info=init_info)), timeout_s)

    def sync(self, order: SyncOrder) -> float:
        return sync_gated(self._gate, self, order, lambda: self.pause(order.pause_mode, order.sync, order.phase_s, True))

    def pause(self, mode: PauseMode, sync: str, timeout_s: float, with_update: bool = False) -> None:
        """``EngineHandle.pause``. ``with_update``: ``update_weights`` follows, and pauses an engine without requests by the same call."""
        if "weights" in self._asleep:
            raise ConfigError(f"engine {self.engine_id} sleeps without its weights; wake(['weights']) before a sync")
        # Without a word from the actor a sync that hangs is a sync that failed; three phases may follow the pause.
        self._gate.begin_sync(sync, 5 * timeout_s)
        self._has_resumed, self._pause_mode = False, None
        if with_update and self._adapters is None and compat.is_idle(self._llm):
            self._pause_mode = mode
        else:
            self._pause_mode = self._calls.run(self._pause(mode, timeout_s, with_update), timeout_s)

    async def _pause(self, mode: PauseMode, timeout_s: float, with_update: bool) -> PauseMode | None:
        """The mode, where the pause is left to the update."""
        limit_s = timeout_s / 2  # so that adapters say what they wait for, and not the deadline of the phase
        if self._adapters is not None:
            self._adapters.hold()
            if mode != "abort":
                # Requests that are kept, or wait in a queue, end on their own version, and none ends in a pause.
                await self._adapters.make_room(limit_s)
        if with_update and compat.is_idle(self._llm):
            return mode
        await compat.pause(self._llm, mode)
        if self._adapters is not None:
            await self._adapters.make_room(limit_s)
        return None

    def update_weights(self, update_info: dict[str, Any], timeout_s: float) -> None:
        # vLLM has one session of an engine's weights: what is left of a failed sync would end that of the next.
        pause_mode, self._pause_mode = self._pause_mode, None
        self._has_resumed = self._calls.run_in_turn(lambda: self._update(update_info, pause_mode), timeout_s)

    async def _update(self, update_info: dict[str, Any], pause_mode: PauseMode | None) -> bool:
        """Whether the engine's core has gone on already, which is so where it had no requests: every engine's workers have committed."""
        info, self._ending = dict(update_info), None
        # What a version of adapters has computed has keys of its own; only a base that is sent leaves nothing of it true.
        keeps_caches = info.pop("keeps_caches", False)
        if self._adapters is not None:
            info |= {"adapter_id": self._adapters.next_id(), "adapters_in_use": self._adapters.in_use()}
        caches_media = compat.may_cache_media(self._llm) and not keeps_caches
        resumes = pause_mode is not None and not caches_media
        has_resumed = await compat.run_update(
            self._llm, info, str(info["version"]), pause_mode=pause_mode, keeps_caches=keeps_caches, resumes=resumes
        )
        if caches_media:
            ending = asyncio.ensure_future(self._reset_media_caches())
            if pause_mode is None:
                await ending
            else:
                # No request is in the engine: its core has the rest of the update before the resume, which waits for both.
                ending.add_done_callback(_heard)
                self._ending = ending
        return has_resumed

    def reset_caches(self, timeout_s: float) -> None:
        """Forget everything computed from the weights that the engine had."""
        self._calls.run(self._reset_caches(), timeout_s)

    async def _reset_caches(self) -> None:
        # Side by side: each is a round trip to the engine's core and its workers.
        cleared, *_ = await asyncio.gather(
            # Kept requests are preempted: their keys and values are computed again with the new weights.
            self._llm.reset_prefix_cache(reset_running_requests=True, reset_connector=True),
            *((self._reset_media_caches(),) if compat.may_cache_media(self._llm) else ()),
        )
        if cleared is False:
            raise RlsyncError(f"engine {self.engine_id} could not reset its prefix cache: requests hold blocks of it")

    async def _reset_media_caches(self) -> None:
        await asyncio.gather(self._llm.reset_mm_cache(), self._llm.reset_encoder_cache())

    def resume(self, version: int | None, timeout_s: float, sync: str = "") -> None:
        """``EngineHandle.resume``. ``sync``: refused while another one is going on."""
        ticket = self._gate.ticket(sync)
        if self._has_resumed and self._adapters is None:
            self._gate.commit(ticket, version)
        else:
            self._calls.run(self._resume(ticket, version), timeout_s)

    async def _resume(self, ticket: int, version: int | None) -> None:
        ending, self._ending = self._ending, None
        resuming = [] if self._has_resumed else [self._llm.resume_generation()]
        await asyncio.gather(*resuming, *([] if ending is None else [ending]))
        self._gate.commit(ticket, version)
        if self._adapters is not None:
            self._adapters.serve(version)

    def mark_dirty(self, reason: str, sync: str = "") -> None:
        self._gate.shut(reason, sync)
        self._calls.end_requests()

    # Memory.

    def sleep(self, level: int, timeout_s: float) -> None:
        """Give device memory back: level 1 keeps the weights in host memory, level 2 drops them and makes the engine dirty.

        Requests under way are aborted. Does nothing where its weights sleep already; one that is awake but for its KV cache gives the
        weights back again. Raises ConfigError where the platform cannot (CPU), or
        the engine was not started with ``enable_sleep_mode``; RlsyncError where it could not: the engine is lost then, as some of its
        workers may have let their memory go.
        """
        if level not in (1, 2):
            raise ConfigError(f"engine {self.engine_id}: sleep level {level} gives no memory back; there are 1 and 2")
        if not compat.can_sleep():
            raise ConfigError(f"engine {self.engine_id}: this platform has no sleep mode; leave the engine awake during training")
        if not self._args.get("enable_sleep_mode"):
            raise ConfigError(f"engine {self.engine_id} was started without enable_sleep_mode=True, so that its memory cannot go")
        if "weights" in self._asleep:
            return
        if level == 2:
            # Before, because what fails in the middle leaves nothing to answer with either.
            self.mark_dirty("its weights were dropped by sleep level 2, and no sync has followed")
        try:
            self._calls.run(self._llm.sleep(level), timeout_s)
        except Exception as error:
            self._gate.close("it could not fall asleep, and its memory may be gone")
            raise RlsyncError(
                f"engine {self.engine_id} could not fall asleep: {type(error).__name__}: {error}; restart it, and let nobody else take "
                "memory of its GPUs meanwhile, which vLLM takes for a failure"
            ) from error
        self._asleep = frozenset(_TAGS)

    def wake(self, tags: Sequence[str], timeout_s: float) -> None:
        """Take memory again for ``weights`` or ``kv_cache``, those that are gone; a sync goes between the two.

        An engine that cannot have it, because another process holds the memory, is lost: vLLM ends or stays without. RlsyncError.
        """
        unknown = sorted(set(tags) - set(_TAGS))
        if unknown:
            raise ConfigError(f"engine {self.engine_id} has no {', '.join(unknown)} to wake, only {' and '.join(_TAGS)}")
        wanted = [tag for tag in _TAGS if tag in tags and tag in self._asleep]
        if not wanted:
            return
        try:
            self._calls.run(self._llm.wake_up(wanted), timeout_s)
        except Exception as error:
            self.mark_dirty(f"it could not wake its {' and '.join(wanted)}")
            raise RlsyncError(
                f"engine {self.engine_id} could not wake its {' and '.join(wanted)}: {type(error).__name__}: {error}; if its GPU is full, "
                "offload more of the actor (actor.offload_weight, offload_grad, offload_optimizer) or lower "
                "rollout.gpu_memory_utilization"
            ) from error
        self._asleep -= frozenset(wanted)

    def _sleeps_without(self) -> str:
        return " and ".join(tag for tag in _TAGS if tag in self._asleep)

    def call_workers(self, method: str, arguments: Sequence[Any], timeout_s: float) -> list[Any]:
        """Results of a method of every worker, by worker rank; for instance one of a ``worker_extension_cls``."""
        result: list[Any] = self._calls.run(self._llm.collective_rpc(method, args=tuple(arguments)), timeout_s)
        return result

    def failure_reason(self) -> str | None:
        """Why the engine cannot go on without a restart: a process of it has ended or is stopped. None while all run; never waits."""
        return self._processes.failure_reason()

    @property
    def process_ids(self) -> tuple[int, ...]:
        """Ids of vLLM's processes, which need not be children of this one."""
        return tuple(process.pid for process in self._processes.seen)

    def close(self) -> None:
        """End all processes of the engine, stopped ones too. Idempotent."""
        if self._calls.closed:
            return
        self._gate.close("it is closed")
        try:
            if self._llm is not None:
                self._processes.look(self._llm)
                with contextlib.suppress(TimeoutError):
                    self._calls.run(self._shut_down(), 2 * _CLOSE_S)
        finally:
            # Also where vLLM fails to end them: nobody else would.
            self._processes.end(_CLOSE_S)
            self._llm = None
            self._calls.stop()

    async def _shut_down(self) -> None:
        self._calls.cancel_requests()
        if self._processes.failure_reason() is not None:
            # vLLM would wait for those that are stopped, and the others for them.
            self._processes.kill()
        await compat.shut_down(self._llm, _CLOSE_S)


def _heard(call: asyncio.Future[None]) -> None:
    """Or asyncio would log a failure of it, where the sync has ended for another reason."""
    if not call.cancelled():
        call.exception()


def _version(label: str) -> int | None:
    """The version that a sync gave to vLLM as a label; None for vLLM's own label of the weights of the start."""
    return int(label) if label.isdecimal() else None


def _check_plugin() -> None:
    """The engine's processes find the receiver through the installed entry point only."""
    if not any(e.name == BACKEND for e in entry_points(group="vllm.general_plugins")):
        raise ConfigError("rlsync is not installed in this environment, so vLLM cannot find its plug-in; run: pip install -e . --no-deps")
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and BACKEND not in allowed.split(","):
        raise ConfigError(f"VLLM_PLUGINS={allowed} keeps vLLM from loading the plug-in; add {BACKEND} to it or unset it")


class Processes:
    """The processes of one engine as they were seen.

    Attributes:
        seen: none before ``look`` and after ``end``.
    """

    def __init__(self, engine_id: str) -> None:
        self._engine_id = engine_id
        self.seen: list[psutil.Process] = []
        self._segments: set[str] = set()

    def look(self, llm: Any) -> None:
        """Remember the processes of ``llm``, an AsyncLLM, and their shared memory: neither can be found once its core is dead."""
        self.seen = list(dict.fromkeys((*self.seen, *_descendants(llm))))
        self._segments |= shared_segments(self.seen)

    def failure_reason(self) -> str | None:
        """Which of them has ended or is stopped. None while all run; never waits."""
        for process in self.seen:
            with contextlib.suppress(psutil.NoSuchProcess):
                if process.is_running() and process.status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD):
                    if process.status() == psutil.STATUS_STOPPED:
                        return f"process {process.pid} of engine {self._engine_id} is stopped"
                    continue
            return f"process {process.pid} of engine {self._engine_id} has ended"
        return None if self.seen else f"engine {self._engine_id} is not started"

    def kill(self) -> None:
        """Kill all that live, stopped ones too."""
        for process in self.seen:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    def end(self, timeout_s: float) -> None:
        """Kill processes that vLLM could not end and remove the shared memory that they left."""
        self.kill()
        psutil.wait_procs(self.seen, timeout=timeout_s)
        for segment in self._segments:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(segment)
        self.seen, self._segments = [], set()


def _descendants(llm: Any) -> list[psutil.Process]:
    found: list[psutil.Process] = []
    for core in compat.core_processes(llm):
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(core.pid)
            found += [process, *process.children(recursive=True)]
    return found


def shared_segments(processes: Iterable[psutil.Process]) -> set[str]:
    """Paths of shared memory that vLLM's processes make for collectives and messages, and remove only when they end by themselves."""
    found = set()
    for process in processes:
        with contextlib.suppress(psutil.Error):
            found |= {m.path for m in process.memory_maps() if m.path.startswith(compat.SHM_PREFIXES)}
    return found
