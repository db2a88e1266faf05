"""What the ranks of ``test_oracle`` do: train, sync, export, and ask a synced and a fresh engine the same questions."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from rlsync import AutoBridge, SyncConfig, WeightSyncer
from rlsync.bridge.source import MegatronSource
from rlsync.engine.handles.local import Completion, Engine
from rlsync.engine.state import state_difference
from rlsync.errors import WeightSyncError
from rlsync.layout.topology import Topology
from rlsync.megatron.model import DdpOptions, unwrap
from rlsync.megatron.optimizer import OptimizerOptions, build_optimizer
from rlsync.megatron.parallel import compute_device, destroy_parallel, initialize_parallel
from rlsync.megatron.train import token_scores, train_step
from rlsync.transport.collectives import gather_bytes
from tests.forking import forked_engines
from tests.gpu.engines import KV_CACHE_BYTES, only_gpus
from tests.inspection import inspect_engines
from tests.models import VOCAB_SIZE

PROMPTS = [[5, 17, 99, 3], [130, 2, 64], [7] * 12, [50]]
GREEDY = {"temperature": 0.0, "max_tokens": 16, "ignore_eos": True, "logprobs": 0}


def engine(name: str, folder: str, dtype: str, gpus: str | None = None, **options: Any) -> Engine:
    """On ``gpus``, as ``"0,1"``, with a worker on each; by default on the first that this rank sees."""
    if torch.cuda.is_available():
        options = {"gpu_memory_utilization": 0.2, "kv_cache_memory_bytes": KV_CACHE_BYTES, **options}
    if gpus is not None:
        options["tensor_parallel_size"] = len(gpus.split(","))
    made = Engine(
        name,
        {
            "model": folder, "dtype": dtype, "max_model_len": 64, "max_num_seqs": 8, "skip_tokenizer_init": True,
            "disable_log_stats": True, **options,
        },
    )  # fmt: skip
    with forked_engines() if gpus is None else only_gpus(gpus):
        made.start()
    return made


def sync_and_compare(**case: Any) -> None:
    """One case; its arguments are those of ``compare``."""
    compare_each([case])


def compare_each(cases: list[dict[str, Any]]) -> None:
    """One case after the other, on ranks that start once for all."""
    for number, case in enumerate(cases):
        if number:
            destroy_parallel(keep_distributed=True)
        compare(**case)
    wait_for_all()
    destroy_parallel()


def wait_for_all() -> None:
    """On the host, because a rank that waits in NCCL keeps its GPU busy, on which rank 0 may have an engine start or compute."""
    dist.barrier(dist.new_group(backend="gloo"))


def ask(each: Engine) -> list[Completion]:
    """Prompt by prompt, so that every batch is the same each time."""
    return [each.generate([prompt], GREEDY, timeout_s=60)[0][0] for prompt in PROMPTS]


def compare(
    folder: str,
    topology: dict[str, int],
    out_dir: str,
    dtype: str = "float32",
    enforce_eager: bool = True,
    ddp: dict[str, Any] | None = None,
    gpus: list[str] | None = None,
    spec: str = "auto",
    **config: Any,
) -> None:
    """Several syncs of a changing actor; then the synced engines against one started from the exported ``hf_model``.

    ``gpus``: of each engine, as ``["0,1", "2,3"]``; by default there is one engine, on the GPU of rank 0.
    ``spec``: of the actor's layers, as ``rlsync.megatron.specs.block_spec`` knows them.
    """
    made = Topology(**topology)
    initialize_parallel(made, seed=1, timeout_s=300)
    places = [None] if gpus is None else gpus
    synced = [
        engine(f"synced {number}", folder, dtype, place, load_format="dummy", enforce_eager=enforce_eager)
        for number, place in enumerate(places if dist.get_rank() == 0 else ())
    ]
    say("engines started")
    wait_for_all()
    bridge = AutoBridge.from_pretrained(folder)
    models = bridge.get_model(folder, topology=made, bf16=dtype == "bfloat16", ddp=DdpOptions(**(ddp or {})), spec=spec)
    optimizer = build_optimizer(models, OptimizerOptions(lr=0.02))
    syncer = WeightSyncer(
        MegatronSource(bridge, models),
        synced,
        SyncConfig(bucket_bytes=60_000, timeout_s=60, **config),
        rank=dist.get_rank(),
        world_size=made.world_size,
        broadcast=lambda payload: gather_bytes(payload, device=compute_device())[0],
    )
    syncer.connect()
    say("connected")
    check_replaced_parameters_are_refused(models, syncer)
    tokens = torch.randint(0, VOCAB_SIZE, (4, 20), generator=torch.Generator().manual_seed(0))
    before: list[list[Completion]] = [[] for _ in synced]
    for version in range(3):
        if version:
            train_step(models, optimizer, [{"tokens": tokens}], lambda s, _: (-s.log_probs.mean() / made.dp_size, {}))
        report = syncer.sync(version)
        say(f"synced to version {version}")
        assert (report.num_buckets > 3 or report.transport == "ipc") and report.bytes > 0
        answers = [ask(each) for each in synced]
        for mine, last in zip(answers, before, strict=True):
            assert [a.token_ids for a in mine] != [b.token_ids for b in last], "the weights changed, the answers did not"
            assert all(a.version == version for a in mine)
        before = answers
        wait_for_all()
    bridge.save_weights(models, Path(out_dir, "hf_model"))
    if dtype == "float32":
        check_against_actor(models, before[0] if before else [])
    syncer.close()
    if synced:
        held = inspect_engines(synced)
        for each in synced:
            each.close()
        fresh = engine("fresh", str(Path(out_dir, "hf_model")), dtype, places[0], enforce_eager=enforce_eager)
        worst = apart(fresh, held, before)
        fresh.close()
        # What the order of a sum over GPUs makes of half precision.
        assert worst <= (1e-4 if dtype == "float32" else 2e-2), worst
        print(f"ORACLE {worst:.1e} {spec} {report.transport} {report.sinks} {report.bytes_by_link} {report.seconds:.3f} s", flush=True)


def apart(fresh: Engine, held: dict[tuple[str, int], dict[str, str]], answers: list[list[Completion]]) -> float:
    """How far answers of synced engines are from a fresh one's. What they hold, by engine and worker, is the same."""
    expected = ask(fresh)
    for (_, worker), state in inspect_engines([fresh]).items():
        assert len(state) > 20
        for engine_id in {engine_id for engine_id, _ in held}:
            assert state_difference(held[engine_id, worker], state) == (), engine_id
    return max(difference(one, expected) for one in answers)


def say(text: str) -> None:
    """For whoever reads the output of a rank that did not end in time."""
    print(f"{time.strftime('%H:%M:%S')} rank {dist.get_rank()}: {text}", flush=True)


def check_replaced_parameters_are_refused(models, syncer: WeightSyncer) -> None:
    """What the source was made of is no longer the model's: both sides would agree about values that nobody trains."""
    layer = unwrap(models[0]).decoder.layers[0].self_attention.linear_proj
    kept = layer.weight
    layer.weight = torch.nn.Parameter(kept.detach().clone())
    with pytest.raises(WeightSyncError, match="other objects than at connect"):
        syncer.sync(0)
    layer.weight = kept
    # A rank that is late for this sync must not meet the next one.
    wait_for_all()


def difference(answers: list[Completion], expected: list[Completion]) -> float:
    """Largest of the log-probabilities; the tokens are the same."""
    assert [a.token_ids for a in answers] == [b.token_ids for b in expected]
    return max(abs(x - y) for a, b in zip(answers, expected, strict=True) for x, y in zip(a.logprobs, b.logprobs, strict=True))


def check_against_actor(models, answers: list[Completion]) -> None:
    """The engine's log-probabilities of its own answers equal those that the actor gives the same tokens."""
    payload = json.dumps([list(a.token_ids) for a in answers]).encode()
    rows = json.loads(gather_bytes(payload, device=compute_device())[0])
    for i, (prompt, response) in enumerate(zip(PROMPTS, rows, strict=True)):
        scores = token_scores(models, [{"tokens": torch.tensor([prompt + response])}])[0]
        if answers:
            mine = scores.log_probs[0, len(prompt) :].cpu()
            assert (mine - torch.tensor(answers[i].logprobs)).abs().max() <= 1e-4
