"""Router replay on real Megatron ranks: tokens go where transformers' model was made to send them, forwards and backwards."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.hf_models import make_models
from tests.ranks import run_ranks

RANKS = "tests.integration.replay_ranks"
SP = {"sequence_parallel": True}
RECOMPUTED = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
PARTLY = {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 1}
SPARSE = (0, 2, 3)  # the second layer of the tiny model is dense
LENGTHS = (24, 17, 9, 21)
NUM_EXPERTS, TOPK = 8, 3


@pytest.fixture(scope="module")
def forced(tmp_path_factory) -> tuple[str, str]:
    """A model's folder, and a file with routes at random, a fifth of them missing, and what transformers makes of them."""
    root = tmp_path_factory.mktemp("replay")
    folder = make_models(root, ("qwen3_moe",))["qwen3_moe"]["folder"]
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    draw = torch.Generator().manual_seed(3)
    rows, longest = len(LENGTHS), max(LENGTHS)
    tokens = torch.randint(1, 131, (rows, longest), generator=draw)
    routes = torch.rand(rows, longest, len(SPARSE), NUM_EXPERTS, generator=draw).argsort(-1)[..., :TOPK]
    routes[torch.rand(rows, longest, generator=draw) < 0.2] = -1
    weights = torch.rand(rows, longest, generator=draw)
    weights[:, 0] = 0.5  # no token before it: its log-probability is 0, but it is no padding
    for row, length in enumerate(LENGTHS):
        weights[row, length:] = 0
    free, chosen, shares = passed(model, tokens, None)
    expected, live, _ = passed(model, tokens, routes)
    loss = -(expected[0] * weights).sum() - 0.1 * (expected[1] * weights.abs()).sum()
    loss.backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    path = root / "expected.pt"
    torch.save(
        {
            "tokens": tokens, "weights": weights, "routes": routes.to(torch.int16), "live": live.to(torch.int16), "lengths": LENGTHS,
            "expected": expected[0].detach(), "free": free[0].detach(), "grad_norm": norm.item(), "loss": loss.item(),
            "balancing": balancing_loss(chosen, shares),
        },
        path,
    )  # fmt: skip
    return folder, str(path)


def balancing_loss(chosen, shares):
    """Equations 4 to 6 of arXiv 2101.03961, for several experts a token: of each sequence the mean over layers."""
    losses = []
    for row, length in enumerate(LENGTHS):
        losses.append(0.0)
        for place in range(len(SPARSE)):
            fraction = torch.bincount(chosen[row, :length, place].reshape(-1), minlength=NUM_EXPERTS) / (length * TOPK)
            losses[-1] += NUM_EXPERTS * (fraction * shares[row, :length, place].mean(0)).sum().item() / len(SPARSE)
    return losses


def passed(model, tokens, routes):
    """Log-probabilities and entropies (rows, length) of transformers' model, its choices and shares, where its routers obey ``routes``."""
    live = torch.empty(*tokens.shape, len(SPARSE), TOPK, dtype=torch.int64)
    spread = torch.empty(*tokens.shape, len(SPARSE), NUM_EXPERTS)

    def obey(place):
        def hook(gate, inputs, output):
            logits = inputs[0].reshape(-1, gate.weight.size(1)) @ gate.weight.T
            shares, own = logits.softmax(-1), logits.topk(TOPK, dim=-1).indices
            live[:, :, place] = own.view(*tokens.shape, TOPK)
            spread[:, :, place] = shares.detach().view(*tokens.shape, NUM_EXPERTS)
            chosen = own
            if routes is not None:
                given = routes[:, :, place].reshape(-1, TOPK)
                chosen = torch.where(given < 0, own, given)
            taken = shares.gather(1, chosen)
            return (output[0], taken / taken.sum(-1, keepdim=True), chosen)

        return hook

    hooks = [model.model.layers[layer].mlp.gate.register_forward_hook(obey(place)) for place, layer in enumerate(SPARSE)]
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


def test_grpo_on_the_engines_routes_has_the_engines_log_probabilities_and_without_them_has_not(forced):
    folder, expected = forced
    outputs = run_ranks(2, RANKS, "grpo", folder=folder, expected=expected)
    assert "ROUTED" in outputs[0]


def test_the_balancing_loss_of_a_step_is_that_of_transformers_choices(forced):
    folder, expected = forced
    outputs = run_ranks(2, RANKS, "balance", folder=folder, expected=expected)
    assert all("BALANCED" in output for output in outputs)
