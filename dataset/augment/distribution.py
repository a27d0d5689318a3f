"""Distribution augmentation (Jun et al. 2020): the network learns turned and recoloured images too, told which."""

import dataclasses
import itertools

import torch

from torch_utils.random import stream

COLOURS = list(itertools.permutations(range(3)))  # the first one is no change


@dataclasses.dataclass(frozen=True)
class DistributionAugment:
    """Quarter turns, transpositions and swaps of colours, as SiD2 uses against overfitting (SiD2 section 4.3).

    Each of the three is drawn uniformly for a share `p` of the images. Colours are swapped where images have three
    channels; images that are not square are turned by a half alone. Labels are one-hot for each kind, and zeros mean an
    image as it is: what to ask for in generation.

    Args:
        p: Share of images for which a kind is drawn, which may then still be no change.
    """

    p: float = 0.5

    @property
    def dim(self) -> int:
        """Length of the labels: three turns, a transposition, five swaps."""
        return 3 + 1 + len(COLOURS) - 1

    def __call__(self, images: torch.Tensor, seed: int, numbers: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Augment images.

        Args:
            images: float32 [N, C, H, W].
            seed: Of the run.
            numbers: Image numbers; draws depend on (seed, number) alone.

        Returns:
            float32 [N, C, H, W] and labels float32 [N, dim], on the same device.
        """
        square = images.shape[2] == images.shape[3]
        counts = (4 if square else 2, 2 if square else 1, len(COLOURS) if images.shape[1] == 3 else 1)
        draws = torch.stack([torch.rand(6, generator=stream(seed, 'distribution', number)) for number in numbers])
        chosen = (draws[:, :3] < self.p) * (draws[:, 3:] * torch.tensor(counts)).long()
        chosen[:, 0] *= 4 // counts[0]
        labels = [torch.nn.functional.one_hot(c, n)[:, 1:] for c, n in zip(chosen.T, (4, 2, len(COLOURS)), strict=True)]
        images = images.clone()
        for turns, transposed, colours in chosen.unique(dim=0).tolist():
            rows = (chosen == torch.tensor([turns, transposed, colours])).all(dim=1).nonzero()[:, 0].to(images.device)
            x = images[rows].rot90(turns, (2, 3))
            x = x.mT if transposed else x
            images[rows] = x[:, COLOURS[colours]] if colours else x
        return images, torch.cat(labels, dim=1).float().to(images.device)

    def problems(self) -> list[str]:
        """Everything that is wrong with it, in words."""
        return [] if 0 <= self.p <= 1 else [f'p must be from 0 to 1, not {self.p}']
