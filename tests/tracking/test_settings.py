"""Tests of redaction: no secret in parameters, tags, logs, queues or the database."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline_steps import tracking
from pipeline_steps.core.project_paths import ProjectPaths
from pipeline_steps.tracking.client.uploader import sync
from pipeline_steps.tracking.settings import is_secret_name, redact
from tests.tracking.helpers import Config, Sqlite, single_run

WORD = st.text("abcdefghijklmnopqrstuvwxyzABCDEFG0123456789@!$%+._~-", min_size=8, max_size=20)
NAMES = [
    "token",
    "HF_TOKEN",
    "db_password",
    "clientSecret",
    "api_key",
    "OPENAI_APIKEY",
    "aws_access_key",
    "passwd",
    "credentials",
]


@given(WORD)
def test_passwords_in_urls_are_redacted(password: str) -> None:
    for scheme in ("postgresql", "https", "mysql+pymysql"):
        shown = redact(f"store {scheme}://me:{password}@db.example:5432/mlflow?x=1 answers")
        assert password not in shown
        assert shown == f"store {scheme}://***@db.example:5432/mlflow?x=1 answers"


@pytest.mark.parametrize("name", NAMES)
def test_secret_names_are_recognized(name: str) -> None:
    assert is_secret_name(name)
    assert redact(f"https://host/x?a=1&{name}=abc123XYZ&b=2") == f"https://host/x?a=1&{name}=***&b=2"
    assert "abc123XYZ" not in redact(f"host=db {name}=abc123XYZ dbname=mlflow")


@pytest.mark.parametrize("text", ["http://host/a@b", "user@example.org wrote", "sqlite:////data/mlflow.db", "C://x y@z"])
def test_other_text_is_unchanged(text: str) -> None:
    assert redact(text) == text


def test_no_file_contains_a_secret(
    layout: ProjectPaths, sqlite: Sqlite, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    secrets = [f"s3cr3t-{number}-value" for number in range(4)]
    monkeypatch.setenv("TEAM_SECRET", secrets[0])
    with tracking.run("train", layout, Config(api_key=secrets[1])) as tracker:
        tracker.log_tags({"db_password": secrets[2]})
        tracker.log_params({"source": f"s3://{secrets[3]}@bucket", "inner": {"access_key": secrets[1], "tokens": 8}})
        tracker.log_tags({"auth.token": secrets[2], "note": f"used {secrets[0]}", "uri": f"https://x?api_key={secrets[3]}"})
    assert sync(layout) == {}
    data = single_run(sqlite()).data
    assert data.params["inner.access_key"] == "***"
    assert data.params["inner.tokens"] == "8"
    assert data.params["source"] == "s3://***@bucket"
    assert (data.tags["auth.token"], data.tags["db_password"]) == ("***", "***")
    assert (data.tags["note"], data.tags["uri"]) == ("used ***", "https://x?api_key=***")
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()) + caplog.text.encode()
    for secret in secrets:
        assert secret.encode() not in written
