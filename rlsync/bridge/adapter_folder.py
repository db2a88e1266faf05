"""An adapter folder as PEFT writes and reads it: ``adapter_config.json`` beside ``adapter_model.safetensors``.

Owns what of PEFT's configuration is understood, and what is refused because the adapter would compute something else. Must not know
Megatron, process groups or engines.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from rlsync.bridge.checkpoint_folder import HF_FOLDER_NAMES
from rlsync.errors import CheckpointError, ConfigError, PlacementError
from rlsync.layout.geometry import Box, Piece, TensorSpec, whole_tensors
from rlsync.layout.json_files import read_json_object
from rlsync.layout.safetensors import Holding, StoredTensor, read_checkpoint
from rlsync.models.lora import PREFIX, A, AdaptedRule, Adapters, B, LoraSpec, module_of
from rlsync.models.stacks import Model
from rlsync.models.stored import FileTensor, differences, file_placement, stacked_tensor

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"

# Keys whose other values change what an adapter computes, with the values that do not. All others (of PEFT 0.21) say how an adapter
# is begun, trained or stored, or are read below.
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "use_dora": (False, None),
    "lora_bias": (False, None),
    "bias": ("none", None),
    "modules_to_save": (None, []),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "layers_to_transform": (None, []),
    "layers_pattern": (None, []),
    "layer_replication": (None, []),
    "trainable_token_indices": (None, []),
    "fan_in_fan_out": (False, None),
    "megatron_config": (None,),
    "use_qalora": (False, None),
    "alora_invocation_tokens": (None,),
    "use_bdlora": (None, False),
    "arrow_config": (None,),
    "monteclora_config": (None,),
    "velora_config": (None,),
}
# Of trained factors the others of these say nothing. PEFT's further ways (pissa, olora, corda, loftq, ...) change the base, or how factors
# are trained.
_INITIAL: Mapping[Any, Literal["kaiming", "gaussian"]] = {
    True: "kaiming", False: "kaiming", None: "kaiming", "gaussian": "gaussian", "eva": "kaiming", "orthogonal": "kaiming",
}  # fmt: skip


def read_adapter_config(folder: Path | str) -> LoraSpec:
    """The spec of an adapter folder.

    Raises:
        CheckpointError: there is no configuration, or it cannot be read.
        ConfigError: it asks for what is not supported; every such key is named.
    """
    path, content = Path(folder) / ADAPTER_CONFIG, _config_of(folder)
    findings = [
        f"{name} is {content[name]!r}; only {' or '.join(map(repr, neutral))} is supported"
        for name, neutral in _NEUTRAL.items()
        if name in content and content[name] not in neutral
    ]
    if content.get("peft_type") != "LORA":
        findings.insert(0, f"peft_type is {content.get('peft_type')!r}; only 'LORA' is supported")
    rank: Any = content.get("r")
    alpha: Any = content.get("lora_alpha")
    targets: Any = content.get("target_modules")
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        findings.append(f"r is {rank!r}; it must be a whole number of at least 1")
    if not isinstance(alpha, int | float) or isinstance(alpha, bool):
        findings.append(f"lora_alpha is {alpha!r}; it must be a number")
    initial: Any = content.get("init_lora_weights")
    if not isinstance(initial, bool | str | None) or initial not in _INITIAL:
        findings.append(
            f"init_lora_weights is {initial!r}; only {', '.join(map(repr, _INITIAL))} leave the base as it is: where PEFT changed it, save "
            "the adapter with PEFT's path_initial_model_for_weight_conversion"
        )
    parameters: Any = content.get("target_parameters") or []
    if targets is None and parameters:
        targets = []
    if not isinstance(targets, str) and not _are_names(targets):
        findings.append(f"target_modules is {targets!r}; it must be names or a regular expression")
    if not _are_names(parameters):
        findings.append(f"target_parameters is {parameters!r}; it must be names")
    excluded: Any = content.get("exclude_modules") or []
    if not isinstance(excluded, str) and not _are_names(excluded):
        findings.append(f"exclude_modules is {excluded!r}; it must be names or a regular expression")
    dropout: Any = content.get("lora_dropout") or 0.0
    if not isinstance(dropout, int | float):
        findings.append(f"lora_dropout is {dropout!r}; it must be a number")
    if findings:
        raise ConfigError(f"{path}: " + "; ".join(findings))
    return LoraSpec(
        r=rank,
        lora_alpha=float(alpha),
        lora_dropout=float(dropout),
        target_modules=targets if isinstance(targets, str) else tuple(targets),
        exclude_modules=excluded if isinstance(excluded, str) else tuple(excluded),
        use_rslora=bool(content.get("use_rslora")),
        init=_INITIAL[initial],
        target_parameters=tuple(parameters),
    )


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def base_of_adapter(folder: Path | str) -> str | None:
    """What an adapter folder says that it adapts: a folder, a name of a hub, or None. Raises CheckpointError as ``read_adapter_config``."""
    name = _config_of(folder).get("base_model_name_or_path")
    return name if isinstance(name, str) and name else None


def other_base(name: str | None, *folders: Path) -> str | None:
    """A warning where adapters say that they are of ``name`` and none of these folders of one model is called so; None otherwise.

    A folder is called by its last part, and by the model of the hub's cache that it lies in. Folders within checkpoints are called all
    alike, and known by their whole path.
    """
    paths = [folder.resolve() for folder in folders]
    if name is None or Path(name).resolve() in paths:
        return None
    cached = {part.rpartition("--")[2] for path in paths for part in path.parts if part.startswith("models--")}
    called = {each.casefold() for each in {path.name for path in paths} | cached if each not in HF_FOLDER_NAMES}
    if Path(name).name.casefold() in called:
        return None
    return f"{ADAPTER_CONFIG} says that they are adapters of {name}: whether {folders[0]} has the same weights is not known"


def _config_of(folder: Path | str) -> dict[str, Any]:
    path = Path(folder) / ADAPTER_CONFIG
    return read_json_object(path, error=CheckpointError, remedy="give a folder that PEFT or rlsync saved")[1]


def adapter_config(adapters: Adapters, base_model: str | None) -> dict[str, Any]:
    """Content of ``adapter_config.json``, for PEFT and vLLM. Targets are full names of the adapted modules where not all linear layers of
    the model that transformers builds have an adapter, so that nobody has to read the spec's words as it was read here."""
    spec, modules = adapters.spec, adapters.modules - adapters.routers.keys()
    names = sorted({module.rpartition(".")[2] for module in modules} if adapters.are_all_of_their_names else modules)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": spec.r,
        "lora_alpha": int(spec.lora_alpha) if float(spec.lora_alpha).is_integer() else spec.lora_alpha,
        "lora_dropout": spec.lora_dropout,
        "use_rslora": spec.use_rslora,
        "use_dora": False,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True if spec.init == "kaiming" else spec.init,
        "target_modules": names,
        "target_parameters": sorted(adapters.routers.values()) or None,
        "exclude_modules": None,
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "inference_mode": True,
    }


def check_adapter_folder(folder: Path | str, running: LoraSpec) -> None:
    """Raise ConfigError where an adapter of ``folder`` would compute something else under the spec of this run; and as
    ``read_adapter_config``."""
    stored = read_adapter_config(folder)
    different = [
        f"{name} {getattr(stored, name)} there, {getattr(running, name)} here"
        for name in ("r", "lora_alpha", "use_rslora")
        if getattr(stored, name) != getattr(running, name)
    ]
    if different:
        raise ConfigError(f"{folder} holds another adapter than this run's: {'; '.join(different)}; set them as they are there")


@dataclass(frozen=True, slots=True)
class StoredFactor:
    """A tensor of an adapter's file, by its name there without the prefix and its shape, and the factors in it.

    ``file`` sees the same elements in a shape whose boxes are the factors. Where several factors are the same elements, each has such a
    view, and all of them one ``name``.
    """

    name: str
    shape: tuple[int, ...]
    file: FileTensor


def placed_adapter(model: Model, adapters: Adapters, folder: Path) -> Holding:
    """Where the factors of ``adapters`` lie in the file of an adapter folder; reads its header only.

    Raises CheckpointError for a missing or damaged file, PlacementError with every missing, unexpected and wrongly shaped tensor at once.
    """
    copies = _names_of_copies(adapters)
    # A router may be called otherwise in transformers than in released files.
    called = {module_of(parameter): module for module, parameter in adapters.routers.items()}
    ours = {f"{there}{factor}": f"{module}{factor}" for there, module in called.items() for factor in (A, B)}
    stored = {ours.get(name, name): tensor for name, tensor in _stored(folder).items() if name not in copies}
    factors = stored_factors(model, adapters, stored)
    findings = differences({factor.name: factor.shape for factor in factors}, {name: t.spec.shape for name, t in stored.items()})
    if findings:
        raise PlacementError(f"{folder} does not hold the adapters asked for: " + "; ".join(findings))
    held = [replace(f.file, spec=replace(f.file.spec, dtype=stored[f.name].spec.dtype)) for f in factors]
    return Holding(file_placement(str(folder), held), {factor.file.spec.name: stored[factor.name] for factor in factors})


def base_copies(adapters: Adapters, folder: Path) -> dict[str, StoredTensor]:
    """Weights of the base in the file of an adapter folder, by their names in the base: PEFT saves those of embeddings and heads beside
    their adapters. Reads its header only; raises as ``placed_adapter`` of the file."""
    names = _names_of_copies(adapters)
    return {names[name]: tensor for name, tensor in _stored(folder).items() if name in names}


def _names_of_copies(adapters: Adapters) -> dict[str, str]:
    return {f"{module}.base_layer.weight": f"{module}.weight" for module in adapters.modules}


def _stored(folder: Path) -> dict[str, StoredTensor]:
    return {name.removeprefix(PREFIX): tensor for name, tensor in read_checkpoint(folder).items()}


def stored_factors(model: Model, adapters: Adapters, names: Collection[str]) -> list[StoredFactor]:
    """How a file with tensors of these ``names`` holds the factors of ``adapters``, if it holds them all.

    Either each has a tensor of its own, or those of a layer's experts are stacked, as PEFT has them for parameters of transformers with
    all experts (``target_parameters``): A of all experts one below the other, and in B (out, r * experts), the expert counted fastest;
    projections that lie in one such parameter have one A.
    """
    stacked = [found for rules in _by_layer(model, adapters) for found in _stacked_factors(rules)]
    if not any(factor.name in names for factor in stacked):
        stacked = []
    taken = {piece.tensor for factor in stacked for piece in factor.file.pieces}
    single = [tensor for tensor in adapters.tensors(model, "float32") if tensor.name not in taken]
    whole = [(tensor, piece) for tensor, piece in zip(single, whole_tensors("file", single).pieces, strict=True)]
    return [*(StoredFactor(tensor.name, tensor.shape, FileTensor(tensor, (piece,))) for tensor, piece in whole), *stacked]


def _by_layer(model: Model, adapters: Adapters) -> Iterator[list[AdaptedRule]]:
    """The factors of the experts of each layer that may be stacked."""
    layers: dict[str, list[AdaptedRule]] = defaultdict(list)
    for rule in adapters.rules(bound for bound in model.parameters() if bound.stack.stacked is not None):
        layers[stacked_tensor(rule.base, None)[0].rpartition(".")[0]].append(rule)
    yield from layers.values()


def _stacked_factors(rules: Sequence[AdaptedRule]) -> Iterator[StoredFactor]:
    """Those of one layer. PEFT wraps its parameters one after the other, and the first is inside."""
    parameters: dict[str, list[AdaptedRule]] = defaultdict(list)
    for rule in rules:
        parameters[stacked_tensor(rule.base, None)[0]].append(rule)
    for number, (name, experts) in enumerate(parameters.items()):
        module = name.rpartition(".")[0] + ".base_layer" * (len(parameters) - 1 - number)
        count, r, width = experts[0].base.copies, experts[0].a.hf[0][1][0], experts[0].a.hf[0][1][1]
        rows = [shape[0] for _, shape in experts[0].base.hf]
        for place, _ in enumerate(experts[0].sources):
            spec = TensorSpec(f"{module}{A}" + f" of projection {place}" * (place > 0), "float32", (count * r, width))
            pieces = [
                Piece(rule.a.hf[place][0], Box.whole((r, width)), spec.name, rule.base.numbers[-1] * r * width, (width, 1))
                for rule in experts
            ]
            yield StoredFactor(f"{module}{A}", spec.shape, FileTensor(spec, tuple(pieces)))
        spec = TensorSpec(f"{module}{B}", "float32", (sum(rows), r, count))
        pieces = [
            Piece(tensor, Box.whole(shape), spec.name, sum(rows[:source]) * r * count + rule.base.numbers[-1], (r * count, count))
            for rule in experts
            for source, (tensor, shape) in zip(rule.sources, rule.b.hf, strict=True)
        ]
        yield StoredFactor(f"{module}{B}", (sum(rows), r * count), FileTensor(spec, tuple(pieces)))
