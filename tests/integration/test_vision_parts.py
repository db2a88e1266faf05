"""Parts of a vision-language model that are frozen or have a learning rate of their own, under every layout, and what a resume restores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.models import save_tiny_model
from tests.ranks import run_ranks
from tests.vision_models import FAMILIES, row, save_tiny_vision_model, tiny_vision_config

RANKS = "tests.integration.vision_parts_ranks"
LANGUAGE, TOWER, PROJECTION = "language_model", "vision_model", "vision_projection"
# Of each row: a number of text tokens, or height and width of a picture.
ROWS: list[list[int | tuple[int, int]]] = [[4, (84, 56), 6], [9], [2, (56, 56), 5], [(56, 84), 7]]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> dict[str, Any]:
    """Folders by family, tied and untied, and the files of their rows."""
    root = tmp_path_factory.mktemp("hf")
    found: dict[str, Any] = {}
    for family in FAMILIES:
        rows = []
        for seed, parts in enumerate(ROWS):
            drawn = row(tiny_vision_config(family), parts, seed=seed)
            rows.append({**drawn, "weights": torch.full((len(drawn["tokens"]),), 0.05)})
        torch.save({"rows": rows}, root / f"{family}.pt")
        folders = {tied: str(save_tiny_vision_model(root / f"{family}-{tied}", family, tied=tied, seed=4)) for tied in (False, True)}
        found[family] = {"rows": str(root / f"{family}.pt"), "untied": folders[False], "tied": folders[True]}
    return found


DISTRIBUTED = {"use_distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True}


def test_frozen_parts_stay_bit_for_bit_and_all_others_move(made):
    """Alone and together, tied and not, under TP, PP (a stage without anything to train), VPP and distributed optimizers.

    Negative controls: a case without frozen parts, and a learning rate of 0, which keeps a part still and has its state.
    """
    qwen3, qwen2_5 = made["qwen3_vl"], made["qwen2_5_vl"]
    cases = [
        {"folder": qwen3["untied"], "topology": {"dp_size": 2}},
        {"folder": qwen3["untied"], "topology": {"tp_size": 2}, "cut": [2, 2], "frozen": [TOWER]},
        {"folder": qwen3["tied"], "topology": {"pp_size": 2}, "cut": [2, 2], "frozen": [LANGUAGE]},
        {"folder": qwen3["tied"], "topology": {"pp_size": 2}, "cut": [2, 2], "frozen": [TOWER, PROJECTION]},
        {"folder": qwen3["untied"], "topology": {"pp_size": 2}, "cut": [4], "frozen": [LANGUAGE, TOWER], "ddp": DISTRIBUTED},
        {"folder": qwen3["untied"], "topology": {"dp_size": 2}, "frozen": [TOWER], "ddp": DISTRIBUTED},
        {"folder": qwen3["untied"], "topology": {"dp_size": 2}, "frozen": [LANGUAGE, PROJECTION], "ddp": DISTRIBUTED},
        {
            "folder": qwen3["untied"], "topology": {"tp_size": 2}, "cut": [4], "still": [TOWER],
            "optimizer": {"part_lr": {TOWER: 0.0}},
        },
        {
            "folder": qwen3["untied"], "topology": {"dp_size": 2}, "frozen": [LANGUAGE], "rate": 1e-4,
            "optimizer": {"part_lr": {TOWER: 1e-5, PROJECTION: 1e-4}},
        },
    ]  # fmt: skip
    outputs = run_ranks(2, RANKS, "freeze_and_train", cases=cases, rows=qwen3["rows"])
    assert outputs[0].count("TRAINED") == len(cases)
    cases = [
        {
            "folder": qwen2_5["untied"],
            "topology": {"tp_size": 2},
            "cut": [4],
            "frozen": [PROJECTION],
            "overrides": {"sequence_parallel": True},
        },
        {"folder": qwen2_5["tied"], "topology": {"dp_size": 2}, "frozen": [LANGUAGE, TOWER]},
        {
            "folder": qwen2_5["untied"], "topology": {"pp_size": 2, "vpp_size": 2}, "cut": [2, 2], "frozen": [LANGUAGE], "ddp": DISTRIBUTED,
            "overrides": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
        },
    ]  # fmt: skip
    outputs = run_ranks(2, RANKS, "freeze_and_train", cases=cases, rows=qwen2_5["rows"])
    assert outputs[0].count("TRAINED") == len(cases)


def test_each_part_moves_at_its_own_rate(made):
    run_ranks(2, RANKS, "rates_of_parts", case={"folder": made["qwen3_vl"]["untied"], "topology": {"tp_size": 2}, "cut": [4]},
              rows=made["qwen3_vl"]["rows"])  # fmt: skip


def test_a_resume_goes_on_bit_for_bit_with_frozen_parts_and_rates_of_their_own(made, tmp_path):
    qwen3 = made["qwen3_vl"]["untied"]
    rates = {"part_lr": {TOWER: 1e-4, PROJECTION: 1e-2}}
    cases = [
        {"folder": qwen3, "topology": {"tp_size": 2}, "cut": [4], "frozen": [TOWER], "optimizer": {"part_lr": {PROJECTION: 1e-2}}},
        {"folder": qwen3, "topology": {"dp_size": 2}, "ddp": DISTRIBUTED, "optimizer": rates},
        {"folder": qwen3, "topology": {"pp_size": 2}, "cut": [2, 2], "frozen": [LANGUAGE], "ddp": DISTRIBUTED, "optimizer": rates},
        {"folder": qwen3, "topology": {"dp_size": 2}, "frozen": [LANGUAGE, TOWER], "precision": "bf16"},
    ]
    outputs = run_ranks(2, RANKS, "resume", cases=cases, rows=made["qwen3_vl"]["rows"], root=str(tmp_path))
    assert outputs[1].count("RESUMED") == len(cases)


def test_what_cannot_be_frozen_is_refused(made, tmp_path):
    text = save_tiny_model(Path(tmp_path), "qwen3")
    run_ranks(1, RANKS, "refuse", folder=made["qwen3_vl"]["untied"], text_folder=str(text))
