"""Encoded image → the pixels that models take, up to normalisation.

An image is decoded once, whatever number of models look at it; each gets the pixels of
its own `Transform`. Normalisation happens on the device (`spark_nsfw.score.tower`).

OpenAI's CLIP is the reference for its towers (``_transform`` of
https://github.com/openai/CLIP, clip/clip.py): resize the shorter side with antialiased
bicubic, crop the centre, then convert to RGB, each in the image's own mode. timm and
open_nsfw convert first.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import simplejpeg
import torch
from PIL import Image, UnidentifiedImageError
from torch import nn

from spark_nsfw.errors import (
    ImageError,
    InputError,
    OversizedImageError,
    UndecodableImageError,
)

__all__ = [
    "DECODES",
    "MAX_IMAGE_PIXELS",
    "Decode",
    "Transform",
    "center_crop_box",
    "decode_batch",
    "decode_image",
    "decode_once",
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


@dataclass(frozen=True)
class Transform:
    """How an encoded image becomes the square of pixels that a model takes.

    Attributes:
        size: side of that square, in pixels.
        resize: the centre is cropped out of an image of this size. Its shorter side, unless
            ``squash``; None takes ``size``.
        squash: resize both sides, whatever becomes of the image's proportions.
        interpolation: of the resize; always antialiased.
        rgb_first: convert to RGB before the resize rather than after the crop.
        jpeg: compress and decompress the pixels as JPEG in the end, as open_nsfw's training
            did.
        decode: ``exact`` gives pillow's pixels bit for bit; ``fast`` comes close to them
            (docs/fidelity.md says how close).

    Raises:
        InputError: a value that cannot work.
    """

    size: int
    resize: int | None = None
    squash: bool = False
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    rgb_first: bool = False
    jpeg: bool = False
    decode: Decode = "exact"

    def __post_init__(self) -> None:
        if self.size < 1:
            raise InputError(f"size is at least 1 pixel, not {self.size}")
        if self.resize is not None and self.resize < self.size:
            raise InputError(
                f"resize is {self.resize} pixels, less than the {self.size} that are cropped"
            )
        if self.interpolation not in ("bicubic", "bilinear"):
            raise InputError(
                f"interpolation is 'bicubic' or 'bilinear', not {self.interpolation!r}"
            )
        if self.decode not in DECODES:
            raise InputError(f"--decode (decode) is {' or '.join(DECODES)}, not {self.decode!r}")

    def __str__(self) -> str:
        """All that decides about the pixels, in words."""
        to = self.resize or self.size
        parts = [
            f"{self.size} px of {f'{to} x {to}' if self.squash else f'shorter side {to}'}",
            self.interpolation,
            "RGB first" if self.rgb_first else "RGB last",
            *(["through JPEG"] if self.jpeg else []),
            f"decode={self.decode}",
        ]
        return ", ".join(parts)

    def resized(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) after the resize."""
        to = self.resize or self.size
        return (to, to) if self.squash else resized_size(width, height, to)


def decode_image(
    image_bytes: bytes | memoryview,
    size: int,
    max_pixels: int = MAX_IMAGE_PIXELS,
    decode: Decode = "exact",
) -> npt.NDArray[np.uint8]:
    """Decode one image as OpenAI's CLIP does.

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
    return decode_once(image_bytes, [Transform(size, decode=decode)], max_pixels)[0]


def decode_batch(
    images: Sequence[bytes], transform: Transform, first: int = 0
) -> npt.NDArray[np.uint8]:
    """Decode some images of a user's list for one model.

    Args:
        images: N ≥ 1 files' bytes.
        transform: of the model.
        first: the number of the first in the list, for messages.

    Returns:
        uint8 (N, S, S, 3), RGB.

    Raises:
        InputError: one of them is not bytes.
        ImageError: one of them cannot be decoded; which one is said.
    """
    pixels = np.empty((len(images), transform.size, transform.size, 3), np.uint8)
    for number, image in enumerate(images):
        given: Any = image
        if not isinstance(given, (bytes, bytearray, memoryview)):
            kind = type(given).__name__
            raise InputError(f"images[{first + number}] is of type {kind}, not bytes")
        try:
            pixels[number] = decode_once(image, [transform])[0]
        except ImageError as exc:
            raise type(exc)(f"images[{first + number}]: {exc}") from exc
    return pixels


def decode_once(
    image_bytes: bytes | memoryview,
    transforms: Sequence[Transform],
    max_pixels: int = MAX_IMAGE_PIXELS,
) -> list[npt.NDArray[np.uint8]]:
    """Decode one image of any format and mode that pillow reads by itself: not EPS.

    The first frame of an animation counts, and EXIF orientation is ignored, as in
    the reference transforms.

    Args:
        image_bytes: the encoded file.
        transforms: of the models that look at it.
        max_pixels: limit on width × height before and after each resize.

    Returns:
        uint8 (S, S, 3), RGB, for each transform.

    Raises:
        UndecodableImageError: pillow cannot read the file, or not to its end.
        OversizedImageError: more than ``max_pixels``.
    """
    image_bytes = memoryview(image_bytes).cast("B")  # Arrow's are signed, simplejpeg refuses those
    all_fast = all(transform.decode == "fast" for transform in transforms)
    if all_fast:
        rgb = _decode_jpeg_fast(image_bytes, transforms, max_pixels)
        if rgb is not None:
            return [_fast_pixels(rgb, transform) for transform in transforms]
    try:
        formats = [name for name in Image.ID if name not in _NOT_READ]
        with Image.open(io.BytesIO(image_bytes), formats=formats) as image:
            _check_size(*image.size, transforms, max_pixels)
            return [_pillow_pixels(image, transform) for transform in transforms]
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


def _pillow_pixels(image: Image.Image, transform: Transform) -> npt.NDArray[np.uint8]:
    if transform.decode == "fast" and image.mode == "RGB":
        return _fast_pixels(torch.from_numpy(np.array(image)).permute(2, 0, 1), transform)
    if transform.rgb_first and image.mode != "RGB":
        image = image.convert("RGB")
    new_size = transform.resized(*image.size)
    resized: Image.Image = image
    if new_size != image.size:
        resized = image.resize(new_size, Image.Resampling[transform.interpolation.upper()])
    cropped = resized.crop(center_crop_box(*new_size, transform.size)).convert("RGB")
    return _through_jpeg(cropped) if transform.jpeg else np.asarray(cropped)


def _through_jpeg(image: Image.Image) -> npt.NDArray[np.uint8]:
    """What is left of an image after pillow has compressed it at its default quality."""
    with io.BytesIO() as file:
        image.save(file, format="JPEG")
        return np.asarray(Image.open(file))


def encode_jpeg(pixels: npt.NDArray[np.uint8]) -> bytes:
    """A small picture to look at: uint8 (H, W, 3), RGB → a JPEG file."""
    return bytes(simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), quality=75))


def _check_size(width: int, height: int, transforms: Sequence[Transform], max_pixels: int) -> None:
    sizes = [transform.resized(width, height) for transform in transforms]
    new_width, new_height = max(sizes, key=lambda size: size[0] * size[1])
    if max(width * height, new_width * new_height) > max_pixels:
        raise OversizedImageError(
            f"{width} x {height} pixels, {new_width} x {new_height} when resized; "
            f"the limit is {max_pixels:,}"
        )


def _decode_jpeg_fast(
    image_bytes: memoryview, transforms: Sequence[Transform], max_pixels: int
) -> torch.Tensor | None:
    """A colour JPEG by libjpeg-turbo, uint8 (3, H, W); None for what this does not read.

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
    _check_size(width, height, transforms, max_pixels)
    try:
        rgb = simplejpeg.decode_jpeg(image_bytes)
    except ValueError:
        return None
    return torch.from_numpy(rgb).permute(2, 0, 1)


def _fast_pixels(rgb: torch.Tensor, transform: Transform) -> npt.NDArray[np.uint8]:
    """uint8 (3, H, W) → uint8 (S, S, 3), with torch's integer arithmetic."""
    _, height, width = rgb.shape
    new_width, new_height = transform.resized(width, height)
    left, top, right, bottom = center_crop_box(new_width, new_height, transform.size)
    if (new_width, new_height) != (width, height):
        try:
            rgb = nn.functional.interpolate(
                rgb.unsqueeze(0), (new_height, new_width),
                mode=transform.interpolation, antialias=True,
            ).squeeze(0)  # fmt: skip
        except RuntimeError as exc:  # torch's way to say that memory is short
            raise MemoryError(str(exc)) from exc
    pixels = rgb[:, top:bottom, left:right].permute(1, 2, 0).numpy()
    return _through_jpeg(Image.fromarray(pixels)) if transform.jpeg else pixels
