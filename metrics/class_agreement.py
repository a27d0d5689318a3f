"""Whether generated images show the class that was asked for, as a classifier trained on real images sees it."""

import importlib.metadata
import importlib.util
from typing import Any

import numpy as np

from dnnlib.errors import UserError
from metrics.collectors import Sample

FOLDS = 5  # of the cross-validation that judges the classifier


def require_sklearn() -> None:
    """Check that scikit-learn is there, before any image is read."""
    if importlib.util.find_spec('sklearn') is None:
        raise UserError('class_agreement needs scikit-learn: install the extra `demo` (pip install scikit-learn)')


def class_agreement(real: Sample, images: Sample) -> dict[str, Any]:
    """Share of images that a logistic regression, trained on real ones, assigns to the class that was asked for.

    Beside it stands the classifier's own accuracy on real images that it was not trained on (5-fold stratified
    cross-validation), overall and by class: agreement far above it, or far below, says more about the images than
    the bare number. The same data give the same result, to the last bit on one machine. Its time grows with
    images * classes * F: meant for data sets of up to some ten thousand images
    (of more than 50,000, so many at random are used).

    Args:
        real: Labelled real images.
        images: Generated images; their labels are the classes asked for.

    Returns:
        `value` in 0..1, `held_out_accuracy` in 0..1, `classifier` (what it was), and `per_class`: rows of class,
        count (images asked for), agreement (None where count is 0) and held_out_accuracy.
    """
    trained_on, real_labels = _arrays(real)
    judged, asked = _arrays(images)
    _check(real_labels, asked)
    predicted = _classifier().fit(trained_on, real_labels).predict(judged)
    held_out = _held_out_predictions(trained_on, real_labels)
    return {
        'value': float(np.mean(predicted == asked)),
        'held_out_accuracy': float(np.mean(held_out == real_labels)),
        'classifier': f'logistic regression of scikit-learn {importlib.metadata.version("scikit-learn")}',
        'per_class': [
            {
                'class': int(label),
                'count': int(np.sum(asked == label)),
                'agreement': float(np.mean(predicted[asked == label] == label)) if label in asked else None,
                'held_out_accuracy': float(np.mean(held_out[real_labels == label] == label)),
            }
            for label in np.unique(real_labels)
        ],
    }


def _arrays(gathered: Sample) -> tuple[np.ndarray, np.ndarray]:
    """Features float64 [N, F] (in float32 the line search of the fit stalls) and labels int64 [N]."""
    return gathered.features.double().cpu().numpy(), gathered.labels.cpu().numpy()


def _check(real_labels: np.ndarray, asked: np.ndarray) -> None:
    problems = [
        f'class_agreement needs a label for every image, and {(labels < 0).sum()} {kind} images have none'
        for kind, labels in (('real', real_labels), ('generated', asked))
        if (labels < 0).any()
    ]
    if problems:
        raise UserError(problems)
    classes, counts = np.unique(real_labels, return_counts=True)
    if len(classes) < 2:
        problems.append('class_agreement needs real images of at least two classes')
    if counts.min() < FOLDS:
        label = classes[np.argmin(counts)]
        problems.append(f'class_agreement needs {FOLDS} real images of each class; class {label} has {counts.min()}')
    strangers = np.setdiff1d(asked, classes)
    if len(strangers):
        problems.append(f'no real image is of class {strangers[0]}, which was asked for')
    if problems:
        raise UserError(problems)


def _classifier():
    import sklearn.linear_model  # extra `demo`

    return sklearn.linear_model.LogisticRegression(max_iter=10_000)  # the default of 100 stops short on 8x8 pixels


def _held_out_predictions(features: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """For each image the class [N] that a classifier trained without it assigns to it."""
    import sklearn.model_selection

    folds = sklearn.model_selection.StratifiedKFold(FOLDS, shuffle=True, random_state=0)
    return sklearn.model_selection.cross_val_predict(_classifier(), features, labels, cv=folds)
