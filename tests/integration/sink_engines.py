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

from rlsync.engine import compat, compat_layers
from rlsync.engine.sinks.choice import choose
from rlsync.engine.sinks.loaders import LoadersSink
from rlsync.engine.sinks.placed import PlacedSink
from rlsync.engine.state import state_difference, state_hashes
from rlsync.errors import ConfigError
from rlsync.geometry import DTYPE_BYTES, Fill
from rlsync.staging import Segment
from tests.integration.engine_source import read_folder
from tests.models import VOCAB_SIZE

BUCKET_BYTES = 30_000
PROMPTS = [[5, 17, 99, 3], [130, 2, 64], [7] * 12]


class Started:
    """An engine in this process."""

    def __init__(self, folder: str, dtype: str) -> None:
        self.options = {
            "model": folder,
            "dtype": dtype,
            "max_model_len": 64,
            "max_num_seqs": 8,
            "skip_tokenizer_init": True,
            "enforce_eager": True,
        }
        self.llm = LLM(**self.options, disable_log_stats=True)
        runner = self.llm.llm_engine.model_executor.driver_worker.worker.model_runner
        self.model, self.model_config, self.vllm_config = runner.model, runner.model_config, runner.vllm_config

    def answers(self) -> list[list[int]]:
        sampling = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True, detokenize=False)
        self.llm.reset_prefix_cache()
        outputs = self.llm.generate([{"prompt_token_ids": p} for p in PROMPTS], sampling, use_tqdm=False)
        return [list(o.outputs[0].token_ids) for o in outputs]

    def plain(self, folder: str) -> torch.nn.Module:
        """What vLLM's own loaders put into a model of which nothing is post-processed."""
        config = EngineArgs(**{**self.options, "model": folder}).create_engine_config()
        with compat.config_scope(config), mock.patch.object(base_loader, "process_weights_after_loading", return_value=None):
            return get_model(vllm_config=config)


class Weights:
    """One version as a sink gets it: segments in buckets, and the bytes of a slot."""

    def __init__(
        self, tensors: Mapping[str, torch.Tensor], parts: Callable[[str, torch.Tensor], list[tuple[int, tuple[int, ...], tuple[int, ...]]]]
    ) -> None:
        self.tensors = tensors
        buckets: list[list[Segment]] = [[]]
        cursor = 0
        for name, tensor in tensors.items():
            for offset, shape, strides in parts(name, tensor):
                if cursor > BUCKET_BYTES:
                    buckets.append([])
                    cursor = 0
                segment = Segment(name, str(tensor.dtype).removeprefix("torch."), offset, shape, strides, cursor)
                buckets[-1].append(segment)
                cursor += -(-segment.size * DTYPE_BYTES[segment.dtype] // 64) * 64
        self.buckets = tuple(map(tuple, buckets))

    def fill(self, bucket: int, slot: torch.Tensor) -> None:
        slot.fill_(0xAB)
        for s in self.buckets[bucket]:
            source = self.tensors[s.buffer].detach().as_strided(s.shape, s.strides, s.buffer_offset).contiguous().view(-1).view(torch.uint8)
            slot[s.slot_offset : s.slot_offset + source.numel()] = source


def in_parts(name: str, tensor: torch.Tensor) -> list[tuple[int, tuple[int, ...], tuple[int, ...]]]:
    """Rows above, and below two blocks of columns; rows of the padded vocabulary are left to fills."""
    if tensor.ndim == 1:
        return [(0, tuple(tensor.shape), (1,))]
    rows = VOCAB_SIZE if tensor.shape[0] > VOCAB_SIZE and tensor.ndim == 2 and is_vocabulary(name) else tensor.shape[0]
    upper, left = rows // 2, tensor.shape[-1] // 3
    rest, strides = tensor.shape[1:-1], tensor.stride()
    return [
        (0, (upper, *tensor.shape[1:]), strides),
        (upper * strides[0], (rows - upper, *rest, left), strides),
        (upper * strides[0] + left, (rows - upper, *rest, tensor.shape[-1] - left), strides),
    ]


def is_vocabulary(name: str) -> bool:
    return name.split(".")[-2] in ("embed_tokens", "lm_head")


def placed_weights(plain: torch.nn.Module) -> tuple[Weights, tuple[Fill, ...]]:
    tensors = dict(plain.named_parameters())
    fills = tuple(
        Fill(n, VOCAB_SIZE * t.shape[1], (t.shape[0] - VOCAB_SIZE, t.shape[1]), (t.shape[1], 1))
        for n, t in tensors.items()
        if is_vocabulary(n)
    )
    return Weights(tensors, in_parts), fills


def whole_weights(folder: str, dtype: torch.dtype) -> Weights:
    tensors = {n: t.to(dtype) for n, t in read_folder(folder).items()}
    return Weights(tensors, lambda name, tensor: [(0, tuple(tensor.shape), tuple(tensor.stride()))])


def sync(engine: Started, sink: Any, weights: Weights, *, last: int | None = None) -> None:
    """A sync with a ring of one slot, which is overwritten as soon as a bucket is taken; with ``last``, abandoned after that bucket."""
    slot = torch.empty(4 * BUCKET_BYTES, dtype=torch.uint8)
    with compat.config_scope(engine.vllm_config):
        sink.open()
        for number in range(len(weights.buckets)):
            weights.fill(number, slot)
            names = {s.buffer for s in weights.buckets[number]}

            def landed(buffers: Mapping[str, torch.Tensor], number: int = number, names: set[str] = names) -> None:
                assert buffers.keys() == names
                for s in weights.buckets[number]:
                    held = buffers[s.buffer]
                    assert held.is_contiguous() and type(held) is torch.Tensor
                    expected = weights.tensors[s.buffer].detach().as_strided(s.shape, s.strides, s.buffer_offset)
                    assert torch.equal(held.as_strided(s.shape, s.strides, held.storage_offset() + s.buffer_offset), expected), s

            sink.write(number, slot, landed)
            slot.fill_(0xCD)
            if number == last:
                sink.abandon()
                return
        sink.close()


def leftovers(model: torch.nn.Module, before: dict[str, int]) -> list[str]:
    """What an abandoned sync must not leave: parameters elsewhere than before, on meta, or with a wrapped loader."""
    now = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}
    wrapped = [n for n, t in now.items() if getattr(getattr(t, "weight_loader", None), "__name__", "") == "online_process_loader"]
    return [n for n, t in now.items() if t.is_meta or before.get(n) != t.data_ptr()] + sorted(now.keys() ^ before.keys()) + wrapped


def addresses(model: torch.nn.Module) -> dict[str, int]:
    return {n: t.data_ptr() for n, t in (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))}


def compare(folders: list[str], dtype: str, out: str, heal: bool = True) -> None:
    """Everything that is claimed of one model; writes a JSON object to ``out``."""
    a, b = folders
    report: dict[str, Any] = {}
    fresh = Started(b, dtype)
    hash_b, answers_b = state_hashes(fresh.model), fresh.answers()
    del fresh
    engine = Started(a, dtype)
    hash_a = state_hashes(engine.model)
    report["hash_again"] = state_difference(hash_a, state_hashes(engine.model))
    report["a_and_b_part"] = state_difference(hash_a, hash_b)
    report["answers_part"] = engine.answers() != answers_b
    (weights_a, fills), (weights_b, _) = placed_weights(engine.plain(a)), placed_weights(engine.plain(b))
    names = list(weights_a.tensors)
    aliases = {
        n: tuple(m for m, q in engine.model.named_parameters(remove_duplicate=False) if q is p and m != n)
        for n, p in engine.model.named_parameters()
    }
    report["aliases"] = {n: m for n, m in aliases.items() if m}
    if not heal:
        report["unhealed"] = unhealed(engine, weights_a, fills, hash_a, (names, aliases))
    compat_layers.heal()
    compat_layers.heal()
    choice = choose(engine.model, names, aliases, "auto")
    report["choice"] = {"sinks": dict(choice.sinks), "reasons": choice.reasons}
    for requested in ("direct", "layerwise", "loaders", "nonsense"):
        try:
            report[requested] = sorted(set(choose(engine.model, names, aliases, requested).sinks.values()))
        except ConfigError as error:
            report[requested] = str(error)
    whole_a, whole_b = (whole_weights(f, getattr(torch, dtype)) for f in (a, b))
    sinks = {
        "placed": (PlacedSink(engine.model, engine.model_config, weights_a.buckets, fills, choice.sinks), weights_a, weights_b),
        "layerwise": (
            PlacedSink(engine.model, engine.model_config, weights_a.buckets, fills, dict.fromkeys(names, "layerwise")),
            weights_a,
            weights_b,
        ),
        "loaders": (LoadersSink(engine.model, engine.model_config, whole_a.buckets), whole_a, whole_b),
    }
    before = addresses(engine.model)
    for name, (sink, version_a, version_b) in sinks.items():
        got = report[f"{name}_sink"] = {"num_buckets": len(version_a.buckets)}
        sync(engine, sink, version_a)
        got["identity"] = state_difference(hash_a, state_hashes(engine.model))
        sync(engine, sink, version_b)
        got["fresh"] = state_difference(hash_b, state_hashes(engine.model))
        got["answers"] = engine.answers() == answers_b
        got["moved"] = leftovers(engine.model, before)
        for last in (0, len(version_a.buckets) // 2, len(version_a.buckets) - 1):
            sync(engine, sink, version_a, last=last)
            got[f"left_after_{last}"] = leftovers(engine.model, before)
            sync(engine, sink, version_a)
            got[f"fresh_after_{last}"] = state_difference(hash_a, state_hashes(engine.model))
            sync(engine, sink, version_b, last=last)
        sync(engine, sink, version_a)
        got["peak_extra_bytes"] = sink.peak_extra_bytes
    report["module_bytes"] = sorted(sum(p.nbytes for p in m.parameters(recurse=False)) for m in engine.plain(a).modules())
    Path(out).write_text(json.dumps(report))


def unhealed(
    engine: Started, weights: Weights, fills: tuple[Fill, ...], hash_a: dict[str, str], buffers: tuple[Any, Any]
) -> dict[str, Any]:
    """The same without healing: what the hashes and the choice say."""
    sink = PlacedSink(engine.model, engine.model_config, weights.buckets, fills, dict.fromkeys(weights.tensors, "layerwise"))
    found: dict[str, Any] = {"findings": compat_layers.reload_findings(engine.model)}
    try:
        choose(engine.model, *buffers, "auto")
    except ConfigError as error:
        found["refused"] = str(error)
    sync(engine, sink, weights)
    found["identity"] = state_difference(hash_a, state_hashes(engine.model))
    return found
