"""Which folders count as checkpoints. No process group: these functions only look at names."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import pytest

from rlsync.bridge.checkpoint_folder import (
    complete_checkpoints,
    inspect_checkpoint,
    latest_checkpoint,
    publish_checkpoint,
    rank_folder,
    rank_writers,
    remove_remains,
    set_aside_later,
    stage_checkpoint,
    tracked_step,
)
from rlsync.errors import CheckpointError
from rlsync.layout.topology import Topology
from tests.counted import num_calls


def staged(root: Path, step: int, *, complete: bool = True, content: str = "") -> Path:
    folder = stage_checkpoint(root, step)
    (folder / "actor").mkdir()
    (folder / "content").write_text(content)
    if complete:
        (folder / "actor" / "latest_checkpointed_iteration.txt").write_text(str(step))
    return folder


def test_what_killed_saves_left_is_removed_and_nothing_else(tmp_path):
    for step in (1, 2, 3):
        publish_checkpoint(staged(tmp_path, step))
    os.rename(tmp_path / "global_step_3", tmp_path / ".global_step_3.replaced")  # killed between the two renames
    kept = [tmp_path / ".global_step_9.superseded", *complete_checkpoints(tmp_path), tmp_path / "global_step_3"]
    kept[0].mkdir()
    remains = [staged(tmp_path, 4), staged(tmp_path, 5, complete=False)]
    for path in (tmp_path / ".global_step_0.removed", tmp_path / ".global_step_2.replaced"):
        (path / "actor").mkdir(parents=True)
        remains.append(path)
    assert sorted(remove_remains(tmp_path)) == sorted(remains)
    assert sorted(tmp_path.iterdir()) == sorted(kept)
    assert remove_remains(tmp_path) == [] and remove_remains(tmp_path / "none") == []


def test_newest_counts_by_step_and_not_by_name_or_time(tmp_path):
    for step in (9, 100, 20):
        publish_checkpoint(staged(tmp_path, step))
    assert latest_checkpoint(tmp_path) == tmp_path / "global_step_100"


def test_unfinished_and_foreign_folders_do_not_count(tmp_path):
    publish_checkpoint(staged(tmp_path, 1))
    staged(tmp_path, 2)
    (tmp_path / "global_step_3" / "actor").mkdir(parents=True)
    (tmp_path / "global_step_x").mkdir()
    assert complete_checkpoints(tmp_path) == [tmp_path / "global_step_1"]
    assert latest_checkpoint(tmp_path / "nowhere") is None


def test_an_incomplete_stage_is_not_published(tmp_path):
    with pytest.raises(CheckpointError, match=r"latest_checkpointed_iteration\.txt is missing"):
        publish_checkpoint(staged(tmp_path, 4, complete=False))
    assert latest_checkpoint(tmp_path) is None


def test_only_the_newest_are_kept(tmp_path):
    for step in range(1, 6):
        publish_checkpoint(staged(tmp_path, step), keep_last_n=2)
    assert [p.name for p in complete_checkpoints(tmp_path)] == ["global_step_4", "global_step_5"]
    assert {p.name for p in tmp_path.iterdir()} == {"global_step_4", "global_step_5"}


def test_the_same_step_again_replaces_the_old_one(tmp_path):
    publish_checkpoint(staged(tmp_path, 3, content="old"))
    final = publish_checkpoint(staged(tmp_path, 3, content="new"))
    assert (final / "content").read_text() == "new" and {p.name for p in tmp_path.iterdir()} == {"global_step_3"}


def test_a_tracker_that_is_no_number_is_an_error(tmp_path):
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("release")
    with pytest.raises(CheckpointError, match="'release' instead of a step number"):
        tracked_step(tmp_path)


def test_a_tracker_of_another_step_than_the_shards_is_an_error(tmp_path):
    """And not taken for a checkpoint of Hugging Face weights alone, of whose optimizer nothing would be left."""
    actor = publish_checkpoint(staged(tmp_path, 3)) / "actor"
    (actor / "iter_0000002").mkdir()
    (actor / "hf_model").mkdir()
    with pytest.raises(CheckpointError, match=r"names step 3, and .* holds iter_0000002; it was put together from two checkpoints"):
        inspect_checkpoint(actor, tp_size=1, pp_size=1)
    (actor / "iter_0000002").rmdir()
    assert not inspect_checkpoint(actor, tp_size=1, pp_size=1).complete


def test_the_checkpoint_just_written_is_kept_whatever_later_ones_lie_there(tmp_path):
    """As after a resume from an older step."""
    for step in (2, 4, 6):
        publish_checkpoint(staged(tmp_path, step))
    final = publish_checkpoint(staged(tmp_path, 3), keep_last_n=1)
    assert final.exists() and [p.name for p in complete_checkpoints(tmp_path)] == ["global_step_3", "global_step_4", "global_step_6"]


def test_later_checkpoints_of_another_history_are_set_aside_and_not_lost(tmp_path):
    for run in "ab":
        for step in (2, 4, 6):
            publish_checkpoint(staged(tmp_path, step, content=f"{run}{step}"))
        aside = set_aside_later(tmp_path, 2)
        assert [(path / "content").read_text() for path in aside] == [f"{run}4", f"{run}6"]
    assert latest_checkpoint(tmp_path) == tmp_path / "global_step_2"
    assert [(path.name, (path / "content").read_text()) for path in sorted(tmp_path.glob(".*"))] == [
        (".global_step_4.superseded", "a4"),
        (".global_step_4.superseded.1", "b4"),
        (".global_step_6.superseded", "a6"),
        (".global_step_6.superseded.1", "b6"),
    ]


def test_a_kill_between_the_renames_of_a_replacement_loses_nothing(tmp_path, monkeypatch):
    publish_checkpoint(staged(tmp_path, 3, content="old"))
    rename = os.rename

    def die(source, target):
        if str(source).endswith(".partial"):
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr(os, "rename", die)
    with pytest.raises(KeyboardInterrupt):
        publish_checkpoint(staged(tmp_path, 3, content="new"))
    assert complete_checkpoints(tmp_path) == [], "neither has its name"
    monkeypatch.setattr(os, "rename", rename)
    newest = latest_checkpoint(tmp_path)
    assert newest == tmp_path / "global_step_3" and (newest / "content").read_text() == "old"


TOPOLOGIES = [
    {"tp_size": tp, "cp_size": cp, "dp_size": dp, "pp_size": pp, "ep_size": ep, "etp_size": etp}
    for tp, cp, dp, pp, ep, etp in itertools.product((1, 2, 4), (1, 2), (1, 2, 3, 4), (1, 2), (1, 2, 4), (1, 2, 4))
    if tp * cp * dp % (ep * etp) == 0
]


def groups_of_megatron(topology: Topology, *, experts: bool) -> list[list[int]]:
    """Ranks that hold equal shards: the data-parallel groups (with context) that Megatron makes for this topology."""
    from megatron.core.parallel_state import RankGenerator

    if not experts:
        sizes = {"tp": topology.tp_size, "cp": topology.cp_size, "dp": topology.dp_size, "ep": 1}
        return RankGenerator(**sizes, pp=topology.pp_size, order="tp-cp-ep-dp-pp").get_ranks("dp-cp")
    replicas = topology.world_size // (topology.etp_size * topology.ep_size * topology.pp_size)
    sizes = {"tp": topology.etp_size, "cp": 1, "dp": replicas, "ep": topology.ep_size}
    return RankGenerator(**sizes, pp=topology.pp_size, order="tp-cp-ep-dp-pp").get_ranks("dp")


def test_every_rank_finds_its_shards_in_its_folder():
    """Under all axes together, against the groups that Megatron makes, in which dense parameters and experts are alike."""
    assert len(TOPOLOGIES) > 200
    for sizes in TOPOLOGIES:
        topology = Topology(**sizes)
        dense, experts = (groups_of_megatron(topology, experts=kind) for kind in (False, True))
        held = {
            rank: [next(n for n, group in enumerate(kind) if rank in group) for kind in (dense, experts)]
            for group in dense
            for rank in group
        }
        for rank in range(topology.world_size):
            writer = rank_writers(topology)[rank_folder(topology, rank)]
            assert rank_folder(topology, writer) == rank_folder(topology, rank) and held[writer] == held[rank], (sizes, rank)
        for group in (*dense, *experts):
            # A distributed optimizer keeps its state at the first rank of such a group, which has to write its folder.
            assert rank_writers(topology)[rank_folder(topology, min(group))] == min(group), (sizes, group)


def test_with_the_folders_of_tensor_ranks_alone_experts_would_be_lost():
    """Negative control: the names of a model without experts."""
    topology, dense = Topology(tp_size=2, dp_size=2, ep_size=4), Topology(tp_size=2, dp_size=2)
    written = {topology.coordinates(rank).ep_rank for rank in rank_writers(dense).values()}
    assert len(written) == 2 < topology.ep_size


def test_names_are_those_of_megatron_s_format():
    topology = Topology(tp_size=2, pp_size=2, dp_size=2, ep_size=2)
    assert rank_folder(Topology(tp_size=2), 1) == "mp_rank_01"
    assert rank_folder(Topology(tp_size=2, pp_size=2), 3) == "mp_rank_01_001"
    assert rank_folder(Topology(dp_size=2, ep_size=2), 1) == "mp_rank_00_001"
    assert [rank_folder(topology, rank) for rank in (0, 1, 7)] == ["mp_rank_00_000_000", "mp_rank_01_000_001", "mp_rank_01_001_001"]
    assert rank_folder(Topology(dp_size=2, etp_size=2), 1) == "mp_rank_00_001", "of one tensor rank, two expert tensor ranks"


def test_writers_of_twice_the_ranks_are_found_in_twice_the_work() -> None:
    """2,048 ranks were compared with one another: 25 s on each of them, before a resume."""
    work = [num_calls(lambda: rank_writers(Topology(pp_size=4, dp_size=dp, ep_size=dp))) for dp in (8, 16)]  # noqa: B023
    assert work[1] < 2.2 * work[0], work
