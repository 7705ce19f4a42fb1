"""Log-mel front-ends of CLAP and AST, equal to transformers' own extractors and several times as fast.

Frames are transformed in blocks that stay in the cache, only the bins under a mel filter are squared, and one matrix product
per block sums them. The transform runs in double precision: in single precision the rounding of a loud tone or of strong bass
covers the faint bands of the same frame, and recordings with a steep spectrum (every lossy codec makes one) come out up to
0.1 dB off.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F

from pipeline_steps.core.array_types import FloatArray

BLOCK = 64
"""Frames a block: 64 x 1024 doubles are half a megabyte."""


Padding = Literal["repeat", "repeatpad", "pad"]


@dataclass(frozen=True, slots=True)
class ClapFeatureConfig:
    """CLAP's input, as in its `preprocessor_config.json`.

    Attributes:
        sample_rate: Hz.
        seconds: length of a window; a longer clip gives several.
        fft, hop: samples of a frame, and between two of them.
        bands: mel bands between `low` and `high` Hz.
        scale: `slaney` (area-normalised triangles; checkpoints without fusion) or `htk` (unit triangles; with fusion).
        padding: how a short clip fills its window, see `split_windows`.
    """

    sample_rate: int = 48_000
    seconds: float = 10
    fft: int = 1024
    hop: int = 480
    bands: int = 64
    low: float = 0.0
    high: float = 14_000.0
    scale: Literal["slaney", "htk"] = "slaney"
    padding: Padding = "repeatpad"

    @property
    def samples(self) -> int:
        """Samples in a window."""
        return int(self.seconds * self.sample_rate)


@dataclass(frozen=True, slots=True)
class AstFeatureConfig:
    """AST's input, as in its `preprocessor_config.json`: Kaldi's filter-bank features (25 ms Hann, 10 ms hop), normalised.

    Attributes:
        sample_rate: Hz.
        bands: mel bands above 20 Hz.
        frames: frames of a window.
        mean, std: (log mel - mean) / (2 std); both are fixed, so loudness stays in the features.
    """

    sample_rate: int = 16_000
    bands: int = 128
    frames: int = 1024
    mean: float = -4.2677393
    std: float = 4.5689974

    @property
    def samples(self) -> int:
        """Samples that give exactly `frames` frames."""
        return 400 + (self.frames - 1) * 160


@dataclass(frozen=True, slots=True)
class _MelFilterBank:
    """Filters [bins, bands] over the bins `first` to `first + bins`; all others have no weight."""

    first: int
    filters: torch.Tensor

    @property
    def bins(self) -> slice:
        return slice(self.first, self.first + len(self.filters))


@lru_cache(maxsize=8)
def _bank(
    fft: int, bands: int, low: float, high: float, rate: int, scale: str, norm: str | None, in_mel: bool
) -> _MelFilterBank:
    from transformers.audio_utils import mel_filter_bank

    dense = mel_filter_bank(fft // 2 + 1, bands, low, high, rate, norm, scale, triangularize_in_mel_space=in_mel)
    used = np.flatnonzero(dense.sum(1))
    return _MelFilterBank(int(used[0]), torch.from_numpy(dense[used[0] : used[-1] + 1].astype(np.float32)))


def clap_mel_filters(settings: ClapFeatureConfig) -> FloatArray:
    """CLAP's dense mel filters [fft // 2 + 1, bands]."""
    bank = _clap_bank(settings)
    dense = torch.zeros(settings.fft // 2 + 1, settings.bands)
    dense[bank.bins] = bank.filters
    return np.asarray(dense.numpy())


def _clap_bank(settings: ClapFeatureConfig) -> _MelFilterBank:
    norm = "slaney" if settings.scale == "slaney" else None
    edges = settings.low, settings.high, settings.sample_rate
    return _bank(settings.fft, settings.bands, *edges, settings.scale, norm, False)


def _mel_power(
    samples: torch.Tensor,
    window: torch.Tensor,
    hop: int,
    fft: int,
    bank: _MelFilterBank,
    shape: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """Mel power [N, frames, bands] of samples [N, T]; `shape` changes the frames [B, length] before they are windowed."""
    length = len(window)
    count = 1 + (samples.shape[1] - length) // hop
    filters = bank.filters.to(samples.device)
    out = torch.empty(len(samples), count, filters.shape[1], device=samples.device)
    # On a CPU blocks fit the cache; a GPU is faster with one block.
    block = BLOCK if samples.device.type == "cpu" else count
    for row, clip in enumerate(samples) if samples.device.type == "cpu" else [(slice(None), samples)]:
        for start in range(0, count, block):
            frames = min(block, count - start)
            part = clip[..., start * hop : (start + frames - 1) * hop + length].double().unfold(-1, length, hop)
            spectrum = torch.view_as_real(torch.fft.rfft(shape(part) * window, fft)[..., bank.bins].to(torch.complex64))
            squares = spectrum * spectrum
            torch.matmul(squares[..., 0] + squares[..., 1], filters, out=out[row, start : start + frames])
    return out


@torch.inference_mode()
def clap_log_mel(windows: torch.Tensor, settings: ClapFeatureConfig) -> torch.Tensor:
    """CLAP's features of windows.

    Args:
        windows: mono float samples [N, T] at `settings.sample_rate`, on the device that computes.

    Returns:
        10 log10 of the mel power, floored at -100 dB: [N, 1 + T // hop, bands]; frames centred, ends reflected.
    """
    half = settings.fft // 2
    padded = F.pad(windows[:, None], (half, half), mode="reflect")[:, 0]
    window = torch.hann_window(settings.fft, dtype=torch.float64, device=windows.device)
    mel = _mel_power(padded, window, settings.hop, settings.fft, _clap_bank(settings), lambda frames: frames)
    return mel.clamp_(min=1e-10).log10_().mul_(10.0)


@torch.inference_mode()
def ast_log_mel(windows: torch.Tensor, settings: AstFeatureConfig) -> torch.Tensor:
    """AST's features of windows: frames without their mean, pre-emphasis 0.97, Hann, power, log, normalised.

    Args:
        windows: mono float samples [N, T] at `settings.sample_rate`, on the device that computes; at least 400 samples.

    Returns:
        [N, 1 + (T - 400) // 160, bands].
    """

    def emphasise(frames: torch.Tensor) -> torch.Tensor:
        frames = frames - frames.mean(-1, keepdim=True)
        return torch.cat([frames[..., :1] * (1 - 0.97), frames[..., 1:] - 0.97 * frames[..., :-1]], -1)

    half = settings.sample_rate // 2
    bank = _bank(512, settings.bands, 20, half, settings.sample_rate, "kaldi", None, True)
    window = torch.hann_window(400, periodic=False, dtype=torch.float64, device=windows.device)
    mel = _mel_power(windows, window, 160, 512, bank, emphasise)
    floor = 1.192092955078125e-07  # Kaldi's: the spacing of single-precision numbers at 1
    return mel.clamp_(min=floor).log_().sub_(settings.mean).div_(2 * settings.std)


def split_windows(samples: FloatArray, length: int, padding: Padding = "repeat") -> FloatArray:
    """Consecutive windows [N, length] of mono samples [T]; the last window ends with the last sample. No random crop.

    A shorter clip is repeated to the end of its window (`repeat`), or as often as it fits as a whole, followed by silence
    (`repeatpad`), or once, followed by silence (`pad`).

    Raises:
        ValueError: empty, not one-dimensional, or holding NaN or infinity.
    """
    samples = np.asarray(samples, np.float32)
    if samples.ndim != 1 or not samples.size or not np.isfinite(samples).all():
        raise ValueError(f"expected finite mono samples [T], got shape {samples.shape}")
    if len(samples) <= length:
        if padding == "repeat":
            return np.resize(samples, length)[None]
        window = np.zeros((1, length), np.float32)
        filled = len(samples) * (length // len(samples) if padding == "repeatpad" else 1)
        window[0, :filled] = np.resize(samples, filled)
        return window
    last = len(samples) - length
    return np.stack([samples[start : start + length] for start in [*range(0, last, length), last]])


def map_threads(function: Callable[[Any], Any], items: Iterable[Any], threads: int) -> list[Any]:
    """Map `function` over items on threads, in order; each thread computes on one core.

    One core per clip is faster than all cores on one clip, also when other programs are running.
    """
    if threads < 2:
        return [function(item) for item in items]
    before = torch.get_num_threads()
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        results = list(pool.map(function, items))
    torch.set_num_threads(before)  # the setting applies to the whole process
    return results
