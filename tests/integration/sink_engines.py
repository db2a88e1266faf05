"""What the child processes of the sink tests do: engines in this process, synced through the sinks and compared with fresh ones."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from vllm import LLM, SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.model_loader import base_loader, get_model
from vllm.model_executor.model_loader.reload import meta
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

from rlsync.engine.compat import engine as compat
from rlsync.engine.compat import layers as compat_layers
from rlsync.engine.compat import patches
from rlsync.engine.compat import reload as compat_reload
from rlsync.engine.recorder import record
from rlsync.engine.sinks.choice import choose, not_in_place
from rlsync.engine.sinks.loaders import LoadersSink
from rlsync.engine.sinks.placed import PlacedSink
from rlsync.engine.state import state_difference, state_hashes
from rlsync.errors import ConfigError
from rlsync.layout.geometry import DTYPE_BYTES, Padding, TensorSpec
from rlsync.plan.packing import Segment
from rlsync.transport.ends import PackedArrival
from tests.integration.engine_source import NUM_BLOCKS, read_folder
from tests.integration.sink_models import save_case
from tests.models import VOCAB_SIZE

CPU = torch.device("cpu")
BUCKET_BYTES = 30_000
PROMPTS = [[5, 17, 99, 3], [130, 2, 64], [7] * 12]
Regions = list[tuple[int, tuple[int, ...], tuple[int, ...]]]


class Started:
    """An engine in this process."""

    def __init__(self, folder: Path, dtype: str) -> None:
        self._options = {"dtype": dtype, "max_model_len": 64, "max_num_seqs": 8, "skip_tokenizer_init": True, "enforce_eager": True}
        self._options["num_gpu_blocks_override"] = NUM_BLOCKS
        self.llm = LLM(str(folder), disable_log_stats=True, **self._options)
        runner = self.llm.llm_engine.model_executor.driver_worker.worker.model_runner
        self.model, self.model_config, self.vllm_config = runner.model, runner.model_config, runner.vllm_config

    def answers(self) -> list[list[int]]:
        sampling = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True, detokenize=False)
        self.llm.reset_prefix_cache()
        outputs = self.llm.generate([{"prompt_token_ids": p} for p in PROMPTS], sampling, use_tqdm=False)
        return [list(o.outputs[0].token_ids) for o in outputs]

    def plain(self, folder: Path) -> torch.nn.Module:
        """What vLLM's own loaders put into a model of which nothing is post-processed."""
        config = EngineArgs(str(folder), **self._options).create_engine_config()
        with compat.config_scope(config), mock.patch.object(base_loader, "process_weights_after_loading", return_value=None):
            return get_model(vllm_config=config)


class Weights:
    """One version as a sink gets it: segments in buckets, and the bytes of a slot."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], regions: Callable[[str, torch.Tensor], Regions]) -> None:
        self.tensors = tensors
        self.specs = {n: TensorSpec(n, str(t.dtype).removeprefix("torch."), tuple(t.shape)) for n, t in tensors.items()}
        buckets: list[list[Segment]] = [[]]
        cursor = 0
        for name, tensor in tensors.items():
            for offset, shape, strides in regions(name, tensor):
                if cursor > BUCKET_BYTES:
                    buckets.append([])
                    cursor = 0
                segment = Segment(name, str(tensor.dtype).removeprefix("torch."), offset, shape, strides, cursor)
                buckets[-1].append(segment)
                cursor += -(-segment.size * DTYPE_BYTES[segment.dtype] // 64) * 64
        self.buckets = tuple(map(tuple, buckets))
        self.slot_bytes = max(s.slot_offset + s.size * DTYPE_BYTES[s.dtype] for bucket in buckets for s in bucket)

    def part(self, s: Segment) -> torch.Tensor:
        return self.tensors[s.buffer].detach().as_strided(s.shape, s.strides, s.buffer_offset)

    def fill(self, bucket: int, slot: torch.Tensor) -> None:
        for s in self.buckets[bucket]:
            source = self.part(s).contiguous().view(-1).view(torch.uint8)
            slot[s.slot_offset : s.slot_offset + source.numel()] = source

    def check(self, bucket: int, buffers: Mapping[str, torch.Tensor]) -> None:
        """What ``landed`` is promised: the buffers of the bucket, contiguous, with the bytes in place."""
        assert buffers.keys() == {s.buffer for s in self.buckets[bucket]}
        for s in self.buckets[bucket]:
            held = buffers[s.buffer]
            assert held.is_contiguous() and type(held) is torch.Tensor
            assert torch.equal(held.as_strided(s.shape, s.strides, held.storage_offset() + s.buffer_offset), self.part(s)), s


def in_parts(name: str, tensor: torch.Tensor) -> Regions:
    """Rows above, and below two blocks of columns; rows of the padded vocabulary are left to padding."""
    if tensor.ndim == 1:
        return [(0, tuple(tensor.shape), (1,))]
    rows = VOCAB_SIZE if is_vocabulary(name) else tensor.shape[0]
    upper, left = rows // 2, tensor.shape[-1] // 3
    rest, strides = tensor.shape[1:-1], tensor.stride()
    return [
        (0, (upper, *tensor.shape[1:]), strides),
        (upper * strides[0], (rows - upper, *rest, left), strides),
        (upper * strides[0] + left, (rows - upper, *rest, tensor.shape[-1] - left), strides),
    ]


def is_vocabulary(name: str) -> bool:
    return name.split(".")[-2] in ("embed_tokens", "lm_head")


def vocabulary_padding(tensors: Mapping[str, torch.Tensor]) -> tuple[Padding, ...]:
    return tuple(
        Padding(n, VOCAB_SIZE * t.shape[1], (t.shape[0] - VOCAB_SIZE, t.shape[1]), (t.shape[1], 1))
        for n, t in tensors.items()
        if is_vocabulary(n)
    )


def sync(engine: Started, sink: Any, weights: Weights, *, last: int | None = None, fault: bool = False) -> None:
    """A sync with a ring of one slot, overwritten as soon as a bucket is taken; with ``last``, abandoned at or in that bucket."""
    slot = torch.empty(weights.slot_bytes, dtype=torch.uint8)

    def landed(buffers: Mapping[str, torch.Tensor]) -> None:
        weights.check(number, buffers)
        if number == last and fault:
            raise ZeroDivisionError

    with compat.config_scope(engine.vllm_config):
        standing = {number: sink.standing(number) for number in range(len(weights.buckets))}
        sink.open({number: buffers for number, buffers in standing.items() if buffers is not None})
        for number in range(len(weights.buckets)):
            weights.fill(number, slot.fill_(0xAB))
            try:
                sink.write(number, PackedArrival(slot, weights.buckets[number]), landed)
            except ZeroDivisionError:
                assert fault
            slot.fill_(0xCD)
            if number == last:
                sink.abandon()
                return
        sink.close()


def addresses(model: torch.nn.Module) -> dict[str, int]:
    return {n: t.data_ptr() for n, t in (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))}


def leftovers(model: torch.nn.Module, before: dict[str, int]) -> list[str]:
    """What no sync may leave: tensors elsewhere than before, on meta, or with a wrapped loader."""
    now = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}
    wrapped = [n for n, t in now.items() if getattr(getattr(t, "weight_loader", None), "__name__", "") == "online_process_loader"]
    return [n for n, t in now.items() if t.is_meta or before.get(n) != t.data_ptr()] + sorted(now.keys() ^ before.keys()) + wrapped


def poisoned(tensor: torch.Tensor, original: Any = meta.materialize_meta_tensor) -> torch.Tensor:
    """Memory that vLLM takes for a layer holds no zeros by chance."""
    made = original(tensor)
    with torch.no_grad():
        made.view(torch.uint8).fill_(0xFF) if made.ndim else made.fill_(float("nan"))
    return made


def materialized(layer: Any, keep: Any, memory: Any = None, original: Any = compat_layers.materialize) -> None:
    """Nor does memory that a sink takes for it."""
    memory = torch.empty(compat_layers.room(layer, keep), dtype=torch.uint8) if memory is None else memory
    original(layer, keep, memory.fill_(0xFF))


def run(cases: list[str], root: str, patched: bool) -> None:
    """Everything that is claimed of each case, as JSON in ``root/report.json``."""
    reports = {}
    for case in cases:
        dtype = case.rpartition("-")[2]
        folders = [save_case(Path(root, f"{case}-{version}"), case, version) for version in "ab"]
        with mock.patch.object(meta, "materialize_meta_tensor", poisoned), mock.patch.object(compat_layers, "materialize", materialized):
            reports[case] = compare(*folders, dtype, patched)
    Path(root, "report.json").write_text(json.dumps(reports))


def compare(a: Path, b: Path, dtype: str, patched: bool) -> dict[str, Any]:
    fresh = Started(b, dtype)
    hash_b, answers_b = state_hashes(fresh.model), fresh.answers()
    del fresh
    engine = Started(a, dtype)
    hash_a, whole_a, whole_b = state_hashes(engine.model), whole(a, dtype), whole(b, dtype)
    report: dict[str, Any] = {
        "parted": state_difference(hash_a, hash_b), "hashed": sorted(hash_a), "again": state_difference(hash_a, state_hashes(engine.model)),
        "answers_part": engine.answers() != answers_b,
    }  # fmt: skip
    with compat.config_scope(engine.vllm_config):
        recording = record(engine.model, [TensorSpec(n, dtype, tuple(t.shape)) for n, t in whole_a.tensors.items()])
    names = [buffer.name for buffer in recording.buffers]
    placed_a, placed_b = placed(engine.plain(a), names), placed(engine.plain(b), names)
    padding, layerwise = vocabulary_padding(placed_a.tensors), dict.fromkeys(names, "layerwise")
    if not patched:
        report["unpatched"] = unpatched(
            engine, PlacedSink(engine.model, engine.model_config, placed_a.buckets, padding, layerwise), placed_a, hash_a
        )
    patches.apply()
    patches.apply()
    report["choice"] = choices(engine, names, recording.aliases)
    report["bytes"] = {n: t.nbytes for n, t in placed_a.tensors.items()}
    report["placed_direct"] = direct(engine, a, b, names)
    report["loaded_in_place"] = loaded_in_place(engine, a, b, names, recording.aliases)
    report["after_another_reload"] = after_another_reload(engine, a, b, names, recording.aliases)
    for name, sinks in (("placed", report["choice"]["auto"]), ("layerwise", layerwise), ("loaders", None)):
        versions = (whole_a, whole_b) if sinks is None else (placed_a, placed_b)

        def make(sinks: Any = sinks, like: Weights = versions[0]) -> Any:
            if sinks is None:
                layers = not_in_place(engine.model, names, (), recording.aliases)
                return LoadersSink(engine.model, engine.model_config, like.buckets, like.specs, layers, CPU)
            return PlacedSink(engine.model, engine.model_config, like.buckets, padding, sinks)

        report[name] = claims(engine, make(), versions, hash_a, hash_b) | {"num_buckets": len(versions[0].buckets)}
        sync(engine, make(), versions[1])
        report[name]["answers"] = engine.answers() == answers_b
        report[name]["unfilled"] = unfilled(engine, make, versions[0])
    return report


def whole(folder: Path, dtype: str) -> Weights:
    tensors = {n: t.to(getattr(torch, dtype)) for n, t in read_folder(folder).items()}
    return Weights(tensors, lambda name, tensor: [(0, tuple(tensor.shape), tuple(tensor.stride()))])


def placed(plain: torch.nn.Module, names: list[str]) -> Weights:
    live = {**dict(plain.named_parameters(remove_duplicate=False)), **dict(plain.named_buffers(remove_duplicate=False))}
    return Weights({name: live[name] for name in names}, in_parts)


def choices(engine: Started, names: list[str], aliases: Mapping[str, tuple[str, ...]]) -> dict[str, Any]:
    found: dict[str, Any] = {"aliases": {n: m for n, m in aliases.items() if m}}
    for requested in ("auto", "direct", "layerwise", "loaders", "nonsense"):
        try:
            choice = choose(engine.model, names, aliases, requested)
            found[requested], found[f"{requested}_reasons"] = dict(choice.sinks), choice.reasons
        except ConfigError as error:
            found[requested] = str(error)
    impl = next(layer.impl for _, layer in compat_layers.attention_layers(engine.model))
    kept, impl.sinks = getattr(impl, "sinks", None), torch.zeros(4)
    found["stale"] = patches.reload_findings(engine.model)
    impl.sinks = kept
    return found


def claims(engine: Started, sink: Any, versions: tuple[Weights, Weights], hash_a: dict[str, str], hash_b: dict[str, str]) -> dict[str, Any]:
    """The engine holds A; what syncs of A and B, complete and abandoned, leave."""
    before, got = addresses(engine.model), {}
    sync(engine, sink, versions[0])
    got["identity"] = state_difference(hash_a, state_hashes(engine.model))
    sync(engine, sink, versions[1])
    got["fresh"] = state_difference(hash_b, state_hashes(engine.model))
    got["left"] = leftovers(engine.model, before)
    count = len(versions[0].buckets)
    for last, fault in ((0, False), (count // 2, True), (count // 2, False), (count - 1, False)):
        sync(engine, sink, versions[0], last=last, fault=fault)
        got["left"] += leftovers(engine.model, before)
        sync(engine, sink, versions[1])
        got[f"fresh_after_{last}_{fault}"] = state_difference(hash_b, state_hashes(engine.model))
    sync(engine, sink, versions[0])
    got["back"] = state_difference(hash_a, state_hashes(engine.model))
    attention = getattr(sink, "_attention", None)
    got["resting"] = attention and [attention.num_skipped, len(list(compat_layers.attention_layers(engine.model)))]
    return got | {"peak_extra_bytes": sink.peak_extra_bytes}


def direct(engine: Started, a: Path, b: Path, names: list[str]) -> list[str]:
    """Buffers of a model held in plain layout that direct writes leave unlike vLLM's own loaders."""
    model, wanted = engine.plain(a), placed(engine.plain(b), names)
    with torch.no_grad():
        for tensor in placed(model, names).tensors.values():
            tensor.view(torch.uint8).fill_(0xFF)
    sync(
        engine,
        PlacedSink(model, engine.model_config, wanted.buckets, vocabulary_padding(wanted.tensors), dict.fromkeys(names, "direct")),
        wanted,
    )
    held = placed(model, names).tensors
    return [n for n, t in wanted.tensors.items() if not torch.equal(t.view(torch.uint8), held[n].view(torch.uint8))]


def loaded_in_place(engine: Started, a: Path, b: Path, names: list[str], aliases: Mapping[str, tuple[str, ...]]) -> dict[str, Any]:
    """The same for loaders that write a plain model where it lives; and which modules of such a model are rebuilt nevertheless."""
    model, wanted, given = engine.plain(a), placed(engine.plain(b), names), whole(b, str(engine.model_config.dtype).removeprefix("torch."))
    paths = {id(module): path for path, module in model.named_modules()}

    def rebuilt(computed: list[str]) -> list[str]:
        return [paths[id(layer)] for layer in not_in_place(model, names, computed, aliases)]

    layers = not_in_place(model, names, (), aliases)
    sink = LoadersSink(model, engine.model_config, given.buckets, given.specs, layers, CPU)
    with torch.no_grad():
        for tensor in placed(model, names).tensors.values():
            tensor.view(torch.uint8).fill_(0xFF)
    before = addresses(model)
    sync(engine, sink, given)
    found: dict[str, Any] = {"left": leftovers(model, before), "kept": sorted(sink._kept), "rebuilt": rebuilt([])}
    held = placed(model, names).tensors
    found["differ"] = [n for n, t in wanted.tensors.items() if not torch.equal(t.view(torch.uint8), held[n].view(torch.uint8))]
    found["computed"] = rebuilt(["model.norm.weight"])
    layer = model.get_submodule("model.layers.0.self_attn.o_proj")
    layer.register_parameter("weight", torch.nn.Parameter(layer.get_parameter("weight").data, requires_grad=False))
    return found | {"forgotten": rebuilt([])}


def after_another_reload(engine: Started, a: Path, b: Path, names: list[str], aliases: Mapping[str, tuple[str, ...]]) -> dict[str, Any]:
    """Of a plain model in which a reload by somebody else has ended, to which no tensor came: what is rebuilt, and what its loaders
    no longer write where it lives."""
    model, wanted, dtype = engine.plain(a), placed(engine.plain(b), names), str(engine.model_config.dtype).removeprefix("torch.")
    compat_reload.begin_whole_reload(model)
    compat_reload.finish_whole_reload(model, engine.model_config)
    layers = {id(layer) for layer in not_in_place(model, names, (), aliases)}
    compat_reload.load_weights(model, iter(whole(b, dtype).tensors.items()))
    held = placed(model, names).tensors
    return {
        "rebuilt": [path for path, module in model.named_modules() if id(module) in layers],
        "lost": [n for n, t in wanted.tensors.items() if not torch.equal(t.view(torch.uint8), held[n].view(torch.uint8))],
    }


def unfilled(engine: Started, make: Callable[[], Any], weights: Weights) -> list[str]:
    """Which buffers that no checkpoint fills a sync changes, in a module that is rebuilt."""
    name, layer = next((n, m) for n, m in engine.model.named_modules() if n.endswith(("routed_experts", "0.self_attn.o_proj")))
    for attribute, persistent in (("calibration", True), ("scratch", False)):
        layer.register_buffer(attribute, torch.full((3,), 7.0), persistent=persistent)
        get_layerwise_info(layer).restore_metadata[1][attribute] = torch.empty(3, device="meta")
    sync(engine, make(), weights)
    changed = [n for n in ("calibration", "scratch") if not torch.equal(layer._buffers[n], torch.full((3,), 7.0))]
    for attribute in ("calibration", "scratch"):
        delattr(layer, attribute)
        del get_layerwise_info(layer).restore_metadata[1][attribute]
    return [f"{name}.{n}" for n in changed]


def unpatched(engine: Started, sink: PlacedSink, weights: Weights, hash_a: dict[str, str]) -> dict[str, Any]:
    """What is seen without the healing: by the engine's own check, by the choice, by the hashes after a sync of what it has."""
    found: dict[str, Any] = {"findings": patches.reload_findings(engine.model)}
    try:
        choose(engine.model, [], {}, "auto")
    except ConfigError as error:
        found["refused"] = str(error)
    sync(engine, sink, weights)
    return found | {"identity": state_difference(hash_a, state_hashes(engine.model))}
