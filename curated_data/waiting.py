"""What is looked at by whoever waits for a file: registered from above, as looking may need torch."""

from collections.abc import Callable

while_waiting: list[Callable[[], None]] = []
"""Called at every attempt to get a lock; what one of them raises ends the wait."""
