"""The networks that NVIDIA published for EDM and EDM2, and what to make images with: one table, a model is a row.

Names, times, EMA lengths, weights, samplers and results are those that the papers of EDM, EDM2 and of autoguidance
report, for 50,000 images, the best of three sets.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any

from dnnlib.errors import UserError, choose

BASE_URL = 'https://nvlabs-fi-cdn.nvidia.com/edm2/posthoc-reconstructions/'
EDM_URL = 'https://nvlabs-fi-cdn.nvidia.com/edm/pretrained/'
LICENCE = 'CC BY-NC-SA 4.0, NVIDIA Corporation'


@dataclasses.dataclass(frozen=True)
class PublishedModel:
    """How to generate with published networks.

    Args:
        net: File name of the network, without the extension: model, thousands of training images, EMA length.
        gnet: The same of the guiding network; None for no guidance.
        guidance: Guidance weight.
        metric: `FID` or `FD-DINOv2`, for which the EMA lengths and the weight were chosen.
        result: As published.
        folder: URL of the folder of both files.
        sampler: What the network's file shall say of its sampler (`NetworkInfo.sampler`).
    """

    net: str
    gnet: str | None
    guidance: float
    metric: str
    result: str
    folder: str = BASE_URL
    sampler: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def net_url(self) -> str:
        """Where the network is published."""
        return f'{self.folder}{self.net}.pkl'

    @property
    def gnet_url(self) -> str | None:
        """Where the guiding network is published."""
        return self.gnet and f'{self.folder}{self.gnet}.pkl'

    @property
    def ema_std(self) -> str:
        """EMA length of the network, as its name writes it."""
        return self.net.rpartition('-')[2]


FID, DINO = 'FID', 'FD-DINOv2'
_IMG512_KIMG = {
    'xs': '2147483',
    's': '2147483',
    'm': '2147483',
    'l': '1879048',
    'xl': '1342177',
    'xxl': '0939524',
}
_IMG64_KIMG = {'s': '1073741', 'm': '2147483', 'l': '1073741', 'xl': '0671088'}


def _plain(data: str, kimg: dict[str, str], metric: str, rows: Iterable[tuple]) -> dict[str, PublishedModel]:
    """Models without guidance, from rows of (size, EMA length, result)."""
    return {
        f'edm2-{data}-{size}-{_SHORT[metric]}': PublishedModel(
            f'edm2-{data}-{size}-{kimg[size]}-{ema}', None, 1.0, metric, result
        )
        for size, ema, result in rows
    }


def _guided(metric: str, rows: Iterable[tuple]) -> dict[str, PublishedModel]:
    """Classifier-free guidance by the unconditional xs, from rows of (size, weight, EMA length of both, result)."""
    return {
        f'edm2-img512-{size}-guid-{_SHORT[metric]}': PublishedModel(
            f'edm2-img512-{size}-{_IMG512_KIMG[size]}-{ema}',
            f'edm2-img512-xs-uncond-2147483-{ema}',
            weight,
            metric,
            result,
        )
        for size, weight, ema, result in rows
    }


def _autoguided(rows: Iterable[tuple]) -> dict[str, PublishedModel]:
    """Guidance by a smaller network, trained for less time: rows of (name, metric, net, gnet, weight, result)."""
    return {
        f'edm2-{name}-autog-{_SHORT[metric]}': PublishedModel(f'edm2-{net}', f'edm2-{gnet}', weight, metric, result)
        for name, metric, net, gnet, weight, result in rows
    }


def _edm(steps: int, rows: Iterable[tuple], folder: str = EDM_URL) -> dict[str, PublishedModel]:
    """EDM's: rows of (name, result, options of its stochastic sampler as S_churn, S_min, S_max, S_noise, or None)."""
    models = {}
    for name, result, churn in rows:
        options = zip(('S_churn', 'S_min', 'S_max', 'S_noise'), churn or (), strict=churn is not None)
        sampler = {'steps': steps, 'sampler': {'name': 'heun', 'noise_always': True, **dict(options)}}
        models[name] = PublishedModel(name, None, 1.0, FID, result, folder, sampler)
    return models


_SHORT = {FID: 'fid', DINO: 'dino'}

# fmt: off
MODELS: dict[str, PublishedModel] = {
    **_plain('img512', _IMG512_KIMG, FID, (
        ('xs', '0.135', '3.53'), ('s', '0.130', '2.56'), ('m', '0.100', '2.25'),
        ('l', '0.085', '2.06'), ('xl', '0.085', '1.96'), ('xxl', '0.070', '1.91'),
    )),
    **_plain('img512', _IMG512_KIMG, DINO, (
        ('xs', '0.200', '103.39'), ('s', '0.190', '68.64'), ('m', '0.155', '58.44'),
        ('l', '0.155', '52.25'), ('xl', '0.155', '45.96'), ('xxl', '0.150', '42.84'),
    )),
    **_plain('img64', _IMG64_KIMG, FID, (
        ('s', '0.075', '1.58'), ('m', '0.060', '1.43'), ('l', '0.040', '1.33'), ('xl', '0.040', '1.33'),
    )),
    **_guided(FID, (
        ('xs', 1.4, '0.045', '2.91'), ('s', 1.4, '0.025', '2.23'), ('m', 1.2, '0.030', '2.01'),
        ('l', 1.2, '0.015', '1.88'), ('xl', 1.2, '0.020', '1.85'), ('xxl', 1.2, '0.015', '1.81'),
    )),
    **_guided(DINO, (
        ('xs', 1.7, '0.150', '79.94'), ('s', 1.9, '0.085', '52.32'), ('m', 2.0, '0.015', '41.98'),
        ('l', 1.7, '0.035', '38.20'), ('xl', 1.7, '0.030', '35.67'), ('xxl', 1.7, '0.015', '33.09'),
    )),
    **_autoguided((
        ('img512-s', FID, 'img512-s-2147483-0.070', 'img512-xs-0134217-0.125', 2.10, '1.34'),
        ('img512-s', DINO, 'img512-s-2147483-0.120', 'img512-xs-0134217-0.165', 2.45, '36.67'),
        ('img512-xxl', FID, 'img512-xxl-0939524-0.075', 'img512-m-0268435-0.155', 2.05, '1.25'),
        ('img512-xxl', DINO, 'img512-xxl-0939524-0.130', 'img512-m-0268435-0.205', 2.30, '24.18'),
        ('img512-s-uncond', FID, 'img512-s-uncond-2147483-0.070', 'img512-xs-uncond-0134217-0.110', 2.85, '3.86'),
        ('img512-s-uncond', DINO, 'img512-s-uncond-2147483-0.090', 'img512-xs-uncond-0134217-0.125', 2.90, '90.39'),
        ('img64-s', FID, 'img64-s-1073741-0.045', 'img64-xs-0134217-0.110', 1.70, '1.01'),
        ('img64-s', DINO, 'img64-s-1073741-0.105', 'img64-xs-0134217-0.175', 2.20, '31.85'),
    )),
    **_edm(18, (
        ('edm-cifar10-32x32-cond-vp', '1.79', None), ('edm-cifar10-32x32-cond-ve', '1.79', None),
        ('edm-cifar10-32x32-uncond-vp', '1.97', None), ('edm-cifar10-32x32-uncond-ve', '1.98', None),
    )),
    **_edm(40, (
        ('edm-ffhq-64x64-uncond-vp', '2.39', None), ('edm-ffhq-64x64-uncond-ve', '2.53', None),
        ('edm-afhqv2-64x64-uncond-vp', '1.96', None), ('edm-afhqv2-64x64-uncond-ve', '2.16', None),
    )),
    **_edm(256, (('edm-imagenet-64x64-cond-adm', '1.36', (40.0, 0.05, 50.0, 1.003)),)),
    # Networks of Song et al. and of Dhariwal and Nichol. Of CIFAR-10's the paper gives the churn, and no FID with it.
    **_edm(256, (
        ('baseline-cifar10-32x32-uncond-vp', '', (30.0, 0.01, 1.0, 1.007)),
        ('baseline-cifar10-32x32-uncond-ve', '', (80.0, 0.05, 1.0, 1.007)),
        ('baseline-imagenet-64x64-cond-adm', '1.55', (80.0, 0.05, 50.0, 1.003)),
    ), f'{EDM_URL}baseline/'),
}
# fmt: on
SAMPLERS = {model.net: model.sampler for model in MODELS.values() if model.sampler}


def resolve_model(
    preset: str | None, net: str | None, gnet: str | None, guidance: float | None
) -> tuple[str, str | None, float]:
    """Network, guiding network and guidance weight: as given, else those of a published model.

    Args:
        preset: Name of a published model, or None.
        net, gnet: Files or URLs that replace the model's.
        guidance: Replaces the model's weight; 1 by default where there is no model.
    """
    if preset is None:
        if not net:
            raise UserError("Missing option '--net' (a network file), or '--preset' (see --list-presets)")
        return net, gnet, 1.0 if guidance is None else guidance
    model = choose('preset', preset, MODELS)
    return net or model.net_url, gnet or model.gnet_url, model.guidance if guidance is None else guidance


def models_table() -> str:
    """All models, a line for each."""
    rows = [('preset', 'network', 'guiding network', 'guidance', 'published')]
    for name, model in MODELS.items():
        weight = '' if model.gnet is None else f'{model.guidance:.2f}'
        rows.append(
            (name, model.net, model.gnet or '', weight, f'{model.metric} {model.result}' if model.result else '')
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ['  '.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return '\n'.join(
        [*lines, '', f'Numbers at the end of names: thousands of training images, EMA length. Weights: {LICENCE}.']
    )
