"""Megatron-Core on a machine without CUDA: the substitutions that let the same program run on CPU and gloo.

Owns every change made to torch and Megatron for that purpose; nothing happens at import. Must not know models or
parallel layouts. What is substituted, and why:

- ``torch.cuda`` calls that ask for the current device, stream or random state are answered with the CPU's.
- ``Tensor.cuda()`` returns the tensor; ``Tensor.type()`` without an argument names the CUDA type of the dtype, because the
  optimizers sort parameters by that string (``optimizer.py``, ``distrib_optimizer.py``, ``clip_grads.py``).
- Modules of Megatron that write ``device="cuda"`` or ask for pinned memory see a ``torch`` whose factories put those tensors on the CPU.
- Megatron's random state tracker swaps the CPU generator, so dropout and recomputation follow it.
- Its groups share a thread (``rlsync.transport.gloo_device``).
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import types
from collections.abc import Iterator
from typing import Any

import torch

from rlsync.transport.gloo_device import share_gloo_device

# Modules that pass the literal device "cuda", or ``pin_memory``, to a factory of torch.
_LITERAL_DEVICE_MODULES = (
    "megatron.core.models.common.embeddings.rope_utils",
    "megatron.core.optimizer.clip_grads",
    "megatron.core.optimizer.distrib_optimizer",
    "megatron.core.optimizer.grad_scaler",
    "megatron.core.optimizer.optimizer",
    "megatron.core.pipeline_parallel.schedules",
    "megatron.core.rerun_state_machine",
    "megatron.core.tensor_parallel.data",
    "megatron.core.utils",
)
_FACTORIES = ("arange", "as_tensor", "empty", "full", "ones", "rand", "randn", "tensor", "zeros")


def enable_cpu() -> bool:
    """Let Megatron-Core run on CPU and gloo in this process; does nothing where CUDA is available.

    Call it before the first Megatron object is built (``initialize_parallel`` does). Idempotent. Process-wide: other
    code of this process sees the substituted ``torch.cuda`` functions too, which without CUDA could only have raised.

    Returns:
        True when the substitutions are in place, False when CUDA is available and they are not needed.
    """
    if torch.cuda.is_available():
        return False
    if torch.cuda.current_device is _current_device:
        return True
    _substitute_torch()
    _substitute_megatron()
    share_gloo_device()
    return True


class _Stream:
    """Stands in for ``torch.cuda.Stream``: the CPU runs everything in order, so waiting is free."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.cuda_stream = 0

    def synchronize(self) -> None: ...

    def wait_stream(self, stream: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def record_event(self, event: Any = None) -> Any:
        # A stream without work serves as its own event: whoever waits for it has waited.
        return self if event is None else event


class _TorchOnCpu(types.ModuleType):
    """``torch`` as seen by one Megatron module: factories read the device "cuda" as "cpu" and pin nothing, all else is torch's own."""

    def __getattr__(self, name: str) -> Any:
        value = getattr(torch, name)
        return _on_cpu(value) if name in _FACTORIES else value


def _on_cpu(factory: Any) -> Any:
    def create(*args: Any, **kwargs: Any) -> torch.Tensor:
        if str(kwargs.get("device")).startswith("cuda"):
            kwargs["device"] = "cpu"
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return create


def _current_device() -> torch.device:
    return torch.device("cpu")


def _get_rng_state(device: Any = None) -> torch.Tensor:
    return torch.get_rng_state()


def _set_rng_state(new_state: torch.Tensor, device: Any = None) -> None:
    torch.set_rng_state(new_state)


def _manual_seed(seed: int) -> None:
    torch.manual_seed(seed)


def _nothing(*_: Any, **__: Any) -> None:
    return None


def _stream(*_: Any, **__: Any) -> _Stream:
    return _Stream()


@contextlib.contextmanager
def _stream_context(stream: Any) -> Iterator[Any]:
    yield stream


def _substitute_torch() -> None:
    cuda = torch.cuda
    cuda.current_device = _current_device
    cuda.get_rng_state = _get_rng_state
    cuda.set_rng_state = _set_rng_state
    cuda.manual_seed = _manual_seed
    cuda.synchronize = _nothing
    cuda.Stream = _Stream
    cuda.stream = _stream_context
    cuda.current_stream = _stream
    cuda.default_stream = _stream
    cuda.is_current_stream_capturing = lambda: False
    cuda.nvtx.range_push = _nothing
    cuda.nvtx.range_pop = _nothing

    plain_type = torch.Tensor.type

    def type_(self: torch.Tensor, dtype: Any = None, non_blocking: bool = False, **kwargs: Any) -> Any:
        if dtype is not None:
            return plain_type(self, dtype, non_blocking, **kwargs)
        return plain_type(self).replace("torch.", "torch.cuda.", 1)

    torch.Tensor.type = type_
    torch.Tensor.cuda = lambda self, *_, **__: self


def _as_on_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """Counts of tokens for the host: Megatron's own leaves a tensor on the CPU as it is, which collectives do not take as sizes."""
    return tensor.numpy() if as_numpy and isinstance(tensor, torch.Tensor) else tensor


def _also_uneven(gather: Any, reduce_scatter: Any) -> tuple[Any, Any]:
    """Megatron's collectives along the first dimension, with sizes that differ between ranks, which gloo does not take: experts that are
    cut by tensor ranks get other numbers of tokens on each. Padded, and reduced as a whole; gradients are Megatron's own."""

    def gather_along(input_: torch.Tensor, group: Any, output_split_sizes: Any = None, use_global_buffer: bool = False) -> Any:
        if output_split_sizes is None or group.size() == 1:
            return gather(input_, group, output_split_sizes, use_global_buffer)
        padded = input_.new_zeros(max(output_split_sizes), *input_.shape[1:])
        padded[: input_.size(0)] = input_
        arrived = [torch.empty_like(padded) for _ in output_split_sizes]
        torch.distributed.all_gather(arrived, padded, group=group)
        return torch.cat([tensor[:size] for tensor, size in zip(arrived, output_split_sizes, strict=True)])

    def reduce_scatter_along(input_: torch.Tensor, group: Any, input_split_sizes: Any = None, use_global_buffer: bool = False) -> Any:
        if input_split_sizes is None or group.size() == 1:
            return reduce_scatter(input_, group, input_split_sizes, use_global_buffer)
        whole = input_.contiguous().clone()
        torch.distributed.all_reduce(whole, group=group)
        return whole.split(list(input_split_sizes))[group.rank()].contiguous()

    return gather_along, reduce_scatter_along


def _substitute_megatron() -> None:
    random = importlib.import_module("megatron.core.tensor_parallel.random")
    random._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state()
    random._set_cuda_rng_state = lambda new_state, device=-1, graph_safe=False: torch.set_rng_state(new_state)
    # The tracker warns whenever the CPU generator moves inside fork(); here that generator is the tracked one.
    logging.getLogger(random.__name__).addFilter(lambda record: "CPU RNG state changed" not in record.getMessage())

    on_cpu = _TorchOnCpu("torch")
    for name in _LITERAL_DEVICE_MODULES:
        importlib.import_module(name).torch = on_cpu

    # 0.16.1 leaves this name undefined without TransformerEngine, and reads it while building any MoE layer.
    moe_utils = importlib.import_module("megatron.core.transformer.moe.moe_utils")
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None
    # Latent attention of 0.16.1 takes the stand-ins of TransformerEngine's classes for classes.
    latent = importlib.import_module("megatron.core.transformer.multi_latent_attention")
    latent.HAVE_TE = latent.HAVE_TE and isinstance(latent.TELinear, type)
    importlib.import_module("megatron.core.transformer.moe.token_dispatcher").maybe_move_tensor_to_cpu = _as_on_host
    mappings = importlib.import_module("megatron.core.tensor_parallel.mappings")
    mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim = _also_uneven(
        mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim
    )
