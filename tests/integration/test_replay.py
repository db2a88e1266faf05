"""Router replay on real Megatron ranks: tokens go where transformers' model was made to send them, forwards and backwards."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.hf_models import make_models
from tests.ranks import run_ranks

RANKS = "tests.integration.replay_ranks"
SP = {"sequence_parallel": True}
RECOMPUTED = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
PARTLY = {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 1}
SPARSE = (0, 2, 3)  # the second layer of the tiny Qwen3-MoE is dense
LATENT_SPARSE = (1, 2, 3)  # and the first of the tiny DeepSeek-V3
LENGTHS = (24, 17, 9, 21)


@pytest.fixture(scope="module")
def forced(tmp_path_factory) -> tuple[str, str]:
    """A model's folder, and a file with routes at random, a fifth of them missing, and what transformers makes of them."""
    return force(tmp_path_factory.mktemp("replay"), "qwen3_moe", SPARSE)


def force(root: Path, family: str, sparse: Sequence[int]) -> tuple[str, str]:
    folder = make_models(root, (family,))[family]["folder"]
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    draw = torch.Generator().manual_seed(3)
    rows, longest = len(LENGTHS), max(LENGTHS)
    tokens = torch.randint(1, 131, (rows, longest), generator=draw)
    num_experts, topk = model.model.layers[sparse[0]].mlp.gate.weight.size(0), model.config.num_experts_per_tok
    routes = torch.rand(rows, longest, len(sparse), num_experts, generator=draw).argsort(-1)[..., :topk]
    routes[torch.rand(rows, longest, generator=draw) < 0.2] = -1
    weights = torch.rand(rows, longest, generator=draw)
    weights[:, 0] = 0.5  # no token before it: its log-probability is 0, but it is no padding
    for row, length in enumerate(LENGTHS):
        weights[row, length:] = 0
    free, chosen, shares = passed(model, tokens, None, sparse)
    expected, live, _ = passed(model, tokens, routes, sparse)
    loss = -(expected[0] * weights).sum() - 0.1 * (expected[1] * weights.abs()).sum()
    loss.backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    path = root / "expected.pt"
    torch.save(
        {
            "tokens": tokens, "weights": weights, "routes": routes.to(torch.int16), "live": live.to(torch.int16), "lengths": LENGTHS,
            "expected": expected[0].detach(), "free": free[0].detach(), "grad_norm": norm.item(), "loss": loss.item(),
            "chosen": chosen, "shares": shares,
        },
        path,
    )  # fmt: skip
    return folder, str(path)


def passed(model, tokens, routes, sparse):
    """Log-probabilities and entropies (rows, length) of transformers' model, its choices and shares, where its routers obey ``routes``."""
    num_experts, topk = model.model.layers[sparse[0]].mlp.gate.weight.size(0), model.config.num_experts_per_tok
    live = torch.empty(*tokens.shape, len(sparse), topk, dtype=torch.int64)
    spread = torch.empty(*tokens.shape, len(sparse), num_experts)
    scale, renormalises = getattr(model.config, "routed_scaling_factor", None), getattr(model.config, "norm_topk_prob", True)

    def obey(place):
        def hook(gate, inputs, output):
            logits = inputs[0].reshape(-1, gate.weight.size(1)) @ gate.weight.T
            # DeepSeek-V3's have a scale; what they choose by, bias and groups, is no part of what they weigh by.
            shares, own = logits.softmax(-1) if scale is None else logits.sigmoid(), output[2]
            live[:, :, place] = own.view(*tokens.shape, topk)
            spread[:, :, place] = shares.detach().view(*tokens.shape, num_experts)
            chosen = own
            if routes is not None:
                given = routes[:, :, place].reshape(-1, topk)
                chosen = torch.where(given < 0, own, given)
            taken = shares.gather(1, chosen)
            weights = taken / taken.sum(-1, keepdim=True) if renormalises else taken
            return (output[0], weights * (1.0 if scale is None else scale), chosen)

        return hook

    hooks = [model.model.layers[layer].mlp.gate.register_forward_hook(obey(place)) for place, layer in enumerate(sparse)]
    try:
        logits = model(tokens).logits.float()
    finally:
        for hook in hooks:
            hook.remove()
    logs = logits[:, :-1].log_softmax(-1)
    scores = logs.gather(2, tokens[:, 1:, None])[..., 0]
    entropy = -(logs.exp() * logs).sum(-1)
    return [torch.nn.functional.pad(each, (1, 0)) for each in (scores, entropy)], live, spread


def test_replayed_routes_give_the_scores_and_gradients_of_transformers_on_four_ranks(forced):
    """EP, TP x EP with a split sequence, PP with a dense layer, VPP; CP; recomputation of all layers and of some; two rows packed."""
    folder, expected = forced
    cases = [
        {"topology": {"dp_size": 4, "ep_size": 4}, "overrides": {}},
        {"topology": {"tp_size": 2, "dp_size": 2, "ep_size": 2, "etp_size": 2}, "overrides": {**SP, **RECOMPUTED}},
        {"topology": {"tp_size": 2, "pp_size": 2, "ep_size": 2}, "overrides": {**SP, **PARTLY}, "packing": True},
        {"topology": {"pp_size": 2, "vpp_size": 2, "dp_size": 2, "ep_size": 2}, "overrides": RECOMPUTED, "packing": True},
        {"topology": {"tp_size": 2, "cp_size": 2, "ep_size": 2}, "overrides": {**SP, **RECOMPUTED}, "packing": True},
    ]
    outputs = run_ranks(4, RANKS, "replay", cases=[{**case, "folder": folder} for case in cases], expected=expected)
    assert outputs[0].count("REPLAYED") == len(cases)


def test_routes_outside_a_routers_groups_are_taken_with_the_weights_of_its_sigmoid(tmp_path):
    """DeepSeek-V3: routes at random cross the groups that a token may take, and no bias is in what experts are weighed by."""
    folder, expected = force(tmp_path, "deepseek_v3", LATENT_SPARSE)
    cases = [
        {"folder": folder, "topology": {"tp_size": 2, "ep_size": 2}, "overrides": {**SP, **RECOMPUTED}, "packing": True},
        {"folder": folder, "topology": {"pp_size": 2}, "overrides": PARTLY},
    ]
    outputs = run_ranks(2, RANKS, "replay", cases=cases, expected=expected)
    assert outputs[0].count("REPLAYED") == len(cases)


@pytest.mark.parametrize(
    ("family", "sparse", "axes"),
    [
        ("qwen2_moe", SPARSE, {"tp_size": 2, "etp_size": 2}),  # whose weights are not renormalised
        ("mixtral", (0, 1, 2, 3), {"pp_size": 2}),
        ("glm4_moe", LATENT_SPARSE, {"tp_size": 2, "ep_size": 2}),
    ],
)
def test_routes_are_replayed_with_the_weights_of_every_family(tmp_path, family, sparse, axes):
    folder, expected = force(tmp_path, family, sparse)
    overrides = {"sequence_parallel": "tp_size" in axes}
    outputs = run_ranks(2, RANKS, "replay", cases=[{"folder": folder, "topology": axes, "overrides": overrides}], expected=expected)
    assert outputs[0].count("REPLAYED") == 1


def test_grpo_on_the_engines_routes_has_the_engines_log_probabilities_and_without_them_has_not(forced):
    folder, expected = forced
    outputs = run_ranks(2, RANKS, "grpo", folder=folder, expected=expected)
    assert "ROUTED" in outputs[0]


def test_the_balancing_loss_of_a_step_is_that_of_transformers_choices(forced):
    """Whatever pads them, which is no token of any expert's."""
    folder, expected = forced
    outputs = run_ranks(2, RANKS, "balance", folder=folder, expected=expected)
    assert all("BALANCED" in output for output in outputs)


def test_the_bias_of_routers_moves_by_the_tokens_of_transformers_choices_in_every_layout(tmp_path):
    """Padded and packed, computed again or not, also where passes fill up the schedule."""
    folder, expected = force(tmp_path, "deepseek_v3", LATENT_SPARSE)
    cases = [
        {"topology": {"dp_size": 2, "ep_size": 2}},
        {"topology": {"tp_size": 2, "ep_size": 2}, "overrides": {**SP, **RECOMPUTED}},
        {"topology": {"pp_size": 2, "vpp_size": 2}, "overrides": PARTLY, "rows": 1, "count": 3},
        {"topology": {"cp_size": 2}, "packing": True},
    ]
    outputs = run_ranks(2, RANKS, "move_biases", folder=folder, cases=cases, expected=expected)
    assert outputs[0].count("MOVED") == len(cases)
