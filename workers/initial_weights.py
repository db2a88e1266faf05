"""The weights that a run begins with: of a Hugging Face folder, of Megatron's shards, made of one into the others once, or random ones."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from rlsync.bridge.auto_bridge import AutoBridge
from rlsync.bridge.checkpoint import load_checkpoint_weights, save_checkpoint
from rlsync.bridge.checkpoint_folder import TRACKER
from rlsync.megatron.model import unwrap
from rlsync.megatron.parallel import compute_device, current_topology
from rlsync.megatron.state import STATE_FORMAT
from rlsync.transport.collectives import agreed, gather_bytes
from workers.config.schema import ActorConfig
from workers.resume import ORIGIN, check_conversion_folder


def load_initial_weights(bridge: AutoBridge, models: Sequence[torch.nn.Module], actor: ActorConfig) -> None:
    """Fill the model as ``actor.model.megatron_checkpoint``, ``convert_from_hf``, ``mbridge`` and ``use_hf_ckpt`` say. Collective over
    all ranks.

    Raises CheckpointError, PlacementError, or ConfigError for a folder of conversions with other files in it, on all ranks.
    """
    hf_path, megatron = actor.megatron.ckpt_convertor.hf_model_path, actor.megatron
    assert hf_path is not None, "load_config derives it"
    if actor.model.megatron_checkpoint is not None:
        load_checkpoint_weights(actor.model.megatron_checkpoint, bridge, models)
    elif not megatron.convert_from_hf:
        bridge.init_weights(models, seed=actor.seed, std=actor.model.init_method_std)
    elif megatron.mbridge:
        bridge.load_weights(models, hf_path)
    else:
        assert megatron.use_hf_ckpt and megatron.ckpt_convertor.save_path is not None, "load_config sees to both"
        converted = Path(megatron.ckpt_convertor.save_path).absolute()
        _convert_once(bridge, models, Path(hf_path), converted)
        load_checkpoint_weights(converted, bridge, models)
    if actor.lora.adapter_path is not None:
        # After the base, with which weights that lie beside adapters are compared.
        bridge.load_adapter(models, actor.lora.adapter_path)


def _convert_once(bridge: AutoBridge, models: Sequence[torch.nn.Module], hf_folder: Path, converted: Path) -> None:
    """Convert ``hf_folder`` into ``converted`` for this layout, unless that is done. Collective over all ranks.

    Repeated where it was interrupted, where anything that it was made from has changed, and where another ``STATE_FORMAT`` wrote it. Rank 0
    decides for all: copies of ``hf_folder`` on disks of other nodes have other times.
    """
    origin: dict[str, Any] = {}
    is_done = False
    with agreed(device=compute_device()):
        if dist.get_rank() == 0:
            origin = {"hf_model_path": str(hf_folder.resolve()), "files": _fingerprint(hf_folder), **_layout(models)}
            is_done = _origin_of(converted) == origin
    if gather_bytes(b"done" if is_done else b"", device=compute_device())[0]:
        return
    with agreed(device=compute_device()):
        if dist.get_rank() == 0:
            check_conversion_folder(converted)
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
    except ValueError:  # cut short while it was written
        return None


def _fingerprint(hf_folder: Path) -> dict[str, list[int]]:
    """Size and modification time of each weight file: enough to notice other weights under the same path."""
    return {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in sorted(hf_folder.glob("*.safetensors"))}


def _layout(models: Sequence[torch.nn.Module]) -> dict[str, Any]:
    """Properties that the converted files depend on; data-parallel replicas share the files."""
    topology = asdict(current_topology(models))
    del topology["dp_size"]
    return {
        "state_format": STATE_FORMAT,
        "topology": topology,
        "dtype": str(next(models[0].parameters()).dtype),
        "padded_vocab_size": unwrap(models[0]).vocab_size,
    }
