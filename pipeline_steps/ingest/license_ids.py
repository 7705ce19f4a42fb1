"""Licenses as foreign data sets write them (addresses, short names) -> SPDX ids, where there is one. Pure."""

from __future__ import annotations

import re

from pipeline_steps.core.schemas import PUBLIC_DOMAIN

_KNOWN = {
    "cc0": "CC0-1.0", "cc-0": "CC0-1.0", "creative commons 0": "CC0-1.0", "public domain": PUBLIC_DOMAIN,
    "mit": "MIT", "apache-2.0": "Apache-2.0", "bsd-3-clause": "BSD-3-Clause", "bsd-2-clause": "BSD-2-Clause",
    "gpl-2.0": "GPL-2.0-only", "gpl-3.0": "GPL-3.0-only", "odbl": "ODbL-1.0", "odc-by": "ODC-By-1.0", "pddl": "PDDL-1.0",
    "cc-sampling+": "LicenseRef-CC-Sampling-Plus-1.0",
}  # fmt: skip
_ADDRESSES = (
    (re.compile(r"creativecommons\.org/publicdomain/zero/1\.0"), "CC0-1.0"),
    (re.compile(r"creativecommons\.org/publicdomain/mark"), PUBLIC_DOMAIN),
    (re.compile(r"creativecommons\.org/licenses/sampling\+"), "LicenseRef-CC-Sampling-Plus-1.0"),
    (re.compile(r"flickr\.com/commons/usage"), "LicenseRef-Flickr-Commons"),
    (re.compile(r"usa\.gov/copyright"), "LicenseRef-US-Government-Work"),
)
_CC_ADDRESS = re.compile(r"creativecommons\.org/licenses/(by(?:-nc)?(?:-sa|-nd)?)/(\d\.\d)")
_CC_NAME = re.compile(r"cc[ -](by(?:-nc)?(?:-sa|-nd)?)[ -](\d\.\d)")
LONGEST = 200


def spdx(text: object) -> str | None:
    """SPDX id of a license's address or name; a text that is not known comes back as it is, nothing as None.

    An unknown license is not a free one: whoever publishes must judge the text.
    """
    if not isinstance(text, str) or not text.strip():
        return None
    plain = " ".join(text.split())[:LONGEST]
    low = plain.lower()
    for pattern, found in _ADDRESSES:
        if pattern.search(low):
            return found
    if match := _CC_ADDRESS.search(low) or _CC_NAME.fullmatch(low):
        return f"CC-{match.group(1).upper()}-{match.group(2)}"
    if low in {"unknown", "other", "none", "n/a"}:
        return None
    return _KNOWN.get(low, plain)
