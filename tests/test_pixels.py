import io

import numpy as np
import pytest
from PIL import Image
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize

from examples.photographs import encode, photographs
from spark_nsfw.errors import ImageError, OversizedImageError, UndecodableImageError
from spark_nsfw.score.pixels import center_crop_box, decode_image, resized_size

#: OpenAI's CLIP, clip/clip.py, _transform, up to ToTensor.
REFERENCE = Compose(
    [
        Resize(224, interpolation=InterpolationMode.BICUBIC),
        CenterCrop(224),
        lambda image: image.convert("RGB"),
    ]
)

MODES = ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "I", "F", "I;16"]
FORMATS = ["PNG", "JPEG", "TIFF", "WEBP", "GIF", "BMP", "PPM", "AVIF", "JPEG2000"]
SIZES = [(512, 512), (301, 417), (1, 1), (1, 9), (40, 1), (223, 225), (224, 224), (2000, 31)]


def reference(image_bytes):
    return np.asarray(REFERENCE(Image.open(io.BytesIO(image_bytes))))


def corpus():
    """Every mode and format that pillow writes, in every size."""
    photograph = next(photographs(600, 600))
    for mode in MODES:
        for image_format in FORMATS:
            for size in SIZES:
                image = photograph.resize(size)
                try:
                    if mode in ("I", "F", "I;16", "LA", "PA"):
                        image = image.convert("L")
                    content = encode(image.convert(mode), image_format)
                except (OSError, ValueError):
                    continue  # this format has no such mode
                yield f"{mode}-{image_format}-{size[0]}x{size[1]}", content


def test_pixels_are_those_of_openais_transform_bit_for_bit():
    names = []
    for name, content in corpus():
        names.append(name)
        assert np.array_equal(decode_image(content, 224), reference(content)), name
    assert len(names) > 300
    assert {name.split("-")[0] for name in names} == set(MODES)
    assert {name.split("-")[1] for name in names} == set(FORMATS)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_ignored_as_the_reference_ignores_it(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encode(next(photographs()), exif=exif)
    assert np.array_equal(decode_image(content, 224), reference(content))


@pytest.mark.parametrize("image_format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_frame_of_an_animation_counts(image_format):
    frames = [p for p, _ in zip(photographs(300, 300), range(3), strict=False)]
    content = encode(frames[0], image_format, save_all=True, append_images=frames[1:])
    assert Image.open(io.BytesIO(content)).n_frames == 3
    assert np.array_equal(decode_image(content, 224), reference(content))


@pytest.mark.parametrize("image_format", ["PNG", "TIFF"])
def test_sixteen_bit_greyscale(image_format):
    ramp = np.linspace(0, 65535, 300 * 400).reshape(300, 400).astype(np.uint16)
    content = encode(Image.fromarray(ramp), image_format)
    assert np.array_equal(decode_image(content, 224), reference(content))


def test_transparent_palette():
    image = next(photographs()).quantize(16)
    image.info["transparency"] = 3
    content = encode(image, "PNG")
    assert np.array_equal(decode_image(content, 224), reference(content))


@pytest.mark.parametrize("size", [160, 224, 336])
def test_other_model_sizes(size):
    content = encode(next(photographs()))
    transform = Compose([Resize(size, interpolation=InterpolationMode.BICUBIC), CenterCrop(size)])
    expected = np.asarray(transform(Image.open(io.BytesIO(content))))
    assert np.array_equal(decode_image(content, size), expected)


@pytest.mark.parametrize(
    ("width", "height", "expected"),
    [(640, 480, (298, 224)), (480, 640, (224, 298)), (224, 224, (224, 224)), (1, 3, (224, 672))],
)
def test_resized_size(width, height, expected):
    assert resized_size(width, height, 224) == expected


def test_center_crop_rounds_half_to_even():
    assert center_crop_box(225, 227, 224) == (0, 2, 224, 226)


@pytest.mark.parametrize(
    "content",
    [b"", b"<html>", b"\xff\xd8\xff\xe0" + b"\0" * 100, b"\x89PNG\r\n\x1a\n" + b"\0" * 50],
)
def test_bytes_that_are_no_image_are_refused(content):
    with pytest.raises(UndecodableImageError):
        decode_image(content, 224)


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP"])
def test_a_file_cut_in_half_is_refused(image_format):
    content = encode(next(photographs()), image_format)
    with pytest.raises(UndecodableImageError):
        decode_image(content[: len(content) // 2], 224)


@pytest.mark.parametrize("size", [(4000, 3000), (20_000, 20_000)])
def test_too_many_pixels_are_refused_before_they_are_decoded(size):
    content = encode(Image.new("1", size), "PNG")
    with pytest.raises(OversizedImageError, match="pixels"):
        decode_image(content, 224, max_pixels=10_000_000)


def test_an_image_that_would_grow_too_long_is_refused():
    content = encode(Image.new("L", (1, 50_000)), "PNG")
    with pytest.raises(OversizedImageError, match="224 x 11200000 when resized"):
        decode_image(content, 224)


def test_random_damage_never_raises_anything_else():
    generator = np.random.default_rng(0)
    for image_format in ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"):
        original = np.frombuffer(encode(next(photographs(100, 120)), image_format), np.uint8)
        for _ in range(60):
            damaged = original.copy()
            places = generator.integers(0, len(damaged), 20)
            damaged[places] = generator.integers(0, 256, 20)
            try:
                pixels = decode_image(damaged.tobytes(), 224)
            except ImageError:
                continue
            assert pixels.shape == (224, 224, 3)


def difference(content):
    exact, fast = (decode_image(content, 224, decode=d).astype(int) for d in ("exact", "fast"))
    return np.abs(exact - fast)


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("side", [100, 256, 512, 1000, 2000])
def test_fast_pixels_are_within_two_grey_levels(image_format, side):
    for photograph, _ in zip(photographs(side, side + 50, seed=side), range(3), strict=False):
        assert difference(encode(photograph, image_format)).max() <= 2


def test_fast_is_exact_for_every_mode_but_rgb():
    for name, content in corpus():
        jpeg_or_rgb = Image.open(io.BytesIO(content)).mode == "RGB"
        assert difference(content).max() <= (2 if jpeg_or_rgb else 0), name


def test_fast_and_exact_agree_on_what_is_damaged():
    generator = np.random.default_rng(1)
    original = np.frombuffer(encode(next(photographs(200, 300))), np.uint8)
    refused = 0
    for number in range(300):
        damaged = original.copy()
        if number % 3:
            damaged[generator.integers(0, len(damaged), 5)] = generator.integers(0, 256, 5)
        else:
            damaged = damaged[: generator.integers(0, len(damaged))]
        verdicts = []
        for decode in ("exact", "fast"):
            try:
                decode_image(damaged.tobytes(), 224, decode=decode)
                verdicts.append(None)
            except ImageError as exc:
                verdicts.append(type(exc))
        assert verdicts[0] == verdicts[1]
        refused += verdicts[0] is not None
    assert 100 <= refused < 290


def test_fast_refuses_too_many_pixels_before_it_decodes():
    content = encode(Image.new("RGB", (4000, 3000)), "JPEG")
    with pytest.raises(OversizedImageError, match="4000 x 3000"):
        decode_image(content, 224, max_pixels=10_000_000, decode="fast")


def test_postscript_is_not_read_because_it_would_start_another_program(monkeypatch):
    def interpreter(*_, **__):
        raise AssertionError("Ghostscript was called")

    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", interpreter)
    endless = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n{} loop\n"
    for decode in ("exact", "fast"):
        with pytest.raises(UndecodableImageError, match="in no format that pillow knows"):
            decode_image(endless, 224, decode=decode)


def test_a_want_of_memory_is_no_fault_of_the_image(monkeypatch):
    def short(*_, **__):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr("torch.nn.functional.interpolate", short)
    for image_format in ("JPEG", "PNG"):
        with pytest.raises(MemoryError, match="allocate"):
            decode_image(encode(next(photographs()), image_format), 224, decode="fast")
