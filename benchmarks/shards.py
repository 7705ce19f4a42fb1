"""Rate of reading media shards by the offset index, compared with webdataset on the same tar files.

    python -m benchmarks.shards [--samples 1500] [--rounds 5]

A sample is an image of 30 kB and a clip of 200 kB of random bytes, in shards as ingest writes them. Readers return all bytes
in turn, in one thread, with a warm page cache. Rates are the best of the rounds, in processor seconds. webdataset does not
verify hashes. `MediaShardReader` verifies each item when it is first read, unless `verify` is False.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from pipeline_steps.core.hashing import item_id
from pipeline_steps.core.media_shards import MediaShardReader, write_index, write_shards


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=1500)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        compare(Path(name), arguments.samples, arguments.rounds)


def compare(folder: Path, samples: int, rounds: int) -> None:
    import webdataset

    random, rows = np.random.default_rng(0), []
    for kind, extension, size in (("image", "png", 30_000), ("audio", "flac", 200_000)):
        payloads = [random.bytes(size) for _ in range(samples)]
        rows += write_shards(folder, kind, {item_id(payload): payload for payload in payloads}, extension)
    write_index(folder, rows)
    tars = sorted(str(path) for path in folder.glob("*.tar"))
    ids = [row["item_id"] for row in sorted(rows, key=lambda row: (row["shard"], row["offset"]))]

    def through_webdataset() -> int:
        found = webdataset.WebDataset(tars, shardshuffle=False, empty_check=False)
        return sum(len(sample.get("png", b"")) + len(sample.get("flac", b"")) for sample in found)

    def through_index(reader: MediaShardReader) -> int:
        return sum(len(reader.payload(item)) for item in ids)

    unverified, verified = MediaShardReader(folder, verify=False), MediaShardReader(folder)
    through_index(verified)
    begin = time.process_time()
    MediaShardReader(folder)
    opened = time.process_time() - begin
    methods: dict[str, Callable[[], int]] = {
        "webdataset": through_webdataset,
        "index, not verified": lambda: through_index(unverified),
        "index, verified before": lambda: through_index(verified),
        "index, first read, verified": lambda: through_index(MediaShardReader(folder)),
    }
    seconds = {name: float("inf") for name in methods}
    for _ in range(rounds):
        for name, read in methods.items():
            begin = time.process_time()
            total = read()
            seconds[name] = min(seconds[name], time.process_time() - begin)
            assert total == sum(row["size"] for row in rows), name
    print(f"{samples} samples of 230 kB in {len(tars)} shards, load {os.getloadavg()[0]:.1f}")
    print(f"opening the index: {opened * 1e3:.1f} ms")
    print(f"{'reader':30} {'samples/s':>10} {'MB/s':>8} {'x webdataset':>13}")
    for name, duration in seconds.items():
        print(f"{name:30} {samples / duration:10.0f} {samples * 0.23 / duration:8.0f} {seconds['webdataset'] / duration:13.1f}")


if __name__ == "__main__":
    main()
