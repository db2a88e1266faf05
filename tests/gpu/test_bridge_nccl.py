"""The bridge on real GPUs under NCCL: the cases of ``tests/integration/test_bridge.py``, same code, other backend."""

from __future__ import annotations

from typing import Any

import pytest

from tests.gpu.engines import LAYERS
from tests.hf_models import make_models
from tests.models import MOE_FAMILIES
from tests.ranks import run_ranks

SP = {"overrides": {"sequence_parallel": True}}
# Ranks, one a GPU, and for each number of them (model, topology, further options of a case); dense models, and those with experts.
Cases = list[tuple[str, dict[str, int], dict[str, Any]]]
DENSE: dict[int, Cases] = {
    1: [
        ("qwen2", {}, {}),
        ("qwen2-tied", {}, {"divisor": 8}),
        ("llama", {}, {}),
        ("llama-tied", {}, {}),
        ("qwen3", {}, {}),
        ("glm4", {}, {}),
        ("seed_oss", {}, {}),
        ("smollm3", {}, {}),
    ],
    2: [
        ("qwen2", {"tp_size": 2}, {}),
        ("qwen2-tied", {"tp_size": 2}, SP),
        ("llama", {"pp_size": 2, "vpp_size": 2}, {}),
        ("llama-tied", {"pp_size": 2}, {"divisor": 8}),
        ("qwen3", {"dp_size": 2}, {}),
        ("qwen3-tied", {"pp_size": 2, "first_stage_layers": 1, "last_stage_layers": 3}, {}),
    ],
}
EXPERTS: dict[int, Cases] = {
    1: [(family, {}, {}) for family in MOE_FAMILIES],
    2: [
        ("qwen3_moe", {"dp_size": 2, "ep_size": 2}, {}),
        ("qwen3_moe", {"tp_size": 2, "ep_size": 2}, SP),
        ("mixtral", {"tp_size": 2, "etp_size": 2}, SP),
        ("qwen2_moe", {"pp_size": 2}, {}),
        ("glm4_moe", {"dp_size": 2, "ep_size": 2}, {}),
        ("deepseek_v3", {"tp_size": 2, "ep_size": 2}, SP),
        ("moonlight", {"pp_size": 2}, {}),
    ],
}


@pytest.mark.parametrize("num_ranks", [pytest.param(n, marks=pytest.mark.gpu(n)) for n in DENSE])
@pytest.mark.parametrize("of_kind", [DENSE, EXPERTS], ids=["dense", "experts"])
@pytest.mark.parametrize("spec", LAYERS)
def test_logits_and_tensors_agree_with_huggingface(tmp_path, monkeypatch, spec, of_kind, num_ranks):
    # Ranks read it when they initialise CUDA. Without it TransformerEngine multiplies fp32 in TF32, 8e-3 from what transformers computes.
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    models = make_models(tmp_path / "hf", tuple(dict.fromkeys(name for name, _, _ in of_kind[num_ranks])))
    cases = [{**models[name], "spec": spec, "topology": topology, **options} for name, topology, options in of_kind[num_ranks]]
    (tmp_path / "out").mkdir()
    outputs = run_ranks(num_ranks, "tests.integration.bridge_ranks", "agree_with_huggingface", cases=cases, out_dir=str(tmp_path / "out"))
    print("\n".join(outputs))
    assert outputs[-1].count("LOGITS") == len(cases)
