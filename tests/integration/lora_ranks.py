"""What the ranks of ``test_lora`` do; each function runs on every rank."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from rlsync.bridge import auto_bridge
from rlsync.bridge.auto_bridge import AutoBridge
from rlsync.bridge.checkpoint import load_checkpoint, load_checkpoint_weights, save_checkpoint
from rlsync.bridge.checkpoint_folder import Restored
from rlsync.bridge.source import MegatronSource
from rlsync.copy.cpu import region
from rlsync.errors import CheckpointError, ConfigError, PlacementError
from rlsync.layout.topology import Topology
from rlsync.megatron import lora as megatron_lora
from rlsync.megatron.model import DdpOptions, adapters_by_weight, adapters_in, is_adapter, iter_parameters
from rlsync.megatron.optimizer import OptimizerOptions, build_optimizer
from rlsync.megatron.parallel import destroy_parallel, initialize_parallel
from rlsync.megatron.train import token_scores, train_step
from rlsync.models.lora import LoraSpec
from tests.integration.megatron_ranks import loss
from tests.vision_models import collated


class LoraActor:
    """A base with adapters from a folder, under one layout."""

    def __init__(self, case: Mapping[str, Any], expected: Mapping[str, Any], *, load_adapter: bool = True) -> None:
        self.case, self.topology = case, Topology(**case["topology"])
        torch.use_deterministic_algorithms(True)
        initialize_parallel(self.topology, seed=5, timeout_s=300)
        self.bridge = AutoBridge.from_pretrained(expected["folder"])
        self.models = self.bridge.get_model(
            expected["folder"],
            topology=self.topology,
            bf16=case.get("precision") == "bf16",
            ddp=DdpOptions(**case.get("ddp", {})),
            overrides=case.get("overrides"),
            spec=case.get("spec", "auto"),
            lora=LoraSpec(**{name: tuple(value) if isinstance(value, list) else value for name, value in expected["spec"].items()}),
        )
        if load_adapter:
            self.bridge.load_adapter(self.models, expected["adapter"])
        self.optimizer = build_optimizer(self.models, OptimizerOptions(**expected["optimizer"]))

    def microbatches(self, batch: Mapping[str, list] | str) -> list[dict[str, torch.Tensor]]:
        """This replica's share, cut as the case says. A string is a file of rows, which may have pictures."""
        replica, replicas = parallel_state.get_data_parallel_rank(), self.topology.dp_size
        if isinstance(batch, str):
            rows, ends = torch.load(batch)["rows"][replica::replicas], list(accumulate(self.case["cut"]))
            assert ends[-1] == len(rows)
            return [collated(rows[start:end]) for start, end in pairwise((0, *ends))]
        mine = {name: torch.tensor(values)[replica::replicas] for name, values in batch.items()}
        ends = list(accumulate(self.case["cut"]))
        assert ends[-1] == mine["tokens"].size(0)
        return [{name: tensor[start:end] for name, tensor in mine.items()} for start, end in pairwise((0, *ends))]

    def steps(self, batch: Mapping[str, list] | str, count: int) -> list[Any]:
        chunk = {"chunk_tokens": self.case["chunk_tokens"]} if "chunk_tokens" in self.case else {}
        return [train_step(self.models, self.optimizer, self.microbatches(batch), loss, temperature=1.0, **chunk) for _ in range(count)]


def train_as_reference(cases: Sequence[Mapping[str, Any]], models: Mapping[str, Mapping[str, Any]], out_dir: str) -> None:
    """For each case: losses, gradient norms and adapters of ten steps are the reference's; the base has not moved."""
    for number, case in enumerate(cases):
        expected = models[case["model"]]
        actor = LoraActor(case, expected)
        for _, _, name, parameter in iter_parameters(actor.models):
            assert parameter.requires_grad == is_adapter(name), name
            assert hasattr(parameter, "main_grad") == is_adapter(name), name
        held = {name: p.detach().clone() for _, _, name, p in iter_parameters(actor.models) if not is_adapter(name)}
        results = actor.steps(expected["batch"], len(expected["losses"]))
        for step, result in enumerate(results):
            _close(result.metrics["loss"], expected["losses"][step], 1e-4, f"{case}: loss of step {step}")
            _close(result.grad_norm, expected["grad_norms"][step], 1e-4, f"{case}: gradient norm of step {step}")
        trained = load_file(expected["trained"])
        exported = {name: tensor.cpu() for name, tensor in actor.bridge.export_adapter(actor.models)}
        assert exported.keys() == trained.keys(), exported.keys() ^ trained.keys()
        worst = max((exported[name] - tensor).abs().max().item() for name, tensor in trained.items())
        assert worst < 1e-4, f"{case}: adapters differ by {worst} after training"
        assert all(torch.equal(held[name], p) for _, _, name, p in iter_parameters(actor.models) if name in held), "the base has moved"
        merged = {name: tensor.cpu() for name, tensor in actor.bridge.export_weights(actor.models)}
        wanted = load_file(expected["merged"])
        assert merged.keys() == wanted.keys(), merged.keys() ^ wanted.keys()
        source = MegatronSource(actor.bridge, actor.models)
        adapted = {f"{name.rpartition('.lora_')[0]}.weight" for name in exported}
        assert source.declared.transforms == dict.fromkeys(adapted, "merge"), "engines would get the base"
        assert not source.frozen & adapted and source.frozen
        check_merging(actor, source)
        check_exported(actor, source, merged)
        off = max((merged[name] - tensor).abs().max().item() for name, tensor in wanted.items())
        assert off < 1e-4, f"{case}: merged weights differ by {off}"
        folder = Path(out_dir, f"{dist.get_world_size()}-{number}")
        with pytest.MonkeyPatch.context() as patch:
            # 37,248 factors of a 30B take seconds, which every save would wait for.
            for name in ("build_plan", "megatron_placements"):
                patch.delattr(auto_bridge, name)
            actor.bridge.save_adapter(actor.models, folder)
        dist.barrier()
        written = load_file(folder / "adapter_model.safetensors")
        assert all(torch.equal(written[f"base_model.model.{name}"], tensor) for name, tensor in exported.items())
        print(f"TRAINED {case['model']} {case['topology']} adapters within {worst:.1e}, merged within {off:.1e}", flush=True)
        destroy_parallel(keep_distributed=True)


def check_merging(actor: LoraActor, source: MegatronSource) -> None:
    """What an adapter makes of its weight does not depend on those that are merged beside it, bit for bit; and those that are alike, as
    hundreds of experts, take a product each and little else."""
    adapters, compute = adapters_by_weight(actor.models), source.declared.compute
    assert compute is not None
    with Operations() as together:
        merged = dict(zip(adapters, compute(list(adapters)), strict=True))
    for names in ([name] for name in reversed(adapters)):
        assert torch.equal(compute(names)[0], merged[names[0]]), names
        assert merged[names[0]].dtype == source.buffers[names[0]].dtype
    kinds = {(merged[name].shape, each.lora_A.shape, each.lora_B.shape) for name, each in adapters.items()}
    assert together.count <= len(adapters) + 8 * len(kinds), f"{together.count} for {len(adapters)} adapters of {len(kinds)} kinds"


def check_exported(actor: LoraActor, source: MegatronSource, exported: Mapping[str, torch.Tensor]) -> None:
    """Engines get the bytes that an export has."""
    names, compute = list(adapters_by_weight(actor.models)), source.declared.compute
    assert compute is not None
    computed = dict(zip(names, compute(names), strict=True))
    pieces = [piece for piece in source.placements[source.rank].pieces if piece.buffer in computed]
    assert pieces or not names
    for piece in pieces:
        sent = region(computed[piece.buffer], piece.offset, piece.box.shape, piece.strides).cpu()
        assert torch.equal(sent, exported[piece.tensor][tuple(map(slice, piece.box.start, piece.box.stop))]), piece.tensor


class Operations(TorchDispatchMode):
    """Counts those that compute: on a GPU each would be a launch, or several."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view and func is not torch.ops.aten.empty.memory_format
        return func(*args, **(kwargs or {}))


def draw_alike(cases: Sequence[Mapping[str, Any]], models: Mapping[str, Mapping[str, Any]], out_dir: str) -> None:
    """Initial adapters as they are exported, for each case."""
    for number, case in enumerate(cases):
        actor = LoraActor(case, models[case["model"]], load_adapter=False)
        exported = {name: tensor.cpu() for name, tensor in actor.bridge.export_adapter(actor.models)}
        if dist.get_rank() == 0:
            torch.save(exported, Path(out_dir, f"{case['model']}-{dist.get_world_size()}-{number}.pt"))
        destroy_parallel(keep_distributed=True)


def load_stacked(case: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Adapters of stacked experts, as PEFT has saved them, make of the weights what PEFT makes of them."""
    actor = LoraActor(case, expected)
    wanted = load_file(expected["merged"])
    merged = {name: tensor.cpu() for name, tensor in actor.bridge.export_weights(actor.models)}
    assert merged.keys() == wanted.keys(), merged.keys() ^ wanted.keys()
    worst = max((merged[name] - tensor).abs().max().item() for name, tensor in wanted.items())
    assert worst < 1e-6, f"merged weights differ by {worst}"
    print("LOADED", flush=True)


def drop_alike(cases: Sequence[Mapping[str, Any]], models: Mapping[str, Mapping[str, Any]]) -> None:
    """With dropout, ranks that hold the same factors train them alike; scores have no dropout."""
    for case in cases:
        expected = models[case["model"]]
        actor = LoraActor(case, {**expected, "spec": {**expected["spec"], "lora_dropout": 0.5}})
        results = actor.steps(expected["batch"], 3)
        assert abs(results[0].metrics["loss"] - expected["losses"][0]) > 1e-4, "nothing was dropped"
        shards = actor.bridge.adapter_shards(actor.models)
        held: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(held, {name: parameter.detach() for name, parameter in shards.buffers.items()})
        first: dict[tuple[Any, ...], torch.Tensor] = {}
        for rank, placement in enumerate(shards.placements):
            for piece in placement.pieces:
                found = region(held[rank][piece.buffer], piece.offset, piece.box.shape, piece.strides)
                other = first.setdefault((piece.tensor, piece.box), found)
                assert torch.equal(found, other), f"{case}: rank {rank} holds other values of {piece.tensor}"
        scored = [token_scores(actor.models, actor.microbatches(expected["batch"])) for _ in range(2)]
        assert all(torch.equal(one.log_probs, two.log_probs) for one, two in zip(*scored, strict=True) if one is not None)
        print(f"DROPPED {case['model']} {case['topology']}", flush=True)
        destroy_parallel(keep_distributed=True)


def resume_bitwise(cases: Sequence[Mapping[str, Any]], models: Mapping[str, Mapping[str, Any]], root: str) -> None:
    """Shards hold adapters alone, and a run that goes on from them is the uninterrupted one bit for bit."""
    for number, case in enumerate(cases):
        expected, folder = models[case["model"]], Path(root, str(number))
        actor = LoraActor(case, expected)
        actor.steps(expected["batch"], 2)
        save_checkpoint(folder, actor.bridge, actor.models, step=2, optimizer=actor.optimizer)
        actor.steps(expected["batch"], 2)
        wanted = {name: p.detach().clone() for _, _, name, p in iter_parameters(actor.models)}
        destroy_parallel(keep_distributed=True)
        resumed = LoraActor(case, expected, load_adapter=False)
        load_checkpoint(folder, resumed.bridge, resumed.models, optimizer=resumed.optimizer)
        resumed.steps(expected["batch"], 2)
        for _, _, name, parameter in iter_parameters(resumed.models):
            assert torch.equal(parameter, wanted[name]), f"{case}: {name}"
        for path in folder.glob("iter_*/*/model_optim_rng.pt"):
            stored = torch.load(path, weights_only=True)
            names = [name for key in stored if key.startswith("model") for name in stored[key]]
            assert names
            assert all(map(is_adapter, names)), f"{path} holds more than adapters"
        print(f"RESUMED {case['model']} {case['topology']}", flush=True)
        destroy_parallel(keep_distributed=True)


def resume_elsewhere(cases: Sequence[Mapping[str, Any]], models: Mapping[str, Mapping[str, Any]], root: str) -> None:
    """A run goes on under another layout as the run that never moved, and from there back under the first one bit for bit."""
    for number, moving in enumerate(cases):
        expected, folders = models[moving["then"]["model"]], [Path(root, str(number), name) for name in "ab"]

        def started(case: Mapping[str, Any], folder: Path | None = None, expected: Any = expected) -> LoraActor:
            if parallel_state.model_parallel_is_initialized():
                destroy_parallel(keep_distributed=True)
            actor = LoraActor(case, expected, load_adapter=False)
            if folder is not None:
                restored = load_checkpoint(folder, actor.bridge, actor.models, optimizer=actor.optimizer)
                assert restored == Restored(2, complete=True, moved=True), restored
            return actor

        def next_step(actor: LoraActor, expected: Any = expected) -> tuple[float, dict[str, torch.Tensor]]:
            (result,) = actor.steps(expected["batch"], 1)
            return result.metrics["loss"], {name: factor.clone() for name, factor in actor.bridge.export_adapter(actor.models)}

        actor = started(moving["then"])
        actor.steps(expected["batch"], 2)
        save_checkpoint(folders[0], None, actor.models, step=2, optimizer=actor.optimizer)
        loss_then, factors_then = next_step(actor)
        moved = started(moving["now"], folders[0])
        save_checkpoint(folders[1], None, moved.models, step=2, optimizer=moved.optimizer)
        loss_moved, factors_moved = next_step(moved)
        _close(loss_moved, loss_then, 1e-5, f"{moving}: loss of the step after")
        far = max((factors_moved[name] - factor).abs().max().item() for name, factor in factors_then.items())
        assert far < 1e-5, (moving, far)
        loss_back, factors_back = next_step(started(moving["then"], folders[1]))
        assert loss_back == loss_then, moving
        assert [name for name, factor in factors_then.items() if not torch.equal(factors_back[name], factor)] == [], moving
        print(f"MOVED {moving['then']['topology']} {moving['now']['topology']} {far:.1e}", flush=True)
        destroy_parallel(keep_distributed=True)


def resume_beside_other_layers(cases: Sequence[Mapping[str, Any]], models: Mapping[str, Mapping[str, Any]], root: str) -> None:
    """A run beside TransformerEngine's layers goes on beside Megatron's own, from a checkpoint with the same names."""
    for number, case in enumerate(cases):
        expected, folder = models[case["model"]], Path(root, str(number))
        actor = LoraActor({**case, "spec": "te"}, expected)
        actor.steps(expected["batch"], 2)
        save_checkpoint(folder, actor.bridge, actor.models, step=2, optimizer=actor.optimizer)
        saved = {name: p.detach().clone() for _, _, name, p in iter_parameters(actor.models) if is_adapter(name)}
        wanted = actor.steps(expected["batch"], 3)
        destroy_parallel(keep_distributed=True)
        resumed = LoraActor({**case, "spec": "local"}, expected, load_adapter=False)
        load_checkpoint(folder, resumed.bridge, resumed.models, optimizer=resumed.optimizer)
        found = {name: p.detach() for _, _, name, p in iter_parameters(resumed.models) if is_adapter(name)}
        assert list(found) == list(saved), "adapters are not in the order in which their optimizer states are"
        assert all(torch.equal(found[name], saved[name]) for name in saved)
        for before, after in zip(wanted, resumed.steps(expected["batch"], 3), strict=True):
            _close(after.metrics["loss"], before.metrics["loss"], 1e-4, f"{case}: loss of a step after the resume")
            _close(after.grad_norm, before.grad_norm, 1e-4, f"{case}: gradient norm of a step after the resume")
        print(f"RESUMED {case['model']} {case['topology']}", flush=True)
        destroy_parallel(keep_distributed=True)


def differ_without_the_norm(cases: Sequence[Mapping[str, Any]], models: Mapping[str, Mapping[str, Any]], out_dir: str) -> None:
    """Adapters that are given what goes into a layer with a norm, and not what its norm makes of it, are not the reference's."""
    normed = megatron_lora._add_after_norm
    with pytest.MonkeyPatch.context() as patch:

        def add(adapter: Any, base: Any, inputs: Any, output: Any) -> Any:
            (out, _), bias = output if not base.te_return_bias else ((output[0], output[2]), output[1])
            return normed(adapter, base, inputs, ((out, inputs[0]), bias) if not base.te_return_bias else (out, bias, inputs[0]))

        patch.setattr(megatron_lora, "_add_after_norm", add)
        for case in cases:
            with pytest.raises(AssertionError, match="of step 0"):
                train_as_reference([case], models, out_dir)
            print("DIFFERED", flush=True)
            destroy_parallel(keep_distributed=True)


def agree_in_half_precision(cases: Sequence[Mapping[str, Any]], models: Mapping[str, Mapping[str, Any]]) -> None:
    """In bf16 the first steps are the reference's within what bf16 rounds."""
    for case in cases:
        expected = models[case["model"]]
        actor = LoraActor({**case, "precision": "bf16"}, expected)
        results = actor.steps(expected["batch"], 3)
        for step, result in enumerate(results):
            _close(result.metrics["loss"], expected["losses"][step], 3e-2, f"{case}: loss of step {step}")
            _close(result.grad_norm / expected["grad_norms"][step], 1.0, 5e-2, f"{case}: gradient norm of step {step}")
        off = max(abs(result.metrics["loss"] - wanted) for result, wanted in zip(results, expected["losses"], strict=False))
        print(f"AGREED {case['model']} {case['spec']} within {off:.1e}", flush=True)
        destroy_parallel(keep_distributed=True)


def refuse(models: Mapping[str, Mapping[str, Any]], foreign: Mapping[str, str], root: str) -> None:
    """Adapters and checkpoints that do not fit are refused before anything changes."""
    name, expected = next(iter(models.items()))
    actor = LoraActor({"model": name, "topology": {}, "cut": [8]}, expected)
    before = {name: p.detach().clone() for _, _, name, p in iter_parameters(actor.models)}
    kinds = {"ConfigError": ConfigError, "CheckpointError": CheckpointError, "PlacementError": PlacementError}
    for folder, told in foreign.items():
        kind, words = told.split(": ", 1)
        with pytest.raises(kinds[kind], match=re.escape(words)):
            actor.bridge.load_adapter(actor.models, folder)
    save_checkpoint(root, actor.bridge, actor.models, step=1, optimizer=actor.optimizer)
    other = actor.bridge.get_model(bf16=False, lora=replace(adapters_in(actor.models).spec, lora_alpha=16.0))
    with pytest.raises(CheckpointError, match=r"adapters that are multiplied by 2.0, and rank and alpha of those asked for make it 4.0"):
        load_checkpoint(root, actor.bridge, other)
    shutil.rmtree(Path(root, "iter_0000001"))
    for load in (load_checkpoint, load_checkpoint_weights):
        with pytest.raises(CheckpointError, match="holds HF weights alone, and this run's adapters cannot be told from them"):
            load(root, actor.bridge, actor.models)
    assert all(torch.equal(before[name], p) for _, _, name, p in iter_parameters(actor.models))
    print("REFUSED", flush=True)


def _close(found: float, wanted: float, tolerance: float, what: str) -> None:
    assert abs(found - wanted) <= tolerance * max(1.0, abs(wanted)), f"{what}: {found}, expected {wanted}"
