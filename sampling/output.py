"""Generated images on disk: a folder that says how they were made, and can be resumed.

DIR/generation.json      how, from before the first image; "complete" tells whether all are there
DIR/000123.png           image of seed 123 (or DIR/000000/000123.png), whole or not there
DIR/dataset.json         classes, as in a data set, when all are there
DIR/images.npz           instead of the PNGs, with --format=npz
"""

import contextlib
import json
import zipfile
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch

from dnnlib.errors import UserError
from dnnlib.files import atomic_path, read_object, write_json
from dnnlib.images import save_png
from networks.encoders import Encoder
from sampling.pipeline import Samples, decode

RECORD = 'generation.json'
LABELS = 'dataset.json'
PACKED = 'images.npz'
SETTINGS = ('net', 'guiding_net', 'sampler', 'classes', 'precision', 'encoder', 'subdirs')  # what decides over images
LEFT_BEHIND = ('.*.png.*.tmp', f'.{PACKED}.*.tmp', f'.{RECORD}.*.tmp')  # by a process that was killed while it wrote
PENDING = 2  # batches that may wait for being written
WRITERS = 4  # threads that write images: compressing one does not hold up the others


def image_name(seed: int, subdirs: bool) -> str:
    """`000123.png`, or `000000/000123.png` with a folder for every 1000 seeds."""
    return f'{seed // 1000:06d}/{seed:06d}.png' if subdirs else f'{seed:06d}.png'


def prepare(folder: Path, record: dict[str, Any], skip_existing: bool = False, overwrite: bool = False) -> None:
    """Make sure that `folder` holds nothing but images of these settings, and write `record` to it.

    Afterwards `is_complete(folder)` says that there is nothing left to do.

    Args:
        folder: Exists.
        record: What generation.json shall say; SETTINGS, `seeds`, `subdirs` and `format` of it are used here.
        skip_existing: Images may be there, and stay.
        overwrite: Images of other settings may be there; those that the earlier record names are removed.
    """
    if skip_existing and overwrite:
        raise UserError('--skip-existing keeps the images that are there, --overwrite does not: give one of them')
    earlier = _read_record(folder)
    here = {path.relative_to(folder).as_posix() for path in folder.rglob('*.png')}
    ours = {image_name(seed, record['subdirs']) for seed in record['seeds']}
    theirs = set() if earlier is None else {image_name(seed, earlier['subdirs']) for seed in earlier['seeds']}
    if foreign := sorted(here - ours - (theirs if overwrite else set())):
        raise UserError(f'{folder} holds other images, such as {foreign[0]}; give an empty folder')
    packed = (folder / PACKED).exists()
    if (here or packed) and not overwrite:
        if earlier is None:
            found = min(here, default=PACKED)
            raise UserError(
                f'{folder} holds images without a readable {RECORD}, such as {found}; give --overwrite to replace them'
            )
        if changes := _changes(earlier, record):
            raise UserError(
                f'{folder} holds images made with other settings ({", ".join(changes)}); give another folder, '
                'or --overwrite to replace them'
            )
    if skip_existing and packed and record['format'] == 'npz' and _is_result(earlier, record['seeds']):
        unneeded = here  # packed already
    else:
        # Should we be stopped here or later, no record shall stand beside images that it does not describe.
        if overwrite:
            _remove(folder, [RECORD, *here])
        write_json(folder / RECORD, {'complete': False, **record})
        unneeded = {LABELS, PACKED}
    _remove(folder, unneeded)
    _remove(folder, [path.relative_to(folder) for pattern in LEFT_BEHIND for path in folder.rglob(pattern)])


def _remove(folder: Path, names: Iterable[str | Path]) -> None:
    for name in names:
        (folder / name).unlink(missing_ok=True)


def _read_record(folder: Path) -> dict[str, Any] | None:
    """An earlier generation.json; None where there is none, or none that can be read."""
    try:
        record = read_object(folder / RECORD)
        seeds_are_numbers = all(type(seed) is int for seed in record['seeds'])
        return record if seeds_are_numbers and {*SETTINGS, 'complete', 'format'} <= record.keys() else None
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _is_result(record: dict[str, Any], seeds: list[int]) -> bool:
    """Whether all images of exactly these seeds were made."""
    return record['complete'] and record['seeds'] == seeds


def _changes(earlier: dict[str, Any], record: dict[str, Any]) -> list[str]:
    """What decides over the images and differs, in words: `sampler.steps 32, now 18`."""
    found = []
    for key in SETTINGS:
        before, now = _flat(key, earlier[key]), _flat(key, json.loads(json.dumps(record[key])))
        found += [
            f'{name} {before.get(name)}, now {now.get(name)}'
            for name in sorted(before.keys() | now.keys())
            if before.get(name) != now.get(name)
        ]
    return found


def _flat(name: str, value: Any) -> dict[str, Any]:
    """Nested values by dotted names; of a network file, its hash alone."""
    if not isinstance(value, dict):
        return {name: value}
    if 'sha256' in value:
        return {name: f'file {value["sha256"]:.16}...'}
    return {key: v for part in value for key, v in _flat(f'{name}.{part}', value[part]).items()}


def is_complete(folder: Path) -> bool:
    """Whether the record says that nothing is missing."""
    record = _read_record(folder)
    return record is not None and record['complete']


def missing_seeds(folder: Path, seeds: Iterable[int], subdirs: bool) -> list[int]:
    """Those of `seeds` whose image is not in the folder."""
    return [seed for seed in seeds if not (folder / image_name(seed, subdirs)).exists()]


class ImageWriter:
    """Decodes samples in a thread of its own and writes them in several, while the next ones are sampled.

    After an error nothing more is written; `put` and leaving the `with` block raise it.

    Args:
        folder: Where the images go.
        subdirs: As in `image_name`.
        encoder: Makes images of samples.
    """

    def __init__(self, folder: Path, subdirs: bool, encoder: Encoder):
        self.folder = folder
        self.subdirs = subdirs
        self.encoder = encoder
        self._thread = ThreadPoolExecutor(1, 'decoding')
        self._writers = ThreadPoolExecutor(WRITERS, 'writing')
        self._pending: list[Future] = []
        self._failed = False
        self._threads = torch.get_num_threads()

    def put(self, samples: Samples) -> None:
        """Have samples written; waits while PENDING batches are."""
        self._pending.append(self._thread.submit(self._write, samples))
        while len(self._pending) > PENDING:
            self._pending.pop(0).result()

    def _write(self, samples: Samples) -> None:
        if self._failed:
            return
        try:
            images = decode(samples.x, self.encoder, self._threads)
            paths = [self.folder / image_name(seed, self.subdirs) for seed in samples.seeds]
            list(self._writers.map(self._save, paths, images.permute(0, 2, 3, 1).numpy()))
        except BaseException:
            self._failed = True
            raise

    def _save(self, path: Path, pixels: np.ndarray) -> None:
        try:
            path.parent.mkdir(exist_ok=True)
            save_png(path, pixels)
        except OSError as error:  # a full disk does not say which file
            raise type(error)(error.errno, error.strerror or str(error), str(path)) from None

    def __enter__(self) -> 'ImageWriter':
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        self._thread.shutdown(wait=True, cancel_futures=kind is not None)
        self._writers.shutdown()
        torch.set_num_threads(self._threads)  # `decode`'s setting, made in our thread, holds for all threads to come
        if kind is None:
            for future in self._pending:
                future.result()


def read_images(folder: Path, names: Sequence[str]) -> Iterable[np.ndarray]:
    """The images of these names one by one, uint8 [H, W, C]."""
    for name in names:
        pixels = np.asarray(PIL.Image.open(folder / name))
        yield pixels if pixels.ndim == 3 else pixels[:, :, None]


def finish(folder: Path, record: dict[str, Any], labels: torch.Tensor | None, class_names: Sequence[str] = ()) -> None:
    """Write what follows the last image: dataset.json, the npz where that is asked for, the completed record.

    Args:
        folder: Holds all images.
        record: As in `prepare`.
        labels: Class of each seed, int64 [N], or None.
        class_names: Of all classes, where they have names.
    """
    names = [image_name(seed, record['subdirs']) for seed in record['seeds']]
    if record['format'] == 'npz':
        write_npz(folder / PACKED, read_images(folder, names), len(names), labels)
    else:
        classes = None if labels is None else [list(pair) for pair in zip(names, labels.tolist(), strict=True)]
        named = {'class_names': list(class_names)} if class_names and classes else {}
        write_json(folder / LABELS, {'labels': classes, **named})
    write_json(folder / RECORD, {'complete': True, **record})
    if record['format'] == 'npz':
        for name in names:
            (folder / name).unlink()
        for parent in {(folder / name).parent for name in names} - {folder}:
            with contextlib.suppress(OSError):  # holds something else, such as what a file manager leaves
                parent.rmdir()


def write_npz(path: Path, images: Iterable[np.ndarray], count: int, labels: torch.Tensor | None) -> None:
    """Write images in the layout of ADM's evaluators, whole or not at all, one by one: they need not fit in memory.

    Args:
        path: Of the file.
        images: `count` of uint8 [H, W, C], all alike; they become arr_0, uint8 [N, H, W, C].
        count: N.
        labels: int64 [N], becomes arr_1; None leaves that out.
    """
    images = iter(images)
    first = next(images)
    with atomic_path(path) as beside, zipfile.ZipFile(beside, 'w') as archive:
        with archive.open('arr_0.npy', 'w', force_zip64=True) as file:
            header = {'descr': '|u1', 'fortran_order': False, 'shape': (count, *first.shape)}
            np.lib.format.write_array_header_1_0(file, header)
            file.write(first.tobytes())
            for image in images:
                assert image.shape == first.shape
                file.write(image.tobytes())
        if labels is not None:
            with archive.open('arr_1.npy', 'w') as file:
                np.lib.format.write_array(file, labels.numpy().astype(np.int64))
