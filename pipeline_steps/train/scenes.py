"""Scenes composed for training: several images of single things on one ground, and the mixture of their clips.

A thing is as large as its clip is loud: 6 dB halve its side, as twice the distance does. A room reverberates all clips of its
scene, and its ground is darker the longer it reverberates. Items of a scene have ids of their own, so that caches keep them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from pipeline_steps.audio.reverb import REVERBERATION_SECONDS, apply_reverb, decaying_noise_response
from pipeline_steps.core.array_types import ByteArray, FloatArray
from pipeline_steps.core.hashing import fingerprint
from pipeline_steps.core.media_shards import SAMPLE_RATE
from pipeline_steps.core.seeding import seeded_rng
from pipeline_steps.diffusion.image_processor import pad_to_square, place
from pipeline_steps.train.config_groups import SceneConfig

SCENES_VERSION = 1
"""Version of the scenes, part of their ids. Raise it whenever their pixels or samples change."""
LOUDNESS = -26.0
"""LUFS of a clip at level 0 dB."""
LARGEST_SIDE = 0.5
"""Side of a thing at level 0 dB, as a fraction of the scene; a quarter of the scene holds one thing."""
CELLS = ((0.0, 0.0), (0.5, 0.0), (0.0, 0.5), (0.5, 0.5))
GROUNDS = {"small room": 240, "hall": 220, "church": 200}
"""Gray level of the ground of a room; other grounds are white."""
WHITE = 255

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Thing:
    """Image of a scene.

    Attributes:
        image_id: of the catalog.
        side: as a fraction of the scene.
        left, top: position in [0, 1]; 0 is the left or upper edge, 1 the right or lower one.
        mirrored: whether it is flipped horizontally.
    """

    image_id: str
    side: float
    left: float
    top: float
    mirrored: bool


@dataclass(frozen=True, slots=True)
class Scene:
    """Things on the ground of a room; an empty room is the open air."""

    things: tuple[Thing, ...]
    room: str = ""

    @property
    def image_id(self) -> str:
        """Id of the composed image."""
        return fingerprint([SCENES_VERSION, asdict(self)])


def compose_scenes(
    rows: Sequence[Row], loudness: Mapping[str, float], config: SceneConfig, seed: int
) -> tuple[list[Row], dict[str, Scene]]:
    """Pairs of composed scenes, and the scenes by image id; a function of the arguments alone.

    Args:
        rows: training pairs; those whose first clip is silent are not used.
        loudness: LUFS by audio id.
    """
    rng = seeded_rng(seed, "scenes")
    usable = [row for row in rows if np.isfinite(loudness[row["tracks"][0]["audio_id"]])]
    pairs, scenes = [], dict[str, Scene]()
    for _ in range(round(config.fraction * len(rows))):
        count = int(rng.integers(2, config.max_things + 1))
        chosen = [usable[int(index)] for index in rng.permutation(len(usable))[:count]]
        room = str(rng.choice(sorted(GROUNDS))) if rng.random() < config.room_prob else ""
        levels = [0.0, *(-float(level) for level in rng.uniform(0.0, config.max_level_db, count - 1))]
        things, tracks = [], []
        for row, level, cell in zip(chosen, levels, rng.permutation(len(CELLS)), strict=False):
            side = LARGEST_SIDE * 10.0 ** (level / 20.0)
            left, top = (float(start + (0.5 - side) * rng.random()) / (1.0 - side) for start in CELLS[int(cell)])
            things.append(Thing(row["image_id"], round(side, 4), round(left, 4), round(top, 4), bool(rng.random() < 0.5)))
            audio_id = row["tracks"][0]["audio_id"]
            tracks.append({"audio_id": in_room(audio_id, room), "gain_db": LOUDNESS - loudness[audio_id] + level})
        if len({thing.image_id for thing in things}) == count > 1:
            scene = Scene(tuple(things), room)
            scenes[scene.image_id] = scene
            pairs.append({"image_id": scene.image_id, "split": "train", "tracks": tracks})
    return pairs, scenes


def in_room(audio_id: str, room: str) -> str:
    """Id of a clip in a room."""
    return f"{audio_id}@{room}" if room else audio_id


@dataclass(frozen=True, slots=True)
class SceneReader:
    """Reads items of the catalog and of scenes by id.

    Attributes:
        read_image, read_audio: readers of the catalog: RGB uint8 [H, W, 3], mono 48 kHz samples [T].
        scenes: by image id.
        size: side of a composed image in px.
    """

    read_image: Callable[[str], ByteArray]
    read_audio: Callable[[str], FloatArray]
    scenes: Mapping[str, Scene]
    size: int

    def image(self, image_id: str) -> ByteArray:
        """Image of the catalog, or a composed one."""
        scene = self.scenes.get(image_id)
        return self.read_image(image_id) if scene is None else self._compose(scene)

    def sound(self, audio_id: str) -> FloatArray:
        """Clip, in its room at equal energy if its id has one."""
        audio_id, _, room = audio_id.partition("@")
        samples = self.read_audio(audio_id)
        if not room:
            return samples
        impulse = decaying_noise_response(REVERBERATION_SECONDS[room], SAMPLE_RATE, seeded_rng(0, "room"))
        return apply_reverb(samples, impulse).astype(np.float32)

    def _compose(self, scene: Scene) -> ByteArray:
        ground = GROUNDS.get(scene.room, WHITE)
        canvas = np.full((self.size, self.size, 3), WHITE, np.uint8)
        for thing in scene.things:
            image = pad_to_square(self.read_image(thing.image_id), self.size)
            image = np.ascontiguousarray(image[:, ::-1]) if thing.mirrored else image
            place(canvas, image, thing.side, thing.left, thing.top)
        return (canvas.astype(np.uint16) * ground // WHITE).astype(np.uint8)
