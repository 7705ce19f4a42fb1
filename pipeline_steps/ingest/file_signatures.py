"""File formats by extension and by the first bytes of the content. Constants are compared; nothing is parsed."""

from __future__ import annotations

import math
from typing import BinaryIO, Literal, NamedTuple

from pipeline_steps.ingest.reason_codes import RejectedItemError

Kind = Literal["image", "audio", "unknown"]

IMAGE_EXTENSIONS = {
    "jpg": "JPEG", "jpeg": "JPEG", "jpe": "JPEG", "jfif": "JPEG", "png": "PNG", "webp": "WEBP", "gif": "GIF",
    "bmp": "BMP", "tif": "TIFF", "tiff": "TIFF",
}  # fmt: skip
AUDIO_EXTENSIONS = {
    "wav": "WAV", "flac": "FLAC", "ogg": "OGG", "oga": "OGG", "opus": "OGG", "mp3": "MP3", "aif": "AIFF",
    "aiff": "AIFF", "aifc": "AIFF",
}  # fmt: skip
_UNSUPPORTED_IMAGES = (
    "psd", "pdf", "eps", "ps", "ai", "fits", "fit", "gd", "gd2", "svg", "heic", "heif", "avif", "jp2", "j2k", "ico",
    "icns", "tga", "pcx", "ppm", "pgm", "pbm", "exr", "hdr", "dds", "xcf", "raw", "cr2", "nef", "dng", "jxl", "wmf",
)  # fmt: skip
_UNSUPPORTED_AUDIO = (
    "m4a", "aac", "wma", "au", "snd", "caf", "w64", "rf64", "amr", "ape", "wv", "mid", "midi", "mp4", "m4v", "mov", "mkv",
    "webm", "avi", "wmv", "flv", "mpg", "mpeg", "ac3", "dts", "voc", "gsm", "ra", "rm",
)  # fmt: skip
_ARCHIVES = ("zip", "tar", "gz", "tgz", "bz2", "xz", "7z", "rar", "zst")
UNSUPPORTED_EXTENSIONS = frozenset((*_UNSUPPORTED_IMAGES, *_UNSUPPORTED_AUDIO, *_ARCHIVES))
"""Media and archives that a walk quarantines by name; other files are skipped."""

_KINDS: dict[str, Kind] = {
    **dict.fromkeys((*IMAGE_EXTENSIONS, *_UNSUPPORTED_IMAGES), "image"),
    **dict.fromkeys((*AUDIO_EXTENSIONS, *_UNSUPPORTED_AUDIO), "audio"),
    **dict.fromkeys(_ARCHIVES, "unknown"),
}

_ALLOWED: tuple[tuple[bytes, Kind, str], ...] = (
    (b"\xff\xd8\xff", "image", "JPEG"), (b"\x89PNG\r\n\x1a\n", "image", "PNG"), (b"GIF87a", "image", "GIF"),
    (b"GIF89a", "image", "GIF"), (b"II*\x00", "image", "TIFF"), (b"MM\x00*", "image", "TIFF"),
    (b"II+\x00\x08\x00", "image", "TIFF"), (b"MM\x00+\x00\x08", "image", "TIFF"), (b"fLaC", "audio", "FLAC"),
    (b"OggS", "audio", "OGG"),
)  # fmt: skip
_ALLOWED_CONTAINERS: dict[tuple[bytes, bytes], tuple[Kind, str]] = {
    (b"RIFF", b"WEBP"): ("image", "WEBP"),
    (b"RIFF", b"WAVE"): ("audio", "WAV"),
    (b"RIFX", b"WAVE"): ("audio", "WAV"),
    (b"FORM", b"AIFF"): ("audio", "AIFF"),
    (b"FORM", b"AIFC"): ("audio", "AIFF"),
}
"""First four bytes and bytes 8 to 12."""

HEAD_BYTES = 512
"""Bytes by which a format is recognized."""

_BMP_HEADER_SIZES = frozenset(size.to_bytes(4, "little") for size in (12, 40, 52, 56, 64, 108, 124))
_UNSUPPORTED: tuple[tuple[int, bytes, str], ...] = (
    (0, b"%PDF", "PDF"), (0, b"8BPS", "PSD"), (0, b"%!PS", "EPS"), (0, b"\xc5\xd0\xd3\xc6", "EPS"), (0, b"SIMPLE  =", "FITS"),
    (0, b"gd2\x00", "GD"), (0, b"\x00\x00\x00\x0cjP  ", "JPEG2000"), (0, b"\xff\x4f\xff\x51", "JPEG2000"),
    (0, b"\x00\x00\x01\x00", "ICO"), (0, b"icns", "ICNS"), (0, b"DDS ", "DDS"), (0, b"gimp xcf", "XCF"),
    (0, b"\xff\x0a", "JPEG XL"), (0, b"\x76\x2f\x31\x01", "OpenEXR"), (0, b"\x1aE\xdf\xa3", "Matroska"), (0, b"RF64", "RF64"),
    (0, b"BW64", "BW64"),
    (0, b"riff", "W64"), (0, b"caff", "CAF"), (0, b".snd", "AU"), (0, b"MThd", "MIDI"), (0, b"0&\xb2u", "ASF"),
    (0, b"#!AMR", "AMR"), (0, b"MAC ", "Monkey's Audio"), (0, b"wvpk", "WavPack"), (0, b"PK\x03\x04", "ZIP"),
    (0, b"\x1f\x8b", "gzip"), (0, b"7z\xbc\xaf\x27\x1c", "7z"), (0, b"\xfd7zXZ\x00", "xz"), (0, b"BZh", "bzip2"),
    (0, b"Rar!", "RAR"), (0, b"\x28\xb5\x2f\xfd", "zstd"), (4, b"ftyp", "ISO media (MP4, HEIC, AVIF)"),
    (257, b"ustar", "tar"),
)  # fmt: skip


class FileSignature(NamedTuple):
    """Kind and format of a content; `format` of unknown content is a short description."""

    kind: Kind
    format: str
    verdict: Literal["allowed", "unsupported", "unknown"]


def id3_length(head: bytes) -> int:
    """Bytes of the ID3v2 tag that `head` (10 bytes or more) begins with, or 0. Any audio format may follow it."""
    if len(head) < 10 or head[:3] != b"ID3" or head[3] == 0xFF or head[4] == 0xFF or any(byte > 127 for byte in head[6:10]):
        return 0
    size = head[6] << 21 | head[7] << 14 | head[8] << 7 | head[9]
    return size + (20 if head[5] & 16 else 10)


def read_head(handle: BinaryIO, size: int = HEAD_BYTES) -> bytes:
    """First bytes of an open file, or those behind its ID3 tags if they are of a format with a signature."""
    head = first = handle.read(size)
    skip = 0
    while length := id3_length(head):
        skip += length
        handle.seek(skip)
        head = handle.read(size)
    handle.seek(0)
    return head if detect_format(head).verdict != "unknown" and not _mpeg_sync(head) else first


def detect_format(head: bytes) -> FileSignature:
    """Detect the format from the first bytes of a file (512 are enough)."""
    for magic, kind, name in _ALLOWED:
        if head.startswith(magic):
            return FileSignature(kind, name, "allowed")
    if head.startswith(b"BM") and head[14:18] in _BMP_HEADER_SIZES:
        return FileSignature("image", "BMP", "allowed")
    if container := _ALLOWED_CONTAINERS.get((head[:4], head[8:12])):
        return FileSignature(*container, "allowed")
    for offset, magic, name in _UNSUPPORTED:
        if head[offset : offset + len(magic)] == magic:
            return FileSignature("unknown", name, "unsupported")
    if head.startswith(b"ID3") or _mpeg_sync(head):
        return FileSignature("audio", "MP3", "allowed")
    return FileSignature("unknown", _describe(head), "unknown")


def _mpeg_sync(head: bytes) -> bool:
    """Whether the bytes are an MPEG audio frame header (layers 1-3) without reserved values."""
    return (
        len(head) >= 4
        and head[0] == 0xFF
        and head[1] & 0xE0 == 0xE0
        and (head[1] >> 3) & 3 != 1  # version
        and (head[1] >> 1) & 3 != 0  # layer
        and head[2] >> 4 not in {0, 15}  # bit rate
        and (head[2] >> 2) & 3 != 3  # sample rate
    )


def _describe(head: bytes) -> str:
    """Short description of content in an unknown format."""
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if start.startswith((b"<!doctype html", b"<html")):
        return "HTML"
    if start.startswith(b"<svg") or (start.startswith(b"<?xml") and b"<svg" in start):
        return "SVG"
    if start.startswith(b"<?xml"):
        return "XML"
    if start.startswith(b"{"):
        return "JSON or text"
    if head and all(byte >= 32 or byte in b"\t\r\n\f" for byte in head):
        return "text"
    return f"unknown content (starts with {head[:8].hex(' ')})"


def extension(name: str) -> str:
    """Lower-case extension of a file name without the dot, or an empty string."""
    base = name.rsplit("/", 1)[-1]
    return base.rsplit(".", 1)[-1].lower() if "." in base else ""


def kind_from_extension(name: str) -> Kind:
    """Kind of media that the extension of a file name stands for."""
    return _KINDS.get(extension(name), "unknown")


def has_media_extension(name: str) -> bool:
    """Whether the extension belongs to images, audio or archives, of allowed or unsupported formats."""
    return extension(name) in _KINDS


def is_candidate(name: str, head: bytes) -> bool:
    """Whether a file found by a walk is a candidate; notes, tables and license texts are not.

    An MPEG frame header has only eleven fixed bits and occurs in other files, so it counts only without an extension.
    """
    if has_media_extension(name):
        return True
    found = detect_format(head)
    return found.verdict == "allowed" and (found.format != "MP3" or not extension(name) or head.startswith(b"ID3"))


def check_format(name: str, head: bytes, size: int, max_image_bytes: float = math.inf) -> tuple[Kind, str]:
    """Kind and format by which to decode a file.

    Args:
        name: its path; only the extension is used.
        head: first bytes of the content.
        size: bytes of the whole file.
        max_image_bytes: larger images are rejected.

    Raises:
        RejectedItemError: EMPTY_FILE, AUD_EMPTY, FORMAT_NOT_ALLOWED, NOT_AN_IMAGE, AUD_CORRUPT or FILE_TOO_LARGE.
    """
    kind = kind_from_extension(name)
    suffix = extension(name)
    if not size:
        raise RejectedItemError("AUD_EMPTY" if kind == "audio" else "EMPTY_FILE", "the file has no bytes")
    found = detect_format(head)
    if found.format == "MP3" and kind == "image" and not head.startswith(b"ID3"):
        found = FileSignature("unknown", _describe(head), "unknown")  # eleven fixed bits are no proof against the name
    if found.verdict == "allowed":
        if found.kind == "image" and size > max_image_bytes:
            raise RejectedItemError("FILE_TOO_LARGE", f"{size / 1e6:.1f} MB, limit {max_image_bytes / 1e6:g} MB")
        return found.kind, found.format
    if found.verdict == "unsupported":
        raise RejectedItemError("FORMAT_NOT_ALLOWED", f"content is {found.format}; convert it to an allowed format")
    if suffix in UNSUPPORTED_EXTENSIONS:
        raise RejectedItemError("FORMAT_NOT_ALLOWED", f".{suffix} is not allowed (content: {found.format}); convert it")
    if kind == "image":
        raise RejectedItemError("NOT_AN_IMAGE", f"named .{suffix}, content is {found.format}")
    if suffix == "mp3":  # MP3 has no signature and frames may begin anywhere, so the decoder must decide
        return "audio", "MP3"
    for signature, form in ((b"OggS\x00", "OGG"), (b"fLaC\x00", "FLAC"), (b"fLaC\x80", "FLAC")):
        if kind == "audio" and signature in head:  # other bytes before the first page or block
            return "audio", form
    if kind == "audio":
        raise RejectedItemError("AUD_CORRUPT", f"named .{suffix}, content is {found.format}")
    raise RejectedItemError("FORMAT_NOT_ALLOWED", f"content is {found.format}")


def has_wrong_extension(name: str, form: str) -> bool:
    """Whether the extension stands for an allowed format other than that of the content."""
    expected = {**IMAGE_EXTENSIONS, **AUDIO_EXTENSIONS}.get(extension(name))
    return expected is not None and expected != form.split("/")[0]
