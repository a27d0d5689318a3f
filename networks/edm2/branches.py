"""The residual branches of EDM2 and EDM2+ as one table (EDM2+ figures 2 and 3): a new block is a new row."""

import dataclasses

SILU = 'silu'  # MP-SiLU
MODULATE = 'modulate'  # multiply channel-wise by the embedding
DECODER_ONLY = 'decoder:'  # prefix of a step that encoder blocks leave out

# What each layer is (dense 3x3, depthwise or pointwise convolution) and how wide its output is: as its input,
# the block's output, or that times the expansion. The names are those of the parameters.
LAYERS = {
    'conv_res0': ('dense', 'out'),
    'conv_res1': ('dense', 'out'),
    'dw_in': ('depthwise', 'same'),
    'pw_expand': ('pointwise', 'wide'),
    'dw_mid': ('depthwise', 'same'),
    'pw_project': ('pointwise', 'out'),
    'dw_out': ('depthwise', 'same'),
}


@dataclasses.dataclass(frozen=True)
class Branch:
    """One residual branch: its steps in order of execution.

    Args:
        summary: What it is, in the papers' words.
        steps: `silu`, `modulate`, or names from `LAYERS`; words of one string, so that a row reads like the figure.
        expansion: Width of the inverted bottleneck relative to the block's output.
        kernel: Side length of the depthwise kernels.
    """

    summary: str
    steps: str
    expansion: int = 1
    kernel: int = 3

    def kernel_of(self, kind: str) -> int:
        """Side length of the kernel of a `dense`, `depthwise` or `pointwise` layer."""
        return {'dense': 3, 'depthwise': self.kernel, 'pointwise': 1}[kind]

    def but(self, summary: str, **changes) -> 'Branch':
        """The same branch with some fields changed."""
        return dataclasses.replace(self, summary=summary, **changes)

    def steps_of(self, flavor: str) -> list[str]:
        """Steps in an encoder (`enc`) or decoder (`dec`) block."""
        words = self.steps.split()
        if flavor == 'enc':
            return [word for word in words if not word.startswith(DECODER_ONLY)]
        return [word.removeprefix(DECODER_ONLY) for word in words]


_A = Branch('EDM2: two 3x3 convolutions', 'silu conv_res0 modulate silu conv_res1')
_B = Branch('depthwise convolutions', 'silu dw_in decoder:pw_project modulate silu dw_out')
_C = Branch(
    'depthwise-separable convolutions, expansion 6',
    'silu dw_in silu pw_expand silu dw_mid modulate silu pw_project',
    expansion=6,
)
_D = _C.but('C with a linear bottleneck', steps='silu dw_in pw_expand silu dw_mid modulate silu pw_project')
_Dstar = _D.but('D with expansion 4', expansion=4)
_E = Branch('inverted bottleneck, expansion 6', 'silu pw_expand silu dw_mid modulate silu pw_project', expansion=6)
_F = _Dstar.but(
    'D* with a depthwise convolution at the end',
    steps='silu dw_in pw_expand silu dw_mid modulate silu pw_project silu dw_out',
)
_Fstar = _F.but(
    'F with an embedding bottleneck', steps='silu dw_in pw_expand silu dw_mid silu pw_project modulate silu dw_out'
)
_G = _F.but(
    'F without the middle depthwise convolution', steps='silu dw_in pw_expand modulate silu pw_project silu dw_out'
)
_Gstar = _G.but(
    'EDM2+: G with an embedding bottleneck', steps='silu dw_in pw_expand silu pw_project modulate silu dw_out'
)

BRANCHES: dict[str, Branch] = {
    'A': _A,
    'B': _B,
    'C': _C,
    'D': _D,
    'D*': _Dstar,
    'E': _E,
    'E7': _E.but('E with 7x7 depthwise kernels', kernel=7),
    'F': _F,
    'F*': _Fstar,
    'G': _G,
    'G*': _Gstar,
}
