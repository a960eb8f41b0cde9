"""Suites of evaluation datasets: described in YAML, opened as pools, embedded once for all evaluations."""

from curated_data.datasets.embedded import EmbeddedDataset, Features
from curated_data.datasets.layouts import LAYOUTS
from curated_data.datasets.suite import Dataset, Part, load_suite, open_suite

__all__ = ["LAYOUTS", "Dataset", "EmbeddedDataset", "Features", "Part", "load_suite", "open_suite"]
