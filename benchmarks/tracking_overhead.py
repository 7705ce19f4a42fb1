"""What tracking costs a training loop when the store is well, dead, broken or slow: python benchmarks/tracking_overhead.py

A loop of small matrix products stands for training: each step logs three numbers, every fiftieth a picture. Printed are the
time of a step, the wait at the end of the run, and how many entries stay in the spool for `sonify sync`.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from pipeline_steps import tracking
from pipeline_steps.core.config import StageConfig
from pipeline_steps.core.layout import Layout
from pipeline_steps.tracking.spool import all_spools

SERVER = """
import http.server, sys, time
class Answer(http.server.BaseHTTPRequestHandler):
    def answer(self):
        time.sleep(float(sys.argv[1]))
        self.send_response(500); self.send_header("Content-Length", "0"); self.end_headers()
    do_GET = do_POST = do_PATCH = answer
    def log_message(self, *_): pass
httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer)
print(httpd.server_port, flush=True)
httpd.serve_forever()
"""
CASES = ("off", "sqlite, first run", "sqlite", "dead port", "answers 500", "hangs 60 s a call")


class Config(StageConfig):
    """A stage's section."""

    learning_rate: float = 1e-3


@contextlib.contextmanager
def fake_server(delay_s: float) -> Iterator[str]:
    """Address of a server that answers 500 after `delay_s`."""
    with subprocess.Popen([sys.executable, "-c", SERVER, str(delay_s)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield f"http://127.0.0.1:{int(process.stdout.readline())}"
        process.kill()


@contextlib.contextmanager
def store(case: str) -> Iterator[dict[str, str]]:
    """Environment of a case."""
    if case == "off":
        yield {"SONIFY_TRACKING": "off"}
    elif case.startswith("sqlite"):
        yield {}
    elif case == "dead port":
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        yield {"MLFLOW_TRACKING_URI": f"http://127.0.0.1:{port}"}
    else:
        with fake_server(60.0 if case.startswith("hangs") else 0.0) as uri:
            yield {"MLFLOW_TRACKING_URI": uri}


def train(layout: Layout, steps: int, size: int) -> tuple[list[float], list[float], float]:
    """Seconds of each step, seconds of it spent in tracking, and seconds from the last step to the end of the run."""
    random = np.random.default_rng(0)
    matrix = random.normal(size=(size, size)).astype(np.float32)
    picture = random.integers(0, 255, (256, 256, 3), dtype=np.uint8)
    seconds, spent = [], []
    with tracking.run("train", layout, Config()) as tracker:
        for step in range(steps):
            begin = time.perf_counter()
            loss = float((matrix @ matrix).std())
            said = time.perf_counter()
            tracker.log_metrics({"train/loss": loss, "train/rate": 1e-3, "train/speed": float(step)}, step=step)
            if step % 50 == 49:
                tracker.log_image("samples/grid", picture, step=step)
            now = time.perf_counter()
            seconds.append(now - begin)
            spent.append(now - said)
        end = time.perf_counter()
    return seconds, spent, time.perf_counter() - end


def main() -> None:
    """Run every case and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--size", type=int, default=700, help="side of the matrices: sets the time of a step")
    options = parser.parse_args()
    print(f"{options.steps} steps, {os.cpu_count()} cores\n")
    print("| store | step p50 ms | step p99 ms | in tracking p50 ms | in tracking p99 ms | wait at the end s | entries left |")
    print("|---|---|---|---|---|---|---|")
    before = dict(os.environ)
    with tempfile.TemporaryDirectory() as scratch:
        for case in CASES:
            root = Path(scratch) / ("sqlite" if case.startswith("sqlite") else case.split()[0])
            root.mkdir(exist_ok=True)
            os.environ.pop("MLFLOW_TRACKING_URI", None)
            with store(case) as environment, contextlib.redirect_stderr(io.StringIO()):
                os.environ.update({"SONIFY_TRACKING": "on", **environment})
                seconds, spent, wait = train(Layout(root), options.steps, options.size)
            left = sum(spool.unsent() for spool in all_spools(Layout(root)))
            numbers = [*np.percentile(seconds, [50, 99]), *np.percentile(spent, [50, 99])]
            cells = " | ".join(f"{number * 1e3:.2f}" for number in numbers)
            print(f"| {case} | {cells} | {wait:.1f} | {left} |", flush=True)
    os.environ.clear()
    os.environ.update(before)


if __name__ == "__main__":
    main()
