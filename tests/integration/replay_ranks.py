"""What the ranks of ``test_replay`` do; each function runs on every rank."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer.moe.router_replay import RouterReplay

from rlsync.bridge.auto_bridge import AutoBridge
from rlsync.layout.topology import Topology
from rlsync.megatron.optimizer import OptimizerOptions, build_optimizer
from rlsync.megatron.parallel import compute_device, destroy_parallel, initialize_parallel
from rlsync.megatron.routes import NO_ROUTE, Routing
from rlsync.megatron.train import token_scores, train_step
from tests.integration.megatron_ranks import loss


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
        mine = _microbatches(wanted, topology.dp_size)
        free = [{name: tensor for name, tensor in microbatch.items() if name != "routes"} for microbatch in mine]

        given = _scores(models, mine, routing)
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

        _near(_scores(other, free, apart), [m["free"] for m in free], f"{case}: the other model of the process routes live")
        apart_routes = [apart.taken(i, *m["tokens"].shape) for i, m in enumerate(free)]
        _near(_scores(models, free, None), [m["free"] for m in free], f"{case}: without routing")
        worst = max((a - m["free"]).abs().max().item() for a, m in zip(given, mine, strict=True))
        assert worst > 0.05, f"the routes that are given change nothing: {worst}"
        # The recorded routes, given to a pass in other microbatches.
        again = [{**m, "routes": routes} for m, routes in zip(free, apart_routes, strict=True)]
        _near(_scores(other, again[::-1], apart), [m["free"] for m in free[::-1]], f"{case}: recorded routes replayed")

        optimizer = build_optimizer(models, OptimizerOptions(lr=1e-3, weight_decay=0.0, clip_grad=0.0))
        result = train_step(models, optimizer, mine, loss, routing=routing)
        assert result.grad_norm is not None
        assert abs(result.grad_norm - wanted["grad_norm"]) <= 1e-4 * wanted["grad_norm"], (case, result.grad_norm, wanted["grad_norm"])
        assert abs(result.metrics["loss"] - wanted["loss"]) <= 1e-4 * abs(wanted["loss"]), case
        if parallel_state.get_tensor_model_parallel_rank() == 0:
            print("REPLAYED", flush=True)
        destroy_parallel(keep_distributed=True)
    destroy_parallel()


def _microbatches(wanted: dict[str, torch.Tensor], replicas: int) -> list[dict[str, torch.Tensor]]:
    """One row each, trimmed to its length."""
    replica, found = parallel_state.get_data_parallel_rank(), []
    names = ("tokens", "weights", "routes", "live", "expected", "free")
    for row in range(replica, wanted["tokens"].size(0), replicas):
        length = int(wanted["lengths"][row])
        found.append({name: wanted[name][row : row + 1, :length].clone() for name in names})
    return found


def _scores(models: Any, microbatches: Any, routing: Routing | None) -> list[torch.Tensor]:
    kept = [{n: t for n, t in m.items() if n in ("tokens", "routes")} for m in microbatches]
    return [scores.log_probs.cpu() for scores in token_scores(models, kept, routing=routing)]


def _near(found: list[torch.Tensor], wanted: list[torch.Tensor], what: str) -> None:
    worst = max((a - b).abs().max().item() for a, b in zip(found, wanted, strict=True))
    assert worst <= 1e-4, f"{what}: {worst} on {compute_device()}"
