"""`sonify find`: retrieve audio for an image."""

from __future__ import annotations

import io
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline_steps.commands.console import JsonFlag, handle_errors, layout_of, print_result, table
from pipeline_steps.commands.draw import load_media
from pipeline_steps.core.errors import DataError
from pipeline_steps.core.project_paths import ProjectPaths

if TYPE_CHECKING:
    from pipeline_steps.caption.captioners.base import CaptionResult
    from pipeline_steps.core.array_types import ByteArray

BEST = 5
CANDIDATES = 50
SUFFIX = ".sound.wav"


def load_image(layout: ProjectPaths, path: Path) -> ByteArray:
    """Image file given by the user as RGB uint8 [H, W, 3], not larger than in ingest; errors as in `load_media`."""
    import numpy as np
    from PIL import Image

    ((kind, payload),) = load_media(layout, [path])
    if kind != "image":
        raise DataError(f"{path} is an audio file", "give an image; for audio: sonify draw")
    with Image.open(io.BytesIO(payload), formats=("PNG",)) as image:
        return np.asarray(image.convert("RGB"))


def caption_image(layout: ProjectPaths, params: dict[str, Any], pixels: ByteArray, name: str) -> CaptionResult:
    """Caption an image uint8 [H, W, 3] with the configured captioner; `name` stands for the image in messages.

    Raises:
        DataError: the captioner has no result for the image.
    """
    from pipeline_steps.caption.captioners.base import CaptionFailure
    from pipeline_steps.caption.config import CaptionConfig
    from pipeline_steps.caption.stage import build_captioner
    from pipeline_steps.core.config import parse_section

    captioner = build_captioner(parse_section(CaptionConfig, "caption", params), layout).load()
    _, prediction = next(captioner.stream([(name, pixels)]))
    if isinstance(prediction, CaptionFailure):
        raise DataError(
            f"{name} could not be captioned: {prediction.code}: {prediction.reason}", "try again, or use another image"
        )
    return captioner.caption(prediction)


def rank_audio(layout: ProjectPaths, params: dict[str, Any], events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rank audio of the pool for the events: candidates from the index, exact scores.

    `score` is the mean over the events of their inner product with the clip, weighted by salience x confidence.

    Raises:
        DataError, IntegrityError: the embeddings or the index are missing, damaged or do not belong together.
    """
    import numpy as np

    from pipeline_steps.core.config import parse_section
    from pipeline_steps.core.schemas import AUDIO
    from pipeline_steps.core.tables import read_table
    from pipeline_steps.embed.config import EmbedConfig
    from pipeline_steps.embed.stage import build_encoder, embed_texts
    from pipeline_steps.retrieve.config import RetrieveConfig
    from pipeline_steps.retrieve.stage import open_pool_index

    config = parse_section(RetrieveConfig, "retrieve", params)
    index, vectors, audio_ids = open_pool_index(layout, config)
    chosen = parse_section(EmbedConfig, "embed", params)
    encoder = build_encoder(chosen, layout).load()
    phrases = [event["phrase"] for event in events]
    queries = embed_texts(encoder, chosen, layout, phrases)[0]
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


def find_audio(layout: ProjectPaths, pixels: ByteArray, name: str) -> dict[str, Any]:
    """Sound events of an image uint8 [H, W, 3] and the best audio clips of the pool: `events`, `audio`, `reason`.

    Where the stage would abstain, the events are its best guesses and `reason` has its code and reason.

    Raises:
        DataError, IntegrityError: as `caption_image` and `rank_audio`.
    """
    from pipeline_steps.core.config import load_params

    params = load_params(layout.params)
    caption = caption_image(layout, params, pixels, name)
    events = [asdict(event) for event in caption.events or caption.guesses]
    reason = f"{caption.code}: {caption.reason}" if caption.code else None
    return {"events": events, "audio": rank_audio(layout, params, events) if events else [], "reason": reason}


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
    torch.set_num_threads(1)  # one image and a few words: more threads are slower
    found = find_audio(layout, load_image(layout, image), image.name)
    events, clips, reason = found["events"], found["audio"], found["reason"]
    if not events:
        print_result({**found, "wav": None}, [f"no event: {reason}; no WAV written"], as_json)
        return
    target = out or Path(shortened(image.stem, MAX_NAME_BYTES - len(SUFFIX)) + SUFFIX)
    with atomic_path(target) as temporary:
        soundfile.write(
            temporary, MediaShardReader(layout.media).sound(clips[0]["audio_id"]), SAMPLE_RATE, subtype="PCM_16", format="WAV"
        )
    lines = ["events:"] if reason is None else [f"the pipeline would abstain: {reason}", "guesses:"]
    lines += table(
        [f"  {e['salience'] * e['confidence']:.3f}", e["phrase"], "seen" if e["visible"] else "inferred"] for e in events
    )
    lines += ["audio:"]
    lines += table(
        [f"  {c['score']:.3f}", c["path"], f"{c['duration_s']:.1f} s", c["license"] or "-", f"for: {c['because']}"]
        for c in clips
    )
    lines.append(str(target))
    print_result({**found, "wav": str(target)}, lines, as_json)
