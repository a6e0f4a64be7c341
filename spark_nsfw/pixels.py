"""Encoded image → pixels, as OpenAI's CLIP preprocesses them, up to normalisation.

The reference is ``_transform`` of https://github.com/openai/CLIP (clip/clip.py):
resize the shorter side with antialiased bicubic, crop the centre, then convert to
RGB, each in the image's own mode. Normalisation happens on the device
(`spark_nsfw.embedders`).
"""

from __future__ import annotations

import io

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from spark_nsfw.errors import OversizedImageError, UndecodableImageError

__all__ = ["MAX_IMAGE_PIXELS", "center_crop_box", "decode_image", "resized_size"]

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
    image_bytes: bytes | memoryview, size: int, max_pixels: int = MAX_IMAGE_PIXELS
) -> npt.NDArray[np.uint8]:
    """Decode one image of any format and mode that pillow reads.

    The first frame of an animation counts, and EXIF orientation is ignored, as in
    the reference transform.

    Args:
        image_bytes: the encoded file.
        size: side of the square that the model takes, in pixels.
        max_pixels: limit on width × height before and after the resize.

    Returns:
        uint8 (size, size, 3), RGB.

    Raises:
        UndecodableImageError: pillow cannot read the file, or not to its end.
        OversizedImageError: more than ``max_pixels``.
    """
    try:
        with Image.open(io.BytesIO(image_bytes)) as image:
            width, height = image.size
            new_width, new_height = resized_size(width, height, size)
            if max(width * height, new_width * new_height) > max_pixels:
                raise OversizedImageError(
                    f"{width} x {height} pixels, {new_width} x {new_height} when resized; "
                    f"the limit is {max_pixels:,}"
                )
            resized: Image.Image = image
            if (new_width, new_height) != (width, height):
                resized = image.resize((new_width, new_height), Image.Resampling.BICUBIC)
            cropped = resized.crop(center_crop_box(new_width, new_height, size))
            return np.asarray(cropped.convert("RGB"))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as exc:
        raise OversizedImageError(str(exc)) from exc
    except OversizedImageError:
        raise
    except MemoryError:
        raise
    except UnidentifiedImageError as exc:
        start = bytes(image_bytes[:16])
        raise UndecodableImageError(
            f"{len(image_bytes):,} bytes in no format that pillow knows, starting with {start!r}"
        ) from exc
    except Exception as exc:  # pillow's plugins raise what they like on damaged files
        raise UndecodableImageError(f"{type(exc).__name__}: {exc}") from exc
