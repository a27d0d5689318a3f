"""Inception-v3 in the FID variant: layout, wiring, pools, resize, and what is refused as its weights."""

import copy
import hashlib
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import metrics.inception
import metrics.network_detector
from dnnlib.errors import UserError
from metrics.inception import (
    BlockA,
    BlockB,
    BlockC,
    BlockD,
    BlockE,
    InceptionDetector,
    InceptionV3,
    average_pool,
    find_weights,
    load_inception,
    max_pool,
    resize_as_tensorflow,
)
from tests.helpers import random_inception


@pytest.fixture(scope='module')
def weights(tmp_path_factory):
    """A file of random weights in the public layout."""
    return random_inception(tmp_path_factory.mktemp('weights') / 'random.pth')


@pytest.fixture(scope='module')
def detector(weights):
    return InceptionDetector('cpu', str(weights), any_weights=True)


def random_images(seed: int, *shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


# ---- layout ----


def test_state_dict_is_that_of_the_public_file():
    with torch.device('meta'):
        state = InceptionV3().state_dict()
    assert len(state) == 566
    assert sum(tensor.numel() for tensor in state.values()) == 23_885_486
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    assert shapes['Conv2d_1a_3x3.conv.weight'] == (32, 3, 3, 3)
    assert shapes['Conv2d_4a_3x3.conv.weight'] == (192, 80, 3, 3)
    assert shapes['Mixed_5b.branch1x1.conv.weight'] == (64, 192, 1, 1)
    assert shapes['Mixed_5d.branch5x5_2.conv.weight'] == (64, 48, 5, 5)
    assert shapes['Mixed_6a.branch3x3.conv.weight'] == (384, 288, 3, 3)
    assert shapes['Mixed_6b.branch7x7_2.conv.weight'] == (128, 128, 1, 7)
    assert shapes['Mixed_6e.branch7x7dbl_2.conv.weight'] == (192, 192, 7, 1)
    assert shapes['Mixed_7a.branch7x7x3_4.conv.weight'] == (192, 192, 3, 3)
    assert shapes['Mixed_7b.branch_pool.conv.weight'] == (192, 1280, 1, 1)
    assert shapes['Mixed_7c.branch3x3dbl_3b.conv.weight'] == (384, 384, 3, 1)
    assert shapes['Mixed_7c.branch3x3dbl_1.bn.running_var'] == (448,)
    assert shapes['Conv2d_1a_3x3.bn.num_batches_tracked'] == ()
    assert (shapes['fc.weight'], shapes['fc.bias']) == ((1008, 2048), (1008,))


@pytest.mark.parametrize(
    ('make', 'cin', 'side', 'order'),
    [
        (
            lambda: BlockA(192, 32),
            192,
            35,
            {'branch1x1': 64, 'branch5x5_2': 64, 'branch3x3dbl_3': 96, 'branch_pool': 32},
        ),
        (lambda: BlockB(288), 288, 35, {'branch3x3': 384, 'branch3x3dbl_3': 96, '': 288}),
        (
            lambda: BlockC(768, 128),
            768,
            17,
            {'branch1x1': 192, 'branch7x7_3': 192, 'branch7x7dbl_5': 192, 'branch_pool': 192},
        ),
        (lambda: BlockD(768), 768, 17, {'branch3x3_2': 320, 'branch7x7x3_4': 192, '': 768}),
        (
            lambda: BlockE(1280, average_pool),
            1280,
            8,
            {
                'branch1x1': 320,
                'branch3x3_2a': 384,
                'branch3x3_2b': 384,
                'branch3x3dbl_3a': 384,
                'branch3x3dbl_3b': 384,
                'branch_pool': 192,
            },
        ),
    ],
)
def test_branches_lie_in_their_order(make, cin, side, order):
    """Every last convolution of a branch says its number through its bias; '' is the input's own maxima."""
    with torch.device('meta'):
        block = make()
    block = block.to_empty(device='cpu').eval().requires_grad_(False)
    for name, tensor in block.state_dict().items():
        tensor.fill_(name.endswith(('bn.weight', 'running_var')))
    for name, parameter in block.named_parameters():
        if name.endswith('conv.weight'):
            parameter.zero_()
    for number, branch in enumerate(order, 1):
        if branch:
            getattr(block, branch).bn.bias.fill_(number)
    x = torch.full((1, cin, side, side), 100.0)
    expected = [number if branch else 100 for number, branch in enumerate(order, 1)]
    found = block(x)[0, :, 0, 0].split(list(order.values()))
    for part, value in zip(found, expected, strict=True):
        assert (part == value).all()
    assert block(x).shape[2] == (side - 1) // 2 if '' in order else block(x).shape[2] == side


def test_chains_run_in_their_order():
    """Sides after each stage, and the order of the factorised kernels, seen by hooks."""
    with torch.device('meta'):
        net = InceptionV3().eval()
    seen = {}
    for name, module in net.named_modules():
        if name.count('.') == 0 and name.startswith(('Conv', 'Mixed')):
            module.register_forward_hook(lambda m, args, out, name=name: seen.update({name: tuple(out.shape[1:])}))
    calls = []
    for name, module in net.Mixed_6c.named_children():
        module.register_forward_hook(lambda m, args, out, name=name: calls.append(name))
    pooled, spatial = net(torch.zeros(2, 3, 299, 299, device='meta'))
    assert pooled.shape == (2, 2048) and spatial.shape == (2, 17 * 17 * 7)
    assert seen['Conv2d_1a_3x3'] == (32, 149, 149)
    assert seen['Conv2d_2b_3x3'] == (64, 147, 147)
    assert seen['Conv2d_4a_3x3'] == (192, 71, 71)
    assert seen['Mixed_5b'] == (256, 35, 35) and seen['Mixed_5d'] == (288, 35, 35)
    assert seen['Mixed_6a'] == (768, 17, 17) and seen['Mixed_6e'] == (768, 17, 17)
    assert seen['Mixed_7a'] == (1280, 8, 8) and seen['Mixed_7c'] == (2048, 8, 8)
    doubles = [name for name in calls if 'dbl' in name]
    assert doubles == [f'branch7x7dbl_{i}' for i in range(1, 6)]


def test_every_convolution_reaches_the_features(detector):
    """Forward hooks count: 94 convolutions, each used once."""
    calls = []
    hooks = [
        module.register_forward_hook(lambda m, args, out: calls.append(m))
        for module in detector.net.modules()
        if isinstance(module, torch.nn.Conv2d)
    ]
    try:
        detector(random_images(0, 1, 3, 8, 8))
    finally:
        for hook in hooks:
            hook.remove()
    assert len(hooks) == len(calls) == len(set(calls)) == 94


# ---- pools, normalisation ----


def test_average_pools_leave_padding_out():
    x = torch.arange(9.0).reshape(1, 1, 3, 3)
    expected = torch.tensor([[(0 + 1 + 3 + 4) / 4, (0 + 1 + 2 + 3 + 4 + 5) / 6, (1 + 2 + 4 + 5) / 4]])
    torch.testing.assert_close(average_pool(x)[0, 0, :1], expected)
    assert average_pool(x)[0, 0, 1, 1] == 4


def test_only_the_last_block_pools_with_maxima():
    with torch.device('meta'):
        net = InceptionV3()
    pools = {name: module.pool for name, module in net.named_modules() if isinstance(module, BlockE)}
    assert pools == {'Mixed_7b': average_pool, 'Mixed_7c': max_pool}
    x = torch.arange(9.0).reshape(1, 1, 3, 3)
    assert max_pool(x)[0, 0].tolist() == [[4, 5, 5], [7, 8, 8], [7, 8, 8]]


@pytest.mark.parametrize('pool', [average_pool, max_pool])
def test_pools_are_used_in_their_blocks(detector, pool):
    block = copy.deepcopy(detector.net.Mixed_7b)
    block.pool = pool
    x = torch.rand(1, 1280, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(block(x)[:, 2048 - 192 :], block.branch_pool(pool(x)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('name', ['Mixed_5c', 'Mixed_6d'])
def test_blocks_before_pool_with_means(detector, name):
    block = getattr(detector.net, name)
    cin = block.branch_pool.conv.in_channels
    x = torch.rand(1, cin, 9, 9, generator=torch.Generator().manual_seed(0))
    expected = block.branch_pool(average_pool(x))
    torch.testing.assert_close(block(x)[:, -expected.shape[1] :], expected, rtol=1e-4, atol=1e-4)


def test_batch_normalisation_is_of_running_statistics_with_eps(detector):
    x = torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(1))
    block = detector.net.Conv2d_1a_3x3
    bn = block.bn
    y = F.conv2d(x, block.conv.weight, stride=2)
    scale = bn.weight / (bn.running_var + 0.001).sqrt()
    expected = ((y - bn.running_mean[:, None, None]) * scale[:, None, None] + bn.bias[:, None, None]).clamp(min=0)
    torch.testing.assert_close(block(x), expected, rtol=1e-4, atol=1e-5)


# ---- resize and scaling ----


def test_resize_by_hand():
    # Output pixel i of 3 from 2 lies at 0, 2/3, 4/3; beyond the last pixel the last one repeats.
    image = torch.tensor([[0.0, 30.0], [60.0, 120.0]])[None, None]
    rows = torch.tensor([[0.0, 20.0, 30.0], [60.0, 100.0, 120.0]])
    expected = torch.stack([rows[0], rows[0] + (rows[1] - rows[0]) * 2 / 3, rows[1]])
    torch.testing.assert_close(resize_as_tensorflow(image, 3, 3)[0, 0], expected)


def test_resize_down_takes_single_pixels_without_antialiasing():
    image = torch.arange(36.0).reshape(1, 1, 6, 6)
    assert resize_as_tensorflow(image, 3, 2)[0, 0].tolist() == [[0, 3], [12, 15], [24, 27]]


@pytest.mark.parametrize('size', [(64, 64), (299, 299), (512, 300), (1, 7)])
def test_resize_is_the_documented_formula(size):
    image = random_images(2, 1, 2, *size).float()
    found = resize_as_tensorflow(image, 299, 299)
    generator = torch.Generator().manual_seed(3)
    for i, j in torch.randint(299, (50, 2), generator=generator).tolist():
        y, x = i * size[0] / 299, j * size[1] / 299
        low, left = int(y), int(x)
        below, right = min(low + 1, size[0] - 1), min(left + 1, size[1] - 1)
        top = image[0, :, low, left] * (1 - (x - left)) + image[0, :, low, right] * (x - left)
        bottom = image[0, :, below, left] * (1 - (x - left)) + image[0, :, below, right] * (x - left)
        # positions are float32: up to 512 * 6e-8 of a pixel off, times a contrast of 255
        torch.testing.assert_close(found[0, :, i, j], top * (1 - (y - low)) + bottom * (y - low), rtol=0, atol=0.02)


def test_features_are_of_the_resized_and_scaled_image(detector):
    images = random_images(4, 3, 3, 20, 30)
    with torch.inference_mode():
        expected, _ = detector.net((resize_as_tensorflow(images, 299, 299) - 128) / 128)
    features = detector(images)['inception']
    assert features.shape == (3, 2048) and features.dtype == torch.float32
    assert features.std(dim=0).mean() > 1e-3  # these random weights tell images apart
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-4)


def test_scaling_is_minus_128_over_128(detector):
    seen = []
    hook = detector.net.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    try:
        detector(torch.tensor([0, 128, 255], dtype=torch.uint8).reshape(3, 1, 1, 1))
    finally:
        hook.remove()
    assert [image.unique().tolist() for image in seen[0]] == [[-1], [0], [127 / 128]]


def test_grayscale_is_replicated(detector):
    images = random_images(5, 2, 1, 16, 16)
    gray, rgb = detector(images), detector(images.expand(-1, 3, -1, -1))
    assert all(torch.equal(gray[name], rgb[name]) for name in gray)


def test_batches_larger_than_the_network_takes_at_once(detector, monkeypatch):
    images = random_images(6, 3, 1, 8, 8)
    whole = detector(images)
    monkeypatch.setattr(metrics.network_detector, 'AT_ONCE', 2)
    for name, features in detector(images).items():
        assert features.shape == (3, detector.num_features((1, 8, 8))[name])
        torch.testing.assert_close(features, whole[name], rtol=1e-4, atol=1e-5)


def test_classes_are_of_logits_without_bias(detector):
    found = detector(random_images(7, 2, 1, 8, 8))
    fc = detector.net.fc
    logits = (fc(found['inception']) - fc.bias).double()
    torch.testing.assert_close(found['classes'][:, :-1], logits.softmax(dim=1), rtol=1e-3, atol=1e-6)
    negentropy = (logits.softmax(dim=1) * logits.log_softmax(dim=1)).sum(dim=1)
    torch.testing.assert_close(found['classes'][:, -1], negentropy, rtol=1e-4, atol=1e-4)


def test_spatial_features_are_the_first_seven_channels_of_a_branch(detector):
    """What sFID sees: of Mixed_6d's 1x1 branch, after its ReLU, pixel by pixel."""
    seen = []
    hook = detector.net.Mixed_6d.branch1x1.register_forward_hook(lambda module, args, out: seen.append(out))
    try:
        spatial = detector(random_images(8, 2, 3, 20, 20))['spatial']
    finally:
        hook.remove()
    assert seen[0].shape == (2, 192, 17, 17)
    for n, channel, y, x in ((0, 0, 0, 0), (1, 6, 16, 16), (0, 3, 5, 11), (1, 2, 16, 0)):
        assert spatial[n, (y * 17 + x) * 7 + channel] == seen[0][n, channel, y, x]
    assert (spatial >= 0).all() and spatial.std() > 0


# ---- weights ----


def test_other_weights_are_refused_unless_asked_for(weights, detector):
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    with pytest.raises(UserError, match=rf'SHA-256 {digest[:8]}.*not 6726825d.*--any-weights'):
        InceptionDetector('cpu', str(weights))
    assert digest in detector.identity and detector.standard is False


def test_published_weights_are_known_by_their_digest(weights, monkeypatch):
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    monkeypatch.setattr(metrics.inception, 'PUBLISHED', digest[:8])
    monkeypatch.setenv('EDM2PLUS_INCEPTION', str(weights))
    assert InceptionDetector().standard is True


def test_missing_weights_name_url_file_and_place(tmp_path, monkeypatch):
    monkeypatch.delenv('EDM2PLUS_INCEPTION', raising=False)

    def no_network(url, offline):
        raise UserError(f'{url} cannot be downloaded: no network')

    monkeypatch.setattr(metrics.inception, 'download', no_network)
    with pytest.raises(UserError) as refusal:
        find_weights(None)
    for text in ('https://github.com/', 'weights-inception-2015-12-05-6726825d.pth', '--inception=', 'no network'):
        assert text in str(refusal.value)
    with pytest.raises(UserError, match=r'no Inception weights at .*absent.*the file needed is weights-inception'):
        find_weights(str(tmp_path / 'absent'))


def test_weights_come_from_the_cache(tmp_path, weights, monkeypatch):
    monkeypatch.delenv('EDM2PLUS_INCEPTION', raising=False)
    monkeypatch.setattr(
        metrics.inception, 'download', lambda url, offline: weights if url == metrics.inception.URL else None
    )
    assert find_weights(None) == weights


@pytest.mark.parametrize('change', ['missing', 'extra', 'shape', 'text', 'list', 'code'])
def test_files_that_are_no_weights_are_refused(tmp_path, weights, change):
    path = tmp_path / 'wrong.pth'
    state = torch.load(weights, weights_only=True)
    if change == 'missing':
        del state['Mixed_6b.branch1x1.bn.running_mean']
    elif change == 'extra':
        state['AuxLogits.fc.weight'] = torch.zeros(1)
    elif change == 'shape':
        state['fc.weight'] = torch.zeros(1000, 2048)
    if change == 'text':
        path.write_text('not weights')
    else:
        torch.save({'list': [1, 2], 'code': Path('/')}.get(change, state), path)
    wrong = {'missing': 'running_mean is missing', 'extra': 'AuxLogits', 'shape': r'fc.weight is \(1000, 2048\)'}
    with pytest.raises(UserError, match=f'wrong.pth .*{wrong.get(change, "")}'):
        load_inception(path)
