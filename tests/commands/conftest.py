"""Fixtures of the command tests."""

from command_project import ids, pool, sonify

__all__ = ["ids", "pool", "sonify"]
