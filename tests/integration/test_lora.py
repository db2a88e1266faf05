"""Adapters on real Megatron ranks train as PEFT's on transformers' model under every layout, and as files they are PEFT's."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from rlsync.bridge.adapter_folder import adapter_config
from rlsync.megatron.lora import initial_factor
from rlsync.models import model_of
from rlsync.models.lora import LoraSpec, adapters_of
from tests.models import VOCAB_SIZE, save_tiny_model, tiny_model
from tests.ranks import run_ranks
from tests.vision_models import hf_inputs, row, save_tiny_vision_model, tiny_vision_model

RANKS = "tests.integration.lora_ranks"
STEPS = 10
OPTIMIZER = {"lr": 2e-3, "weight_decay": 0.1, "adam_eps": 1e-3, "adam_beta2": 0.95, "clip_grad": 0.5}
DISTRIBUTED = {"use_distributed_optimizer": True}
OVERLAPPED = {**DISTRIBUTED, "overlap_grad_reduce": True, "overlap_param_gather": True}
PREFIX = "base_model.model."
# Of models that no virtual stages and no adapters of single layers need deeper.
SHALLOW = {"num_hidden_layers": 2}
# Adapters of all kinds of bases: two of three packed projections, rslora, excluded modules, one layer alone.
DENSE: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "llama": ({"family": "llama", "tied": True, "num_key_value_heads": 4}, {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}),
    "qwen2": (
        {"family": "qwen2", **SHALLOW},
        {"r": 3, "lora_alpha": 5, "use_rslora": True, "target_modules": ["v_proj", "up_proj", "down_proj"]},
    ),
    "qwen3": (
        {"family": "qwen3", "tied": True, "num_key_value_heads": 1, **SHALLOW},
        {
            "r": 8,
            "lora_alpha": 4,
            "target_modules": ["q_proj", "v_proj", "o_proj", "gate_proj"],
            "exclude_modules": ["layers.0.self_attn.o_proj"],
        },
    ),
    "glm4": ({"family": "glm4"}, {"r": 4, "lora_alpha": 8, "target_modules": r".*layers\.[12]\..*proj"}),
    "mistral": ({"family": "mistral", **SHALLOW}, {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}),
    "seed_oss": ({"family": "seed_oss", **SHALLOW}, {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}),
    "smollm3": ({"family": "smollm3", "tied": True, **SHALLOW}, {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}),
    "deepseek_v3": (
        {"family": "deepseek_v3", **SHALLOW},
        {"r": 4, "lora_alpha": 8, "target_modules": ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]},
    ),
}
# Adapters of layers that have one where they are named.
NAMED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "head": ({"family": "qwen2", **SHALLOW}, {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "lm_head"]}),
    "embedding": ({"family": "llama", **SHALLOW}, {"r": 4, "lora_alpha": 8, "target_modules": ["embed_tokens", "v_proj"]}),
    "both": ({"family": "qwen3", **SHALLOW}, {"r": 3, "lora_alpha": 6, "use_rslora": True, "target_modules": ["embed_tokens", "lm_head"]}),
    "router": (
        {"family": "qwen3_moe", **SHALLOW},
        {"r": 4, "lora_alpha": 8, "target_modules": ["o_proj"], "target_parameters": ["mlp.gate.weight"]},
    ),
    "sigmoid router": (
        {"family": "glm4_moe", **SHALLOW},
        {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "embed_tokens"], "target_parameters": ["mlp.gate.weight"]},
    ),
}
EXPERTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "mixtral": ({"family": "mixtral", **SHALLOW}, {"r": 4, "lora_alpha": 8}),
    "qwen2_moe": ({"family": "qwen2_moe", **SHALLOW, "mlp_only_layers": [0]}, {"r": 4, "lora_alpha": 8}),
    "qwen3_moe": (
        {"family": "qwen3_moe", "tied": True, **SHALLOW, "mlp_only_layers": [1]},
        {"r": 2, "lora_alpha": 8, "target_modules": ["gate_proj", "down_proj", "q_proj"]},
    ),
    # The first layer is dense, the second has a shared MLP beside its experts.
    "glm4_moe": ({"family": "glm4_moe", **SHALLOW}, {"r": 4, "lora_alpha": 8}),
    "deepseek_v3": ({"family": "deepseek_v3", **SHALLOW}, {"r": 4, "lora_alpha": 8}),
    "moonlight": ({"family": "moonlight", **SHALLOW}, {"r": 4, "lora_alpha": 8, "use_rslora": True}),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, dict[str, Any]]:
    root = tmp_path_factory.mktemp("models")
    return {name: _peft_expectations(root / name, base, spec) for name, (base, spec) in DENSE.items()}


@pytest.fixture(scope="module")
def named(tmp_path_factory) -> dict[str, dict[str, Any]]:
    root = tmp_path_factory.mktemp("named")
    return {name: _peft_expectations(root / name, base, spec) for name, (base, spec) in NAMED.items()}


# Adapters of a tower and its mergers, beside some of the language model.
VISION: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2_5_vl": (
        "qwen2_5_vl",
        {"r": 4, "lora_alpha": 8, "target_modules": ["qkv", "down_proj", "merger.mlp.0", "q_proj", "embed_tokens", "lm_head"]},
    ),
    "qwen3_vl": (
        "qwen3_vl",
        {"r": 4, "lora_alpha": 8, "target_modules": r".*(visual.*(qkv|attn.proj|linear_fc[12])|layers\.1\..*up_proj|embed_tokens)"},
    ),
}


@pytest.fixture(scope="module")
def moe_models(tmp_path_factory) -> dict[str, dict[str, Any]]:
    root = tmp_path_factory.mktemp("moe")
    return {name: expectations_without_peft(root / name, base, spec) for name, (base, spec) in EXPERTS.items()}


def _case(
    model: str, cut: list[int], *, sp: bool = False, ddp: dict | None = None, precision: str = "fp32", **topology: int
) -> dict[str, Any]:
    return {
        "model": model, "topology": topology, "cut": cut, "ddp": ddp or {}, "overrides": {"sequence_parallel": sp}, "precision": precision,
    }  # fmt: skip


RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


def test_one_rank_trains_as_peft(models, tmp_path):
    cases = [
        _case("llama", [8]),
        {**_case("qwen2", [3, 5]), "overrides": RECOMPUTE},
        _case("qwen3", [8], ddp=DISTRIBUTED),
        _case("glm4", [8]),
    ]
    _train(1, cases, models, tmp_path)


def test_two_ranks_train_as_peft(models, tmp_path):
    cases = [
        _case("llama", [8], tp_size=2),
        _case("qwen2", [8], tp_size=2, sp=True),
        _case("qwen3", [3, 5], tp_size=2, sp=True, ddp=DISTRIBUTED),  # one key-value head on two ranks
        _case("qwen2", [2, 6], pp_size=2),
        _case("llama", [3, 3, 2], pp_size=2, vpp_size=2, ddp=DISTRIBUTED),
        _case("qwen3", [2, 2], dp_size=2, ddp=OVERLAPPED),
        _case("glm4", [2, 6], pp_size=2),
        _case("glm4", [8], tp_size=2, sp=True),
        _case("deepseek_v3", [8], tp_size=2, sp=True),
        _case("mistral", [8], tp_size=2),
        _case("seed_oss", [8], tp_size=2, sp=True),
        _case("smollm3", [2, 6], pp_size=2),
    ]
    _train(2, cases, models, tmp_path)


def test_four_ranks_train_as_peft(models, tmp_path):
    cases = [
        _case("llama", [4, 4], tp_size=2, pp_size=2, sp=True),
        _case("qwen2", [2, 2], tp_size=2, dp_size=2, sp=True, ddp=OVERLAPPED),
    ]
    _train(4, cases, models, tmp_path)


def test_what_is_named_trains_as_peft(named, tmp_path):
    """Over a vocabulary that tensor ranks pad, and a head that scores a few positions at a time."""
    _train(1, [{**_case("head", [8]), "chunk_tokens": 50}, _case("router", [8])], named, tmp_path)
    cases = [
        _case("head", [8], tp_size=2),
        {**_case("head", [3, 5], tp_size=2, sp=True, ddp=DISTRIBUTED), "chunk_tokens": 30},
        _case("head", [2, 6], pp_size=2),
        _case("both", [2, 2], dp_size=2, ddp=OVERLAPPED),
        _case("embedding", [8], tp_size=2),
        _case("embedding", [3, 5], tp_size=2, sp=True, ddp=DISTRIBUTED),
        {**_case("both", [8], tp_size=2, sp=True), "overrides": {**RECOMPUTE, "sequence_parallel": True}},
        {**_case("both", [2, 6], pp_size=2), "chunk_tokens": 30},
        _case("router", [3, 5], tp_size=2, sp=True, ddp=DISTRIBUTED),
        _case("router", [4], dp_size=2, ep_size=2, ddp=OVERLAPPED),
        _case("sigmoid router", [8], tp_size=2, ep_size=2, sp=True),
    ]
    _train(2, cases, named, tmp_path)
    import peft

    for name, (base, _) in NAMED.items():
        # Of the first case of each, under TP 2.
        folder = next(tmp_path / f"2-{number}" for number, case in enumerate(cases) if case["model"] == name)
        peft.PeftModel.from_pretrained(tiny_model(seed=3, **base), folder).merge_and_unload().save_pretrained(tmp_path / name)
        loaded, wanted = load_file(tmp_path / name / "model.safetensors"), load_file(named[name]["merged"])
        assert max((loaded[key] - tensor).abs().max().item() for key, tensor in wanted.items()) < 1e-4


def test_adapters_of_experts_train_as_those_of_each_expert_by_itself(moe_models, tmp_path):
    """Under EP, ETP and both, with and without sequence parallelism: an adapter's output is in the state of its base's."""
    cases = [
        _case("qwen3_moe", [4], dp_size=2, ep_size=2, ddp=DISTRIBUTED),
        _case("qwen3_moe", [4, 4], tp_size=2, ep_size=2, sp=True),
        _case("qwen2_moe", [4, 4], tp_size=2, etp_size=2, sp=True),
        _case("mixtral", [8], tp_size=2, etp_size=2, sp=True, ddp=DISTRIBUTED),
        _case("mixtral", [8], tp_size=2, sp=True),  # experts whole on both ranks, which see other tokens
        _case("qwen2_moe", [2, 6], pp_size=2),
        _case("glm4_moe", [4], dp_size=2, ep_size=2, ddp=DISTRIBUTED),
        _case("deepseek_v3", [8], tp_size=2, etp_size=2, sp=True),
        _case("moonlight", [8], tp_size=2, ep_size=2, sp=True),
    ]
    _train(2, cases, moe_models, tmp_path)
    cases = [
        _case("qwen3_moe", [4], tp_size=2, dp_size=2, ep_size=2, etp_size=2, sp=True, ddp=DISTRIBUTED),
        _case("mixtral", [8], tp_size=4, ep_size=2, etp_size=2, sp=True),
    ]
    _train(4, cases, moe_models, tmp_path)


def test_adapters_of_a_tower_and_its_mergers_train_as_peft(tmp_path):
    """Every tensor rank has them whole; one replica's microbatches have no pictures."""
    known = {name: _vision_expectations(tmp_path / name, family, spec) for name, (family, spec) in VISION.items()}
    cases = [
        _case("qwen3_vl", [2, 2], tp_size=2, sp=True),
        _case("qwen2_5_vl", [1, 3], pp_size=2, ddp=DISTRIBUTED),
        {**_case("qwen3_vl", [1, 1], dp_size=2, ddp=OVERLAPPED), "overrides": RECOMPUTE},
    ]
    _train(2, cases, known, tmp_path)


def test_initial_values_do_not_depend_on_the_layout(models, moe_models, named, tmp_path):
    dense = [
        _case("llama", [8], tp_size=2),
        _case("llama", [8], pp_size=2, vpp_size=2),
        _case("qwen3_moe", [8], tp_size=2, etp_size=2, sp=True),
        _case("both", [8], tp_size=2, sp=True),
    ]
    known = models | moe_models | named
    run_ranks(2, RANKS, "draw_alike", cases=dense, models=known, out_dir=str(tmp_path))
    alone = [_case(model, [8]) for model in ("llama", "qwen3_moe", "both")]
    run_ranks(1, RANKS, "draw_alike", cases=alone, models=known, out_dir=str(tmp_path))
    for model in ("llama", "qwen3_moe", "both"):
        first, *others = [torch.load(path) for path in sorted(tmp_path.glob(f"{model}-*.pt"))]
        assert others
        assert all(torch.equal(first[name], other[name]) for other in others for name in first)
        assert all((tensor == 0).all() == name.endswith(("lora_B.weight", "lora_embedding_A")) for name, tensor in first.items())
        assert all(abs(tensor.std() - 1) < 0.2 for name, tensor in first.items() if name.endswith("lora_embedding_B"))


def test_dropout_is_alike_where_factors_are(models, moe_models, named):
    cases = [
        _case("llama", [8], tp_size=2),
        _case("llama", [8], tp_size=2, sp=True),
        _case("qwen3_moe", [4, 4], tp_size=2, ep_size=2, sp=True),
        _case("mixtral", [8], tp_size=2, etp_size=2, sp=True),
        _case("llama", [4], dp_size=2),
        _case("both", [8], tp_size=2),
        _case("both", [8], tp_size=2, sp=True),
    ]
    outputs = run_ranks(2, RANKS, "drop_alike", cases=cases, models=models | moe_models | named)
    assert outputs[0].count("DROPPED") == len(cases)


def test_checkpoints_hold_adapters_alone_and_resume_bit_for_bit(models, moe_models, named, tmp_path):
    cases = [
        _case("llama", [4], dp_size=2, ddp=OVERLAPPED, precision="bf16"),
        _case("qwen2", [8], tp_size=2, sp=True),
        _case("qwen3_moe", [4], dp_size=2, ep_size=2, ddp=DISTRIBUTED),
        _case("both", [8], tp_size=2, sp=True),
    ]
    outputs = run_ranks(2, RANKS, "resume_bitwise", cases=cases, models=models | moe_models | named, root=str(tmp_path))
    assert outputs[0].count("RESUMED") == len(cases)


def test_another_layout_goes_on_with_adapters_and_their_optimizer_and_back_bit_for_bit(tmp_path):
    """Packed projections of which some have adapters, experts, embedding and head, and stages that have no adapter at all."""
    adapted = {name: (DENSE | EXPERTS | NAMED)[name] for name in ("qwen2", "qwen3_moe", "both", "glm4")}
    adapted["last layer"] = adapted["glm4"][0], {**adapted.pop("glm4")[1], "target_modules": r".*layers\.3\..*proj"}
    models = {}
    for name, (base, spec) in adapted.items():
        folder = save_tiny_model(tmp_path / name, seed=3, **base)
        batch = {what: tensor.tolist() for what, tensor in _batch().items()}
        models[name] = {"folder": str(folder), "spec": spec, "optimizer": OPTIMIZER, "batch": batch}
    moves = [
        (_case("qwen2", [8], tp_size=2, sp=True, ddp=DISTRIBUTED), _case("qwen2", [4], dp_size=2, ddp=OVERLAPPED)),
        (
            _case("qwen3_moe", [4], dp_size=2, ep_size=2, ddp=DISTRIBUTED),
            _case("qwen3_moe", [8], tp_size=2, etp_size=2, sp=True, ddp=DISTRIBUTED),
        ),
        (_case("both", [8], tp_size=2, ddp=DISTRIBUTED), _case("both", [8], pp_size=2, ddp=DISTRIBUTED)),
        (_case("last layer", [8], pp_size=2, ddp=DISTRIBUTED), _case("last layer", [8], tp_size=2, ddp=DISTRIBUTED)),
        (_case("last layer", [4], dp_size=2, ddp=DISTRIBUTED), _case("last layer", [8], pp_size=2, ddp=DISTRIBUTED)),
    ]
    cases = [{"then": then, "now": now} for then, now in moves]
    outputs = run_ranks(2, RANKS, "resume_elsewhere", cases=cases, models=models, root=str(tmp_path))
    assert outputs[0].count("MOVED") == len(cases)


def test_peft_loads_what_was_saved(models, tmp_path):
    """The folder of a Megatron run under TP 2 gives PEFT the adapters that PEFT has trained itself."""
    _train(2, [_case("qwen3", [8], tp_size=2)], models, tmp_path)
    base, _ = DENSE["qwen3"]
    import peft

    loaded = peft.PeftModel.from_pretrained(tiny_model(seed=3, **base), tmp_path / "2-0").merge_and_unload()
    wanted = load_file(models["qwen3"]["merged"])
    found = loaded.state_dict()
    assert max((found[name] - tensor).abs().max().item() for name, tensor in wanted.items()) < 1e-4


@pytest.mark.parametrize(
    ("family", "targets", "left_out"),
    [
        ("mixtral", "all-linear", None),
        ("deepseek_v3", r".*(q_b_proj|mlp\.experts\..*)", None),
        ("glm4_moe", "all-linear", r".*(layers\.0\.mlp|shared_experts)\..*"),
        ("qwen2_moe", "all-linear", r".*mlp\.experts\..*"),
    ],
)
def test_peft_reads_the_adapters_of_experts_that_are_saved_but_for_what_it_leaves_out(tmp_path, family, targets, left_out):
    """It stacks those of experts itself, and says nothing of what it drops: docs/lora.md names it."""
    import peft

    save_tiny_model(tmp_path, family)
    model, spec = model_of(json.loads((tmp_path / "config.json").read_text())), LoraSpec(4, 8, target_modules=targets)
    adapters = adapters_of(model, spec)
    factors = {tensor.name: torch.nn.Parameter(torch.zeros(tensor.shape)) for tensor in adapters.tensors(model, "float32")}
    _fill(factors)
    (tmp_path / "adapter").mkdir()
    save_file({PREFIX + name: factor.detach() for name, factor in factors.items()}, tmp_path / "adapter" / "adapter_model.safetensors")
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(adapter_config(adapters, str(tmp_path))))
    peft.PeftModel.from_pretrained(tiny_model(family), tmp_path / "adapter").merge_and_unload().save_pretrained(tmp_path / "merged")
    base, found = load_file(tmp_path / "model.safetensors"), load_file(tmp_path / "merged" / "model.safetensors")
    for module in adapters.modules:
        wanted = base[f"{module}.weight"]
        if left_out is None or not re.fullmatch(left_out, module):
            wanted = wanted + spec.scaling * factors[f"{module}.lora_B.weight"].detach() @ factors[f"{module}.lora_A.weight"].detach()
        assert (found[f"{module}.weight"] - wanted).abs().max() < 1e-6, module


@pytest.mark.parametrize("parameters", [("gate_up_proj", "down_proj"), ("down_proj",)])
def test_adapters_of_stacked_experts_are_read_as_pefts(tmp_path, parameters):
    import peft

    save_tiny_model(tmp_path, "qwen3_moe", seed=3)
    targets = {"target_modules": ["q_proj"], "target_parameters": [f"mlp.experts.{name}" for name in parameters]}
    model = peft.get_peft_model(tiny_model("qwen3_moe", seed=3), peft.LoraConfig(r=4, lora_alpha=8, **targets))
    _fill({name: p for name, p in model.named_parameters() if p.requires_grad})
    model.save_pretrained(tmp_path / "adapter")
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    names = {"gate_up_proj": "gate_proj|up_proj", "down_proj": "down_proj"}
    expected = {
        "folder": str(tmp_path), "adapter": str(tmp_path / "adapter"), "merged": str(tmp_path / "merged" / "model.safetensors"),
        "spec": {"r": 4, "lora_alpha": 8, "target_modules": rf".*(q_proj|experts\.\d+\.({'|'.join(names[p] for p in parameters)}))"},
        "optimizer": OPTIMIZER,
    }  # fmt: skip
    outputs = run_ranks(2, RANKS, "load_stacked", case=_case("qwen3_moe", [4], dp_size=2, ep_size=2), expected=expected)
    assert "LOADED" in outputs[0]


def test_foreign_adapters_and_checkpoints_without_any_are_refused(models, named, tmp_path):
    origin = Path(models["llama"]["adapter"])
    changes = {
        "use_dora": ({"use_dora": True}, "ConfigError: use_dora is True"),
        "modules_to_save": ({"modules_to_save": ["lm_head"]}, "ConfigError: modules_to_save is ['lm_head']"),
        "rank": ({"r": 8}, "ConfigError: r 8 there, 4 here"),
        "kind": ({"peft_type": "IA3"}, "ConfigError: peft_type is 'IA3'"),
    }
    foreign = {}
    for name, (change, told) in changes.items():
        folder = shutil.copytree(origin, tmp_path / name)
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps({**config, **change}))
        foreign[str(folder)] = told
    for name, drop, told in (
        ("missing", True, "PlacementError: missing 1 tensors: "),
        ("unexpected", False, "PlacementError: unexpected 1 tensors: lm_head"),
    ):
        folder = shutil.copytree(origin, tmp_path / name)
        tensors = load_file(folder / "adapter_model.safetensors")
        if drop:
            tensors.pop(next(iter(tensors)))
        else:
            tensors[f"{PREFIX}lm_head.lora_A.weight"] = torch.zeros(4, 96)
        save_file(tensors, folder / "adapter_model.safetensors")
        foreign[str(folder)] = told
    (tmp_path / "empty").mkdir()
    foreign[str(tmp_path / "empty")] = "CheckpointError: adapter_config.json cannot be read"
    run_ranks(1, RANKS, "refuse", models={"llama": models["llama"]}, foreign=foreign, root=str(tmp_path / "saved"))
    folder = shutil.copytree(named["head"]["adapter"], tmp_path / "other base")
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors[f"{PREFIX}lm_head.base_layer.weight"][-1, -1] += 0.01
    save_file(tensors, folder / "adapter_model.safetensors")
    foreign = {str(folder): "ConfigError: holds another lm_head.weight beside its adapters"}
    run_ranks(1, RANKS, "refuse", models={"head": named["head"]}, foreign=foreign, root=str(tmp_path / "saved"))


def _train(world_size: int, cases: list[dict], models: dict, out_dir: Path) -> None:
    outputs = run_ranks(world_size, RANKS, "train_as_reference", cases=cases, models=models, out_dir=str(out_dir))
    assert outputs[0].count("TRAINED") == len(cases), outputs[0]


def _peft_expectations(folder: Path, base: dict[str, Any], spec: dict[str, Any]) -> dict[str, Any]:
    """A saved model and adapter, and what PEFT and torch's AdamW make of it in ten steps."""
    import peft

    save_tiny_model(folder, seed=3, **base)
    model = peft.get_peft_model(tiny_model(seed=3, **base), peft.LoraConfig(task_type="CAUSAL_LM", **spec)).train()
    factors = {name: p for name, p in model.named_parameters() if p.requires_grad}
    _fill(factors)
    model.save_pretrained(folder / "adapter")
    expected = _trained(factors, lambda tokens: model(tokens).logits, folder, spec)
    save_file(
        {name.replace(".default", "").removeprefix(PREFIX): p.detach().contiguous() for name, p in factors.items()},
        folder / "trained" / "adapter.safetensors",
    )
    model.merge_and_unload().save_pretrained(folder / "merged")
    return expected


def expectations_without_peft(folder: Path, base: dict[str, Any], spec: dict[str, Any]) -> dict[str, Any]:
    """The same where PEFT is not installed, or has no adapters for each projection of an expert: products of factors are added to the
    weights that transformers uses."""
    save_tiny_model(folder, seed=3, **base)
    model = tiny_model(seed=3, **base).train()
    own = LoraSpec(**{name: tuple(value) if isinstance(value, list) else value for name, value in spec.items()})
    table = model_of(json.loads((folder / "config.json").read_text()))
    adapters = adapters_of(table, own)
    factors = {t.name: torch.nn.Parameter(torch.zeros(t.shape)) for t in adapters.tensors(table, "float32")}
    _fill(factors)
    (folder / "adapter").mkdir()
    save_file({PREFIX + name: p.detach().clone() for name, p in factors.items()}, folder / "adapter" / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": own.r,
        "lora_alpha": own.lora_alpha,
        "use_rslora": own.use_rslora,
        "target_modules": sorted(adapters.modules),
    }
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    weights = dict(model.named_parameters())

    def merged() -> dict[str, torch.Tensor]:
        def delta(module: str) -> torch.Tensor | None:
            a = factors.get(f"{module}.lora_A.weight")
            if (rows := factors.get(f"{module}.lora_embedding_A")) is not None:
                return own.scaling * (factors[f"{module}.lora_embedding_B"] @ rows).t()
            return None if a is None else own.scaling * factors[f"{module}.lora_B.weight"] @ a

        found = {}
        for name, weight in weights.items():
            module = name.removesuffix(".weight")
            if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
                root, _, kind = name.rpartition(".")
                block = root.replace(".mlp.experts", ".block_sparse_moe.experts") if table.family.model_type == "mixtral" else root
                names = {"mixtral": {"gate_up_proj": ("w1", "w3"), "down_proj": ("w2",)}}.get(
                    table.family.model_type, {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
                )[kind]
                rows = weight.shape[1] // len(names)
                found[name] = weight.detach() + torch.stack([
                    torch.cat([d if (d := delta(f"{block}.{e}.{n}")) is not None else torch.zeros(rows, weight.shape[2]) for n in names])
                    for e in range(weight.shape[0])
                ])  # fmt: skip
            elif (d := delta(module)) is not None:
                found[name] = weight.detach() + d
            else:
                found[name] = weight.detach()
        return found

    expected = _trained(factors, lambda tokens: torch.func.functional_call(model, merged(), (tokens,)).logits, folder, spec)
    save_file({name: p.detach().clone() for name, p in factors.items()}, folder / "trained" / "adapter.safetensors")
    with torch.no_grad():
        for name, tensor in merged().items():
            weights[name].copy_(tensor)
    model.save_pretrained(folder / "merged")
    return expected


def _vision_expectations(folder: Path, family: str, spec: dict[str, Any]) -> dict[str, Any]:
    """As ``_peft_expectations``, of rows of which some have pictures."""
    import peft

    save_tiny_vision_model(folder, family, seed=3)
    model = peft.get_peft_model(tiny_vision_model(family, seed=3), peft.LoraConfig(**spec)).train()
    factors = {name: p for name, p in model.named_parameters() if p.requires_grad}
    _fill(factors)
    model.save_pretrained(folder / "adapter")
    layouts: list[list[int | tuple[int, int]]] = [[4, (56, 56), 6], [9], [2, (28, 84), 5], [13]]
    rows = [row(model.config, parts, seed=i) for i, parts in enumerate(layouts)]
    for found in rows:
        found["weights"] = (torch.arange(len(found["tokens"])) >= 1) / 50.0
    torch.save({"rows": rows}, folder / "rows.pt")
    tokens = torch.nn.utils.rnn.pad_sequence([found["tokens"] for found in rows], batch_first=True)
    weights = torch.nn.utils.rnn.pad_sequence([found["weights"] for found in rows], batch_first=True)
    expected = _trained(
        factors,
        lambda _: model(**hf_inputs([{k: v for k, v in r.items() if k != "weights"} for r in rows])).logits,
        folder,
        spec,
        {"tokens": tokens, "weights": weights},
    )
    save_file(
        {name.replace(".default", "").removeprefix(PREFIX): p.detach().contiguous() for name, p in factors.items()},
        folder / "trained" / "adapter.safetensors",
    )
    (folder / "merged").mkdir()
    save_file({name: p.contiguous() for name, p in model.merge_and_unload().state_dict().items()}, folder / "merged" / "model.safetensors")
    return {**expected, "batch": str(folder / "rows.pt")}


def _fill(factors: dict[str, torch.nn.Parameter]) -> None:
    """Values for both factors, so that both have gradients from the first step on."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for _, factor in sorted(factors.items()):
            factor.copy_(torch.randn(factor.shape, generator=generator) * 0.05)


def _trained(
    factors: dict[str, torch.nn.Parameter], logits: Any, folder: Path, spec: dict[str, Any], batch: dict[str, torch.Tensor] | None = None
) -> dict[str, Any]:
    batch = _batch() if batch is None else batch
    (folder / "trained").mkdir()
    adam = torch.optim.AdamW(
        factors.values(), lr=OPTIMIZER["lr"], eps=OPTIMIZER["adam_eps"], betas=(0.9, OPTIMIZER["adam_beta2"]),
        weight_decay=OPTIMIZER["weight_decay"],
    )  # fmt: skip
    losses, norms = [], []
    for _ in range(STEPS):
        distribution = logits(batch["tokens"]).float().log_softmax(dim=-1)
        now = torch.nn.functional.pad(distribution[:, :-1].gather(-1, batch["tokens"][:, 1:, None])[..., 0], (1, 0))
        spread = torch.nn.functional.pad(-(distribution.exp() * distribution).sum(dim=-1)[:, :-1], (1, 0))
        value = -(now * batch["weights"]).sum() - 0.1 * (spread * batch["weights"].abs()).sum()
        adam.zero_grad()
        value.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(factors.values(), OPTIMIZER["clip_grad"]).item())
        adam.step()
        losses.append(value.item())
    return {
        "folder": str(folder), "adapter": str(folder / "adapter"), "trained": str(folder / "trained" / "adapter.safetensors"),
        "merged": str(folder / "merged" / "model.safetensors"), "optimizer": OPTIMIZER, "losses": losses, "grad_norms": norms,
        "batch": {name: tensor.tolist() for name, tensor in batch.items()},
        "spec": {name: tuple(value) if isinstance(value, list) else value for name, value in spec.items()},
    }  # fmt: skip


def _batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(11)
    tokens = torch.randint(1, VOCAB_SIZE, (8, 24), generator=generator)
    weights = torch.randn(8, 1, generator=generator) * (torch.arange(24) >= 3) / 168
    return {"tokens": tokens, "weights": weights}


def test_initial_factors_are_distributed_as_pefts():
    import peft

    for init in (True, "gaussian"):
        layer = peft.get_peft_model(tiny_model("llama"), peft.LoraConfig(r=16, init_lora_weights=init, target_modules=["down_proj"]))
        drawn = torch.cat([p.detach().flatten() for name, p in layer.named_parameters() if "lora_A" in name])
        spec = LoraSpec(r=16, lora_alpha=16, init="kaiming" if init is True else init)
        own = torch.cat([initial_factor(spec, f"layer {number}", (16, 160)).flatten() for number in range(4)])
        assert own.shape == drawn.shape
        assert abs(own.std() / drawn.std() - 1) < 0.05
        assert abs(own.abs().max() / drawn.abs().max() - 1) < (0.01 if init is True else 0.5)
