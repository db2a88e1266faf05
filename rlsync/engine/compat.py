"""Every place where vLLM's versions or platforms differ, and every private name of vLLM that is used.

Written against vLLM 0.25.1 and 0.32.0. A branch names the version it is for; it can go with the last supported version
before that.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
from collections.abc import Awaitable, Callable, Iterable, Iterator
from typing import Any

import torch
import vllm
from vllm.config import set_current_vllm_config
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.model_loader.reload import layerwise
from vllm.model_executor.model_loader.reload.meta import restore_layer_on_meta
from vllm.model_executor.model_loader.reload.utils import get_layer_tensors
from vllm.platforms import current_platform

try:  # vLLM >= 0.27: a draft model's completeness is checked after each load_weights call, while a sync makes one per bucket
    from vllm.model_executor.model_loader.mtp_validation import disable_mtp_completeness_check as _partial_load
except ImportError:
    _partial_load = contextlib.nullcontext


# Of shared memory: through which CPU workers reduce and gather, and through which cores and workers talk.
SHM_PREFIXES = ("/dev/shm/vllm_dist_", "/dev/shm/psm_")


_FINISH_S = 5.0


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


# Layer-wise reload.


def begin_reload(model: torch.nn.Module) -> None:
    """Put the parameters into checkpoint layout on meta; each layer is rebuilt when its last tensor arrives."""
    layerwise.initialize_layerwise_reload(model)


def load_weights(model: Any, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Hand HF-named tensors to the model's own loaders."""
    with _partial_load(), torch.no_grad():
        model.load_weights(weights)


def finish_reload(model: torch.nn.Module, model_config: Any) -> None:
    """Rebuild the layers that padding or attention kept waiting, and everything derived from them."""
    # vLLM warns of every layer without checkpoint tensors (rotary caches, tied heads), at every reload; what is loaded was
    # judged at connect.
    with torch.no_grad(), quiet():
        layerwise.finalize_layerwise_reload(model, model_config)
        refresh_sharers(model)


def forbid_answers(model: torch.nn.Module, reason: str) -> None:
    """Make the model raise instead of giving logits, until ``allow_answers``: being paused is all else that keeps it from answering.

    Logits are computed outside CUDA graphs, so that captured graphs are no way around.
    """

    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError(f"this engine refuses to answer: {reason}; sync it completely or restart it")

    model.compute_logits = refuse  # type: ignore[assignment]


def allow_answers(model: torch.nn.Module) -> None:
    """Let the model answer again. Idempotent."""
    vars(model).pop("compute_logits", None)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep vLLM's warnings out of the log for the moment."""
    logger = logging.getLogger("vllm")
    level = logger.level
    logger.setLevel(max(level, logging.ERROR))
    try:
        yield
    finally:
        logger.setLevel(level)


def abandon_reload(model: torch.nn.Module) -> None:
    """Give every layer that still waits for tensors its former ones back, so that no parameter stays on meta.

    Without it a later reload skips those layers and counts on from where this one stopped (``can_load`` is true).
    """
    for layer in model.modules():
        info = layerwise.get_layerwise_info(layer)
        if info.can_load():
            if info.kernel_tensors is not None:
                layerwise._place_kernel_tensors(layer, info)
            for tensor in get_layer_tensors(layer).values():
                # Tensors that a reload leaves live were wrapped too.
                if hasattr(tensor, "weight_loader"):
                    tensor.weight_loader = layerwise._get_original_loader(tensor)
            info.reset()
    layerwise.LOADING_LAYERS.clear()


@contextlib.contextmanager
def parameters_on_meta(model: torch.nn.Module) -> Iterator[None]:
    """For the moment, parameters have checkpoint layout and no memory, and loaders run at once. Leaves no trace.

    Raises RuntimeError while a reload is under way.
    """
    known = set(layerwise.LAYERWISE_INFO)
    kept: list[_KeptLayer] = []
    try:
        for layer in model.modules():
            info = layerwise.get_layerwise_info(layer)
            if info.can_load():
                raise RuntimeError(f"a reload of {type(layer).__name__} is under way; finish or abandon it first")
            kept.append(_KeptLayer(layer, info))
            restore_layer_on_meta(layer, info)
            for tensor in get_layer_tensors(layer).values():
                # An earlier reload has left its wrappers on the tensors that describe the layout.
                if hasattr(tensor, "weight_loader"):
                    tensor.weight_loader = layerwise._get_original_loader(tensor)
        yield
    finally:
        for layer_kept in reversed(kept):
            layer_kept.put_back()
        for layer in set(layerwise.LAYERWISE_INFO) - known:
            del layerwise.LAYERWISE_INFO[layer]


class _KeptLayer:
    """What a layer and its tensors have as attributes, to be put back in the same order."""

    def __init__(self, layer: torch.nn.Module, info: Any) -> None:
        tensors = [*get_layer_tensors(layer).values(), *(t for group in info.restore_metadata for t in group.values())]
        tables: list[dict[str, Any]] = [layer.__dict__, layer._parameters, layer._buffers, *(t.__dict__ for t in tensors)]
        self._tables = [(table, dict(table)) for table in tables]
        self._non_persistent = layer._non_persistent_buffers_set, set(layer._non_persistent_buffers_set)

    def put_back(self) -> None:
        for table, entries in self._tables:
            table.clear()
            table.update(entries)
        names, kept = self._non_persistent
        names.clear()
        names |= kept


def refresh_sharers(model: torch.nn.Module) -> None:
    """Rebuild what a CPU layer packed from a parameter that belongs to another layer.

    A tied lm_head shares the embedding's parameter, and no tensor is loaded for it, so its reload leaves it alone. On CPU
    it computes from a packed copy made at start-up, which would stay that of the old weights.
    """
    if not current_platform.is_cpu():
        return
    owners: dict[int, Any] = {}
    layer: Any
    for layer in model.modules():
        for parameter in layer.parameters(recurse=False):
            shared = owners.setdefault(id(parameter), layer) is not layer
            # Experts share a gate's score correction, and would pack packed weights.
            if shared and parameter.numel() and parameter is getattr(layer, "weight", None) and hasattr(layer, "cpu_linear"):
                layer.quant_method.process_weights_after_loading(layer)


# AsyncLLM.


async def pause(llm: Any, mode: str) -> None:
    """Let no request be scheduled. Not ``AsyncLLM.pause_generation``: it sleeps 20 ms afterwards, which is no part of the pause."""
    await llm.engine_core.pause_scheduler_async(mode=mode, clear_cache=False)


def may_cache_media(llm: Any) -> bool:
    """Whether the engine's model takes anything but tokens; otherwise its multimodal and encoder caches are always empty."""
    config = llm.vllm_config.model_config
    return bool(config.is_multimodal_model or config.is_encoder_decoder or config.enable_prompt_embeds)


async def run_update(llm: Any, update_info: dict[str, Any], weight_version: str, reset_caches: Callable[[], Awaitable[None]]) -> None:
    """One complete weight update of a paused engine: start, update, finish, and ``reset_caches``.

    All calls are made at once. The engine's core takes them one after another in this order, whatever becomes of this coroutine and of
    the calls before: no session stays open.
    """
    from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

    takes_version = "weight_version" in inspect.signature(llm.finish_weight_update).parameters  # vLLM >= 0.27
    start, update, finish, reset = calls = [
        asyncio.ensure_future(call)
        for call in (
            llm.start_weight_update(),
            llm.update_weights(WeightTransferUpdateRequest(update_info=update_info)),
            llm.finish_weight_update(*([weight_version] if takes_version else [])),
            reset_caches(),
        )
    ]
    try:
        await update
        await asyncio.gather(finish, reset)
    except Exception as error:
        # The next update finds a core that is through with this one.
        await asyncio.wait(calls, timeout=_FINISH_S)
        raise error from (start.exception() if start.done() else None)
    finally:
        for call in calls:
            if not call.cancel() and not call.cancelled():
                call.exception()  # or asyncio would log it as one that nobody has heard of


def sampled_by(output: Any) -> tuple[str, str] | None:
    """Labels of the weights that sampled the first and the last token; None without a token, or where vLLM (< 0.32) does not say."""
    spans = getattr(output, "weight_versions", None)
    return (spans[0].version, spans[-1].version) if spans else None


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
