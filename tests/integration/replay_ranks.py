"""What the ranks of ``test_replay`` do; each function runs on every rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.moe.router_replay import RouterReplay

from rlsync.bridge.auto_bridge import AutoBridge
from rlsync.layout.topology import Topology
from rlsync.megatron.optimizer import OptimizerOptions, build_optimizer
from rlsync.megatron.parallel import compute_device, destroy_parallel, initialize_parallel
from rlsync.megatron.routes import Routing
from rlsync.megatron.train import token_scores, train_step
from rlsync.models.moe import NO_ROUTE
from tests.integration.actor_ranks import batches, leave, set_up
from tests.integration.actor_reference import run_config
from tests.integration.megatron_ranks import loss
from workers.config import actor_topology
from workers.grpo_actor import GrpoRank
from workers.routes import RoutingShape, engine_routes, routing_metrics
from workers.samples import Sample


def replay(cases: list[dict[str, Any]], expected: str) -> None:
    """For each case: scores, gradient norm and routes equal those of transformers' model that was sent the same ways."""
    wanted = torch.load(expected)
    for case in cases:
        torch.use_deterministic_algorithms(True)
        topology = Topology(**case["topology"])
        initialize_parallel(topology, seed=5, timeout_s=300)
        bridge = AutoBridge.from_pretrained(case["folder"])
        models = bridge.get_model(case["folder"], topology=topology, bf16=False, overrides=case["overrides"])
        other = bridge.get_model(case["folder"], topology=topology, bf16=False, overrides=case["overrides"])
        routing, apart = Routing(models), Routing(other)
        assert not RouterReplay.global_router_replay_instances, "nothing is left in Megatron's list of all routers"
        packing = case.get("packing", False)
        mine = _microbatches(wanted, topology.dp_size, rows=2 if packing else 1)
        free = [{name: tensor for name, tensor in microbatch.items() if name != "routes"} for microbatch in mine]

        given = _scores(models, mine, routing, packing)
        _near(given, [m["expected"] for m in mine], f"{case}: scores under replay")
        for index, microbatch in enumerate(mine):
            rows, length = microbatch["tokens"].shape
            taken = routing.taken(index, rows, length)
            for layer in routing.layers:
                known = (microbatch["routes"][:, :, layer] != NO_ROUTE).all(-1) & microbatch["weights"].ne(0)
                assert torch.equal(taken[:, :, layer][known], microbatch["routes"][:, :, layer][known]), case
            held = taken != NO_ROUTE
            missing = (microbatch["routes"] == NO_ROUTE) & held & microbatch["weights"].ne(0)[:, :, None, None]
            live = microbatch["live"].sort(-1).values, taken.sort(-1).values
            assert torch.equal(live[0][missing], live[1][missing]), f"{case}: what has no route is routed live"

        _near(_scores(other, free, apart, packing), [m["free"] for m in free], f"{case}: the other model of the process routes live")
        apart_routes = [apart.taken(i, *m["tokens"].shape) for i, m in enumerate(free)]
        _near(_scores(models, free, None, packing), [m["free"] for m in free], f"{case}: without routing")
        worst = max((a - m["free"]).abs().max().item() for a, m in zip(given, mine, strict=True))
        assert worst > 0.05, f"the routes that are given change nothing: {worst}"
        # The recorded routes, given to a pass in other microbatches.
        again = [{**m, "routes": routes} for m, routes in zip(free, apart_routes, strict=True)]
        _near(_scores(other, again[::-1], apart, packing), [m["free"] for m in free[::-1]], f"{case}: recorded routes replayed")

        optimizer = build_optimizer(models, OptimizerOptions(lr=1e-3, weight_decay=0.0, clip_grad=0.0))
        result = train_step(models, optimizer, mine, loss, routing=routing, packing=packing)
        assert result.grad_norm is not None
        assert abs(result.grad_norm - wanted["grad_norm"]) <= 1e-4 * wanted["grad_norm"], (case, result.grad_norm, wanted["grad_norm"])
        assert abs(result.metrics["loss"] - wanted["loss"]) <= 1e-4 * abs(wanted["loss"]), case
        if parallel_state.get_tensor_model_parallel_rank() == 0:
            print("REPLAYED", flush=True)
        destroy_parallel(keep_distributed=True)
    destroy_parallel()


def balance(folder: str, expected: str) -> None:
    """The balancing loss of a step is that of transformers' shares and choices, under EP, on two stages and where ranks share a sequence;
    its gradient is the same there."""
    wanted, norms = torch.load(expected), []
    for topology in ({"dp_size": 2, "ep_size": 2}, {"pp_size": 2}, {"cp_size": 2, "ep_size": 2}):
        layout = Topology(**topology)
        initialize_parallel(layout, seed=5, timeout_s=300)
        bridge = AutoBridge.from_pretrained(folder)
        for weight in (0.01, 0.0):
            overrides = {"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": weight}
            models = bridge.get_model(folder, topology=layout, bf16=False, overrides=overrides)
            optimizer = build_optimizer(models, OptimizerOptions(lr=0.0, weight_decay=0.0, clip_grad=0.0))
            for packing in (False, True):
                mine = _trained_on(wanted, layout.dp_size, rows=2)
                found = train_step(models, optimizer, mine, loss, packing=packing).balancing
                assert list(found) == (["load_balancing_loss"] if weight else []), found
                if weight:
                    groups = [range(first, 4, layout.dp_size) for first in range(layout.dp_size)]
                    theirs = [_balancing_loss(wanted, rows[at : at + 2]) for rows in groups for at in range(0, len(rows), 2)]
                    assert abs(found["load_balancing_loss"] - sum(theirs) / len(theirs)) <= 1e-4, (topology, found, theirs)
                if layout.dp_size == 1:
                    weightless = [{**m, "weights": torch.zeros_like(m["weights"])} for m in mine]
                    norms.append(train_step(models, optimizer, weightless, loss, packing=packing).grad_norm)
        destroy_parallel(keep_distributed=True)
    # On two stages and where two ranks share a sequence: with and without the weight of that loss, padded and packed.
    of_loss = [*norms[:2], *norms[4:6]]
    assert [*norms[2:4], *norms[6:]] == [0] * 4 and min(of_loss) > 0, norms
    assert all(abs(norm - norms[0]) <= 1e-4 * norms[0] for norm in of_loss), norms
    print("BALANCED", flush=True)
    destroy_parallel()


def _balancing_loss(wanted: dict[str, Any], rows: Sequence[int]) -> float:
    """Equations 4 to 6 of arXiv 2101.03961, for several experts a token: of the tokens of some sequences, the mean over layers."""
    chosen, shares = (torch.cat([wanted[name][row, : wanted["lengths"][row]] for row in rows]) for name in ("chosen", "shares"))
    counts = _counts(wanted, rows) / (len(chosen) * chosen.size(-1))
    return (shares.size(-1) * (counts * shares.mean(0)).sum(-1)).mean().item()


def _counts(wanted: dict[str, Any], rows: Sequence[int]) -> torch.Tensor:
    """(layers with experts, experts): to how many tokens of some sequences transformers gives each expert."""
    chosen = torch.cat([wanted["chosen"][row, : wanted["lengths"][row]] for row in rows])
    num_experts = wanted["shares"].size(-1)
    return torch.stack([torch.bincount(each.reshape(-1), minlength=num_experts) for each in chosen.unbind(1)])


def _trained_on(wanted: dict[str, Any], replicas: int, rows: int) -> list[dict[str, torch.Tensor]]:
    return [{name: m[name] for name in ("tokens", "weights", "lengths")} for m in _microbatches(wanted, replicas, rows)]


def move_biases(folder: str, cases: Sequence[dict[str, Any]], expected: str) -> None:
    """After a step the bias of every expert is a rate higher where it got fewer tokens than the mean, and lower where it got more."""
    wanted, rate = torch.load(expected), 0.25
    for case in cases:
        counts = _counts(wanted, range(case.get("count", 4))).double()
        moves = rate * (counts.mean(-1, keepdim=True) - counts).sign()
        topology = Topology(**case["topology"])
        initialize_parallel(topology, seed=5, timeout_s=300)
        bridge = AutoBridge.from_pretrained(folder)
        overrides = {**case.get("overrides", {}), "moe_router_bias_update_rate": rate}
        models = bridge.get_model(folder, topology=topology, bf16=False, overrides=overrides)
        began = _biases(bridge, models)
        assert len(began) == len(moves)
        optimizer = build_optimizer(models, OptimizerOptions(lr=0.0, weight_decay=0.0))
        mine = _trained_on(wanted, topology.dp_size, rows=case.get("rows", 2))[: case.get("count")]
        train_step(models, optimizer, mine, loss, packing=case.get("packing", False))
        for place, (before, after) in enumerate(zip(began, _biases(bridge, models), strict=True)):
            off = ((after - before) - moves[place]).abs().max().item()
            assert off < 1e-5, f"{case}: of layer {place} with experts: {after - before}, and {moves[place]} by the tokens of experts"
        if dist.get_rank() == 0:
            print("MOVED", flush=True)
        destroy_parallel(keep_distributed=True)
    destroy_parallel()


def _biases(bridge: AutoBridge, models: Sequence[torch.nn.Module]) -> list[torch.Tensor]:
    """Of the routers of all layers with experts, in their order."""
    return [t.cpu().clone() for name, t in sorted(bridge.export_weights(models)) if name.endswith("e_score_correction_bias")]


def grpo(folder: str, expected: str) -> None:
    """A step of GRPO on samples of an engine that routes in its own way, which transformers' model with forced routes stands for."""
    wanted, dense = torch.load(expected), torch.zeros(1, 1, 1, dtype=torch.int16)
    samples, shape = [], RoutingShape(4, (0, 2, 3), 3)
    for row, length in enumerate(wanted["lengths"]):
        tokens = tuple(wanted["tokens"][row, :length].tolist())
        routes = wanted["routes"][row, : length - 1]
        # As vLLM returns them: of all layers, the dense one too.
        whole = torch.cat((routes[:, :1], dense.expand(length - 1, 1, routes.size(2)), routes[:, 1:]), dim=1).numpy()
        logprobs = tuple(wanted["expected"][row, 4:length].tolist())
        samples.append(
            Sample(
                tokens[:4], tokens[4:], logprobs, True, 0, advantage=(-1.0) ** row, routes=engine_routes(whole, length=length, shape=shape)
            )
        )
    found = {}
    for mode in ("off", "R2", "R3"):
        sections = {
            "runner": {"seq_length": 24},
            "algorithm": {
                "group_size": 4, "training_batch_size_per_gpu": 1, "logprob_forward_micro_batch_size": 2,
                "sampling_params": {"temperature": 1.0},
            },
            "data": {"rollout_batch_size": 1, "max_prompt_length": 4},
            "rollout": {"enable_return_routed_experts": True},
            "actor.model": {"expert_model_parallel_size": 2},
            "actor.megatron": {"router_replay": mode},
        }  # fmt: skip
        config = run_config(folder, sections)
        actor = GrpoRank(config, actor_topology(config.actor.model))
        set_up(actor)
        actor.begin(None)
        dealt = batches(actor, samples, 1)
        difference = actor.score(dealt)
        counts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(counts, actor.routing_counts())
        updates = actor.train(dealt)
        found[mode] = (difference.total / difference.count, routing_metrics(counts), updates)
        leave(actor)
    means = {mode: mean for mode, (mean, _, _) in found.items()}
    mismatches = {mode: metrics["moe/route_mismatch"] for mode, (_, metrics, _) in found.items()}
    assert means["R3"] <= 1e-5 < 0.05 < min(means["off"], means["R2"]), means
    assert mismatches["R3"] == 0 < 0.5 < min(mismatches["off"], mismatches["R2"]), mismatches
    for mode, (_, metrics, updates) in found.items():
        assert metrics["moe/load_imbalance"] >= 1
        # Training takes the routes of the old log-probabilities: before the first update nothing differs.
        assert abs(updates[0]["actor/ratio"] - 1) <= 1e-5, (mode, updates[0])
    assert abs(found["off"][2][1]["actor/ratio"] - found["R2"][2][1]["actor/ratio"]) > 1e-6, "R2 leaves the second update as it is"
    if dist.get_rank() == 0:
        print(f"ROUTED {means} {mismatches}", flush=True)


def _microbatches(wanted: dict[str, torch.Tensor], replicas: int, rows: int = 1) -> list[dict[str, torch.Tensor]]:
    """So many rows each, trimmed to the longest, without scores behind the end of a row."""
    mine, found = range(parallel_state.get_data_parallel_rank(), wanted["tokens"].size(0), replicas), []
    names = ("tokens", "weights", "routes", "live", "expected", "free")
    for first in range(0, len(mine), rows):
        chosen = list(mine[first : first + rows])
        lengths = torch.tensor([wanted["lengths"][row] for row in chosen])
        found.append({name: wanted[name][chosen, : int(lengths.max())].clone() for name in names} | {"lengths": lengths})
        for name in ("expected", "free"):
            found[-1][name] *= _is_token(found[-1])
    return found


def _is_token(microbatch: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.arange(microbatch["tokens"].size(1)) < microbatch["lengths"][:, None]


def _scores(models: Any, microbatches: Any, routing: Routing | None, packing: bool) -> list[torch.Tensor]:
    kept = [{n: t for n, t in m.items() if n in ("tokens", "routes", "lengths")} for m in microbatches]
    scored = token_scores(models, kept, routing=routing, packing=packing)
    return [scores.log_probs.cpu() * _is_token(m) for scores, m in zip(scored, microbatches, strict=True)]


def _near(found: list[torch.Tensor], wanted: list[torch.Tensor], what: str) -> None:
    worst = max((a - b).abs().max().item() for a, b in zip(found, wanted, strict=True))
    assert worst <= 1e-4, f"{what}: {worst} on {compute_device()}"
