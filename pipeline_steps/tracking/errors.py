"""Errors of the upload to MLflow."""

from __future__ import annotations


class StoreUnavailableError(Exception):
    """The store did not take an entry now; it may later."""


class EntryRejectedError(Exception):
    """The store will never take this entry."""


class RunDeletedError(Exception):
    """The run is no longer in the store (a person deleted it); it is written anew."""
