"""The walk from a pool to a selection, its relatives, and what reads its results: stages composed."""
