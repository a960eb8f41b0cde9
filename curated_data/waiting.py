"""Checks while a process waits for a lock; higher modules register them, as they may need torch."""

from collections.abc import Callable

while_waiting: list[Callable[[], None]] = []
"""Called at every attempt to get a lock; what one of them raises ends the wait."""
