"""DINOv2 ViT-L/14 through the library `transformers`, as FD-DINOv2 uses it."""

import hashlib
import importlib.util
import os

import torch

from dnnlib.errors import UserError

MODEL = 'facebook/dinov2-large'
ARCHITECTURE = {'hidden_size': 1024, 'num_hidden_layers': 24, 'num_attention_heads': 16, 'patch_size': 14}
VARIABLE = 'EDM2PLUS_DINOV2'
SIDE = 224
AT_ONCE = 64  # images
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, for pixels in 0..1
OFFSET = 0.1  # added to the grid's side where DINOv2's authors interpolate position embeddings


def require_transformers() -> None:
    """Check that transformers is there, before any image is read.

    Raises:
        UserError: naming the extra that installs it.
    """
    if importlib.util.find_spec('transformers') is None:
        raise UserError('DINOv2 needs transformers: install the extra `dino` (pip install transformers)')


class DinoDetector:
    """CLS features of FD-DINOv2: uint8 [N, C, H, W] -> float32 [N, 1024], in full float32.

    Grayscale is replicated to three channels; bicubic resize with antialiasing to 224x224; ImageNet's mean and standard
    deviation; the CLS token after the last layer norm. Position embeddings (37x37 of them) are interpolated to the grid
    as DINOv2's authors do it, bicubically with scale (16 + 0.1) / 37; transformers by itself uses 16 / 37, which moves
    them by up to 0.2 of a patch.

    Args:
        device: Where images will be.
        weights: Folder of the model (config.json, model.safetensors); None takes $EDM2PLUS_DINOV2, else the published
            model by name, from the library's cache or downloaded into it.
        any_weights: Accept a model that is not a ViT-L/14.
        offline: Download nothing.

    Attributes:
        identity: With a SHA-256 over all weights.
        published: Whether the weights are those that published numbers are made with; None where a folder says so
            of itself only.

    Raises:
        UserError: where the library or the model is not to be had, or it is another network.
    """

    def __init__(
        self,
        device: torch.device | str = 'cpu',
        weights: str | None = None,
        any_weights: bool = False,
        offline: bool = False,
    ):
        require_transformers()
        folder = weights or os.environ.get(VARIABLE)
        net = load_dino(folder, offline)
        config = net.config
        is_large = all(getattr(config, name) == value for name, value in ARCHITECTURE.items())
        if not is_large and not any_weights:
            raise UserError(
                f'{folder} is a model of {config.num_hidden_layers} layers with {config.hidden_size} features and '
                f'patches of {config.patch_size}, not ViT-L/14 (24 layers, 1024 features, patches of 14): fd_dinov2 '
                'would not be comparable; --any-weights measures with it all the same'
            )
        self.published = False if not is_large else (None if folder else True)
        self.size = config.hidden_size
        digest = state_sha256(net)
        self.identity = f'dinov2 {MODEL if is_large else "(another)"} (bicubic to {SIDE}, CLS), weights {digest}'
        set_position_grid(net, SIDE // config.patch_size)
        self.net = net.to(device)
        self.mean, self.std = (torch.tensor(values, device=device).view(3, 1, 1) for values in (MEAN, STD))

    def num_features(self, image_shape: tuple[int, int, int]) -> int:
        """1024, whatever the images."""
        del image_shape
        return self.size

    @torch.inference_mode()
    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Features float32 [N, 1024] of uint8 [N, C, H, W]."""
        assert images.dtype == torch.uint8 and images.ndim == 4, f'uint8 [N, C, H, W] expected, got {images.dtype}'
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, allow_tf32=False):
            return torch.cat([self._features(some) for some in images.split(AT_ONCE)])

    def _features(self, images: torch.Tensor) -> torch.Tensor:
        x = torch.nn.functional.interpolate(images.float(), (SIDE, SIDE), mode='bicubic', antialias=True) / 255
        x = (x.expand(-1, 3, -1, -1) - self.mean) / self.std
        return self.net(x).pooler_output.float()


def load_dino(folder: str | None, offline: bool = False) -> torch.nn.Module:
    """The model of a folder, or the published one where it is None, in evaluation mode.

    With `offline` nothing is downloaded into the library's cache.

    Raises:
        UserError: where it is not to be had; it says what is needed and where to put it.
    """
    import transformers  # extra `dino`; takes seconds

    try:
        net = transformers.Dinov2Model.from_pretrained(folder or MODEL, local_files_only=offline or folder is not None)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f'the DINOv2 model {folder or MODEL} cannot be loaded: {" ".join(str(error).split())[:160]}; on a machine '
            f'without a network, fetch config.json and model.safetensors of https://huggingface.co/{MODEL} elsewhere '
            f'and give their folder: --dinov2=PATH or {VARIABLE}=PATH'
        ) from None
    return net.float().eval().requires_grad_(False)


def state_sha256(net: torch.nn.Module) -> str:
    """SHA-256 over names, shapes and values of all weights, in the order of their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(net.state_dict().items()):
        digest.update(f'{name} {tuple(tensor.shape)} {tensor.dtype}\n'.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy())
    return digest.hexdigest()


def set_position_grid(net: torch.nn.Module, side: int) -> None:
    """Interpolate the position embeddings [1, 1 + P * P, D] to a grid of side x side, once, in place."""
    positions = net.embeddings.position_embeddings
    cls, grid = positions[:, :1], positions[:, 1:]
    before = round(grid.shape[1] ** 0.5)
    if before == side:
        return
    scale = (side + OFFSET) / before
    grid = grid.reshape(1, before, before, -1).permute(0, 3, 1, 2)  # [1, D, P, P]
    grid = torch.nn.functional.interpolate(grid, scale_factor=(scale, scale), mode='bicubic')
    assert grid.shape[2:] == (side, side), f'{before} positions became {tuple(grid.shape[2:])}'
    grid = grid.permute(0, 2, 3, 1).reshape(1, side * side, -1)
    net.embeddings.position_embeddings = torch.nn.Parameter(torch.cat([cls, grid], 1), requires_grad=False)
