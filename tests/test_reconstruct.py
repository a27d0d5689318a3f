"""Reconstruction from files: equal to the formula, in passes, by pattern; what is wrong with snapshots is told."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

import reconstruct_phema
from dnnlib.configs import replaced
from dnnlib.errors import UserError
from ema.half_life import HalfLifeEMA, halflife_beta
from ema.power import combine, profile, solve, std_to_exp
from ema.reconstruct import Plan, Wanted, find_snapshots
from networks.denoiser import Denoiser
from networks.files import NetworkInfo, constant_names, load_network, read_info, save_network
from tests.helpers import edm2_network, state_tensors

CONFIG = edm2_network((8, 8), 1, 10, 16, (1, 2), 1, (4,), 16)
CONSTANTS = constant_names(CONFIG)
TIMES, STDS = [2048 * i for i in range(1, 13)], (0.05, 0.10)


def make_snapshots(folder, dtype=torch.float32, config=CONFIG):
    """Snapshots of random weights; returns them by (time, length)."""
    folder.mkdir(exist_ok=True)
    saved = {}
    for i, nimg in enumerate(TIMES):
        for std in STDS:
            weights = Denoiser(config, seed=100 * i + int(100 * std)).state_dict()
            weights = {name: t if name in CONSTANTS else t.to(dtype) for name, t in weights.items()}
            path = folder / f'network-snapshot-{nimg // 1000:07d}-{std:.3f}.safetensors'
            save_network(path, weights, NetworkInfo(config, nimg, std, 'preset', 'data'), dtype=None)
            saved[nimg, std] = weights
    return saved


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp('snapshots') / 'run'


@pytest.fixture(scope='module')
def saved(folder):
    return make_snapshots(folder)


def lengths(*stds):
    return [Wanted.of_length(std) for std in stds]


def test_results_are_the_formula(folder, saved):
    plan = Plan.make(find_snapshots(folder), lengths(0.03, 0.15, 0.2))
    for each, info, weights in plan.reconstruct():
        keys = [(nimg, std) for nimg in TIMES for std in STDS]
        solution = solve([k[0] for k in keys], [k[1] for k in keys], TIMES[-1], each.std)
        for name, t in weights.items():
            if name in CONSTANTS:
                expected = saved[keys[-1]][name]
                assert torch.equal(t, expected)
            else:
                expected = combine([saved[key][name] for key in keys], solution.coefficients).float()
                torch.testing.assert_close(t, expected, rtol=1e-6, atol=1e-6)
        assert info == NetworkInfo(CONFIG, TIMES[-1], each.std, 'preset', 'data')


def test_stored_length_returns_the_snapshot(folder, saved):
    ((_, _, weights),) = Plan.make(find_snapshots(folder), lengths(0.05), TIMES[5]).reconstruct()
    for name, t in saved[TIMES[5], 0.05].items():
        if name in CONSTANTS:  # the test's snapshots differ in them, a run's do not
            continue
        torch.testing.assert_close(weights[name], t, rtol=0, atol=1e-6)


def test_passes_change_nothing(folder, saved):
    plan = Plan.make(find_snapshots(folder), lengths(0.03, 0.08, 0.15, 0.2, 0.25))
    numbers = sum(p.numel() for p in Denoiser(CONFIG).parameters())
    assert [len(part) for part in plan.passes(2.5 * 8 * numbers)] == [2, 2, 1]
    assert [len(part) for part in plan.passes(0)] == [1] * 5 and len(plan.passes(float('inf'))) == 1
    for (a, _, whole), (b, _, parts) in zip(plan.reconstruct(), plan.reconstruct(2.5 * 8 * numbers), strict=True):
        assert a == b
        for name in whole:
            torch.testing.assert_close(whole[name], parts[name], rtol=1e-6, atol=1e-6)


def test_sixteen_bits_are_added_up_in_float32(tmp_path):
    saved = make_snapshots(tmp_path / 'half', torch.float16)
    plan = Plan.make(find_snapshots(tmp_path / 'half'), lengths(0.03))
    ((_, _, weights),) = plan.reconstruct()
    keys = list(saved)
    for name, t in weights.items():
        if name not in CONSTANTS:
            expected = combine([saved[key][name] for key in keys], plan.combinations[0.03].coefficients)
            torch.testing.assert_close(t.double(), expected, rtol=0, atol=1e-5)


def test_lengths_by_pattern(folder, saved, tmp_path):
    (tmp_path / 'mixed.json').write_text(json.dumps({'unet.enc.*': 0.03, '*_gain': 0.2, '*': 0.1}))
    wanted = Wanted.from_file(tmp_path / 'mixed.json')
    assert wanted.label == 'mixed' and wanted.std is None
    assert [wanted.length_of(n) for n in ('unet.enc.8x8_block0.emb_gain', 'unet.out_gain', 'x')] == [0.03, 0.2, 0.1]
    snapshots = find_snapshots(folder)
    ((_, info, mixed),) = Plan.make(snapshots, [wanted]).reconstruct()
    whole = {each.std: weights for each, _, weights in Plan.make(snapshots, lengths(0.03, 0.1, 0.2)).reconstruct()}
    for name, t in mixed.items():
        torch.testing.assert_close(t, whole[wanted.length_of(name)][name], rtol=1e-6, atol=1e-6)
    assert info.ema_std is None and info.ema_lengths == (('unet.enc.*', 0.03), ('*_gain', 0.2), ('*', 0.1))
    save_network(tmp_path / 'mixed.safetensors', mixed, info)
    assert read_info(tmp_path / 'mixed.safetensors') == info


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('{', 'is not JSON'),
        ('[1]', 'must hold patterns and lengths'),
        ('{"*": "0.1"}', 'must hold patterns and lengths'),
        ('[' * 100_000, 'is not JSON'),
        ('{"*": ' + '9' * 5000 + '}', 'is not JSON'),
        ('{"*": 1' + '0' * 400 + '}', 'EMA lengths must be between 0 and 0.2887, not 1000'),
        ('{"*": 1e999}', 'EMA lengths must be between 0 and 0.2887, not inf'),
        ('{"*": NaN}', 'EMA lengths must be between 0 and 0.2887, not nan'),
        ('{"*": {"*": 0.1}}', 'must hold patterns and lengths'),
        ('{"*": 0.3}', 'EMA lengths must be between 0 and 0.2887, not 0.3'),
        ('{"unet.enc.*": 0.1}', 'no pattern matches unet.out_gain; add "*" for the rest'),
        ('{"nothing": 0.1, "*": 0.1}', 'no parameter has a name like nothing'),
    ],
)
def test_bad_patterns(folder, saved, tmp_path, text, message):
    (tmp_path / 'l.json').write_text(text)
    with pytest.raises(UserError) as error:
        Plan.make(find_snapshots(folder), [Wanted.from_file(tmp_path / 'l.json')])
    assert message in str(error.value)


def test_one_stored_length(folder, saved):
    snapshots = find_snapshots(folder, [0.05])
    assert len(snapshots) == len(TIMES) and {s.info.ema_std for s in snapshots} == {0.05}
    both = Plan.make(find_snapshots(folder), lengths(0.1)).combinations[0.1]
    one = Plan.make(snapshots, lengths(0.1)).combinations[0.1]
    assert both.error < 1e-6 < 0.05 < one.error < 0.5
    with pytest.raises(UserError, match=r'no snapshots of length 0\.07, but of 0\.05, 0\.1'):
        find_snapshots(folder, [0.05, 0.07])


def test_doubts_are_told(folder, saved, tmp_path):
    snapshots = find_snapshots(folder)
    assert Plan.make(snapshots, lengths(0.05, 0.1, 0.15)).warnings() == []
    (far,) = Plan.make(snapshots, lengths(0.01)).warnings()
    assert 'more snapshots are needed, or it lies too far from the stored lengths' in far
    (late,) = Plan.make(snapshots, lengths(0.05), TIMES[2] + 2000).warnings()
    assert f'the nearest snapshot before it is at {TIMES[2]} images' in late
    make_snapshots(tmp_path / 'b', torch.bfloat16)
    warnings = Plan.make(find_snapshots(tmp_path / 'b'), lengths(0.03)).warnings()
    assert any('rounding of the snapshots is amplified' in w for w in warnings)


def test_times(folder, saved):
    snapshots = find_snapshots(folder)
    for nimg, message in ((1999, 'no snapshot at or before 1999 images; the first is at 2048'),
                          (99999, 'training ended at 24576 images, before 99999')):  # fmt: skip
        with pytest.raises(UserError, match=message):
            Plan.make(snapshots, lengths(0.1), nimg)
    assert len(Plan.make(snapshots, lengths(0.1), TIMES[3]).snapshots) == 8
    with pytest.raises(UserError, match='first three decimals'):
        Plan.make(snapshots, lengths(0.1, 0.1001))


def test_bad_folders(folder, saved, tmp_path):
    mixed = tmp_path / 'mixed'
    make_snapshots(mixed)
    other = replaced(CONFIG, {'architecture.model_channels': 32})
    path = mixed / 'network-snapshot-0000099-0.050.safetensors'
    save_network(path, Denoiser(other).state_dict(), NetworkInfo(other, 99000, 0.05, 'p'))
    with pytest.raises(UserError, match='is of another network than'):
        find_snapshots(mixed)
    save_network(path, Denoiser(CONFIG).state_dict(), NetworkInfo(CONFIG, TIMES[0], 0.05, 'p'))
    with pytest.raises(UserError, match='has the time and length of'):
        find_snapshots(mixed)
    save_network(path, Denoiser(CONFIG).state_dict(), NetworkInfo(CONFIG, 99000, None, 'p'))
    with pytest.raises(UserError, match='is no power-function EMA'):
        find_snapshots(mixed)
    path.write_bytes(b'')
    with pytest.raises(UserError, match=r'0000099-0\.050\.safetensors is not a network file'):
        find_snapshots(mixed)
    (tmp_path / 'empty').mkdir()
    with pytest.raises(UserError, match='holds no network-snapshot'):
        find_snapshots(tmp_path / 'empty')


def test_numbers_that_are_not_finite_are_traced(tmp_path):
    make_snapshots(tmp_path / 'nan')
    path = tmp_path / 'nan/network-snapshot-0000008-0.050.safetensors'
    net, info = load_network(path)
    weights = net.state_dict()
    weights['unet.out_conv.weight'][0, 0, 0, 0] = float('nan')
    save_network(path, weights, info)
    plan = Plan.make(find_snapshots(tmp_path / 'nan'), lengths(0.08))
    with pytest.raises(UserError, match=r'0000008-0\.050\.safetensors: unet\.out_conv\.weight holds numbers that are'):
        list(plan.reconstruct())


@pytest.mark.parametrize('which', ['first', 'last'])
def test_integer_tensors_are_refused(tmp_path, which):
    make_snapshots(tmp_path)
    path = sorted(tmp_path.iterdir())[3]
    net, info = load_network(path)
    weights = net.state_dict()
    names = [name for name, _ in net.named_parameters() if 'weight' in name]
    name = names[0 if which == 'first' else -1]
    save_network(path, weights | {name: weights[name].long()}, info, dtype=None)
    with pytest.raises(UserError, match=rf'{path.name}: {name} is of .*64, not floating-point numbers'):
        list(Plan.make(find_snapshots(tmp_path), lengths(0.1)).reconstruct())


def test_at_the_command_line(folder, saved, run_script, run_here, tmp_path):
    pytest.importorskip('matplotlib')
    arguments = ('reconstruct_phema.py', f'--indir={folder}', f'--outdir={tmp_path / "out"}')
    process = run_script(*arguments, '--outstd=0.01,0.12', '--outprefix=mine', '--plot=p.png', '--memory=0')
    assert process.returncode == 0, process.stderr
    assert '2 networks in 2 passes over the snapshots' in process.stdout
    assert 'mine-0000024-0.120.safetensors  profile error 0.00' in process.stdout
    assert 'warning: length 0.01: the profile is' in process.stderr
    assert (tmp_path / 'p.png').stat().st_size > 5000
    assert load_network(tmp_path / 'out/mine-0000024-0.120.safetensors')[1].ema_std == 0.12
    broken = folder / 'network-snapshot-0000012-0.050.safetensors'
    whole = broken.read_bytes()
    broken.write_bytes(whole[:-100])
    try:
        process = run_here(*arguments[:2], f'--outdir={tmp_path / "none"}', '--outstd=0.12')
    finally:
        broken.write_bytes(whole)
    assert process.returncode == 2 and '0000012-0.050.safetensors' in process.stderr
    assert not (tmp_path / 'none').exists()


def test_mixed_precisions(folder, saved, tmp_path):
    mixed = {}
    for i, ((nimg, std), weights) in enumerate(saved.items()):
        dtype = (torch.float32, torch.float16, torch.bfloat16)[i % 3]
        mixed[nimg, std] = {n: t if n in CONSTANTS else t.to(dtype) for n, t in weights.items()}
        info = NetworkInfo(CONFIG, nimg, std, 'preset', 'data')
        save_network(tmp_path / f'network-snapshot-{i}.safetensors', mixed[nimg, std], info, dtype=None)
    plan = Plan.make(find_snapshots(tmp_path), lengths(0.15))
    ((_, _, weights),) = plan.reconstruct()
    for name, t in weights.items():
        if name not in CONSTANTS:
            expected = combine([each[name] for each in mixed.values()], plan.combinations[0.15].coefficients).float()
            torch.testing.assert_close(t, expected, rtol=1e-6, atol=1e-6)


def test_a_snapshot_cut_short_meanwhile_is_named(tmp_path):
    make_snapshots(tmp_path / 'run')
    plan = Plan.make(find_snapshots(tmp_path / 'run'), lengths(0.08))
    path = tmp_path / 'run/network-snapshot-0000012-0.050.safetensors'
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(UserError, match=r'0000012-0\.050\.safetensors is not a network file'):
        list(plan.reconstruct())


def test_what_is_refused_before_the_work(folder, saved, tmp_path):
    pytest.importorskip('matplotlib')
    out = tmp_path / 'out'
    arguments = [f'--indir={folder}', f'--outdir={out}', '--outstd=0.12']
    with pytest.raises(UserError, match='look like snapshots'):
        reconstruct_phema.main([*arguments, '--outprefix=network-snapshot'], standalone_mode=False)
    assert not out.exists()
    with pytest.raises(OSError):
        reconstruct_phema.main([*arguments, f'--plot={tmp_path}/none/p.png'], standalone_mode=False)
    assert not list(out.iterdir())


def test_profiles_integrate_to_one():
    times = np.linspace(0, 10, 100001)
    for std in (0.05, 0.25):
        p = profile(times, 8.0, std)
        assert np.trapezoid(p, times) == pytest.approx(1, abs=1e-3) and (p[times > 8] == 0).all()
        assert p[50000] == pytest.approx((std_to_exp(std) + 1) / 8 * (5 / 8) ** std_to_exp(std))


def test_half_life():
    assert halflife_beta(1000, 0, 5000, 1000) == 0.5
    assert halflife_beta(1000, 0.05, 10000, 500) == 0.5  # min(1000, 500)
    assert halflife_beta(1000, 0.05, 0, 500) == 0
    ema = HalfLifeEMA({'w': torch.full((1,), 100.0)}, halflife=1000, rampup=0.5)
    ema.update({'w': torch.zeros(1)}, 1000, 1000)
    assert ema.average['w'] == 0  # the first update copies
    ema.update({'w': torch.ones(1)}, 2000, 1000)
    assert ema.average['w'].item() == pytest.approx(1 - 0.5 ** (1000 / 500))
    ema.update({'w': torch.ones(1)}, 3000, 1000)
    assert ema.average['w'].item() == pytest.approx(1 - 0.25 * 0.5)


def test_traditional_average_of_a_run(config, run):
    config = replaced(config, {'ema.halflife': 512, 'ema.rampup': 0.0, 'snapshot_precision': 'fp32'})
    whole = run('halflife', config)
    run('halves', replace(config, slice=1024))
    halves = run('halves', config)
    a, b = state_tensors(whole), state_tensors(halves)
    assert all(torch.equal(a[name], b[name]) for name in a)
    net, info = load_network(whole / 'network-ema-0000002.safetensors')
    assert info.ema_std is None and info.ema_halflife == 512
    for name, t in net.state_dict().items():
        assert torch.equal(t, a[f'ema/half-life/{name}']), name
    moved = (a['ema/half-life/unet.out_conv.weight'] - a['net/unet.out_conv.weight']).norm()
    assert 0 < moved < a['net/unet.out_conv.weight'].norm()
    assert len(find_snapshots(whole)) == 4 and find_snapshots(whole)[0].dtype == torch.float32
