"""The seam for what comes next: a made-up family whose experts, router buffer, vision tower and extra layer are rows, not code."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from rlsync.copy.cpu import bind, write_padding
from rlsync.errors import PlacementError
from rlsync.layout.geometry import Placement, whole_tensors
from rlsync.layout.topology import Topology
from rlsync.models import check_config, model_of, unread_keys
from rlsync.models.dense import ATTENTION, DENSE_STACKS, MLP, decoder_stacks, layer_stack
from rlsync.models.keys import renamed_keys
from rlsync.models.layouts import Column, Fused, GatedColumn, GroupedQKV, Replicated, Row
from rlsync.models.llama import LLAMA
from rlsync.models.placement import held_parameters, indivisible, megatron_placements
from rlsync.models.rope import Rope
from rlsync.models.stacks import Family, HFTensor, Index, Model, Rule, Stack, renamed
from rlsync.plan.planner import build_plan

EMBEDDING, _, HEAD = DENSE_STACKS
LAYER = Index("layer", "num_layers", "pp")
EXPERT = Index("expert", "num_experts", "ep")
DECODER = {"megatron": "decoder.layers.{layer}.", "hf": "model.layers.{layer}."}


def is_dense(model: Model, layer: int) -> bool:
    return layer < model.values["first_k_dense_replace"]


def has_experts(model: Model, layer: int) -> bool:
    return not is_dense(model, layer)


def attention(prefix: str = "self_attention.") -> tuple[Rule, ...]:
    qkv = tuple(HFTensor(f"self_attn.{x}_proj.weight", rows, "hidden") for x, rows in (("q", "q"), ("k", "kv"), ("v", "kv")))
    return (
        Rule(
            "input_layernorm.weight",
            (HFTensor("input_layernorm.weight", "hidden"),),
            Replicated(),
            te=f"{prefix}linear_qkv.layer_norm_weight",
        ),
        Rule(f"{prefix}linear_qkv.weight", qkv, GroupedQKV()),
        Rule(f"{prefix}linear_proj.weight", (HFTensor("self_attn.o_proj.weight", "hidden", "q"),), Row()),
    )


def mlp(megatron: str, hf: str, ffn: str, number: str = "") -> tuple[Rule, ...]:
    gated = (HFTensor(f"{hf}gate_proj.weight", ffn, "hidden"), HFTensor(f"{hf}up_proj.weight", ffn, "hidden"))
    return (
        Rule(f"{megatron}linear_fc1.weight{number}", gated, GatedColumn()),
        Rule(f"{megatron}linear_fc2.weight{number}", (HFTensor(f"{hf}down_proj.weight", "hidden", ffn),), Row()),
    )


STACKS = (
    Stack(
        (Rule("qkv.weight", (HFTensor("qkv.weight", "vision", "vision"),), Column()),),
        megatron="vision_model.decoder.layers.{block}.",
        hf="visual.blocks.{block}.",
        indices=(Index("block", "num_blocks"),),
        stage="first",
    ),
    EMBEDDING,
    Stack(attention(), indices=(LAYER,), **DECODER),
    Stack(mlp("mlp.", "mlp.", "ffn"), indices=(LAYER,), has_layer=is_dense, **DECODER),
    Stack(
        (Rule("mlp.router.weight", (HFTensor("mlp.gate.weight", "num_experts", "hidden"),), Replicated()),),
        indices=(LAYER,),
        has_layer=has_experts,
        **DECODER,
    ),
    Stack(
        (Rule("mlp.router.expert_bias", (HFTensor("mlp.gate.e_score_correction_bias", "num_experts"),), Replicated()),),
        indices=(LAYER,),
        has_layer=has_experts,
        dtype="float32",
        **DECODER,
    ),
    Stack(
        mlp("mlp.experts.", "mlp.experts.{expert}.", "expert_ffn", "{expert}"),
        indices=(LAYER, EXPERT),
        tensor_axis="etp",
        has_layer=has_experts,
        **DECODER,
    ),
    HEAD,
    Stack(
        (
            Rule("eh_proj.weight", (HFTensor("eh_proj.weight", "hidden", "hidden"),), Column()),
            *attention("transformer_layer.self_attention."),
        ),
        megatron="mtp.layers.{depth}.",
        hf="mtp.{depth}.",
        indices=(Index("depth", "num_depths"),),
        stage="last",
    ),
)  # fmt: skip
FAMILY = dataclasses.replace(LLAMA, architectures=("MadeUpForCausalLM",), model_type="made_up", stacks=STACKS)


def made_up(**dims: int) -> Model:
    sizes = {
        "hidden": 16, "vocab": 37, "ffn": 24, "expert_ffn": 8, "vision": 12, "q": 16, "kv": 8, "num_heads": 4, "num_groups": 2,
        "head_dim": 4, "num_layers": 4, "num_experts": 8, "num_blocks": 3, "num_depths": 1, **dims,
    }  # fmt: skip
    return Model(
        family=FAMILY, architecture="MadeUpForCausalLM", values={"first_k_dense_replace": 1}, dims=sizes, features=frozenset({"untied"}),
        dtype="bfloat16", max_positions=64, rope=Rope(1e4), transformer={},
    )  # fmt: skip


# Names of a released family's experts begin so in its two layers.
EXPERTS = tuple(f"decoder.layers.{layer}.mlp.experts." for layer in range(2))


def made_up_qwen() -> Model:
    config = {
        "architectures": ["Qwen3MoeForCausalLM"], "vocab_size": 37, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4, "num_experts": 6, "num_experts_per_tok": 2,
        "moe_intermediate_size": 10, "norm_topk_prob": True,
    }  # fmt: skip
    return model_of(config)


def numbers_on(topology: Topology, rank: int, held: int) -> range:
    first = topology.coordinates(rank).ep_rank * held
    return range(first, first + held)


TOPOLOGIES: list[dict[str, Any]] = [
    {},
    {"tp_size": 2},
    {"dp_size": 4, "ep_size": 4},
    {"tp_size": 2, "dp_size": 2, "ep_size": 2, "etp_size": 2},
    {"tp_size": 4, "dp_size": 2, "ep_size": 8},
    {"tp_size": 2, "dp_size": 2, "ep_size": 4, "pp_size": 2},
    {"tp_size": 2, "pp_size": 2, "vpp_size": 2, "ep_size": 2},
    {"tp_size": 2, "dp_size": 2, "cp_size": 2, "ep_size": 2, "etp_size": 4, "pp_size": 4},
    {"pp_size": 2, "first_stage_layers": 1, "last_stage_layers": 3},
]


def random_tensors(model: Model) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {t.name: torch.randn(t.shape, generator=generator).to(getattr(torch, t.dtype)) for t in model.tensors()}


def loaded(model: Model, ranks: Sequence[Placement], original: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """The buffers of every rank, by a plan that fills all of them, bit for bit, from whole tensors."""
    shards = [{b.name: torch.full(b.shape, float("nan"), dtype=getattr(torch, b.dtype)) for b in rank.buffers} for rank in ranks]
    for bucket in build_plan(model.tensors(), [whole_tensors("file", model.tensors())], ranks).buckets:
        for copy in bucket.copies:
            bind([copy], original, shards[copy.destination]).run()
    for rank, buffers in zip(ranks, shards, strict=True):
        write_padding(rank.padding, buffers)
        assert not any(tensor.isnan().any() for tensor in buffers.values())
    return shards


@pytest.mark.parametrize("axes", TOPOLOGIES, ids=str)
@pytest.mark.parametrize("flavour", ["local", "te"])
def test_every_rank_gets_its_share_and_the_whole_comes_back(axes, flavour):
    """Planned both ways, which proves that placements are complete, and copied both ways, bit for bit."""
    model, topology = made_up(), Topology(**axes)
    assert indivisible(model, topology) == []
    tensors, ranks = model.tensors(), megatron_placements(model, topology, flavour=flavour)
    whole = whole_tensors("file", tensors)
    original = random_tensors(model)
    shards = loaded(model, ranks, original)
    saved = {t.name: torch.full(t.shape, float("nan"), dtype=getattr(torch, t.dtype)) for t in tensors}
    for bucket in build_plan(tensors, ranks, [whole]).buckets:
        for copy in bucket.copies:
            bind([copy], shards[copy.source], saved).run()
    assert all(torch.equal(saved[name], original[name]) for name in original)


@pytest.mark.parametrize("axes", [{"dp_size": 2, "ep_size": 2}, {"tp_size": 2, "dp_size": 2, "ep_size": 2, "etp_size": 2}], ids=str)
def test_every_module_of_experts_has_the_same_boxes(axes):
    """Under other names, and in GroupedMLP each matrix transposed, in a block with those of the rank's other experts."""
    model, topology, hidden = made_up_qwen(), Topology(**axes), 16
    original = random_tensors(model)
    forms: dict[str, list[dict[str, torch.Tensor]]] = {}
    boxes: dict[str, list[set]] = {}
    for experts in ("SequentialMLP", "TEGroupedMLP", "GroupedMLP"):
        ranks = megatron_placements(model, topology, experts=experts)
        forms[experts] = loaded(model, ranks, original)
        boxes[experts] = [{(piece.tensor, piece.box) for piece in rank.pieces} for rank in ranks]
    assert boxes["SequentialMLP"] == boxes["TEGroupedMLP"] == boxes["GroupedMLP"]
    held = model.dims["num_experts"] // topology.ep_size
    for rank, (single, numbered, joined) in enumerate(zip(*forms.values(), strict=True)):
        assert [buffers.keys() - single.keys() for buffers in (numbered, joined)] == [
            {f"{layer}linear_fc{fc}.weight{number}" for layer in EXPERTS for fc in (1, 2) for number in numbers_on(topology, rank, held)},
            {f"{layer}weight{fc}" for layer in EXPERTS for fc in (1, 2)},
        ]
        for layer in EXPERTS:
            # As GroupedMLP.forward sees its parameters.
            fc1, fc2 = joined[f"{layer}weight1"].view(held, hidden, -1), joined[f"{layer}weight2"].view(held, -1, hidden)
            for block, number in enumerate(numbers_on(topology, rank, held)):
                for name, matrix in (("linear_fc1.weight", fc1[block].T), ("linear_fc2.weight", fc2[block].T)):
                    own = single[f"{layer}local_experts.{number}.{name}"]
                    assert torch.equal(own, matrix) and torch.equal(own, numbered[f"{layer}{name}{number}"])


def test_a_missing_expert_is_found_before_anything_moves():
    """Negative control: without the ranks of one expert block the proof fails by name."""
    model, topology = made_up(), Topology(dp_size=4, ep_size=4)
    ranks = megatron_placements(model, topology)
    with pytest.raises(PlacementError, match=r"model\.layers\.1\.mlp\.experts\.6\."):
        build_plan(model.tensors(), ranks[:3], [whole_tensors("file", model.tensors())])


def test_names_count_over_the_whole_model():
    model, topology = made_up(), Topology(tp_size=2, dp_size=2, ep_size=4, pp_size=2)
    names = [{bound.name("te"): bound.hf for bound in held_parameters(model, topology, rank)} for rank in range(topology.world_size)]
    at = topology.coordinates(6)
    assert (at.pp_rank, at.ep_rank, at.etp_rank) == (1, 2, 0)
    (gate, shape), (up, _) = names[6]["decoder.layers.3.mlp.experts.linear_fc1.weight5"]
    assert (gate, up, shape) == ("model.layers.3.mlp.experts.5.gate_proj.weight", "model.layers.3.mlp.experts.5.up_proj.weight", (8, 16))
    assert {name for name in names[6] if ".experts." in name and ".2." in name} == {
        f"decoder.layers.2.mlp.experts.linear_fc{fc}.weight{expert}" for fc in (1, 2) for expert in (4, 5)
    }
    assert "decoder.layers.0.self_attention.linear_qkv.layer_norm_weight" in names[0]
    assert "decoder.layers.0.mlp.linear_fc1.weight" in names[0] and "decoder.layers.1.mlp.linear_fc1.weight" not in names[0]
    assert [any(name.startswith("mtp.") for name in held) for held in names] == [False] * 4 + [True] * 4
    assert [any(name.startswith("vision_model.") for name in held) for held in names] == [True] * 4 + [False] * 4


def test_a_stack_has_a_dtype_of_its_own():
    model = made_up()
    (rank,) = megatron_placements(model, Topology())
    dtypes = {b.name: b.dtype for b in rank.buffers}
    assert dtypes["decoder.layers.2.mlp.router.expert_bias"] == "float32"
    assert {dtype for name, dtype in dtypes.items() if "expert_bias" not in name} == {"bfloat16"}
    assert {t.name: t.dtype for t in model.tensors("float16")}["model.layers.2.mlp.gate.e_score_correction_bias"] == "float32"


def test_tensors_come_layer_by_layer():
    layers = [t.name.split(".")[2] for t in made_up().tensors() if t.name.startswith("model.layers.")]
    assert layers == sorted(layers)


@pytest.mark.parametrize(
    ("dims", "axes", "said"),
    [
        ({"num_experts": 6}, {"dp_size": 4, "ep_size": 4}, "num_experts 6 cannot be divided by ep_size 4"),
        ({"expert_ffn": 9}, {"tp_size": 2, "etp_size": 2}, "etp_size 2 does not fit model.layers.1.mlp.experts.0.gate_proj.weight"),
        ({"ffn": 25}, {"tp_size": 2}, "tp_size 2 does not fit model.layers.0.mlp.gate_proj.weight"),
        ({"num_layers": 3}, {"pp_size": 2}, "3 layers cannot be split over pp_size 2"),
    ],
)
def test_what_an_axis_cannot_divide_is_said_by_name(dims, axes, said):
    model, topology = made_up(**dims), Topology(**axes)
    assert any(said in finding for finding in indivisible(model, topology)), indivisible(model, topology)


# A llama by other names, whose keys, values and queries are the rows of one tensor, in this order.
NAMES = {
    "model.embed_tokens": "stem.wte", "model.layers": "stem.blocks", "model": "stem", "input_layernorm": "norm_1",
    "post_attention_layernorm": "norm_2", "self_attn.kvq_proj": "mixer.kvq", "self_attn.o_proj": "mixer.out", "mlp.gate_proj": "ffn.w1",
    "mlp.up_proj": "ffn.w3", "mlp.down_proj": "ffn.w2",
}  # fmt: skip
KEYS = {"num_key_value_heads": "kv_heads", "intermediate_size": "ffn_size"}


def other_llama() -> Family:
    kvq = Rule(
        "self_attention.linear_qkv.weight",
        (HFTensor("self_attn.kvq_proj.weight", "kv + kv + q", "hidden"),),
        Fused(GroupedQKV(), ("q", "kv", "kv"), order=(1, 2, 0)),
    )
    layer = tuple(kvq if rule.megatron == kvq.megatron else rule for rule in ATTENTION + MLP)
    return dataclasses.replace(
        LLAMA,
        architectures=("OtherForCausalLM",),
        model_type="other",
        keys=renamed_keys(LLAMA.keys, KEYS),
        stacks=renamed(decoder_stacks(layer_stack(layer)), NAMES),
    )


LLAMA_CONFIG = {
    "architectures": ["LlamaForCausalLM"], "vocab_size": 37, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
OTHER_CONFIG = {KEYS.get(key, key): value for key, value in LLAMA_CONFIG.items()} | {"architectures": ["OtherForCausalLM"]}


@pytest.mark.parametrize("axes", [{}, {"tp_size": 2}, {"tp_size": 4}, {"tp_size": 2, "pp_size": 2}], ids=str)
def test_a_family_by_other_names_and_with_fused_tensors_is_a_table(monkeypatch, axes):
    """It fills ranks with the same bits as Llama. Negative control: rows in another order do not."""
    monkeypatch.setattr("rlsync.models.FAMILIES", (LLAMA, other_llama()))
    llama, other, topology = model_of(LLAMA_CONFIG), model_of(OTHER_CONFIG), Topology(**axes)
    assert other.values == llama.values and other.transformer == llama.transformer
    theirs, ours, in_llamas_order = random_tensors(llama), {}, {}
    for tensor in other.tensors():
        if tensor.name.endswith(".mixer.kvq.weight"):
            q, k, v = (
                theirs[tensor.name.replace("stem.blocks", "model.layers").replace("mixer.kvq", f"self_attn.{x}_proj")] for x in "qkv"
            )
            ours[tensor.name], in_llamas_order[tensor.name] = torch.cat([k, v, q]), torch.cat([q, k, v])
        else:
            name = tensor.name
            for before, after in NAMES.items():
                name = name.replace(f"{after}.", f"{before}.")
            ours[tensor.name] = in_llamas_order[tensor.name] = theirs[name]
    wanted = loaded(llama, megatron_placements(llama, topology), theirs)
    found, mistaken = (loaded(other, megatron_placements(other, topology), tensors) for tensors in (ours, in_llamas_order))
    for rank, buffers in enumerate(wanted):
        assert buffers.keys() == found[rank].keys()
        assert all(torch.equal(found[rank][name], tensor) for name, tensor in buffers.items())
    assert any(not torch.equal(mistaken[rank][name], tensor) for rank, buffers in enumerate(wanted) for name, tensor in buffers.items())


def test_what_is_wrong_with_renamed_keys_is_said_by_the_names_in_the_file(monkeypatch):
    monkeypatch.setattr("rlsync.models.FAMILIES", (other_llama(),))
    assert check_config({**OTHER_CONFIG, "kv_heads": 3}) == ["num_attention_heads 4 is not a multiple of kv_heads 3"]
    (finding,) = check_config({**OTHER_CONFIG, "ffn_size": "24"})
    assert finding.startswith('ffn_size is "24"; for OtherForCausalLM it must be a whole number')
    assert unread_keys({**OTHER_CONFIG, "intermediate_size": 24}) == ("intermediate_size",)


def test_a_slip_in_a_table_of_names_is_said():
    with pytest.raises(ValueError, match=r"no HF name of the stacks has self_attn\.out_proj between dots"):
        renamed(DENSE_STACKS, {"self_attn.out_proj": "mixer.out", "self_attn": "mixer"})
    with pytest.raises(ValueError, match="the table has no kv_heads"):
        renamed_keys(LLAMA.keys, {"kv_heads": "num_key_value_heads"})
    with pytest.raises(ValueError, match="two keys of the table would be called intermediate_size"):
        renamed_keys(LLAMA.keys, {"hidden_size": "intermediate_size"})
    with pytest.raises(ValueError, match=r"self_attn\.q_proj\.weight and .*self_attn\.k_proj\.weight would both be called"):
        renamed(DENSE_STACKS, {"q_proj": "k_proj"})


def test_keys_that_are_renamed_twice_keep_their_meaning():
    once = renamed_keys(LLAMA.keys, {"hidden_size": "width", "vocab_size": "words"})
    twice = renamed_keys(once, {"width": "d_model"})
    assert {name: key.meaning for name, key in twice.items() if key.meaning} == {"d_model": "hidden_size", "words": "vocab_size"}


def test_a_fused_tensor_has_the_rows_of_its_parts():
    with pytest.raises(PlacementError, match="ffn \\+ ffn are 48 rows, and the tensor has 40"):
        Fused(GatedColumn(), ("ffn", "ffn")).local([(40, 16)], 0, 2, {"ffn": 24})


def test_a_model_without_experts_takes_no_expert_axis():
    config = {
        "architectures": ["LlamaForCausalLM"], "vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }  # fmt: skip
    assert check_config(config, Topology(dp_size=2, ep_size=2)) == ["ep_size is 2; LlamaForCausalLM has no experts, so it must be 1"]
