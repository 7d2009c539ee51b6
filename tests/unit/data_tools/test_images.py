"""What becomes of transparency, broken metadata, strips and huge images."""

import io
import struct
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from data_tools import images
from data_tools.images import Rendered, Unreadable
from data_tools.packing.metadata import without_metadata

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (9, 7, 3), dtype=np.uint8)


def _saved(picture: Image.Image, form: str, **options: object) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, form, **options)
    return stream.getvalue()


def _render(path: Path, data: bytes, channels: int = 3, size: int | None = None, **options: object) -> np.ndarray:
    path.write_bytes(data)
    result = images.render(str(path), channels, size, **options)  # type: ignore[arg-type]
    assert isinstance(result, Rendered), result
    values = np.array(Image.open(io.BytesIO(result.png)))
    assert values.reshape(result.shape).shape == result.shape
    return values


# --- transparency ---


def _over(colour: np.ndarray, alpha: np.ndarray, background: tuple[int, int, int]) -> np.ndarray:
    """Porter and Duff's "over", in float64."""
    share = alpha[..., None] / 255.0
    return colour * share + np.array(background) * (1 - share)


@pytest.mark.parametrize("form", ["PNG", "WEBP", "TIFF", "ICO"])
@pytest.mark.parametrize("background", [(255, 255, 255), (0, 0, 0), (200, 30, 90)])
def test_transparent_pixels_show_the_background(tmp_path, form, background):
    side = 16 if form == "ICO" else 9
    colour = RNG.integers(0, 256, (side, side, 3), dtype=np.uint8)
    alpha = RNG.choice(np.array([0, 1, 40, 128, 254, 255], np.uint8), (side, side))
    options = {"WEBP": {"lossless": True, "exact": True}, "ICO": {"sizes": [(side, side)]}}.get(form, {})
    data = _saved(Image.fromarray(np.dstack([colour, alpha])), form, **options)
    # Rounding in 8 bits: half a step of the product, and one of the sum.
    assert np.abs(_render(tmp_path / "x", data, background=background) - _over(colour, alpha, background)).max() <= 1


@pytest.mark.parametrize("hidden", [0, 255, 130])
@pytest.mark.parametrize(
    "kind", ["LA", "palette", "palette with alphas", "colour key", "grey key", "GIF", "APNG", "WebP"]
)
def test_hidden_colours_never_come_out(tmp_path, kind, hidden):
    """Left half opaque with value 77, right half transparent over `hidden`; on white, in every way to say so."""
    value, alpha = np.full((4, 8), 77, np.uint8), np.full((4, 8), 255, np.uint8)
    value[:, 4:], alpha[:, 4:] = hidden, 0
    rgba = Image.fromarray(np.dstack([value] * 3 + [alpha]))
    indices = Image.fromarray((alpha == 0).astype(np.uint8)).convert("P")
    indices.putpalette([77] * 3 + [hidden] * 3 + [0] * 762)
    keyed = Image.fromarray(np.dstack([value] * 3))
    other = Image.new("RGBA", (8, 4), (1, 2, 3, 255))
    data = {
        "LA": lambda: _saved(Image.fromarray(np.dstack([value, alpha])), "PNG"),
        "palette": lambda: _saved(indices, "PNG", transparency=1),
        "palette with alphas": lambda: _saved(indices, "PNG", transparency=b"\xff\x00"),
        "colour key": lambda: _saved(keyed, "PNG", transparency=(hidden,) * 3),
        "grey key": lambda: _saved(Image.fromarray(value), "PNG", transparency=hidden),
        "GIF": lambda: _saved(indices, "GIF", transparency=1),
        "APNG": lambda: _saved(rgba, "PNG", save_all=True, append_images=[other]),
        # Of black below transparency libwebp makes a smaller first frame, and no alpha: then one picture will do.
        "WebP": lambda: _saved(
            rgba, "WEBP", save_all=hidden > 0, append_images=[other] if hidden else [], lossless=True, exact=True
        ),
    }[kind]()
    for channels in (1, 3):
        values = _render(tmp_path / "x", data, channels)
        assert (values[:, :4] == 77).all() and (values[:, 4:] == 255).all()


def test_opaque_images_stay_as_they_are(tmp_path):
    assert np.array_equal(_render(tmp_path / "x", _saved(Image.fromarray(RGB), "PNG")), RGB)
    opaque = Image.fromarray(np.dstack([RGB, np.full(RGB.shape[:2], 255, np.uint8)]))
    assert np.array_equal(_render(tmp_path / "x", _saved(opaque, "PNG"), background=(9, 9, 9)), RGB)


def _png_of(bits: int, colour_type: int, samples: np.ndarray, key: tuple[int, ...]) -> bytes:
    """A PNG with a colour key, of (H, W, channels) samples of any depth, written by hand (PNG specification, 7.2)."""
    height, width = samples.shape[:2]
    rows = samples.reshape(height, -1)
    if bits == 16:
        packed = [row.astype(">u2").tobytes() for row in rows]
    else:
        each = (rows[..., None] >> np.arange(bits - 1, -1, -1)) & 1
        packed = [np.packbits(row.reshape(-1)).tobytes() for row in each]
    header = struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, 0)
    chunks = [
        (b"IHDR", header),
        (b"tRNS", struct.pack(f">{len(key)}H", *key)),
        (b"IDAT", zlib.compress(b"".join(b"\0" + row for row in packed))),
        (b"IEND", b""),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in chunks
    )


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("key", ["lowest", "highest"])
def test_colour_keys_of_grey_at_any_depth(tmp_path, bits, key):
    """Optimizers store icons so; a value v of b bits is v / (2^b - 1)."""
    most = 2**bits - 1
    values = np.array([[0, most, most // 2, 0, most, most // 2]] * 3)
    hidden = 0 if key == "lowest" else most
    expected = np.where(values == hidden, 255, np.round(values * 255 / most))
    data = _png_of(bits, 0, values[..., None], (hidden,))
    for channels in (1, 3):
        assert np.array_equal(_render(tmp_path / "x", data, channels).reshape(3, 6, -1)[..., 0], expected)


def test_colour_keys_of_16_bits(tmp_path):
    values = np.full((4, 4, 3), (0x1234, 0x5678, 0x9ABC))
    values[:, 2:] = (0x2234, 0x5678, 0x9ABC)
    rendered = _render(tmp_path / "x", _png_of(16, 2, values, (0x1234, 0x5678, 0x9ABC)))
    assert (rendered[:, :2] == 255).all() and (rendered[:, 2:] == (0x22, 0x56, 0x9A)).all()


@pytest.mark.parametrize(("bits", "alpha", "shown"), [(0, 0, 7), (8, 0, 255), (0, 255, 7), (8, 255, 7)])
def test_a_fourth_byte_that_is_no_alpha(tmp_path, bits, alpha, shown):
    """Truevision TGA 2.0, field 5.6: bits 3 to 0 of the descriptor are the bits of alpha per pixel."""
    header = struct.pack("<BBBHHBHHHHBB", 0, 0, 2, 0, 0, 0, 0, 0, 5, 4, 32, 0x20 | bits)
    values = _render(tmp_path / "x.tga", header + bytes([7, 7, 7, alpha]) * 20)
    assert values.shape == (4, 5, 3) and (values == shown).all()


# --- what is no image ---


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(80), "HEIF (HEIC)"),
        (b"\xff\x0a" + bytes(80), "JPEG XL"),
        (b"<?xml version='1.0'?><svg/>", "SVG"),
        (b"%PDF-1.7\n", "PDF"),
        (b"\n<!DOCTYPE HTML><title>403", "a web page: the download failed"),
        (b"II*\0" + struct.pack("<IHI", 8, 0, 0), "header is damaged, or of a kind"),
        (b"404 not found", "begins as no image does"),
    ],
)
def test_files_that_are_no_images_say_what_they_are(tmp_path, data, reason):
    (tmp_path / "x.jpg").write_bytes(data)
    result = images.render(str(tmp_path / "x.jpg"), 3, None)
    assert isinstance(result, Unreadable) and reason in result.reason


# --- metadata ---


def _png_with(kind: bytes, content: bytes, crc: int | None = None) -> bytes:
    data = _saved(Image.fromarray(RGB), "PNG")
    check = zlib.crc32(kind + content) if crc is None else crc
    return data[:33] + struct.pack(">I", len(content)) + kind + content + struct.pack(">I", check) + data[33:]


@pytest.mark.parametrize(
    ("kind", "content", "crc"),
    [
        (b"tEXt", b"Comment\0hello", 1),
        (b"zTXt", b"Comment\0\0" + zlib.compress(bytes(80_000_000)), None),
        (b"iCCP", b"profile\0\0not compressed", None),
        (b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + b"not compressed", None),
        (b"eXIf", b"MM\0*\xff\xff\xff\xff", None),
        (b"pHYs", b"short", None),
        (b"tIME", b"", 7),
    ],
)
def test_a_png_with_a_broken_chunk_is_kept(tmp_path, kind, content, crc):
    assert np.array_equal(_render(tmp_path / "x", _png_with(kind, content, crc)), RGB)


SEGMENTS = [b"", b"Exif\0\0", b"Exif\0\0MM\0*\0\0\0\x08", b"Exif\0\0II*\0\x08\0\0\0", b"http://ns.adobe.com/xap/1.0/\0"]
SEGMENTS += [b"ICC_PROFILE\0\x01\x02", b"MPF\0", b"Photoshop 3.0\x008BIM"]


@settings(max_examples=150, deadline=None)
@given(
    marker=st.integers(0xE1, 0xEF).filter(lambda marker: marker != 0xEE),
    start=st.sampled_from(SEGMENTS),
    rest=st.binary(max_size=60),
)
def test_a_jpeg_with_any_broken_segment_is_kept(tmp_path_factory, marker, start, rest):
    plain = _saved(Image.fromarray(RGB), "JPEG")
    content = start + rest
    data = plain[:2] + bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2) + content + plain[2:]
    values = _render(tmp_path_factory.getbasetemp() / "segment", data)
    expected = np.array(Image.open(io.BytesIO(plain)))
    turned = [np.rot90(one, k) for one in (expected, expected[::-1]) for k in range(4)]
    assert any(np.array_equal(values, one) for one in turned), "chance may write a whole orientation"


@pytest.mark.parametrize("tag", [b"EXIF", b"XMP ", b"ICCP"])
def test_a_webp_with_a_broken_chunk_is_kept(tmp_path, tag):
    data = _saved(Image.fromarray(RGB), "WEBP", lossless=True, exif=b"Exif\0\0II*\0", xmp=b"<x/>", icc_profile=b"abc")
    at = data.find(tag)
    broken = data[: at + 8] + b"\xff" + data[at + 9 :]
    assert np.array_equal(_render(tmp_path / "x", broken), RGB)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
def test_files_without_metadata_have_the_same_pixels(form):
    exif = Image.Exif()
    exif[0x010E] = "a picture"
    options = {
        "exif": exif,
        "icc_profile": b"x" * 99,
        "dpi": (72, 72),
        **({"lossless": True} if form == "WEBP" else {}),
    }
    if form == "PNG":
        options["pnginfo"] = PngImagePlugin.PngInfo()
        options["pnginfo"].add_text("Comment", "hello")
    data = _saved(Image.fromarray(RGB), form, **options)
    plain = without_metadata(data)
    assert plain is not None and len(plain) < len(data)
    with Image.open(io.BytesIO(plain)) as bare, Image.open(io.BytesIO(data)) as full:
        assert not bare.getexif() and "icc_profile" not in bare.info
        assert np.array_equal(np.array(bare), np.array(full))


@pytest.mark.parametrize(
    ("orientation", "turns", "mirrored"),
    [
        *zip((1, 3, 6, 8), (0, 2, 3, 1), [False] * 4, strict=True),
        *zip((2, 4, 5, 7), (0, 2, 1, 3), [True] * 4, strict=True),
    ],
)
@pytest.mark.parametrize("form", ["PNG", "WEBP", "TIFF"])
def test_images_are_turned_upright(tmp_path, form, orientation, turns, mirrored):
    """Counter-clockwise quarter turns after a mirroring, as table 6 of EXIF 2.32 describes the eight values."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = _saved(Image.fromarray(RGB), form, exif=exif, **({"lossless": True} if form == "WEBP" else {}))
    assert np.array_equal(_render(tmp_path / "x", data), np.rot90(RGB[:, ::-1] if mirrored else RGB, turns))


# --- size ---


@pytest.mark.parametrize(("width", "height"), [(1, 30_000), (30_000, 1), (3, 9_001), (12_345, 20)])
def test_strips_take_no_more_memory_than_squares(tmp_path, width, height):
    """Enlarged before they are cut, the first two would have 256 x 7,680,000 pixels: minutes, and 6 GB."""
    gradient = (
        np.linspace(0, 255, max(width, height)).round().astype(np.uint8).reshape(height if height > width else 1, -1)
    )
    values = (
        np.broadcast_to(gradient, (height, width))
        if width > height
        else np.broadcast_to(gradient.reshape(-1, 1), (height, width))
    )
    began = time.perf_counter()
    out = _render(tmp_path / "x", _saved(Image.fromarray(np.ascontiguousarray(values)), "PNG"), 1, 256)
    assert time.perf_counter() - began < 5
    assert out.shape == (256, 256)
    # The middle of a ramp from 0 to 255 is 127.5; a strip's middle square has a tiny part of it.
    assert abs(out.mean() - 127.5) < 1


@pytest.mark.parametrize(("width", "height"), [(64, 64), (70, 560), (200, 130)])
def test_what_is_no_strip_is_cropped_as_before(width, height):
    """The published crop, written anew without the step for strips."""
    picture = Image.fromarray(RNG.integers(0, 256, (height, width, 3), dtype=np.uint8))
    published = picture
    while min(*published.size) >= 2 * 24:
        published = published.resize(tuple(side // 2 for side in published.size), resample=Image.Resampling.BOX)
    scale = 24 / min(*published.size)
    published = published.resize(
        tuple(round(side * scale) for side in published.size), resample=Image.Resampling.BICUBIC
    )
    values = np.array(published)
    top, left = (values.shape[0] - 24) // 2, (values.shape[1] - 24) // 2
    assert np.array_equal(np.array(images.center_crop(picture, 24)), values[top : top + 24, left : left + 24])


@pytest.mark.parametrize(("width", "height"), [(2, 20_000), (20_000, 2), (640, 480)])
def test_other_shapes_are_cropped_alike(width, height):
    """A wide crop of a picture is the tall crop of the picture laid on its side."""
    picture = Image.fromarray(RNG.integers(100, 156, (height, width, 3), dtype=np.uint8))
    # Of few contrasts, so that no overshoot is cut off between the passes along rows and columns, whose order differs:
    # each halving and the resize round after each pass.
    wide = np.array(images.center_crop(picture, (24, 36)))
    tall = np.array(images.center_crop(picture.transpose(Image.Transpose.TRANSPOSE), (36, 24)))
    assert wide.shape == (24, 36, 3) and np.abs(wide.astype(int) - tall.transpose(1, 0, 2)).max() <= 2


def test_huge_images_are_decoded_smaller_or_left_out(tmp_path, monkeypatch):
    """With a limit of 10,000 pixels in place of 179 million."""
    monkeypatch.setattr(images, "MOST_PIXELS", 10_000)
    ramp = np.broadcast_to(np.linspace(0, 255, 400).round().astype(np.uint8), (400, 400))
    jpeg = _saved(Image.fromarray(np.ascontiguousarray(ramp)), "JPEG", quality=95)
    small = _render(tmp_path / "x", jpeg, 1, 16)
    assert np.abs(small.mean(0) - np.linspace(0, 255, 16, endpoint=False) - 8).max() < 3, "still the whole ramp"
    (tmp_path / "x").write_bytes(_saved(Image.fromarray(np.ascontiguousarray(ramp)), "PNG"))
    result = images.render(str(tmp_path / "x"), 1, 16)
    assert isinstance(result, Unreadable) and "400x400 are more than 10000 pixels" in result.reason
    assert Image.MAX_IMAGE_PIXELS is not None, "Pillow's own limit is back"


def test_a_bomb_is_left_out_without_being_decoded(tmp_path):
    """60,000 x 60,000 pixels in 50 kB."""
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 1, 0, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(bytes(1 << 20))), (b"IEND", b"")]
    data = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in chunks
    )
    (tmp_path / "x").write_bytes(data)
    result = images.render(str(tmp_path / "x"), 3, 64)
    assert isinstance(result, Unreadable) and "60000x60000" in result.reason


def test_a_pointer_of_git_lfs_says_what_it_is(tmp_path):
    (tmp_path / "x.png").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n")
    result = images.render(str(tmp_path / "x.png"), 3, None)
    assert isinstance(result, Unreadable) and "git lfs pull" in result.reason
