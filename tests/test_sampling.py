"""Samplers on problems with known solutions; the pipeline's promises."""

import itertools
import math
import re
import threading
import unittest.mock
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from diffusion.schedules import EDM, edm_sigmas
from dnnlib.errors import UserError
from networks.denoiser import Denoiser
from networks.encoders import decode_pixels
from networks.files import NetworkInfo, save_network
from sampling import pipeline
from sampling.config import SamplerConfig
from sampling.guidance import guide
from sampling.pipeline import Streams, count_evaluations, generate, sample, trajectory
from sampling.portions import portion_size
from sampling.samplers import DPMpp2M, Euler, Heun
from sampling.table import SAMPLERS
from tests.conftest import ROOT
from tests.helpers import edm2_network

ONE = torch.ones(1, 1, 1, 1, dtype=torch.float64)


def gaussian(variance: float):
    """The exact denoiser of data ~ N(0, variance)."""
    return lambda x, sigma: x * variance / (sigma**2 + variance)


def test_golden_values(golden):
    for case in golden['sampler']:
        spacing = {name: case[name] for name in ('sigma_min', 'sigma_max', 'rho') if name in case}
        churn = Heun(**{name: value for name, value in case.items() if name.startswith('S_')})
        sigmas = edm_sigmas(case['num_steps'], **spacing)
        denoise = guide(gaussian(0.25), gaussian(0.36), case.get('guidance', 1))
        x = churn(denoise, ONE * sigmas[0], sigmas, torch.ones_like)
        assert x.item() == pytest.approx(case['x'], rel=1e-12), case


def test_published_churn_values():
    for churn, expected in (
        (Heun(40, 0.05, 50, 1.003), 1.6933846062),
        (Heun(30, 0.01, 1, 1.007), 1.1013733986),
        (Heun(4), 1.9151586171),
    ):
        sigmas = edm_sigmas(18)
        x = churn(gaussian(0.25), ONE * sigmas[0], sigmas, torch.ones_like)
        assert x.item() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize('name', [name for name, cls in SAMPLERS.items() if cls().order])
def test_order_of_convergence(name):
    # Exact solution of the probability flow ODE for N(0, 1/4): x scales with sqrt(sigma^2 + 1/4). In EDM's spacing,
    # from 10 to 0.1. (First and last steps of first order are allowed: the error of one step is of second order.)
    exact = math.sqrt((0.1**2 + 0.25) / (10**2 + 0.25))
    errors = []
    for steps in (160, 320, 640):
        sigmas = edm_sigmas(steps + 1, 0.1, 10)[:-1]
        errors.append(abs(SAMPLERS[name]()(gaussian(0.25), ONE, sigmas).item() - exact))
    slopes = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert slopes == pytest.approx([SAMPLERS[name]().order] * 2, abs=0.1)
    assert SAMPLERS[name]().order == {'heun': 2, 'euler': 1, 'dpm++2m': 2, 'ablation': 2}[name]
    assert errors[-1] < 1e-2 * exact


@pytest.mark.parametrize('name', SAMPLERS)
def test_one_step_is_the_denoised_image(name):
    x = SAMPLERS[name]()(gaussian(0.25), ONE * 80, edm_sigmas(1), torch.zeros_like)
    assert x.item() == pytest.approx(80 * 0.25 / (80**2 + 0.25))


def test_multistep_takes_the_denoised_image_in_the_middle_of_a_step():
    # A denoiser that says lambda = -ln sigma, whatever x: the line through two of its values is exact.
    sigmas = torch.tensor([9.0, 2.0, 0.5], dtype=torch.float64)
    x = DPMpp2M()(lambda x, sigma: -torch.log(sigma) * torch.ones_like(x), 3 * ONE, sigmas).item()
    first = 2 / 9 * 3 + (1 - 2 / 9) * -math.log(9)  # no previous value: constant
    middle = (-math.log(2) - math.log(0.5)) / 2
    assert x == pytest.approx(0.5 / 2 * first + (1 - 0.5 / 2) * middle, rel=1e-12)


def test_euler_with_churn():
    # One step of EDM's algorithm 2 by hand, without its correction: raise sigma by gamma, then step.
    sigmas = torch.tensor([2.0, 1.0, 0.0], dtype=torch.float64)
    x = Euler(0.4, 1.5, 3, 1.1)(gaussian(0.25), ONE, sigmas, torch.ones_like).item()
    hat = 2 * 1.2
    raised = 1 + math.sqrt(hat**2 - 4) * 1.1
    first = raised + (1 - hat) * (raised - raised * 0.25 / (hat**2 + 0.25)) / hat
    assert x == pytest.approx(first * 0.25 / (1 + 0.25), rel=1e-12)


class Counted:
    """A denoiser that counts its evaluations and remembers their noise levels."""

    def __init__(self, variance=0.25):
        self.denoise, self.levels = gaussian(variance), []

    def __call__(self, x, sigma):
        self.levels.append(sigma.item())
        return self.denoise(x, sigma)


@pytest.mark.parametrize('name', SAMPLERS)
@pytest.mark.parametrize('steps', [1, 2, 7, 32])
def test_evaluations(name, steps):
    main, weaker = Counted(), Counted()
    solve, expected = SAMPLERS[name](), SAMPLERS[name]().evaluations(steps)
    solve(guide(main, weaker, 1), ONE, edm_sigmas(steps), torch.zeros_like)
    assert (len(main.levels), len(weaker.levels)) == (expected, 0)
    solve(guide(main, weaker, 2), ONE, edm_sigmas(steps), torch.zeros_like)
    assert (len(main.levels), len(weaker.levels)) == (2 * expected, expected)
    assert expected == (2 * steps - 1 if name in ('heun', 'ablation') else steps)
    assert count_evaluations(SamplerConfig(steps, SAMPLERS[name]())) == (expected, 0)
    assert count_evaluations(SamplerConfig(steps, SAMPLERS[name](), guidance=0.5)) == (expected, expected)


@pytest.mark.parametrize(
    ('interval', 'first', 'last'), [((0.19, 1.61), 17, 22), ((0.60, 5.00), 13, 19), ((0, 80), 0, 31)]
)
@pytest.mark.parametrize('name', SAMPLERS)
def test_published_intervals_are_these_steps(name, interval, first, last):
    # The paper gives the interval and the steps of 32; the correction of Heun's method follows its step.
    main, weaker = Counted(), Counted()
    SAMPLERS[name]()(guide(main, weaker, 2, interval), ONE, edm_sigmas(32), torch.zeros_like)
    sigmas = edm_sigmas(32).tolist()
    expected = []
    for i in range(first, last + 1):
        expected += [sigmas[i], sigmas[i + 1]] if name in ('heun', 'ablation') and i < 31 else [sigmas[i]]
    assert weaker.levels == expected
    config = SamplerConfig(sampler=SAMPLERS[name](), guidance=2, guidance_interval=interval)
    assert count_evaluations(config) == (len(main.levels), len(weaker.levels))


@pytest.mark.parametrize('name', SAMPLERS)
def test_interval_of_nothing_and_of_all(name):
    sigmas, solve = edm_sigmas(8), SAMPLERS[name]()
    plain, full = (solve(guide(gaussian(0.25), gaussian(0.36), w), 80 * ONE, sigmas, torch.zeros_like) for w in (1, 2))
    assert not torch.equal(plain, full)
    between = (sigmas[3].item() * 0.99, sigmas[3].item() * 0.999)
    for interval, expected in ((between, plain), ((80, 100), plain), ((0, 80), full), ((0.0019, math.inf), full)):
        x = solve(guide(gaussian(0.25), gaussian(0.36), 2, interval), 80 * ONE, sigmas, torch.zeros_like)
        assert torch.equal(x, expected), interval


def mixture(classes, spread=0.3):
    """The exact denoiser of data that are N(-1, spread^2) and N(+1, spread^2), or of the `classes` of these."""
    means = torch.tensor([-1.0, 1.0], dtype=torch.float64)[classes]

    def denoise(x, sigma):
        variance = sigma**2 + spread**2
        weights = torch.softmax(-((x[..., None] - means) ** 2) / (2 * variance), dim=-1)
        return ((means + spread**2 / variance * (x[..., None] - means)) * weights).sum(-1)

    return denoise


def test_classes_of_a_mixture():
    z = torch.randn(4000, 1, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    sigmas = edm_sigmas(128)
    plain, guided, apart = (
        Heun()(guide(mixture([1]), mixture([0, 1]), w, interval), 80 * z, sigmas).flatten()
        for w, interval in ((1, (0, math.inf)), (3, (0, math.inf)), (3, (0, 0.05)))
    )
    # Without guidance a sample is the known map of its latent: N(1, 0.3^2).
    exact = 1 + (80 * z.flatten() - 1) * 0.3 / math.sqrt(80**2 + 0.3**2)
    torch.testing.assert_close(plain, exact, rtol=0, atol=2e-3)
    assert (guided > 0).all() and guided.std() < 0.9 * plain.std() and guided.mean() > plain.mean() + 0.05
    # The classes are apart at low noise levels: guidance there changes what lies between them alone.
    assert (apart - plain).abs().median() < 1e-6


def test_guidance_sharpens_as_the_formula_says():
    # D_w = x + sigma^2 d/dx log(p(x|c)^w p(x)^(1-w)): the class's density, sharpened by (p(x|c) / p(x))^(w-1).
    for sigma in (0.3, 1.0, 4.0):
        x = torch.linspace(-3, 3, 13, dtype=torch.float64)[:, None, None, None].requires_grad_()
        variance, w = sigma**2 + 0.09, 2.5
        log_p = [-((x - m) ** 2) / (2 * variance) for m in (-1, 1)]
        log_pw = w * log_p[1] + (1 - w) * torch.logaddexp(*log_p)
        (slope,) = torch.autograd.grad(log_pw.sum(), x)
        guided = guide(mixture([1]), mixture([0, 1]), w)(x, torch.tensor(sigma))
        torch.testing.assert_close(guided, x + sigma**2 * slope)


def test_guidance_extrapolates():
    guided = guide(lambda x, sigma: 3 * x, lambda x, sigma: x, 1.5)
    assert guided(ONE, ONE).item() == pytest.approx(1 + 1.5 * (3 - 1))


def busy(config):
    """A network whose every part has a say, as after training."""
    net = Denoiser(config, seed=3).eval()
    torch.nn.init.ones_(net.unet.out_gain)
    for name, p in net.named_parameters():
        if name.endswith('emb_gain'):
            torch.nn.init.ones_(p)
    return net


@pytest.fixture
def net(tiny_config):
    return busy(tiny_config)


def images_of(net, seeds, **options):
    """Image by seed; samples in float32, so that not a bit may differ."""
    config = SamplerConfig(**{'steps': 3, **options.pop('sampler', {})})
    batches = list(sample(net, seeds, config, **options))
    return {seed: x for batch in batches for seed, x in zip(batch.seeds, batch.x, strict=True)}


@pytest.mark.parametrize('case', ['plain', 'churn', 'guidance', 'multistep', 'larger', 'odd sizes'])
def test_an_image_depends_on_its_seed_alone_to_the_bit(net, case):
    options = {}
    if case == 'churn':
        options['sampler'] = {'sampler': Heun(S_churn=4)}
    elif case == 'guidance':
        options = {'sampler': {'guidance': 2.0}, 'guiding_net': net}
    elif case == 'multistep':
        options['sampler'] = {'sampler': DPMpp2M()}
    elif case == 'larger':
        net = busy(edm2_network((32, 32), 3, 10, 32, (1, 2), 1, (16,), 32, block='A'))
        options['sampler'] = {'steps': 1}
        assert 1 < portion_size(net.config) < 16
    elif case == 'odd sizes':
        net = busy(edm2_network((6, 10), 1, 10, 20, (1, 2), 1, (3,), 4))
    together = images_of(net, range(8), batch_size=8, **options)
    assert not torch.equal(together[0], together[1])
    for size in (1, 2, 3, 5):
        shuffled = torch.randperm(8, generator=torch.Generator().manual_seed(size)).tolist()
        apart = images_of(net, shuffled, batch_size=size, **options)
        assert all(torch.equal(together[seed], apart[seed]) for seed in range(8)), size
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        others = images_of(net, range(8), batch_size=4, **options)
        with ThreadPoolExecutor(1) as later:  # the caller's own setting nothing could change
            assert later.submit(torch.get_num_threads).result() == 3
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(together[seed], others[seed]) for seed in range(8))


def test_portions_grow_as_networks_shrink():
    def size(side, channels):
        return portion_size(edm2_network((side, side), 3, 0, channels))

    assert [size(8, 64), size(32, 32), size(32, 64), size(64, 64), size(512, 64)] == [16, 4, 2, 1, 1]


def test_noise_does_not_depend_on_whether_the_class_was_given(net):
    churn = {'sampler': {'sampler': Heun(S_churn=4)}}
    (drawn,) = sample(net, [5], SamplerConfig(steps=3, **churn['sampler']))
    given = images_of(net, [5], classes=drawn.labels.tolist(), **churn)
    assert torch.equal(drawn.x[0], given[5])


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


def test_classes_of_many_seeds_need_few_latents(monkeypatch, tiny_config):
    made = []

    class Spy(pipeline.Streams):
        def __init__(self, seeds, config, device):
            made.append(len(seeds))
            super().__init__(seeds, config, device)

    seeds = list(range(300))
    expected = pipeline.Streams(seeds, tiny_config).drawn
    monkeypatch.setattr(pipeline, 'Streams', Spy)
    assert torch.equal(pipeline.choose_labels(tiny_config, seeds, None, None), expected)
    assert sum(made) == 300 and max(made) < 100


def test_defaults_are_edm2s():
    config = SamplerConfig()
    assert (config.steps, config.disc, config.guidance) == (32, EDM(0.002, 80, 7), 1)
    assert config.sampler == Heun(0, 0, math.inf, 1)


@pytest.mark.parametrize('sampler', [Heun, Euler])
def test_noise_is_drawn_where_each_family_draws_it(sampler):
    sigmas = torch.tensor([4.0, 2.0, 1.0, 0.5, 0.0])
    for always, inside in ((False, 2), (True, 4)):
        noise = unittest.mock.Mock(side_effect=torch.ones_like)
        churn = sampler(S_churn=1, S_min=1, S_max=2, noise_always=always)
        assert churn(gaussian(0.25), ONE * 4, sigmas, noise).isfinite() and noise.call_count == inside
    plain = sampler(noise_always=True)
    assert torch.equal(plain(gaussian(0.25), ONE * 4, sigmas), sampler()(gaussian(0.25), ONE * 4, sigmas))


def test_noise_of_a_gpu(net):
    with pytest.raises(UserError, match="unknown noise device 'gpu'"):
        SamplerConfig(noise_device='gpu').check()
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match='no GPU here to draw noise on'):
            images_of(net, [0], sampler={'noise_device': 'cuda'})
        return
    streams = Streams([3, 4], net.config, 'cuda')
    generator = torch.Generator('cuda').manual_seed(4)
    assert torch.equal(streams.latents[1], torch.randn(streams.shape, generator=generator, device='cuda'))


def test_churn_bounds_are_inclusive():
    churn = Heun(S_churn=1, S_min=0.5, S_max=2)
    assert [churn.gamma(sigma, 10) > 0 for sigma in (0.49, 0.5, 1, 2, 2.01)] == [False, True, True, True, False]
    assert Heun(S_churn=100).gamma(1, 10) == pytest.approx(math.sqrt(2) - 1)


def test_pipeline_solves_from_its_own_latents(net):
    """An image by hand: latent of the seed times sigma_max, guided by a network without classes."""
    unconditional = Denoiser(edm2_network((8, 8), 1, 0, 16, (1, 2), 1, (4,), 16), seed=9).eval()
    torch.nn.init.ones_(unconditional.unet.out_gain)
    config = SamplerConfig(steps=3, guidance=1.7)
    (batch,) = generate(net, [11], config, unconditional, classes=[4])
    latent = torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(11))[None]
    label = torch.eye(10)[4:5]

    def denoise(x, sigma):
        return 1.7 * net(x, sigma, label) - 0.7 * unconditional(x, sigma)

    with torch.no_grad():
        x = Heun()(denoise, latent * 80, edm_sigmas(3))
    assert (decode_pixels(x).int() - batch.images.int()).abs().max() <= 1


def test_a_network_guides_itself_with_its_labels_dropped(net):
    (batch,) = sample(net, [11], SamplerConfig(steps=1, guidance=3), net, classes=[4])
    latent = 80 * torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(11))[None]
    with torch.no_grad():
        D, weaker = (net(latent, torch.tensor(80.0), labels) for labels in (torch.eye(10)[4:5], None))
    torch.testing.assert_close(batch.x, weaker + 3 * (D - weaker), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(D, weaker, atol=1e-3)


def test_trajectory(net):
    config = SamplerConfig(steps=4)
    frames = trajectory(net, [3, 9], config, classes=[4])
    (batch,) = generate(net, [3, 9], config, classes=[4])
    assert frames.shape == (4, 2, 1, 8, 8) and torch.equal(frames[-1], batch.images)
    (first,) = generate(net, [3, 9], SamplerConfig(steps=1), classes=[4])
    assert torch.equal(frames[0], first.images)  # one step goes to the first estimate


def test_another_encoder_decodes(net):
    """Two images at a time, each in one thread."""
    together, threads = threading.Barrier(2, timeout=30), torch.get_num_threads()

    class Inverted:
        def decode(self, x):
            assert torch.get_num_threads() == 1 and together.wait() in (0, 1)
            return 255 - decode_pixels(x)

    torch.set_num_threads(2)
    try:
        (plain,), (inverted,) = (generate(net, [0, 1], SamplerConfig(steps=2), encoder=e) for e in (None, Inverted()))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(inverted.images, 255 - plain.images)


def test_overflow_is_reported(net):
    torch.nn.init.constant_(net.unet.out_gain, math.inf)
    with pytest.raises(UserError, match=r'seeds 7\.\.\. are not finite'):
        next(generate(net, [7], SamplerConfig(steps=2)))


def test_what_does_not_fit_is_refused(net):
    unconditional = Denoiser(edm2_network((8, 8), 1, 0, 16, (1, 2), 1, (4,), 16)).eval()
    assert next(iter(generate(unconditional, [0], SamplerConfig(steps=1)))).labels is None
    for arguments, message in (
        ({'classes': [3, 10]}, 'between 0 and 9, not 10'),
        ({'classes': [3, -1]}, 'between 0 and 9, not -1'),
        ({'guiding_net': Denoiser(edm2_network((16, 16), 1, 3, 16, (1, 2), 1, (4,), 16))}, 'shape.*; .*3 classes'),
    ):
        with pytest.raises(UserError, match=message):
            next(generate(net, [0], SamplerConfig(), **arguments))
    with pytest.raises(UserError, match='needs a guiding network'):
        next(generate(net, [0], SamplerConfig(guidance=3)))
    with pytest.raises(UserError, match='rho must be a finite number, not nan'):
        SamplerConfig(disc=EDM(rho=math.nan)).check()
    with pytest.raises(UserError, match='takes no class'):
        next(generate(unconditional, [0], SamplerConfig(), classes=[1]))
    with pytest.raises(UserError, match=r'steps .*; .*sigma_min'):
        SamplerConfig(steps=0, disc=EDM(2, 1)).check()
    for wrong, message in (
        ({'sampler': Heun(-1, 3, 2)}, 'S_churn must be at least 0, not -1; S_min <= S_max'),
        ({'sampler': Heun(1, S_noise=math.nan)}, 'S_noise must be'),
        ({'guidance_interval': (2.0, 1.0)}, 'LO < HI, not 2,1'),
        ({'guidance_interval': (math.nan, 1.0)}, 'LO < HI, not nan,1'),
    ):
        with pytest.raises(UserError, match=message):
            SamplerConfig(**wrong).check()
    with pytest.raises(UserError, match='no labels to drop'):
        next(generate(unconditional, [0], SamplerConfig(guidance=2), unconditional))


def test_example_of_the_documentation(tmp_path):
    """The Python of docs/sampling.md, with small networks in the place of the demo's."""
    (code,) = re.findall(r'```python\n(.*?)```', (ROOT / 'docs/sampling.md').read_text(), re.DOTALL)
    config = edm2_network((8, 8), 1, 10, 16, (1, 2), 1, (4,), 16)
    for i, name in enumerate(re.findall(r"load_network\('(.*?)'\)", code)):
        path = tmp_path / f'{i}.safetensors'
        save_network(path, Denoiser(config, seed=i).state_dict(), NetworkInfo(config, 1000, 0.1, 'edm2plus-digits'))
        code = code.replace(name, str(path))
    found = {}
    exec(compile(code, 'docs/sampling.md', 'exec'), found)
    assert found['images'].shape == (10, 1, 8, 8) and found['images'].dtype == torch.uint8
