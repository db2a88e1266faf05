"""Process groups of a Megatron run: torch.distributed, Megatron's parallel state, model-parallel random seeds.

Owns their creation and destruction and their description as a Topology. Must not know models.
"""

from __future__ import annotations

import gc
import os
import random
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

import numpy
import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from rlsync.errors import ConfigError
from rlsync.layout.topology import Topology
from rlsync.megatron.cpu import enable_cpu


def initialize_parallel(
    topology: Topology, *, seed: int, timeout_s: float, backend: str | None = None, store: dist.Store | None = None
) -> None:
    """Create torch.distributed (unless it exists), Megatron's process groups, and the random state of this rank.

    Reads RANK, WORLD_SIZE, LOCAL_RANK and, without ``store``, MASTER_ADDR and MASTER_PORT as torchrun sets them. Collective over all
    ranks.
    Without CUDA this process is prepared for CPU and gloo first (``enable_cpu``).

    Args:
        topology: sizes of the parallel axes; their product must be the number of ranks.
        seed: dropout in tensor-parallel regions differs between tp_ranks, everything else draws the same numbers on
            all ranks of one pipeline stage; stages differ, as in Megatron.
        timeout_s: deadline of each collective.
        backend: of torch.distributed; by default nccl with CUDA, else gloo.
        store: where ranks find each other; by default torch's own at MASTER_PORT, which rank 0 listens for on every address it has.

    Raises:
        ConfigError: the topology does not fit the number of ranks, or Megatron's groups exist already.
    """
    on_cpu = enable_cpu()
    if not dist.is_initialized():
        _initialize_distributed(backend if backend is not None else ("gloo" if on_cpu else "nccl"), store, timeout_s=timeout_s)
    if dist.get_world_size() != topology.world_size:
        raise ConfigError(
            f"topology {topology} is made for {topology.world_size} ranks, but {dist.get_world_size()} are running: "
            f"start {topology.world_size} processes or change dp_size"
        )
    if parallel_state.model_parallel_is_initialized():
        raise ConfigError("Megatron's process groups exist already in this process; call destroy_parallel() before creating others")
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=topology.tp_size,
        pipeline_model_parallel_size=topology.pp_size,
        virtual_pipeline_model_parallel_size=topology.vpp_size if topology.vpp_size > 1 else None,
        context_parallel_size=topology.cp_size,
        expert_model_parallel_size=topology.ep_size,
        expert_tensor_parallel_size=topology.etp_size,
        distributed_timeout_minutes=timeout_s / 60,
    )
    _seed_all(seed)


def current_topology(models: Sequence[torch.nn.Module] = ()) -> Topology:
    """The Topology of Megatron's process groups of this process.

    Args:
        models: chunks of a model, whose config tells an uneven pipeline split; without them the split is taken as even.

    Raises:
        ConfigError: Megatron's process groups do not exist.
    """
    if not parallel_state.model_parallel_is_initialized():
        raise ConfigError("Megatron's process groups do not exist in this process; call initialize_parallel(topology, ...) first")
    config: Any = models[0].config if models else None
    vpp_size = parallel_state.get_virtual_pipeline_model_parallel_world_size()
    return Topology(
        tp_size=parallel_state.get_tensor_model_parallel_world_size(),
        pp_size=parallel_state.get_pipeline_model_parallel_world_size(),
        vpp_size=1 if vpp_size is None else vpp_size,
        cp_size=parallel_state.get_context_parallel_world_size(),
        dp_size=parallel_state.get_data_parallel_world_size(),
        ep_size=parallel_state.get_expert_model_parallel_world_size(),
        etp_size=parallel_state.get_expert_tensor_parallel_world_size(),
        first_stage_layers=None if config is None else config.num_layers_in_first_pipeline_stage,
        last_stage_layers=None if config is None else config.num_layers_in_last_pipeline_stage,
    )


def destroy_parallel(*, keep_distributed: bool = False) -> None:
    """Destroy Megatron's process groups and torch.distributed, where they exist. Collective over all ranks.

    The threads of a gloo group end with the last reference to it: drop models and optimizers that were built on it, too.

    Args:
        keep_distributed: leave torch.distributed as it is. Do so to call ``initialize_parallel`` again in the same
            process: torch's own store is not made to be opened a second time while another rank still closes it.
    """
    if not dist.is_initialized():
        return
    if not keep_distributed:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
    elif parallel_state.model_parallel_is_initialized():
        # Megatron only forgets its groups.
        made = parallel_state._global_process_group_list
        groups = {id(group): group for group in made if group is not None}
        del made
        parallel_state.destroy_model_parallel()
        # No rank may close a connection on which another still waits.
        dist.barrier()
        while groups:
            _, group = groups.popitem()
            if group in dist.distributed_c10d._world.pg_map:
                dist.destroy_process_group(group)


def compute_device() -> torch.device:
    """The device on which this rank's parameters live: its current CUDA device, or the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def to_device(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor on ``compute_device``. A copy from host memory is enqueued there and not waited for; the original may be changed."""
    device = compute_device()
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    # From other memory than pinned the driver would wait for all that was enqueued before.
    # An expanded tensor has no memory of its own that could be pinned.
    return tensor.contiguous().pin_memory().to(device, non_blocking=True)


def freeze_objects() -> None:
    """Take what exists out of Python's garbage collection, for a process that trains from here on. Not collective.

    A collection goes through the million objects of torch, compiled functions and models, which takes tenths of a second in which neither
    this rank's GPU gets work nor those that wait for its messages.
    """
    gc.collect()
    gc.freeze()


def share_in_replica(batches: Sequence[Mapping[str, torch.Tensor]] | None) -> list[dict[str, torch.Tensor]]:
    """The tensors of the first rank of a data-parallel replica (first tp_rank and cp_rank of the first stage), on each rank of it.

    Args:
        batches: named tensors on any device; None on the other ranks.

    Returns:
        The same on this rank's device. Collective over the ranks of the replica, whose context group and whose tensor and pipeline
        parallel group it uses.
    """
    context, model = parallel_state.get_context_parallel_group(), parallel_state.get_model_parallel_group()
    if dist.get_rank(model) == 0:
        batches = _shared(batches, context, dist.get_process_group_ranks(context)[0])
    return _shared(batches, model, parallel_state.get_model_parallel_src_rank())


def _shared(batches: Sequence[Mapping[str, torch.Tensor]] | None, group: dist.ProcessGroup, source: int) -> list[dict[str, torch.Tensor]]:
    """The tensors of one rank of a group on each of them. Collective over the group."""
    device = compute_device()
    layout: list[Any] = [None]
    if batches is not None:
        layout = [[[(name, tensor.shape, tensor.dtype) for name, tensor in batch.items()] for batch in batches]]
    if dist.get_world_size(group) > 1:
        dist.broadcast_object_list(layout, src=source, group=group)
    shared: list[dict[str, torch.Tensor]] = []
    for i, named in enumerate(layout[0]):
        shared.append({})
        for name, shape, dtype in named:
            given = torch.empty(shape, dtype=dtype, device=device) if batches is None else batches[i][name].to(device).contiguous()
            if dist.get_world_size(group) > 1 and given.numel():
                dist.broadcast(given.view(-1).view(torch.uint8), src=source, group=group)
            shared[-1][name] = given
    return shared


def _initialize_distributed(backend: str, store: dist.Store | None, *, timeout_s: float) -> None:
    address = ("MASTER_ADDR", "MASTER_PORT") if store is None else ()
    missing = [name for name in ("RANK", "WORLD_SIZE", *address) if name not in os.environ]
    if missing:
        raise ConfigError(
            f"cannot join a process group: the environment lacks {', '.join(missing)}; start with torchrun, "
            "set them, or initialise torch.distributed yourself before"
        )
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", os.environ["RANK"])) % torch.cuda.device_count())
    # What torch reads itself is said by -1.
    rank, world_size = (-1, -1) if store is None else (int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s), store=store, rank=rank, world_size=world_size)


def _seed_all(seed: int) -> None:
    stage_seed = seed + 100 * parallel_state.get_pipeline_model_parallel_rank()  # the stride of Megatron's own set-up
    random.seed(stage_seed)
    numpy.random.seed(stage_seed)
    torch.manual_seed(stage_seed)
    tensor_parallel.model_parallel_cuda_manual_seed(stage_seed)
