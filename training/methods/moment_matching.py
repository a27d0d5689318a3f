"""Distilling a denoiser into a few-step generator by matching moments (Salimans et al. 2024, algorithm 2).

The student g(x_t; t) makes a clean image x~ of a noisy one, and its posterior a less noisy x_s. What the student makes
shall have the conditional mean that real images have: E[x~ | x_s] = D(x_s), the teacher's. An auxiliary network
learns half of what the mean is, and the difference to the teacher pushes the student.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from diffusion.levels import LEVELS
from diffusion.logsnr import Cosine, logsnr_of, sigma_of
from diffusion.posterior import posterior
from diffusion.weightings import EDM, WEIGHTINGS, Weighting
from dnnlib.configs import tagged
from dnnlib.download import file_sha256, local_file
from dnnlib.errors import UserError
from networks.config import NetworkConfig
from networks.denoiser import Denoiser
from networks.dropout import Dropout, seed_dropout
from networks.files import NetworkInfo, load_network, read_info
from networks.folding import settled
from sampling.config import SamplerConfig, known_range
from sampling.samplers import Ancestral
from training.inputs import Inputs, normal_draws, training_draws
from training.monitor.step_stats import StepStats
from training.monitor.timing import PhaseTimer
from training.update import Update

HALF_TANGENT = Cosine(1, 2, 2, 0.002, 80.0)  # sigma(t) = tan(A t + B) / 2: for images of standard deviation 1/2
STUDENT_SAMPLER = Ancestral(variance=0.0, clip=0.0)  # each step draws from the posterior at x~


@dataclasses.dataclass(frozen=True)
class MomentMatchingConfig:
    """A student of `steps` sampling steps; it and the auxiliary network begin as the teacher.

    Args:
        teacher: Its network file, path or URL.
        sha256: Of that file.
        steps: k, uniform in the time of the schedule.
        schedule: sigma(t); None for the teacher's own, or sigma = tan(A t + B) / 2 where that has none.
        levels: How the noise levels of x_s are drawn; None for uniform times.
        weighting: w of the moments at noise level s, one that weights whole images.
        guidance: Weight of the teacher against itself with its labels dropped; 1 is no guidance.
        guidance_interval: Noise levels (low, high] at which there is guidance.
    """

    teacher: str = ''
    sha256: str = ''
    steps: int = 8
    schedule: Any = tagged({'cosine': Cosine}, default=None)
    levels: Any = tagged(LEVELS, default=None)
    weighting: Any = tagged(WEIGHTINGS, default=EDM())
    guidance: float = 1.0
    guidance_interval: tuple[float, float] = (0.0, math.inf)

    trained, frozen = 2, 1

    def build(self, config: Any, device: torch.device) -> 'MomentMatching':
        """The method for a run, a `TrainConfig` that `resolved` has completed."""
        return MomentMatching(config, device)

    def problems(self, network: NetworkConfig) -> list[str]:
        """Everything that is wrong with it, in words."""
        parts = (self.schedule, self.levels, self.weighting)
        found = [line for part in parts if part is not None for line in part.problems()]
        if type(self.weighting).weight is Weighting.weight:
            found.append('moment matching needs a weighting of whole images, such as edm or sigmoid')
        if self.guidance != 1 and not network.label_dim:
            found.append('the teacher is unconditional: it has no labels to drop, and cannot guide itself')
        sampler = SamplerConfig(self.steps, guidance=self.guidance, guidance_interval=self.guidance_interval)
        return [*found, *sampler.problems()]

    def resolved(self, config: Any, offline: bool) -> Any:
        """A run with all that the teacher's file decides: network, schedule and how the student is sampled."""
        if not self.teacher:
            raise UserError('moment matching needs the network file of a teacher: --teacher=FILE')
        info = read_info(self.teacher, offline)
        if found := _misfits(info, config):
            raise UserError(found, where=self.teacher)
        network = dataclasses.replace(info.config, uncertainty=0, augment_dim=0)
        own = SamplerConfig.from_json(info.sampler).disc
        schedule = self.schedule or (own if isinstance(own, Cosine) else HALF_TANGENT)
        schedule = known_range(schedule, network.preconditioning)
        sha256 = file_sha256(local_file(self.teacher, offline))
        method = dataclasses.replace(self, sha256=sha256, schedule=schedule, levels=self.levels or schedule)
        sampler = SamplerConfig(self.steps, STUDENT_SAMPLER, schedule, distilled=True)
        return dataclasses.replace(config, network=network, encoder=info.encoder, method=method, sampler=sampler)


def _misfits(info: NetworkInfo, config: Any) -> list[str]:
    """Why a run cannot have this teacher."""
    found = ['a student begins with the weights of its teacher, not of --init'] if config.init else []
    pairs = {
        'images of shape': (info.config.image_shape, config.network.image_shape),
        'classes:': (info.config.label_dim, config.network.label_dim),
        'encoder': (info.encoder, config.encoder),
    }
    if config.data:
        found += [f'the teacher has {what} {a}, the data have {b}' for what, (a, b) in pairs.items() if a != b]
    return found


class MomentMatching:
    """The auxiliary network trains in even steps, the student in odd ones.

    Args:
        config: Of the run, a `TrainConfig`.
        device: Where it trains.

    Attributes:
        networks, optimizers: By name, see `training.methods.table`.
    """

    def __init__(self, config: Any, device: torch.device):
        self.config, method = config, config.method
        self.teacher, _ = load_network(method.teacher, device, config.precision)
        weights = self.teacher.state_dict()
        self.networks = {name: Denoiser(config.network, config.seed, config.precision) for name in ('net', 'auxiliary')}
        for net in self.networks.values():
            net.load_state_dict({name: weights[name] for name in net.state_dict()})
            net.train().to(device)
        for layer in self.teacher.modules():  # the auxiliary's masks, so that the two differ in what was learned alone
            layer.training = isinstance(layer, Dropout)
        self.optimizers = {name: config.optimizer.build(net) for name, net in self.networks.items()}
        counted = [p for net in self.networks.values() for p in net.parameters()]
        self.all = (*self.networks.values(), self.teacher)
        self.updates = {
            name: Update(MomentMatchingLoss(net, self.all, method), self.optimizers[name], config, counted)
            for name, net in self.networks.items()
        }

    def step(self, batches: Iterator[Inputs], nimg: int, timer: PhaseTimer) -> StepStats:
        """Train one of the two, see `training.methods.table`."""
        trained, other = (('auxiliary', 'net'), ('net', 'auxiliary'))[nimg // self.config.batch % 2]
        with settled(self.networks[other]):  # as `Update` does with the one that is trained
            return self.updates[trained]((self.draw(inputs, nimg) for inputs in batches), nimg, timer)

    def draw(self, inputs: Inputs, nimg: int) -> tuple:
        """Arguments of `MomentMatchingLoss`: times s and t, and the noise of x_t and of x_s, of each image."""
        method, device = self.config.method, inputs.y.device
        seed, numbers, shape = self.config.seed, inputs.numbers, tuple(inputs.y.shape[1:])
        sigma, noise = training_draws(seed, numbers, shape, method.levels, device)
        z, noise_s = normal_draws(seed, 'posterior', numbers, shape, device)
        s = method.schedule.inverse(logsnr_of(sigma))
        t = (s + torch.special.ndtr(z) / method.steps).clamp(max=1)
        sigma_s, sigma_t = (sigma_of(method.schedule.logsnr(time)).float() for time in (s, t))
        for net in self.all:
            seed_dropout(net, seed, numbers)
        return inputs.y, sigma_t, sigma_s, noise, noise_s, inputs.labels, nimg


class MomentMatchingLoss(nn.Module):
    """Loss of every image, of whichever of the two networks is trained; a module as `DenoisingLoss` is one.

    With x~ the student's image of x_t, x_s drawn from its posterior, g the auxiliary and D the teacher:

        auxiliary  w(s) (||x~ - g(x_s)||^2 + ||D(x_s) - g(x_s)||^2), whose optimum is g = (E[x~ | x_s] + D) / 2
        student    w(s) x~ . (g(x_s) - D(x_s)), with a gradient through x~ alone

    Args:
        net: The network that is trained: the student or the auxiliary.
        networks: Student, auxiliary and teacher.
        config: Gives weighting and guidance.
    """

    def __init__(self, net: nn.Module, networks: tuple[nn.Module, nn.Module, nn.Module], config: MomentMatchingConfig):
        super().__init__()
        self.net, self.config = net, config
        self.networks = networks  # a tuple's modules are not this one's: only `net` is trained

    def forward(
        self,
        y: torch.Tensor,
        sigma_t: torch.Tensor,
        sigma_s: torch.Tensor,
        noise: torch.Tensor,
        noise_s: torch.Tensor,
        labels: torch.Tensor | None,
        nimg: int = 0,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Noise levels s, losses, and weighted squared differences of auxiliary and teacher.

        Args:
            y: float32 [N, C, H, W], clean images.
            sigma_t, sigma_s: float32 [N], the first at least as large.
            noise, noise_s: [N, C, H, W], standard normal.
            labels: float [N, label_dim] or None.
            nimg: Images trained on so far.

        Returns:
            float32 [N] three times. The student's loss is no measure of progress; the differences are, which at the
            auxiliary's optimum are w(s) ||E[x~ | x_s] - D||^2 / 4.
        """
        student, auxiliary, _ = self.networks
        trains_student = self.net is student
        t, s = sigma_t[:, None, None, None], sigma_s[:, None, None, None]
        x_t = y + t * noise
        with torch.set_grad_enabled(trains_student):
            made = student(x_t, sigma_t, labels)
        mean, variance = posterior(x_t, made, t, s)
        x_s = mean + variance.sqrt() * noise_s
        with torch.set_grad_enabled(not trains_student):
            estimate = auxiliary(x_s, sigma_s, labels)
        target = self.teach(x_s, sigma_s, labels)
        weight = self.config.weighting.weight(sigma_s, self.config.levels, nimg)
        difference = estimate - target
        if trains_student:
            losses = weight * (made * difference).flatten(1).sum(dim=1)
        else:
            losses = weight * ((made - estimate).square() + difference.square()).flatten(1).sum(dim=1)
        return sigma_s, losses, weight * difference.detach().square().flatten(1).sum(dim=1)

    @torch.no_grad()
    def teach(self, x: torch.Tensor, sigma: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
        """The teacher's D(x; sigma), guided where the config says so: [N, C, H, W], sigma [N] -> [N, C, H, W]."""
        teacher, (low, high) = self.networks[2], self.config.guidance_interval
        D = teacher(x, sigma, labels)
        if self.config.guidance == 1:
            return D
        weaker = teacher(x, sigma)
        inside = ((sigma > low) & (sigma <= high))[:, None, None, None]
        return torch.where(inside, weaker + self.config.guidance * (D - weaker), D)
