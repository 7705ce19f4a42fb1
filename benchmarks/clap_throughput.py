"""File to CLAP vector, and text to CLAP vector, against the plain transformers loop: `python benchmarks/clap_throughput.py`.

The checkpoint has the published shape (HTSAT-tiny, RoBERTa-base) and random weights, made on the spot, so speed and equality
are real and retrieval quality is not judged. Both sides read the same files and run in turn on the same cores. On all cores
rates are items per second of wall time, which needs a quiet machine; with `--threads 1` per processor-second. The plain loop:
soundfile, soxr, ClapFeatureExtractor, ClapModel.get_audio_features, one sound at a time.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--sounds", type=int, default=4, help="0 leaves them out")
parser.add_argument("--texts", type=int, default=192, help="of 12 to 28 tokens")
parser.add_argument("--rounds", type=int, default=3)
parser.add_argument("--threads", type=int, default=os.cpu_count())
parser.add_argument("--backends", nargs="+", default=["torch", "openvino"], choices=["torch", "openvino"])
arguments = parser.parse_args()
for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[name] = str(arguments.threads)
warnings.filterwarnings("ignore")
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests/encoders")]

import numpy as np  # noqa: E402
import soundfile  # noqa: E402
import soxr  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from tiny_clap import TEXTS, clap_checkpoint  # noqa: E402
from transformers import AutoTokenizer, ClapFeatureExtractor, ClapModel  # noqa: E402

from pipeline_steps.encoders.clap import Clap  # noqa: E402

torch.set_num_threads(arguments.threads)
UNIT = "cpu-s" if arguments.threads == 1 else "s"
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


def timed(function: Callable[[], np.ndarray]) -> tuple[np.ndarray, float]:
    clock = time.process_time if arguments.threads == 1 else time.perf_counter
    start = clock()
    return function(), clock() - start


def report(title: str, count: int, bar: float, sides: dict[str, Callable[[], np.ndarray]]) -> None:
    """Run every side in turn; the first one is the baseline."""
    for function in sides.values():
        function()
    rounds = [{name: timed(function) for name, function in sides.items()} for _ in range(arguments.rounds)]
    base = next(iter(sides))
    for name in sides:
        best = min(found[name][1] for found in rounds)
        ratio = float(np.median([found[base][1] / found[name][1] for found in rounds]))
        cosine = float((rounds[0][base][0] * rounds[0][name][0]).sum(1).min())
        same = all(np.array_equal(found[name][0], rounds[0][name][0]) for found in rounds)
        told = f"{count / best:7.2f} per {UNIT}, ratio {ratio:5.2f} (median), smallest cosine {cosine:.7f}"
        print(f"{title}: {name:28} {told}, {'same bytes each round' if same else 'BYTES DIFFER'}")
    print(f"{title}: bar {bar}\n", flush=True)


def main() -> None:
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, {arguments.threads} threads, torch {torch.__version__}\n")
    with tempfile.TemporaryDirectory() as scratch:
        folder = clap_checkpoint(Path(scratch) / "clap", full_size=True)
        # Ten-second stereo files at 44.1 kHz, as sound libraries hold them, in four formats.
        random = np.random.default_rng(0)
        files = []
        for number in range(arguments.sounds):
            kind = ("flac", "mp3", "ogg", "wav")[number % 4]
            files.append(Path(scratch) / f"{number}.{kind}")
            slow = np.repeat(random.standard_normal((100, 2)), 4410, axis=0) * random.standard_normal((441_000, 2))
            soundfile.write(files[-1], np.clip(0.1 * slow, -1, 1), 44_100)
        model, extractor = ClapModel.from_pretrained(folder).eval(), ClapFeatureExtractor.from_pretrained(folder)
        words = AutoTokenizer.from_pretrained(folder)

        def read(file: Path) -> np.ndarray:
            samples, rate = soundfile.read(file, dtype="float32", always_2d=True)
            return np.asarray(soxr.resample(samples.mean(1), rate, 48_000, quality="HQ"), np.float32)[:480_000]

        @torch.inference_mode()
        def plain_sounds() -> np.ndarray:
            rows = []
            for file in files:
                inputs = extractor(read(file), sampling_rate=48_000, padding="repeat", return_tensors="pt")
                rows.append(model.get_audio_features(**inputs).pooler_output)
            return torch.cat(rows).numpy()

        @torch.inference_mode()
        def plain_texts() -> np.ndarray:
            rows = [model.get_text_features(**words(text, return_tensors="pt")).pooler_output for text in texts]
            return torch.cat(rows).numpy()

        encoders = {backend: Clap(str(folder), backend=backend).load() for backend in arguments.backends}
        ours = {
            f"clap, {name}": lambda encoder=encoder: encoder.encode_sounds([read(file) for file in files])
            for name, encoder in encoders.items()
        }
        if files:
            report("sounds", len(files), 2.0, {"plain transformers loop": plain_sounds, **ours})
        spoken = sorted({word for text in TEXTS for word in text.split()})
        texts = [" ".join(random.choice(spoken, random.integers(6, 15))) for _ in range(arguments.texts)]
        counts = [len(words(text)["input_ids"]) for text in texts]
        print(f"texts have {min(counts)} to {max(counts)} tokens, {np.mean(counts):.1f} on average")
        encoder = next(iter(encoders.values()))
        report("texts", len(texts), 2.7, {"one by one": plain_texts, "clap": lambda: encoder.encode_texts(texts)})


if __name__ == "__main__":
    main()
