"""Claims about adapters on paper: which modules have one, where its factors lie under a layout, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch

from rlsync.bridge.adapter_folder import ADAPTER_CONFIG, adapter_config, check_adapter_folder
from rlsync.copy.cpu import bind
from rlsync.errors import ConfigError
from rlsync.layout.geometry import whole_tensors
from rlsync.layout.topology import Topology
from rlsync.models import FAMILIES, model_of
from rlsync.models.lora import LoraSpec, adapters_of, check_adapters, check_beside_base, idle_exclusions
from rlsync.models.placement import megatron_placements
from rlsync.plan.planner import build_plan
from tests.models import DENSE_FAMILIES, MOE_FAMILIES, tiny_config
from tests.vision_models import tiny_vision_config

DENSE = model_of({**tiny_config("qwen2").to_dict(), "architectures": ["Qwen2ForCausalLM"]})
EXPERTS = model_of({**tiny_config("qwen3_moe").to_dict(), "architectures": ["Qwen3MoeForCausalLM"]})


@pytest.mark.parametrize(
    ("model", "topology"),
    [
        (DENSE, Topology(tp_size=2)),
        (DENSE, Topology(tp_size=2, pp_size=2)),
        (EXPERTS, Topology(tp_size=2, ep_size=2, etp_size=1)),
        (EXPERTS, Topology(tp_size=2, ep_size=2, etp_size=2, dp_size=2)),
    ],
)
@pytest.mark.parametrize(
    "targets", ["all-linear", ("q_proj", "v_proj", "up_proj"), r".*layers\.1\..*(k|down)_proj", ("lm_head", "embed_tokens")]
)
def test_factors_survive_any_layout(model: Any, topology: Topology, targets: Any) -> None:
    """From whole factors to ranks and back; the plans are proven complete, and B's rows of projections without adapter are padding."""
    adapters = adapters_of(model, LoraSpec(3, 6, target_modules=targets))
    tensors = adapters.tensors(model, "float32")
    assert {name.rpartition(".lora_")[0] for name in (t.name for t in tensors)} == adapters.modules
    whole, ranks = whole_tensors("whole", tensors), megatron_placements(model, topology, dtype="float32", adapters=adapters)
    values = {t.name: torch.randn(t.shape) for t in tensors}
    held = [{b.name: torch.full(b.shape, torch.nan) for b in placement.buffers} for placement in ranks]
    for bucket in build_plan(tensors, [whole], ranks).buckets:
        for copy in bucket.copies:
            bind([copy], values, held[copy.destination]).run()
    found = {name: torch.zeros_like(value) for name, value in values.items()}
    for bucket in build_plan(tensors, ranks, [whole]).buckets:
        for copy in bucket.copies:
            bind([copy], held[copy.source], found).run()
    assert all(torch.equal(found[name], value) for name, value in values.items())


@pytest.mark.parametrize("family", DENSE_FAMILIES + MOE_FAMILIES)
def test_every_linear_layer_of_every_family_is_cut_as_its_base(family: str) -> None:
    """Under TP 2 the product of its factors on a rank has the shape of the weight there: every layout is known to adapters."""
    config = tiny_config(family).to_dict()
    architecture = next(known.architectures[0] for known in FAMILIES if known.model_type == config["model_type"])
    model = model_of({**config, "architectures": [architecture]})
    adapters = adapters_of(model, LoraSpec(3, 6))
    for rule in adapters.rules(model.parameters()):
        base, b = (model.local_layout(bound, 1, 2).shape for bound in (rule.base, rule.b))
        a = model.local_layout(rule.a, 1, 2).shape
        assert (b[0], a[1]) == base, rule.base.local


def test_all_linear_is_every_linear_layer_of_attention_mlps_and_experts() -> None:
    found = {module.rpartition(".")[2] for module in adapters_of(EXPERTS, LoraSpec(4, 8)).modules}
    assert found == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    one = adapters_of(EXPERTS, LoraSpec(4, 8, target_modules="all-linear", exclude_modules=r".*experts\.\d+\..*"))
    assert not any(".experts." in module for module in one.modules) and one.modules


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"target_modules": ("q_porj",)}, "match no linear layer of Qwen2ForCausalLM; it has q_proj, k_proj"),
        ({"target_modules": "q_proj"}, "match no linear layer"),  # a regular expression, which a whole name has to match
        ({"target_modules": ("q_proj", "qkv_proj")}, "name qkv_proj, which no linear layer"),
        ({"target_modules": "(q_proj"}, "is not a regular expression"),
        ({"exclude_modules": r".*_proj"}, "match no linear layer"),
        ({"target_parameters": ("mlp.experts.down_proj",)}, "name mlp.experts.down_proj, which no experts or routers of Qwen2ForCausalLM"),
        ({"lora_dropout": 1.0}, "it is a probability below 1"),
        ({"r": 0}, "must be at least 1"),
        ({"lora_alpha": float("nan")}, "it must be a finite number"),
    ],
)
def test_a_spec_that_cannot_be_is_refused_by_name(fields: dict[str, Any], said: str) -> None:
    findings = check_adapters(DENSE, LoraSpec(**{"r": 4, "lora_alpha": 8, **fields}))
    assert len([finding for finding in findings if said in finding]) == 1, findings


@pytest.mark.parametrize("name", ["lm_head", "embed_tokens"])
def test_head_and_embedding_have_an_adapter_where_they_are_named_and_are_two_weights(name: str) -> None:
    named = adapters_of(DENSE, LoraSpec(4, 8, target_modules=(name, "q_proj")))
    (module,) = (module for module in named.modules if module.endswith(name))
    assert adapter_config(named, None)["target_modules"] == [name, "q_proj"]
    assert module in adapters_of(DENSE, LoraSpec(4, 8, target_modules=f".*({name}|_proj)")).modules
    assert module not in adapters_of(DENSE, LoraSpec(4, 8)).modules
    (said,) = check_beside_base(DENSE, named)
    assert said.startswith(f"{module} has an adapter") and "weight_sync.lora to merged" in said
    tied = model_of({**tiny_config("qwen2", tied=True).to_dict(), "architectures": ["Qwen2ForCausalLM"]})
    for targets in ((name, "q_proj"), f".*({name}|_proj)"):
        (said,) = check_adapters(tied, LoraSpec(4, 8, target_modules=targets))
        assert f"match {module}, which is tied: head and embedding are one weight" in said


def test_a_stacked_parameter_is_that_projection_of_every_expert() -> None:
    found = adapters_of(EXPERTS, LoraSpec(4, 8, target_modules=(), target_parameters=("mlp.experts.gate_up_proj",))).modules
    assert found == adapters_of(EXPERTS, LoraSpec(4, 8, target_modules=r".*experts\.\d+\.(gate|up)_proj")).modules


def test_routers_have_an_adapter_where_they_are_named_and_gates_of_shared_experts_have_none() -> None:
    model = model_of({**tiny_config("qwen2_moe").to_dict(), "architectures": ["Qwen2MoeForCausalLM"]})
    (said, _) = check_adapters(model, LoraSpec(4, 8, target_modules=("shared_expert_gate",)))
    assert "model.layers.0.mlp.shared_expert_gate, which is the gate of a shared expert" in said
    routers = adapters_of(model, LoraSpec(4, 8, target_modules=("gate",)))
    assert routers.modules == {f"model.layers.{layer}.mlp.gate" for layer in (0, 2, 3)}, "layer 1 has no experts"
    by_parameter = LoraSpec(4, 8, target_modules=("q_proj",), target_parameters=("gate.weight",))
    both = adapters_of(model, by_parameter)
    assert both.modules == routers.modules | {f"model.layers.{layer}.self_attn.q_proj" for layer in range(model.num_layers)}
    assert not routers.modules & adapters_of(model, LoraSpec(4, 8)).modules
    said = adapter_config(both, None)
    assert said["target_modules"] == ["q_proj"] and said["target_parameters"] == sorted(f"{module}.weight" for module in routers.modules)
    (said,) = check_adapters(model, replace(by_parameter, lora_dropout=0.1))
    assert "lora_dropout is 0.1" in said and "mlp.gate is a router" in said
    (said,) = check_beside_base(model, both)
    assert "mlp.gate has an adapter, for which engines have no slot" in said
    # transformers has another name for it than released files.
    mixtral = model_of({**tiny_config("mixtral").to_dict(), "architectures": ["MixtralForCausalLM"]})
    named = adapters_of(mixtral, replace(by_parameter, target_parameters=("mlp.gate.weight",)))
    assert "model.layers.0.block_sparse_moe.gate" in named.modules and named.routers == {
        module: module.replace("block_sparse_moe", "mlp") + ".weight" for module in named.modules if module.endswith("gate")
    }


def test_names_reach_layers_of_a_tower_and_all_linear_does_not() -> None:
    config = tiny_vision_config("qwen2_5_vl")
    model = model_of({**config.to_dict(), "architectures": ["Qwen2_5_VLForConditionalGeneration"]})
    assert not any("visual" in module or module == "lm_head" for module in adapters_of(model, LoraSpec(4, 8)).modules)
    both = adapters_of(model, LoraSpec(4, 8, target_modules=("gate_proj", "merger.mlp.0")))
    assert {module.split(".")[1] for module in both.modules} == {"visual", "language_model"} and "model.visual.merger.mlp.0" in both.modules
    # To PEFT a number would be the name of blocks too.
    assert set(adapter_config(both, None)["target_modules"]) == both.modules
    (said,) = check_adapters(model, LoraSpec(4, 8, target_modules=("mlp.1",)))
    assert said.endswith(
        "it has qkv, proj, gate_proj, up_proj, down_proj, mlp.0, mlp.2, q_proj, k_proj, v_proj, o_proj, "
        "and where they are named embed_tokens, lm_head"
    ), said
    model = model_of({**tiny_vision_config("qwen3_vl").to_dict(), "architectures": ["Qwen3VLForConditionalGeneration"]})
    for name, what in (("pos_embed", "an embedding of places"), ("proj", "model.visual.patch_embed.proj, which is a convolution")):
        assert any(what in said for said in check_adapters(model, LoraSpec(4, 8, target_modules=(name,))))


def test_an_exclusion_of_nothing_is_a_slip_and_one_of_what_has_no_adapter_anyway_is_not() -> None:
    def found(exclude: str | tuple[str, ...]) -> list[str]:
        spec = LoraSpec(4, 8, exclude_modules=exclude)
        assert check_adapters(DENSE, spec) == []
        return idle_exclusions(DENSE, spec)

    assert found(()) == found(("k_proj", "lm_head", "embed_tokens")) == found(r".*layers\.0\..*") == []
    (said,) = found(("k_proj", "k_porj"))
    assert "exclude_modules name k_porj, which no layer of" in said
    # As PEFT reads it, an expression has to match the whole name.
    assert len(found("k_proj")) == 1


ADAPTING_BASE = ("pissa", "pissa_niter_4", "olora", "corda", "loftq", "mica", "lora_ga")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"use_dora": True}, "use_dora is True"),
        # PEFT takes their factors out of the base when it loads them.
        *(({"init_lora_weights": name}, f"init_lora_weights is '{name}'; only True, .* leave the base as it is") for name in ADAPTING_BASE),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern is"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is"),
        ({"target_modules": ["q_proj", 1]}, r"target_modules is \['q_proj', 1\]; it must be names"),
        ({"target_parameters": [None]}, r"target_parameters is \[None\]; it must be names"),
        ({"exclude_modules": True}, "exclude_modules is True; it must be names"),
        ({"exclude_modules": [["k_proj"]]}, r"exclude_modules is \[\['k_proj'\]\]; it must be names"),
        ({"lora_dropout": "some"}, "lora_dropout is 'some'; it must be a number"),
        ({"r": 8}, "r 8 there, 4 here"),
        ({"use_rslora": True}, "use_rslora True there, False here"),
    ],
)
def test_a_folder_of_another_adapter_is_refused_by_name(tmp_path, change: dict[str, Any], said: str) -> None:
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    (tmp_path / ADAPTER_CONFIG).write_text(json.dumps(config))
    check_adapter_folder(tmp_path, LoraSpec(4, 8.0))
    (tmp_path / ADAPTER_CONFIG).write_text(json.dumps({**config, **change}))
    with pytest.raises(ConfigError, match=said):
        check_adapter_folder(tmp_path, LoraSpec(4, 8.0))


def test_beside_the_base_go_adapters_of_whole_experts_and_of_language_models_alone() -> None:
    vision = model_of({**tiny_vision_config("qwen2_5_vl").to_dict(), "architectures": ["Qwen2_5_VLForConditionalGeneration"]})

    def found(model: Any, *targets: str) -> list[str]:
        return check_beside_base(model, adapters_of(model, LoraSpec(4, 8, target_modules=targets or "all-linear")))

    assert found(EXPERTS) == found(EXPERTS, "q_proj", "o_proj") == found(vision) == []
    (said,) = found(EXPERTS, "q_proj", "gate_proj", "down_proj")
    assert "experts.0.gate_proj has an adapter" in said and "add up_proj, or set weight_sync.lora to merged" in said
    (said,) = found(vision, "q_proj", "attn.qkv")
    assert "blocks.0.attn.qkv has an adapter" in said and "name it in exclude_modules" in said


def test_adapters_that_engines_would_divide_are_not_sent_beside_the_base() -> None:
    """vLLM's GLM-4 has slots for a gate_proj and an up_proj, and ends in an IndexError over the adapter of both in one."""
    model = model_of({**tiny_config("glm4").to_dict(), "architectures": ["Glm4ForCausalLM"]})
    (said,) = check_beside_base(model, adapters_of(model, LoraSpec(4, 8)))
    assert said.startswith("4 layers have adapters of gate_up_proj, as ") and "weight_sync.lora to merged" in said
    assert check_beside_base(model, adapters_of(model, LoraSpec(4, 8, exclude_modules=("gate_up_proj",)))) == []


@pytest.mark.parametrize("family", ["deepseek_v3", "moonlight"])
def test_adapters_that_engines_of_latent_attention_would_leave_out_are_not_sent_beside_the_base(family: str) -> None:
    model = model_of({**tiny_config(family).to_dict(), "architectures": ["DeepseekV3ForCausalLM"]})
    all_linear, others = (adapters_of(model, LoraSpec(4, 8, exclude_modules=names)) for names in ((), ("kv_b_proj",)))
    (said,) = check_beside_base(model, all_linear)
    assert "adapters of kv_b_proj" in said and "weight_sync.lora to merged" in said
    assert check_beside_base(model, others) == check_beside_base(DENSE, adapters_of(DENSE, LoraSpec(4, 8))) == []
    assert {"kv_a_proj_with_mqa", "o_proj"} < {name.rpartition(".")[2] for name in others.modules}
