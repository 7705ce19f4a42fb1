"""A captioner as the stage uses it: pictures in, what was seen in each out, a row of the memo for it, and the caption. Pure."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import pyarrow as pa

from pipeline_steps.core.errors import StageError
from pipeline_steps.encoders.caption_answer import MEMO_SCHEMA, Answer, answer_row, row_answer
from pipeline_steps.encoders.caption_prompt import Failed
from pipeline_steps.encoders.protocols import Picture
from pipeline_steps.encoders.tagger import Caption, Tag, Tagger

log = logging.getLogger(__name__)

Seen = TypeVar("Seen")

TAGS_SCHEMA = pa.schema(
    [
        pa.field("vocabulary", pa.list_(pa.string())),
        pa.field("index", pa.list_(pa.int32())),
        pa.field("label", pa.list_(pa.string())),
        pa.field("probability", pa.list_(pa.float32())),
    ]
)


class Looks(Protocol[Seen]):
    """What the stage asks of a captioner. `Seen` is what one look at a picture gives, before any rule of taste."""

    schema: pa.Schema

    @property
    def families(self) -> tuple[str, ...]: ...

    def load(self) -> None: ...

    def describe_looks(self) -> dict[str, Any]:
        """Everything but the picture that shapes what is seen: the memo's fingerprint."""
        ...

    def describe(self) -> dict[str, Any]:
        """`describe_looks` and the rules that make a caption of it."""
        ...

    def stream(self, pictures: Iterable[tuple[str, Picture]]) -> Iterator[tuple[str, Seen | Failed]]:
        """What is seen in each named picture, in any order, as it comes."""
        ...

    def compose(self, seen: Seen) -> Caption: ...

    def row(self, seen: Seen) -> dict[str, Any]: ...

    def seen(self, row: Mapping[str, Any]) -> Seen: ...


class TaggerLooks:
    """Tags of the embedded tagger."""

    schema = TAGS_SCHEMA

    def __init__(self, tagger: Tagger, batch_size: int) -> None:
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

    def stream(self, pictures: Iterable[tuple[str, Picture]]) -> Iterator[tuple[str, list[Tag] | Failed]]:
        return batches(self._tagger.tags, pictures, self._batch_size)

    def compose(self, seen: list[Tag]) -> Caption:
        return self._tagger.compose(seen)

    def row(self, seen: list[Tag]) -> dict[str, Any]:
        return {name: [getattr(tag, name) for tag in seen] for name in TAGS_SCHEMA.names}

    def seen(self, row: Mapping[str, Any]) -> list[Tag]:
        values = zip(row["vocabulary"], row["index"], row["label"], row["probability"], strict=True)
        return [Tag(vocabulary, index, label, probability) for vocabulary, index, label, probability in values]


class Answerer(Protocol):
    """What `vlm` and `endpoint` have in common."""

    @property
    def families(self) -> tuple[str, ...]: ...

    def load(self) -> Any: ...

    def describe_answers(self) -> dict[str, Any]: ...

    def describe(self) -> dict[str, Any]: ...

    def compose(self, answer: Answer) -> Caption: ...


AnswerStream = Callable[[Iterable[tuple[str, Picture]]], Iterator[tuple[str, Answer | Failed]]]


class AnswerLooks:
    """Answers of a vision-language model: `stream` sends pictures through it, in batches here or one by one to a server."""

    schema = MEMO_SCHEMA

    def __init__(self, captioner: Answerer, stream: AnswerStream) -> None:
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

    def compose(self, seen: Answer) -> Caption:
        return self._captioner.compose(seen)

    def row(self, seen: Answer) -> dict[str, Any]:
        return answer_row(seen)

    def seen(self, row: Mapping[str, Any]) -> Answer:
        return row_answer(row)


def look_once(looks: Looks[Seen], picture: Picture) -> Seen | Failed:
    """One look at one picture, for a person who asks."""
    return next(iter(looks.stream([("picture", picture)])))[1]


def batches(
    look: Callable[[Sequence[Picture]], Sequence[Seen | Failed]], pictures: Iterable[tuple[str, Picture]], size: int
) -> Iterator[tuple[str, Seen | Failed]]:
    """`look` on batches of `size` pictures."""
    source = iter(pictures)
    while batch := dict(itertools.islice(source, size)):
        yield from look_batch(look, batch).items()


def look_batch(
    look: Callable[[Sequence[Picture]], Sequence[Seen | Failed]], pictures: Mapping[str, Picture]
) -> dict[str, Seen | Failed]:
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
    found: dict[str, Seen | Failed] = {}
    for image_id in ids:
        try:
            single = look([pictures[image_id]])
        except StageError:
            raise
        except Exception as error:
            found[image_id] = Failed("CAPTION_FAILED", f"{type(error).__name__}: {error}")
            continue
        found[image_id] = single[0] if len(single) == 1 else Failed("CAPTION_FAILED", f"{len(single)} results for one picture")
    return found
