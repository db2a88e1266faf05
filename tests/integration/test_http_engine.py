"""Claims about a real ``vllm serve`` that somebody started and that is driven over its own HTTP routes."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import shutil
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import save_file

from rlsync.cli import main
from rlsync.engine.handles import PicturePrompt
from rlsync.engine.handles.adapters import lora_arguments
from rlsync.engine.handles.http import HttpEngine
from rlsync.errors import ConfigError, EngineDirtyError, RlsyncError, WeightSyncError
from rlsync.sync import SyncConfig, WeightSyncer
from tests.integration.doomed_actor import BUCKET_BYTES, start_doomed_actor
from tests.integration.engine_source import NUM_BLOCKS, AdapterSource, FolderSource, call_on_fill, read_folder
from tests.integration.greedy import greedy, same
from tests.integration.served_engine import API_KEY, SERVE_S, serve
from tests.models import save_tiny_model

# The first test waits for the server to start.
pytestmark = pytest.mark.slow

PROMPTS = ((3, 5, 7, 9), (11, 2, 100, 130, 4), (1,))
GREEDY = {"temperature": 0.0, "max_tokens": 12, "ignore_eos": True}
# More than three blocks of the prefix cache.
LONG_PROMPT = tuple((7 * i) % 131 for i in range(100))
BLOCK_SIZE = 32
NUM_RUNNING = 4
SERVING: dict[str, Any] = {
    "dtype": "float32", "max_model_len": 512, "max_num_seqs": NUM_RUNNING, "num_gpu_blocks_override": NUM_BLOCKS, "enforce_eager": True,
    "skip_tokenizer_init": True, "uvicorn_log_level": "warning",
    # The worker is in the process of the core, as on GPUs. Else both poll.
    "distributed_executor_backend": "vllm.v1.executor.uniproc_executor.UniProcExecutor",
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two checkpoints. That of the start has a generation config in which every sample is the greedy one."""
    root = tmp_path_factory.mktemp("models")
    made = {name: save_tiny_model(root / name, "qwen2", seed=seed) for name, seed in (("a", 1), ("b", 2))}
    (made["a"] / "generation_config.json").write_text(json.dumps({"do_sample": True, "top_k": 1, "eos_token_id": 2}))
    return made


@pytest.fixture(scope="module")
def url(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    scratch = tmp_path_factory.mktemp("server")
    with serve(folders["a"], scratch, api_key=API_KEY, block_size=BLOCK_SIZE, **SERVING) as (url, process):
        await_start(url, process, scratch)
        yield url


def await_start(url: str, process: psutil.Process, scratch: Path) -> None:
    try:
        HttpEngine(url, engine_id="served", timeout_s=SERVE_S).close()
    except RlsyncError as error:
        pytest.fail(f"{error}; it is {process.status()}; its log ends with: {(scratch / 'serve.log').read_text()[-4000:]}")


@pytest.fixture
def engine(url: str) -> Iterator[HttpEngine]:
    made = HttpEngine(url, engine_id="served", api_key=API_KEY)
    yield made
    made.close()


def connected(engine: HttpEngine, folder: Path, **settings: Any) -> tuple[WeightSyncer, FolderSource]:
    source = FolderSource(read_folder(folder))
    syncer = WeightSyncer(source, [engine], SyncConfig(**{"bucket_bytes": BUCKET_BYTES, "timeout_s": 30.0, **settings}))
    syncer.connect()
    return syncer, source


def ask(url: str, method: str, path: str, body: Any = None, timeout_s: float = 30.0) -> Any:
    """As any client of the server asks it, past the handle."""
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {API_KEY}"}
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url + path, data=data, headers=headers, method=method)
    with urllib.request.urlopen(request, timeout=timeout_s) as answer:
        text = answer.read() or b"{}"
        return json.loads(text) if text.startswith(b"{") else text.decode()


def complete(url: str, prompt: tuple[int, ...], timeout_s: float = 30.0, **fields: Any) -> dict[str, Any]:
    """The first choice that a client of the server gets."""
    body = {"prompt": list(prompt), "return_token_ids": True, "ignore_eos": True, **fields}
    return ask(url, "POST", "/v1/completions", body, timeout_s)["choices"][0]


def await_requests(url: str, *, running: int, waiting: int) -> None:
    """Return when the server says that so many requests run and so many wait in its queue."""
    deadline_s = time.monotonic() + 60
    while (found := requests_of(url)) != {"running": running, "waiting": waiting}:
        assert time.monotonic() < deadline_s, found
        time.sleep(0.01)


def requests_of(url: str) -> dict[str, float]:
    """How many run and how many wait, as the server says."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=30) as answer:
        text = answer.read().decode()
    pattern = r"^vllm:num_requests_{}{{.*}} (.*)$"
    return {name: sum(map(float, re.findall(pattern.format(name), text, re.MULTILINE))) for name in ("running", "waiting")}


def answers_like(engine: HttpEngine, folder: Path) -> bool:
    found = engine.generate(PROMPTS, GREEDY, timeout_s=30)
    return all(same(completion, greedy(folder, prompt, 12)) for prompt, (completion,) in zip(PROMPTS, found, strict=True))


def test_a_synced_server_answers_like_the_checkpoint_of_its_version(url: str, engine: HttpEngine, folders: dict[str, Path]) -> None:
    assert (engine.state, engine.version, engine.num_workers) == ("clean", None, 1)
    assert answers_like(engine, folders["a"])
    assert not answers_like(engine, folders["b"])
    syncer, source = connected(engine, folders["b"])
    with syncer:
        for version, name in ((1, "b"), (2, "a"), (3, "b")):
            source.take(read_folder(folders[name]))
            report = syncer.sync(version)
            assert answers_like(engine, folders[name])
            assert (engine.state, engine.version, report.version) == ("clean", version, version)
            ((completion,),) = engine.generate(PROMPTS[:1], GREEDY)
            assert (completion.version, completion.last_version, completion.finish_reason) == (version, version, "length")
            assert tuple(complete(url, PROMPTS[0], temperature=0, max_tokens=12)["token_ids"]) == completion.token_ids
    assert 0 < report.pause_s < report.seconds
    assert report.pause_s + report.transfer_s <= report.seconds


def test_what_is_sampled_does_not_depend_on_the_generation_config_of_the_model(url: str, engine: HttpEngine) -> None:
    sampling = {"temperature": 1.0, "max_tokens": 12, "ignore_eos": True, "n": 2}
    (twice, other) = engine.generate([PROMPTS[0], PROMPTS[0]], sampling, seeds=[1, 1001])
    assert len({c.token_ids for c in (*twice, *other)}) == 4
    assert engine.generate([PROMPTS[0]], sampling, seeds=[1]) == [twice]
    ((longer,), (shorter,)) = engine.generate(PROMPTS[:2], [GREEDY, {**GREEDY, "max_tokens": 3, "logprobs": None}])
    assert (len(longer.logprobs), len(shorter.token_ids), shorter.logprobs) == (GREEDY["max_tokens"], 3, ())
    # The negative control: who leaves the fields out gets the greedy sample whatever the seed.
    assert len({tuple(complete(url, PROMPTS[0], temperature=1, max_tokens=12, seed=seed)["token_ids"]) for seed in range(3)}) == 1
    with pytest.raises(ConfigError, match="no sampling field temprature"):
        engine.generate([PROMPTS[0]], {"temprature": 1.0})


def test_pictures_which_its_route_does_not_know_are_refused_before_anything_is_asked(engine: HttpEngine) -> None:
    prompts = [PROMPTS[0], PicturePrompt((1, 2), ("a picture",))]
    with pytest.raises(ConfigError, match=r"engine served: the completions route of vLLM takes no pictures .* use Engine or RayEngine"):
        engine.generate(prompts, GREEDY)
    assert len(engine.generate(prompts[:1], GREEDY)) == 1


@pytest.mark.parametrize("is_reset", [True, False])
def test_the_prefix_cache_does_not_survive_a_commit(
    engine: HttpEngine, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, is_reset: bool
) -> None:
    """With the negative control: a sync that leaves the cache alone goes on from keys and values of the former weights."""
    syncer, source = connected(engine, folders["a"])
    with syncer:
        syncer.sync(1)
        for _ in range(2):
            ((before,),) = engine.generate([LONG_PROMPT], GREEDY)
            assert same(before, greedy(folders["a"], LONG_PROMPT, 12))
        if not is_reset:
            monkeypatch.setattr(engine, "_reset_caches", partial(asyncio.sleep, 0))
        source.take(read_folder(folders["b"]))
        syncer.sync(2)
        ((after,),) = engine.generate([LONG_PROMPT], GREEDY)
    assert same(after, greedy(folders["b"], LONG_PROMPT, 12)) == is_reset
    engine._calls.run(HttpEngine._reset_caches(engine, 10), 10)


def test_requests_in_flight_are_aborted_with_the_tokens_they_have(url: str, engine: HttpEngine, folders: dict[str, Path]) -> None:
    """Those of the handle and those of other clients. Two more wait in the server's queue, and have none."""
    syncer, _ = connected(engine, folders["b"])
    with syncer, ThreadPoolExecutor(3) as pool:
        mine = pool.submit(engine.generate, PROMPTS, {**GREEDY, "max_tokens": 500})
        theirs = pool.submit(complete, url, PROMPTS[0], temperature=0, max_tokens=500)
        await_requests(url, running=NUM_RUNNING, waiting=0)
        queued = pool.submit(engine.generate, PROMPTS[:2], GREEDY)
        await_requests(url, running=NUM_RUNNING, waiting=2)
        syncer.sync(1)
        choice, completions = theirs.result(30), [completion for (completion,) in mine.result(30)]
        assert [(c.finish_reason, c.token_ids, c.logprobs) for (c,) in queued.result(30)] == [("abort", (), ())] * 2
    assert choice["finish_reason"] == "abort"
    assert 0 < len(choice["token_ids"]) < 500
    for completion in completions:
        assert completion.finish_reason == "abort"
        assert 0 < len(completion.token_ids) == len(completion.logprobs) < 500


def test_a_server_whose_sync_failed_stays_paused_until_a_complete_one(url: str, engine: HttpEngine, folders: dict[str, Path]) -> None:
    syncer, _ = connected(engine, folders["a"])
    with syncer, ThreadPoolExecutor(1) as pool:

        def fail(bucket: int) -> None:
            if bucket == 2:
                raise RuntimeError("the shard is gone")

        call_on_fill(syncer, fail)
        with pytest.raises(WeightSyncError, match="the shard is gone"):
            syncer.sync(1)
        with pytest.raises(EngineDirtyError, match="the shard is gone"):
            engine.generate(PROMPTS, GREEDY)
        waiting = pool.submit(complete, url, PROMPTS[0], temperature=0, max_tokens=12)
        time.sleep(1.0)
        assert not waiting.done()
        assert ask(url, "GET", "/is_paused") == {"is_paused": True}
        call_on_fill(syncer, lambda bucket: None)
        syncer.sync(1)
        assert tuple(waiting.result(30)["token_ids"]) == greedy(folders["a"], PROMPTS[0], 12).token_ids
    assert answers_like(engine, folders["a"])


def test_a_server_whose_actor_was_killed_in_mid_sync_answers_nobody_until_a_complete_sync(
    url: str, engine: HttpEngine, folders: dict[str, Path]
) -> None:
    timeout_s = 4.0
    actor = start_doomed_actor(url, API_KEY, folders["b"], timeout_s)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(complete, url, PROMPTS[0], timeout_s=60, temperature=0, max_tokens=12)
        actor.kill()
        actor.wait()
        # The worker gives up meanwhile, and the server's core is free to answer, if it would.
        time.sleep(timeout_s + 3)
        assert not waiting.done()
        assert ask(url, "GET", "/is_paused") == {"is_paused": True}
        # A client that gives up is no harm.
        with pytest.raises((TimeoutError, urllib.error.URLError)):
            complete(url, PROMPTS[1], timeout_s=1)
        late = HttpEngine(url, engine_id="late", api_key=API_KEY)
        with pytest.raises(EngineDirtyError, match="its server is paused"):
            late.generate(PROMPTS, GREEDY)
        syncer, _ = connected(late, folders["a"])
        with syncer:
            syncer.sync(1)
            assert answers_like(late, folders["a"])
        late.close()
        assert tuple(waiting.result(30)["token_ids"]) == greedy(folders["a"], PROMPTS[0], 12).token_ids
    assert ask(url, "GET", "/is_paused") == {"is_paused": False}


def test_a_server_that_somebody_resumes_in_mid_sync_is_reported(url: str, engine: HttpEngine, folders: dict[str, Path]) -> None:
    syncer, _ = connected(engine, folders["b"])
    with syncer, ThreadPoolExecutor(1) as pool:
        call_on_fill(syncer, lambda bucket: pool.submit(ask, url, "POST", "/resume") if bucket == 2 else None)
        with pytest.raises(WeightSyncError, match="was resumed by somebody"):
            syncer.sync(1)
        assert engine.state == "dirty"
        call_on_fill(syncer, lambda bucket: None)
        syncer.sync(1)
    assert answers_like(engine, folders["b"])


def test_a_failed_connection_pauses_a_server_that_served(url: str, engine: HttpEngine, folders: dict[str, Path]) -> None:
    """As it does any engine; a complete sync heals it."""
    tensors = read_folder(folders["b"])
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:5]
    assert ask(url, "GET", "/is_paused") == {"is_paused": False}
    with pytest.raises(WeightSyncError, match=r"model\.norm\.weight"):
        WeightSyncer(FolderSource(tensors), [engine], SyncConfig(timeout_s=30.0)).connect()
    with pytest.raises(EngineDirtyError, match="its connection to the actor failed"):
        engine.generate(PROMPTS, GREEDY)
    deadline_s = time.monotonic() + 60
    while not ask(url, "GET", "/is_paused")["is_paused"]:
        assert time.monotonic() < deadline_s
    syncer, _ = connected(engine, folders["b"])
    with syncer:
        syncer.sync(1)
    assert answers_like(engine, folders["b"])


def test_a_sync_that_an_actor_left_open_is_closed_by_the_next(url: str, engine: HttpEngine, folders: dict[str, Path]) -> None:
    ask(url, "POST", "/start_weight_update")
    syncer, _ = connected(engine, folders["b"])
    with syncer:
        syncer.sync(1)
    assert answers_like(engine, folders["b"])


def test_a_server_that_was_started_again_is_dirty(url: str, engine: HttpEngine, folders: dict[str, Path]) -> None:
    """It names its weights as it does before the first sync, which stands for the restart here."""
    syncer, _ = connected(engine, folders["b"])
    with syncer:
        syncer.sync(7)
        assert ask(url, "GET", "/weight_info") == {"weight_version": "7"}
        ask(url, "POST", "/update_weight_version", {"new_version": "default"})
        with pytest.raises(EngineDirtyError, match="holds weights 'default' instead of version 7"):
            engine.generate(PROMPTS, GREEDY)
        syncer.sync(8)
    assert answers_like(engine, folders["b"])


def test_the_key_is_in_no_error_and_no_log(url: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    wrong = "not-the-key-0815"
    engine = HttpEngine(url, engine_id="served", api_key=wrong)
    with pytest.raises(RlsyncError, match="401") as refused:
        engine.generate(PROMPTS, GREEDY)
    with pytest.raises(RlsyncError, match=r"answered POST /init_weight_transfer_engine with 500: .*unexpected keyword") as echoed:
        engine.init_weight_transfer({wrong: 1}, 10)
    engine.close()
    assert "'***'" in str(echoed.value)
    for text in (str(refused.value), str(echoed.value), caplog.text, repr(engine)):
        assert wrong not in text


def test_an_address_without_a_server_is_one_error_that_says_how_to_start_one(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(RlsyncError, match=r"engine gone at http://127\.0\.0\.1:9 cannot be reached .*vllm serve MODEL"):
        HttpEngine("http://127.0.0.1:9", engine_id="gone", timeout_s=4.0)
    (told,) = (record.getMessage() for record in caplog.records if record.levelno == logging.WARNING)
    assert re.search(r"engine gone at http://127\.0\.0\.1:9 cannot be reached .*refused; waiting for it up to [1-4] s$", told), told
    with pytest.raises(ConfigError, match="without a name or a password"):
        HttpEngine("http://me:secret@127.0.0.1:9", engine_id="gone")


def test_verify_tells_what_a_server_holds_unlike_a_folder_and_changes_nothing(
    url: str,
    engine: HttpEngine,
    folders: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("VLLM_API_KEY", API_KEY)

    def verify(folder: Path) -> tuple[int, list[str]]:
        return main(["verify", str(folder), "--engine", url, "--timeout-s", "30"]), capsys.readouterr().out.splitlines()

    flipped = {name: tensor.clone() for name, tensor in read_folder(folders["b"]).items()}
    for name in ("model.layers.2.mlp.up_proj.weight", "model.layers.1.input_layernorm.weight"):
        flipped[name].view(-1).view(torch.int32)[7] ^= 1
    shutil.copytree(folders["b"], tmp_path / "flipped")
    save_file(flipped, tmp_path / "flipped" / "model.safetensors", metadata={"format": "pt"})
    syncer, _ = connected(engine, folders["b"])
    with syncer:
        syncer.sync(1)
        assert verify(folders["b"]) == (0, [f"equal: 51 tensors in {folders['b']}; 1 workers of {url}"])
        probed = "model.layers.2.mlp.gate_up_proj, by what it makes of a fixed input"
        code, lines = verify(tmp_path / "flipped")
        assert (code, lines[:-1]) == (1, ["worker 0: model.layers.1.input_layernorm.weight", f"worker 0: {probed}"])
        code, lines = verify(folders["a"])
        assert code == 1 and len(lines) > 30 and "tensors of the engine differ" in lines[-1]
        assert answers_like(engine, folders["b"])
        syncer.sync(2)
    ask(url, "POST", "/pause?mode=keep&clear_cache=false")
    assert main(["verify", str(folders["b"]), "--engine", url]) == 2
    assert "serves no committed version, so it cannot be compared" in capsys.readouterr().err
    assert ask(url, "GET", "/is_paused") == {"is_paused": True}, "it is not let go"
    ask(url, "POST", "/resume")


# Of the server to which adapters are synced beside their base.
R = 4
ADAPTED = ("self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
NUM_LONG = 64


@pytest.fixture(scope="module")
def adapted(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Url of a server with slots for adapters and the routes by which requests come to them."""
    scratch = tmp_path_factory.mktemp("adapted")
    variables, options = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}, SERVING | lora_arguments(R)
    with serve(folders["a"], scratch, variables=variables, is_forked=True, **options) as (url, process):
        await_start(url, process, scratch)
        yield url


def factors(base: dict[str, torch.Tensor], seed: int) -> dict[str, torch.Tensor]:
    """Of adapters on a part of what vLLM packs, large enough to change answers."""
    random = torch.Generator().manual_seed(seed)
    made = {}
    for name, weight in base.items():
        module = name.removesuffix(".weight")
        if module.endswith(ADAPTED):
            made[f"{module}.lora_A.weight"] = torch.randn(R, weight.shape[1], generator=random) / weight.shape[1] ** 0.5
            made[f"{module}.lora_B.weight"] = torch.randn(weight.shape[0], R, generator=random) / 4
    return made


def merged(folder: Path, adapters: dict[str, torch.Tensor], into: Path) -> Path:
    """The checkpoint in ``folder`` with adapters added, for transformers."""
    tensors = read_folder(folder)
    for name, a in adapters.items():
        if name.endswith(".lora_A.weight"):
            module = name.removesuffix(".lora_A.weight")
            tensors[f"{module}.weight"] = tensors[f"{module}.weight"] + adapters[f"{module}.lora_B.weight"] @ a
    shutil.copytree(folder, into)
    save_file(tensors, into / "model.safetensors", metadata={"format": "pt"})
    return into


def peft_folder(folder: Path, adapters: dict[str, torch.Tensor]) -> Path:
    folder.mkdir()
    save_file({f"base_model.model.{name}": tensor for name, tensor in adapters.items()}, folder / "adapter_model.safetensors")
    targets = [module.rpartition(".")[2] for module in ADAPTED]
    config = {"peft_type": "LORA", "r": R, "lora_alpha": R, "target_modules": targets, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def models_of(url: str) -> list[str]:
    return [model["id"] for model in ask(url, "GET", "/v1/models")["data"]]


def begun(url: str, pool: ThreadPoolExecutor, generate: Callable[[], Any]) -> Future[Any]:
    """A request that has tokens and stands still, because somebody has paused the server."""
    for _ in range(8):
        future = pool.submit(generate)
        while not future.done() and not requests_of(url)["running"]:
            time.sleep(0.01)
        ask(url, "POST", "/pause?mode=keep&clear_cache=false")
        if not future.done():
            return future
        ask(url, "POST", "/resume")
    raise AssertionError("requests ended before they could be looked at")


def test_adapters_alone_are_synced_to_a_server_and_requests_end_on_the_version_that_they_began_with(
    adapted: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    """The base comes once, and again after a sync that failed; each version is a model of the server, and of those there is one."""
    base = read_folder(folders["b"])
    adapters = {version: factors(base, version) for version in range(1, 5)}
    wanted = {version: merged(folders["b"], made, tmp_path / str(version)) for version, made in adapters.items()}
    factor_bytes = sum(tensor.nbytes for tensor in adapters[1].values())
    engine = HttpEngine(adapted, engine_id="adapted")
    source = AdapterSource(base, adapters[1], R)
    config = SyncConfig(lora="adapter", pause_mode="keep", bucket_bytes=BUCKET_BYTES, timeout_s=60.0)
    long = {**GREEDY, "max_tokens": NUM_LONG}
    with WeightSyncer(source, [engine], config) as syncer, ThreadPoolExecutor(2) as pool:
        ask(adapted, "POST", "/v1/load_lora_adapter", {"lora_name": "own", "lora_path": str(peft_folder(tmp_path / "own", adapters[2]))})
        assert main(["verify", str(folders["a"]), "--engine", adapted]) == 0
        with pytest.raises(WeightSyncError, match=r"its server has adapters of its own \(own\)"):
            syncer.connect()
        ask(adapted, "POST", "/v1/unload_lora_adapter", {"lora_name": "own"})
        syncer.connect()
        assert syncer.sync(1).bytes > 2 * factor_bytes
        assert answers_like(engine, wanted[1])
        (_, first) = models_of(adapted)
        assert (
            tuple(complete(adapted, PROMPTS[0], model=first, temperature=0, max_tokens=12)["token_ids"])
            == greedy(wanted[1], PROMPTS[0], 12).token_ids
        )
        assert (
            tuple(complete(adapted, PROMPTS[0], temperature=0, max_tokens=12)["token_ids"])
            == greedy(folders["b"], PROMPTS[0], 12).token_ids
        )

        mine = begun(adapted, pool, lambda: engine.generate([LONG_PROMPT], long))
        source.take(adapters[2])
        report = syncer.sync(2)
        assert (report.bytes, report.held_bytes > 0) == (factor_bytes, True)
        ((through,),) = mine.result(60)
        assert (through.version, through.last_version) == (1, 1)
        assert same(through, greedy(wanted[1], LONG_PROMPT, NUM_LONG))
        assert answers_like(engine, wanted[2]) and not answers_like(engine, wanted[1])
        with pytest.raises(urllib.error.HTTPError, match="404"):
            complete(adapted, PROMPTS[0], model=first)

        source.take(adapters[3])
        syncer.sync(3)
        (_, third) = models_of(adapted)
        # This handle does not know of it, and its slot is the first.
        theirs = begun(adapted, pool, lambda: complete(adapted, LONG_PROMPT, 120, model=third, temperature=0, max_tokens=NUM_LONG))
        source.take(adapters[4])
        assert syncer._connection is not None
        last = syncer._connection.num_buckets - 1

        def fails(bucket: int) -> None:
            """Once the server is paused: before, its requests would be ended."""
            if bucket == last:
                while engine._may_answer:  # the server itself says nothing while its core is inside the update
                    time.sleep(0.01)
                _ = 1 // 0

        call_on_fill(syncer, fails)
        with pytest.raises(WeightSyncError, match="by zero"):
            syncer.sync(4)
        with pytest.raises(EngineDirtyError, match="by zero"):
            engine.generate(PROMPTS, GREEDY)
        call_on_fill(syncer, lambda bucket: None)
        assert syncer.sync(4).bytes > 2 * factor_bytes
        assert tuple(theirs.result(60)["token_ids"]) == greedy(wanted[3], LONG_PROMPT, NUM_LONG).token_ids
        assert answers_like(engine, wanted[4])

        with pytest.raises(urllib.error.HTTPError, match="500") as refused:
            ask(adapted, "POST", "/v1/load_lora_adapter", {"lora_name": "other", "lora_path": str(tmp_path)})
        assert "load it into another engine" in refused.value.read().decode()
        # As after a restart, where vLLM keeps no label of its weights.
        ask(adapted, "POST", "/v1/unload_lora_adapter", {"lora_name": models_of(adapted)[1]})
        with pytest.raises(EngineDirtyError, match="its server was started again, or somebody unloaded its adapters"):
            engine.generate(PROMPTS[:1], GREEDY)
        syncer.sync(5)
    engine.close()


def test_an_actor_that_was_started_again_names_its_versions_anew_and_a_late_request_begins_on_the_next(
    adapted: str, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The actor before has left a version. The request comes to the server when its version is no model of it any more."""
    base, left, is_sent = read_folder(folders["b"]), models_of(adapted)[1:], threading.Event()
    adapters = {version: factors(base, 10 + version) for version in (1, 2)}
    engine, source = HttpEngine(adapted, engine_id="late"), AdapterSource(base, adapters[1], R)
    choices = engine._choices

    async def choose_late(body: dict[str, Any]) -> list[dict[str, Any]]:
        while not is_sent.is_set():
            await asyncio.sleep(0.01)
        return await choices(body)

    config = SyncConfig(lora="adapter", pause_mode="keep", bucket_bytes=BUCKET_BYTES, timeout_s=60.0)
    with WeightSyncer(source, [engine], config) as syncer, ThreadPoolExecutor(1) as pool:
        syncer.connect()
        syncer.sync(1)
        monkeypatch.setattr(engine, "_choices", choose_late)
        late = pool.submit(engine.generate, PROMPTS[:1], GREEDY)
        deadline_s = time.monotonic() + 60
        while engine._adapters is None or not engine._adapters.in_use():
            assert time.monotonic() < deadline_s
            time.sleep(0.01)
        source.take(adapters[2])
        syncer.sync(2)
        is_sent.set()
        ((completion,),) = late.result(60)
        wanted = merged(folders["b"], adapters[2], tmp_path / "wanted")
        assert completion.version == 2 and same(completion, greedy(wanted, PROMPTS[0], 12))
        assert answers_like(engine, wanted)
        (_, now) = models_of(adapted)
        assert now not in left
    with pytest.raises(WeightSyncError, match=r"sync adapters with weight_sync\.lora=adapter"):
        connected(engine, folders["b"])
    engine.close()


def test_verify_compares_the_base_of_a_server_with_slots_and_says_so(
    adapted: str, folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Adapters stay where they are. The checkpoint with adapters merged is another base."""
    base = read_folder(folders["b"])
    adapters = factors(base, 7)
    engine, wanted = HttpEngine(adapted, engine_id="verified"), merged(folders["b"], adapters, tmp_path / "wanted")
    with WeightSyncer(AdapterSource(base, adapters, R), [engine], SyncConfig(lora="adapter", bucket_bytes=BUCKET_BYTES)) as syncer:
        syncer.connect()
        syncer.sync(1)
        assert main(["verify", str(folders["b"]), "--engine", adapted]) == 0
        beside = ", of whose weights the base was compared and not the adapters in its slots"
        assert capsys.readouterr().out.splitlines() == [f"equal: 51 tensors in {folders['b']}; 1 workers of {adapted}{beside}"]
        assert main(["verify", str(wanted), "--engine", adapted, "--json"]) == 1
        found = json.loads(capsys.readouterr().out)
        assert found["second"]["compared"] == "base"
        modules = {difference["tensor"].removesuffix(".#probe").partition(".layers.")[2][2:] for difference in found["differences"]}
        assert modules == {"self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"}
        assert answers_like(engine, wanted)
        syncer.sync(2)
        assert answers_like(engine, wanted)
    engine.close()


def test_a_server_without_slots_for_adapters_is_refused(url: str, engine: HttpEngine, folders: dict[str, Path]) -> None:
    base = read_folder(folders["b"])
    with pytest.raises(WeightSyncError, match=r"no slots for the adapters of rank 4 .* start it with enable_lora=True"):
        WeightSyncer(AdapterSource(base, factors(base, 1), R), [engine], SyncConfig(lora="adapter", timeout_s=30.0)).connect()
    syncer, _ = connected(engine, folders["b"])
    with syncer:
        syncer.sync(1)


def test_a_server_that_somebody_resumes_after_a_failed_sync_gives_no_answer(url: str, engine: HttpEngine, folders: dict[str, Path]) -> None:
    """It costs the server. Keep it last."""
    syncer, _ = connected(engine, folders["b"])
    with syncer:
        call_on_fill(syncer, lambda bucket: 1 // 0 if bucket == 3 else None)
        with pytest.raises(WeightSyncError):
            syncer.sync(1)
    ask(url, "POST", "/resume")
    with pytest.raises(urllib.error.URLError):
        complete(url, PROMPTS[0], timeout_s=30, temperature=0, max_tokens=12)
