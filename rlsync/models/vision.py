"""What vision-language families share: keys of their configs, sizes of a vision tower, rules of its weights.

The tower is transformers' own module: Megatron names of its parameters are ``visual.`` and the names inside it, and the first pipeline
stage has all of it on every rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from rlsync.models.base_keys import BASE_KEYS
from rlsync.models.keys import Key, Section, flag, harmless, is_whole, only, read_elsewhere, size, unsupported
from rlsync.models.layouts import Replicated
from rlsync.models.stacks import Family, HFTensor, Index, Part, Rule, Stack, Vision

_PICTURE_TOKENS = {"image_token_id": 151655, "video_token_id": 151656, "vision_start_token_id": 151652, "vision_end_token_id": 151653}
_AXIAL = {"rope_type": ("axial", "default"), "type": ("axial", "default"), "rope_theta": (10000,), "partial_rotary_factor": (1,)}


def token_id(default: int) -> Key:
    """A token id, from 0."""
    return Key(lambda value: is_whole(value) and value >= 0, "a token id", default=default)


def indexes(default: tuple[int, ...]) -> Key:
    """Numbers of blocks, from 0."""
    return Key(
        lambda value: isinstance(value, (list, tuple)) and all(is_whole(index) and index >= 0 for index in value),
        "a list of block numbers",
        default=default,
    )


def _is_axial(value: Any) -> bool:
    return isinstance(value, Mapping) and all(key in _AXIAL and number in _AXIAL[key] for key, number in value.items())


# Of the top level.
_ROOT_KEYS: Mapping[str, Key] = {
    **BASE_KEYS,
    **read_elsewhere("the sections of the family", "text_config", "vision_config"),
    **{name: token_id(default) for name, default in _PICTURE_TOKENS.items()},
    "tie_word_embeddings": flag(default=False),
    **harmless("no token of the model that anything is computed for", "vision_token_id"),
}
# Of a text_config beside the keys of its decoder.
_TEXT_KEYS: Mapping[str, Key] = {
    **harmless("token ids of pictures: those of the top level are read", *_PICTURE_TOKENS, "vision_token_id"),
    "tie_word_embeddings": Key(lambda value: isinstance(value, bool), "true or false", is_nullable=True),
}
# Of every vision_config.
_TOWER_KEYS: Mapping[str, Key] = {
    **BASE_KEYS,
    "rope_parameters": Key(
        lambda value: not value or _is_axial(value),
        "absent, or of type axial with rope_theta 10000",
        "engines turn patches so whatever it says",
        is_nullable=True,
        is_honoured=False,
    ),
    "rope_scaling": unsupported("patches turn by their place in the picture alone"),
    "rope_theta": only(10000, default=10000.0, is_nullable=True, why="engines turn patches so whatever it says"),
    "partial_rotary_factor": only(1, default=1, is_nullable=True, why="patches turn whole heads"),
    "head_dim": unsupported("a tower's heads have hidden_size / num_heads"),
    "num_attention_heads": unsupported("it is another name of num_heads; keep that one"),
    "in_channels": only(3, default=3, why="processors give pictures of three colours"),
    "in_chans": only(3, default=3, is_nullable=True, why="processors give pictures of three colours"),
    "depth": size(is_required=True, most=10_000),
    "hidden_size": size(is_required=True),
    "intermediate_size": size(is_required=True),
    "out_hidden_size": size(is_required=True),
    "num_heads": size(default=16),
    "spatial_merge_size": size(default=2),
    "temporal_patch_size": size(default=2),
    **harmless("the size of a patch is patch_size", "spatial_patch_size"),
}


def tower_dims(values: Mapping[str, Any]) -> dict[str, int]:
    """Named sizes of a tower. ``merged`` is a square of patches in one row, as mergers see it."""
    hidden = values["vision_hidden_size"]
    return {
        "vision": hidden,
        "vision_heads": values["vision_num_heads"],
        "vision_qkv": 3 * hidden,
        "vision_ffn": values["vision_intermediate_size"],
        "merged": hidden * values["vision_spatial_merge_size"] ** 2,
        "patch": values["vision_patch_size"],
        "frames": values["vision_temporal_patch_size"],
        "num_blocks": values["vision_depth"],
    }


def tower_contradictions(values: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong between keys of a vision-language model that are right by themselves."""
    out, hidden, heads = values["vision_out_hidden_size"], values["vision_hidden_size"], values["vision_num_heads"]
    if out != values["hidden_size"]:
        yield f"vision_config.out_hidden_size is {out}, and hidden_size of the language model {values['hidden_size']}; they must be equal"
    if hidden % (4 * heads):
        yield (
            f"vision_config.hidden_size {hidden} is not a multiple of 4 x num_heads {heads}: of the pairs of a head half turn with the "
            "height and half with the width"
        )
    ids = {name: values[name] for name in _PICTURE_TOKENS}
    outside = [f"{name} {number}" for name, number in ids.items() if number >= values["vocab_size"]]
    if outside:
        yield f"{', '.join(outside)}: the vocabulary has {values['vocab_size']} tokens"
    if len(set(ids.values())) < len(ids):
        yield f"token ids of pictures must differ: {', '.join(f'{name} {number}' for name, number in ids.items())}"


def outside_the_tower(name: str, found: tuple[int, ...], depth: int) -> Iterator[str]:
    """Why block numbers are not those of a tower in ascending order."""
    if list(found) != sorted(set(found)) or any(index >= depth for index in found):
        yield f"vision_config.{name} is {list(found)}; it must be ascending block numbers below depth {depth}"


def _vision_of(tower: str, values: Mapping[str, Any], config: Mapping[str, Any]) -> Vision:
    """The tower of a family: transformers' class (module:class), values of the family's keys, the content of ``vision_config``."""
    return Vision(
        **{name: values[name] for name in _PICTURE_TOKENS},
        **{name: values[f"vision_{name}"] for name in ("patch_size", "temporal_patch_size", "spatial_merge_size")},
        in_channels=3,
        deepstack_visual_indexes=tuple(values.get("vision_deepstack_visual_indexes", ())),
        config=config,
        tower=tower,
    )


def whole(name: str, *dims: str) -> Rule:
    """A parameter of the tower, which has the same name in both frameworks and is not cut."""
    return Rule(name, (HFTensor(name, *dims),), Replicated())


def linear(name: str, rows: str, columns: str) -> tuple[Rule, Rule]:
    """Weight and bias of a linear layer of the tower."""
    return whole(f"{name}.weight", rows, columns), whole(f"{name}.bias", rows)


def layer_norm(name: str, size: str) -> tuple[Rule, Rule]:
    """Weight and bias of a LayerNorm of the tower."""
    return whole(f"{name}.weight", size), whole(f"{name}.bias", size)


def tower_stack(*rules: Rule, within: str = "", index: Index | None = None, part: Part = "vision_model") -> Stack:
    """Rules of the tower, on every rank of the first stage. ``within`` comes after ``visual.``, with the name of ``index`` in braces."""
    return Stack(rules, f"visual.{within}", f"model.visual.{within}", () if index is None else (index,), stage="first", part=part)


BLOCKS = Index("block", "num_blocks")
# The table has the names of transformers' modules. Released Qwen2.5-VL checkpoints have the others, which transformers 5 writes too.
_SPELLINGS: Mapping[str, tuple[str, ...]] = {"model.visual.": ("visual.",), "model.language_model.": ("model.",)}


def vision_family(
    architecture: str,
    model_type: str,
    module: str,
    *,
    decoder: Mapping[str, Key],
    text: Mapping[str, Key],
    tower: Mapping[str, Key],
    may_be_flat: bool = False,
    **rules: Any,
) -> Family:
    """A family whose config.json has a ``text_config`` and a ``vision_config``.

    Args:
        module: transformers' class of the tower, as ``module:class``.
        decoder: keys of the text family that the language model is like.
        text, tower: keys that this family has otherwise than such a decoder, or than other towers; those of the tower are called
            ``vision_`` and their name among values.
        may_be_flat: released files have keys of the language model at the top level.
        rules: the other attributes of ``Family``.
    """
    types = {name: f"{model_type}_{name}" for name in ("text", "vision")}
    texts = {**decoder, **_TEXT_KEYS, "model_type": only(types["text"], default=types["text"]), **text}
    towers = {**_TOWER_KEYS, "model_type": only(types["vision"], model_type, default=types["vision"]), **tower}
    return Family(
        architectures=(architecture,),
        model_type=model_type,
        keys=_ROOT_KEYS,
        sections=(Section("text_config", texts, may_be_flat=may_be_flat), Section("vision_config", towers, prefix="vision_")),
        vision=partial(_vision_of, module),
        spellings=_SPELLINGS,
        **rules,
    )
