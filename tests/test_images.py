"""load_image: every kind of input becomes one upright RGB picture, every broken one a clear InputError."""

from __future__ import annotations

import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tap_llm import images
from tap_llm.errors import InputError, MissingFileError
from tap_llm.images import load_image, open_image

ORIENTATION = 0x0112


def pixels(image: Image.Image) -> np.ndarray:
    assert image.mode == "RGB"
    return np.asarray(image)


@pytest.fixture
def photo() -> np.ndarray:
    """(3, 5, 3) uint8, all values different."""
    return np.arange(45, dtype=np.uint8).reshape(3, 5, 3) * 5


def save(path: Path, image: Image.Image, **options: Any) -> Path:
    image.save(path, **options)
    return path


def test_every_source_gives_the_same_pixels(photo: np.ndarray, tmp_path: Path) -> None:
    path = save(tmp_path / "photo.png", Image.fromarray(photo))
    chw = torch.from_numpy(photo).permute(2, 0, 1)
    sources = [path, str(path), Image.open(path), Image.fromarray(photo), photo, chw, chw.float() / 255]
    for source in sources:
        np.testing.assert_array_equal(pixels(load_image(source)), photo)


def test_half_precision_and_gradients_are_accepted(photo: np.ndarray) -> None:
    tensor = (torch.from_numpy(photo).permute(2, 0, 1) / 255).to(torch.bfloat16).requires_grad_()
    assert np.abs(pixels(load_image(tensor)).astype(int) - photo).max() <= 1


def test_grey_arrays_and_views(photo: np.ndarray) -> None:
    grey = photo[..., 0]
    expected = np.repeat(grey[..., None], 3, axis=2)
    for source in (grey, grey[..., None], torch.from_numpy(grey.copy())[None]):
        np.testing.assert_array_equal(pixels(load_image(source)), expected)
    np.testing.assert_array_equal(pixels(load_image(photo[::-1, ::-1, ::-1])), photo[::-1, ::-1, ::-1])


def test_result_does_not_alias_the_input(photo: np.ndarray) -> None:
    source = Image.fromarray(photo)
    load_image(source).putpixel((0, 0), (255, 255, 255))
    assert source.getpixel((0, 0)) == tuple(photo[0, 0])


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_exif_orientation_is_applied_once(photo: np.ndarray, tmp_path: Path, orientation: int, suffix: str) -> None:
    upright = {
        1: photo,
        2: photo[:, ::-1],
        3: photo[::-1, ::-1],
        4: photo[::-1],
        5: photo.transpose(1, 0, 2),
        6: np.rot90(photo, -1),
        7: photo[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(photo),
    }[orientation]
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    path = save(tmp_path / f"turned.{suffix}", Image.fromarray(photo), exif=exif)
    once = load_image(path)
    np.testing.assert_array_equal(pixels(once), upright)
    np.testing.assert_array_equal(pixels(load_image(once)), upright)
    np.testing.assert_array_equal(pixels(load_image(Image.open(path))), upright)


def test_damaged_exif_does_not_cost_the_picture(photo: np.ndarray, tmp_path: Path) -> None:
    path = save(tmp_path / "odd.png", Image.fromarray(photo), exif=b"Exif\x00\x00MM\x00*garbage" + bytes(9))
    np.testing.assert_array_equal(pixels(load_image(path)), photo)


def test_transparency_is_composited_on_white() -> None:
    rgba = np.zeros((1, 3, 4), dtype=np.uint8)
    rgba[0, :, 0] = 200
    rgba[0, :, 3] = (0, 255, 51)  # 51 / 255 = one fifth
    expected = [[255, 255, 255], [200, 0, 0], [244, 204, 204]]
    for source in (rgba, Image.fromarray(rgba), torch.from_numpy(rgba).permute(2, 0, 1)):
        assert pixels(load_image(source))[0].tolist() == expected
    grey_alpha = Image.merge("LA", [Image.new("L", (1, 1), 7), Image.new("L", (1, 1), 0)])
    assert pixels(load_image(grey_alpha)).tolist() == [[[255, 255, 255]]]


def test_palette_with_and_without_transparency(tmp_path: Path) -> None:
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    plain = save(tmp_path / "plain.png", palette)
    clear = save(tmp_path / "clear.png", palette, transparency=0)
    assert pixels(load_image(plain)).tolist() == [[[10, 20, 30], [40, 50, 60]]]
    assert pixels(load_image(clear)).tolist() == [[[255, 255, 255], [40, 50, 60]]]


def test_colour_key_transparency(tmp_path: Path) -> None:
    path = save(tmp_path / "key.png", Image.new("RGB", (1, 1), (1, 2, 3)), transparency=(1, 2, 3))
    assert pixels(load_image(path)).tolist() == [[[255, 255, 255]]]


def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path: Path) -> None:
    values = np.array([[0, 257, 25700, 65535]], dtype=np.uint16)
    path = save(tmp_path / "deep.png", Image.fromarray(values))
    assert pixels(load_image(path))[0, :, 0].tolist() == [0, 1, 100, 255]
    assert pixels(load_image(Image.fromarray(values.astype(np.int32))))[0, :, 1].tolist() == [0, 1, 100, 255]


@pytest.mark.parametrize(
    ("values", "dtype", "expected"),
    [
        ([0, 100, 255], np.int32, [0, 100, 255]),
        ([-100, 0, 100], np.int32, [0, 128, 255]),
        ([0, 500_000, 1_000_000], np.int32, [0, 128, 255]),
        ([0, 0.2, 1], np.float32, [0, 51, 255]),
        ([0, 20, 255], np.float32, [0, 20, 255]),
        ([-1, 0, 1], np.float32, [0, 128, 255]),
    ],
)
def test_deep_grey_ranges(values: list[float], dtype: type, expected: list[int]) -> None:
    image = Image.fromarray(np.array([values], dtype=dtype))
    assert pixels(load_image(image))[0, :, 0].tolist() == expected


def test_one_bit_cmyk_and_smallest_image() -> None:
    assert pixels(load_image(Image.new("1", (1, 1), 1))).tolist() == [[[255, 255, 255]]]
    assert pixels(load_image(Image.new("CMYK", (1, 1), (0, 255, 255, 0)))).tolist() == [[[255, 0, 0]]]
    assert load_image(np.zeros((1, 1, 3), np.uint8)).size == (1, 1)


def test_first_frame_of_an_animation(tmp_path: Path) -> None:
    frames = [Image.new("L", (4, 3), value) for value in (10, 200)]
    path = save(tmp_path / "moving.gif", frames[0], save_all=True, append_images=frames[1:])
    assert pixels(load_image(path)).max() == 10


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.98])
@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "tiff", "gif", "webp"])
def test_truncated_files(tmp_path: Path, share: float, suffix: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    whole = save(tmp_path / f"whole.{suffix}", Image.fromarray(noise)).read_bytes()
    path = tmp_path / f"cut.{suffix}"
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(InputError, match=f"cut.{suffix}"):
        load_image(path)


def test_files_that_are_no_images(tmp_path: Path) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("not an image")
    with pytest.raises(InputError, match=r"notes\.txt.*not an image"):
        load_image(text)
    with pytest.raises(MissingFileError, match=r"no file .*absent\.png"):
        load_image(tmp_path / "absent.png")
    with pytest.raises(InputError, match="is a folder"):
        load_image(tmp_path)
    with pytest.raises(InputError, match="cannot read"):
        load_image("a\0b.png")
    with pytest.raises(InputError, match="cannot read"):
        load_image("x" * 5000)


@pytest.mark.parametrize("url", ["https://example.com/a.png", "file:///a.png", "data:image/png;base64,iVBO"])
def test_url_says_download_it_first(url: str) -> None:
    with pytest.raises(InputError, match="download it first"):
        load_image(url)


def write_png_header(path: Path, width: int, height: int) -> Path:
    """A PNG that claims a size and ends before its first pixel."""
    chunks = [b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0), b"IDAT"]
    parts = [struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
    return path


def test_too_large_file_is_named_before_decoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_png_header(tmp_path / "huge.png", 20_000, 20_000)
    limit = Image.MAX_IMAGE_PIXELS
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(InputError, match="20000x20000 is too large"):
            load_image(path)
        with Image.open(save(tmp_path / "small.png", Image.new("L", (30, 20)))) as lazy:
            monkeypatch.setattr(images, "MAX_IMAGE_PIXELS", 599)
            monkeypatch.setattr(lazy, "load", lambda: pytest.fail("decoded"))
            with pytest.raises(InputError, match="30x20 is too large"):
                load_image(lazy)
    assert limit == Image.MAX_IMAGE_PIXELS


def test_between_pillow_limit_and_ours_no_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "large.png", Image.new("L", (30, 20), 9))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_image(path).size == (30, 20)
    assert Image.MAX_IMAGE_PIXELS == 100


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (np.zeros((4, 4, 3), np.float32), "uint8, got float32"),
        (np.zeros((4, 4, 3), np.uint16), "uint8, got uint16"),
        (np.zeros((3, 4, 5), np.uint8), r"1, 3 or 4 channels, got shape \(3, 4, 5\)"),
        (np.zeros((2, 4, 4, 3), np.uint8), r"got shape \(2, 4, 4, 3\).*list of images"),
        (np.zeros(4, np.uint8), r"got shape \(4,\)"),
        (np.zeros((0, 4, 3), np.uint8), "4x0 has no pixels"),
        (np.broadcast_to(np.uint8(0), (20_000, 20_000)), "20000x20000 is too large"),
        (torch.zeros(5, 4, 3, dtype=torch.uint8), r"got shape \(5, 4, 3\).*channels first"),
        (torch.zeros(3, 4, 4, dtype=torch.int64), "uint8, got int64"),
        (torch.full((3, 4, 4), torch.nan), "NaN"),
        (torch.full((3, 4, 4), 200.0), r"\[0, 1\], got 200 to 200"),
        (torch.full((3, 4, 4), -1.5), r"\[0, 1\], got -1.5"),
        (Image.fromarray(np.full((2, 2), np.nan, np.float32)), "NaN"),
        (Image.new("RGB", (0, 5)), "0x5 has no pixels"),
        ([np.zeros((4, 4, 3), np.uint8)], "cannot read a list"),
        (None, "cannot read a NoneType"),
    ],
)
def test_unusable_inputs(source: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_image(source)


def test_open_image_keeps_the_mode(tmp_path: Path) -> None:
    palette = Image.new("P", (2, 1), 3)
    palette.putpalette(list(range(12)))
    assert np.asarray(open_image(save(tmp_path / "labels.png", palette))).tolist() == [[3, 3]]
    with pytest.raises(MissingFileError, match="^mask image"):
        open_image(tmp_path / "absent.png", "mask image")


def test_postscript_never_reaches_an_interpreter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "photo.eps", Image.new("RGB", (4, 3)))
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *args, **options: pytest.fail("interpreted"))
    for name in ("photo.eps", "photo.png"):
        with pytest.raises(InputError, match="not an image of a known format"):
            open_image(path.rename(tmp_path / name), "mask image")
        path = tmp_path / name


def test_unknown_formats_of_an_older_pillow_do_no_harm(
    photo: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "FILE_FORMATS", ("NOT-YET", "PNG"))
    path = save(tmp_path / "photo.png", Image.fromarray(photo))
    np.testing.assert_array_equal(pixels(load_image(path)), photo)


@pytest.mark.parametrize("kind", ["png", "gif", "bmp", "dib", "tiff", "ppm", "ico", "tga", "jpg", "jp2", "webp"])
def test_common_formats_are_read(tmp_path: Path, kind: str) -> None:
    path = save(tmp_path / f"photo.{kind}", Image.new("RGB", (32, 32), (200, 30, 60)))
    assert np.abs(pixels(load_image(path)).astype(int) - (200, 30, 60)).max() <= 4
