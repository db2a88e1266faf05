"""A run whose engine shares experts among its GPUs (``rollout.vllm.enable_expert_parallel``), beside one that cuts them.

Actor ranks share experts, too, and lie on the same GPUs.
"""

from __future__ import annotations

import pytest

from tests.gpu.expert_runs import steps

pytestmark = [pytest.mark.gpu(2), pytest.mark.timeout(900)]

PLACEMENT = '{"actor,rollout,reward": "0-1"}'


def test_an_engine_whose_gpus_share_experts_is_as_near_to_the_actor_as_one_whose_gpus_cut_them(tmp_path):
    found = {}
    for name in ("cut", "shared"):
        own = ("rollout.tensor_parallel_size=2", f"rollout.vllm.enable_expert_parallel={name == 'shared'}", "weight_sync.verify=full")
        found[name] = steps(tmp_path, name, PLACEMENT, *own)
        print(name, [(line["rollout/logprob_diff_mean"], line["sync/max_redundancy"]) for line in found[name]], flush=True)
    # At the first step both have the same weights, and each expert's bytes go to the worker that serves it alone.
    first = {name: lines[0]["rollout/logprob_diff_mean"] for name, lines in found.items()}
    assert first["shared"] <= max(2 * first["cut"], 1e-3) and first["shared"] <= 0.01, first
    assert all(line["sync/max_redundancy"] == 1 for lines in found.values() for line in lines)
    assert all(len(lines) == 6 for lines in found.values())
