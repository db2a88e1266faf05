"""Megatron-Core reshards a model from one layout to another by itself; what a rank then holds is what our tables say."""

from __future__ import annotations

from tests.models import DENSE_FAMILIES, MOE_FAMILIES, save_tiny_model
from tests.ranks import run_ranks
from tests.vision_models import FAMILIES as VISION_FAMILIES
from tests.vision_models import MOE_FAMILIES as VISION_MOE_FAMILIES
from tests.vision_models import save_tiny_vision_model

TP, PP, EP, ETP = {"tp_size": 2}, {"pp_size": 2}, {"dp_size": 2, "ep_size": 2}, {"tp_size": 2, "etp_size": 2}


def test_megatrons_own_resharding_of_every_family_ends_where_a_load_does(tmp_path):
    """An oracle that has not seen our tables: it goes by the attributes of parameters and by process groups."""
    text = DENSE_FAMILIES + MOE_FAMILIES
    folders = {family: save_tiny_model(tmp_path / family, family) for family in text}
    folders |= {family: save_tiny_vision_model(tmp_path / family, family) for family in VISION_FAMILIES + VISION_MOE_FAMILIES}
    cases = []
    for number, (family, folder) in enumerate(folders.items()):
        layouts = (EP, ETP) if family in MOE_FAMILIES + VISION_MOE_FAMILIES else (TP, PP)
        before, after = layouts if number % 2 else reversed(layouts)
        cases.append({"folder": str(folder), "before": before, "after": after})
    outputs = run_ranks(2, "tests.integration.reshard_ranks", "reshard_as_megatron", cases=cases)
    assert all(output.count("RESHARDED") == len(cases) for output in outputs)
