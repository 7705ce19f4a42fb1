"""License terms: a table of known licenses, and laws for arbitrary strings."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline_steps.pair.release.license_terms import CLOSED, UNKNOWN, combine_all, combine_pair, strictest, terms

KNOWN = [
    "LicenseRef-Public-Domain", "CC0-1.0", "MIT", "BSD-3-Clause", "Apache-2.0", "CC-BY-1.0", "CC-BY-2.5", "CC-BY-4.0",
    "CC-BY-SA-2.0", "CC-BY-SA-4.0", "LAL-1.3", "LGPL-2.1-or-later", "GPL-2.0-or-later", "GPL-3.0-only", "AGPL-3.0-only",
    "GFDL-1.3-or-later", "CC-BY-NC-4.0", "CC-BY-NC-SA-3.0", "CC-BY-ND-4.0", "CC-BY-NC-ND-4.0", "LicenseRef-Proprietary",
]  # fmt: skip
"""Licenses from the least to the most strict."""

licenses = st.one_of(st.none(), st.sampled_from(KNOWN), st.text(max_size=20))


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ("CC0-1.0", "MIT", "MIT"),
        ("MIT", "CC-BY-3.0", "CC-BY-3.0"),
        ("CC-BY-4.0", "CC-BY-SA-2.0", "CC-BY-SA-2.0"),
        ("GPL-2.0-or-later", "CC-BY-SA-4.0", "GPL-2.0-or-later"),
        ("GPL-2.0-or-later", "GPL-3.0-only", "GPL-3.0-only"),
        ("LAL-1.3", "CC-BY-3.0", "LAL-1.3"),
        ("LicenseRef-Public-Domain", "CC0-1.0", "CC0-1.0"),
        ("CC-BY-NC-4.0", "GPL-3.0-or-later", "CC-BY-NC-4.0"),
        ("MIT", None, None),
        ("MIT", "Some License 7", None),
        ("mit", "MIT", "mit"),
    ],
)
def test_the_stricter_of_two(first: str | None, second: str | None, expected: str | None) -> None:
    assert strictest((first, second)) == expected
    assert strictest((second, first)) == expected


@pytest.mark.parametrize(
    ("license", "obligations", "publishable", "commercial"),
    [
        ("CC0-1.0", set(), True, True),
        ("MIT", {"attribution", "notice"}, True, True),
        ("CC-BY-4.0", {"attribution", "notice"}, True, True),
        ("CC-BY-SA-3.0", {"attribution", "notice", "share-alike"}, True, True),
        ("GPL-2.0-or-later", {"attribution", "notice", "share-alike", "source"}, True, True),
        ("GPL-2.0+", {"attribution", "notice", "share-alike", "source"}, True, True),
        ("CC-BY-NC-4.0", {"attribution", "notice"}, True, False),
        ("CC-BY-ND-4.0", {"attribution", "notice"}, False, True),
        ("CC-BY-NC-ND-4.0", {"attribution", "notice"}, False, False),
        ("All rights reserved", set(), False, False),
        (None, set(), False, False),
        ("", set(), False, False),
        ("CC-Sampling-Plus-1.0", set(), False, False),
        ("GPL", set(), False, False),
        ("MIT OR GPL-3.0-only", {"attribution", "notice"}, True, True),
        ("MIT AND CC-BY-SA-4.0", {"attribution", "notice", "share-alike"}, True, True),
        ("CC0-1.0 AND (GPL-2.0-only OR MIT)", {"attribution", "notice"}, True, True),
        ("GPL-2.0-or-later WITH Font-exception-2.0", {"attribution", "notice", "share-alike", "source"}, True, True),
        ("MIT AND", set(), False, False),
        ("(MIT", set(), False, False),
        ("MIT OR OR MIT", set(), False, False),
        ("(" * 400 + "MIT OR MIT", set(), False, False),
    ],
)
def test_terms(license: str | None, obligations: set[str], publishable: bool, commercial: bool) -> None:
    found = terms(license)
    assert (set(found.obligations), found.publishable, found.commercial) == (obligations, publishable, commercial)


def test_the_order_of_the_families() -> None:
    order = [terms(name).strictness for name in KNOWN]
    assert order == sorted(order)
    assert terms(KNOWN[-1]) == CLOSED
    assert terms("whatever") == UNKNOWN


@given(licenses, licenses, licenses)
def test_laws_of_the_algebra(a: str | None, b: str | None, c: str | None) -> None:
    assert strictest((a, b)) == strictest((b, a))
    assert strictest((a, strictest((b, c)))) == strictest((strictest((a, b)), c)) == strictest((a, b, c))
    joined = combine_pair(terms(a), terms(b))
    assert joined == combine_pair(terms(b), terms(a))
    assert joined == combine_all((a, b))
    assert joined.strictness >= terms(a).strictness
    assert joined.obligations >= terms(a).obligations
    assert joined.publishable == (terms(a).publishable and terms(b).publishable)
    if strictest((a, b)) is None:
        assert not joined.known


@given(st.text(alphabet="()ANDORWITHMIT CC0-1.0", max_size=60))
def test_any_expression_is_parsed_or_unknown(text: str) -> None:
    found = terms(text)
    assert found.known or not found.publishable
