"""Adapters on GPUs, beside TransformerEngine's layers where it is installed: the claims of ``tests/integration/test_lora.py``."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rlsync.megatron.lora import grouped_product
from tests.gpu.engines import LAYERS
from tests.integration.test_lora import DENSE, EXPERTS, NAMED, expectations_without_peft
from tests.ranks import run_ranks

pytestmark = pytest.mark.usefixtures("exact_products")

RANKS = "tests.integration.lora_ranks"
SP = {"overrides": {"sequence_parallel": True}}
RECOMPUTE = {"overrides": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}}
FUSED = {"overrides": {"gradient_accumulation_fusion": True, "bias_activation_fusion": True, "bias_dropout_fusion": True}}
DISTRIBUTED = {"ddp": {"use_distributed_optimizer": True}}
OVERLAPPED = {"ddp": {"use_distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True}}
# Ranks, one a GPU, and for each number of them (model, rows of each microbatch of a replica, topology, further options of a case).
CASES: dict[int, list[tuple[str, list[int], dict[str, int], dict[str, Any]]]] = {
    1: [
        ("llama", [8], {}, {}),
        ("qwen2", [3, 5], {}, RECOMPUTE),
        ("qwen3", [8], {}, DISTRIBUTED),
        ("glm4", [8], {}, {}),
        ("deepseek_v3", [8], {}, {}),
        ("mixtral", [8], {}, DISTRIBUTED),
        ("qwen2_moe", [2, 6], {}, {}),
        ("qwen3_moe", [8], {}, RECOMPUTE),
        ("head", [8], {}, {"chunk_tokens": 50}),
        ("embedding", [8], {}, DISTRIBUTED),
        ("router", [8], {}, {}),
    ],
    2: [
        ("llama", [8], {"tp_size": 2}, {}),
        ("qwen2", [8], {"tp_size": 2}, SP),
        ("qwen3", [3, 5], {"tp_size": 2}, SP | DISTRIBUTED),
        ("llama", [3, 3, 2], {"pp_size": 2, "vpp_size": 2}, DISTRIBUTED),
        ("qwen3", [2, 2], {"dp_size": 2}, OVERLAPPED),
        ("deepseek_v3", [8], {"tp_size": 2}, SP),
        ("qwen3_moe", [4], {"dp_size": 2, "ep_size": 2}, DISTRIBUTED),
        # Adapters of grouped experts are computed together, and each waits for what other ranks have of it.
        ("qwen3_moe", [2, 2], {"dp_size": 2}, OVERLAPPED),
        ("qwen3_moe", [4, 4], {"tp_size": 2, "ep_size": 2}, SP),
        ("qwen2_moe", [4, 4], {"tp_size": 2, "etp_size": 2}, SP),
        ("mixtral", [8], {"tp_size": 2}, SP),
        ("head", [3, 5], {"tp_size": 2}, SP | DISTRIBUTED),
        ("embedding", [3, 5], {"tp_size": 2}, SP | DISTRIBUTED),
        ("both", [2, 2], {"dp_size": 2}, OVERLAPPED),
        ("router", [4], {"dp_size": 2, "ep_size": 2}, OVERLAPPED),
        ("sigmoid router", [8], {"tp_size": 2, "ep_size": 2}, SP),
    ],
}
ON_ONE_AND_TWO = pytest.mark.parametrize("num_ranks", [pytest.param(n, marks=pytest.mark.gpu(n)) for n in CASES])
NEEDS_TE = pytest.mark.skipif("te" not in LAYERS, reason="TransformerEngine is not installed")


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, dict[str, Any]]:
    root = tmp_path_factory.mktemp("models")
    return {name: expectations_without_peft(root / name, base, spec) for name, (base, spec) in (DENSE | EXPERTS | NAMED).items()}


def cases(num_ranks: int, spec: str, names: tuple[str, ...] | None = None) -> list[dict[str, Any]]:
    return [
        {"model": model, "cut": cut, "topology": topology, "spec": spec, **options}
        for model, cut, topology, options in CASES[num_ranks]
        if names is None or model in names
    ]


@ON_ONE_AND_TWO
@pytest.mark.parametrize("spec", LAYERS)
def test_adapters_train_as_those_of_transformers(models, tmp_path, spec, num_ranks):
    """Losses, gradient norms, adapters after ten steps, merged weights; the base has neither gradients nor moved."""
    asked = cases(num_ranks, spec)
    outputs = run_ranks(num_ranks, RANKS, "train_as_reference", cases=asked, models=models, out_dir=str(tmp_path))
    print(outputs[0])
    assert outputs[0].count("TRAINED") == len(asked)


@NEEDS_TE
@ON_ONE_AND_TWO
def test_a_run_goes_on_beside_other_layers(models, tmp_path, num_ranks):
    asked = cases(num_ranks, "te", ("qwen3", "qwen3_moe"))
    outputs = run_ranks(num_ranks, RANKS, "resume_beside_other_layers", cases=asked, models=models, root=str(tmp_path))
    assert outputs[0].count("RESUMED") == len(asked)


@pytest.mark.gpu(1)
@pytest.mark.parametrize("rank", [4, 8])
@pytest.mark.parametrize("splits", [(3, 0, 17, 1), (0, 0, 0, 0), (0, 40, 0, 0)])
def test_products_of_all_experts_are_those_of_each(splits, rank):
    """In bf16 too, where one kernel computes them all; one of rank 4 has no such kernel. Experts may have no tokens."""
    x, factors = torch.randn(sum(splits), 48, device="cuda"), torch.randn(4, rank, 48, device="cuda")
    upstream = torch.randn(sum(splits), rank, device="cuda")
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 5e-2)):
        found = []
        for product in (grouped_product, _one_by_one):
            leaves = [tensor.to(dtype).requires_grad_() for tensor in (x, factors)]
            out = product(*leaves, splits)
            out.backward(upstream.to(dtype))
            found.append([out.detach(), *(leaf.grad for leaf in leaves)])
        for mine, theirs in zip(*found, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance)


def _one_by_one(x, factors, splits):
    return torch.cat([rows @ factor.t() for rows, factor in zip(x.split(splits), factors, strict=True)])


@NEEDS_TE
@pytest.mark.gpu(1)
def test_adapters_beside_a_layer_with_a_norm_take_the_normed_input(models, tmp_path):
    asked = cases(1, "te", ("llama",))
    outputs = run_ranks(1, RANKS, "differ_without_the_norm", cases=asked, models=models, out_dir=str(tmp_path))
    assert outputs[0].count("DIFFERED") == len(asked)


@pytest.mark.gpu(1)
@pytest.mark.parametrize("spec", LAYERS)
def test_adapters_train_in_half_precision(models, spec):
    asked = [case | (FUSED if spec == "te" else {}) for case in cases(1, spec, ("llama", "qwen2_moe"))]
    outputs = run_ranks(1, RANKS, "agree_in_half_precision", cases=asked, models=models)
    print(outputs[0])
    assert outputs[0].count("AGREED") == len(asked)
