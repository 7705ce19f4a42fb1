"""Parts of the report: selection, item flow, evaluation plan, CSV cells, training curves, media files."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pipeline_steps.audio.mixing import mix_tracks
from pipeline_steps.evaluate.evaluation_plan import (
    EvalAudio,
    EvalPair,
    build_evaluation_plan,
    evenly_spaced_indices,
    mix_id,
    select_calibration_images,
)
from pipeline_steps.evaluate.generation import render
from pipeline_steps.evaluate.ground_truth import GoldPair, GroundTruth
from pipeline_steps.evaluate.metrics.gain_sensitivity import gain_distances
from pipeline_steps.evaluate.metrics.win_rate import mann_whitney_win_rate
from pipeline_steps.evaluate.metrics.win_rate_rows import JudgeFeatures, negative_masks, shuffled_partners, win_rates_per_pair
from pipeline_steps.evaluate.report.build import csv_bytes
from pipeline_steps.evaluate.report.item_flow import StageTables, audio_flow, find_imbalances, image_flow, license_counts
from pipeline_steps.evaluate.report.media import mp3, png, spectrogram, strip, thumbnail
from pipeline_steps.evaluate.report.selection import select_pairs_to_show, select_samples_to_show
from pipeline_steps.evaluate.report.summary import findings
from pipeline_steps.evaluate.report.training_curves import training_curves


def pair(name: str, split: str, image: str, sound: str, z: float = 1.0, gain: float = 0.0) -> dict[str, Any]:
    tracks = [{"audio_id": sound, "phrase": "phrase", "gain_db": gain}]
    return {
        "pair_id": name, "image_id": image, "tracks": tracks, "z_score": z, "score": z, "split": split, "license": "CC0-1.0",
        "image_group": f"g{image}", "audio_group": f"g{sound}",
    }  # fmt: skip


@given(st.lists(st.floats(-3, 3), max_size=40, unique=True), st.integers(0, 20))
def test_selected_pairs_are_distinct_and_include_the_best_and_the_weakest(scores: list[float], at_most: int) -> None:
    rows = [pair(f"p{place}", "test", f"i{place}", "s", z) for place, z in enumerate(scores)]
    chosen = select_pairs_to_show(rows, [], at_most, 0)
    ids = [row["pair_id"] for _, row in chosen]
    assert len(ids) == len(set(ids)) == min(at_most, len(rows))
    assert select_pairs_to_show(rows[::-1], [], at_most, 0) == chosen
    if len(rows) > at_most >= 3:
        assert chosen[0][1]["z_score"] == max(scores)
        assert chosen[-1][1]["z_score"] == min(scores)


def test_a_doubtful_caption_does_not_come_first() -> None:
    rows = [pair("doubtful", "test", "i0", "s0", 8.0), pair("sure", "test", "i1", "s1", 5.0)]
    events = [{"image_id": f"i{place}", "phrase": "phrase", "confidence": sure} for place, sure in enumerate((0.2, 0.9))]
    assert [row["pair_id"] for _, row in select_pairs_to_show(rows, events, 10, 0)] == ["sure", "doubtful"]


def numbers(low: float, gain: tuple[float, float]) -> dict[str, Any]:
    test = {"clips": 13, "win_rate": 0.67, "win_rate_low": low, "win_rate_high": 0.78}
    return {"test": test | {"gain_over_lookup": 0.1, "gain_over_lookup_low": gain[0], "gain_over_lookup_high": gain[1]}}


@pytest.mark.parametrize(
    ("low", "gain", "follows", "lookup"),
    [
        (0.57, (0.02, 0.2), "The images follow the sound on 13 test sounds", "is better than a lookup"),
        (0.45, (-0.2, 0.2), "It is not shown that the images follow the sound", "is not shown to differ from a lookup"),
        (
            0.57,
            (-0.2, -0.1),
            "67 % [57, 78] of the comparisons (chance: 50 %; too few to rank models).",
            "is worse than a lookup",
        ),
    ],
)
def test_findings_say_what_the_intervals_show(low: float, gain: tuple[float, float], follows: str, lookup: str) -> None:
    pairing, model, nearest = findings({"test": {"too_small_to_rank": True}, "warnings": []}, numbers(low, gain), (3, 9))
    assert pairing.startswith("3 of 9 images")
    assert follows in model
    assert lookup in nearest


def test_findings_say_why_nothing_was_judged() -> None:
    evaluation = {"warnings": ["other", "too few to judge: 1 test pairs"]}
    assert findings(evaluation, {}, (1, 2))[1] == "The model was not judged: too few to judge: 1 test pairs."
    assert findings({"warnings": []}, {}, (1, 2))[1] == "The model was not judged: no win rate was measured."


def test_selected_samples_span_high_and_low_win_rates() -> None:
    rates: list[float | None] = [0.1, 0.9, None, 0.5, 0.7]
    names = list("abcde")
    assert select_samples_to_show(rates, names, 10) == [1, 4, 3, 0, 2]
    assert select_samples_to_show(rates, names, 2) == [1, 2]
    assert select_samples_to_show(rates, names, 0) == []


def tables() -> StageTables:
    images = [{"image_id": f"i{n}", "holdout": n == 5, "group_id": f"gi{n}"} for n in range(6)]
    audio = [{"audio_id": f"s{n}", "holdout": False, "group_id": f"gs{n}"} for n in range(3)]
    dropped = {"item_id": "x", "kind": "image", "action": "dropped", "code": "IMG_TRUNCATED"}
    abstained = {"image_id": "i1", "code": "NO_SOUND"}
    return StageTables(
        images=images,
        audio=audio,
        quarantine=[dropped],
        events=[{"image_id": f"i{n}"} for n in (2, 3, 4, 5)],
        captions_abstained=[abstained],
        captions_quarantine=[{"item_id": "i0", "code": "CAPTION_FAILED"}],
        embeddings_quarantine=[{"item_id": "s2", "kind": "audio", "code": "EMB_ZERO"}],
        pairs=[pair("p2", "train", "i2", "s0"), pair("p3", "test", "i3", "s1")],
        pairs_abstained=[{"image_id": "i4", "code": "BELOW_NULL"}],
    )


def test_the_item_flow_counts_every_item() -> None:
    found = image_flow(tables())
    assert [(step.n_in, step.n_out) for step in found] == [(7, 6), (6, 5), (5, 3), (3, 2)]
    assert found[2].removed == (("abstained", "NO_SOUND", 1), ("quarantined", "CAPTION_FAILED", 1))
    assert find_imbalances(found) == []
    sounds = audio_flow(tables())
    assert [(step.n_in, step.n_out) for step in sounds] == [(3, 3), (3, 3), (3, 2), (2, 2)]
    assert find_imbalances(sounds) == []
    lost = StageTables(**{**{name: getattr(tables(), name) for name in StageTables.__slots__}, "pairs_abstained": []})
    assert find_imbalances(image_flow(lost)) == ["paired with a sound: 3 in, 2 out, 0 removed with a reason"]
    assert license_counts([{"license": "MIT"}, {"license": None}, {"license": "MIT"}]) == [("MIT", 2), ("unknown", 1)]


def test_the_plan_contains_each_clip_once_and_the_seen_classes() -> None:
    rows = [
        pair("a", "train", "i0", "s0"),
        pair("b", "test", "i1", "s1"),
        pair("c", "test", "i2", "s1"),
        pair("d", "test", "i3", "s1", gain=-6.0),
    ]
    labels = {"i0": "dog", "s0": "wolf", "s1": "cat", "G1": "dog", "G2": "cow"}
    truth = GroundTruth(labels, (GoldPair("p1", "GI1", "G1", "dog"), GoldPair("p2", "GI2", "G2", "cow")), 0)
    plan = build_evaluation_plan(rows, truth, {"GI1": "x", "GI2": "y"}, {"G1": "u", "G2": "v"}, 10)
    assert [sound.label for sound in plan.clips] == ["cat", "cat", "dog", "cow"]
    assert [item.clip for item in plan.sets["test"]] == [0, 0, 1]
    assert plan.seen_classes == {"dog", "wolf"}
    assert [item.name for item in plan.sets["gold_seen_classes"]] == ["p1"]
    assert plan.num_skipped == 0
    assert build_evaluation_plan(rows, truth, {"GI1": "x", "GI2": "y"}, {"G1": "u", "G2": "v"}, 2).num_skipped == 1
    assert mix_id((("s1", 0.0),)) == "s1"
    assert mix_id((("s1", -6.0),)) != mix_id((("s1", 0.0), ("s2", 0.0)))
    assert evenly_spaced_indices(10, 3) == [0, 3, 6]


def test_calibration_images_belong_to_no_evaluated_group() -> None:
    rows = [pair("a", "train", "i0", "s0"), pair("b", "test", "i1", "s1")]
    images = [
        {"image_id": "i0", "group_id": "gi0", "holdout": False},
        {"image_id": "i1", "group_id": "gi1", "holdout": False},
        {"image_id": "i1-twin", "group_id": "gi1", "holdout": False},
        {"image_id": "i2", "group_id": "gi2", "holdout": False},
        {"image_id": "gold", "group_id": "gg", "holdout": True},
        {"image_id": "gold-twin", "group_id": "gg", "holdout": False},
    ]
    truth = GroundTruth({}, (GoldPair("p", "gold", "S", "dog"),), 0)
    plan = build_evaluation_plan(rows, truth, {"gold": "gg"}, {"S": "gs"}, 10)
    assert select_calibration_images(plan, images, rows, 10) == ["i0", "i2"]
    assert select_calibration_images(plan, images, rows, 1) == ["i0"]


def test_win_rates_of_a_model_with_perfect_features() -> None:
    sounds = [EvalAudio(f"s{n}", f"g{n}", f"class {n}") for n in range(4)]
    items = [EvalPair(f"p{n}", f"i{n}", f"gi{n}", n) for n in range(4)]
    own = np.eye(4)
    everything = [np.array([n]) for n in range(4)]
    rest = [np.array([m for m in range(4) if m != n]) for n in range(4)]
    features = JudgeFeatures(own, np.repeat(own[:, None], 2, axis=1), np.full((5, 4), 0.5), own, everything, rest)
    partner = shuffled_partners(sounds, items, 0)
    assert sorted(partner) == [0, 1, 2, 3]
    assert all(partner[n] != n for n in range(4))
    rates = win_rates_per_pair(features, sounds, items)
    assert rates["model"].tolist() == [1.0] * 4
    assert rates["real_images"].tolist() == [1.0] * 4
    # Samples of a negative clip tie with the two other negatives and lose to the pair's own clip.
    assert rates["shuffled_audio"] == pytest.approx([1 / 3] * 4)
    # The similarity of samples without audio is 0.5, that of the negatives 0.
    assert rates["unconditional"].tolist() == [1.0] * 4


@pytest.mark.parametrize(("strength", "fits"), [(1.0, True), (0.0, None), (-1.0, False)])
def test_shuffled_audio_is_below_one_half_exactly_if_the_model_uses_audio(strength: float, fits: bool | None) -> None:
    """Compared with a loop over the negatives of each pair; four clips share a class and are no negatives of each other."""
    rng = np.random.default_rng(0)
    sounds = [EvalAudio(f"s{n}", f"g{n}", "one" if n < 4 else f"class {n}") for n in range(9)]
    items = [EvalPair(f"p{n}", f"i{n}", f"gi{n}", n % 9) for n in range(14)]
    own = np.array([item.clip for item in items])
    unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)  # noqa: E731
    kinds = rng.normal(size=(9, 12))
    targets = unit(kinds[own])
    generated = (
        np.broadcast_to(np.eye(12)[0], (9, 3, 12))
        if fits is None
        else unit(strength * kinds[:, None] + rng.normal(size=(9, 3, 12)))
    )
    features = JudgeFeatures(targets, generated, generated[0], targets, [np.array([0])] * 14, [np.array([1])] * 14)
    rates = win_rates_per_pair(features, sounds, items)
    _, pair_negatives = negative_masks(sounds, items)
    scores = np.einsum("nk,msk->nms", targets, generated)
    for n in range(14):
        listed = np.flatnonzero(pair_negatives[n])
        expected = [
            mann_whitney_win_rate(scores[n, other], scores[n, [own[n], *(m for m in listed if m != other)]].ravel())
            for other in listed
        ]
        assert rates["shuffled_audio"][n] == pytest.approx(np.mean(expected))
        assert rates["shuffled_audio"][n] == pytest.approx(0.5 + (0.5 - rates["model"][n]) / len(listed))
    shuffled = rates["shuffled_audio"].mean()
    assert shuffled == pytest.approx(0.5) if fits is None else (shuffled < 0.49 if fits else shuffled > 0.51)


def test_gain_changes_features_less_than_another_sound() -> None:
    rng = np.random.default_rng(0)
    base = rng.normal(size=(6, 2, 8))
    unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)  # noqa: E731
    found = gain_distances({0.0: unit(base), 6.0: unit(base + 0.1 * rng.normal(size=base.shape))}, list("abcdef"), 100, 0)
    assert set(found) == {"gain_+6_db", "other_noise", "other_sound"}
    assert found["gain_+6_db"].value < 0.1 < found["other_sound"].value


def test_csv_cells_that_start_a_formula_are_quoted() -> None:
    text = csv_bytes([{"a": "=1+1", "b": -0.5}, {"a": "+x", "c": "@y"}, {"a": "plain", "b": None}]).decode()
    assert text == "a,b,c\n'=1+1,-0.5,\n'+x,,'@y\nplain,,\n"


def test_training_curves_contain_every_number_with_a_step() -> None:
    found = training_curves({"loss.csv": "step,loss,loss_t0\n1,0.5,\n2,nan,0.25\n", "other.csv": "x,y\n1,2\n"})
    assert found == {"loss": [(1.0, 0.5)], "loss_t0": [(2.0, 0.25)]}


def test_media_files_are_small_playable_and_reproducible() -> None:
    time = np.arange(48_000, dtype=np.float32) / 48_000
    tone = (0.3 * np.sin(2 * np.pi * 440 * time)).astype(np.float32)
    assert mp3(tone) == mp3(tone)
    samples, rate = soundfile.read(io.BytesIO(mp3(tone)))
    assert rate == 24_000
    assert abs(len(samples) / rate - 1.0) < 0.15
    image = spectrogram(tone)
    assert image.shape == (80, 240, 3)
    bright = int(image.astype(int).sum((1, 2)).argmax())
    assert 45 < bright < 75  # 440 Hz lies in the lower third
    assert spectrogram(tone[:100]).shape == (80, 240, 3)
    assert len(png(image, palette=True)) < 20_000
    images = np.zeros((3, 8, 8, 3), np.uint8)
    assert strip(images).shape == (8, 28, 3)
    with Image.open(io.BytesIO(thumbnail(np.zeros((300, 600, 3), np.uint8), 224))) as small:
        assert small.size == (224, 112)


def test_tracks_are_mixed_with_their_gains() -> None:
    media = {"a": np.full(4, 0.5, np.float32), "b": np.array([0.5, -0.5], np.float32)}
    mixed = render((("a", 0.0), ("b", -20.0)), media.__getitem__)
    assert mixed == pytest.approx([0.55, 0.45, 0.55, 0.45])
    assert mixed.tolist() == mix_tracks([(media["a"], 0.0), (media["b"], -20.0)]).tolist(), "training mixes the same way"
