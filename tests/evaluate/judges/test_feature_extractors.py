"""Independence of judges, audio-image regression, ground-truth table."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline_steps.core.errors import ConfigError, DataError
from pipeline_steps.evaluate.evaluation_plan import build_evaluation_plan
from pipeline_steps.evaluate.ground_truth import match, parse_manifest
from pipeline_steps.evaluate.judges.audio_image_regression import PENALTIES, fit
from pipeline_steps.evaluate.judges.independence import check_judge_independence, families_in
from pipeline_steps.evaluate.metrics.win_rate_rows import negative_masks


def test_a_judge_of_a_used_family_is_rejected_or_flagged() -> None:
    used = {"captions": {"efficientnet", "ssd-mobilenet"}, "embeddings": {"yamnet", "minilm"}, "model": {"yamnet"}}
    assert check_judge_independence({"augnet": "augnet", "aisfx": "aisfx"}, used, allow=False) == []
    with pytest.raises(ConfigError, match="ssd_mobilenet has model family ssd-mobilenet, which is also used in captions"):
        check_judge_independence({"ssd_mobilenet": "ssd-mobilenet"}, used, allow=False)
    flagged = check_judge_independence({"ssd_mobilenet": "ssd-mobilenet", "yamnet": "yamnet"}, used, allow=True)
    assert len(flagged) == 3


def test_families_are_found_at_any_depth() -> None:
    meta = {"encoder": {"family": "a", "parts": [{"family": "b"}, {"families": ["c", "d"]}]}, "n": 3, "note": "family"}
    assert families_in(meta) == {"a", "b", "c", "d"}


def test_r2_of_the_regression_is_high_with_signal_and_near_zero_without() -> None:
    rng = np.random.default_rng(0)
    sounds = rng.normal(size=(150, 20))
    mix = rng.normal(size=(20, 30))
    images = sounds @ mix + 2.0 * rng.normal(size=(150, 30)) + 5.0
    each = [f"g{row}" for row in range(120)]
    judge = fit(sounds[:120], images[:120], each)
    assert judge.group_out_r2 > 0.3
    agreement = judge.predict(sounds[120:]) @ judge.project(images[120:]).T
    assert (np.diag(agreement)[:, None] > agreement).mean() > 0.85
    noise = fit(sounds[:120], rng.normal(size=(120, 30)), each)
    assert noise.group_out_r2 < 0.05


def test_pairs_of_one_recording_do_not_raise_the_r2() -> None:
    """Three similar images for each of 40 independent recordings: a new recording cannot be predicted."""
    rng = np.random.default_rng(1)
    groups = [f"g{row // 3}" for row in range(120)]
    sounds = np.repeat(rng.normal(size=(40, 200)), 3, axis=0)
    images = np.repeat(rng.normal(size=(40, 30)), 3, axis=0) + 0.3 * rng.normal(size=(120, 30))
    judge = fit(sounds, images, groups)
    assert -0.05 < judge.group_out_r2 < 0.01
    assert fit(sounds, images, [str(row) for row in range(120)]).group_out_r2 > 0.5, "R^2 if single pairs are left out"
    assert (judge.n, judge.groups) == (120, 40)


def test_the_closed_form_equals_refits_without_each_group() -> None:
    """Errors of the closed form at every penalty, compared with one refit per group with its own means."""
    rng = np.random.default_rng(4)
    groups = np.array([f"g{row // 3}" for row in range(25)])  # the last group has one pair
    sounds, images = rng.normal(size=(9, 6))[np.arange(25) // 3], rng.normal(size=(25, 5))
    images[:, 0] += 3 * sounds[:, 0]
    judge = fit(sounds, images, groups.tolist())
    x = sounds / np.linalg.norm(sounds, axis=1, keepdims=True)
    y = images / np.linalg.norm(images, axis=1, keepdims=True)
    errors, of_the_mean = {}, 0.0
    for relative in PENALTIES:
        penalty = relative * np.linalg.norm(x - x.mean(0), 2) ** 2
        error = of_the_mean = 0.0
        for name in np.unique(groups):
            keep = groups != name
            here, there = x[keep] - x[keep].mean(0), y[keep] - y[keep].mean(0)
            weights = np.linalg.solve(here.T @ here + penalty * np.eye(6), here.T @ there)
            error += ((y[~keep] - y[keep].mean(0) - (x[~keep] - x[keep].mean(0)) @ weights) ** 2).sum()
            of_the_mean += ((y[~keep] - y[keep].mean(0)) ** 2).sum()
        errors[penalty] = error
    best = min(errors, key=errors.__getitem__)
    assert judge.penalty == pytest.approx(best)
    assert judge.group_out_r2 == pytest.approx(1 - errors[best] / of_the_mean, abs=1e-9)
    with pytest.raises(ValueError, match="3 or more pairs"):
        fit(sounds[:2], images[:2], ["a", "b"])
    with pytest.raises(ValueError, match="2 or more audio groups, got 5 clips of 1 groups"):
        fit(sounds[:5], images[:5], ["a"] * 5)


def test_equal_sounds_give_r2_zero() -> None:
    judge = fit(np.ones((4, 3)), np.random.default_rng(0).normal(size=(4, 2)), list("aabb"))
    assert judge.group_out_r2 == 0.0
    assert np.isfinite(judge.predict(np.eye(3))).all()


MANIFEST = """id,kind,file,label,caption,group,split,pair
s1,sound,sounds/a.ogg,dog,A dog,animals,gold,p1
i1,image,images/a.webp,dog,A dog,animals,gold,p1
i2,image,images/b.webp,cat,A cat,animals,pool,
i3,image,images/gone.webp,cow,A cow,animals,gold,p2
s3,sound,sounds/cow.ogg,cow,A cow,animals,gold,p2
"""


def test_manifest_rows_are_matched_to_the_catalog_by_path() -> None:
    images = [{"image_id": "I1", "sources": ["images/a.webp"]}, {"image_id": "I2", "sources": ["x.webp", "images/b.webp"]}]
    audio = [{"audio_id": "S1", "sources": ["sounds/a.ogg"]}, {"audio_id": "S3", "sources": ["sounds/cow.ogg"]}]
    truth = match(parse_manifest(MANIFEST, "m.csv"), images, audio)
    assert truth.labels == {"S1": "dog", "I1": "dog", "I2": "cat", "S3": "cow"}
    assert [(pair.name, pair.image_id, pair.audio_id, pair.label) for pair in truth.pairs] == [("p1", "I1", "S1", "dog")]
    assert truth.num_unmatched == 1
    assert match(parse_manifest(MANIFEST.splitlines()[0], "m.csv"), images, audio).pairs == ()
    with pytest.raises(DataError, match="column 'label' is missing"):
        parse_manifest("kind,file,split,pair\n", "m.csv")


def test_an_empty_label_means_an_unknown_class() -> None:
    """Tables of `sonify labels` may have empty labels; items without a label have no common class."""
    rows = [f"sound,s{n}.wav,,gold,p{n}\nimage,i{n}.png,,gold,p{n}" for n in range(3)]
    text = "\n".join(["kind,file,label,split,pair", *rows, "image,again.png,dog,pool,"])
    images = [{"image_id": f"I{n}", "sources": [f"i{n}.png"] + ["again.png"] * (n == 0)} for n in range(3)]
    audio = [{"audio_id": f"S{n}", "sources": [f"s{n}.wav"]} for n in range(3)]
    truth = match(parse_manifest(text, "m.csv"), images, audio)
    assert [pair.label for pair in truth.pairs] == [None] * 3
    assert truth.labels == {"I0": "dog"}, "the first label among the files of one item"
    plan = build_evaluation_plan([], truth, {f"I{n}": f"I{n}" for n in range(3)}, {f"S{n}": f"S{n}" for n in range(3)}, 9)
    between, of_items = negative_masks(plan.clips, plan.sets["gold"])
    assert (between == ~np.eye(3, dtype=bool)).all()
    assert of_items.sum() == 6
    assert plan.seen_classes == frozenset()
