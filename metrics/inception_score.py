"""Inception score: how sure a classifier is of each image, and how many classes there are over all."""

from typing import Any

import torch

from metrics.collectors import Sums


def class_features(logits: torch.Tensor) -> torch.Tensor:
    """Class probabilities p of logits [N, K], and sum_k p_k log p_k: float64 [N, K + 1]."""
    logarithms = logits.double().log_softmax(dim=1)
    probabilities = logarithms.exp()
    return torch.cat([probabilities, (probabilities * logarithms).sum(dim=1, keepdim=True)], dim=1)


def inception_score(real: None, images: Sums) -> dict[str, Any]:
    """exp of the mean KL(p(y|x) | p(y)), within each of ten random parts of the images; mean and deviation of these.

        KL mean of a part = mean_x sum_k p_k log p_k - sum_k q_k log q_k,  q = mean_x p

    (Salimans et al., Improved Techniques for Training GANs, 2016.) p is the softmax over all 1008 outputs of the
    Inception network of FID without their bias, as in the original measurement.

    Args:
        real: Not used: the score knows no reference.
        images: Of `class_features`.

    Returns:
        `value` from 1 to the number of classes, `std` over the parts (None for one), `splits`.
    """
    del real
    means = torch.stack([group.mean for group in images.groups])  # [S, K + 1]
    marginal, negentropy = means[:, :-1], means[:, -1]
    scores = (negentropy - torch.special.xlogy(marginal, marginal).sum(dim=1)).exp()
    std = scores.std(correction=0).item() if len(scores) > 1 else None
    return {'value': scores.mean().item(), 'std': std, 'splits': len(scores)}
