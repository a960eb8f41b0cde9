"""Measurements beside peers: `python -m benchmarks.NAME`; results are in RESULTS.md and history/."""
