"""Labels of a dataset: `dataset.json`.

    {"labels": [["00000/img00000000.png", 6], ...], "class_names": ["ant", ...], "edm2plus": {"source": "photos", ...}}

`"labels": null` means none. Other readers (EDM, EDM2) take the labels only.
"""

import collections
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dataset.files.archive import Archive
from dnnlib.errors import UserError, quoted

LABEL_FILE = 'dataset.json'
LABEL_EXAMPLE = '{"labels": [["00000/img00000000.png", 6], ...]}'
NOTE_KEY = 'edm2plus'
LARGEST = (2**20, 2**14)  # bytes of the file, and besides for each image


@dataclass(frozen=True)
class Labels:
    """What `dataset.json` says.

    Attributes:
        classes: Class index of each image, int64 [N], or None.
        made_with: How the dataset was made; {} where it does not say.
    """

    classes: np.ndarray | None = None
    made_with: Mapping[str, Any] = field(default_factory=dict)


def read_labels(archive: Archive, names: Sequence[str]) -> Labels:
    """Read the labels of the images `names`, exactly all of which `dataset.json` must name where it gives labels."""
    row = archive.files.find(LABEL_FILE)
    if row is None:
        return Labels()
    where = archive.where(LABEL_FILE)
    try:
        content = json.loads(archive.read(row, LARGEST[0] + LARGEST[1] * len(names)))
    except UserError:
        raise
    except (ValueError, RecursionError) as error:
        raise UserError(f'{where} is not JSON: {error}') from None
    pairs = content.get('labels') if isinstance(content, dict) else ()
    if pairs is not None and not (isinstance(pairs, list) and all(map(_is_pair, pairs))):
        raise UserError(f'{where} does not say which image has which label; it should read like {LABEL_EXAMPLE}')
    note = content.get(NOTE_KEY)
    made_with = note if isinstance(note, dict) else {}
    if pairs is None:
        return Labels(None, made_with)
    labels = dict(pairs)
    if problems := [f'{where} {problem}' for problem in _problems(pairs, labels, names)]:
        raise UserError(problems)
    return Labels(np.fromiter((labels[name] for name in names), np.int64, len(names)), made_with)


def _is_pair(pair: object) -> bool:
    return isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str)


def _problems(pairs: list, labels: dict[str, object], names: Sequence[str]) -> Iterator[str]:
    known = set(names)
    # type(), because to isinstance True is an int
    wrong = [name for name, label in pairs if type(label) is not int or not 0 <= label < 2**31]
    if wrong:
        example = f'{quoted(repr(labels[wrong[0]]))} of {quoted(wrong[0])}'
        yield f'has {len(wrong)} labels that are not whole numbers from 0 up, for instance {example}'
    if len(labels) < len(pairs):
        name = collections.Counter(name for name, _ in pairs).most_common(1)[0][0]
        yield f'has more than one label for an image, for instance {quoted(name)}'
    missing = [name for name in names if name not in labels]
    if missing:
        yield f'has no label for {len(missing)} of {len(names)} images, for instance {quoted(missing[0])}'
    extra = [name for name in labels if name not in known]
    if extra:
        yield f'has labels for {len(extra)} images that are not there, for instance {quoted(extra[0])}'
