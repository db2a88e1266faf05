"""What the child processes of the recorder's tests do: claims by name, each of which holds or has a traceback."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from vllm.model_executor import parameter
from vllm.model_executor.layers import layernorm
from vllm.model_executor.model_loader.weight_utils import composed_weight_loader, default_weight_loader

from rlsync.engine.compat import engine as compat
from rlsync.engine.compat import reload as compat_reload
from rlsync.engine.recorder import LastRecording, Recording, record
from rlsync.layout.geometry import TensorSpec
from rlsync.layout.recorded import tensors_as_read
from tests.integration import recorder_adapters
from tests.integration.recorder_models import Worker, differing, engine_config, executed, same_bits, start_ranks, virtual_rank
from tests.integration.recorder_toys import COMPUTED, COPIES, SHAPE, Loader, Toy
from tests.integration.recorder_trace import differences, trace_of

HF = TensorSpec("hf", "float32", SHAPE)
# Copies of which some elements of the tensor are left out.
IN_PART = ("assigned rows", "assigned numbers", "part of a stack", "one row for all", "one element for all")
# Buffers that no checkpoint fills: the attention's scales, the rotary cache, and the table of a rank's experts.
NEVER_LOADED = frozenset({"_k_scale", "_v_scale", "_q_scale", "_prob_scale", "cos_sin_cache", "_expert_map"})


class Claims:
    """Runs claims and writes what became of them to ``report``, with what they found."""

    def __init__(self, report: Path) -> None:
        self._report = report
        self._found: dict[str, Any] = {}

    def run(self, name: str, claim: Callable[[], Any]) -> None:
        try:
            self._found[name] = {"found": claim()}
        except Exception:
            self._found[name] = {"error": traceback.format_exc()}
        self._report.write_text(json.dumps(self._found))


def check_placement(packed: Worker, plain: Worker) -> dict[str, Any]:
    """Recorded on a model that computes, executed from the HF tensors, compared with what vLLM's loaders put into a plain one."""
    recording, held = packed.record(), plain.held()
    assert not recording.findings, recording.findings
    buffers, findings = executed(recording, packed.tensors)
    assert not findings
    assert set(buffers) == {b.name for b in recording.buffers}
    assert differing(buffers, held) == []
    described = {name for buffer in recording.buffers for name in (buffer.name, *recording.aliases[buffer.name])}
    absent = {name for name in held if name not in described and name.rsplit(".", 1)[1] not in NEVER_LOADED}
    assert not absent, absent
    return {
        "read": recording.read_names, "unused": recording.unused_names, "digest": digest(recording),
        "gaping": check_gaps(recording, packed.specs, plain),
    }  # fmt: skip


def check_gaps(recording: Recording, specs: list[TensorSpec], plain: Worker) -> list[str]:
    """Loaders that are given nothing but what they were seen to read leave the same. Returns which tensors that was not all of."""
    names = set(recording.read_names)
    placement = tensors_as_read("worker", [s for s in specs if s.name in names], recording.writes, recording.computed_names)
    given = {b.name: torch.full_like(plain.tensors[b.name], torch.nan) for b in placement.buffers}
    for piece in placement.pieces:
        box = tuple(slice(a, b) for a, b in zip(piece.box.start, piece.box.stop, strict=True))
        given[piece.tensor][box] = plain.tensors[piece.tensor][box]
    held = plain.held()
    written = {b.name: held[b.name] for b in recording.buffers}
    wanted = {name: tensor.clone() for name, tensor in written.items()}
    with torch.no_grad():
        for tensor in written.values():
            tensor.fill_(torch.nan)
    with compat.config_scope(plain.config):
        compat_reload.load_weights(plain.model, iter(given.items()))
    assert differing(written, wanted) == []
    return [b.name for b in placement.buffers if b.has_gaps]


def digest(recording: Recording) -> str:
    return hashlib.sha256(repr((recording.buffers, recording.writes)).encode()).hexdigest()


def check_trace(worker: Worker) -> None:
    before = trace_of(worker.model, worker.config)
    first = worker.record()
    assert not (left := differences(before, trace_of(worker.model, worker.config))), left
    assert worker.record() == first
    broken = worker.record([*worker.specs, TensorSpec("model.nowhere.weight", "bfloat16", (3,))])
    assert broken.unused_names == (*first.unused_names, "model.nowhere.weight") and broken.writes == first.writes
    assert not (left := differences(before, trace_of(worker.model, worker.config))), left


def check_trace_sees(worker: Worker) -> None:
    """Negative control: each kind of trace is seen."""
    before = trace_of(worker.model, worker.config)
    name, layer = next((n, m) for n, m in worker.model.named_modules() if "bias" in m._parameters and m.bias is not None)
    layer.bias.data[0] += 1
    assert f"{name} parameter bias" not in (seen := differences(before, trace_of(worker.model, worker.config))) and "hashes" in seen
    layer.bias.data[0] -= 1
    layer._parameters["weight"] = layer._parameters.pop("weight")
    assert differences(before, trace_of(worker.model, worker.config)) == [f"{name} parameters"]
    layer._parameters["bias"] = layer._parameters.pop("bias")
    bias = layer.bias
    layer.bias = torch.nn.Parameter(bias.data, requires_grad=False)
    assert f"{name} parameter bias" in differences(before, trace_of(worker.model, worker.config))
    layer.bias = bias
    worker.config.compilation_config.static_all_moe_layers.append("twin")
    assert "static_all_moe_layers" in differences(before, trace_of(worker.model, worker.config))
    worker.config.compilation_config.static_all_moe_layers.remove("twin")


def check_reload(worker: Worker) -> None:
    """After a layer-wise reload, a reload that failed in the middle, and while one is under way."""
    first = worker.record()
    with compat.config_scope(worker.config):
        compat_reload.begin_whole_reload(worker.model)
        with pytest.raises(RuntimeError, match="is under way"):
            worker.record()
        compat_reload.load_weights(worker.model, iter(worker.tensors.items()))
        compat_reload.finish_whole_reload(worker.model, worker.config.model_config)
        assert worker.record() == first
        compat_reload.begin_whole_reload(worker.model)
        compat_reload.load_weights(worker.model, iter(list(worker.tensors.items())[: len(worker.tensors) // 2]))
        compat_reload.abandon_reload(worker.model)
        before = trace_of(worker.model, worker.config)
        assert worker.record() == first
        assert not (left := differences(before, trace_of(worker.model, worker.config))), left


@contextlib.contextmanager
def gate_and_up_swapped() -> Iterator[None]:
    column = parameter._ColumnvLLMParameter
    original = column.load_merged_column_weight

    def swapped(self: Any, loaded_weight: Any, **where: Any) -> None:
        original(self, loaded_weight, **{**where, "shard_offset": where["shard_size"] - where["shard_offset"]})

    with mock.patch.object(column, "load_merged_column_weight", swapped):
        yield


def check_swapped(packed: Worker, plain: Worker) -> None:
    """Negative control: the comparison sees two shards in each other's place."""
    with gate_and_up_swapped():
        buffers, findings = executed(packed.record(), packed.tensors)
    assert not findings
    wrong = differing(buffers, plain.held())
    assert wrong and wrong == [name for name in buffers if name.endswith("gate_up_proj.weight")], wrong


def check_computed(packed: Worker, plain: Worker) -> None:
    """Negative control: a norm whose loader takes a logarithm of it is a finding, and nothing else is."""
    norms = [m for m in packed.model.modules() if isinstance(m, layernorm.RMSNorm)]
    with contextlib.ExitStack() as stack:
        for metadata in [compat_reload.layerwise.LAYERWISE_INFO[norm].restore_metadata[0]["weight"] for norm in norms[:1]]:
            metadata.weight_loader = composed_weight_loader(default_weight_loader, lambda x: torch.exp(x.float()))
            stack.callback(delattr, metadata, "weight_loader")
        buffers, findings = executed(packed.record(), packed.tensors)
    (finding,) = findings
    assert "model.layers.0.input_layernorm.weight" in finding and "computes" in finding
    assert "model.layers.0.input_layernorm.weight" not in buffers and differing(buffers, plain.held()) == []


def check_misfits(worker: Worker) -> None:
    """Everything wrong is found together: what no loader reads, and shapes that do not fit."""
    name = "model.layers.1.self_attn.k_proj.weight"
    specs = [replace(s, shape=(3, *s.shape[1:])) if s.name == name else s for s in worker.specs]
    recording = worker.record([*specs, TensorSpec("model.layers.9.mlp.up_proj.weight", "bfloat16", (3, 3))])
    (finding,) = recording.findings
    assert finding.startswith(f"{name} (3, 128) torch.bfloat16 does not fit the engine's model: "), finding
    assert recording.unused_names == ("model.layers.9.mlp.up_proj.weight",)
    assert name not in recording.read_names and len(recording.read_names) == len(worker.specs) - 1
    assert "nothing writes" in executed(recording, worker.tensors)[1][0]


def check_partial(loader: Loader, recording: Recording) -> bool:
    """A loader that is given nothing but what it was seen to read leaves the same. Returns whether it was given less than all."""
    tensor, given = torch.randn(SHAPE, generator=torch.Generator().manual_seed(3)), torch.full(SHAPE, torch.nan)
    read = [HF] if "hf" in recording.read_names else []
    for piece in tensors_as_read("toy", read, recording.writes, recording.computed_names).pieces:
        box = tuple(slice(a, b) for a, b in zip(piece.box.start, piece.box.stop, strict=True))
        given[box] = tensor[box]
    is_partial = bool(read) and bool(given.isnan().any())
    whole, partial = Toy(loader), Toy(loader)
    whole.load_weights([("hf", tensor)])
    partial.load_weights([("hf", given)])
    wanted = whole.state_dict()
    assert all(torch.equal(t, wanted[n]) and not t.isnan().any() for n, t in partial.state_dict().items())
    return is_partial


def check_copies(idiom: str) -> None:
    tensor = torch.randn(SHAPE, generator=torch.Generator().manual_seed(3))
    wanted = Toy(COPIES[idiom])
    wanted.load_weights([("hf", tensor)])
    toy = Toy(COPIES[idiom])
    before = {n: t.clone() for n, t in toy.state_dict(keep_vars=True).items()}
    recording = record(toy, [HF])
    assert all(torch.equal(t, before[n]) for n, t in toy.state_dict(keep_vars=True).items())
    assert recording.read_names == ("hf",) and not recording.findings
    assert check_partial(COPIES[idiom], recording) == (idiom in IN_PART)
    buffers, findings = executed(recording, {"hf": tensor})
    names = {"weight", "bias", "table", "e_score_correction_bias"} if idiom == "every table" else {"weight"}
    assert set(buffers) == names
    assert [f.split(" ")[0] for f in findings] == [n for n in ("bias",) if n not in names]
    assert all(same_bits(t, wanted.get_parameter(n) if n in ("weight", "bias") else wanted.get_buffer(n)) for n, t in buffers.items())


def check_computations(idiom: str) -> None:
    buffer, loader = COMPUTED[idiom]
    toy = Toy(loader)
    kept, values = toy.bias, toy.bias.clone()
    recording = record(toy, [HF])
    assert toy.bias is kept and torch.equal(toy.bias, values) and toy.bias.untyped_storage()._cdata == kept.untyped_storage()._cdata
    assert not recording.findings, recording.findings
    assert not check_partial(loader, recording)
    buffers, findings = executed(recording, {"hf": torch.zeros(SHAPE)})
    assert buffer not in buffers
    assert any(f.startswith(f"{buffer} ") and "its loader computes" in f for f in findings), findings


def check_foreign() -> None:
    """A loader that fills what is neither parameter nor buffer has lost the tensor: nothing is executed, and it is named."""
    toy = Toy(lambda toy, hf: toy.plain.copy_(hf))
    (finding,) = record(toy, [HF]).findings
    assert finding.startswith("hf (4, 6) torch.float32 does not fit") and "neither a parameter nor a buffer" in finding
    assert not toy.plain.any()


def check_shared_live() -> None:
    """A live tensor of two layers, which a reload left wrapped, keeps its wrapper."""
    layers = [Toy(lambda toy, hf: toy.weight.data.copy_(hf)) for _ in range(2)]

    def online_process_loader() -> None: ...

    online_process_loader.__wrapped__ = default_weight_loader  # type: ignore[attr-defined]
    layers[1].bias = layers[0].bias
    layers[0].bias.weight_loader = online_process_loader
    layers[0].add_module("other", layers[1])
    record(layers[0], [HF])
    assert layers[0].bias is layers[1].bias and layers[0].bias.weight_loader is online_process_loader


def check_again() -> None:
    """A worker that connects again does not run its loaders again, unless tensors, layers or the memory that they share are others."""
    runs = []
    toy = Toy(lambda toy, hf: (runs.append(hf.shape), toy.weight.data.copy_(hf)))
    last = LastRecording()
    first = last.record(toy, [HF])
    assert last.record(toy, [HF]) is first and len(runs) == 1
    last.record(toy, [replace(HF, dtype="bfloat16")])
    assert len(runs) == 2
    toy.add_module("other", Toy(lambda toy, hf: None))
    found = last.record(toy, [HF])
    assert len(runs) == 3 and len(found.buffers) > len(first.buffers)
    toy.add_module("other", Toy(lambda toy, hf: None))
    found = last.record(toy, [HF])
    assert len(runs) == 4, "another layer of the same names"
    toy.other.weight = toy.weight
    assert last.record(toy, [HF]) is not found and len(runs) == 5


def one_rank(folders: dict[str, str], report: str) -> None:
    claims = Claims(Path(report))
    start_ranks(engine_config(folders["qwen3_moe"]), 0, 1)
    packed = functools.cache(lambda name: Worker(folders[name]))
    plain = functools.cache(lambda name: Worker(folders[name], plain=True))
    for idiom in COPIES:
        claims.run(f"copies: {idiom}", functools.partial(check_copies, idiom))
    for idiom in COMPUTED:
        claims.run(f"computes: {idiom}", functools.partial(check_computations, idiom))
    claims.run("foreign", check_foreign)
    claims.run("shared live", check_shared_live)
    claims.run("again", check_again)
    for name in folders:
        claims.run(f"placement {name}", lambda name=name: check_placement(packed(name), plain(name)))
        claims.run(f"trace {name}", lambda name=name: check_trace(packed(name)))
    for rank in range(2):
        claims.run(f"adapters of cut experts {rank}", functools.partial(recorder_adapters.check, tp_rank=rank, tp_size=2))
        claims.run(f"adapters of shared experts {rank}", functools.partial(recorder_adapters.check, ep_rank=rank, ep_size=2))
    claims.run("adapters of experts", recorder_adapters.check)
    claims.run("trace is seen", lambda: check_trace_sees(packed("qwen2")))
    claims.run("swapped", lambda: check_swapped(packed("llama"), plain("llama")))
    claims.run("computed", lambda: check_computed(packed("qwen2"), plain("qwen2")))
    claims.run("misfits", lambda: check_misfits(packed("qwen2")))
    for name in ("qwen2", "qwen3", "qwen3_moe", "deepseek_v3"):
        claims.run(f"reload {name}", lambda name=name: check_reload(packed(name)))
    for name in ("qwen2", "qwen3_moe", "deepseek_v3"):
        for rank in range(4):
            claims.run(f"virtual {name} {rank}/4", functools.partial(_virtual, folders[name], rank, 4))
    for rank in range(2):
        claims.run(f"virtual qwen2 {rank}/2", functools.partial(_virtual, folders["qwen2"], rank, 2))


def _virtual(folder: str, rank: int, world_size: int) -> dict[str, Any]:
    with virtual_rank(rank, world_size):
        worker = Worker(folder, plain=True)
        return check_placement(worker, worker)


def two_ranks(folders: dict[str, str], report: str) -> None:
    rank, world_size = int(os.environ["RANK"]), 2
    claims = Claims(Path(f"{report}.{rank}"))
    experts = {"tensor_parallel_size": world_size, "enable_expert_parallel": True}
    start_ranks(engine_config(folders["qwen3_moe"], **experts), rank, world_size)
    for name, folder in folders.items():
        for kind, options in (("placement", {"tensor_parallel_size": world_size}), ("experts", experts)):
            if kind == "experts" and name not in ("qwen3_moe", "deepseek_v3"):
                continue
            packed = functools.cache(lambda folder=folder, options=options: Worker(folder, **options))
            claims.run(f"{kind} {name}", lambda: check_placement(packed(), Worker(folder, plain=True, **options)))  # noqa: B023
            claims.run(f"trace {kind} {name}", lambda: check_trace(packed()))  # noqa: B023
