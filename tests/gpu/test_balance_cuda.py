"""Biases of routers move on a GPU by the tokens of sequences alone."""

from __future__ import annotations

import pytest

from tests.integration.test_replay import LATENT_SPARSE, RANKS, RECOMPUTED, force
from tests.ranks import run_ranks

pytestmark = pytest.mark.usefixtures("exact_products")


@pytest.mark.gpu(1)
def test_the_bias_of_routers_moves_by_the_tokens_of_transformers_choices(tmp_path):
    folder, expected = force(tmp_path, "deepseek_v3", LATENT_SPARSE)
    cases = [{"topology": {}}, {"topology": {}, "overrides": RECOMPUTED, "rows": 1}]
    outputs = run_ranks(1, RANKS, "move_biases", folder=folder, cases=cases, expected=expected)
    assert outputs[0].count("MOVED") == len(cases)
