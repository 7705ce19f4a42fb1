"""Errors of uploads to MLflow."""

from __future__ import annotations


class StoreUnavailableError(Exception):
    """The store cannot accept an entry now; a later attempt may succeed."""


class EntryRejectedError(Exception):
    """The store refuses an entry permanently."""


class RunDeletedError(Exception):
    """The run was deleted in the store; the uploader creates it again."""
