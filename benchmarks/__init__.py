"""Measurements beside peers, each started by `python -m benchmarks.NAME`; results are in RESULTS.md and history/."""
