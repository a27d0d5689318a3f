"""The networks of the golden file, filled as it says, evaluated and trained for three steps, on any device."""

import math

import torch

from networks.denoiser import Denoiser
from tests.helpers import edm2_network
from training.methods.denoising import DenoisingConfig, DenoisingLoss

PIXELS = 2 * 3 * 16 * 16
# Every layer rounds to 8 bits of mantissa (bfloat16: 4e-3) or 11 (float16: 5e-4); errors of some thirty layers add
# up at random. F and F* have gradients ten times those of the others at these weights, and errors likewise.
RELATIVE = {'bf16': 0.05, 'fp16': 0.007}


def golden_net(name: str) -> Denoiser:
    """The golden net with every tensor filled as the golden file's `fill` says."""
    net = Denoiser(edm2_network((16, 16), 3, 4, 32, (1, 2), 1, (8,), 16, block=name))
    with torch.no_grad():
        for tensor_name, t in net.state_dict().items():
            h = sum(map(ord, tensor_name)) % 997
            i = torch.arange(t.numel(), dtype=torch.float64)
            s = torch.sin(h + 0.731 * i + 0.0173 * i**2).reshape(t.shape)
            if t.ndim == 0:
                s = torch.tensor(0.7 + 0.2 * math.sin(h))
            elif tensor_name.endswith('freqs'):
                s = 2 * math.pi * s
            elif tensor_name.endswith('phases'):
                s = math.pi * (1 + s)
            t.copy_(s)
    return net


def golden_inputs(device: torch.device | str = 'cpu') -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Noisy images, noise levels, labels."""
    x = torch.cos(0.37 * torch.arange(PIXELS, dtype=torch.float64)).float().reshape(2, 3, 16, 16)
    labels = torch.nn.functional.one_hot(torch.tensor([1, 3]), 4).float()
    return x.to(device), torch.tensor([0.5, 3.0], device=device), labels.to(device)


@torch.no_grad()
def golden_evaluation(net: Denoiser) -> dict[str, torch.Tensor]:
    """What the golden file has of a network."""
    x, sigma, labels = golden_inputs(net.device)
    D, D_null = net.eval()(x, sigma, labels).cpu(), net(x, sigma).cpu()
    values = {'D_mean': D.mean(), 'D_std': D.std(), 'D_first8': D.flatten()[:8], 'D_last8': D.flatten()[-8:]}
    return values | {'logvar': net.logvar(sigma).cpu(), 'Dnull_mean': D_null.mean(), 'Dnull_std': D_null.std()}


def golden_training(net: Denoiser, optimizer: torch.optim.Optimizer) -> dict:
    """What the golden file has of three steps; the norms of the gradient are of all parameters, by name."""
    x, sigma, labels = golden_inputs(net.device)
    k = torch.arange(PIXELS, dtype=torch.float64).reshape(x.shape)
    y = (0.5 * torch.sin(0.11 * k)).float().to(net.device)
    found = {'loss_mean_per_step': []}
    net.train()
    for j in range(3):
        noise = (math.sqrt(2) * torch.cos(1.3 * k + j)).float().to(net.device)
        _, losses, _ = DenoisingLoss(net, DenoisingConfig())(y, sigma, noise, labels)
        found['loss_mean_per_step'].append(losses.mean().item() / x[0].numel())
        optimizer.zero_grad()
        (losses.sum() / 2).backward()
        if j == 0:
            found['grad_norm_step0'] = {n: p.grad.double().norm().item() for n, p in net.named_parameters()}
            found['total_grad_norm_step0'] = math.hypot(*found['grad_norm_step0'].values())
        optimizer.step()
    with torch.no_grad():
        D = net.eval()(x, sigma, labels).cpu()
    return found | {'D_mean_after': D.mean(), 'D_std_after': D.std(), 'D_first8_after': D.flatten()[:8]}
