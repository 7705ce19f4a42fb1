"""The corpus of bad files: rows A, B and C of the fault matrix that concern ingest, each made by code.

`CASES` is a table: row of the matrix, file name, what must become of it, and the function that makes it. Nothing is
downloaded, nothing is random without a seed.
"""

from __future__ import annotations

import io
import os
import random
import socket
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import soundfile
from PIL import Image, ImageCms

OK = "ok"
SEED = 20260711
RATE = 48_000


@dataclass(frozen=True)
class Case:
    """One file: what must become of it (`ok` or a quarantine code), and for accepted ones what must stand in the row."""

    row: str
    name: str
    expected: str
    make: Callable[[Path], None]
    repaired: tuple[str, ...] = ()
    reason: str = ""
    row_values: tuple[tuple[str, object], ...] = ()

    @property
    def id(self) -> str:
        return f"{self.row}-{self.name.encode('ascii', 'backslashreplace').decode()[:60]}"


# ---------------------------------------------------------------- pictures


def gradient(width: int = 96, height: int = 64, seed: int = 0) -> npt.NDArray[np.uint8]:
    """A picture with structure: two gradients and a seeded patch, RGB uint8 [height, width, 3]."""
    y, x = np.mgrid[0:height, 0:width]
    image = np.stack([255 * x / width, 255 * y / height, 255 * (x + y) / (width + height)], axis=-1)
    generator = np.random.default_rng([SEED, seed])
    top, left = int(generator.integers(0, height // 2 + 1)), int(generator.integers(0, width // 2 + 1))
    image[top : top + height // 3, left : left + width // 3] = generator.integers(0, 255, 3)
    return image.astype(np.uint8)


def encoded(array: npt.NDArray[np.generic], form: str, mode: str | None = None, **options: object) -> bytes:
    picture = Image.fromarray(array)
    buffer = io.BytesIO()
    (picture.convert(mode) if mode else picture).save(buffer, form, **options)
    return buffer.getvalue()


def picture(form: str, mode: str | None = None, seed: int = 0, **options: object) -> Callable[[Path], None]:
    return lambda path: put(path, encoded(gradient(seed=seed), form, mode, **options))


def put(path: Path, payload: bytes) -> None:
    path.write_bytes(payload)


def written(payload: bytes) -> Callable[[Path], None]:
    return lambda path: put(path, payload)


def cut(make: Callable[[Path], None], share: float = 0.5) -> Callable[[Path], None]:
    """What `make` writes, cut after `share` of its bytes."""

    def truncated(path: Path) -> None:
        make(path)
        payload = path.read_bytes()
        path.write_bytes(payload[: int(len(payload) * share)])

    return truncated


def bit_png(side: int) -> Callable[[Path], None]:
    """A black 1-bit PNG written chunk by chunk: a few kB for any number of pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    def make(path: Path) -> None:
        packer = zlib.compressobj(9)
        line = bytes(1 + (side + 7) // 8)
        data = b"".join(packer.compress(line * 100) for _ in range(side // 100)) + packer.flush()
        header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
        put(path, b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b""))

    return make


def animated(form: str, **options: object) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        frames = [Image.fromarray(gradient(seed=seed)) for seed in (1, 2, 3)]
        buffer = io.BytesIO()
        frames[0].save(buffer, form, save_all=True, append_images=frames[1:], **options)
        put(path, buffer.getvalue())

    return make


def with_exif(orientation: int) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        exif = Image.Exif()
        exif[274] = orientation
        exif[271] = "camera of a secret maker"
        exif[34853] = {1: "N", 2: (52.0, 31.0, 12.0)}  # GPS position
        put(path, encoded(gradient(), "JPEG", exif=exif.tobytes(), quality=95))

    return make


def with_profile(path: Path) -> None:
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes())
    profile[24:36] = bytes(12)  # the time of its making: the corpus is the same whenever it is made
    put(path, encoded(gradient(seed=5), "PNG", icc_profile=bytes(profile)))


def noisy_scan(path: Path) -> None:
    payload = bytearray(encoded(gradient(256, 256, 7), "JPEG", quality=95))
    generator = random.Random(SEED)
    for _ in range(80):
        place = generator.randrange(len(payload) // 3, len(payload) - 10)
        if payload[place] != 0xFF and payload[place - 1] != 0xFF:
            payload[place] = generator.randrange(0, 0xF0)
    put(path, bytes(payload))


def rgba(path: Path) -> None:
    array = np.dstack([gradient(), np.tile(np.linspace(0, 255, 96).astype(np.uint8), (64, 1))])
    put(path, encoded(array, "PNG"))


def grey_alpha(path: Path) -> None:
    array = np.dstack([gradient()[..., 0], np.full((64, 96), 128, np.uint8)])
    put(path, encoded(array, "PNG"))


def deep_grey(path: Path) -> None:
    put(path, encoded(gradient()[..., 2].astype(np.uint16) * 257, "PNG"))


# ---------------------------------------------------------------- sounds


def tone(
    seconds: float, rate: int = RATE, frequency: float = 440.0, channels: int = 1, gain: float = 0.5
) -> npt.NDArray[np.float64]:
    """A sine that swells and fades, float64 [T] or [T, channels]."""
    time = np.arange(round(seconds * rate)) / rate
    wave = gain * np.sin(2 * np.pi * frequency * time) * (0.6 + 0.4 * np.sin(2 * np.pi * 0.7 * time))
    return wave if channels == 1 else np.repeat(wave[:, None], channels, axis=1)


def noise(seconds: float, rate: int = RATE, gain: float = 0.3, seed: int = 0) -> npt.NDArray[np.float64]:
    return gain * np.random.default_rng([SEED, seed]).standard_normal(round(seconds * rate)).clip(-3, 3) / 3


def sound(
    samples: npt.NDArray[np.float64], form: str = "WAV", subtype: str | None = "PCM_16", rate: int = RATE
) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        buffer = io.BytesIO()
        soundfile.write(buffer, samples, rate, format=form, subtype=subtype)
        put(path, buffer.getvalue())

    return make


def patched(make: Callable[[Path], None], offset: int, data: bytes) -> Callable[[Path], None]:
    """What `make` writes, with `data` laid over it at `offset`."""

    def overlay(path: Path) -> None:
        make(path)
        payload = bytearray(path.read_bytes())
        payload[offset : offset + len(data)] = data
        put(path, bytes(payload))

    return overlay


def scrambled(make: Callable[[Path], None], changes: int = 40) -> Callable[[Path], None]:
    def scramble(path: Path) -> None:
        make(path)
        payload = bytearray(path.read_bytes())
        generator = random.Random(SEED)
        for _ in range(changes):
            payload[generator.randrange(200, len(payload))] = generator.randrange(256)
        put(path, bytes(payload))

    return scramble


def nonfinite(value: float, place: int, seconds: float = 4.0) -> Callable[[Path], None]:
    samples = tone(seconds)
    samples[place] = value
    return sound(samples, "WAV", "FLOAT")


def three_hours(path: Path) -> None:
    """A minute of noise, then silence: three hours in some hundred kB."""
    buffer = io.BytesIO()
    with soundfile.SoundFile(buffer, "w", 8000, 1, format="FLAC", subtype="PCM_16") as file:
        file.write(noise(60, 8000))
        silence = np.zeros(8000 * 60, np.int16)
        for _ in range(179):
            file.write(silence)
    put(path, buffer.getvalue())


def unknown_length(path: Path) -> None:
    """A FLAC whose header does not say how long it is, as a live recorder writes it: 90 seconds."""
    sound(noise(90, 8000), "FLAC", "PCM_16", 8000)(path)
    payload = bytearray(path.read_bytes())
    payload[21] &= 0xF0  # STREAMINFO: 36 bits of total samples
    payload[22:26] = bytes(4)
    put(path, bytes(payload))


def many_channels(path: Path) -> None:
    sound(tone(0.5))(path)
    payload = bytearray(path.read_bytes())
    payload[22:24] = struct.pack("<H", 1025)
    put(path, bytes(payload))


# ---------------------------------------------------------------- names and kinds of file


def link(target: str) -> Callable[[Path], None]:
    return lambda path: path.symlink_to(target)


def unix_socket(path: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # the address of a socket holds some hundred bytes only
    try:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path.name)
    finally:
        os.chdir(here)


_LONG = "l" * 251 + ".png"

CASES: tuple[Case, ...] = (
    Case("A1", "cut.jpg", "IMG_TRUNCATED", cut(picture("JPEG", quality=95)), reason="missing"),
    Case("A1", "cut.png", "IMG_TRUNCATED", cut(picture("PNG")), reason="missing"),
    Case("A1", "cut.webp", "IMG_TRUNCATED", cut(picture("WEBP")), reason="missing"),
    Case("A1", "cut.gif", "IMG_TRUNCATED", cut(picture("GIF")), reason="missing"),
    Case("A1", "cut.bmp", "IMG_TRUNCATED", cut(picture("BMP")), reason="missing"),
    Case("A1", "cut.tiff", "IMG_TRUNCATED", cut(picture("TIFF"), 0.4)),
    Case("A2", "zero.jpg", "EMPTY_FILE", written(b"")),
    Case("A3", "page.jpg", "NOT_AN_IMAGE", written(b"<!DOCTYPE html><html><body>404</body></html>"), reason="HTML"),
    Case("A3", "note.png", "NOT_AN_IMAGE", written(b"just a line of text\n"), reason="text"),
    Case("A4", "png-inside.jpg", OK, picture("PNG", seed=41), ("WRONG_EXTENSION",), row_values=(("format", "PNG"),)),
    Case("A5", "dot.png", "IMG_TOO_SMALL", lambda path: put(path, encoded(gradient(1, 1), "PNG")), reason="16"),
    Case("A5", "hair.png", "IMG_ASPECT", lambda path: put(path, encoded(gradient(3, 4000), "PNG")), reason="10 : 1"),
    Case("A6", "bomb-1-bit.png", "IMG_BOMB", bit_png(20_000), reason="50000000"),
    Case("A6", "bomb-144-megapixel.png", "IMG_BOMB", bit_png(12_000), reason="50000000"),
    Case("A7", "cmyk.jpg", OK, picture("JPEG", "CMYK", seed=71), ("CMYK_TO_RGB",)),
    Case("A7", "palette.png", OK, picture("PNG", "P", seed=72), ("PALETTE_TO_RGB",)),
    Case("A7", "rgba.png", OK, rgba, ("ALPHA_OVER_WHITE",)),
    Case("A7", "grey-alpha.png", OK, grey_alpha, ("ALPHA_OVER_WHITE",)),
    Case("A8", "deep-grey.png", OK, deep_grey, ("DEPTH_16",)),
    Case("A9", "moving.gif", OK, animated("GIF"), ("FIRST_FRAME",), row_values=(("num_frames", 3),)),
    Case("A9", "moving.webp", OK, animated("WEBP", lossless=True), ("FIRST_FRAME",), row_values=(("num_frames", 3),)),
    Case("A9", "pages.tiff", OK, animated("TIFF"), ("FIRST_FRAME",), row_values=(("num_frames", 3),)),
    Case("A10", "turned.jpg", OK, with_exif(6), ("ORIENTED",), row_values=(("width", 64), ("height", 96))),
    Case("A10", "profile.png", OK, with_profile, ("ICC_IGNORED",)),
    Case("A11", "sky.fits", "FORMAT_NOT_ALLOWED", written(b"SIMPLE  =                    T" + bytes(2850)), reason="FITS"),
    Case("A11", "layers.psd", "FORMAT_NOT_ALLOWED", written(b"8BPS\x00\x01" + bytes(100)), reason="PSD"),
    Case("A11", "paper.pdf", "FORMAT_NOT_ALLOWED", written(b"%PDF-1.7\n" + bytes(100)), reason="PDF"),
    Case("A11", "paper.jpg", "FORMAT_NOT_ALLOWED", written(b"%PDF-1.7\n%named as a picture" + bytes(100)), reason="PDF"),
    Case("A11", "drawing.eps", "FORMAT_NOT_ALLOWED", written(b"%!PS-Adobe-3.0 EPSF-3.0\n"), reason="EPS"),
    Case("A11", "old.gd", "FORMAT_NOT_ALLOWED", written(b"\xff\xff\x00\x10\x00\x10" + bytes(300)), reason="gd"),
    Case("A11", "vector.svg", "FORMAT_NOT_ALLOWED", written(b"<svg xmlns='http://www.w3.org/2000/svg'/>"), reason="svg"),
    Case("A12", "noise-in-scan.jpg", OK, noisy_scan),
    Case("B1", "zero.wav", "AUD_EMPTY", written(b"")),
    Case("B1", "no-samples.wav", "AUD_EMPTY", sound(np.zeros(0))),
    Case("B1", "twenty-bytes.wav", "AUD_CORRUPT", cut(sound(tone(0.01)), 0.0199)),
    Case("B2", "cut.wav", "AUD_TRUNCATED", cut(sound(tone(2))), reason="declares"),
    Case("B2", "cut-vorbis.ogg", "AUD_TRUNCATED", cut(sound(noise(4), "OGG", "VORBIS")), reason="Ogg"),
    Case("B2", "cut-opus.opus", "AUD_TRUNCATED", cut(sound(noise(4, seed=1), "OGG", "OPUS")), reason="Ogg"),
    Case("B2", "cut.aiff", "AUD_TRUNCATED", cut(sound(tone(2), "AIFF")), reason="declares"),
    Case("B2", "cut.flac", "AUD_CORRUPT", cut(sound(noise(2), "FLAC"))),
    Case("B3", "four-gigabytes.wav", "AUD_HEADER_LIES", patched(sound(tone(1)), 40, b"\xf0\xff\xff\xff"), reason="4294967280"),
    Case("B3", "both-sizes.wav", "AUD_HEADER_LIES", patched(patched(sound(tone(1)), 4, b"\xff" * 4), 40, b"\xff" * 4)),
    Case("B4", "nan.wav", "AUD_NONFINITE", nonfinite(float("nan"), 100)),
    Case("B4", "nan-at-the-end.wav", "AUD_NONFINITE", nonfinite(float("nan"), -1)),
    Case("B4", "inf.wav", "AUD_NONFINITE", nonfinite(float("inf"), 90_000)),
    Case("B5", "eight-channels.wav", OK, sound(tone(1, channels=8)), ("DOWNMIX",), row_values=(("channels", 8),)),
    Case("B5", "surround.wav", OK, sound(tone(1, frequency=330, channels=6)), ("DOWNMIX",), row_values=(("channels", 6),)),
    Case("B6", "click.wav", "AUD_TOO_SHORT", sound(tone(0.05)), reason="0.1"),
    Case("B6", "short.wav", OK, sound(tone(0.25)), ("LOUDNESS_TILED",)),
    Case("B7", "silent.wav", "AUD_SILENT", sound(np.zeros(RATE))),
    Case("B7", "constant.wav", "AUD_SILENT", sound(np.full(RATE, 0.5))),
    Case("B7", "below-70.flac", "AUD_SILENT", sound(noise(2, gain=3e-4), "FLAC", "PCM_24"), reason="LUFS"),
    Case("B8", "three-hours.flac", "AUD_TOO_LONG", three_hours, reason="60"),
    Case("B8", "unknown-length.flac", "AUD_TOO_LONG", unknown_length, reason="60"),
    Case("B9", "192-kHz.wav", OK, sound(tone(1, 192_000), rate=192_000), row_values=(("sample_rate", 192_000),)),
    Case("B9", "8-kHz.wav", OK, sound(tone(1, 8000), rate=8000), row_values=(("sample_rate", 8000),)),
    Case("B9", "11-kHz.aiff", OK, sound(tone(1, 11_025), "AIFF", rate=11_025), row_values=(("sample_rate", 11_025),)),
    Case("B10", "scrambled.flac", "AUD_CORRUPT", scrambled(sound(noise(2, seed=2), "FLAC"))),
    Case("B10", "garbage.mp3", "AUD_CORRUPT", written(random.Random(SEED).randbytes(20_000))),
    Case("B10", "rate-0.wav", "AUD_CORRUPT", patched(sound(tone(1)), 24, bytes(4))),
    Case("B10", "rate-1.wav", "AUD_CORRUPT", patched(sound(tone(1)), 24, b"\x01\x00\x00\x00"), reason="1 Hz"),
    Case("B10", "1025-channels.wav", "AUD_CORRUPT", many_channels),
    Case("B11", "clipped.wav", OK, sound((8 * tone(1)).clip(-1, 1)), ("CLIPPED",)),
    Case("B11", "8-bit.wav", OK, sound(tone(1, frequency=500), subtype="PCM_U8")),
    Case("B11", "mu-law.wav", OK, sound(tone(1, frequency=510), subtype="ULAW")),
    Case("B11", "24-bit.wav", OK, sound(tone(1, frequency=520), subtype="PCM_24")),
    Case("B11", "beyond-full-scale.wav", OK, sound(tone(1, gain=4.0), subtype="FLOAT"), ("PEAK_GUARD",)),
    Case("B11", "fine.mp3", OK, sound(tone(1, frequency=530), "MP3", None), row_values=(("format", "MP3"),)),
    Case("B11", "fine.opus", OK, sound(tone(1, frequency=540), "OGG", "OPUS"), row_values=(("format", "OGG/Opus"),)),
    Case("C1", "caf\udce9.png", "PATH_ENCODING", picture("PNG", seed=101), reason="caf\\xe9.png"),
    Case("C2", "new\nline.png", OK, picture("PNG", seed=102)),
    Case("C2", "tab\there.png", OK, picture("PNG", seed=103)),
    Case("C2", "a;rm -rf x;'\"`$(id).png", OK, picture("PNG", seed=104)),
    Case("C2", "\U0001f3b5\u202egnp.png", OK, picture("PNG", seed=105)),
    Case("C2", _LONG, OK, picture("PNG", seed=106)),
    Case("C2", "-rf.png", OK, picture("PNG", seed=107)),
    Case("C2", "back\\slash.png", OK, picture("PNG", seed=108)),
    Case("C3", "out-of-root.png", "PATH_UNSAFE", link("../outside.png")),
    Case("C3", "passwords.png", "PATH_UNSAFE", link("/etc/passwd")),
    Case("C3", "zeros.png", "PATH_UNSAFE", link("/dev/zero")),
    Case("C4", "round-1.png", "NOT_A_FILE", link("round-2.png")),
    Case("C4", "round-2.png", "NOT_A_FILE", link("round-1.png")),
    Case("C4", "pipe.png", "NOT_A_FILE", lambda path: os.mkfifo(path), reason="pipe"),
    Case("C4", "socket.png", "NOT_A_FILE", unix_socket, reason="socket"),
    Case("C4", "folder.png", "NOT_A_FILE", lambda path: path.mkdir(), reason="folder"),
    Case("C4", "broken-link.png", "FILE_MISSING", link("nowhere.png")),
    Case("C5", "Case.png", OK, picture("PNG", seed=111)),
    Case("C5", "case.png", OK, picture("PNG", seed=112)),
    Case("C5", "caf\u00e9.png", OK, picture("PNG", seed=113)),
    Case("C5", "cafe\u0301.png", OK, picture("PNG", seed=114)),
    Case("C7", "one-content.png", OK, picture("PNG", seed=120)),
    Case("C7", "same-content.png", OK, picture("PNG", seed=120)),
    Case("D14", "packed.zip", "FORMAT_NOT_ALLOWED", written(b"PK\x03\x04" + bytes(64)), reason="ZIP"),
)


def build(folder: Path) -> Path:
    """Write the corpus into `folder/root` (and the file a link leads out to beside it); returns the root."""
    root = folder / "root"
    root.mkdir(parents=True)
    put(folder / "outside.png", encoded(gradient(seed=999), "PNG"))
    for case in CASES:
        case.make(root / case.name)
    (root / "README.txt").write_text("not a media file: passed over\n")
    return root
