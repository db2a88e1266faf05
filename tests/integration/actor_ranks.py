"""What the ranks of ``test_actor`` do; each function runs on every rank, without Ray and without engines."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from rlsync.megatron.parallel import destroy_parallel
from rlsync.topology import Topology
from tests.integration.actor_reference import Reference, read_samples, run_config
from workers.actor import ActorRank
from workers.actor_options import actor_topology
from workers.config import RunConfig
from workers.samples import Sample, Share, deal


def start(config: RunConfig, *, load_initial: bool = True) -> ActorRank:
    """An ``ActorRank`` after ``setup``, on as many replicas as there are ranks for."""
    one = actor_topology(config.actor.model, 1)
    topology: Topology = actor_topology(config.actor.model, int(os.environ["WORLD_SIZE"]) // one.world_size)
    actor = ActorRank(config, topology)
    actor.setup("127.0.0.1", int(os.environ["MASTER_PORT"]), load_initial)
    return actor


def leave(actor: ActorRank) -> None:
    """End Megatron's groups, so that another actor can start in this process."""
    destroy_parallel(keep_distributed=True)


def shares(actor: ActorRank, samples: Sequence[Sample], step: int) -> list[Share]:
    config = actor._config
    return deal(
        samples,
        dp_size=actor._topology.dp_size,
        num_updates=config.algorithm.n_minibatches,
        micro_batch_size=config.algorithm.training_batch_size_per_gpu,
        max_tokens=config.runner.max_tokens_per_mbs if config.runner.enable_dynamic_batch_size else None,
        balance=config.actor.enable_dp_load_balance,
        shuffle_seed=config.actor.seed + step if config.algorithm.shuffle_rollout else None,
    )


def steps(actor: ActorRank, samples: Sequence[Sample], which: Sequence[int]) -> list[list[dict[str, float]]]:
    """Score and train, once for each number of a step; metrics of every update."""
    done = []
    for step in which:
        dealt = shares(actor, samples, step)
        actor.score(dealt)
        done.append(actor.train(dealt))
    return done


def weights(actor: ActorRank) -> dict[str, torch.Tensor]:
    return {name: tensor.cpu().clone() for name, tensor in actor._bridge.export_weights(actor._models)}


def say(value: Any) -> None:
    if dist.get_rank() == 0:
        print("SAID " + json.dumps(value), flush=True)


def train_as_reference(cases: Sequence[Mapping[str, Any]], folder: str, samples: str) -> None:
    """Two steps under each configuration: every metric of every update, and the weights, as the reference has them."""
    mine = read_samples(samples)
    for case in cases:
        config = run_config(folder, case)
        algorithm = config.algorithm
        seeds = [config.actor.seed + step if algorithm.shuffle_rollout else None for step in (1, 2)]
        reference = Reference(config) if os.environ["RANK"] == "0" else None
        expected = [reference.step(mine, seed) for seed in seeds] if reference is not None else []
        actor = start(config)
        actor.begin(None)
        found = steps(actor, mine, (1, 2))
        everywhere: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everywhere, found)
        assert all(other == found for other in everywhere), f"{case}: ranks report different metrics"
        trained = weights(actor)
        if reference is not None:
            _compare(case, found, expected, trained, reference.model.state_dict())
        leave(actor)


def _compare(case: Any, found: Any, expected: Any, trained: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor]) -> None:
    for step, (updates, wanted) in enumerate(zip(found, expected, strict=True), 1):
        assert len(updates) == len(wanted)
        for update, (ours, theirs) in enumerate(zip(updates, wanted, strict=True)):
            where = f"{case}: step {step}, update {update}"
            missing = theirs.keys() - ours.keys()
            assert not missing, f"{where}: no {missing}"
            off = {k: (ours[k], v) for k, v in theirs.items() if abs(ours[k] - v) > 1e-4 * max(1.0, abs(v))}
            assert not off, f"{where}: {off}"
            assert ours["actor/update_success"] == 1.0 and ours["actor/lr"] > 0
    worst = max((trained[name] - tensor).abs().max().item() for name, tensor in state.items() if name in trained)
    assert worst < 5e-5, f"{case}: weights differ by {worst}"
    print(f"EQUAL {json.dumps(case)} weights within {worst:.1e}", flush=True)
