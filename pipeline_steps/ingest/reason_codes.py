"""Reason codes of the quarantine, and codes of the normalizations applied to accepted items."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class ReasonCode(NamedTuple):
    """Row of the reason-code table. `retryable`: another run may give another result, so it is not cached."""

    description: str
    action: str = "dropped"
    retryable: bool = False


CODES: dict[str, ReasonCode] = {
    "ARCHIVE_CORRUPT": ReasonCode("tar, Arrow or Parquet file that cannot be read to its end; earlier members are kept"),
    "ARCHIVE_DUPLICATE": ReasonCode("archive member whose name occurred before"),
    "ARCHIVE_NO_MEDIA": ReasonCode("table without a column of images or audio"),
    "EMPTY_FILE": ReasonCode("file without bytes"),
    "FILE_CHANGED": ReasonCode("bytes changed between hashing and decoding", retryable=True),
    "FILE_MISSING": ReasonCode("file of the metadata table that does not exist", retryable=True),
    "NOT_EMBEDDED": ReasonCode("table row without embedded bytes; nothing is downloaded"),
    "FILE_TOO_LARGE": ReasonCode("image file larger than ingest.image.max_file_mb"),
    "FILE_UNREADABLE": ReasonCode("file that cannot be opened or read", retryable=True),
    "FORGOTTEN": ReasonCode("content listed in takedowns.csv", action="abstained"),
    "FORMAT_NOT_ALLOWED": ReasonCode("format that is not allowed; no decoder was called"),
    "NOT_A_FILE": ReasonCode("folder, pipe, socket, device or circular link"),
    "PATH_ENCODING": ReasonCode("file name that is not UTF-8"),
    "PATH_UNSAFE": ReasonCode("path that leads out of the root; it was not opened"),
    "DECODER_CRASH": ReasonCode("decoding process died", retryable=True),
    "DECODER_MEMORY": ReasonCode("decoding needed more memory than ingest.decoder.memory_mb", retryable=True),
    "DECODER_TIMEOUT": ReasonCode("decoding took longer than ingest.decoder.timeout_seconds", retryable=True),
    "NOT_AN_IMAGE": ReasonCode("image extension, but no image content"),
    "IMG_ANIMATED": ReasonCode("several frames, and ingest.image.animated is 'refuse'"),
    "IMG_ASPECT": ReasonCode("aspect ratio above ingest.image.max_aspect"),
    "IMG_BOMB": ReasonCode("more pixels than ingest.image.max_megapixels, by the header"),
    "IMG_CORRUPT": ReasonCode("image that the decoder cannot read"),
    "IMG_MODE": ReasonCode("pixel type without a defined conversion to 8-bit RGB (32-bit samples)"),
    "IMG_TOO_SMALL": ReasonCode("shorter side below ingest.image.min_side"),
    "IMG_TRUNCATED": ReasonCode("file that ends before the image does"),
    "AUD_CORRUPT": ReasonCode("audio that the decoder cannot read, or an impossible header"),
    "AUD_EMPTY": ReasonCode("no bytes, or no samples"),
    "AUD_HEADER_LIES": ReasonCode("header that declares more data than the file can contain"),
    "AUD_NONFINITE": ReasonCode("samples that are NaN or infinite"),
    "AUD_SILENT": ReasonCode("silent, constant, or not above ingest.audio.min_lufs", action="abstained"),
    "AUD_TOO_LONG": ReasonCode("longer than ingest.audio.max_seconds"),
    "AUD_TOO_SHORT": ReasonCode("shorter than ingest.audio.min_seconds"),
    "AUD_TRUNCATED": ReasonCode("file that ends before the audio does"),
}

NORMALIZATIONS: dict[str, str] = {
    "ALPHA_OVER_WHITE": "transparency was composited over white",
    "CMYK_TO_RGB": "CMYK was converted to RGB",
    "DEPTH_16": "16-bit samples were rescaled to 8 bit, not clipped",
    "EXIF_IGNORED": "unreadable EXIF data; the image was taken as upright",
    "FIRST_FRAME": "several frames; the first was used",
    "ICC_APPLIED": "colors were converted to sRGB with the embedded profile",
    "ICC_IGNORED": "the embedded color profile could not be used",
    "ORIENTED": "rotated or mirrored according to EXIF",
    "PALETTE_TO_RGB": "palette colors were converted to RGB",
    "BYTES_LEFT_OUT": "bytes that belong to no part of the format were left out",
    "LENGTH_COUNTED": "the header states no length or a wrong one; all samples that are present were decoded",
    "PARTS_JOINED": "several recordings one after the other in the file were joined",
    "STREAMS_LEFT_OUT": "only the first audio stream was decoded; others in the file were left out",
    "ANTIPHASE": "channels cancelled each other; the loudest one was used",
    "CLIPPED": "more than 20 % of the samples are at full scale",
    "DOWNMIX": "mono is the mean of all channels",
    "LOUDNESS_TILED": "shorter than one loudness block (0.4 s): measured on repetitions",
    "PEAK_GUARD": "scaled down because samples exceeded full scale",
    "WRONG_EXTENSION": "the extension names another format than the content has",
}


@dataclass
class RejectedItemError(Exception):
    """Rejection of an item: a code of `CODES` and a reason that names the limit or the library's message."""

    code: str
    reason: str

    def __post_init__(self) -> None:
        if self.code not in CODES:
            raise ValueError(f"unknown quarantine code {self.code}")

    def __str__(self) -> str:
        return f"{self.code}: {self.reason}"
