"""Encoded image → pixels, as OpenAI's CLIP preprocesses them, up to normalisation.

The reference is ``_transform`` of https://github.com/openai/CLIP (clip/clip.py):
resize the shorter side with antialiased bicubic, crop the centre, then convert to
RGB, each in the image's own mode. Normalisation happens on the device
(`spark_nsfw.score.embedder`).
"""

from __future__ import annotations

import io
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
import simplejpeg
import torch
from PIL import Image, UnidentifiedImageError
from torch import nn

from spark_nsfw.errors import OversizedImageError, UndecodableImageError

__all__ = [
    "DECODES",
    "MAX_IMAGE_PIXELS",
    "center_crop_box",
    "decode_image",
    "encode_jpeg",
    "resized_size",
]

Decode = Literal["exact", "fast"]
DECODES: tuple[Decode, ...] = get_args(Decode)

Image.init()  # in a thread's first `Image.open` it would hide the formats from other threads

#: These pillow reads by starting another program, without a limit on its time.
_NOT_READ = ("EPS",)

#: Default limit on width × height, of the file and of the resized image; pillow's own.
MAX_IMAGE_PIXELS = 89_478_485


def resized_size(width: int, height: int, size: int) -> tuple[int, int]:
    """(width, height) with the shorter side at ``size``, rounded as torchvision's Resize does.

    Source: torchvision.transforms.functional._compute_resized_output_size.
    """
    short, long = min(width, height), max(width, height)
    scaled = int(size * long / short)
    return (size, scaled) if width <= height else (scaled, size)


def center_crop_box(width: int, height: int, size: int) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of the centre square, rounded as torchvision's CenterCrop does.

    Source: torchvision.transforms.functional.center_crop.
    """
    left, top = round((width - size) / 2.0), round((height - size) / 2.0)
    return left, top, left + size, top + size


def decode_image(
    image_bytes: bytes | memoryview,
    size: int,
    max_pixels: int = MAX_IMAGE_PIXELS,
    decode: Decode = "exact",
) -> npt.NDArray[np.uint8]:
    """Decode one image of any format and mode that pillow reads by itself: not EPS.

    The first frame of an animation counts, and EXIF orientation is ignored, as in
    the reference transform.

    Args:
        image_bytes: the encoded file.
        size: side of the square that the model takes, in pixels.
        max_pixels: limit on width × height before and after the resize.
        decode: ``exact`` gives the reference transform's pixels bit for bit; ``fast``
            comes close to them (docs/fidelity.md says how close).

    Returns:
        uint8 (size, size, 3), RGB.

    Raises:
        UndecodableImageError: pillow cannot read the file, or not to its end.
        OversizedImageError: more than ``max_pixels``.
    """
    image_bytes = memoryview(image_bytes).cast("B")  # Arrow's are signed, simplejpeg refuses those
    if decode == "fast":
        pixels = _decode_jpeg_fast(image_bytes, size, max_pixels)
        if pixels is not None:
            return pixels
    try:
        formats = [name for name in Image.ID if name not in _NOT_READ]
        with Image.open(io.BytesIO(image_bytes), formats=formats) as image:
            width, height = image.size
            _check_size(width, height, size, max_pixels)
            if decode == "fast" and image.mode == "RGB":
                rgb = torch.from_numpy(np.array(image)).permute(2, 0, 1)
                return _resize_fast(rgb, size)
            new_size = resized_size(width, height, size)
            resized: Image.Image = image
            if new_size != (width, height):
                resized = image.resize(new_size, Image.Resampling.BICUBIC)
            return np.asarray(resized.crop(center_crop_box(*new_size, size)).convert("RGB"))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as exc:
        raise OversizedImageError(str(exc)) from exc
    except (OversizedImageError, MemoryError):
        raise
    except UnidentifiedImageError as exc:
        start = bytes(image_bytes[:16])
        raise UndecodableImageError(
            f"{len(image_bytes):,} bytes in no format that pillow knows, starting with {start!r}"
        ) from exc
    except Exception as exc:  # pillow's plugins raise what they like on damaged files
        raise UndecodableImageError(f"{type(exc).__name__}: {exc}") from exc


def encode_jpeg(pixels: npt.NDArray[np.uint8]) -> bytes:
    """A small picture to look at: uint8 (H, W, 3), RGB → a JPEG file."""
    return bytes(simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), quality=75))


def _check_size(width: int, height: int, size: int, max_pixels: int) -> None:
    new_width, new_height = resized_size(width, height, size)
    if max(width * height, new_width * new_height) > max_pixels:
        raise OversizedImageError(
            f"{width} x {height} pixels, {new_width} x {new_height} when resized; "
            f"the limit is {max_pixels:,}"
        )


def _decode_jpeg_fast(
    image_bytes: memoryview, size: int, max_pixels: int
) -> npt.NDArray[np.uint8] | None:
    """A colour JPEG by libjpeg-turbo; None for what this does not read.

    What it does not read, damaged files too, is left to pillow, which decides.
    """
    if bytes(image_bytes[:2]) != b"\xff\xd8":
        return None
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(image_bytes)
    except ValueError:
        return None
    if colorspace not in ("YCbCr", "RGB"):
        return None
    _check_size(width, height, size, max_pixels)
    try:
        rgb = simplejpeg.decode_jpeg(image_bytes)
    except ValueError:
        return None
    return _resize_fast(torch.from_numpy(rgb).permute(2, 0, 1), size)


def _resize_fast(rgb: torch.Tensor, size: int) -> npt.NDArray[np.uint8]:
    """uint8 (3, H, W) → uint8 (size, size, 3), with torch's integer bicubic."""
    _, height, width = rgb.shape
    new_width, new_height = resized_size(width, height, size)
    left, top, right, bottom = center_crop_box(new_width, new_height, size)
    if (new_width, new_height) != (width, height):
        try:
            rgb = nn.functional.interpolate(
                rgb.unsqueeze(0), (new_height, new_width), mode="bicubic", antialias=True
            ).squeeze(0)
        except RuntimeError as exc:  # torch's way to say that memory is short
            raise MemoryError(str(exc)) from exc
    return rgb[:, top:bottom, left:right].permute(1, 2, 0).numpy()
