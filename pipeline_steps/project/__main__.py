"""`python -m pipeline_steps.project`: stage `code` of a project. Checks `params.yaml` and writes `code.yaml`."""

import sys
from pathlib import Path

from pipeline_steps.commands.run import check_params
from pipeline_steps.core.errors import StageError
from pipeline_steps.core.project_paths import ProjectPaths
from pipeline_steps.project.code_digests import write_code_digests

layout = ProjectPaths(Path())
try:
    # This stage always runs first, so an error in the section of a late stage is found before an early one starts.
    check_params(layout)
except StageError as error:
    print(f"code: {error}", file=sys.stderr)
    sys.exit(error.exit_code)
write_code_digests(layout)
