"""Positions of picture tokens and their frequencies equal transformers'; pictures that do not fit their tokens are refused."""

from __future__ import annotations

import pytest
import torch

from rlsync.errors import ConfigError
from rlsync.megatron.context import Share
from rlsync.megatron.pictures import axes_of_frequencies, check_pictures, places_of, positions_of
from rlsync.megatron.vision import MultimodalRotary
from rlsync.models import model_of
from rlsync.models.stacks import Vision
from tests.vision_models import IMAGE, VIDEO, collated, hf_inputs, row, tiny_vision_config, tiny_vision_model

ARCHITECTURES = {"qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration", "qwen3_vl": "Qwen3VLForConditionalGeneration"}
BATCHES = {
    "one": [[5, (56, 84), 7]],
    "several": [[3, (56, 56), 2, (112, 56), 4, (28, 140), 1], [(84, 84), 6]],
    "none": [[9], [5]],
    "sizes": [[4, (140, 28), 6], [11], [2, (28, 28), 1], [(56, 56), 1, (112, 84), 9]],
}


@pytest.fixture(scope="module", params=("qwen2_5_vl", "qwen3_vl"))
def family(request) -> str:
    return request.param


@pytest.mark.parametrize("name", BATCHES)
def test_positions_are_those_of_transformers(family, name):
    model = tiny_vision_model(family, num_hidden_layers=2)
    rows = [row(model.config, parts, seed=i) for i, parts in enumerate(BATCHES[name])]
    inputs, batch = hf_inputs(rows), collated(rows)
    vision = _vision(model.config)
    check_pictures(batch["tokens"], batch, vision)
    ours = positions_of(batch["tokens"], batch.get("image_grid_thw"), vision)
    theirs, _ = model.model.get_rope_index(
        inputs["input_ids"], inputs["mm_token_type_ids"], batch.get("image_grid_thw"), attention_mask=inputs["attention_mask"]
    )
    assert torch.equal(ours * inputs["attention_mask"], theirs)
    plain = torch.arange(ours.size(2)).expand_as(ours)
    assert torch.equal(ours, plain) == (name == "none"), "negative control: pictures change positions"


def test_angles_are_those_of_transformers(family):
    """And the two ways of dealing frequencies differ, so that taking one for the other would show."""
    model = tiny_vision_model(family, num_hidden_layers=2)
    rope = model.config.text_config.rope_parameters
    axes = axes_of_frequencies(rope["mrope_section"], interleaved=family == "qwen3_vl")
    positions = torch.randint(0, 50, (3, 2, 17), generator=torch.Generator().manual_seed(0))
    angles = MultimodalRotary(axes, rope["rope_theta"])(positions)[:, :, 0].transpose(0, 1)
    cos, sin = model.model.language_model.rotary_emb(torch.zeros(1), positions)
    torch.testing.assert_close(angles.cos(), cos, rtol=0, atol=1e-6)
    torch.testing.assert_close(angles.sin(), sin, rtol=0, atol=1e-6)
    other = MultimodalRotary(axes_of_frequencies(rope["mrope_section"], interleaved=family != "qwen3_vl"), rope["rope_theta"])
    assert not torch.allclose(other(positions)[:, :, 0].transpose(0, 1).cos(), cos, atol=1e-3)


def test_parts_of_a_sequence_hold_its_picture_tokens_once():
    config = tiny_vision_config("qwen3_vl")
    rows = [row(config, parts, seed=i) for i, parts in enumerate(BATCHES["sizes"])]
    tokens = torch.nn.functional.pad(collated(rows)["tokens"], (0, 3))
    length = tokens.size(1) // 4 * 4
    tokens, vision = tokens[:, :length], _vision(config)
    whole, everything = places_of(tokens, vision, torch.arange(length))
    assert everything is None
    assert torch.equal(tokens.T.flatten()[whole], torch.full_like(whole, IMAGE))
    # In order, as tensor ranks cut a sequence, and from both ends, as context ranks do.
    for parts in (torch.arange(length).chunk(4), [Share((0, length), rank, 2).own(torch.arange(length), 0) for rank in range(2)]):
        found = [places_of(tokens, vision, held) for held in parts]
        columns, rows_of = tokens.size(0), [torch.div(places, tokens.size(0), rounding_mode="floor") for places, _ in found]
        joined = torch.cat([held[s] * columns + places % columns for held, s, (places, _) in zip(parts, rows_of, found, strict=True)])
        order = torch.cat([rows for _, rows in found if rows is not None])
        assert torch.equal(joined, whole[order])
        assert sorted(order.tolist()) == list(range(len(whole)))


def test_pictures_that_do_not_fit_are_refused():
    config = tiny_vision_config("qwen2_5_vl")
    rows = [row(config, parts, seed=i) for i, parts in enumerate([[3, (56, 84), 2], [4, (28, 56), 5]])]
    batch, vision = collated(rows), _vision(config)
    check_pictures(batch["tokens"], batch, vision)
    tokens, pixels, grid = (batch[name] for name in ("tokens", "pixel_values", "image_grid_thw"))
    cut = tokens.clone()
    cut[0, 5] = 7
    torn = tokens.clone()
    torn[0, 4], torn[0, 1] = 7, IMAGE
    for changed, said in (
        ({"tokens": cut}, r"7 tokens 129, .* of 2 pictures makes 8"),
        ({"tokens": torn}, "picture 0 of a microbatch has 6 tokens by its image_grid_thw, which are not a run of one row"),
        ({"tokens": tokens.flip(0)}, "not a run of one row"),
        ({"pixel_values": pixels[:-1]}, r"pixel_values is \(31, 1176\), but image_grid_thw makes \(32, 1176\)"),
        ({"image_grid_thw": grid + torch.tensor([0, 1, 0])}, r"row 0 of image_grid_thw is \[1, 5, 6\]; .* multiples of the 2 patches"),
        ({"image_grid_thw": grid[0]}, r"must be \(num_images, 3\) int64"),
        ({"tokens": torch.where(tokens == tokens[0, 0], VIDEO, tokens)}, "only pictures are supported"),
    ):
        with pytest.raises(ConfigError, match=said):
            check_pictures(changed.get("tokens", tokens), {**batch, **changed}, vision)
    with pytest.raises(ConfigError, match="holds pixel_values without the other"):
        check_pictures(tokens, {"tokens": tokens, "pixel_values": pixels}, vision)
    with pytest.raises(ConfigError, match="8 tokens 129, which stand for pictures, and no pixel_values"):
        check_pictures(tokens, {"tokens": tokens}, vision)


def _vision(config) -> Vision:
    vision = model_of({**config.to_dict(), "architectures": [ARCHITECTURES[config.model_type]]}).vision
    assert vision is not None
    return vision
