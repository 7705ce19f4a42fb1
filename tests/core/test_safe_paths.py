from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline_steps.core.safe_paths import (
    UnsafePathError,
    digest_file,
    display_path,
    open_regular_file,
    resolve,
    validate_relative_path,
    walk_untrusted,
)

HOSTILE = [
    "", " ", "/etc/passwd", "//etc/passwd", "../x.png", "a/../../x.png", "a/..", "..", "~/x.png", "~root/x.png", "..\\x.png",
    "a\\b.png", "C:\\x.png", "C:/x.png", "c:x.png", "\\\\server\\share\\x.png", "file:///etc/passwd", "http://host/x.png",
    "a\x00.png", "x\udcff.png",
]  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE, ids=ascii)
def test_unsafe_paths_are_rejected_without_disk_access(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("open", "lstat", "stat"):
        monkeypatch.setattr(os, name, lambda *_, **__: pytest.fail("the disk was touched"))
    with pytest.raises(UnsafePathError) as error:
        validate_relative_path(text)
    assert error.value.code == ("PATH_ENCODING" if "\udcff" in text else "PATH_UNSAFE")


@given(st.text(max_size=60))
def test_validated_path_is_below_the_root(text: str) -> None:
    try:
        relative = validate_relative_path(text)
    except UnsafePathError:
        return
    joined = os.path.normpath(f"/pool/of/it/{relative}")
    assert joined == "/pool/of/it" or joined.startswith("/pool/of/it/")


@given(st.binary(max_size=40), st.binary(max_size=40))
def test_displayed_paths_are_printable_and_distinct(first: bytes, second: bytes) -> None:
    names = [os.fsdecode(name) for name in (first, second)]
    shown = [display_path(name) for name in names]
    assert (shown[0] == shown[1]) == (names[0] == names[1])
    for text in shown:
        text.encode("utf-8")
        assert "\n" not in text
        assert "\x1b" not in text
        assert "\u202e" not in text


def test_plain_files_are_read(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a/x.bin").write_bytes(b"hello")
    (tmp_path / "link.bin").symlink_to("a/x.bin")
    for name in ("a/x.bin", "link.bin"):
        relative = resolve(tmp_path, name)
        assert relative == "a/x.bin"
        with open_regular_file(tmp_path, relative) as handle:
            seen = digest_file(handle, head=4)
            assert (seen.size, seen.head) == (5, b"hell")
            assert handle.read() == b"hello"


def test_nothing_outside_the_root_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (tmp_path / "secret.png").write_bytes(b"secret")
    (root / "file.png").symlink_to("../secret.png")
    (root / "folder").symlink_to("..")
    opened = []
    real = os.open
    monkeypatch.setattr(os, "open", lambda *a, **k: (opened.append(a[0]), real(*a, **k))[1])
    for name in ("file.png", "folder/secret.png"):
        with pytest.raises(UnsafePathError) as error:
            resolve(root, name)
        assert error.value.code == "PATH_UNSAFE"
    assert not opened


def test_link_created_after_the_check_is_rejected(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "folder").mkdir(parents=True)
    (root / "folder/x.png").write_bytes(b"x")
    (tmp_path / "x.png").write_bytes(b"secret")
    relative = resolve(root, "folder/x.png")
    (root / "folder/x.png").unlink()
    (root / "folder").rmdir()
    (root / "folder").symlink_to("..")
    with pytest.raises(UnsafePathError) as error:
        open_regular_file(root, relative)
    assert error.value.code == "PATH_UNSAFE"
    (root / "y.png").symlink_to("../x.png")
    with pytest.raises(UnsafePathError):
        open_regular_file(root, "y.png")


@pytest.mark.timeout(20)
def test_pipes_do_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for attempt in (lambda: resolve(tmp_path, "pipe"), lambda: open_regular_file(tmp_path, "pipe")):
        with pytest.raises(UnsafePathError) as error:
            attempt()
        assert error.value.code == "NOT_A_FILE"


def test_missing_and_invalid_names_are_errors(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"x")
    for name in ("nothing", "x/y", "n" * 300):
        with pytest.raises(UnsafePathError) as error:
            resolve(tmp_path, name)
        assert error.value.code == "FILE_MISSING", name


def test_walk_lists_every_name_once_and_follows_no_link(tmp_path: Path) -> None:
    (tmp_path / "b/c").mkdir(parents=True)
    (tmp_path / ".hidden").mkdir()
    for name in ("z", "b/y", "b/c/x", ".hidden/w"):
        (tmp_path / name).touch()
    (tmp_path / "loop").symlink_to(".")
    assert list(walk_untrusted(tmp_path)) == [
        (".hidden", "folder"), ("b", "folder"), ("loop", "file"), ("z", "file"),
        ("b/c", "folder"), ("b/y", "file"), ("b/c/x", "file"),
    ]  # fmt: skip
