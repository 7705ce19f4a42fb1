"""Reason codes of the quarantine: what each means, whether trying again may help, and what becomes of the item."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class Meaning(NamedTuple):
    """One line of the table of codes."""

    text: str
    action: str = "dropped"
    retryable: bool = False


CODES: dict[str, Meaning] = {
    "ARCHIVE_CORRUPT": Meaning("a tar, Arrow or Parquet file that cannot be read to its end; what came before is kept"),
    "ARCHIVE_DUPLICATE": Meaning("the archive holds the same name before"),
    "ARCHIVE_NO_MEDIA": Meaning("a table without a column of pictures or sounds"),
    "EMPTY_FILE": Meaning("the file has no bytes"),
    "FILE_CHANGED": Meaning("the bytes changed between hashing and decoding", retryable=True),
    "FILE_MISSING": Meaning("the metadata table names a file that is not there", retryable=True),
    "NOT_EMBEDDED": Meaning("a row of a table without the bytes of its picture or sound; nothing is downloaded"),
    "FILE_TOO_LARGE": Meaning("a picture file larger than picture.max_file_mb"),
    "FILE_UNREADABLE": Meaning("the file cannot be opened or read", retryable=True),
    "FORGOTTEN": Meaning("taken down: forgotten.csv lists this content", action="abstained"),
    "FORMAT_NOT_ALLOWED": Meaning("a format outside the allow-list; no decoder was called"),
    "NOT_A_FILE": Meaning("a folder, pipe, socket, device or circle of links"),
    "PATH_ENCODING": Meaning("the file name is not UTF-8"),
    "PATH_UNSAFE": Meaning("the path leads out of the root; nothing was opened"),
    "DECODER_CRASH": Meaning("the decoding process died", retryable=True),
    "DECODER_MEMORY": Meaning("decoding wanted more memory than limits.memory_mb", retryable=True),
    "DECODER_TIMEOUT": Meaning("decoding took longer than limits.timeout_seconds and was killed", retryable=True),
    "NOT_AN_IMAGE": Meaning("named like a picture, but the content is none"),
    "IMG_ANIMATED": Meaning("several frames, and picture.animated is 'refuse'"),
    "IMG_ASPECT": Meaning("longer side over shorter side above picture.max_aspect"),
    "IMG_BOMB": Meaning("more pixels than picture.max_megapixels; judged from the header"),
    "IMG_CORRUPT": Meaning("the decoder refused the picture"),
    "IMG_MODE": Meaning("a pixel type with no stated way to 8-bit RGB (32-bit samples)"),
    "IMG_TOO_SMALL": Meaning("shorter side below picture.min_side"),
    "IMG_TRUNCATED": Meaning("the file ends before the picture does"),
    "AUD_CORRUPT": Meaning("the decoder refused the sound, or its header is impossible"),
    "AUD_EMPTY": Meaning("no bytes, or no samples"),
    "AUD_HEADER_LIES": Meaning("the header claims more data than the file can hold"),
    "AUD_NONFINITE": Meaning("samples that are NaN or infinite"),
    "AUD_SILENT": Meaning("silent, constant, or below sound.silence_lufs", action="abstained"),
    "AUD_TOO_LONG": Meaning("longer than sound.max_seconds"),
    "AUD_TOO_SHORT": Meaning("shorter than sound.min_seconds"),
    "AUD_TRUNCATED": Meaning("the file ends before the sound does"),
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
class RejectedError(Exception):
    """An item that is not taken: a code of `CODES` and a reason that names the limit or the library's message."""

    code: str
    reason: str

    def __post_init__(self) -> None:
        if self.code not in CODES:
            raise ValueError(f"unknown quarantine code {self.code}")

    def __str__(self) -> str:
        return f"{self.code}: {self.reason}"
