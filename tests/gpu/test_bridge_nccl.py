"""The bridge on real GPUs under NCCL: the cases of ``tests/integration/test_bridge.py``, same code, other backend."""

from __future__ import annotations

import pytest

from tests.gpu.engines import LAYERS
from tests.hf_models import make_models
from tests.ranks import run_ranks


@pytest.mark.gpu(2)
@pytest.mark.parametrize("spec", LAYERS)
def test_logits_and_tensors_agree_with_huggingface_on_two_gpus(tmp_path, monkeypatch, spec):
    # Ranks read it when they initialise CUDA. Without it TransformerEngine multiplies fp32 in TF32, 8e-3 from what transformers computes.
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    models = {name: {**model, "spec": spec} for name, model in make_models(tmp_path / "hf").items()}
    cases = [
        {**models["qwen2"], "topology": {"tp_size": 2}},
        {**models["qwen2-tied"], "topology": {"tp_size": 2}, "overrides": {"sequence_parallel": True}},
        {**models["llama"], "topology": {"pp_size": 2, "vpp_size": 2}},
        {**models["llama-tied"], "topology": {"pp_size": 2}, "divisor": 8},
        {**models["qwen3"], "topology": {"dp_size": 2}},
        {**models["qwen3-tied"], "topology": {"pp_size": 2, "first_stage_layers": 1, "last_stage_layers": 3}},
    ]
    (tmp_path / "out").mkdir()
    outputs = run_ranks(2, "tests.integration.bridge_ranks", "agree_with_huggingface", cases=cases, out_dir=str(tmp_path / "out"))
    print("\n".join(outputs))
    assert outputs[1].count("LOGITS") == len(cases)
