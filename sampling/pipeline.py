"""Seeds to images: every image depends on its own seed alone."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from diffusion.noise import edm_sigmas
from dnnlib.errors import UserError
from networks.denoiser import Denoiser
from networks.encoders import decode_pixels
from sampling.guidance import guide
from sampling.samplers import Churn, heun


@dataclasses.dataclass(frozen=True)
class SamplerConfig:
    """How images are generated; the defaults are EDM2's (EDM2 table 6).

    Args:
        steps: N, number of noise levels above 0.
        sigma_min, sigma_max, rho: Spacing of the noise levels (EDM eq. 5).
        guidance: Weight of the main network against the guiding one; 1 is no guidance.
        churn: Stochasticity (EDM algorithm 2).
    """

    steps: int = 32
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0
    guidance: float = 1.0
    churn: Churn = dataclasses.field(default_factory=Churn)

    def to_json(self) -> dict[str, Any]:
        """As plain values, for the record beside the images; an infinite bound becomes None."""
        values = dataclasses.asdict(self)
        values['churn'] = {name: v if math.isfinite(v) else None for name, v in values['churn'].items()}
        return values

    def check(self) -> 'SamplerConfig':
        """Return self.

        Raises:
            UserError: with all problems, if there are any.
        """
        found = [
            f'{name} must be a finite number, not {getattr(self, name)}'
            for name in ('sigma_min', 'sigma_max', 'rho', 'guidance')
            if not math.isfinite(getattr(self, name))
        ]
        if self.steps < 1:
            found.append(f'steps must be at least 1, not {self.steps}')
        if not 0 < self.sigma_min < self.sigma_max:
            found.append(f'0 < sigma_min < sigma_max is needed, not {self.sigma_min} and {self.sigma_max}')
        if self.rho <= 0:
            found.append(f'rho must be positive, not {self.rho}')
        if found:
            raise UserError(found)
        return self


@dataclasses.dataclass(frozen=True)
class Batch:
    """Some generated images.

    Args:
        seeds: One per image.
        labels: Class of each image, int64 [N] on the CPU; None for an unconditional network.
        images: uint8 [N, C, H, W] on the CPU.
    """

    seeds: list[int]
    labels: torch.Tensor | None
    images: torch.Tensor


def generate(
    net: Denoiser,
    seeds: Sequence[int],
    config: SamplerConfig,
    guiding_net: Denoiser | None = None,
    classes: Sequence[int] | None = None,
    batch_size: int = 64,
) -> Iterator[Batch]:
    """Generate one image per seed.

    A seed's generator gives the latent first, then the label, then the churn noise, so that an image does not
    depend on the others of its batch.

    Args:
        net: In evaluation mode; its device is where sampling runs.
        seeds: One per image.
        config: How.
        guiding_net: For `config.guidance` other than 1.
        classes: Classes to cycle through: seed k gets classes[k mod len(classes)]. None draws each image's class
            from its seed.
        batch_size: Images at a time.

    Yields:
        Batches in the order of the seeds.
    """
    config = config.check()
    check_fit(net, guiding_net, config, classes)
    sigmas = edm_sigmas(config.steps, config.sigma_min, config.sigma_max, config.rho)
    for start in range(0, len(seeds), batch_size):
        chosen = list(seeds[start : start + batch_size])
        streams = [torch.Generator().manual_seed(seed) for seed in chosen]
        yield _generate_batch(net, guiding_net, chosen, streams, sigmas, config, classes)


@torch.inference_mode()
def _generate_batch(net, guiding_net, seeds, streams, sigmas, config, classes) -> Batch:
    device = net.device
    shape = (net.config.img_channels, *net.config.img_resolution)
    latents = torch.stack([torch.randn(shape, generator=stream) for stream in streams]).to(device)
    labels = _labels(net.config.label_dim, seeds, streams, classes)
    one_hot = None if labels is None else torch.nn.functional.one_hot(labels, net.config.label_dim).float().to(device)

    def denoise(x, sigma):
        return net(x, sigma, one_hot)

    if guiding_net is not None:
        guiding_labels = one_hot if guiding_net.config.label_dim else None
        denoise = guide(denoise, lambda x, sigma: guiding_net(x, sigma, guiding_labels), config.guidance)

    def noise(x):
        return torch.stack([torch.randn(shape, generator=stream) for stream in streams]).to(x)

    x = heun(denoise, latents * config.sigma_max, sigmas, noise, config.churn)
    return Batch(seeds, labels, decode_pixels(x).cpu())


def _labels(label_dim: int, seeds, streams, classes: Sequence[int] | None) -> torch.Tensor | None:
    if not label_dim:
        return None
    if classes is None:
        return torch.cat([torch.randint(label_dim, (1,), generator=stream) for stream in streams])
    return torch.tensor([classes[seed % len(classes)] for seed in seeds])


def check_fit(
    net: Denoiser, guiding_net: Denoiser | None, config: SamplerConfig, classes: Sequence[int] | None
) -> None:
    """Check that the classes exist and that the networks go together.

    Raises:
        UserError: with all problems, if there are any.
    """
    found, label_dim = [], net.config.label_dim
    if config.guidance != 1 and guiding_net is None:
        found.append('guidance other than 1 needs a guiding network: --gnet=FILE')
    if classes is not None and not label_dim:
        found.append('the network is unconditional and takes no class')
    elif classes is not None and not all(0 <= c < label_dim for c in classes):
        found.append(f'classes must be between 0 and {label_dim - 1}, not {max(classes)}')
    if guiding_net is not None:
        ours, theirs = ((c.img_channels, *c.img_resolution) for c in (net.config, guiding_net.config))
        if ours != theirs:
            found.append(f'the guiding network makes images of shape {theirs}, the main network {ours}')
        if guiding_net.config.label_dim not in (0, label_dim):
            found.append(
                f'the guiding network has {guiding_net.config.label_dim} classes, the main network {label_dim}'
            )
    if found:
        raise UserError(found)
