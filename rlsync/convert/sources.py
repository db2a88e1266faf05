"""What a conversion reads: a folder of any known form as placements of a model's tensors in files, of which only headers are read.

Owns which form a folder has, and the comparison of its tensors with the model's table. Copies nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from rlsync.bridge.adapter_folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS, base_of_adapter, placed_adapter, read_adapter_config
from rlsync.bridge.checkpoint_folder import ADAPTER_FOLDER, HF_FOLDER_NAMES, TRACKER, hf_folder, rank_writers, shards_folder
from rlsync.bridge.model_folder import CONFIG_NAME, form_of_folder, kept_tensors, placed_checkpoint, read_config
from rlsync.convert.torch_dist import METADATA, is_distributed, placed_chunks
from rlsync.errors import CheckpointError, ConfigError, PlacementError, first_few
from rlsync.layout.geometry import Placement, TensorSpec, whole_tensors
from rlsync.layout.safetensors import Holding, StoredTensor
from rlsync.layout.topology import Topology
from rlsync.layout.torch_files import Opaque, TensorView, read_torch_file
from rlsync.models import Flavour, Model, model_of
from rlsync.models.lora import Adapters, adapters_of, without_idle_targets
from rlsync.models.placement import megatron_placement
from rlsync.models.shards import ADAPTERS_SCALING, EXTRA_STATE, RANK_STATE_FILE, both_names, chunk_keys, local_names
from rlsync.models.stored import StoredForm

Form = Literal["hf", "megatron"]
# Tracker of Megatron-LM for weights that no step was made on.
_RELEASE = "release"
# Arguments of Megatron-LM that say how a model is cut, by the field of Topology. Its experts are cut as all else by default.
_ARGUMENTS = {
    "tp_size": "tensor_model_parallel_size",
    "pp_size": "pipeline_model_parallel_size",
    "vpp_size": "virtual_pipeline_model_parallel_size",
    "ep_size": "expert_model_parallel_size",
    "etp_size": "expert_tensor_parallel_size",
    "first_stage_layers": "decoder_first_pipeline_num_layers",
    "last_stage_layers": "decoder_last_pipeline_num_layers",
}
# Arguments of Megatron-LM that cut the layers in ways of their own.
_UNEVEN = ("pipeline_model_parallel_layout", "account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split")


@dataclass(frozen=True, slots=True)
class Source:
    """A checkpoint that can be read: a model's weights, or adapters of them alone.

    Attributes:
        form: of its files.
        folder: that holds them.
        model_folder: has ``config.json``, and what travels with weights.
        config_text: content of that file.
        stored_form: how Hugging Face files of this model hold its tensors: those of ``folder``, else of ``model_folder``.
        holdings: with every tensor of the model, or every factor of the adapters, some in several of them.
        topology: how Megatron's shards are cut; None for Hugging Face files, and for torch_dist, which has whole tensors.
        flavour: how Megatron's parameters are called, or None as for ``topology``.
        step: of the run that saved it; 0 for Hugging Face files.
        kept: tensors that Megatron's shards do not have and Hugging Face files do, where files are at hand; they are among ``holdings``.
        adapters: whose factors the tensors are; None for weights.
        base_name: what the configuration of the adapters says that they adapt.
        merged: adapters that are added to the weights on their way.
    """

    form: Form
    folder: Path
    model_folder: Path
    config_text: str
    model: Model
    stored_form: StoredForm
    holdings: tuple[Holding, ...]
    topology: Topology | None = None
    flavour: Flavour | None = None
    step: int = 0
    kept: Mapping[str, StoredTensor] = field(default_factory=dict)
    adapters: Adapters | None = None
    base_name: str | None = None
    merged: Source | None = None

    def tensors(self) -> tuple[TensorSpec, ...]:
        """Every tensor that there may be: the model's and those that are kept, or the factors of the adapters."""
        if self.adapters is not None:
            return self.adapters.tensors(self.model, "float32")
        return (*self.model.tensors(), *(entry.spec for entry in self.kept.values()))

    def files(self) -> tuple[Path, ...]:
        """Every file of weights, in the order of their names, and of the adapters that are merged."""
        mine = sorted({tensor.file for holding in self.holdings for tensor in holding.stored.values()})
        return (*mine, *(() if self.merged is None else self.merged.files()))

    def dtype(self) -> str:
        """Of the parameters, but for those that have one of their own in every model. ConfigError where they have several."""
        own = set(self.kept) | {name for bound in self.model.parameters() if bound.stack.dtype for name, _ in bound.hf}
        found: dict[str, str] = {}
        for holding in self.holdings:
            dtypes = {buffer.name: buffer.dtype for buffer in holding.placement.buffers}
            for piece in holding.placement.pieces:
                if piece.tensor not in own:
                    found.setdefault(dtypes[piece.buffer], piece.tensor)
        if len(found) > 1:
            examples = ", ".join(f"{dtype} ({tensor})" for dtype, tensor in sorted(found.items()))
            raise ConfigError(f"{self.folder}: its tensors have several dtypes, {examples}; choose one with --dtype")
        return next(iter(found))


def open_source(folder: Path, model_folder: Path | None = None) -> Source:
    """The checkpoint in ``folder``: Hugging Face files, a ``global_step_N`` or ``actor`` folder, or Megatron's ``iter_XXXXXXX``.

    Args:
        model_folder: has the model's ``config.json``; by default the folder itself, or the Hugging Face weights beside the shards.

    Raises CheckpointError for what is missing or damaged, ConfigError for a model that is not supported or not said, PlacementError with
    every tensor that is missing, unexpected or wrongly shaped.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder; give a Hugging Face folder, or one with checkpoints of Megatron")
    weights = _weights_folder(folder)
    model_folder = _model_folder(folder, weights) if model_folder is None else model_folder
    text, config = read_config(model_folder)
    model = model_of(config)
    if _is_megatron(weights):
        return _with_kept(_read_megatron(weights, model_folder, text, model), model_folder)
    holding = placed_checkpoint(model, weights)
    return _with_kept(Source("hf", weights, model_folder, text, model, form_of_folder(model, weights), (holding,)), weights)


def holds_adapters(folder: Path) -> bool:
    """Whether a folder holds adapters alone: PEFT's, or Megatron's shards of a run with adapters. Raises CheckpointError."""
    if _is_peft(folder):
        return True
    if not folder.is_dir():
        return False
    weights = _weights_folder(folder)
    first = next(iter(sorted(weights.glob("mp_rank_*"))), None)
    return first is not None and _scaling_of(_content(weights, first.name)) is not None


def open_adapter(folder: Path, model_folder: Path | None = None) -> Source:
    """The adapters in ``folder``: one that PEFT or rlsync saved, or shards of a run with adapters.

    Args:
        model_folder: has ``config.json`` of the model that they adapt; by default the folder that their configuration names, or the one
            beside the shards.

    Raises as :func:`open_source`, ConfigError for adapters that compute what is not supported, and CheckpointError for shards without
    their configuration.
    """
    weights = folder if _is_peft(folder) else _weights_folder(folder)
    beside = [weights, weights.parent, weights.parent / ADAPTER_FOLDER]
    where = next((each for each in beside if (each / ADAPTER_CONFIG).is_file()), None)
    if where is None and not any(weights.glob("mp_rank_*")):
        raise CheckpointError(
            f"{folder} holds no adapters: neither {ADAPTER_CONFIG} and {ADAPTER_WEIGHTS} of PEFT, nor shards of a run with some"
        )
    if where is None:
        raise CheckpointError(f"{folder}: no {ADAPTER_CONFIG} beside the shards says which projections the adapters in them are of")
    spec, base_name = read_adapter_config(where), base_of_adapter(where)
    if model_folder is None:
        model_folder = base_folder(base_name) or _model_folder(folder, weights)
    text, config = read_config(model_folder)
    model = model_of(config)
    adapters = adapters_of(model, without_idle_targets(model, spec))
    if not _is_peft(folder):
        return replace(_read_shards(weights, model_folder, text, model, adapters), base_name=base_name)
    holding = placed_adapter(model, adapters, folder)
    return Source("hf", folder, model_folder, text, model, StoredForm(), (holding,), adapters=adapters, base_name=base_name)


def base_folder(name: str | None) -> Path | None:
    """The folder of the model that adapters say they are of; None where there is none here."""
    return Path(name) if name is not None and (Path(name) / CONFIG_NAME).is_file() else None


def _is_peft(folder: Path) -> bool:
    return (folder / ADAPTER_CONFIG).is_file() and (folder / ADAPTER_WEIGHTS).is_file()


def _scaling_of(content: Mapping[str, Any]) -> float | None:
    """What the adapters in a file are multiplied by; None of weights."""
    options = content.get("options")
    return options.get(ADAPTERS_SCALING) if isinstance(options, dict) else None


def _with_kept(source: Source, folder: Path) -> Source:
    """A source with the tensors of a Hugging Face folder that are no shard's."""
    kept = kept_tensors(source.model, folder)
    if not kept:
        return source
    held = Holding(whole_tensors("kept", [entry.spec for entry in kept.values()]), kept)
    return replace(source, holdings=(*source.holdings, held), kept=kept)


def holdings_of(folder: Path, model: Model) -> tuple[Holding, ...]:
    """Where the tensors of ``model`` lie in a folder of any form that :func:`open_source` takes. Raises as that does."""
    weights = _weights_folder(folder) if (folder / TRACKER).is_file() or (folder / "actor").is_dir() else folder
    if _is_megatron(weights):
        return _read_megatron(weights, folder, "", model).holdings
    return (placed_checkpoint(model, weights),)


def adapter_holdings_of(folder: Path, model: Model, adapters: Adapters) -> tuple[Holding, ...]:
    """Where the factors of ``adapters`` lie in Megatron's shards of any layout, which a run with them saved. Raises as :func:`open_adapter`
    for shards."""
    return _read_shards(folder, folder, "", model, adapters).holdings


def _is_megatron(folder: Path) -> bool:
    if is_distributed(folder) or any(folder.glob("mp_rank_*")):
        return True
    # A Hugging Face folder may be called anything.
    return folder.name.startswith(("iter_", _RELEASE)) and not any(folder.glob("*.safetensors*"))


def _read_megatron(folder: Path, model_folder: Path, text: str, model: Model) -> Source:
    if not is_distributed(folder):
        return _read_shards(folder, model_folder, text, model)
    placement, stored, step = placed_chunks(folder, model)
    form = form_of_folder(model, model_folder)
    return Source("megatron", folder, model_folder, text, model, form, (Holding(placement, stored),), step=step)


def _weights_folder(folder: Path) -> Path:
    """The folder with the files of weights that ``folder`` stands for."""
    if (folder / "actor").is_dir():
        folder = folder / "actor"
    tracker = folder / TRACKER
    if tracker.is_file():
        text = tracker.read_bytes().decode("utf-8", errors="replace").strip()
        if text != _RELEASE and not (text.isascii() and text.isdigit()):
            raise CheckpointError(f"{tracker} holds {text!r}, which is neither a step number nor {_RELEASE}")
        shards = folder / _RELEASE if text == _RELEASE else shards_folder(folder, int(text))
        return shards if shards.is_dir() else hf_folder(folder)
    if any(folder.glob("*.safetensors*")) or any(folder.glob("mp_rank_*")) or is_distributed(folder):
        return folder
    kinds = f"*.safetensors, {TRACKER} beside iter_*, mp_rank_*, or {METADATA}"
    raise CheckpointError(f"{folder} holds none of {kinds}; a conversion or a save that was cut short has none either")


def model_folder_of(folder: Path) -> Path:
    """The folder with ``config.json`` of a checkpoint of any form. Raises as :func:`open_source`."""
    return folder if (folder / CONFIG_NAME).is_file() else _model_folder(folder, _weights_folder(folder))


def _model_folder(folder: Path, weights: Path) -> Path:
    beside = [weights, weights.parent, *(weights.parent / name for name in HF_FOLDER_NAMES)]
    for candidate in beside:
        if (candidate / CONFIG_NAME).is_file():
            return candidate
    raise ConfigError(f"{folder}: no {CONFIG_NAME} beside the shards says what model they are of; name its Hugging Face folder by --model")


@dataclass(frozen=True, slots=True)
class RankFile:
    """One of Megatron's ``mp_rank_*`` folders: its name, the rank that writes it, and what its ``model_optim_rng.pt`` holds."""

    name: str
    rank: int
    content: Mapping[str, Any]


def rank_files(folder: Path, adapters: Adapters | None = None) -> tuple[Topology, Iterator[RankFile]]:
    """The layout of shards in Megatron's ``torch`` format, and all files, read one by one.

    Raises CheckpointError for missing, unexpected and damaged ones, and where they hold adapters and weights are asked for, or others
    than ``adapters``.
    """
    found = sorted(path.name for path in folder.glob("mp_rank_*"))
    if not found:
        raise CheckpointError(f"{folder}: neither mp_rank_* folders of Megatron's torch format nor {METADATA} of torch_dist")
    first = _content(folder, found[0])
    topology = topology_of(first, folder / found[0])
    names = rank_writers(topology)
    differing = sorted(names.keys() ^ set(found))
    scaling = _scaling_of(first)
    if adapters is None and scaling is not None:
        raise CheckpointError(f"{folder}: its shards hold adapters alone; take the merged weights or the adapter folder beside them")
    if adapters is not None and scaling != adapters.spec.scaling:
        held = "weights and no adapters" if scaling is None else f"adapters that are multiplied by {scaling}"
        raise CheckpointError(
            f"{folder}: its shards hold {held}, and rank and alpha of those asked for make it {adapters.spec.scaling}; they are of two runs"
        )
    if differing:
        raise CheckpointError(
            f"{folder}: {found[0]} says {_said(topology)}, whose folders are {len(names)}; missing or unexpected: {first_few(differing)}"
        )

    def read() -> Iterator[RankFile]:
        for name, rank in names.items():
            content = first if name == found[0] else _content(folder, name)
            if topology_of(content, folder / name) != topology:
                raise CheckpointError(f"{folder}: {name} and {found[0]} were saved under different layouts; they are of two checkpoints")
            yield RankFile(name, rank, content)

    return topology, read()


def _read_shards(folder: Path, model_folder: Path, text: str, model: Model, adapters: Adapters | None = None) -> Source:
    """Files of Megatron's ``torch`` format, by rlsync or by Megatron-LM."""
    topology, files = rank_files(folder, adapters)
    holdings: list[Holding] = []
    findings: list[str] = []
    flavours: set[Flavour] = set()
    step = 0
    for file in files:
        views, wrong, spelled = _named(file.content, model, topology, file.rank, f"{file.name}/{RANK_STATE_FILE}", adapters)
        findings += wrong
        flavours |= spelled
        step = file.content.get("iteration", 0)
        if not findings:
            placement, misfits = _placed(model, topology, file.rank, views, file.name, adapters)
            findings += misfits
            holdings.append(Holding(placement, {b.name: views[b.name].stored(b.name) for b in placement.buffers}))
    if findings:
        raise PlacementError(f"{folder} does not hold {model.architecture}: {first_few(findings, separator='; ')}")
    return Source(
        "megatron",
        folder,
        model_folder,
        text,
        model,
        form_of_folder(model, model_folder),
        tuple(holdings),
        topology,
        "te" if "te" in flavours else "local",
        step if isinstance(step, int) else 0,
        adapters=adapters,
    )


def _content(folder: Path, name: str) -> Mapping[str, Any]:
    content = read_torch_file(folder / name / RANK_STATE_FILE)
    if not isinstance(content, dict):
        raise CheckpointError(f"{folder / name / RANK_STATE_FILE} holds a {type(content).__name__}, expected a dict by Megatron or rlsync")
    return content


def topology_of(content: Mapping[str, Any], where: Path) -> Topology:
    """How a file says that the model was cut: in rlsync's words, or by the arguments of Megatron-LM."""
    said = content.get("topology")
    if isinstance(said, dict):
        try:
            return Topology(**said)
        except TypeError:
            raise CheckpointError(f"{where}: its topology {said} is not one of this version of rlsync") from None
    arguments = getattr(content.get("args"), "state", None) if isinstance(content.get("args"), Opaque) else None
    if not isinstance(arguments, dict):
        raise CheckpointError(f"{where}: neither rlsync's topology nor Megatron-LM's args say how its model was cut")
    uneven = [f"{name} {arguments[name]}" for name in _UNEVEN if arguments.get(name)]
    if uneven:
        raise CheckpointError(f"{where}: {', '.join(uneven)} cuts the layers in a way that is not supported")
    sizes = {field: arguments.get(name) for field, name in _ARGUMENTS.items()}
    return smallest_topology(**{field: size for field, size in sizes.items() if isinstance(size, int)} | _etp(sizes))


def _etp(sizes: Mapping[str, Any]) -> dict[str, int]:
    return {} if isinstance(sizes["etp_size"], int) else {"etp_size": sizes["tp_size"] or 1}


def smallest_topology(**sizes: int) -> Topology:
    """A topology of these sizes with as few data-parallel ranks as hold all experts."""
    dense, experts = sizes.get("tp_size", 1) * sizes.get("cp_size", 1), sizes.get("ep_size", 1) * sizes.get("etp_size", 1)
    dp_size = next((dp for dp in range(1, experts + 1) if dense * dp % experts == 0), 1)
    return Topology(**sizes, dp_size=dp_size)


def _said(topology: Topology) -> str:
    sizes = {"TP": topology.tp_size, "PP": topology.pp_size, "VPP": topology.vpp_size, "EP": topology.ep_size, "ETP": topology.etp_size}
    return ", ".join(f"{axis}={size}" for axis, size in sizes.items() if size > 1 or axis in ("TP", "PP"))


def _named(
    content: Mapping[str, Any], model: Model, topology: Topology, rank: int, where: str, adapters: Adapters | None
) -> tuple[dict[str, TensorView], list[str], set[Flavour]]:
    """Tensors of one rank by global name under the local spec; what is wrong with their names; and the specs that they are named by."""
    keys = chunk_keys(topology.vpp_size)
    chunks = [dict(_tensors(content.get(key))) for key in keys]
    findings = [f"{where} has no {key!r}" for key in keys if not isinstance(content.get(key), dict)]
    views: dict[str, TensorView] = {}
    flavours: set[Flavour] = set()
    for name in local_names(model, topology, rank, adapters):
        spelled = [each for each in dict.fromkeys((name.local, name.te)) if each in chunks[name.chunk]]
        if len(spelled) != 1:
            called = both_names(name.bound.local, name.local)
            findings.append(f"{where}: {called} is {'there under two names' if spelled else 'missing'}")
            continue
        if name.te != name.local:
            flavours.add("te" if spelled[0] == name.te else "local")
        views[name.bound.local] = chunks[name.chunk].pop(spelled[0])
    findings += [f"{where}: {name} {view.shape} is unexpected" for chunk in chunks for name, view in chunk.items()]
    return views, findings, flavours


def _tensors(chunk: Any) -> Iterator[tuple[str, TensorView]]:
    for name, value in chunk.items() if isinstance(chunk, dict) else ():
        if isinstance(name, str) and not name.endswith(EXTRA_STATE) and isinstance(value, TensorView):
            yield name, value


def _placed(
    model: Model, topology: Topology, rank: int, views: Mapping[str, TensorView], where: str, adapters: Adapters | None
) -> tuple[Placement, list[str]]:
    """The placement of one rank with the dtypes of its file, and the shapes that are not those of the table."""
    # As many rows as this rank has, whatever they were a multiple of.
    rows = {"embedding.word_embeddings.weight": 0, "output_layer.weight": 0, "output_layer.adapter.lora_B": 0}
    rows["embedding.word_embeddings.adapter.lora_A"] = 1
    divisor = next((views[name].shape[dim] for name, dim in rows.items() if name in views and len(views[name].shape) == 2), 1)
    expected = megatron_placement(model, topology, rank, make_vocab_size_divisible_by=divisor, adapters=adapters)
    findings = [
        f"{where}: {buffer.name} has shape {views[buffer.name].shape}, expected {buffer.shape}"
        for buffer in expected.buffers
        if views[buffer.name].shape != buffer.shape
    ]
    buffers = tuple(replace(buffer, dtype=views[buffer.name].dtype) for buffer in expected.buffers)
    return replace(expected, holder=where, buffers=buffers), findings
