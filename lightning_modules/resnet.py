"""ResNets of any width without their classifier, and the stem for small images."""

from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

# Blocks a stage. ResNet-10 has half the blocks of ResNet-18: for small images on small machines.
RESNETS: dict[str, tuple[type[BasicBlock] | type[Bottleneck], tuple[int, ...]]] = {
    "resnet10": (BasicBlock, (1, 1, 1, 1)),
    "resnet18": (BasicBlock, (2, 2, 2, 2)),
    "resnet34": (BasicBlock, (3, 4, 6, 3)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
}


class ResNet(nn.Module):
    """A ResNet without classifier, of any width; torchvision's weights fit at width 64.

    Args:
        depth: a key of `RESNETS`.
        width: channels of the first stage; each later stage doubles them.
        small_images: 3x3 first convolution with stride 1 and no max-pool (He et al. 2016, section 4.2).
    """

    layer1: nn.Sequential
    layer2: nn.Sequential
    layer3: nn.Sequential
    layer4: nn.Sequential

    def __init__(self, depth: str = "resnet18", *, width: int = 64, small_images: bool = False) -> None:
        super().__init__()
        block, n_blocks = RESNETS[depth]
        self.conv1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        if small_images:
            use_small_stem(self, depth)
        channels = width
        for stage, n in enumerate(n_blocks):
            inner = width * 2**stage
            blocks: list[nn.Module] = []
            for i in range(n):
                stride = 2 if i == 0 and stage > 0 else 1
                outer = inner * block.expansion
                shortcut = None
                if stride != 1 or channels != outer:
                    shortcut = nn.Sequential(
                        nn.Conv2d(channels, outer, 1, stride, bias=False), nn.BatchNorm2d(outer)
                    )
                blocks.append(block(channels, inner, stride, shortcut))
                channels = outer
            setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.avgpool(x).flatten(1)


def use_small_stem(net: nn.Module, name: str) -> None:
    """Replace a ResNet's first convolution and max-pool by a 3x3 convolution of stride 1."""
    first = getattr(net, "conv1", None)
    if not isinstance(first, nn.Conv2d) or not hasattr(net, "maxpool"):
        raise ValueError(
            f"small_images: backbone {name!r} has no ResNet stem (conv1, maxpool) to replace; "
            "use a ResNet, or a transformer with a small patch_size"
        )
    net.conv1 = nn.Conv2d(
        first.in_channels, first.out_channels, 3, stride=1, padding=1, bias=first.bias is not None
    )
    nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
    net.maxpool = nn.Identity()
