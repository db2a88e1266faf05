"""GPTModel chunks of this rank: building, unwrapping, walking their parameters by global name.

Must not know HF names, files or engines.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from importlib import import_module
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.utils import get_te_version

from rlsync.errors import ConfigError, PlacementError, RlsyncError
from rlsync.layout.topology import Topology
from rlsync.megatron.config import ModelConfig, model_config
from rlsync.megatron.cpu import enable_cpu
from rlsync.megatron.lora import ADAPTER, Adapter, adapter_path, adapters_of_chunk, add_adapters
from rlsync.megatron.overrides import SPEED_SWITCHES
from rlsync.megatron.packing import rotate_packed_on_device
from rlsync.megatron.parallel import compute_device, current_topology
from rlsync.megatron.scores import ScoringHead
from rlsync.megatron.specs import SpecName, block_spec, builds_transformer_engine, fuses_norms
from rlsync.megatron.versions import expert_modules, joins_experts
from rlsync.megatron.vision import PictureLayer, VisionLanguageModel
from rlsync.models import ExpertModule, Flavour, Part, check_parts, model_of
from rlsync.models.deepseek_v3 import LATENT_EPSILON
from rlsync.models.lora import Adapters, LoraSpec, adapters_of
from rlsync.models.rope import Llama3Scaling, Rope, YarnScaling
from rlsync.models.stacks import Model

_LOG = logging.getLogger(__name__)
_LAYER_LISTS = ("decoder.layers.",)
# Names of experts within a layer, one by one (SequentialMLP) and grouped (TEGroupedMLP), around the number on this rank.
_EXPERT = re.compile(r"(mlp\.experts\.local_experts\.|mlp\.experts\.linear_fc[12]\.weight)(\d+)(|\..*)")


@dataclass(frozen=True, slots=True)
class DdpOptions:
    """Switches of Megatron's DistributedDataParallel; fields as in ``DistributedDataParallelConfig``.

    ``bucket_size`` is in parameters; None lets Megatron choose. ``check_for_nan_in_grad`` None means: on, except with
    fp16, whose loss scaling expects overflows.
    """

    use_distributed_optimizer: bool = False
    grad_reduce_in_fp32: bool = True
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False
    bucket_size: int | None = None
    check_for_nan_in_grad: bool | None = None


def build_model(
    hf_config: Mapping[str, Any],
    *,
    topology: Topology,
    dtype: torch.dtype,
    make_vocab_size_divisible_by: int = 1,
    wrap_with_ddp: bool = True,
    ddp: DdpOptions | None = None,
    overrides: Mapping[str, Any] | None = None,
    spec: SpecName = "auto",
    frozen: Collection[Part] = (),
    lora: LoraSpec | None = None,
) -> list[MegatronModule]:
    """Build this rank's part of a model with random weights on its device.

    Collective over all ranks (tied embeddings agree by an all-reduce under pipeline parallelism). Without CUDA this process is
    prepared for CPU first (``enable_cpu``).

    Args:
        hf_config: content of config.json.
        topology: as given to ``initialize_parallel``; may add an uneven pipeline split.
        dtype: of the parameters.
        make_vocab_size_divisible_by: the vocabulary is padded to a multiple of this times tp_size.
        wrap_with_ddp: wrap each chunk in Megatron's DistributedDataParallel, which training needs. Load weights after
            or before, but before ``build_optimizer``: it copies them.
        ddp: options of that wrapper.
        overrides: TransformerConfig fields by name, see ``model_config``.
        spec: see ``block_spec``.
        frozen: parts of a vision-language model that are not trained: they have no gradients and no optimizer state.
        lora: adapters, which alone are trained then. ``is_adapter`` tells their parameters from the base's, whose names stay.

    Returns:
        One module per virtual pipeline stage, in order; a single one without virtual stages.

    Raises:
        ConfigError: as ``model_config``; everything, or a part of a model of text, is frozen; the topology differs from Megatron's process
            groups; Megatron's random state was not seeded; or adapters do not fit the model (``check_adapters``), or its layers.
    """
    enable_cpu()
    rotate_packed_on_device()
    _check_process(topology)
    config = model_config(
        hf_config,
        topology=topology,
        dtype=dtype,
        make_vocab_size_divisible_by=make_vocab_size_divisible_by,
        overrides=overrides,
        is_transformer_engine=builds_transformer_engine(spec),
    )
    model = model_of(hf_config)
    findings = check_parts(model, {f"frozen {part}": part for part in frozen}, {})
    if frozen and lora is not None:
        findings.append(f"frozen {', '.join(frozen)} beside lora, which freezes all but its adapters; leave one of them out")
    if findings:
        raise ConfigError("; ".join(findings))
    adapters = None if lora is None else adapters_of(model, lora)
    if dist.get_rank() == 0:
        _LOG.info("%s", _described(config.transformer, spec))
    stages = range(topology.vpp_size) if topology.vpp_size > 1 else (None,)
    chunks: list[MegatronModule] = [_build_chunk(config, vp_stage=stage, spec=spec) for stage in stages]
    for parameter, part in parts_of_parameters(chunks):
        parameter.requires_grad_(part not in frozen)
    if topology.experts_have_own_replicas:
        _reduce_experts_apart(chunks)
    _adapt(chunks, adapters, model, topology, dtype)
    return _wrap(chunks, ddp if ddp is not None else DdpOptions(), dtype=dtype) if wrap_with_ddp else chunks


def _reduce_experts_apart(chunks: Sequence[MegatronModule]) -> None:
    """Have gradients of experts summed over the ranks that hold the same experts.

    Megatron (0.16 to 0.19) tells its wrapper so under EP alone. Under EP 1 it takes the data-parallel ranks of all else for these, which
    are others where ETP is not TP: under TP 2, experts that are whole on both ranks would be trained on half of the tokens each.
    """
    for chunk in chunks:
        for layer in chunk.decoder.layers:
            for parameter in layer.mlp.experts.parameters() if hasattr(layer.mlp, "experts") else ():
                parameter.allreduce = False


def _adapt(chunks: Sequence[MegatronModule], adapters: Adapters | None, model: Model, topology: Topology, dtype: torch.dtype) -> None:
    """Have the chunks know their adapters, and add those of this rank."""
    for chunk in chunks:
        chunk.adapters = adapters
    if adapters is not None:
        weights = {name: (chunks[index], local) for index, local, name, _ in iter_parameters(chunks)}
        flavour, experts = flavour_of(chunks), experts_of(chunks)
        add_adapters(chunks, weights, model, adapters, topology, dist.get_rank(), dtype, flavour=flavour, experts=experts)


def unwrap(model: torch.nn.Module) -> GPTModel:
    """The GPTModel inside DistributedDataParallel, Float16Module and other wrappers that keep it in ``module``."""
    while not isinstance(model, GPTModel):
        inner = getattr(model, "module", None)
        assert inner is not None, f"no GPTModel inside {type(model).__name__}"
        model = inner
    return model


def iter_parameters(models: Sequence[torch.nn.Module]) -> Iterator[tuple[int, str, str, torch.nn.Parameter]]:
    """Every parameter of this rank: ``(chunk_index, local_name, global_name, parameter)``, in module order.

    Local names are those inside the chunk's GPTModel; global names count layers and experts over the whole model, from 0. A shared
    parameter is yielded once, under its first name; ``output_layer.weight`` of a tied model appears on the last of
    several pipeline stages, which holds a copy of its own.
    """
    for chunk_index, model in enumerate(models):
        chunk = unwrap(model)
        numbers = _Numbers(chunk)
        for name, parameter in chunk.named_parameters():
            yield chunk_index, name, numbers.global_name(name), parameter


def global_names(model: torch.nn.Module) -> Callable[[str], str]:
    """The global name of what a chunk calls by a local one: a parameter, or a buffer that a checkpoint keeps."""
    return _Numbers(unwrap(model)).global_name


def parts_of_parameters(models: Sequence[torch.nn.Module]) -> Iterator[tuple[torch.nn.Parameter, Part]]:
    """Every parameter of this rank with the part of the model that it belongs to."""
    tower_parts = unwrap(models[0]).tower_parts
    for _, _, name, parameter in iter_parameters(models):
        yield parameter, tower_parts.get(name, "language_model")


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name, local or global, is a factor of an adapter."""
    return name.split(".")[-2:-1] == [ADAPTER]


def adapters_in(models: Sequence[torch.nn.Module]) -> Adapters | None:
    """The adapters of chunks that ``build_model`` made with some, or None."""
    found: Adapters | None = getattr(unwrap(models[0]), "adapters", None) if models else None
    return found


def adapters_by_weight(models: Sequence[torch.nn.Module]) -> dict[str, Adapter]:
    """Adapters of this rank by the global name of the weight that they add to; empty where there are none."""
    found = [dict(adapters_of_chunk(unwrap(model))) for model in models]
    paths = ((index, adapter_path(local), name) for index, local, name, _ in iter_parameters(models))
    return {name: found[index][path] for index, path, name in paths if path in found[index]}


def iter_weights(models: Sequence[torch.nn.Module]) -> Iterator[tuple[str, torch.Tensor]]:
    """Everything of this rank that a checkpoint keeps, by global name: every parameter, then every persistent buffer."""
    yield from ((name, parameter) for _, _, name, parameter in iter_parameters(models))
    for model in models:
        chunk = unwrap(model)
        numbers = _Numbers(chunk)
        for prefix, module in chunk.named_modules():
            for name, buffer in module.named_buffers(recurse=False):
                if name not in module._non_persistent_buffers_set:
                    yield numbers.global_name(f"{prefix}.{name}" if prefix else name), buffer


def flavour_of(models: Sequence[torch.nn.Module]) -> Flavour:
    """How parameters of live chunks are called: "te" where their spec leaves the norms to the linear that follows, else "local"."""
    return "te" if fuses_norms(unwrap(models[0]).transformer_layer_spec) else "local"


def experts_of(models: Sequence[torch.nn.Module]) -> ExpertModule | None:
    """Which of Megatron's modules holds the experts of a layer; None where it is the one that the spec has without being asked.

    A rank without such layers goes by the model's config. Raises PlacementError for a module of another class.
    """
    for model in models:
        for layer in unwrap(model).decoder.layers:
            experts = getattr(layer.mlp, "experts", None)
            if experts is not None:
                known = expert_modules()
                name = next((name for name, module in known.items() if isinstance(experts, module)), None)
                if name is None:
                    raise PlacementError(f"experts are held by {type(experts).__name__}; known are {', '.join(known)}")
                return name
    return "GroupedMLP" if joins_experts(unwrap(models[0]).config, is_te=flavour_of(models) == "te") else None


def gather_parameters(models: Sequence[torch.nn.Module], parameters: Iterable[torch.Tensor] | None = None) -> None:
    """Make every parameter of this rank current. Collective over the DP group.

    With ``overlap_param_gather`` the optimizer leaves each rank with new values for its own shard only, and the rest
    arrives during the next forward pass; whoever reads parameters before must call this. Free otherwise.

    Args:
        parameters: of the models, from a caller who knows them and has no time to walk the modules.

    Raises:
        RlsyncError: the weights are in host memory (``ActorMemory.offload``).
    """
    if parameters is None:
        parameters = (tensor for _, tensor in iter_weights(models))
    if any(p.data_ptr() == 0 and p.numel() for p in parameters):
        away = [name for name, p in iter_weights(models) if p.data_ptr() == 0 and p.numel()]
        raise RlsyncError(
            f"the actor's weights are offloaded ({len(away)} parameters and buffers, among them {away[0]}): onload them before they "
            "are synced, saved or used"
        )
    for model in models:
        if isinstance(model, DistributedDataParallel) and model.use_forward_hook:
            # The public start_param_sync(force_sync=True) only waits where a gather is in flight, and gathers the first
            # bucket alone then; Megatron's own evaluation takes this way for the same reason.
            model.disable_forward_pre_hook(param_sync=True)
            model.enable_forward_pre_hook()


class _Numbers:
    """What turns the names inside a chunk into global ones: its layers' numbers, and the first of its experts."""

    def __init__(self, chunk: GPTModel) -> None:
        self._layers = {f"decoder.layers.{index}.": layer.layer_number - 1 for index, layer in enumerate(chunk.decoder.layers)}
        experts = chunk.config.num_moe_experts or 0
        self._first_expert = experts // chunk.config.expert_model_parallel_size * parallel_state.get_expert_model_parallel_rank()

    def global_name(self, local_name: str) -> str:
        for prefix in _LAYER_LISTS:
            if local_name.startswith(prefix):
                index, rest = local_name[len(prefix) :].split(".", 1)
                return f"{prefix}{self._layers[f'{prefix}{index}.']}.{self._with_expert(rest)}"
        return local_name

    def _with_expert(self, name: str) -> str:
        found = _EXPERT.fullmatch(name)
        return name if found is None else f"{found[1]}{self._first_expert + int(found[2])}{found[3]}"


def _check_process(topology: Topology) -> None:
    """Raise ConfigError where Megatron's groups are of another layout, or its random state was not seeded."""
    running = current_topology()
    names = ("tp_size", "pp_size", "vpp_size", "cp_size", "dp_size", "ep_size", "etp_size")
    different = [name for name in names if getattr(topology, name) != getattr(running, name)]
    if different:
        raise ConfigError(
            "the topology differs from Megatron's process groups: "
            + ", ".join(f"{name} {getattr(topology, name)} asked, {getattr(running, name)} running" for name in different)
        )
    if not get_cuda_rng_tracker().is_initialized():
        raise ConfigError(
            "Megatron's random state of the tensor-parallel ranks does not exist: call "
            "megatron.core.tensor_parallel.model_parallel_cuda_manual_seed(seed) on every rank after the process groups were made"
        )


def _build_chunk(config: ModelConfig, *, vp_stage: int | None, spec: SpecName) -> GPTModel:
    is_first = parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage)
    takes_deepstack = is_first and config.vision is not None and config.vision.model.deepstack_visual_indexes
    layer_class = PictureLayer if takes_deepstack else None
    build: Callable[..., GPTModel] = partial(GPTModel, position_embedding_type="rope")
    if config.vision is not None:
        build = partial(VisionLanguageModel, vision=config.vision)
    with _accumulating_without_apex(config.transformer):
        chunk = build(
            config=config.transformer,
            transformer_layer_spec=block_spec(
                config.transformer, spec=spec, vp_stage=vp_stage, layer_class=layer_class, normed_outputs=config.normed_outputs
            ),
            vocab_size=config.padded_vocab_size,
            max_sequence_length=config.max_sequence_length,
            pre_process=is_first,
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
            share_embeddings_and_output_weights=config.tied_embeddings,
            rotary_base=config.rope.theta,
            rotary_percent=config.rope.partial,
            seq_len_interpolation_factor=config.rope.interpolation,
            parallel_output=True,
            vp_stage=vp_stage,
        )
    if config.transformer.multi_latent_attention:
        _set_latent_epsilon(chunk)
    elif config.rope.llama3 is not None or config.rope.yarn is not None:
        # GPTModel(rope_scaling=True) knows one set of llama3 constants only (rotary_pos_embedding.py of 0.16), and its yarn blends over
        # other pairs than transformers'.
        inverse = inverse_frequencies(config.rope, config.transformer.kv_channels)
        chunk.rotary_pos_emb.inv_freq = inverse.to(compute_device())
    if chunk.post_process:
        # GPTModel makes it itself.
        chunk.output_layer.__class__ = ScoringHead
    chunk.unpadded_vocab_size = config.vocab_size
    chunk.tower_parts = config.tower_parts
    return chunk.to(compute_device())


def _set_latent_epsilon(chunk: GPTModel) -> None:
    """The norms of compressed queries, keys and values have an epsilon of their own in transformers, whatever ``rms_norm_eps`` says."""
    for module in chunk.modules():
        if isinstance(module, MLASelfAttention):
            for name in ("q", "kv"):
                norm = getattr(module, f"{name}_layernorm", None)
                if norm is not None:
                    # Under TransformerEngine the norm is in the linear that follows.
                    (norm if hasattr(norm, "eps") else getattr(module, f"linear_{name}_up_proj")).eps = LATENT_EPSILON


@contextmanager
def _accumulating_without_apex(transformer: TransformerConfig) -> Iterator[None]:
    """Around the building of a chunk whose TransformerEngine layers add gradients of weights in their matrix products.

    The one layer beside them with a weight matrix, Megatron's output layer, would need Apex for that, and refuses to be built without;
    ``ScoringHead`` adds up gradients in a way of its own.
    """
    if not transformer.gradient_accumulation_fusion:
        yield
        return
    layers = import_module("megatron.core.tensor_parallel.layers")
    before = layers._grad_accum_fusion_available
    layers._grad_accum_fusion_available = True
    try:
        yield
    finally:
        layers._grad_accum_fusion_available = before


def _described(transformer: TransformerConfig, spec: SpecName) -> str:
    """Which layers and which attention a model is made of, and the switches for speed that are on."""
    if builds_transformer_engine(spec):
        layers = f"TransformerEngine {get_te_version()}, attention by its DotProductAttention (NVTE_DEBUG=1 NVTE_DEBUG_LEVEL=1 says which)"
    else:
        layers = "Megatron's local ones, attention by torch's scaled_dot_product_attention"
    switches = [name for name in SPEED_SWITCHES if getattr(transformer, name, False)]
    return f"decoder layers: {layers}; switched on: {', '.join(switches) or 'nothing'}"


def inverse_frequencies(rope: Rope, head_dim: int) -> torch.Tensor:
    """Inverse frequencies of a rotary embedding of one dimension, rescaled where its type says so: (head_dim / 2,) float32 on the CPU."""
    plain = 1.0 / (rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim))
    if rope.llama3 is not None:
        return _llama3(rope.llama3, plain)
    return plain if rope.yarn is None else _yarn(rope.yarn, rope.theta, plain)


def _llama3(scaling: Llama3Scaling, plain: torch.Tensor) -> torch.Tensor:
    """The share of the unscaled frequency rises linearly in 1 / wavelength, from 0 at ``original / low_freq_factor`` to 1 at
    ``original / high_freq_factor``; the rest is the frequency divided by ``factor``."""
    rotations = scaling.original_max_position_embeddings * plain / (2 * math.pi)
    share = ((rotations - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)).clamp(0.0, 1.0)
    return (1 - share) * plain / scaling.factor + share * plain


def _yarn(scaling: YarnScaling, theta: float, plain: torch.Tensor) -> torch.Tensor:
    """The share of the unscaled frequency falls linearly over the pairs, from 1 at the last that turns ``beta_fast`` times within the
    original length to 0 at the first that turns ``beta_slow`` times (equation 23 of arXiv 2309.00071, with whole pairs)."""
    pairs = len(plain)

    def pair_of(turns: float) -> float:
        return 2 * pairs * math.log(scaling.original_max_position_embeddings / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first, last = max(math.floor(pair_of(scaling.beta_fast)), 0), min(math.ceil(pair_of(scaling.beta_slow)), 2 * pairs - 1)
    width = last - first if last != first else 0.001
    share = 1 - ((torch.arange(pairs, dtype=torch.float32) - first) / width).clamp(0.0, 1.0)
    return (1 - share) * plain / scaling.factor + share * plain


def _wrap(chunks: Sequence[MegatronModule], options: DdpOptions, *, dtype: torch.dtype) -> list[MegatronModule]:
    settings = asdict(options)
    if settings["check_for_nan_in_grad"] is None:
        settings["check_for_nan_in_grad"] = dtype is not torch.float16
    if options.overlap_param_gather and not (options.use_distributed_optimizer and options.overlap_grad_reduce):
        raise ConfigError(
            f"overlap_param_gather needs use_distributed_optimizer ({options.use_distributed_optimizer}) and overlap_grad_reduce "
            f"({options.overlap_grad_reduce}); set both to True"
        )
    config = DistributedDataParallelConfig(**settings)
    return [
        # Later chunks of an interleaved pipeline finish their gradients early, where small buckets would not overlap.
        DistributedDataParallel(chunk.config, config, chunk, disable_bucketing=index > 0)
        for index, chunk in enumerate(chunks)
    ]
