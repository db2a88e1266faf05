"""Claims about GRPO's arithmetic: hand-computed values, a brute-force reference, and exactness under any split."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from workers.algorithms import (
    LossAggregation,
    MicroBatchLoss,
    PolicyLossOptions,
    Sums,
    aggregation_denominator,
    aggregation_numerator,
    correct_importance,
    group_advantages,
    kl_penalty,
    moments,
    policy_loss,
    whiten,
)

MODES: tuple[LossAggregation, ...] = ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean")
K3 = math.exp(-0.5) - 1 + 0.5
KINDS = ("kl", "k1", "abs", "mse", "k2", "low_var_kl", "k3")


def batch(num_samples: int = 6, length: int = 5, seed: int = 0) -> dict[str, Tensor]:
    """Random samples of uneven lengths, one of them empty, in float64."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, length + 1, (num_samples,), generator=generator)
    lengths[0] = 0
    draw = {name: torch.randn(num_samples, length, generator=generator, dtype=torch.float64) for name in ("new", "old", "ref", "adv")}
    return {
        "logprobs": -draw["new"].abs(),
        "old_logprobs": -draw["old"].abs(),
        "reference_logprobs": -draw["ref"].abs(),
        "advantages": draw["adv"],
        "entropy": draw["new"].square(),
        "mask": torch.arange(length)[None, :] < lengths[:, None],
    }


def brute_force_loss(data: dict[str, Tensor], options: PolicyLossOptions) -> float:
    """The loss of a batch, one token at a time, in plain Python."""
    rows = []
    for b in range(data["mask"].shape[0]):
        row = []
        for t in range(data["mask"].shape[1]):
            if not data["mask"][b, t]:
                continue
            new, old, ref, adv = (data[k][b, t].item() for k in ("logprobs", "old_logprobs", "reference_logprobs", "advantages"))
            ratio = math.exp(new - old)
            loss = -min(ratio * adv, min(max(ratio, 1 - options.clip_ratio_low), 1 + options.clip_ratio_high) * adv)
            if options.clip_ratio_c is not None and adv < 0:
                loss = min(loss, -options.clip_ratio_c * adv)
            k3 = math.exp(ref - new) - 1 - (ref - new)
            row.append(loss + options.kl_beta * min(k3, 10.0) - options.entropy_bonus * data["entropy"][b, t].item())
        if row:
            rows.append(row)
    if options.loss_agg_func == "token-mean":
        return sum(map(sum, rows)) / sum(map(len, rows))
    if options.loss_agg_func == "seq-mean-token-sum":
        return sum(map(sum, rows)) / len(rows)
    return sum(sum(row) / len(row) for row in rows) / len(rows)


def loss_of(data: dict[str, Tensor], options: PolicyLossOptions) -> MicroBatchLoss:
    return policy_loss(
        data["logprobs"],
        data["old_logprobs"],
        data["advantages"],
        data["mask"],
        options,
        reference_logprobs=data["reference_logprobs"],
        entropy=data["entropy"],
    )


OPTIONS = PolicyLossOptions(clip_ratio_low=0.2, clip_ratio_high=0.28, clip_ratio_c=3.0, kl_beta=0.1, entropy_bonus=0.01)


def test_group_advantages_match_hand_computed_values() -> None:
    found = group_advantages(torch.tensor([1.0, 0.0, 0.0, 1.0, 5.0, 1.0]), 3)
    std = math.sqrt(((2 / 3) ** 2 + 2 * (1 / 3) ** 2) / 2)
    torch.testing.assert_close(found[:3], torch.tensor([2 / 3, -1 / 3, -1 / 3]) / (std + 1e-6))
    assert found[3:].sum().abs() < 1e-6 and found[4] > 0


def test_a_group_with_equal_rewards_has_no_advantage() -> None:
    """Also where the mean is not exactly representable, which a division by 1e-6 would magnify."""
    assert group_advantages(torch.full((6,), 0.1), 3).tolist() == [0.0] * 6


@pytest.mark.parametrize(("count", "size"), [(5, 2), (4, 1)])
def test_rewards_that_form_no_groups_are_refused(count: int, size: int) -> None:
    with pytest.raises(ValueError, match="cannot form groups"):
        group_advantages(torch.zeros(count), size)


def test_whitened_advantages_have_mean_0_and_variance_1_over_valid_tokens() -> None:
    data = batch()
    found = whiten(data["advantages"], data["mask"], moments(data["advantages"], data["mask"]))
    valid = found[data["mask"]].double()
    assert valid.mean().abs() < 1e-6 and (valid.var() - 1).abs() < 1e-5
    assert (found[~data["mask"]] == 0).all()


def test_whitening_by_parts_equals_whitening_the_whole() -> None:
    data = batch()
    values, mask = data["advantages"], data["mask"]
    totals = moments(values[:2], mask[:2]) + moments(values[2:], mask[2:])
    parts = torch.cat((whiten(values[:2], mask[:2], totals), whiten(values[2:], mask[2:], totals)))
    torch.testing.assert_close(parts, whiten(values, mask, moments(values, mask)))


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("kl", 0.5),
        ("k1", 0.5),
        ("abs", 0.5),
        ("mse", 0.125),
        ("k2", 0.125),
        ("low_var_kl", math.exp(-0.5) - 0.5),
        ("k3", math.exp(-0.5) - 0.5),
    ],
)
def test_kl_estimators_match_hand_computed_values(kind: str, expected: float) -> None:
    """log policy - log reference = 0.5; k3 is r - 1 - log r with r = exp(-0.5)."""
    found = kl_penalty(torch.tensor([-1.0]), torch.tensor([-1.5]), kind)  # type: ignore[arg-type]
    torch.testing.assert_close(found, torch.tensor([expected]))


def test_k3_estimates_the_kl_divergence_without_bias() -> None:
    policy, reference = torch.tensor([0.7, 0.2, 0.1]).double().log(), torch.tensor([0.3, 0.3, 0.4]).double().log()
    exact = (policy.exp() * (policy - reference)).sum()
    for kind in ("k1", "k3"):
        torch.testing.assert_close((policy.exp() * kl_penalty(policy, reference, kind)).sum(), exact)  # type: ignore[arg-type]


def test_k3_stays_finite_for_policies_that_differ_wildly() -> None:
    found = kl_penalty(torch.tensor([-500.0, 0.0]), torch.tensor([0.0, -500.0]), "k3")
    assert torch.isfinite(found).all() and found[0] == 10.0


@pytest.mark.parametrize(
    ("mode", "expected"), [("token-mean", 12 / 4), ("seq-mean-token-sum", 12 / 2), ("seq-mean-token-mean", (2 + 6) / 2)]
)
def test_aggregation_matches_hand_computed_values(mode: LossAggregation, expected: float) -> None:
    values = torch.tensor([[1.0, 2.0, 3.0], [6.0, float("nan"), float("inf")], [float("nan")] * 3])
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [0, 0, 0]])
    assert (aggregation_numerator(values, mask, mode) / aggregation_denominator(mask, mode)).item() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected"),
    [
        (1.1, 1.0, -1.1),  # inside the range
        (1.5, 1.0, -1.28),  # clipped high
        (0.5, 1.0, -0.5),  # a good token that became unlikelier is never clipped
        (0.5, -1.0, 0.8),  # clipped low
        (1.5, -1.0, 1.5),  # a bad token that became likelier is not clipped ...
        (9.0, -1.0, 3.0),  # ... up to the dual clip
        (9.0, 1.0, -1.28),  # the dual clip leaves good tokens alone
    ],
)
def test_clipping_matches_hand_computed_values(ratio: float, advantage: float, expected: float) -> None:
    one = torch.ones(1, 1)
    loss = policy_loss(torch.log(one * ratio), torch.zeros(1, 1), one * advantage, one, replace(OPTIONS, kl_beta=0.0, entropy_bonus=0.0))
    assert loss.numerator.item() == pytest.approx(expected)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("clip_c", [None, 1.5])
def test_policy_loss_equals_the_brute_force_reference(mode: LossAggregation, clip_c: float | None) -> None:
    options = replace(OPTIONS, loss_agg_func=mode, clip_ratio_c=clip_c)
    for seed in range(5):
        data = batch(seed=seed)
        found = loss_of(data, options).sums.means()["final_loss"]
        assert found == pytest.approx(brute_force_loss(data, options), rel=1e-9)


@pytest.mark.parametrize("mode", MODES)
def test_any_split_into_micro_batches_and_ranks_gives_the_full_batch_loss_metrics_and_gradient(mode: LossAggregation) -> None:
    options, data = replace(OPTIONS, loss_agg_func=mode), batch(num_samples=8)
    data["logprobs"].requires_grad_(True)
    whole = loss_of(data, options)
    denominator = aggregation_denominator(data["mask"], mode)
    (gradient,) = torch.autograd.grad(whole.numerator / denominator, data["logprobs"])

    order = list(range(8))
    random.Random(1).shuffle(order)
    shares = [order[:3], order[3:4], order[4:]]  # uneven micro-batches, shuffled samples
    parts = [loss_of({name: value[share] for name, value in data.items()}, options) for share in shares]
    assert sum(aggregation_denominator(data["mask"][share], mode) for share in shares) == denominator
    (split,) = torch.autograd.grad(sum(part.numerator / denominator for part in parts), data["logprobs"])  # type: ignore[arg-type]
    torch.testing.assert_close(split, gradient)
    total = Sums({name: torch.stack([part.sums.terms[name] for part in parts]).sum(0) for name in whole.sums.terms})
    summed, expected = total.means(), whole.sums.means()
    assert summed.keys() == expected.keys()
    for name in expected:
        assert summed[name] == pytest.approx(expected[name]), name


def test_the_mean_of_micro_batch_means_would_not_be_exact() -> None:
    """Negative control of the claim above: why numerators and denominators travel apart."""
    data = batch(num_samples=8)
    whole = loss_of(data, OPTIONS).sums.means()["final_loss"]
    means = [loss_of({n: v[share] for n, v in data.items()}, OPTIONS).sums.means()["final_loss"] for share in (slice(0, 3), slice(3, 8))]
    assert abs(sum(means) / 2 - whole) > 1e-3


def test_metrics_carry_the_names_users_know() -> None:
    assert set(loss_of(batch(), OPTIONS).sums.terms) == {
        *("policy_loss", "policy_loss_abs", "ratio", "ratio_abs", "clipped_ratio", "dual_cliped_ratio", "approx_kl"),
        *("clip_fraction", "final_loss", "entropy_loss", "kl_loss", "early_stopped"),
    }


def test_identical_policies_have_ratio_1_and_clip_nothing() -> None:
    data = batch()
    data["old_logprobs"] = data["reference_logprobs"] = data["logprobs"]
    means = loss_of(data, OPTIONS).sums.means()
    assert means["ratio"] == means["clipped_ratio"] == 1.0
    assert means["ratio_abs"] == means["clip_fraction"] == means["approx_kl"] == means["kl_loss"] == means["dual_cliped_ratio"] == 0.0


def test_positions_outside_the_mask_change_nothing() -> None:
    data = batch()
    poisoned = {name: torch.where(data["mask"], value, float("nan")) if name != "mask" else value for name, value in data.items()}
    clean, found = ({**d, "logprobs": d["logprobs"].clone().requires_grad_(True)} for d in (data, poisoned))
    assert loss_of(found, OPTIONS).sums.means() == loss_of(clean, OPTIONS).sums.means()
    (gradient,) = torch.autograd.grad(loss_of(found, OPTIONS).numerator, found["logprobs"])
    assert (gradient[~data["mask"]] == 0).all() and gradient.isfinite().all()


def test_an_exploding_micro_batch_is_stopped_with_a_zero_gradient() -> None:
    logprobs = torch.tensor([[-1.0, -1.0]], requires_grad=True)
    options = PolicyLossOptions(early_stop_imp_ratio=5.0)
    loss = policy_loss(logprobs, torch.full((1, 2), -1e4), torch.ones(1, 2), torch.ones(1, 2), options)
    (gradient,) = torch.autograd.grad(loss.numerator, logprobs)
    assert loss.numerator.item() == 0.0 and gradient.abs().max() == 0.0
    assert loss.sums.means()["early_stopped"] == 1.0
    calm = policy_loss(logprobs, torch.full((1, 2), -1.1), torch.ones(1, 2), torch.ones(1, 2), options)
    assert calm.numerator.item() != 0.0 and calm.sums.means()["early_stopped"] == 0.0


def test_the_loss_asks_a_gpu_for_nothing() -> None:
    """A host that asks for a number waits for all that it enqueued. Tensors of the meta device have none to give."""
    data = {name: value.to("meta") for name, value in batch().items()}
    loss = loss_of(data, replace(OPTIONS, early_stop_imp_ratio=5.0, clip_ratio_c=3.0))
    assert {value.device.type for value in (loss.numerator, *loss.sums.terms.values())} == {"meta"}
    with pytest.raises((RuntimeError, NotImplementedError)):
        loss.sums.means()


def test_log_ratio_clamp_bounds_the_ratio() -> None:
    options = PolicyLossOptions(clip_log_ratio_min=-0.1, clip_log_ratio_max=0.1)
    one = torch.ones(1, 2)
    means = policy_loss(torch.tensor([[-1.0, -3.0]]), torch.tensor([[-2.0, -2.0]]), one, one, options).sums.means()
    assert means["ratio"] == pytest.approx((math.exp(0.1) + math.exp(-0.1)) / 2)


def test_importance_correction_is_the_truncated_ratio() -> None:
    found = correct_importance(torch.tensor([[2.0], [-1.0]]), torch.tensor([[-1.0], [0.0]]), torch.tensor([[-1.5], [-9.0]]), clip=3.0)
    torch.testing.assert_close(found, torch.tensor([[2.0 * math.exp(0.5)], [-3.0]]))


def test_missing_inputs_of_active_terms_are_refused() -> None:
    one = torch.ones(1, 1)
    with pytest.raises(ValueError, match="reference_logprobs are required"):
        policy_loss(one, one, one, one, PolicyLossOptions(kl_beta=0.1))
    with pytest.raises(ValueError, match="entropy is required"):
        policy_loss(one, one, one, one, PolicyLossOptions(entropy_bonus=0.1))


@pytest.mark.parametrize("kind", KINDS)
def test_every_kl_kind_has_a_gradient(kind: str) -> None:
    logprobs = torch.tensor([-1.0, -2.0], requires_grad=True)
    kl_penalty(logprobs, torch.tensor([-2.0, -1.0]), kind).sum().backward()  # type: ignore[arg-type]
    assert logprobs.grad is not None and (logprobs.grad != 0).any()
