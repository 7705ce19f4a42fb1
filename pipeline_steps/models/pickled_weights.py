"""Conversion of a checkpoint whose weights exist only as `pytorch_model.bin` to safetensors.

    python -m pipeline_steps.models.pickled_weights FOLDER NEW_FOLDER

A .bin file is a pickle, which can run code when it is read. A child process with limits on memory, file size and time reads it
with torch's restricted unpickler, which accepts tensors only. The result is kept in a cache under the hash of the source, with
the hashes of all files, which are verified at every use.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock

from pipeline_steps.core.atomic import write_json
from pipeline_steps.core.errors import IntegrityError
from pipeline_steps.core.hashing import sha256_file
from pipeline_steps.core.process_limits import apply_process_limits

PICKLED = "pytorch_model.bin"
INDEX = "pytorch_model.bin.index.json"
PICKLED_FILES = ("pytorch_model*.bin", INDEX)
"""Patterns of what is fetched of a checkpoint without safetensors, beside its other files."""

RECORD = "conversion.json"
FAILURE = "failure.txt"
SECONDS = 600
BYTES_PER_SECOND = 20_000_000
"""Slowest expected conversion; with `SECONDS` for the start of the process it is the time limit."""
SPARE_BYTES = 2 * 2**30
"""Address space beyond twice the largest file and what the process has mapped when it begins to read."""


def pickled_shards(folder: Path) -> list[str]:
    """Names of the .bin files of a checkpoint, in the order of its index; empty if there are none.

    Raises:
        IntegrityError: the index is damaged, or names a file that is missing or lies outside the folder.
    """
    if (folder / PICKLED).is_file():
        return [PICKLED]
    if not (folder / INDEX).is_file():
        return []
    try:
        names = sorted(set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
        wrong = [name for name in names if Path(name).name != name or not (folder / name).is_file()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise IntegrityError(f"{folder / INDEX}: no index of weights", "fetch the checkpoint again") from error
    if wrong or not names:
        raise IntegrityError(f"{folder / INDEX}: {', '.join(wrong[:3]) or 'no file'} is missing", "fetch the checkpoint again")
    return names


def converted_checkpoint(folder: Path, digest: str, files: Sequence[str], cache: Path, key: str) -> Path:
    """Folder in `cache` with the same checkpoint as safetensors; converted if it is not there yet.

    Args:
        folder: checkpoint with .bin weights and without safetensors.
        digest: hash over the checkpoint's files; name of the new folder.
        files: patterns of the other files, which are copied.
        cache: folder of converted checkpoints.
        key: of params.yaml, for messages.

    Raises:
        IntegrityError: the file has other contents than tensors, or the child process exceeds a limit.
    """
    target = cache / digest[:32]
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / f".{target.name}.lock"):
        if _is_intact(target):
            return target
        shutil.rmtree(target, ignore_errors=True)
        with tempfile.TemporaryDirectory(dir=cache) as temporary:
            made = Path(temporary) / "checkpoint"
            made.mkdir()
            _convert_in_child(folder, made, key)
            for pattern in files:
                for path in folder.glob(pattern):
                    if path.name != INDEX:
                        shutil.copyfile(path, made / path.name)
            sources = {name: sha256_file(folder / name) for name in pickled_shards(folder)}
            hashes = {path.name: sha256_file(path) for path in sorted(made.iterdir())}
            write_json(made / RECORD, {"source": sources, "files": hashes})
            made.rename(target)
    return target


def _is_intact(folder: Path) -> bool:
    """Whether every file that the record of a conversion names has the recorded hash."""
    try:
        files = json.loads((folder / RECORD).read_text(encoding="utf-8"))["files"]
        return bool(files) and all(sha256_file(folder / name) == digest for name, digest in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _convert_in_child(folder: Path, target: Path, key: str) -> None:
    """Run `python -m` of this module; raise IntegrityError with its reason if it fails."""
    size = sum((folder / name).stat().st_size for name in pickled_shards(folder))
    path = os.pathsep.join(str(Path(entry).resolve()) for entry in sys.path if entry)
    environment = {"PATH": os.environ.get("PATH", ""), "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}  # no tokens, no keys
    command = [sys.executable, "-m", __name__, str(folder.resolve()), str(target.resolve())]
    try:
        code = subprocess.run(command, env=environment, timeout=SECONDS + size / BYTES_PER_SECOND, check=False).returncode
        failure = target / FAILURE
        reason = failure.read_text(encoding="utf-8") if failure.is_file() else f"the reading process ended with code {code}"
    except subprocess.TimeoutExpired as error:
        code, reason = 1, f"the reading process took longer than {error.timeout:.0f} s"
    if code:
        raise IntegrityError(
            f"{key}.model: {folder}: weights are pickled and cannot be converted: {reason}",
            "choose a checkpoint with safetensors; the file may have been made to harm",
        )


def convert(folder: Path, target: Path) -> None:
    """Write each .bin file of `folder` as safetensors into `target`, with an index if there are several.

    Raises:
        ValueError: a file is no mapping of names to dense tensors.
    """
    import torch
    from safetensors.torch import save_file

    shards = pickled_shards(folder)
    weight_map: dict[str, str] = {}
    for number, name in enumerate(shards, 1):
        content: Any = torch.load(folder / name, map_location="cpu", weights_only=True)
        if not isinstance(content, dict) or not all(
            isinstance(key, str)
            and isinstance(value, torch.Tensor)
            and value.layout == torch.strided
            and not value.is_quantized
            for key, value in content.items()
        ):
            raise ValueError(f"{name} is no mapping of names to dense tensors")
        written = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
        # Copies, because safetensors refuses tensors that have memory in common, as tied weights do.
        save_file({key: value.contiguous().clone() for key, value in content.items()}, target / written, {"format": "pt"})
        weight_map |= dict.fromkeys(content, written)
    if len(shards) > 1:
        size = sum(path.stat().st_size for path in target.iterdir())
        write_json(target / "model.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": weight_map})


def main(folder: Path, target: Path) -> int:
    """Convert within limits; the reason of a failure goes to `FAILURE` in the target."""
    import safetensors.torch  # noqa: F401 - before the limits
    import torch  # noqa: F401

    sizes = [(folder / name).stat().st_size for name in pickled_shards(folder)]
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() if sys.platform == "linux" else 0
    apply_process_limits(mapped + 3 * max(sizes) + SPARE_BYTES, file_bytes=2 * max(sizes) + 2**20)
    try:
        convert(folder, target)
    except Exception as error:  # a manipulated file may raise any error
        with contextlib.suppress(OSError):
            (target / FAILURE).write_text(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}", encoding="utf-8")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
