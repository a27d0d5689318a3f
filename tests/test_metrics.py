"""Detectors, statistics and metrics against closed forms, NumPy and SciPy."""

import itertools
import sys

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dnnlib.errors import UserError
from metrics.class_agreement import class_agreement, require_sklearn
from metrics.collectors import Sample, restore_collector
from metrics.detectors import PixelDetector, load_detectors
from metrics.frechet import frechet_distance
from metrics.gathering import Need, gather
from metrics.image_sets import ImageBatch, ImageSet
from metrics.reference import load_reference, save_reference
from metrics.registry import METRICS, check_sets, needs_of, require_packages, select_metrics
from metrics.results import evaluate, format_result
from metrics.statistics import FeatureStatistics
from torch_utils.tensor_files import save_tensors

PIXEL_STATISTICS = Need('pixels', 'halves')
PIXEL_FEATURES = Need('pixels', 'sample')
PIXELS = {'pixels': PixelDetector()}


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def random_images(seed: int, count: int, shape=(1, 8, 8)) -> torch.Tensor:
    return torch.randint(0, 256, (count, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def image_set(images: torch.Tensor, num_classes: int = 0, name: str = 'some') -> ImageSet:
    return ImageSet(name, len(images), tuple(images.shape[1:]), num_classes)


def batches(images: torch.Tensor, labels: torch.Tensor | None = None, size: int = 7) -> list[ImageBatch]:
    places = torch.arange(len(images)).split(size)
    return [ImageBatch(images[i], None if labels is None else labels[i], i) for i in places]


def gathered(images: torch.Tensor, need: Need, labels: torch.Tensor | None = None, size: int = 7):
    return gather(image_set(images), batches(images, labels, size), [need], 'cpu', PIXELS).collected[need]


# ---- detectors ----


def test_pixels_above_the_grid_are_averaged_by_hand():
    image = torch.zeros(1, 1, 16, 16, dtype=torch.uint8)
    image[0, 0, 0:2, 0:2] = torch.tensor([[10, 20], [30, 40]])
    image[0, 0, 14:16, 0:2] = 255
    features = PixelDetector()(image)['pixels']
    expected = torch.zeros(8, 8)
    expected[0, 0] = 25 / 255
    expected[7, 0] = 1
    # float32 rounds the quotient once; the sums of whole numbers are exact
    torch.testing.assert_close(features, expected.flatten()[None], rtol=1e-6, atol=0)


@pytest.mark.parametrize('shape', [(1, 12, 20), (3, 9, 64), (3, 32, 32), (2, 28, 8)])
def test_pixels_are_means_of_the_documented_windows(shape):
    images = random_images(1, 2, shape)
    channels, height, width = shape
    windows = np.zeros((2, channels, 8, 8))
    for i in range(8):
        for j in range(8):
            rows = slice(i * height // 8, -(-(i + 1) * height // 8))
            columns = slice(j * width // 8, -(-(j + 1) * width // 8))
            windows[:, :, i, j] = images[:, :, rows, columns].double().mean(dim=(2, 3)).numpy() / 255
    np.testing.assert_allclose(PixelDetector()(images)['pixels'], windows.reshape(2, -1), rtol=1e-6)  # float32 means


def test_pixels_below_the_grid_stay():
    images = random_images(2, 3, (3, 5, 4))
    torch.testing.assert_close(PixelDetector()(images)['pixels'], images.flatten(1).float() / 255, rtol=0, atol=0)


@pytest.mark.parametrize(
    ('shape', 'size'), [((1, 8, 8), 64), ((3, 32, 32), 192), ((1, 64, 64), 64), ((3, 4, 100), 96), ((1, 1, 1), 1)]
)
def test_number_of_features_is_known_before_the_first_image(shape, size):
    detector = load_detectors(['pixels'])['pixels']
    features = detector(random_images(0, 2, shape))['pixels']
    assert features.shape == (2, size) and features.dtype == torch.float32
    assert detector.num_features(shape) == {'pixels': size}


def test_unknown_detector_names_the_near_one():
    with pytest.raises(UserError, match='did you mean pixels'):
        load_detectors(['pixel'])


# ---- streaming statistics ----


def check_against_numpy(statistics: FeatureStatistics, vectors: torch.Tensor) -> None:
    assert statistics.count == len(vectors)
    covariance = np.cov(vectors.numpy(), rowvar=False)
    # One-pass sums of squares at mean 1e4 and deviation 1 are wrong by 1e-8; centred moments by 1e-14 or so.
    np.testing.assert_allclose(statistics.mean, vectors.numpy().mean(axis=0), rtol=1e-14, atol=1e-14)
    np.testing.assert_allclose(statistics.covariance(), covariance, rtol=0, atol=1e-12 * covariance.max())


@settings(max_examples=40, deadline=None)
@given(
    cuts=st.lists(st.integers(0, 50), max_size=6),
    mean=st.sampled_from([0.0, -3.0, 1e4]),
    seed=st.integers(0, 1000),
)
def test_statistics_of_any_split_are_those_of_numpy(cuts, mean, seed):
    vectors = normal(seed, 50, 4) @ normal(seed + 1, 4, 4) + mean
    statistics = FeatureStatistics(4)
    ends = [0, *sorted(cuts), 50]
    for start, end in itertools.pairwise(ends):
        statistics.update(vectors[start:end])
    check_against_numpy(statistics, vectors)


@settings(max_examples=40, deadline=None)
@given(cuts=st.lists(st.integers(0, 30), min_size=1, max_size=4), seed=st.integers(0, 1000))
def test_merged_statistics_are_those_of_all_vectors(cuts, seed):
    vectors = normal(seed, 30, 3) * torch.tensor([1.0, 0.1, 5.0]) + 1e4
    merged = FeatureStatistics(3)
    ends = [0, *sorted(cuts), 30]
    for start, end in itertools.pairwise(ends):
        part = FeatureStatistics(3)
        part.update(vectors[start:end])
        before = part.scatter.clone()
        merged.merge(part)
        assert torch.equal(part.scatter, before)
    check_against_numpy(merged, vectors)


def test_statistics_of_one_vector_at_a_time():
    vectors = normal(5, 200, 3) + 1e4
    statistics = FeatureStatistics(3)
    for vector in vectors:
        statistics.update(vector[None])
    check_against_numpy(statistics, vectors)


def test_float32_features_are_summed_in_float64():
    vectors = (normal(6, 3000, 2) + 1e4).float()
    statistics = FeatureStatistics(2)
    statistics.update(vectors)
    check_against_numpy(statistics, vectors.double())


def test_one_process_reduces_to_itself():
    vectors = normal(7, 20, 3)
    statistics = FeatureStatistics(3)
    statistics.all_reduce()
    assert statistics.count == 0
    statistics.update(vectors)
    statistics.all_reduce()
    check_against_numpy(statistics, vectors)


# ---- Fréchet distance ----


def rotation(seed: int, size: int) -> torch.Tensor:
    return torch.linalg.qr(normal(seed, size, size))[0]


def covariance_of(seed: int, size: int, count: int) -> torch.Tensor:
    return torch.cov(normal(seed, size, count))


def trace_of_root_by_scipy(cov1: torch.Tensor, cov2: torch.Tensor) -> float:
    return np.trace(scipy.linalg.sqrtm(cov1.numpy() @ cov2.numpy())).real


def test_distance_in_one_dimension():
    one = torch.ones(1, 1)
    # (3 - 1)^2 + (2 - 0.5)^2 = 6.25
    assert frechet_distance(torch.tensor([3.0]), 4 * one, torch.tensor([1.0]), 0.25 * one) == pytest.approx(6.25)


@pytest.mark.parametrize('rotated', [False, True])
def test_distance_of_commuting_covariances(rotated):
    basis = rotation(1, 6) if rotated else torch.eye(6, dtype=torch.float64)
    deviation1, deviation2 = normal(2, 6).abs(), normal(3, 6).abs()
    mean1, mean2 = normal(4, 6), normal(5, 6)
    expected = (mean1 - mean2).square().sum() + (deviation1 - deviation2).square().sum()
    cov1 = basis @ deviation1.square().diag() @ basis.T
    cov2 = basis @ deviation2.square().diag() @ basis.T
    assert frechet_distance(mean1, cov1, mean2, cov2) == pytest.approx(expected.item(), rel=1e-12)


def test_small_deviations_count_beside_large_ones():
    zero, cov1, cov2 = torch.zeros(2), torch.tensor([1.0, 1e-4]).double() ** 2, torch.tensor([1.0, 3e-4]).double() ** 2
    # Rounding of terms of size 1 leaves 1e-16 of (3e-4 - 1e-4)^2 = 4e-8.
    assert frechet_distance(zero, cov1.diag(), zero, cov2.diag()) == pytest.approx(4e-8, rel=1e-6)


@pytest.mark.parametrize('count', [2, 10, 100])  # samples of 40 dimensions: rank 1, 9, 40
def test_distance_to_itself_is_zero(count):
    mean, cov = normal(1, 40), covariance_of(2, 40, count)
    # The terms are of size tr S = 40; rooting a rounded zero would leave 1e-7.
    assert 0 <= frechet_distance(mean, cov, mean, cov) < 1e-12


def test_distance_of_two_lines():
    # S1 = u u^T and S2 = v v^T have rank 1, and tr (S1^1/2 S2 S1^1/2)^1/2 = |u . v|
    u, v, zero = normal(1, 30), normal(2, 30), torch.zeros(30)
    expected = u.square().sum() + v.square().sum() - 2 * (u @ v).abs()
    # A root of a rounded zero would be off by 1e-8 in each of 29 directions.
    distance = frechet_distance(zero, torch.outer(u, u), zero, torch.outer(v, v))
    assert distance == pytest.approx(expected.item(), rel=1e-12)


def test_distance_to_a_point():
    cov = covariance_of(1, 5, 20)
    distance = frechet_distance(torch.zeros(5), cov, torch.ones(5), torch.zeros(5, 5))
    assert distance == pytest.approx(5 + cov.trace().item(), rel=1e-12)


@settings(max_examples=30, deadline=None)
@given(size=st.integers(1, 12), count=st.integers(2, 20), seed=st.integers(0, 1000))
def test_distance_is_symmetric_and_invariant_under_rotation_and_shift(size, count, seed):
    mean1, mean2, shift = normal(seed, size), normal(seed + 1, size), normal(seed + 2, size)
    cov1, cov2 = (
        covariance_of(seed + 3, size, count).reshape(size, size),
        covariance_of(seed + 4, size, 30).reshape(size, size),
    )
    turn = rotation(seed + 5, size)
    distance = frechet_distance(mean1, cov1, mean2, cov2)
    moved = frechet_distance(turn @ mean1 + shift, turn @ cov1 @ turn.T, turn @ mean2 + shift, turn @ cov2 @ turn.T)
    assert distance >= 0
    assert frechet_distance(mean2, cov2, mean1, cov1) == pytest.approx(distance, rel=1e-9, abs=1e-9)
    assert moved == pytest.approx(distance, rel=1e-9, abs=1e-9)


def test_distance_agrees_with_scipy_for_regular_covariances():
    cov1, cov2 = covariance_of(1, 10, 50), 3 * covariance_of(2, 10, 40)
    mean1, mean2 = normal(3, 10), normal(4, 10)
    expected = (mean1 - mean2).square().sum() + cov1.trace() + cov2.trace() - 2 * trace_of_root_by_scipy(cov1, cov2)
    assert frechet_distance(mean1, cov1, mean2, cov2) == pytest.approx(expected.item(), rel=1e-10)


def test_distance_agrees_with_scipy_for_fewer_samples_than_dimensions():
    cov1, cov2 = covariance_of(1, 12, 6), covariance_of(2, 12, 8)
    zero = torch.zeros(12)
    # SciPy needs a regular matrix; adding e*I moves the trace of the root by about sqrt(e) in each of 12 directions.
    nudge = 1e-12 * torch.eye(12, dtype=torch.float64)
    expected = cov1.trace() + cov2.trace() - 2 * trace_of_root_by_scipy(cov1 + nudge, cov2 + nudge)
    assert frechet_distance(zero, cov1, zero, cov2) == pytest.approx(expected.item(), abs=3e-5)


# ---- one pass over a set ----


def test_gathering_does_not_depend_on_batches():
    images, labels = random_images(1, 50), torch.arange(50) % 3
    whole, pieces = (gathered(images, PIXEL_STATISTICS, labels, size) for size in (50, 3))
    for one, other in zip(whole.groups, pieces.groups, strict=True):
        torch.testing.assert_close(one.scatter, other.scatter, rtol=0, atol=1e-12)
    one, other = (gathered(images, PIXEL_FEATURES, labels, size) for size in (50, 3))
    assert torch.equal(one.features, other.features) and torch.equal(one.labels, other.labels)


@pytest.mark.parametrize(('kind', 'sizes'), [('statistics', [31]), ('halves', [15, 16]), ('tenths', [3] * 9 + [4])])
def test_sums_are_of_random_groups_of_nearly_equal_size(kind, sizes):
    images = random_images(2, 31)
    sums = gathered(images, Need('pixels', kind))
    features = PixelDetector()(images)['pixels'].double()
    assert sorted(group.count for group in sums.groups) == sizes
    check_against_numpy(sums.union(), features)
    places = [i for i in range(31) if sums._group[i] == 0]
    assert len(sizes) == 1 or places not in (list(range(len(places))), list(range(0, 31, len(sizes))))
    check_against_numpy(sums.groups[0], features[places])
    if len(sizes) > 1:
        check_against_numpy(sums.union(without=0), features[[i for i in range(31) if i not in places]])


def test_features_keep_their_labels():
    images, labels = random_images(3, 10), torch.arange(10)
    shuffled = torch.randperm(10, generator=torch.Generator().manual_seed(0))
    batch = ImageBatch(images[shuffled], labels[shuffled], shuffled)
    collected = gather(image_set(images), [batch], [PIXEL_FEATURES], 'cpu', PIXELS).collected[PIXEL_FEATURES]
    assert sorted(collected.labels.tolist()) == list(range(10))
    assert torch.equal(collected.features, PixelDetector()(images)['pixels'][collected.labels])
    assert (gathered(images, PIXEL_FEATURES).labels == -1).all()


def test_content_changes_with_a_pixel_and_with_the_order():
    images = random_images(4, 10)

    def content(images: torch.Tensor, size: int = 7) -> str:
        return gather(image_set(images), batches(images, size=size), [PIXEL_FEATURES], 'cpu', PIXELS).content

    changed = images.clone()
    changed[9, 0, 7, 7] ^= 1
    assert len(content(images)) == 16 and content(images) == content(images.clone(), 3)
    assert len({content(images), content(changed), content(images.flip(0)), content(images[:9])}) == 4


def test_image_of_other_shape_is_refused():
    stream = [*batches(random_images(1, 5)), ImageBatch(random_images(1, 1, (1, 8, 9)), None, torch.tensor([5]))]
    about = ImageSet('odd', 6, (1, 8, 8), 0)
    with pytest.raises(UserError, match='image 5 of odd is 1x8x9'):
        gather(about, stream, [PIXEL_STATISTICS], 'cpu', PIXELS)


def test_latents_are_refused():
    about = ImageSet('latents', 2, (4, 8, 8), 0)
    stream = [ImageBatch(torch.zeros(2, 4, 8, 8), None, torch.arange(2))]
    with pytest.raises(UserError, match=r'latents holds 4x8x8 .* of float32; metrics need grayscale or RGB'):
        gather(about, stream, [PIXEL_STATISTICS], 'cpu', PIXELS)


@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_features_that_are_not_finite_name_their_image(value):
    class Broken(PixelDetector):
        def __call__(self, images):
            features = super().__call__(images)
            features['pixels'][(images == 255).flatten(1).all(dim=1), 3] = value
            return features

    images = random_images(1, 20)
    images[17] = 255
    with pytest.raises(UserError, match=r'image 17 of some .*not finite.*pixels'):
        gather(image_set(images), batches(images), [PIXEL_STATISTICS], 'cpu', {'pixels': Broken()})


# ---- class agreement ----


def labelled(features, labels) -> Sample:
    collected = Sample(len(features), features.shape[1])
    collected.features[:] = torch.as_tensor(features)
    collected.labels[:] = torch.as_tensor(labels)
    return collected


@pytest.fixture(scope='module')
def digits() -> tuple[Sample, Sample]:
    """Real handwritten digits, and others in the place of generated ones."""
    import sklearn.datasets

    data = sklearn.datasets.load_digits()
    images = torch.from_numpy(data.images * 15).to(torch.uint8)[:, None]  # 0..16 -> 0..240
    features = PixelDetector()(images)['pixels']
    return labelled(features[:900], data.target[:900]), labelled(features[900:], data.target[900:])


def test_agreement_is_high_for_the_classes_asked_for(digits):
    real, images = digits
    result = class_agreement(real, images)
    assert result['value'] > 0.9  # other writers; 0.935 on the machine that this was written on
    assert result['held_out_accuracy'] > 0.92
    assert [row['class'] for row in result['per_class']] == list(range(10))
    assert sum(row['count'] for row in result['per_class']) == len(images.labels)
    mean = sum(row['count'] * row['agreement'] for row in result['per_class']) / len(images.labels)
    assert mean == pytest.approx(result['value'])
    assert class_agreement(real, images) == result


def test_agreement_is_low_for_permuted_classes(digits):
    real, images = digits
    permuted = labelled(images.features, images.labels.roll(1))
    assert class_agreement(real, permuted)['value'] < 0.2  # chance is 0.1, with a deviation of 0.01


def test_held_out_accuracy_does_not_know_its_labels(digits):
    real, images = digits
    noise = labelled(real.features[:300], torch.arange(300) % 5)  # labels that the images say nothing about
    few = labelled(images.features[:10], torch.arange(10) % 5)
    assert class_agreement(noise, few)['held_out_accuracy'] < 0.35  # chance is 0.2, with a deviation of 0.023


def test_agreement_by_hand():
    real = labelled(torch.tensor([[0.0], [1.0]]).repeat(10, 1), torch.tensor([4, 9]).repeat(10))
    images = labelled(torch.tensor([[0.0], [0.1], [0.9], [1.0]]), [4, 4, 4, 4])
    result = class_agreement(real, images)
    assert (result['value'], result['held_out_accuracy']) == (0.5, 1.0)
    assert [(row['class'], row['count'], row['agreement']) for row in result['per_class']] == [
        (4, 4, 0.5),
        (9, 0, None),
    ]


@pytest.mark.parametrize(
    ('real_labels', 'asked', 'problem'),
    [
        ([0, 1] * 4, [0], '5 real images of each class; class 0 has 4'),
        ([0] * 8, [0], 'at least two classes'),
        ([0, 1] * 5, [0, 7], 'no real image is of class 7'),
        ([0, 1] * 5, [0, -1], '1 generated images have none'),
        ([0, 1, -1] * 5, [0], '5 real images have none'),
    ],
)
def test_agreement_refuses_labels_that_cannot_be_judged(real_labels, asked, problem):
    real = labelled(normal(1, len(real_labels), 2), real_labels)
    with pytest.raises(UserError, match=problem):
        class_agreement(real, labelled(normal(2, len(asked), 2), asked))


def test_missing_sklearn_names_the_extra(monkeypatch):
    require_sklearn()
    monkeypatch.setitem(sys.modules, 'sklearn', None)
    with pytest.raises(UserError, match='extra `demo`'):
        require_packages(select_metrics(['class_agreement']))


# ---- the table ----


def test_unknown_metrics_name_the_near_ones():
    with pytest.raises(UserError, match=r'did you mean fd_pixels.*; unknown metric .zzzzz.; choose from'):
        select_metrics(['fd_pixel', 'fd_pixels', 'zzzzz'])


def test_metrics_are_selected_once_in_order():
    chosen = select_metrics([' class_agreement', 'fd_pixels', 'fd_pixels '])
    assert list(chosen) == ['class_agreement', 'fd_pixels']
    assert needs_of({**chosen, 'again': METRICS['fd_pixels']}) == [PIXEL_FEATURES, Need('pixels', 'statistics')]
    assert needs_of(chosen, reference=True) == [PIXEL_FEATURES, PIXEL_STATISTICS]


def test_sets_that_cannot_be_compared_are_refused_with_all_reasons():
    chosen = select_metrics(['fd_pixels', 'class_agreement'])
    real, images = ImageSet('real', 3, (1, 8, 8), 10), ImageSet('made', 1, (3, 8, 8), 0)
    with pytest.raises(UserError) as refusal:
        check_sets(chosen, real, images)
    reasons = refusal.value.problems
    assert len(reasons) == 4
    for reason, text in zip(
        reasons, ('made are 3x8x8', 'made has 1 image', 'real has 3 image', 'made has none'), strict=True
    ):
        assert text in reason
    check_sets(chosen, ImageSet('real', 4, (1, 8, 8), 10), ImageSet('made', 2, (1, 8, 8), 10))


def evaluate_fd(real_images: torch.Tensor, images: torch.Tensor):
    chosen = select_metrics(['fd_pixels'])
    real, made = (
        gather(image_set(group, name=name), batches(group), needs_of(chosen, name == 'real'), 'cpu', PIXELS)
        for group, name in ((real_images, 'real'), (images, 'made'))
    )
    return evaluate(chosen, real, made)


def test_fd_pixels_from_first_principles():
    real, made = random_images(1, 41), random_images(2, 30) // 2

    def direct(a: torch.Tensor, b: torch.Tensor) -> float:
        a, b = (group.flatten(1).numpy() / 255 for group in (a, b))
        cov1, cov2 = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
        eigenvalues, vectors = np.linalg.eigh(cov1)
        root = vectors * np.sqrt(eigenvalues.clip(0)) @ vectors.T
        roots = np.sqrt(np.linalg.eigvalsh(root @ cov2 @ root).clip(0))
        return np.square(a.mean(0) - b.mean(0)).sum() + np.trace(cov1) + np.trace(cov2) - 2 * roots.sum()

    results = evaluate_fd(real, made)
    numbers = results['metrics']['fd_pixels']
    # Pixels are float32 (1e-7), and the eigenvalues that are zero here are rooted after rounding (1e-8 each).
    assert numbers['value'] == pytest.approx(direct(real, made), rel=1e-5)
    groups = gathered(real, PIXEL_STATISTICS)._group
    assert numbers['real_halves'] == pytest.approx(direct(real[groups == 0], real[groups == 1]), rel=1e-5)
    assert (numbers['num_images'], numbers['num_reference'], numbers['real_halves_counts']) == (30, 41, [21, 20])
    line = format_result('fd_pixels', numbers)
    assert f'{numbers["value"]:.5f}' in line and 'N=30' in line and 'N=41' in line and 'N=21' in line
    assert results['detectors'] == {'pixels': PixelDetector.identity}


def test_equal_sets_are_at_distance_zero():
    images = random_images(1, 20)
    # Terms of about 64 / 12 = 5 cancel to rounding.
    assert evaluate_fd(images, images)['metrics']['fd_pixels']['value'] < 1e-12


def test_few_images_are_warned_about():
    enough, few = random_images(1, 2048, (1, 2, 4)), random_images(2, 2047, (1, 2, 4))
    assert evaluate_fd(enough, enough)['warnings'] == []
    (warning,) = evaluate_fd(enough, few)['warnings']
    assert '2047 images of made' in warning and 'biased' in warning and 'real' not in warning
    assert '2047 images of real' in evaluate_fd(few, enough)['warnings'][0]


# ---- reference files ----


@pytest.fixture
def reference_file(tmp_path):
    images = random_images(1, 25)
    real = gather(image_set(images, num_classes=10), batches(images), [PIXEL_STATISTICS], 'cpu', PIXELS)
    save_reference(tmp_path / 'ref.safetensors', real)
    return tmp_path / 'ref.safetensors', real


def test_reference_file_holds_what_was_gathered(reference_file):
    path, real = reference_file
    loaded = load_reference(path, [PIXEL_STATISTICS], PIXELS)
    assert (loaded.about, loaded.identities, loaded.versions) == (real.about, real.identities, real.versions)
    before, after = real.collected[PIXEL_STATISTICS], loaded.collected[PIXEL_STATISTICS]
    for one, other in zip(before.groups, after.groups, strict=True):
        assert torch.equal(one.mean, other.mean) and torch.equal(one.scatter, other.scatter)
    assert [group.count for group in after.groups] == [13, 12] and loaded.content == real.content


def test_halves_of_older_reference_files(reference_file):
    _, real = reference_file
    before = real.collected[PIXEL_STATISTICS]
    parts = zip(('even', 'odd'), before.groups, strict=True)
    tensors = {f'{half}.{name}': t for half, group in parts for name, t in group.to_tensors().items()}
    after = restore_collector('halves', tensors, tensors['even.mean'].shape[-1])
    assert [group.count for group in after.groups] == [13, 12]
    assert torch.equal(after.union().scatter, before.union().scatter)


def test_reference_of_another_detector_is_refused(reference_file, monkeypatch):
    path, _ = reference_file
    monkeypatch.setattr(PixelDetector, 'identity', 'pixels (another grid)')
    with pytest.raises(UserError, match=r'another detector: .pixels .average.*here it is .pixels .another grid'):
        load_reference(path, [PIXEL_STATISTICS], PIXELS)


def test_reference_without_what_a_metric_needs_is_refused(reference_file):
    path, _ = reference_file
    with pytest.raises(UserError, match=r'no inception/statistics, only pixels/halves'):
        load_reference(path, [Need('inception', 'statistics')], PIXELS)
    with pytest.raises(UserError, match=r'no pixels/sample.*give the data set some'):
        load_reference(path, [PIXEL_FEATURES], PIXELS)


def test_other_tensor_files_are_no_reference(tmp_path):
    save_tensors(tmp_path / 'net.safetensors', {'weight': torch.zeros(2)}, {'format': 'network'})
    with pytest.raises(UserError, match=r'net.safetensors is not a metric reference'):
        load_reference(tmp_path / 'net.safetensors', [PIXEL_STATISTICS], PIXELS)
