"""Inception score: how sure a classifier is of each image, and how many classes there are over all."""

from typing import Any

import torch

from metrics.collectors import ClassScores


def inception_score(real: None, images: ClassScores) -> dict[str, Any]:
    """exp of the mean KL(p(y|x) | p(y)), within each of ten random parts of the images; mean and deviation of these.

        KL mean of a part = mean_x sum_k p_k log p_k - sum_k q_k log q_k,  q = mean_x p

    (Salimans et al., Improved Techniques for Training GANs, 2016.) p is the softmax over all 1008 outputs of the
    Inception network of FID without their bias, as in the original measurement.

    Args:
        real: Not used: the score knows no reference.
        images: Sums over the images.

    Returns:
        `value` from 1 to the number of classes, `std` over the parts (None for one), `splits`.
    """
    del real
    counts = images.counts
    marginal = images.probabilities / counts[:, None]  # q, [S, K]
    kl = images.negentropy / counts - torch.special.xlogy(marginal, marginal).sum(dim=1)
    scores = kl.exp()
    std = scores.std(correction=0).item() if len(scores) > 1 else None
    return {'value': scores.mean().item(), 'std': std, 'splits': len(scores)}
