"""Seconds and memory of a vision tower, forward and backward: transformers' own, and as rlsync computes it; and how far features are apart.

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

from rlsync.megatron.tower import refined

ON_GPU = torch.cuda.is_available()
SMALL = {"depth": 4, "hidden_size": 128, "num_heads": 4, "intermediate_size": 132}
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


def measure(tower: Any, pixels: torch.Tensor, grid: torch.Tensor) -> tuple[float, float, torch.Tensor]:
    """Median seconds of forward and backward, GiB at most (0 without a GPU), and the features."""
    seconds = []
    if ON_GPU:
        torch.cuda.reset_peak_memory_stats()
    for _ in range(6 if ON_GPU else 2):
        tower.zero_grad()
        _wait()
        began = time.perf_counter()
        features = tower(pixels, grid_thw=grid).pooler_output
        features = features if torch.is_tensor(features) else torch.cat(tuple(features))
        features.float().square().mean().backward()
        _wait()
        seconds.append(time.perf_counter() - began)
    most = torch.cuda.max_memory_allocated() / 2**30 if ON_GPU else 0.0
    return statistics.median(seconds), most, features.detach().float()


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
        theirs = measure(tower, pixels, grid)
        ours = measure(refined(tower), pixels, grid)
        apart = ((theirs[2] - ours[2]).norm() / theirs[2].norm()).item()
        for whose, (seconds, most, _) in (("transformers'", theirs), ("rlsync's", ours)):
            print(f"{name}, {patches} patches, {whose}: {seconds:.4f} s, {most:.1f} GiB")
        print(f"{name}: {theirs[0] / ours[0]:.1f} times as fast, features apart {apart:.1e} of their norm")


if __name__ == "__main__":
    main()
