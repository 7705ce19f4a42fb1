"""Checksums of outs: standard format, every changed bit found, the cure named."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from pipeline_steps.core.checksums import NAME, check_digest, read_verified, record_checksums, verified_sha256
from pipeline_steps.core.errors import IntegrityError
from pipeline_steps.core.hashing import sha256_bytes


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A recorded folder with files in folders and a media shard."""
    folder = tmp_path / "data/pairs"
    with record_checksums("pair", folder):
        for name in ("pairs.parquet", "unet/config.json", "a/b/deep.bin", "audio-0.tar"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(name.encode())
    return folder


def problem_of(path: Path) -> str:
    """Error of reading a file; empty if there is none."""
    try:
        read_verified(path)
    except IntegrityError as error:
        return str(error)
    return ""


def test_record_is_what_sha256sum_checks(out: Path) -> None:
    text = (out / NAME).read_text()
    assert text.splitlines()[0] == "# written by stage pair"
    assert [line.split("  ")[1] for line in text.splitlines()[1:-1]] == ["a/b/deep.bin", "pairs.parquet", "unet/config.json"]
    if shutil.which("sha256sum"):
        done = subprocess.run(["sha256sum", "--strict", "-c", NAME], cwd=out, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout.count(": OK")) == (0, 3), done


def test_damaged_file_is_named_with_the_cure(out: Path) -> None:
    path = out / "a/b/deep.bin"
    assert read_verified(path) == b"a/b/deep.bin"
    assert verified_sha256(path) == sha256_bytes(b"a/b/deep.bin")
    path.write_bytes(b"a/b/deep.bim")
    for read in (read_verified, verified_sha256):
        with pytest.raises(IntegrityError, match=r"deep\.bin: sha256 is \w{64}, \S+ has \w{64}") as caught:
            read(path)
        assert caught.value.action == f"rm {path} && dvc checkout {out}; or dvc repro --force pair"


def test_every_bit_of_the_record_is_checked(out: Path) -> None:
    """Whichever file is read, a changed record is an error."""
    record, intact = out / NAME, (out / NAME).read_bytes()
    files = [path for path in out.rglob("*") if path.is_file() and path != record and path.suffix != ".tar"]
    for bit in range(8 * len(intact)):
        changed = bytearray(intact)
        changed[bit // 8] ^= 1 << bit % 8
        record.write_bytes(bytes(changed))
        assert all("is damaged" in (problem := problem_of(path)) and "dvc checkout" in problem for path in files), bit


def test_file_that_the_record_does_not_list(out: Path) -> None:
    (out / "new.json").write_text("{}")
    with pytest.raises(IntegrityError, match="has no such file"):
        read_verified(out / "new.json")


def test_interrupted_stage_leaves_no_record(out: Path) -> None:
    with pytest.raises(NotADirectoryError), record_checksums("pair", out):
        (out / "pairs.parquet" / "x").write_bytes(b"a stage that fails")
    assert not (out / NAME).exists()
    check_digest(out / "pairs.parquet", "anything")
