"""Work on paper, before a byte moves, is done once for a model: not for each of its files, adapters, pipeline stages or ranks.

Models of tests have few of them, and real ones hundreds. Work is counted in calls of functions.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlsync.cli.shapes import SHAPES
from rlsync.convert.conversion import Request, prepare
from rlsync.convert.merging import FilePlanner
from rlsync.convert.sources import smallest_topology
from rlsync.copy.files import shard_files
from rlsync.layout.safetensors import encode_header
from rlsync.models import model_of
from tests.counted import num_calls

CONFIG = {**SHAPES["tiny-moe"], "num_experts": 64, "dtype": "bfloat16"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose files are headers and holes."""
    path: Path = tmp_path_factory.mktemp("paper") / "model"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(CONFIG))
    for name, group in shard_files(model_of(CONFIG).tensors(), 2**40).items():
        header, _ = encode_header(group)
        with (path / name).open("wb") as stream:
            stream.write(header)
            stream.truncate(len(header) + sum(tensor.nbytes for tensor in group))
    return path


@pytest.mark.parametrize(
    ("few", "many"),
    [
        ({"form": "hf"}, {"form": "hf", "max_shard_bytes": 1}),
        ({"form": "torch_dist"}, {"form": "torch_dist", "max_shard_bytes": 1}),
        ({"form": "megatron"}, {"form": "megatron", "topology": smallest_topology(ep_size=64)}),
    ],
    ids=["hf", "torch_dist", "megatron"],
)  # fmt: skip
def test_planning_a_conversion_takes_as_much_work_for_many_files_as_for_one(few: Any, many: Any, folder: Path, tmp_path: Path) -> None:
    """671B has 252 files, or more of ranks: each of them took a look at all tensors of both sides, which was minutes."""
    num_files, work = list[int](), list[float]()
    for options in (few, many):
        source, output = prepare(Request(folder, tmp_path / "to", **options))
        targets = output.targets()
        num_files.append(len(targets))
        planner = FilePlanner(source)
        work.append(num_calls(lambda: [planner.plan(target.placement, bucket_bytes=2**30) for target in targets]))  # noqa: B023
        work[-1] += num_calls(output.targets)
        # Files of ranks have some tensors several times.
        work[-1] /= sum(len(target.placement.pieces) for target in targets)
    assert num_files[0] == 1 and num_files[1] >= 30, num_files
    assert work[1] < 3 * work[0], work
