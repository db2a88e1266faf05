"""Router replay with routes of a real engine: under R3 the actor routes as the engine did, and its log-probabilities stay as close to it.

Two runs of the tiny model with experts in bf16, with the same weights, which differ in ``actor.megatron.router_replay`` alone.
"""

from __future__ import annotations

import pytest
import torch

from tests.gpu.expert_runs import steps

pytestmark = [pytest.mark.gpu(1), pytest.mark.timeout(900)]

# The engine on a GPU of its own where there are two.
PLACEMENT = '{"actor": "0", "rollout,reward": "1"}' if torch.cuda.device_count() > 1 else '{"actor,rollout,reward": "0"}'


def test_with_r3_no_token_is_routed_differently_and_log_probabilities_come_no_farther(tmp_path):
    own = ("actor.model.expert_model_parallel_size=1", "rollout.enable_return_routed_experts=True")
    found = {mode: steps(tmp_path, mode, PLACEMENT, *own, f"actor.megatron.router_replay={mode}") for mode in ("off", "R3")}
    for mode, lines in found.items():
        print(mode, [(line["moe/route_mismatch"], line["rollout/logprob_diff_mean"]) for line in lines], flush=True)
    assert all(line["moe/route_mismatch"] == 0 for line in found["R3"])
    # The control: left to itself the actor takes other ways, and the engine's routes are not its own read back.
    assert any(line["moe/route_mismatch"] > 0 for line in found["off"])
    # At the first step both runs have the same weights and answers. What is left is what bf16 resolves, on a model that is sure of them.
    first = {mode: lines[0]["rollout/logprob_diff_mean"] for mode, lines in found.items()}
    assert first["R3"] <= first["off"] <= 0.01, first
