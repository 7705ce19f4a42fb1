"""Decode the fault corpus and random mutations of it: result, time and peak memory per file.

Usage: python -m benchmarks.ingest_faults [--mutations 10000] [--json FILE]

Exits with code 1 if a result differs from the fault matrix.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline_steps.core.safe_paths import display_path
from pipeline_steps.ingest.candidates import CandidateFile, RejectedFile
from pipeline_steps.ingest.config import IngestConfig
from pipeline_steps.ingest.decoding.decode import PRELOAD, decode
from pipeline_steps.ingest.reason_codes import CODES
from pipeline_steps.ingest.sources.file_walk import inspect_file
from pipeline_steps.ingest.stage import build_decode_job
from pipeline_steps.ingest.worker_pool import WorkerLimits, WorkerPool
from tests.faults.corpus import CASES, OK, build
from tests.faults.hostile_decoders import peak_mb

MEMORY = 2_048_000_000
SEED = 20260711
SEED_ROWS = {"A4", "A7", "A9", "A10", "B5", "B6", "B11"}


def timed(job: Any) -> dict[str, Any]:
    """Result of the decoder, with its seconds and the peak resident size of this process."""
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak, so that each file has its own
    start = time.perf_counter()
    answer = decode(job)
    return {**answer, "seconds": time.perf_counter() - start, "peak_mb": peak_mb()}


def table(root: Path, workers: WorkerPool) -> list[dict[str, Any]]:
    """One row per case."""
    rows = []
    for case in CASES:
        start = time.perf_counter()
        found = inspect_file(root, case.name, None, IngestConfig().image.max_file_bytes, walked=False)
        if isinstance(found, CandidateFile):
            _, answer = next(iter(workers.map([("", build_decode_job(IngestConfig(), found))])))
        else:
            assert isinstance(found, RejectedFile)
            answer = {"code": found.code, "seconds": time.perf_counter() - start}
        got = answer["code"] or OK
        row = {"row": case.row, "file": display_path(case.name)[:40], "expected": case.expected, "result": got}
        row |= {"normalizations": answer.get("normalizations", []), "ok": got == case.expected}
        rows.append(row | {"seconds": round(answer["seconds"], 4), "peak_mb": round(answer.get("peak_mb", 0)) or None})
    return rows


def mutate(payload: bytes, generator: random.Random) -> bytes:
    """Copy with a few bytes changed or removed, or truncated, mostly in the header."""
    mutated = bytearray(payload)
    for _ in range(generator.randint(1, 12)):
        reach = min(len(mutated), generator.choice([64, 512, len(mutated)]))
        place = generator.randrange(max(1, reach))
        what = generator.randrange(6)
        if what < 3:
            mutated[place : place + 1] = generator.randbytes(1)
        elif what == 3:
            mutated[place : place + 4] = generator.choice([b"\xff" * 4, bytes(4), b"\x7f\xff\xff\xff"])
        elif what == 4:
            del mutated[place : place + generator.randint(1, 16)]
        elif generator.random() < 0.3:
            del mutated[max(1, place) :]
    return bytes(mutated) or b"\x00"


def mutations(root: Path, folder: Path, count: int) -> tuple[Counter[str], float, int]:
    """Counts of result codes over `count` mutated files, seconds, and the number of results with an unknown code."""
    generator = random.Random(SEED)
    good = [root / case.name for case in CASES if case.expected == OK and case.row in SEED_ROWS]
    codes: Counter[str] = Counter()

    def jobs() -> Iterator[tuple[str, Any]]:
        for number in range(count):
            source = generator.choice(good)
            path = folder / f"{number}{source.suffix}"
            path.write_bytes(mutate(source.read_bytes(), generator))
            found = inspect_file(folder, path.name, None, 1e8, walked=False)
            if isinstance(found, CandidateFile):
                yield path.name, build_decode_job(IngestConfig(), found)
            else:
                assert isinstance(found, RejectedFile)
                codes[found.code] += 1

    start = time.perf_counter()
    with WorkerPool(WorkerLimits(2, 30, MEMORY), decode, PRELOAD) as workers:
        for name, answer in workers.map(jobs()):
            codes[answer["code"] or OK] += 1
            (folder / name).unlink()
    unknown = sum(number for code, number in codes.items() if code != OK and code not in CODES)
    return codes, time.perf_counter() - start, unknown


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutations", type=int, default=10_000)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        root = build(Path(name))
        with WorkerPool(WorkerLimits(1, 30, MEMORY), timed, PRELOAD) as workers:
            rows = table(root, workers)
        print(f"{'row':4} {'file':40} {'expected':19} {'result':19} {'s':>7} {'MB':>5}")
        for row in rows:
            flag = "" if row["ok"] else "  <-- differs"
            peak = "-" if row["peak_mb"] is None else row["peak_mb"]
            print(
                f"{row['row']:4} {row['file']:40} {row['expected']:19} {row['result']:19} {row['seconds']:7.3f} {peak:>5}{flag}"
            )
        mutated = Path(name) / "mutated"
        mutated.mkdir()
        codes, seconds, unknown = mutations(root, mutated, arguments.mutations)
    wrong = sum(not row["ok"] for row in rows)
    peaks = [row["peak_mb"] for row in rows if row["peak_mb"]]
    print(f"\n{len(rows)} files, {wrong} differ from the matrix; peak of a decoding process {max(peaks)} MB")
    print(f"{sum(codes.values())} mutated files in {seconds:.1f} s, {unknown} with an unknown code:")
    for code, count in codes.most_common():
        print(f"  {code:20} {count}")
    if arguments.json:
        arguments.json.write_text(json.dumps({"corpus": rows, "mutations": dict(codes)}, indent=2) + "\n")
    return 1 if wrong or unknown or sum(codes.values()) != arguments.mutations else 0


if __name__ == "__main__":
    sys.exit(main())
