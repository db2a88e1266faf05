"""Checksums beside the weights of a checkpoint: written when all ranks have written, and compared by them before anything is loaded.

A folder without sums, as other trainers and ``rlsync convert`` write it, is taken as it is. Knows no content of a file.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch.distributed as dist

from rlsync.bridge.checkpoint_folder import write_durably
from rlsync.copy.writes import Written, check_sums, read_sums
from rlsync.layout.safetensors import CHECKSUMS
from rlsync.megatron.parallel import compute_device
from rlsync.transport.collectives import agreed, gather_bytes


def write_sums(folder: Path, written: Sequence[Written]) -> None:
    """Write the CRC-32 of all that ranks have written below ``folder`` to a ``checksums.json`` in each of its folders that got some.

    Collective over all ranks; ``written`` is this rank's.
    """
    mine = [(str(one.file.relative_to(folder)), one.begin, one.end, one.crc) for one in written]
    gathered = gather_bytes(json.dumps(mine).encode(), device=compute_device())
    with agreed(device=compute_device()):
        if dist.get_rank() == 0:
            sums: dict[str, list[tuple[str, int, int, int]]] = defaultdict(list)
            for file, *rest in sorted(one for payload in gathered for one in json.loads(payload)):
                inner, _, path = file.partition("/")
                sums[inner].append((path, *rest))
            for inner, rows in sums.items():
                write_durably(folder / inner / CHECKSUMS, json.dumps(rows))


def check_written(folder: Path, files: Iterable[Path] | None = None) -> None:
    """Raise CheckpointError, on every rank, where files of a folder are no longer what was written. Ranks share the reading.

    Args:
        folder: with a ``checksums.json``, or without one, and nothing is compared.
        files: compare these alone; None: all that the sums are of.

    Collective over all ranks.
    """
    path, wanted = folder / CHECKSUMS, None if files is None else set(files)
    with agreed(device=compute_device()):
        if path.is_file():
            sums = [one for one in read_sums(path) if wanted is None or one.file in wanted]
            check_sums(sums[dist.get_rank() :: dist.get_world_size()], path)
