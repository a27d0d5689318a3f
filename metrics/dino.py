"""DINOv2 ViT-L/14 through the library `transformers`, as FD-DINOv2 uses it."""

import importlib.util
import os
from pathlib import Path

import torch

from dnnlib.download import file_sha256
from dnnlib.errors import UserError
from metrics.network_detector import NetworkDetector

MODEL = 'facebook/dinov2-large'
REVISION = '47b73eefe95e8d44ec3623f8890bd894b6ea2d6c'  # the file of a name may change, that of a revision not
FILES = ('config.json', 'model.safetensors')
ARCHITECTURE = {'hidden_size': 1024, 'num_hidden_layers': 24, 'num_attention_heads': 16, 'patch_size': 14}
VARIABLE = 'EDM2PLUS_DINOV2'
SIDE = 224
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, for pixels in 0..1
OFFSET = 0.1  # added to the grid's side where DINOv2's authors interpolate position embeddings


def require_transformers() -> None:
    """Check that transformers is there, before any image is read."""
    if importlib.util.find_spec('transformers') is None:
        raise UserError('DINOv2 needs transformers: install the extra `dino` (pip install transformers)')


class DinoDetector(NetworkDetector):
    """CLS features of FD-DINOv2, in full float32: `dinov2` [N, 1024].

    Grayscale is replicated to three channels; bicubic resize with antialiasing to 224x224; ImageNet's mean and standard
    deviation; the CLS token after the last layer norm. Position embeddings (37x37 of them) are interpolated to the grid
    as DINOv2's authors do it, bicubically with scale (16 + 0.1) / 37; transformers by itself uses 16 / 37, which moves
    them by up to 0.2 of a patch.

    Args:
        device: Where images will be.
        weights: Folder of the model (config.json, model.safetensors); None takes $EDM2PLUS_DINOV2, else the published
            model by name and revision, from the library's cache or downloaded into it.
        any_weights: Accept a model that is not a ViT-L/14.
        offline: Download nothing.

    Attributes:
        identity: With the SHA-256 of model.safetensors, whatever the version of the library.
        standard: Whether the weights are those that published numbers are made with; None where a folder says so
            of itself only.
    """

    def __init__(
        self,
        device: torch.device | str = 'cpu',
        weights: str | None = None,
        any_weights: bool = False,
        offline: bool = False,
    ):
        require_transformers()
        given = weights or os.environ.get(VARIABLE)
        folder = Path(given) if given else fetch_dino(offline)
        net = load_dino(folder)
        config = net.config
        is_large = all(getattr(config, name) == value for name, value in ARCHITECTURE.items())
        if not is_large and not any_weights:
            raise UserError(
                f'{folder} is a model of {config.num_hidden_layers} layers with {config.hidden_size} features and '
                f'patches of {config.patch_size}, not ViT-L/14 (24 layers, 1024 features, patches of 14): fd_dinov2 '
                'would not be comparable; --any-weights measures with it nevertheless'
            )
        self.standard = False if not is_large else (None if given else True)
        self.size = config.hidden_size
        digest = file_sha256(folder / FILES[1])
        self.identity = f'dinov2 {MODEL if is_large else "(another)"} (bicubic to {SIDE}, CLS), file {digest}'
        set_position_grid(net, SIDE // config.patch_size)
        self.net = net.to(device)
        self.mean, self.std = (torch.tensor(values, device=device).view(3, 1, 1) for values in (MEAN, STD))

    def num_features(self, image_shape: tuple[int, int, int]) -> dict[str, int]:
        """1024, whatever the images."""
        del image_shape
        return {'dinov2': self.size}

    def _features(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        x = torch.nn.functional.interpolate(images.float(), (SIDE, SIDE), mode='bicubic', antialias=True) / 255
        x = (x.expand(-1, 3, -1, -1) - self.mean) / self.std
        return {'dinov2': self.net(x).pooler_output.float()}


def fetch_dino(offline: bool = False) -> Path:
    """The folder of the published model in the library's cache, downloaded if need be, unless `offline`."""
    import huggingface_hub  # comes with transformers

    try:
        return Path(
            huggingface_hub.snapshot_download(
                MODEL, revision=REVISION, allow_patterns=list(FILES), local_files_only=offline
            )
        )
    except Exception as error:  # of many kinds, from several libraries
        raise UserError(_unavailable(f'{MODEL} cannot be downloaded', error)) from None


def load_dino(folder: Path) -> torch.nn.Module:
    """The model of a folder, in evaluation mode."""
    import transformers  # extra `dino`; takes seconds

    transformers.utils.logging.disable_progress_bar()
    try:
        if missing := [name for name in FILES if not (folder / name).is_file()]:
            raise FileNotFoundError(f'it has no {" and no ".join(missing)}')
        net = transformers.Dinov2Model.from_pretrained(folder, local_files_only=True, use_safetensors=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(_unavailable(f'the DINOv2 model {folder} cannot be loaded', error)) from None
    return net.float().eval().requires_grad_(False)


def _unavailable(what: str, error: Exception) -> str:
    return (
        f'{what}: {" ".join(str(error).split())[:160]}; on a machine without a network, fetch {" and ".join(FILES)} of '
        f'https://huggingface.co/{MODEL}/tree/{REVISION} elsewhere and give their folder: --dinov2=PATH or '
        f'{VARIABLE}=PATH'
    )


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
