"""Pictures of data rows: from what a row says to RGB pixels, and from pixels to a vision tower's patches.

Pixels are those that vLLM makes of a picture in a request: turned as its EXIF data says, what is transparent on white. Patches are
made by the model folder's own image processor of transformers, which is imported when one is loaded, so that ``workers.check`` may open
pictures. Knows neither Ray nor Megatron.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from PIL import Image, ImageOps

from rlsync.errors import ConfigError
from workers.row_files import BadRow

# Formats that vLLM refuses: Pillow has other programs read some (Ghostscript runs what an EPS file says), and of the rest no pixels.
_NO_PICTURES = frozenset(("EPS", "WMF", "BUFR", "GRIB", "HDF5", "MPEG"))


def open_picture(reference: Any, folder: Path) -> Image.Image:
    """An RGB picture.

    Args:
        reference: a path, ``file://`` or ``data:`` address; the bytes of a picture file; or an object with ``bytes`` (base64 where it
            comes from JSON) or ``path``, as Hugging Face datasets write pictures.
        folder: from which relative paths are meant.

    Raises:
        BadRow: it names no picture, or one that cannot be read.
    """
    source, name = _source(reference, folder)
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            if image.format in _NO_PICTURES:
                raise ValueError(f"it is a file of form {image.format}, which vLLM does not take for a picture either")
            image.load()
            return _as_rgb(ImageOps.exif_transpose(image))
    except FileNotFoundError:
        raise BadRow(f"picture {name} does not exist") from None
    except Exception as error:  # nothing narrower: Pillow's readers of damaged files raise whatever they run into, struct.error too
        raise BadRow(f"picture {name} cannot be read: {str(error) or type(error).__name__}") from None


def _source(reference: Any, folder: Path) -> tuple[bytes | Path, str]:
    """Content or path, and its name for people."""
    if isinstance(reference, dict):
        content, path = reference.get("bytes"), reference.get("path")
        if isinstance(content, str):
            return _decoded(content, "in base64"), "in base64"
        if content is None and path is None:
            raise BadRow(f"a picture is an object with {', '.join(map(repr, reference)) or 'nothing'}; it must have bytes or path")
        reference = path if content is None else content
    if isinstance(reference, bytes):
        return reference, f"of {len(reference)} bytes"
    if not isinstance(reference, str):
        raise BadRow(f"a picture is {type(reference).__name__}; a path, bytes, or an object with bytes or path is read")
    try:
        reference.encode()
    except UnicodeEncodeError:
        raise BadRow("a picture's path holds half of a surrogate pair, which is no text") from None
    if reference.startswith("data:"):
        head, comma, content = reference.partition(",")
        if not comma or not head.endswith(";base64"):
            raise BadRow(f"picture {head[:40]!r} is a data address without base64")
        return _decoded(content, head[:40]), head[:40]
    if "://" in reference and not reference.startswith("file://"):
        raise BadRow(f"picture {reference[:80]!r} is on the network; download it and name its path")
    path = folder / reference.removeprefix("file://")
    if reference.startswith("file://") and not os.path.exists(path):  # Path.exists raises where a name is too long
        path = folder / unquote(reference.removeprefix("file://").removeprefix("localhost"))
    return path, str(path)


def _decoded(content: str, name: str) -> bytes:
    try:
        return base64.b64decode(content, validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadRow(f"picture {name} is not base64: {error}") from None


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":  # also where one colour of it stands for clear: vLLM shows that colour
        return image
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


# Files of a model folder, each of which an image processor can be made from.
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")
# Width and height of each picture of a row, in pixels.
PictureSizes = tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class PictureLimits:
    """Pixels between which an image processor of Qwen2-VL's kind keeps a picture."""

    least: int
    most: int

    def pixels(self, size: tuple[int, int]) -> int:
        """Pixels of a picture as a tower sees it, but for the rounding of its sides to whole squares of patches."""
        return min(max(size[0] * size[1], self.least), self.most)

    def least_features(self, size: tuple[int, int], side: int) -> int:
        """Fewest features that a tower makes of a picture, one of a square of ``side`` pixels, however its sides are rounded."""
        scale = math.sqrt(self.pixels(size) / (size[0] * size[1]))
        return math.prod(max(1, int(length * scale / side)) for length in size)


def read_picture_limits(folder: Path, *, min_pixels: int | None, max_pixels: int | None) -> PictureLimits:
    """Limits of a model folder's image processor, which ``min_pixels`` and ``max_pixels`` replace; those of transformers' class where the
    folder says none that can be read."""
    said: dict[str, Any] = {}
    for name in PROCESSOR_FILES:
        try:
            content = json.loads((folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        found = content.get("image_processor", content) if isinstance(content, dict) else {}
        size = found.get("size") if isinstance(found, dict) else None
        edges = {"min_pixels": size.get("shortest_edge"), "max_pixels": size.get("longest_edge")} if isinstance(size, dict) else {}
        said |= {key: value for key, value in edges.items() if isinstance(value, int)}
        said |= {key: value for key, value in (found.items() if isinstance(found, dict) else ()) if isinstance(value, int)}
    least, most = (said.get(key, default) for key, default in (("min_pixels", 56 * 56), ("max_pixels", 1280 * 28 * 28)))
    return PictureLimits(least if min_pixels is None else min_pixels, most if max_pixels is None else max_pixels)


def check_picture_limits(folder: Path, *, min_pixels: int | None, max_pixels: int | None) -> None:
    """Raise ConfigError where one of the keys contradicts the folder's image processor, of which the other limit is: pictures would be
    enlarged beyond ``max_pixels``, or reduced below ``min_pixels``."""
    limits = read_picture_limits(folder, min_pixels=min_pixels, max_pixels=max_pixels)
    if limits.least > limits.most:
        (name, value), (other, theirs) = ("data.min_pixels", limits.least), ("max_pixels", limits.most)
        if min_pixels is None:
            (name, value), (other, theirs) = ("data.max_pixels", limits.most), ("min_pixels", limits.least)
        raise ConfigError(f"{name} ({value}) contradicts {other} {theirs} of the image processor of {folder}; set data.{other} too")


@dataclass(frozen=True, slots=True)
class Patches:
    """Attributes:
    pixel_values: (patches, patch size) float32 of all pictures.
    image_grid_thw: (pictures, 3) int64.
    num_features: for each picture, how many features the tower gives to the language model.
    """

    pixel_values: Any
    image_grid_thw: Any
    num_features: tuple[int, ...]


class PictureProcessor:
    """Pictures to patches by an image processor of transformers, Qwen2-VL's kind.

    Args:
        image_processor: resizes within its own limits of pixels, normalises and cuts.
        image_token_id: of the placeholder that a chat template puts once for each picture.
        video_token_id: of the one for videos, which no row may have; None: unknown.
    """

    def __init__(self, image_processor: Any, image_token_id: int, video_token_id: int | None = None) -> None:
        self.image_processor, self.image_token_id, self.video_token_id = image_processor, image_token_id, video_token_id

    def __call__(self, images: Sequence[Image.Image]) -> Patches:
        """Patches of pictures of any size. Raises BadRow where a picture is too narrow."""
        try:
            found = self.image_processor(images=list(images), return_tensors="pt")
        except ValueError as error:
            raise BadRow(f"a picture cannot be cut into patches: {error}") from None
        counts = found["image_grid_thw"].prod(dim=1) // self.image_processor.merge_size**2
        return Patches(found["pixel_values"], found["image_grid_thw"], tuple(counts.tolist()))

    def repeats(self, token_ids: Sequence[int], num_features: Sequence[int]) -> list[int]:
        """How often each token stands where a picture's placeholder stands once for each feature of the picture.

        Raises BadRow unless there is one placeholder for each picture, and none for a video.
        """
        if self.video_token_id in token_ids:
            raise BadRow(f"the text holds the token {self.video_token_id}, which stands for a video; only pictures are read")
        found = token_ids.count(self.image_token_id)
        if found != len(num_features):
            raise BadRow(f"the text holds {found} placeholders of pictures, and the row has {len(num_features)} pictures")
        rest = iter(num_features)
        return [next(rest) if token == self.image_token_id else 1 for token in token_ids]


def load_picture_processor(
    folder: Path, image_token_id: int, *, min_pixels: int | None, max_pixels: int | None, video_token_id: int | None = None
) -> PictureProcessor:
    """The image processor of a model folder; ``min_pixels`` and ``max_pixels`` replace its own limits. It is the variant that vLLM and
    transformers take by themselves, torchvision's where that is installed and else Pillow's: an engine sees the same pixels.

    Raises:
        ConfigError: the folder has none, or one of another kind, or limits that contradict those given.
    """
    from transformers import AutoImageProcessor

    limits = {name: value for name, value in (("min_pixels", min_pixels), ("max_pixels", max_pixels)) if value is not None}
    if limits:
        check_picture_limits(folder, min_pixels=min_pixels, max_pixels=max_pixels)
    try:
        found = AutoImageProcessor.from_pretrained(folder, **limits)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:  # what transformers raises for such files
        raise ConfigError(f"no image processor can be made from {folder}: {type(error).__name__}: {error}") from error
    if "image_grid_thw" not in found.model_input_names or not hasattr(found, "merge_size"):
        raise ConfigError(f"{folder}: {type(found).__name__} does not cut pictures into patches as Qwen2-VL's image processor does")
    return PictureProcessor(found, image_token_id, video_token_id)
