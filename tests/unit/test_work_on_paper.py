"""Work on paper, before a byte moves, is done once for a model: not for each of its files, adapters, pipeline stages or ranks.

Models of tests have few of them, and real ones hundreds. Work is counted in calls of functions.
"""

from __future__ import annotations

import json
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import pytest

from rlsync.bridge.full_tensors import plan_export
from rlsync.cli.shapes import SHAPES
from rlsync.convert.conversion import Request, prepare
from rlsync.convert.merging import FilePlanner
from rlsync.convert.sources import smallest_topology
from rlsync.copy.files import shard_files
from rlsync.layout.geometry import TensorSpec
from rlsync.layout.safetensors import encode_header
from rlsync.layout.topology import Topology
from rlsync.models import model_of
from rlsync.models.lora import LoraSpec, adapters_of, check_adapters, check_beside_base, idle_exclusions
from rlsync.models.memory import TrainingOptions, training_memory
from rlsync.models.placement import megatron_placements
from rlsync.models.stacks import Model
from rlsync.models.stored import default_form
from tests.counted import num_calls

CONFIG: dict[str, Any] = {**SHAPES["tiny-moe"], "num_experts": 32, "dtype": "bfloat16"}


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
        ({"form": "megatron"}, {"form": "megatron", "topology": smallest_topology(ep_size=32)}),
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


def test_planning_an_export_takes_work_for_what_ranks_hold_and_not_for_all_tensors_on_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 671B on 256 ranks each rank looked at 45,395 tensors 256 times, before the first save."""
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 0)
    asked, model = [0], model_of(CONFIG)

    def counted(tensor: TensorSpec) -> int:
        asked[0] += 1
        return prod(tensor.shape)

    monkeypatch.setattr(TensorSpec, "size", property(counted))
    tensors = model.tensors()
    files, counts = default_form(model).file_tensors(model, tensors), []
    for ranks in (1, 32):
        placements = megatron_placements(model, Topology(ep_size=ranks, dp_size=ranks))
        asked[0] = 0
        plan_export(tensors, placements, files, 2**30)
        counts.append(asked[0])
    assert 0 < counts[1] < 2 * counts[0], counts


def test_the_memory_of_adapters_is_predicted_with_one_look_at_them_for_all_pipeline_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 671B each of 16 stages looked for the 45,000 adapters of the whole model: a check of a minute."""
    bound, bind_one = 0, Model._bind

    def counted(*arguments: Any) -> Any:
        nonlocal bound
        bound += 1
        return bind_one(*arguments)

    monkeypatch.setattr(Model, "_bind", counted)
    model, options, counts = model_of({**CONFIG, "num_hidden_layers": 8}), TrainingOptions(micro_batch_tokens=64, lora=LoraSpec(2, 4)), []
    for stages in (1, 8):
        bound = 0
        training_memory(model, Topology(pp_size=stages), options)
        counts.append(bound)
    assert 0 < counts[1] < 1.2 * counts[0], counts


@pytest.mark.parametrize(
    "work",
    [
        lambda model, adapters: check_adapters(model, replace(adapters.spec, lora_dropout=0.1)),
        lambda model, adapters: idle_exclusions(model, replace(adapters.spec, exclude_modules=("up_proj",))),
        check_beside_base,
        lambda model, adapters: adapters.tensors(model, "bfloat16"),
        lambda model, adapters: megatron_placements(model, Topology(), dtype="bfloat16", adapters=adapters),
    ],
    ids=["check", "exclusions", "beside", "tensors", "placements"],
)
def test_work_on_adapters_grows_with_the_layers_of_experts_and_not_with_their_square(work: Any) -> None:
    """30B-A3B has 18,624 adapters: a look at all parameters for each of them takes an hour."""
    counts = []
    for layers in (2, 8):
        model = model_of({**CONFIG, "num_hidden_layers": layers, "num_experts": 8})
        adapters = adapters_of(model, LoraSpec(2, 4))
        counts.append(num_calls(lambda: work(model, adapters)))  # noqa: B023
    assert 0 < counts[1] < 5 * counts[0], counts
