"""Time and memory of reading a million cached results, as a run without new items does.

    python -m benchmarks.result_cache [--items 1000000] [--part 64] [--dimension 521] [--folder DIR]

Writes results like `embed`, one part per batch, then reads all of them in a new process and prints its seconds, processor
seconds and peak memory. Only the result cache is measured.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa

from pipeline_steps.core.result_cache import ResultCache

VECTOR = pa.schema([pa.field("vector", pa.list_(pa.float32()))])


def keys_of(items: int) -> list[str]:
    return [f"{number * 2654435761 % 2**32:08x}{number:024x}" for number in range(items)]


def fill(folder: str, items: int, part: int, dimension: int) -> None:
    store, random, keys = ResultCache(folder, "embed-audio", "rehearsal", VECTOR), np.random.default_rng(0), keys_of(items)
    for start in range(0, items, part):
        some = keys[start : start + part]
        rows = random.random((len(some), dimension), dtype=np.float32)
        store.append({key: {"vector": row} for key, row in zip(some, rows, strict=True)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--part", type=int, default=64, help="results per part: embed.batch_size")
    parser.add_argument("--dimension", type=int, default=521)
    parser.add_argument("--folder", help="folder of the cache; filled if it is empty")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        found = ResultCache(arguments.folder, "embed-audio", "rehearsal", VECTOR).vectors(keys_of(arguments.items))
        assert len(found) == arguments.items
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or temporary
        if not (Path(folder) / "embed-audio").is_dir():
            begin = time.process_time()
            fill(folder, arguments.items, arguments.part, arguments.dimension)
            print(f"filled: {time.process_time() - begin:.1f} cpu s")
        begin = time.perf_counter()
        process = subprocess.Popen([sys.executable, __file__, "--child", "--folder", folder, "--items", str(arguments.items)])
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            sys.exit(f"the child process exited with code {process.returncode}")
        print(
            f"{arguments.items} cached results, {arguments.part} per part: {time.perf_counter() - begin:.1f} s, "
            f"{usage.ru_utime + usage.ru_stime:.1f} cpu s, {usage.ru_maxrss / 2**20:.2f} GB, load {os.getloadavg()[0]:.1f}"
        )


if __name__ == "__main__":
    main()
