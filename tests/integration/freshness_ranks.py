"""What the ranks of ``test_freshness`` do: train, and hold what a sync reads with what the optimizer has just computed."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.optimizer import ChainedOptimizer, DistributedOptimizer

from rlsync.bridge.source import MegatronSource
from rlsync.megatron.model import iter_parameters
from rlsync.megatron.optimizer import cores_of_rank
from rlsync.megatron.parallel import destroy_parallel
from tests.integration.megatron_ranks import Actor

Weights = dict[str, torch.Tensor]


def synced_weights_are_those_after_the_step(cases: Sequence[Mapping[str, Any]], models: Mapping[str, Mapping[str, Any]]) -> None:
    """Step after step, on every replica, bit for bit; ``stale`` cases are not, as long as nobody has begun a sync."""
    for case in cases:
        expected = models[case["model"]]
        actor = Actor(expected["folder"], case)
        source = MegatronSource(actor.bridge, actor.models)
        for version in range(1, 4):
            before = _copies(source.buffers)
            actor.steps(expected["batch"], 1)
            computed = _computed(actor)
            unforced = _copies(source.buffers)
            source.begin(version)
            read = _copies(source.buffers)
            assert _equal(read, computed), f"{case}: version {version} is not what the optimizer computed"
            assert not _equal(read, before), "negative control: the step changed nothing"
            assert _everywhere(_equal(unforced, computed)) is not case["stale"], f"{case}: staleness without begin()"
        print(f"FRESH {case['topology']} {case['optimizer']}", flush=True)
        dist.barrier()
        destroy_parallel(keep_distributed=True)


def the_step_alone_has_the_cores_of_the_rank(case: Mapping[str, Any], models: Mapping[str, Mapping[str, Any]]) -> None:
    """What the optimizer computes on the host it computes with its share of the host's cores, and nothing else does."""
    expected = models[case["model"]]
    actor, found = Actor(expected["folder"], case), list[int]()
    assert cores_of_rank() == max(1, len(os.sched_getaffinity(0)) // dist.get_world_size())
    on_host = bool(case["optimizer"].get("optimizer_cpu_offload"))
    assert actor.optimizer.host_threads == (cores_of_rank() if on_host else None)
    actor.optimizer.host_threads = 3
    for part in actor.optimizer.chained_optimizers:
        part.optimizer.register_step_pre_hook(lambda *_: found.append(torch.get_num_threads()))
    actor.steps(expected["batch"], 1)
    assert (torch.get_num_threads(), found) == (1, [3]), found
    print("SHARED", flush=True)
    destroy_parallel(keep_distributed=True)


def optimizers_agree(cases: Sequence[Mapping[str, Any]], models: Mapping[str, Mapping[str, Any]]) -> None:
    """Three steps of each case move weights as those of the first case do: far closer to them than to where they began."""
    found: list[tuple[list[float], torch.Tensor]] = []
    for case in cases:
        expected = models[case["model"]]
        actor = Actor(expected["folder"], case)
        began = _flat(_copies(MegatronSource(actor.bridge, actor.models).buffers))
        losses = [result.metrics["loss"] for result in actor.steps(expected["batch"], 3)]
        ended = _flat(_computed(actor))
        found.append((losses, ended))
        destroy_parallel(keep_distributed=True)
        (plain, moved), (ours, theirs) = found[0], found[-1]
        apart, way = (theirs - moved).norm().item(), (moved - began).norm().item()
        print(f"{case['optimizer']}: losses {ours} beside {plain}, weights {apart / way:.1e} of their way apart", flush=True)
        assert all(abs(one - other) < 0.01 * abs(other) for one, other in zip(ours, plain, strict=True)), case
        assert apart < 0.05 * way, case
        if case is not cases[0]:
            print(f"AGREED {case['optimizer']}", flush=True)


def _computed(actor: Actor) -> Weights:
    """Whole weights out of the main parameters, wherever the optimizer keeps them and whichever replica holds each part."""
    optimizer, mains = actor.optimizer, {}
    for part in optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]:
        assert isinstance(part, DistributedOptimizer), "else main parameters are not sharded, and nothing has to be gathered"
        for model_parameter, main, start in _shards(part):
            mains.setdefault(id(model_parameter), []).append((start, main.detach().cpu()))
    whole = {}
    for _, _, name, parameter in iter_parameters(actor.models):
        flat = torch.zeros(parameter.numel(), dtype=torch.float32)
        for start, main in mains.get(id(parameter), ()):
            flat[start : start + main.numel()] = main.float().flatten()
        flat = flat.to(parameter.device)
        dist.all_reduce(flat, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
        whole[name] = flat.view(parameter.shape).to(parameter.dtype).cpu()
    return whole


def _shards(part: DistributedOptimizer) -> list[tuple[torch.nn.Parameter, torch.Tensor, int]]:
    """(parameter, this replica's part of its main parameter, where the part starts)."""
    found = []
    pairs = [
        *zip(part.model_float16_groups, part.shard_fp32_from_float16_groups, strict=True),
        *zip(part.model_fp32_groups, part.shard_fp32_groups, strict=True),
    ]
    inner = part.optimizer
    for group, mains in pairs:
        for parameter, main in zip(group, mains, strict=True):
            if main is None:  # the inner optimizer keeps main parameters among its state
                index, order = part.model_param_group_index_map[parameter]
                main = inner.state[inner.param_groups[index]["params"][order]]["master_param"]
            found.append((parameter, main, part._get_model_param_range_map(parameter)["param"].start))
    return found


def _flat(weights: Weights) -> torch.Tensor:
    return torch.cat([weights[name].float().flatten() for name in sorted(weights)])


def _copies(buffers: Mapping[str, torch.Tensor]) -> Weights:
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in buffers.items()}


def _equal(left: Weights, right: Weights) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def _everywhere(fact: bool) -> bool:
    facts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(facts, fact)
    return all(facts)
