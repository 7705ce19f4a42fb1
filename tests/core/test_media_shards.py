"""Tests of media shards: reading by the index and by webdataset, changed bytes."""

import io
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline_steps.core.errors import DataError, IntegrityError
from pipeline_steps.core.hashing import item_id
from pipeline_steps.core.media_shards import MediaShardReader, write_index, write_shards


def png(seed: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (5, 7, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def flac(seed: int) -> bytes:
    buffer = io.BytesIO()
    samples = np.random.default_rng(seed).uniform(-0.5, 0.5, 480)
    soundfile.write(buffer, samples, 48_000, format="FLAC", subtype="PCM_16")
    return buffer.getvalue()


def shards(folder: Path) -> list[str]:
    images = {item_id(png(n)): png(n) for n in range(6)}
    sounds = {item_id(flac(n)): flac(n) for n in range(3)}
    write_index(folder, write_shards(folder, "image", images, "png") + write_shards(folder, "audio", sounds, "flac"))
    return sorted(images)


def test_round_trip(tmp_path: Path) -> None:
    ids = shards(tmp_path)
    reader = MediaShardReader(tmp_path)
    assert reader.ids("image") == ids
    assert reader.image(ids[0]).shape == (5, 7, 3)
    sound = reader.sound(reader.ids("audio")[0])
    assert sound.dtype == np.float32
    assert sound.shape == (480,)


@given(st.dictionaries(st.text("0123456789abcdef", min_size=4, max_size=8), st.binary(max_size=3000), min_size=1, max_size=12))
@settings(max_examples=25, deadline=None)
def test_offsets_are_those_of_the_payloads(tmp_path_factory: pytest.TempPathFactory, items: dict[str, bytes]) -> None:
    folder = tmp_path_factory.mktemp("shards")
    write_index(folder, write_shards(folder, "image", items, "png"))
    reader = MediaShardReader(folder)
    assert {item: reader.payload(item) for item in items} == items


def test_a_new_item_changes_one_shard(tmp_path: Path) -> None:
    items = {f"{digit}{n:031x}": bytes([n]) * 100 for digit in "0123" for n in range(3)}
    write_shards(tmp_path / "a", "image", items, "png")
    write_shards(tmp_path / "b", "image", {**items, "2" + "f" * 31: b"new"}, "png")
    changed = [p.name for p in (tmp_path / "a").glob("*.tar") if p.read_bytes() != (tmp_path / "b" / p.name).read_bytes()]
    assert changed == ["image-2.tar"]


def test_webdataset_reads_the_same_samples(tmp_path: Path) -> None:
    import webdataset

    ids = shards(tmp_path)
    tars = sorted(str(path) for path in tmp_path.glob("image-*.tar"))
    samples = list(webdataset.WebDataset(tars, shardshuffle=False, empty_check=False))
    assert sorted(sample["__key__"] for sample in samples) == ids
    assert {sample["__key__"]: sample["png"] for sample in samples} == {i: MediaShardReader(tmp_path).payload(i) for i in ids}


def test_changed_bytes_and_unknown_ids_are_errors(tmp_path: Path) -> None:
    ids = shards(tmp_path)
    with pytest.raises(DataError, match="is not in"):
        MediaShardReader(tmp_path).payload("f" * 32)
    tar = tmp_path / f"image-{ids[0][0]}.tar"
    payload = bytearray(tar.read_bytes())
    payload[600] ^= 1
    tar.write_bytes(bytes(payload))
    with pytest.raises(IntegrityError, match="do not match the index"):
        MediaShardReader(tmp_path).image(ids[0])


def test_reader_checks_each_item_once_unless_verify_is_false(tmp_path: Path) -> None:
    ids = shards(tmp_path)
    tar = tmp_path / f"image-{ids[0][0]}.tar"
    checked, trusting = MediaShardReader(tmp_path), MediaShardReader(tmp_path, verify=False)
    sound = checked.payload(ids[0])
    damaged = bytearray(tar.read_bytes())
    damaged[damaged.index(sound) + 3] ^= 1
    tar.write_bytes(bytes(damaged))
    assert len(trusting.payload(ids[0])) == len(sound)
    with pytest.raises(IntegrityError):
        MediaShardReader(tmp_path).payload(ids[0])
    tar.write_bytes(bytes(damaged[:600]))
    with pytest.raises(IntegrityError):
        trusting.payload(ids[0])


def test_pickled_reader_opens_a_bounded_number_of_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = shards(tmp_path)
    reader = MediaShardReader(tmp_path)
    payloads = [reader.payload(item) for item in ids]
    again = pickle.loads(pickle.dumps(reader))
    assert [again.payload(item) for item in ids] == payloads
    monkeypatch.setattr("pipeline_steps.core.media_shards.OPEN_SHARDS", 1)
    few = MediaShardReader(tmp_path)
    assert [few.payload(item) for item in ids] == payloads
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(MediaShardReader(tmp_path).payload, ids * 5)) == payloads * 5
