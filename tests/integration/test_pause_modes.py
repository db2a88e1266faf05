"""Claims about requests in flight when a sync comes: what abort, wait and keep do to their tokens, and what every mode does to caches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rlsync.engine.compat import engine as compat
from rlsync.engine.handles.local import Completion, Engine
from rlsync.errors import EngineDirtyError, WeightSyncError
from rlsync.sync import SyncConfig, SyncReport, WeightSyncer
from tests.deadlines import HANG_S, ended_by
from tests.integration.audio_model import AUDIO_PROMPT, SAMPLING_RATE, read_audio_model, save_audio_model, save_language_model, sound
from tests.integration.engine_source import ENGINE_ENV, NUM_BLOCKS, FolderSource
from tests.integration.greedy import close, greedy, same
from tests.integration.held_requests import EXTENSION, hold
from tests.integration.kept_caches import keep_caches
from tests.integration.tiny_engines import is_stopped, worker_of
from tests.phases import passed_deadline

pytestmark = pytest.mark.slow

# Two more than the engine runs at once: these wait in its queue when the pause comes.
NUM_RUNNING = 4
PROMPTS = ((3, 5, 7, 9), (11, 2, 100, 130, 4), (1,), (77, 8, 8), (42, 17), (99, 98, 97))
NUM_TOKENS = 40
LONG = {"temperature": 0.0, "max_tokens": NUM_TOKENS, "ignore_eos": True}
SHORT = {**LONG, "max_tokens": 8}
# More than three blocks of the prefix cache.
BLOCK_SIZE = 32
LONG_PROMPT = tuple((7 * i) % 131 for i in range(100))
BUCKET_BYTES = 100_000
MODES = ("abort", "wait", "keep")


@dataclass(frozen=True)
class Checkpoint:
    """A model with an encoder, and what it does with text alone as a checkpoint of its own, for transformers to answer."""

    folder: Path
    text: Path

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        return read_audio_model(self.folder)


@pytest.fixture(scope="module")
def a(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return checkpoint(tmp_path_factory.mktemp("a"), 1)


@pytest.fixture(scope="module")
def b(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return checkpoint(tmp_path_factory.mktemp("b"), 2)


def checkpoint(root: Path, seed: int) -> Checkpoint:
    folder = save_audio_model(root / "audio", seed)
    return Checkpoint(folder, save_language_model(root / "text", folder))


@pytest.fixture(scope="module")
def engine(a: Checkpoint) -> Iterator[Engine]:
    args: dict[str, Any] = {"model": str(a.folder), "dtype": "float32", "max_model_len": 1024, "max_num_batched_tokens": 1024}
    args |= {"enforce_eager": True, "max_num_seqs": NUM_RUNNING, "block_size": BLOCK_SIZE, "enable_prefix_caching": True}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENGINE_ENV.items():
            patch.setenv(name, value)
        args |= {"num_gpu_blocks_override": 4 * NUM_BLOCKS, "worker_extension_cls": EXTENSION}
        made = Engine("e", args | {"limit_mm_per_prompt": {"audio": 1}})
        made.start()
        yield made
        made.close()


class Rollout:
    """An engine at version 1 with the weights of a, requests in flight, and a sync to those of b."""

    def __init__(self, engine: Engine, a: Checkpoint, b: Checkpoint, pool: ThreadPoolExecutor, **settings: Any) -> None:
        self.engine, self.pool = engine, pool
        self.source = FolderSource(a.tensors)
        self.config = SyncConfig(**{"bucket_bytes": BUCKET_BYTES, "timeout_s": 30.0, **settings})
        self.source.take(a.tensors)
        self.syncer = WeightSyncer(self.source, [self.engine], self.config)
        self.syncer.connect()
        self.syncer.sync(1)
        self.source.take(b.tensors)

    def through_a_sync(self, **held: float) -> tuple[list[Completion], SyncReport]:
        """What becomes of the requests that ``hold`` holds until the sync's pause."""
        future = hold(self.engine, NUM_RUNNING, len(PROMPTS), lambda: self.pool.submit(self.engine.generate, PROMPTS, LONG), **held)
        report = self.syncer.sync(2)
        return [completion for (completion,) in future.result(60)], report


@pytest.fixture
def rollout(engine: Engine, a: Checkpoint, b: Checkpoint) -> Iterator[Callable[..., Rollout]]:
    made: list[Rollout] = []
    with ThreadPoolExecutor(2) as pool:

        def make(**settings: Any) -> Rollout:
            made.append(Rollout(engine, a, b, pool, **settings))
            return made[-1]

        yield make
        for one in made:
            one.syncer.close()


def versions(completions: list[Completion]) -> list[tuple[int | None, int | None]]:
    return [(c.version, c.last_version) for c in completions]


def num_tokens_of(completion: Completion, folder: Path, prompt: tuple[int, ...]) -> int:
    """How many of its first tokens are those of the checkpoint in ``folder``."""
    wanted = greedy(folder, prompt, NUM_TOKENS).token_ids
    return next((i for i, (x, y) in enumerate(zip(completion.token_ids, wanted, strict=False)) if x != y), len(completion.token_ids))


@pytest.fixture(params=["seen", "unseen"])
def requests_are(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether the handle finds requests when it pauses the engine, or they come to the core between its look and the pause."""
    if request.param == "unseen":
        monkeypatch.setattr(compat, "is_idle", lambda llm: True)


@pytest.mark.usefixtures("requests_are")
def test_abort_ends_requests_with_the_tokens_they_have(rollout: Callable[..., Rollout], a: Checkpoint) -> None:
    completions, _ = rollout(pause_mode="abort").through_a_sync()
    assert {c.finish_reason for c in completions} == {"abort"}
    assert set(versions(completions)) == {(1, 1)}
    for completion, prompt in zip(completions[:NUM_RUNNING], PROMPTS, strict=False):
        assert 0 < len(completion.token_ids) < NUM_TOKENS
        assert num_tokens_of(completion, a.text, prompt) == len(completion.token_ids) == len(completion.logprobs)
    assert {c.token_ids for c in completions[NUM_RUNNING:]} == {()}


@pytest.mark.usefixtures("requests_are")
def test_wait_lets_running_requests_end_and_queued_ones_begin_with_the_new_weights(
    rollout: Callable[..., Rollout], a: Checkpoint, b: Checkpoint
) -> None:
    completions, report = rollout(pause_mode="wait").through_a_sync(pause_s=1.0)
    assert versions(completions) == [(1, 1)] * NUM_RUNNING + [(2, 2)] * (len(PROMPTS) - NUM_RUNNING)
    for i, (completion, prompt) in enumerate(zip(completions, PROMPTS, strict=True)):
        assert same(completion, greedy((a if i < NUM_RUNNING else b).text, prompt, NUM_TOKENS))
    # Waiting is no transfer.
    assert report.pause_s > 1.0
    assert report.pause_s + report.transfer_s + report.commit_s + report.resume_s <= report.seconds


@pytest.mark.usefixtures("requests_are")
@pytest.mark.parametrize("is_reset", [True, False])
def test_keep_goes_on_with_the_new_weights_as_if_they_had_read_the_tokens_so_far(
    rollout: Callable[..., Rollout], engine: Engine, a: Checkpoint, b: Checkpoint, monkeypatch: pytest.MonkeyPatch, is_reset: bool
) -> None:
    """With the negative control: where caches are not reset, kept requests go on from keys and values of the former weights."""
    made = rollout(pause_mode="keep")
    if not is_reset:
        keep_caches(monkeypatch, engine, prefix=True)
    completions, _ = made.through_a_sync()
    assert versions(completions) == [(1, 2)] * NUM_RUNNING + [(2, 2)] * (len(PROMPTS) - NUM_RUNNING)
    assert {len(c.token_ids) for c in completions} == {NUM_TOKENS}
    are_right = []
    for completion, prompt in zip(completions[:NUM_RUNNING], PROMPTS, strict=False):
        count = num_tokens_of(completion, a.text, prompt)
        assert 0 < count < NUM_TOKENS
        rest = greedy(b.text, (*prompt, *completion.token_ids[:count]), NUM_TOKENS - count)
        are_right.append(completion.token_ids[count:] == rest.token_ids and close(completion.logprobs[count:], rest.logprobs))
    assert all(are_right) if is_reset else not any(are_right)
    for completion, prompt in zip(completions[NUM_RUNNING:], PROMPTS[NUM_RUNNING:], strict=True):
        assert same(completion, greedy(b.text, prompt, NUM_TOKENS))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("is_reset", [True, False])
def test_the_prefix_cache_survives_no_commit(
    rollout: Callable[..., Rollout],
    engine: Engine,
    a: Checkpoint,
    b: Checkpoint,
    monkeypatch: pytest.MonkeyPatch,
    mode: str,
    is_reset: bool,
) -> None:
    """With the negative control in every mode: no pause forgets the cache by itself."""
    made = rollout(pause_mode=mode)
    for _ in range(2):
        ((before,),) = engine.generate([LONG_PROMPT], SHORT)
        assert same(before, greedy(a.text, LONG_PROMPT, 8))
    if not is_reset:
        keep_caches(monkeypatch, engine, prefix=True)
    made.syncer.sync(2)
    ((after,),) = engine.generate([LONG_PROMPT], SHORT)
    assert same(after, greedy(b.text, LONG_PROMPT, 8)) == is_reset


def hear(engine: Engine, key: str, num_tokens: int = 8, said: tuple[int, ...] = ()) -> Completion:
    """The answer to one sound, after the tokens ``said``. vLLM caches what its encoder makes of the sound under ``key``."""
    from vllm.sampling_params import RequestOutputKind, SamplingParams

    prompt = {"prompt_token_ids": [*AUDIO_PROMPT, *said], "multi_modal_data": {"audio": [(sound(0), SAMPLING_RATE)]}}
    fields = {**SHORT, "max_tokens": num_tokens, "logprobs": 0, "detokenize": False, "output_kind": RequestOutputKind.FINAL_ONLY}

    async def ask() -> Any:
        numbered = f"sound-{next(engine._numbers)}"
        async for output in engine._llm.generate(prompt | {"multi_modal_uuids": {"audio": [key]}}, SamplingParams(**fields), numbered):
            final = output
        return final.outputs[0]

    return engine._completion(engine._calls.run(ask(), 60), None)


@pytest.mark.parametrize("mode", MODES)
def test_what_the_encoder_made_of_a_sound_survives_no_commit(
    rollout: Callable[..., Rollout], engine: Engine, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    """Measured by the same sound under a key that no cache has seen. A request that is kept hears it again, too."""
    made = rollout(pause_mode=mode)
    before = hear(engine, f"{mode}-1")
    kept = hold(engine, 1, 1, lambda: made.pool.submit(hear, engine, f"{mode}-1", NUM_TOKENS))
    made.syncer.sync(2)
    after = hear(engine, f"{mode}-1")
    assert same(after, hear(engine, f"{mode}-2"))
    assert after.token_ids != before.token_ids
    if mode == "keep":
        whole, alone = kept.result(60), hear(engine, f"{mode}-3", NUM_TOKENS)
        assert whole.token_ids[0] == before.token_ids[0] != alone.token_ids[0]
        # The last 8 tokens, by the new weights alone, as they follow on all those before.
        assert same(
            replace(whole, token_ids=whole.token_ids[-8:], logprobs=whole.logprobs[-8:]), hear(engine, "-4", said=whole.token_ids[:-8])
        )


def test_without_a_reset_the_encoder_cache_would_survive(
    rollout: Callable[..., Rollout], engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The negative control: of all caches the prefix cache alone is reset."""
    made = rollout(pause_mode="abort")
    hear(engine, "n-1")
    keep_caches(monkeypatch, engine, prefix=False)
    made.syncer.sync(2)
    assert not same(hear(engine, "n-1"), hear(engine, "n-2"))


def test_waiting_for_requests_is_bounded_by_the_deadline_of_a_phase(rollout: Callable[..., Rollout], engine: Engine) -> None:
    made, worker = rollout(pause_mode="wait"), worker_of(engine)
    asked = PROMPTS[:NUM_RUNNING]
    future = hold(engine, len(asked), len(asked), lambda: made.pool.submit(engine.generate, asked, LONG), pause_s=HANG_S)
    with passed_deadline("engine e worker 0", has_failed=lambda: is_stopped(worker)), pytest.raises(WeightSyncError) as raised:
        made.syncer.sync(2)
    with pytest.raises(EngineDirtyError):
        future.result(60)
    assert engine.state == "dirty", raised.value
    worker.resume()
    made.syncer.sync(2)
    assert engine.state == "clean"


def test_a_rollout_past_its_deadline_ends_and_costs_a_live_engine_nothing(engine: Engine) -> None:
    state = engine.state, engine.version
    with pytest.raises(TimeoutError, match=r"within 0\.2 s"):
        engine.generate(PROMPTS, {**LONG, "max_tokens": 900}, timeout_s=0.2)
    assert (engine.state, engine.version) == state
    assert len(engine.generate(PROMPTS[:1], SHORT, timeout_s=30)[0][0].token_ids) == 8


# Costs the engine. Keep it last.


def test_a_rollout_on_a_stopped_worker_ends_at_its_deadline_and_leaves_the_engine_dirty(engine: Engine) -> None:
    worker = worker_of(engine)
    worker.suspend()
    with ended_by(1.0), pytest.raises(EngineDirtyError, match=r"did not end within 1 s.*no sign of life"):
        engine.generate(PROMPTS, LONG, timeout_s=1)
    assert engine.state == "dirty"
    with pytest.raises(EngineDirtyError, match="no sign of life"):
        engine.generate(PROMPTS, SHORT)
    worker.kill()
