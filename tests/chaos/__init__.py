"""Attacks on this package, counted: kills, damaged files, hostile servers and dying ranks. See `__main__`."""
