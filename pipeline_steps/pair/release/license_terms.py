"""Terms of licenses, and of pairs of licensed works: the stricter license, with the obligations of both.

A pair is a collection of two separate works, each under its own license. The `license` of a pair is the stricter one by
`strictness`, and its `obligations` are the union. This is bookkeeping for sharing a data set, not legal advice.
Identifiers are those of the SPDX license list (https://spdx.org/licenses/), expressions those of SPDX 2.3 annex D.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache, reduce

from pipeline_steps.core.schemas import PUBLIC_DOMAIN

UNKNOWN_STRICTNESS = 99
CLOSED_STRICTNESS = 90


@dataclass(frozen=True, slots=True)
class LicenseTerms:
    """Terms of one license or of a combination; `strictness` orders the families in `_FAMILIES`."""

    strictness: int
    obligations: frozenset[str] = frozenset()
    redistribution: bool = True
    derivatives: bool = True
    commercial: bool = True

    @property
    def known(self) -> bool:
        return self.strictness != UNKNOWN_STRICTNESS

    @property
    def publishable(self) -> bool:
        """Whether a resized or resampled copy may be shared."""
        return self.redistribution and self.derivatives


_ATTRIBUTION = frozenset({"attribution"})
_NOTICE = frozenset({"attribution", "notice"})
_RECIPROCAL = frozenset({"attribution", "notice", "share-alike"})
_SOURCE = frozenset({"attribution", "notice", "share-alike", "source"})

UNKNOWN = LicenseTerms(UNKNOWN_STRICTNESS, redistribution=False, derivatives=False, commercial=False)
CLOSED = replace(UNKNOWN, strictness=CLOSED_STRICTNESS)

# The first match counts; a pattern matches the whole identifier in upper case.
_FAMILIES: tuple[tuple[str, LicenseTerms], ...] = (
    (PUBLIC_DOMAIN.upper() + r"|PUBLIC-DOMAIN|CC-PDDC|CC-PDM-1\.0|PDDL-1\.0", LicenseTerms(0)),
    (r"CC0-1\.0|UNLICENSE|0BSD|WTFPL|MIT-0", LicenseTerms(1)),
    (r"MIT(-.+)?|ISC|ZLIB|X11|BSL-1\.0|BSD-[1-4]-CLAUSE(-.+)?|APACHE-(1\.[01]|2\.0)|OFL-1\.[01]", LicenseTerms(10, _NOTICE)),
    (r"CC-BY-[1-4]\.[05](-[A-Z]{2,3})?|ODC-BY-1\.0", LicenseTerms(20, _NOTICE)),
    (r"CC-BY-SA-[1-4]\.[05](-[A-Z]{2,3})?|LAL-1\.[23]|ODBL-1\.0", LicenseTerms(30, _RECIPROCAL)),
    (r"LGPL-[23]\.[01](-ONLY|-OR-LATER|\+)?|MPL-[12]\.[01]", LicenseTerms(40, _SOURCE)),
    (r"GPL-[123]\.0(-ONLY|-OR-LATER|\+)?", LicenseTerms(50, _SOURCE)),
    (r"AGPL-[13]\.0(-ONLY|-OR-LATER|\+)?|GFDL-1\.[123](-.+)?", LicenseTerms(55, _SOURCE)),
    (r"CC-BY-NC-[1-4]\.[05](-[A-Z]{2,3})?", LicenseTerms(60, _NOTICE, commercial=False)),
    (r"CC-BY-NC-SA-[1-4]\.[05](-[A-Z]{2,3})?", LicenseTerms(65, _RECIPROCAL, commercial=False)),
    (r"CC-BY-ND-[1-4]\.[05](-[A-Z]{2,3})?", LicenseTerms(70, _NOTICE, derivatives=False)),
    (r"CC-BY-(NC-ND|ND-NC)-[1-4]\.[05](-[A-Z]{2,3})?", LicenseTerms(75, _NOTICE, derivatives=False, commercial=False)),
    (r"LICENSEREF-(PROPRIETARY|ALL-RIGHTS-RESERVED|NO-REDISTRIBUTION)(-.*)?|ALL RIGHTS RESERVED|PROPRIETARY|NONE", CLOSED),
)
_COMPILED = tuple((re.compile(pattern), terms) for pattern, terms in _FAMILIES)
_OPERATORS = {"(": "(", ")": ")", "AND": " and ", "OR": " or ", "WITH": " @ "}
"""Operators of SPDX, and operators of Python with the same precedence."""

_TOKENS = re.compile(r"(\(|\)|\bAND\b|\bOR\b|\bWITH\b)")


@lru_cache(maxsize=4096)
def terms(license: str | None) -> LicenseTerms:
    """Terms of an SPDX identifier or expression; `UNKNOWN` if it cannot be parsed.

    `A OR B` has the terms of the less strict side, `A AND B` those of both, `A WITH exception` those of A.
    """
    if license is None or len(license) > 500:
        return UNKNOWN
    names: list[str] = []
    source = ""
    for token in filter(None, map(str.strip, _TOKENS.split(license))):
        source += _OPERATORS.get(token, f" n{len(names)} ")
        names += [] if token in _OPERATORS else [" ".join(token.split())]
    try:
        return _evaluate(ast.parse(source.strip(), mode="eval").body, names)
    except (SyntaxError, MemoryError, RecursionError):
        return UNKNOWN


def _evaluate(node: ast.expr, names: list[str]) -> LicenseTerms:
    """Terms of a parsed expression; `names` are the identifiers that its variables n0, n1... stand for."""
    match node:
        case ast.Name(id=variable):
            name = names[int(variable[1:])].upper()
            return next((found for pattern, found in _COMPILED if pattern.fullmatch(name)), UNKNOWN)
        case ast.BinOp(left=ast.Name() as licensed, right=ast.Name()):
            return _evaluate(licensed, names)
        case ast.BoolOp(op=ast.And(), values=sides):
            return reduce(combine_pair, (_evaluate(side, names) for side in sides))
        case ast.BoolOp(values=sides):
            return min((_evaluate(side, names) for side in sides), key=lambda side: side.strictness)
    raise SyntaxError("not an SPDX expression")


def combine_pair(first: LicenseTerms, second: LicenseTerms) -> LicenseTerms:
    """Terms of a collection of two works: larger strictness, all obligations, permissions that both give."""
    return LicenseTerms(
        max(first.strictness, second.strictness),
        first.obligations | second.obligations,
        first.redistribution and second.redistribution,
        first.derivatives and second.derivatives,
        first.commercial and second.commercial,
    )


def strictest(licenses: Iterable[str | None]) -> str | None:
    """Strictest of several licenses; None if one of them is unknown or cannot be parsed.

    Of two with equal strictness the one that sorts later (case-folded) is returned, so the order of arguments does not matter.
    """
    names = [" ".join(license.split()) if license else "" for license in licenses]
    if not all(terms(name).known for name in names):
        return None
    return max(names, key=lambda name: (terms(name).strictness, name.casefold(), name), default=None)


def combine_all(licenses: Iterable[str | None]) -> LicenseTerms:
    """Terms of works under these licenses together; public domain if there are none."""
    return reduce(combine_pair, map(terms, licenses), LicenseTerms(0))
