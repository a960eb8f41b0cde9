"""SimCLR of a very small network in memory, and what its features are worth on balanced labelled images."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from lightning_modules.evaluation.knn import knn
from lightning_modules.heads import mlp
from lightning_modules.losses import nt_xent
from lightning_modules.views import color_matrix

NEIGHBOURS = 5
INVERSE_PENALTY = 0.1
BATCH = 64


class SmallNet(nn.Module):
    """Convolutions of stride 2, each twice as wide as the last, and the mean over places."""

    def __init__(self, width: int = 32, depth: int = 3) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inputs = 3
        for stage in range(depth):
            outputs = width << stage
            layers += [nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False)]
            layers += [nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
            inputs = outputs
        self.layers = nn.Sequential(*layers)
        self.dimension = inputs

    def forward(self, images: Tensor) -> Tensor:
        """(n, 3, H, W) float to (n, width * 2^(depth - 1))."""
        features: Tensor = self.layers(images).mean((2, 3))
        return features


def pretrain(images: np.ndarray, steps: int, seed: int, *, batch: int = BATCH) -> SmallNet:
    """Train on (n, H, W, 3) uint8 images for so many steps, whatever n is; 0 for the initial weights."""
    torch.manual_seed(seed)
    net = SmallNet()
    head = mlp([net.dimension, net.dimension, 64], batch_norm=True)
    parameters = [*net.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=4e-3, weight_decay=1e-4)
    warm = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, 0.5 + 0.5 * math.cos(math.pi * step / max(1, steps)))
    )
    source = torch.from_numpy(images).permute(0, 3, 1, 2)
    order = torch.empty(0, dtype=torch.int64)
    net.train()
    for _ in range(steps):
        while len(order) < batch:
            order = torch.cat([order, torch.randperm(len(source))])
        rows, order = order[:batch], order[batch:]
        some = source[rows].float().div_(255)
        first, second = head(net(torch.cat([view(some), view(some)]))).chunk(2)
        loss = nt_xent(first, second, temperature=0.2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    if steps and not torch.isfinite(loss):
        raise FloatingPointError(f"the loss is {float(loss)} after {steps} steps")
    return net


def view(images: Tensor) -> Tensor:
    """One random view of each of (n, 3, H, W) images in 0..1: crop, flip, colours; zero mean."""
    n = len(images)
    area, aspect = torch.empty(n).uniform_(0.25, 1.0), torch.empty(n).uniform_(-0.29, 0.29).exp()
    width, height = (area * aspect).sqrt().clamp(max=1), (area / aspect).sqrt().clamp(max=1)
    flip = torch.randint(0, 2, (n,)) * 2.0 - 1
    place = torch.zeros(n, 2, 3)
    place[:, 0, 0], place[:, 1, 1] = width * flip, height
    place[:, 0, 2] = (1 - width) * torch.empty(n).uniform_(-1, 1)
    place[:, 1, 2] = (1 - height) * torch.empty(n).uniform_(-1, 1)
    grid = F.affine_grid(place, list(images.shape), align_corners=False)
    cut = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    # Brightness, contrast about the mean, saturation and grey are one matrix and an offset per image.
    brightness, contrast, saturation = torch.empty(3, n).uniform_(0.6, 1.4)
    saturation[torch.rand(n) < 0.2] = 0.0
    grey, colours = color_matrix(grey=True), torch.eye(3)
    mix = saturation[:, None, None] * colours + (1 - saturation[:, None, None]) * grey
    mean = cut.mean((1, 2, 3))
    changed = torch.bmm(mix * (brightness * contrast)[:, None, None], cut.flatten(2)).view_as(cut)
    return (changed + (brightness * (1 - contrast) * mean)[:, None, None, None]).clamp_(0, 1) - 0.5


def halved(images: np.ndarray) -> np.ndarray:
    """Images (n, H, W, 3) at half the size, by means of four pixels."""
    n, height, width, _ = images.shape
    blocks = images.reshape(n, height // 2, 2, width // 2, 2, 3)
    return blocks.mean(axis=(2, 4)).round().astype(np.uint8)


@torch.inference_mode()
def features(net: SmallNet, images: np.ndarray) -> Tensor:
    """(n, d) of (n, H, W, 3) uint8 images as they are."""
    net.eval()
    source = torch.from_numpy(images).permute(0, 3, 1, 2)
    return torch.cat([net(some.float().div_(255) - 0.5) for some in source.split(1000)])


def accuracies(
    bank: Tensor, bank_labels: np.ndarray, test: Tensor, test_labels: np.ndarray, rarest: np.ndarray
) -> dict[str, float]:
    """Linear probe and k-NN in percent: means over all classes, and over the `rarest`."""
    near = neighbours(bank, bank_labels, test, test_labels)
    probed = probe(bank, bank_labels, test)
    linear = np.array([(probed[test_labels == c] == c).mean() for c in range(len(near))])
    return {
        "knn": 100 * near.mean(),
        "knn_rare": 100 * near[rarest].mean(),
        "linear": 100 * linear.mean(),
        "linear_rare": 100 * linear[rarest].mean(),
    }


def neighbours(bank: Tensor, bank_labels: np.ndarray, test: Tensor, test_labels: np.ndarray) -> np.ndarray:
    """k-NN accuracy of each class, 0..1."""
    found = knn(bank, bank_labels, test, test_labels, k=min(NEIGHBOURS, len(bank)))
    by_class = next(iter(found.per_class.values()))
    return np.array([by_class[c] for c in range(int(test_labels.max()) + 1)])


def probe(bank: Tensor, labels: np.ndarray, test: Tensor) -> np.ndarray:
    """Labels that logistic regression on standardised features gives."""
    mean, deviation = bank.mean(0), bank.std(0).clamp_min(1e-6)
    head = LogisticRegression(C=INVERSE_PENALTY, max_iter=500)
    head.fit(((bank - mean) / deviation).numpy(), labels)
    return np.asarray(head.predict(((test - mean) / deviation).numpy()))
