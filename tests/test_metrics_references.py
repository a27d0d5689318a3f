"""References of others (.npz, .pkl), image arrays in .npz files, DINOv2, warnings, and records of results."""

import hashlib
import http.server
import json
import pickle
import re
import sys
import threading
import types
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dnnlib.errors import UserError
from dnnlib.jsonl import append_record
from dnnlib.parsing import parse_int_list
from evaluation.records import find_generation, format_int_list
from metrics.baselines import BASELINES, has_statistics, load_baseline, reference_file, save_baseline
from metrics.dino import DinoDetector, fetch_dino, set_position_grid
from metrics.gathering import Gathered, Need, gather
from metrics.image_sets import ImageBatch, ImageSet
from metrics.inception_score import class_features
from metrics.npz import NpzImages, npz_array
from metrics.reading import batch_range, describe, random_subset, read_batches, split_evenly
from metrics.reference import load_reference, save_reference
from metrics.registry import METRICS, check_sets, memory_notes, needs_of, require_packages, select_metrics
from metrics.results import evaluate, format_result, summarize_runs

FID = Need('inception', 'statistics')


class Detector:
    """Five numbers of each image; `standard` as a test wants it."""

    identity = 'five numbers'

    def __init__(self, standard=True):
        self.standard = standard

    def num_features(self, image_shape):
        return {'inception': 5, 'spatial': 5, 'classes': 5}

    def __call__(self, images):
        features = images.flatten(1)[:, :5].float()
        return {'inception': features, 'spatial': features + 1, 'classes': class_features(features[:, :4])}


def random_images(seed: int, count: int, shape=(1, 4, 4)) -> torch.Tensor:
    return torch.randint(0, 256, (count, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def gathered(images: torch.Tensor, needs=(FID,), name='some', **about) -> Gathered:
    batches = [ImageBatch(images[i], None, i) for i in torch.arange(len(images)).split(7)]
    about = ImageSet(name, len(images), tuple(images.shape[1:]), 0, **about)
    return gather(about, batches, needs, 'cpu', {need.detector: Detector() for need in needs})


# ---- references of others ----


@pytest.fixture
def moments():
    images = gathered(random_images(0, 50))
    statistics = images.collected[FID].union()
    return {'mu': statistics.mean.numpy(), 'sigma': statistics.covariance().numpy()}


def write(path, moments, form):
    if form == 'npz':
        np.savez(path, **moments)
    elif form == 'compressed':
        np.savez_compressed(path, **moments, arr_0=np.zeros(3))
    else:
        with open(path, 'wb') as file:
            pickle.dump(moments if form == 'flat' else {'fid': moments, 'fd_dinov2': moments}, file)
    return path


@pytest.mark.parametrize(
    ('name', 'form'), [('a.npz', 'npz'), ('b.npz', 'compressed'), ('c.pkl', 'flat'), ('d.pkl', 'nested')]
)
def test_published_statistics_give_what_ours_give(tmp_path, moments, name, form):
    path = write(tmp_path / name, moments, form)
    assert has_statistics(path)
    published = load_baseline(path, [FID], {'inception': Detector()})
    ours, images = gathered(random_images(0, 50)), gathered(random_images(1, 30))
    fid = select_metrics(['fid'])
    expected = evaluate(fid, ours, images)['metrics']['fid']
    found = evaluate(fid, published, images)['metrics']['fid']
    assert found['value'] == pytest.approx(expected['value'], rel=1e-9) and expected['value'] > 1
    assert (found['num_images'], found['num_reference']) == (30, None)
    assert 'N=30, reference N unknown' in format_result('fid', found)


def test_reference_for_edm2(tmp_path):
    ours = gathered(random_images(0, 50))
    save_baseline(tmp_path / 'ref.pkl', ours)
    content = pickle.loads((tmp_path / 'ref.pkl').read_bytes())  # as EDM2 reads it
    assert content.keys() == {'fid', 'num_images'} and content['num_images'] == 50
    assert content['fid']['mu'].dtype == content['fid']['sigma'].dtype == np.float64
    for protocol in (2, 3, 5):  # 2 has bytes as text
        (tmp_path / 'again.pkl').write_bytes(pickle.dumps(content, protocol))
        again = load_baseline(tmp_path / 'again.pkl', [FID], {'inception': Detector()})
        assert again.about.count == 50
        for name in ('mean', 'covariance'):
            a, b = (getattr(each.collected[FID].union(), name) for each in (again, ours))
            a, b = (x() if callable(x) else x for x in (a, b))
            assert torch.allclose(a, b, rtol=1e-12, atol=0)
    with pytest.raises(UserError, match='EDM2 reads fid and fd_dinov2 only'):
        save_baseline(tmp_path / 'none.pkl', replace(ours, collected={}))


@pytest.mark.parametrize(
    ('change', 'problem'),
    [
        ({'mu': np.zeros(4)}, r'mu and sigma are \(4,\) and \(5, 5\)'),
        ({'sigma': np.full((5, 5), np.nan)}, 'not finite'),
        ({'mu': np.zeros(5, np.int64)}, 'arrays of floating-point numbers'),
        ({'mu': np.array([{}] * 5, object)}, 'cannot be read|not allowed|no array of numbers'),
        ({'mu': np.zeros(3), 'sigma': np.eye(3)}, 'has 3 features, inception has 5'),
    ],
)
@pytest.mark.parametrize('form', ['npz', 'nested'])
def test_damaged_statistics_are_refused(tmp_path, moments, change, problem, form):
    path = write(tmp_path / f'x.{"npz" if form == "npz" else "pkl"}', {**moments, **change}, form)
    with pytest.raises(UserError, match=problem):
        load_baseline(path, [FID], {'inception': Detector()})


def test_statistics_without_what_a_metric_needs_are_refused(tmp_path, moments):
    path = write(tmp_path / 'a.npz', moments, 'npz')
    with pytest.raises(UserError, match='covariances of inception only, and a metric needs dinov2/statistics'):
        load_baseline(path, [Need('dinov2', 'statistics')], {'dinov2': Detector()})
    with pytest.raises(UserError, match='needs inception/sample'):
        load_baseline(path, [Need('inception', 'sample')], {'inception': Detector()})
    (tmp_path / 'list.pkl').write_bytes(pickle.dumps([1, 2]))
    with pytest.raises(UserError, match='no entry fid or fd_dinov2'):
        load_baseline(tmp_path / 'list.pkl', [FID], {'inception': Detector()})


def test_published_statistics_need_published_weights(tmp_path, moments):
    path = write(tmp_path / 'a.npz', moments, 'npz')
    with pytest.raises(UserError, match='published weights of inception, and here it has others: five numbers'):
        load_baseline(path, [FID], {'inception': Detector(standard=False)})
    assert load_baseline(path, [FID], {'inception': Detector(standard=None)})


def test_pickles_that_would_run_code_are_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return print, ('run',)

    (tmp_path / 'evil.pkl').write_bytes(pickle.dumps({'fid': Evil()}))
    with pytest.raises(UserError, match='print'):
        load_baseline(tmp_path / 'evil.pkl', [FID], {'inception': Detector()})


SPATIAL = Need('spatial', 'statistics')


def test_spatial_statistics_of_adm(tmp_path, moments):
    """Its files hold mu_s and sigma_s beside mu and sigma, and images too."""
    moved = {'mu_s': moments['mu'] + 1, 'sigma_s': moments['sigma']}
    np.savez(tmp_path / 'adm.npz', arr_0=np.zeros((3, 4, 4, 3), np.uint8), **moments, **moved)
    assert has_statistics(tmp_path / 'adm.npz')
    published = load_baseline(str(tmp_path / 'adm.npz'), [FID, SPATIAL], {'inception': Detector()})
    chosen = select_metrics(['sfid', 'fid'])
    images = gathered(random_images(1, 30), needs_of(chosen))
    numbers = evaluate(chosen, published, images)['metrics']
    assert numbers['sfid']['value'] == pytest.approx(numbers['fid']['value'], rel=1e-9)  # both are shifted by 1
    assert numbers['fid']['value'] > 1 and len(NpzImages(tmp_path / 'adm.npz')) == 3


# ---- baselines ----


@pytest.fixture
def published(tmp_path, monkeypatch, moments):
    """A server of this test that has what `BASELINES` names, and its number of requests."""
    write(tmp_path / 'img64.pkl', moments, 'nested')
    requests = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(tmp_path))

        def log_message(self, *args):
            requests.append(self.path)

    monkeypatch.setenv('EDM2PLUS_CACHE', str(tmp_path / 'cache'))
    for name in ('http_proxy', 'https_proxy', 'all_proxy', 'HTTP_PROXY', 'HTTPS_PROXY', 'ALL_PROXY'):
        monkeypatch.delenv(name, raising=False)
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={'poll_interval': 0.01})
        thread.start()
        url = f'http://127.0.0.1:{server.server_port}/img64.pkl'
        monkeypatch.setitem(BASELINES, 'edm2-img64', replace(BASELINES['edm2-img64'], url=url))
        yield requests
        server.shutdown()
        thread.join()


def test_baselines_are_downloaded_once_and_known(published, moments):
    with pytest.raises(UserError, match=r'img64.pkl is not in the download cache .*--offline forbids'):
        load_baseline('edm2-img64', [FID], {'inception': Detector()}, offline=True)
    for offline in (False, True):
        real = load_baseline('edm2-img64', [FID], {'inception': Detector()}, offline)
    assert published == ['/img64.pkl'] and reference_file('edm2-img64', offline=True).name == 'img64.pkl'
    assert (real.about.name, real.about.count, real.about.image_shape) == ('edm2-img64', 1_281_167, (3, 64, 64))
    np.testing.assert_array_equal(real.collected[FID].union().covariance().numpy(), moments['sigma'])
    images = gathered(random_images(0, 40, (3, 32, 32)), name='made', made_with={'transform': 'center-crop'})
    warnings = evaluate(select_metrics(['fid']), real, images)['warnings']
    assert any('3x32x32' in w and 'edm2-img64 3x64x64' in w for w in warnings)
    assert any('transform center-crop, the reference edm2-img64 with center-crop-dhariwal' in w for w in warnings)
    path = reference_file('edm2-img64', offline=True)
    path.write_bytes(path.read_bytes() + b'!')
    with pytest.raises(UserError, match='SHA-256'):
        load_baseline('edm2-img64', [FID], {'inception': Detector()}, offline=True)


def test_baselines_are_of_what_their_names_say():
    for name, baseline in BASELINES.items():
        side = 32 if name == 'edm-cifar10' else int(re.search(r'(\d+)$', name)[1])
        assert baseline.side == side and f'{side}' in baseline.url, name
    sets = {(b.count, b.transform) for name, b in BASELINES.items() if name != 'edm-cifar10'}
    assert sets == {(1_281_167, 'center-crop-dhariwal')}
    assert (BASELINES['edm-cifar10'].count, BASELINES['edm-cifar10'].transform) == (50_000, 'none')


def test_baselines_lie_at_encrypted_places_and_near_names_are_told(tmp_path, monkeypatch):
    assert set(BASELINES) == {'edm2-img64', 'edm2-img512', 'edm-cifar10', 'edm-imagenet64', 'adm-imagenet256'}
    for baseline in BASELINES.values():
        assert baseline.url.startswith('https://') and baseline.url.endswith(('.pkl', '.npz'))
    with pytest.raises(UserError, match=r'edm2-img46 is no file or folder.*did you mean edm2-img64'):
        reference_file('edm2-img46')
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'edm2-img64').mkdir()  # what lies here comes first
    assert reference_file('edm2-img64') == Path('edm2-img64')


# ---- our own files ----


def test_reference_with_several_kinds(tmp_path):
    needs = [FID, Need('inception', 'sample'), Need('inception', 'halves')]
    real = gathered(random_images(0, 50), needs, made_with={'transform': 'center-crop'}, fingerprint='abc')
    save_reference(tmp_path / 'ref.safetensors', real)
    loaded = load_reference(tmp_path / 'ref.safetensors', needs, {'inception': Detector()})
    assert loaded.about == real.about and loaded.versions == real.versions
    for need in needs:
        for name, tensor in real.collected[need].to_tensors().items():
            assert torch.equal(loaded.collected[need].to_tensors()[name], tensor)


def test_reference_of_other_weights_is_refused(tmp_path):
    save_reference(tmp_path / 'ref.safetensors', gathered(random_images(0, 50)))
    other = Detector()
    other.identity = 'five numbers, weights 123'
    with pytest.raises(UserError, match=r"another detector: 'five numbers', here it is 'five numbers, weights 123'"):
        load_reference(tmp_path / 'ref.safetensors', [FID], {'inception': other})


# ---- images in .npz files ----


@pytest.fixture
def pictures():
    return np.random.default_rng(0).integers(0, 256, (9, 4, 6, 3), dtype=np.uint8)


@pytest.mark.parametrize('save', [np.savez, np.savez_compressed])
def test_npz_images(tmp_path, pictures, save):
    save(tmp_path / 'made.npz', pictures, np.arange(9) % 4)
    images = NpzImages(tmp_path / 'made.npz')
    assert (images.name, len(images), images.image_shape, images.num_classes) == ('made', 9, (3, 4, 6), 4)
    for i in range(9):
        image, label = images[i]
        assert label == i % 4 and torch.equal(image, torch.tensor(pictures[i]).permute(2, 0, 1))
    assert isinstance(npz_array(tmp_path / 'made.npz', 'arr_0'), np.memmap) == (save is np.savez)
    batches = list(read_batches(images, 4, 'images'))
    assert torch.equal(torch.cat([batch.images for batch in batches]).permute(0, 2, 3, 1), torch.tensor(pictures))
    assert torch.cat([batch.indices for batch in batches]).tolist() == list(range(9))


def test_other_npz_files_are_refused(tmp_path, pictures):
    path = tmp_path / 'x.npz'
    for arrays, problem in (
        ({'mu': np.zeros(2)}, 'no arr_0, only mu'),
        ({'arr_0': pictures.astype(np.float32)}, 'arr_0 is float32'),
        ({'arr_0': pictures[:0]}, 'arr_0 is empty'),
        ({'arr_0': pictures, 'arr_1': np.zeros(3, int)}, 'not a class per image'),
        ({'arr_0': np.array([{}], object)}, 'holds objects'),
    ):
        np.savez(path, **arrays)
        with pytest.raises(UserError, match=problem):
            NpzImages(path)
    path.write_bytes(b'no zip')
    with pytest.raises(UserError, match=r'x\.npz is not an \.npz file'):
        NpzImages(path)
    with zipfile.ZipFile(path, 'w') as archive:
        archive.writestr('arr_0.npy', b'no array')
    with pytest.raises(UserError, match='arr_0 cannot be read'):
        NpzImages(path)


def test_parts_and_workers(tmp_path, pictures):
    np.savez(tmp_path / 'made.npz', pictures)
    images = NpzImages(tmp_path / 'made.npz')
    _, part, _ = split_evenly(images, 3)
    assert len(part) == 3 and torch.equal(part[0][0], images[3][0]) and part.fingerprint != images.fingerprint
    (batch,) = read_batches(part, 4, 'part', workers=1)
    assert torch.equal(batch.images[2], images[5][0]) and batch.names == ['3', '4', '5']
    assert describe(part).count == 3


def test_random_subsets(tmp_path, pictures):
    np.savez(tmp_path / 'made.npz', pictures)
    images = NpzImages(tmp_path / 'made.npz')
    some, same, other = (random_subset(images, 4, seed) for seed in (5, 5, 6))
    assert some.names == same.names == sorted(set(some.names)) and len(some) == 4 and some.names != other.names
    assert all(torch.equal(some[i][0], images[some.names[i]][0]) for i in range(4))
    assert random_subset(images, 9, 0).names == list(range(9))
    counts = torch.zeros(9)
    for seed in range(300):
        counts[random_subset(images, 3, seed).names] += 1
    assert (counts - 100).abs().max() < 35  # binomial of 300 and 1/3: deviation 8


def test_batches_are_the_same_for_any_number_of_ranks(monkeypatch):
    for size in (1, 2, 8):
        monkeypatch.setattr('torch_utils.distributed.world_size', lambda size=size: size)
        found = []
        for rank in range(size):
            monkeypatch.setattr('torch_utils.distributed.rank', lambda rank=rank: rank)
            found += batch_range(41, 4)
        assert sorted(found) == list(range(11))


# ---- warnings ----


def warnings_of(images: Gathered, real: Gathered | None, names=('fid',)) -> list[str]:
    return evaluate(select_metrics(names), real, images)['warnings']


@pytest.fixture(scope='module')
def enough():
    return random_images(0, 2048, (1, 4, 4)), random_images(1, 2048, (1, 4, 4))


def test_nothing_is_warned_about_without_need(enough):
    assert warnings_of(gathered(enough[0]), gathered(enough[1])) == []


def test_jpegs_are_warned_about(enough):
    (warning,) = warnings_of(gathered(enough[0], jpegs=7), gathered(enough[1]))
    assert '7 of 2048 images are JPEGs' in warning


def test_copies_are_warned_about(enough):
    images = enough[0].clone()
    images[[5, 700, 1500]] = images[[2047, 2047, 3]]
    (warning,) = warnings_of(gathered(images), gathered(enough[1]))
    assert '3 of 2048 images are copies' in warning


def test_other_shapes_and_transforms_are_warned_about(enough):
    real = gathered(enough[1].repeat(1, 1, 2, 1), name='real', made_with={'transform': 'center-crop'})
    shape, transform = warnings_of(gathered(enough[0], made_with={'transform': 'none'}), real)
    assert 'some is 1x4x4' in shape and '1x8x4' in shape and 'resize' in shape
    assert 'transform none, the reference real with center-crop' in transform


def test_transforms_are_seen_through_later_conversions(enough):
    """What only changes the file format notes `none`, and what it was made from before."""
    crop = {'transform': 'center-crop', 'format': 'png'}
    packed = {'transform': 'none', 'format': 'npy', 'before': {'transform': 'none', 'before': crop}}
    assert warnings_of(gathered(enough[0], made_with=packed), gathered(enough[1], made_with=crop)) == []
    other = gathered(enough[1], name='real', made_with={'transform': 'center-crop-dhariwal'})
    (warning,) = warnings_of(gathered(enough[0], made_with=packed), other)
    assert 'transform center-crop, the reference real with center-crop-dhariwal' in warning


def test_few_images_are_counted(enough):
    (warning,) = warnings_of(gathered(enough[0][:2047]), gathered(enough[1]))
    assert '2047 images of some' in warning and 'fid' in warning


def test_every_statistic_that_few_images_move_warns_of_them(enough):
    """FID by its bias, the Inception score by the opposite one, overlap, and the extrapolation; KID has none."""
    chosen = select_metrics(['fid', 'kid', 'is', 'prdc', 'fid_infinity'])
    real, images = (gathered(each, {*needs_of(chosen), *needs_of(chosen, True)}) for each in enough)
    warnings = evaluate(chosen, real, images)['warnings']
    assert [w.split(':')[0] for w in warnings] == ['is', 'prdc', 'fid_infinity']
    for warning, text in zip(
        warnings, ('below 20000 it is biased downwards', 'below 10000 all', 'below 5000'), strict=True
    ):
        assert text in warning and '2048 images of some' in warning


def test_any_statistic_of_any_features():
    """Names are STATISTIC_FEATURES, with the field's own names for some; one row makes all of a statistic."""
    assert METRICS['fid'] is METRICS['fd_inception'] and METRICS['sfid'] is METRICS['fd_spatial']
    assert METRICS['precision_recall'] is METRICS['prdc'] is METRICS['prdc_inception']
    for statistic in ('fd', 'fd_infinity', 'kid', 'prdc'):
        for features in ('inception', 'dinov2', 'pixels'):
            metric = METRICS[f'{statistic}_{features}']
            assert metric.need.features == metric.reference.features == features
    images = gathered(random_images(0, 40), [METRICS['kid'].need, METRICS['fid'].need])
    one, other = (METRICS[name].statistic.compute for name in ('kid_dinov2', 'kid'))
    assert one is other and images.collected[METRICS['kid'].need].count == 40


def test_extrapolation_needs_three_images_in_each_tenth():
    few, enough = (ImageSet('some', count, (3, 8, 8), 0) for count in (29, 30))
    check_sets(select_metrics(['fid_infinity']), enough, enough)
    with pytest.raises(UserError, match='fid_infinity needs at least 30 images'):
        check_sets(select_metrics(['fid_infinity']), enough, few)


def test_metrics_without_a_reference():
    need = METRICS['is'].need
    images = gathered(random_images(0, 30), [need])
    results = evaluate(select_metrics(['is']), None, images)
    assert results['metrics']['is']['value'] > 1 and results['metrics']['is']['num_reference'] is None
    with pytest.raises(UserError, match='fid needs a reference'):
        check_sets(select_metrics(['is', 'fid']), None, images.about)


def test_memory_is_told_before_it_is_taken():
    chosen = select_metrics(['fid', 'kid', 'precision_recall'])
    note, more = memory_notes(chosen, 1_281_167, 50_000, {'inception': 2048})
    assert note == 'kid, precision_recall: keeps 0.76 GiB on every rank'  # 2 * 50000 * 2048 * 4 / 2^30
    # 60,000 float64 vectors, and three blocks of 2^24 distances: (60000 * 2048 + 3 * 2^24) * 8 / 2^30
    assert more == 'precision_recall: 1.29 GiB more on rank 0 while it is computed'
    (note,) = memory_notes(chosen, 50_000, None, {'inception': 2048})  # of a reference
    assert note == 'kid, precision_recall: keeps 0.38 GiB on every rank'
    assert memory_notes(select_metrics(['kid']), None, 100, {'inception': 2048}) == []


def test_repeats_are_summed_up():
    runs = [{'metrics': {'fid': {'value': value}}} for value in (2.0, 1.5, 2.5)]
    summary = summarize_runs({'fid': METRICS['fid']}, runs)
    assert summary == {'fid': {'value': {'min': 1.5, 'mean': 2.0, 'max': 2.5, 'spread': 1.0}}}


# ---- records ----


@pytest.mark.parametrize('text', ['0-49999', '5', '1,3,5-7', '7,6,5'])
def test_seeds_are_written_as_they_are_read(text):
    assert format_int_list(parse_int_list(text)) == text


def test_records_are_appended(tmp_path):
    path = tmp_path / 'metrics.jsonl'
    append_record(path, {'a': 1})
    append_record(path, {'b': None})
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{'a': 1}, {'b': None}]


def test_generation_is_found(tmp_path):
    record = {'seeds': [0, 1, 2, 5], 'sampler': {'steps': 18}}
    expected = {'seeds': '0-2,5', 'sampler': {'steps': 18}}
    assert find_generation(str(tmp_path)) is None
    (tmp_path / 'generation.json').write_text(json.dumps(record))
    assert find_generation(str(tmp_path)) == find_generation(str(tmp_path / 'images.npz')) == expected
    with zipfile.ZipFile(tmp_path / 'x.zip', 'w') as archive:
        archive.writestr('y', '')
        assert find_generation(archive.filename) is None if archive.close() else True
    assert find_generation(str(tmp_path / 'x.zip')) is None
    (tmp_path / 'generation.json').write_text('{')
    with pytest.raises(UserError, match=r'generation\.json of .* cannot be read'):
        find_generation(str(tmp_path))


# ---- DINOv2 ----


@pytest.fixture(scope='module')
def tiny_dino(tmp_path_factory):
    transformers = pytest.importorskip('transformers')
    folder = tmp_path_factory.mktemp('dino')
    config = transformers.Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=518)
    with torch.random.fork_rng():
        transformers.Dinov2Model(config).save_pretrained(folder)
    return str(folder)


def test_dino_features_are_the_cls_token(tiny_dino):
    transformers = pytest.importorskip('transformers')
    detector = DinoDetector('cpu', tiny_dino, any_weights=True)
    images = random_images(0, 2, (1, 20, 30))
    x = torch.nn.functional.interpolate(images.float(), (224, 224), mode='bicubic', antialias=True) / 255
    x = (x - torch.tensor([0.485, 0.456, 0.406])[:, None, None]) / torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    net = transformers.Dinov2Model.from_pretrained(tiny_dino).eval()
    set_position_grid(net, 16)
    with torch.no_grad():
        expected = net(x).last_hidden_state[:, 0]
    assert detector.num_features((1, 20, 30)) == {'dinov2': 32} and detector.standard is False
    torch.testing.assert_close(detector(images)['dinov2'], expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match=r'not ViT-L/14.*--any-weights'):
        DinoDetector('cpu', tiny_dino)


def test_dino_is_known_by_its_file(tiny_dino, tmp_path, monkeypatch):
    """Versions of the library call its parameters by other names; the file stays. A pickle is not taken for it."""
    file = Path(tiny_dino) / 'model.safetensors'
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert DinoDetector('cpu', tiny_dino, any_weights=True).identity.endswith(f'file {digest}')
    (tmp_path / 'config.json').write_text((Path(tiny_dino) / 'config.json').read_text())
    (tmp_path / 'pytorch_model.bin').write_bytes(b'')
    with pytest.raises(UserError, match=r'cannot be loaded: it has no model\.safetensors.*--dinov2=PATH'):
        DinoDetector('cpu', str(tmp_path), any_weights=True)


class Positions(torch.nn.Module):
    def __init__(self, values):
        super().__init__()
        self.embeddings = torch.nn.Module()
        self.embeddings.position_embeddings = torch.nn.Parameter(values)


def test_positions_are_interpolated_with_the_authors_scale():
    """On a ramp, output i is its place there, (i + 1/2) * 37 / 16.1 - 1/2, but for 0.05 that torch's kernel adds."""
    ramp = torch.arange(37.0).expand(37, 37).reshape(1, 37 * 37, 1)
    net = Positions(torch.cat([torch.full((1, 1, 1), -5.0), ramp], 1))
    set_position_grid(net, 16)
    found = net.embeddings.position_embeddings
    assert found.shape == (1, 257, 1) and found[0, 0, 0] == -5
    expected = (torch.arange(16) + 0.5) * 37 / 16.1 - 0.5
    torch.testing.assert_close(found[0, 1:, 0].reshape(16, 16)[7, 1:15], expected[1:15], rtol=0, atol=0.06)
    assert ((torch.arange(16) + 0.5) * 37 / 16 - 0.5 - expected)[14] > 0.19  # with 16 for 16.1


def test_missing_dino_says_what_is_needed(tmp_path, monkeypatch):
    monkeypatch.setattr('metrics.dino.importlib.util.find_spec', lambda name: None)
    with pytest.raises(UserError, match='install the extra `dino`'):
        require_packages(select_metrics(['fd_dinov2']))


def test_published_dino_is_asked_for_by_its_revision(monkeypatch):
    def snapshot_download(name, revision, allow_patterns, local_files_only):
        raise OSError(f'{name} {revision} {sorted(allow_patterns)} {local_files_only}')

    hub = types.SimpleNamespace(snapshot_download=snapshot_download)
    monkeypatch.setitem(sys.modules, 'huggingface_hub', hub)
    for offline in (True, False):
        files = r"\['config.json', 'model.safetensors'\]"
        with pytest.raises(UserError, match=f'facebook/dinov2-large [0-9a-f]{{40}} {files} {offline}.*--dinov2=PATH'):
            fetch_dino(offline)


def test_absent_dino_names_url_files_and_place(tmp_path):
    pytest.importorskip('transformers')
    with pytest.raises(UserError, match=r'https://huggingface.co/facebook/dinov2-large.*--dinov2=PATH'):
        DinoDetector('cpu', str(tmp_path / 'absent'))
