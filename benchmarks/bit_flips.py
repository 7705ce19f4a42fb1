"""Flip one bit in a file of a finished project, and run the stage or command that reads the file next.

Usage: python -m benchmarks.bit_flips PROJECT --scratch DIR [--flips 200] [--seed 0]

The project is copied by hard links into the scratch folder, with short training and evaluation; it is never changed. Every
file of its outs and of its result cache is drawn once, then again at random until there are enough flips. Each flip is one
of:

- `noticed`: the reader ended with exit code 6, and its message names the file and the command that restores it;
- `recomputed`: a damaged part of the result cache was put aside, and the outs are those of the intact project;
- `verify`: no stage reads the file or these bytes (framing of a tar, a data-set card), and `sonify verify` reports it;
- `MISSED`: anything else.

Results are appended to `flips.jsonl` in the scratch folder; a second run continues. Exit code 1 if a flip was missed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from ruamel.yaml import YAML

from pipeline_steps.core.atomic import link_or_copy
from pipeline_steps.core.checksums import NAME
from pipeline_steps.core.media_shards import INDEX
from pipeline_steps.core.schemas import SHARD_INDEX
from pipeline_steps.core.tables import read_table

OUTS = {
    "data/assets": "assets", "data/catalog": "ingest", "data/media": "ingest", "data/captions": "caption",
    "data/embeddings": "embed", "data/retrieval": "retrieve", "data/pairs": "pair", "models/audio2image": "train",
}  # fmt: skip
"""Out -> the stage that writes it."""
CACHE = ".cache/items"
COPIED = ("params.yaml", "dvc.yaml", "assets.toml", "backbone", "data", "models", CACHE)
SHORT: dict[str, Any] = {
    "train.ip_adapter.phases.adapter.max_steps": 2, "train.validation_steps": 2, "train.checkpointing_steps": 2,
    "evaluate.samples_per_audio": 1, "evaluate.unconditional_samples": 4, "evaluate.num_inference_steps": 1,
    "evaluate.max_test_pairs": 8, "evaluate.num_bootstrap": 100, "evaluate.gain_sensitivity.num_clips": 0,
    "evaluate.abilities.names": [], "evaluate.num_calibration_images": 30,
}  # fmt: skip
"""Parameters of the copy."""
READERS = (
    (r"data/assets/(efficientnet|imagenet|meta|checksums)", "caption"),
    (r"data/assets/(yamnet|audioset|minilm)", "embed"),
    (r"data/assets/backbone/.*/", "train"),
    (r"data/assets/backbone/", "verify"),  # its model_index.json: the code knows which parts a backbone has
    (r"data/assets/augnet", "verify"),  # a judge that the demo does not use
    (r"data/assets/", "evaluate"),
    (r"data/catalog/audio|data/media/audio|data/captions/(events|checksums)", "embed"),
    (r"data/catalog/quarantine|data/captions/meta|data/embeddings/quarantine", "evaluate"),
    (r"data/media/(index|checksums)", "export"),  # stages whose results are cached open no media
    (r"data/catalog/|data/media/", "caption"),
    (r"data/captions/", "pair"),
    (r"data/embeddings/", "retrieve"),
    (r"data/retrieval/index", "find"),
    (r"data/retrieval/", "pair"),
    (r"data/pairs/stats", "export"),
    (r"data/pairs/(README|croissant)", "verify"),  # for people and catalogs of data sets
    (r"data/pairs/abstained", "evaluate"),
    (r"data/pairs/", "train"),
    (r"models/audio2image/backbone/[^/]*$", "verify"),
    (r"models/audio2image/training/", "evaluate"),
    (r"models/", "draw"),
    (rf"{CACHE}/(\w+?)(-\w+)?/", r"\1"),
)  # fmt: skip
"""Pattern of a file -> the stage or command that reads it next. The first match counts."""


def link_project(source: Path, target: Path) -> None:
    """Copy a project by hard links."""
    shutil.rmtree(target, ignore_errors=True)
    for name in COPIED:
        if (source / name).is_dir():
            shutil.copytree(source / name, target / name, copy_function=link_or_copy)
        else:
            target.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, target / name)


def run_main(folder: Path, command: str) -> tuple[int, str]:
    """Exit code and output of a stage or `sonify` command in a forked process, which starts with its imports done."""
    log = folder / "output.txt"
    child = os.fork()
    if not child:
        code = 1
        try:
            descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            os.chdir(folder)
            code = call(command)
        except SystemExit as stop:
            code = int(stop.code or 0)
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    status = os.waitpid(child, 0)[1]
    return os.waitstatus_to_exitcode(status), log.read_text(encoding="utf-8", errors="replace")


def call(command: str) -> int:
    """Run a stage or command in the working directory."""
    from pipeline_steps.__main__ import STAGES, main
    from pipeline_steps.cli import app

    if command in STAGES:
        return main([command])
    media = {kind: sorted(str(path) for path in Path("data/demo", kind).iterdir())[0] for kind in ("images", "sounds")}
    arguments = {
        "find": ["find", media["images"], "--out", "found.wav"],
        "draw": ["draw", media["sounds"], "--samples", "1", "--steps", "1"],
        "export": ["export", "--webdataset", "release"],
        "verify": ["verify"],
    }
    app(arguments[command])
    return 0


def prepare(project: Path, base: Path) -> None:
    """Copy of the project whose training and evaluation are short, with all stages done."""
    link_project(project, base)
    yaml = YAML(typ="safe", pure=True)  # without the comments, which a round trip may put in front of a value
    params = yaml.load((base / "params.yaml").read_text(encoding="utf-8"))
    for key, value in SHORT.items():
        *sections, name = key.split(".")
        node = params
        for section in sections:
            node = node[section]
        node[name] = value
    yaml.dump(params, base / "params.yaml")
    for stage in ("ingest", "caption", "embed", "retrieve", "pair", "train", "evaluate"):
        code, output = run_main(base, stage)
        if code:
            raise SystemExit(f"{stage} of the intact copy ends with {code}: {output}")
        print(output.strip().splitlines()[-1], flush=True)


def draw_flips(base: Path, count: int, seed: int) -> Iterator[tuple[Path, int]]:
    """Files, relative to the project, and the bit to flip: each file once, then files at random."""
    files = [path for folder in (*OUTS, CACHE) for path in sorted((base / folder).rglob("*")) if path.is_file()]
    generator = random.Random(seed)
    order = generator.sample(files, len(files))
    for path in (*order, *generator.choices(files, k=max(0, count - len(files)))):
        yield path.relative_to(base), generator.randrange(8 * path.stat().st_size)


def flip(work: Path, name: Path, bit: int) -> None:
    """Change one bit in the file's own copy; its time of change stays as it was, as after a fault of a disk."""
    path = work / name
    payload, times = bytearray(path.read_bytes()), path.stat()
    payload[bit // 8] ^= 1 << bit % 8
    path.unlink()
    path.write_bytes(bytes(payload))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def forget_results(work: Path, name: Path, bit: int, stage: str) -> str:
    """Remove what the reader would take from its result cache instead of the file; returns the stage that must notice.

    Of a shard, the cache parts with the item of the changed byte are removed. `verify`: no item has this byte.
    """
    if name.suffix != ".tar":
        for folder in (work / CACHE).glob(f"{stage}*"):
            if name.parts[0] == "data" and name.parts[1] == "assets":
                shutil.rmtree(folder)
        return stage
    rows = read_table(work / "data/media" / INDEX, SHARD_INDEX).to_pylist()
    inside = [row for row in rows if row["shard"] == name.name and 0 <= bit // 8 - row["offset"] < row["size"]]
    if not inside:
        return "verify"
    for part in (work / CACHE).glob(f"{stage}*/**/*.parquet"):
        if inside[0]["item_id"] in pq.read_table(part, columns=["key"])["key"].to_pylist():
            part.unlink()
    return stage


def records(folder: Path) -> dict[str, str]:
    """Checksums of the outs, and the numbers of the evaluation."""
    paths = [*(folder / out / NAME for out in OUTS), folder / "reports/evaluation.json"]
    return {str(path.relative_to(folder)): path.read_text(encoding="utf-8") for path in paths if path.is_file()}


def judge(work: Path, base: Mapping[str, str], name: Path, stage: str, code: int, output: str) -> str:
    """Outcome of a flip."""
    last = output.strip().splitlines()[-1] if output.strip() else ""
    if name.is_relative_to(CACHE):
        aside = (work / f"{name}.damaged").is_file() and "is damaged" in output
        return "recomputed" if code == 0 and aside and records(work) == base else "MISSED"
    out = next(out for out in OUTS if name.is_relative_to(out))
    if stage == "verify":
        return "verify" if code == 6 and str(out) in last else "MISSED"
    cure = f"dvc checkout {out}; or dvc repro --force {OUTS[out]}"
    named = str(name) in " ".join(output.split()) or name.name == NAME
    right = cure in " ".join(output.split()) or (name.name == NAME and f"dvc checkout {out}" in " ".join(output.split()))
    return "noticed" if code == 6 and named and right else "MISSED"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("project", type=Path)
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--flips", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="regular expression of the files to flip")
    options = parser.parse_args(arguments)
    os.environ["SONIFY_TRACKING"] = "off"
    import_stages()
    base, work, record = (options.scratch.resolve() / name for name in ("base", "work", "flips.jsonl"))
    if not (base / "reports/evaluation.json").is_file():
        prepare(options.project.resolve(), base)
    lines = record.read_text(encoding="utf-8").splitlines() if record.is_file() else []
    done = [json.loads(line) for line in lines]
    intact = records(base)
    for number, (name, bit) in enumerate(draw_flips(base, options.flips, options.seed)):
        if number >= options.flips or any(row["number"] == number for row in done):
            continue
        if not re.search(options.only, str(name)):
            continue
        start = time.monotonic()
        link_project(base, work)
        shutil.copytree(base / "reports", work / "reports")
        pattern, reader = next(entry for entry in READERS if re.match(entry[0], str(name)))
        reader = forget_results(work, name, bit, re.match(pattern, str(name)).expand(reader))  # type: ignore[union-attr]
        flip(work, name, bit)
        code, output = run_main(work, reader)
        outcome = judge(work, intact, name, reader, code, output)
        row = {"number": number, "file": str(name), "bit": bit, "reader": reader, "code": code, "outcome": outcome}
        row |= {"seconds": round(time.monotonic() - start, 1), "output": output[-600:]}
        done.append(row)
        with record.open("a", encoding="utf-8") as handle:
            handle.write(json.dumps(row) + "\n")
        print(f"{number:4} {outcome:10} exit {code} {reader:9} {row['seconds']:5} s  {name}", flush=True)
    print("\n".join(table(done)))
    return 1 if any(row["outcome"] == "MISSED" for row in done) else 0


def import_stages() -> None:
    """Import what the stages import, once."""
    import pipeline_steps.cli  # noqa: F401
    from pipeline_steps.__main__ import STAGES

    for stage in STAGES:
        __import__(f"pipeline_steps.{stage}.stage")


def table(done: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Markdown table of outcomes by kind of file."""
    kinds: dict[str, Counter[str]] = {}
    for row in done:
        name = Path(row["file"])
        place = CACHE if name.is_relative_to(CACHE) else "/".join(name.parts[:2])
        kinds.setdefault(f"{place} *{name.suffix}", Counter())[row["outcome"]] += 1
    outcomes = ("noticed", "recomputed", "verify", "MISSED")
    yield f"| files | {' | '.join(outcomes)} |"
    yield f"|---|{'---|' * len(outcomes)}"
    for kind, counts in sorted(kinds.items()):
        yield f"| {kind} | {' | '.join(str(counts[outcome]) for outcome in outcomes)} |"
    total = Counter(row["outcome"] for row in done)
    yield f"| all {len(done)} | {' | '.join(str(total[outcome]) for outcome in outcomes)} |"


if __name__ == "__main__":
    sys.exit(main())
