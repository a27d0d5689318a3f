"""Files by URL: downloaded once into a cache, continued where a download was cut off, verified by SHA-256."""

import contextlib
import hashlib
import json
import os
import re
import time
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dnnlib.errors import UserError
from dnnlib.files import make_folder, named_errors, read_regular

CACHE_VARIABLE = 'EDM2PLUS_CACHE'
LOCAL_HOSTS = ('localhost', '127.0.0.1', '::1')  # the only ones that may be asked without encryption
ATTEMPTS = 5
PAUSE = 1.0  # seconds before the second attempt; twice as long before each further one
TIMEOUTS = (15, 60)  # seconds to connect, and without a byte
SLOWEST = (60, 1024)  # seconds, and bytes per second that must arrive in them
LONGEST = 12 * 3600  # seconds for a file
MOST_FOLDERS = 64
CHUNK = 2**16  # bytes
PAGES = (b'<!doctype html', b'<html')


def is_url(text: str | os.PathLike) -> bool:
    """Whether a file is named by a URL rather than by a path."""
    return isinstance(text, str) and text.startswith(('https://', 'http://'))


def cache_folder() -> Path:
    """Where downloads are kept: $EDM2PLUS_CACHE, else edm2plus in the user's cache folder."""
    if named := os.environ.get(CACHE_VARIABLE):
        return Path(named)
    return Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache') / 'edm2plus'


def local_file(source: str | os.PathLike, offline: bool = False) -> Path:
    """The file that a path or URL names, downloaded if need be; see `download`."""
    return download(str(source), offline=offline) if is_url(source) else Path(source)


def download(url: str, sha256: str | None = None, offline: bool = False) -> Path:
    """Download a file into the cache, unless it is there, and return its path, which ends as the URL does.

    The file's SHA-256 is kept beside it (`NAME.sha256`, as `sha256sum -c` reads it) and checked at every use. One that
    is known beforehand may end the URL: `https://.../x.pkl#sha256=HEX`. Processes that ask for one file at the same
    time wait for the first of them.

    Args:
        url: https; plain http only of this machine.
        sha256: Expected digest in hex; None takes that of the URL, or the one of the first download.
        offline: Only look into the cache.
    """
    address, expected = _split(url)
    expected = sha256.lower() if sha256 else expected
    path = _place(address)
    if offline and not path.exists():
        raise UserError(f'{address} is not in the download cache ({path}), and --offline forbids downloading it')
    if not path.exists():
        make_folder(path.parent)
        with _locked(path):
            if not path.exists():  # another process may have been first
                _fetch(address, path, expected)
    _verify(path, expected, address)
    return path


def _split(url: str) -> tuple[str, str | None]:
    """A URL's address, and the digest that its fragment gives."""
    address, _, fragment = url.partition('#')
    try:
        parts = urllib.parse.urlsplit(address)
    except ValueError as error:
        raise UserError(f'{address} is no URL: {error}') from None
    if parts.scheme != 'https' and parts.hostname not in LOCAL_HOSTS:
        raise UserError(f'{address} is not encrypted; use https')
    if not parts.hostname or not Path(parts.path).name:
        raise UserError(f'{address} does not name a file')
    if fragment and not re.fullmatch('sha256=[0-9a-fA-F]{64}', fragment):
        raise UserError(f'{url}: what follows # must be sha256= and 64 hexadecimal digits')
    return address, fragment.removeprefix('sha256=').lower() or None


def _place(address: str) -> Path:
    """Where the cache keeps a URL: by host and path, so that names keep their meaning."""
    parts = urllib.parse.urlsplit(address)
    *folders, name = [part for part in urllib.parse.unquote(parts.path).split('/') if part]
    if parts.query:
        folders.append('query-' + hashlib.sha256(parts.query.encode()).hexdigest()[:16])
    host = parts.netloc.rpartition('@')[2].replace(':', '-')
    if len(folders) > MOST_FOLDERS:
        raise UserError(f'{address[:100]}... has {len(folders)} folders in it, more than {MOST_FOLDERS}')
    for part in (host, *folders, name):
        if part in ('.', '..') or not part.isprintable() or set(part) & set('\\:') or len(part) > 200:
            raise UserError(f'{address} has {part[:50]!r} in it, which cannot be the name of a file')
    return cache_folder().joinpath('downloads', host, *folders, name)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the one lock of this file, where the platform has such locks."""
    try:
        import fcntl
    except ImportError:  # Windows: processes started together may download twice
        yield
        return
    with open(path.with_name(f'.{path.name}.lock'), 'w') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _fetch(address: str, path: Path, expected: str | None) -> None:
    """Download to `path`, continuing what an earlier attempt has left."""
    import requests  # takes a quarter of a second, which most commands need not wait for

    part = path.with_name(f'.{path.name}.part')
    deadline = time.monotonic() + LONGEST
    for attempt in range(1, ATTEMPTS + 1):
        try:
            with named_errors(part):  # a full disk, say
                _receive(address, part, deadline)
            break
        except requests.HTTPError as error:
            if error.response.status_code < 500 or attempt == ATTEMPTS:
                reason = f'{error.response.status_code} {error.response.reason}'
                raise UserError(f'{address} cannot be downloaded: {reason}') from None
        except (requests.ConnectionError, requests.Timeout) as error:
            if attempt == ATTEMPTS or time.monotonic() > deadline:
                kept = f'; {part.stat().st_size} bytes are kept, run again to continue' if part.exists() else ''
                raise UserError(f'{address} cannot be downloaded: {_reason(error)}{kept}') from None
        except (requests.RequestException, ValueError) as error:  # the latter of hosts that cannot be
            raise UserError(f'{address} cannot be downloaded: {_reason(error)}') from None
        time.sleep(PAUSE * 2 ** (attempt - 1))
    digest = file_sha256(part)
    if problem := _problem(part, digest, expected):
        _discard(part)
        raise UserError(f'{address} {problem}; it was not kept')
    _digest_file(path).write_text(f'{digest}  {path.name}\n', encoding='utf-8')
    part.replace(path)
    _version_file(part).unlink(missing_ok=True)


def _problem(part: Path, digest: str, expected: str | None) -> str | None:
    """Why a file that was downloaded is not the one that was wanted."""
    with open(part, 'rb') as file:
        head = file.read(512)
    if not head:
        return 'is empty'
    if head.lstrip().lower().startswith(PAGES):
        return 'is a web page (of a log-in, or an error), not a file'
    return f'has the SHA-256 {digest}, expected {expected}' if expected and digest != expected else None


def _receive(address: str, part: Path, deadline: float) -> None:
    """One attempt: append what is missing of the file to `part`, or start over where the server's file has changed.

    Raises:
        requests.RequestException: for whatever goes wrong on the way.
    """
    import requests

    have, before = part.stat().st_size if part.exists() else 0, _read_version(part)
    headers = {'Accept-Encoding': 'identity'}
    if have:
        headers['Range'] = f'bytes={have}-'
        if before.get('etag'):  # the server sends the rest only of the same version
            headers['If-Range'] = before['etag']
    with requests.get(address, headers=headers, stream=True, timeout=TIMEOUTS) as response:
        if urllib.parse.urlsplit(response.url).hostname not in LOCAL_HOSTS and not response.url.startswith('https'):
            raise requests.exceptions.InvalidURL('it leads to an address that is not encrypted')
        if response.status_code == 416:
            _discard(part)
            raise requests.ConnectionError('the part that was there did not fit the file')
        response.raise_for_status()
        version, resumed = _version(response, have), response.status_code == 206
        changed = any(before.get(key) and version[key] and before[key] != version[key] for key in version)
        if resumed and (changed or not response.headers.get('Content-Range', '').startswith(f'bytes {have}-')):
            _discard(part)
            raise requests.ConnectionError('the server sent another part than it was asked for')
        if not resumed:
            have = 0
            _version_file(part).write_text(json.dumps(version), encoding='utf-8')
        total = version['total']
        with (
            open(part, 'ab' if resumed else 'wb') as file,
            tqdm(desc=part.name[1:-5], total=total, initial=have, unit='B', unit_scale=True, disable=None) as bar,
        ):
            for chunk in _chunks(response, deadline):
                file.write(chunk)
                bar.update(len(chunk))
            file.flush()
            os.fsync(file.fileno())
    if total is not None and part.stat().st_size < total:
        raise requests.ConnectionError(f'the connection ended after {part.stat().st_size} of {total} bytes')


def _chunks(response: Any, deadline: float) -> Iterator[bytes]:
    """What arrives, as it arrives; too slow a server is a broken connection."""
    import requests
    import urllib3

    seconds, speed = SLOWEST
    mark, since = time.monotonic(), 0
    read = getattr(response.raw, 'read1', response.raw.read)  # older urllib3 waits until it has all of it
    try:
        while chunk := read(CHUNK, decode_content=True):
            yield chunk
            now, since = time.monotonic(), since + len(chunk)
            if now > deadline:
                raise requests.ConnectionError(f'it took more than {LONGEST / 3600:g} hours')
            if now > mark + seconds:
                if since < speed * (now - mark):
                    raise requests.ConnectionError(f'only {since} bytes arrived in {now - mark:.0f} seconds')
                mark, since = now, 0
    except urllib3.exceptions.HTTPError as error:
        raise requests.ConnectionError(error) from None


def _version(response: Any, have: int) -> dict[str, Any]:
    """What tells versions of a file apart: the server's name for this one, where it is exact, and the total length."""
    etag = response.headers.get('ETag') or response.headers.get('Last-Modified') or ''
    length = response.headers.get('Content-Length', '')
    start = have if response.status_code == 206 else 0
    return {'etag': '' if etag.startswith('W/') else etag, 'total': start + int(length) if length.isdigit() else None}


def _read_version(part: Path) -> dict[str, Any]:
    try:
        version = json.loads(read_regular(_version_file(part), CHUNK))
        return version if isinstance(version, dict) else {}
    except (OSError, ValueError):
        return {}


def _discard(part: Path) -> None:
    part.unlink(missing_ok=True)
    _version_file(part).unlink(missing_ok=True)


def _verify(path: Path, expected: str | None, address: str) -> None:
    """Check a cached file against what is expected, or else against what was first downloaded."""
    try:
        kept = _digest_file(path).read_text(encoding='utf-8').split()[0]
    except (OSError, IndexError):
        kept = None
    digest = file_sha256(path)
    if digest != (expected or kept or digest):
        whose = 'expected' if expected else 'downloaded'
        raise UserError(
            f'{path} has the SHA-256 {digest}, {whose} was {expected or kept}; delete it to fetch {address}'
        )


def file_sha256(path: str | os.PathLike) -> str:
    """SHA-256 of a file, in hex."""
    digest = hashlib.sha256()
    with open(path, 'rb') as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _digest_file(path: Path) -> Path:
    return path.with_name(f'{path.name}.sha256')


def _version_file(part: Path) -> Path:
    """Holds what tells the version of the file that `part` is the beginning of."""
    return part.with_name(f'{part.name}-version')


def _reason(error: Exception) -> str:
    """The heart of what a library says: the end of a chain of causes."""
    reason = ' '.join(str(error).split()).rpartition(': ')[2].strip('\'")')
    return (reason + ')' * (reason.count('(') - reason.count(')')))[:200] or type(error).__name__
