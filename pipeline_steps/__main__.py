"""`python -m pipeline_steps STAGE`: run one stage and write its report; an error becomes one line and an exit code."""

from __future__ import annotations

import errno
import importlib
import json
import logging
import os
import signal
import sys
import traceback
from pathlib import Path
from types import FrameType

from pipeline_steps.core.atomic import write_json
from pipeline_steps.core.config import config_class, load_params, parse_section
from pipeline_steps.core.errors import ERROR_FILE, ConfigError, ResourceError, StageError
from pipeline_steps.core.project_paths import ProjectPaths

STAGES = ("assets", "ingest", "caption", "embed", "retrieve", "pair", "train", "evaluate")
"""Packages with a `stage.py`. The graph between them is defined in `dvc.yaml`."""


class SigtermReceived(BaseException):
    """SIGTERM arrived."""


def _on_sigterm(_signal: int, _frame: FrameType | None) -> None:
    raise SigtermReceived


def run_stage(name: str, layout: ProjectPaths) -> None:
    """Run one stage in `layout` with the parameters found there; write its report and `reports/runtime/<name>.json`.

    Raises:
        StageError: a failure that the user can act on.
    """
    if name not in STAGES:
        raise ConfigError(f"unknown stage {name!r}", f"choose one of {', '.join(STAGES)}")
    stage = importlib.import_module(f"pipeline_steps.{name}.stage")
    config = parse_section(config_class(name), name, load_params(layout.params))
    report = stage.run(config, layout)
    report.write(layout.report(name), layout.runtime(name))
    print(report.line(), flush=True)
    if name == STAGES[-1]:
        print(f"report: {layout.reports / 'index.html'}", flush=True)


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit code (0 ok, 2 configuration, 3 data, 4 resource, 5 service, 6 integrity, 7 locked)."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if len(arguments) != 1 or arguments[0] in {"-h", "--help"}:
        print(f"usage: python -m pipeline_steps STAGE\nstages: {', '.join(STAGES)}")
        return 0 if arguments and arguments[0] in {"-h", "--help"} else ConfigError.exit_code
    logging.basicConfig(level=os.environ.get("SONIFY_LOG", "INFO").upper(), format="%(levelname)s %(name)s: %(message)s")
    signal.signal(signal.SIGTERM, _on_sigterm)
    layout = ProjectPaths(Path())
    error_file = layout.root / ERROR_FILE
    error_file.unlink(missing_ok=True)
    try:
        run_stage(arguments[0], layout)
        return 0
    except StageError as error:
        failure = error
    except MemoryError:
        failure = ResourceError("out of memory", "lower the stage's batch size", transient=True)
    except (KeyboardInterrupt, SigtermReceived) as stop:
        code = 130 if isinstance(stop, KeyboardInterrupt) else 143
        write_json(error_file, {"stage": arguments[0], "kind": "interrupted", "exit_code": code, "transient": True})
        print(f"{arguments[0]}: interrupted; finished items are cached, run again to continue", file=sys.stderr)
        return code
    except Exception as error:
        if not isinstance(error, OSError) or error.errno != errno.ENOSPC:
            trace = traceback.format_exc()
            internal = {"stage": arguments[0], "kind": "internal", "exit_code": 1, "transient": False, "reason": trace}
            write_json(error_file, internal)
            print(trace, file=sys.stderr)
            return 1
        reason = f"no space left on device: {error.filename}"
        failure = ResourceError(reason, "free disk space and run again; finished items are cached")
    write_json(error_file, {"stage": arguments[0], **json.loads(json.dumps(failure.as_dict(), default=str))})
    print(f"{arguments[0]}: {failure}", file=sys.stderr)
    return failure.exit_code


if __name__ == "__main__":
    sys.exit(main())
