"""The names of the fields of samples and batches."""

MODALITIES = ("image", "array", "text")  # the first one that a sample has is augmented
BESIDE_IMAGES = ("label", "caption", "metadata")
FIELDS = (*MODALITIES, *BESIDE_IMAGES)
MISSING = {"label": -1, "caption": "", "padding": False}  # the values for samples without the field
