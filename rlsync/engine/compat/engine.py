"""An engine of vLLM and its workers: how the plug-in gets in, where a worker stands, and how an AsyncLLM is paused, updated and ended."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import inspect
import multiprocessing
import os
import time
from collections.abc import Callable
from multiprocessing.context import BaseContext
from typing import Any

import torch
import vllm
from vllm.config import set_current_vllm_config
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.platforms import current_platform

# What rlsync calls a whole update, of a core and of a worker.
UPDATE = "rlsync_update"
# Of shared memory: through which CPU workers reduce and gather, and through which cores and workers talk.
SHM_PREFIXES = ("/dev/shm/vllm_dist_", "/dev/shm/psm_")

_CUDA_ERROR_NOT_INITIALIZED = 3
# A tenth of what a step of a tiny model takes on CPU; a look takes about a twentieth of it.
_NAP_S = 0.00025


def vllm_version() -> str:
    return vllm.__version__


def register_backend(name: str, module: str, attribute: str) -> None:
    """Register a weight-transfer backend once per process; vLLM raises where a name is taken."""
    if name not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(name, module, attribute)


def config_scope(vllm_config: Any) -> contextlib.AbstractContextManager[None]:
    """vLLM 0.25 calls a weight-transfer engine without its config being current, which post-processing asks for."""
    return set_current_vllm_config(vllm_config)


def worker_place(parallel_config: Any) -> tuple[int, int, int]:
    """``(dp_index, worker_rank, world_size)``: which data-parallel replica, and where in its tensor x pipeline ranks."""
    return parallel_config.data_parallel_index, parallel_config.rank, parallel_config.world_size


def is_read_last(parallel_config: Any) -> bool:
    """Whether vLLM reads this worker's answer to a call after those of all others.

    An executor of several processes stops reading at the first failure, and takes what is left for answers to its next calls. Of
    workers that fail together only this one may raise, until https://github.com/vllm-project/vllm/issues/49972 is solved.
    """
    return parallel_config.rank == parallel_config.world_size - 1


def gpu_uuid(device: torch.device) -> str | None:
    """UUID of the worker's GPU, or None where there is none."""
    if device.type != "cuda":
        return None
    return str(torch.cuda.get_device_properties(device).uuid)


# What vLLM's runners call a model's logits by; the second with ``enable_batch_sharded_sampling``, each rank for requests of its own.
LOGITS = ("compute_logits", "compute_logits_local")


def forbid_answers(model: torch.nn.Module, reason: str) -> None:
    """Make the model raise instead of giving logits, until ``allow_answers``: being paused is all else that keeps it from answering.

    Logits are computed outside CUDA graphs, so that captured graphs are no way around. A model that lacks one of the ways to them is not
    given it: vLLM asks a model which it has.
    """

    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError(f"this engine refuses to answer: {reason}; sync it completely or restart it")

    for name in LOGITS:
        if hasattr(model, name):
            setattr(model, name, refuse)


def allow_answers(model: torch.nn.Module) -> None:
    """Let the model answer again. Idempotent."""
    for name in LOGITS:
        vars(model).pop(name, None)


# Processes on CPU.


def runs_on_cpu() -> bool:
    return bool(current_platform.is_cpu())


def start_cores_with(context: Callable[[], BaseContext]) -> None:
    """Make engines of this process start their cores with ``context`` and not as vLLM would. Idempotent."""
    from vllm.v1.engine import utils

    utils.get_mp_context = context


def spawn_where_forks_have_no_gpu() -> None:
    """Make engines of this process spawn their cores where its CUDA driver is initialized, which no process forked from it can be again.

    vLLM asks torch, which does not know of all that initializes the driver: a backward pass on the CPU does, as it counts the devices.
    """
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return
    if driver.cuDeviceGetCount(ctypes.byref(ctypes.c_int())) != _CUDA_ERROR_NOT_INITIALIZED:
        os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"


def fork_workers() -> None:
    """Make the engine's core that this process is, if it is one, fork its workers. Idempotent."""
    from vllm.v1.executor import multiproc_executor

    multiproc_executor.get_mp_context = lambda: multiprocessing.get_context("fork")


def sleep_between_looks() -> None:
    """Make the engine's core that this process is, and its workers, sleep between two looks for each other's messages. Idempotent.

    For a second after each message vLLM looks for the next one without a pause, in every process: between the steps of a request, and
    through every sync. Processes that share few processors take from each other what they look with. Each look finds what is there,
    so that nothing depends on notifications, of which vLLM drops one that follows another closely.
    """
    from vllm.distributed.device_communicators import shm_broadcast

    shm_broadcast.sched_yield = _nap


def _nap() -> None:
    time.sleep(_NAP_S)


def override_kernels_ahead() -> None:
    """Put vLLM's functions for CPU in the place of its Triton kernels now, for this process and all that are forked from it. Idempotent.

    Each worker looks through all attributes of all modules for those kernels, for half a second. Nothing where vLLM has none for CPU.
    """
    override = getattr(current_platform, "register_triton_kernel_overrides", None)
    if override is not None:
        override()
        type(current_platform).register_triton_kernel_overrides = classmethod(lambda cls: None)  # type: ignore[method-assign,assignment]


def skip_imports_in_last_collection() -> None:
    """Make the engine's core that this process is, and its workers, leave what was imported out of their last collection of garbage.

    vLLM unfreezes it for engines that end within a process that goes on; these processes end.
    """
    gc.unfreeze = lambda: None  # type: ignore[assignment]


def look_at_models_here() -> None:
    """Make vLLM import a model's class in this process to ask what it can do. Idempotent.

    vLLM has a process of its own for it, which imports all of vLLM, because the class might ask for a GPU. On CPU there is none.
    """
    from vllm.model_executor.models import registry

    registry._run_in_subprocess = lambda look: look()


# AsyncLLM.


async def pause(llm: Any, mode: str) -> None:
    """Let no request be scheduled. Not ``AsyncLLM.pause_generation``: it sleeps 20 ms afterwards, which is no part of the pause."""
    await llm.engine_core.pause_scheduler_async(mode=mode, clear_cache=False)


def is_idle(llm: Any) -> bool:
    """Whether a pause is complete as soon as the engine's core takes it: there is one core, and no request in it."""
    return llm.vllm_config.parallel_config.data_parallel_size == 1 and not llm.output_processor.has_unfinished_requests()


def may_cache_media(llm: Any) -> bool:
    """Whether the engine's model takes anything but tokens; otherwise its multimodal and encoder caches are always empty."""
    config = llm.vllm_config.model_config
    return bool(config.is_multimodal_model or config.is_encoder_decoder or config.enable_prompt_embeds)


def picture_placeholder(llm: Any) -> int | None:
    """The token that stands for a picture in a prompt; None where the engine's model takes no pictures."""
    config = llm.vllm_config.model_config
    placeholder = getattr(config.hf_config, "image_token_id", None) if config.is_multimodal_model else None
    return None if placeholder is None else int(placeholder)


async def run_update(
    llm: Any, update_info: dict[str, Any], weight_version: str, *, pause_mode: str | None, keeps_caches: bool, resumes: bool
) -> bool:
    """One complete weight update by one call of an engine's core; whether that has resumed it, too. See ``core._update``.

    The core goes on with it whatever becomes of this coroutine: no session stays open. Multimodal and encoder caches are left.
    """
    call = llm.engine_core.call_utility_async(UPDATE, update_info, weight_version, pause_mode, keeps_caches, resumes)
    return bool(await call)


def sampled_by(output: Any) -> tuple[str, str] | None:
    """Labels of the weights that sampled the first and the last token; None without a token, or where vLLM (< 0.32) does not say."""
    spans = getattr(output, "weight_versions", None)
    return (spans[0].version, spans[-1].version) if spans else None


def routes_of(request: Any, output: Any) -> Any:
    """Experts of prompt and continuation as an array (tokens, layers, topk), without the last token; None where vLLM returned none.

    Some versions return the part of the prompt with the request, and others all with each continuation.
    """
    routes, prompt = getattr(output, "routed_experts", None), getattr(request, "prompt_routed_experts", None)
    if routes is None or prompt is None:
        return routes
    import numpy  # not at the top: what a machine without vLLM hears is that vLLM is missing

    return numpy.concatenate((prompt, routes))


async def shut_down(llm: Any, timeout_s: float) -> None:
    """End an AsyncLLM's processes, by force after ``timeout_s`` (vLLM 0.25: after its own 5 s)."""
    # Otherwise it logs the end of the processes as their failure.
    if llm.output_handler is not None:
        llm.output_handler.cancel()
    takes_timeout = "timeout" in inspect.signature(llm.shutdown).parameters
    await asyncio.to_thread(llm.shutdown, **({"timeout": timeout_s} if takes_timeout else {}))


def core_processes(llm: Any) -> list[Any]:
    """Process objects of an AsyncLLM's engine cores; their children are the workers."""
    manager = llm.engine_core.resources.engine_manager
    return list(getattr(manager, "processes", ()))


def can_sleep() -> bool:
    """Whether the platform can give weights and KV cache back while the engine lives."""
    return current_platform.is_sleep_mode_available()


def supported(backend: str) -> dict[str, Any]:
    """What the installed vLLM supports, for ``rlsync doctor``: facts by name. Starts no engine.

    ``version``; ``platform``: cpu, cuda, ...; ``backend_loaded``: vLLM's plug-ins, loaded as in a worker, have registered
    ``backend``; ``takes_version``: an engine can be told which version it serves (vLLM >= 0.27); ``can_sleep``;
    ``shm_prefixes``: where its workers put shared memory.
    """
    from vllm.plugins import load_general_plugins
    from vllm.v1.engine.async_llm import AsyncLLM

    from rlsync.engine.compat import patches

    load_general_plugins()
    patches.apply()
    return {
        "version": vllm_version(),
        "platform": str(current_platform.device_type),
        "backend_loaded": backend in WeightTransferEngineFactory._registry,
        "takes_version": "weight_version" in inspect.signature(AsyncLLM.finish_weight_update).parameters,
        "can_sleep": can_sleep(),
        "shm_prefixes": list(SHM_PREFIXES),
    }
