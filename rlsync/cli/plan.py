"""``rlsync plan``: what a sync of a model between two layouts moves and needs, computed from a config.json alone.

Prices the path that exists: actor ranks fill buckets of whole HF tensors in host shared memory, every engine worker of the
host reads all of them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rlsync.errors import ConfigError
from rlsync.families import model_of
from rlsync.links import traffic
from rlsync.placement.huggingface import whole_tensors
from rlsync.placement.megatron import megatron_placements
from rlsync.plan import build_plan
from rlsync.topology import Topology

_AXES = {"tp": "tp_size", "pp": "pp_size", "vpp": "vpp_size", "cp": "cp_size", "dp": "dp_size"}


@dataclass(frozen=True, slots=True)
class Price:
    """One sync on paper. Byte counts are exact; they hold for parameters of ``dtype``."""

    architecture: str
    dtype: str
    num_tensors: int
    tensor_bytes: int
    actor_ranks: int
    held_bytes_per_actor_rank: tuple[int, int]
    filled_bytes_per_actor_rank: tuple[int, int]
    num_copies: int
    num_buckets: int
    largest_bucket_bytes: int
    ring_bytes: int
    engine_workers: int
    read_bytes_per_worker: int
    plan_digest: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, help="config.json, or the folder that holds it")
    parser.add_argument("--actor", default="tp=1", help="sizes of the actor's axes, as tp=2,pp=2,vpp=2,cp=1,dp=4")
    parser.add_argument("--rollout", default="tp=1,engines=1", help="the engines on the actor's host, as tp=2,engines=2")
    parser.add_argument("--dtype", help="of the parameters; default: the config's")
    parser.add_argument("--bucket-bytes", type=int, default=256 * 2**20)
    parser.add_argument("--num-slots", type=int, default=2)
    parser.add_argument("--make-vocab-size-divisible-by", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")


def run(arguments: argparse.Namespace) -> int:
    """Print the price; refusals (layouts that cannot work) are raised as ConfigError or PlacementError."""
    path = arguments.config / "config.json" if arguments.config.is_dir() else arguments.config
    if not path.is_file():
        raise ConfigError(f"{path}: no such file; give a config.json or the folder that holds it")
    rollout = _sizes(arguments.rollout, {"tp": "tp", "engines": "engines"}, "--rollout")
    result = price(
        json.loads(path.read_text()),
        Topology(**_sizes(arguments.actor, _AXES, "--actor")),
        num_workers=rollout.get("tp", 1) * rollout.get("engines", 1),
        dtype=arguments.dtype,
        bucket_bytes=arguments.bucket_bytes,
        num_slots=arguments.num_slots,
        make_vocab_size_divisible_by=arguments.make_vocab_size_divisible_by,
    )
    print(json.dumps(asdict(result)) if arguments.json else _table(result))
    return 0


def price(
    config: Mapping[str, Any],
    topology: Topology,
    *,
    num_workers: int,
    dtype: str | None = None,
    bucket_bytes: int,
    num_slots: int,
    make_vocab_size_divisible_by: int = 1,
) -> Price:
    """Build the plan of a sync for an HF config and price it. Raises ConfigError or PlacementError where it cannot work."""
    model = model_of(config)
    tensors = model.tensors(dtype)
    placements = megatron_placements(model, topology, dtype=dtype, make_vocab_size_divisible_by=make_vocab_size_divisible_by)
    plan = build_plan(tensors, placements, [whole_tensors("buckets", tensors)], bucket_bytes=bucket_bytes)
    filled = traffic(plan).bytes_by_source.values()
    item = tensors[0].nbytes // tensors[0].size
    held = [sum(b.size for b in p.buffers) * item for p in placements]
    largest = max(sum(t.nbytes for t in bucket.tensors) for bucket in plan.buckets)
    total = sum(t.nbytes for t in tensors)
    return Price(
        architecture=config["architectures"][0],
        dtype=tensors[0].dtype,
        num_tensors=len(tensors),
        tensor_bytes=total,
        actor_ranks=topology.world_size,
        held_bytes_per_actor_rank=(min(held), max(held)),
        filled_bytes_per_actor_rank=(min(filled), max(filled)),
        num_copies=sum(len(bucket.copies) for bucket in plan.buckets),
        num_buckets=len(plan.buckets),
        largest_bucket_bytes=largest,
        ring_bytes=num_slots * largest,
        engine_workers=num_workers,
        read_bytes_per_worker=total,
        plan_digest=plan.digest,
    )


def _sizes(text: str, names: Mapping[str, str], option: str) -> dict[str, int]:
    sizes = {}
    for part in text.split(","):
        name, _, value = part.partition("=")
        if name not in names or not value.isdigit():
            raise ConfigError(f"{option} {text!r}: cannot read {part!r}; write {', '.join(f'{n}=N' for n in names)}")
        sizes[names[name]] = int(value)
    return sizes


def _table(price: Price) -> str:
    rows = []
    for name, value in asdict(price).items():
        shown = " .. ".join(map(_amount, value)) if isinstance(value, tuple) else _amount(value) if "bytes" in name else str(value)
        rows.append(f"{name.replace('_', ' '):<30} {shown}")
    return "\n".join(rows)


def _amount(nbytes: int) -> str:
    return f"{nbytes / 2**20:,.1f} MiB" if nbytes < 10 * 2**30 else f"{nbytes / 2**30:,.1f} GiB"
