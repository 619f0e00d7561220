"""The CIFAR family of ResNets (20, 32, 44, 56 layers; K = 64 filters at the end), without pooling and classifier.

Source: He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, section 4.2 (shortcut option A).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

DEPTHS = {"resnet20": 3, "resnet32": 5, "resnet44": 7, "resnet56": 9}


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut that subsamples and pads channels with zeros, without parameters."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride = stride
        self.extra = channels - channels_in

    def forward(self, x: Tensor) -> Tensor:
        """(N, channels_in, H, W) to (N, channels, ceil(H / stride), ceil(W / stride))."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.stride != 1 or self.extra:
            x = F.avg_pool2d(x, 1, self.stride)  # subsamples; unlike a slice, its gradient stays channels-last
            x = F.pad(x, (0, 0, 0, 0, self.extra // 2, self.extra - self.extra // 2))
        return F.relu(out + x)


class CifarResNet(nn.Module):
    """The ResNet for small images: (N, in_channels, H, W) to the feature map (N, 64, ceil(H / 4), ceil(W / 4)).

    blocks: residual blocks in each of the three stages; a classifier counted, the network has 6 blocks + 2 layers.
    Source: He et al., CVPR 2016, section 4.2 (shortcut option A).
    """

    num_filters = 64

    def __init__(self, blocks: int = 3, in_channels: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, 16, 3, 1, 1, bias=False)
        self.bn = nn.BatchNorm2d(16)
        self.stages = nn.Sequential(
            *(
                BasicBlock(before if i == 0 else width, width, stride if i == 0 else 1)
                for before, width, stride in ((16, 16, 1), (16, 32, 2), (32, 64, 2))
                for i in range(blocks)
            )
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """The last convolutional layer's feature map."""
        return self.stages(F.relu(self.bn(self.conv(x))))
