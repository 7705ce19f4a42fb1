"""Shared parts of the stages: schemas, tables, media shards, result cache, errors. Imports no torch, mlflow, prefect, dvc."""
