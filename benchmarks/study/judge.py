"""What is measured of a network: its error on held-out digits, and the digits that it draws."""

import dataclasses
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from benchmarks.study.recipes import Scale
from dataset.reader import ImageDataset
from diffusion.levels import LogNormal
from dnnlib.images import image_grid
from evaluation.measure import Evaluator, Generation, MeasureConfig
from metrics.collectors import Sample
from metrics.gathering import gather
from metrics.manifolds import manifold_overlap
from metrics.registry import needs_of, select_metrics
from networks.denoiser import Denoiser
from networks.encoders import PixelEncoder, encode_pixels
from sampling.config import SamplerConfig
from sampling.samplers import DPMpp2M
from torch_utils.random import stream
from training.config import TrainConfig
from training.heldout import Subset, held_out_loss
from training.methods.denoising import DenoisingConfig

CPU = torch.device('cpu')
AT_ONCE = 250  # images
COMMON = DenoisingConfig(LogNormal(-0.4, 1.2))  # noise levels and weights at which all are compared: EDM's weighting


class Classifier(nn.Module):
    """Two convolutions and two layers, for digits of 16x16 pixels; what precedes the last layer are the features."""

    def __init__(self, seed: int = 0):
        super().__init__()
        with torch.random.fork_rng(devices=[]):  # PyTorch's layers draw weights of their own, which do not stay
            self.body = nn.Sequential(
                nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
                nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
                nn.Flatten(), nn.Linear(512, 64), nn.ReLU(),
            )  # fmt: skip
            self.head = nn.Linear(64, 10)
        generator = stream(seed, 'classifier')
        with torch.no_grad():
            for parameter in self.parameters():
                bound = (3 / parameter[0].numel()) ** 0.5 if parameter.ndim > 1 else 0.0
                parameter.uniform_(-bound, bound, generator=generator)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """uint8 [N, 1, 16, 16] -> features [N, 64] and logits [N, 10]."""
        features = self.body(encode_pixels(images))
        return features, self.head(features)


def train_classifier(images: torch.Tensor, labels: torch.Tensor, epochs: int) -> Classifier:
    """The same for the same images, uint8 [N, 1, 16, 16], and classes, int64 [N]."""
    net = Classifier()
    optimizer = torch.optim.Adam(net.parameters(), 2e-3)
    for epoch in range(epochs):
        for chosen in torch.randperm(len(images), generator=stream(epoch, 'classifier')).split(50):
            optimizer.zero_grad()
            functional.cross_entropy(net(images[chosen])[1], labels[chosen]).backward()
            optimizer.step()
    return net.eval().requires_grad_(False)


def read(path: Path) -> tuple[ImageDataset, torch.Tensor, torch.Tensor]:
    """A dataset, with its images uint8 [N, C, H, W] and classes int64 [N]."""
    dataset = ImageDataset(path)
    images, labels = zip(*(dataset[i] for i in range(len(dataset))), strict=True)
    return dataset, torch.stack(images), torch.tensor(labels)


class Judge:
    """Measures networks, all in the same way.

    Args:
        data, held_out: Digits that networks are trained on, and others.
        scale: Of the study.

    Attributes:
        accuracy: Of the classifier on the held-out digits.
    """

    def __init__(self, data: Path, held_out: Path, scale: Scale):
        self.scale = scale
        self.dataset, images, labels = read(data)
        self.held_out, others, truth = read(held_out)
        self.classifier = train_classifier(images, labels, scale.epochs)
        self.accuracy = (self.classifier(others)[1].argmax(dim=1) == truth).double().mean().item()
        self.real = sample_of(self.classifier(images)[0])
        self.evaluator = Evaluator(MeasureConfig(select_metrics(['fd_pixels']), (str(data),), batch=AT_ONCE), CPU)

    def error(self, net: Denoiser, config: TrainConfig) -> dict[str, Any]:
        """Denoising error of held-out digits with EDM's weights, over all noise levels and at each; see `summarize`."""
        part = Subset(self.held_out, torch.arange(len(self.held_out)))
        config = dataclasses.replace(config, method=COMMON, seed=0)  # the same noise for all
        found = held_out_loss(net, part, config, AT_ONCE)
        return {'error': found['mse'], 'by_noise': found['by_noise']}

    def drawn(self, net: Denoiser) -> tuple[dict[str, float], np.ndarray]:
        """Metrics of generated digits, CPU seconds for an image among them, and a picture of two of each class."""
        sampler = SamplerConfig(self.scale.steps, DPMpp2M())
        how = Generation(range(self.scale.samples), sampler, PixelEncoder(), classes=range(10))
        self.evaluator.prepare(how.describe(net.config))
        start = time.process_time()
        batches = list(how.batches(net, AT_ONCE))
        seconds = (time.process_time() - start) / self.scale.samples
        needs = needs_of(self.evaluator.config.metrics)
        gathered = gather(how.describe(net.config), batches, needs, CPU, self.evaluator.detectors)
        (result,) = self.evaluator.results(gathered)
        images = torch.cat([batch.images for batch in batches])
        labels = torch.cat([batch.labels for batch in batches])
        features, logits = self.classifier(images)
        overlap = manifold_overlap(self.real, sample_of(features))
        measured = {
            'fd_pixels': result['metrics']['fd_pixels']['value'],
            'class_agreement': (logits.argmax(dim=1) == labels).double().mean().item(),
            'precision': overlap['precision'],
            'recall': overlap['recall'],
            'sampling_seconds': seconds,
        }
        return measured, image_grid(images[:20].permute(0, 2, 3, 1).numpy(), 20, zoom=2)


def sample_of(features: torch.Tensor) -> Sample:
    """Features [N, F] as metrics take them."""
    return Sample.from_tensors({'features': features, 'count': torch.tensor(len(features))})
