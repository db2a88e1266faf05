"""Memory of the actor's GPUs on paper: what a run takes of them in training and beside a rollout, and what to change where it cannot fit.

Reads configuration, ``config.json`` and the limits of an image processor alone. ``rlsync.models.memory`` counts what a rank of the actor
takes; engines take what they are told to.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rlsync.layout.topology import Topology
from rlsync.models import model_of
from rlsync.models.memory import TrainingMemory, TrainingOptions, training_memory
from rlsync.models.stacks import Model
from workers.colocation import ColocationPlan
from workers.config import AnyConfig, SftConfig
from workers.pictures import PictureSizes, read_picture_limits

_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
GIB = 2**30
# Of each process on a GPU: what CUDA and NCCL take, and what is lost between allocations. A guess.
_PROCESS_BYTES = 2 * GIB
# How far the estimate may be off before it refuses a run.
_TOLERANCE = 0.1


@dataclass(frozen=True, slots=True)
class PredictedMemory:
    """Bytes of the fullest GPU of the actor.

    Attributes:
        rank: of the actor, where it takes most in a step; its pipeline stage is ``stage``.
        sync_buffers: for buckets on their way to engines, at most.
        processes: what CUDA takes for the actor and for an engine beside it; 0 without GPUs.
        engine_training: of an engine on the same GPU while the actor trains; ``engine_rollout`` while it generates.
        actor_rollout: of the actor then.
        device: that the GPU has, or None where there is none.
    """

    stage: int
    rank: TrainingMemory
    sync_buffers: int
    processes: int
    engine_training: int
    engine_rollout: int
    actor_rollout: int
    device: int | None

    @property
    def in_training(self) -> int:
        return self.rank.peak + self.sync_buffers + self.processes + self.engine_training

    @property
    def in_rollout(self) -> int:
        return self.actor_rollout + self.sync_buffers + self.processes + self.engine_rollout

    @property
    def is_close(self) -> bool:
        """Whether what a GPU has is nearer than the estimate is."""
        return self.device is not None and max(self.in_training, self.in_rollout) > self.device * (1 - _TOLERANCE / 2)

    def as_dict(self) -> dict[str, Any]:
        """For JSON; bytes."""
        return {**asdict(self), "actor_peak": self.rank.peak, "in_training": self.in_training, "in_rollout": self.in_rollout}


def predict_memory(
    config: AnyConfig,
    hf_config: Mapping[str, Any],
    topology: Topology,
    plan: ColocationPlan,
    *,
    pictures: Sequence[PictureSizes] = (),
    shared: bool,
    on_gpus: bool,
    device: int | None,
) -> PredictedMemory:
    """The fullest GPU of the actor in this layout, or the largest process where it runs on none.

    Args:
        plan: what leaves the GPUs at which phase.
        pictures: of rows of the data, the fullest of which stands for all.
        shared: engines are on the actor's GPUs.
        on_gpus: the actor runs on GPUs, of each of which CUDA takes a part.
        device: bytes of a GPU, where that is known.
    """
    model, actor = model_of(hf_config), config.actor
    options = training_options(config, topology, row_patches=_row_patches(config, model, pictures))
    stages = training_memory(model, topology, options)
    stage = max(range(len(stages)), key=lambda index: stages[index].peak)
    rank = stages[stage]
    buffers = 0
    if config.has_engines:
        largest = max(tensor.nbytes for tensor in model.tensors(options.dtype))
        buffers = config.weight_sync.num_slots * max(config.weight_sync.bucket_bytes, largest)
    awake = round(config.rollout.gpu_memory_utilization * (device or 0)) if shared and config.has_engines else 0
    parts = {"weights": rank.weights, "grads": rank.gradients, "optimizer": rank.optimizer}
    return PredictedMemory(
        stage=stage,
        rank=rank,
        # Buffers of parameters that stay where they are are not needed; those that are, at most.
        sync_buffers=buffers if not shared or actor.offload_weight else 0,
        processes=_PROCESS_BYTES * (2 if shared and config.has_engines else 1) if on_gpus else 0,
        engine_training=0 if plan.sleep_level else awake,
        engine_rollout=awake,
        actor_rollout=sum(nbytes for part, nbytes in parts.items() if part not in plan.parts),
        device=device,
    )


def _row_patches(config: AnyConfig, model: Model, pictures: Sequence[PictureSizes]) -> int:
    """Patches of the row that has most, of which no more are trained on than a sequence has features of."""
    if model.vision is None or not pictures:
        return 0
    limits = read_picture_limits(Path(config.model_path), min_pixels=config.data.min_pixels, max_pixels=config.data.max_pixels)
    most = max(sum(map(limits.pixels, sizes)) for sizes in pictures)
    return min(round(most / model.vision.patch_size**2), config.runner.seq_length * model.vision.spatial_merge_size**2)


def training_options(config: AnyConfig, topology: Topology, *, row_patches: int = 0) -> TrainingOptions:
    """What of a configuration, and of pictures in rows of its data, decides the memory of a step."""
    actor, model, runner = config.actor, config.actor.model, config.runner
    samples = _samples(config)
    tokens = runner.max_tokens_per_mbs if runner.enable_dynamic_batch_size else None
    per_rank = (actor.global_batch_size or 1) // topology.dp_size
    trained, scored = samples * runner.seq_length if tokens is None else tokens, _scoring_tokens(config, tokens)
    # As many rows as have room, all of them as long as rows may be.
    trained_rows, scored_rows = (max(1, count // runner.seq_length) if count else 0 for count in (trained, scored))
    return TrainingOptions(
        dtype=_DTYPES[model.precision],
        grads_in_fp32=actor.megatron.accumulate_allreduce_grads_in_fp32,
        distributed_optimizer=actor.optim.use_distributed_optimizer,
        offloaded=actor.optim.optimizer_offload_fraction if actor.optim.optimizer_cpu_offload else 0.0,
        precise=actor.optim.use_precision_aware_optimizer,
        frozen=frozenset(model.frozen.values()),
        lora=actor.lora_spec,
        micro_batch_tokens=trained,
        micro_batch_patches=trained_rows * row_patches,
        scoring_tokens=scored,
        scoring_patches=scored_rows * row_patches,
        num_microbatches=max(1, per_rank // samples),
        chunk_tokens=model.logits_chunk_tokens,
        sequence_parallel=model.sequence_parallel,
        fused_activation=bool(model.bias_activation_fusion),
        recompute=model.recompute_granularity or "none",
        recompute_method=model.recompute_method or "uniform",
        recompute_layers=model.recompute_num_layers or 1,
        make_vocab_size_divisible_by=model.make_vocab_size_divisible_by,
    )


def shown(memory: PredictedMemory) -> str:
    """A line for the plan of a run."""
    rank = memory.rank
    rows = [(name, getattr(rank, name)) for name in ("weights", "gradients", "optimizer", "activations", "pictures", "logits")]
    rows += [("scoring", rank.scoring)] if rank.scoring > rank.passes else []
    rows += [("sync", memory.sync_buffers), ("CUDA", memory.processes), ("engine", memory.engine_training)]
    said = ", ".join(f"{name} {nbytes / GIB:.3g}" for name, nbytes in rows if nbytes)
    where = f" of pipeline stage {memory.stage}" if memory.stage else ""
    of = "" if memory.device is None else f" of the {memory.device / GIB:.3g} of a GPU"
    beside = ""
    if memory.engine_rollout:
        beside = f"; beside a rollout {memory.in_rollout / GIB:.3g}, {memory.engine_rollout / GIB:.3g} of them the engine's"
    return f"GiB of an actor rank{where}, predicted: {said}; at most {memory.in_training / GIB:.3g}{of} in training{beside}"


def misfits_of_memory(config: AnyConfig, memory: PredictedMemory) -> Iterator[str]:
    """What cannot fit, and what to change."""
    if memory.device is None:
        return
    has = f"a GPU has {memory.device / GIB:.1f} GiB"
    if memory.in_training > memory.device * (1 + _TOLERANCE):
        yield (
            f"the actor cannot train in this memory: {shown(memory)}, and {has}. "
            f"{_advice(config, memory)}"
        )  # fmt: skip
    elif memory.engine_rollout and memory.in_rollout > memory.device * (1 + _TOLERANCE):
        parts = [f"actor.offload_{part}" for part in ("weight", "grad", "optimizer") if not getattr(config.actor, f"offload_{part}")]
        switch = f"set {', '.join(parts)} to True, or " if parts else ""
        yield (
            f"actor and engine do not fit side by side: {shown(memory)}, and {has}; {switch}lower rollout.gpu_memory_utilization "
            f"({config.rollout.gpu_memory_utilization})"
        )


def _advice(config: AnyConfig, memory: PredictedMemory) -> str:
    """The keys that lower what is largest, those that cost least first."""
    model, optim, rank = config.actor.model, config.actor.optim, memory.rank
    batch = "actor.micro_batch_size" if isinstance(config, SftConfig) else "algorithm.training_batch_size_per_gpu"
    runner, dynamic = config.runner, config.runner.enable_dynamic_batch_size
    is_whole = model.tensor_model_parallel_size > 1 and not model.sequence_parallel
    choices = [
        (memory.engine_training, memory.engine_training > 0, "set rollout.sleep_level to 2"),
        (rank.optimizer, not optim.use_distributed_optimizer, "set actor.optim.use_distributed_optimizer to True"),
        (rank.activations + rank.pictures, not dynamic and _samples(config) > 1, f"lower {batch}"),
        (rank.activations + rank.pictures, dynamic and (runner.max_tokens_per_mbs or 0) > runner.seq_length,
         "lower runner.max_tokens_per_mbs"),
        (rank.pictures, True, "lower data.max_pixels"),
        (rank.activations + rank.pictures, model.recompute_granularity != "full",
         "set actor.model.recompute_granularity to full, with recompute_method uniform and recompute_num_layers 1"),
        (rank.activations, is_whole, "set actor.model.sequence_parallel to True"),
        (rank.scoring, rank.scoring > rank.passes, "lower actor.eval_batch_size" if isinstance(config, SftConfig) else
         "lower algorithm.logprob_forward_max_tokens or logprob_forward_micro_batch_size"),
        (rank.logits, True, "lower actor.model.logits_chunk_tokens"),
        (rank.optimizer, not optim.optimizer_cpu_offload, "set actor.optim.optimizer_cpu_offload to True"),
        (rank.kept, True, "raise actor.model.tensor_model_parallel_size or pipeline_model_parallel_size"),
    ]  # fmt: skip
    over = memory.in_training - (memory.device or 0)
    useful = [text for nbytes, is_open, text in choices if is_open and nbytes > over / 4]
    return f"Change one or more: {'; '.join(useful)}"


def _scoring_tokens(config: AnyConfig, tokens: int | None) -> int:
    """Positions of a micro-batch when log-probabilities are recomputed, or rows of a validation scored; ``tokens`` of one of training that
    is cut by tokens."""
    if isinstance(config, SftConfig):
        validates = config.data.val_data_paths and (config.runner.val_check_interval > 0 or config.runner.val_before_train)
        return (config.actor.eval_batch_size or 1) * config.runner.seq_length if validates else 0
    if not (config.algorithm.recompute_logprobs or config.has_reference):
        return 0
    if config.algorithm.logprob_forward_max_tokens is not None:
        return config.algorithm.logprob_forward_max_tokens
    return config.algorithm.logprob_forward_micro_batch_size * config.runner.seq_length if tokens is None else tokens


def _samples(config: AnyConfig) -> int:
    """Samples of a micro-batch that is cut by samples."""
    return (config.actor.micro_batch_size if isinstance(config, SftConfig) else config.algorithm.training_batch_size_per_gpu) or 1
