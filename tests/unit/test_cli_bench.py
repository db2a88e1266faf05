"""Claims about what ``rlsync bench`` makes of its arguments and of its numbers; nothing is started."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rlsync.bench import host, result, spec, training, work
from rlsync.bench import run as bench
from rlsync.bench.chart import draw
from rlsync.bench.spec import Measured
from rlsync.cli import main
from rlsync.cli.bench import add_arguments, plan, plan_training, run
from rlsync.cli.shapes import SHAPES
from rlsync.engine.handles.adapters import lora_arguments
from rlsync.errors import ConfigError, PlacementError
from rlsync.megatron.optimizer import OptimizerOptions
from rlsync.models import model_of
from rlsync.sync.config import LORA
from tests.models import tiny_model
from tests.vision_folders import save_vision_folder

FLOORS = {
    "same_gb_per_s": {str(gpu): 2000.0 for gpu in range(4)},
    "peer_gb_per_s": {f"{s}->{d}": 400.0 for s in range(4) for d in range(4)},
}


def planned(folder: Path, *words: str) -> spec.Spec:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return plan(parser.parse_args(["--model", "qwen2.5-7b", *words]), folder)


def on_gpus(made: spec.Spec, count: int = 4) -> spec.Spec:
    devices = tuple(map(str, range(count)))
    actors, engines = spec.devices_of(made.placement, made.topology.world_size, made.num_engines, made.engine_tp, devices)
    return replace(made, devices=devices, actor_gpus=actors, engine_gpus=engines)


def test_lists_of_settings_are_every_combination(tmp_path: Path) -> None:
    made = planned(tmp_path, "--transport", "shm,gloo", "--sink", "auto,loaders", "--bucket-bytes", "1000")
    assert [case.name for case in made.cases] == ["shm auto", "shm loaders", "gloo auto", "gloo loaders"]
    assert made.cases[1].settings == {"transport": "shm", "sink": "loaders", "bucket_bytes": 1000, "timeout_s": made.timeout_s}
    assert [case.name for case in planned(tmp_path).cases] == ["auto"]
    several = planned(tmp_path, "--mode", "params,moved", "--num-slots", "2,3").cases
    assert [case.name for case in several] == ["params num-slots 2", "params num-slots 3", "moved num-slots 2", "moved num-slots 3"]
    assert [(case.settings["num_slots"], case.settings["staging"], case.moves) for case in several] == [
        (2, "auto", False), (3, "auto", False), (2, "auto", True), (3, "auto", True),
    ]  # fmt: skip


def test_the_engine_of_a_model_that_takes_pictures_gets_its_processor_and_no_weights(tmp_path: Path) -> None:
    folder, made = save_vision_folder(tmp_path / "model", "qwen2_5_vl"), tmp_path / "made"
    made.mkdir()
    spec_of = planned(made, "--model", str(folder), "--rollout", "tp=2")
    assert not host.engine_arguments(spec_of, "merged", 1, None)["skip_tokenizer_init"], "the processor needs it"
    names = {path.name for path in made.iterdir()}
    assert names == {path.name for path in folder.iterdir()} - {"model.safetensors"}
    with pytest.raises(ConfigError, match=r"config\.json takes pictures, and its engine reads a tokenizer, which is not there"):
        planned(made, "--model", str(folder / "config.json"))
    (folder / "processor_config.json").unlink()
    with pytest.raises(ConfigError, match="its engine reads a processor, which is not there"):
        planned(made, "--model", str(folder))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--model", "qwen9"], "neither a known shape"),
        (["--rollout", "tp=2,ep=2"], "ep=2 of an engine: Qwen2ForCausalLM has no experts"),
        (["--model", "qwen3-30b-a3b", "--rollout", "tp=4,ep=2"], "ep=2 of an engine of tp=4, dp=1: vLLM shares experts among all 4 ranks"),
        (["--model", "qwen3-30b-a3b", "--actor", "dp=3,ep=3"], "num_experts 128 cannot be divided by ep_size 3"),
        (["--rollout", "tp=2,dp=2"], "--rollout 'tp=2,dp=2': cannot read 'dp=2'; write tp=N, ep=N, engines=N"),
        (["--actor", "tp=2,pp"], "--actor 'tp=2,pp': cannot read 'pp'"),
        (["--rollout", "tp=2,tp=4"], "--rollout 'tp=2,tp=4': tp is given twice"),
        (["--rollout", "tp=3"], "28 attention heads cannot be divided by 3 ranks"),
        (["--actor", "pp=3"], "28 layers cannot be split over pp_size 3"),
        (["--sink", "direct,fast"], "weight_sync.sink is 'fast'; known are auto, direct"),
        (["--transport", "shm,,gloo"], "write different words with commas between them"),
        (["--mode", "slow"], "--mode 'slow': known are params, ring, moved"),
        (["--num-slots", "2,many"], "--num-slots 'many': write a whole number"),
        (["--num-slots", "²"], "--num-slots '²': write a whole number"),
        (["--bucket-bytes", "0"], "weight_sync.bucket_bytes is 0; it must be positive"),
        (["--peers", "nccl"], "--peers 'nccl': known are gather-broadcast"),
        (["--peers", "vllm-nccl"], "--peers vllm-nccl works disaggregated on GPUs, and this bench is without GPUs"),
        (["--steps", "0"], "--steps is 0"),
        (["--lora", "513"], "--lora is 513; give a rank up to 512"),
        (["--lora-sync", "adapter"], "--lora-sync adapter without --lora"),
        (["--lora", "8", "--lora-sync", "both"], "weight_sync.lora is 'both'; known are merged, adapter"),
        (["--lora", "8", "--sink", "loaders"], "weight_sync.lora is adapter and sink is loaders"),
        (["--lora", "8", "--peers", "gather-broadcast"], "syncs weights without the adapters of --lora; leave it out, or choose vllm-"),
        (["--peers", "vllm-folder"], "--peers vllm-folder needs --lora"),
        (["--layers", "te"], "--layers te needs TransformerEngine and a CUDA device; install it, or use --layers local or auto"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_starts(tmp_path: Path, words: list[str], said: str) -> None:
    with pytest.raises((ConfigError, PlacementError), match=said.replace("(", r"\(")):
        planned(tmp_path, *words)


def test_merged_weights_and_adapters_go_to_engines_of_their_own(tmp_path: Path) -> None:
    """On the same GPUs: those with slots for adapters take nothing else."""
    made = on_gpus(planned(tmp_path, "--lora", "8", "--rollout", "engines=2"))
    assert [(case.name, case.lora) for case in made.cases] == [("merged", "merged"), ("adapter", "adapter")]
    assert made.hosts == (("merged", 0), ("merged", 1), ("adapter", 0), ("adapter", 1))
    assert made.peers == ("vllm-folder",)
    assert [host.environment(made, index)["CUDA_VISIBLE_DEVICES"] for index in range(4)] == ["0", "1", "0", "1"]
    plain, slots = (host.engine_arguments(made, lora, 10**9, None) for lora in LORA)
    assert slots == {**plain, **lora_arguments(8)}
    alone = planned(tmp_path, "--lora", "8", "--lora-sync", "adapter")
    assert alone.hosts == (("adapter", 0),) and planned(tmp_path).hosts == (("merged", 0),)


def test_peers_are_those_that_can_be() -> None:
    assert spec.peers(None, "collocated") == ("gather-broadcast", "vllm-ipc")
    assert spec.peers(None, "disaggregated") == ("gather-broadcast", "vllm-nccl")
    assert spec.peers(None, "cpu") == ("gather-broadcast",)
    assert spec.peers(None, "beside") == spec.peers("none", "collocated") == ()
    with pytest.raises(ConfigError, match="one NCCL group; leave it out, or choose gather-broadcast, vllm-ipc"):
        spec.peers("vllm-nccl", "collocated")
    assert spec.scene("collocated", "01", (0, 1), ((0, 1),)) == "collocated"
    assert spec.scene("collocated", "01", (0,), ((0, 1),)) == "beside"
    assert spec.scene("disaggregated", "01", (0,), ((1,),)) == "disaggregated"
    assert spec.scene("disaggregated", "", (0,), ((1,),)) == "cpu"


def test_gpus_are_shared_where_collocated_and_disjoint_where_not() -> None:
    assert spec.devices_of("collocated", 4, 2, 2, "0123") == ((0, 1, 2, 3), ((0, 1), (2, 3)))
    assert spec.devices_of("disaggregated", 2, 1, 2, "0123") == ((0, 1), ((2, 3),))
    with pytest.raises(ConfigError, match="2 actor ranks and 4 engine workers need 6 GPUs, and 4 are visible"):
        spec.devices_of("disaggregated", 2, 2, 2, "0123")


def test_layers_are_those_of_transformer_engine_where_it_is_installed_and_there_is_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for installed, devices, automatic in ((None, "0", "local"), (True, "", "local"), (True, "0", "te")):
        monkeypatch.setattr(spec.importlib.util, "find_spec", {"transformer_engine": installed}.get)
        assert spec.layers_of("auto", devices) == automatic
        assert spec.layers_of("local", devices) == "local"
    assert spec.layers_of("te", "0") == "te"


def test_a_spec_survives_its_file(tmp_path: Path) -> None:
    made = on_gpus(planned(tmp_path, "--actor", "tp=2", "--rollout", "tp=2"))
    spec.write(made, tmp_path / "spec.json")
    assert spec.read(tmp_path / "spec.json") == made
    assert made.topology.tp_size == 2


def test_the_floor_counts_bytes_of_the_same_gpu_and_of_others_apart(tmp_path: Path) -> None:
    same = work.workers(on_gpus(planned(tmp_path, "--actor", "tp=2", "--rollout", "tp=2")), FLOORS)
    apart = work.workers(on_gpus(planned(tmp_path, "--actor", "tp=2", "--rollout", "tp=2", "--placement", "disaggregated")), FLOORS)
    halves = work.workers(on_gpus(planned(tmp_path, "--actor", "tp=2,pp=2", "--rollout", "tp=2,engines=2")), FLOORS)
    for found in (same, apart, halves):
        # Each byte once: two workers hold the model, but for norms and biases of q, k, v, which both hold.
        assert all(w.held_bytes == w.same_bytes + w.peer_bytes for w in found)
        assert sum(w.held_bytes for w in found[:2]) == pytest.approx(15.23e9, rel=1e-3)
    assert [(w.peer_bytes, w.gpu) for w in same] == [(0, 0), (0, 1)]
    assert same[0].floor_s == pytest.approx(same[0].held_bytes / 2000e9)
    assert [(w.same_bytes, w.gpu) for w in apart] == [(0, 2), (0, 3)]
    assert work.floor_s(apart) == pytest.approx(5 * work.floor_s(same))
    for worker in halves:
        assert 0.4 < worker.same_bytes / worker.held_bytes < 0.6
        assert worker.floor_s == pytest.approx(worker.same_bytes / 2000e9 + worker.peer_bytes / 400e9)
        assert worker.overlapped_floor_s == pytest.approx(worker.peer_bytes / 400e9)


def test_the_floor_of_experts_is_that_of_those_which_a_worker_serves(tmp_path: Path) -> None:
    words = ["--model", "tiny-moe", "--placement", "disaggregated"]
    cut = work.workers(on_gpus(planned(tmp_path, *words, "--actor", "tp=2,etp=2", "--rollout", "tp=2")), FLOORS)
    whole = work.workers(on_gpus(planned(tmp_path, *words, "--actor", "dp=2,ep=2", "--rollout", "tp=2,ep=2")), FLOORS)
    model = model_of(SHAPES["tiny-moe"])
    experts, rest = ([t.nbytes for t in model.tensors() if (".experts." in t.name) is of_experts] for of_experts in (True, False))
    for found in (cut, whole):
        assert {w.same_bytes for w in found} == {0} and found[0].peer_bytes == found[0].held_bytes
        # All but norms and routers is half as large on either.
        assert sum(experts) / 2 + sum(rest) / 2 < found[0].held_bytes < sum(experts) / 2 + sum(rest) * 0.52


def measured(name: str, kind: str, whole: float, **changes: object) -> Measured:
    steps = [{"data": 0.01 * n, "transfer": 0.02 * n, "whole": whole * n} for n in (1, 2, 3, 4, 10)]
    if kind == "peer":
        steps = [{**step, "gather": 0.5 * step["data"]} for step in steps]
    return Measured(name=name, kind=kind, steps=steps, fingerprints=["a", "b"], **changes)  # type: ignore[arg-type]


def summed_up(tmp_path: Path, *found: Measured) -> dict:
    made = on_gpus(planned(tmp_path, "--actor", "tp=2", "--rollout", "tp=2"))
    floors = {**FLOORS, "gpus": [], "convention": ""}
    return result.summary(made, floors, found, {0: {"1": 7}}, {"command": "rlsync bench"})


def test_summaries_are_quantiles_and_quotients(tmp_path: Path) -> None:
    whole = summed_up(tmp_path, measured("auto", "rlsync", 0.1), measured("other", "peer", 0.7))
    ours, peer = whole["cases"]
    assert ours["median"] == {"data": 0.03, "transfer": 0.06, "whole": pytest.approx(0.3)}
    assert ours["p10"]["whole"] == pytest.approx(0.14)
    assert ours["p90"]["whole"] == pytest.approx(0.76)
    assert ours["data_over_floor"] == pytest.approx(0.03 / whole["floors"]["floor_s"])
    assert ours["extra_memory"]["gpu_bytes"] == {"1": 7}
    assert peer["extra_memory"]["gpu_bytes"] is None
    expected = {"transfer": 0.03 / 0.06, "with_gather": 0.045 / 0.06, "whole": 7.0}
    assert whole["comparisons"] == [{"case": "auto", "peer": "other", **{k: pytest.approx(v) for k, v in expected.items()}}]
    assert ours["right"] and peer["right"]


def test_adapters_are_held_to_what_vllm_loads_and_compared_with_merged_weights(tmp_path: Path) -> None:
    merged, alone = measured("merged", "rlsync", 0.4), measured("adapter", "rlsync", 0.1, lora="adapter")
    folder, wrong = (measured(name, "peer", 0.7, lora="adapter") for name in ("vllm-folder", "other"))
    alone.fingerprints = folder.fingerprints = ["c", "d"]
    whole = summed_up(tmp_path, merged, alone, folder, wrong)
    assert [case["right"] for case in whole["cases"]] == [True, True, True, False]
    assert ["data_over_floor" in case for case in whole["cases"]] == [True, False, False, False]
    pairs = {(row["case"], row["peer"]): row for row in whole["comparisons"]}
    assert pairs.keys() == {("adapter", "merged"), ("adapter", "vllm-folder"), ("adapter", "other")}
    assert pairs["adapter", "merged"]["whole"] == pytest.approx(4) and pairs["adapter", "merged"]["transfer"] == 1


def test_a_case_that_left_other_weights_is_not_right(tmp_path: Path) -> None:
    stuck, other = measured("stuck", "rlsync", 0.1), measured("other", "peer", 0.1)
    # The second is what one tensor does that never arrives: it is right after every other sync.
    stuck.fingerprints, other.fingerprints = ["b", "b"], ["x", "b"]
    refused = Measured(name="refused", kind="rlsync", error="no")
    whole = summed_up(tmp_path, measured("auto", "rlsync", 0.1), stuck, refused, other)
    assert [case["right"] for case in whole["cases"]] == [True, False, False, False]


def test_a_chart_is_drawn_or_the_lack_of_matplotlib_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = summed_up(tmp_path, measured("auto", "rlsync", 0.1), measured("other", "peer", 0.7))
    assert draw(whole, tmp_path / "bench.png") is None
    assert (tmp_path / "bench.png").read_bytes()[1:4] == b"PNG"
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    assert "no chart was drawn" in str(draw(whole, tmp_path / "other.png"))
    assert not (tmp_path / "other.png").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--deadline-s", "nan"], "--deadline-s is nan; it must be more than 0 seconds"),
        (["--deadline-s", "0"], "--deadline-s is 0; it must be more than 0 seconds"),
        (["--out", "{file}/out"], "{file}/out cannot be written (Not a directory); name another folder"),
        (["--train", "--out", "{file}"], "{file} cannot be written"),
    ],
)
def test_what_a_bench_would_fail_over_at_its_end_is_said_before(tmp_path: Path, capsys, monkeypatch, words: list[str], said: str) -> None:
    (tmp_path / "file").touch()
    for name in ("measure", "measure_training"):
        monkeypatch.setattr(bench, name, lambda *_: pytest.fail("the bench began"))
    file = str(tmp_path / "file")
    assert main(["bench", "--model", "tiny", *(word.format(file=file) for word in words)]) == 1
    assert said.format(file=file) in capsys.readouterr().err


def planned_training(folder: Path, *words: str) -> training.TrainSpec:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return plan_training(parser.parse_args(["--train", "--model", "tiny", *words]), folder)


def test_sequences_of_a_step_fit_their_microbatches_and_packed_ones_are_balanced() -> None:
    lengths = training.lengths_of("spread", 400, 9)
    assert sorted(lengths) == [4, 7, 13, 22, 40, 71, 126, 225, 400], "two powers of ten"
    assert lengths == training.lengths_of("spread", 400, 9) != tuple(sorted(lengths))
    assert training.lengths_of("equal", 400, 2) == (400, 400)
    assert sorted(training.lengths_of("3,5", 400, 3)) == [3, 3, 5]
    for packing in (False, True):
        cuts = training.cut(lengths, 400, packing=packing)
        assert sorted(length for cut in cuts for length in cut) == sorted(lengths)
        assert all((sum(cut) if packing else len(cut) * max(cut)) <= 400 for cut in cuts)
    assert [sum(cut) for cut in cuts] == [400, 254, 254]
    assert len(training.cut(lengths, 400, packing=False)) > 3, "padding takes more of them"


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_operations_of_a_token_are_those_of_the_matrices_that_it_meets(family: str) -> None:
    """The parameters are counted on transformers' own model."""
    made = tiny_model(family)
    config, total = {**made.config.to_dict(), "architectures": [type(made).__name__]}, 0.0
    for name, parameter in made.named_parameters():
        if parameter.dim() >= 2 and not name.endswith("embed_tokens.weight"):
            is_expert = ".experts." in name
            total += parameter.numel() * (config["num_experts_per_tok"] / made.config.num_experts if is_expert else 1)
    assert training.flops_of_token(model_of(config)) == round(2 * total)
    heads, size, layers = config["num_attention_heads"], config["head_dim"], config["num_hidden_layers"]
    # Scores and their product with values: two operations for each pair of tokens that the causal mask leaves, and element of a head.
    pairs = 10 * 10 / 2
    assert training.flops_of_attention(model_of(config), 10) == layers * heads * size * 2 * 2 * pairs


def test_rates_are_of_real_tokens_beside_a_plain_product_and_the_peak(tmp_path: Path) -> None:
    made = planned_training(tmp_path, "--actor", "tp=2,dp=2", "--sequence-length", "64", "--sequences", "6", "--lengths", "64,16,20")
    ranks = [training.RankFound(device="NVIDIA H200", matmul_tflops=floor, held_bytes=5, peak_bytes=7) for floor in (800.0, 700.0)]
    found = training.TrainFound(train_s=[3.0, 1.0, 2.0], score_s=[1.0], losses=[1.0] * 3, ranks=ranks)
    whole = training.summary(made, found, {}, None)
    assert (whole["sequences"], whole["tokens"]) == (12, 2 * 200)
    assert whole["positions"] == 2 * sum(len(cut) * max(cut) for cut in made.microbatches) > whole["tokens"]
    forward = 2 * (
        200 * whole["flops"]["token"] + sum(training.flops_of_attention(model_of(made.config), n) for n in (64, 64, 16, 16, 20, 20))
    )
    train, score = whole["train"], whole["score"]
    assert (train["median_s"], train["tokens_per_s"], train["tokens_per_s_per_rank"]) == (2.0, 200.0, 50.0)
    assert train["tflops_per_rank"] == pytest.approx(3 * forward / 2.0 / 4 / 1e12)
    assert score["tflops_per_rank"] == pytest.approx(forward / 4 / 1e12)
    assert train["share_of_matmul"] == pytest.approx(train["tflops_per_rank"] / 700.0), "the slowest rank's"
    assert train["share_of_peak"] == pytest.approx(train["tflops_per_rank"] / 989.4)
    vocab, hidden = made.config["vocab_size"], made.config["hidden_size"]
    more = train["share_of_peak_with_embedding"] - train["share_of_peak"]
    assert more == pytest.approx(2 * 200 * 6 * vocab * hidden / 2.0 / 4 / 989.4e12)
    other = [training.RankFound(device="a card", matmul_tflops=700.0, held_bytes=0, peak_bytes=0)]
    unknown = training.summary(made, training.TrainFound(train_s=[1.0], score_s=[1.0], losses=[1.0], ranks=other), {}, None)
    assert unknown["train"]["share_of_peak"] is None
    training.show(unknown)
    adapted = planned_training(
        tmp_path, "--actor", "tp=2,dp=2", "--sequence-length", "64", "--sequences", "6", "--lengths", "64,16,20", "--lora", "8"
    )
    base, factors = (2 * 200 * n for n in (whole["flops"]["token"], training.flops_of_adapters(model_of(made.config), adapted.lora)))
    assert 0 < factors < base / 2
    beside = training.summary(adapted, found, {}, None)
    flops = 3 * (forward + factors) - base
    assert beside["train"]["tflops_per_rank"] == pytest.approx(flops / 2.0 / 4 / 1e12), "weights of a frozen base have no gradients"
    assert beside["memory"]["predicted_held_bytes"] < whole["memory"]["predicted_held_bytes"] / 2
    memory = whole["memory"]
    assert memory["peak_bytes"] == 7 and memory["predicted_held_bytes"] < memory["predicted_peak_bytes"]
    assert memory["predicted_held_bytes"] == sum(memory["predicted_bytes"][part] for part in ("weights", "gradients", "optimizer"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--set", "sequence_paralel=True"], "unknown model override 'sequence_paralel'; did you mean 'sequence_parallel'"),
        (["--set", "tp_comm_overlap=True"], "tp_comm_overlap cannot be switched on"),
        (["--set", "fused"], "--set 'fused': write NAME=VALUE"),
        (["--set", "use_distributed_optimizer=false"], "--set use_distributed_optimizer=false: write True or False, as Python has it"),
        (["--set", "log_num_zeros_in_grad=1"], "--set log_num_zeros_in_grad=1: write True or False"),
        (["--set", "sequence_parallel=off", "--set", "recompute_num_layers=x"], "sequence_parallel=off.*; --set recompute_num_layers=x: "),
        (["--set", "bucket_size=1e7"], "--set bucket_size=10000000.0: write a number"),
        (["--sequence-length", "1"], "--sequence-length is 1"),
        (["--peak-tflops", "0"], "--peak-tflops is 0; it must be more than 0"),
        (["--lengths", "5,³"], "write equal, spread, or numbers from 2"),
        (["--lengths", "5,9000"], "write equal, spread, or numbers from 2 to --sequence-length 4096"),
        (["--micro-batch-tokens", "100"], "--micro-batch-tokens 100 is less than the longest sequence, 4096"),
        (["--score-micro-batch-tokens", "100"], "--score-micro-batch-tokens 100 is less than the longest sequence, 4096"),
        (["--sequences", "0"], "--sequences is 0; it must be at least 1"),
        (["--actor", "pp=3"], "4 layers cannot be split over pp_size 3"),
        (["--profile"], "--profile says what a GPU does, and no GPU is visible"),
        (
            ["--model", "tiny-moe", "--actor", "tp=2"],
            "Megatron trains under tp=2 on parts of the sequence only; give --set sequence_parallel",
        ),
        (["--set", "overlap_param_gather=True"], "needs use_distributed_optimizer and overlap_grad_reduce True"),
        (["--set", "optimizer_cpu_offload=True"], "moves the optimizer's state from GPUs to the host, and no GPU is visible"),
        (["--set", "optimizer_offload_fraction=0.5"], "is of optimizer_cpu_offload, which is off"),
        (["--set", "use_precision_aware_optimizer=True"], "needs a GPU and TransformerEngine"),
        (["--packing", "--actor", "cp=2", "--set", "cp_comm_type=a2a"], "--packing: cp_comm_type a2a takes no packed sequences"),
    ],
)
def test_training_that_cannot_be_is_refused_before_anything_starts(tmp_path: Path, words: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        planned_training(tmp_path, *words)


def test_an_optimizer_on_the_host_is_there_as_a_whole_unless_a_share_is_given(tmp_path: Path) -> None:
    """As in a run: Megatron's own default would leave all of it on the GPU."""
    made = planned_training(tmp_path)
    there = training.predicted_memory(made)["predicted_bytes"]["optimizer"]

    def left(**given: Any) -> float:
        away = replace(made, optimizer={"lr": 1e-5, "optimizer_cpu_offload": True, **given})
        return training.predicted_memory(away)["predicted_bytes"]["optimizer"] / there

    precise = {"use_precision_aware_optimizer": True}
    assert (left(**precise), left(**precise, optimizer_offload_fraction=0.5)) == (0, 0.5)
    assert left() == pytest.approx(1 / 3), "main parameters, without which the other optimizer does not go"
    assert OptimizerOptions(lr=1e-5, optimizer_cpu_offload=True).optimizer_offload_fraction == 1.0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--train", "--rollout", "tp=2"], "--rollout belong to a bench of syncs, and --train starts no engine"),
        (["--packing", "--set", "bias_dropout_fusion=True"], "--packing, --set belong to a bench of training; give --train too"),
    ],
)
def test_options_of_the_other_kind_of_bench_are_refused(words: list[str], said: str) -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    with pytest.raises(ConfigError, match=said):
        run(parser.parse_args(["--model", "tiny", *words]))
