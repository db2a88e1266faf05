"""Real vLLM engines on CPU with tiny models, shared by all tests of a session that sync two actor ranks with them.

Owns how they are started and asked, and the two ranks; the fixtures are in ``conftest``.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM

from rlsync.engine.handles.local import Completion, Engine
from rlsync.errors import EngineDirtyError, WeightSyncError
from rlsync.sync import SyncConfig, SyncReport, WeightSyncer
from tests.deadlines import ended_before
from tests.integration.engine_rank import serve
from tests.integration.engine_source import ENGINE_ENV, NUM_BLOCKS, FolderSource, read_folder
from tests.models import save_tiny_model
from tests.phases import passed_deadline
from tests.ranks import make_process

PROMPTS = ((3, 5, 7, 9), (11, 2, 100, 130, 4), (1,))
GREEDY = {"temperature": 0.0, "max_tokens": 12, "ignore_eos": True}
SETTINGS: dict[str, Any] = {"bucket_bytes": 100_000}
LOGPROB_TOLERANCE = 1e-4
# Of each phase of a sync, of which none takes a tenth, also on a busy machine.
TIMEOUT_S = 60.0

Answers = list[tuple[Completion, ...]]


def save_folders(root: Path) -> dict[str, Path]:
    """Checkpoints by name: two seeds of an untied qwen2, and two of a tied llama, whose vocabulary is padded for two workers."""
    made = {name: save_tiny_model(root / name, "qwen2", seed=seed) for name, seed in (("a", 1), ("b", 2))}
    return made | {name: save_tiny_model(root / name, "llama", tied=True, seed=seed) for name, seed in (("llama", 3), ("other llama", 4))}


def start(engine_id: str, folder: Path, **changes: Any) -> Engine:
    args: dict[str, Any] = {"model": str(folder), "skip_tokenizer_init": True, "dtype": "float32", "max_model_len": 128}
    args |= {"enforce_eager": True, "max_num_seqs": 8}
    if torch.cuda.is_available():
        args["gpu_memory_utilization"] = 0.1
    else:
        args["num_gpu_blocks_override"] = NUM_BLOCKS
    engine = Engine(engine_id, args | changes)
    engine.start()
    return engine


@contextlib.contextmanager
def started_engines(folders: dict[str, Path]) -> Iterator[dict[str, Engine]]:
    """Engines ``a`` and ``b`` started from those checkpoints; ``llama`` and, with two workers, ``tp2`` from no weights at all."""
    dummy = {"load_format": "dummy"}
    wanted: dict[str, tuple[str, dict[str, Any]]] = {
        "a": ("a", {"worker_extension_cls": "tests.integration.held_requests.StopsItself"}),
        "b": ("b", {}),
        "llama": ("llama", dummy),
    }
    if torch.cuda.device_count() != 1:
        wanted["tp2"] = ("llama", {**dummy, "tensor_parallel_size": 2})
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENGINE_ENV.items():
            patch.setenv(name, value)
        with ThreadPoolExecutor(2) as pool:
            starting = {name: pool.submit(start, name, folders[folder], **options) for name, (folder, options) in wanted.items()}
            made = {name: future.result() for name, future in starting.items()}
        yield made
        for engine in made.values():
            engine.close()


def same(found: Answers, wanted: Answers) -> bool:
    """Token for token, and within the tolerance log-probability for log-probability."""
    pairs = [(f, w) for fs, ws in zip(found, wanted, strict=True) for f, w in zip(fs, ws, strict=True)]
    return all(
        f.token_ids == w.token_ids and max(abs(x - y) for x, y in zip(f.logprobs, w.logprobs, strict=True)) <= LOGPROB_TOLERANCE
        for f, w in pairs
    )


def await_tokens(engine: Engine, num_requests: int) -> None:
    """Return when that many requests have a first token and not their last."""
    deadline_s = time.monotonic() + 120
    while True:
        states = list(engine._llm.output_processor.request_states.values())
        if sum(state.detokenizer.num_output_tokens() > 0 for state in states) >= num_requests:
            return
        assert time.monotonic() < deadline_s, "no tokens"
        time.sleep(0.002)


def transformers_answers(folder: Path) -> Answers:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    answers: Answers = []
    for prompt in PROMPTS:
        tokens, logprobs = list(prompt), []
        for _ in range(GREEDY["max_tokens"]):
            with torch.no_grad():
                row = model(torch.tensor([tokens])).logits[0, -1].log_softmax(-1)
            logprobs.append(float(row.max()))
            tokens.append(int(row.argmax()))
        answers.append((Completion(tuple(tokens[len(prompt) :]), tuple(logprobs), "length", None, None),))
    return answers


def one_rank(engines: list[Engine], folder: Path, **settings: Any) -> WeightSyncer:
    return WeightSyncer(FolderSource(read_folder(folder)), engines, SyncConfig(**{**SETTINGS, "timeout_s": TIMEOUT_S, **settings}))


def is_stopped(process: psutil.Process) -> bool:
    return process.status() == psutil.STATUS_STOPPED


class TwoRanks:
    """Actor rank 0 in this process and rank 1 in another; each fills every second tensor."""

    def __init__(self, engines: list[Engine], folder: Path, **settings: Any) -> None:
        settings = {**SETTINGS, "timeout_s": TIMEOUT_S, **settings}
        self.pipe, other = multiprocessing.Pipe()
        self.process = make_process(serve, other, str(folder), settings)
        self.process.start()
        other.close()
        self.source = FolderSource(read_folder(folder), rank=0, world_size=2)
        self.syncer = WeightSyncer(self.source, engines, SyncConfig(**settings), rank=0, world_size=2, broadcast=self._broadcast)
        self.tell("read", str(folder))

    def _broadcast(self, payload: bytes) -> bytes:
        self.pipe.send(payload)
        return payload

    def tell(self, method: str, argument: Any = None) -> None:
        self.pipe.send((method, argument))
        assert self.answer() == ("ok", None)

    def answer(self, timeout_s: float = 60.0) -> tuple[str, str | None]:
        assert self.pipe.poll(timeout_s), "rank 1 does not answer"
        return self.pipe.recv()

    def both(self, method: str, *arguments: Any) -> tuple[Any, tuple[str, str | None]]:
        """The outcome of a collective call on rank 0 and the answer of rank 1."""
        self.pipe.send((method, *arguments) if arguments else (method, None))
        try:
            outcome = getattr(self.syncer, method)(*arguments)
        except WeightSyncError as error:
            outcome = error
        return outcome, self.answer()

    def connect(self) -> None:
        assert self.both("connect") == (None, ("ok", None))

    def sync(self, version: int) -> SyncReport:
        report, answer = self.both("sync", version)
        assert isinstance(report, SyncReport), report
        assert answer == ("ok", None)
        return report

    def kill_in_sync(self, version: int, at: int) -> None:
        """Rank 1 is killed before it fills bucket ``at``; the sync fails with its name before its deadline."""
        self.tell("fault", ("kill", at))
        self.pipe.send(("sync", version))
        with ended_before(TIMEOUT_S), pytest.raises(WeightSyncError, match=r"the process of actor rank 1 .* has ended"):
            self.syncer.sync(version)

    def stop_in_sync(self, version: int, at: int) -> WeightSyncError:
        """Rank 1 stops before it fills bucket ``at``, the deadline passes, and it goes on: the error that both ranks raise."""
        self.tell("fault", ("stop", at))
        self.pipe.send(("sync", version))
        process = psutil.Process(self.process.pid)
        with (
            passed_deadline("actor rank 1", has_failed=lambda: is_stopped(process)),
            pytest.raises(WeightSyncError, match="actor rank 1") as raised,
        ):
            self.syncer.sync(version)
        process.resume()
        assert self.answer() == ("error", str(raised.value))
        return raised.value

    def close(self) -> None:
        self.syncer.close()
        if self.process.is_alive():
            with contextlib.suppress(BrokenPipeError):
                self.pipe.send(("end", None))
            self.process.join(10)
        self.process.kill()
        self.process.join()


def assert_refuses(engine: Engine, words: str) -> None:
    assert engine.state == "dirty"
    with pytest.raises(EngineDirtyError, match=words):
        engine.generate(PROMPTS[:1], GREEDY)


def worker_of(engine: Engine) -> psutil.Process:
    """The first worker process of an engine; its core, where that is the worker."""
    core = psutil.Process(engine._llm.engine_core.resources.engine_manager.processes[0].pid)
    return (core.children(recursive=True) or [core])[0]
