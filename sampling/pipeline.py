"""Seeds to images: every image depends on its own seed alone."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence

import torch

from dnnlib.errors import UserError
from networks.config import NetworkConfig
from networks.denoiser import Denoiser
from networks.encoders import Encoder, PixelEncoder
from sampling.config import SamplerConfig
from sampling.guidance import guide, guide_both
from sampling.portions import EAGER, Execution, Portions, evaluating
from sampling.samplers import Denoise, Observe
from torch_utils.threads import one_thread_each

DECODERS = 4  # images that an encoder decodes at once on a CPU; a VAE takes about 1 GiB for one of 512x512
CHUNK = 64  # streams at a time, where nothing but their classes is asked for


@dataclasses.dataclass(frozen=True)
class Samples:
    """What a sampler made, not yet decoded.

    Args:
        seeds: One per image.
        labels: Class of each image, int64 [N] on the CPU; None for an unconditional network.
        x: float32 [N, C, H, W] on the network's device.
    """

    seeds: list[int]
    labels: torch.Tensor | None
    x: torch.Tensor


@dataclasses.dataclass(frozen=True)
class GeneratedImages:
    """Some generated images.

    Args:
        seeds: One per image.
        labels: Class of each image, int64 [N] on the CPU; None for an unconditional network.
        images: uint8 [N, C, H, W] on the CPU.
    """

    seeds: list[int]
    labels: torch.Tensor | None
    images: torch.Tensor


class Streams:
    """The random numbers of some images: a generator each, so that an image depends on its seed alone.

    A seed gives the latent first, then the class, then the noise of every step, in EDM's order. The class is drawn also
    where another one is asked for: noise does not depend on that. (A generator for each image means a call for each.)

    Args:
        seeds: One per image.
        config: Of the network; gives shape and number of classes.
        device: Where they are drawn. A GPU's differ from a CPU's; EDM and EDM2 draw on a GPU.
    """

    def __init__(self, seeds: Sequence[int], config: NetworkConfig, device: torch.device | str = 'cpu'):
        self.device = device
        self.generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
        self.shape = config.image_shape
        self.latents = self.normal()
        self.drawn = torch.zeros(len(seeds), dtype=torch.int64)
        if config.label_dim:
            drawn = [torch.randint(config.label_dim, (1,), generator=g, device=device) for g in self.generators]
            self.drawn = torch.cat(drawn).cpu()

    def normal(self) -> torch.Tensor:
        """Fresh noise, float32 [N, C, H, W]."""
        noise = torch.empty(len(self.generators), *self.shape, device=self.device)
        for row, generator in zip(noise, self.generators, strict=True):
            torch.randn(self.shape, generator=generator, out=row)
        return noise


def sample(
    net: Denoiser,
    seeds: Sequence[int],
    config: SamplerConfig,
    guiding_net: Denoiser | None = None,
    classes: Sequence[int] | None = None,
    batch_size: int = 64,
    execution: Execution = EAGER,
) -> Iterator[Samples]:
    """Sample for one seed after the other, in batches, and leave the decoding to the caller.

    Args:
        net: In evaluation mode; its device is where sampling runs.
        seeds: One per image.
        config: How.
        guiding_net: For `config.guidance` other than 1: an unconditional network (classifier-free guidance), a weaker
            one (autoguidance), or `net` itself, which then guides with its labels dropped.
        classes: Classes to cycle through: seed k gets classes[k mod len(classes)]. None draws each image's class
            from its seed.
        batch_size: Images at a time.
        execution: How networks are evaluated.

    Yields:
        Samples in the order of the seeds.
    """
    config = config.check()
    check_fit(net, guiding_net, config, classes)
    nets = [net] if guiding_net is None else [net, guiding_net]
    with evaluating(nets, min(batch_size, len(seeds)), execution) as portions:
        for start in range(0, len(seeds), batch_size):
            yield _sample_batch(portions, list(seeds[start : start + batch_size]), config, classes)


def generate(
    net: Denoiser,
    seeds: Sequence[int],
    config: SamplerConfig,
    guiding_net: Denoiser | None = None,
    classes: Sequence[int] | None = None,
    batch_size: int = 64,
    encoder: Encoder | None = None,
    execution: Execution = EAGER,
) -> Iterator[GeneratedImages]:
    """Generate one image per seed.

    Args:
        net, seeds, config, guiding_net, classes, batch_size, execution: As for `sample`.
        encoder: Makes images of samples; None is for networks of images (`rgb`).

    Yields:
        Batches in the order of the seeds.
    """
    for samples in sample(net, seeds, config, guiding_net, classes, batch_size, execution):
        yield GeneratedImages(samples.seeds, samples.labels, decode(samples.x, encoder))


def decode(x: torch.Tensor, encoder: Encoder | None = None, threads: int | None = None) -> torch.Tensor:
    """Samples [N, C, H, W] -> uint8 images on the CPU, the same bits whatever the number of threads.

    Args:
        x: Samples.
        encoder: Makes images of them; None for networks of images.
        threads: How many images are decoded at once, DECODERS at most; by default the threads of an operation.
    """
    encoder = encoder or PixelEncoder()
    if x.device.type != 'cpu':
        return encoder.decode(x).cpu()
    with one_thread_each(min(threads or torch.get_num_threads(), DECODERS)) as workers:
        return torch.cat(list(workers.map(encoder.decode, x.split(1))))


def trajectory(
    net: Denoiser,
    seeds: Sequence[int],
    config: SamplerConfig,
    guiding_net: Denoiser | None = None,
    classes: Sequence[int] | None = None,
    encoder: Encoder | None = None,
    execution: Execution = EAGER,
) -> torch.Tensor:
    """The denoised estimate D(x; sigma) at the beginning of every step; that of the last step is the image.

    Args:
        net, seeds, config, guiding_net, classes, encoder, execution: As for `generate`; all seeds are one batch.

    Returns:
        uint8 [steps, N, C, H, W].
    """
    config = config.check()
    check_fit(net, guiding_net, config, classes)
    frames = []
    nets = [net] if guiding_net is None else [net, guiding_net]
    with evaluating(nets, len(seeds), execution) as portions:
        samples = _sample_batch(
            portions, list(seeds), config, classes, lambda i, sigma, D: frames.append(decode(D, encoder))
        )
    return torch.stack([*frames[:-1], decode(samples.x, encoder)])


def count_evaluations(config: SamplerConfig) -> tuple[int, int]:
    """Evaluations per image of the main and of the guiding network, counted on a trajectory of nothing."""
    counts = [0, 0]

    def counted(which: int, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        counts[which] += 1
        return x

    denoise = guide(
        functools.partial(counted, 0), functools.partial(counted, 1), config.guidance, config.guidance_interval
    )
    config.sampler(denoise, torch.zeros(1, 1, 1, 1), config.sigmas(), torch.zeros_like)
    return counts[0], counts[1]


@torch.inference_mode()
def _sample_batch(
    portions: list[Portions],
    seeds: list[int],
    config: SamplerConfig,
    classes: Sequence[int] | None,
    observe: Observe | None = None,
) -> Samples:
    net = portions[0].net
    streams = Streams(seeds, net.config, config.noise_device)
    labels = choose_labels(net.config, seeds, streams, classes)
    one_hot = None if labels is None else torch.nn.functional.one_hot(labels, net.config.label_dim)
    one_hot = None if one_hot is None else one_hot.float().to(net.device)
    sigmas = config.sigmas(net.config.preconditioning)
    x = config.sampler(
        _guided(portions, one_hot, config),
        streams.latents.to(net.device) * sigmas[0].item(),
        sigmas,
        lambda x: streams.normal().to(x),
        observe,
    )
    if not torch.isfinite(x).all():
        raise UserError(f'images of seeds {seeds[0]}... are not finite; with --precision=fp16, try bf16 or fp32')
    return Samples(seeds, labels, x)


def _guided(portions: list[Portions], one_hot: torch.Tensor | None, config: SamplerConfig) -> Denoise:
    """The denoiser of a batch."""
    main, *guides = portions
    denoise = functools.partial(main, labels=one_hot)
    if guides and guides[0].net is main.net:  # one batch of twice the size, without labels in its second half
        labels = torch.cat([one_hot, torch.zeros_like(one_hot)])

        def both(x: torch.Tensor, sigma: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return guides[0](torch.cat([x, x]), sigma, labels).chunk(2)

        denoise = guide_both(denoise, both, config.guidance, config.guidance_interval)
    elif guides:
        weaker = functools.partial(guides[0], labels=one_hot if guides[0].net.config.label_dim else None)
        denoise = guide(denoise, weaker, config.guidance, config.guidance_interval)
    denoise.round = main.net.config.preconditioning.round
    return denoise


def choose_labels(
    config: NetworkConfig,
    seeds: Sequence[int],
    streams: Streams | None,
    classes: Sequence[int] | None,
    device: str = 'cpu',
) -> torch.Tensor | None:
    """Class of each seed, int64 [N]: cycled through `classes`, or drawn; None for an unconditional network.

    Args:
        config: Of the network.
        seeds: One per image.
        streams: Of these seeds, where they have been made already.
        classes: As for `sample`.
        device: Where they are drawn, without streams.
    """
    if not config.label_dim:
        return None
    if classes is None and streams is None:
        # A few at a time: every stream draws its latent before its class, and 50,000 latents are gigabytes.
        parts = [Streams(seeds[i : i + CHUNK], config, device).drawn for i in range(0, len(seeds), CHUNK)]
        return torch.cat([torch.empty(0, dtype=torch.int64), *parts])
    if classes is None:
        return streams.drawn
    return torch.tensor([classes[seed % len(classes)] for seed in seeds])


def check_fit(
    net: Denoiser, guiding_net: Denoiser | None, config: SamplerConfig, classes: Sequence[int] | None
) -> None:
    """Check that the classes exist and that the networks go together."""
    found, label_dim = [], net.config.label_dim
    if config.noise_device == 'cuda' and not torch.cuda.is_available():
        found.append('there is no GPU here to draw noise on; without --noise-device=cuda it is drawn on the CPU')
    if config.guidance != 1 and guiding_net is None:
        found.append('guidance other than 1 needs a guiding network: --gnet=FILE, or --gnet=self to drop the labels')
    if classes is not None and not label_dim:
        found.append('the network is unconditional and takes no class')
    elif classes is not None and not all(0 <= c < label_dim for c in classes):
        wrong = next(c for c in classes if not 0 <= c < label_dim)
        found.append(f'classes must be between 0 and {label_dim - 1}, not {wrong}')
    if guiding_net is net and not label_dim:
        found.append('the network is unconditional: it has no labels to drop, and cannot guide itself')
    elif guiding_net is not None:
        ours, theirs = net.config.image_shape, guiding_net.config.image_shape
        if ours != theirs:
            found.append(f'the guiding network makes images of shape {theirs}, the main network {ours}')
        if guiding_net.config.label_dim not in (0, label_dim):
            found.append(
                f'the guiding network has {guiding_net.config.label_dim} classes, the main network {label_dim}'
            )
    if found:
        raise UserError(found)
