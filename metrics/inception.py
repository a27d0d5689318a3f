"""Inception-v3 in the variant that FID is defined with: features, logits, and the resize that belongs to it."""

import os
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from dnnlib.download import download, file_sha256
from dnnlib.errors import UserError
from metrics.inception_score import class_features
from metrics.network_detector import NetworkDetector

FILE = 'weights-inception-2015-12-05-6726825d.pth'
URL = f'https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{FILE}'
PUBLISHED = '6726825d'  # how the SHA-256 of the published file begins; its name says so
VARIABLE = 'EDM2PLUS_INCEPTION'
SIDE = 299
FEATURES, CLASSES = 2048, 1008
SPATIAL = 7  # channels of the first branch of Mixed_6d, 17x17 pixels, that sFID takes


def resize_as_tensorflow(images: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Bilinear resize of TensorFlow 1: no half-pixel centres, no antialiasing.

    Output pixel i lies at i * H / height of the input, between its floor and the pixel after that (the last pixel
    repeats).

    Args:
        images: [N, C, H, W], of any dtype.
        height, width: Of the output.

    Returns:
        float32 [N, C, height, width].
    """
    images = images.float()
    for dim, size in ((2, height), (3, width)):
        length = images.shape[dim]
        position = torch.arange(size, device=images.device) * (length / size)  # float32, as there
        low = position.long().clamp(max=length - 1)
        weight = (position - low).view(-1, 1) if dim == 2 else position - low
        lower, upper = (images.index_select(dim, i) for i in (low, (low + 1).clamp(max=length - 1)))
        images = lower + (upper - lower) * weight
    return images


class ConvBlock(nn.Module):
    """Convolution without bias, batch normalisation (eps 1e-3), ReLU. `padding` keeps the size at stride 1."""

    def __init__(self, cin: int, cout: int, kernel: int | tuple[int, int], stride: int = 1, padded: bool = True):
        super().__init__()
        height, width = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = (height // 2, width // 2) if padded else 0
        self.conv = nn.Conv2d(cin, cout, (height, width), stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(cout, eps=1e-3)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)))


def average_pool(x: torch.Tensor) -> torch.Tensor:
    """3x3 means at stride 1 over the pixels that are there: padding does not count. Here the FID variant differs."""
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


max_pool = nn.MaxPool2d(3, stride=1, padding=1)  # in the last block


class BlockA(nn.Module):
    """35x35: 1x1, 5x5, two 3x3, pool -> 64 + 64 + 96 + pool_features channels."""

    def __init__(self, cin: int, pool_features: int):
        super().__init__()
        self.branch1x1 = ConvBlock(cin, 64, 1)
        self.branch5x5_1 = ConvBlock(cin, 48, 1)
        self.branch5x5_2 = ConvBlock(48, 64, 5)
        self.branch3x3dbl_1 = ConvBlock(cin, 64, 1)
        self.branch3x3dbl_2 = ConvBlock(64, 96, 3)
        self.branch3x3dbl_3 = ConvBlock(96, 96, 3)
        self.branch_pool = ConvBlock(cin, pool_features, 1)

    def forward(self, x):
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        five = self.branch5x5_2(self.branch5x5_1(x))
        return torch.cat([self.branch1x1(x), five, double, self.branch_pool(average_pool(x))], 1)


class BlockB(nn.Module):
    """35x35 -> 17x17: 3x3, two 3x3, maxima -> 384 + 96 + cin channels."""

    def __init__(self, cin: int):
        super().__init__()
        self.branch3x3 = ConvBlock(cin, 384, 3, stride=2, padded=False)
        self.branch3x3dbl_1 = ConvBlock(cin, 64, 1)
        self.branch3x3dbl_2 = ConvBlock(64, 96, 3)
        self.branch3x3dbl_3 = ConvBlock(96, 96, 3, stride=2, padded=False)

    def forward(self, x):
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), double, F.max_pool2d(x, 3, stride=2)], 1)


class BlockC(nn.Module):
    """17x17: 1x1, one and two factorised 7x7 with `mid` channels inside, pool -> 4 * 192 channels."""

    def __init__(self, cin: int, mid: int):
        super().__init__()
        self.branch1x1 = ConvBlock(cin, 192, 1)
        self.branch7x7_1 = ConvBlock(cin, mid, 1)
        self.branch7x7_2 = ConvBlock(mid, mid, (1, 7))
        self.branch7x7_3 = ConvBlock(mid, 192, (7, 1))
        self.branch7x7dbl_1 = ConvBlock(cin, mid, 1)
        self.branch7x7dbl_2 = ConvBlock(mid, mid, (7, 1))
        self.branch7x7dbl_3 = ConvBlock(mid, mid, (1, 7))
        self.branch7x7dbl_4 = ConvBlock(mid, mid, (7, 1))
        self.branch7x7dbl_5 = ConvBlock(mid, 192, (1, 7))
        self.branch_pool = ConvBlock(cin, 192, 1)

    def forward(self, x):
        single = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return torch.cat([self.branch1x1(x), single, double, self.branch_pool(average_pool(x))], 1)


class BlockD(nn.Module):
    """17x17 -> 8x8: 3x3, factorised 7x7 and 3x3, maxima -> 320 + 192 + cin channels."""

    def __init__(self, cin: int):
        super().__init__()
        self.branch3x3_1 = ConvBlock(cin, 192, 1)
        self.branch3x3_2 = ConvBlock(192, 320, 3, stride=2, padded=False)
        self.branch7x7x3_1 = ConvBlock(cin, 192, 1)
        self.branch7x7x3_2 = ConvBlock(192, 192, (1, 7))
        self.branch7x7x3_3 = ConvBlock(192, 192, (7, 1))
        self.branch7x7x3_4 = ConvBlock(192, 192, 3, stride=2, padded=False)

    def forward(self, x):
        seven = self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x))))
        return torch.cat([self.branch3x3_2(self.branch3x3_1(x)), seven, F.max_pool2d(x, 3, stride=2)], 1)


class BlockE(nn.Module):
    """8x8: 1x1, forked 3x3, 3x3 and forked 3x3, pool -> 320 + 768 + 768 + 192 channels."""

    def __init__(self, cin: int, pool):
        super().__init__()
        self.pool = pool
        self.branch1x1 = ConvBlock(cin, 320, 1)
        self.branch3x3_1 = ConvBlock(cin, 384, 1)
        self.branch3x3_2a = ConvBlock(384, 384, (1, 3))
        self.branch3x3_2b = ConvBlock(384, 384, (3, 1))
        self.branch3x3dbl_1 = ConvBlock(cin, 448, 1)
        self.branch3x3dbl_2 = ConvBlock(448, 384, 3)
        self.branch3x3dbl_3a = ConvBlock(384, 384, (1, 3))
        self.branch3x3dbl_3b = ConvBlock(384, 384, (3, 1))
        self.branch_pool = ConvBlock(cin, 192, 1)

    def forward(self, x):
        three = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        forks = [self.branch3x3_2a(three), self.branch3x3_2b(three)]
        forks += [self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double)]
        return torch.cat([self.branch1x1(x), *forks, self.branch_pool(self.pool(x))], 1)


class InceptionV3(nn.Module):
    """Inception-v3 of 2015-12-05 as FID uses it: 94 convolutions, 2048 features, 1008 classes.

    It differs from the usual Inception-v3 in that average pools leave padding out, and that the last block (Mixed_7c)
    pools with maxima. Names and shapes are those of the public state dict (566 entries, 23,885,486 elements).
    """

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = ConvBlock(3, 32, 3, stride=2, padded=False)  # 299 -> 149
        self.Conv2d_2a_3x3 = ConvBlock(32, 32, 3, padded=False)  # 147
        self.Conv2d_2b_3x3 = ConvBlock(32, 64, 3)  # then pooled: 73
        self.Conv2d_3b_1x1 = ConvBlock(64, 80, 1)
        self.Conv2d_4a_3x3 = ConvBlock(80, 192, 3, padded=False)  # 71, then pooled: 35
        self.Mixed_5b = BlockA(192, 32)
        self.Mixed_5c = BlockA(256, 64)
        self.Mixed_5d = BlockA(288, 64)
        self.Mixed_6a = BlockB(288)  # 17
        self.Mixed_6b = BlockC(768, 128)
        self.Mixed_6c = BlockC(768, 160)
        self.Mixed_6d = BlockC(768, 160)
        self.Mixed_6e = BlockC(768, 192)
        self.Mixed_7a = BlockD(768)  # 8
        self.Mixed_7b = BlockE(1280, average_pool)
        self.Mixed_7c = BlockE(2048, max_pool)
        self.fc = nn.Linear(FEATURES, CLASSES)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Pooled and spatial features of images of about -1..1: [N, 3, 299, 299] -> [N, 2048], [N, 17 * 17 * 7]."""
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = F.max_pool2d(x, 3, stride=2)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))
        x = F.max_pool2d(x, 3, stride=2)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))
        x = self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x))))
        spatial = x[:, :SPATIAL].permute(0, 2, 3, 1).flatten(1)  # [N, 7, 17, 17] -> [N, 17 * 17 * 7]
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(self.Mixed_6e(x))))
        return x.mean(dim=(2, 3)), spatial


class InceptionDetector(NetworkDetector):
    """Features of FID, sFID, KID and the Inception score, in full float32.

    `inception` [N, 2048] is what the last layer sees; `spatial` [N, 2023] the first 7 channels of 17x17 pixels in the
    middle of the network (sFID: Nash et al., Generating Images with Sparse Representations, 2021; as ADM measures it);
    `classes` [N, 1009] see `class_features`, of the last layer without its bias: the Inception score is defined so.
    Grayscale is replicated to three channels; TensorFlow 1's bilinear resize to 299x299 (each side for itself); then
    (x - 128) / 128.

    Args:
        device: Where images will be.
        weights: File of the public state dict; None takes $EDM2PLUS_INCEPTION, else downloads it into the cache.
        any_weights: Accept a file that is not the published one.
        offline: Download nothing.

    Attributes:
        identity: With the SHA-256 of the weights.
        standard: Whether the weights are those that published numbers are made with.
    """

    def __init__(
        self,
        device: torch.device | str = 'cpu',
        weights: str | None = None,
        any_weights: bool = False,
        offline: bool = False,
    ):
        path = find_weights(weights, offline)
        digest = file_sha256(path)
        self.standard = digest.startswith(PUBLISHED)
        if not self.standard and not any_weights:
            raise UserError(
                f'{path} has the SHA-256 {digest[:8]}..., not {PUBLISHED}... of the published weights ({URL}): FID '
                'would not be FID; --any-weights measures with them nevertheless'
            )
        self.identity = f'inception-v3 2015-12-05, FID variant (TF1 resize to {SIDE}, (x-128)/128), weights {digest}'
        self.net = load_inception(path).to(device, memory_format=torch.channels_last)

    def num_features(self, image_shape: tuple[int, int, int]) -> dict[str, int]:
        """The same whatever the images."""
        del image_shape
        return {'inception': FEATURES, 'spatial': SPATIAL * 17 * 17, 'classes': CLASSES + 1}

    def _features(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        x = (resize_as_tensorflow(images, SIDE, SIDE) - 128) / 128
        pooled, spatial = self.net(x.expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last))
        classes = class_features(F.linear(pooled, self.net.fc.weight))
        return {'inception': pooled, 'spatial': spatial, 'classes': classes}


def find_weights(given: str | None, offline: bool = False) -> Path:
    """The weights file: the one named, that of $EDM2PLUS_INCEPTION, or the published one through the cache.

    With `offline` nothing is downloaded into that.
    """
    if path := given or os.environ.get(VARIABLE):
        if not Path(path).is_file():
            raise UserError(f'no Inception weights at {path}; the file needed is {FILE}, from {URL}')
        return Path(path)
    try:
        return download(URL, offline=offline)
    except UserError as error:
        raise UserError(
            f'{error}; on a machine without a network, fetch {FILE} from that URL elsewhere and give its place: '
            f'--inception=PATH or {VARIABLE}=PATH'
        ) from None


def load_inception(path: str | os.PathLike) -> InceptionV3:
    """The network with the weights of a state-dict file, in evaluation mode; nothing in the file is run."""
    try:
        weights = torch.load(path, map_location='cpu', weights_only=True)
    except OSError:
        raise
    except Exception as error:  # a damaged file fails in many ways inside torch.load
        raise UserError(f'{path} is not a file of weights: {" ".join(str(error).split())[:120]}') from None
    with torch.device('meta'):
        net = InceptionV3()
    expected = {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()}
    found = {name: tuple(t.shape) for name, t in weights.items()} if isinstance(weights, dict) else {}
    if found != expected:
        wrong = next(name for name in [*expected, *found] if found.get(name) != expected.get(name))
        raise UserError(
            f'{path} does not hold the weights of Inception-v3 in the FID variant: {wrong} is '
            f'{found.get(wrong, "missing")}, expected {expected.get(wrong, "nothing of that name")}'
        )
    net.load_state_dict(weights, assign=True)
    return net.float().eval().requires_grad_(False)
