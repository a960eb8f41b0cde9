"""The data module, what it streams, and callbacks."""
