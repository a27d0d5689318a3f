"""All samplers by name: a new one is a class (see `sampling.samplers`) and a row here."""

from sampling.ablation import Ablation
from sampling.samplers import Ancestral, DPMpp2M, Euler, Heun, Sampler

SAMPLERS: dict[str, type[Sampler]] = {
    'heun': Heun,
    'euler': Euler,
    'dpm++2m': DPMpp2M,
    'ancestral': Ancestral,
    'ablation': Ablation,
}
