"""Artifacts in the cache: named by what determined them, whole or absent, held while in use."""
