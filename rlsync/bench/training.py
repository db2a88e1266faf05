"""``rlsync bench --train``: what is asked, the work of a step on paper, and what came out, as JSON and as a table. Starts nothing.

``train_rank`` is the process of an actor rank.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import msgspec
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from rlsync.bench.profile import KINDS, Phases, Profile
from rlsync.bench.spec import BenchSpec
from rlsync.errors import ConfigError
from rlsync.models import Model, model_of
from rlsync.models.lora import LoraSpec, adapters_of
from rlsync.models.memory import CHUNK_TOKENS, TrainingOptions, training_memory
from rlsync.models.stacks import Bound

# Dense products of half precision in 10^12 operations a second, as the maker states them, by the device's name.
PEAK_TFLOPS: Mapping[str, float] = {
    "NVIDIA H200": 989.4,
    "NVIDIA H100 80GB HBM3": 989.4,
    "NVIDIA A100-SXM4-80GB": 312.0,
    "NVIDIA A100-SXM4-40GB": 312.0,
}
# Lengths that lie on powers of ten apart: the shortest is this part of the longest.
_SPREAD = 100
FLOPS = (
    "of a token 2 x the parameters of matrix products it takes part in (of its experts alone; the head, not the embedding) forward and "
    "twice that backward; of a sequence of n tokens layers x heads x (size of a key + size of a value) x n^2 forward, which is the causal "
    "half, and twice that backward; beside adapters the products of a frozen base count once backward, as their weights have no gradient; "
    "padding and what is computed again do not count"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainSpec(BenchSpec):
    """A bench of training.

    Attributes:
        switches: fields of Megatron's TransformerConfig by name.
        ddp, optimizer: fields of DdpOptions and of OptimizerOptions.
        microbatches: lengths of the sequences of each microbatch of a step, the same on every data-parallel replica.
        score_microbatches: the same of a scoring pass.
        packing: sequences of a microbatch lie one after the other; else they are padded.
        chunk_tokens: positions of which logits exist at once; None for rlsync's own.
        profile: one more step and one more scoring pass, of which rank 0 says what its GPU does.
    """

    switches: dict[str, Any]
    ddp: dict[str, Any]
    optimizer: dict[str, Any]
    microbatches: tuple[tuple[int, ...], ...]
    score_microbatches: tuple[tuple[int, ...], ...]
    packing: bool
    chunk_tokens: int | None
    profile: bool


class RankFound(msgspec.Struct, kw_only=True):
    """What one rank says of itself: its device, the rate of a plain matrix product there, and bytes of torch before and in the steps."""

    device: str
    matmul_tflops: float
    held_bytes: int
    peak_bytes: int


class TrainFound(msgspec.Struct, kw_only=True):
    """What came out: seconds of each measured step from barrier to barrier, each rank's part, and profiles of rank 0: "train", "score"."""

    train_s: list[float]
    score_s: list[float]
    losses: list[float]
    ranks: list[RankFound]
    profiles: dict[str, Profile] = {}
    phases: Phases | None = None


def read(path: str | Path) -> TrainSpec:
    return msgspec.json.decode(Path(path).read_bytes(), type=TrainSpec)


def lengths_of(text: str, sequence_length: int, count: int, seed: int = 0) -> tuple[int, ...]:
    """Tokens of ``count`` sequences in a seeded order: ``equal``, ``spread`` over powers of ten, or numbers that are repeated.

    Raises ConfigError for what it cannot read, and for a length that no sequence can have.
    """
    if text == "equal":
        return (sequence_length,) * count
    if text == "spread":
        shares = [index / max(1, count - 1) for index in range(count)]
        found = [max(2, round(sequence_length / _SPREAD**share)) for share in shares]
    else:
        words = text.split(",")
        if not all(word.isascii() and word.isdigit() and 2 <= int(word) <= sequence_length for word in words):
            raise ConfigError(
                f"--lengths {text!r}: write equal, spread, or numbers from 2 to --sequence-length {sequence_length} with commas"
            )
        found = [int(words[index % len(words)]) for index in range(count)]
    random.Random(seed).shuffle(found)
    return tuple(found)


def cut(lengths: Sequence[int], tokens: int, *, packing: bool, option: str = "--micro-batch-tokens") -> tuple[tuple[int, ...], ...]:
    """Sequences as microbatches of at most ``tokens`` positions: packed ones balanced by their sums, longest first, padded ones in order.

    Raises ConfigError, which names the ``option``, where a sequence alone is longer.
    """
    if max(lengths) > tokens:
        raise ConfigError(f"{option} {tokens} is less than the longest sequence, {max(lengths)}")
    if not packing:
        cuts: list[list[int]] = []
        for length in lengths:
            if cuts and (len(cuts[-1]) + 1) * max(*cuts[-1], length) <= tokens:
                cuts[-1].append(length)
            else:
                cuts.append([length])
        return tuple(map(tuple, cuts))
    count = -(-sum(lengths) // tokens)
    while True:
        packed: list[list[int]] = [[] for _ in range(count)]
        for length in sorted(lengths, reverse=True):
            min(packed, key=sum).append(length)
        if max(map(sum, packed)) <= tokens:
            return tuple(map(tuple, packed))
        count += 1


def flops_of_token(model: Model) -> int:
    """FLOPs of one token in the forward matrix products with parameters; see FLOPS."""
    return _flops_of(model, model.parameters())


def flops_of_adapters(model: Model, lora: LoraSpec) -> int:
    """FLOPs of one token in the forward matrix products with factors of adapters."""
    return _flops_of(model, adapters_of(model, lora).parameters(model.parameters()))


def _flops_of(model: Model, parameters: Iterable[Bound]) -> int:
    total = 0.0
    for bound in parameters:
        if bound.stack.part != "language_model" or bound.stack.stage == "first":
            continue
        share = 1.0
        if any(index.axis == "ep" for index in bound.stack.indices):
            share = model.transformer["moe_router_topk"] / model.dims["num_experts"]
        total += share * sum(shape[0] * shape[1] for _, shape in bound.hf if len(shape) == 2)
    return round(2 * total)


def flops_of_attention(model: Model, length: int) -> int:
    """FLOPs of attention in the forward pass of a sequence of ``length`` tokens; see FLOPS."""
    fields = model.transformer
    key = fields["qk_head_dim"] + fields["qk_pos_emb_head_dim"] if "qk_head_dim" in fields else model.dims["head_dim"]
    value = fields.get("v_head_dim", model.dims["head_dim"])
    return model.num_layers * model.dims["num_heads"] * (key + value) * length**2


def summary(spec: TrainSpec, found: TrainFound, machine: Mapping[str, Any], peak_tflops: float | None) -> dict[str, Any]:
    """Everything as one JSON object. ``machine`` is its head; ``peak_tflops`` replaces what PEAK_TFLOPS says."""
    model, topology = model_of(spec.config), spec.topology
    lengths = [length for micro in spec.microbatches for length in micro]
    replicas, world = topology.dp_size, topology.world_size
    base = replicas * sum(lengths) * flops_of_token(model)
    adapters = 0 if spec.lora is None else replicas * sum(lengths) * flops_of_adapters(model, spec.lora)
    forward = base + adapters + replicas * sum(flops_of_attention(model, length) for length in lengths)
    # Weights of a frozen base have no gradients.
    step = 3 * forward - (0 if spec.lora is None else base)
    positions = replicas * sum(sum(micro) if spec.packing else len(micro) * max(micro) for micro in spec.microbatches)
    # As 6 x all parameters counts: a look-up in the embedding as if it were a product. One that is tied is the head's already.
    looked_up = 0 if model.tied else replicas * sum(lengths) * 2 * model.dims["vocab"] * model.dims["hidden"]
    peak = peak_tflops if peak_tflops is not None else PEAK_TFLOPS.get(found.ranks[0].device)
    floor = min(rank.matmul_tflops for rank in found.ranks)

    def rates(seconds: Sequence[float], flops: int, embedding: int) -> dict[str, Any]:
        median = statistics.median(seconds)
        tflops, with_embedding = (count / median / world / 1e12 for count in (flops, flops + embedding))
        return {
            "median_s": median,
            "tokens_per_s": replicas * sum(lengths) / median,
            "tokens_per_s_per_rank": replicas * sum(lengths) / median / world,
            "tflops_per_rank": tflops,
            "share_of_matmul": tflops / floor,
            "share_of_peak": None if peak is None else tflops / peak,
            "share_of_peak_with_embedding": None if peak is None else with_embedding / peak,
        }

    return {
        **machine,
        "model": spec.model,
        "config": spec.config,
        "actor": spec.axes,
        "layers": spec.layers,
        "switches": spec.switches,
        "ddp": spec.ddp,
        "optimizer": spec.optimizer,
        "lora_r": spec.lora_r,
        "packing": spec.packing,
        "chunk_tokens": spec.chunk_tokens,
        "warmup": spec.warmup,
        "sequences": replicas * len(lengths),
        "tokens": replicas * sum(lengths),
        "positions": positions,
        "microbatches": [list(micro) for micro in spec.microbatches],
        "score_microbatches": [list(micro) for micro in spec.score_microbatches],
        "flops": {"of": FLOPS, "forward": forward, "token": flops_of_token(model)},
        "matmul_tflops": floor,
        "peak_tflops": peak,
        "train": rates(found.train_s, step, looked_up * (3 if spec.lora is None else 2)),
        "score": rates(found.score_s, forward, looked_up),
        "memory": {
            "held_bytes": max(r.held_bytes for r in found.ranks),
            "peak_bytes": max(r.peak_bytes for r in found.ranks),
            **predicted_memory(spec),
        },
        "found": msgspec.to_builtins(found),
    }


def predicted_memory(spec: TrainSpec) -> dict[str, Any]:
    """Predicted bytes of the rank that takes most: between steps, at most, and by what they are taken."""
    switches = spec.switches
    options = TrainingOptions(
        grads_in_fp32=spec.ddp.get("grad_reduce_in_fp32", True),
        distributed_optimizer=spec.ddp.get("use_distributed_optimizer", False),
        offloaded=spec.optimizer.get("optimizer_offload_fraction", 1.0) if spec.optimizer.get("optimizer_cpu_offload") else 0.0,
        precise=bool(spec.optimizer.get("use_precision_aware_optimizer")),
        lora=spec.lora,
        micro_batch_tokens=_most_positions(spec.microbatches, packing=spec.packing),
        scoring_tokens=_most_positions(spec.score_microbatches, packing=spec.packing),
        num_microbatches=len(spec.microbatches),
        chunk_tokens=CHUNK_TOKENS if spec.chunk_tokens is None else spec.chunk_tokens,
        sequence_parallel=bool(switches.get("sequence_parallel")),
        fused_activation=bool(switches.get("bias_activation_fusion")),
        recompute=switches.get("recompute_granularity") or "none",
        recompute_method=switches.get("recompute_method") or "uniform",
        recompute_layers=switches.get("recompute_num_layers") or 1,
    )
    fullest = max(training_memory(model_of(spec.config), spec.topology, options), key=lambda stage: stage.peak)
    parts = {field.name: getattr(fullest, field.name) for field in fields(fullest)}
    return {"predicted_held_bytes": fullest.kept, "predicted_peak_bytes": fullest.peak, "predicted_bytes": parts}


def _most_positions(microbatches: Sequence[Sequence[int]], *, packing: bool) -> int:
    return max(sum(micro) if packing else len(micro) * max(micro) for micro in microbatches)


_SHARES = ("share_of_matmul", "share_of_peak", "share_of_peak_with_embedding")


def show(whole: Mapping[str, Any]) -> None:
    """Print to standard output."""
    console = Console(highlight=False, width=140)
    peak = "" if whole["peak_tflops"] is None else f", {whole['peak_tflops']:g} by the maker"
    adapters = f", adapters of rank {whole['lora_r']}" if whole["lora_r"] else ""
    console.print(
        f"{whole['model']}, actor {whole['actor']}, layers {whole['layers']}{adapters}, {'packed' if whole['packing'] else 'padded'}: "
        f"{whole['sequences']} sequences of {whole['tokens']} tokens in {whole['positions']} positions; "
        f"a plain matrix product {whole['matmul_tflops']:.3g} TFLOP/s{peak}",
        markup=False,
    )
    table = Table(box=SIMPLE, padding=(0, 1, 0, 0))
    for name in ("", "s, median", "tokens/s", "tokens/s a rank", "TFLOP/s a rank", "of a plain product", "of the peak", "with embedding"):
        table.add_column(name, justify="right")
    for name in ("train", "score"):
        row = whole[name]
        numbers = [f"{row['median_s']:.4f}", f"{row['tokens_per_s']:.0f}", f"{row['tokens_per_s_per_rank']:.0f}"]
        shares = ["" if row[share] is None else f"{row[share]:.3f}" for share in _SHARES]
        table.add_row(name, *numbers, f"{row['tflops_per_rank']:.3g}", *shares)
    console.print(table)
    show_profiles(console, whole["found"])
    memory = {name: value / 2**30 for name, value in whole["memory"].items() if name != "predicted_bytes"}
    held, most = (f"{memory[name]:.2f} ({memory[f'predicted_{name}']:.2f} predicted)" for name in ("held_bytes", "peak_bytes"))
    console.print(f"memory of a rank in GiB: {held} between steps, at most {most}")


def show_profiles(console: Console, found: Mapping[str, Any]) -> None:
    """Print what ``TrainFound``, as JSON holds it, says of a profile, if there is one."""
    profiles, phases = found["profiles"], found["phases"]
    if not profiles:
        return
    passes, issued, optimizer = (1e3 * phases[name] for name in ("passes_s", "issued_s", "optimizer_s"))
    console.print(f"a step in parts: passes {passes:.1f} ms, issued by the host in {issued:.1f}; optimizer {optimizer:.1f} ms")
    table = Table(box=SIMPLE, padding=(0, 1, 0, 0), title="ms of one pass on the GPU of rank 0", title_justify="left")
    for name in ("", "whole", "nothing at work", "communication alone", *KINDS):
        table.add_column(name, justify="right")
    for name, found in profiles.items():
        seconds = [found["seconds"], found["seconds"] - found["busy_s"], found["exposed_communication_s"], *found["kinds"].values()]
        table.add_row(name, *(f"{1e3 * one:.1f}" for one in seconds))
    console.print(table)
