"""What the ranks of ``test_vision`` do; each function runs on every rank."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from rlsync.megatron.model import adapters_in, iter_parameters
from rlsync.megatron.parallel import destroy_parallel
from rlsync.megatron.train import Microbatch, gathered_logits, train_step
from tests.integration.megatron_ranks import Actor, loss


def compute_as_huggingface(cases: Sequence[Mapping[str, Any]], models: Mapping[str, Mapping[str, Any]]) -> None:
    """For each case: logits and gradients of every batch equal those of HF's model, and tensor ranks agree on the tower's."""
    for case in cases:
        expected = models[case["model"]]
        actor = Actor(expected["folder"], {**case, "optimizer": {"lr": 0.0, "weight_decay": 0.0, "clip_grad": 0.0}})
        worst, uncalled = [0.0, 0.0], _watched(actor)
        for name, path in expected["batches"].items():
            batch = torch.load(path)
            if len(batch["rows"]) != sum(case["cut"]) * actor.topology.dp_size:
                continue
            worst[0] = max(worst[0], _check_logits(actor, actor.microbatches(path), batch, name))
            check = _check_adapter_gradients if "lora" in case else _check_gradients
            worst[1] = max(worst[1], check(actor, actor.microbatches(path), batch, name))
        assert not uncalled, f"{case}: parameters of modules that were not called, whose gathers nothing waits for: {sorted(uncalled)}"
        print(f"COMPUTED {case['model']} {case['topology']} logits {worst[0]:.1e} gradients {worst[1]:.1e}", flush=True)
        destroy_parallel(keep_distributed=True)


def _watched(actor: Actor) -> set[str]:
    """Names of modules that have parameters of their own that are trained, and have not been called yet."""
    uncalled: set[str] = set()
    for chunk in actor.models:
        for name, module in chunk.named_modules():
            if any(parameter.requires_grad for parameter in module.parameters(recurse=False)):
                uncalled.add(name)
                module.register_forward_pre_hook(lambda *_, name=name: uncalled.discard(name))
    return uncalled


def _check_logits(actor: Actor, microbatches: Sequence[Microbatch], batch: Mapping[str, Any], name: str) -> float:
    start, worst = 0, 0.0
    replica, replicas = parallel_state.get_data_parallel_rank(), actor.topology.dp_size
    for microbatch in microbatches:
        count = len(microbatch["tokens"])
        logits = gathered_logits(actor.models, microbatch)
        for row in range(count):
            theirs = batch["logits"][replica + (start + row) * replicas]
            if logits is not None:
                worst = max(worst, (logits[row, : len(theirs)].cpu() - theirs).abs().max().item())
        start += count
    assert worst < 1e-4, f"{actor.case} {name}: logits differ by {worst}"
    return worst


def _check_gradients(actor: Actor, microbatches: Sequence[Microbatch], batch: Mapping[str, Any], name: str) -> float:
    result = train_step(actor.models, actor.optimizer, microbatches, loss, **actor.how)
    assert abs(result.metrics["loss"] - batch["loss"]) <= 2e-5 * max(1, abs(batch["loss"])), (name, result.metrics, batch["loss"])
    for key, gradient in _tower_gradients(actor):
        others = [torch.empty_like(gradient) for _ in range(actor.topology.tp_size)]
        dist.all_gather(others, gradient, group=parallel_state.get_tensor_model_parallel_group())
        assert all(torch.equal(gradient, other) for other in others), f"{name}: tensor ranks have other gradients of {key}"
    return _compare(actor, name, _gradients(actor, actor.bridge.export_weights), batch["gradients"])


def _check_adapter_gradients(actor: Actor, microbatches: Sequence[Microbatch], batch: Mapping[str, Any], name: str) -> float:
    """Those of fresh adapters, whose B is zero: what transformers' gradients of the weights make of them."""
    adapters = adapters_in(actor.models)
    assert adapters is not None
    factors = {key: tensor.cpu() for key, tensor in actor.bridge.export_adapter(actor.models)}
    train_step(actor.models, actor.optimizer, microbatches, loss)
    wanted = {}
    for module in adapters.modules:
        a, gradient = factors[f"{module}.lora_A.weight"], batch["gradients"][f"{module}.weight"]
        wanted[f"{module}.lora_A.weight"] = torch.zeros_like(a)
        wanted[f"{module}.lora_B.weight"] = adapters.spec.scaling * gradient @ a.T
    return _compare(actor, name, _gradients(actor, actor.bridge.export_adapter), wanted)


def _gradients(actor: Actor, export: Callable[[Any], Iterator[tuple[str, torch.Tensor]]]) -> dict[str, torch.Tensor]:
    """What is exported of the gradients, in the place of the parameters that have them."""
    kept = []
    with torch.no_grad():
        for _, _, _, parameter in iter_parameters(actor.models):
            if parameter.requires_grad:
                kept.append((parameter, parameter.clone()))
                parameter.copy_(parameter.main_grad)
        exported = {key: tensor.cpu().clone() for key, tensor in export(actor.models)}
        for parameter, value in kept:
            parameter.copy_(value)
    return exported


def _compare(actor: Actor, name: str, found: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> float:
    assert found.keys() == wanted.keys(), found.keys() ^ wanted.keys()
    differences = {key: (tensor - wanted[key]).abs().max().item() for key, tensor in found.items()}
    worst = max(differences, key=differences.__getitem__)
    assert differences[worst] < 1e-4, f"{actor.case} {name}: gradients differ by {differences[worst]} in {worst}"
    return differences[worst]


def _tower_gradients(actor: Actor) -> Iterator[tuple[str, torch.Tensor]]:
    return ((name, parameter.main_grad) for _, _, name, parameter in iter_parameters(actor.models) if name.startswith("visual."))
