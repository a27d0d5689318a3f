"""What a network is: enough to build it, stored in every network file."""

import dataclasses
from typing import Any

from diffusion.preconditioning import EDM, PRECONDITIONINGS
from dnnlib.configs import from_json, tagged, to_json
from dnnlib.errors import UserError
from networks.families import ARCHITECTURES
from networks.interface import LARGEST, Interface

UNCERTAINTY_CHANNELS = 128  # of EDM2's uncertainty head


@dataclasses.dataclass(frozen=True)
class NetworkConfig:
    """What every denoiser has, and the architecture inside it.

    Args:
        img_resolution: (height, width) in pixels (or latents).
        img_channels: Channels of the images.
        label_dim: Number of classes; 0 makes an unconditional network.
        architecture: Numbers of a family, see `networks.families`.
        preconditioning: See `diffusion.preconditioning`.
        uncertainty: Fourier channels of the uncertainty head u(sigma) (EDM2 eq. 21); 0 for none.
        augment_dim: Numbers that tell the network how an image was augmented; 0 for none.
    """

    img_resolution: tuple[int, int]
    img_channels: int
    label_dim: int
    architecture: Any = tagged(ARCHITECTURES, 'family')
    preconditioning: Any = tagged(PRECONDITIONINGS, default=EDM())
    uncertainty: int = 0
    augment_dim: int = 0

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the images."""
        return (self.img_channels, *self.img_resolution)

    @property
    def interface(self) -> Interface:
        """What the architecture is built for."""
        out_channels = self.preconditioning.out_channels(self.img_channels)
        return Interface(self.img_resolution, self.img_channels, out_channels, self.label_dim, self.augment_dim)

    def problems(self) -> list[str]:
        """Everything that is wrong with this config, in words; empty if it can be built."""
        found = [
            f'{name} must be at least {least}, not {getattr(self, name)}'
            for name, least in (('img_channels', 1), ('label_dim', 0), ('uncertainty', 0), ('augment_dim', 0))
            if getattr(self, name) < least
        ]
        if min(self.img_resolution) < 1:
            found.append(f'img_resolution must be a height and a width, not {self.img_resolution}')
        numbers = (*self.img_resolution, self.img_channels, self.label_dim, self.uncertainty, self.augment_dim)
        if max(numbers) > LARGEST:
            found.append(f'sizes above {LARGEST} are not built')
        return found or [*self.preconditioning.problems(), *self.architecture.problems(self.interface)]

    def check(self) -> 'NetworkConfig':
        """Return self."""
        if found := self.problems():
            raise UserError(found)
        return self

    def to_json(self) -> dict[str, Any]:
        """As plain values for a header; `from_json` is its inverse."""
        return to_json(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> 'NetworkConfig':
        """Rebuild a config that `to_json` wrote, now or when EDM2 was the only family, and check it."""
        if isinstance(values, dict) and 'architecture' not in values:
            values = _edm2_alone(values)
        return from_json(cls, values).check()


def _edm2_alone(values: dict[str, Any]) -> dict[str, Any]:
    """The config of a file from when all networks were EDM2's, and their fields lay side by side."""
    common = {name: v for name, v in values.items() if name in ('img_resolution', 'img_channels', 'label_dim')}
    rest = {name: v for name, v in values.items() if name not in (*common, 'sigma_data')}
    sigma_data = {'sigma_data': values['sigma_data']} if 'sigma_data' in values else {}
    return {
        **common,
        'architecture': {'family': 'edm2', **rest},
        'preconditioning': {'name': 'edm', **sigma_data},
        'uncertainty': UNCERTAINTY_CHANNELS,
    }
