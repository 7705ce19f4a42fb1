"""A captioner as the stage uses it: pictures in, what was seen in each out, a row of the memo for it, and the caption. Pure."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import pyarrow as pa

from pipeline_steps.caption.captioners.base import CaptionBackend, CaptionResult, Seen
from pipeline_steps.caption.captioners.prompt import CaptionFailure
from pipeline_steps.caption.captioners.tagger import LabelScore, TaggerCaptioner
from pipeline_steps.caption.captioners.vlm_response import MEMO_SCHEMA, VlmResponse, response_to_row, row_to_response
from pipeline_steps.core.array_types import ByteArray
from pipeline_steps.core.errors import StageError

log = logging.getLogger(__name__)


TAGS_SCHEMA = pa.schema(
    [
        pa.field("vocabulary", pa.list_(pa.string())),
        pa.field("index", pa.list_(pa.int32())),
        pa.field("label", pa.list_(pa.string())),
        pa.field("probability", pa.list_(pa.float32())),
    ]
)


class TaggerBackend:
    """Tags of the embedded tagger."""

    schema = TAGS_SCHEMA

    def __init__(self, tagger: TaggerCaptioner, batch_size: int) -> None:
        self._tagger = tagger
        self._batch_size = batch_size

    @property
    def families(self) -> tuple[str, ...]:
        return self._tagger.families

    def load(self) -> None:
        self._tagger.load()

    def describe_looks(self) -> dict[str, Any]:
        return self._tagger.describe_tags()

    def describe(self) -> dict[str, Any]:
        return self._tagger.describe()

    def stream(self, pictures: Iterable[tuple[str, ByteArray]]) -> Iterator[tuple[str, list[LabelScore] | CaptionFailure]]:
        return predict_batches(self._tagger.tags, pictures, self._batch_size)

    def compose(self, seen: list[LabelScore]) -> CaptionResult:
        return self._tagger.compose(seen)

    def row(self, seen: list[LabelScore]) -> dict[str, Any]:
        return {name: [getattr(tag, name) for tag in seen] for name in TAGS_SCHEMA.names}

    def seen(self, row: Mapping[str, Any]) -> list[LabelScore]:
        values = zip(row["vocabulary"], row["index"], row["label"], row["probability"], strict=True)
        return [LabelScore(vocabulary, index, label, probability) for vocabulary, index, label, probability in values]


class GenerativeCaptioner(Protocol):
    """What `vlm` and `endpoint` have in common."""

    @property
    def families(self) -> tuple[str, ...]: ...

    def load(self) -> Any: ...

    def describe_answers(self) -> dict[str, Any]: ...

    def describe(self) -> dict[str, Any]: ...

    def compose(self, answer: VlmResponse) -> CaptionResult: ...


AnswerStream = Callable[[Iterable[tuple[str, ByteArray]]], Iterator[tuple[str, VlmResponse | CaptionFailure]]]


class VlmBackend:
    """Answers of a vision-language model: `stream` sends pictures through it, in batches here or one by one to a server."""

    schema = MEMO_SCHEMA

    def __init__(self, captioner: GenerativeCaptioner, stream: AnswerStream) -> None:
        self._captioner = captioner
        self.stream = stream

    @property
    def families(self) -> tuple[str, ...]:
        return self._captioner.families

    def load(self) -> None:
        self._captioner.load()

    def describe_looks(self) -> dict[str, Any]:
        return self._captioner.describe_answers()

    def describe(self) -> dict[str, Any]:
        return self._captioner.describe()

    def compose(self, seen: VlmResponse) -> CaptionResult:
        return self._captioner.compose(seen)

    def row(self, seen: VlmResponse) -> dict[str, Any]:
        return response_to_row(seen)

    def seen(self, row: Mapping[str, Any]) -> VlmResponse:
        return row_to_response(row)


def predict_one(looks: CaptionBackend[Seen], picture: ByteArray) -> Seen | CaptionFailure:
    """One look at one picture, for a person who asks."""
    return next(iter(looks.stream([("picture", picture)])))[1]


def predict_batches(
    look: Callable[[Sequence[ByteArray]], Sequence[Seen | CaptionFailure]], pictures: Iterable[tuple[str, ByteArray]], size: int
) -> Iterator[tuple[str, Seen | CaptionFailure]]:
    """`look` on batches of `size` pictures."""
    source = iter(pictures)
    while batch := dict(itertools.islice(source, size)):
        yield from predict_batch(look, batch).items()


def predict_batch(
    look: Callable[[Sequence[ByteArray]], Sequence[Seen | CaptionFailure]], pictures: Mapping[str, ByteArray]
) -> dict[str, Seen | CaptionFailure]:
    """What is seen by id, or why nothing was.

    A captioner that returns fewer or more results than it was given cannot be matched to its pictures: then, and when it
    raises, the batch goes through one by one, so that one bad item never shifts or loses the others.
    """
    ids = list(pictures)
    try:
        results = look([pictures[image_id] for image_id in ids])
        if len(results) == len(ids):
            return dict(zip(ids, results, strict=True))
        log.warning("the captioner gave %d results for %d pictures; going one by one", len(results), len(ids))
    except StageError:
        raise
    except Exception as error:
        log.warning("the captioner failed on a batch of %d (%s); going one by one", len(ids), error)
    found: dict[str, Seen | CaptionFailure] = {}
    for image_id in ids:
        try:
            single = look([pictures[image_id]])
        except StageError:
            raise
        except Exception as error:
            found[image_id] = CaptionFailure("CAPTION_FAILED", f"{type(error).__name__}: {error}")
            continue
        found[image_id] = (
            single[0] if len(single) == 1 else CaptionFailure("CAPTION_FAILED", f"{len(single)} results for one picture")
        )
    return found
