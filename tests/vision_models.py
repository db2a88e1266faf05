"""Tiny random vision-language models of transformers, pictures through its own processor, and batches of both; deterministic in seeds.

head_dim is 32 as in ``tests.models``; towers have heads of 32 too. Ids of picture tokens are the last of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import (
    PretrainedConfig,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from tests.models import SHARED

VISION_START, VISION_END, IMAGE, VIDEO = 127, 128, 129, 130
FAMILIES = ("qwen2_5_vl", "qwen3_vl")
MOE_FAMILIES = ("qwen3_vl_moe",)

_IDS = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": VISION_START, "vision_end_token_id": VISION_END}
_TEXT: dict[str, Any] = {**SHARED, "hidden_size": 128}
_TOWER: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_heads": 2,
    "out_hidden_size": 128,
    "initializer_range": 0.1,
}


def tiny_vision_config(family: str, *, tied: bool = False, **text: Any) -> PretrainedConfig:
    """Config of a tiny model of ``family`` (one of FAMILIES or MOE_FAMILIES); ``text`` replaces fields of its language model."""
    if family == "qwen2_5_vl":
        rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}
        # Windows of 2 x 2 tokens, so that pictures of a few tokens have several; and as in released models, columns that fill no tile.
        tower = {**_TOWER, "depth": 2, "intermediate_size": 100, "window_size": 56, "fullatt_block_indexes": [1]}
        return Qwen2_5_VLConfig(
            text_config={**_TEXT, "rope_parameters": rope, **text}, vision_config=tower, tie_word_embeddings=tied, **_IDS
        )
    if family in ("qwen3_vl", "qwen3_vl_moe"):
        rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [6, 5, 5], "mrope_interleaved": True}
        tower = {**_TOWER, "depth": 3, "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]}
        experts = {"num_experts_per_tok": 3, "moe_intermediate_size": 48, "num_experts": 8, "mlp_only_layers": [1], "norm_topk_prob": True}
        kind, more = (Qwen3VLConfig, {}) if family == "qwen3_vl" else (Qwen3VLMoeConfig, experts)
        return kind(
            text_config={**_TEXT, "head_dim": 32, "rope_parameters": rope, **more, **text},
            vision_config=tower,
            tie_word_embeddings=tied,
            **_IDS,
        )
    raise ValueError(f"unknown family {family!r}; one of {FAMILIES + MOE_FAMILIES}")


def tiny_vision_model(family: str, *, tied: bool = False, seed: int = 0, **text: Any) -> PreTrainedModel:
    """A random fp32 model in which no parameter is trivial: norms and biases are random too."""
    classes = {
        "qwen2_5_vl": Qwen2_5_VLForConditionalGeneration,
        "qwen3_vl": Qwen3VLForConditionalGeneration,
        "qwen3_vl_moe": Qwen3VLMoeForConditionalGeneration,
    }
    config = tiny_vision_config(family, tied=tied, **text)
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    model = classes[family]._from_config(config, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 and name.endswith(".weight"):
                parameter.uniform_(0.5, 1.5)
            elif name.endswith(".bias"):
                parameter.normal_(std=0.2)
    torch.random.set_rng_state(state)
    return model.eval()


def picture(height: int, width: int, *, seed: int) -> np.ndarray:
    """Smooth random colours: (height, width, 3) uint8."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width][..., None] / 16
    waves = np.sin(x * rng.uniform(0.2, 2, 3) + y * rng.uniform(0.2, 2, 3) + rng.uniform(0, 6, 3))
    return np.uint8(127.5 + 100 * waves + rng.uniform(-20, 20, (height, width, 3)))


def processed(config: PretrainedConfig, pictures: Sequence[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
    """``pixel_values`` and ``image_grid_thw`` of transformers' image processor."""
    patch = config.vision_config.patch_size
    processor = Qwen2VLImageProcessorPil(patch_size=patch, min_pixels=(2 * patch) ** 2, max_pixels=(12 * patch) ** 2)
    out = processor(images=list(pictures), return_tensors="pt")
    return out["pixel_values"], out["image_grid_thw"]


def row(config: PretrainedConfig, parts: Sequence[int | tuple[int, int]], *, seed: int) -> dict[str, torch.Tensor]:
    """One sequence: a number of text tokens, or height and width of a picture in pixels, for each part in order.

    Returns:
        ``tokens`` (S,), and with pictures ``pixel_values`` and ``image_grid_thw``.
    """
    generator = torch.Generator().manual_seed(seed)
    tokens: list[int] = []
    pixels, grids = [], []
    for index, part in enumerate(parts):
        if isinstance(part, int):
            # Not the padding token: HF's embedding takes no gradient for it, Megatron's does.
            tokens += torch.randint(1, VISION_START, (part,), generator=generator).tolist()
            continue
        values, grid = processed(config, [picture(*part, seed=100 * seed + index)])
        merged = int(grid.prod()) // config.vision_config.spatial_merge_size**2
        tokens += [VISION_START, *[IMAGE] * merged, VISION_END]
        pixels.append(values)
        grids.append(grid)
    found = {"tokens": torch.tensor(tokens)}
    return {**found, "pixel_values": torch.cat(pixels), "image_grid_thw": torch.cat(grids)} if pixels else found


def collated(rows: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """A microbatch of rows, right-padded; pictures only where a row has some. Other entries of one dimension are padded with zeros."""
    pictures = ("pixel_values", "image_grid_thw")
    padded = {
        name: torch.nn.utils.rnn.pad_sequence([part[name] for part in rows], batch_first=True) for name in rows[0] if name not in pictures
    }
    padded["lengths"] = torch.tensor([len(part["tokens"]) for part in rows])
    return padded | {name: torch.cat(found) for name in pictures if (found := [part[name] for part in rows if name in part])}


def hf_inputs(rows: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The same microbatch as transformers' models take it."""
    batch = collated(rows)
    tokens, lengths = batch.pop("tokens"), batch.pop("lengths")
    return {
        "input_ids": tokens,
        "attention_mask": (torch.arange(tokens.size(1)) < lengths[:, None]).long(),
        "mm_token_type_ids": (tokens == IMAGE).long(),
        **{name: batch[name] for name in ("pixel_values", "image_grid_thw") if name in batch},
    }


def save_tiny_vision_model(folder: str | Path, family: str, *, transposed: bool = False, **options: Any) -> Path:
    """Save ``tiny_vision_model(family, **options)`` as a checkpoint folder, under the names that transformers' modules have.

    ``transposed``: stacked experts are, as in released files of Qwen3-VL-MoE.
    """
    folder = Path(folder)
    model = tiny_vision_model(family, **options)
    # save_pretrained would write Qwen2.5-VL under the names of its first checkpoint.
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    state = model.state_dict()
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    if transposed:
        stacked = {name: tensor.mT.contiguous() for name, tensor in state.items() if ".mlp.experts." in name}
        assert stacked
        state |= stacked
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
