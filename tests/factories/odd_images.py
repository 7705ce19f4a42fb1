"""Corpus of odd images with the pixels that they show: depths, color models, alpha, profiles, damaged metadata."""

from __future__ import annotations

import io
import zlib
from collections.abc import Callable
from typing import NamedTuple

import imagecodecs
import numpy as np
import numpy.typing as npt
import tifffile
from PIL import Image

from tests.factories import image_files as make
from tests.factories.image_files import (
    LONG,
    RATIONAL,
    SHORT,
    bmp,
    encode,
    exif,
    gradient,
    gray,
    icc,
    png_chunk,
    srgb_codes,
    tiff,
    with_chunk,
    with_segment,
)  # fmt: skip

Truth = npt.NDArray[np.floating | np.integer]
COLOR, GRAY = gradient(), gray()
UPRIGHT = np.rot90(COLOR, -1)
"""`COLOR` with orientation 6 applied."""

HALF = COLOR * (128 / 255) + 127
"""`COLOR` with alpha 128 over white."""

NOT_SUPPORTED = "FORMAT_NOT_ALLOWED"


class OddImage(NamedTuple):
    """File with its upright pixels (gray [H, W] or RGB [H, W, 3]) and marks, or with the code of its refusal."""

    name: str
    build: Callable[[], bytes]
    pixels: Callable[[], Truth] | None = None
    marks: frozenset[str] = frozenset()
    code: str = ""


CASES: list[OddImage] = []


def accepted(name: str, build: Callable[[], bytes], pixels: Truth | Callable[[], Truth], *marks: str) -> None:
    CASES.append(OddImage(name, build, pixels if callable(pixels) else lambda: pixels, frozenset(marks)))


def refused(name: str, build: Callable[[], bytes], code: str) -> None:
    CASES.append(OddImage(name, build, code=code))


def codes(bits: int, pixels: Truth = GRAY) -> npt.NDArray[np.int64]:
    """Samples of a number of bits whose largest value is white."""
    return np.rint(pixels / 255 * (2**bits - 1)).astype(np.int64)


def with_alpha(alpha: int, pixels: Truth = COLOR) -> npt.NDArray[np.uint8]:
    return np.dstack([pixels, np.full(pixels.shape[:2], alpha, np.uint8)]).astype(np.uint8)


def inks(pixels: Truth = COLOR) -> npt.NDArray[np.uint8]:
    """CMYK without black ink."""
    return np.dstack([255 - pixels, np.zeros(pixels.shape[:2], np.uint8)]).astype(np.uint8)


def by_tifffile(array: Truth, **options: object) -> bytes:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, array, **options)
    return buffer.getvalue()


def lab_pixels(lightness: Truth) -> Truth:
    """Gray of CIE L* 0..255."""
    scaled = lightness / 255 * 100
    luminance = np.where(scaled > 8, ((scaled + 16) / 116) ** 3, scaled * 27 / 24389)
    return srgb_codes(luminance)


# ---------------------------------------------------------------- TIFF

for _bits in (1, 2, 4, 8):
    for _white_is_zero in (False, True):
        accepted(
            f"gray-{_bits}-{'white-0' if _white_is_zero else 'black-0'}.tif",
            lambda bits=_bits, flip=_white_is_zero: tiff(
                2**bits - 1 - codes(bits) if flip else codes(bits), bits, int(not flip)
            ),
            lambda bits=_bits: codes(bits) * 255 / (2**bits - 1),
        )
for _order, _name in (("<", "little"), (">", "big")):
    accepted(f"gray-16-{_name}.tif", lambda order=_order: tiff(codes(16), 16, order=order), GRAY, "DEPTH_16")
    accepted(f"color-16-{_name}.tif", lambda order=_order: tiff(codes(16, COLOR), 16, order=order), COLOR)
accepted("gray-16-white-0.tif", lambda: tiff(65_535 - codes(16), 16, 0), GRAY, "DEPTH_16")
accepted("gray-16-white-0-big.tif", lambda: tiff(65_535 - codes(16), 16, 0, ">"), GRAY, "DEPTH_16")
accepted("gray-12.tif", lambda: tiff(codes(12), 12), GRAY, "DEPTH_16")
accepted("gray-12-in-16.tif", lambda: tiff(codes(12), 16, tags={281: (SHORT, [4095])}), GRAY, "DEPTH_16")
accepted("gray-10-in-16.tif", lambda: tiff(codes(10), 16, tags={281: (SHORT, [1023])}), GRAY, "DEPTH_16")
accepted("statistics-16.tif", lambda: tiff(codes(16) // 2, 16, tags={281: (SHORT, [40_000])}), GRAY / 2, "DEPTH_16")
for _bits in (10, 12, 14):
    accepted(f"gray-{_bits}-white-0.tif", lambda bits=_bits: tiff(2**bits - 1 - codes(bits), bits, 0), GRAY, "DEPTH_16")
    accepted(f"color-{_bits}.tif", lambda bits=_bits: tiff(codes(bits, COLOR), bits), COLOR, "DEPTH_16")
    accepted(f"color-{_bits}-big.tif", lambda bits=_bits: tiff(codes(bits, COLOR), bits, order=">"), COLOR, "DEPTH_16")
for _bits in (10, 14):
    accepted(f"gray-{_bits}.tif", lambda bits=_bits: tiff(codes(bits), bits), GRAY, "DEPTH_16")
accepted(
    "gray-12-turned.tif",
    lambda: tiff(codes(12), 12, 0, tags={274: (SHORT, [6])}),
    255 - np.rot90(GRAY, -1),
    "DEPTH_16",
    "ORIENTED",
)
refused("gray-14-cut.tif", lambda: tiff(codes(14), 14)[:-900], "IMG_TRUNCATED")
refused("color-9.tif", lambda: tiff(codes(9, COLOR), 9), NOT_SUPPORTED)
refused("signed-8.tif", lambda: tiff(GRAY, tags={339: (SHORT, [2])}), "IMG_MODE")
refused("signed-16.tif", lambda: tiff(codes(16), 16, tags={339: (SHORT, [2])}), "IMG_MODE")
refused("gray-32.tif", lambda: tiff(codes(16), 32), "IMG_MODE")
for _kind in ("float16", "float64"):
    refused(f"{_kind}.tif", lambda kind=_kind: by_tifffile(GRAY.astype(kind)), NOT_SUPPORTED)
refused("float32.tif", lambda: by_tifffile(GRAY.astype(np.float32)), "IMG_MODE")
accepted("bigtiff.tif", lambda: tiff(GRAY, big=True), GRAY)
accepted("bigtiff-16.tif", lambda: tiff(codes(16), 16, big=True), GRAY, "DEPTH_16")
refused("bigtiff-big-endian.tif", lambda: tiff(GRAY, order=">", big=True), NOT_SUPPORTED)
accepted("extra-unspecified.tif", lambda: tiff(with_alpha(0), tags={338: (SHORT, [0])}), COLOR)
accepted("alpha-0.tif", lambda: tiff(with_alpha(0), tags={338: (SHORT, [2])}), COLOR, "ALPHA_IGNORED")
accepted("alpha-0-untagged.tif", lambda: tiff(with_alpha(0)), COLOR, "ALPHA_IGNORED")
accepted("alpha-128.tif", lambda: tiff(with_alpha(128), tags={338: (SHORT, [2])}), HALF, "ALPHA_OVER_WHITE")
accepted(
    "alpha-premultiplied.tif",
    lambda: tiff(with_alpha(128, np.rint(COLOR * (128 / 255)).astype(np.uint8)), tags={338: (SHORT, [1])}),
    HALF, "ALPHA_OVER_WHITE",
)  # fmt: skip
refused("alpha-premultiplied-0.tif", lambda: tiff(with_alpha(0, COLOR * 0), tags={338: (SHORT, [1])}), "IMG_TRANSPARENT")
accepted("gray-alpha-0.tif", lambda: tiff(with_alpha(0, GRAY), 8, 1, tags={338: (SHORT, [2])}), GRAY, "ALPHA_IGNORED")
accepted("inks.tif", lambda: tiff(inks(), 8, 5), COLOR, "CMYK_TO_RGB")
accepted("inks-16.tif", lambda: tiff(codes(16, inks()), 16, 5), COLOR, "CMYK_TO_RGB")
accepted("lab.tif", lambda: tiff(np.dstack([GRAY, GRAY * 0, GRAY * 0]), 8, 8), lambda: lab_pixels(GRAY))
refused("luma-chroma.tif", lambda: tiff(COLOR, 8, 6), NOT_SUPPORTED)
for _compression in ("zlib", "lzw", "packbits", "zstd", "lzma"):
    accepted(
        f"color-{_compression}.tif",
        lambda compression=_compression: by_tifffile(COLOR, photometric="rgb", compression=compression),
        COLOR,
    )
    accepted(
        f"deep-{_compression}.tif",
        lambda compression=_compression: by_tifffile(codes(16).astype(np.uint16), compression=compression),
        GRAY, "DEPTH_16",
    )  # fmt: skip
refused("webp-inside.tif", lambda: by_tifffile(COLOR, photometric="rgb", compression="webp"), NOT_SUPPORTED)
refused("jpeg-2000-inside.tif", lambda: by_tifffile(COLOR, photometric="rgb", compression="jpeg2000"), NOT_SUPPORTED)
accepted("planes.tif", lambda: by_tifffile(COLOR.transpose(2, 0, 1), photometric="rgb", planarconfig="separate"), COLOR)
refused(
    "planes-16.tif",
    lambda: by_tifffile(codes(16, COLOR).astype(np.uint16).transpose(2, 0, 1), photometric="rgb", planarconfig="separate"),
    NOT_SUPPORTED,
)
accepted("tiles.tif", lambda: by_tifffile(COLOR, photometric="rgb", tile=(32, 32)), COLOR)
accepted("turned.tif", lambda: tiff(COLOR, tags={274: (SHORT, [6])}), UPRIGHT, "ORIENTED")
accepted(
    "turned-with-bad-fraction.tif", lambda: tiff(COLOR, tags={274: (SHORT, [8]), 282: (RATIONAL, [5])}),
    lambda: np.rot90(COLOR), "ORIENTED",
)  # fmt: skip
accepted("unknown-tag.tif", lambda: tiff(COLOR, tags={65_000: (LONG, [1, 2, 3])}), COLOR)
refused("cut.tif", lambda: tiff(COLOR)[:-4000], "IMG_TRUNCATED")

# ---------------------------------------------------------------- profiles

_LINEAR_GRAY, _LINEAR_COLOR = srgb_codes(GRAY / 255), srgb_codes(COLOR / 255)
_DARK_GRAY = srgb_codes((GRAY / 255) ** 1.8)
LINEAR, LINEAR_GRAY = icc("RGB", 1.0), icc("GRAY", 1.0)
for _form in ("PNG", "TIFF", "JPEG"):
    accepted(
        f"linear-gray.{_form.lower()}",
        lambda form=_form: encode(GRAY, form, icc_profile=LINEAR_GRAY),
        _LINEAR_GRAY,
        "ICC_APPLIED",
    )
accepted(
    "dark-gray.png", lambda: encode(GRAY, "PNG", icc_profile=icc("GRAY", 1.8)), srgb_codes((GRAY / 255) ** 1.8), "ICC_APPLIED"
)
accepted(
    "linear-deep-gray.png", lambda: encode(codes(16).astype(np.uint16), "PNG", icc_profile=LINEAR_GRAY), _LINEAR_GRAY,
    "DEPTH_16", "ICC_APPLIED",
)  # fmt: skip
accepted(
    "linear-gray-alpha.png",
    lambda: encode(with_alpha(255, GRAY), "PNG", icc_profile=LINEAR_GRAY),
    _LINEAR_GRAY,
    "ICC_APPLIED",
)
accepted("gray-with-color-profile.png", lambda: encode(GRAY, "PNG", icc_profile=LINEAR), _LINEAR_GRAY, "ICC_APPLIED")
accepted("color-with-gray-profile.png", lambda: encode(COLOR, "PNG", icc_profile=LINEAR_GRAY), COLOR, "ICC_IGNORED")
accepted("linear.png", lambda: encode(COLOR, "PNG", icc_profile=LINEAR), _LINEAR_COLOR, "ICC_APPLIED")
accepted(
    "linear-named-srgb.png", lambda: encode(COLOR, "PNG", icc_profile=icc("RGB", 1.0, "sRGB")), _LINEAR_COLOR, "ICC_APPLIED"
)
accepted(
    "swapped-named-srgb.png", lambda: encode(COLOR, "PNG", icc_profile=icc("RGB", 1.0, "sRGB", swap=True)),
    _LINEAR_COLOR[..., ::-1], "ICC_APPLIED",
)  # fmt: skip
accepted("broken-profile.png", lambda: encode(COLOR, "PNG", icc_profile=b"junk" * 50), COLOR, "ICC_IGNORED")

# ---------------------------------------------------------------- PNG


def png_with(name: bytes, data: bytes, checksum: int | None = None) -> bytes:
    return with_chunk(encode(COLOR, "PNG"), png_chunk(name, data, checksum))


_HUGE = zlib.compress(bytes(40_000_000))
accepted("2-MB-text.png", lambda: png_with(b"zTXt", b"workflow\x00\x00" + zlib.compress(bytes(2_000_000))), COLOR)
for _name, _data in (
    ("zTXt", b"w\x00\x00" + _HUGE), ("iTXt", b"w\x00\x01\x00\x00\x00" + _HUGE), ("iCCP", b"w\x00\x00" + _HUGE),
    ("gAMA", b"\x00"), ("pHYs", b"\x00"), ("cHRM", b"\x00"), ("sRGB", b""), ("acTL", b"\x00"), ("tRNS", b"\x00"),
):  # fmt: skip
    accepted(f"bad-{_name}.png", lambda name=_name, data=_data: png_with(name.encode(), data), COLOR, "METADATA_IGNORED")
accepted("text-checksum.png", lambda: png_with(b"tEXt", b"a\x00b", 1), COLOR, "METADATA_IGNORED")
accepted("exif.png", lambda: png_with(b"eXIf", exif(6)[6:]), UPRIGHT, "ORIENTED")
accepted(
    "exif-and-huge-text.png", lambda: with_chunk(png_with(b"eXIf", exif(6)[6:]), png_chunk(b"zTXt", b"w\x00\x00" + _HUGE)),
    UPRIGHT, "METADATA_IGNORED", "ORIENTED",
)  # fmt: skip
accepted("bytes-after.png", lambda: encode(COLOR, "PNG") + b"junk" * 99, COLOR)
accepted("gray-16.png", lambda: encode(codes(16).astype(np.uint16), "PNG"), GRAY, "DEPTH_16")
accepted("color-16.png", lambda: imagecodecs.png_encode(codes(16, COLOR).astype(np.uint16)), COLOR)
refused("transparent.png", lambda: encode(with_alpha(0), "PNG"), "IMG_TRANSPARENT")
refused("transparent.webp", lambda: encode(with_alpha(0), "WEBP", lossless=True), "IMG_TRANSPARENT")
refused("transparent.gif", lambda: encode(with_alpha(0), "GIF"), "IMG_TRANSPARENT")
refused("apple.png", lambda: encode(COLOR, "PNG")[:8] + png_chunk(b"CgBI", bytes(4)) + encode(COLOR, "PNG")[8:], NOT_SUPPORTED)

# ---------------------------------------------------------------- JPEG


def jpeg(**options: object) -> bytes:
    return encode(COLOR, "JPEG", quality=98, subsampling=0, **options)


_BAD_FRACTION = (282, 5, 1, b"\xff\xff\xff\x7f")
for _name, _entry in (
    ("bad-fraction", _BAD_FRACTION), ("bad-position", (34_853, 4, 1, b"\xff\xff\xff\x7f")),
    ("bad-directory", (34_665, 4, 1, b"\xff\xff\xff\x7f")), ("endless-directory", (34_665, 4, 1, b"\x08\x00\x00\x00")),
    ("bad-type", (282, 99, 1, bytes(4))), ("huge-count", (270, 2, 0x7FFFFFFF, bytes(4))),
):  # fmt: skip
    accepted(f"{_name}.jpg", lambda entry=_entry: with_segment(jpeg(), 0xE1, exif(6, entry)), UPRIGHT, "ORIENTED")
accepted("exif-cut.jpg", lambda: with_segment(jpeg(), 0xE1, exif(6, _BAD_FRACTION)[:36]), UPRIGHT, "ORIENTED")
accepted("exif-garbage.jpg", lambda: with_segment(jpeg(), 0xE1, b"Exif\x00\x00garbage"), COLOR)
for _name, _marker, _data in (
    ("adobe", 0xEE, b"Adobe"), ("jfif", 0xE0, b"JFIF"), ("profile", 0xE2, b"ICC_PROFILE\x00"),
):  # fmt: skip
    accepted(
        f"short-{_name}.jpg", lambda marker=_marker, data=_data: with_segment(jpeg(), marker, data), COLOR, "METADATA_IGNORED"
    )
accepted("bad-photoshop.jpg", lambda: with_segment(jpeg(), 0xED, b"Photoshop 3.0\x008BIM\x03\xed\x00\x00" + b"\xff" * 4), COLOR)
accepted("bad-multi-picture.jpg", lambda: with_segment(jpeg(), 0xE2, b"MPF\x00II*\x00\x08\x00\x00\x00\xff\xff"), COLOR)
accepted("bytes-after.jpg", lambda: jpeg() + b"x" * 9000, COLOR)


def cmyk_jpeg(marker: bool) -> bytes:
    """CMYK as Adobe's programs store it (inverted, with their marker), or with 0 as no ink and without a marker."""
    buffer = io.BytesIO()  # Pillow inverts and sets the marker
    Image.fromarray(inks() if marker else 255 - inks(), "CMYK").save(buffer, "JPEG", quality=98, subsampling=0)
    return buffer.getvalue() if marker else make.without_segment(buffer.getvalue(), 0xEE)


accepted("inks-adobe.jpg", lambda: cmyk_jpeg(True), COLOR, "CMYK_TO_RGB")
accepted("inks-plain.jpg", lambda: cmyk_jpeg(False), COLOR, "CMYK_ASSUMED", "CMYK_TO_RGB")
refused("gray-12.jpg", lambda: imagecodecs.jpeg_encode(codes(12).astype(np.uint16), bitspersample=12), NOT_SUPPORTED)
refused("jpeg-ls.jpg", lambda: imagecodecs.jpegls_encode(GRAY), NOT_SUPPORTED)

# ---------------------------------------------------------------- BMP and others

for _header in (56, 108, 124):
    accepted(f"alpha-0-{_header}.bmp", lambda header=_header: bmp(COLOR, header, 0), COLOR, "ALPHA_IGNORED")
    accepted(f"alpha-128-{_header}.bmp", lambda header=_header: bmp(COLOR, header, 128), HALF, "ALPHA_OVER_WHITE")
accepted("unused-byte.bmp", lambda: bmp(COLOR, 40, 0), COLOR)
for _declared in (0, 1, 18_500, 0xFFFFFFFF):
    accepted(f"declares-{_declared}.bmp", lambda declared=_declared: bmp(COLOR, declared=declared), COLOR)
refused("cut.bmp", lambda: bmp(COLOR)[:-500], "IMG_TRUNCATED")
accepted("bytes-after.webp", lambda: encode(COLOR, "WEBP", lossless=True) + b"junk", COLOR)
for _name, _head in (("jpeg-xr.jpg", b"II\xbc\x01"), ("moving.png", b"\x8aMNG"), ("scan.tif", b"FLIF")):
    refused(_name, lambda head=_head: head + bytes(300), NOT_SUPPORTED)
