"""Overhead of tracking for a training run with a working, stopped, failing, slow or recovering store.

    python -m benchmarks.tracking_overhead [--repeats 5] [--steps 150]     training runs with and without tracking in turn
    python -m benchmarks.tracking_overhead --loop                          time per step in a small loop

The training uses this project's data and reduced parameters on one thread: run `dvc repro pair` first. Each case alternates
with `off`. Printed are the ratios of training time (without the wait at the end) and processor time to the adjacent run without
tracking, as median and range, the wait at the end, and the entries left for `sonify sync`.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from benchmarks.servers import free_port, mlflow_server
from pipeline_steps import tracking
from pipeline_steps.core.config import StageConfig
from pipeline_steps.core.project_paths import ProjectPaths
from pipeline_steps.tracking.client.offline_queue import all_queues

SERVER = """
import http.server, sys, time, urllib.error, urllib.request
delay, upstream, recover_at = float(sys.argv[1]), sys.argv[2], time.time() + float(sys.argv[3])
class Answer(http.server.BaseHTTPRequestHandler):
    def answer(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        code, payload = 500, b""
        if upstream and time.time() > recover_at:
            request = urllib.request.Request(upstream + self.path, body or None, method=self.command)
            request.add_header("Content-Type", self.headers.get("Content-Type", "application/json"))
            try:
                with urllib.request.urlopen(request, timeout=30) as reply: code, payload = reply.status, reply.read()
            except urllib.error.HTTPError as error: code, payload = error.code, error.read()
        else:
            time.sleep(delay)
        self.send_response(code); self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(payload))); self.end_headers(); self.wfile.write(payload)
    do_GET = do_POST = do_PATCH = do_PUT = do_DELETE = answer
    def log_message(self, *_): pass
httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer)
print(httpd.server_port, flush=True)
httpd.serve_forever()
"""
TRAINING_CASES = ("sqlite", "working", "dead port", "answers 500", "hangs 60 s a call", "recovers after 10 s")
SHRUNK = {
    "audio.num_augmentations": 2, "ip_adapter.phases.adapter.batch_size": 4, "checkpointing_steps": 1000,
    "validation_steps": 50, "sampling.num_inference_steps": 3, "num_threads": 1,
}  # fmt: skip
DRIVER = """
import json, sys, time
from pathlib import Path
from pipeline_steps.core.config import load_params, parse_section
from pipeline_steps.core.project_paths import ProjectPaths
from pipeline_steps.train import stage
from pipeline_steps.train.config import TrainConfig
from pipeline_steps.tracking.client import tracker
layout = ProjectPaths(Path())
config = parse_section(TrainConfig, "train", load_params(layout.params))
end = []
finish = tracker._UploaderProcess.finish
def finishing(self, seconds):
    end.append((time.perf_counter(), time.process_time()))
    finish(self, seconds)
tracker._UploaderProcess.finish = finishing
begin = time.perf_counter(), time.process_time()
stage.run(config, layout)
last = time.perf_counter(), time.process_time()
done = end[0] if end else last
print(json.dumps({"seconds": done[0] - begin[0], "cpu": done[1] - begin[1], "wait": last[0] - done[0]}))
"""
CASES = ("off", "sqlite, first run", "sqlite", "dead port", "answers 500", "hangs 60 s a call")


PROJECT = Path(__file__).resolve().parents[1]


class Config(StageConfig):
    """Configuration of a stage."""

    learning_rate: float = 1e-3


@contextlib.contextmanager
def fake_server(delay_s: float, upstream: str = "", recover_after_s: float = 0.0) -> Iterator[str]:
    """Start a server that answers 500 after `delay_s` and forwards to `upstream` after `recover_after_s`. Yields its URI."""
    command = [sys.executable, "-c", SERVER, str(delay_s), upstream, str(recover_after_s)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield f"http://127.0.0.1:{int(process.stdout.readline())}"
        finally:
            process.kill()


@contextlib.contextmanager
def store(case: str) -> Iterator[dict[str, str]]:
    """Environment variables of a case."""
    if case == "off":
        yield {"SONIFY_TRACKING": "off"}
    elif case.startswith("sqlite"):
        yield {}
    elif case == "dead port":
        yield {"MLFLOW_TRACKING_URI": f"http://127.0.0.1:{free_port()}"}
    else:
        upstream = os.environ.get("OVERHEAD_MLFLOW", "") if case.startswith(("working", "recovers")) else ""
        delay_s, recover_after_s = (60.0 if case.startswith("hangs") else 0.0), (10.0 if case.startswith("recovers") else 0.0)
        with fake_server(delay_s, upstream, recover_after_s) as uri:
            yield {"MLFLOW_TRACKING_URI": uri}


def scratch_project(root: Path, steps: int) -> None:
    """Create a project with hard links to this project's data and reduced parameters."""
    from ruamel.yaml import YAML

    source, target = ProjectPaths(PROJECT), ProjectPaths(root)
    for name in ("assets", "catalog", "media", "pairs", "captions", "embeddings"):
        shutil.copytree(getattr(source, name), getattr(target, name), copy_function=lambda a, b: os.link(Path(a).resolve(), b))
    yaml = YAML()
    params = yaml.load(source.params)
    values = SHRUNK | {"ip_adapter.phases.adapter.max_steps": steps}
    for key, value in values.items():
        *sections, name = key.split(".")
        node = params["train"]
        for section in sections:
            node = node[section]
        node[name] = value
    yaml.dump(params, target.params)


def train_once(root: Path, environment: dict[str, str]) -> dict[str, float]:
    """Run one training in a process, with the result cache only."""
    shutil.rmtree(root / ".runs", ignore_errors=True)
    shutil.rmtree(root / "models", ignore_errors=True)
    clean = {key: value for key, value in os.environ.items() if not key.startswith("MLFLOW_") and key != "DVC_STAGE"}
    clean |= {"PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1", "SONIFY_TRACKING": "on", **environment}
    done = subprocess.run([sys.executable, "-c", DRIVER], cwd=root, env=clean, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    found["left"] = sum(queue.unsent() for queue in all_queues(ProjectPaths(root)))
    return found


def training(repeats: int, steps: int, cases: list[str]) -> None:
    """Print the table of training runs: each case alternates with `off`, in alternating order."""
    print(f"load {os.getloadavg()[0]:.1f}, {os.cpu_count()} cores, {repeats} repeats\n")
    print("| store | training time, ratio to off | processor time, ratio to off | wait at the end, s | entries left |")
    print("|---|---|---|---|---|")
    (PROJECT / ".runs").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=PROJECT / ".runs") as scratch, contextlib.ExitStack() as stack:
        root = Path(scratch) / "project"
        scratch_project(root, steps)
        (Path(scratch) / "mlflow").mkdir()
        server = mlflow_server(f"sqlite:///{Path(scratch) / 'mlflow/server.db'}", Path(scratch) / "mlflow", workers=1)
        os.environ["OVERHEAD_MLFLOW"] = stack.enter_context(server)
        train_once(root, {"SONIFY_TRACKING": "off"})  # fills the result cache
        with store("dead port") as environment:  # loads MLflow's files into the page cache
            train_once(root, environment)
        results: dict[str, list[dict[str, float]]] = {case: [] for case in cases}
        seconds = []
        for number in range(repeats):
            for case in cases:
                order = ["off", case] if number % 2 == 0 else [case, "off"]
                pair = {}
                for name in order:
                    with store(name) as environment:
                        pair[name] = train_once(root, environment)
                off, with_it = pair["off"], pair[case]
                seconds.append(off["seconds"])
                ratios = {key: with_it[key] / off[key] for key in ("seconds", "cpu")}
                results[case].append(with_it | {f"{key}_ratio": value for key, value in ratios.items()})
        for case, found in results.items():
            cells = []
            for key in ("seconds_ratio", "cpu_ratio"):
                values = sorted(one[key] for one in found)
                cells.append(f"{float(np.median(values)):.3f} ({values[0]:.3f} to {values[-1]:.3f})")
            wait, left = max(one["wait"] for one in found), max(one["left"] for one in found)
            print(f"| {case} | {' | '.join(cells)} | {wait:.1f} | {left:.0f} |", flush=True)
        print(f"\na training without tracking takes {np.median(seconds):.1f} s ({min(seconds):.1f} to {max(seconds):.1f})")


def train(layout: ProjectPaths, steps: int, size: int) -> tuple[list[float], list[float], float]:
    """Time of each step, time spent in tracking per step, and time from the last step to the end of the run, in seconds."""
    random = np.random.default_rng(0)
    matrix = random.normal(size=(size, size)).astype(np.float32)
    image = random.integers(0, 255, (256, 256, 3), dtype=np.uint8)
    seconds, spent = [], []
    with tracking.run("train", layout, Config()) as tracker:
        for step in range(steps):
            begin = time.perf_counter()
            loss = float((matrix @ matrix).std())
            logging_started = time.perf_counter()
            tracker.log_metrics({"train/loss": loss, "train/rate": 1e-3, "train/speed": float(step)}, step=step)
            if step % 50 == 49:
                tracker.log_image("samples/grid", image, step=step)
            now = time.perf_counter()
            seconds.append(now - begin)
            spent.append(now - logging_started)
        end = time.perf_counter()
    return seconds, spent, time.perf_counter() - end


def main() -> None:
    """Run all cases and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--loop", action="store_true", help="measure a loop instead of a training run")
    parser.add_argument("--case", action="append", choices=TRAINING_CASES, help="case of the training; default: all")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=0, help="default: 150 for training, 1000 for the loop")
    parser.add_argument("--size", type=int, default=700, help="side of the matrices, which sets the time per step")
    options = parser.parse_args()
    if not options.loop:
        training(options.repeats, options.steps or 150, options.case or list(TRAINING_CASES))
        return
    options.steps = options.steps or 1000
    print(f"{options.steps} steps, {os.cpu_count()} cores\n")
    print("| store | step p50 ms | step p99 ms | in tracking p50 ms | in tracking p99 ms | wait at the end, s | entries left |")
    print("|---|---|---|---|---|---|---|")
    before = dict(os.environ)
    with tempfile.TemporaryDirectory() as scratch:
        for case in CASES:
            root = Path(scratch) / ("sqlite" if case.startswith("sqlite") else case.split()[0])
            root.mkdir(exist_ok=True)
            os.environ.pop("MLFLOW_TRACKING_URI", None)
            with store(case) as environment, contextlib.redirect_stderr(io.StringIO()):
                os.environ.update({"SONIFY_TRACKING": "on", **environment})
                seconds, spent, wait = train(ProjectPaths(root), options.steps, options.size)
            left = sum(queue.unsent() for queue in all_queues(ProjectPaths(root)))
            numbers = [*np.percentile(seconds, [50, 99]), *np.percentile(spent, [50, 99])]
            cells = " | ".join(f"{number * 1e3:.2f}" for number in numbers)
            print(f"| {case} | {cells} | {wait:.1f} | {left} |", flush=True)
    os.environ.clear()
    os.environ.update(before)


if __name__ == "__main__":
    main()
