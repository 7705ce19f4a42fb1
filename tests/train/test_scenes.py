"""Scenes composed for training: sizes by level, rooms on ground and clips, the same scenes for the same seed."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline_steps.audio.mixing import pair_tracks
from pipeline_steps.core.media_shards import SAMPLE_RATE
from pipeline_steps.train.config_groups import SceneConfig
from pipeline_steps.train.scenes import GROUNDS, LOUDNESS, Scene, SceneReader, Thing, compose_scenes, in_room

ROWS = [
    {"image_id": f"image{n}", "split": "train", "tracks": [{"audio_id": f"clip{n}", "phrase": "", "gain_db": 0.0}]}
    for n in range(8)
]
LUFS = {f"clip{n}": -20.0 - n for n in range(8)} | {"clip7": -np.inf}
BLACK = np.zeros((40, 20, 3), np.uint8)
CLICK = np.zeros(SAMPLE_RATE, np.float32)
CLICK[0] = 0.5


def reader(scenes: dict[str, Scene], size: int = 64) -> SceneReader:
    return SceneReader(lambda _: BLACK, lambda _: CLICK, scenes, size)


def test_a_thing_is_as_large_as_its_clip_is_loud() -> None:
    pairs, scenes = compose_scenes(ROWS, LUFS, SceneConfig(fraction=5, max_things=4), seed=0)
    assert 0 < len(pairs) <= 40
    assert {len(scene.things) for scene in scenes.values()} == {2, 3, 4}
    for pair in pairs:
        things = scenes[pair["image_id"]].things
        assert [thing.image_id[5:] for thing in things] == [audio_id[4:] for audio_id, _ in pair_tracks(pair)]
        assert "clip7" not in dict(pair_tracks(pair)), "a silent clip has no size"
        for thing, (audio_id, gain) in zip(things, pair_tracks(pair), strict=True):
            level = gain + LUFS[audio_id] - LOUDNESS
            assert -12 <= level <= 1e-9
            assert thing.side == pytest.approx(0.5 * 2 ** (level / 6.0206), abs=1e-3), "6 dB halve the side"
            assert 0 <= thing.left <= 1
            assert 0 <= thing.top <= 1


def test_the_seed_decides_and_nothing_is_composed_by_default() -> None:
    config = SceneConfig(fraction=1, room_prob=0.5)
    first, again = (compose_scenes(ROWS, LUFS, config, 3) for _ in range(2))
    assert first == again
    assert compose_scenes(ROWS, LUFS, config, 4)[1].keys() != first[1].keys()
    assert compose_scenes(ROWS, LUFS, SceneConfig(), 3) == ([], {})


def test_things_do_not_overlap_and_other_images_are_read_as_they_are() -> None:
    _, scenes = compose_scenes(ROWS, LUFS, SceneConfig(fraction=3, max_level_db=0), seed=1)
    read = reader(scenes)
    for image_id in scenes:
        image = read.image(image_id)
        assert image.shape == (64, 64, 3)
        assert (image < 128).any(-1).mean() == pytest.approx(2 * 0.25 / 2, abs=0.03), "two halves of a quarter"
    assert read.image("image0") is BLACK
    assert read.sound("clip0") is CLICK


def test_a_room_darkens_the_ground_and_reverberates_the_clips() -> None:
    pairs, scenes = compose_scenes(ROWS, LUFS, SceneConfig(fraction=2, room_prob=1), seed=2)
    assert {scene.room for scene in scenes.values()} == set(GROUNDS)
    for pair in pairs:
        scene = scenes[pair["image_id"]]
        assert reader(scenes).image(scene.image_id).max() == GROUNDS[scene.room]
        assert all(audio_id.endswith(f"@{scene.room}") for audio_id, _ in pair_tracks(pair))
    tails = [np.abs(reader({}).sound(in_room("clip0", room))[SAMPLE_RATE // 2 :]).mean() for room in ("", *GROUNDS)]
    assert tails == sorted(tails)
    assert tails[0] == 0 < tails[-1]
    wet = reader({}).sound(in_room("clip0", "hall"))
    assert np.dot(wet, wet) == pytest.approx(np.dot(CLICK, CLICK), rel=1e-3)


def test_every_part_of_a_scene_is_in_its_id() -> None:
    thing = Thing("image0", 0.5, 0.1, 0.2, False)
    scenes = [Scene((thing,)), Scene((thing,), "hall"), Scene((thing, thing)), Scene((Thing("image0", 0.5, 0.1, 0.2, True),))]
    assert len({scene.image_id for scene in scenes}) == len(scenes)
