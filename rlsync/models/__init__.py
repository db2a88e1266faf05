"""Model families, each stated once: what its config.json may hold, what Megatron is told, and which HF tensors make up its weights.

``check_config`` says everything that is wrong with a config.json, ``model_of`` reads one or raises all of that. Plain Python: imports
no torch, transformers or Megatron, so that whoever checks a run before it starts answers at once. A new family is one file here and
a test.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from rlsync.errors import ConfigError
from rlsync.layout.topology import Topology
from rlsync.models.deepseek_v3 import DEEPSEEK_V3
from rlsync.models.glm4 import GLM4
from rlsync.models.glm4_moe import GLM4_MOE
from rlsync.models.keys import HFConfig, joined, missing_for_engines, read_keys, read_section, shown, unread
from rlsync.models.llama import LLAMA
from rlsync.models.mistral import MISTRAL
from rlsync.models.mixtral import MIXTRAL
from rlsync.models.placement import indivisible
from rlsync.models.qwen2 import QWEN2
from rlsync.models.qwen2_5_vl import QWEN2_5_VL
from rlsync.models.qwen2_moe import QWEN2_MOE
from rlsync.models.qwen3 import QWEN3
from rlsync.models.qwen3_moe import QWEN3_MOE
from rlsync.models.qwen3_vl import QWEN3_VL
from rlsync.models.qwen3_vl_moe import QWEN3_VL_MOE
from rlsync.models.rope import ROPE_KEYS, Rope, misfit_of_rope, read_rope
from rlsync.models.seed_oss import SEED_OSS
from rlsync.models.smollm3 import SMOLLM3
from rlsync.models.stacks import FEATURE_FIELDS, PARTS, ExpertModule, Family, Flavour, Model, Part, Vision

FAMILIES: tuple[Family, ...] = (
    *(LLAMA, QWEN2, QWEN3, MISTRAL, SEED_OSS, SMOLLM3, GLM4),
    *(MIXTRAL, QWEN2_MOE, QWEN3_MOE, GLM4_MOE, DEEPSEEK_V3),
    *(QWEN2_5_VL, QWEN3_VL, QWEN3_VL_MOE),
)

__all__ = [
    "FAMILIES",
    "PARTS",
    "REFUSED_SWITCHES",
    "ExpertModule",
    "Family",
    "Flavour",
    "Model",
    "Part",
    "Vision",
    "check_config",
    "check_for_engines",
    "check_overrides",
    "check_parts",
    "family_of",
    "model_of",
    "supported_architectures",
    "unread_keys",
]


def supported_architectures() -> tuple[str, ...]:
    """Values of ``architectures[0]`` that a family exists for, sorted."""
    return tuple(sorted(name for family in FAMILIES for name in family.architectures))


def check_config(hf_config: Any, topology: Topology | None = None) -> list[str]:
    """Everything that keeps the model of a config.json from being trained as transformers computes it; empty where nothing does.

    Args:
        hf_config: content of config.json; anything that JSON can hold is answered by findings.
        topology: parallel layout that has to divide the model, or None.

    Returns:
        One sentence for each finding: the key, its value, what is supported instead.
    """
    return _read(hf_config, topology)[1]


def check_for_engines(hf_config: HFConfig) -> list[str]:
    """Everything that keeps vLLM from starting on the model of a config.json that :func:`check_config` finds nothing wrong with."""
    family = family_of(hf_config)
    findings = missing_for_engines(family.keys, hf_config)
    for section in family.sections:
        inner, where = section.of(hf_config)
        findings += missing_for_engines(section.keys, inner or {}, where)
    return findings


def model_of(hf_config: HFConfig, topology: Topology | None = None) -> Model:
    """The model of a config.json. Raises ConfigError with every finding of :func:`check_config`."""
    model, findings = _read(hf_config, topology)
    if findings or model is None:
        raise ConfigError(joined(findings, "config.json"))
    return model


def check_parts(model: Model, frozen: Mapping[str, Part], rates: Mapping[str, Part]) -> list[str]:
    """What is wrong with freezing parts of a model and with giving parts a learning rate of their own.

    Args:
        model: as read from its config.json.
        frozen: switches that are set, by the names that a user knows them by, and the part that each freezes.
        rates: the same of learning rates.
    """
    switches = ", ".join([*frozen, *rates])
    if model.vision is None:
        text = f"{switches}: {model.architecture} is a model of text, which is trained whole at one learning rate; leave it out here, "
        return [f"{text}it belongs into a run of a vision-language model"] if switches else []
    findings = []
    if set(frozen.values()) == set(PARTS):
        findings.append(f"{', '.join(frozen)} freeze all of {model.architecture}; leave out one of them, there is nothing to train")
    for name, part in rates.items():
        by = [switch for switch, frozen_part in frozen.items() if frozen_part == part]
        findings += [f"{name} is a learning rate of what {switch} freezes; leave out one of them" for switch in by]
    return findings


# Switches of Megatron's TransformerConfig that have no part in a training step here, whatever the model, and why.
REFUSED_SWITCHES: Mapping[str, str] = {
    "calculate_per_token_loss": "a loss is divided by what its caller counts, and Megatron would no longer undo its own divisions alike",
    "cross_entropy_loss_fusion": "log-probabilities, entropies and their gradients are computed together, without Megatron's cross entropy",
    "defer_embedding_wgrad_compute": "the gradient of the output layer is computed with those of log-probabilities",
    "tp_comm_overlap": "TransformerEngine's buffers for it take microbatches of one shape, which these have not",
}


def check_overrides(model: Model, overrides: Mapping[str, Any], topology: Topology) -> list[str]:
    """Switches of Megatron's TransformerConfig, by name, that would compute another model, or that this model would ignore, or that do
    not fit a layout."""
    findings = [f"{name} cannot be switched on: {why}; leave it out" for name, why in REFUSED_SWITCHES.items() if overrides.get(name)]
    if model.rope.mrope_interleaved and overrides.get("apply_rope_fusion"):
        findings.append(
            "apply_rope_fusion must be False for Qwen3 VL SFT, the Mrope answer is Error: fused kernels know no interleaved positions of "
            "three dimensions; leave it out or set it to False"
        )
    kind, groups = overrides.get("cp_comm_type"), max(1, model.dims.get("num_groups", model.dims["num_heads"]) // topology.tp_size)
    if topology.cp_size > 1 and kind not in (None, "p2p", "all_gather", "a2a"):
        findings.append(f"cp_comm_type is {kind!r}; use p2p, all_gather or a2a")
    elif topology.cp_size > 1 and kind == "a2a" and groups % topology.cp_size:
        findings.append(
            f"cp_comm_type a2a deals key-value heads to context_parallel_size {topology.cp_size} ranks, and each tensor rank has "
            f"{groups} of them; use p2p"
        )
    if "sinkhorn" in (overrides.get("moe_router_load_balancing_type") or ()):
        findings.append(
            "moe_router_load_balancing_type sinkhorn chooses other experts than the best ones, which transformers and engines take; "
            "balance by aux_loss"
        )
    weight = overrides.get("moe_aux_loss_coeff")
    if weight and "num_experts" not in model.dims:
        findings.append(f"moe_aux_loss_coeff is {weight}, and {model.architecture} has no experts to balance; leave it out")
    elif weight and overrides.get("moe_router_load_balancing_type") == "none":
        findings.append(f"moe_aux_loss_coeff is {weight}, which moe_router_load_balancing_type none leaves out; set that to aux_loss")
    rate = overrides.get("moe_router_bias_update_rate")
    if rate and not model.transformer.get("moe_router_enable_expert_bias"):
        findings.append(f"moe_router_bias_update_rate is {rate}, and the routers of {model.architecture} have no bias; leave it out")
    return findings


def unread_keys(hf_config: HFConfig) -> tuple[str, ...]:
    """Keys of a supported config.json that its family's table does not name, sorted.

    The table names what transformers and vLLM read, so these change nothing; whoever wrote them may think otherwise.
    """
    family = family_of(hf_config)
    found = unread(family.known_keys, hf_config)
    for section in family.sections:
        inner, where = section.of(hf_config)
        found += tuple(f"{where}{name}" for name in unread(section.keys, inner or {}) if where)
    return found


def family_of(hf_config: HFConfig) -> Family:
    """The family of an HF config. ConfigError lists the supported architectures."""
    names = hf_config.get("architectures")
    for family in FAMILIES:
        if isinstance(names, (list, tuple)) and len(names) == 1 and names[0] in family.architectures:
            return family
    if isinstance(names, (list, tuple)) and len(names) == 1:
        found = str(names[0])
    else:
        found = f"{shown(names)} (model_type {shown(hf_config.get('model_type'))})"
    raise ConfigError(f"config.json: unknown architecture {found}; supported are {', '.join(supported_architectures())}")


def _read(hf_config: Any, topology: Topology | None) -> tuple[Model | None, list[str]]:
    if not isinstance(hf_config, Mapping):
        return None, [f"it holds {shown(hf_config)}, not an object of keys"]
    try:
        family = family_of(hf_config)
    except ConfigError as error:
        return None, [str(error).removeprefix("config.json: ")]
    name = str(hf_config["architectures"][0])
    values, findings = read_keys(family.keys, hf_config, name)
    for section in family.sections:
        inner, wrong = read_section(section, family.keys, hf_config, name)
        findings += [finding for finding in wrong if finding not in findings]
        values |= inner
    kind = hf_config.get("model_type", family.model_type)
    if kind != family.model_type:
        findings.insert(
            0,
            f"model_type is {shown(kind)}, but architectures is {name}, whose model_type is {shown(family.model_type)}: "
            "transformers computes the one and engines the other; make them agree",
        )
    text = family.sections[0].of(hf_config)[0] if family.sections else hf_config
    if text is None:
        return None, findings
    rope, wrong = _read_rope(family, hf_config, text, values.get("max_position_embeddings"))
    findings += wrong
    if findings:
        return None, findings
    findings = _as_in_the_file(family, family.contradictions(values, text))
    if findings or rope is None:
        return None, findings
    dims = family.dims(values)
    findings = misfit_of_rope(rope, dims["head_dim"])
    if findings:
        return None, findings
    dtype = next((config[key] for config in (hf_config, text) for key in ("dtype", "torch_dtype") if config.get(key)), "float32")
    tables = [family.keys, *(section.keys for section in family.sections if not section.prefix)]
    fields = {key.field: values[key.meaning or key_name] for table in tables for key_name, key in table.items() if key.field}
    features = family.features(values)
    switched = {field: True for feature, field in FEATURE_FIELDS.items() if feature in features}
    model = Model(
        family=family,
        architecture=name,
        values=values,
        dims=dims,
        features=features,
        dtype=str(dtype).removeprefix("torch."),
        max_positions=values["max_position_embeddings"],
        rope=rope,
        transformer={**fields, **family.transformer(values, dims), **switched},
        vision=None if family.vision is None else family.vision(values, hf_config["vision_config"]),
    )
    return model, [] if topology is None else indivisible(model, topology)


def _as_in_the_file(family: Family, findings: list[str]) -> list[str]:
    """Findings with keys by the names that config.json has for them."""
    for name, key in family.known_keys.items():
        if key.meaning:
            findings = [re.sub(rf"\b{key.meaning}\b", name, finding) for finding in findings]
    return findings


def _read_rope(family: Family, hf_config: HFConfig, text: HFConfig, max_positions: int | None) -> tuple[Rope | None, list[str]]:
    """The rotary embedding that ``text`` describes. Keys of it at the top level beside a section are forgotten, and must say the same."""
    rope, findings = read_rope(text, max_positions=max_positions, kind=family.rope)
    outside = {} if text is hf_config else {key: hf_config[key] for key in ROPE_KEYS if key in hf_config}
    if not findings and outside and read_rope({**text, **outside}, max_positions=max_positions, kind=family.rope)[0] != rope:
        said = ", ".join(f"{key} {shown(value)}" for key, value in outside.items())
        where = family.sections[0].name
        findings = [f"{said} beside {where}, which says otherwise: transformers reads the inner ones, other programs do not; keep those"]
    return rope, findings
