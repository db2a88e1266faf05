"""``rlsync plan``: what a sync of a model between two layouts moves and needs, from a config.json alone, and what it would refuse.

Owns arguments and output; ``pricing`` computes.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from rlsync.cli.lines import wrapped
from rlsync.cli.pricing import Price, Quote, Settings, quote
from rlsync.cli.scene import Scene
from rlsync.cli.shapes import SHAPES, shape_of
from rlsync.errors import ConfigError

_AXES = {
    "tp": "tp_size", "pp": "pp_size", "vpp": "vpp_size", "cp": "cp_size", "dp": "dp_size",
    "first": "first_stage_layers", "last": "last_stage_layers",
}  # fmt: skip
_ENGINES = {"tp": "tp_size", "engines": "num_engines"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help=f"config.json, or the folder that holds it, or one of {', '.join(SHAPES)}")
    parser.add_argument(
        "--actor", default="tp=1", help="sizes of the actor's axes, as tp=8,pp=8,dp=1; also vpp, cp, and layers: first, last"
    )
    parser.add_argument("--rollout", default="tp=1,engines=1", help="the engines, as tp=8,engines=8")
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
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")


def run(arguments: argparse.Namespace) -> int:
    """Print price and refusals; 1 where a sync would be refused. Raises ConfigError for arguments that cannot be read."""
    config = shape_of(arguments.config)
    scene = Scene(
        axes=_sizes(arguments.actor, _AXES, "--actor"),
        **_sizes(arguments.rollout, _ENGINES, "--rollout"),
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
    )
    found = quote(config, scene, settings)
    print(json.dumps(_flat(found)) if arguments.json else _shown(found))
    return 1 if found.refusals else 0


def _sizes(text: str, names: Mapping[str, str], option: str) -> dict[str, int]:
    sizes = {}
    for part in text.split(","):
        name, _, value = part.partition("=")
        if name not in names or not value.isdigit() or int(value) < 1:
            raise ConfigError(f"{option} {text!r}: cannot read {part!r}; write {', '.join(f'{n}=N' for n in names)}")
        if names[name] in sizes:
            raise ConfigError(f"{option} {text!r}: {name} is given twice")
        sizes[names[name]] = int(value)
    return sizes


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
        ("model", f"{p.architecture}: {p.num_tensors:,} tensors, {_amount(p.tensor_bytes)} in {p.dtype}{cast}"),
        ("actor", f"{actor}, each holds {_between(p.held_bytes_per_actor_rank)}"),
        ("engines", f"{engines} on {_many(p.engine_hosts, 'host')} in {_many(p.num_destinations, 'destination')}"),
        ("transport", transports),
        ("given per actor rank", _between(p.given_bytes_per_actor_rank)),
        ("received per worker", f"{_between(p.received_bytes_per_worker)}, {p.redundancy_per_worker[1]:.2f} times what it holds"),
        ("over links, in all", ", ".join(f"{_amount(nbytes)} {link}" for link, nbytes in links)),
        ("a step", f"{p.num_copies:,} copies in {_many(p.num_buckets, 'bucket')}"),
        *_staging(p),
        ("extra in a worker", f"none with the direct sink, up to {_amount(p.layerwise_extra_bytes)} with layerwise"),
        ("planned in", f"{p.planning_s:.1f} s"),
    ]


def _staging(p: Price) -> list[tuple[str, str]]:
    rows = []
    if p.ring_bytes:
        rows.append(("ring", f"{_amount(p.ring_bytes)} in /dev/shm, in slots of {_amount(p.slot_bytes)}"))
    if p.staging_bytes_per_actor_rank[1]:
        rows.append(("staging ring", f"{_between(p.staging_bytes_per_actor_rank)} of GPU memory in each actor rank"))
    if p.outbox_bytes_per_actor_rank[1]:
        sent, taken = _between(p.outbox_bytes_per_actor_rank), _between(p.inbox_bytes_per_worker)
        rows.append(("messages", f"{sent} in each actor rank, {taken} in each worker"))
    return rows


def _many(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'s' * (count != 1)}"


def _between(limits: tuple[int, int]) -> str:
    low, high = limits
    return _amount(low) if low == high else f"{_amount(low)} to {_amount(high)}"


def _amount(nbytes: int) -> str:
    return f"{nbytes / 2**20:,.1f} MiB" if nbytes < 10 * 2**30 else f"{nbytes / 2**30:,.1f} GiB"
