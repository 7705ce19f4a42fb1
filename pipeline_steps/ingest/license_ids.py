"""SPDX ids for licenses as data sets write them: URLs and short names. Pure."""

from __future__ import annotations

import re

from pipeline_steps.core.schemas import PUBLIC_DOMAIN

_SHORT_NAMES = {
    "cc0": "CC0-1.0", "cc0-1.0": "CC0-1.0", "cc-0": "CC0-1.0", "creative commons 0": "CC0-1.0", "public domain": PUBLIC_DOMAIN,
    "mit": "MIT", "apache-2.0": "Apache-2.0", "bsd-3-clause": "BSD-3-Clause", "bsd-2-clause": "BSD-2-Clause",
    "gpl-2.0": "GPL-2.0-only", "gpl-3.0": "GPL-3.0-only", "odbl": "ODbL-1.0", "odc-by": "ODC-By-1.0", "pddl": "PDDL-1.0",
    "cc-sampling+": "LicenseRef-CC-Sampling-Plus-1.0",
}  # fmt: skip
_URLS = (
    (re.compile(r"creativecommons\.org/publicdomain/zero/1\.0"), "CC0-1.0"),
    (re.compile(r"creativecommons\.org/publicdomain/mark"), PUBLIC_DOMAIN),
    (re.compile(r"creativecommons\.org/licenses/sampling\+"), "LicenseRef-CC-Sampling-Plus-1.0"),
    (re.compile(r"flickr\.com/commons/usage"), "LicenseRef-Flickr-Commons"),
    (re.compile(r"usa\.gov/copyright"), "LicenseRef-US-Government-Work"),
)
_CC_URL = re.compile(r"creativecommons\.org/licenses/(by(?:-nc)?(?:-sa|-nd)?)/(\d\.\d)")
_CC_NAME = re.compile(r"cc[ -](by(?:-nc)?(?:-sa|-nd)?)[ -](\d\.\d)")
MAX_CHARS = 200


def spdx_id(text: object) -> str | None:
    """SPDX id of a license given by URL or name; other text is returned unchanged, an empty or unknown value as None.

    Text without an SPDX id does not mean a free license: it must be reviewed before publication.
    """
    if not isinstance(text, str) or not text.strip():
        return None
    plain = " ".join(text.split())[:MAX_CHARS]
    lower = plain.lower()
    for pattern, license in _URLS:
        if pattern.search(lower):
            return license
    if match := _CC_URL.search(lower) or _CC_NAME.fullmatch(lower):
        return f"CC-{match.group(1).upper()}-{match.group(2)}"
    if lower in {"unknown", "other", "none", "n/a"}:
        return None
    return _SHORT_NAMES.get(lower, plain)
