"""Rate of the log-mel features of CLAP and AST, compared with transformers' extractors: `python -m benchmarks.log_mel`.

Both sides run in turn on the same clips of the demo set, on one core (`--threads 1`) or with their default threads. Rates are
windows per processor second, which other load does not affect, and windows per second.
"""

from __future__ import annotations

import argparse
import os
import time
import warnings
from collections.abc import Callable
from pathlib import Path

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--windows", type=int, default=8, help="windows per round")
parser.add_argument("--rounds", type=int, default=7)
parser.add_argument("--threads", type=int, default=1, help="0: default of each side")
arguments = parser.parse_args()
if arguments.threads:
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = str(arguments.threads)
warnings.filterwarnings("ignore")

import numpy as np  # noqa: E402
import soundfile  # noqa: E402
import torch  # noqa: E402
from transformers import ASTFeatureExtractor, ClapFeatureExtractor  # noqa: E402

from pipeline_steps.audio.log_mel import (  # noqa: E402
    AstFeatureConfig,
    ClapFeatureConfig,
    ast_log_mel,
    clap_log_mel,
    map_threads,
    split_windows,
)

if arguments.threads:
    torch.set_num_threads(arguments.threads)
CLAP, AST = ClapFeatureConfig(), AstFeatureConfig()
DEMO = Path(__file__).resolve().parents[1] / "data/demo/sounds"


def clip_windows(count: int, length: int) -> list[np.ndarray]:
    """Windows of recorded clips; the first is a pure tone, the hardest case for single precision."""
    files = sorted(DEMO.glob("*.ogg"))
    files = files[:: max(1, len(files) // (count - 1))][: count - 1]
    tone = (0.9 * np.sin(np.arange(length) * 0.13)).astype(np.float32)
    return [tone, *(split_windows(soundfile.read(file, dtype="float32")[0], length)[0] for file in files)]


def timed(function: Callable[[], np.ndarray]) -> tuple[np.ndarray, float, float]:
    wall, processor = time.perf_counter(), time.process_time()
    result = function()
    return result, time.process_time() - processor, time.perf_counter() - wall


def compare(name: str, bar: float, theirs: Callable[[], np.ndarray], ours: Callable[[], np.ndarray]) -> None:
    rounds = [(timed(theirs), timed(ours)) for _ in range(arguments.rounds + 1)][1:]
    error = max(float(np.abs(old[0] - new[0]).max()) for old, new in rounds)
    ratios = [(old[1] / new[1], old[2] / new[2]) for old, new in rounds]
    count = arguments.windows
    for label, side in (("transformers", 0), ("ours", 1)):
        best = min(pair[side][1] for pair in rounds)
        wall = min(pair[side][2] for pair in rounds)
        print(f"{name:10} {label:14} {count / best:8.1f} windows/cpu-s {count / wall:8.1f} windows/s")
    cpu, wall = np.median(np.array(ratios), axis=0)
    best_cpu = min(pair[0][1] for pair in rounds) / min(pair[1][1] for pair in rounds)
    print(f"{name:10} ratio: median {cpu:.2f} (cpu), {wall:.2f} (wall), best against best {best_cpu:.2f} (cpu); bar {bar}")
    print(f"{name:10} largest difference {error:.1e}; bar 2e-4\n")


def main() -> None:
    load = os.getloadavg()[0]
    threads = torch.get_num_threads()
    print(f"{os.cpu_count()} cores, load {load:.1f}, {threads} torch threads, {arguments.windows} windows a round\n")
    windows = clip_windows(arguments.windows, CLAP.samples)
    extractor = ClapFeatureExtractor(truncation="rand_trunc", padding="repeat")

    def clap(window: np.ndarray) -> np.ndarray:
        return clap_log_mel(torch.from_numpy(window)[None], CLAP)[0].numpy()

    compare(
        "CLAP",
        5,
        lambda: np.stack([extractor(w, sampling_rate=48_000, return_tensors="np")["input_features"][0, 0] for w in windows]),
        lambda: np.stack(map_threads(clap, windows, threads)),
    )
    shorter = clip_windows(arguments.windows, AST.samples)
    fbank = ASTFeatureExtractor()

    def ast(window: np.ndarray) -> np.ndarray:
        return ast_log_mel(torch.from_numpy(window)[None], AST)[0].numpy()

    compare(
        "AST",
        3,
        lambda: np.stack([fbank(w, sampling_rate=16_000, return_tensors="np")["input_values"][0] for w in shorter]),
        lambda: np.stack(map_threads(ast, shorter, threads)),
    )


if __name__ == "__main__":
    main()
