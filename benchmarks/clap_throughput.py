"""Rate of CLAP embeddings of files and texts, compared with a transformers loop: `python -m benchmarks.clap_throughput`.

The checkpoint has the published shape (HTSAT-tiny, RoBERTa-base) and random weights, so retrieval quality is not measured;
`--checkpoint FOLDER` loads real weights. Both sides read the same files and run in turn on the same cores. Rates are items per
second of wall time on all cores, which needs an idle machine, and per processor second with `--threads 1`. The plain loop uses
soundfile, soxr, ClapFeatureExtractor and ClapModel.get_audio_features, one sound at a time.

`--agree N` embeds N sounds of --pool with each backend and prints the values that the guard of int8 checks. `--gold FOLDER`
(with a manifest.csv, as for `benchmarks/gold_retrieval.py`) queries gold sounds by the text of their label among gold and pool
sounds and prints R@10 of each backend. Only this script reads labels.
"""

from __future__ import annotations

import argparse
import csv
import os
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--sounds", type=int, default=4, help="0 leaves them out")
parser.add_argument("--texts", type=int, default=192, help="of 12 to 28 tokens; 0 leaves them out")
parser.add_argument("--rounds", type=int, default=3)
parser.add_argument("--threads", type=int, default=os.cpu_count())
parser.add_argument("--backends", nargs="+", default=["torch", "openvino"], choices=["torch", "openvino", "openvino-int8"])
parser.add_argument("--checkpoint", type=Path, help="folder of a ClapModel; without it one of random weights is made")
parser.add_argument("--agree", type=int, default=0, help="sounds of --pool on which backends are compared; 0: none")
parser.add_argument("--pool", type=Path, default=Path(__file__).resolve().parents[1] / "data/demo/sounds")
parser.add_argument("--gold", type=Path, help="folder with manifest.csv; needs real weights to mean anything")
arguments = parser.parse_args()
for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[name] = str(arguments.threads)
warnings.filterwarnings("ignore")

import numpy as np  # noqa: E402
import soundfile  # noqa: E402
import soxr  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from transformers import AutoTokenizer, ClapFeatureExtractor, ClapModel  # noqa: E402

from pipeline_steps.core.l2_normalize import l2_normalize  # noqa: E402
from pipeline_steps.core.project_paths import ProjectPaths  # noqa: E402
from pipeline_steps.embed.int8_check import neighbor_agreement  # noqa: E402
from pipeline_steps.models.text_audio.clap import ClapEncoder, ClapEncoderConfig  # noqa: E402
from tests.factories.checkpoints.clap import TEXTS, clap_checkpoint  # noqa: E402

torch.set_num_threads(arguments.threads)
UNIT = "cpu-s" if arguments.threads == 1 else "s"
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


def timed(function: Callable[[], np.ndarray]) -> tuple[np.ndarray, float]:
    clock = time.process_time if arguments.threads == 1 else time.perf_counter
    start = clock()
    return function(), clock() - start


def report(title: str, count: int, bar: str, sides: dict[str, Callable[[], np.ndarray]]) -> None:
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
        line = f"{count / best:7.2f} per {UNIT}, ratio {ratio:5.2f} (median), smallest cosine {cosine:.7f}"
        print(f"{title}: {name:28} {line}, {'same bytes each round' if same else 'BYTES DIFFER'}")
    print(f"{title}: bar {bar}\n", flush=True)


def read(file: Path) -> np.ndarray:
    """The first ten seconds, mono at 48 kHz."""
    samples, rate = soundfile.read(file, dtype="float32", always_2d=True)
    return np.asarray(soxr.resample(samples.mean(1), rate, 48_000, quality="HQ"), np.float32)[:480_000]


def compare(encoders: dict[str, ClapEncoder], pool: list[Path]) -> None:
    """Values of the guard on the pool: neighbors by the first backend compared with those by the others."""
    sounds = [read(file) for file in pool]
    vectors = {name: encoder.encode_audio(sounds) for name, encoder in encoders.items()}
    base = next(iter(vectors))
    middle = vectors[base].mean(0)
    for name in list(vectors)[1:]:
        found = ", ".join(f"{key} {value:.4f}" for key, value in neighbor_agreement(vectors[base], vectors[name]).items())
        apart = (l2_normalize(vectors[base] - middle) * l2_normalize(vectors[name] - middle)).sum(1).mean()
        print(f"agreement of {name} with {base}: {found}, cosine about the pool's mean {apart:.4f}")
    others = (vectors[base] @ vectors[base].T)[~np.eye(len(pool), dtype=bool)]
    print(f"different sounds have cosines of {others.mean():.5f} +- {others.std():.5f} in {base}\n", flush=True)


def query_gold(encoders: dict[str, ClapEncoder], folder: Path, pool: list[Path]) -> None:
    """R@10 of gold sounds by the text of their label, among all gold sounds and the pool."""
    with (folder / "manifest.csv").open(encoding="utf-8", newline="") as handle:
        rows = [row for row in csv.DictReader(handle) if row["split"] == "gold" and row["kind"] == "sound"]
    gold = [folder / row["file"] for row in rows]
    known = {file.read_bytes() for file in gold}
    sounds = [read(file) for file in [*gold, *(file for file in pool if file.read_bytes() not in known)]]
    base: np.ndarray | None = None
    for name, encoder in encoders.items():
        scores = encoder.encode_texts([row["label"].replace("_", " ") for row in rows]) @ encoder.encode_audio(sounds).T
        hits = np.array([(score > score[place]).sum() < 10 for place, score in enumerate(scores)], float)
        base = hits if base is None else base
        print(f"gold: {name:16} R@10 {hits.mean():.4f} of {len(rows)}, loss {100 * (base.mean() - hits.mean()):+.2f} points")


def main() -> None:
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, {arguments.threads} threads, torch {torch.__version__}\n")
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.checkpoint or clap_checkpoint(Path(scratch) / "clap", full_size=True)
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

        encoders = {
            backend: ClapEncoder(ClapEncoderConfig(model=str(folder), backend=backend), ProjectPaths(Path())).load()
            for backend in arguments.backends
        }
        ours = {
            f"clap, {name}": lambda encoder=encoder: encoder.encode_audio([read(file) for file in files])
            for name, encoder in encoders.items()
        }
        if files:
            report("sounds", len(files), "2; int8 3", {"plain transformers loop": plain_sounds, **ours})
        pool = sorted(file for file in arguments.pool.iterdir() if file.suffix in (".flac", ".ogg", ".wav", ".mp3"))
        if arguments.agree:
            every = max(1, len(pool) // arguments.agree)
            compare(encoders, pool[::every][: arguments.agree])
        if arguments.gold:
            query_gold(encoders, arguments.gold, pool)
        if not arguments.texts:
            return
        spoken = sorted({word for text in TEXTS for word in text.split()})
        texts = [" ".join(random.choice(spoken, random.integers(6, 15))) for _ in range(arguments.texts)]
        counts = [len(words(text)["input_ids"]) for text in texts]
        print(f"texts have {min(counts)} to {max(counts)} tokens, {np.mean(counts):.1f} on average")
        encoder = next(iter(encoders.values()))
        report("texts", len(texts), "2.7", {"one by one": plain_texts, "clap": lambda: encoder.encode_texts(texts)})


if __name__ == "__main__":
    main()
