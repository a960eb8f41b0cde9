"""A network that counts the images it embeds."""

from torch import nn


def as_float(image):
    return image.float() / 255


class Counting(nn.Module):
    """Mean colours, and how many images were embedded."""

    fingerprint = "mean colours"

    def __init__(self):
        super().__init__()
        self.seen = 0

    def forward(self, batch):
        self.seen += len(batch)
        return batch.mean((2, 3))
