"""Reason codes of the quarantine: what each means, whether trying again may help, and what becomes of the item."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class ReasonCode(NamedTuple):
    """One line of the table of codes."""

    text: str
    action: str = "dropped"
    retryable: bool = False


CODES: dict[str, ReasonCode] = {
    "ARCHIVE_CORRUPT": ReasonCode("a tar, Arrow or Parquet file that cannot be read to its end; what came before is kept"),
    "ARCHIVE_DUPLICATE": ReasonCode("the archive holds the same name before"),
    "ARCHIVE_NO_MEDIA": ReasonCode("a table without a column of pictures or sounds"),
    "EMPTY_FILE": ReasonCode("the file has no bytes"),
    "FILE_CHANGED": ReasonCode("the bytes changed between hashing and decoding", retryable=True),
    "FILE_MISSING": ReasonCode("the metadata table names a file that is not there", retryable=True),
    "NOT_EMBEDDED": ReasonCode("a row of a table without the bytes of its picture or sound; nothing is downloaded"),
    "FILE_TOO_LARGE": ReasonCode("a picture file larger than picture.max_file_mb"),
    "FILE_UNREADABLE": ReasonCode("the file cannot be opened or read", retryable=True),
    "FORGOTTEN": ReasonCode("taken down: forgotten.csv lists this content", action="abstained"),
    "FORMAT_NOT_ALLOWED": ReasonCode("a format outside the allow-list; no decoder was called"),
    "NOT_A_FILE": ReasonCode("a folder, pipe, socket, device or circle of links"),
    "PATH_ENCODING": ReasonCode("the file name is not UTF-8"),
    "PATH_UNSAFE": ReasonCode("the path leads out of the root; nothing was opened"),
    "DECODER_CRASH": ReasonCode("the decoding process died", retryable=True),
    "DECODER_MEMORY": ReasonCode("decoding wanted more memory than limits.memory_mb", retryable=True),
    "DECODER_TIMEOUT": ReasonCode("decoding took longer than limits.timeout_seconds and was killed", retryable=True),
    "NOT_AN_IMAGE": ReasonCode("named like a picture, but the content is none"),
    "IMG_ANIMATED": ReasonCode("several frames, and picture.animated is 'refuse'"),
    "IMG_ASPECT": ReasonCode("longer side over shorter side above picture.max_aspect"),
    "IMG_BOMB": ReasonCode("more pixels than picture.max_megapixels; judged from the header"),
    "IMG_CORRUPT": ReasonCode("the decoder refused the picture"),
    "IMG_MODE": ReasonCode("a pixel type with no stated way to 8-bit RGB (32-bit samples)"),
    "IMG_TOO_SMALL": ReasonCode("shorter side below picture.min_side"),
    "IMG_TRUNCATED": ReasonCode("the file ends before the picture does"),
    "AUD_CORRUPT": ReasonCode("the decoder refused the sound, or its header is impossible"),
    "AUD_EMPTY": ReasonCode("no bytes, or no samples"),
    "AUD_HEADER_LIES": ReasonCode("the header claims more data than the file can hold"),
    "AUD_NONFINITE": ReasonCode("samples that are NaN or infinite"),
    "AUD_SILENT": ReasonCode("silent, constant, or below sound.silence_lufs", action="abstained"),
    "AUD_TOO_LONG": ReasonCode("longer than sound.max_seconds"),
    "AUD_TOO_SHORT": ReasonCode("shorter than sound.min_seconds"),
    "AUD_TRUNCATED": ReasonCode("the file ends before the sound does"),
}

REPAIRS: dict[str, str] = {
    "ALPHA_OVER_WHITE": "transparency was laid over white",
    "CMYK_TO_RGB": "four inks turned into RGB",
    "DEPTH_16": "16-bit samples rescaled to 8 bit, not clipped",
    "EXIF_IGNORED": "unreadable EXIF data; taken as upright",
    "FIRST_FRAME": "several frames; the first was taken",
    "ICC_APPLIED": "colours taken to sRGB through the embedded profile",
    "ICC_IGNORED": "the embedded colour profile could not be used",
    "ORIENTED": "turned or mirrored as EXIF says",
    "PALETTE_TO_RGB": "palette colours turned into RGB",
    "ANTIPHASE": "channels cancelled each other; the loudest one was taken",
    "CLIPPED": "more than 20 % of the samples stand at full scale",
    "DOWNMIX": "mono made as the mean of all channels",
    "LOUDNESS_TILED": "shorter than one loudness block (0.4 s): measured on repetitions",
    "PEAK_GUARD": "scaled down because samples went beyond full scale",
    "WRONG_EXTENSION": "the name says another format than the content",
}


@dataclass
class RejectedItemError(Exception):
    """An item that is not taken: a code of `CODES` and a reason that names the limit or the library's message."""

    code: str
    reason: str

    def __post_init__(self) -> None:
        if self.code not in CODES:
            raise ValueError(f"unknown quarantine code {self.code}")

    def __str__(self) -> str:
        return f"{self.code}: {self.reason}"
