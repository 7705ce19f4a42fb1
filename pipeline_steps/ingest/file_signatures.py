"""What a file's first bytes say it is. Constants are compared; nothing is parsed."""

from __future__ import annotations

from typing import Literal, NamedTuple

from pipeline_steps.ingest.reason_codes import RejectedItemError

Kind = Literal["image", "audio", "unknown"]

PICTURE_EXTENSIONS = {
    "jpg": "JPEG", "jpeg": "JPEG", "jpe": "JPEG", "jfif": "JPEG", "png": "PNG", "webp": "WEBP", "gif": "GIF",
    "bmp": "BMP", "tif": "TIFF", "tiff": "TIFF",
}  # fmt: skip
SOUND_EXTENSIONS = {
    "wav": "WAV", "flac": "FLAC", "ogg": "OGG", "oga": "OGG", "opus": "OGG", "mp3": "MP3", "aif": "AIFF",
    "aiff": "AIFF", "aifc": "AIFF",
}  # fmt: skip
FOREIGN_EXTENSIONS = {
    **dict.fromkeys(
        ("psd", "pdf", "eps", "ps", "ai", "fits", "fit", "gd", "gd2", "svg", "heic", "heif", "avif", "jp2", "j2k", "ico",
         "icns", "tga", "pcx", "ppm", "pgm", "pbm", "exr", "hdr", "dds", "xcf", "raw", "cr2", "nef", "dng", "jxl", "wmf"),
        "image",
    ),
    **dict.fromkeys(
        ("m4a", "aac", "wma", "au", "snd", "caf", "w64", "rf64", "amr", "ape", "wv", "mid", "midi", "mp4", "m4v", "mov", "mkv",
         "webm", "avi", "wmv", "flv", "mpg", "mpeg", "ac3", "dts", "voc", "gsm", "ra", "rm"),
        "audio",
    ),
    **dict.fromkeys(("zip", "tar", "gz", "tgz", "bz2", "xz", "7z", "rar", "zst"), "unknown"),
}  # fmt: skip
"""Media (and archives of them) that are named in the quarantine instead of being passed over like a text file."""

_FOREIGN: tuple[tuple[int, bytes, str], ...] = (
    (0, b"%PDF", "PDF"),
    (0, b"8BPS", "PSD"),
    (0, b"%!PS", "EPS"),
    (0, b"\xc5\xd0\xd3\xc6", "EPS"),
    (0, b"SIMPLE  =", "FITS"),
    (0, b"gd2\x00", "GD"),
    (0, b"\x00\x00\x00\x0cjP  ", "JPEG2000"),
    (0, b"\xff\x4f\xff\x51", "JPEG2000"),
    (0, b"\x00\x00\x01\x00", "ICO"),
    (0, b"icns", "ICNS"),
    (0, b"DDS ", "DDS"),
    (0, b"gimp xcf", "XCF"),
    (0, b"\xff\x0a", "JPEG XL"),
    (0, b"\x76\x2f\x31\x01", "OpenEXR"),
    (0, b"\x1aE\xdf\xa3", "Matroska"),
    (0, b"RF64", "RF64"),
    (0, b"riff", "W64"),
    (0, b"caff", "CAF"),
    (0, b".snd", "AU"),
    (0, b"MThd", "MIDI"),
    (0, b"0&\xb2u", "ASF"),
    (0, b"#!AMR", "AMR"),
    (0, b"MAC ", "Monkey's Audio"),
    (0, b"wvpk", "WavPack"),
    (0, b"PK\x03\x04", "ZIP"),
    (0, b"\x1f\x8b", "gzip"),
    (0, b"7z\xbc\xaf\x27\x1c", "7z"),
    (0, b"\xfd7zXZ\x00", "xz"),
    (0, b"BZh", "bzip2"),
    (0, b"Rar!", "RAR"),
    (0, b"\x28\xb5\x2f\xfd", "zstd"),
    (4, b"ftyp", "ISO media (MP4, HEIC, AVIF)"),
    (257, b"ustar", "tar"),
)


Verdict = Literal["allowed", "foreign", "unknown"]


class FileSignature(NamedTuple):
    """`format` is an allowed or a known foreign format's name or, of unknown content, what it looks like."""

    kind: Kind
    format: str
    verdict: Verdict


def detect_format(head: bytes) -> FileSignature:
    """Judge a file by its first bytes (512 are enough); unknown content is described in `format`."""
    if head.startswith(b"\xff\xd8\xff"):
        return FileSignature("image", "JPEG", "allowed")
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return FileSignature("image", "PNG", "allowed")
    if head.startswith((b"GIF87a", b"GIF89a")):
        return FileSignature("image", "GIF", "allowed")
    if head.startswith((b"II*\x00", b"MM\x00*")):
        return FileSignature("image", "TIFF", "allowed")
    if head.startswith(b"BM") and head[14:18] in {size.to_bytes(4, "little") for size in (12, 40, 52, 56, 64, 108, 124)}:
        return FileSignature("image", "BMP", "allowed")
    if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        return FileSignature("image", "WEBP", "allowed")
    if head.startswith((b"RIFF", b"RIFX")) and head[8:12] == b"WAVE":
        return FileSignature("audio", "WAV", "allowed")
    if head.startswith(b"fLaC"):
        return FileSignature("audio", "FLAC", "allowed")
    if head.startswith(b"OggS"):
        return FileSignature("audio", "OGG", "allowed")
    if head.startswith(b"FORM") and head[8:12] in {b"AIFF", b"AIFC"}:
        return FileSignature("audio", "AIFF", "allowed")
    for offset, magic, name in _FOREIGN:
        if head[offset : offset + len(magic)] == magic:
            return FileSignature("unknown", name, "foreign")
    if head.startswith(b"ID3") or _mpeg_sync(head):
        return FileSignature("audio", "MP3", "allowed")
    return FileSignature("unknown", _describe(head), "unknown")


def _mpeg_sync(head: bytes) -> bool:
    """Is this an MPEG audio layer 1-3 frame header, with no reserved value in it?"""
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
    """Lower-case extension of a file name without the dot, or ''."""
    base = name.rsplit("/", 1)[-1]
    return base.rsplit(".", 1)[-1].lower() if "." in base else ""


def kind_of_name(name: str) -> Kind:
    """What the name promises: image, audio or unknown."""
    suffix = extension(name)
    if suffix in PICTURE_EXTENSIONS:
        return "image"
    if suffix in SOUND_EXTENSIONS:
        return "audio"
    kind = FOREIGN_EXTENSIONS.get(suffix, "unknown")
    return "image" if kind == "image" else "audio" if kind == "audio" else "unknown"


def has_media_name(name: str) -> bool:
    """Whether the extension is that of a picture, a sound, or a foreign format or archive of them."""
    suffix = extension(name)
    return suffix in PICTURE_EXTENSIONS or suffix in SOUND_EXTENSIONS or suffix in FOREIGN_EXTENSIONS


def is_candidate(name: str, head: bytes) -> bool:
    """Whether a file found while walking a tree is a candidate; notes, tables and licenses beside the media are not.

    An MPEG frame header is eleven bits and turns up in other files, so it counts in nameless files alone.
    """
    if has_media_name(name):
        return True
    found = detect_format(head)
    return found.verdict == "allowed" and (found.format != "MP3" or not extension(name) or head.startswith(b"ID3"))


def check_format(name: str, head: bytes, size: int) -> tuple[Kind, str]:
    """Kind and format a file is to be decoded as.

    Args:
        name: its path; only the extension counts.
        head: first bytes of the content.
        size: bytes of the whole file.

    Raises:
        RejectedError: EMPTY_FILE, AUD_EMPTY, FORMAT_NOT_ALLOWED, NOT_AN_IMAGE or AUD_CORRUPT; no decoder need be asked.
    """
    promised = kind_of_name(name)
    suffix = extension(name)
    if not size:
        raise RejectedItemError("AUD_EMPTY" if promised == "audio" else "EMPTY_FILE", "the file has no bytes")
    found = detect_format(head)
    if found.verdict == "allowed":
        return found.kind, found.format
    if found.verdict == "foreign":
        raise RejectedItemError("FORMAT_NOT_ALLOWED", f"content is {found.format}; convert it to an allowed format")
    if suffix in FOREIGN_EXTENSIONS:
        raise RejectedItemError(
            "FORMAT_NOT_ALLOWED", f".{suffix} is not an allowed format (content: {found.format}); convert it"
        )
    if promised == "image":
        raise RejectedItemError("NOT_AN_IMAGE", f"named .{suffix}, content is {found.format}")
    if suffix == "mp3":  # MP3 has no signature: frames may begin anywhere, so the decoder must look
        return "audio", "MP3"
    if promised == "audio":
        raise RejectedItemError("AUD_CORRUPT", f"named .{suffix}, content is {found.format}")
    raise RejectedItemError("FORMAT_NOT_ALLOWED", f"content is {found.format}")


def wrong_extension(name: str, form: str) -> bool:
    """Whether the name promises another allowed format than the content has."""
    promised = {**PICTURE_EXTENSIONS, **SOUND_EXTENSIONS}.get(extension(name))
    return promised is not None and promised != form.split("/")[0]
