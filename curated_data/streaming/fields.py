"""The names of the fields of batches."""

from curated_data.pool.fields import BESIDE_IMAGES, MODALITIES

MISSING = {"label": -1, "caption": "", "padding": False}  # the values for samples without the field

__all__ = ["BESIDE_IMAGES", "MISSING", "MODALITIES"]
