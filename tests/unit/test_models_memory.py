"""Claims about the memory of a training step on paper, held to steps that were measured on GPUs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.vlm_sft import make_config
from rlsync.cli.shapes import shape_of
from rlsync.layout.topology import Topology
from rlsync.models import model_of
from rlsync.models.lora import LoraSpec
from rlsync.models.memory import TrainingMemory, TrainingOptions, training_memory
from workers.picture_world import make_vision_tokenizer

RAW = Path(__file__).resolve().parents[2] / "benchmarks/raw"
CHUNK = 8192


def memory(shape: str, topology: Topology = Topology(), **options) -> tuple[TrainingMemory, ...]:  # noqa: B008
    given = {"micro_batch_tokens": 4096, "num_microbatches": 8, "chunk_tokens": CHUNK, **options}
    return training_memory(model_of(shape_of(shape)), topology, TrainingOptions(**given))


def test_a_measured_bench_took_what_was_predicted() -> None:
    (bench,) = json.loads((RAW / "2026-11-29-1.5b-train-one-gpu.json").read_text()).values()
    assert bench["layers"] == "te" and not bench["packing"] and bench["chunk_tokens"] is None
    (found,) = memory(bench["model"], Topology(**bench["actor"]), micro_batch_tokens=sum(bench["microbatches"][0]))
    assert found.kept == pytest.approx(bench["memory"]["held_bytes"], rel=0.01)
    assert found.peak == pytest.approx(bench["memory"]["peak_bytes"], rel=0.03)


@pytest.mark.parametrize(
    "name",
    [
        *(f"29-{name}" for name in ("1.5b-train-fused-one-gpu", "1.5b-train-packed", "7b-train-tp2", "7b-train-tp2-one-connection")),
        *(
            f"30-{name}"
            for name in (
                "1.5b-train-padded-16k",
                "1.5b-train-packed-16k",
                "7b-train-tp2-profiled",
                "7b-train-tp2-te-swiglu",
                "7b-train-tp2-pairs",
            )
        ),
    ],
)
def test_benches_that_came_after_the_estimates_took_what_was_predicted(name: str) -> None:
    bench = json.loads((RAW / f"2026-11-{name}.json").read_text())
    count = sum if bench["packing"] else lambda lengths: len(lengths) * max(lengths)
    positions = max(count(lengths) for lengths in bench["microbatches"])
    switches = {"fused_activation": True, "sequence_parallel": bench["switches"].get("sequence_parallel", False)}
    (found,) = {*memory(bench["model"], Topology(**bench["actor"]), micro_batch_tokens=positions, **switches)}
    assert found.kept == pytest.approx(bench["memory"]["held_bytes"], rel=0.01)
    assert found.peak == pytest.approx(bench["memory"]["peak_bytes"], rel=0.06)


@pytest.mark.parametrize(
    "name",
    ["12-layers-train-ep2", "12-layers-train-ep2-grouped", "12-layers-train-ep2-grouped-32k", "8-layers-train-grouped"],
)
def test_experts_took_what_was_predicted(name: str) -> None:
    bench = json.loads((RAW / f"2026-11-30-qwen3-30b-a3b-{name}.json").read_text())
    model, topology = model_of(bench["config"]), Topology(**bench["actor"])
    positions = max(len(lengths) * max(lengths) for lengths in bench["microbatches"])
    options = TrainingOptions(micro_batch_tokens=positions, num_microbatches=8, chunk_tokens=CHUNK, fused_activation=True)
    (found,) = training_memory(model, topology, options)
    assert found.kept == pytest.approx(bench["memory"]["held_bytes"], rel=0.02)
    assert found.peak == pytest.approx(bench["memory"]["peak_bytes"], rel=0.03)


def test_adapters_of_a_frozen_base_took_what_was_predicted() -> None:
    bench = json.loads((RAW / "2026-11-29-7b-lora-32k-train-one-gpu.json").read_text())
    assert (bench["microbatches"], bench["lora_r"], bench["switches"]["recompute_method"]) == ([[32768]], 32, "uniform")
    lora, fused = LoraSpec(32, 64.0), bench["switches"]["bias_activation_fusion"]
    (found,) = memory(bench["model"], micro_batch_tokens=32768, num_microbatches=1, lora=lora, fused_activation=fused, recompute="full")
    assert found.kept == pytest.approx(bench["memory"]["held_bytes"], rel=0.02)
    assert found.peak == pytest.approx(bench["memory"]["peak_bytes"], rel=0.02)


def test_ranks_that_share_a_sequence_of_131072_tokens_took_what_was_predicted() -> None:
    bench = json.loads((RAW / "2026-11-30-7b-train-cp2-131072-tokens.json").read_text())
    assert (bench["microbatches"], bench["switches"]["recompute_method"]) == ([[131072]], "uniform")
    options = {"micro_batch_tokens": 131072, "num_microbatches": 1, "fused_activation": True, "recompute": "full"}
    (found,) = {*memory(bench["model"], Topology(**bench["actor"]), chunk_tokens=bench["chunk_tokens"], **options)}
    assert found.kept == pytest.approx(bench["memory"]["held_bytes"], rel=0.02)
    assert found.peak == pytest.approx(bench["memory"]["peak_bytes"], rel=0.02)


@pytest.mark.parametrize(("name", "tokens", "num_microbatches"), [("collocated", 16384, 9), ("collocated-32k", 32768, 2)])
def test_ranks_beside_sleeping_engines_took_what_was_predicted(name: str, tokens: int, num_microbatches: int) -> None:
    steps = json.loads((RAW / f"2026-11-30-7b-grpo-steps-{name}.json").read_text())
    options = {"micro_batch_tokens": tokens, "num_microbatches": num_microbatches, "fused_activation": True, "recompute": "full"}
    (found,) = {*memory("qwen2.5-7b", Topology(dp_size=2), **options)}
    assert found.peak / 1e9 == pytest.approx(steps["median"]["perf/max_memory_allocated_gb"], rel=0.06)


def test_a_rank_whose_optimizer_is_on_the_host_for_half_took_what_was_predicted() -> None:
    """The moments for half: all main parameters are on the GPU. Without these the prediction was 8 % below what the rank took."""
    steps = json.loads((RAW / "2026-11-30-7b-grpo-steps-apart.json").read_text())
    assert "optimizer_offload_fraction=0.5" in steps["command"]
    (found,) = memory(
        "qwen2.5-7b", micro_batch_tokens=16384, num_microbatches=9, fused_activation=True, recompute="full", offloaded=0.5
    )  # fmt: skip
    assert found.peak / 1e9 == pytest.approx(steps["median"]["perf/max_memory_allocated_gb"], rel=0.06)


def test_tensor_and_sequence_parallel_ranks_took_what_was_predicted() -> None:
    """The 79 GiB of benchmarks/RESULTS.md, 2026-11-28, 7B under TP 2 with eight micro-batches."""
    (found,) = memory("qwen2.5-7b", Topology(tp_size=2), sequence_parallel=True)
    assert found.peak / 2**30 == pytest.approx(79, rel=0.03)


def shown_pictures(
    topology: Topology = Topology(),  # noqa: B008
    *,
    size: str = "3b",
    rows: int = 4,
    **options,
) -> tuple[TrainingMemory, ...]:
    """Of Qwen2.5-VL's shapes: a row is 246 tokens of text and a picture of 64 x 64 patches, which become 1,024 features."""
    config = make_config(size, make_vision_tokenizer(), None).to_dict() | {"architectures": ["Qwen2_5_VLForConditionalGeneration"]}
    given = {"micro_batch_tokens": rows * 1270, "micro_batch_patches": rows * 64**2, "num_microbatches": 16 // rows, **options}
    return training_memory(model_of(config), topology, TrainingOptions(**given))


@pytest.mark.parametrize(
    ("name", "rows", "within"),
    # The last one was measured before the tower kept less: its norms and turned queries took 2 GiB of two pictures' 17.
    [("micro-4-te", 4, 0.03), ("micro-4-local", 4, 0.03), ("one-gpu", 2, 0.06)],
)
def test_steps_with_pictures_took_what_was_predicted(name: str, rows: int, within: float) -> None:
    bench = json.loads((RAW / f"2026-11-29-qwen2.5-vl-3b-sft-{name}.json").read_text())
    assert bench["tokens_a_row"] == 1270
    (found,) = shown_pictures(rows=rows)
    assert found.peak / 1e9 == pytest.approx(bench["median"]["perf/max_memory_allocated_gb"], rel=within)


@pytest.mark.parametrize("size", ["3b", "7b"])
def test_steps_with_pictures_on_two_tensor_ranks_took_what_was_predicted(size: str) -> None:
    bench = json.loads((RAW / f"2026-11-30-qwen2.5-vl-{size}-sft-tp2.json").read_text())
    assert bench["tokens_a_row"] == 1270
    (found,) = {*shown_pictures(Topology(tp_size=2), size=size, rows=2)}
    assert found.peak / 1e9 == pytest.approx(bench["median"]["perf/max_memory_allocated_gb"], rel=0.06)


def test_a_tower_is_whole_on_each_tensor_rank_of_the_first_stage_and_keeps_what_its_trained_parts_need() -> None:
    (alone,), (half,) = shown_pictures(), {*shown_pictures(Topology(tp_size=2))}
    tower = 668_683_520
    assert half.pictures == alone.pictures and half.weights == pytest.approx((alone.weights - 2 * tower) / 2 + 2 * tower, rel=1e-3)
    first, last = shown_pictures(Topology(pp_size=2))
    assert first.pictures == 2 * alone.pictures and last.pictures == 0, "two micro-batches are in flight"
    (whole,) = shown_pictures(frozen={"vision_model", "vision_projection"})
    (mergers,) = shown_pictures(frozen={"vision_model"})
    assert whole.pictures == 0 < mergers.pictures < alone.pictures / 50
    (again,) = shown_pictures(recompute="full")
    assert 0 < again.pictures < alone.pictures / 10
    (beside,) = shown_pictures(lora=LoraSpec(8, 16.0))
    (within,) = shown_pictures(lora=LoraSpec(8, 16.0, target_modules=("attn.proj", "q_proj")))
    assert beside.pictures == 0 and within.pictures > alone.pictures * 0.9
    (scored,) = shown_pictures(scoring_tokens=1270, scoring_patches=64 * 64**2)
    assert scored.scoring > shown_pictures(scoring_tokens=1270)[0].scoring


def test_every_way_to_save_memory_saves_what_it_is_for() -> None:
    (plain,), two = memory("qwen2.5-7b"), Topology(dp_size=2)
    (cut,), (whole,) = memory("qwen2.5-7b", two), memory("qwen2.5-7b", two, distributed_optimizer=False)
    assert cut.optimizer * 2 == plain.optimizer == whole.optimizer and cut.weights == plain.weights
    (again,) = memory("qwen2.5-7b", recompute="full")
    (first,) = memory("qwen2.5-7b", recompute="full", recompute_method="block", recompute_layers=14)
    assert again.activations < plain.activations / 8 and again.activations < first.activations < plain.activations * 0.6
    (fused,) = memory("qwen2.5-7b", fused_activation=True)
    assert fused.activations < plain.activations * 0.75
    (away,), (half,) = (memory("qwen2.5-7b", offloaded=1.0, precise=True), memory("qwen2.5-7b", offloaded=0.5, precise=True))
    assert (away.optimizer, half.optimizer * 2) == (0, plain.optimizer)
    (kept,) = memory("qwen2.5-7b", offloaded=1.0)
    assert kept.optimizer * 3 == plain.optimizer, "main parameters are on the GPU, the moments are not"
    (adapters,) = memory("qwen2.5-7b", lora=LoraSpec(16, 32.0))
    assert adapters.gradients < plain.gradients / 50 and adapters.weights > plain.weights
    (chunks,) = memory("qwen2.5-7b", micro_batch_tokens=4 * CHUNK)
    assert chunks.logits < 2 * plain.logits * CHUNK / 4096


def test_scored_micro_batches_count_where_they_take_more_than_trained_ones() -> None:
    (trained,), (as_large,), (larger,) = (memory("qwen2.5-7b", scoring_tokens=tokens) for tokens in (0, 4 * 4096, 64 * 4096))
    assert trained.peak == as_large.peak < larger.peak == larger.kept + larger.scoring
    first, last = memory("qwen2.5-7b", Topology(pp_size=2), scoring_tokens=4096)
    assert 0 < first.scoring < last.scoring, "logits are on the last stage"


def test_earlier_stages_keep_more_micro_batches_and_the_last_has_the_logits() -> None:
    stages = memory("qwen2.5-7b", Topology(pp_size=4))
    assert [stage.logits > 0 for stage in stages] == [False, False, False, True]
    per_layer = stages[2].activations / 2
    assert [round(stage.activations / per_layer) for stage in stages] == [4, 3, 2, 1]
    (only,) = {replace(stage, activations=0) for stage in stages[1:3]}
    assert only.weights < stages[0].weights
    interleaved = memory("qwen2.5-7b", Topology(pp_size=2, vpp_size=2))
    assert memory("qwen2.5-7b", Topology(pp_size=2))[0].activations < interleaved[0].activations


def test_experts_are_cut_over_their_own_replicas() -> None:
    (found,) = memory("qwen3-30b-a3b", Topology(dp_size=8, ep_size=4))
    (one,) = memory("qwen3-30b-a3b")
    experts = 48 * 128 * 3 * 2048 * 768
    rest = one.weights // 2 - experts
    assert found.weights == 2 * (rest + experts // 4)
    assert found.optimizer == pytest.approx(12 * (rest / 8 + experts / 4 / 2), rel=1e-4)
