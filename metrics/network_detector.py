"""What detectors that are networks have in common."""

import torch

AT_ONCE = 64  # images: about 1 GiB of activations of Inception


class NetworkDetector:
    """A network that sees a few images at a time, in full float32; subclasses say what it makes of them."""

    @torch.inference_mode()
    def __call__(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Features [N, F] of uint8 [N, C, H, W], by name."""
        assert images.dtype == torch.uint8 and images.ndim == 4, f'uint8 [N, C, H, W] expected, got {images.dtype}'
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, allow_tf32=False):
            parts = [self._features(some) for some in images.split(AT_ONCE)]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _features(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        raise NotImplementedError
