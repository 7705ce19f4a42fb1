"""Streams of an audio file and their decoders. Lengths are counted where a header states none or may be wrong.

libsndfile decodes ordinary files. miniaudio, which counts frames, decodes MP3 without a length and FLAC from a pipe.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import BinaryIO, NamedTuple, Protocol

import miniaudio
import numpy as np
import soundfile

from pipeline_steps.audio.loudness import full_scale_level
from pipeline_steps.core.array_types import FloatArray
from pipeline_steps.ingest.decoding.mpeg_frames import MpegPart, scan_mpeg
from pipeline_steps.ingest.decoding.ogg_pages import OggStream, scan_ogg
from pipeline_steps.ingest.decoding.riff_chunks import finish_header, scan_chunks
from pipeline_steps.ingest.file_signatures import HEAD_BYTES, id3_length
from pipeline_steps.ingest.reason_codes import RejectedItemError

FORMATS = {"WAV": {"WAV", "WAVEX"}, "FLAC": {"FLAC"}, "OGG": {"OGG"}, "MP3": {"MP3"}, "AIFF": {"AIFF"}}
"""Allowed format by signature -> formats that libsndfile may report for it."""

UNSUPPORTED_ERRORS = {4, 18, 29}
"""Error numbers of libsndfile for a coding that it does not know: unsupported, unimplemented, unspecified."""

DECODED_CODECS = re.compile(r"(8|16|24|32)-bit PCM|(32|64)-bit float|A-law|mu-law|(MS|IMA) ADPCM|GSM 6.10|G.721|AIFF.*")
"""Codings of a WAV or AIFF that libsndfile decodes: an error means damage."""

MAX_FLAC_BITS = 24
MPEG_SLACK_FRAMES = 4
"""Frames by which a decoder's length may be below the counted one: encoder delay and padding."""

MPEG_SLACK_SECONDS = 0.5


class AudioStream(Protocol):
    """One continuous stream. `declared` is the number of samples that its header states, if that must be met."""

    name: str
    rate: int
    channels: int
    full_scale: float
    declared: int | None

    def blocks(self, frames: int) -> Iterator[FloatArray]:
        """Decode from the start in blocks [T <= frames, channels]."""


class SndfileStream:
    """Stream decoded by libsndfile."""

    def __init__(self, handle: BinaryIO, form: str, name: str = "") -> None:
        self._handle = handle
        with self._open() as file:
            if file.format not in FORMATS[form]:
                raise RejectedItemError("AUD_CORRUPT", f"signature of {form}, opened as {file.format}")
            self.name = name or (f"OGG/{file.subtype.title()}" if form == "OGG" else form)
            self.rate, self.channels = file.samplerate, file.channels
            self.full_scale = full_scale_level(file.subtype)
            self.declared: int | None = file.frames if 0 <= file.frames < 1 << 62 else None

    def _open(self) -> soundfile.SoundFile:
        self._handle.seek(0)
        return soundfile.SoundFile(self._handle)

    def blocks(self, frames: int) -> Iterator[FloatArray]:
        with self._open() as file:
            while len(block := file.read(frames, dtype="float32", always_2d=True)):
                yield block


class MiniaudioStream:
    """Stream decoded by miniaudio up to its last frame. `head` replaces the first bytes of `handle`."""

    def __init__(
        self, name: str, coding: miniaudio.FileFormat, shape: tuple[int, int], handle: BinaryIO, head: bytes = b"",
        bits: int = 0, declared: int | None = None,
    ) -> None:  # fmt: skip
        self.name = name
        self.rate, self.channels = shape
        self.declared: int | None = declared
        self.full_scale = full_scale_level(f"PCM_{bits}")
        self._coding = coding
        self._input = (handle, head)

    def blocks(self, frames: int) -> Iterator[FloatArray]:
        decoder = miniaudio.stream_any(
            _HandleSource(*self._input), self._coding, miniaudio.SampleFormat.FLOAT32, self.channels, self.rate, frames
        )
        for block in decoder:
            yield np.asarray(block, dtype=np.float32).reshape(-1, self.channels)


class _HandleSource(miniaudio.StreamableSource):  # type: ignore[misc]
    """Bytes of an open file, the first of them replaced by `head`."""

    def __init__(self, handle: BinaryIO, head: bytes) -> None:
        self._handle, self._head = handle, head
        self._position = 0

    def read(self, num_bytes: int) -> bytes:
        if self._position < len(self._head):
            data = self._head[self._position : self._position + num_bytes]
        else:
            self._handle.seek(self._position)
            data = self._handle.read(num_bytes)
        self._position += len(data)
        return data

    def seek(self, offset: int, origin: miniaudio.SeekOrigin) -> bool:
        position = offset + (self._position if origin == miniaudio.SeekOrigin.CURRENT else 0)
        if position < 0:
            return False
        self._position = position
        return True


def open_streams(handle: BinaryIO, form: str, max_seconds: float, normalizations: set[str]) -> list[AudioStream]:
    """Streams of a file that play one after the other. What is left out is added to `normalizations`.

    Raises:
        RejectedItemError: FORMAT_NOT_ALLOWED, AUD_CORRUPT, AUD_TRUNCATED, AUD_HEADER_LIES or AUD_TOO_LONG.
    """
    openers: dict[str, Callable[[BinaryIO, float, set[str]], list[AudioStream]]] = {
        "MP3": _open_mpeg, "OGG": _open_ogg, "FLAC": _open_flac, "WAV": _open_wav, "AIFF": _open_aiff,
    }  # fmt: skip
    handle.seek(0)
    if form != "MP3" and (skip := _leading_tags(handle)):
        handle.seek(skip)
        handle = io.BytesIO(handle.read())
    return openers[form](handle, max_seconds, normalizations)


@contextmanager
def decoder_errors(form: str) -> Iterator[None]:
    """Turn the errors of the decoders into rejections: an unknown coding is not allowed, anything else is damage."""
    try:
        yield
    except soundfile.LibsndfileError as error:
        text = f"{form}: {error.error_string.rstrip('.')}"
        if error.code in UNSUPPORTED_ERRORS:
            raise RejectedItemError("FORMAT_NOT_ALLOWED", f"{text}; convert it to 16-bit WAV or FLAC") from error
        raise RejectedItemError("AUD_CORRUPT", text) from error
    except miniaudio.MiniaudioError as error:
        raise RejectedItemError("AUD_CORRUPT", f"{form}: {error.args[0] if error.args else error}") from error


def _leading_tags(handle: BinaryIO) -> int:
    """Bytes of the ID3 tags before the content; the position returns to 0."""
    skip = 0
    while length := id3_length(handle.read(10)):
        skip += length
        handle.seek(skip)
    handle.seek(0)
    return skip


def _not_allowed(codec: str) -> RejectedItemError:
    return RejectedItemError("FORMAT_NOT_ALLOWED", f"the content is {codec}; convert it to an allowed format")


# ---------------------------------------------------------------- MPEG


def _open_mpeg(handle: BinaryIO, max_seconds: float, normalizations: set[str], name: str = "MP3") -> list[AudioStream]:
    data = handle.read()
    scan = scan_mpeg(data, max_seconds + MPEG_SLACK_SECONDS)
    if not scan.parts:
        if data[:1] == b"\xff" and len(data) > 2 and data[1] & 0xE6 in {0xE2, 0xE4, 0xE6} and not data[2] >> 4:
            return [SndfileStream(handle, "MP3", name)]  # free format: the length of a frame is not stated
        raise RejectedItemError("AUD_CORRUPT", "no MPEG audio frames")
    if scan.seconds > max_seconds + MPEG_SLACK_SECONDS:
        raise RejectedItemError("AUD_TOO_LONG", f"more than {max_seconds:g} s")
    last = scan.parts[-1]
    if last.declared and last.frames < last.declared - (not scan.cut_bytes):  # some encoders count the header's frame too
        raise RejectedItemError("AUD_TRUNCATED", f"MP3: the header declares {last.declared} frames, {last.frames} are present")
    if scan.foreign_bytes or scan.cut_bytes:
        normalizations.add("BYTES_LEFT_OUT")
    if len(scan.parts) == 1 and name == "MP3":
        return [_mpeg_stream(last, data, handle, name, normalizations)]
    if len(scan.parts) > 1:
        normalizations.add("PARTS_JOINED")
    return [_mpeg_stream(part, data, io.BytesIO(part.payload(data, True)), name, normalizations) for part in scan.parts]


def _mpeg_stream(
    part: MpegPart, data: bytes, handle: BinaryIO, name: str, normalizations: set[str]
) -> SndfileStream | MiniaudioStream:
    """Decoder of a part: libsndfile if its length agrees with the counted frames, else miniaudio on the frames alone."""
    if part.declared not in {None, part.frames}:
        normalizations.add("LENGTH_COUNTED")
    else:
        try:
            stream = SndfileStream(handle, "MP3", name)
        except (soundfile.LibsndfileError, RejectedItemError):
            pass
        else:
            slack = part.header.samples * MPEG_SLACK_FRAMES if part.declared else 0
            agrees = stream.declared is not None and 0 <= part.samples - stream.declared <= slack
            if agrees and (stream.rate, stream.channels) == (part.header.rate, part.header.channels):
                return stream
    frames = io.BytesIO(part.payload(data, False))
    return MiniaudioStream(name, miniaudio.FileFormat.MP3, (part.header.rate, part.header.channels), frames)


# ---------------------------------------------------------------- FLAC


class _StreamInfo(NamedTuple):
    """Metadata block of FLAC that describes its samples; `total` 0 means unknown."""

    rate: int
    channels: int
    bits: int
    total: int


def _stream_info(block: bytes) -> _StreamInfo:
    packed = int.from_bytes(block[10:18], "big")
    return _StreamInfo(packed >> 44, (packed >> 41 & 7) + 1, (packed >> 36 & 31) + 1, packed & (1 << 36) - 1)


def _open_flac(handle: BinaryIO, max_seconds: float, normalizations: set[str]) -> list[AudioStream]:
    """FLAC is decoded twice: to count its samples, because decoders stop at the declared number, and to read them."""
    if start := handle.read(HEAD_BYTES).find(b"fLaC"):
        if start < 0:
            raise RejectedItemError("AUD_CORRUPT", "FLAC: no signature")
        normalizations.add("BYTES_LEFT_OUT")
        handle.seek(start)
        handle = io.BytesIO(handle.read())
    handle.seek(0)
    head = handle.read(42)
    if len(head) < 42 or head[4] & 127:
        raise RejectedItemError("AUD_CORRUPT", "FLAC: no stream information")
    info = _stream_info(head[8:])
    if info.bits > MAX_FLAC_BITS:
        raise _not_allowed(f"{info.bits}-bit FLAC")
    if not info.rate:
        raise RejectedItemError("AUD_CORRUPT", "FLAC: the sample rate is 0")
    if info.total > max_seconds * info.rate:
        raise RejectedItemError("AUD_TOO_LONG", f"{info.total / info.rate:.1f} s, limit {max_seconds:g} s")
    open_end = head[:21] + bytes([head[21] & 0xF0]) + bytes(4) + head[26:]
    shape = (info.rate, info.channels)
    counted = MiniaudioStream("FLAC", miniaudio.FileFormat.FLAC, shape, handle, open_end, info.bits)
    samples = _count(counted, max_seconds)
    if samples > info.total:
        normalizations.add("LENGTH_COUNTED")
        return [counted]
    if samples < info.total:
        raise RejectedItemError("AUD_CORRUPT", f"FLAC: {info.total} samples declared, {samples} can be decoded")
    return [SndfileStream(handle, "FLAC")]


def _count(stream: AudioStream, max_seconds: float) -> int:
    """Samples that a decoder returns, at most somewhat more than `max_seconds`."""
    samples = 0
    for block in stream.blocks(1 << 15):
        samples += len(block)
        if samples > max_seconds * stream.rate:
            break
    return samples


# ---------------------------------------------------------------- Ogg


def _open_ogg(handle: BinaryIO, max_seconds: float, normalizations: set[str]) -> list[AudioStream]:
    data = handle.read()
    scan = scan_ogg(data)
    if not scan.audio:
        if scan.others:
            raise _not_allowed(f"Ogg with {' and '.join(sorted(set(scan.others)))}")
        raise RejectedItemError("AUD_TRUNCATED" if scan.missing else "AUD_CORRUPT", f"OGG: {scan.missing or 'no audio stream'}")
    if scan.missing:
        raise RejectedItemError("AUD_TRUNCATED", f"OGG: {scan.missing}")
    if data.count(0, len(data) - scan.foreign_bytes) < scan.foreign_bytes:
        normalizations.add("BYTES_LEFT_OUT")
    if set(scan.others) - {"Skeleton"}:
        normalizations.add("STREAMS_LEFT_OUT")
    if len(scan.audio) > 1:
        normalizations.add("PARTS_JOINED")
    return [_ogg_stream(stream, data) for stream in scan.audio]


def _ogg_stream(stream: OggStream, data: bytes) -> SndfileStream | MiniaudioStream:
    payload = stream.payload(data)
    if stream.codec != "FLAC":
        return SndfileStream(io.BytesIO(payload), "OGG")
    start = payload.find(b"fLaC")
    info = _stream_info(payload[start + 8 : start + 42])
    if info.bits > MAX_FLAC_BITS:
        raise _not_allowed(f"{info.bits}-bit FLAC")
    shape = (info.rate, info.channels)
    declared = info.total or None
    return MiniaudioStream("OGG/Flac", miniaudio.FileFormat.FLAC, shape, io.BytesIO(payload), b"", info.bits, declared)


# ---------------------------------------------------------------- WAV and AIFF


def _open_wav(handle: BinaryIO, max_seconds: float, normalizations: set[str]) -> list[AudioStream]:
    return _open_chunks(handle, "WAV", max_seconds, normalizations)


def _open_aiff(handle: BinaryIO, max_seconds: float, normalizations: set[str]) -> list[AudioStream]:
    return _open_chunks(handle, "AIFF", max_seconds, normalizations)


def _open_chunks(handle: BinaryIO, form: str, max_seconds: float, normalizations: set[str]) -> list[AudioStream]:
    scan = scan_chunks(handle, form)
    if scan.truncation:
        code = "AUD_HEADER_LIES" if scan.impossible_header else "AUD_TRUNCATED"
        raise RejectedItemError(code, f"{form}: {scan.truncation}")
    if scan.foreign_bytes:
        normalizations.add("BYTES_LEFT_OUT")
    if scan.unfinished:
        normalizations.add("LENGTH_COUNTED")
        handle = io.BytesIO(finish_header(handle.read(), scan, form))
    if scan.codec in {"MP3", "MPEG"}:
        handle.seek(scan.audio_offset)
        return _open_mpeg(io.BytesIO(handle.read(scan.audio_bytes)), max_seconds, normalizations, form)
    try:
        return [SndfileStream(handle, form)]
    except soundfile.LibsndfileError as error:
        if not scan.codec or (error.code not in UNSUPPORTED_ERRORS and DECODED_CODECS.fullmatch(scan.codec)):
            raise
        raise _not_allowed(f"{form} with {scan.codec}") from error
