"""The bridge on real GPUs under NCCL: the cases of ``tests/integration/test_bridge.py``, same code, other backend."""

from __future__ import annotations

from typing import Any

import pytest

from tests.gpu.engines import LAYERS
from tests.hf_models import make_models
from tests.ranks import run_ranks

# Ranks, one a GPU, and for each number of them (model, topology, further options of a case).
CASES: dict[int, list[tuple[str, dict[str, int], dict[str, Any]]]] = {
    1: [("qwen2", {}, {}), ("qwen2-tied", {}, {"divisor": 8}), ("llama", {}, {}), ("llama-tied", {}, {}), ("qwen3", {}, {})],
    2: [
        ("qwen2", {"tp_size": 2}, {}),
        ("qwen2-tied", {"tp_size": 2}, {"overrides": {"sequence_parallel": True}}),
        ("llama", {"pp_size": 2, "vpp_size": 2}, {}),
        ("llama-tied", {"pp_size": 2}, {"divisor": 8}),
        ("qwen3", {"dp_size": 2}, {}),
        ("qwen3-tied", {"pp_size": 2, "first_stage_layers": 1, "last_stage_layers": 3}, {}),
    ],
}


@pytest.mark.parametrize("num_ranks", [pytest.param(n, marks=pytest.mark.gpu(n)) for n in CASES])
@pytest.mark.parametrize("spec", LAYERS)
def test_logits_and_tensors_agree_with_huggingface(tmp_path, monkeypatch, spec, num_ranks):
    # Ranks read it when they initialise CUDA. Without it TransformerEngine multiplies fp32 in TF32, 8e-3 from what transformers computes.
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    models = make_models(tmp_path / "hf")
    cases = [{**models[name], "spec": spec, "topology": topology, **options} for name, topology, options in CASES[num_ranks]]
    (tmp_path / "out").mkdir()
    outputs = run_ranks(num_ranks, "tests.integration.bridge_ranks", "agree_with_huggingface", cases=cases, out_dir=str(tmp_path / "out"))
    print("\n".join(outputs))
    assert outputs[-1].count("LOGITS") == len(cases)
