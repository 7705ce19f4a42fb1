"""Test that env.example lists exactly the variables that the project reads."""

from __future__ import annotations

import re

from infra.topology import INFRA, PORTS

PROJECT = INFRA.parent
STANDARD = {"PATH", "PYTHONPATH", "HOME", "CI", "TMPDIR"}
"""Variables of the system."""


def read_variables() -> set[str]:
    """Names of variables that the source reads."""
    names: set[str] = set(PORTS)
    for folder in ("pipeline_steps", "flows", "infra"):
        for path in (PROJECT / folder).rglob("*.py"):
            text = path.read_text(encoding="utf-8")
            names |= set(re.findall(r"environ(?:\.get|\.pop)?[(\[]\s*\"([A-Z][A-Z0-9_]+)\"", text))
            names |= set(re.findall(r"\"((?:SONIFY|SERVICES)_[A-Z0-9_]+)\"", text))
    for path in [*(PROJECT / "infra/bin").iterdir(), PROJECT / "infra/compose.yaml"]:
        text = path.read_text(encoding="utf-8")
        assigned = set(re.findall(r"^([A-Z][A-Z0-9_]+)=", text, re.MULTILINE))
        names |= set(re.findall(r"environ(?:\.get)?[(\[]\s*\"([A-Z][A-Z0-9_]+)\"", text))
        names |= set(re.findall(r"\$\{?([A-Z][A-Z0-9_]+)", text)) - assigned
    return names - STANDARD


def example_variables() -> dict[str, str]:
    """Name -> the rest of its line."""
    lines = (PROJECT / "infra/env.example").read_text(encoding="utf-8").splitlines()
    return dict(match.groups() for line in lines if (match := re.match(r"#?([A-Z][A-Z0-9_]+)=(.*)$", line)))


BY_LIBRARIES = {"MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "PREFECT_API_AUTH_STRING"}
"""Read by MLflow and Prefect; listed because users of the servers need them."""


def test_example_lists_all_variables() -> None:
    listed = set(example_variables())
    read = read_variables()
    assert read - listed == set(), "read, but not in infra/env.example"
    assert listed - read - BY_LIBRARIES == set(), "in infra/env.example, but not read"


def test_every_variable_is_explained() -> None:
    for name, rest in example_variables().items():
        assert re.search(r" # \S.{5,}", rest) or name.startswith(("PREFECT_WORK", "DEMO", "POSTGRES", "S3_DATA")), name


def test_ports_are_those_of_the_topology() -> None:
    listed = example_variables()
    for name, port in PORTS.items():
        assert listed[name].split()[0] == str(port)
