"""Executor `ray` on two real raylets: lost and repeated items when an actor or a node is killed during a run."""

from __future__ import annotations

import json
import os
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.factories.ray_cluster import Cluster, driver, finished, kill_tree, two_raylets, wait_for

DRIVER = str(Path(__file__).with_name("counting_driver.py"))
ITEMS, BATCH, ACTORS = 40, 4, 2

pytestmark = [pytest.mark.full, pytest.mark.fault, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with two_raylets(tmp_path_factory.getbasetemp().parent / "ray.lock") as made:
        yield made


def begun(folder: Path) -> list[tuple[str, int]]:
    """Item and process of each attempt so far."""
    if not (folder / "begun").is_dir():
        return []
    names = [path.name.split("-") for path in sorted((folder / "begun").iterdir(), key=lambda path: path.stat().st_mtime_ns)]
    return [(name[0], int(name[1])) for name in names]


def start(cluster: Cluster, folder: Path, cpus: int = 1) -> Any:
    return driver([DRIVER, str(folder), cluster.address, str(ITEMS), str(BATCH), str(ACTORS), str(cpus)], folder)


def check(folder: Path, answer: str, killed: int) -> None:
    """Every item has a row or a reason, and only items in progress on a killed process were repeated."""
    result = json.loads(answer.splitlines()[-1])
    assert result == {
        "known": 0,
        "cached": ITEMS - 1,
        "failed": {"item7": ["BAD", "item7 is the bad one"]},
        "right": ITEMS - 1,
        "local_rows": 0,
    }
    attempts = Counter(item for item, _ in begun(folder))
    assert len(attempts) == ITEMS
    assert sum(attempts.values()) - ITEMS <= killed * BATCH
    assert all(count <= 1 + killed for count in attempts.values())


def test_killed_actor_repeats_at_most_its_batch(cluster: Cluster, tmp_path: Path) -> None:
    running = start(cluster, tmp_path)
    wait_for(lambda: len({pid for _, pid in begun(tmp_path)}) == ACTORS and len(begun(tmp_path)) > 2 * BATCH)
    victim = begun(tmp_path)[-1][1]
    os.kill(victim, signal.SIGKILL)
    assert len(begun(tmp_path)) < ITEMS, "killed in mid-run"
    check(tmp_path, finished(running), killed=1)
    assert len({pid for _, pid in begun(tmp_path)}) == ACTORS + 1, "another actor took its place"


def test_killed_driver_keeps_finished_items(cluster: Cluster, tmp_path: Path) -> None:
    running = start(cluster, tmp_path)
    wait_for(lambda: len(begun(tmp_path)) > 3 * BATCH)
    running.kill()
    running.wait()
    actors = {pid for _, pid in begun(tmp_path)}
    wait_for(lambda: not any(psutil.pid_exists(pid) for pid in actors))
    before = len(begun(tmp_path))
    assert before < ITEMS, "killed in mid-run"
    result = json.loads(finished(start(cluster, tmp_path)).splitlines()[-1])
    assert result["known"] >= before - ACTORS * BATCH - 1
    assert (result["known"] + result["cached"], result["right"]) == (ITEMS - 1, ITEMS - 1)
    assert len(begun(tmp_path)) - ITEMS <= ACTORS * BATCH + 1, "the bad one is tried again, and what was in hand"


def test_full_cluster_is_an_error_after_the_timeout(cluster: Cluster, tmp_path: Path) -> None:
    error = json.loads(finished(start(cluster, tmp_path, cpus=64)).splitlines()[-1])["error"]
    assert (error["kind"], error["exit_code"], error["transient"]) == ("service", 5, True)
    assert "no_progress_timeout_seconds" in error["action"]


def test_killed_node_repeats_at_most_its_batches(cluster: Cluster, tmp_path: Path) -> None:
    """The last test, because one node remains; the remaining actor processes the items of both."""
    running = start(cluster, tmp_path)
    wait_for(lambda: len({pid for _, pid in begun(tmp_path)}) == ACTORS and len(begun(tmp_path)) > 2 * BATCH)
    lost = {child.pid for child in psutil.Process(cluster.nodes[1].pid).children(recursive=True)}
    assert lost & {pid for _, pid in begun(tmp_path)}, "an actor lives there"
    kill_tree(cluster.nodes[1])
    assert len(begun(tmp_path)) < ITEMS, "killed in mid-run"
    check(tmp_path, finished(running), killed=1)


NO_TOKEN = "import os; del os.environ['RAY_AUTH_MODE'], os.environ['RAY_AUTH_TOKEN']"


def run_on_its_own(folder: Path) -> str:
    """Two items on a Ray that the process starts."""
    folder.mkdir()
    return f"sys.argv[1:] = [{str(folder)!r}, '', '2', '1', '1', '1']; runpy.run_path({DRIVER!r}, run_name='__main__')"


def test_process_can_start_ray_twice(tmp_path: Path) -> None:
    """As `embed` does with an empty address: once for texts, once for audio."""
    lines = ["import runpy, sys", NO_TOKEN, *(run_on_its_own(tmp_path / name) for name in ("texts", "sounds"))]
    answers = finished(driver(["-c", "\n".join(lines)], tmp_path)).splitlines()
    assert [json.loads(answer)["right"] for answer in answers[-2:]] == [2, 2]


def test_ray_imported_without_a_token_is_an_error(tmp_path: Path) -> None:
    lines = ["import runpy, sys", NO_TOKEN, "import ray", run_on_its_own(tmp_path / "texts")]
    error = json.loads(finished(driver(["-c", "\n".join(lines)], tmp_path)).splitlines()[-1])["error"]
    assert (error["kind"], error["transient"]) == ("configuration", False)
    assert "RAY_AUTH_MODE" in error["action"]
