"""Tests of `sonify`: light imports, one-line errors with exit codes, `--json`."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image
from typer.testing import CliRunner, Result

from pipeline_steps.cli import app
from pipeline_steps.core.media_shards import write_index, write_shards
from pipeline_steps.core.project_paths import ProjectPaths
from pipeline_steps.core.schemas import QUARANTINE
from pipeline_steps.core.tables import write_table
from tests.factories.cli_project import json_output

PROJECT = Path(__file__).resolve().parents[1]
COMMANDS = [
    ["doctor"], ["run"], ["find"], ["draw"], ["report"], ["quarantine", "list"], ["quarantine", "show"], ["check"], ["verify"],
    ["export"], ["ui"], ["sync"], ["trace"], ["forget"], ["compare"], ["promote"], ["rollback"],
]  # fmt: skip
HEAVY = {
    "torch",
    "mlflow",
    "pyarrow",
    "numpy",
    "pandas",
    "transformers",
    "diffusers",
    "lightning",
    "dvc",
    "prefect",
    "PIL",
    "gradio",
    "uvicorn",
}


def sonify(root: Path, *arguments: str) -> Result:
    return CliRunner().invoke(app, ["--project", str(root), *arguments])


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Empty project; the working directory is its parent."""
    folder = tmp_path / "project"
    folder.mkdir()
    monkeypatch.chdir(tmp_path)
    return folder


@pytest.mark.parametrize("command", [[], ["find"]])
def test_help_imports_nothing_heavy(command: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", "from pipeline_steps.cli import app; app()", *command, "--help"],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        check=True,
    )
    loaded = {
        line.rsplit("|", 1)[-1].strip().split(".")[0] for line in done.stderr.splitlines() if line.startswith("import time:")
    }
    assert "typer" in loaded
    assert not loaded & HEAVY


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_has_help_and_json(command: list[str]) -> None:
    result = CliRunner().invoke(app, [*command, "--help"], env={"COLUMNS": "200", "NO_COLOR": "1"})
    assert result.exit_code == 0
    assert "--json" in re.sub(r"\x1b\[[0-9;]*m", "", result.output)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["find", "no.png"], 2, "no.png is not a file"),
        (["draw", "no.wav"], 2, "no trained model"),
        (["draw", "no.wav", "--out", "x.jpg"], 2, "must end in .png"),
        (["report"], 3, "does not exist yet"),
        (["quarantine", "list"], 3, "quarantine.parquet is missing"),
        (["check", "nowhere"], 2, "nowhere is not a folder"),
        (["export", "--webdataset", "out"], 3, "pairs.parquet is missing"),
        (["export", "--hf", "out"], 3, "pairs.parquet is missing"),
        (["export"], 2, "give one of --webdataset, --hf and --model"),
        (["export", "--hf", "out", "--model", "out"], 2, "--hf and --model to export"),
        (["export", "--hf", "out", "--version", "3"], 2, "belongs to --model"),
        (["export", "--model", "out"], 2, "there is no trained model"),
        (["export", "--model", "out", "--version", "3"], 2, "nothing was tracked here"),
        (["verify"], 3, "nothing to verify"),
        (["run"], 2, "contains no dvc.yaml"),
        (["run", "trian"], 2, "did you mean train?"),
        (["run", "--preset", "x"], 2, "contains no dvc.yaml"),
        (["ui", "--host", "0.0.0.0"], 2, "would show runs and files to the network"),
    ],
)
def test_errors_are_one_line_with_a_code(root: Path, arguments: list[str], code: int, message: str) -> None:
    if arguments[0] == "find":
        shutil.copy(PROJECT / "params.yaml", root)
    result = sonify(root, *arguments)
    assert result.exit_code == code, result.output
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
    again = sonify(root, *arguments, "--json")
    assert again.exit_code == code
    assert json_output(again)["error"]["exit_code"] == code


def test_version() -> None:
    from pipeline_steps import __version__

    result = CliRunner().invoke(app, ["--version"])
    assert (result.exit_code, result.output) == (0, f"sonify {__version__}\n")


def test_upload_needs_an_answer(root: Path) -> None:
    result = sonify(root, "export", "--hf", "out", "--push", "me/pairs", "--json")
    assert result.exit_code == 2
    assert "--json cannot ask for confirmation" in result.stderr


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ("retrieve: {k: 5}\ntrain: {sed: 1}\n", "train.sed is unknown; did you mean seed"),
        ("trian: {seed: 1}\n", "section trian belongs to no stage -> did you mean train?"),
    ],
)
def test_run_checks_all_sections_before_the_first_stage(root: Path, params: str, message: str) -> None:
    (root / "params.yaml").write_text(params)
    (root / "dvc.yaml").write_text("stages: {}\n")
    result = sonify(root, "run", "assets")
    assert result.exit_code == 2
    assert message in result.stderr


def test_doctor_names_the_stage_that_failed_last(root: Path) -> None:
    shutil.copy(PROJECT / "params.yaml", root)
    error = {"stage": "train", "kind": "resource", "exit_code": 4, "reason": "out of GPU memory", "action": "lower batch_size"}
    (root / "error.json").write_text(json.dumps(error))
    findings = {finding["name"]: finding for finding in json_output(sonify(root, "doctor", "--json"))["findings"]}
    assert findings["last run"] == {
        "name": "last run",
        "status": "warn",
        "found": "stage train failed with exit code 4: out of GPU memory",
        "wanted": "",
        "fix": "lower batch_size",
        "exit_code": 0,
    }


def test_terminal_sequences_in_names_are_escaped(root: Path) -> None:
    hostile = "images/\x1b[31mred\x07\u202e.png"
    row = {
        "item_id": "ab" * 16,
        "kind": "image",
        "path": hostile,
        "bytes": 3,
        "stage": "ingest",
        "code": "IMG_TRUNCATED",
        "reason": "cut\nin two",
        "decoder": "x",
        "action": "dropped",
        "retryable": False,
    }
    write_table(ProjectPaths(root).catalog / "quarantine.parquet", QUARANTINE, [row])
    listed = sonify(root, "quarantine", "list", "--code", "IMG_TRUNCATED")
    assert listed.exit_code == 0
    assert "\x1b" not in listed.output
    assert "\u202e" not in listed.output
    assert "\\x1b[31mred" in listed.output
    assert json_output(sonify(root, "quarantine", "list", "--json"))["codes"] == {"IMG_TRUNCATED": 1}
    shown = json_output(sonify(root, "quarantine", "show", "abab", "--json"))
    assert shown["items"][0]["path"] == hostile
    missing = sonify(root, "quarantine", "show", "zz")
    assert missing.exit_code == 2
    assert json_output(sonify(root, "quarantine", "list", "--code", "IMG_BOMB", "--json"))["count"] == 0
    unknown = sonify(root, "quarantine", "list", "--code", "IMG_TRUNKATED")
    assert unknown.exit_code == 2
    assert "did you mean IMG_TRUNCATED?" in unknown.stderr


def test_check_is_a_dry_run_of_ingest(root: Path, tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    random = np.random.default_rng(0)
    for number in range(2):
        Image.fromarray(random.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    soundfile.write(folder / "tone.wav", 0.3 * np.sin(np.arange(48_000) * 0.06), 48_000)
    before = sorted(tmp_path.rglob("*"))
    good = sonify(root, "check", str(folder), "--json")
    assert good.exit_code == 0, good.output
    assert (json_output(good)["images"], json_output(good)["audio"]) == (2, 1)
    (folder / "broken.jpg").write_bytes(b"<html>not found</html>")
    one_bad = sonify(root, "check", str(folder), "--json")
    assert one_bad.exit_code == 0, "one bad file stops no small pool"
    (row,) = json_output(one_bad)["quarantine"]
    assert row["path"] == "broken.jpg"
    for number in range(4):
        (folder / f"broken-{number}.jpg").write_bytes(bytes([number]) * 99)
    bad = sonify(root, "check", str(folder))
    assert bad.exit_code == 3
    assert "ingest would stop: ingest.max_failed_fraction: 5 of 8 files failed, and 0.05 accepts 4" in bad.output
    for path in folder.glob("broken*"):
        path.unlink()
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("command", [("check", "data/pool"), ("doctor",), ("run",)])
def test_entry_at_which_dvc_would_hang_is_named_before_anything_starts(root: Path, command: tuple[str, ...]) -> None:
    pool = root / "data/pool"
    pool.mkdir(parents=True)
    os.mkfifo(pool / "pipe.wav")
    (root / "params.yaml").write_text("ingest: {root: data/pool}\n")
    (root / "dvc.yaml").write_text("stages: {}\n")
    arguments = [str(root / part) if "/" in part else part for part in command]
    result = sonify(root, *arguments)
    assert result.exit_code == 3, result.output
    assert "pipe.wav: a named pipe" in result.output
    assert "pipe.wav" in sonify(root, *arguments, "--json").stdout


def test_ingest_started_by_dvc_refuses_a_pool_that_dvc_cannot_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline_steps.core.errors import DataError
    from pipeline_steps.ingest.config import IngestConfig
    from pipeline_steps.ingest.stage import run as ingest

    (tmp_path / "pool").mkdir()
    os.mkfifo(tmp_path / "pool/pipe.wav")
    monkeypatch.setenv("DVC_STAGE", "ingest")
    with pytest.raises(DataError, match=r"pipe\.wav: a named pipe"):
        ingest(IngestConfig(root="pool", metadata=None), ProjectPaths(tmp_path))


def test_doctor_shows_the_fix_for_a_damaged_lock(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copy(PROJECT / "params.yaml", root)
    (root / "dvc.lock").write_text("schema: '2.0'\nstages:\n  ingest:\n    cmd: [")
    monkeypatch.setenv("HF_TOKEN", "hf_verysecret")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:hf_verysecret@127.0.0.1:9")
    result = sonify(root, "doctor", "--json")
    findings = {finding["name"]: finding for finding in json_output(result)["findings"]}
    assert result.exit_code == 2
    assert "git checkout dvc.lock" in findings["lock"]["fix"]
    for name in ("mlflow", "lightning", "pillow", "disk", "GPU", "C++ compiler"):
        assert findings[name]["status"] == "ok", findings[name]
    assert findings["tracking"]["status"] == "warn"
    assert "hf_verysecret" not in result.output
    assert "fix for lock" in sonify(root, "doctor").output


def test_lock_holders_of_running_and_exited_processes(root: Path) -> None:
    from pipeline_steps.commands.doctor import living_lock_holders, lock_holders

    layout = ProjectPaths(root)
    assert lock_holders(layout) == set()
    path = root / ".dvc/tmp/rwlock"
    path.parent.mkdir(parents=True)
    holder = {"pid": os.getpid(), "cmd": "dvc repro"}
    dead = {"pid": 2**22 + 1, "cmd": "dvc repro"}
    path.write_text(json.dumps({"read": {"/a": [dead]}, "write": {"/b": holder}}))
    assert lock_holders(layout) == {os.getpid(), 2**22 + 1}
    assert living_lock_holders(layout) == [os.getpid()]
    path.write_text('{"read": ')
    with pytest.raises(ValueError, match="Expecting value"):
        lock_holders(layout)


def test_preset_is_applied_with_its_diff_and_the_old_file_is_kept(root: Path) -> None:
    from pipeline_steps.commands.run import apply_preset
    from pipeline_steps.core.errors import ConfigError

    layout = ProjectPaths(root)
    (root / "presets").mkdir()
    (root / "presets/embedded.yaml").write_text("train:\n  seed: 1\n")
    (root / "presets/wrong.yaml").write_text("train:\n  sed: 1\n")
    before = "retrieve:\n  k: 7  # mine\ntrain:\n  seed: 2\n"
    layout.params.write_text(before)
    changes = apply_preset(layout, "embedded")
    assert "-  seed: 2" in changes
    assert "+  seed: 1" in changes
    assert layout.params.read_text() == before.replace("seed: 2", "seed: 1")
    assert [path.read_text() for path in (layout.runs / "params").iterdir()] == [before]
    with pytest.raises(ConfigError, match=r"train\.sed is unknown; did you mean seed"):
        apply_preset(layout, "wrong")
    assert apply_preset(layout, "embedded") == []
    with pytest.raises(ConfigError, match="did you mean embedded"):
        apply_preset(layout, "embeded")


def test_run_exits_with_the_code_of_the_stage(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DVC turns every code into 255."""
    code = (
        "import json, pathlib, sys\n"
        "pathlib.Path('error.json').write_text(json.dumps({'stage': 'ingest', 'kind': 'integrity', 'exit_code': 6,"
        " 'reason': 'wrong hash', 'action': 'fetch again'}))\n"
        "sys.exit(6)\n"
    )
    (root / "fail.py").write_text(code)
    (root / "dvc.yaml").write_text("stages:\n  ingest:\n    cmd: python fail.py\n    deps: [fail.py]\n    outs: [out]\n")
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    subprocess.run([sys.executable, "-m", "dvc", "init", "--no-scm", "-q"], cwd=root, check=True)
    result = sonify(root, "run", "ingest", "--json")
    assert result.exit_code == 6
    assert json_output(result)["error"]["reason"] == "ingest: wrong hash"
    assert "fetch again" in result.stderr


def test_report_shows_headline_numbers(root: Path) -> None:
    reports = ProjectPaths(root).reports
    reports.mkdir()
    (reports / "index.html").write_text("<html></html>")
    entry = {"value": 0.71, "low": 0.6, "high": 0.8, "n": 40}
    evaluation = {
        "protocol": {"samples": 4},
        "test": {"rows": {"model": {"win_rate_ssd": entry, "precision": entry}, "shuffled_audio": {"win_rate_ssd": entry}}},
        "retrieval": {"rows": {"pipeline": {"recall_at_10": entry}, "random": {"recall_at_10": {"value": None}}}},
    }
    (reports / "evaluation.json").write_text(json.dumps(evaluation))
    result = sonify(root, "report")
    assert result.exit_code == 0
    lines = result.output.splitlines()
    assert len(lines) == 4
    assert [line.split()[:3] for line in lines[:3]] == [
        ["test,", "win_rate_ssd", "0.710"],
        ["retrieval,", "pipeline,", "recall_at_10"],
        ["retrieval,", "random,", "recall_at_10"],
    ]
    assert lines[0].endswith("0.710  [0.600, 0.800]  n=40")
    assert lines[3] == f"report: {(reports / 'index.html').resolve()}"
    assert json_output(sonify(root, "report", "--json"))["evaluation"] == evaluation


def test_ui_shows_its_command_without_credentials(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://me:verysecret@db/mlflow")
    result = sonify(root, "ui", "--json", "--port", "5055")
    assert result.exit_code == 0
    assert json_output(result)["address"] == "http://127.0.0.1:5055"
    assert "verysecret" not in result.output


def test_ui_on_a_used_port_is_an_error(root: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        result = sonify(root, "ui", "--port", str(taken.getsockname()[1]))
    assert result.exit_code == 2
    assert "choose another with --port" in result.stderr


@pytest.mark.parametrize(
    ("host", "fine"),
    [
        ("127.0.0.1", True),
        ("localhost", True),
        ("::1", True),
        ("127.9.9.9", True),
        ("0.0.0.0", False),
        ("::", False),
        ("192.168.0.1", False),
        ("example.org", False),
    ],
)
def test_only_loopback_hosts_are_accepted(host: str, fine: bool) -> None:
    from pipeline_steps.commands.ui import is_loopback

    assert is_loopback(host) is fine


class TestVerify:
    """Every kind of damage is reported with exit code 6."""

    @pytest.fixture
    def project(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """A DVC project with media shards and weights as outs."""
        code = (
            "from pathlib import Path\n"
            "from pipeline_steps.core.media_shards import write_index, write_shards\n"
            "from pipeline_steps.core.hashing import sha256_bytes\n"
            "import json\n"
            "items = {'a' * 32: b'one', 'b' * 32: b'two'}\n"
            "folder = Path('data/media')\n"
            "write_index(folder, write_shards(folder, 'image', items, 'png'))\n"
            "Path('data/assets').mkdir()\n"
            "Path('data/assets/w.safetensors').write_bytes(b'weights')\n"
            "entry = {'sha256': sha256_bytes(b'weights'), 'bytes': 7}\n"
            "Path('data/assets/meta.json').write_text(json.dumps({'files': {'w.safetensors': entry}}))\n"
        )
        (root / "make.py").write_text(code)
        (root / "dvc.yaml").write_text(
            "stages:\n  ingest:\n    cmd: python make.py\n    deps: [make.py]\n    outs: [data/media, data/assets]\n"
        )
        monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
        monkeypatch.setenv("PYTHONPATH", str(PROJECT))
        for command in (["init", "--no-scm", "-q"], ["repro", "-q"]):
            subprocess.run([sys.executable, "-m", "dvc", *command], cwd=root, check=True)
        return root

    def damaged(self, project: Path) -> str:
        result = sonify(project, "verify")
        assert result.exit_code == 6, result.output
        value = json_output(sonify(project, "verify", "--json"))
        assert value["intact"] is False
        assert all(check["fix"] for check in value["checks"] if check["problem"])
        return result.output

    def test_finds_each_damage(self, project: Path) -> None:
        whole = sonify(project, "verify", "--json")
        assert whole.exit_code == 0, whole.output
        assert json_output(whole)["checked"] >= 12

        # D7: a cache object changed, its mode kept at 0444. DVC itself says that all is up to date.
        listing = next((project / ".dvc/cache/files/md5").glob("*/*.dir"))
        member = json.loads(listing.read_text())[0]
        victim = project / ".dvc/cache/files/md5" / member["md5"][:2] / member["md5"][2:]
        with self.changed(victim):
            assert victim.stat().st_mode & 0o777 == 0o444
            status = subprocess.run(
                [sys.executable, "-m", "dvc", "status"], cwd=project, capture_output=True, text=True, check=True
            )
            assert "up to date" in status.stdout
            assert victim.name in self.damaged(project)
        with self.changed(listing):
            assert listing.name in self.damaged(project)

        shard = project / "data/media/image-a.tar"
        with self.changed(shard, at=512):
            said = self.damaged(project)
            assert "data/media" in said
            assert "do not match the index" in said
        weights = project / "data/assets/w.safetensors"
        with self.changed(weights):
            assert "data/assets/w.safetensors" in self.damaged(project)
        shutil.rmtree(project / "data/assets")
        assert "data/assets: is missing" in self.damaged(project)

    def test_shard_member_that_is_not_in_the_index(self, project: Path) -> None:
        folder = project / "data/media"
        rows = write_shards(folder, "image", {"a" * 32: b"one", "b" * 32: b"two", "c" * 32: b"three"}, "png")
        write_index(folder, rows[:2])
        assert "not in index.parquet" in self.damaged(project)

    class changed:  # noqa: N801 - reads as a verb
        """One byte of a file changed, mode kept; undone at the end."""

        def __init__(self, path: Path, at: int = 0) -> None:
            self.path, self.before, self.mode = path, path.read_bytes(), path.stat().st_mode
            self.after = self.before[:at] + bytes([self.before[at] ^ 1]) + self.before[at + 1 :]

        def write(self, payload: bytes) -> None:
            self.path.chmod(0o644)
            self.path.write_bytes(payload)
            self.path.chmod(self.mode)

        def __enter__(self) -> None:
            self.write(self.after)

        def __exit__(self, *_: object) -> None:
            self.write(self.before)


def test_find_retrieves_a_dog_and_writes_a_wav(root: Path, assets: Path, tmp_path: Path) -> None:
    """Stages ingest to retrieve on seven demo files, with plain text pooling, then `sonify find`."""
    from pipeline_steps.__main__ import run_stage

    pool = tmp_path / "pool"
    pool.mkdir()
    demo = PROJECT / "data/demo"
    for file in ["images/i-dog-000.webp", "images/i-wolf-000.webp", "images/i-horse-000.webp",
                 "sounds/s-dog-004.ogg", "sounds/s-dog-002.ogg", "sounds/s-bell-000.ogg", "sounds/s-rain-000.ogg"]:  # fmt: skip
        shutil.copy(demo / file, pool)
    layout = ProjectPaths(root)
    layout.assets.parent.mkdir()
    layout.assets.symlink_to(assets)
    section = {"root": str(pool), "metadata": None, "pool": None, "holdout": None}
    layout.params.write_text(
        json.dumps(
            {
                "ingest": section,
                "caption": {},
                "embed": {"yamnet_minilm": {"text_pooling": "plain"}},
                "retrieve": {"annoy": {"min_recall": 0.0}},
            }
        )
    )
    for stage in ("ingest", "caption", "embed", "retrieve"):
        run_stage(stage, layout)
    long_name = tmp_path / ("l" * 250 + ".webp")
    shutil.copy(demo / "images/i-dog-000.webp", long_name)
    assert sonify(root, "find", str(long_name)).exit_code == 0
    assert (tmp_path / ("l" * 245 + ".sound.wav")).is_file()
    result = sonify(root, "find", str(demo / "images/i-dog-000.webp"), "--json")
    assert result.exit_code == 0, result.output
    found = json_output(result)
    assert "dog" in found["events"][0]["phrase"]
    assert found["audio"][0]["path"].startswith("s-dog-")
    assert [clip["score"] for clip in found["audio"]] == sorted((clip["score"] for clip in found["audio"]), reverse=True)
    samples, rate = soundfile.read(found["wav"])
    assert rate == 48_000
    assert len(samples) / rate == pytest.approx(found["audio"][0]["duration_s"], abs=0.1)
    assert Path(found["wav"]).name == "i-dog-000.sound.wav"
    from pipeline_steps import embed_sounds, find_sounds

    with Image.open(demo / "images/i-dog-000.webp") as image:
        matches = find_sounds(image, project=root)
    assert matches.audio == found["audio"], "a PIL image is a normalised file"
    assert np.abs(matches.waveform() - samples).max() < 1e-4
    stored = np.load(layout.embeddings / "audio.npy")
    vectors = embed_sounds([pool / "s-dog-004.ogg", matches.waveform()], 48_000, project=root)
    assert np.abs(vectors @ stored.T).max(axis=1).min() > 0.9999
    refused = sonify(root, "find", str(pool / "s-dog-004.ogg"))
    assert refused.exit_code == 3
    assert "is an audio file" in refused.stderr
