"""Files by URL: downloaded once into a cache, continued where a download was cut off, verified by SHA-256."""

import contextlib
import hashlib
import os
import re
import time
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from dnnlib.errors import UserError
from dnnlib.files import make_folder

CACHE_VARIABLE = 'EDM2PLUS_CACHE'
LOCAL_HOSTS = ('localhost', '127.0.0.1', '::1')  # the only ones that may be asked without encryption
ATTEMPTS = 5
PAUSE = 1.0  # seconds before the second attempt; twice as long before each further one
TIMEOUTS = (15, 60)  # seconds to connect, and without a byte
MOST_FOLDERS = 64
CHUNK = 2**16  # less than this is lost where a connection breaks


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
    return download(source, offline=offline) if is_url(source) else Path(source)


def download(url: str, sha256: str | None = None, offline: bool = False) -> Path:
    """Bring a file into the cache, unless it is there, and return its path, which ends as the URL does.

    The file's SHA-256 is kept beside it (`NAME.sha256`, as `sha256sum -c` reads it) and checked at every use. One that
    is known beforehand may end the URL: `https://.../x.pkl#sha256=HEX`. Processes that ask for one file at the same
    time wait for the first of them.

    Args:
        url: https; plain http only of this machine.
        sha256: Expected digest in hex; None takes that of the URL, or the one of the first download.
        offline: Only look into the cache.

    Raises:
        UserError: where the URL cannot be used, the file is not to be had, or its digest is another one.
        OSError: where the cache cannot be written.
    """
    address, expected = _split(url)
    expected = sha256.lower() if sha256 else expected
    path = _place(address)
    if offline and not path.exists():
        raise UserError(f'{address} is not in the download cache ({path}), and --offline forbids to fetch it')
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
    for attempt in range(1, ATTEMPTS + 1):
        try:
            _receive(address, part)
            break
        except requests.HTTPError as error:
            if error.response.status_code < 500 or attempt == ATTEMPTS:
                reason = f'{error.response.status_code} {error.response.reason}'
                raise UserError(f'{address} cannot be downloaded: {reason}') from None
        except (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError) as error:
            if attempt == ATTEMPTS:
                kept = f'; {part.stat().st_size} bytes are kept, run again to continue' if part.exists() else ''
                raise UserError(f'{address} cannot be downloaded: {_reason(error)}{kept}') from None
        except (requests.RequestException, ValueError) as error:  # the latter of hosts that cannot be
            raise UserError(f'{address} cannot be downloaded: {_reason(error)}') from None
        time.sleep(PAUSE * 2 ** (attempt - 1))
    digest = file_sha256(part)
    if expected and digest != expected:
        part.unlink()
        _validator_file(part).unlink(missing_ok=True)
        raise UserError(f'{address} has the SHA-256 {digest}, expected {expected}; it was thrown away')
    _digest_file(path).write_text(f'{digest}  {path.name}\n', encoding='utf-8')
    part.replace(path)
    _validator_file(part).unlink(missing_ok=True)


def _receive(address: str, part: Path) -> None:
    """One attempt: append what is missing of the file to `part`, or begin anew where the server's file has changed.

    Raises:
        requests.RequestException: for whatever goes wrong on the way.
    """
    import requests

    have = part.stat().st_size if part.exists() else 0
    headers = {'Accept-Encoding': 'identity'}
    if have:
        headers['Range'] = f'bytes={have}-'
        with contextlib.suppress(OSError):  # the server sends the rest only of the same version
            headers['If-Range'] = _validator_file(part).read_text(encoding='utf-8')
    with requests.get(address, headers=headers, stream=True, timeout=TIMEOUTS) as response:
        if urllib.parse.urlsplit(response.url).hostname not in LOCAL_HOSTS and not response.url.startswith('https'):
            raise requests.exceptions.InvalidURL('it leads to an address that is not encrypted')
        if response.status_code == 416:  # the part is no beginning of the file
            part.unlink()
            raise requests.ConnectionError('the part that was there did not fit the file')
        response.raise_for_status()
        resumed = response.status_code == 206 and response.headers.get('Content-Range', '').startswith(f'bytes {have}-')
        if response.status_code == 206 and not resumed:
            part.unlink()
            raise requests.ConnectionError('the server sent another part than it was asked for')
        if not resumed:
            have = 0
            validator = response.headers.get('ETag') or response.headers.get('Last-Modified') or ''
            if validator and not validator.startswith('W/'):
                _validator_file(part).write_text(validator, encoding='utf-8')
            else:
                _validator_file(part).unlink(missing_ok=True)
        length = response.headers.get('Content-Length')
        total = have + int(length) if length and length.isdigit() else None
        with (
            open(part, 'ab' if resumed else 'wb') as file,
            tqdm(desc=part.name[1:-5], total=total, initial=have, unit='B', unit_scale=True, disable=None) as bar,
        ):
            for chunk in response.iter_content(CHUNK):
                file.write(chunk)
                bar.update(len(chunk))
            file.flush()
            os.fsync(file.fileno())
    if total is not None and part.stat().st_size < total:
        raise requests.ConnectionError(f'the connection ended after {part.stat().st_size} of {total} bytes')


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


def _validator_file(part: Path) -> Path:
    """Holds the server's name for the version of the file that `part` is the beginning of."""
    return part.with_name(f'{part.name}-version')


def _reason(error: Exception) -> str:
    """The heart of what a library says: the end of a chain of causes."""
    reason = ' '.join(str(error).split()).rpartition(': ')[2].strip('\'")')
    return (reason + ')' * (reason.count('(') - reason.count(')')))[:200] or type(error).__name__
