"""Routes of samples: from engines' arrays to what the actor replays, and the numbers of a step."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rlsync.errors import RlsyncError
from rlsync.models.moe import NO_ROUTE, sparse_layers
from workers.routes import engine_routes, padded_routes, routing_counts, routing_metrics, routing_shape

SHAPE = routing_shape({"num_layers": 4, "moe_layer_freq": [1, 0, 1, 1], "moe_router_topk": 2})


def of_engine(tokens: int, layers: int = 4) -> np.ndarray:
    return np.arange(tokens * layers * 2, dtype=np.uint8).reshape(tokens, layers, 2)


def test_routes_of_all_layers_are_cut_to_those_with_experts_and_the_last_token_is_unknown():
    array = of_engine(4)
    routes = engine_routes(array, length=5, shape=SHAPE)
    assert routes.shape == (5, 3, 2) and routes.dtype is torch.int16
    assert routes[:4].tolist() == array[:, [0, 2, 3]].tolist() and (routes[4] == NO_ROUTE).all()
    compact = of_engine(4, layers=3)
    assert engine_routes(compact, length=5, shape=SHAPE)[:4].tolist() == compact.tolist(), "some versions leave dense layers out"


@pytest.mark.parametrize(
    ("array", "said"),
    [
        (None, "returned no routes"),
        (of_engine(3), "routes of 3 tokens, 4 layers and 2 experts a token; the sample has 5 tokens"),
        (of_engine(4, layers=2), "4 tokens, 2 layers"),
    ],
)
def test_routes_of_another_sample_or_model_are_refused(array, said):
    with pytest.raises(RlsyncError, match=said):
        engine_routes(array, length=5, shape=SHAPE)


def test_padding_of_a_microbatch_has_no_route():
    rows = [torch.zeros(2, 3, 2, dtype=torch.int16), torch.ones(4, 3, 2, dtype=torch.int16)]
    padded = padded_routes(rows, 5)
    assert padded.shape == (2, 5, 3, 2)
    assert (padded[0, 2:] == NO_ROUTE).all() and (padded[1, 4:] == NO_ROUTE).all() and (padded[1, :4] == 1).all()


def test_mismatch_counts_pairs_of_token_and_layer_whatever_the_order_of_experts():
    taken = torch.tensor([[[0, 1], [2, 3]], [[0, 1], [1, 2]], [[0, 1], [1, 2]]], dtype=torch.int16)
    engine = torch.tensor([[[1, 0], [2, 0]], [[0, 1], [2, 1]], [[NO_ROUTE] * 2] * 2], dtype=torch.int16)
    counts = routing_counts([taken], [engine], num_experts=4)
    assert (counts.num_different, counts.num_compared) == (1, 4)
    assert routing_metrics([counts, None])["moe/route_mismatch"] == 0.25


def test_load_imbalance_is_the_mean_over_layers_of_all_stages_and_replicas():
    first = torch.tensor([[[0, 1], [NO_ROUTE] * 2]] * 4, dtype=torch.int16)  # a stage with the first of two layers: all to two of four
    last = torch.tensor([[[NO_ROUTE] * 2, [0, 1]], [[NO_ROUTE] * 2, [2, 3]]] * 2, dtype=torch.int16)
    stages = [routing_counts([each], None, num_experts=4) for each in (first, last)]
    assert stages[0].loads.tolist() == [[4, 4, 0, 0], [0, 0, 0, 0]]
    assert routing_metrics(stages) == {"moe/load_imbalance": (2.0 + 1.0) / 2}
    assert routing_metrics([None]) == {}


def test_layers_with_experts_are_those_of_megatrons_frequency() -> None:
    """As ``TransformerConfig`` documents it: every so many layers, the first of them included, or a list of 0 and 1."""
    assert sparse_layers(5, 1) == (0, 1, 2, 3, 4)
    assert sparse_layers(5, 2) == (0, 2, 4)
    assert sparse_layers(3, [0, 1, 1]) == (1, 2)
