"""What happens between two hosts, told as facts; ``near`` is the process of a rank.

The near host has the actor and an engine; it starts the far one, which has an engine and shares nothing with it but a cable.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

from rlsync.engine.handles.local import Completion, Engine
from rlsync.errors import RlsyncError, WeightSyncError
from rlsync.sync import SyncConfig, WeightSyncer
from tests.integration import far_engine, hosts
from tests.integration.engine_source import NUM_BLOCKS, FolderSource, call_on_fill, read_folder
from tests.integration.far_engine import FarEngine
from tests.ranks import make_process

NEAR, FAR = "10.77.0.1", "10.77.0.2"
TIMEOUT_S = 8.0
PROMPTS = ((3, 5, 7, 9), (11, 2, 100, 130, 4), (1,))
GREEDY = {"temperature": 0.0, "max_tokens": 12, "ignore_eos": True}

Facts = dict[str, Any]


def start(engine_id: str, folder: str) -> Engine:
    args = {"model": folder, "skip_tokenizer_init": True, "dtype": "float32", "max_model_len": 128, "enforce_eager": True}
    engine = Engine(engine_id, {**args, "max_num_seqs": 8, "num_gpu_blocks_override": NUM_BLOCKS})
    engine.start()
    return engine


def far(pipe: Connection, folder: str) -> None:
    """The far host: waits for its end of the cable, starts its engine, and answers calls."""
    hosts.enter_namespaces(*hosts.HOST)
    hosts.fork_here()
    hosts.settle("far-host")
    assert pipe.recv() == "the cable is there"
    hosts.set_address("eth-far", FAR)
    engine = start("far", folder)
    pipe.send("ready")
    far_engine.serve(engine, pipe)
    engine.close()


def near(result: str, first: str, second: str) -> None:
    """The near host: sync both engines, cut the cable, mend it, stop and kill the far worker; writes the facts to ``result``."""
    hosts.enter_namespaces(*hosts.HOST)
    hosts.fork_here()
    hosts.settle("near-host")
    pipe, there = Pipe()
    process = make_process(far, there, first, daemon=False)
    process.start()
    there.close()
    assert process.pid is not None
    _until_elsewhere(process.pid)
    hosts.lay_cable("eth-near", "eth-far", process.pid)
    hosts.set_address("eth-near", NEAR)
    pipe.send("the cable is there")
    with ThreadPoolExecutor(1) as pool:
        starting = pool.submit(start, "near", second)
        assert pipe.poll(300) and pipe.recv() == "ready"
        engines = starting.result(), FarEngine("far", pipe)
    try:
        facts = _story(*engines, first, second)
        with open(result, "w") as file:
            json.dump(facts, file, default=list)
    finally:
        engines[0].close()
        pipe.send(None)
        process.join(60)


def _until_elsewhere(pid: int) -> None:
    """``unshare`` needs a moment to leave this network namespace."""
    while os.readlink(f"/proc/{pid}/ns/net") == os.readlink("/proc/self/ns/net"):
        time.sleep(0.01)


def _story(near_engine: Engine, far_engine: FarEngine, first: str, second: str) -> Facts:
    facts: Facts = {"held bytes": sum(t.nbytes for t in read_folder(second).values())}
    facts["fresh first"], facts["fresh second"] = _answers(far_engine), _answers(near_engine)
    before = hosts.listeners(), far_engine.call("listeners")
    source = FolderSource(read_folder(second))
    syncer = WeightSyncer(source, [near_engine, far_engine], _config())
    syncer.connect()
    facts["near listeners"], facts["far listeners"] = hosts.listeners() - before[0], far_engine.call("listeners") - before[1]
    for version in (1, 2):
        carried = hosts.carried_bytes("eth-near")
        report = syncer.sync(version)
        received, sent = (b - a for a, b in zip(carried, hosts.carried_bytes("eth-near"), strict=True))
        facts[f"sync {version}"] = {
            "transport": report.transport, "bytes": report.bytes, "links": report.bytes_by_link, "redundancy": report.max_redundancy,
            "received": received, "sent": sent, "near": _answers(near_engine), "far": _answers(far_engine),
        }  # fmt: skip

    facts["cut"] = _fault(syncer, far_engine, 3, lambda: hosts.set_link("eth-near", up=False))
    hosts.set_link("eth-near", up=True)
    source.take(read_folder(first))
    facts["after the cut"] = _complete(syncer, near_engine, far_engine, 4)

    facts["stopped"] = _fault(
        syncer, far_engine, 5, lambda: far_engine.call("worker", "suspend"), lambda: far_engine.call("worker", "resume")
    )
    facts["after the stop"] = _complete(syncer, near_engine, far_engine, 6)
    syncer.close()
    # Threads of gloo close theirs behind the call.
    deadline = time.monotonic() + 5
    while hosts.listeners() - before[0] and time.monotonic() < deadline:
        time.sleep(0.1)
    facts["listeners after close"] = hosts.listeners() - before[0]

    syncer.connect()
    facts["killed"] = _fault(syncer, far_engine, 1, lambda: far_engine.call("worker", "kill"))
    syncer.close()
    far_engine.call("close")
    near_engine.close()
    facts["processes left"] = far_engine.call("num_processes")
    facts["rings left"] = [name for name in os.listdir("/dev/shm") if name.startswith("rlsync-ring-")]
    time.sleep(0.5)
    facts["threads left"] = [t.name for t in threading.enumerate() if t.name.startswith(("rlsync-coordinator", "rlsync-packer"))]
    return facts


def _config() -> SyncConfig:
    return SyncConfig(bucket_bytes=100_000, timeout_s=TIMEOUT_S, bind_host=NEAR, verify="full")


def _complete(syncer: WeightSyncer, near_engine: Engine, far_engine: FarEngine, version: int) -> Facts:
    """The sync after a fault, in the same connection or, where that is refused, in a new one."""
    try:
        syncer.sync(version)
        anew = ""
    except WeightSyncError as error:
        anew = str(error)
        syncer.close()
        syncer.connect()
        syncer.sync(version)
    return {"connected anew because": anew, "near": _answers(near_engine), "far": _answers(far_engine)}


def _fault(
    syncer: WeightSyncer, far_engine: FarEngine, version: int, fault: Callable[[], None], mend: Callable[[], None] | None = None
) -> Facts:
    """One sync with a fault before its third bucket is filled. ``mend``: what lets a worker go on that cannot leave before."""
    call_on_fill(syncer, lambda bucket: fault() if bucket == 2 else None)
    started_s = time.monotonic()
    far_engine.took_s.pop("update_weights", None)
    try:
        syncer.sync(version)
        error = None
    except WeightSyncError as raised:
        error = raised
    took_s = time.monotonic() - started_s
    call_on_fill(syncer, lambda bucket: None)
    refusal = _refusal(far_engine)
    if mend is not None:
        mend()
    _wait_for(lambda: "update_weights" in far_engine.took_s, 10 * TIMEOUT_S)
    return {
        "seconds": took_s, "error": None if error is None else {"text": str(error), "phase": error.phase, "engine": error.engine},
        "refusal": refusal, "far seconds": far_engine.took_s.get("update_weights"),
    }  # fmt: skip


def _wait_for(condition: Callable[[], bool], timeout_s: float) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < deadline_s:
        time.sleep(0.05)


def _refusal(engine: FarEngine) -> str:
    try:
        engine.generate(PROMPTS, GREEDY)
    except RlsyncError as error:
        return str(error)
    return ""


def _answers(engine: Any) -> list[Any]:
    answers: list[tuple[Completion, ...]] = engine.generate(PROMPTS, GREEDY)
    return [[asdict(c) for c in row] for row in answers]
