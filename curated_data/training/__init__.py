"""The data module, what it streams, and what hangs on a Trainer."""
