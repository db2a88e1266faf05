"""Folders of checkpoints: names, completeness, and staging and publishing by one rename. Reads names and the tracker, no tensor.

    <root>/global_step_N/
        actor/hf_model/                               for transformers and vLLM
        actor/hf_adapter/                             of a run with adapters: these alone, for PEFT and vLLM
        actor/iter_XXXXXXX/mp_rank_TT[_PPP][_EEE]/    Megatron's own shards
        actor/*/checksums.json                        of what was written to the files of each of these
        actor/latest_checkpointed_iteration.txt       written last
        data/data.pt                                  the driver's

Imports neither torch nor Megatron, so that what a run would resume is known before either is started.
"""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from rlsync.errors import CheckpointError, first_few
from rlsync.layout.topology import Topology

TRACKER = "latest_checkpointed_iteration.txt"
HF_FOLDER = "hf_model"
ADAPTER_FOLDER = "hf_adapter"
# What RLinf calls the same folder; read, never written.
HF_FOLDER_NAMES = (HF_FOLDER, "hf_checkpoint")
_STEP_FOLDER = re.compile(r"global_step_(\d+)")
_RANK_FOLDER = re.compile(r"mp_rank_(\d{2}(?:_\d{3})*)")


def rank_folder(topology: Topology, rank: int) -> str:
    """Name of the folder of the shards that ``rank`` holds, as in Megatron's ``torch`` format: ``mp_rank_TT[_PPP][_EEE]``.

    Ranks with one name hold the same parameters. Pipeline and expert ranks are left out where there is one, and an expert tensor rank
    stands behind them where the tensor rank does not tell it. Parameters that are no experts' lie in the files of all expert ranks.
    """
    at = topology.coordinates(rank)
    numbers = [getattr(at, axis) for axis in _axes(topology)]
    return "_".join(["mp_rank", f"{numbers[0]:02d}", *(f"{other:03d}" for other in numbers[1:])])


def rank_writers(topology: Topology) -> dict[str, int]:
    """By name of a folder the rank that writes it, in the order of the ranks: the lowest with that name.

    It is the first of its data-parallel groups, of experts and of all else, wherever a rank of its folder is: what such a group keeps at
    its first rank (the state of a distributed optimizer) is in that rank's folder.
    """
    found: dict[str, int] = {}
    for rank in range(topology.world_size):
        found.setdefault(rank_folder(topology, rank), rank)
    return found


def _axes(topology: Topology) -> tuple[str, ...]:
    used = {
        "tp_rank": True,
        "pp_rank": topology.pp_size > 1,
        "ep_rank": topology.ep_size > 1,
        "etp_rank": topology.tp_size % topology.etp_size != 0,
    }
    return tuple(axis for axis, is_used in used.items() if is_used)


@dataclass(frozen=True, slots=True)
class Restored:
    """What ``load_checkpoint`` puts back.

    Attributes:
        complete: False where only HF weights were there: the optimizer starts anew.
        moved: the shards were saved under another layout and are cut anew; random states start anew.
    """

    step: int
    complete: bool
    moved: bool = False


def inspect_checkpoint(folder: Path | str, *, tp_size: int, pp_size: int, ep_size: int = 1) -> Restored:
    """What ``load_checkpoint`` would restore from an ``actor/`` folder under these sizes; reads names only, no tensor.

    Raises CheckpointError for an incomplete folder. ``moved`` tells of another TP, PP or EP only: names do not tell of other axes.
    """
    folder = Path(folder)
    step = tracked_step(folder)
    shards = shards_folder(folder, step)
    if not shards.is_dir():
        if others := sorted(path.name for path in folder.glob("iter_*")):
            raise CheckpointError(
                f"{folder / TRACKER} names step {step}, and {folder} holds {first_few(others)}; it was put together from two checkpoints, "
                "or is damaged: resume from another one"
            )
        hf_folder(folder)
        return Restored(step, complete=False)
    return Restored(step, complete=True, moved=_is_moved(shards, tp_size, pp_size, ep_size))


def shards_folder(folder: Path, step: int) -> Path:
    """Megatron's shards of an ``actor/`` folder."""
    return folder / f"iter_{step:07d}"


def hf_folder(folder: Path) -> Path:
    """The HF weights of an ``actor/`` folder. Raises CheckpointError where it has none."""
    for name in HF_FOLDER_NAMES:
        if (folder / name).is_dir():
            return folder / name
    raise CheckpointError(f"{folder}: neither the tracked iter_* nor {' or '.join(HF_FOLDER_NAMES)} is there; nothing to resume from")


def tracked_step(actor_folder: Path) -> int:
    """The step an ``actor/`` folder holds; CheckpointError where its tracker is missing, as after a killed save."""
    tracker = actor_folder / TRACKER
    if not tracker.is_file():
        raise CheckpointError(f"{tracker} is missing: {actor_folder.parent} is not a complete checkpoint; resume from an older one")
    text = tracker.read_bytes().decode("utf-8", errors="replace").strip()
    if not text.isascii() or not text.isdigit():
        raise CheckpointError(f"{tracker} holds {text!r} instead of a step number")
    return int(text)


def stage_checkpoint(root: Path | str, step: int) -> Path:
    """An empty folder to write checkpoint ``step`` into, invisible to :func:`latest_checkpoint` until it is published."""
    staged = Path(root) / f".global_step_{step}.partial"
    _recover_replaced(Path(root))
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    return staged


def publish_checkpoint(staged: Path, *, keep_last_n: int | None = None) -> Path:
    """Give a complete staged checkpoint its name by one rename, then remove those before it but the ``keep_last_n`` newest.

    Raises CheckpointError where the staged folder has no tracker. Returns the published folder.
    """
    step = tracked_step(staged / "actor")
    final = staged.parent / f"global_step_{step}"
    if final.exists():
        # Same step again: a kill between the two renames is undone by _recover_replaced.
        outgoing = staged.parent / f".global_step_{step}.replaced"
        shutil.rmtree(outgoing, ignore_errors=True)
        os.rename(final, outgoing)
        os.rename(staged, final)
        shutil.rmtree(outgoing)
    else:
        os.rename(staged, final)
    sync_folder(staged.parent)
    if keep_last_n is not None:
        until_now = [path for path in complete_checkpoints(staged.parent) if step_of(path) <= step]
        for old in until_now[:-keep_last_n]:
            # Renamed first, so that a kill in the middle leaves no half checkpoint under a valid name.
            doomed = old.with_name(f".{old.name}.removed")
            os.rename(old, doomed)
            shutil.rmtree(doomed)
    return final


def set_aside_later(root: Path | str, step: int) -> list[Path]:
    """Take checkpoints after ``step`` out of sight: they are of a history that a run which continues from there leaves.

    Each becomes ``.global_step_N.superseded``, with a number behind it where that is taken. Returns their new paths.
    """
    aside = []
    for path in complete_checkpoints(root):
        if step_of(path) > step:
            superseded, number = path.with_name(f".{path.name}.superseded"), 0
            while superseded.exists():
                number += 1
                superseded = path.with_name(f".{path.name}.superseded.{number}")
            os.rename(path, superseded)
            aside.append(superseded)
    return aside


def step_of(folder: Path) -> int:
    """The step in the name of a published checkpoint."""
    match = _STEP_FOLDER.fullmatch(folder.name)
    assert match is not None, folder
    return int(match[1])


def complete_checkpoints(root: Path | str) -> list[Path]:
    """Published checkpoints of ``root``, oldest step first; unfinished ones are left out."""
    named = [path for path in Path(root).glob("global_step_*") if _STEP_FOLDER.fullmatch(path.name)]
    return sorted((path for path in named if (path / "actor" / TRACKER).is_file()), key=step_of)


def latest_checkpoint(root: Path | str) -> Path | None:
    """The complete checkpoint with the highest step, or None."""
    _recover_replaced(Path(root))
    found = complete_checkpoints(root)
    return found[-1] if found else None


def remove_remains(root: Path | str) -> list[Path]:
    """Remove what killed saves have left in ``root``: unfinished checkpoints, and those that were being removed. Returns their paths.

    For whoever is the only one to write checkpoints there.
    """
    _recover_replaced(Path(root))
    remains = [path for end in ("partial", "removed", "replaced") for path in sorted(Path(root).glob(f".global_step_*.{end}"))]
    for path in remains:
        shutil.rmtree(path)
    return remains


def _recover_replaced(root: Path) -> None:
    """Give a checkpoint its name back that a kill in the middle of its replacement left without one."""
    for path in root.glob(".global_step_*.replaced"):
        final = path.with_name(path.name.removeprefix(".").removesuffix(".replaced"))
        if not final.exists():
            os.rename(path, final)


def _is_moved(shards: Path, tp_size: int, pp_size: int, ep_size: int) -> bool:
    """Whether shards were saved under another TP, PP or EP. Raises CheckpointError where some are missing or empty."""
    found = [match[1] for path in shards.iterdir() if (match := _RANK_FOLDER.fullmatch(path.name))]
    if not found:
        raise CheckpointError(
            f"{shards}: no mp_rank_* folder, as in a checkpoint of another trainer; start a new run from its Hugging Face weights"
        )
    empty = [path for path in sorted(shards.glob("mp_rank_*/*.pt")) if path.stat().st_size == 0]
    if empty:
        raise CheckpointError(f"{empty[0]} has 0 bytes; resume from an older checkpoint")
    ranks = [tuple(map(int, numbers.split("_"))) for numbers in found]
    saved = [1 + max(rank[axis] for rank in ranks if len(rank) > axis) for axis in range(max(map(len, ranks)))]
    # Two numbers are of tensor and pipeline ranks, or of tensor and expert ranks.
    saved = [saved[0], 1, saved[1]] if len(saved) == 2 and pp_size == 1 and ep_size > 1 else [*saved, 1, 1][:3]
    if saved != [tp_size, pp_size, ep_size]:
        return True
    # Which expert ranks a tensor rank has depends on all axes; a folder that is missing is found by the rank that reads it.
    if ep_size == 1 and len(ranks) != tp_size * pp_size:
        raise CheckpointError(f"{shards}: {len(ranks)} mp_rank_* folders, expected {tp_size * pp_size}")
    return False


def write_durably(path: Path, text: str) -> None:
    """Write a small file that is there as a whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(partial, path)


def sync_folder(folder: Path) -> None:
    """Have the disk know the names in a folder."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
