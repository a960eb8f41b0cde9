"""Measurements beside peers, each started by `python -m benchmarks.NAME`; results in RESULTS.md, history/."""
