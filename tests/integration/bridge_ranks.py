"""What the ranks of ``test_bridge`` do; each function runs on every rank."""

from __future__ import annotations

import gc
import json
import os
import resource
from copy import copy
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region, model_parallel_cuda_manual_seed
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.moe.experts import SequentialMLP, TEGroupedMLP
from safetensors.torch import load_file

from rlsync import AutoBridge
from rlsync.bridge import auto_bridge
from rlsync.copy.writes import DeferredWrites, HostMemory
from rlsync.errors import CheckpointError, ConfigError, PlacementError, RlsyncError
from rlsync.layout.topology import Topology
from rlsync.megatron.model import flavour_of, iter_parameters
from rlsync.megatron.parallel import compute_device, destroy_parallel, initialize_parallel
from rlsync.megatron.versions import expert_modules
from rlsync.transport import collectives


def load_folder(folder: str | Path) -> dict[str, torch.Tensor]:
    return {name: t for file in sorted(Path(folder).glob("*.safetensors")) for name, t in load_file(file).items()}


def parallel(topology: dict[str, int]) -> Topology:
    made = Topology(**topology)
    initialize_parallel(made, seed=1, timeout_s=300)
    return made


def agree_with_huggingface(cases: list[dict], out_dir: str) -> None:
    """For each case: load, compare logits with HF's, export and compare bitwise, save under this layout.

    ``kept`` of a case: what names begin with of tensors that are in its folder and no rank has.
    """
    # Some tensors of the tiny models are to travel without a message, and some in one.
    collectives.STRAIGHT_BYTES = 20_000
    for case in cases:
        topology = parallel(case["topology"])
        bridge = AutoBridge.from_pretrained(case["folder"])
        models = bridge.get_model(
            case["folder"], topology=topology, bf16=False, wrap_with_ddp=False, make_vocab_size_divisible_by=case.get("divisor", 1),
            overrides=case.get("overrides"), spec=case.get("spec", "auto"),
        )  # fmt: skip
        original = load_folder(case["folder"])
        exported = dict(bridge.export_weights(models, bucket_bytes=50_000))
        held = {name for name in original if not name.startswith(case.get("kept", "no kept tensors"))}
        assert set(exported) == held, set(exported) ^ held
        for name, tensor in exported.items():
            assert torch.equal(tensor.cpu(), original[name]), f"{case}: {name} changed on its way"
        if "logits" in case:
            check_logits(models, case)
        saved = Path(out_dir, f"saved-{cases.index(case)}")
        bridge.save_weights(models, saved, max_shard_bytes=60_000)
        check_saved(bridge, topology, models, saved, original, case)
        destroy_parallel(keep_distributed=True)
    destroy_parallel()


def serve_a_trainer_with_plain_mpu(case: dict) -> None:
    """Process groups and seeds as Megatron's own examples make them; nothing of ``rlsync.megatron.parallel``."""
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=2)
    bridge = AutoBridge.from_pretrained(case["folder"])
    try:
        bridge.get_model(case["folder"], bf16=False)
    except ConfigError as error:
        print(f"SAID {error}", flush=True)
    model_parallel_cuda_manual_seed(1)
    models = bridge.get_model(case["folder"], bf16=False)
    original = load_folder(case["folder"])
    assert all(torch.equal(t.cpu(), original[name]) for name, t in bridge.export_weights(models))
    check_logits(models, case)


def build_and_give_up(folder: str, times: int) -> None:
    """Build a model on groups of its own, and give both up, again and again; says how many threads are left after each."""
    numbers = []
    for _ in range(times):
        parallel({"tp_size": 2})
        models = AutoBridge.from_pretrained(folder).get_model(folder, bf16=False)
        destroy_parallel(keep_distributed=True)
        del models
        gc.collect()
        numbers.append(len(os.listdir("/proc/self/task")))
    print(f"THREADS {json.dumps(numbers)}", flush=True)
    destroy_parallel()


def check_logits(models: list[torch.nn.Module], case: dict) -> None:
    """Logits of the last pipeline stage, gathered over TP and cut to the real vocabulary, against HF's."""
    device = compute_device()
    tokens, expected = torch.tensor(case["tokens"], device=device), torch.tensor(case["logits"], device=device)
    positions = torch.arange(tokens.shape[1], device=device).expand_as(tokens)

    rounds = parallel_state.get_pipeline_model_parallel_world_size()  # interleaving wants as many microbatches as stages

    def forward_step(iterator, model):
        next(iterator)
        return model(tokens, positions, None), lambda output, non_loss_data=False: output

    for model in models:
        model.eval()
    with torch.no_grad():
        outputs = get_forward_backward_func()(
            forward_step_func=forward_step, data_iterator=[iter([None] * rounds) for _ in models],
            model=list(models), num_microbatches=rounds, seq_length=tokens.shape[1],
            micro_batch_size=tokens.shape[0], forward_only=True, collect_non_loss_data=True,
        )  # fmt: skip
    if parallel_state.is_pipeline_last_stage(ignore_virtual=True):
        logits = gather_from_tensor_model_parallel_region(outputs[0])[..., : expected.shape[-1]]
        difference = (logits - expected).abs().max().item()
        assert difference <= 1e-4, f"{case['folder']} {case['topology']}: logits differ by {difference}"
        print(f"LOGITS {case.get('spec', 'auto')} {case['topology']} {difference:.2e}", flush=True)


def check_saved(bridge, topology, models, saved: Path, original, case) -> None:
    """The saved folder holds the same bits, and loading it restores models that were wiped."""
    assert (saved / "config.json").read_bytes() == Path(case["folder"], "config.json").read_bytes()
    again = load_folder(saved)
    assert all(torch.equal(again[name], original[name]) for name in original) and set(again) == set(original)
    for _, _, _, parameter in iter_parameters(models):
        parameter.data.fill_(float("nan"))
    bridge.load_weights(models, saved)
    assert all(torch.equal(t.cpu(), original[name]) for name, t in bridge.export_weights(models))
    for _, _, name, parameter in iter_parameters(models):
        assert not parameter.isnan().any(), name


def refuse_bad_checkpoints(folder: str, broken: dict[str, str]) -> None:
    """Each broken folder raises its error on every rank, and no parameter changes."""
    topology = parallel({"tp_size": 2})
    bridge = AutoBridge.from_pretrained(folder)
    models = bridge.get_model(folder, topology=topology, bf16=False, wrap_with_ddp=False)
    before = [p.clone() for _, _, _, p in iter_parameters(models)]
    said = {}
    for kind, bad in broken.items():
        try:
            bridge.load_weights(models, bad)
        except (PlacementError, CheckpointError) as error:
            said[kind] = f"{type(error).__name__}: {error}"
        assert all(torch.equal(a, p) for a, (_, _, _, p) in zip(before, iter_parameters(models), strict=True)), kind
    try:
        bridge.load_weights(models, broken["missing"] if dist.get_rank() else folder)
    except RlsyncError as error:
        said["one rank"] = f"{type(error).__name__}: {error}"
    print("SAID " + json.dumps(said), flush=True)
    destroy_parallel()


def refuse_foreign_parameters(folder: str) -> None:
    """A model whose parameters are not what the table says is refused by name."""
    topology = parallel({"tp_size": 2})
    bridge = AutoBridge.from_pretrained(folder)
    models = bridge.get_model(topology=topology, bf16=False, wrap_with_ddp=False)
    models[0].extra = torch.nn.Parameter(torch.zeros(3))
    try:
        bridge.shards(models)
    except PlacementError as error:
        print(f"SAID {error}", flush=True)
    del models[0].extra
    models[0].decoder.layers[1].register_buffer("bias", torch.zeros(4))
    models[0].register_buffer("scratch", torch.zeros(4), persistent=False)
    try:
        bridge.shards(models)
    except PlacementError as error:
        print(f"SAID {error}", flush=True)
    destroy_parallel()


def survive_transformer_engine_names(folders: list[str]) -> None:
    """Norms fused into the following linear and experts with numbers, with the tensor attributes that TransformerEngine sets."""
    for folder in folders:
        parallel({"tp_size": 2})
        bridge = AutoBridge.from_pretrained(folder)
        models = bridge.get_model(folder, bf16=False, wrap_with_ddp=False)
        assert flavour_of(models) == "local"
        local = {name for _, _, name, _ in iter_parameters(models)}
        for layer, spec in zip(models[0].decoder.layers, models[0].transformer_layer_spec.layer_specs, strict=True):
            _name_as_transformer_engine(layer, spec.submodules)
        assert flavour_of(models) == "te"
        names = {name for _, _, name, _ in iter_parameters(models)}
        assert "decoder.layers.3.pre_mlp_layernorm.weight" in (names if bridge.model.transformer.get("num_moe_experts") else local - names)
        assert any(name.endswith(".layer_norm_weight") for name in names - local)
        with torch.no_grad():
            for _, _, _, parameter in iter_parameters(models):
                parameter.fill_(float("nan"))
        bridge.load_weights(models, folder)
        original = load_folder(folder)
        exported = dict(bridge.export_weights(models))
        assert set(exported) == set(original) and all(torch.equal(t.cpu(), original[name]) for name, t in exported.items())
        destroy_parallel(keep_distributed=True)
    destroy_parallel()


def _name_as_transformer_engine(layer: torch.nn.Module, spec: Any) -> None:
    """Move parameters of a layer, and mark its spec, to where TransformerEngine's have them."""
    attention, mlp, linears = layer.self_attention, layer.mlp, []
    fused = [(layer, "input_layernorm", attention.linear_qkv)] if hasattr(attention, "linear_qkv") else []
    if not fused:
        fused = [(attention, f"{name}_layernorm", getattr(attention, f"linear_{name}_up_proj", None)) for name in ("q", "kv")]
        spec.self_attention.submodules.kv_layernorm = IdentityOp
        linears += [attention.linear_kv_down_proj]
    else:
        spec.input_layernorm = IdentityOp
    if hasattr(mlp, "experts"):
        mlp.experts = _NumberedExperts(mlp.experts)
    else:
        fused.append((layer, "pre_mlp_layernorm", mlp.linear_fc1))
        linears.append(mlp.linear_fc2)
    for owner, norm, linear in fused:
        if linear is not None:
            linear.layer_norm_weight = getattr(owner, norm).weight
            setattr(owner, norm, torch.nn.Identity())
            linears.append(linear)
    for linear in linears:
        linear.weight.tensor_model_parallel, linear.weight.partition_dim, linear.weight.partition_stride = True, 0, 1


class _NumberedExperts(TEGroupedMLP):
    """The parameters of a TEGroupedMLP, which needs TransformerEngine, with the attributes that its layers set."""

    def __init__(self, single: SequentialMLP) -> None:
        torch.nn.Module.__init__(self)
        for name in ("linear_fc1", "linear_fc2"):
            linear = torch.nn.Module()
            for number, expert in enumerate(single.local_experts):
                weight = torch.nn.Parameter(torch.full_like(getattr(expert, name).weight, float("nan")))
                weight.tensor_model_parallel, weight.partition_dim, weight.partition_stride = True, 0, 1
                linear.register_parameter(f"weight{number}", weight)
            self.add_module(name, linear)


def hold_experts_in_other_modules(folder: str) -> None:
    """Every module of Megatron's that holds experts is loaded and exported bit for bit, and GroupedMLP then computes as SequentialMLP."""
    parallel({"dp_size": 2, "ep_size": 2})
    bridge = AutoBridge.from_pretrained(folder)
    models = bridge.get_model(folder, bf16=False, wrap_with_ddp=False)
    original, layers = load_folder(folder), [layer.mlp for layer in models[0].decoder.layers if hasattr(layer.mlp, "experts")]
    generator = torch.Generator().manual_seed(dist.get_rank())
    counts = torch.arange(1, 1 + layers[0].num_local_experts)
    tokens = torch.randn(int(counts.sum()), models[0].config.hidden_size, generator=generator)
    routed = tokens, counts, torch.rand(len(tokens), generator=generator)
    expected = [mlp.experts(*routed)[0] for mlp in layers]
    # GroupedMLP is of Megatron-Core 0.16. Its kernels are not there; the assertion of its forward is about their dtype.
    joined = expert_modules().get("GroupedMLP")
    config = copy(models[0].config)
    config.bf16 = True
    groups = ProcessGroupCollection.use_mpu_process_groups()
    with pytest.MonkeyPatch.context() as patch:
        if joined is not None:
            grouped_gemm = import_module("megatron.core.transformer.moe.grouped_gemm_util")
            patch.setattr(grouped_gemm, "assert_grouped_gemm_is_available", lambda: None)
            patch.setattr(grouped_gemm, "ops", SimpleNamespace(gmm=_products))
        for name in ("linear_fc1.weight1", "weight1") if joined else ("linear_fc1.weight1",):
            for mlp in layers:
                mlp.experts = joined(len(counts), config, groups) if name == "weight1" else _NumberedExperts(mlp.experts)
            assert any(key.endswith(f"experts.{name}") for key, _ in models[0].named_parameters())
            bridge.load_weights(models, folder)
            exported = dict(bridge.export_weights(models))
            assert exported.keys() == original.keys() and all(torch.equal(tensor, original[key]) for key, tensor in exported.items())
        for mlp, output in zip(layers, expected, strict=True) if joined else ():
            torch.testing.assert_close(mlp.experts(*routed)[0], output, rtol=0, atol=1e-5)
        layers[0].experts = torch.nn.Linear(2, 2)
        with pytest.raises(PlacementError, match="experts are held by Linear; known are SequentialMLP, TEGroupedMLP"):
            bridge.shards(models)
    print("HELD", flush=True)
    destroy_parallel()


def _products(tokens: torch.Tensor, weights: torch.Tensor, counts: torch.Tensor, trans_b: bool) -> torch.Tensor:
    """What grouped_gemm's kernel computes: each expert's tokens times its matrix."""
    assert not trans_b
    return torch.cat([part @ weight for part, weight in zip(tokens.split(counts.tolist()), weights, strict=True)])


def save_in_another_dtype(folder: str, nan_folder: str, out_dir: str) -> None:
    """bf16 parameters of a fp32 folder; saved twice over each other, refused over the folder they came from."""
    parallel({"tp_size": 2})
    bridge = AutoBridge.from_pretrained(folder)
    models = bridge.get_model(nan_folder, bf16=True, wrap_with_ddp=False)
    before = {path.name: path.read_bytes() for path in Path(folder).iterdir()}
    for alias in (folder, Path(folder, "..", Path(folder).name)):
        with pytest.raises(RlsyncError, match="save cut short would lose it"):
            bridge.save_weights(models, alias)
    dist.barrier()
    assert {path.name: path.read_bytes() for path in Path(folder).iterdir()} == before
    bridge.save_weights(models, out_dir, max_shard_bytes=60_000)
    bridge.save_weights(models, out_dir)
    with patch("rlsync.bridge.full_tensors.build_plan", side_effect=AssertionError("a second plan for the same files")):
        bridge.save_weights(models, out_dir)
    Path(out_dir, "adapter.safetensors").touch()
    dist.barrier()
    with pytest.raises(RlsyncError, match=r"adapter\.safetensors"):
        bridge.save_weights(models, out_dir)
    dist.barrier()
    destroy_parallel()


def fail_to_save_on_one_rank(folder: str, out_dir: str) -> None:
    """The weights that are there stay where rank 1 alone has a model that cannot be saved."""
    parallel({"tp_size": 2})
    bridge = AutoBridge.from_pretrained(folder)
    models = bridge.get_model(folder, bf16=False, wrap_with_ddp=False)
    bridge.save_weights(models, out_dir, max_shard_bytes=60_000)
    before = {path.name: path.read_bytes() for path in Path(out_dir).iterdir()}
    if dist.get_rank() == 1:
        models[0].extra = torch.nn.Parameter(torch.zeros(3))
    with pytest.raises(RlsyncError, match="extra"):
        bridge.save_weights(models, out_dir)
    dist.barrier()
    assert {path.name: path.read_bytes() for path in Path(out_dir).iterdir()} == before
    destroy_parallel()


def run_out_of_host_memory_on_one_rank(folder: str, out_dir: str) -> None:
    """A rank that gets no memory for the copies of its files takes part in the exchange to its end; all ranks hear of it, and no file of
    its own is left."""
    initialize_parallel(Topology(tp_size=2), seed=1, timeout_s=20)
    bridge = AutoBridge.from_pretrained(folder)
    models = bridge.get_model(folder, bf16=False, wrap_with_ddp=False)
    rank = dist.get_rank()
    # Many exchanges follow the failure.
    with patch.object(auto_bridge, "EXPORT_BUCKET_BYTES", 20_000), pytest.raises(RlsyncError if rank == 0 else RuntimeError) as caught:
        save_within(200 * 2**20 if rank == 1 else None, bridge, models, out_dir)
    assert "can't allocate memory" in str(caught.value) and (rank == 1 or "rank 1: RuntimeError" in str(caught.value)), caught.value
    dist.barrier()
    assert len({path.stem for path in Path(out_dir).glob("model-*")}) > 2, "control: rank 0 has written several files"
    written = {bool(int(path.name[6:11]) % 2) for path in Path(out_dir).glob("model-*.safetensors*")}
    assert written == {True}, "rank 1 left files"
    bridge.save_weights(models, out_dir)
    destroy_parallel()


def save_within(more_bytes: int | None, bridge: AutoBridge, models: list[torch.nn.Module], out_dir: str) -> None:
    """Begin to save into host memory, of which a piece takes 256 MiB, while this process may take so many more bytes."""
    limit, pages = resource.getrlimit(resource.RLIMIT_AS), int(Path("/proc/self/statm").read_text().split()[0])
    if more_bytes is not None:
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + more_bytes, limit[1]))
    try:
        bridge.save_weights(models, out_dir, max_shard_bytes=60_000, writes=DeferredWrites(HostMemory()))
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limit)


def export_without_moving(folder: str) -> None:
    """Two data-parallel ranks send each other nothing; what lies in order in a parameter is that parameter, and all else is new."""
    topology = parallel({"dp_size": 2})
    bridge = AutoBridge.from_pretrained(folder)
    models = bridge.get_model(folder, topology=topology, bf16=False, wrap_with_ddp=False)

    def deliver(self, bucket, destinations):
        raise AssertionError("every rank holds all tensors")

    original = load_folder(folder)
    collectives.Exchange.deliver = deliver
    memory = [(p.data_ptr(), p.data_ptr() + p.nbytes) for _, _, _, p in iter_parameters(models)]
    views = set()
    for name, tensor in bridge.export_weights(models):
        assert tensor.is_contiguous() and not tensor.requires_grad
        assert torch.equal(tensor, original.pop(name)), name
        if any(begin <= tensor.data_ptr() < end for begin, end in memory):
            views.add(name.split(".")[-2])
    assert not original
    assert views == {"embed_tokens", "gate_proj", "up_proj", "down_proj", "o_proj", "input_layernorm", "post_attention_layernorm", "norm",
                     "q_norm", "k_norm"}, views  # fmt: skip
    destroy_parallel()
