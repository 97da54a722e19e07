"""The residual networks of the FedLoRA paper and the small one of the CIFAR literature."""

from collections.abc import Sequence
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """conv3x3-BN-ReLU-conv3x3-BN plus the input, then ReLU (He et al., CVPR 2016).

    If the shape changes, the skip connection has a 1x1 convolution and BatchNorm.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.downsample = None
        if stride != 1 or in_channels != out_channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False),
                nn.BatchNorm2d(out_channels),
            )

    def forward(self, x: Tensor) -> Tensor:
        skip = x if self.downsample is None else self.downsample(x)
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + skip)


class ResNet(nn.Module):
    """A stem, one block per width (stride 2 from the second on), a global average, a Linear.

    ``imagenet_stem``: a 7x7/2 convolution and a 3x3/2 max pool, also for 32x32 inputs, as in the
    official FedDecomp code; else a 3x3 convolution.
    """

    def __init__(
        self, classes: int, channels: int, widths: Sequence[int], imagenet_stem: bool
    ) -> None:
        super().__init__()
        stem_width = widths[0]
        if imagenet_stem:
            self.conv1 = nn.Conv2d(channels, stem_width, 7, 2, 3, bias=False)
        else:
            self.conv1 = nn.Conv2d(channels, stem_width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(stem_width)
        self.pool = nn.MaxPool2d(3, 2, 1) if imagenet_stem else nn.Identity()
        blocks = []
        for stage, (in_width, out_width) in enumerate(pairwise((stem_width, *widths))):
            blocks.append(Block(in_width, out_width, stride=1 if stage == 0 else 2))
        self.layers = nn.Sequential(*blocks)
        self.fc = nn.Linear(widths[-1], classes)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(F.relu(self.bn1(self.conv1(x))))
        return self.fc(self.layers(x).mean((2, 3)))
