"""Samplers on problems with known solutions; the pipeline's promises."""

import itertools
import math

import pytest
import torch

from diffusion.noise import edm_sigmas
from dnnlib.errors import UserError
from networks.config import NetworkConfig
from networks.denoiser import Denoiser
from networks.encoders import decode_pixels
from sampling.guidance import guide
from sampling.pipeline import SamplerConfig, generate
from sampling.samplers import Churn, heun

ONE = torch.ones(1, 1, 1, 1, dtype=torch.float64)


def gaussian(variance: float):
    """The exact denoiser of data ~ N(0, variance)."""
    return lambda x, sigma: x * variance / (sigma**2 + variance)


def test_golden_values(golden):
    for case in golden['sampler']:
        spacing = {name: case[name] for name in ('sigma_min', 'sigma_max', 'rho') if name in case}
        churn = Churn(**{name: value for name, value in case.items() if name.startswith('S_')})
        sigmas = edm_sigmas(case['num_steps'], **spacing)
        denoise = guide(gaussian(0.25), gaussian(0.36), case.get('guidance', 1))
        x = heun(denoise, ONE * sigmas[0], sigmas, torch.ones_like, churn)
        assert x.item() == pytest.approx(case['x'], rel=1e-12), case


def test_published_churn_values():
    for churn, expected in (
        (Churn(40, 0.05, 50, 1.003), 1.6933846062),
        (Churn(30, 0.01, 1, 1.007), 1.1013733986),
        (Churn(4), 1.9151586171),
    ):
        sigmas = edm_sigmas(18)
        x = heun(gaussian(0.25), ONE * sigmas[0], sigmas, torch.ones_like, churn)
        assert x.item() == pytest.approx(expected, abs=1e-9)


def test_heun_is_of_second_order():
    # Exact solution of the probability flow ODE for N(0, 1/4): x scales with sqrt(sigma^2 + 1/4).
    # (The last step is Euler's; the error of one step is of second order too.)
    exact = math.sqrt(0.25 / (10**2 + 0.25))
    errors = []
    for steps in (160, 320, 640):
        sigmas = torch.linspace(10, 0, steps + 1, dtype=torch.float64)
        errors.append(abs(heun(gaussian(0.25), ONE, sigmas).item() - exact))
    slopes = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert slopes == pytest.approx([2, 2], abs=0.1)


def test_one_step_is_the_denoised_image():
    x = heun(gaussian(0.25), ONE * 80, edm_sigmas(1))
    assert x.item() == pytest.approx(80 * 0.25 / (80**2 + 0.25))


def test_evaluations():
    calls = {'main': 0, 'weaker': 0}

    def counted(name):
        def denoise(x, sigma):
            calls[name] += 1
            return gaussian(0.25)(x, sigma)

        return denoise

    heun(guide(counted('main'), counted('weaker'), 1), ONE, edm_sigmas(32))
    assert calls == {'main': 63, 'weaker': 0}
    heun(guide(counted('main'), counted('weaker'), 2), ONE, edm_sigmas(32))
    assert calls == {'main': 126, 'weaker': 63}


def test_guidance_extrapolates():
    guided = guide(lambda x, sigma: 3 * x, lambda x, sigma: x, 1.5)
    assert guided(ONE, ONE).item() == pytest.approx(1 + 1.5 * (3 - 1))


@pytest.fixture
def net(tiny_config):
    net = Denoiser(tiny_config, seed=3).eval()
    torch.nn.init.ones_(net.unet.out_gain)
    for name, p in net.named_parameters():
        if name.endswith('emb_gain'):
            torch.nn.init.ones_(p)
    return net


def images_of(net, seeds, **options):
    config = SamplerConfig(steps=4, **options.pop('sampler', {}))
    batches = list(generate(net, seeds, config, **options))
    return {seed: image for batch in batches for seed, image in zip(batch.seeds, batch.images, strict=True)}


@pytest.mark.parametrize('churn', [Churn(), Churn(S_churn=4)])
def test_an_image_depends_on_its_seed_alone(net, churn):
    together = images_of(net, range(7), sampler={'churn': churn})
    apart = images_of(net, [5, 3, 6, 0, 1, 2, 4], sampler={'churn': churn}, batch_size=2)
    for seed in range(7):
        difference = (together[seed].int() - apart[seed].int()).abs().max()
        assert difference <= 1, 'batches of other sizes may round differently, by no more than one grey level'
    assert not torch.equal(together[0], together[1])


def test_same_call_same_bits(net):
    a, b = images_of(net, range(3)), images_of(net, range(3))
    assert all(torch.equal(a[seed], b[seed]) for seed in a)


def test_classes(net):
    (batch,) = generate(net, [0, 1, 2, 10, 11], SamplerConfig(steps=1), classes=[7, 8, 9])
    assert batch.labels.tolist() == [7, 8, 9, 8, 9]
    (drawn,) = generate(net, range(200), SamplerConfig(steps=1), batch_size=200)
    assert set(drawn.labels.tolist()) == set(range(10))
    a, b = images_of(net, [0], classes=[1]), images_of(net, [0], classes=[2])
    assert not torch.equal(a[0], b[0])


def test_defaults_are_edm2s():
    config = SamplerConfig()
    assert (config.steps, config.sigma_min, config.sigma_max, config.rho, config.guidance) == (32, 0.002, 80, 7, 1)
    assert config.churn == Churn(0, 0, math.inf, 1)


def test_churn_bounds_are_inclusive():
    churn = Churn(S_churn=1, S_min=0.5, S_max=2)
    assert [churn.gamma(sigma, 10) > 0 for sigma in (0.49, 0.5, 1, 2, 2.01)] == [False, True, True, True, False]
    assert Churn(S_churn=100).gamma(1, 10) == pytest.approx(math.sqrt(2) - 1)


def test_pipeline_solves_from_its_own_latents(net):
    """An image by hand: latent of the seed times sigma_max, guided by a network without classes."""
    unconditional = Denoiser(NetworkConfig((8, 8), 1, 0, 16, (1, 2), 1, (4,), 16), seed=9).eval()
    torch.nn.init.ones_(unconditional.unet.out_gain)
    config = SamplerConfig(steps=3, guidance=1.7)
    (batch,) = generate(net, [11], config, unconditional, classes=[4])
    latent = torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(11))[None]
    label = torch.eye(10)[4:5]

    def denoise(x, sigma):
        return 1.7 * net(x, sigma, label) - 0.7 * unconditional(x, sigma)

    with torch.no_grad():
        x = heun(denoise, latent * 80, edm_sigmas(3))
    assert (decode_pixels(x).int() - batch.images.int()).abs().max() <= 1


def test_what_does_not_fit_is_refused(net):
    unconditional = Denoiser(NetworkConfig((8, 8), 1, 0, 16, (1, 2), 1, (4,), 16)).eval()
    assert next(iter(generate(unconditional, [0], SamplerConfig(steps=1)))).labels is None
    for arguments, message in (
        ({'classes': [3, 10]}, 'between 0 and 9, not 10'),
        ({'guiding_net': Denoiser(NetworkConfig((16, 16), 1, 3, 16, (1, 2), 1, (4,), 16))}, 'shape.*; .*3 classes'),
    ):
        with pytest.raises(UserError, match=message):
            next(generate(net, [0], SamplerConfig(), **arguments))
    with pytest.raises(UserError, match='needs a guiding network'):
        next(generate(net, [0], SamplerConfig(guidance=3)))
    with pytest.raises(UserError, match='rho must be a finite number, not nan'):
        SamplerConfig(rho=math.nan).check()
    with pytest.raises(UserError, match='takes no class'):
        next(generate(unconditional, [0], SamplerConfig(), classes=[1]))
    with pytest.raises(UserError, match=r'steps .*; .*sigma_min'):
        SamplerConfig(steps=0, sigma_min=2, sigma_max=1).check()
