"""How sampling evaluates networks: weights folded, threads inside portions or beside each other."""

import dataclasses
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from networks.denoiser import Denoiser
from networks.edm2.magnitude import MPConv
from networks.folding import folded, settled
from sampling import portions
from sampling.config import SamplerConfig
from sampling.pipeline import sample
from sampling.portions import EAGER, Execution
from sampling.samplers import Euler
from tests.golden_networks import golden_inputs, golden_net
from tests.test_sampling import busy, images_of


@pytest.fixture
def computed(monkeypatch):
    """Layers whose weights were computed."""
    found, used_weight = [], MPConv.used_weight

    def counted(self, *args):
        found.append(self)
        return used_weight(self, *args)

    monkeypatch.setattr(MPConv, 'used_weight', counted)
    return found


@pytest.mark.parametrize('precision', ['fp32', 'bf16'])
@pytest.mark.parametrize('name', ['A', 'G*'])
def test_folded_weights_are_computed_once_and_are_the_same_to_the_bit(name, precision, computed):
    net = golden_net(name).eval()
    net.precision = precision
    inputs = golden_inputs()
    with torch.no_grad():
        expected = net(*inputs)
        computed.clear()
        with folded([net, net]):
            with folded([net]):
                assert torch.equal(net(*inputs), expected)
            assert torch.equal(net(*inputs), expected)
            assert len(computed) == len(set(computed)) > 30
            net.precision = 'fp16'  # another dtype is not served with these
            assert not torch.equal(net(*inputs), expected)
        net.precision = precision
        net.unet.out_conv.weight[:, 0] *= 3
        assert not torch.equal(net(*inputs), expected)  # nothing is left behind
        with folded([net]):
            assert not torch.equal(net(*inputs), expected)


@pytest.mark.parametrize(('name', 'joined'), [('A', 1), ('G*', 0)])
def test_dense_convolutions_after_upsampling_run_at_the_lower_resolution(name, joined, monkeypatch):
    """Where a CPU evaluates; in training it is the same, but for weights that are settled once more."""
    seen, of_upsampled = [], MPConv.of_upsampled
    monkeypatch.setattr(MPConv, 'of_upsampled', lambda layer, x, gain: seen.append(x) or of_upsampled(layer, x, gain))
    net, inputs = golden_net(name).train(), golden_inputs()
    with torch.no_grad():
        with settled(net):
            expected = net(*inputs)
        assert not seen
        torch.testing.assert_close(net.eval()(*inputs), expected, rtol=1e-4, atol=1e-4)
    assert len(seen) == joined  # of two resolutions


def test_weights_are_dropped_after_an_error(tiny_config):
    net = busy(tiny_config)
    with pytest.raises(ZeroDivisionError), torch.no_grad(), folded([net]):
        net(torch.ones(1, 1, 8, 8), torch.ones(1))
        raise ZeroDivisionError
    assert all(m.kept is None and not m.folding for m in net.modules() if isinstance(m, MPConv))


def test_only_packed_weights_are_of_a_batch_s_shape():
    """Batches of another size, as at the ends of a guidance interval, then need no other weights and no compilation."""
    layer = MPConv(8, 8, kernel=0).eval()
    layer.reset_parameters(torch.Generator().manual_seed(0))
    with folded([layer]), torch.inference_mode():
        assert layer.weight_for(torch.ones(2, 8)) is layer.weight_for(torch.ones(4, 8))
        assert layer.weight_for(torch.ones(2, 8)) is not layer.weight_for(torch.ones(2, 8, dtype=torch.bfloat16))


def test_networks_in_training_are_not_folded(tiny_config):
    with pytest.raises(AssertionError), folded([Denoiser(tiny_config).train()]):
        pass


def test_sampling_computes_weights_once(tiny_config, computed):
    net = busy(tiny_config)
    for _ in sample(net, range(40), SamplerConfig(steps=3), batch_size=16):
        pass
    each = sum(isinstance(m, MPConv) for m in net.unet.modules())
    assert each <= len(computed) <= each * torch.get_num_threads()  # threads that begin at once may all compute it


def test_a_network_guides_itself_in_one_call(tiny_config):
    net, seen = busy(tiny_config), []
    net.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    options = {'sampler': {'sampler': Euler(), 'steps': 2, 'guidance': 2.0}, 'guiding_net': net}
    few, many = images_of(net, range(8), **options), images_of(net, range(9), **options)
    assert seen == [16] * 2 + [16] * 4  # as many as a portion holds, twice 8; then 18 need two
    assert all(torch.equal(few[seed], many[seed]) for seed in range(8))


@pytest.mark.parametrize('guided', [False, True])
@pytest.mark.parametrize('threads', [1, 2])
def test_all_threads_on_one_image_at_a_time(tiny_config, monkeypatch, threads, guided):
    """Same bits for every batch size, whatever other threads set; with `exact`, for every number of threads."""
    monkeypatch.setattr(portions, 'PORTION_FEATURES', 1)  # as of a large network
    net, seen = busy(tiny_config), []
    options = {'sampler': {'sampler': Euler(), 'steps': 1, 'guidance': 2.0 if guided else 1.0}}
    options |= {'guiding_net': net} if guided else {}
    net.register_forward_pre_hook(lambda module, args: seen.append((len(args[0]), torch.get_num_threads())))
    exactly = images_of(net, range(2), execution=Execution(exact=True), **options)
    assert set(seen) == {(1, 1)}
    seen.clear()
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        alone = images_of(net, range(2), batch_size=1, **options)
        assert set(seen) == {(1, threads)}
        with ThreadPoolExecutor(1) as other:
            for _ in range(50):
                other.submit(torch.set_num_threads, 1)  # as decoding does
            together = images_of(net, [1, 0], batch_size=2, **options)
        torch.set_num_threads(threads)  # for threads to come, too
        seen.clear()
        exactly_too = images_of(net, range(2), execution=Execution(exact=True), **options)
        assert set(seen) == {(1, 1)}
    finally:
        torch.set_num_threads(before)
    for seed in range(2):
        assert torch.equal(alone[seed], together[seed]) and torch.equal(exactly[seed], exactly_too[seed])
        torch.testing.assert_close(alone[seed], exactly[seed], rtol=1e-4, atol=1e-4)


def test_a_small_guiding_network_decides_for_both(tiny_config, monkeypatch):
    """Were each to have its own way, the threads' setting would change in the middle of a trajectory."""
    net, small = busy(tiny_config), busy(dataclasses.replace(tiny_config, label_dim=0))
    monkeypatch.setattr(portions, 'portion_size', lambda config: 1 if config is net.config else 4)
    with portions.evaluating([net, small], 8, EAGER) as (main, guide):
        assert main.workers is guide.workers is not None and (main.size, guide.size) == (1, 4)
