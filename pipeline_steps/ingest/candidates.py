"""Candidate files, rejected files, and the result of discovery."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from pipeline_steps.core.hashing import ID_LENGTH
from pipeline_steps.ingest.reason_codes import CODES


class ArchiveMember(NamedTuple):
    """Location of an item in an archive: bytes [offset, offset + size), or a cell of a Parquet row group.

    `name` is the member's path; only its extension is used. `group` is -1 for a byte range.
    """

    name: str
    offset: int = 0
    size: int = 0
    column: str = ""
    group: int = -1
    row: int = -1


@dataclass(frozen=True, slots=True)
class CandidateFile:
    """File or archive member that was opened and hashed, with its metadata.

    `relative` is the file below `root`, both without links; `path` is the name as printable text, behind the name of its pool.
    """

    root: str
    relative: str
    path: str
    sha256: str
    bytes: int
    kind: str
    format: str
    license: str | None = None
    author: str | None = None
    source: str | None = None
    group: str | None = None
    holdout: bool = False
    member: ArchiveMember | None = None  # location in `relative` if that is an archive or a table
    text: str | None = None

    @property
    def name(self) -> str:
        """Name whose extension counts."""
        return self.member.name if self.member else self.relative

    @property
    def item_id(self) -> str:
        return self.sha256[:ID_LENGTH]


@dataclass(frozen=True, slots=True)
class RejectedFile:
    """Candidate that does not enter the catalog, with the reason code."""

    path: str
    kind: str
    code: str
    reason: str
    bytes: int = 0
    item_id: str = ""
    decoder: str = ""

    @property
    def abstained(self) -> bool:
        return CODES[self.code].action == "abstained"

    def row(self) -> dict[str, Any]:
        """Row of the quarantine table."""
        code = CODES[self.code]
        return {**asdict(self), "stage": "ingest", "action": code.action, "retryable": code.retryable}


@dataclass
class DiscoveryResult:
    """Candidates to decode and candidates that were rejected before decoding."""

    files: list[CandidateFile] = field(default_factory=list)
    rejected: list[RejectedFile] = field(default_factory=list)
    skipped_files: Counter[str] = field(default_factory=Counter)  # extension -> files that are no candidates
    filtered_rows: int = 0  # metadata rows in neither `pool` nor `holdout`
    layouts: dict[str, str] = field(default_factory=dict)  # folder -> data set layout

    @property
    def count(self) -> int:
        """Number of candidates, rejected ones included."""
        return len(self.files) + len(self.rejected)

    def merge(self, other: DiscoveryResult) -> None:
        """Append the files, counts and layouts of another result."""
        self.files += other.files
        self.rejected += other.rejected
        self.skipped_files += other.skipped_files
        self.filtered_rows += other.filtered_rows
        self.layouts |= other.layouts
