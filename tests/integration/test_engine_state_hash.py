"""Claims about the hash of an engine's state: it sees every place in which weights hide, and vLLM's CPU experts as they really are."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rlsync.engine.state import state_difference, state_hashes
from tests.integration.test_sinks import SINKS, assert_all_weights_part, run_cases

# The first is also run without healing, which cannot be undone in its process.
CASES = ("moe-bfloat16", "mla-bfloat16")


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Any]:
    return run_cases(tmp_path_factory.mktemp("state"), CASES, patched=False)


@pytest.mark.parametrize("sink", SINKS)
@pytest.mark.parametrize("case", CASES)
def test_synced_experts_hash_and_answer_like_fresh_ones(reports: Mapping[str, Any], case: str, sink: str) -> None:
    got = reports[case][sink]
    differences = {name: d for name, d in got.items() if name in ("identity", "fresh", "back", "left") or name.startswith("fresh_after_")}
    assert len(differences) == 8 and not any(differences.values())
    assert got["answers"] and reports[case]["answers_part"]
    assert_all_weights_part(reports[case])


@pytest.mark.parametrize("case", CASES)
def test_experts_are_layerwise_and_written_directly_only_where_they_are_plain(reports: Mapping[str, Any], case: str) -> None:
    report = reports[case]
    experts = {name for name in report["bytes"] if name.endswith(("w13_weight", "w2_weight"))}
    assert len(experts) == 2
    assert {report["choice"]["auto"][name] for name in experts} == {"layerwise"}
    assert all(name in report["choice"]["direct"] for name in experts)
    assert report["placed_direct"] == []


def test_without_healing_experts_are_scrambled_and_the_choice_refuses(reports: Mapping[str, Any]) -> None:
    """The negative control of every other claim here: the same weights once more, and the hashes change."""
    unpatched = reports[CASES[0]]["unpatched"]
    experts = [f"model.layers.0.mlp.experts.routed_experts.{name}" for name in ("w13_weight", "w2_weight")]
    assert unpatched["identity"] == experts
    assert [finding.split(":")[0] for finding in unpatched["findings"]] == experts
    assert unpatched["refused"].startswith("vLLM's reload cannot be relied on")


def test_absorbed_and_shared_weights_of_mla_follow(reports: Mapping[str, Any]) -> None:
    report = reports["mla-bfloat16"]
    parted = set(report["parted"])
    assert {f"model.layers.{i}.self_attn.mla_attn.mla_attn.{name}" for i in (0, 1) for name in ("W_UV", "W_UK_T")} <= parted
    # Views of kv_b_proj, a plain product on CPU: written in place, and they show it.
    assert report["choice"]["auto"]["model.layers.0.self_attn.kv_b_proj.weight"] == "direct"
    correction = "model.layers.1.mlp.gate.e_score_correction_bias"
    assert "model.layers.1.mlp.experts.routed_experts.e_score_correction_bias" in report["choice"]["aliases"][correction]


@pytest.mark.parametrize("sink", SINKS)
def test_attention_that_computes_from_weights_is_finished_in_every_sync(reports: Mapping[str, Any], sink: str) -> None:
    """The negative control of leaving plain attention out, which experts' models have."""
    assert reports["mla-bfloat16"][sink]["resting"] == [0, 2]
    assert reports["moe-bfloat16"][sink]["resting"] == [1, 1]


@pytest.mark.parametrize("case", ["moe-bfloat16", "mla-bfloat16"])
def test_loaders_leave_experts_to_a_reload_and_write_the_other_layers_where_they_live(reports: Mapping[str, Any], case: str) -> None:
    """In a model that was never post-processed, only what was rebuilt differs from what a load puts there: it is packed."""
    got = reports[case]["loaded_in_place"]
    packed = [name for name in reports[case]["bytes"] if name.endswith(("w13_weight", "w2_weight"))]
    assert sorted(got["differ"]) == sorted(packed)
    assert {name.rpartition(".")[0] for name in packed} <= set(got["rebuilt"])


class Slotted:
    __slots__ = ("_held",)

    def __init__(self, held: torch.Tensor) -> None:
        self._held = held


@dataclasses.dataclass(frozen=True)
class Held:
    weights: tuple[torch.Tensor, ...]


class Kernel:
    def __init__(self, held: torch.Tensor) -> None:
        self.held = held
        self.me = self

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.held


def closure(held: torch.Tensor) -> Callable[..., torch.Tensor]:
    return lambda x: x @ held


def default(held: torch.Tensor) -> Callable[..., torch.Tensor]:
    return lambda x, weight=held: x @ weight


PLACES: dict[str, Callable[[torch.Tensor], Any]] = {
    "attribute": lambda t: t,
    "list": lambda t: [0, [t]],
    "dict": lambda t: {"a": {3: t}},
    "namespace": lambda t: SimpleNamespace(inner=t),
    "slots": Slotted,
    "dataclass": lambda t: Held((t,)),
    "object with a cycle": Kernel,
    "bound method": lambda t: Kernel(t).apply,
    "closure": closure,
    "default argument": default,
    "partial": lambda t: functools.partial(torch.add, t, other=1),
    "keyword of a partial": lambda t: functools.partial(torch.add, other=t),
    "module outside the registry": lambda t: [module_with(weight=t)],
    "float": lambda t: float(t.sum()),
}


def module_with(**attributes: Any) -> torch.nn.Module:
    module = torch.nn.Linear(3, 2, dtype=torch.float64)
    torch.nn.init.ones_(module.weight)
    torch.nn.init.zeros_(module.bias)
    module.extra = SimpleNamespace(**attributes)
    return module


@pytest.mark.parametrize("place", PLACES)
def test_a_tensor_is_found_wherever_it_hides(place: str) -> None:
    held = torch.arange(6.0).reshape(2, 3)
    before = state_hashes(module_with(kernel=PLACES[place](held)))
    assert state_difference(before, state_hashes(module_with(kernel=PLACES[place](held.clone())))) == ()
    held[1, 2] += 2.0**-20
    (path,) = state_difference(before, state_hashes(module_with(kernel=PLACES[place](held))))
    assert path.startswith("extra.kernel")


@pytest.mark.parametrize(
    "change",
    [torch.Tensor.bfloat16, torch.Tensor.flatten, lambda t: t.t().contiguous().t(), lambda t: -t, lambda t: t.to("meta")],
    ids=["dtype", "shape", "strides", "sign of zero", "meta"],
)
def test_what_a_tensor_is_counts_too(change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    held = torch.zeros(2, 3)
    assert state_difference(state_hashes(module_with(held=held)), state_hashes(module_with(held=change(held)))) == ("extra.held",)


def test_only_addressed_elements_count() -> None:
    memory = torch.zeros(4, 6)
    before = state_hashes(module_with(held=memory[:, 1:3]))
    memory[:, 4] = 1.0
    assert state_hashes(module_with(held=memory[:, 1:3])) == before
    memory[3, 2] = 1.0
    assert state_hashes(module_with(held=memory[:, 1:3])) != before


def test_a_view_is_not_a_copy() -> None:
    weight = torch.ones(2, 3)
    shared = state_hashes(module_with(a=weight, b=weight.t()))
    assert state_hashes(module_with(a=weight.clone(), b=weight.t())) != shared
    other = weight.clone()
    assert state_hashes(module_with(a=other, b=other.t())) == shared


def test_the_order_of_registries_does_not_show() -> None:
    first, second = module_with(), module_with()
    bias = second.bias
    del second.bias
    weight = second.weight
    del second.weight
    second.register_parameter("bias", bias)
    second.register_parameter("weight", weight)
    assert list(first._parameters) != list(second._parameters)
    assert state_hashes(first) == state_hashes(second)


def test_what_requests_leave_behind_is_not_state() -> None:
    assert "extra.kv_cache" not in state_hashes(module_with(kv_cache=torch.ones(3)))
