"""Seconds of a vision tower, forward and backward, with transformers' attention and with rlsync's, and how far their results are apart.

``python -m benchmarks.vision_tower``: towers of released sizes in bf16 on a GPU; small ones in fp32 elsewhere.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from transformers import Qwen2_5_VLConfig, Qwen3VLConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel

from rlsync.megatron.vision import ATTENTION

ON_GPU = torch.cuda.is_available()
SMALL = {"depth": 4, "hidden_size": 128, "num_heads": 4, "intermediate_size": 128}
TOWERS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "Qwen2.5-VL": (
        Qwen2_5_VisionTransformerPretrainedModel,
        Qwen2_5_VLConfig,
        {"depth": 32, "hidden_size": 1280, "num_heads": 16, "intermediate_size": 3420, "fullatt_block_indexes": [7, 15, 23, 31]},
    ),
    "Qwen3-VL": (
        Qwen3VLVisionModel,
        Qwen3VLConfig,
        {"depth": 27, "hidden_size": 1152, "num_heads": 16, "intermediate_size": 4304, "deepstack_visual_indexes": [8, 16, 24]},
    ),
}
GRIDS = [[1, 64, 64], [1, 64, 64]] if ON_GPU else [[1, 12, 12], [1, 12, 12], [1, 8, 20]]


def measure(tower: Any, pixels: torch.Tensor, grid: torch.Tensor, attention: str) -> tuple[float, torch.Tensor]:
    """Median seconds of forward and backward, and the features."""
    tower.config._attn_implementation = attention
    seconds = []
    for _ in range(6 if ON_GPU else 2):
        tower.zero_grad()
        _wait()
        began = time.perf_counter()
        features = tower(pixels, grid_thw=grid).pooler_output
        features = features if torch.is_tensor(features) else torch.cat(tuple(features))
        features.float().square().mean().backward()
        _wait()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds), features.detach().float()


def _wait() -> None:
    if ON_GPU:
        torch.cuda.synchronize()


def main() -> None:
    device, dtype = ("cuda", torch.bfloat16) if ON_GPU else ("cpu", torch.float32)
    for name, (tower_class, config_class, sizes) in TOWERS.items():
        config = config_class().vision_config
        small = {key: [1, 3] for key in ("fullatt_block_indexes", "deepstack_visual_indexes") if key in sizes} | SMALL
        for key, value in (sizes if ON_GPU else small).items():
            setattr(config, key, value)
        torch.manual_seed(0)
        with torch.device(device):
            tower = tower_class._from_config(config, dtype=dtype, attn_implementation="sdpa").train()
        patches = sum(t * h * w for t, h, w in GRIDS)
        pixels = torch.randn(patches, 3 * config.temporal_patch_size * config.patch_size**2, device=device, dtype=dtype)
        grid = torch.tensor(GRIDS, device=device)
        theirs, ours = (measure(tower, pixels, grid, attention) for attention in ("sdpa", ATTENTION))
        apart = (theirs[1] - ours[1]).abs().max().item()
        ratio = theirs[0] / ours[0]
        print(f"{name}: {patches} patches, sdpa {theirs[0]:.4f} s, now {ours[0]:.4f} s, {ratio:.1f} times as fast, apart {apart:.1e}")


if __name__ == "__main__":
    main()
