"""Bounded reader of Debian packages: the files below one folder, without dpkg."""

import io
import lzma
import tarfile
from collections.abc import Iterator
from pathlib import Path


def _data_member(deb: Path) -> tuple[str, bytes]:
    with deb.open("rb") as stream:
        if stream.read(8) != b"!<arch>\n":
            raise ValueError(f"{deb}: is not a Debian package")
        while header := stream.read(60):
            name, size = header[:16].decode("ascii").strip().rstrip("/"), int(header[48:58])
            content = stream.read(size + size % 2)[:size]
            if name.startswith("data.tar"):
                return name, content
    raise ValueError(f"{deb}: has no member data.tar")


def deb_files(deb: Path, prefix: str, suffix: str, max_bytes: int) -> Iterator[tuple[str, bytes]]:
    """Yield path and content of regular files below `prefix`; files larger than `max_bytes` are skipped."""
    name, content = _data_member(deb)
    stream = io.BytesIO(lzma.decompress(content) if name.endswith(".xz") else content)
    with tarfile.open(fileobj=stream) as archive:
        for member in archive:
            if member.isfile() and member.size <= max_bytes and member.name.startswith(prefix) and member.name.endswith(suffix):
                extracted = archive.extractfile(member)
                if extracted is not None:
                    yield member.name, extracted.read()
