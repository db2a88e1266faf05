"""Where the actor's first weights come from: HF files, a Megatron checkpoint, or a conversion made once and kept.

Owns the conversion's folder and when it is still good. Knows no optimizer: weights come before it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from rlsync.bridge import AutoBridge
from rlsync.checkpoint import load_checkpoint_weights, save_checkpoint
from rlsync.checkpoint_folder import TRACKER
from rlsync.megatron.parallel import compute_device, current_topology
from rlsync.transport.collectives import agreed
from workers.config.actor import ActorConfig

# What a conversion was made from; written after everything else of it.
ORIGIN = "origin.json"


def load_initial_weights(bridge: AutoBridge, models: Sequence[torch.nn.Module], actor: ActorConfig) -> None:
    """Fill the model as ``actor.model.megatron_checkpoint``, ``mbridge`` and ``use_hf_ckpt`` say. Collective over all ranks.

    Raises CheckpointError or PlacementError, on all ranks.
    """
    hf_path, megatron = actor.megatron.ckpt_convertor.hf_model_path, actor.megatron
    assert hf_path is not None, "load_config derives it"
    if actor.model.megatron_checkpoint is not None:
        load_checkpoint_weights(actor.model.megatron_checkpoint, bridge, models)
    elif megatron.mbridge:
        bridge.load_weights(models, hf_path)
    else:
        assert megatron.use_hf_ckpt and megatron.ckpt_convertor.save_path is not None, "load_config sees to both"
        converted = Path(megatron.ckpt_convertor.save_path).absolute()
        _convert_once(bridge, models, Path(hf_path), converted)
        load_checkpoint_weights(converted, bridge, models)


def _convert_once(bridge: AutoBridge, models: Sequence[torch.nn.Module], hf_folder: Path, converted: Path) -> None:
    """Make ``converted`` hold ``hf_folder`` in this layout, unless it does already. A conversion cut short is made again."""
    origin = {"hf_model_path": str(hf_folder.resolve()), "files": _fingerprint(hf_folder), **_layout(models)}
    if _origin_of(converted) == origin:
        return
    dist.barrier()  # nobody removes what another still looks at
    with agreed(device=compute_device()):
        if dist.get_rank() == 0:
            (converted / ORIGIN).unlink(missing_ok=True)
            shutil.rmtree(converted, ignore_errors=True)
    if dist.get_rank() == 0:
        print(f"converting {hf_folder} to a Megatron checkpoint in {converted}, once", flush=True)
    bridge.load_weights(models, hf_folder)
    save_checkpoint(converted, None, models, step=0)
    with agreed(device=compute_device()):
        if dist.get_rank() == 0:
            (converted / ORIGIN).write_text(json.dumps(origin, indent=1))


def _origin_of(converted: Path) -> dict[str, Any] | None:
    path = converted / ORIGIN
    if not path.is_file() or not (converted / TRACKER).is_file():
        return None
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError:  # cut short while it was written
        return None


def _fingerprint(hf_folder: Path) -> dict[str, list[int]]:
    """Size and modification time of each weight file: enough to notice other weights under the same path."""
    return {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in sorted(hf_folder.glob("*.safetensors"))}


def _layout(models: Sequence[torch.nn.Module]) -> dict[str, Any]:
    """What the conversion's files depend on; data-parallel replicas share them."""
    topology = asdict(current_topology(models))
    del topology["dp_size"]
    return {"topology": topology, "dtype": str(next(models[0].parameters()).dtype)}
