"""Shards of real photographs for demo, tests and benchmarks, from packages that ship some.

Needs scikit-image and scikit-learn (``pip install spark-nsfw[demo]``); their pictures
are cropped, resized and mirrored at random, from a fixed seed.
"""

from __future__ import annotations

import io
import json
import random
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path

from PIL import Image, ImageOps

__all__ = [
    "damaged_samples",
    "encode",
    "originals",
    "photographs",
    "write_photograph_shards",
    "write_shard",
]

_SKIMAGE = {
    "astronaut": "astronaut",
    "cat": "chelsea",
    "coffee": "coffee",
    "rocket": "rocket",
    "hubble": "hubble_deep_field",
    "retina": "retina",
}
_SKLEARN = {"palace": "china.jpg", "flower": "flower.jpg"}

#: One sample for `write_shard`: its key, and each member's extension and content.
RawSample = tuple[str, Sequence[tuple[str, bytes]]]


@lru_cache(maxsize=1)
def _originals() -> dict[str, Image.Image]:
    from skimage import data
    from sklearn.datasets import load_sample_image

    arrays = {key: getattr(data, name)() for key, name in _SKIMAGE.items()}
    arrays |= {key: load_sample_image(name) for key, name in _SKLEARN.items()}
    return {key: Image.fromarray(array) for key, array in arrays.items()}


def originals() -> Iterator[RawSample]:
    """The photographs as they are, under their names."""
    for key, picture in _originals().items():
        yield _photograph_sample(key, picture)


def photographs(min_side: int = 400, max_side: int = 600, seed: int = 0) -> Iterator[Image.Image]:
    """Photographs without end, RGB, sides drawn between the two bounds, in pixels."""
    draw, pictures = random.Random(seed), tuple(_originals().values())
    while True:
        original = draw.choice(pictures)
        width, height = original.size
        share = draw.uniform(0.5, 1.0)
        left, top = draw.uniform(0, 1 - share) * width, draw.uniform(0, 1 - share) * height
        photograph = original.resize(
            (draw.randint(min_side, max_side), draw.randint(min_side, max_side)),
            Image.Resampling.BICUBIC,
            (left, top, left + share * width, top + share * height),
        )
        yield ImageOps.mirror(photograph) if draw.random() < 0.5 else photograph


def encode(image: Image.Image, image_format: str = "JPEG", **options: object) -> bytes:
    """One image as a file's bytes."""
    stream = io.BytesIO()
    image.save(stream, image_format, **options)
    return stream.getvalue()


def write_shard(path: Path, samples: Iterable[RawSample]) -> None:
    """Write one WebDataset shard."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for key, members in samples:
            for extension, content in members:
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))


def write_photograph_shards(
    directory: Path, num_shards: int, samples_per_shard: int, seed: int = 0
) -> None:
    """Write shards of JPEGs with a caption and a JSON description each."""
    for number in range(num_shards):
        pictures = photographs(seed=seed * 1_000_003 + number)
        samples = (
            _photograph_sample(f"{number:05d}{index:04d}", picture)
            for index, picture in zip(range(samples_per_shard), pictures, strict=False)
        )
        write_shard(directory / f"{number:05d}.tar", samples)


def _photograph_sample(key: str, picture: Image.Image) -> RawSample:
    about = {"key": key, "width": picture.width, "height": picture.height}
    return key, [
        ("jpg", encode(picture, quality=90)),
        ("txt", b"a photograph"),
        ("json", json.dumps(about).encode()),
    ]


def damaged_samples(seed: int = 0) -> Iterator[RawSample]:
    """Samples that cannot be scored, one of each kind, and some odd ones that can."""
    picture = next(photographs(seed=seed))
    jpeg = encode(picture, quality=90)
    yield "cut_in_half", [("jpg", jpeg[: len(jpeg) // 2])]
    yield "empty_file", [("jpg", b"")]
    yield "not_an_image", [("jpg", b"<html>404 Not Found</html>")]
    yield "caption_only", [("txt", b"the image was never downloaded")]
    yield "two_images", [("jpg", jpeg), ("jpg", jpeg)]
    yield "too_many_pixels", [("png", encode(Image.new("1", (20_000, 20_000)), "PNG"))]
    yield "greyscale", [("png", encode(picture.convert("L"), "PNG"))]
    yield "transparent", [("webp", encode(picture.convert("RGBA"), "WEBP"))]
    yield "for_print", [("jpg", encode(picture.convert("CMYK")))]
