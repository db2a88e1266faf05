"""vLLM's own weight transfer (0.25), beside which rlsync is measured: both ends of its ``nccl`` and ``ipc`` backends.

Goes when vLLM's classes for the trainer's side are stable and say so (from 0.30 ``trainer_send_weights`` is being replaced).
"""

from __future__ import annotations

import base64
import pickle
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import torch
from vllm.config import WeightTransferConfig
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

Named = Iterator[tuple[str, torch.Tensor]]


def replace_engine(worker: Any, backend: str | None, kept: Any) -> Any:
    """Give a worker a new weight-transfer engine, as it makes one when it loads a model (``gpu_worker.py``), or ``kept`` for None.

    Returns the one it had.
    """
    former = worker.weight_transfer_engine
    if backend is None:
        worker.weight_transfer_engine = kept
    else:
        worker.weight_transfer_engine = WeightTransferEngineFactory.create_engine(
            WeightTransferConfig(backend=backend), worker.vllm_config, worker.device, worker.model_runner.get_model()
        )
    return former


def nccl_init_info(host: str, port: int, rank_offset: int, size: int) -> dict[str, Any]:
    """Init info for a worker to join the trainer's group; ``rank_offset``: of the engine's first worker."""
    return {"master_address": host, "master_port": port, "rank_offset": rank_offset, "world_size": size}


def nccl_trainer_group(host: str, port: int, size: int) -> Any:
    """The trainer's end of the group. Collective over its members."""
    from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine

    return NCCLWeightTransferEngine.trainer_init({"master_address": host, "master_port": port, "world_size": size})


def nccl_update_info(tensors: list[tuple[str, str, list[int]]]) -> dict[str, Any]:
    """``tensors``: name, dtype and shape, in the order in which they are sent."""
    names, dtypes, shapes = (list(column) for column in zip(*tensors, strict=True))
    return {"names": names, "dtype_names": dtypes, "shapes": shapes, "packed": True}


def nccl_send(named: Named, group: Any) -> None:
    """Broadcast whole tensors to the workers, packed."""
    from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine

    NCCLWeightTransferEngine.trainer_send_weights(named, {"group": group, "packed": True})
    torch.cuda.synchronize()


def ipc_send(named: Named, buffer_bytes: int, send: Callable[[dict[str, Any]], object]) -> None:
    """Hand whole tensors to the workers on the same GPUs, packed. ``send`` is called on rank 0 with what the workers are to be told.

    Collective over the trainer's default process group.
    """
    from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferEngine

    def send_mode(info: Any) -> None:
        told = asdict(info)
        told["ipc_handles_pickled"] = base64.b64encode(pickle.dumps(told.pop("ipc_handles"))).decode()
        send(told)

    arguments = {"send_mode": send_mode, "packed": True, "packed_buffer_size_bytes": buffer_bytes}
    IPCWeightTransferEngine.trainer_send_weights(named, arguments)
