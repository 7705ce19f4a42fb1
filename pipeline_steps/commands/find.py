"""`sonify find`: retrieve audio for an image."""

from __future__ import annotations

import io
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline_steps.commands.console import JsonFlag, handle_errors, layout_of, print_result, table
from pipeline_steps.commands.draw import load_media
from pipeline_steps.core.errors import DataError
from pipeline_steps.core.project_paths import ProjectPaths

if TYPE_CHECKING:
    from pipeline_steps.caption.captioners.base import Captioner
    from pipeline_steps.core.array_types import ByteArray
    from pipeline_steps.embed.config import EmbedConfig
    from pipeline_steps.models.text_audio.base import TextAudioEncoder

BEST = 5
CANDIDATES = 50
SUFFIX = ".sound.wav"


@dataclass(frozen=True, slots=True)
class FoundAudio:
    """Audio that an image suggests.

    Attributes:
        events: sound events of the image, or guesses where the captioner abstains; empty if there are none.
        clips: best clips of the pool, best first.
        reason: why the captioner abstains; None if it does not.
    """

    events: list[dict[str, Any]]
    clips: list[dict[str, Any]]
    reason: str | None


def load_image(payload: bytes) -> ByteArray:
    """Pixels [H, W, 3] of a normalised image."""
    import numpy as np
    from PIL import Image

    with Image.open(io.BytesIO(payload), formats=("PNG",)) as image:
        return np.asarray(image.convert("RGB"))


class AudioFinder:
    """Retrieves audio of the pool for images, with the configured captioner and encoder. Their weights are loaded once."""

    def __init__(self, layout: ProjectPaths) -> None:
        from pipeline_steps.core.config import load_params

        self._layout = layout
        self._params = load_params(layout.params)

    @cached_property
    def _captioner(self) -> Captioner[Any]:
        from pipeline_steps.caption.config import CaptionConfig
        from pipeline_steps.caption.stage import build_captioner
        from pipeline_steps.core.config import parse_section

        return build_captioner(parse_section(CaptionConfig, "caption", self._params), self._layout).load()

    @cached_property
    def _encoder(self) -> tuple[EmbedConfig, TextAudioEncoder]:
        from pipeline_steps.core.config import parse_section
        from pipeline_steps.embed.config import EmbedConfig
        from pipeline_steps.embed.stage import build_encoder

        config = parse_section(EmbedConfig, "embed", self._params)
        return config, build_encoder(config, self._layout).load()

    def find(self, name: str, pixels: ByteArray) -> FoundAudio:
        """Events and clips of an image [H, W, 3].

        Raises:
            DataError: the image could not be captioned.
            DataError, IntegrityError: the embeddings or the index are missing, damaged or do not belong together.
        """
        from pipeline_steps.caption.captioners.base import CaptionFailure

        _, prediction = next(self._captioner.stream([(name, pixels)]))
        if isinstance(prediction, CaptionFailure):
            raise DataError(
                f"{name} could not be captioned: {prediction.code}: {prediction.reason}", "try again, or use another image"
            )
        caption = self._captioner.caption(prediction)
        # Where the stage would abstain, this command prints the best guesses and marks them as guesses.
        events = [asdict(event) for event in caption.events or caption.guesses]
        reason = f"{caption.code}: {caption.reason}" if caption.code else None
        return FoundAudio(events, self._rank(events) if events else [], reason)

    def _rank(self, events: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Clips of the pool for the events: candidates from the index, exact scores.

        `score` is the mean over the events of their inner product with the clip, weighted by salience x confidence.
        """
        import numpy as np

        from pipeline_steps.core.config import parse_section
        from pipeline_steps.core.schemas import AUDIO
        from pipeline_steps.core.tables import read_table
        from pipeline_steps.embed.stage import embed_texts
        from pipeline_steps.retrieve.config import RetrieveConfig
        from pipeline_steps.retrieve.stage import open_pool_index

        layout = self._layout
        index, vectors, audio_ids = open_pool_index(layout, parse_section(RetrieveConfig, "retrieve", self._params))
        config, encoder = self._encoder
        queries = embed_texts(encoder, config, layout, [event["phrase"] for event in events])[0]
        if queries.shape[1] != vectors.shape[1]:
            raise DataError("embed in params.yaml is not what the embeddings were made with", "dvc repro retrieve")
        weights = np.array([event["salience"] * event["confidence"] for event in events], np.float64)
        weights /= weights.sum()
        rows = np.unique(index.search(queries, CANDIDATES)[0])
        rows = rows[rows >= 0]
        similarity = queries.astype(np.float64) @ vectors[rows].T.astype(np.float64)
        scores = weights @ similarity
        catalog = {row["audio_id"]: row for row in read_table(layout.catalog / "audio.parquet", AUDIO).to_pylist()}
        found = []
        for place in np.argsort(-scores, kind="stable")[:BEST]:
            row = catalog[audio_ids[rows[place]]]
            because = events[int(np.argmax(weights * similarity[:, place]))]["phrase"]
            clip = {name: row[name] for name in ("audio_id", "path", "license")} | {"duration_s": round(row["duration_s"], 2)}
            found.append(clip | {"score": round(float(scores[place]), 4), "because": because})
        return found


@handle_errors
def find(
    context: typer.Context,
    image: Annotated[Path, typer.Argument(metavar="IMAGE", help="Image file: JPEG, PNG, WebP, GIF, BMP, TIFF.")],
    out: Annotated[Path | None, typer.Option("-o", "--out", help="WAV to write; default: name of IMAGE + .sound.wav.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Print the sound events of an image and the five best audio clips of the pool; write the best one as WAV."""
    import soundfile
    import torch

    from pipeline_steps.core.atomic import MAX_NAME_BYTES, atomic_path, shortened
    from pipeline_steps.core.media_shards import SAMPLE_RATE, MediaShardReader

    layout = layout_of(context)
    finder = AudioFinder(layout)
    kind, payload = load_media(layout, image)
    if kind != "image":
        raise DataError(f"{image} is an audio file", "give an image; for audio: sonify draw")
    torch.set_num_threads(1)  # one image and a few words: more threads are slower
    found = finder.find(image.name, load_image(payload))
    if not found.events:
        print_result(
            {"events": [], "audio": [], "wav": None, "reason": found.reason},
            [f"no event: {found.reason}; no WAV written"],
            as_json,
        )
        return
    target = out or Path(shortened(image.stem, MAX_NAME_BYTES - len(SUFFIX)) + SUFFIX)
    best = MediaShardReader(layout.media).sound(found.clips[0]["audio_id"])
    with atomic_path(target) as temporary:
        soundfile.write(temporary, best, SAMPLE_RATE, subtype="PCM_16", format="WAV")
    lines = ["events:"] if found.reason is None else [f"the pipeline would abstain: {found.reason}", "guesses:"]
    lines += table(
        [f"  {e['salience'] * e['confidence']:.3f}", e["phrase"], "seen" if e["visible"] else "inferred"] for e in found.events
    )
    lines += ["audio:"]
    lines += table(
        [f"  {c['score']:.3f}", c["path"], f"{c['duration_s']:.1f} s", c["license"] or "-", f"for: {c['because']}"]
        for c in found.clips
    )
    lines.append(str(target))
    value = {"events": found.events, "audio": found.clips, "wav": str(target), "reason": found.reason}
    print_result(value, lines, as_json)
