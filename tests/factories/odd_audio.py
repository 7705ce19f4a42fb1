"""Corpus of odd audio files: missing and wrong lengths, tags, joined and multiplexed streams, codings without a decoder."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from tests.factories import audio_streams as make
from tests.factories.audio_streams import RATE, encode, flac, id3v1, id3v2, mp3, noise, ogg_pages, riff, tone, wav_format


class OddAudio(NamedTuple):
    """File with its seconds and marks, or with the code of its refusal."""

    name: str
    build: Callable[[], bytes]
    seconds: float = 0.0
    marks: frozenset[str] = frozenset()
    code: str = ""


CASES: list[OddAudio] = []


def accepted(name: str, build: Callable[[], bytes], seconds: float, *marks: str) -> None:
    CASES.append(OddAudio(name, build, seconds, frozenset(marks)))


def refused(name: str, build: Callable[[], bytes], code: str) -> None:
    CASES.append(OddAudio(name, build, code=code))


def swelling(rate: int = RATE) -> np.ndarray:
    """Three seconds of noise from quiet to loud: the first frames of a variable bit rate are not like the others."""
    return noise(3, rate) * np.linspace(0.001, 1, 3 * rate)


def patched(payload: bytes, *values: tuple[int, int], order: str = "<") -> bytes:
    """Copy with 32-bit numbers (position, value) written over it."""
    changed = bytearray(payload)
    for position, value in values:
        struct.pack_into(f"{order}I", changed, position, value)
    return bytes(changed)


def wav(tag: int = 1, bits: int = 16, data: bytes | None = None, extra: bytes = b"") -> bytes:
    pcm = (tone(1) * 32767).astype("<i2").tobytes() if data is None else data
    return riff([(b"fmt ", wav_format(tag, bits, extra=extra)), (b"data", pcm)])


def wav_sizes(outer: int | None = None, data: int | None = None) -> bytes:
    """A second of sound whose two sizes are replaced."""
    payload = wav()
    values = [(position, value) for position, value in ((4, outer), (40, data)) if value is not None]
    return patched(payload, *values)


def info_says(frames: int | None) -> bytes:
    """MP3 whose Info frame declares a number of frames, or none."""
    payload = mp3(tone(2))
    place = max(payload.find(b"Info"), payload.find(b"Xing"))
    return patched(payload, (place + 4, 0) if frames is None else (place + 8, frames), order=">")


def multiplexed(first: bytes, second: bytes) -> bytes:
    """Ogg with two streams at the same time: first pages together, then the rest page by page."""
    one, two = ogg_pages(first), ogg_pages(second)
    rest = [page for pair in zip(one[1:], two[1:], strict=False) for page in pair]
    count = min(len(one), len(two))
    return b"".join([one[0], two[0], *rest, *one[count:], *two[count:]])


def vorbis(seconds: float = 1.0, seed: int = 0, rate: int = RATE) -> bytes:
    return encode(noise(seconds, rate, seed), "OGG", "VORBIS", rate)


def opus(seconds: float = 1.0) -> bytes:
    return encode(noise(seconds), "OGG", "OPUS")


def theora() -> bytes:
    return make.ogg_other(b"\x80theora" + bytes(35), 31)


def gsm() -> bytes:
    """GSM 6.10 in WAV; the encoder's last block holds bytes that it never set, so it is removed."""
    payload = encode(noise(1, 8000), "WAV", "GSM610", 8000)[:-65]
    return patched(payload, (4, len(payload) - 8), (payload.find(b"data") + 4, len(payload) - payload.find(b"data") - 8))


def aiff_sizes(form: int, samples: int, comm: int) -> bytes:
    payload = encode(tone(1), "AIFF", "PCM_16")
    chunks = payload.find(b"SSND"), payload.find(b"COMM")
    return patched(payload, (4, form), (chunks[0] + 4, samples), (chunks[1] + 10, comm), order=">")


for _rate in (48_000, 44_100, 32_000, 24_000, 22_050, 16_000, 12_000, 11_025, 8_000):
    accepted(f"constant-{_rate}.mp3", lambda rate=_rate: mp3(swelling(rate), rate, info=False), 3 + 1700 / _rate)
    accepted(f"variable-{_rate}.mp3", lambda rate=_rate: mp3(swelling(rate), rate, variable=True, info=False), 3 + 1700 / _rate)
    accepted(f"variable-info-{_rate}.mp3", lambda rate=_rate: mp3(swelling(rate), rate, variable=True), 3)

_PLAIN = 1.04  # one second of sound with the encoder's delay, which only an Info frame states
accepted("cover.mp3", lambda: id3v2(60_000) + mp3(tone(1), info=False), _PLAIN)
accepted("all-tags.mp3", lambda: id3v2() + mp3(tone(1), info=False) + make.ape_tag() + id3v1(), _PLAIN)
accepted("two-tags.mp3", lambda: id3v2() + id3v2(3000) + mp3(tone(1)), 1)
accepted("joined.mp3", lambda: mp3(tone(1)) + mp3(noise(1)), 2, "PARTS_JOINED")
accepted("joined-with-tags.mp3", lambda: (id3v2() + mp3(tone(1)) + id3v1()) * 2, 2, "PARTS_JOINED")
accepted("joined-without-info.mp3", lambda: mp3(tone(1), info=False) * 2, 2 * _PLAIN)
accepted("joined-rates.mp3", lambda: mp3(tone(1)) + mp3(tone(1, 22_050), 22_050), 2, "PARTS_JOINED")
accepted("joined-channels.mp3", lambda: mp3(tone(1)) + mp3(tone(1, channels=2)), 2, "PARTS_JOINED", "DOWNMIX")
accepted("page-before.mp3", lambda: b"<html>proxy</html>" * 9 + mp3(tone(1), info=False), _PLAIN, "BYTES_LEFT_OUT")
accepted("page-after.mp3", lambda: mp3(tone(1), info=False) + b"<html>proxy</html>", _PLAIN, "BYTES_LEFT_OUT")
accepted("page-between.mp3", lambda: b"<html>proxy</html>".join([mp3(tone(1), info=False)] * 2), 2 * _PLAIN, "BYTES_LEFT_OUT")
accepted("zeros-around.mp3", lambda: bytes(4000) + mp3(tone(1), info=False) + bytes(4000), _PLAIN)
accepted("info-says-10.mp3", lambda: info_says(10), 2.04, "LENGTH_COUNTED")
accepted("info-without-count.mp3", lambda: info_says(None), 2.04)
accepted("cut-without-info.mp3", lambda: mp3(tone(2), info=False)[:-9000], 1.5, "BYTES_LEFT_OUT")
refused("cut-with-info.mp3", lambda: mp3(tone(2))[:-9000], "AUD_TRUNCATED")
refused("info-says-9999.mp3", lambda: info_says(9999), "AUD_TRUNCATED")
refused("minutes.mp3", lambda: mp3(tone(2), info=False) * 40, "AUD_TOO_LONG")
refused("random.mp3", lambda: np.random.default_rng(0).bytes(20_000), "AUD_CORRUPT")
refused("random-after-a-header.mp3", lambda: b"\xff\xfb\x90\x64" + np.random.default_rng(1).bytes(20_000), "AUD_CORRUPT")

for _bits in (8, 16, 24):
    accepted(f"{_bits}-bit.flac", lambda bits=_bits: flac(tone(1), bits), 1)
    accepted(f"pipe-{_bits}-bit.flac", lambda bits=_bits: flac(tone(1), bits, declared=0), 1, "LENGTH_COUNTED")
accepted("pipe-stereo.flac", lambda: flac(tone(1, channels=2), declared=0), 1, "LENGTH_COUNTED", "DOWNMIX")
accepted("declares-less.flac", lambda: flac(tone(1), declared=9000), 1, "LENGTH_COUNTED")
accepted("tags.flac", lambda: id3v2(4000) + flac(tone(1)) + id3v1(), 1)
accepted("joined.flac", lambda: flac(tone(1)) + flac(noise(1)), 2, "LENGTH_COUNTED")
accepted("bytes-before.flac", lambda: b"\r\n" + flac(tone(1)), 1, "BYTES_LEFT_OUT")
refused("declares-more.flac", lambda: flac(tone(1), declared=99_000), "AUD_CORRUPT")
refused("cut.flac", lambda: flac(tone(1))[:-9000], "AUD_CORRUPT")
refused("32-bit.flac", lambda: flac(tone(1), 32), "FORMAT_NOT_ALLOWED")
refused("pipe-of-minutes.flac", lambda: flac(tone(62, 8000), 8, 8000, declared=0), "AUD_TOO_LONG")

accepted("chained.ogg", lambda: vorbis() + make.with_serial(vorbis(1, 2), 99), 2, "PARTS_JOINED")
accepted("chained-same-serial.ogg", lambda: vorbis() + vorbis(1, 2), 2, "PARTS_JOINED")
accepted("chained-rates.ogg", lambda: vorbis() + make.with_serial(vorbis(1, 2, 22_050), 7), 2, "PARTS_JOINED")
accepted("chained-codecs.ogg", lambda: vorbis() + make.with_serial(opus(), 7), 2, "PARTS_JOINED")
accepted("chained-first-cut.ogg", lambda: b"".join(ogg_pages(vorbis(4))[:-1]) + vorbis(1, 2), 4.62, "PARTS_JOINED")
accepted("skeleton.ogg", lambda: make.with_skeleton(vorbis()), 1)
accepted("skeleton.opus", lambda: make.with_skeleton(opus()), 1)
accepted("two-sounds.ogg", lambda: multiplexed(vorbis(), make.with_serial(opus(), 8)), 1, "STREAMS_LEFT_OUT")
accepted("video.ogg", lambda: multiplexed(theora(), vorbis()), 1, "STREAMS_LEFT_OUT")
accepted("flac.ogg", lambda: make.ogg_flac(tone(1)), 1)
accepted("flac-skeleton.oga", lambda: make.with_skeleton(make.ogg_flac(tone(1))), 1)
accepted("one-zero-after.ogg", lambda: vorbis() + b"\x00", 1)
accepted("zeros-after.ogg", lambda: vorbis() + bytes(27), 1)
accepted("line-end-after.opus", lambda: opus() + b"\r\n", 1, "BYTES_LEFT_OUT")
accepted("bytes-before.ogg", lambda: b"junk" * 20 + vorbis(), 1, "BYTES_LEFT_OUT")
accepted("bytes-between.ogg", lambda: b"xx".join(ogg_pages(vorbis())), 1, "BYTES_LEFT_OUT")
accepted("tag-before.ogg", lambda: id3v2(4000) + vorbis(), 1)
accepted("broadcast.ogg", lambda: make.shifted_granules(vorbis(), RATE * 999), 1)
refused("theora-only.ogg", theora, "FORMAT_NOT_ALLOWED")
refused("speex.ogg", lambda: make.ogg_other(b"Speex   " + bytes(72)), "FORMAT_NOT_ALLOWED")
refused("cut.ogg", lambda: vorbis()[:-300], "AUD_TRUNCATED")
refused("last-page-missing.ogg", lambda: b"".join(ogg_pages(vorbis(4))[:-1]), "AUD_TRUNCATED")
refused("chained-last-cut.ogg", lambda: vorbis() + b"".join(ogg_pages(vorbis(4, 2))[:-1]), "AUD_TRUNCATED")

for _name, _outer, _data in (
    ("zeros", 0, 0), ("wave-module", 36, 0), ("all-ones", 0xFFFFFFFF, 0xFFFFFFFF), ("ones-and-zero", 0xFFFFFFFF, 0),
    ("zero-and-ones", 0, 0xFFFFFFFF), ("two-gigabytes", 0x7FFFF024, 0x7FFFF000), ("data-never-set", None, 0),
    ("data-set-once", None, 5000),
):  # fmt: skip
    accepted(f"{_name}.wav", lambda outer=_outer, data=_data: wav_sizes(outer, data), 1, "LENGTH_COUNTED")
accepted("riff-size-0.wav", lambda: wav_sizes(0), 1)
accepted("riff-size-large.wav", lambda: wav_sizes(999_999), 1)
accepted("tag-before.wav", lambda: id3v2() + wav(), 1)
accepted("tag-after.wav", lambda: wav() + id3v2(), 1, "BYTES_LEFT_OUT")
accepted("zeros-after.wav", lambda: wav() + bytes(500), 1)
accepted("gsm.wav", gsm, 1)
accepted("mp3-inside.wav", lambda: wav(0x55, 0, mp3(tone(1), info=False), b"\x0c\x00" + bytes(12)), _PLAIN)
for _subtype in ("ALAW", "ULAW", "FLOAT", "DOUBLE", "PCM_U8", "PCM_24", "PCM_32", "MS_ADPCM", "IMA_ADPCM", "G721_32"):
    accepted(f"{_subtype.lower()}.wav", lambda subtype=_subtype: encode(tone(1, 8000), "WAV", subtype, 8000), 1)
refused("data-all-ones.wav", lambda: wav_sizes(None, 0xFFFFFFFF), "AUD_HEADER_LIES")
refused("cut.wav", lambda: wav()[:-5000], "AUD_TRUNCATED")
refused("no-samples.wav", lambda: wav(data=b""), "AUD_EMPTY")
refused("bw64.wav", lambda: b"BW64" + wav()[4:], "FORMAT_NOT_ALLOWED")
refused("rf64.wav", lambda: b"RF64" + wav()[4:], "FORMAT_NOT_ALLOWED")
for _tag in (0x20, 0x45, 0x65, 0xFF, 0x161, 0x1600, 0x2000, 0x1234):
    refused(f"codec-{_tag:04x}.wav", lambda tag=_tag: wav(tag, 4), "FORMAT_NOT_ALLOWED")
refused("64-bit.wav", lambda: wav(1, 64), "FORMAT_NOT_ALLOWED")
refused("half-float.wav", lambda: wav(3, 16), "FORMAT_NOT_ALLOWED")

accepted("never-finished.aiff", lambda: aiff_sizes(0, 0, 0), 1, "LENGTH_COUNTED")
accepted("pipe.aiff", lambda: aiff_sizes(0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF), 1, "LENGTH_COUNTED")

for _rate in (8_000, 44_100, 48_000):
    refused(f"offset-{_rate}.wav", lambda rate=_rate: encode(np.full(rate, 0.4), "WAV", "PCM_16", rate), "AUD_SILENT")
refused("offset.mp3", lambda: mp3(np.full(RATE, 0.4)), "AUD_SILENT")
refused("offset.flac", lambda: flac(np.full(22_050, -0.3), rate=22_050), "AUD_SILENT")
