"""Project with small stages that log metrics, images, a model and an evaluation like the real stages."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from tests.flows.dvc_project import environment

SOURCE = Path(__file__).resolve().parents[2]

DVC_YAML = """\
stages:
  sums:
    desc: Running sums of the source
    cmd: python work.py sums
    deps: [source.txt, work.py]
    params: [sums]
    outs: [data/pairs]
    metrics:
      - reports/sums.json: {cache: false}
    meta: {flow: data, retries: 1, timeout_s: 300}
  model:
    cmd: python work.py model
    deps: [data/pairs, work.py]
    params: [model]
    outs: [models/audio2image]
    metrics:
      - reports/model.json: {cache: false}
    meta: {flow: model, retries: 1, timeout_s: 300}
  score:
    cmd: python work.py score
    deps: [data/pairs, models/audio2image, work.py]
    params: [score]
    outs: [reports/index.html]
    metrics:
      - reports/score.json: {cache: false}
    meta: {flow: model, retries: 1, timeout_s: 300}
"""

PARAMS = """\
sums:
  power: 2
  pause: 0.0
model:
  seed: 0
  pause: 0.0
score:
  pause: 0.0
"""

WORK = '''\
"""python work.py STAGE; the results only depend on the source, so that a killed and repeated run gives the same bytes."""
import hashlib
import json
import sys
import time
from pathlib import Path

import numpy as np
from ruamel.yaml import YAML

from pipeline_steps import tracking
from pipeline_steps.core.config import StageConfig
from pipeline_steps.core.project_paths import ProjectPaths


class Config(StageConfig):
    power: int = 0
    seed: int = 0
    pause: float = 0.0


stage, layout = sys.argv[1], ProjectPaths(Path())
config = Config(**YAML(typ="safe").load(layout.params)[stage])


def items(count: int):
    for number in range(count):
        time.sleep(config.pause / count)
        print(f"{stage}: did {number + 1} of {count} items", flush=True)
        yield number


started, count = time.monotonic(), 8
if stage == "sums":
    layout.pairs.mkdir(parents=True, exist_ok=True)
    numbers = [int(word) for word in Path("source.txt").read_text().split()]
    for number in items(count):
        (layout.pairs / f"{number}.txt").write_text(str(sum(numbers[: number + 1]) ** config.power))
elif stage == "model":
    layout.model.mkdir(parents=True, exist_ok=True)
    with tracking.run("train", layout, config, inputs=[layout.pairs]) as tracker:
        text = "".join(path.read_text() for path in sorted(layout.pairs.iterdir())) + str(config.seed)
        for step in items(count):
            text = hashlib.sha256(text.encode()).hexdigest()
            tracker.log_metrics({"train/loss": 1.0 / (step + 1)}, step=step)
            if step % 3 == 0:
                rows = np.frombuffer(bytes.fromhex(text), dtype=np.uint8)
                image = np.kron(rows[:16].reshape(4, 4, 1), np.ones((24, 24, 3), dtype=np.uint8)).astype(np.uint8)
                tracker.log_image("samples/grid", image, step=step)
        (layout.model / "weights.txt").write_text(text)
        tracker.log_model(layout.model)
else:
    layout.reports.mkdir(exist_ok=True)
    with tracking.run("evaluate", layout, config, inputs=[layout.model, layout.pairs]) as tracker:
        for _ in items(count):
            pass
        text = (layout.model / "weights.txt").read_text()
        value = int(text[:8], 16) / 16**8
        tracker.log_metrics({"test/model/win_rate": value})
        tracker.log_model_metrics(layout.model, {"test/model/win_rate": value}, layout.pairs)
        rate = {"value": 0.6, "low": 0.55, "high": 0.65, "n": 40, "clusters": 40}
        rows = {"model": {"win_rate_ssd_mobilenet_v2": rate}}
        table = layout.runs / "evaluation.json"
        table.write_text(json.dumps({"gold": {"rows": rows}, "protocol": {}, "warnings": []}))
        tracker.log_artifact(table, folder="report")
        (layout.reports / "index.html").write_text(f"<!doctype html><title>Report</title><h1>win rate {value:.3f}</h1>")
layout.reports.mkdir(exist_ok=True)
layout.report(stage).write_text(json.dumps({
    "stage": stage, "n_in": count, "n_ok": count, "n_abstained": 0, "n_quarantined": 0}))
layout.runtime(stage).parent.mkdir(exist_ok=True)
layout.runtime(stage).write_text(json.dumps({
    "cache_misses": count, "cache_hits": 0, "seconds": round(time.monotonic() - started, 3), "items_per_second": 1.0}))
'''


def build(folder: Path) -> Path:
    """Create the project with `flows`, `pipeline_steps` and `infra/prefect.yaml` under git and DVC; no stage has run."""
    folder.mkdir(parents=True)
    for name in ("flows", "pipeline_steps"):
        shutil.copytree(SOURCE / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "infra").mkdir()
    for name in ("prefect.yaml", "gate.yaml"):
        shutil.copy(SOURCE / "infra" / name, folder / "infra" / name)
    (folder / "presets").mkdir()
    (folder / "presets/plain.yaml").write_text(PARAMS)
    (folder / "dvc.yaml").write_text(DVC_YAML)
    (folder / "params.yaml").write_text(PARAMS)
    (folder / "work.py").write_text(WORK)
    (folder / "source.txt").write_text(" ".join(str(number) for number in range(1, 9)))
    ignored = ".cache/\n.runs/\nerror.json\n/data\n/models\n__pycache__/\nmlflow.db*\n/reports/index.html\n"
    (folder / ".gitignore").write_text(ignored)
    (folder / ".dvcignore").write_text("__pycache__\n.runs\n.cache\n")
    call(folder, "git", "init", "--quiet", "--initial-branch=main")
    call(folder, sys.executable, "-m", "dvc", "init", "--quiet")
    commit(folder, "small project")
    return folder


def commit(folder: Path, message: str) -> None:
    """Commit all files that git does not ignore."""
    author = ("-c", "user.name=Test", "-c", "user.email=test@localhost")
    call(folder, "git", "add", "--all")
    call(folder, "git", *author, "commit", "--quiet", "-m", message)


def call(folder: Path, *command: str) -> str:
    """Run a command that must succeed; returns its output."""
    done = subprocess.run(command, cwd=folder, env=environment(), text=True, capture_output=True, check=False)
    assert done.returncode == 0, (command, done.stdout[-2000:], done.stderr[-2000:])
    return done.stdout.strip()
