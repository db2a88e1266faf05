"""``rlsync plan``: what a sync of a model between two layouts moves and needs, from a config.json alone, and what it would refuse.

Owns arguments and output; ``pricing`` computes.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rlsync.cli.lines import amount, between, milliseconds, wrapped
from rlsync.cli.page import page
from rlsync.cli.prediction import links_of
from rlsync.cli.pricing import Price, Quote, Settings, quote
from rlsync.cli.scene import AXES, ENGINES, STAGES, Scene, sizes
from rlsync.cli.shapes import SHAPES, shape_of
from rlsync.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help=f"config.json, or the folder that holds it, or one of {', '.join(SHAPES)}")
    parser.add_argument(
        "--actor", default="tp=1", help="sizes of the actor's axes, as tp=8,pp=8,dp=1; also vpp, cp, ep, etp, and layers: first, last"
    )
    parser.add_argument(
        "--rollout", default="tp=1,engines=1", help="the engines, as tp=8,engines=8; also dp, and ep=tp*dp for expert parallelism"
    )
    parser.add_argument("--gpus-per-host", type=int, default=8, help="GPUs are taken in order: the actor's, then the engines'")
    parser.add_argument("--actor-hosts", type=int, help="hosts for the actor alone; default: engines may share its last one")
    parser.add_argument("--colocated", action="store_true", help="engines are on the actor's GPUs")
    parser.add_argument("--dtype", help="of the actor's parameters; default: the config's")
    parser.add_argument("--engine-dtype", help="of the engines' parameters; default: the actor's")
    parser.add_argument("--bucket-bytes", type=int, default=256 * 2**20, help="weight_sync.bucket_bytes")
    parser.add_argument("--num-slots", type=int, default=2, help="weight_sync.num_slots")
    parser.add_argument("--transport", choices=("auto", "ipc", "shm", "nccl", "gloo"), default="auto", help="weight_sync.transport")
    parser.add_argument("--staging", choices=("auto", "always"), default="auto", help="weight_sync.staging")
    parser.add_argument("--offload-weight", action="store_true", help="actor.offload_weight: parameters leave the GPUs between syncs")
    parser.add_argument("--shm-bytes", type=int, help="size of /dev/shm on the actor's host: refuse a ring that does not fit")
    parser.add_argument(
        "--make-vocab-size-divisible-by", type=int, default=1, help="the actor pads its vocabulary to a multiple of this times tp"
    )
    parser.add_argument(
        "--link", help="bytes per second that arrive at one GPU, as nvlink=370e9,nic=44e9; also gpu, of a copy on one: predict seconds"
    )
    parser.add_argument("--html", type=Path, help="write a page with all of it, and a map of who gives to whom, into this file")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")


def run(arguments: argparse.Namespace) -> int:
    """Print price and refusals; 1 where a sync would be refused. Raises ConfigError for arguments that cannot be read."""
    config = shape_of(arguments.config)
    scene = Scene(
        axes=sizes(arguments.actor, AXES | STAGES, "--actor"),
        **sizes(arguments.rollout, ENGINES, "--rollout"),
        gpus_per_host=_positive(arguments.gpus_per_host, "--gpus-per-host"),
        colocated=arguments.colocated,
        actor_hosts=arguments.actor_hosts,
    )
    settings = Settings(
        dtype=arguments.dtype,
        engine_dtype=arguments.engine_dtype,
        bucket_bytes=_positive(arguments.bucket_bytes, "--bucket-bytes"),
        num_slots=_positive(arguments.num_slots, "--num-slots"),
        transport=arguments.transport,
        staging=arguments.staging,
        offload_weight=arguments.offload_weight,
        shm_bytes=arguments.shm_bytes,
        make_vocab_size_divisible_by=_positive(arguments.make_vocab_size_divisible_by, "--make-vocab-size-divisible-by"),
        links={} if arguments.link is None else links_of(arguments.link),
    )
    found = quote(config, scene, settings)
    if arguments.html is not None:
        _write_page(arguments.html, found, settings.links)
    print(json.dumps(_flat(found)) if arguments.json else _shown(found))
    return 1 if found.refusals else 0


def _write_page(path: Path, found: Quote, links: Mapping[str, float]) -> None:
    rows = [] if found.price is None else _rows(found.price)
    try:
        path.write_text(page(found, rows, shlex.join(["rlsync", *sys.argv[1:]]), links), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--html {path}: {error.strerror}; name a file in a folder that can be written") from None


def _positive(value: int, option: str) -> int:
    if value < 1:
        raise ConfigError(f"{option} is {value}; it must be at least 1")
    return value


def _flat(found: Quote) -> dict[str, Any]:
    return {"refusals": list(found.refusals), **({} if found.price is None else asdict(found.price))}


def _shown(found: Quote) -> str:
    rows = [] if found.price is None else _rows(found.price)
    priced = [wrapped(f"{name:<26} {text}", indent=27) for name, text in rows]
    return "\n".join([*priced, *(wrapped(f"refused: {text}") for text in found.refusals)])


def _rows(p: Price) -> list[tuple[str, str]]:
    transports = ", ".join(f"{name} for {_many(count, 'worker')}" for name, count in sorted(p.workers_by_transport.items()))
    cast = "" if p.dtype == p.engine_dtype else f", cast to {p.engine_dtype}"
    links = (("same GPU", p.bytes_same_gpu), ("same host", p.bytes_same_host), ("other host", p.bytes_other_host))
    actor, engines = f"{_many(p.actor_ranks, 'rank')} on {_many(p.actor_hosts, 'host')}", _many(p.engine_workers, "worker")
    return [
        ("model", f"{p.architecture}: {p.num_tensors:,} tensors, {amount(p.tensor_bytes)} in {p.dtype}{cast}"),
        ("actor", f"{actor}, each holds {between(p.held_bytes_per_actor_rank)}"),
        ("engines", f"{engines} on {_many(p.engine_hosts, 'host')} in {_many(p.num_destinations, 'destination')}"),
        ("transport", transports),
        ("given per actor rank", f"{between(p.given_bytes_per_actor_rank)}, most by {p.heaviest_actor_rank}"),
        ("received per worker", f"{between(p.received_bytes_per_worker)}, most by {p.heaviest_worker}, {_redundancy(p)}"),
        ("over links, in all", ", ".join(f"{amount(nbytes)} {link}" for link, nbytes in links)),
        ("a step", f"{p.num_copies:,} copies in {_many(p.num_buckets, 'bucket')}"),
        *_staging(p),
        *_seconds(p),
        ("extra in a worker", f"none with the direct sink, up to {amount(p.layerwise_extra_bytes)} with layerwise"),
        ("planned in", f"{p.planning_s:.1f} s of one processor"),
    ]


def _redundancy(p: Price) -> str:
    return f"{p.redundancy_per_worker[1]:.2f} times what it holds"


def _seconds(p: Price) -> list[tuple[str, str]]:
    """Where speeds were asked for."""
    if p.prediction is None:
        return [("seconds", f"not predicted: {p.unpredicted}")] if p.unpredicted else []
    whole, data, floor = map(milliseconds, (p.prediction.whole_s, p.prediction.data_s, p.prediction.floor_s))
    return [
        ("seconds, predicted", f"{whole} from pause to resume, of which data {data}; the floor is {floor}: {p.prediction.limit} that long")
    ]


def _staging(p: Price) -> list[tuple[str, str]]:
    rows = []
    if p.ring_bytes:
        rows.append(("ring", f"{amount(p.ring_bytes)} in /dev/shm, in slots of {amount(p.slot_bytes)}"))
    if p.staging_bytes_per_actor_rank[1]:
        rows.append(("staging ring", f"{between(p.staging_bytes_per_actor_rank)} of GPU memory in each actor rank"))
    if p.outbox_bytes_per_actor_rank[1]:
        sent, taken = between(p.outbox_bytes_per_actor_rank), between(p.inbox_bytes_per_worker)
        rows.append(("messages", f"{sent} in each actor rank, {taken} in each worker"))
    return rows


def _many(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'s' * (count != 1)}"
