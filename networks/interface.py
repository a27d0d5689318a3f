"""What a denoiser and an architecture know of each other; all that the modules of a family import from above them."""

import dataclasses

LARGEST = 2**20  # sizes and widths of configs from files that nobody vouches for


@dataclasses.dataclass(frozen=True)
class Interface:
    """What goes into an architecture F(x, c_noise, labels, augment) and comes out of it, whatever its inside.

    Args:
        img_resolution: (height, width) of x.
        in_channels, out_channels: Of x and of F; the latter may be more (iDDPM's learned variance).
        label_dim: Number of classes; 0 makes it unconditional.
        augment_dim: Numbers that tell how an image was augmented; 0 for none.
    """

    img_resolution: tuple[int, int]
    in_channels: int
    out_channels: int
    label_dim: int
    augment_dim: int = 0
