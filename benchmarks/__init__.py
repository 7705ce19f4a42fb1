"""Benchmarks. Run them from the project root as `python -m benchmarks.NAME`."""
