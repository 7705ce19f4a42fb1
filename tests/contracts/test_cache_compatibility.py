"""Results in existing caches stay valid: the fingerprints of captions and embeddings of `params.yaml` do not change.

A fingerprint changes when an implementation's `version` is raised or a parameter that shapes the result changes. Then the
value here changes too, in the same commit, and every caption or embedding is computed again.
"""

from __future__ import annotations

from pathlib import Path

from pipeline_steps.caption.stage import CaptionProcessor
from pipeline_steps.core.config import config_class, load_params, parse_section
from pipeline_steps.core.hashing import fingerprint
from pipeline_steps.core.project_paths import ProjectPaths
from pipeline_steps.embed.stage import AudioEmbeddingProcessor, TextEmbeddingProcessor


def test_fingerprints_of_captions_and_embeddings(project: Path, assets: Path) -> None:
    layout = ProjectPaths(project)
    params = load_params(layout.params)
    caption, embed = (parse_section(config_class(stage), stage, params) for stage in ("caption", "embed"))
    assert fingerprint(CaptionProcessor(caption, layout).describe()) == "021cae3fcca65ba4"
    assert fingerprint(AudioEmbeddingProcessor(embed, layout).describe()) == "9918e7d69924b18a"
    assert fingerprint(TextEmbeddingProcessor(embed, layout, {}).describe()) == "c588a6e2e4648777"
