"""Stage `pair` on a small data set: counts, cap, splits without leakage, abstentions, reproducible bytes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from pipeline_steps.core.errors import DataError
from pipeline_steps.core.project_paths import ProjectPaths
from pipeline_steps.core.schemas import ABSTAINED, PAIRS
from pipeline_steps.core.tables import read_table
from pipeline_steps.pair.split_leakage import find_leaks
from pipeline_steps.pair.stage import PairConfig, run
from tests.pair.synthetic_tables import KINDS, SyntheticDataset

Settings = Callable[..., PairConfig]


def pairs_of(layout: ProjectPaths) -> list[dict[str, Any]]:
    return read_table(layout.pairs / "pairs.parquet", PAIRS).to_pylist()


def reasons(layout: ProjectPaths) -> Counter[str]:
    return Counter(read_table(layout.pairs / "abstained.parquet", ABSTAINED)["code"].to_pylist())


def kind_of(dataset: SyntheticDataset) -> dict[str, str]:
    kinds = {row["image_id"]: row["sound_source"] for row in dataset.events}
    return kinds | {row["audio_id"]: KINDS[int(row["path"][7:-5]) % 8] for row in dataset.audio}


def test_a_dataset_is_paired(dataset: SyntheticDataset, settings: Settings) -> None:
    layout = dataset.write()
    report = run(settings(max_reuse=3), layout)
    report.check_balance()
    assert (report.n_in, report.n_abstained, report.n_quarantined) == (130, report.n_in - report.n_ok, 0)
    pairs = pairs_of(layout)
    kinds = kind_of(dataset)
    hits = sum(kinds[pair["image_id"]] == kinds[pair["tracks"][0]["audio_id"]] for pair in pairs)
    assert hits >= 0.95 * len(pairs) > 90
    assert max(Counter(pair["audio_group"] for pair in pairs).values()) <= 3
    held_out = {row["image_id"] for row in dataset.images if row["holdout"]} | {
        r["audio_id"] for r in dataset.audio if r["holdout"]
    }
    assert not held_out & {name for pair in pairs for name in (pair["image_id"], pair["tracks"][0]["audio_id"])}
    assert {pair["split"] for pair in pairs} == {"train", "val", "test"}
    assert not any(report.metrics["leaks"].values())
    assert report.metrics["test_phrase_overlap"] == 1.0
    assert report.metrics["top1_baseline"]["max_reuse"] > report.metrics["assignment"]["max_reuse"]
    assert report.metrics["top1_baseline"]["gini"] > report.metrics["assignment"]["gini"]
    assert all(pair["tracks"][0]["phrase"] == f"sound of a {kinds[pair['image_id']]}" for pair in pairs)


def test_pairs_have_the_distance_of_their_event_and_the_space_of_their_image(
    dataset: SyntheticDataset, settings: Settings
) -> None:
    run(settings(), dataset.write())
    assert not {"distance", "space"} & set(pq.read_schema(dataset.layout.pairs / "pairs.parquet").names)
    stated = {row["image_id"]: (["near", "medium", "far", None][index % 4], ["cave", None][index % 2])
              for index, row in enumerate(dataset.events)}  # fmt: skip
    for row in dataset.events:
        row["distance"], row["space"] = stated[row["image_id"]]
    run(settings(), dataset.write())
    pairs = pairs_of(dataset.layout)
    assert len(pairs) > 90
    assert all((pair["distance"], pair["space"]) == stated[pair["image_id"]] for pair in pairs)


def test_no_group_is_in_two_splits(dataset: SyntheticDataset, settings: Settings) -> None:
    for row in dataset.images[:60]:
        row["group_id"] = f"{int(row['path'][7:-4]) % 16:032x}"
    for row in dataset.audio[:32]:
        row["group_id"] = f"{int(row['path'][7:-5]) % 16:032x}"
    layout = dataset.write()
    run(settings(), layout)
    for name in ("image_group", "audio_group"):
        sides: dict[str, set[str]] = {}
        for pair in pairs_of(layout):
            sides.setdefault(pair[name], set()).add(pair["split"])
        assert all(len(found) == 1 for found in sides.values())


def test_the_cap_counts_near_duplicate_clips_as_one(dataset: SyntheticDataset, settings: Settings) -> None:
    first = next(row["audio_id"] for row in dataset.audio)
    for row in dataset.audio:
        if row["path"][7:-5].isdigit() and int(row["path"][7:-5]) % 8 == 0 and not row["holdout"]:
            dataset.vectors[row["audio_id"]] = dataset.vectors[first]
    layout = dataset.write()
    run(settings(max_reuse=3), layout)
    dogs = [pair for pair in pairs_of(layout) if pair["tracks"][0]["phrase"] == "sound of a dog"]
    assert len({pair["audio_group"] for pair in dogs}) == 1
    assert len(dogs) == 3
    unpaired = {row["image_id"] for row in dataset.events if row["sound_source"] == "dog"} - {pair["image_id"] for pair in dogs}
    abstained = read_table(layout.pairs / "abstained.parquet", ABSTAINED).to_pylist()
    assert {row["code"] for row in abstained if row["image_id"] in unpaired} == {"CAPACITY"}


def test_near_duplicates_of_gold_pairs_are_not_paired(dataset: SyntheticDataset, settings: Settings) -> None:
    gold_image = next(row for row in dataset.images if row["holdout"])
    gold_clip = next(row for row in dataset.audio if row["holdout"])
    dataset.images[0]["group_id"] = gold_image["group_id"]
    dataset.audio[0]["group_id"] = gold_clip["group_id"]
    dataset.vectors[dataset.audio[8]["audio_id"]] = dataset.vectors[gold_clip["audio_id"]]
    layout = dataset.write()
    report = run(settings(), layout)
    pairs = pairs_of(layout)
    assert dataset.images[0]["image_id"] not in {pair["image_id"] for pair in pairs}
    used = {pair["tracks"][0]["audio_id"] for pair in pairs}
    assert not used & {dataset.audio[0]["audio_id"], dataset.audio[8]["audio_id"]}
    assert reasons(layout)["HOLDOUT_GROUP"] == 1
    assert report.metrics["sounds_excluded"] == {"HOLDOUT_GROUP": 2}


@pytest.mark.fault
def test_a_planted_leak_stops_the_stage(dataset: SyntheticDataset, settings: Settings) -> None:
    """Two copies of one image with different groups are in two splits: the leak check compares perceptual hashes."""
    layout = dataset.write()
    run(settings(), layout)
    by_split = {pair["split"]: pair["image_id"] for pair in pairs_of(layout)}
    rows = {row["image_id"]: row for row in dataset.images}
    rows[by_split["test"]]["phash"] = f"{int(rows[by_split['train']]['phash'], 16) ^ 0b101:016x}"
    dataset.write()
    with pytest.raises(DataError, match="near-duplicate picture") as caught:
        run(settings(), layout)
    assert caught.value.exit_code == 3
    assert by_split["test"] in caught.value.reason or by_split["train"] in caught.value.reason
    assert caught.value.details["crossings"]["near-duplicate picture"] >= 1  # type: ignore[index]


@pytest.mark.fault
def test_a_copy_of_a_gold_image_stops_the_stage(dataset: SyntheticDataset, settings: Settings) -> None:
    gold = next(row for row in dataset.images if row["holdout"])
    layout = dataset.write()
    run(settings(), layout)
    paired = pairs_of(layout)[0]["image_id"]
    row = next(row for row in dataset.images if row["image_id"] == paired)
    row["phash"] = f"{int(gold['phash'], 16) ^ 0b101:016x}"  # ingest did not group: phash_distance is -1
    dataset.write()
    with pytest.raises(DataError, match="near-duplicate picture") as caught:
        run(settings(), layout)
    assert {paired, gold["image_id"]} == {name for name in (paired, gold["image_id"]) if name in caught.value.reason}


@given(st.integers(0, 2**64 - 1), st.integers(0, 8), st.sampled_from(["train", "val", "test"]), st.floats(-1, 1))
def test_held_out_items_are_a_split_of_their_own(phash: int, flips: int, split: str, tilt: float) -> None:
    pair = {"image_id": "a", "split": split, "image_group": "a", "audio_group": "s", "tracks": [{"audio_id": "s"}]}
    hashes = {name: f"{value:016x}" for name, value in (("a", phash), ("gold", phash ^ (2**flips - 1)), ("pool", phash))}
    vectors = {"s": np.array([1, 0], np.float32), "ding": np.array([tilt, 1 - abs(tilt)], np.float32)}
    counts = find_leaks([pair], hashes, vectors, {"gold", "ding"}, 4, 0.995).counts()
    near = int(tilt >= 0.995 * float(np.hypot(tilt, 1 - abs(tilt))))
    assume(abs(tilt - 0.909) > 0.01)  # not at the limit itself
    assert counts["near-duplicate picture"] == (flips <= 4)
    assert counts["near-duplicate sound"] == near
    assert sum(counts.values()) == (flips <= 4) + near
    assert find_leaks([pair], hashes, vectors, {"a"}, 4, 0.995).counts() == {name: int(name == "holdout") for name in counts}


def test_a_new_image_changes_no_other_split(dataset: SyntheticDataset, settings: Settings) -> None:
    layout = dataset.write()
    run(settings(), layout)
    before = {pair["image_id"]: pair for pair in pairs_of(layout)}
    new = dataset.add_image("train", 5000)
    dataset.write()
    run(settings(), layout)
    after = {pair["image_id"]: pair for pair in pairs_of(layout)}
    assert new in after
    for name in before.keys() & after.keys():
        assert before[name]["split"] == after[name]["split"]
        if before[name]["tracks"][0]["phrase"] != "sound of a train":
            assert before[name] == after[name]


def test_images_below_the_threshold_abstain_with_their_score(dataset: SyntheticDataset, settings: Settings) -> None:
    name = dataset.add_image("ghost", 7000)
    phrase = "sound of a ghost"
    dataset.phrases[phrase] = -dataset.phrases["sound of a dog"]  # unlike dogs, and equally far from all clips
    layout = dataset.write()
    run(settings(null_quantile=0.95), layout)
    row = next(r for r in read_table(layout.pairs / "abstained.parquet", ABSTAINED).to_pylist() if r["image_id"] == name)
    assert (row["code"], row["stage"]) == ("BELOW_NULL", "pair")
    assert row["score"] is not None
    assert f"{row['score']:.3f}" in row["reason"]


def test_licenses_may_be_restricted(dataset: SyntheticDataset, settings: Settings) -> None:
    dataset.images[0]["license"] = None
    dataset.images[1]["license"] = "CC-BY-ND-4.0"
    layout = dataset.write()
    run(settings(license_policy="no-copyleft"), layout)
    assert {pair["license"] for pair in pairs_of(layout)} == {"CC0-1.0", "MIT", "CC-BY-4.0"}
    run(settings(license_policy="publishable"), layout)
    names = {pair["image_id"] for pair in pairs_of(layout)}
    assert not names & {dataset.images[0]["image_id"], dataset.images[1]["image_id"]}
    assert reasons(layout)["LICENSE"] == 2
    run(settings(), layout)
    unknown = [pair for pair in pairs_of(layout) if pair["license"] is None]
    assert [pair["image_id"] for pair in unknown] == [dataset.images[0]["image_id"]]


def test_gain_moves_a_clip_to_the_target_within_its_bound(dataset: SyntheticDataset, settings: Settings) -> None:
    layout = dataset.write()
    run(settings(target_lufs=-18.0, max_gain_db=5.0), layout)
    loudness = {row["audio_id"]: row["lufs"] for row in dataset.audio}
    gains = {track["audio_id"]: track["gain_db"] for pair in pairs_of(layout) for track in pair["tracks"]}
    assert all(gain == pytest.approx(min(5.0, -18.0 - loudness[name])) for name, gain in gains.items())
    assert max(gains.values()) == 5.0


def test_same_inputs_same_bytes(dataset: SyntheticDataset, settings: Settings, tmp_path: Path) -> None:
    layout = dataset.write()
    run(settings(), layout)
    first = {path.name: path.read_bytes() for path in sorted(layout.pairs.iterdir())}
    for path in layout.pairs.iterdir():
        path.unlink()
    run(settings(), layout)
    assert {path.name: path.read_bytes() for path in sorted(layout.pairs.iterdir())} == first
    tables = {"abstained.parquet", "pairs.parquet"}
    assert set(first) == {"README.md", "checksums.sha256", "croissant.json", "stats.json", *tables}
    assert not any(str(tmp_path).encode() in payload for payload in first.values())


@pytest.mark.fault
def test_all_abstained_is_an_error_with_reasons(empty_dataset: SyntheticDataset, settings: Settings) -> None:
    empty_dataset.add_image(None, 1)
    empty_dataset.add_audio("dog", 1)
    empty_dataset.add_audio("bell", 2)
    with pytest.raises(DataError, match=r"no pair was made: 1 images, \{'NO_SOUND': 1\}"):
        run(settings(), empty_dataset.write())


@pytest.mark.fault
def test_one_image_and_one_clip(empty_dataset: SyntheticDataset, settings: Settings, caplog: pytest.LogCaptureFixture) -> None:
    empty_dataset.add_image("dog", 1)
    empty_dataset.add_audio("dog", 1)
    layout = empty_dataset.write()
    report = run(settings(), layout)
    assert report.n_ok == 1
    assert report.metrics["empty_splits"] == ["val", "test"]
    assert "too small for all splits: no pair in val, test" in caplog.text


def test_only_held_out_images_or_lost_images_are_errors(empty_dataset: SyntheticDataset, settings: Settings) -> None:
    empty_dataset.add_image("dog", 1, holdout=True)
    empty_dataset.add_audio("dog", 1)
    with pytest.raises(DataError, match="no image may be paired"):
        run(settings(), empty_dataset.write())
    empty_dataset.add_image("dog", 2)
    lost = empty_dataset.events.pop()["image_id"]
    with pytest.raises(DataError, match=f"first: {lost}"):
        run(settings(), empty_dataset.write())


def test_quarantined_captions_are_counted(dataset: SyntheticDataset, settings: Settings) -> None:
    row = dataset.abstained.pop()
    dataset.quarantined.append(
        {
            "item_id": row["image_id"],
            "kind": "image",
            "path": "x",
            "bytes": 1,
            "stage": "caption",
            "code": "CAPTION_FAILED",
            "reason": "broken",
            "decoder": "tagger",
            "action": "dropped",
            "retryable": True,
        }
    )
    report = run(settings(), dataset.write())
    report.check_balance()
    assert report.n_quarantined == 1


def test_embeddings_of_another_length_than_their_ids_are_an_error(dataset: SyntheticDataset, settings: Settings) -> None:
    layout = dataset.write()
    (layout.embeddings / "audio.npy").write_bytes((layout.embeddings / "text.npy").read_bytes())
    with pytest.raises(DataError, match=r"audio\.npy is float32 \(8, 32\), its id table has 65 rows"):
        run(settings(), layout)


def test_croissant_validates_and_reads(dataset: SyntheticDataset, settings: Settings) -> None:
    layout = dataset.write()
    run(settings(), layout)
    tool = Path(sys.executable).with_name("mlcroissant")
    done = subprocess.run(
        [tool, "validate", "--jsonld", str(layout.pairs / "croissant.json")], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "error" not in done.stderr.lower()
    import mlcroissant

    records = list(mlcroissant.Dataset(jsonld=layout.pairs / "croissant.json").records("pairs"))
    assert {record["pairs/pair_id"].decode() for record in records} == {pair["pair_id"] for pair in pairs_of(layout)}


@pytest.mark.fault
def test_the_card_escapes_hostile_text(dataset: SyntheticDataset, settings: Settings) -> None:
    hostile = "![x](http://evil.example/a.png) | <script>alert(1)</script> {{ 7*7 }}\n# heading"
    dataset.events[0] |= {"phrase": hostile}
    dataset.images[2]["license"] = "CC0-1.0<img src=x onerror=alert(1)>"
    layout = dataset.write()
    run(settings(), layout)
    card = (layout.pairs / "README.md").read_text(encoding="utf-8")
    assert "{{ 7*7 }}".replace("{", "\\{").replace("}", "\\}").replace("*", "\\*") in card
    assert "<script" not in card.replace("\\<", "")
    assert "![" not in card
    assert "http://evil" not in card
    assert "\n# heading" not in card
    assert json.loads((layout.pairs / "croissant.json").read_text())["@type"] == "sc:Dataset"
