"""Feature store: rows by key from mapped files, checked at each read."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest

from pipeline_steps.core.errors import IntegrityError
from pipeline_steps.core.feature_store import FeatureStore


@pytest.fixture
def store(tmp_path: Path) -> FeatureStore:
    """Rows in two parts; values of unequal length, one empty."""
    store = FeatureStore(tmp_path, ("grid", "tags"))
    store.append({f"a{row}": {"grid": bytes([row]) * (100 + row), "tags": b""} for row in range(5)})
    store.append({f"b{row}": {"grid": b"grid", "tags": bytes([row])} for row in range(3)})
    store.append({})
    return store


def test_rows_are_found_and_read(store: FeatureStore) -> None:
    rows = store.find(["b2", "none", "a3", "a0"])
    assert rows[1] == -1
    assert bytes(store.read(int(rows[0]), "tags")) == b"\x02"
    assert bytes(store.read(int(rows[2]), "grid")) == b"\x03" * 103
    assert bytes(store.read(int(rows[3]), "tags")) == b""
    assert FeatureStore(store.folder / "new", ("grid",)).find(["a0"]).tolist() == [-1]


def test_sizes_are_known_without_reading_values(store: FeatureStore) -> None:
    rows = store.find(["b2", "a3", "a0"])
    assert store.sizes(rows, "grid").tolist() == [4, 103, 100]
    assert store.sizes(rows, "tags").tolist() == [1, 0, 0]
    assert rows.dtype == np.int32


def test_parts_added_meanwhile_do_not_move_rows(store: FeatureStore) -> None:
    before = store.find(["a0", "a4", "b0"])
    FeatureStore(store.folder, store.columns).append({f"c{row}": {"grid": b"c", "tags": b"c"} for row in range(50)})
    after = store.find(["a0", "a4", "b0", "c7"])
    assert before.tolist() == after[:3].tolist()
    assert bytes(store.read(int(after[3]), "grid")) == b"c"


def test_another_process_maps_the_files_itself(store: FeatureStore) -> None:
    row = int(store.find(["a3"])[0])
    state = pickle.dumps(store)
    assert len(state) < 2_000
    assert bytes(pickle.loads(state).read(row, "grid")) == b"\x03" * 103


def test_values_are_views_of_the_mapped_file(store: FeatureStore) -> None:
    row = int(store.find(["a3"])[0])
    first, second = (np.frombuffer(store.read(row, "grid"), np.uint8) for _ in range(2))
    assert first.__array_interface__["data"] == second.__array_interface__["data"]
    assert not first.flags.writeable


def read(store: FeatureStore, row: int, column: str) -> bytes | None:
    """A value; None if it is damaged."""
    try:
        return bytes(store.read(row, column))
    except IntegrityError as error:
        (part,) = store.folder.iterdir()
        return None if error.action == f"rm {part}, and run the stage again to encode its rows" else b"another cure"


def test_every_flipped_bit_is_noticed(tmp_path: Path) -> None:
    """A changed part is put aside when it is opened, or its row is an error when it is read, or nothing has changed."""
    columns, values = ("grid", "tags"), {"grid": b"some features", "tags": b"tag"}
    FeatureStore(tmp_path / "intact", columns).append({"key": values})
    (part,) = (tmp_path / "intact").iterdir()
    payload = part.read_bytes()
    noticed = 0
    for byte in range(0, len(payload), 3):
        folder = tmp_path / str(byte)
        folder.mkdir()
        changed = bytearray(payload)
        changed[byte] ^= 1 << byte % 8
        (folder / part.name).write_bytes(bytes(changed))
        store = FeatureStore(folder, columns)
        row = int(store.find(["key"])[0])
        if row < 0:  # put aside, or under another key
            noticed += 1
            continue
        for column in columns:
            found = read(store, row, column)
            noticed += found is None
            assert found in {None, values[column]}
    assert noticed > len(payload) // 12
