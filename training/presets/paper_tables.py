"""Sizes and quality of the papers' models, as printed, to hold ours against."""

import dataclasses

from networks.sid2.config import UViTConfig
from training.presets.sid2 import PRESETS as SID2


@dataclasses.dataclass(frozen=True)
class PublishedRow:
    """A row of a table.

    Args:
        label: What the paper calls it.
        presets: Ours; several are networks that are used together; `NAME/0` is that preset without classes.
        mparams, gflops: As printed, with the digits printed; nothing where the paper does not tell.
        fid: FID-50K as printed.
        note: Why ours differ, where they do.
    """

    label: str
    presets: tuple[str, ...]
    mparams: str
    gflops: str
    fid: str
    note: str = ''


@dataclasses.dataclass(frozen=True)
class PublishedTable:
    """A table of a paper.

    Args:
        title: With what is in it.
        rows: From top to bottom.
        note: Why ours differ, where all do for one reason.
        unit: Of the second size: `GFLOPs` are operations in EDM2's convention, `GMACs` multiply-accumulates of
            convolutions, linear layers and attention alone.
    """

    title: str
    rows: tuple[PublishedRow, ...]
    note: str = ''
    unit: str = 'GFLOPs'


def sid2_gflops(architecture: UViTConfig, resolution: int) -> float:
    """What SiD2 counts for a network, in 10^9 multiply-accumulates (SiD2 appendix A.2): the matrices of its blocks."""
    total, mid = 0, len(architecture.channels) - 1
    for level, channels in enumerate(architecture.channels):
        tokens = (resolution // architecture.patch >> level) ** 2
        blocks = architecture.mid_blocks
        if level < mid:
            blocks = architecture.down_blocks[level] + architecture.up_blocks[level]
        if level < architecture.res_levels:
            total += blocks * 18 * channels**2 * tokens
        else:
            total += blocks * (12 * channels**2 * tokens + 2 * channels * tokens**2)
    return total / 1e9


def _sid2(label: str, preset: str, fid: str) -> PublishedRow:
    architecture, resolution = SID2[preset].network.architecture, SID2[preset].network.img_resolution[0]
    return PublishedRow(label, (preset,), '', f'{sid2_gflops(architecture, resolution):.1f}', fid)


_S = 'edm2plus-img64-s'
_BASELINE = PublishedRow('A conv, c192 (baseline reproduced)', ('edm2-img64-s',), '280.21', '101.90', '1.63')
_DSTAR = PublishedRow('D* dsconv, e4, linear bottleneck', (f'{_S}-dstar',), '195.59', '51.09', '1.60')
_GUIDE_NOTE = (
    'The unconditional XS guide has 68.18 by the same definition that gives all other rows; 213 cannot be derived.'
)
_F = PublishedRow('F +dwconv at the end', (f'{_S}-f',), '195.76', '51.26', '1.68')
_G = PublishedRow('G -dwconv in the middle', (f'{_S}-g',), '195.11', '50.61', '1.66')

TABLES = (
    PublishedTable(
        'Table 1: the denoising network block',
        (
            PublishedRow('baseline (original publication)', ('edm2-img64-s',), '280.21', '101.90', '1.58'),
            _BASELINE,
            PublishedRow('B dwconv, c384', (f'{_S}-b',), '252.28', '51.13', '1.81'),
            PublishedRow('C dsconv, e6', (f'{_S}-c',), '273.99', '72.52', '1.75'),
            PublishedRow('D dsconv, e6, linear bottleneck', (f'{_S}-d',), '273.99', '72.44', '1.57'),
            _DSTAR,
            PublishedRow('E mbconv, e6', (f'{_S}-e',), '273.76', '72.27', '1.63'),
            PublishedRow('E⋄ mbconv, e6, k7', (f'{_S}-ek7',), '278.05', '75.27', '1.64'),
            _F,
            _G,
        ),
    ),
    PublishedTable(
        'Table 2: embedding and denoising network',
        (
            _BASELINE,
            _DSTAR,
            _F,
            PublishedRow('F* +dwconv at the end, embed bottleneck', (f'{_S}-fstar',), '154.61', '51.05', '1.60'),
            _G,
            PublishedRow('G* -dwconv in the middle, embed bottleneck', (_S,), '153.97', '50.41', '1.58'),
        ),
    ),
    PublishedTable(
        'Table 3: EDM2 and EDM2+ on ImageNet at 64x64, deterministic sampling',
        (
            PublishedRow('EDM2-S', ('edm2-img64-s',), '280', '102', '1.58'),
            PublishedRow('EDM2-S + autoguidance(XS)', ('edm2-img64-s', 'edm2-img64-xs'), '405', '147', '1.01'),
            PublishedRow('EDM2-M', ('edm2-img64-m',), '498', '181', '1.43'),
            PublishedRow('EDM2-L', ('edm2-img64-l',), '777', '282', '1.33'),
            PublishedRow('EDM2-XL', ('edm2-img64-xl',), '1119', '406', '1.33'),
            PublishedRow('EDM2+-S', (_S,), '154', '50', '1.58'),
            PublishedRow('EDM2+-S + autoguidance(XS)', (_S, 'edm2plus-img64-xs/0'), '213', '73', '1.00', _GUIDE_NOTE),
            PublishedRow('EDM2+-L', ('edm2plus-img64-l',), '426', '138', '1.33'),
            PublishedRow(
                'EDM2+-XL', ('edm2plus-img64-xl',), '613', '199', '1.33', 'The paper cuts instead of rounding.'
            ),
        ),
    ),
    PublishedTable(
        "EDM2's table 1: from ADM to EDM2 on latents of ImageNet-512",
        (
            PublishedRow('A EDM: ADM', ('edm2-ladder-a',), '295.9', '110.4', '8.00'),
            PublishedRow('B minor improvements', ('edm2-ladder-b',), '291.8', '100.4', '7.24'),
            PublishedRow('C architectural streamlining', ('edm2-ladder-c',), '277.8', '100.3', '6.96'),
            PublishedRow('D magnitude-preserving learned layers', ('edm2-ladder-d',), '277.8', '101.2', '3.75'),
            PublishedRow('E control of the effective learning rate', ('edm2-ladder-e',), '277.8', '101.2', '3.02'),
            PublishedRow('F no group normalizations', ('edm2-ladder-f',), '280.2', '102.1', '2.71'),
            PublishedRow('G magnitude-preserving fixed-function layers', ('edm2-ladder-g',), '280.2', '102.2', '2.56'),
        ),
        note='The paper counts about 0.28 GFLOPs more than the formulas have, in every row. One more operation per '
        'weight, such as a gain of its own, makes all seven agree; the steps from row to row do as they are.',
    ),
    PublishedTable(
        'SiD2 on ImageNet, pixels',
        (
            _sid2('small, 128x128', 'sid2-img128-small', ''),
            _sid2('small, 256x256', 'sid2-img256-small', '1.72'),
            _sid2('small, 512x512', 'sid2-img512-small', '2.19'),
            _sid2('flop heavy, 128x128', 'sid2-img128-fh', '1.26'),
            _sid2('flop heavy, 256x256', 'sid2-img256-fh', '1.38'),
            _sid2('flop heavy, 512x512', 'sid2-img512-fh', '1.48'),
        ),
        note='The paper has a formula (appendix A.2), which counts the matrices of the blocks. The rest of ours is '
        'layers between levels, patches and modulation (under 1 %), and what is done element by element.',
    ),
    PublishedTable(
        'EDM table 2 (configuration F) and ImageNet-64; the paper has no sizes, these are of its networks',
        (
            PublishedRow('CIFAR-10, classes, DDPM++', ('edm-cifar10-cond-vp',), '55.735299', '21.190216064', '1.79'),
            PublishedRow('CIFAR-10, classes, NCSN++', ('edm-cifar10-cond-ve',), '56.400643', '21.389377280', '1.79'),
            PublishedRow('CIFAR-10, DDPM++', ('edm-cifar10-uncond-vp',), '55.733891', '21.190214784', '1.97'),
            PublishedRow('CIFAR-10, NCSN++', ('edm-cifar10-uncond-ve',), '56.397827', '21.389374720', '1.98'),
            PublishedRow('FFHQ-64, DDPM++', ('edm-ffhq64-vp',), '61.805571', '41.861448832', '2.39'),
            PublishedRow('FFHQ-64, NCSN++', ('edm-ffhq64-ve',), '62.761091', '42.408591104', '2.53'),
            PublishedRow('AFHQv2-64, DDPM++', ('edm-afhqv2-64-vp',), '61.805571', '41.861448832', '1.96'),
            PublishedRow('AFHQv2-64, NCSN++', ('edm-afhqv2-64-ve',), '62.761091', '42.408591104', '2.16'),
            PublishedRow('ImageNet-64, classes, ADM', ('edm-imagenet64-adm',), '295.899267', '109.657552896', '1.36'),
        ),
        unit='GMACs',
    ),
)
