"""Fixtures of the command tests."""

from tests.factories.cli_project import ids, pool, sonify

__all__ = ["ids", "pool", "sonify"]
