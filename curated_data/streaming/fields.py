"""The names of what samples hold and batches are made of."""

MODALITIES = ("image", "array", "text")  # of which the first that a sample has is augmented
BESIDE_IMAGES = ("label", "caption", "metadata")
FIELDS = (*MODALITIES, *BESIDE_IMAGES)
MISSING = {"label": -1, "caption": "", "padding": False}  # in a batch, for samples that have none
