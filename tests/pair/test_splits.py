"""Splits: stable under new items, and every tested kind occurs in training."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pipeline_steps.pair.splits import SPLITS, audio_splits, hash_to_unit_interval, image_splits

names = st.sets(st.text(alphabet="0123456789abcdef", min_size=4, max_size=8), min_size=1, max_size=40)


def kinds_of(groups: list[str]) -> dict[str, set[str]]:
    return {group: {group[0], group[1]} for group in groups}


@given(names, st.text(alphabet="0123456789abcdef", min_size=9, max_size=9), st.integers(0, 5))
def test_a_new_clip_changes_only_its_own_kind(groups: set[str], new: str, seed: int) -> None:
    before = audio_splits(sorted(groups), kinds_of(sorted(groups)), seed, 0.3, 0.2)
    after = audio_splits([*sorted(groups), new], kinds_of([*sorted(groups), new]), seed, 0.3, 0.2)
    for group in groups:
        assert before[group] == after[group] or {*group[:2]} & {*new[:2]}


@given(names, st.integers(0, 5))
def test_held_out_clips_share_a_kind_with_training(groups: set[str], seed: int) -> None:
    kinds = kinds_of(sorted(groups))
    splits = audio_splits(sorted(groups), kinds, seed, 0.3, 0.2)
    assert set(splits) == groups
    trained = set().union(*(kinds[group] for group, split in splits.items() if split == "train"))
    assert all(kinds[group] & trained for group, split in splits.items() if split != "train")


def test_a_clip_without_a_kind_is_for_training() -> None:
    assert set(audio_splits([f"g{i}" for i in range(50)], {}, 0, 0.3, 0.2).values()) == {"train"}


image_groups = st.dictionaries(
    st.text(min_size=1, max_size=6), st.dictionaries(st.sampled_from(SPLITS), st.floats(0.01, 9)), max_size=20
)


@given(image_groups)
def test_an_image_is_in_a_split_with_a_good_match(best: dict[str, dict[str, float]]) -> None:
    kinds = {group: {str(len(group))} for group in best}
    splits = image_splits(best, kinds, 0, 0.4, 0.2, 0.6)
    assert set(splits) == set(best)
    trained = {str(len(group)) for group, split in splits.items() if split == "train"}
    for group, values in best.items():
        if values:
            assert values[splits[group]] >= 0.6 * max(values.values())
            can_train = values.get("train", 0) >= 0.6 * max(values.values())
            assert splits[group] == "train" or not can_train or kinds[group] & trained, "every tested kind is trained"
        others = {name: value for name, value in best.items() if len(name) == len(group)}
        assert image_splits(others, kinds, 0, 0.4, 0.2, 0.6)[group] == splits[group], "images of other kinds do not matter"


def test_fractions_are_met() -> None:
    groups = [f"{i:08x}" for i in range(4000)]
    splits = audio_splits(groups, {group: {"all"} for group in groups}, 3, 0.2, 0.1)
    fractions = {split: sum(found == split for found in splits.values()) / len(groups) for split in SPLITS}
    assert abs(fractions["test"] - 0.2) < 0.02
    assert abs(fractions["val"] - 0.1) < 0.02


def test_the_hash_depends_on_seed_kind_and_name() -> None:
    draws = {hash_to_unit_interval(group, kind, seed) for group in "ab" for kind in ("audio", "image") for seed in (0, 1)}
    assert len(draws) == 8
    assert all(0 <= number < 1 for number in draws)
    assert hash_to_unit_interval("a", "audio", 0) == 0.5578510671327703
