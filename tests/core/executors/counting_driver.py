"""Driver of executor `ray` that counts attempts: `python counting_driver.py FOLDER ADDRESS ITEMS BATCH ACTORS CPUS`.

Each item leaves a file named by item, process and attempt when it is begun; its row says what it is. Being `__main__`, the
class travels to the actors by value.
"""

from __future__ import annotations

import json
import os
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline_steps.core.errors import StageError
from pipeline_steps.core.executors.base import RayConfig, Result
from pipeline_steps.core.executors.run import run_items
from pipeline_steps.core.hashing import fingerprint, text_id
from pipeline_steps.core.result_cache import ResultCache

SCHEMA = pa.schema([pa.field("value", pa.string())])
SECONDS = 0.1
"""Processing time of an item."""


class Counting:
    def __init__(self, folder: Path, actors: int) -> None:
        self.folder, self.actors = folder, actors
        self.cache = ResultCache((folder / "memo").as_uri(), "count", fingerprint(self.describe()), SCHEMA)

    def describe(self) -> Any:
        return {"name": "counting"}

    def load(self) -> None:
        for name in ("begun", "loaded"):
            (self.folder / name).mkdir(exist_ok=True)
        (self.folder / "loaded" / str(os.getpid())).touch()

    def results(self, ids: Sequence[str]) -> Iterator[tuple[str, Result]]:
        while len(list((self.folder / "loaded").iterdir())) < self.actors:  # on a busy machine one starts long before the other
            time.sleep(SECONDS)
        for key in ids:
            (self.folder / "begun" / f"{key}-{os.getpid()}-{uuid.uuid4().hex}").touch()
            time.sleep(SECONDS)
            yield key, ("BAD", f"{key} is the bad one") if key == "item7" else {"value": text_id(key)}


def main(folder: str, address: str, items: int, batch: int, actors: int, cpus: int) -> None:
    work = Counting(Path(folder), actors)
    ids = [f"item{number}" for number in range(items)]
    known = work.cache.load(ids)
    settings = RayConfig(
        address=address,
        min_actors=actors,
        max_actors=actors,
        cpus_per_actor=cpus,
        no_progress_timeout_seconds=60 if cpus == 1 else 5,
    )
    try:
        done = run_items(work, [key for key in ids if key not in known], batch, "ray", settings)
    except StageError as error:
        print(json.dumps({"error": error.as_dict()}))
        return
    rows = work.cache.load(ids)
    right = sum(row["value"] == text_id(key) for key, row in rows.items())
    answer = {"known": len(known), "cached": len(done.cached_ids), "failed": done.failed, "right": right}
    print(json.dumps({**answer, "local_rows": len(done.rows)}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *(int(argument) for argument in sys.argv[3:7]))
