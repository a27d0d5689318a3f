"""Statistics of features: KID, Inception score, overlap of manifolds, FD-infinity, by closed forms and plain loops."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluation.selftest import expected_distance
from metrics import collectors, kid, manifolds
from metrics.collectors import Sample, Sums, collector_memory
from metrics.frechet import fd, fd_infinity, frechet_distance
from metrics.image_sets import ImageBatch
from metrics.inception_score import class_features, inception_score
from metrics.kid import kernel_distance, mmd2_unbiased
from metrics.manifolds import _distances2, manifold_overlap


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def sums(features: torch.Tensor, groups: int, size: int = 7) -> Sums:
    kept = Sums(len(features), features.shape[1], groups=groups)
    for places in torch.arange(len(features)).split(size):
        kept.update(features[places], ImageBatch(torch.empty(0), None, places))
    kept.all_reduce()
    assert kept.count == len(features)
    return kept


def sample(features: torch.Tensor, size: int = 7) -> Sample:
    kept = Sample(len(features), features.shape[1])
    for places in torch.arange(len(features)).split(size):
        kept.update(features[places].float(), ImageBatch(torch.empty(0), None, places))
    kept.all_reduce()
    return kept


# ---- which features are kept ----


def test_a_small_set_is_kept_whole_whatever_the_batches():
    features = normal(0, 40, 3)
    one, other = sample(features, 40), sample(features, 3)
    assert torch.equal(one.features, other.features) and one.count == other.count == 40
    assert torch.equal(one.features.sort(dim=0).values, features.float().sort(dim=0).values)
    assert not torch.equal(one.features, features.float())  # shuffled


def test_of_a_large_set_a_random_part_is_kept(monkeypatch):
    monkeypatch.setattr(collectors, 'MOST_FEATURES', 500)
    places = sample(torch.arange(2000.0)[:, None])
    assert places.features.shape == (500, 1) and places.count == 2000
    assert len(places.features.unique()) == 500
    # The mean of 500 of 0..1999, drawn without replacement, deviates by 577 / sqrt(500) * sqrt(3 / 4) = 22.
    assert abs(places.features.mean() - 999.5) < 90
    assert collector_memory('sample', 2000, 7) == 4 * 500 * 7 and collector_memory('tenths', 2000, 7) == 8 * 10 * 49


def test_sample_survives_a_reference_file():
    before = sample(normal(0, 5, 2))
    after = Sample.from_tensors(before.to_tensors())
    assert torch.equal(before.features, after.features) and after.count == 5
    del (tensors := before.to_tensors())['labels']  # as files of before
    assert Sample.from_tensors(tensors).labels.tolist() == [-1] * 5


# ---- KID ----


@settings(max_examples=20)
@given(m=st.integers(2, 6), n=st.integers(2, 6), size=st.integers(1, 4), seed=st.integers(0, 100))
def test_mmd_is_its_definition(m, n, size, seed):
    x, y = normal(seed, m, size), normal(seed + 1, n, size) + 0.5

    def kernel(a, b):
        return (float(a @ b) / size + 1) ** 3

    xx = np.mean([kernel(x[i], x[j]) for i in range(m) for j in range(m) if i != j])
    yy = np.mean([kernel(y[i], y[j]) for i in range(n) for j in range(n) if i != j])
    xy = np.mean([kernel(a, b) for a in x for b in y])
    assert mmd2_unbiased(x, y) == pytest.approx(xx + yy - 2 * xy, rel=1e-10, abs=1e-10)


def test_kid_of_two_points():
    x, y = torch.full((20, 2), 1.0), torch.full((30, 2), 2.0)
    # (1 + 1)^3 + (4 + 1)^3 - 2 (2 + 1)^3
    result = kernel_distance(sample(x), sample(y))
    assert result == {'value': pytest.approx(79), 'standard_error': pytest.approx(0), 'blocks': 10, 'block_size': 2}


def test_kid_is_unbiased_and_its_standard_error_honest():
    """Over 40 draws of equal distributions, the value is 0 within its errors."""
    results = [kernel_distance(sample(normal(k, 400, 8)), sample(normal(k + 100, 400, 8))) for k in range(40)]
    scores = torch.tensor([r['value'] / r['standard_error'] for r in results])
    assert abs(scores.mean()) < 0.55  # of 40 unit deviations: 0.16 each side, and Student's tails
    assert 0.7 < scores.std() < 1.5
    shifted = kernel_distance(sample(normal(0, 400, 8)), sample(normal(1, 400, 8) + 0.5))
    assert shifted['value'] > 6 * shifted['standard_error'] > 0
    assert (shifted['blocks'], shifted['block_size']) == (10, 40)


def test_blocks_of_kid_have_at_most_1000_images():
    result = kernel_distance(sample(normal(0, 12_300, 1), 5000), sample(normal(1, 13_000, 1), 5000))
    assert (result['blocks'], result['block_size']) == (12, 1000)
    tiny = kernel_distance(sample(normal(0, 3, 1)), sample(normal(1, 3, 1)))
    assert (tiny['blocks'], tiny['block_size'], tiny['standard_error']) == (1, 2, None)


def test_kid_of_sets_whose_images_belong_together_is_unbiased():
    """A set against a noised copy of itself: partners in one block would pull the estimate down."""
    results = []
    for k in range(20):
        x = normal(k, 400, 8)
        results.append(kernel_distance(sample(x), sample(x + 0.01 * normal(k + 50, 400, 8)))['value'])
    values = torch.tensor(results)
    assert abs(values.mean()) < 3 * values.std() / len(values) ** 0.5
    together = torch.tensor([mmd2_unbiased(normal(k, 40, 8), normal(k, 40, 8)) for k in range(200)])
    assert together.mean() < -10 * values.std() / len(values) ** 0.5  # what one block of partners gives


# ---- FD-infinity ----


def test_fd_infinity_of_gaussians():
    """d = |m|^2 + sum (s - 1)^2 for N(0, I) and N(m, s^2 I); of N images it is too large by about c / N."""
    size, shift, scale = 10, 0.1, 1.2
    expected = size * (shift**2 + (scale - 1) ** 2)
    exact = Sums(0, 0)
    exact.groups = [sums(normal(0, 30, size), 1).groups[0]]
    exact.groups[0].mean, exact.groups[0].scatter = torch.zeros(size).double(), 29 * torch.eye(size).double()
    found, finite = [], []
    for k in range(40):
        images = sums(scale * normal(k + 1, 400, size) + shift, 10, 400)
        found.append(fd_infinity(exact, images))
        finite.append(fd(exact, images)['value'])
        assert found[-1]['finite'] == finite[-1] and found[-1]['groups'] == 10
    values, errors = (torch.tensor([f[name] for f in found]) for name in ('value', 'standard_error'))
    error = values.std() / 40**0.5
    assert torch.tensor(finite).mean() - expected > 10 * error  # what is to be taken away
    assert abs(values.mean() - expected) < 3 * error
    # The errors that it names are those that it makes; the deviation of 40 values is known to 11 %.
    assert errors.square().mean().sqrt() / values.std() == pytest.approx(1, abs=0.35)


def test_distance_of_samples_to_their_distribution():
    """One dimension by hand: variance / n of the mean, half of that of the standard deviation. More by drawing."""
    assert expected_distance(torch.tensor([[4.0]]), 100) == pytest.approx(4 / 100 * 1.5)
    root, n = torch.tensor([1.0, 0.5, 2.0], dtype=torch.float64), 400
    real = torch.zeros(3, dtype=torch.float64), root.square().diag()
    drawn = (normal(i, n, 3) * root for i in range(300))
    found = torch.tensor([frechet_distance(*real, x.mean(dim=0), torch.cov(x.T)) for x in drawn])
    assert abs(found.mean() - expected_distance(real[1], n)) < 4 * found.std() / 300**0.5 + 0.02 * found.mean()


def test_fd_infinity_is_the_line_through_two_sizes():
    """By hand, with groups of unequal size: p_i = (N d_N - (N - n_i) d_i) / n_i."""
    real, features = sums(normal(0, 50, 3), 1), normal(1, 34, 3) + 1
    images = sums(features, 10)

    def distance(rows):
        return fd(real, sums(rows, 1))['value']

    parts = [images._group == i for i in range(10)]
    estimates = [
        (34 * distance(features) - (34 - n) * distance(features[~part])) / n
        for part in parts
        for n in [int(part.sum())]
    ]
    result = fd_infinity(real, images)
    assert {int(part.sum()) for part in parts} == {3, 4}
    assert result['value'] == pytest.approx(np.mean(estimates), rel=1e-9)
    assert result['standard_error'] == pytest.approx(np.std(estimates, ddof=1) / 10**0.5, rel=1e-9)


# ---- Inception score ----


def scores(logits: torch.Tensor, size: int = 7) -> Sums:
    return sums(class_features(logits), 10, size)


def test_score_of_sure_and_balanced_images_is_the_number_of_classes():
    # Parts of a random split are balanced to a few per cent only.
    logits = 100 * torch.eye(5)[torch.arange(50_000) % 5]
    result = inception_score(None, scores(logits, 5000))
    assert result['value'] == pytest.approx(5, rel=1e-3) and result['splits'] == 10


def test_score_of_images_of_one_class_is_one():
    result = inception_score(None, scores(torch.tensor([[3.0, 1.0, 0.0]]).repeat(30, 1)))
    assert result['value'] == pytest.approx(1, abs=1e-12) and result['std'] == pytest.approx(0, abs=1e-12)


def test_score_is_its_definition():
    logits = normal(0, 200, 6) * 3
    split = scores(logits)._group.numpy()
    p = np.exp(logits.numpy()) / np.exp(logits.numpy()).sum(axis=1, keepdims=True)
    parts = [p[split == k] for k in range(10)]
    expected = [np.exp(np.mean(np.sum(q * (np.log(q) - np.log(q.mean(axis=0))), axis=1))) for q in parts]
    for size in (200, 7):
        result = inception_score(None, scores(logits, size))
        assert result['value'] == pytest.approx(np.mean(expected), rel=1e-12)
        assert result['std'] == pytest.approx(np.std(expected), rel=1e-9)
    assert [len(part) for part in parts] == [20] * 10


def test_score_of_few_images():
    assert inception_score(None, scores(normal(0, 2, 3)))['splits'] == 2
    assert inception_score(None, scores(normal(0, 1, 3)))['std'] is None


# ---- precision, recall, density and coverage ----


def by_loops(real: torch.Tensor, images: torch.Tensor, k: int) -> tuple[float, float]:
    def inside(x, centres):
        count = 0
        for a in x:
            count += any(
                (a - c).norm() <= sorted((c - other).norm() for j, other in enumerate(centres) if j != i)[k - 1]
                for i, c in enumerate(centres)
            )
        return count / len(x)

    return inside(images, real), inside(real, images)


@settings(max_examples=15)
@given(m=st.integers(4, 12), n=st.integers(4, 12), size=st.integers(1, 3), seed=st.integers(0, 100))
def test_precision_and_recall_are_their_definition(m, n, size, seed):
    real, images = normal(seed, m, size).float(), 1.5 * normal(seed + 1, n, size).float() + 0.5
    result = manifold_overlap(sample(real), sample(images))
    expected = by_loops(real.double(), images.double(), 3)
    assert (result['precision'], result['recall']) == pytest.approx(expected)


def test_precision_without_recall_by_hand():
    real = torch.arange(10.0)[:, None]  # each reaches 2 to 3 to either side
    images = torch.tensor([4.0, 4.1, 4.2, 4.3])[:, None]  # each reaches 0.2 to 0.3
    result = manifold_overlap(sample(real), sample(images))
    assert (result['precision'], result['recall']) == (1, 0.1)  # of the real ones only 4 is near
    assert (result['neighbours'], result['real_used'], result['images_used']) == (3, 10, 4)


def test_density_and_coverage_are_their_definition():
    real, images = normal(0, 30, 2).float().double(), 1.2 * normal(1, 25, 2).float().double() + 0.3
    images = images.float().double()
    result = manifold_overlap(sample(real), sample(images))
    radii = (real[:, None] - real).norm(dim=2).sort(dim=1).values[:, 5]
    inside = (images[:, None] - real).norm(dim=2) <= radii  # [N, M]
    assert result['density'] == pytest.approx(inside.sum().item() / (5 * 25))
    assert result['coverage'] == pytest.approx(inside.any(dim=0).sum().item() / 30)


def test_density_and_coverage_of_equal_gaussians():
    """Whatever the distribution: E density = 1, E coverage = 1 - C(M - 1, k) / C(M + N - 1, k) (Naeem et al. 2020).

    The M - 1 + N other vectors around x are exchangeable: x is not covered where its k nearest are all real.
    """
    results = [manifold_overlap(sample(normal(k, 150, 4)), sample(normal(k + 50, 100, 4))) for k in range(20)]
    expected = 1 - math.comb(149, 5) / math.comb(249, 5)
    density, coverage = (torch.tensor([r[name] for r in results]) for name in ('density', 'coverage'))
    # deviations over draws are about 0.1 and 0.03; of means of 20, 0.023 and 0.007
    assert density.mean() == pytest.approx(1, abs=0.07) and coverage.mean() == pytest.approx(expected, abs=0.02)
    narrow = manifold_overlap(sample(normal(0, 150, 4)), sample(0.1 * normal(1, 100, 4)))
    assert narrow['density'] > 1.3 and narrow['coverage'] < 0.5  # in the middle, where the real ones are dense
    far = manifold_overlap(sample(normal(0, 150, 4)), sample(normal(1, 100, 4) + 20))
    assert far['density'] == far['coverage'] == 0


def test_copies_lie_in_each_others_manifold_however_far_from_zero():
    features = normal(0, 50, 6) + 1e3
    result = manifold_overlap(sample(features), sample(features))
    assert (result['precision'], result['recall'], result['coverage']) == (1, 1, 1)
    assert result['density'] == pytest.approx(6 / 5)  # each ball holds its own copy and those of its five neighbours
    same = torch.full((5, 6), 1e3)  # balls of radius 0
    assert manifold_overlap(sample(same), sample(same))['precision'] == 1
    assert manifold_overlap(sample(features), sample(features + 100))['precision'] == 0


def test_equal_vectors_are_at_distance_zero_and_near_ones_are_not():
    x = normal(3, 20, 501) + 5
    distances = _distances2(x, torch.cat([x, x + 1e-3]))
    assert (distances[:, :20].diagonal() == 0).all()
    torch.testing.assert_close(distances[:, 20:].diagonal(), torch.full((20,), 501e-6).double(), rtol=1e-6, atol=0)


def test_precision_and_recall_in_blocks(monkeypatch):
    real, images = sample(normal(0, 40, 3)), sample(normal(1, 50, 3))
    whole = manifold_overlap(real, images)
    monkeypatch.setattr('metrics.manifolds.BLOCK', 7 * 40)
    sizes = set()

    def distances(x, y):
        sizes.add(len(x) * len(y))
        return _distances2(x, y)

    monkeypatch.setattr('metrics.manifolds._distances2', distances)
    assert manifold_overlap(real, images) == whole
    assert 0 < whole['precision'] < 1 and max(sizes) == 7 * 40


def test_protocol_of_published_numbers():
    """50,000 generated images against 10,000 real ones; blocks of 1000 for KID, ten parts for the Inception score."""
    assert (collectors.MOST_FEATURES, manifolds.MOST_REAL, kid.MOST_BLOCK) == (50_000, 10_000, 1000)
    assert collectors.GROUPS == {'statistics': 1, 'halves': 2, 'tenths': 10}


def test_real_images_are_limited(monkeypatch):
    monkeypatch.setattr('metrics.manifolds.MOST_REAL', 8)
    assert manifold_overlap(sample(normal(0, 40, 3)), sample(normal(1, 50, 3)))['real_used'] == 8


def test_few_images_have_fewer_neighbours():
    result = manifold_overlap(sample(normal(0, 4, 2)), sample(normal(1, 2, 2)))
    assert result['neighbours'] == 1 and math.isfinite(result['recall'])
