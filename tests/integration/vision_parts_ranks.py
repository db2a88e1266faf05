"""What the ranks of ``test_vision_parts`` do; each function runs on every rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.optimizer import ChainedOptimizer

from rlsync.errors import ConfigError
from rlsync.megatron.model import gather_parameters, iter_parameters, parts_of_parameters
from rlsync.megatron.offload import ActorMemory
from rlsync.megatron.optimizer import SchedulerOptions, build_scheduler
from rlsync.megatron.parallel import destroy_parallel
from rlsync.models import PARTS
from tests.integration.megatron_ranks import Actor

LR = 1e-3
OPTIMIZER = {"lr": LR, "weight_decay": 0.01, "clip_grad": 1.0}


def _actor(folder: str, case: Mapping[str, Any]) -> Actor:
    return Actor(folder, {"cut": [2], **case, "optimizer": {**OPTIMIZER, **case.get("optimizer", {})}})


def _weights(actor: Actor) -> dict[str, torch.Tensor]:
    gather_parameters(actor.models)
    return {name: parameter.detach().clone() for _, _, name, parameter in iter_parameters(actor.models)}


def _parts(actor: Actor) -> dict[str, str]:
    part_of = {id(parameter): part for parameter, part in parts_of_parameters(actor.models)}
    return {name: part_of[id(parameter)] for _, _, name, parameter in iter_parameters(actor.models)}


def _state(actor: Actor) -> int:
    """Elements of this rank's optimizer state."""
    parts = actor.optimizer.chained_optimizers if isinstance(actor.optimizer, ChainedOptimizer) else [actor.optimizer]
    states = [state for part in parts if part.optimizer is not None for state in part.optimizer.state.values()]
    return sum(state["exp_avg"].numel() for state in states)


def freeze_and_train(cases: Sequence[Mapping[str, Any]], rows: str) -> None:
    """For each case: after two steps what is frozen has not moved by a bit and everything else has, and nothing is kept for the frozen."""
    for case in cases:
        actor = _actor(case["folder"], case)
        parts, before = _parts(actor), _weights(actor)
        still = {*case.get("frozen", ()), *case.get("still", ())}
        results = actor.steps(rows, 2)
        assert [result.learning_rate for result in results] == [case.get("rate", LR)] * 2, results
        # Also on a stage that has nothing of them.
        assert {*results[0].learning_rates} == {*PARTS} - {*case.get("frozen", ())}, (case, results[0].learning_rates)
        moved = {name for name, weight in _weights(actor).items() if not torch.equal(weight, before[name])}
        assert moved == {name for name, part in parts.items() if part not in still}, (
            case, sorted(moved)[:5], sorted(set(before) - moved)[:5],
        )  # fmt: skip
        for _, _, name, parameter in iter_parameters(actor.models):
            is_frozen = parts[name] in case.get("frozen", ())
            assert parameter.requires_grad is not is_frozen
            assert (getattr(parameter, "main_grad", None) is None) is is_frozen, name
            assert parameter.grad is None or not is_frozen, name
        if not case.get("ddp"):
            assert _state(actor) == sum(w.numel() for name, w in before.items() if parts[name] not in case.get("frozen", ()))
        print(f"TRAINED {case['topology']} {sorted(still)}", flush=True)
        destroy_parallel(keep_distributed=True)


def rates_of_parts(case: Mapping[str, Any], rows: str) -> None:
    """Adam's first step moves a weight by its learning rate; a schedule gives all parts its shape, whose peak is its own."""
    part_lr = {"vision_model": 1e-5, "vision_projection": 1e-2}
    for optimizer in ({"part_lr": part_lr}, {"part_lr": {**part_lr, "vision_model": LR}}, {}):
        actor = _actor(case["folder"], {**case, "optimizer": {"weight_decay": 0.0, **optimizer}})
        expected = {"language_model": LR, "vision_model": LR, "vision_projection": LR, **optimizer.get("part_lr", {})}
        parts, before = _parts(actor), _weights(actor)
        (result,) = actor.steps(rows, 1)
        assert (result.learning_rates, result.learning_rate) == (expected, LR)
        after = _weights(actor)
        for part, rate in expected.items():
            steps = [(after[name] - before[name]).abs().max().item() for name in before if parts[name] == part]
            assert not steps or 0.98 * rate <= max(steps) <= 1.02 * rate, (part, rate, max(steps))
        scheduler = build_scheduler(actor.optimizer, SchedulerOptions(max_lr=2e-3, min_lr=1e-3, lr_decay_style="linear", lr_decay_iters=4))
        scheduler.step(2)
        middle = {1.5e-3 if "own_lr" not in group else 0.75 * group["own_lr"] for group in actor.optimizer.param_groups}
        assert {round(group["lr"], 12) for group in actor.optimizer.param_groups} == {round(rate, 12) for rate in middle}
        destroy_parallel(keep_distributed=True)


def resume(cases: Sequence[Mapping[str, Any]], rows: str, root: str) -> None:
    """For each case: four steps are bit for bit two, a checkpoint, and two of another actor that resumes it, moved to the host between."""
    for number, case in enumerate(cases):
        actor = _actor(case["folder"], case)
        frozen = {name: weight for name, weight in _weights(actor).items() if _parts(actor)[name] in case.get("frozen", ())}
        actor.steps(rows, 2)
        memory = ActorMemory(actor.models, actor.optimizer)
        memory.offload("weights", "grads", "optimizer")
        memory.onload("weights", "grads", "optimizer")
        folder = str(Path(root, str(number)))
        actor.save(folder, 2)
        actor.steps(rows, 2)
        expected = _weights(actor)
        destroy_parallel(keep_distributed=True)
        again = _actor(case["folder"], case)
        with torch.no_grad():
            for _, _, _, parameter in iter_parameters(again.models):
                parameter.fill_(7.0)
        assert again.load(folder).complete
        assert all(torch.equal(_weights(again)[name], weight) for name, weight in frozen.items()), "frozen weights are in the checkpoint"
        again.steps(rows, 2)
        assert all(torch.equal(weight, expected[name]) for name, weight in _weights(again).items())
        print(f"RESUMED {case['topology']}", flush=True)
        destroy_parallel(keep_distributed=True)


def refuse(folder: str, text_folder: str) -> None:
    """What cannot be frozen is said before a model is built."""
    everything = ("language_model", "vision_model", "vision_projection")
    for path, frozen, said in (
        (folder, everything, "there is nothing to train"),
        (text_folder, ("vision_model",), "frozen vision_model: Qwen3ForCausalLM is a model of text"),
    ):
        with pytest.raises(ConfigError, match=said):
            _actor(path, {"topology": {}, "frozen": frozen})
        destroy_parallel(keep_distributed=True)
