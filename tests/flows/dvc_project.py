"""Small DVC project for tests, with stages that are Python scripts. Its stage names differ from those of dvc.yaml."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil

DVC_YAML = """
stages:
  count:
    desc: Squares of the numbers in the source
    cmd: python work.py count
    deps: [source.txt, work.py]
    params: [count]
    outs: [out/count]
    metrics:
      - reports/count.json: {cache: false}
    meta: {flow: data, retries: 1, retry_delay_s: 0, timeout_s: 60}
  join:
    cmd: python work.py join
    deps: [out/count, work.py]
    params: [join]
    outs: [out/join.txt]
    metrics:
      - reports/join.json: {cache: false}
    meta: {flow: data, timeout_s: 60}
  model:
    cmd: python work.py model
    deps: [out/join.txt, work.py]
    params: [model]
    outs: [out/model.txt]
    metrics:
      - reports/model.json: {cache: false}
    meta: {flow: model, retries: 2, retry_delay_s: 0, timeout_s: 60}
"""

PARAMS = """
count:
  power: 2
  pause: 0.0
join:
  sign: "+"
  pause: 0.0
model:
  seed: 0
  pause: 0.0
  fail: ""
"""

WORK = """
import hashlib, json, os, pathlib, re, subprocess, sys, time

stage = sys.argv[1]
text = pathlib.Path("params.yaml").read_text()
section = re.search(rf"(?m)^{stage}:\\n((?:  .*\\n)+)", text)[1]
param = {k: v.strip().strip("\\"'") for k, v in re.findall(r"  (\\w+): *(.*)", section)}
pause = float(param["pause"])
pathlib.Path("error.json").unlink(missing_ok=True)
pathlib.Path("out").mkdir(exist_ok=True)
pathlib.Path("reports").mkdir(exist_ok=True)
started = time.monotonic()

def items(n):
    for i in range(n):
        time.sleep(pause / n)
        print(f"{stage}: did {i + 1} of {n} items", flush=True)
        yield i

if stage == "count":
    numbers = [int(x) for x in pathlib.Path("source.txt").read_text().split()]
    folder = pathlib.Path("out/count")
    folder.mkdir(exist_ok=True)
    for i in items(len(numbers)):
        (folder / f"{i}.txt").write_text(str(numbers[i] ** int(param["power"])))
    value = len(numbers)
elif stage == "join":
    parts = sorted(pathlib.Path("out/count").iterdir())
    for _ in items(4):
        pass
    pathlib.Path("out/join.txt").write_text(param["sign"].join(p.read_text() for p in parts))
    value = len(parts)
else:
    fail = param["fail"]
    if fail:
        marker = pathlib.Path(".runs/failed-once")
        if fail == "child":
            child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
            pathlib.Path(".runs/child.pid").write_text(str(child.pid))
            time.sleep(600)
        if fail in {"data", "flaky"} and not (fail == "flaky" and marker.exists()):
            marker.parent.mkdir(exist_ok=True)
            marker.write_text("")
            kind, code = ("data", 3) if fail == "data" else ("service", 5)
            error = {"stage": "model", "kind": kind, "exit_code": code, "reason": "the input is not valid",
                    "action": "replace it", "transient": fail == "flaky"}
            pathlib.Path("error.json").write_text(json.dumps(error))
            print("model: the input is not valid", file=sys.stderr)
            sys.exit(code)
    for _ in items(8):
        pass
    joined = pathlib.Path("out/join.txt").read_text()
    pathlib.Path("out/model.txt").write_text(hashlib.sha256((joined + param["seed"]).encode()).hexdigest())
    value = len(joined)
pathlib.Path(f"reports/{stage}.json").write_text(json.dumps({
    "stage": stage, "n_in": value, "n_ok": value, "n_abstained": 0, "n_quarantined": 0, "size": value}))
pathlib.Path("reports/runtime").mkdir(exist_ok=True)
pathlib.Path(f"reports/runtime/{stage}.json").write_text(json.dumps({
    "cache_misses": value, "cache_hits": 0, "seconds": round(time.monotonic() - started, 3), "items_per_second": 1.0}))
"""


def environment() -> dict[str, str]:
    """Environment of commands in tests: `python` and `dvc` are those of this interpreter."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "DVC_NO_ANALYTICS": "1", "GIT_CONFIG_GLOBAL": os.devnull}


def call(folder: Path, *command: str) -> str:
    """Run a command that must succeed; returns its output."""
    done = subprocess.run(
        command, cwd=folder, env=environment(), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:]
    return done.stdout


def has_exited(pid: int, seconds: float = 15.0) -> bool:
    """Whether a process has ended, or ends within some seconds."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.05)
    return False


def git(folder: Path, *arguments: str) -> str:
    """Run git with an author."""
    return call(folder, "git", "-c", "user.name=Test", "-c", "user.email=test@localhost", *arguments).strip()


def dvc(folder: Path, *arguments: str) -> str:
    """Run dvc of this interpreter."""
    return call(folder, sys.executable, "-m", "dvc", *arguments)


def commit(folder: Path, message: str = "change") -> None:
    """Commit all files that git does not ignore."""
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "-m", message)


def build(folder: Path, numbers: int = 6) -> Path:
    """Create the project under git and DVC; no stage has run."""
    folder.mkdir(parents=True)
    (folder / "dvc.yaml").write_text(textwrap.dedent(DVC_YAML))
    (folder / "params.yaml").write_text(PARAMS.lstrip())
    (folder / "presets").mkdir()
    (folder / "presets/cubes.yaml").write_text("count:\n  power: 3\n")
    (folder / "work.py").write_text(WORK)
    (folder / "source.txt").write_text(" ".join(str(n) for n in range(numbers)))
    (folder / ".gitignore").write_text(".cache/\n.runs/\nerror.json\n/out\n/reports/runtime\n__pycache__/\n")
    (folder / ".dvcignore").write_text("__pycache__\n.runs\n.cache\n")
    git(folder, "init", "--quiet", "--initial-branch=main")
    dvc(folder, "init", "--quiet")
    commit(folder, "project")
    return folder
