"""Orchestration: the only importer of prefect."""
