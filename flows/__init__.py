"""Orchestration with Prefect: the only package that imports prefect."""
