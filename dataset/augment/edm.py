"""Augmentation that does not leak into what is generated: the network is told what was done (EDM appendix F.2)."""

import dataclasses
import math
from collections.abc import Callable, Sequence

import torch

from dataset.augment import warp
from dnnlib.errors import UserError
from torch_utils.random import stream

SCALE_STD = 0.2  # of log2, also of anisotropic scaling
TRANSLATE_STD = 0.125  # of the image's side
TRANSLATE_MAX = 0.125  # likewise, in whole pixels
BRIGHTNESS_STD = 0.2
CONTRAST_STD = 0.5  # of log2
SATURATION_STD = 1.0  # of log2


@dataclasses.dataclass(frozen=True)
class Transform:
    """A row of TRANSFORMS.

    Args:
        draws: How each of its parameters is drawn: a name of DRAWS. All 0 is no change.
        labels: What tells the network of it: parameters, [N] each, -> numbers, [N] each. By default themselves.
    """

    draws: tuple[str, ...]
    labels: Callable[..., Sequence[torch.Tensor]] = lambda *parameters: parameters


# From numbers uniform in [0, 1).
DRAWS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    'coin': lambda u: (2 * u).floor(),
    'quarter': lambda u: (4 * u).floor(),
    'normal': lambda u: torch.special.ndtri(u.clamp(min=2.0**-54)),
    'symmetric': lambda u: 2 * u - 1,
    'angle': lambda u: (2 * u - 1) * math.pi,
    'half angle': lambda u: torch.where(u < 0.5, (4 * u - 1) * math.pi, 0),  # with probability 0.5, otherwise 0
}


def _circle(angle: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return angle.cos() - 1, angle.sin()


# In the order in which they are done and their labels stand.
TRANSFORMS: dict[str, Transform] = {
    'xflip': Transform(('coin',)),
    'yflip': Transform(('coin',)),
    'rotate_int': Transform(('quarter',), lambda k: ((k == 1) | (k == 2), (k == 2) | (k == 3))),
    'translate_int': Transform(('symmetric', 'symmetric')),
    'scale': Transform(('normal',)),
    'rotate_frac': Transform(('angle',), _circle),
    'aniso': Transform(('normal', 'half angle'), lambda w, r: (w * r.cos(), w * r.sin())),
    'translate_frac': Transform(('normal', 'normal')),
    'brightness': Transform(('normal',)),
    'contrast': Transform(('normal',)),
    'lumaflip': Transform(('coin',)),
    'hue': Transform(('angle',), _circle),
    'saturation': Transform(('normal',)),
}
GEOMETRIC = ('scale', 'rotate_frac', 'aniso', 'translate_frac')
Parameters = dict[str, list[torch.Tensor]]  # of each transform, float64 [N] each, 0 where it is not done


@dataclasses.dataclass(frozen=True)
class EDMAugment:
    """EDM's pipeline: every transform with probability min(1, p times its multiplier), each for itself.

    The defaults are those of CIFAR-10. Scaling and all after it need images of 1 or 3 channels where they change color.

    Args:
        p: Common probability.
        xflip, yflip: Mirror at the vertical and at the horizontal axis, every second time.
        rotate_int: Quarter turns, of square images.
        translate_int: Shift by whole pixels, up to an eighth of the side.
        scale: Zoom by 2^(0.2 w), w ~ N(0, 1).
        rotate_frac: Turn by any angle.
        aniso: Stretch by 2^(0.2 w), and shrink across, along an axis that is horizontal every second time.
        translate_frac: Shift with a standard deviation of an eighth of the side.
        brightness: Add 0.2 w.
        contrast: Multiply by 2^(0.5 w).
        lumaflip: Mirror luminance, every second time.
        hue: Turn colors around the gray axis.
        saturation: Multiply colors' distance to it by 2^w.
    """

    p: float = 0.12
    xflip: float = 1e8
    yflip: float = 1.0
    rotate_int: float = 0.0
    translate_int: float = 0.0
    scale: float = 1.0
    rotate_frac: float = 1.0
    aniso: float = 1.0
    translate_frac: float = 1.0
    brightness: float = 0.0
    contrast: float = 0.0
    lumaflip: float = 0.0
    hue: float = 0.0
    saturation: float = 0.0

    @property
    def dim(self) -> int:
        """Length of the labels: of the transforms that are done at all."""
        return self.labels(self.neutral(1)).shape[1]

    def probability(self, name: str) -> float:
        """How often a transform is done."""
        return min(1.0, getattr(self, name) * self.p)

    def __call__(self, images: torch.Tensor, seed: int, numbers: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Augment a batch.

        Args:
            images: float32 [N, C, H, W].
            seed: Of the run.
            numbers: Of the images, counted over the whole run; an image's transforms depend on (seed, number) alone.

        Returns:
            The images, and float32 [N, dim] on the same device, what was done to them.
        """
        parameters = self.draw(seed, numbers)
        return apply(images, parameters), self.labels(parameters).to(images.device)

    def draw(self, seed: int, numbers: Sequence[int]) -> Parameters:
        """Parameters of all transforms. All are drawn always, so that no probability changes another's."""
        count = sum(1 + len(transform.draws) for transform in TRANSFORMS.values())
        uniform = torch.stack(
            [torch.rand(count, dtype=torch.float64, generator=stream(seed, 'augment', n)) for n in numbers]
        )
        columns, parameters = iter(uniform.unbind(dim=1)), {}
        for name, transform in TRANSFORMS.items():
            done = next(columns) < self.probability(name)
            parameters[name] = [torch.where(done, DRAWS[draw](next(columns)), 0) for draw in transform.draws]
        return parameters

    def neutral(self, count: int) -> Parameters:
        """Parameters that change nothing, of `count` images."""
        zeros = torch.zeros(count, dtype=torch.float64)
        return {name: [zeros for _ in transform.draws] for name, transform in TRANSFORMS.items()}

    def labels(self, parameters: Parameters) -> torch.Tensor:
        """What the network is told, float32 [N, dim]."""
        numbers = [
            transform.labels(*parameters[name]) for name, transform in TRANSFORMS.items() if self.probability(name)
        ]
        return torch.stack([number.float() for group in numbers for number in group], dim=1)

    def problems(self) -> list[str]:
        """Everything that is wrong with it, in words."""
        values = dataclasses.asdict(self)
        found = [
            f'{name} must be a finite number of at least 0, not {v}'
            for name, v in values.items()
            if not 0 <= v < math.inf
        ]
        if self.p > 1:
            found.append(f'p must be at most 1, not {self.p}')
        if not found and not any(self.probability(name) for name in TRANSFORMS):
            found.append('the augmentation does nothing: leave it out')
        return found


def apply(images: torch.Tensor, parameters: Parameters) -> torch.Tensor:
    """Do what the parameters say to images, float32 [N, C, H, W]."""
    for name, dim in (('xflip', 3), ('yflip', 2)):
        flipped = _for_images(parameters[name][0] == 1, images)
        images = torch.where(flipped, images.flip(dim), images)
    (turns,) = parameters['rotate_int']
    for k in (1, 2, 3):
        if (turns == k).any():
            if images.shape[2] != images.shape[3]:
                raise UserError(f'quarter turns need square images, not {tuple(images.shape[2:])}')
            images = torch.where(_for_images(turns == k, images), images.rot90(k, dims=(2, 3)), images)
    images = _shifted(images, *parameters['translate_int'])
    moved = _changed(parameters, GEOMETRIC)
    if moved.any():
        index, images = moved.nonzero()[:, 0], images.clone()
        place = index.to(images.device)
        matrices = _geometry(parameters, images.shape[2], images.shape[3])[index]
        images[place] = warp.warp(images[place], matrices)
    if _changed(parameters, tuple(TRANSFORMS)[-5:]).any():
        images = _colored(images, _color(parameters).to(images))
    return images


def _for_images(mask: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    return mask.to(images.device)[:, None, None, None]


def _changed(parameters: Parameters, names: Sequence[str]) -> torch.Tensor:
    """Which images any of these transforms changes, bool [N]."""
    return torch.stack([parameter != 0 for name in names for parameter in parameters[name]]).any(dim=0)


def _shifted(images: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Images moved by whole pixels, reflected at their borders; x and y are parts of the longest way."""
    if not (x != 0).any() and not (y != 0).any():
        return images
    rows = []
    for w, side in ((y, images.shape[2]), (x, images.shape[3])):
        shift = (w * TRANSLATE_MAX * side).round()
        source = torch.arange(side) - shift[:, None]
        rows.append((side - 1 - (side - 1 - source % (2 * side - 2)).abs()).long().to(images.device))
    n, c = (torch.arange(size, device=images.device) for size in images.shape[:2])
    return images[n[:, None, None, None], c[:, None, None], rows[0][:, None, :, None], rows[1][:, None, None, :]]


def _geometry(parameters: Parameters, height: int, width: int) -> torch.Tensor:
    """Where a pixel of the result comes from, float64 [N, 3, 3]."""
    (scale,), (turn,), (stretch, axis) = (parameters[name] for name in GEOMETRIC[:3])
    x, y = parameters['translate_frac']
    zoom, pull = 2 ** (SCALE_STD * scale), 2 ** (SCALE_STD * stretch)
    return (
        warp.scaling(1 / zoom, 1 / zoom)
        @ warp.rotation(turn)
        @ warp.rotation(-axis)
        @ warp.scaling(1 / pull, pull)
        @ warp.rotation(axis)
        @ warp.translation(-x * TRANSLATE_STD * width, -y * TRANSLATE_STD * height)
    )


def _color(parameters: Parameters) -> torch.Tensor:
    """What is done to colors (r, g, b, 1), float64 [N, 3, 4]; the first transform is the rightmost."""
    (brightness,), (contrast,), (lumaflip,), (hue,), (saturation,) = (
        parameters[name] for name in tuple(TRANSFORMS)[-5:]
    )
    eye = torch.eye(3, dtype=torch.float64)
    gray = torch.full((3, 3), 1 / 3, dtype=torch.float64)  # onto the gray axis
    cross = torch.tensor([[0, -1, 1], [1, 0, -1], [-1, 1, 0]], dtype=torch.float64) / math.sqrt(3)  # with that axis
    brightness, contrast, lumaflip, hue, saturation = (
        w[:, None, None] for w in (brightness, contrast, lumaflip, hue, saturation)
    )
    matrix = eye * 2 ** (CONTRAST_STD * contrast)
    matrix = (eye - 2 * lumaflip * gray) @ matrix
    matrix = (hue.cos() * eye + hue.sin() * cross + (1 - hue.cos()) * gray) @ matrix  # Rodrigues
    matrix = (gray + 2 ** (SATURATION_STD * saturation) * (eye - gray)) @ matrix
    return torch.cat([matrix, matrix.sum(dim=2, keepdim=True) * BRIGHTNESS_STD * brightness], dim=2)


def _colored(images: torch.Tensor, matrices: torch.Tensor) -> torch.Tensor:
    """Images of 3 channels, or gray ones of 1, through color matrices [N, 3, 4]."""
    if images.shape[1] == 1:
        matrices = torch.stack([matrices[:, :, :3].sum(dim=(1, 2)), matrices[:, :, 3].sum(dim=1)], dim=1)[:, None] / 3
    elif images.shape[1] != 3:
        raise UserError(f'colors can be changed of images with 1 or 3 channels, not {images.shape[1]}')
    mixed = (matrices[:, :, :-1, None, None] * images[:, None]).sum(dim=2)
    return mixed + matrices[:, :, -1, None, None]
