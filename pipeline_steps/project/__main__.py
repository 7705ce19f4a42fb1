"""`python -m pipeline_steps.project`: stage `code` of a project. Writes `code.yaml`."""

from pathlib import Path

from pipeline_steps.core.project_paths import ProjectPaths
from pipeline_steps.project.code_digests import write_code_digests

write_code_digests(ProjectPaths(Path()))
