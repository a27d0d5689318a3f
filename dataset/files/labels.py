"""Labels of a dataset: `dataset.json`.

    {"labels": [["00000/img00000000.png", 6], ...], "class_names": ["ant", ...], "edm2plus": {"source": "photos", ...}}

`"labels": null` means none. Other readers (EDM, EDM2) take the labels only.
"""

import collections
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dataset.files.archive import Archive
from dnnlib.errors import UserError, printable, quoted, warn

LABEL_FILE = 'dataset.json'
LABEL_EXAMPLE = '{"labels": [["00000/img00000000.png", 6], ...]}'
CLASSES_KEY, NOTE_KEY = 'class_names', 'edm2plus'
LARGEST = (2**20, 2**14)  # bytes of the file, and besides for each image


@dataclass(frozen=True)
class Labels:
    """What `dataset.json` says.

    Attributes:
        classes: Class index of each image, int64 [N], or None.
        class_names: Name of each class, or None.
        made_with: How the dataset was made; {} where it does not say.
    """

    classes: np.ndarray | None = None
    class_names: list[str] | None = None
    made_with: Mapping[str, Any] = field(default_factory=dict)


def read_labels(archive: Archive, names: Sequence[str]) -> Labels:
    """Read the labels of the images `names`, all of which `dataset.json` must name where it gives labels.

    What other readers take is taken, with a warning: 4.0 for 4, one-hot vectors, and, where no note says that this
    project has written the file, labels of images that are not there.
    """
    row = archive.files.find(LABEL_FILE)
    if row is None:
        return Labels()
    where = archive.where(LABEL_FILE)
    try:
        content = json.loads(archive.read(row, LARGEST[0] + LARGEST[1] * len(names)))
    except UserError:
        raise
    except (ValueError, RecursionError) as error:
        raise UserError(f'{where} is not JSON: {printable(error)}') from None
    pairs = content.get('labels') if isinstance(content, dict) else ()
    if pairs is not None and not (isinstance(pairs, list) and all(map(_is_pair, pairs))):
        raise UserError(f'{where} does not say which image has which label; it should read like {LABEL_EXAMPLE}')
    made_with = content[NOTE_KEY] if isinstance(content.get(NOTE_KEY), dict) else {}
    classes = None if pairs is None else _classes(where, pairs, names, exactly=bool(made_with))
    class_names = content.get(CLASSES_KEY)
    if classes is None:
        return Labels(made_with=made_with)
    if class_names is not None and not _are_names(class_names, int(classes.max()) + 1):
        warn(f'{where} has {CLASSES_KEY} that are not a name for each of the classes; they are ignored')
        class_names = None
    return Labels(classes, class_names, made_with)


def _is_pair(pair: object) -> bool:
    return isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str)


def _are_names(names: object, count: int) -> bool:
    return isinstance(names, list) and len(names) >= count and all(isinstance(name, str) for name in names)


def _classes(where: str, pairs: list, names: Sequence[str], exactly: bool) -> np.ndarray | None:
    """Class indices, int64 [N]; None, with a warning, where the labels are vectors that stand for no class."""
    labels = dict(pairs)
    indices = {name: _class_index(label) for name, label in labels.items()}
    wrong = [name for name, index in indices.items() if index is None]
    if wrong and all(isinstance(label, list) for label in labels.values()):
        warn(
            f'{where} has vectors as labels that are not one-hot, of {printable(wrong[0])}, say; opened without labels'
        )
        return None
    problems = []
    if wrong:
        example = f'{quoted(labels[wrong[0]])} of {printable(wrong[0])}'
        problems.append(f'has {len(wrong)} labels that are not whole numbers from 0 up, for instance {example}')
    if len(labels) < len(pairs):
        name = collections.Counter(name for name, _ in pairs).most_common(1)[0][0]
        problems.append(f'has more than one label for an image, for instance {printable(name)}')
    if missing := [name for name in names if name not in labels]:
        problems.append(f'has no label for {len(missing)} of {len(names)} images, for instance {printable(missing[0])}')
    if extra := labels.keys() - set(names):
        problem = f'has labels for {len(extra)} images that are not there, for instance {printable(min(extra))}'
        problems.append(problem) if exactly else warn(f'{where} {problem}')
    if problems:
        raise UserError([f'{where} {problem}' for problem in problems])
    if odd := sum(type(label) is not int for label in labels.values()):
        warn(f'{where} has {odd} labels such as 4.0, or one-hot vectors, which are read as class indices')
    return np.fromiter((indices[name] for name in names), np.int64, len(names))


def _class_index(label: object) -> int | None:
    """The class that a label stands for: 4, 4.0 or a one-hot vector; None where it stands for none."""
    if isinstance(label, list):
        ones = [i for i, number in enumerate(label) if number != 0]
        return ones[0] if len(ones) == 1 and label[ones[0]] == 1 else None
    whole = type(label) is int or (type(label) is float and label.is_integer())  # to isinstance True is an int
    return int(label) if whole and 0 <= label < 2**31 else None
