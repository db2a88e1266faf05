"""Where pictures lie in the tokens of a microbatch, and the three-dimensional positions that follow. Integers in tensors.

Owns the checks that tokens and pictures belong together. Must not know models, stages or process groups. Nothing here waits for a GPU
as long as the microbatch's own tensors are in host memory, where a loader leaves them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlsync.errors import ConfigError
from rlsync.models.stacks import Vision

PICTURE_KEYS = ("pixel_values", "image_grid_thw")


@dataclass(frozen=True, slots=True)
class Pictures:
    """The pictures of one microbatch, n picture tokens in all, as the first pipeline stage takes them.

    Attributes:
        pixel_values: (num_patches, patch_dim) floating, of all pictures in order.
        grid: (num_pictures, 3) int64: frames, and patches along height and width.
        places: (k,) int64: where picture tokens of this rank lie among its hidden states, counted as ``s * B + b``.
        rows: (k,) int64: which of the n picture tokens these are; None for all of them in order.
    """

    pixel_values: Tensor
    grid: Tensor
    places: Tensor
    rows: Tensor | None


def refuse_pictures(microbatch: Mapping[str, Tensor]) -> None:
    """Raise ConfigError where a microbatch for a model of text holds pictures."""
    given = [key for key in PICTURE_KEYS if key in microbatch]
    if given:
        raise ConfigError(f"a microbatch holds {' and '.join(given)}, but the model has no vision tower; leave pictures out")


def check_pictures(tokens: Tensor, microbatch: Mapping[str, Tensor], vision: Vision) -> None:
    """Raise ConfigError unless the pictures of a microbatch are those that its ``tokens`` (B, S) have room for."""
    given = [key for key in PICTURE_KEYS if key in microbatch]
    if len(given) == 1:
        raise ConfigError(f"a microbatch holds {given[0]} without the other of {' and '.join(PICTURE_KEYS)}; give both or neither")
    if bool((tokens == vision.video_token_id).any()):
        raise ConfigError(f"a microbatch holds token {vision.video_token_id}, which stands for a video; only pictures are supported")
    image = vision.image_token_id
    found = int((tokens == image).sum())
    if not given:
        if found:
            raise ConfigError(
                f"a microbatch holds {found} tokens {image}, which stand for pictures, and no pixel_values; where a policy sampled "
                "such tokens, forbid them in its sampling"
            )
        return
    pixel_values, grid = (microbatch[key] for key in PICTURE_KEYS)
    if grid.dim() != 2 or grid.size(1) != 3 or not len(grid) or grid.dtype != torch.int64 or bool((grid < 1).any()):
        raise ConfigError(f"image_grid_thw is {tuple(grid.shape)} {grid.dtype}; it must be (num_images, 3) int64, all of it above 0")
    uneven = (grid[:, 1:] % vision.spatial_merge_size).any(dim=1).nonzero()[:, 0].tolist()
    if uneven:
        raise ConfigError(
            f"row {uneven[0]} of image_grid_thw is {grid[uneven[0]].tolist()}; height and width must be multiples of the "
            f"{vision.spatial_merge_size} patches that are one token"
        )
    patches = (int(grid.prod(dim=1).sum()), vision.patch_dim)
    if tuple(pixel_values.shape) != patches:
        raise ConfigError(f"pixel_values is {tuple(pixel_values.shape)}, but image_grid_thw makes {patches}")
    counts = _counts(grid, vision)
    if found != int(counts.sum()):
        raise ConfigError(
            f"a microbatch holds {found} tokens {image}, which stand for pictures, but its image_grid_thw of {len(grid)} pictures "
            f"makes {int(counts.sum())}; a prompt may have been cut through a picture, or a policy sampled such tokens"
        )
    ends = counts.cumsum(0)
    where = (tokens == image).flatten().nonzero()[:, 0]
    first, last = where[ends - counts], where[ends - 1]
    torn = ((last - first + 1 != counts) | (first // tokens.size(1) != last // tokens.size(1))).nonzero()[:, 0].tolist()
    if torn:
        raise ConfigError(
            f"picture {torn[0]} of a microbatch has {int(counts[torn[0]])} tokens by its image_grid_thw, which are not a run of one row; "
            "pictures must be in the order of rows and of appearance"
        )


def positions_of(tokens: Tensor, grid: Tensor | None, vision: Vision) -> Tensor:
    """Positions (3, B, S) int64 along time, height and width of ``tokens`` (B, S) with the pictures of ``grid``.

    Text counts on by one along all three. A picture's tokens stand where they lie in it, counted from the position that text would
    have; text goes on behind its longer side. Padding at the right is counted as text.
    """
    if grid is None:
        return torch.arange(tokens.size(1), device=tokens.device).expand(3, *tokens.shape)
    counts = _counts(grid, vision)
    height, width = (grid[:, 1:] // vision.spatial_merge_size).unbind(1)
    picture = torch.arange(len(grid), device=grid.device).repeat_interleave(counts)
    inside = torch.arange(len(picture), device=grid.device) - (counts.cumsum(0) - counts)[picture]
    height, width, counts = height[picture], width[picture], counts[picture]
    lies_at = torch.stack((inside // (height * width), inside // width % height, inside % width))
    is_picture = tokens == vision.image_token_id
    steps = torch.ones_like(tokens)
    steps[is_picture] = torch.where(inside + 1 == counts, torch.maximum(height, width), 0)
    positions = (steps.cumsum(dim=1) - steps).repeat(3, 1, 1)
    positions[:, is_picture] += lies_at
    return positions


def places_of(tokens: Tensor, vision: Vision, held: Tensor) -> tuple[Tensor, Tensor | None]:
    """``places`` and ``rows`` of :class:`Pictures` for ``tokens`` (B, S), of whose positions a rank has those ``held`` (k,) int64."""
    is_picture = tokens == vision.image_token_id
    ordinals = is_picture.flatten().cumsum(0).view_as(tokens) - 1
    b, s = is_picture[:, held].nonzero().unbind(1)
    return s * tokens.size(0) + b, None if len(held) == tokens.size(1) else ordinals[b, held[s]]


def axes_of_frequencies(sections: Sequence[int], *, interleaved: bool) -> tuple[int, ...]:
    """Which axis (0 time, 1 height, 2 width) turns each of the ``sum(sections)`` frequencies of a head.

    Consecutive sections lie one after the other. Interleaved ones take turns, as long as height and width have frequencies left; time
    has all the others.
    """
    if not interleaved:
        return tuple(axis for axis, length in enumerate(sections) for _ in range(length))
    return tuple(index % 3 if index // 3 < sections[index % 3] else 0 for index in range(sum(sections)))


def _counts(grid: Tensor, vision: Vision) -> Tensor:
    return grid.prod(dim=1) // vision.spatial_merge_size**2
