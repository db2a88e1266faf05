"""What the ranks of ``test_convert`` do; each function runs on every rank."""

from __future__ import annotations

import argparse
import enum
import json
import os
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.validation import StrictHandling
from safetensors.torch import load_file

from rlsync import AutoBridge
from rlsync.bridge.adapter_folder import read_adapter_config
from rlsync.bridge.checkpoint import load_checkpoint_weights, save_checkpoint
from rlsync.cli import main
from rlsync.layout.topology import Topology
from rlsync.megatron.model import iter_weights, unwrap
from rlsync.megatron.parallel import destroy_parallel, initialize_parallel

STEP = 5


class Backend(enum.Enum):
    """As Megatron-LM's arguments have them: an object of a class that no reader of weights needs."""

    AUTO = 1


def write_and_read(cases: list[dict[str, Any]], adapted: list[dict[str, Any]]) -> None:
    """For each case: load the model under its layout, save it in every form, and read what was converted to that layout. Then adapters."""
    for case in cases:
        topology = Topology(**case["topology"])
        initialize_parallel(topology, seed=1, timeout_s=300)
        bridge = AutoBridge.from_pretrained(case["folder"], make_vocab_size_divisible_by=case.get("divisor", 1))
        models = bridge.get_model(
            case["folder"], topology=topology, bf16=False, wrap_with_ddp=False, overrides=case.get("overrides")
        )  # fmt: skip
        out = Path(case["out"])
        save_checkpoint(out / "ours", None, models, step=STEP)
        _save_as_megatron_lm(out / "legacy", models, topology)
        if case.get("torch_dist", True):
            _save_distributed(out / "torch_dist", models, case.get("metadata"))
        original = {name: t for file in Path(case["folder"]).glob("*.safetensors") for name, t in load_file(file).items()}
        for load in (partial(load_checkpoint_weights, case["converted"], bridge), partial(_load_distributed, out / "whole")):
            for _, tensor in iter_weights(models):
                tensor.data.fill_(float("nan"))
            load(models)
            exported = dict(bridge.export_weights(models))
            assert exported.keys() == original.keys() and all(torch.equal(t, original[name]) for name, t in exported.items()), (case, load)
        dist.barrier()
        destroy_parallel(keep_distributed=True)
    for case in adapted:
        _load_adapters(case)
        destroy_parallel(keep_distributed=True)
    destroy_parallel()


def _load_adapters(case: dict[str, Any]) -> None:
    """A run starts from converted shards of adapters, which are PEFT's, and saves its own."""
    topology = Topology(**case["topology"])
    initialize_parallel(topology, seed=1, timeout_s=300)
    bridge = AutoBridge.from_pretrained(case["folder"])
    spec, overrides = read_adapter_config(case["adapter"]), {"sequence_parallel": topology.tp_size > 1}
    models = bridge.get_model(case["folder"], topology=topology, bf16=False, wrap_with_ddp=False, lora=spec, overrides=overrides)
    load_checkpoint_weights(case["converted"], bridge, models)
    theirs = load_file(Path(case["adapter"], "adapter_model.safetensors"))
    exported = {f"base_model.model.{name}": tensor for name, tensor in bridge.export_adapter(models)}
    assert exported.keys() == theirs.keys() and all(torch.equal(t, theirs[name]) for name, t in exported.items()), case
    save_checkpoint(case["out"], bridge, models, step=STEP)


def compare_precision(folder: str, pictures: str, changed: str, shards: str, out: str) -> None:
    """``rlsync compare`` of equal weights, of shards, of a tower, and of weights of which one layer differs; and a conversion's own."""

    def compared(*arguments: str) -> tuple[int, dict[str, Any]]:
        with redirect_stdout(StringIO()) as said:
            code = main(["compare", *arguments, "--json"])
        return code, json.loads(said.getvalue())

    for arguments in ([folder], [folder, "--weights", shards], [pictures], [pictures, "--pictures", "0"]):
        code, found = compared(*arguments, "--prompt-length", "8")
        assert code == 0 and found["within"] and found["first_layer"] is None, found
        assert found["logits"][0]["largest"] < 1e-4 and found["logits"][0]["top1"] == 1.0 and len(found["layers"]) == 5, found
        kinds = [row["positions"] for row in found["logits"]]
        assert kinds == ["all", "prompt", "response", *(["pictures", "text"] if arguments == [pictures] else [])]
        assert found["logits"][1]["count"] + found["logits"][2]["count"] == found["logits"][0]["count"] == 64
    with redirect_stdout(StringIO()) as said:
        assert main(["convert", pictures, out, "--tp", "2", "--test-precision", "--json"]) == 0
    found = json.loads(said.getvalue())["precision"]
    counts = {row["positions"]: row["count"] for row in found["logits"]}
    assert found["within"] and counts == {"all": 64, "prompt": 16, "response": 48, "pictures": 8, "text": 56}, found
    code, found = compared(folder, "--weights", changed)
    assert code == 1 and not found["within"] and found["first_layer"] == "layer 2", found
    code, found = compared(folder, "--dtype", "bf16")
    assert code == 0 and found["dtype"] == "bfloat16" and found["logits"][0]["largest"] > 1e-3, found
    with redirect_stderr(StringIO()) as said:
        assert main(["compare", folder, "--tokens", out, "--rows", "3"]) == 1
    assert "--rows are of random rows, and --tokens gives the rows" in said.getvalue()


def _save_as_megatron_lm(folder: Path, models: list[torch.nn.Module], topology: Topology) -> None:
    """One file for each tensor, pipeline and expert rank, called as Megatron-LM calls it, with its arguments and other objects."""
    at = topology.coordinates(dist.get_rank())
    name = f"mp_rank_{at.tp_rank:02d}"
    name += f"_{at.pp_rank:03d}" if topology.pp_size > 1 else ""
    name += f"_{at.ep_rank:03d}" if topology.ep_size > 1 else ""
    arguments = argparse.Namespace(
        tensor_model_parallel_size=topology.tp_size,
        pipeline_model_parallel_size=topology.pp_size,
        virtual_pipeline_model_parallel_size=topology.vpp_size if topology.vpp_size > 1 else None,
        expert_model_parallel_size=topology.ep_size,
        expert_tensor_parallel_size=topology.etp_size,
        decoder_first_pipeline_num_layers=topology.first_stage_layers,
        decoder_last_pipeline_num_layers=topology.last_stage_layers,
        params_dtype=torch.float32,
        attention_backend=Backend.AUTO,
        save=Path("/there"),
    )
    state: dict[str, Any] = {"args": arguments, "checkpoint_version": 3.0, "iteration": STEP, "rng_state": [torch.get_rng_state()]}
    for index, model in enumerate(models):
        state["model" if len(models) == 1 else f"model{index}"] = unwrap(model).state_dict_for_save_checkpoint()
    # Ranks that hold the same write the same, as one of them would.
    path = folder / f"iter_{STEP:07d}" / name / "model_optim_rng.pt"
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{dist.get_rank()}.partial")
    torch.save(state, partial)
    os.replace(partial, path)
    (folder / "latest_checkpointed_iteration.txt").write_text(str(STEP))


def _load_distributed(folder: Path, models: list[torch.nn.Module]) -> None:
    """By Megatron's own ``dist_checkpointing``, which asks the folder how its keys are written."""
    shards = folder / "iter_0000000"
    metadata = dist_checkpointing.load_content_metadata(str(shards))
    state: dict[str, Any] = {}
    for index, model in enumerate(models):
        state["model" if len(models) == 1 else f"model{index}"] = unwrap(model).sharded_state_dict(metadata=dict(metadata))
    # As Megatron-LM with --dist-ckpt-strictness return_all. Linear layers ask for a state of FP8, which is empty here.
    loaded, lacking, unread = dist_checkpointing.load(state, str(shards), strict=StrictHandling.RETURN_ALL)
    assert not unread - {name for name in unread if "_extra_state" in name} and not lacking, (lacking, unread)
    for key, model in zip(state, models, strict=True):
        unwrap(model).load_state_dict(loaded[key], strict=False)


def _save_distributed(folder: Path, models: list[torch.nn.Module], metadata: dict[str, Any] | None) -> None:
    """By Megatron's own ``dist_checkpointing``."""
    shards = folder / f"iter_{STEP:07d}"
    shards.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    state: dict[str, Any] = {"iteration": STEP, "args": argparse.Namespace(attention_backend=Backend.AUTO)}
    for index, model in enumerate(models):
        key = "model" if len(models) == 1 else f"model{index}"
        state[key] = unwrap(model).sharded_state_dict(metadata=None if metadata is None else dict(metadata))
    dist_checkpointing.save(state, str(shards))
    if dist.get_rank() == 0:
        (folder / "latest_checkpointed_iteration.txt").write_text(str(STEP))
    dist.barrier()
