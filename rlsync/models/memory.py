"""Memory that a rank of the actor takes in a training step, on paper: exact for what is kept between steps, an estimate for the rest.

Estimates are of half precision on a GPU. What layers keep for the backward pass follows the tensors that Megatron-Core's layers save; held
to measured steps by ``tests/unit/test_models_memory.py``. What a vision tower keeps follows ``rlsync.megatron.tower``.
"""

from __future__ import annotations

from collections.abc import Iterator, Set
from dataclasses import dataclass
from typing import Literal

from rlsync.layout.geometry import DTYPE_BYTES
from rlsync.layout.topology import Topology
from rlsync.models.lora import Adapters, LoraSpec, adapters_of, module_of
from rlsync.models.moe import sparse_layers
from rlsync.models.placement import held_parameters, megatron_placement
from rlsync.models.stacks import Model, Part

# Positions whose logits exist at once where nobody says otherwise. With the 152,064 tokens of Qwen's vocabulary that is 2.5 GB in half
# precision on one tensor rank.
CHUNK_TOKENS = 8192
# A gradient buffer of Megatron's distributed optimizer ends at a multiple of this times the data-parallel size.
_BUFFER_MULTIPLE = 128
# Temporaries of the scores: pieces of a matrix of logits in float32, of which three exist at once.
_PIECE_BYTES = 3 * 4 * 64 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingOptions:
    """What of a run decides the memory of its steps.

    Attributes:
        dtype: of the parameters.
        grads_in_fp32: gradients are accumulated in float32 whatever the parameters are in.
        distributed_optimizer: its state is cut over the data-parallel ranks.
        offloaded: share of the optimizer that is in host memory (``optimizer_cpu_offload``).
        precise: Megatron's ``use_precision_aware_optimizer``, whose float32 main parameters are part of the optimizer's state. Without it
            they stay on the GPU, and the step on the host has copies of its own.
        frozen: parts of the model that are not trained.
        lora: adapters, which alone are trained then.
        micro_batch_tokens: positions of a micro-batch of one data-parallel replica, padding counted.
        micro_batch_patches: patches of the pictures of such a micro-batch, before a tower merges them.
        scoring_tokens: positions of a micro-batch that is scored without gradients; 0 where nothing is. ``scoring_patches``: its patches.
        num_microbatches: of an optimizer update on one replica.
        chunk_tokens: positions whose logits exist at once.
        sequence_parallel: Megatron's.
        fused_activation: Megatron's ``bias_activation_fusion``.
        recompute: activations that are computed again in the backward pass: none, those of attention, or whole layers.
        recompute_method: with "full": all layers in groups ("uniform"), or the first ones ("block").
        recompute_layers: with "full": layers of a group, or how many first ones.
        make_vocab_size_divisible_by: the vocabulary is padded to a multiple of this times TP.
    """

    dtype: str = "bfloat16"
    grads_in_fp32: bool = True
    distributed_optimizer: bool = True
    offloaded: float = 0.0
    precise: bool = False
    frozen: Set[Part] = frozenset()
    lora: LoraSpec | None = None
    micro_batch_tokens: int
    micro_batch_patches: int = 0
    scoring_tokens: int = 0
    scoring_patches: int = 0
    num_microbatches: int = 1
    chunk_tokens: int = CHUNK_TOKENS
    sequence_parallel: bool = False
    fused_activation: bool = False
    recompute: Literal["none", "selective", "full"] = "none"
    recompute_method: Literal["uniform", "block"] = "uniform"
    recompute_layers: int = 1
    make_vocab_size_divisible_by: int = 1


@dataclass(frozen=True, slots=True)
class TrainingMemory:
    """Bytes of one rank. Exact, but for the padding of buffers: ``weights``, ``gradients``, ``optimizer``. Estimates:

    Attributes:
        activations: kept for the backward pass by all micro-batches in flight, in the language model.
        pictures: the same in a vision tower, which is whole on each tensor- and context-parallel rank of the first stage.
        logits: of a chunk of tokens, their temporaries, and the gradient of the head.
        step: temporaries of the optimizer's step, when there are neither activations nor logits.
        scoring: of a pass without gradients, at most: what a layer holds, and the logits.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    pictures: int
    logits: int
    step: int
    scoring: int

    @property
    def kept(self) -> int:
        """Between steps."""
        return self.weights + self.gradients + self.optimizer

    @property
    def peak(self) -> int:
        """In a step."""
        return self.kept + max(self.passes, self.step, self.scoring)

    @property
    def passes(self) -> int:
        """Beside that, in the forward and backward passes of a step."""
        return self.activations + self.pictures + self.logits


def training_memory(model: Model, topology: Topology, options: TrainingOptions) -> tuple[TrainingMemory, ...]:
    """The memory of a rank of each pipeline stage, one that takes as much as any. Raises ConfigError or PlacementError for a topology that
    does not fit."""
    found = []
    adapters = None if options.lora is None else adapters_of(model, options.lora)
    for stage in range(topology.pp_size):
        rank = next(rank for rank in range(topology.world_size) if topology.coordinates(rank).pp_rank == stage)
        sizes = _held(model, topology, rank, options, adapters)
        item = DTYPE_BYTES[options.dtype]
        # Two moments. Float32 main parameters of a float32 model are its own.
        main, on_gpu = 0 if options.dtype == "float32" else 4, 1 - options.offloaded
        state = 8 * on_gpu + main * (on_gpu if options.precise else 1)
        gradient_item = 4 if options.grads_in_fp32 else item
        trained = sum(sizes.trained.values())
        # What Adam divides by, and float32 copies of gradients in other precisions.
        shard = sum(_shard(topology, options, sizes.trained))
        step = shard * (4 if gradient_item == 4 else 8)
        found.append(
            TrainingMemory(
                weights=sizes.weight_bytes,
                gradients=trained * gradient_item,
                optimizer=round(state * shard),
                activations=_activations(model, topology, stage, options),
                pictures=0 if stage else _pictures(model, topology, rank, options, adapters),
                logits=_logits(model, topology, options) if stage == topology.pp_size - 1 else 0,
                step=round(step * on_gpu),
                scoring=_scoring(model, topology, stage, options),
            )
        )
    return tuple(found)


@dataclass(frozen=True, slots=True)
class _Held:
    """Bytes of the weights of a rank, and elements that it trains: of experts, and of all else."""

    weight_bytes: int
    trained: dict[bool, int]


def _held(model: Model, topology: Topology, rank: int, options: TrainingOptions, adapters: Adapters | None) -> _Held:
    divisor = options.make_vocab_size_divisible_by
    placement = megatron_placement(model, topology, rank, dtype=options.dtype, make_vocab_size_divisible_by=divisor)
    nbytes = sum(buffer.size * DTYPE_BYTES[buffer.dtype] for buffer in placement.buffers)
    stacks = {bound.local: bound.stack for bound in held_parameters(model, topology, rank)}
    trained = {True: 0, False: 0}
    if adapters is not None:
        factors = megatron_placement(model, topology, rank, dtype=options.dtype, make_vocab_size_divisible_by=divisor, adapters=adapters)
        for buffer in factors.buffers:
            trained[".experts." in buffer.name] += buffer.size
            nbytes += buffer.size * DTYPE_BYTES[buffer.dtype]
        return _Held(nbytes, trained)
    for buffer in placement.buffers:
        stack = stacks[buffer.name]
        if stack.part not in options.frozen and not stack.dtype:
            trained[stack.tensor_axis == "etp"] += buffer.size
    return _Held(nbytes, trained)


def _shard(topology: Topology, options: TrainingOptions, trained: dict[bool, int]) -> Iterator[int]:
    """Elements of the optimizer's state on a rank: of experts, and of all else."""
    whole = topology.tp_size * topology.cp_size * topology.dp_size
    replicas = {True: whole // (topology.ep_size * topology.etp_size), False: topology.cp_size * topology.dp_size}
    for is_expert, count in trained.items():
        parts = replicas[is_expert] if options.distributed_optimizer else 1
        yield -(-count // (parts * _BUFFER_MULTIPLE)) * _BUFFER_MULTIPLE if parts > 1 else count


def _activations(model: Model, topology: Topology, stage: int, options: TrainingOptions) -> int:
    """Bytes of activations of the most micro-batches that a stage has in flight."""
    tokens = -(-options.micro_batch_tokens // topology.cp_size)
    item = DTYPE_BYTES[options.dtype]
    cost = _layers(model, topology, stage, options)
    hidden = model.dims["hidden"] / (topology.tp_size if options.sequence_parallel else 1)
    kept = [_kept(layers, hidden, options) for layers in cost]
    working = max((max(layers) for layers in cost if layers), default=0.0) if options.recompute == "full" else 0.0
    if options.recompute == "full" and options.recompute_method == "uniform":
        working *= options.recompute_layers
    working += _in_dispatch(model, topology, options)
    beside = hidden if stage == 0 else 0.0
    if stage == topology.pp_size - 1:
        # Input and output of the last norm, and the whole hidden states that the head is given.
        beside += 2 * hidden + model.dims["hidden"]
    in_flight = _in_flight(topology, stage, options.num_microbatches) / topology.vpp_size
    return round(tokens * item * (sum(kept) * in_flight + working + beside))


def _pictures(model: Model, topology: Topology, rank: int, options: TrainingOptions, adapters: Adapters | None) -> int:
    """Bytes of a tower's activations, on the first stage. Blocks that are not trained keep none, and neither does what comes before the
    first trained part."""
    if model.vision is None:
        return 0
    parts, patches = _trained_parts(model, topology, rank, options, adapters), options.micro_batch_patches
    if not parts & {"vision_model", "vision_projection"}:
        return 0
    hidden, block, again = model.dims["vision"], _block(model), options.recompute == "full"
    # A merger's input, what its norm gives, its inner product and the activation of that: a square of patches is a row of them.
    kept = 4.0 * hidden * (1 + len(model.vision.deepstack_visual_indexes))
    if "vision_model" in parts:
        kept += model.vision.patch_dim + model.dims["num_blocks"] * (hidden if again else block)
    working = block if again and "vision_model" in parts else 0.0
    in_flight = -(-_in_flight(topology, 0, options.num_microbatches) // topology.vpp_size)
    return round(patches * DTYPE_BYTES[options.dtype] * (kept * in_flight + working))


def _block(model: Model) -> float:
    """Elements a patch that a block of a vision tower keeps for its backward pass."""
    stacks = [stack for stack in model.family.stacks if stack.part == "vision_model"]
    # A gated network has two.
    inner = sum(tensor.dims[0] == "vision_ffn" and len(tensor.dims) == 2 for s in stacks for rule in s.rules for tensor in rule.hf)
    # Inputs of both norms and what they give, queries, keys and values, what attention gives; the inner products, and as many of what is
    # made of them: an activation, and in a gated network what it is multiplied to.
    return 8 * model.dims["vision"] + 2 * inner * model.dims["vision_ffn"]


def _trained_parts(model: Model, topology: Topology, rank: int, options: TrainingOptions, adapters: Adapters | None) -> Set[Part]:
    """Parts of the model of which a rank trains parameters, or adapters on them."""
    held = held_parameters(model, topology, rank)
    if adapters is None:
        return {bound.stack.part for bound in held} - options.frozen
    return {bound.stack.part for bound in held if any(module_of(name) in adapters.modules for name, _ in bound.hf)}


def _layers(model: Model, topology: Topology, stage: int, options: TrainingOptions) -> list[list[float]]:
    """``_layer`` of each layer of each virtual chunk of a stage."""
    sparse = set(sparse_layers(model.num_layers, model.transformer["moe_layer_freq"])) if "num_experts" in model.dims else set()
    chunks = [topology.layers_of(model.num_layers, stage, chunk) for chunk in range(topology.vpp_size)]
    return [[_layer(model, topology, options, layer in sparse) for layer in chunk] for chunk in chunks]


def _scoring(model: Model, topology: Topology, stage: int, options: TrainingOptions) -> int:
    """Bytes of a forward pass without gradients: all that a layer or a block of a tower would keep, the hidden states around it, and on
    the last stage logits."""
    tokens = -(-options.scoring_tokens // topology.cp_size)
    if not tokens:
        return 0
    item, dims = DTYPE_BYTES[options.dtype], model.dims
    layer = max((cost for chunk in _layers(model, topology, stage, options) for cost in chunk), default=0.0)
    layer += _in_dispatch(model, topology, options)
    held = round(tokens * item * (layer + 2 * dims["hidden"]))
    if stage == 0 and model.vision is not None:
        held = max(held, round(options.scoring_patches * item * (_block(model) + 2 * dims["vision"])))
    if stage != topology.pp_size - 1:
        return held
    rows = min(tokens, options.chunk_tokens)
    columns = model.padded_vocab(topology.tp_size, options.make_vocab_size_divisible_by) // topology.tp_size
    logits = tokens * item * 2 * dims["hidden"] + rows * columns * item + min(_PIECE_BYTES, 3 * 4 * rows * columns)
    return max(held, logits)


def _in_flight(topology: Topology, stage: int, num_microbatches: int) -> int:
    """Micro-batches whose activations a stage keeps; with virtual stages those of single chunks."""
    pp, vpp = topology.pp_size, topology.vpp_size
    if vpp == 1:
        return min(pp - stage, num_microbatches)
    return min((pp - stage - 1) * 2 + (vpp - 1) * pp + 1, num_microbatches * vpp)


def _kept(layers: list[float], hidden: float, options: TrainingOptions) -> float:
    """Elements a token that a chunk keeps."""
    if options.recompute != "full":
        return sum(layers)
    if options.recompute_method == "uniform":
        return -(-len(layers) // options.recompute_layers) * hidden
    again = min(options.recompute_layers, len(layers))
    return again * hidden + sum(layers[again:])


def _layer(model: Model, topology: Topology, options: TrainingOptions, is_sparse: bool) -> float:
    """Elements a token that a layer keeps for its backward pass."""
    dims, tp = model.dims, topology.tp_size
    # Inputs of both norms, and what they give to the layers after them.
    inputs = 4 * dims["hidden"] / (tp if options.sequence_parallel else 1)
    return inputs + _attention(model, tp) + (_experts(model, topology, options) if is_sparse else _mlp(dims["ffn"] / tp, options))


def _attention(model: Model, tp: int) -> float:
    dims, values = model.dims, model.transformer
    heads = dims["num_heads"]
    if "multi_latent_attention" in values:
        key, value = values["qk_head_dim"] + values["qk_pos_emb_head_dim"], values["v_head_dim"]
        # Latents before and after their norms are whole on every tensor rank; keys and values are made of one matrix product.
        latents = 2 * ((dims.get("q_rank") or 0) + dims["kv_rank"]) + values["qk_pos_emb_head_dim"]
        return latents + heads * (2 * key + values["qk_head_dim"] + 2 * value + value) / tp
    query, keys = dims["q"], dims["kv"]
    # Queries and keys after their rotation, values, and what attention gives to its projection.
    kept = query + 2 * keys + query
    return (kept + (query + keys if values.get("qk_layernorm") else 0)) / tp


def _mlp(width: float, options: TrainingOptions) -> float:
    """Unfused, the two halves of the first product, the activation of one, a copy of the other, and what they are multiplied to."""
    return (3 if options.fused_activation else 5) * width


def _experts(model: Model, topology: Topology, options: TrainingOptions) -> float:
    """Where tokens are spread evenly over experts: a token as often as it is routed, and what its experts make of it."""
    dims, values = model.dims, model.transformer
    spread = topology.tp_size if options.sequence_parallel else 1
    routed = values["moe_router_topk"] * (dims["hidden"] + _mlp(dims["expert_ffn"] / topology.etp_size, options))
    router = 4 * dims["num_experts"] / spread
    shared = _mlp(dims["shared_ffn"] / topology.tp_size, options) if dims.get("shared_ffn") else 0.0
    return routed * topology.etp_size / spread + router + shared


def _in_dispatch(model: Model, topology: Topology, options: TrainingOptions) -> float:
    """Elements a token that the layer of experts at work has beside what it keeps: tokens on their way to experts, and their results."""
    if "num_experts" not in model.dims:
        return 0.0
    spread = topology.tp_size if options.sequence_parallel else 1
    return 2 * float(model.transformer["moe_router_topk"]) * model.dims["hidden"] * topology.etp_size / spread


def _logits(model: Model, topology: Topology, options: TrainingOptions) -> int:
    tokens = -(-options.micro_batch_tokens // topology.cp_size)
    columns = model.padded_vocab(topology.tp_size, options.make_vocab_size_divisible_by) // topology.tp_size
    item = DTYPE_BYTES[options.dtype]
    rows = min(tokens, options.chunk_tokens)
    pieces = min(_PIECE_BYTES, 3 * 4 * rows * columns)
    # Beside adapters the head is frozen.
    of_head = 0 if options.lora is not None else columns * model.dims["hidden"] * item * (1 if tokens <= options.chunk_tokens else 2)
    return rows * columns * item + max(pieces, of_head + tokens * model.dims["hidden"] * item)
