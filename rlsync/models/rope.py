"""Rotary position embeddings as a config.json describes them.

Reads ``rope_parameters`` (transformers 5) and ``rope_theta`` / ``rope_scaling`` (transformers 4) as transformers 5 does, and
refuses what it and an engine would read in two ways. Plain numbers; the frequencies are computed where tensors are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from rlsync.models.keys import HFConfig, is_number, is_whole, shown

DEFAULT_THETA = 10000.0  # PreTrainedConfig.default_theta
# Numbers that each type takes beside rope_theta.
TYPES: Mapping[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
}
# Numbers that a type may leave out, and what transformers puts in their place; None: computed.
_YARN = {"beta_fast": 32.0, "beta_slow": 1.0, "attention_factor": None, "mscale": None, "mscale_all_dim": None}
OPTIONAL: Mapping[str, Mapping[str, float | None]] = {"yarn": _YARN}
# Keys of config.json that this module reads.
ROPE_KEYS = ("rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings")
_COMMON = ("rope_type", "type", "rope_theta", "partial_rotary_factor")
# What models of three-dimensional positions take instead. "mrope" is how old files call "default" with sections.
_MROPE_TYPES: Mapping[str, tuple[str, ...]] = dict.fromkeys(("default", "mrope"), ("mrope_section", "mrope_interleaved"))


@dataclass(frozen=True, slots=True)
class RopeKind:
    """What transformers' class of a family makes of rotary embeddings.

    Attributes:
        theta: its ``default_theta``.
        mrope: how the pairs of a head are dealt to the three dimensions of a position (time, height, width): "" where positions have one
            dimension, "blocks" for one run of pairs each, "interleaved" for turns.
        partial: the share of a head's dimensions that turns where a config is silent (``partial_rotary_factor``); None where whole heads
            turn, whatever a config says.
        is_latent: yarn's ``mscale_all_dim`` scales attention scores too, as in multi-head latent attention; no other type is known there.
    """

    theta: float = DEFAULT_THETA
    mrope: Literal["", "blocks", "interleaved"] = ""
    partial: float | None = None
    is_latent: bool = False


@dataclass(frozen=True, slots=True)
class Llama3Scaling:
    """Wavelengths above original/low are stretched by ``factor``, those below original/high kept, between them blended."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True, slots=True)
class YarnScaling:
    """YaRN (arXiv 2309.00071): pairs that turn more than ``beta_fast`` times within the original length are kept, those that turn less than
    ``beta_slow`` times are stretched by ``factor``, those between blended; cosines and sines are multiplied by ``attention_factor``.
    Latent attention multiplies its scores by ``score_factor`` as well."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float
    beta_slow: float
    attention_factor: float
    score_factor: float = 1.0


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary embedding of one model.

    Attributes:
        theta: base of the frequencies.
        interpolation: positions are divided by it (type "linear"); None otherwise.
        llama3: frequencies are rescaled (type "llama3"); None otherwise.
        yarn: frequencies are rescaled and scores sharpened (type "yarn"); None otherwise.
        mrope_section: pairs of a head that turn with time, height and width of a position; None where positions have one dimension.
        mrope_interleaved: the pairs go by turns (t h w t h w ... t t), not in one block each.
        partial: the share of a head's dimensions that turns, the first ones; the others stay as they are.
    """

    theta: float
    interpolation: float | None = None
    llama3: Llama3Scaling | None = None
    yarn: YarnScaling | None = None
    mrope_section: tuple[int, int, int] | None = None
    mrope_interleaved: bool = False
    partial: float = 1.0

    def reach(self, max_positions: int) -> float:
        """Longest sequence, in tokens, of a model of ``max_positions``."""
        if self.yarn is not None:
            return max(max_positions, self.yarn.factor * self.yarn.original_max_position_embeddings)
        return max_positions * (1.0 if self.interpolation is None else self.interpolation)


def read_rope(config: HFConfig, *, max_positions: int | None = None, kind: RopeKind = RopeKind()) -> tuple[Rope | None, list[str]]:
    """The rotary embedding of a config.json, or of the object in it that holds the keys, and everything that is wrong with what it says.

    ``max_positions`` is what ``original_max_position_embeddings`` is without a key of its own, as in transformers. The rope is
    None where anything is wrong.
    """
    findings: list[str] = []
    given: dict[str, Mapping[str, Any]] = {}
    for name in ("rope_scaling", "rope_parameters"):
        value = config.get(name)
        if isinstance(value, Mapping):
            given |= {name: value} if value else {}
        elif value is not None:
            findings.append(f"{name} is {shown(value)}; it must be an object, or absent")
    ropes = []
    for name, nested in given.items() or [("rope_parameters", {})]:
        rope, wrong = _read(name, nested, config, max_positions, kind)
        ropes.append(rope)
        findings.extend(f for f in wrong if f not in findings)
    if not findings and len(set(ropes)) > 1:
        both = " beside ".join(f"{name} {shown(value)}" for name, value in given.items())
        findings.append(f"{both}: transformers 5 reads rope_scaling and forgets the other, other programs do not; keep one of them")
    return (None if findings else ropes[0]), findings


def _read(
    name: str, nested: Mapping[str, Any], config: HFConfig, max_positions: int | None, family: RopeKind
) -> tuple[Rope | None, list[str]]:
    """One of the two objects, together with the keys beside it."""
    per_layer_type = sorted(key for key, value in nested.items() if isinstance(value, Mapping))
    if per_layer_type:
        return None, [f"{name} is given per layer type ({', '.join(per_layer_type)}); only one set for all layers is supported"]
    findings = []
    types = _MROPE_TYPES if family.mrope else TYPES if family.partial is None else {"default": ()}
    if family.is_latent:
        types = {kind: TYPES[kind] for kind in ("default", "yarn")}
    kind = nested.get("rope_type", nested.get("type", "default"))
    if "type" in nested and nested["type"] != kind and not (family.mrope and (kind, nested["type"]) == ("default", "mrope")):
        findings.append(f"{name} has rope_type {shown(kind)} and type {shown(nested['type'])}; keep the one that is meant")
    if not isinstance(kind, str) or kind not in types:
        return None, [*findings, f"{name} asks for rope type {shown(kind)}; supported are {', '.join(types)}"]
    optional = {} if family.mrope else OPTIONAL.get(kind, {})
    known = (*_COMMON, *types[kind], *optional, *(("truncate",) if optional else ()))
    foreign = sorted(key for key, value in nested.items() if key not in known and value is not None)
    if foreign:
        findings.append(
            f"{name} of rope type {kind} holds {', '.join(foreign)}, which that type does not have; remove it, or name its type"
        )
    partial, wrong = _partial(name, nested, config, family)
    findings += wrong
    numbers = {"rope_theta": config.get("rope_theta", family.theta)}
    if "original_max_position_embeddings" in types[kind]:
        numbers["original_max_position_embeddings"] = config.get("original_max_position_embeddings", max_positions)
    for key in numbers:
        if key in nested and key in config and nested[key] != config[key]:
            findings.append(f"{key} is {shown(config[key])}, and {shown(nested[key])} in {name}; keep one of them")
    numbers |= {key: nested.get(key, numbers.get(key)) for key in ("rope_theta", *(() if family.mrope else types[kind]))}
    numbers |= {key: nested[key] for key in optional if nested.get(key) is not None}
    if family.is_latent and kind == "yarn":
        findings += _wrong_latent_yarn(name, nested)
    if nested.get("truncate", True) is not True:
        findings.append(f"truncate of {name} is {shown(nested['truncate'])}; it must be true: the blended pairs are whole ones")
    for key, value in numbers.items():
        right = is_whole(value) if key == "original_max_position_embeddings" else is_number(value)
        if value is None:
            findings.append(f"{name} asks for rope type {shown(kind)} but gives no {key}")
        elif not right or value <= 0:
            findings.append(f"{key} of {name} is {shown(value)}; it must be a number above 0")
    if not findings and kind == "llama3" and numbers["low_freq_factor"] >= numbers["high_freq_factor"]:
        low, high = numbers["low_freq_factor"], numbers["high_freq_factor"]
        findings.append(f"low_freq_factor {low} of {name} must be below its high_freq_factor {high}")
    if family.mrope:
        findings += _wrong_mrope(name, nested, family)
        section = tuple(nested.get("mrope_section") or ())
        rope = None if findings else Rope(float(numbers["rope_theta"]), mrope_section=section, mrope_interleaved=family.mrope != "blocks")
        return rope, findings
    return (None if findings else replace(_rope(kind, numbers), partial=partial)), findings


def _partial(name: str, nested: Mapping[str, Any], config: HFConfig, family: RopeKind) -> tuple[float, list[str]]:
    """The share of a head that turns, and what is wrong with what a config says of it."""
    sources: tuple[tuple[str, Mapping[str, Any]], ...] = ((name, nested), ("config.json", config))
    said: list[tuple[str, Any]] = [(where, given["partial_rotary_factor"]) for where, given in sources if "partial_rotary_factor" in given]
    said = [(where, factor) for where, factor in said if factor is not None]
    if family.partial is None:
        why = "these models rotate whole heads in transformers whatever it says, and a part of each in vLLM"
        wrong = [f"partial_rotary_factor of {where} is {shown(factor)}; it must be 1: {why}" for where, factor in said if factor != 1]
        return 1.0, wrong
    wrong = [
        f"partial_rotary_factor of {where} is {shown(factor)}; it must be a number above 0 and up to 1, the share of a head that turns"
        for where, factor in said
        if not (is_number(factor) and 0 < factor <= 1)
    ]
    if not wrong and len({factor for _, factor in said}) > 1:
        wrong = [f"partial_rotary_factor is {said[1][1]}, and {said[0][1]} in {name}; keep one of them"]
    return float(said[0][1]) if said and not wrong else family.partial, wrong


def _wrong_latent_yarn(name: str, nested: Mapping[str, Any]) -> Iterator[str]:
    """What transformers and engines read in two ways where scores are scaled too."""
    if nested.get("attention_factor") is not None:
        yield f"attention_factor of {name} is {shown(nested['attention_factor'])}; leave it out: engines compute it from mscale"
    if (nested.get("mscale") is None) is not (nested.get("mscale_all_dim") is None):
        yield f"{name} gives one of mscale and mscale_all_dim: transformers and engines fill in the other differently; give both or none"
    factor = nested.get("factor")
    if factor is not None and is_number(factor) and 0 < factor <= 1:
        yield f"factor of {name} is {shown(factor)}; it must be above 1: nothing is stretched otherwise"


def _wrong_mrope(name: str, nested: Mapping[str, Any], family: RopeKind) -> Iterator[str]:
    section, interleaved = nested.get("mrope_section"), nested.get("mrope_interleaved")
    if not (isinstance(section, list) and len(section) == 3 and all(is_whole(pairs) and pairs > 0 for pairs in section)):
        yield (
            f"mrope_section of {name} is {shown(section)}; it must be three whole numbers above 0, the pairs of a head for time, height "
            "and width: without it engines count positions in one dimension"
        )
    wanted = family.mrope == "interleaved"
    if bool(interleaved) is not wanted or not isinstance(interleaved, (bool, type(None))):
        yield (
            f"mrope_interleaved of {name} is {shown(interleaved)}; it must be {shown(wanted)}: transformers computes it so "
            "whatever it says, and engines obey it"
        )


def misfit_of_rope(rope: Rope, head_dim: int) -> list[str]:
    """Why the pairs of a head cannot turn as a rotary embedding says; empty where they can."""
    turning = int(head_dim * rope.partial)
    if turning % 2 or not turning:
        return [f"partial_rotary_factor {rope.partial} of a head_dim of {head_dim} is {turning} dimensions, and they turn in pairs"]
    if rope.mrope_section is None:
        return []
    shares, pairs = list(rope.mrope_section), head_dim // 2
    if sum(shares) != pairs:
        return [f"mrope_section {shares} has {sum(shares)} pairs, and a head_dim of {head_dim} has {pairs}"]
    last = max(3 * shares[axis] - 3 + axis for axis in (1, 2))
    if rope.mrope_interleaved and last >= pairs:
        return [f"mrope_section {shares} cannot be interleaved over {pairs} pairs: the last turn of height or width would be pair {last}"]
    return []


def _rope(kind: str, numbers: Mapping[str, Any]) -> Rope:
    theta = float(numbers["rope_theta"])
    if kind == "linear":
        return Rope(theta, interpolation=float(numbers["factor"]))
    if kind == "llama3":
        factor, low, high, original = (numbers[key] for key in TYPES["llama3"])
        return Rope(theta, llama3=Llama3Scaling(float(factor), float(low), float(high), int(original)))
    if kind == "yarn":
        return Rope(theta, yarn=_yarn(numbers))
    return Rope(theta)


def _yarn(numbers: Mapping[str, Any]) -> YarnScaling:
    """The numbers of transformers' ``_compute_yarn_parameters``, without its tensors."""
    factor, given = float(numbers["factor"]), {**_YARN, **numbers}

    def sharpened(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    attention = given["attention_factor"]
    if attention is None:
        both = given["mscale"] is not None and given["mscale_all_dim"] is not None
        attention = sharpened(given["mscale"]) / sharpened(given["mscale_all_dim"]) if both else sharpened(1.0)
    fast, slow = float(given["beta_fast"]), float(given["beta_slow"])
    scores = 1.0 if given["mscale_all_dim"] is None else sharpened(given["mscale_all_dim"]) ** 2
    return YarnScaling(factor, int(numbers["original_max_position_embeddings"]), fast, slow, float(attention), scores)
