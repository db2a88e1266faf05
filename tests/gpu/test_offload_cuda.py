"""Memory of a Megatron actor that was in pinned host memory for a while: given back for real, and training goes on bit for bit."""

from __future__ import annotations

import pytest

from tests.integration.test_offload import DISTRIBUTED, OVERLAPPED, RANKS, case, make_models
from tests.ranks import run_ranks


@pytest.mark.gpu(1)
def test_one_gpu_gets_its_memory_back_and_trains_on_bit_for_bit(tmp_path):
    cases = [case("qwen2", ddp=DISTRIBUTED), case("qwen3", precision="fp16"), case("qwen2", ddp=DISTRIBUTED, precision="fp32")]
    outputs = run_ranks(1, RANKS, "goes_on_bitwise", cases=cases, models=make_models(tmp_path))
    assert outputs[0].count("OFFLOADED") == len(cases), outputs[0]


@pytest.mark.gpu(2)
def test_two_gpus_do_so_with_overlapped_gathers(tmp_path):
    cases = [case("qwen2", ddp=OVERLAPPED, dp_size=2), case("qwen3", ddp=OVERLAPPED, pp_size=2), case("qwen3", tp_size=2)]
    halved = case("qwen3", ddp=OVERLAPPED, dp_size=2)  # half of the optimizer is on the host anyway
    halved["optimizer"] = {**halved["optimizer"], "optimizer_cpu_offload": True, "optimizer_offload_fraction": 0.5}
    cases.append(halved)
    outputs = run_ranks(2, RANKS, "goes_on_bitwise", cases=cases, models=make_models(tmp_path))
    assert outputs[0].count("OFFLOADED") == len(cases), outputs[0]
