"""The process of one actor rank: ``python -m rlsync.bench.rank SPEC``, in an environment as torchrun makes it.

Rank 0 holds the engines, and writes what came out after each case, so that a failure leaves what there was before.
"""

from __future__ import annotations

import sys
import time
from importlib import import_module

import msgspec

from rlsync.bench import spec as specs
from rlsync.bench.actor import Actor
from rlsync.bench.measuring import Bench
from rlsync.bench.peers import Fleet
from rlsync.bench.remote import RemoteEngine
from rlsync.megatron.parallel import destroy_parallel
from rlsync.sync.config import LoraSync


def main(path: str) -> None:
    spec = specs.read(path)
    # The imports above took as long as the links take to be measured.
    specs.await_file(spec.floors_path, spec.start_s)
    begin_s = time.monotonic()
    actor = Actor(spec)
    built_s = time.monotonic() - begin_s
    if any(name.startswith("vllm") for name in spec.peers):
        # Takes seconds, in which the engines start.
        import_module("rlsync.engine.compat.transfer")
    engines: dict[LoraSync, list[RemoteEngine]] = {lora: [] for lora, _ in spec.hosts}
    if actor.rank == 0:
        for i, (lora, _) in enumerate(spec.hosts):
            engines[lora].append(RemoteEngine(f"engine{i}", spec.socket(i), spec.token, spec.start_s))
        print(f"actor built in {built_s:.1f} s, engines there after {time.monotonic() - begin_s:.1f} s", flush=True)
    fleets = {lora: Fleet(several, spec.timeout_s) for lora, several in engines.items()}
    bench = Bench(spec, actor, fleets)
    bench.warm_up()
    found: list[specs.Measured] = []
    for measure, what in [*((bench.sync, case) for case in spec.cases), *((bench.peer, name) for name in spec.peers)]:
        found.append(measure(what))  # type: ignore[operator]
        if actor.rank == 0:
            specs.write_file(spec.outcome_path, msgspec.json.encode(found).decode())
    for fleet in fleets.values():
        fleet.each(RemoteEngine.close)
    actor.settle()
    destroy_parallel()


if __name__ == "__main__":
    main(sys.argv[1])
