"""Counts against the papers' tables, and the counter against what can be counted by hand."""

import itertools
import json

import pytest
import torch

import count_flops
from networks.complexity import _Counter, attention_cost, complexity, saved_bytes
from networks.denoiser import Denoiser
from tests.conftest import ROOT
from tests.helpers import edm2_network
from training.presets.paper_tables import TABLES, sid2_gflops
from training.presets.table import get_preset

KNOWN_TO_DIFFER = {('edm2plus-img64-s', 'edm2plus-img64-xs/0'), ('edm2plus-img64-xl',)}  # each with a note


def test_tables_of_the_papers(run_here, monkeypatch):
    """To the last digit that they print, and in the docs what the script prints."""
    tables = json.loads(run_here('count_flops.py', '--tables', '--json').stdout)
    monkeypatch.setattr(count_flops, '_count_tables', lambda: tables)  # counted once
    printed = run_here('count_flops.py', '--tables').stdout
    assert printed in (ROOT / 'docs/networks.md').read_text()
    assert printed.count(' [') == len(KNOWN_TO_DIFFER) and '| 222 [1] | 213 |' in printed
    seen = 0
    for table in tables:
        for row in table['rows']:
            if row['presets'][0].startswith('sid2'):
                continue
            if row['presets'][0].startswith('edm2-ladder'):  # with one more operation for each weight
                row['our_gflops'] += row['our_mparams'] / 1000
            agrees = [
                f'{ours:.{len(row[name].partition(".")[2])}f}' == row[name]
                for name, ours in (('mparams', row['our_mparams']), ('gflops', row['our_gflops']))
            ]
            if tuple(row['presets']) in KNOWN_TO_DIFFER:
                assert agrees == [False, True] and row['note'], row
            else:
                assert all(agrees), row
            seen += 1
    assert seen == 10 + 6 + 9 + 7 + 9


@pytest.mark.parametrize('preset', ['edm2-img64-xs', 'edm2plus-digits', 'edm-digits', 'sid2-digits'])
def test_results_that_are_remembered_change_no_count(preset, monkeypatch):
    remembered = complexity(get_preset(preset).network)
    monkeypatch.setattr('networks.complexity.SLOW', ())
    assert complexity(get_preset(preset).network) == remembered


@pytest.mark.parametrize(
    ('name', 'gflops'),
    [
        *((f'sid2-img{resolution}-small', 137.4) for resolution in (128, 256, 512)),
        *(('sid2-img128-fh', 536.9), ('sid2-img256-fh', 652.8), ('sid2-img512-fh', 652.8), ('sid2-img64-small', 32.7)),
    ],
)
def test_costs_of_sid2(name, gflops):
    """By the paper's formula to the digit, and what there is beside the matrices of the blocks, layer by layer."""
    network = get_preset(name).network
    architecture, resolution = network.architecture, network.img_resolution[0]
    formula = sid2_gflops(architecture, resolution)
    assert round(formula, 1) == gflops
    rest, emb = 0, architecture.emb_channels
    for level, (fine, coarse) in enumerate(itertools.pairwise(architecture.channels)):
        rest += 2 * fine * coarse * (resolution // architecture.patch >> level + 1) ** 2  # D and U, at the coarser side
    rest += 2 * 3 * architecture.channels[0] * resolution**2  # patches in and out
    blocks = [*map(sum, zip(architecture.down_blocks, architecture.up_blocks, strict=True)), architecture.mid_blocks]
    for level, (channels, count) in enumerate(zip(architecture.channels, blocks, strict=True)):
        rest += count * (2 if level < architecture.res_levels else 4) * channels * emb  # modulation
    rest += emb // 4 * emb + emb**2 + 1000 * emb
    cost = complexity(network)
    assert cost.macs == round(formula * 1e9) + rest
    assert cost.macs < cost.operations < 1.05 * cost.macs


def test_largest_model():
    """EDM2 table 2 and appendix D.5: XXL at 512x512, and the operators that dominate it, in gigaflops."""
    cost = complexity(get_preset('edm2-img512-xxl').network)
    assert round(cost.parameters / 1e6, 1) == 1523.2 and round(cost.operations / 1e9, 1) == 552.1
    kinds = {kind: n / 1e9 for kind, n in cost.by_kind.items()}
    resampling = kinds['avg_pool2d'] + kinds['upsample_nearest2d']  # convolutions there
    assert kinds['3x3 convolution'] + kinds['1x1 convolution'] + resampling == pytest.approx(545.50, abs=0.005)
    assert kinds['norm'] == pytest.approx(1.54, abs=0.005)
    assert sum(cost.by_kind.values()) == sum(cost.by_place.values()) == cost.operations


def test_parameters_are_those_of_the_network(tiny_config):
    assert complexity(tiny_config).parameters == sum(p.numel() for p in Denoiser(tiny_config).parameters())


def test_multiply_accumulates_by_hand():
    # One level, one block: everything at 4x4 with 8 channels, all of them in heads of 8.
    config = edm2_network((4, 4), 1, 0, 8, (1,), 1, (), 8, block='A')
    conv, pixels = 9 * 8 * 8 * 16, 16
    blocks = 5  # enc block0, dec in0, in1, block0, block1
    skips = 2 * 16 * 8 * pixels + 2 * 9 * 8 * 8 * pixels  # the wider input of two decoder blocks: conv_skip, conv_res0
    first_and_last = 9 * 2 * 8 * pixels + 9 * 8 * 1 * pixels
    attention = (24 * 8 + 8 * 8) * pixels + 2 * pixels * pixels * 8  # in0 only
    embedding = 8 * 8 + blocks * 8 * 8
    expected = 2 * blocks * conv + skips + first_and_last + attention + embedding
    cost = complexity(config)
    assert cost.macs == expected
    assert set(cost.by_place) == {'embedding', '4x4', 'output'}
    # The output convolution: normalization of its weight (norm, add, div, mul by the gain), the gain's own division.
    weight = 9 * 8
    assert cost.by_place['output'] == pytest.approx(9 * 8 * pixels + 3 * weight, abs=80)  # and the final combination


def test_peak_by_hand():
    with torch.device('meta'):
        x, w = torch.empty(256), torch.empty(1000)
    counter = _Counter([w])
    with torch.no_grad(), counter:
        y = x + 1  # 1 KiB
        y = y * 2  # 2 KiB while both are there
        z = y + 1  # 2 KiB: the first is gone
        del y, z
        _ = w * 2 * 3  # weights are no activations
    assert counter.peak == 2 * 1024 and counter.bytes == 0


def test_attention_by_hand():
    q = torch.empty(1, 2, 6, 4)  # 2 heads, 6 pixels, 4 channels
    macs = 2 * (2 * 6 * 6 * 4)
    assert attention_cost(q, q) == (macs + 48 + 3 * 72, macs)


def test_memory(tiny_config):
    narrow, wide = complexity(tiny_config), complexity(edm2_network((8, 8), 1, 10, 32, (1, 2), 1, (4,), 16))
    assert wide.peak_bytes > narrow.peak_bytes
    # At least the input of each of the blocks' SiLUs, in float32: 16 channels at 8x8 in four blocks, two in each.
    assert saved_bytes(tiny_config) > 4 * 2 * 16 * 64 * 4
    assert saved_bytes(tiny_config, 'bf16') < 0.75 * saved_bytes(tiny_config)


# Parameters in millions and GFLOPs as EDM2 table 6 and spec/edm2.md print them, for rows that no table has.
PRINTED = {
    'edm2-img512-xs': ('124.7', '45.5'),
    'edm2-img512-s': ('280.2', '101.9'),  # EDM2 prints 102.2, which no count of the formulas gives
    'edm2-img512-m': ('497.8', '180.8'),
    'edm2-img512-l': ('777.5', '282.1'),  # EDM2 prints 282.2
    'edm2-img512-xl': ('1119.3', '405.9'),
    'edm2-img64-m': ('497.8', '180.8'),
    'edm2-img64-l': ('777.5', '282.1'),
    'edm2-img64-xl': ('1119.3', '405.8'),  # EDM2 prints 405.9
    'edm2plus-img64-m': ('273.21', '89.00'),
    'edm2plus-img64-xs': ('68.69', '22.71'),
    'edm2plus-img64-l': ('426.40', '138.49'),
    'edm2plus-img64-xl': ('613.55', '198.88'),
}


@pytest.mark.parametrize('name', PRINTED)
def test_sizes_of_presets(name):
    cost = complexity(get_preset(name).network)
    for value, text in zip((cost.parameters / 1e6, cost.operations / 1e9), PRINTED[name], strict=True):
        assert f'{value:.{len(text.partition(".")[2])}f}' == text


def test_results_of_presets_are_those_of_the_tables():
    checked = 0
    for row in (row for table in TABLES for row in table.rows if len(row.presets) == 1 and 'baseline' not in row.label):
        if not row.fid:
            continue
        result = get_preset(row.presets[0]).result
        assert result.startswith(f'FID {row.fid}'), row
        checked += 1
    assert checked == 8 + 5 + 7 + 7 + 5 + 9
