"""Moment matching against closed forms for Gaussian data and linear networks, and students in training and sampling."""

import dataclasses
import functools
import json
import math
from collections import Counter

import pytest
import torch
from torch import nn
from torch._dynamo import config as dynamo_config

from diffusion.logsnr import logsnr_of
from diffusion.posterior import posterior
from diffusion.preconditioning import VP
from diffusion.weightings import Multiscale
from dnnlib.configs import from_json, replaced
from dnnlib.errors import UserError
from networks.config import NetworkConfig
from networks.denoiser import Denoiser
from networks.edm.song import SongConfig
from networks.edm2.magnitude import MPConv
from networks.files import NetworkInfo, load_network, save_network
from sampling.config import SamplerConfig
from tests.helpers import assert_same_tensors, edm2_network, state_tensors
from tests.published_files import write_published
from tests.test_training_survival import assert_same_runs, start, wait_for
from training.config import TrainConfig
from training.cost import memory
from training.inputs import Inputs
from training.methods.moment_matching import HALF_TANGENT, MomentMatching, MomentMatchingConfig, MomentMatchingLoss
from training.monitor.timing import PhaseTimer

S, T, STD = 0.4, 1.1, 0.7  # noise levels of x_s and x_t, standard deviation of the data
R = S**2 / T**2


@pytest.mark.parametrize(('sigma', 'sigma_next'), [(80.0, 3.0), (1.0, 0.5), (0.01, 0.002)])
def test_posterior(sigma, sigma_next):
    """By Gaussian conditioning in the exploding scale, and as DDPM writes it in the preserving one (eq. 7)."""
    x, clean = torch.randn(2, 4, 1, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sigmas = torch.tensor([sigma, sigma_next], dtype=torch.float64)
    mean, variance = posterior(x, clean, *sigmas)
    gain = sigma_next**2 / sigma**2  # x_next = clean + e, x = x_next + e': Cov(x_next, x) / Var(x), given the clean one
    torch.testing.assert_close(mean, clean + gain * (x - clean))
    assert variance.item() == pytest.approx(sigma_next**2 - gain * sigma_next**2, rel=1e-12)
    a2_t, a2_s = (1 / (1 + sigmas**2)).tolist()  # z = alpha x
    beta = 1 - a2_t / a2_s
    z = math.sqrt(a2_s) * beta / (1 - a2_t) * clean + math.sqrt(a2_t / a2_s) * (1 - a2_s) / (1 - a2_t) * (
        math.sqrt(a2_t) * x
    )
    torch.testing.assert_close(math.sqrt(a2_s) * mean, z)
    assert a2_s * variance.item() == pytest.approx((1 - a2_s) / (1 - a2_t) * beta, rel=1e-9)
    assert posterior(x, clean, sigma, 0.0)[1] == 0 and torch.equal(posterior(x, clean, sigma, 0.0)[0], clean)


class Linear(nn.Module):
    """D(x; sigma) = slope x."""

    def __init__(self, slope: float):
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(slope, dtype=torch.float64))

    def forward(self, x, sigma, labels=None):
        return self.slope * x


class Gaussian:
    """Data N(0, STD^2), a student x~ = a x_t, and numbers with exactly the second moments of the distribution."""

    def __init__(self, a: float, auxiliary: float = 0.0):
        normal = torch.randn(64, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        whitened = 8 * torch.linalg.qr(normal).Q  # [64, 3], of unit variance and uncorrelated
        self.y, self.noise, self.noise_s = whitened.t().reshape(3, 64, 1, 1, 1)
        self.teacher, self.student, self.auxiliary = Linear(STD**2 / (STD**2 + S**2)), Linear(a), Linear(auxiliary)
        self.config = MomentMatchingConfig(levels=HALF_TANGENT)

    def gradient(self, name: str) -> float:
        """Of a network's expected loss by its slope; the other networks get none."""
        networks = (self.student, self.auxiliary, self.teacher)
        for net in networks:
            net.slope.grad = None
        trained = getattr(self, name)
        sigma_t, sigma_s = (torch.full((64,), sigma, dtype=torch.float64) for sigma in (T, S))
        loss = MomentMatchingLoss(trained, networks, self.config)
        _, losses, _ = loss(STD * self.y, sigma_t, sigma_s, self.noise, self.noise_s, None)
        losses.mean().backward()
        assert all(net.slope.grad is None for net in networks if net is not trained)
        return trained.slope.grad.item()

    def moments(self) -> tuple[float, float, float, float]:
        """Cov(x~, x_s), Var(x_s), Cov(x_t, x_s) and w(s)."""
        a, variance = self.student.slope.item(), STD**2 + T**2
        m = R + (1 - R) * a  # x_s = m x_t + noise
        return a * m * variance, m**2 * variance + S**2 * (1 - R), m * variance, (S**2 + 0.25) / (0.5 * S) ** 2

    def optimum(self) -> float:
        """Slope of (E[x~ | x_s] + teacher) / 2."""
        covariance, variance, _, _ = self.moments()
        return (covariance / variance + self.teacher.slope.item()) / 2


@pytest.mark.parametrize('a', [-0.5, 0.2, 0.6, 1.5])
def test_auxiliary_converges_to_half_of_both(a):
    case = Gaussian(a)
    _, variance, _, weight = case.moments()
    for _ in range(40):  # the loss is 2 w Var(x_s) (slope - optimum)^2 and a constant: every step halves the distance
        case.auxiliary.slope.data -= case.gradient('auxiliary') / (8 * weight * variance)
    assert case.auxiliary.slope.item() == pytest.approx(case.optimum(), abs=1e-11)
    assert case.gradient('auxiliary') == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize('a', [-0.5, 0.2, 0.6, 1.5])
def test_gradient_at_the_optimum_is_that_of_moment_matching(a):
    """d/da of w E[x~ (E[x~ | x_s] - D(x_s))] / 2 through x~ alone: w / 2 (slope of E[x~ | x_s] - of D) E[x_t x_s]."""
    case = Gaussian(a)
    case.auxiliary.slope.data.fill_(case.optimum())
    covariance, variance, of_input, weight = case.moments()
    expected = weight / 2 * (covariance / variance - case.teacher.slope.item()) * of_input
    assert case.gradient('student') == pytest.approx(expected, rel=1e-10)


def test_turns_converge_to_equal_moments():
    case = Gaussian(0.1)
    for _ in range(300):
        for name in ('auxiliary', 'student'):
            getattr(case, name).slope.data -= 0.02 * case.gradient(name)
    covariance, variance, _, _ = case.moments()
    assert covariance / variance == pytest.approx(case.teacher.slope.item(), rel=1e-6)


def test_differences_are_what_is_reported():
    case = Gaussian(0.2, auxiliary=0.9)
    for trained in (case.student, case.auxiliary):
        loss = MomentMatchingLoss(trained, (case.student, case.auxiliary, case.teacher), case.config)
        t, s = torch.full((64,), T, dtype=torch.float64), torch.full((64,), S, dtype=torch.float64)
        levels, _, errors = loss(STD * case.y, t, s, case.noise, case.noise_s, None)
        _, variance, _, weight = case.moments()
        assert torch.equal(levels, s) and not errors.requires_grad
        expected = weight * (0.9 - case.teacher.slope.item()) ** 2 * variance
        assert errors.mean().item() == pytest.approx(expected, rel=1e-10)


def test_guidance_of_the_teacher():
    class Labelled(nn.Module):
        def forward(self, x, sigma, labels=None):
            return x if labels is None else 3 * x

    config = MomentMatchingConfig(guidance=2.5, guidance_interval=(0.1, 1.0))
    loss = MomentMatchingLoss(nn.Identity(), (nn.Identity(), nn.Identity(), Labelled()), config)
    x, sigma = torch.ones(4, 1, 1, 1), torch.tensor([0.1, 0.5, 1.0, 2.0])
    assert loss.teach(x, sigma, torch.ones(4, 1)).flatten().tolist() == [3, 6, 6, 3]  # 1 + 2.5 (3 - 1) inside


@pytest.fixture
def student(config, trained_once) -> TrainConfig:
    """A run that distills what `config` has trained, with its dropout, into 4 steps."""
    method = MomentMatchingConfig(str(trained_once / 'network-snapshot-0000002-0.050.safetensors'), steps=4)
    optimizer = dataclasses.replace(config.optimizer, lr=1e-3)
    config = dataclasses.replace(config, method=method, optimizer=optimizer, batch=128, status=128)
    return method.resolved(config, False)


def test_everything_begins_as_the_teacher(student):
    """With dropout: the masks of teacher and auxiliary are the same, so that nothing pushes the student yet."""
    method = MomentMatching(student, torch.device('cpu'))
    teacher = method.teacher.state_dict()
    for net in method.networks.values():
        weights = net.state_dict()
        assert all(torch.equal(weights[name], teacher[name]) for name in weights)
        assert net.config.uncertainty == 0 and all(p.requires_grad for p in net.parameters())
    y = torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    inputs = Inputs(y, torch.eye(10)[:8], None, list(range(8)))
    for update in method.updates.values():
        _, losses, errors = update.plain(*method.draw(inputs, 0))
        assert losses.abs().max() > 0 or update.plain.net is method.networks['net']
        assert errors.max() < 1e-6  # weights are normalized once more in training
    moved = [p for p in method.networks['auxiliary'].parameters() if p.ndim > 1][-1]
    moved.data.mul_(-1)
    assert update.plain(*method.draw(inputs, 0))[2].min() > 1e-6


def test_times_of_a_step(student):
    method, numbers = MomentMatching(student, torch.device('cpu')), list(range(2000))
    inputs = Inputs(torch.zeros(2000, 1, 8, 8), None, None, numbers)
    _, sigma_t, sigma_s, noise, noise_s, _, _ = method.draw(inputs, 0)
    s, t = (student.method.schedule.inverse(logsnr_of(sigma.double())) for sigma in (sigma_s, sigma_t))
    sorted_s, steps = s.sort().values, (t - s)[s < 0.75] * 4
    uniform = (torch.arange(2000) + 0.5) / 2000
    assert (sorted_s - uniform).abs().max() < 0.04  # Kolmogorov's 99.7 % quantile is 1.8 / sqrt(2000)
    assert (steps.sort().values - (torch.arange(len(steps)) + 0.5) / len(steps)).abs().max() < 0.05
    assert t.max() <= 1 and (t >= s).all() and (t[s > 0.75] == 1).any()
    assert abs((noise * noise_s).mean()) < 0.015 and abs((noise_s**2).mean() - 1) < 0.015  # 128,000 numbers
    some = method.draw(Inputs(inputs.y[5:8], None, None, numbers[5:8]), 0)
    assert all(torch.equal(a, b[5:8]) for a, b in zip(some[1:5], (sigma_t, sigma_s, noise, noise_s), strict=True))


def test_resolved(student, config, trained_once, tmp_path):
    method, network = student.method, config.network
    assert student.network == dataclasses.replace(network, uncertainty=0)
    assert method.schedule == method.levels == HALF_TANGENT and len(method.sha256) == 64
    sigmas = student.sampler.sigmas()
    expected = HALF_TANGENT.logsnr(torch.tensor([1.0, 0.75, 0.5, 0.25])).div(-2).exp()
    torch.testing.assert_close(sigmas, torch.cat([expected, torch.zeros(1)]).double())
    assert student.sampler.distilled and student.check() == student
    assert from_json(TrainConfig, student.to_json()) == student
    with pytest.raises(UserError, match='needs the network file of a teacher'):
        MomentMatchingConfig().resolved(config, False)
    other = replaced(config, {'network.label_dim': 3, 'init': 'x', 'encoder': 'stabilityvae'})
    with pytest.raises(UserError) as error:
        MomentMatchingConfig(method.teacher).resolved(other, False)
    assert len(error.value.problems) == 3
    wrong = MomentMatchingConfig(weighting=Multiscale(), steps=0, guidance=2.0)
    assert len(wrong.problems(dataclasses.replace(network, label_dim=0))) == 3


def test_plan_counts_three_networks(student):
    name = 'parameters, gradients, optimizer, EMAs'
    numbers = memory(replaced(student, {'method': 'denoising'}), 1)[name] // (4 + 2)  # and two averages
    assert memory(student, 1)[name] == numbers * (2 * 4 + 1 + 2)
    assert memory(student, 2)[name] == numbers * (2 * 5 + 1 + 2)
    assert memory(student, 1)['activations'] == memory(replaced(student, {'method': 'denoising'}), 1)['activations']


def test_resumed_run_is_bit_exact(student, run, tmp_path):
    """Stopped after an odd number of steps: the turn goes on where it was."""
    config = dataclasses.replace(student, duration=1024)
    whole = state_tensors(run('whole', config))
    for part in (384, 384, 256):
        run('parts', dataclasses.replace(config, slice=part))
    assert_same_tensors(whole, state_tensors(tmp_path / 'parts'))
    for name in ('net', 'auxiliary'):
        assert whole[f'optimizer/{name}/unet.out_conv.weight/step'] == 4
    assert not torch.equal(whole['net/unet.out_conv.weight'], whole['auxiliary/unet.out_conv.weight'])
    with pytest.raises(UserError, match=r'method\.steps is 8, was 4'):
        run('parts', replaced(config, {'method.steps': 8}))
    net, info = load_network(tmp_path / 'whole/network-snapshot-0000001-0.050.safetensors')
    assert net.config == student.network and SamplerConfig.from_json(info.sampler) == student.sampler


def test_both_networks_are_settled_once_a_step(student, monkeypatch):
    """Not by every micro-batch, and not inside a compiler's graph."""
    forced, settle = Counter(), MPConv.settle
    monkeypatch.setattr(MPConv, 'settle', lambda layer: forced.update([layer]) or settle(layer))
    device = torch.device('cpu')
    method = MomentMatching(dataclasses.replace(student, batch=4, micro_batch=2), device)
    parts = [Inputs(torch.zeros(2, 1, 8, 8), torch.eye(10)[:2], None, [2 * i, 2 * i + 1]) for i in range(2)]
    for step in range(2):
        method.step(iter(parts), 4 * step, PhaseTimer(device))
    layers = [layer for net in method.networks.values() for layer in net.modules() if isinstance(layer, MPConv)]
    assert len(layers) > 20 and all(forced.pop(layer) == 2 for layer in layers) and not forced


@pytest.mark.slow
def test_compiled_as_one_graph(student, monkeypatch):
    """In two turns of both, each in one graph that serves later steps, the same weights as without."""
    monkeypatch.setattr(torch, 'compile', functools.partial(torch.compile, fullgraph=True, backend='aot_eager'))
    y = torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    device, found = torch.device('cpu'), []
    for compiled in (True, False):
        torch.compiler.reset()
        method = MomentMatching(dataclasses.replace(student, batch=8, compile=compiled), device)
        for step in range(6):
            inputs = Inputs(y, torch.eye(10)[:8], None, list(range(8 * step, 8 * step + 8)))
            with dynamo_config.patch(error_on_recompile=step > 3):
                method.step(iter([inputs]), 8 * step, PhaseTimer(device))
        found.append({name: net.state_dict() for name, net in method.networks.items()})
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_killed_and_resumed(config, trained_once, tmp_path):
    teacher = trained_once / 'network-snapshot-0000002-0.050.safetensors'
    arguments = [
        *('--preset=edm2plus-digits-distilled', f'--teacher={teacher}', f'--data={config.data}', '--duration=2Ki'),
        *('--batch=128', '--checkpoint=1Ki', '--status=128', '--preview=2Ki', '--snapshot=2Ki'),
    ]
    process = start(arguments, tmp_path / 'whole')
    assert process.communicate()[0] and process.returncode == 0
    process = start(arguments, tmp_path / 'killed')
    wait_for(process, r'^ +1[3-9]\d\d images')
    process.kill()
    process.communicate()
    process = start(arguments, tmp_path / 'killed')
    assert 'at 1024 images' in wait_for(process, 'resumed from')
    process.communicate()
    assert_same_runs(tmp_path / 'whole', tmp_path / 'killed')


@pytest.mark.slow
def test_commands(config, trained_once, run_script, tmp_path):
    """Train on one rank and on two, reconstruct an EMA, generate as the file says, and with a warning otherwise."""
    teacher = trained_once / 'network-snapshot-0000002-0.050.safetensors'
    arguments = [
        *('--preset=edm2plus-digits', '--method=moment-matching', f'--teacher={teacher}', '--steps-student=2'),
        *(f'--data={config.data}', '--batch=128', '--rampup=1024', '--lr=1e-3', '--set=optimizer.eps=1e-3'),
        *(f'--{name}=1024' for name in ('duration', 'status', 'checkpoint', 'preview', 'snapshot')),
    ]
    for name, ranks, more in (('one', 0, []), ('two', 2, ['--batch-gpu=32'])):
        done = run_script('train.py', *arguments, *more, f'--outdir={name}', ranks=ranks)
        assert done.returncode == 0, done.stderr
    one, two = (state_tensors(tmp_path / name) for name in ('one', 'two'))
    for name in (name for name in one if name.startswith(('net/', 'auxiliary/'))):
        torch.testing.assert_close(two[name], one[name], rtol=1e-4, atol=2e-5)
    done = run_script('reconstruct_phema.py', '--indir=one', '--outstd=0.08')
    assert done.returncode == 0, done.stderr
    net = 'one/phema-0000001-0.080.safetensors'
    done = run_script('generate.py', f'--net={net}', '--seeds=0-1', '--outdir=images')
    assert done.returncode == 0 and 'evaluations for each: 2' in done.stdout and 'warning' not in done.stderr
    record = json.loads((tmp_path / 'images/generation.json').read_text())
    assert record['sampler']['sampler'] == {'name': 'ancestral', 'variance': 0.0, 'clip': 0.0}
    assert (tmp_path / 'one/samples-0000001.png').exists()
    done = run_script('generate.py', f'--net={net}', '--seeds=0-1', '--steps=3', '--outdir=more')
    assert done.returncode == 0 and 'warning: the network was distilled for 2 steps' in done.stderr


@pytest.mark.parametrize('kind', ['published', 'edm'])
def test_teachers_of_other_families(kind, config, tmp_path):
    """A published pickle with an uncertainty head, and a network of EDM with a range of noise and augmentation."""
    if kind == 'published':
        net = Denoiser(edm2_network((8, 8), 1, 10, 16, (1, 2), 1, (4,), 16, block='A'))
        path = write_published(tmp_path / 'net.pkl', net, torch.float32)
    else:
        song = SongConfig(model_channels=16, channel_mult=(1, 2), num_blocks=1, attn_resolutions=(4,), dropout=0.1)
        net = Denoiser(NetworkConfig((8, 8), 1, 10, song, VP(), augment_dim=9))
        path = tmp_path / 'net.safetensors'
        save_network(path, net.state_dict(), NetworkInfo(net.config, 1000, None, 'edm'))
    config = MomentMatchingConfig(str(path)).resolved(config, False).check()
    sigmas = config.sampler.sigmas(config.network.preconditioning)
    assert torch.equal(sigmas, config.sampler.sigmas()) and len(sigmas) == 9
    assert sigmas[0] == pytest.approx(min(80.0, config.network.preconditioning.sigma_max))
    method = MomentMatching(config, torch.device('cpu'))
    student = method.networks['net'].eval()
    x, sigma, labels = torch.ones(2, 1, 8, 8), torch.tensor([0.5, 2.0]), torch.eye(10)[:2]
    torch.testing.assert_close(student(x, sigma, labels), net.eval()(x, sigma, labels))
    inputs = Inputs(x, labels, None, [0, 1])
    assert all(update.plain(*method.draw(inputs, 0))[1].isfinite().all() for update in method.updates.values())
