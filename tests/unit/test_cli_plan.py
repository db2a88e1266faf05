"""Claims about ``rlsync plan``: it counts what a sync would do, refuses what a sync would refuse, and needs no framework for it."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path
from typing import Any

import msgspec
import numpy
import pytest
import torch

from rlsync.cli import main
from rlsync.cli.pricing import Price, Settings, quote
from rlsync.cli.scene import Scene
from rlsync.cli.shapes import SHAPES
from rlsync.coordinator.messages import ActorHello, Recorded, Reports, WorkerHello
from rlsync.errors import ConfigError
from rlsync.layout.geometry import DTYPE_BYTES
from rlsync.layout.topology import Topology
from rlsync.models import check_config, model_of
from rlsync.models.paper import Seat
from rlsync.models.placement import megatron_placements
from rlsync.plan import packing
from rlsync.plan.transports import Memory
from rlsync.sync import SyncConfig
from rlsync.sync.planning import ConnectionPlan, plan_connection
from rlsync.transport import shm
from rlsync.transport.gloo import GlooCommunicator
from rlsync.transport.p2p import GroupSender, Inbox
from rlsync.transport.rendezvous import GroupInfo
from tests.deadlines import HANG_S
from tests.paper import paper_worker
from tests.planned import assigned

ROOT = Path(__file__).resolve().parents[2]
QWEN_7B: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"], "hidden_size": 3584, "intermediate_size": 18944, "vocab_size": 152064,
    "num_attention_heads": 28, "num_key_value_heads": 4, "num_hidden_layers": 28, "dtype": "bfloat16", "tie_word_embeddings": False,
}  # fmt: skip
QWEN_72B = QWEN_7B | {
    "hidden_size": 8192, "intermediate_size": 29568, "num_attention_heads": 64, "num_key_value_heads": 8, "num_hidden_layers": 80,
}  # fmt: skip
# Two layers, a vocabulary that both sides pad, fewer key-value heads than an engine of four has ranks, and no size that is aligned.
SMALL = QWEN_7B | {
    "hidden_size": 100, "intermediate_size": 180, "vocab_size": 131, "num_attention_heads": 4, "num_key_value_heads": 2,
    "num_hidden_layers": 2, "head_dim": 26,
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> str:
    (tmp_path / "config.json").write_text(json.dumps(QWEN_7B))
    return str(tmp_path)


def priced(config: dict[str, Any], scene: Scene, **settings: Any) -> Price:
    found = quote(config, scene, Settings(**settings))
    assert found.refusals == () and found.price is not None, found.refusals
    return found.price


def test_plan_counts_the_bytes_of_a_model_it_never_sees(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", folder, "--actor", "tp=2,dp=2", "--rollout", "tp=2,engines=2", "--json"]) == 0
    price = json.loads(capsys.readouterr().out)
    assert price["refusals"] == []
    assert price["tensor_bytes"] == 15_231_233_024, "7.6e9 parameters in bf16, as the published checkpoint"
    assert price["num_tensors"] == 339 and price["actor_ranks"] == 4 and price["engine_workers"] == 4
    assert price["workers_by_transport"] == {"ipc": 4} and price["num_destinations"] == 4, "each worker reads for itself"
    assert price["num_buckets"] == 1 and price["ring_bytes"] == 0, "parameters are read where they lie"
    low, high = price["given_bytes_per_actor_rank"]
    assert low > 0.4 * price["tensor_bytes"] and high < 0.6 * price["tensor_bytes"], "replicas share the work"
    assert price["redundancy_per_worker"] == [1.0, 1.0]
    assert price["bytes_same_host"] > price["tensor_bytes"] and price["bytes_other_host"] == 0


def test_the_table_says_what_the_json_says(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", folder, "--actor", "tp=4", "--rollout", "tp=2,engines=2", "--colocated"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "Qwen2ForCausalLM: 339 tensors, 14.2 GiB in bfloat16" in out
    assert "4 ranks on 1 host, each holds" in out and "4 workers on 1 host in 4 destinations" in out
    assert "ipc for 4 workers" in out and "1.00 times what it holds" in out


def reported(
    config: dict[str, Any], topology: Topology, tp_size: int, num_engines: int, colocated: bool, memory: Memory = "stable"
) -> Reports:
    """What a coordinator would tell of engines that hold what they hold on paper, all on one host, with a GPU each or an actor's."""

    def shared(gpu: int, pid: int) -> dict[str, Any]:
        return {
            "token": "t", "run_id": "r", "host": "host 0", "shm_domain": "d", "pid_domain": "p", "pid": pid, "gpu_uuid": f"gpu {gpu}",
        }  # fmt: skip

    size = topology.world_size
    actors = tuple(ActorHello(**shared(r, 1 + r), actor_rank=r, world_size=size, digest="", memory=memory) for r in range(size))
    places = [(e, r) for e in range(num_engines) for r in range(tp_size)]
    first = 0 if colocated else size
    workers = tuple(
        WorkerHello(**shared(first + i, 1 + size + i), engine_id=str(e), dp_index=0, worker_rank=r, world_size=tp_size, vllm_version="0")
        for i, (e, r) in enumerate(places)
    )
    model = model_of(config)
    records = tuple(Recorded(paper_worker(model, Seat(r, tp_size), holder=f"engine {e} worker {r}"), "direct") for e, r in places)
    return Reports(actors, workers, records)


LAYOUTS = pytest.mark.parametrize(
    ("axes", "tp_size", "num_engines"), [({"tp_size": 2, "pp_size": 2}, 4, 1), ({"tp_size": 2, "dp_size": 2}, 2, 2), ({}, 1, 3)]
)
BUCKET_BYTES = 25_000


def both_ways(
    axes: dict[str, int],
    tp_size: int,
    num_engines: int,
    transport: Any,
    bucket_bytes: int = BUCKET_BYTES,
    staging: Any = "auto",
    colocated: bool = False,
    offload_weight: bool = False,
) -> tuple[Price, ConnectionPlan]:
    """The same sync on paper and as a connection would plan it."""
    scene = Scene(axes, tp_size=tp_size, num_engines=num_engines, gpus_per_host=16, colocated=colocated)
    price = priced(
        SMALL,
        scene,
        bucket_bytes=bucket_bytes,
        transport=transport,
        staging=staging,
        offload_weight=offload_weight,
        engine_dtype="bfloat16",
    )
    model, topology = model_of(SMALL), Topology(**axes)
    reports = reported(SMALL, topology, tp_size, num_engines, colocated, "unstable" if offload_weight else "stable")
    config = SyncConfig(bucket_bytes=bucket_bytes, transport=transport, staging=staging)
    return price, plan_connection(model.tensors(), megatron_placements(model, topology), reports, config)


@LAYOUTS
@pytest.mark.parametrize("transport", ["shm", "gloo"])
def test_paper_agrees_with_what_a_connection_plans(axes: dict[str, int], tp_size: int, num_engines: int, transport: str) -> None:
    price, planned = both_ways(axes, tp_size, num_engines, transport)
    page_bytes, routes = 4096, planned.routes(2)
    slot_bytes = shm.slot_bytes(routes["shm"]) if transport == "shm" else 0
    assert price.slot_bytes == -(-slot_bytes // page_bytes) * page_bytes
    assert (price.num_buckets, price.num_destinations) == (len(planned.parts), planned.num_destinations)
    assert price.workers_by_transport == {planned.transport: tp_size * num_engines}
    by_link = (price.bytes_same_gpu, price.bytes_same_host, price.bytes_other_host)
    assert by_link == tuple(planned.traffic.bytes_by_link.values()) and sum(by_link) == planned.nbytes
    given = planned.traffic.bytes_by_source.values()
    assert price.given_bytes_per_actor_rank == (min(given), max(given))
    assert price.num_copies == sum(len(part.regions) for row in planned.parts for part in row)
    assert price.num_buckets > 5, "or the cut is not tried"


@pytest.mark.parametrize("colocated", [True, False])
@pytest.mark.parametrize("staging", ["auto", "always"])
@pytest.mark.parametrize("transport", ["auto", "ipc"])
def test_paper_finds_the_near_gpu_as_a_connection_does(transport: str, staging: str, colocated: bool) -> None:
    price, planned = both_ways({"tp_size": 2, "dp_size": 2}, 2, 2, transport, staging=staging, colocated=colocated)
    assert planned.transport == "ipc" and price.workers_by_transport == {"ipc": 4}
    assert (price.num_buckets, price.num_destinations) == (len(planned.parts), planned.num_destinations)
    assert (price.num_buckets == 1) == (staging == "auto") == planned.is_read_in_place
    by_link = (price.bytes_same_gpu, price.bytes_same_host, price.bytes_other_host)
    assert by_link == tuple(planned.traffic.bytes_by_link.values()) and sum(by_link) == planned.nbytes
    # An engine and a replica are cut alike, but for the padding of the vocabulary.
    assert by_link[0] > 0.9 * sum(by_link) if colocated else by_link == (0, sum(by_link), 0)
    given = planned.traffic.bytes_by_source.values()
    assert price.given_bytes_per_actor_rank == (min(given), max(given))
    stages = [2 * end.stage_bytes for end in assigned(planned).exporters]
    assert price.staging_bytes_per_actor_rank == (min(stages), max(stages)) and (staging == "always") == (min(stages) > 0)
    assert price.ring_bytes == price.slot_bytes == 0


@pytest.mark.parametrize(("tp_size", "num_engines"), [(2, 2), (1, 4)])
@pytest.mark.parametrize("colocated", [True, False])
def test_paper_finds_the_rings_of_weights_that_leave_as_a_connection_does(tp_size: int, num_engines: int, colocated: bool) -> None:
    price, planned = both_ways({"tp_size": 2, "dp_size": 2}, tp_size, num_engines, "ipc", colocated=colocated, offload_weight=True)
    # Engines that are cut as the actor is read other GPUs for what the padding of the vocabulary has shifted alone.
    assert price.num_buckets == len(planned.parts) and (price.num_buckets == 1) == (colocated and tp_size == 2)
    exporters = assigned(planned).exporters
    stages = [planned.num_slots(2) * end.stage_bytes for end in exporters]
    assert price.staging_bytes_per_actor_rank == (min(stages), max(stages)) and max(stages) > 0
    in_place = sum(r.nbytes for end in exporters for row in end.in_place for part in row for r in part.regions)
    assert in_place == price.bytes_same_gpu and bool(in_place) == colocated


def communicator(number: int) -> GlooCommunicator:
    """Never opened."""
    return GlooCommunicator(GroupInfo("127.0.0.1", 1, 0, ("nobody",)), number, 1.0)


@LAYOUTS
@pytest.mark.parametrize("bucket_bytes", [BUCKET_BYTES, 10**7])
def test_paper_counts_the_memory_of_messages(axes: dict[str, int], tp_size: int, num_engines: int, bucket_bytes: int) -> None:
    price, planned = both_ways(axes, tp_size, num_engines, "gloo", bucket_bytes)
    on_host, given = torch.device("cpu"), assigned(planned)
    sent = [GroupSender(end, communicator, on_host).nbytes for end in given.groups]
    assert price.outbox_bytes_per_actor_rank == (min(sent), max(sent)) and len(sent) == price.actor_ranks
    inboxes = [Inbox(each.parts, each.num_slots, 1, communicator(0), on_host) for each in given.workers]
    for inbox in inboxes:
        inbox._make_slots()
    taken = [inbox.nbytes for inbox in inboxes]
    assert price.inbox_bytes_per_worker == (min(taken), max(taken))
    assert price.ring_bytes == 0 < min(sent)


@LAYOUTS
@pytest.mark.parametrize("bucket_bytes", [2 * BUCKET_BYTES, 10**7])
def test_paper_counts_the_memory_of_steps(
    axes: dict[str, int], tp_size: int, num_engines: int, bucket_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "LEAST_PIECE_BYTES", 4096)
    price, planned = both_ways(axes, tp_size, num_engines, "nccl", bucket_bytes)
    assert (price.num_buckets, planned.num_steps > 1) == (1, bucket_bytes == 2 * BUCKET_BYTES)
    on_host, given = torch.device("cpu"), assigned(planned)
    assert {end.group.num_steps for end in given.groups} == {planned.num_steps}
    sent = [GroupSender(end, communicator, on_host).nbytes for end in given.groups]
    assert price.outbox_bytes_per_actor_rank == (min(sent), max(sent)) and len(sent) == price.actor_ranks
    inboxes = [Inbox(each.parts, each.num_slots, planned.num_steps, communicator(0), on_host) for each in given.workers]
    for inbox, share in zip(inboxes, given.workers, strict=True):
        specs = {b.name: b for b in planned.plan.destinations[share.destination].buffers}
        inbox.bind(0, {s.buffer: torch.empty(specs[s.buffer].shape, dtype=torch.bfloat16) for s in share.parts[0].segments})
    taken = [inbox.nbytes for inbox in inboxes]
    assert price.inbox_bytes_per_worker == (min(taken), max(taken))
    assert max(*sent, *taken) <= 2 * 1.2 * bucket_bytes


def test_neighbouring_workers_share_a_key_value_head() -> None:
    held = [paper_worker(model_of(SMALL), Seat(rank, 4), holder="w").pieces for rank in range(4)]
    keys = [next(p for p in pieces if p.tensor == "model.layers.0.self_attn.k_proj.weight") for pieces in held]
    assert [(p.box.start[0], p.box.stop[0]) for p in keys] == [(0, 26), (0, 26), (26, 52), (26, 52)]
    assert {(p.buffer, p.offset) for p in keys} == {("model.layers.0.self_attn.qkv_proj.weight", 26 * 100)}


def test_experts_that_do_not_come_out_even_are_shared_by_all_ranks_of_an_engine() -> None:
    """Eight of them by three ranks: three, three and two, each once."""
    price = priced(dict(SHAPES["tiny-moe"]), Scene({}, dp_size=3, ep_size=3))
    least, most = price.received_bytes_per_worker
    assert most - least == 4 * 3 * 128 * 64 * 2, "of four layers the three matrices of an expert"
    assert price.redundancy_per_worker == (1.0, 1.0) and price.heaviest_worker == "engine 0 worker 0"
    (refusal,) = quote(dict(SHAPES["tiny-moe"]), Scene({}, dp_size=9, ep_size=9), Settings()).refusals
    assert "has 8 experts; take fewer ranks" in refusal


def test_the_time_of_planning_is_that_of_the_processor_from_the_first_layout_on() -> None:
    began_s = time.process_time()
    price = priced(dict(SHAPES["tiny-moe"]) | {"num_experts": 64}, Scene({"dp_size": 4, "ep_size": 4}, dp_size=4, ep_size=4))
    spent_s = time.process_time() - began_s
    assert 0.95 * spent_s <= price.planning_s <= spent_s


def test_links_follow_from_where_the_engines_are() -> None:
    axes = {"tp_size": 4, "pp_size": 2}
    apart = priced(SMALL, Scene(axes, tp_size=4, num_engines=2, gpus_per_host=8))
    assert (apart.bytes_same_gpu, apart.bytes_same_host) == (0, 0) and apart.workers_by_transport == {"nccl": 8}
    together = priced(SMALL, Scene(axes, tp_size=4, num_engines=2, gpus_per_host=8, colocated=True))
    # A worker wants a quarter of each of two stages, and one of them is on its GPU.
    assert together.bytes_same_gpu > 0 < together.bytes_same_host and together.bytes_other_host == 0
    assert together.workers_by_transport == {"ipc": 8}
    through_host = priced(SMALL, Scene(axes, tp_size=4, num_engines=2, gpus_per_host=8, colocated=True), transport="shm")
    # However near the GPUs are.
    assert through_host.bytes_same_host > 0 == through_host.bytes_same_gpu == through_host.bytes_other_host
    beside = priced(SMALL, Scene(axes, tp_size=4, num_engines=2, gpus_per_host=16))
    assert beside.bytes_same_gpu == 0 == beside.bytes_other_host and beside.engine_hosts == 1
    alone = priced(SMALL, Scene(axes, tp_size=4, num_engines=2, gpus_per_host=16, actor_hosts=1))
    assert alone.bytes_other_host > 0 == alone.bytes_same_host


def test_a_page_has_all_of_it_and_needs_nothing_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The map is decoded and held to the bytes between hosts, which a plan of each worker counts the same."""
    file = tmp_path / "plan.html"
    words = ["plan", "tiny-moe", "--actor", "pp=2,dp=2,ep=2", "--rollout", "tp=2,ep=2,engines=3", "--gpus-per-host", "2"]
    assert main([*words, "--link", "nvlink=370e9,nic=44e9", "--html", str(file), "--json"]) == 0
    price, text = json.loads(capsys.readouterr().out), file.read_text()
    assert not re.search(r"(src|href)=(?!'data:)|https?:|<script", text), "nothing is loaded"
    for said in (
        "Qwen3MoeForCausalLM, 4 to 6 GPUs",
        "44 GB/s",
        "1.00 times what it holds",
        "other host",
        "seconds, predicted",
        "in 1 bucket",
    ):
        assert said in text
    traffic = price["host_traffic"]
    assert (traffic["actor_hosts"], traffic["engine_hosts"]) == (["host 0", "host 1"], ["host 2", "host 3", "host 4"])
    assert sum(map(sum, traffic["nbytes"])) == price["bytes_other_host"]
    (encoded,) = re.findall(r"data:image/png;base64,([\w+/=]+)", text)
    header, pixels = re.search(rb"IHDR(.{13}).*?IDAT(.*).{4}\0\0\0\0IEND", base64.b64decode(encoded), re.DOTALL).groups()  # type: ignore[union-attr]
    assert struct.unpack(">II", header[:8]) == (3, 2)
    rows = [line[1:] for line in batched(zlib.decompress(pixels), 13)]
    most = max(map(max, traffic["nbytes"]))
    assert [[row[4 * i + 3] for i in range(3)] for row in rows] == [[24 + n * 231 // most for n in row] for row in traffic["nbytes"]]


def batched(data: bytes, size: int) -> list[bytes]:
    return [data[begin : begin + size] for begin in range(0, len(data), size)]


def test_a_page_of_a_refusal_says_why(tmp_path: Path) -> None:
    file = tmp_path / "plan.html"
    assert main(["plan", "tiny-moe", "--actor", "dp=3,ep=3", "--rollout", "tp=2,dp=2,ep=2", "--html", str(file)]) == 1
    for said in ("num_experts 8 cannot be divided by ep_size 3", "vLLM shares experts among all 4 ranks of an engine or among none"):
        assert said in file.read_text()


def test_a_cast_counts_in_the_engines_bytes() -> None:
    scene = Scene({}, tp_size=1)
    whole, half = priced(SMALL, scene, dtype="float32", engine_dtype="bfloat16"), priced(SMALL, scene, dtype="float32")
    assert (whole.dtype, whole.engine_dtype, half.engine_dtype) == ("float32", "bfloat16", "float32")
    assert 2 * whole.received_bytes_per_worker[0] == half.received_bytes_per_worker[0]


def test_one_layer_is_what_layerwise_takes() -> None:
    model = model_of(SMALL)
    sizes: dict[str, int] = {}
    for buffer in paper_worker(model, Seat(0), holder="w").buffers:
        module = buffer.name.rpartition(".")[0]
        sizes[module] = sizes.get(module, 0) + buffer.size * DTYPE_BYTES[buffer.dtype]
    # A bucket for each tensor: a module of two tensors is in progress alone, a smaller one beside it never.
    for transport in ("ipc", "shm"):
        assert priced(SMALL, Scene({}), bucket_bytes=1, transport=transport).layerwise_extra_bytes == max(sizes.values())
    assert priced(SMALL, Scene({})).layerwise_extra_bytes == sum(sizes.values()), "one bucket has all of them in progress"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--actor", "tp=8"], ["28 attention heads cannot be divided by a tensor axis of 8 ranks"]),
        (
            ["--actor", "tp=8", "--rollout", "tp=3"],
            ["cannot be divided by a tensor axis of 8 ranks", "self_attn.qkv_proj.weight: 28 attention heads cannot be divided by 3 ranks"],
        ),
        (["--actor", "pp=3"], ["28 layers cannot be split over pp_size 3"]),
        (["--actor", "tp=2", "--rollout", "engines=4", "--colocated"], ["4 engine workers cannot share the GPUs of 2 actor ranks"]),
        (["--actor", "dp=4", "--gpus-per-host", "2", "--actor-hosts", "1"], ["4 actor ranks do not fit on 1 hosts of 2 GPUs"]),
        (["--gpus-per-host", "1", "--transport", "ipc"], ["transport is ipc, but 1 of 1"]),
        (["--transport", "nccl", "--colocated"], ["transport is nccl, but 1 GPUs are shared, and NCCL takes one member on each"]),
        (["--gpus-per-host", "1", "--transport", "shm"], ["1 of 1 workers do not share a host with every actor rank"]),
        (["--shm-bytes", "1000000", "--transport", "shm"], ["/dev/shm has 1000000 bytes, the ring needs 21"]),
        (["--dtype", "bf16"], ["dtype bf16 is not supported of an actor; use one of float32, bfloat16, float16"]),
        (["--engine-dtype", "bf16"], ["of engine 0 worker 0 has dtype bf16, of which no size is known"]),
        (["--engine-dtype", "int8"], ["int8 in engine 0 worker 0, bfloat16 in actor 0"]),
    ],
)
def test_what_a_sync_would_refuse_is_refused_with_its_reason(
    folder: str, arguments: list[str], said: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", folder, *arguments, "--json"]) == 1
    refusals = json.loads(capsys.readouterr().out)["refusals"]
    assert len(refusals) == len(said)
    assert all(part in refusal for part, refusal in zip(said, refusals, strict=True)), refusals
    assert main(["plan", folder, *arguments]) == 1
    assert capsys.readouterr().out.count("refused: ") == len(said)


@pytest.mark.parametrize(
    ("changes", "axes"),
    [
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, {}),
        ({"quantization_config": {"quant_method": "fp8"}}, {}),
        ({"model_type": "mistral", "num_hidden_layers": "many"}, {}),
        ({"partial_rotary_factor": 0.5, "is_causal": False}, {}),
        ({}, {"pp_size": 2, "vpp_size": 3, "first_stage_layers": 14, "last_stage_layers": 14}),
        ({}, {"tp_size": 3}),
    ],
)
def test_plan_refuses_what_the_actor_refuses(changes: dict[str, Any], axes: dict[str, int]) -> None:
    config = QWEN_7B | changes
    found = quote(config, Scene(axes=axes), Settings())
    try:
        findings = check_config(config, Topology(**axes))
    except ConfigError as error:
        findings = [str(error)]
    assert findings and found.price is None
    assert all(any(finding in refusal for refusal in found.refusals) for finding in findings), found.refusals


def test_plan_needs_only_msgspec_and_numpy_beside_python(folder: str, tmp_path: Path) -> None:
    """With this environment's packages out of sight, but for these two."""
    found = tmp_path / "packages"
    found.mkdir()
    for package in (msgspec, numpy):
        path = Path(str(package.__file__)).parent
        # Wheels have their shared libraries beside them.
        for part in (path, path.with_name(f"{path.name}.libs")):
            if part.is_dir():
                (found / part.name).symlink_to(part)
    run = subprocess.run(
        [sys.executable, "-S", "-m", "rlsync.cli", "plan", folder, "--rollout", "tp=2,engines=2"],
        cwd=tmp_path, env={"PYTHONPATH": f"{ROOT}{os.pathsep}{found}"}, capture_output=True, text=True, timeout=HANG_S,
    )  # fmt: skip
    assert run.returncode == 0 and "over links, in all" in run.stdout, run.stdout + run.stderr


def test_an_unknown_model_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["GPT2LMHeadModel"]}))
    assert main(["plan", str(tmp_path)]) == 1
    assert "refused: config.json: unknown architecture GPT2LMHeadModel" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--actor", "tensor=8"], "cannot read 'tensor=8'; write tp=N"),
        (["--actor", "tp=0"], "cannot read 'tp=0'"),
        (["--actor", "tp=²"], "cannot read 'tp=²'"),
        (["--rollout", "tp=2,tp=4"], "tp is given twice"),
        (["--bucket-bytes", "0"], "--bucket-bytes is 0; it must be at least 1"),
        (["--link", "nvlink=370e9,infiniband=44e9"], "cannot read 'infiniband=44e9'; write gpu=BYTES_PER_SECOND, nvlink=BYTES_PER_SECOND"),
        (["--link", "nic=-1"], "cannot read 'nic=-1'"),
        (["--link", "nic=1,nic=2"], "nic is given twice"),
        (["--html", "/absent/page.html"], "--html /absent/page.html: No such file or directory; name a file in a folder"),
    ],
)
def test_arguments_that_cannot_be_read_are_named(folder: str, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", folder, *arguments]) == 1
    assert said in capsys.readouterr().err


def test_a_file_that_is_no_config_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for text, said in (("{", "not JSON"), ("[]", "holds list, not the object")):
        (tmp_path / "config.json").write_text(text)
        assert main(["plan", str(tmp_path)]) == 1
        assert said in capsys.readouterr().err
    assert main(["plan", str(tmp_path / "absent")]) == 1
    assert "neither a known shape (tiny, " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("qwen2.5-7b", 7_615_616_512),
        ("qwen3-30b-a3b", 30_532_122_624),
        ("qwen3-235b-a22b", 235_093_634_560),
        ("moonlight-16b", 15_960_000_000),
        ("deepseek-v3", 671_026_419_200),
    ],
)
def test_shapes_have_as_many_parameters_as_what_they_are_called_after(name: str, parameters: int) -> None:
    """Of the published checkpoints."""
    assert sum(t.size for t in model_of(SHAPES[name]).tensors()) == pytest.approx(parameters, rel=1e-5)


def test_a_shape_of_the_bench_is_planned_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "tiny"]) == 0
    assert "Qwen2ForCausalLM: 51 tensors" in capsys.readouterr().out


def test_a_step_folder_says_where_its_model_is(folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    below = tmp_path / "global_step_10" / "actor" / "hf_model"
    below.mkdir(parents=True)
    shutil.copy(Path(folder) / "config.json", below)
    assert main(["plan", str(tmp_path / "global_step_10")]) == 1
    assert f"did you mean {below}?" in capsys.readouterr().err
    assert main(["plan", str(below)]) == 0


def test_plan_needs_no_torch_no_vllm_and_no_megatron(folder: str) -> None:
    absent = "import sys\nfor name in ('torch', 'vllm', 'megatron', 'ray', 'transformers'): sys.modules[name] = None\n"
    program = f"{absent}from rlsync.cli import main\nsys.exit(main(['plan', {folder!r}, '--json']))"
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=HANG_S)
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout)["num_tensors"] == 339


def test_64_actor_ranks_and_64_workers_of_72b_are_priced() -> None:
    scene = Scene({"tp_size": 8, "pp_size": 8}, tp_size=8, num_engines=8, colocated=True)
    price = priced(QWEN_72B, scene)
    assert (price.actor_ranks, price.engine_workers, price.actor_hosts) == (64, 64, 8)
    received = price.bytes_same_gpu + price.bytes_same_host + price.bytes_other_host
    # Key-value heads are as many as ranks, so each engine holds every element once, and norms on each rank.
    assert 8 * price.tensor_bytes < received < 8.01 * price.tensor_bytes
