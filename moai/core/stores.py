"""Objects of a store as inputs: s3:// gs:// az:// and http(s)://, read by ranges with retries, through obstore
(`pip install 'moai[store]'`).

    objects = Objects()                       # a Storage of moai.core.files, which hands URLs to it
    for one in listed("s3://bucket/prefix"): ...

Credentials, regions and endpoints are obstore's: the provider's environment variables (AWS_*, GOOGLE_*, AZURE_*), the
machine's role. None of what a store answers is repeated in an error, since that may hold them.
"""

from __future__ import annotations

import errno
import io
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import unquote, urlsplit

import xxhash

from moai.core.errors import ConfigError
from moai.core.files import Stamp

if TYPE_CHECKING:
    import pyarrow as pa
    from obstore import GetOptions

T = TypeVar("T")

SCHEMES = ("s3", "s3a", "gs", "az", "abfs", "abfss", "http", "https")
_URL = re.compile(rf"({'|'.join(SCHEMES)})://")
_LEAST_BYTES, _BLOCK_BYTES = 1 << 20, 8 << 20
"""Small reads ask for so much, and what follows is at hand."""
_TRIES, _PAUSE_SECONDS = 6, 0.2
"""Of a read that breaks off, each after twice the pause; the store's own errors obstore tries again by itself."""
_FIRST = {"max_retries": 2, "retry_timeout": timedelta(seconds=3)}
"""At the first contact nobody should wait long to hear what is wrong."""
_LATER = {"max_retries": 10, "retry_timeout": timedelta(minutes=3)}


@dataclass(frozen=True)
class Found:
    url: str
    stamp: Stamp


def is_url(path: str) -> bool:
    return bool(_URL.match(path))


class Objects:
    """A Storage (moai.core.files) of objects."""

    def stamp(self, path: str) -> Stamp:
        return _stamp(_head(path))

    def open(self, path: str) -> io.RawIOBase:
        return _Object(path, _head(path))

    def random_access(self, path: str, *, mapped: bool) -> pa.NativeFile:
        import pyarrow as pa

        return pa.PythonFile(self.open(path), mode="r")


def listed(prefix: str) -> Iterator[Found]:
    """Objects below a prefix, which ends at a slash. Raises OSError."""
    import obstore

    base, key = parts_of(prefix)
    for chunk in _ask(prefix, lambda: list(obstore.list(_store(base, first=True), key or None))):
        for meta in chunk:
            yield Found(f"{base}/{meta['path']}", _stamp(meta))


@dataclass
class _Object(io.RawIOBase):
    """Read by ranges of one version: a range of another is refused."""

    url: str
    meta: Any
    _at: int = 0
    _held: bytes = b""
    _held_from: int = 0
    size: int = field(init=False)

    def __post_init__(self) -> None:
        self.size = self.meta["size"]

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self.size}[whence]
        return self._at

    def read(self, number: int = -1) -> bytes:
        end = self.size if number < 0 else min(self.size, self._at + number)
        if end <= self._at:
            return b""
        held = self._at - self._held_from
        if not (held >= 0 and end <= self._held_from + len(self._held)):
            self._held, self._held_from, held = self._range(max(end, self._at + _LEAST_BYTES)), self._at, 0
        data = self._held[held : held + end - self._at]
        self._at += len(data)
        return data

    def readall(self) -> bytes:
        return self.read()

    def readinto(self, buffer: Any) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def _range(self, end: int) -> bytes:
        import obstore

        base, key = parts_of(self.url)
        wanted = (self._at, min(end, self.size))
        options: GetOptions = {"range": wanted, **({"if_match": tag} if (tag := self.meta["e_tag"]) else {})}
        data = _ask(self.url, lambda: bytes(obstore.get(_store(base), key, options=options).bytes()), tries=_TRIES)
        if len(data) != wanted[1] - wanted[0]:
            raise OSError(errno.EIO, "the store gave another range than was asked for", self.url)
        return data


def _head(url: str) -> Any:
    import obstore

    base, key = parts_of(url)
    return _ask(url, lambda: obstore.head(_store(base, first=True), key), tries=2)


def _stamp(meta: Any) -> Stamp:
    """Size, and in place of times and inode what tells contents apart: ETag and version, else the time."""
    tag, version = meta["e_tag"], meta["version"]
    written = 0 if tag else int(meta["last_modified"].timestamp() * 1e9)
    return Stamp(meta["size"], written, _number(version), _number(tag))


def _number(text: str | None) -> int:
    return xxhash.xxh3_64_intdigest(text.encode()) >> 1 if text else 0


def parts_of(url: str) -> tuple[str, str]:
    """(store, key). Raises ConfigError for what would put a secret into names and logs."""
    split = urlsplit(url)
    web = split.scheme.startswith("http")
    if "@" in split.netloc and (web or ":" in split.netloc.rpartition("@")[0]):
        raise ConfigError(f"{split.scheme}://...@{split.hostname}: credentials do not belong into a name")
    if web and split.query:
        raise ConfigError(f"{url.split('?')[0]}?...: a URL with a query may be a signed one; download it, or name it")
    key = url[len(split.scheme) + 3 + len(split.netloc) :].strip("/")
    return f"{split.scheme}://{split.netloc}", unquote(key) if web else key


@cache
def _store(base: str, *, first: bool = False) -> Any:
    if find_spec("obstore") is None:
        raise ConfigError(f"{base}: obstore is not installed; pip install 'moai[store]'")
    from obstore.store import HTTPStore, from_url

    how: dict[str, Any] = {
        "client_options": {"allow_http": True, "connect_timeout": "3s", "timeout": "4s" if first else "120s"},
        "retry_config": _FIRST if first else _LATER,
    }
    return HTTPStore.from_url(base, **how) if base.startswith("http") else from_url(base, **how)


def _ask(url: str, question: Callable[[], T], tries: int = 1) -> T:
    """Its answer. Raises OSError with what is wrong, in our own words."""
    from obstore import exceptions as of_store

    for left in reversed(range(tries)):
        try:
            return question()
        except (of_store.NotFoundError, FileNotFoundError):
            raise OSError(errno.ENOENT, "there is no such object or bucket", url) from None
        except (of_store.PermissionDeniedError, of_store.UnauthenticatedError):
            raise OSError(
                errno.EACCES, "the store denies access: check its credentials and what they may read", url
            ) from None
        except of_store.AlreadyExistsError:
            raise
        except of_store.PreconditionError:
            raise OSError(errno.ESTALE, "changed while it was read", url) from None
        except of_store.BaseError as error:
            said, known = _said(str(error))
            if said.endswith("404"):
                raise OSError(errno.ENOENT, "there is no such object or bucket", url) from None
            if known or not left:
                raise OSError(errno.EIO, said, url) from None
        time.sleep(_PAUSE_SECONDS * 2 ** (tries - 1 - left))
    raise AssertionError


def _said(text: str) -> tuple[str, bool]:
    """What is wrong, and whether another try would help nobody."""
    if "169.254." in text or "redential" in text or "metadata" in text:
        return "no credentials were found: set the provider's variables (AWS_ACCESS_KEY_ID, ...)", True
    if "redirect" in text:
        return "the bucket is elsewhere: set its region (AWS_REGION)", True
    status = re.search(r"status(?: code)?:? ([45]\d\d)", text)
    return f"the store answers {status[1]}" if status else "the store does not answer", False


def size_of(url: str) -> int | None:
    """None where there is no such object."""
    try:
        return int(_head(url)["size"])
    except FileNotFoundError:
        return None


def read(url: str) -> bytes:
    """A small object, whole."""
    with Objects().open(url) as file:
        return bytes(file.readall())


def download(url: str, path: Path) -> None:
    """An object into a file, by blocks."""
    with Objects().open(url) as source, open(path, "wb") as out:
        while block := source.read(_BLOCK_BYTES):
            out.write(block)


def put(url: str, path: Path) -> None:
    """A file, whole or not at all."""
    import obstore

    base, key = parts_of(url)
    _ask(url, lambda: obstore.put(_store(base), key, path), tries=_TRIES)


def create(url: str, data: bytes) -> bool:
    """Put an object where there is none. False where there is one."""
    import obstore
    from obstore.exceptions import AlreadyExistsError

    base, key = parts_of(url)
    try:
        _ask(url, lambda: obstore.put(_store(base), key, data, mode="create"))
    except AlreadyExistsError:
        return False
    return True
