"""Downloads from a server of this test: resumed, verified, cached, and never without being asked."""

import contextlib
import errno
import hashlib
import http.server
import threading
import time

import pytest

from dnnlib import download as module
from dnnlib.download import download, is_url, local_file
from dnnlib.errors import UserError

CONTENT = bytes(range(256)) * 5120  # half of it is a whole number of chunks
DIGEST = hashlib.sha256(CONTENT).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves CONTENT with ranges; `server.plan` says what goes wrong, one entry for each request."""

    def do_GET(self):
        server = self.server
        server.requests.append((self.path, self.headers.get('Range'), self.headers.get('If-Range')))
        trouble = server.plan.pop(0) if server.plan else ''
        if trouble.isdigit():
            self.send_error(int(trouble))
            return
        content = server.content
        start = 0
        wanted = self.headers.get('If-Range') in (None, server.etag) or server.careless
        wanted = wanted and trouble != 'ignore range'
        if self.headers.get('Range') and wanted:
            start = int(self.headers['Range'].removeprefix('bytes=').removesuffix('-'))
        if trouble == 'wrong range':
            start = 1
        self.send_response(206 if start else 200)
        self.send_header('Content-Length', str(len(content) - start))
        if server.etag:
            self.send_header('ETag', server.etag)
        if start:
            self.send_header('Content-Range', f'bytes {start}-{len(content) - 1}/{len(content)}')
        self.end_headers()
        if trouble == 'slow':
            with contextlib.suppress(OSError):  # until the client has had enough
                for i in range(start, len(content)):
                    self.wfile.write(content[i : i + 1])
                    time.sleep(0.02)
            return
        self.wfile.write(content[start : len(content) // 2] if trouble == 'cut' else content[start:])

    def log_message(self, *_):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setenv('EDM2PLUS_CACHE', str(tmp_path / 'cache'))
    monkeypatch.setattr(module, 'PAUSE', 0.0)
    for name in ('http_proxy', 'https_proxy', 'all_proxy'):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    server.content, server.etag, server.careless, server.plan, server.requests = CONTENT, '"1"', False, [], []
    server.url = f'http://127.0.0.1:{server.server_port}'
    thread = threading.Thread(target=server.serve_forever, kwargs={'poll_interval': 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def names(path):
    return sorted(p.name for p in path.parent.iterdir() if not p.name.endswith('.lock'))


def test_once_and_by_name(server):
    path = download(f'{server.url}/raw/edm2-img512-s/x-0.050.pkl')
    assert path.read_bytes() == CONTENT and path.parts[-3:] == ('raw', 'edm2-img512-s', 'x-0.050.pkl')
    assert names(path) == ['x-0.050.pkl', 'x-0.050.pkl.sha256']
    assert path.with_name('x-0.050.pkl.sha256').read_text() == f'{DIGEST}  x-0.050.pkl\n'
    assert download(f'{server.url}/raw/edm2-img512-s/x-0.050.pkl', offline=True) == path
    assert local_file(f'{server.url}/raw/edm2-img512-s/x-0.050.pkl#sha256={DIGEST}') == path
    assert len(server.requests) == 1
    assert download(f'{server.url}/raw/edm2-img512-s/x-0.050.pkl?v=2') != path


def test_a_cut_download_is_continued(server):
    server.plan = ['cut', '503', '']
    assert download(f'{server.url}/x').read_bytes() == CONTENT
    half = len(CONTENT) // 2
    assert [r[1:] for r in server.requests] == [(None, None), *[(f'bytes={half}-', '"1"')] * 2]


def test_a_later_run_continues(server):
    server.plan = ['cut', *['500'] * 10]
    with pytest.raises(UserError, match='500'):
        download(f'{server.url}/x')
    assert len(server.requests) == module.ATTEMPTS
    server.plan = []
    assert download(f'{server.url}/x', sha256=DIGEST).read_bytes() == CONTENT
    assert server.requests[-1][1] == f'bytes={len(CONTENT) // 2}-'


@pytest.mark.parametrize('trouble', ['ignore range', 'wrong range', '416'])
def test_servers_that_do_not_continue(server, trouble):
    server.plan = ['cut', trouble]
    assert download(f'{server.url}/x').read_bytes() == CONTENT


def test_a_file_that_changed_meanwhile_is_fetched_anew(server):
    server.plan = ['cut', *['503'] * 4]
    with pytest.raises(UserError):
        download(f'{server.url}/x')
    server.content, server.etag = CONTENT[::-1], '"2"'
    assert download(f'{server.url}/x').read_bytes() == CONTENT[::-1]


@pytest.mark.parametrize(('etag', 'content'), [('"2"', CONTENT[::-1]), ('', CONTENT[::-1] + b'!')])
def test_a_careless_server_s_changed_file_is_fetched_anew(server, etag, content):
    """It sends the rest of whatever version is asked for; its ETag, or without one the length, tells."""
    server.plan = ['cut', *['503'] * 4]
    server.etag = etag and '"1"'
    with pytest.raises(UserError):
        download(f'{server.url}/x')
    server.content, server.etag, server.careless = content, etag, True
    assert download(f'{server.url}/x').read_bytes() == content


@pytest.mark.parametrize(('content', 'message'), [(b'', 'is empty'), (b'\n<!DOCTYPE HTML><p>Log in', 'is a web page')])
def test_what_is_no_file_is_not_cached(server, content, message):
    server.content = content
    with pytest.raises(UserError, match=f'/x {message}.*; it was not kept'):
        download(f'{server.url}/x')
    server.content = CONTENT
    assert download(f'{server.url}/x').read_bytes() == CONTENT


def test_slow_servers_are_left(server, monkeypatch):
    monkeypatch.setattr(module, 'SLOWEST', (0.1, 1024))
    server.plan = ['slow', '']
    assert download(f'{server.url}/x').read_bytes() == CONTENT
    assert int(server.requests[1][1].removeprefix('bytes=').removesuffix('-')) < 100  # what had arrived is kept
    monkeypatch.setattr(module, 'LONGEST', 0.1)
    server.plan = ['slow'] * 9
    with pytest.raises(UserError, match=r'(it took more than|only \d+ bytes).*are kept, run again'):
        download(f'{server.url}/y')
    assert len(server.requests) == 3


def test_a_full_disk_is_named(server, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, 'No space left on device')

    monkeypatch.setattr(module.os, 'fsync', full)
    with pytest.raises(OSError, match='No space left') as caught:
        download(f'{server.url}/x')
    assert caught.value.filename.endswith('.x.part')


def test_connection_that_always_breaks(server):
    server.plan = ['cut'] * 10
    with pytest.raises(UserError, match=r'; 655360 bytes are kept, run again'):
        download(f'{server.url}/x')


def test_digests(server):
    with pytest.raises(UserError, match=f'has the SHA-256 {DIGEST}, expected {"0" * 64}'):
        download(f'{server.url}/x#sha256={"0" * 64}')
    path = download(f'{server.url}/x')
    path.write_bytes(CONTENT[:-1] + b'!')
    with pytest.raises(UserError, match=f'downloaded was {DIGEST}; delete it'):
        download(f'{server.url}/x')
    with pytest.raises(UserError, match=f'expected was {DIGEST}'):
        download(f'{server.url}/x', sha256=DIGEST.upper())


def test_missing_file(server):
    server.plan = ['404']
    with pytest.raises(UserError, match='404 Not Found'):
        download(f'{server.url}/x')
    assert len(server.requests) == 1


def test_offline(server):
    with pytest.raises(UserError, match=r'not in the download cache.*--offline'):
        download(f'{server.url}/x', offline=True)
    assert not server.requests


def test_nobody_there(server, monkeypatch):
    monkeypatch.setattr(module, 'ATTEMPTS', 2)
    with pytest.raises(UserError, match=r'cannot be downloaded: .*[Rr]efused'):
        download('http://127.0.0.1:1/x')


@pytest.mark.parametrize(
    ('url', 'message'),
    [
        ('http://example.org/x', 'use https'),
        ('https://example.org/', 'does not name a file'),
        ('https:///x', 'does not name a file'),
        ('https://example.org/a/../../../x', 'cannot be the name'),
        ('https://example.org/%2e%2e/x', 'cannot be the name'),
        ('https://example.org/x#sha256=12', '64 hexadecimal'),
        ('https://example.org/x#md5=12', '64 hexadecimal'),
        ('https://[::1/x', 'is no URL: Invalid IPv6'),
        ('https://example.org/' + 'a/' * 1000 + 'x', 'has 1000 folders'),
    ],
)
def test_urls_that_are_refused(url, message):
    with pytest.raises(UserError, match=message):
        download(url, offline=True)


def test_hosts_that_cannot_be(server):
    with pytest.raises(UserError, match='cannot be downloaded'):
        download('https://a..b/x')


def test_processes_that_start_together_download_once(server):
    threads = [threading.Thread(target=download, args=(f'{server.url}/x',)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(server.requests) == 1


def test_paths_are_not_urls(tmp_path):
    assert not is_url('runs/https.pkl') and not is_url(tmp_path)
    assert local_file(tmp_path / 'x') == tmp_path / 'x'
