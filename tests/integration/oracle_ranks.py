"""What the ranks of ``test_oracle`` do: train, sync, export, and ask a synced and a fresh engine the same questions."""

from __future__ import annotations

import contextlib
import gc
import json
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from rlsync import AutoBridge, SyncConfig, WeightSyncer
from rlsync.bridge.source import MegatronSource
from rlsync.engine.handles import PicturePrompt, Prompt
from rlsync.engine.handles.adapters import lora_arguments
from rlsync.engine.handles.local import Completion, Engine
from rlsync.engine.state import state_difference
from rlsync.errors import EngineDirtyError, WeightSyncError
from rlsync.layout.topology import Topology
from rlsync.megatron.model import DdpOptions, adapters_in, unwrap
from rlsync.megatron.optimizer import OptimizerOptions, build_optimizer
from rlsync.megatron.parallel import compute_device, destroy_parallel, initialize_parallel
from rlsync.megatron.train import token_scores, train_step
from rlsync.models import Part
from rlsync.models.lora import LoraSpec
from rlsync.sync import SyncReport
from rlsync.sync.config import LoraSync
from rlsync.transport.collectives import gather_bytes
from tests.gpu.engines import KV_CACHE_BYTES, Asked, only_gpus
from tests.inspection import inspect_engines
from tests.integration.engine_source import NUM_BLOCKS, call_on_fill
from tests.integration.tiny_engines import await_tokens
from tests.models import VOCAB_SIZE
from tests.vision_models import IMAGE, VIDEO

# Syncs of a case.
VERSIONS = 3
PROMPTS = [[5, 17, 99, 3], [130, 2, 64], [7] * 12, [50]]
# An engine that takes pictures reads them with its tokenizer.
SEEING = {"skip_tokenizer_init": False, "max_model_len": 256}
# More than one block of the prefix cache.
LONG_PROMPT = [(7 * i) % 131 for i in range(150)]
GREEDY = {"temperature": 0.0, "max_tokens": 16, "ignore_eos": True, "logprobs": 0}
# A placeholder that is drawn has no picture, and an actor refuses it.
SEEING_GREEDY = {**GREEDY, "logit_bias": {IMAGE: -100.0, VIDEO: -100.0}}


def engine(name: str, folder: str, dtype: str, gpus: str | None = None, **options: Any) -> Engine:
    """On ``gpus``, as ``"0,1"``, with a worker on each, all of one replica unless ``options`` say; by default on this rank's first."""
    if torch.cuda.is_available():
        options = {"gpu_memory_utilization": 0.2, "kv_cache_memory_bytes": KV_CACHE_BYTES, **options}
    else:
        options = {"num_gpu_blocks_override": NUM_BLOCKS, **options}
    if gpus is not None:
        options = {"tensor_parallel_size": len(gpus.split(",")), **options}
    made = Engine(
        name,
        {
            "model": folder, "dtype": dtype, "max_model_len": 64, "max_num_seqs": 8, "skip_tokenizer_init": True,
            "disable_log_stats": True, **options,
        },
    )  # fmt: skip
    with contextlib.nullcontext() if gpus is None else only_gpus(gpus):
        made.start()
    return made


def sync_and_compare(**case: Any) -> None:
    """One case; its arguments are those of ``compare``."""
    compare_each([case])


def compare_each(cases: list[dict[str, Any]]) -> None:
    """One case after the other, on ranks that start once for all."""
    for number, case in enumerate(cases):
        if number:
            # Groups of models that are still referred to keep their threads, which wake up a hundred times a second.
            gc.collect()
            destroy_parallel(keep_distributed=True)
        compare(**case)
    wait_for_all()
    destroy_parallel()


def wait_for_all() -> None:
    """On the host, because a rank that waits in NCCL keeps its GPU busy, on which rank 0 may have an engine start or compute."""
    dist.barrier(dist.new_group(backend="gloo"))


def ask(each: Engine, prompts: Sequence[Prompt] = PROMPTS) -> list[Completion]:
    """Prompt by prompt, so that every batch is the same each time."""
    return [each.generate([p], SEEING_GREEDY if isinstance(p, PicturePrompt) else GREEDY, timeout_s=60)[0][0] for p in prompts]


def compare(
    folder: str,
    topology: dict[str, int],
    out_dir: str,
    dtype: str = "float32",
    enforce_eager: bool = True,
    ddp: dict[str, Any] | None = None,
    gpus: list[str] | None = None,
    spec: str = "auto",
    sees: bool = False,
    frozen: Sequence[Part] = (),
    actor_overrides: dict[str, Any] | None = None,
    lora: dict[str, Any] | None = None,
    serves_adapters: bool = False,
    lora_sync: LoraSync = "merged",
    options: dict[str, Any] | None = None,
    fresh: bool = True,
    asked: bool = True,
    **config: Any,
) -> None:
    """Several syncs of a changing actor; then the synced engines against one started from the exported ``hf_model``.

    ``gpus``: of each engine, as ``["0,1", "2,3"]``; by default there is one engine, on the GPU of rank 0.
    ``spec``: of the actor's layers, as ``rlsync.megatron.specs.block_spec`` knows them.
    ``sees``: whether the model takes pictures, with which it is then trained and asked. ``frozen``: its parts that are not trained.
    ``lora``: of adapters, fields of ``LoraSpec``. ``serves_adapters``: whether vLLM's own adapters are asked as well. ``lora_sync``: how
    engines get them. ``options``: of the engines.
    ``fresh``: False leaves out the one from the exported folder, so that the synced one is held to the actor, and to vLLM's adapters.
    ``asked``: False where engines cannot compute on this machine, so that they are held to what the fresh one holds alone.
    """
    made = Topology(**topology)
    initialize_parallel(made, seed=1, timeout_s=300)
    places = [None] if gpus is None else gpus
    options = {"enforce_eager": enforce_eager, **(SEEING if sees else {}), **(options or {})}
    synced = started(folder, dtype, places, options)
    bridge, models = built(folder, made, dtype, ddp, lora, spec=spec, frozen=frozen, overrides=actor_overrides)
    optimizer = build_optimizer(models, OptimizerOptions(lr=0.02))
    source = MegatronSource(bridge, models, lora=lora_sync)
    syncer = connected(source, synced, SyncConfig(bucket_bytes=60_000, timeout_s=60, lora=lora_sync, **config), made.world_size)
    check_replaced_parameters_are_refused(models, syncer)
    prompts, batch = questions(folder, sees=sees)
    prompts = prompts if asked else []
    beside = BesideTheBase(bridge, models, source, syncer, synced, options) if lora_sync == "adapter" else None
    report, before = synced_answers(
        lambda: train_step(models, optimizer, [batch], lambda s, _: (-s.log_probs.mean() / made.dp_size, {})),
        syncer.sync if beside is None else beside.sync,
        lambda: [ask(each, prompts) for each in synced if prompts],
        first_held=(1 if beside is None else 2) if frozen or lora else VERSIONS,
    )
    if beside is not None and options.get("enable_sleep_mode"):
        beside.sleep(VERSIONS - 1)
        assert all(difference(ask(each, prompts), last) <= 2e-2 for each, last in zip(synced, before, strict=True))
    assert not options.get("enable_expert_parallel") or set(report.redundancy.values()) == {1.0}, report.redundancy
    save(bridge, models, Path(out_dir))
    if dtype == "float32":
        check_against_actor(models, before[0] if before else [], prompts, folder if sees else None)
    syncer.close()
    if not synced:
        return
    held, worst = stopped(synced), 0.0
    if serves_adapters:
        slots = {**options, **lora_arguments(LoraSpec(**(lora or {})).r)}
        other = adapters_of_vllm(folder, Path(out_dir, "hf_adapter"), dtype, places[0], slots)
        worst = apart(other, held if beside is not None else {}, before, prompts)
    if fresh:
        other = engine("fresh", str(Path(out_dir, "hf_model")), dtype, places[0], **options)
        worst = max(worst, apart(other, held, before, prompts))
    # What the order of a sum over GPUs makes of half precision.
    assert worst <= (1e-4 if dtype == "float32" else 2e-2), worst
    of = "" if fresh or serves_adapters else "of the actor "
    print(f"ORACLE {of}{worst:.1e} {spec} {report.transport} {report.sinks} {report.bytes_by_link} {report.seconds:.3f} s", flush=True)


def started(folder: str, dtype: str, places: Sequence[str | None], options: dict[str, Any]) -> list[Engine]:
    """Engines of rank 0 without weights, one at each of the places; none on other ranks. Collective."""
    synced = [
        engine(f"synced {number}", folder, dtype, place, load_format="dummy", **options)
        for number, place in enumerate(places if dist.get_rank() == 0 else ())
    ]
    say("engines started")
    wait_for_all()
    return synced


def built(
    folder: str, topology: Topology, dtype: str, ddp: dict[str, Any] | None, lora: dict[str, Any] | None, **options: Any
) -> tuple[AutoBridge, Sequence[torch.nn.Module]]:
    """An actor with the weights of a folder; ``options`` are those of ``AutoBridge.get_model``. Collective."""
    bridge = AutoBridge.from_pretrained(folder)
    adapters, wrapped = None if lora is None else LoraSpec(**lora), DdpOptions(**(ddp or {}))
    return bridge, bridge.get_model(folder, topology=topology, bf16=dtype == "bfloat16", ddp=wrapped, lora=adapters, **options)


def connected(source: MegatronSource, engines: Sequence[Engine], config: SyncConfig, world_size: int) -> WeightSyncer:
    """Collective."""
    syncer = WeightSyncer(
        source,
        engines,
        config,
        rank=dist.get_rank(),
        world_size=world_size,
        broadcast=lambda payload: gather_bytes(payload, device=compute_device())[0],
    )
    syncer.connect()
    say("connected")
    return syncer


def questions(folder: str, *, sees: bool) -> tuple[Sequence[Prompt], dict[str, torch.Tensor]]:
    """What engines are asked, and what the actor is trained with; both with pictures where the model ``sees``."""
    if sees:
        pictures = pictured(folder)
        return pictures.PROMPTS, pictures.microbatch(folder, pictures.PROMPTS)
    return PROMPTS, {"tokens": torch.randint(0, VOCAB_SIZE, (4, 20), generator=torch.Generator().manual_seed(0))}


def save(bridge: AutoBridge, models: Sequence[torch.nn.Module], out_dir: Path) -> None:
    """The folders that other engines start from. Collective."""
    bridge.save_weights(models, out_dir / "hf_model")
    if adapters_in(models) is not None:
        bridge.save_adapter(models, out_dir / "hf_adapter")


def stopped(engines: Sequence[Engine]) -> dict[tuple[str, int], dict[str, str]]:
    """What engines held, by engine and worker, before they were closed."""
    held = inspect_engines(engines)
    for each in engines:
        each.close()
    return held


def synced_answers(
    train: Callable[[], object], sync: Callable[[int], SyncReport], answer: Callable[[], list[list[Completion]]], first_held: int
) -> tuple[SyncReport, list[list[Completion]]]:
    """Syncs of a changing actor: the last report, and the last answers of each engine. Engines hold a part of the weights that is not sent
    again from version ``first_held`` on. Collective."""
    before: list[list[Completion]] | None = None
    for version in range(VERSIONS):
        if version:
            train()
        report = sync(version)
        say(f"synced to version {version}")
        assert (report.num_buckets > 3 or report.transport == "ipc") and report.bytes > 0
        assert (report.held_bytes > 0) == (version >= first_held)
        answers = answer()
        for mine, last in zip(answers, answers if before is None else before, strict=True):
            assert before is None or [a.token_ids for a in mine] != [b.token_ids for b in last], "the weights changed, the answers did not"
            assert all(a.version == version for a in mine)
        before = answers
        wait_for_all()
    assert before is not None
    return report, before


def pictured(folder: str) -> Any:
    """The module that knows prompts with pictures. Needs torchvision, which other cases do without."""
    from tests import vision_folders

    return vision_folders


def apart(
    fresh: Engine, held: dict[tuple[str, int], dict[str, str]], answers: list[list[Completion]], prompts: Sequence[Prompt] = PROMPTS
) -> float:
    """How far answers of synced engines are from a fresh one's, which is closed. What they hold, by engine and worker, is the same."""
    expected = ask(fresh, prompts)
    for (_, worker), state in inspect_engines([fresh]).items():
        assert len(state) > 20
        for engine_id in {engine_id for engine_id, _ in held}:
            assert state_difference(held[engine_id, worker], state) == (), engine_id
    fresh.close()
    return max((difference(one, expected) for one in answers), default=0.0)


class BesideTheBase:
    """Syncs of adapters alone.

    The second sync fails once in the middle, and takes the base along when it is done again. A request goes through the third.
    """

    def __init__(
        self, bridge: AutoBridge, models, source: MegatronSource, syncer: WeightSyncer, engines: list[Engine], options: dict[str, Any]
    ) -> None:
        self._syncer, self._engines, self._pool = syncer, engines, ThreadPoolExecutor(1)
        # A continuation that takes longer than a sync.
        self._num_tokens = options["max_model_len"] - len(LONG_PROMPT) - 2
        factors = source.tensors[len(source.tensors) - len(bridge.adapter_shards(models).tensors) :]
        self._factor_bytes = sum(tensor.nbytes for tensor in factors)

    def sync(self, version: int) -> SyncReport:
        if version == 1:
            self._fail()
        wait_for_all()
        if version == 2 and self._engines:
            kept = self._begin_a_long_answer()
        report = self._syncer.sync(version)
        if version == 2 and self._engines:
            assert not kept.done(), "the request has ended before the sync"
            through = kept.result(120)[0][0]
            assert (through.version, through.last_version, len(through.token_ids)) == (1, 1, self._num_tokens)
        # Parts of A that no worker has to itself are sent to each.
        assert (self._factor_bytes <= report.bytes < 2 * self._factor_bytes) == (version == 2), report
        return report

    def sleep(self, version: int) -> None:
        """What sleep drops comes back: the base once, and adapters alone in the sync after it."""
        for each in self._engines:
            each.sleep(2, 60)
            each.wake(["weights"], 60)
        for times in (1, 2):
            wait_for_all()
            report = self._syncer.sync(version + times)
            assert (report.bytes < 2 * self._factor_bytes) == (times == 2), report
            for each in self._engines:
                each.wake(["kv_cache"], 60)

    def _begin_a_long_answer(self) -> Future[Any]:
        sampling = {"temperature": 0.0, "max_tokens": self._num_tokens, "ignore_eos": True}
        future = self._pool.submit(self._engines[0].generate, [LONG_PROMPT], sampling, timeout_s=120)
        await_tokens(self._engines[0], 1)
        return future

    def _fail(self) -> None:
        """In the middle of the last bucket; whoever runs on the version before is told."""
        if self._engines:
            lost = self._begin_a_long_answer()
            call_on_fill(self._syncer, self._raise_in_the_last)
        wait_for_all()
        with pytest.raises(WeightSyncError, match="no more"):
            self._syncer.sync(1)
        assert {each.state for each in self._engines} <= {"dirty"}
        if self._engines:
            with pytest.raises(EngineDirtyError, match="no more"):
                lost.result(60)
            call_on_fill(self._syncer, lambda bucket: None)
        wait_for_all()

    def _raise_in_the_last(self, bucket: int) -> None:
        connection = self._syncer._connection
        if connection is not None and bucket == connection.num_buckets - 1:
            raise RuntimeError("no more")


def adapters_of_vllm(base: str, adapter: Path, dtype: str, gpus: str | None, options: dict[str, Any]) -> Engine:
    """An engine started from the base, to which vLLM has loaded a PEFT folder, on which its requests run."""
    made = engine("of vLLM", base, dtype, gpus, worker_extension_cls=f"{Asked.__module__}.{Asked.__name__}", **options)
    without = ask(made)
    requests = made._adapters
    assert requests is not None, "it was started with slots"
    made.call_workers("load_adapter", (str(adapter), requests.next_id()), 60)
    requests.serve(0)
    assert [a.token_ids for a in ask(made)] != [b.token_ids for b in without], "the adapter changes answers"
    return made


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


def check_against_actor(models, answers: list[Completion], prompts: Sequence[Prompt] = PROMPTS, folder: str | None = None) -> None:
    """The engine's log-probabilities of its own answers equal those that the actor gives the same tokens.

    ``folder``: of a model that takes pictures.
    """
    payload = json.dumps([list(a.token_ids) for a in answers]).encode()
    rows = json.loads(gather_bytes(payload, device=compute_device())[0])
    for i, (prompt, response) in enumerate(zip(prompts, rows, strict=True)):
        batch = {"tokens": torch.tensor([prompt])} if folder is None else pictured(folder).microbatch(folder, [prompt])
        batch["tokens"] = torch.cat((batch["tokens"], torch.tensor([response])), 1)
        scores = token_scores(models, [batch])[0]
        if answers:
            mine = scores.log_probs[0, -len(response) :].cpu()
            worst = float((mine - torch.tensor(answers[i].logprobs)).abs().max())
            say(f"prompt {i}: the actor's log-probabilities are within {worst:.1e}")
            assert worst <= 1e-4
