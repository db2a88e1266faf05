"""Packed sequences, chunked logits and sequences shared between GPUs in bf16, under TransformerEngine's layers where it is installed: as
padded and whole ones, and without more waits for the GPU."""

from __future__ import annotations

import pytest

from tests.models import LATENT_SIZES, save_tiny_model
from tests.ranks import run_ranks

pytestmark = pytest.mark.usefixtures("exact_products")

RANKS = "tests.integration.megatron_ranks"
# Heads that flash and cuDNN attention take.
SIZES = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
FUSED = {"apply_rope_fusion": True, "bias_activation_fusion": True, "bias_dropout_fusion": True, "gradient_accumulation_fusion": True}
DISTRIBUTED = {"use_distributed_optimizer": True}
OVERLAPPED = {**DISTRIBUTED, "overlap_grad_reduce": True, "overlap_param_gather": True}


def run(world_size: int, folder, *cases: dict) -> None:
    outputs = run_ranks(world_size, RANKS, "agree_in_half_precision", cases=list(cases), folder=str(folder))
    print(outputs[0])
    assert outputs[0].count("AGREED") == len(cases), outputs[0]


@pytest.mark.gpu(1)
def test_one_gpu_computes_the_same_of_packed_sequences_and_with_fused_kernels(tmp_path):
    folder = save_tiny_model(
        tmp_path / "hf", "qwen2", tied=True, hidden_size=256, num_attention_heads=4, num_key_value_heads=2, head_dim=64
    )
    run(
        1,
        folder,
        {"how": {"packing": True}},
        {"how": {"chunk_tokens": 64}},
        {"overrides": FUSED},
        {"overrides": FUSED, "how": {"packing": True, "chunk_tokens": 64}, "ddp": DISTRIBUTED},
    )


@pytest.mark.gpu(1)
@pytest.mark.parametrize("family", ["qwen3_moe", "moonlight"])
def test_experts_and_latent_attention_do_so(tmp_path, family):
    folder = save_tiny_model(tmp_path / "hf", family, **(LATENT_SIZES if family == "moonlight" else SIZES))
    run(1, folder, {"how": {"packing": True, "chunk_tokens": 64}})


@pytest.mark.gpu(1)
def test_passes_wait_for_the_gpu_no_oftener_with_more_microbatches(tmp_path):
    """Packed too, where an index that has to be copied for every microbatch would make the host wait."""
    folder = save_tiny_model(tmp_path / "hf", "qwen2", tied=True, **SIZES)
    hows = [{}, {"packing": True}]
    (output,) = run_ranks(1, RANKS, "waits_do_not_grow_with_microbatches", hows=hows, folder=str(folder))
    print(output)
    assert output.count("ASKED NOTHING") == len(hows), output


@pytest.mark.gpu(2)
def test_two_gpus_do_so(tmp_path):
    folder = save_tiny_model(tmp_path / "hf", "qwen3", **SIZES)
    cases = [
        {"overrides": {**FUSED, "sequence_parallel": True}, "how": {"packing": True, "chunk_tokens": 64}, "topology": {"tp_size": 2}},
        {"overrides": FUSED, "how": {"packing": True}, "topology": {"pp_size": 2}},
        {"overrides": FUSED, "how": {"packing": True}, "topology": {"dp_size": 2}, "ddp": OVERLAPPED},
    ]
    run(2, folder, *cases)


@pytest.mark.gpu(2)
def test_two_gpus_that_share_sequences_compute_as_two_that_share_layers(tmp_path):
    """Exchanged in every way that TransformerEngine has; the layers without it gather keys and values whatever is asked."""
    folder = save_tiny_model(tmp_path / "hf", "qwen3", **SIZES)
    whole, shared = {"beside": {"tp_size": 2}}, {"topology": {"cp_size": 2}}
    cases = [
        {**whole, **shared},
        {**whole, **shared, "overrides": FUSED, "how": {"packing": True, "chunk_tokens": 64}, "ddp": OVERLAPPED},
        {**whole, **shared, "overrides": {"cp_comm_type": "all_gather"}},
        {**whole, **shared, "overrides": {"cp_comm_type": "a2a"}, "ddp": DISTRIBUTED},
    ]
    run(2, folder, *cases)


@pytest.mark.gpu(4)
def test_four_gpus_do_so(tmp_path):
    folder = save_tiny_model(tmp_path / "hf", "qwen3", **SIZES)
    cases = [
        {"beside": {"tp_size": 2, "pp_size": 2}, "topology": {"tp_size": 2, "cp_size": 2}, "how": {"packing": True}},
        {"beside": {"tp_size": 2, "pp_size": 2}, "topology": {"pp_size": 2, "cp_size": 2}, "how": {"packing": True}},
    ]
    run(4, folder, *cases)
