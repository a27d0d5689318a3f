"""Distribution augmentation: a known group of changes, told by labels, drawn for each image."""

import torch

from dataset.augment.distribution import COLOURS, DistributionAugment

N = 4000
IMAGES = torch.arange(27.0).reshape(1, 3, 3, 3).repeat(N, 1, 1, 1)
IMAGES, LABELS = DistributionAugment(p=1.0)(IMAGES, 0, list(range(N)))


def undone(image, label):
    """The image before the change that its labels tell."""
    turns, transposed, colours = (
        int((part * torch.arange(1, len(part) + 1)).sum()) for part in (label[:3], label[3:4], label[4:])
    )
    image = image[torch.tensor(COLOURS[colours]).argsort()]
    image = image.mT if transposed else image
    return image.rot90(-turns, (1, 2))


def test_labels_tell_the_change():
    original = torch.arange(27.0).reshape(3, 3, 3)
    assert all(torch.equal(undone(image, label), original) for image, label in zip(IMAGES, LABELS, strict=True))


def test_all_changes_are_drawn_alike():
    changes, counts = LABELS.unique(dim=0, return_counts=True)
    assert len(changes) == 4 * 2 * 6 and len(IMAGES.flatten(1).unique(dim=0)) == 48
    assert counts.min() > N / 48 - 5 * (N / 48) ** 0.5 and counts.max() < N / 48 + 5 * (N / 48) ** 0.5  # 5 sigma


def test_draws_belong_to_images():
    images = torch.rand(6, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    augment = DistributionAugment()
    x, labels = augment(images, 1, [5, 6, 7, 8, 9, 10])
    one = augment(images[2:3], 1, [7])
    assert torch.equal(one[0], x[2:3]) and torch.equal(one[1], labels[2:3])
    assert labels.shape == (6, augment.dim) and labels.dtype == x.dtype == torch.float32
    assert not torch.equal(augment(images, 2, [5, 6, 7, 8, 9, 10])[1], labels)


def test_without_colours_and_without_change():
    images = torch.rand(64, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    before = images.clone()
    x, labels = DistributionAugment(p=1.0)(images, 0, list(range(64)))
    assert labels[:, :4].any() and not labels[:, 4:].any() and torch.equal(images, before)
    tall = torch.rand(64, 3, 6, 4, generator=torch.Generator().manual_seed(0))
    x, labels = DistributionAugment(p=1.0)(tall, 0, list(range(64)))
    assert labels[:, 1].any() and not labels[:, [0, 2, 3]].any() and labels[:, 4:].any()
    assert all(torch.equal(undone(*pair), before) for *pair, before in zip(x, labels, tall, strict=True))
    x, labels = DistributionAugment(p=0.0)(images, 0, list(range(64)))
    assert torch.equal(x, images) and not labels.any()
    assert DistributionAugment(p=2.0).problems() == ['p must be from 0 to 1, not 2.0']
    assert not DistributionAugment().problems()
