"""Files that are whole or absent: private staging -> fsync -> rename or link, never an overwrite of something
published.

write_atomic(path, data)          a small file, replaced as a whole
publish_file(staged, final)       a finished file gets its final name; an existing one stays
publish_directory(staged, final)  likewise for a directory
storage_of(path)                  how an input is read: every input byte comes through it
replace_directory(staged, final)  a directory that may have the name is swapped as a whole
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import json
import os
import re
import shutil
import stat
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from io import RawIOBase
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import xxhash

from moai.core.errors import SourceError, StorageError
from moai.core.failpoints import failpoint

if TYPE_CHECKING:
    import pyarrow as pa

_RACY_NS = 2_000_000_000
_BLOCK_BYTES = 4 << 20
_HERE, _EXCHANGE = -100, 2
"""AT_FDCWD and RENAME_EXCHANGE of Linux's renameat2(2)."""
_ADVICE = {
    errno.ENOSPC: "the disk is full: free space there or name another --cache_dir; finished shards are kept and the "
    "next run goes on from them",
    errno.EDQUOT: "the quota is used up: free space there or name another --cache_dir; finished shards are kept and "
    "the next run goes on from them",
    errno.EFBIG: "the file-size limit is reached (ulimit -f): raise it; finished shards are kept and the next run goes "
    "on from them",
    errno.EROFS: "it is read-only: name a writable --cache_dir",
    errno.EACCES: "no permission, it may be another user's: name a --cache_dir of your own or change its owner",
    errno.EPERM: "no permission, it may be another user's: name a --cache_dir of your own or change its owner",
    errno.EISDIR: "a directory stands where a file is needed: move it away",
    errno.ELOOP: "a symbolic link leads to itself: remove it",
    errno.ENAMETOOLONG: "the path is longer than this file system takes: name another --cache_dir",
    errno.EMFILE: "this process may open no more files: raise ulimit -n, or ask for less: --num_proc 0",
    errno.ENFILE: "this machine may open no more files: ask for less: --num_proc 0",
    errno.ENOMEM: "too little memory: ask for less: --num_proc 0, a smaller --shard_bytes",
    errno.ENOTDIR: "a file stands where a directory is needed: name another --cache_dir",
    errno.EEXIST: "a file stands where a directory is needed: name another --cache_dir",
}


@dataclass(frozen=True)
class Stamp:
    """What the file system says of a file without reading it. Of an object the store tells no inode but an ETag
    (moai.core.stores).
    """

    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int

    def is_racy(self) -> bool:
        """Younger than 2 s: a further write may not change it (git's racy rule), so it proves nothing."""
        return time.time_ns() - max(self.mtime_ns, self.ctime_ns) < _RACY_NS

    def is_unwritten(self, now: Stamp) -> bool:
        """Nothing was written since: a further link, chmod or a snapshot changes no more than the ctime."""
        return (self.size, self.mtime_ns, self.inode) == (now.size, now.mtime_ns, now.inode)

    def as_list(self) -> list[int]:
        return list(asdict(self).values())


def stamp(path: Path) -> Stamp:
    status = path.stat()
    return Stamp(status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)


class Storage(Protocol):
    """Where inputs lie. All that is read of an input is read through these."""

    def stamp(self, path: str) -> Stamp: ...
    def open(
        self, path: str
    ) -> RawIOBase: ...  # unbuffered, for `seek` and `read`; a read may give less than was asked for
    def random_access(
        self, path: str, *, mapped: bool
    ) -> pa.NativeFile: ...  # for Arrow's own readers; mapped where slices are to cost no copy


class LocalFiles:
    """Files that the operating system opens."""

    def stamp(self, path: str) -> Stamp:
        return stamp(Path(path))

    def open(self, path: str) -> RawIOBase:
        return open(path, "rb", buffering=0)

    def random_access(self, path: str, *, mapped: bool) -> pa.NativeFile:
        import pyarrow as pa

        return pa.memory_map(path) if mapped else pa.OSFile(path)


_LOCAL = LocalFiles()


def storage_of(path: str) -> Storage:
    """What reads the input of this name: a URL is an object's."""
    if "://" in path:
        from moai.core.stores import Objects, is_url

        if is_url(path):
            return Objects()
    return _LOCAL


def read_range(path: str, start: int, end: int | None, block_bytes: int) -> Iterator[bytes]:
    """The bytes [start, end) of an input, or from `start` to its end, in blocks of at most `block_bytes`."""
    with storage_of(path).open(path) as file:
        file.seek(start)
        while (end is None or start < end) and (
            block := file.read(block_bytes if end is None else min(block_bytes, end - start))
        ):
            start += len(block)
            yield block


def canonical_json(value: Any) -> bytes:
    """One spelling for one value: sorted keys, no spaces, UTF-8."""
    # A path that is not UTF-8 holds lone surrogates; they have a spelling too, and `json` reads it back.
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode(
        "utf-8", "surrogatepass"
    )


def digest_json(value: Any) -> str:
    """sha256 of the canonical JSON, in hex: the identity of a value."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def sealed(value: Mapping[str, Any]) -> bytes:
    """A JSON object with its own digest: what it says is believed, so no bit of it may change unseen."""
    return canonical_json({**value, "self_digest": digest_json(value)})


def unsealed(data: bytes) -> dict[str, Any]:
    """What was sealed. Raises ValueError, LookupError, TypeError, AttributeError or RecursionError where it was not, or
    has changed since.
    """
    value: dict[str, Any] = json.loads(data)
    if value.pop("self_digest") != digest_json(value):
        raise ValueError("its own digest is another")
    return value


def digest_file(path: Path) -> str:
    """xxh3_128 of the bytes, in hex: for integrity."""
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


@contextlib.contextmanager
def storage_errors(place: Path, flag: str = "--cache_dir") -> Iterator[None]:
    """Turn what a full, read-only or forbidden place raises into one line with the way out. `flag` names the place."""
    try:
        yield
    except OSError as error:
        if isinstance(error, StorageError) or error.errno not in _ADVICE:
            raise
        advice = _ADVICE[error.errno].replace("--cache_dir", flag)
        if error.errno == errno.ENOSPC and _has_no_inodes(place):
            advice = advice.replace("the disk is full: free space", "no inodes are left: remove files")
        raise StorageError(f"{error.filename or place}: {os.strerror(error.errno)}; {advice}") from error


@contextlib.contextmanager
def input_errors(path: str | Path) -> Iterator[None]:
    """Turn what an input that vanished, is forbidden or does not read raises into one line."""
    try:
        yield
    except OSError as error:
        if isinstance(error, StorageError):
            raise
        raise SourceError(
            f"{path}: not readable ({error.strerror or error}); check that it is there and may be read"
        ) from error


def write_atomic(path: Path, data: bytes, *, durable: bool = True) -> None:
    """Write `path` as a whole: readers see the old content or the new one, after a crash too when `durable`."""
    staged = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(staged, "xb") as file:
            file.write(data)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(staged, path)
    except BaseException:
        staged.unlink(missing_ok=True)
        raise


def regular_size(path: Path) -> int | None:
    """Bytes of a regular file; None where there is none, or something else."""
    try:
        found = os.lstat(path)
    except OSError:
        return None
    return found.st_size if stat.S_ISREG(found.st_mode) else None


def make_way(path: Path) -> None:
    """For a file of a cache that will be renamed to this name. What a rename does not replace is set aside: a
    directory.
    """
    with contextlib.suppress(FileNotFoundError):
        if stat.S_ISDIR(os.lstat(path).st_mode):
            os.rename(path, path.with_name(f"{path.name}.corrupt-{uuid.uuid4().hex[:8]}"))


def publish_file(staged: Path, final: Path) -> None:
    """Give a finished, fsynced file its final name. One that is already there has the same content by its name and
    stays, unless it was damaged since.
    """
    failpoint("file.publish", staged)
    make_way(final)
    try:
        os.link(staged, final)
    except FileExistsError:
        if regular_size(final) is None or digest_file(final) != digest_file(staged):
            os.replace(staged, final)
            return
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK, errno.ENOSYS, errno.EXDEV):
            raise
        os.replace(staged, final)  # a file system without hard links: the bytes under this name are the same ones
        return
    failpoint("file.published", final)
    staged.unlink()


def link_or_copy(source: Path, target: Path) -> None:
    """`target` as a second name of `source`, or a fsynced copy where links fail."""
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK, errno.ENOSYS, errno.EXDEV):
            raise
        shutil.copyfile(source, target)
        sync(target)


def publish_directory(staged: Path, final: Path) -> bool:
    """Rename without replacement. False when another run was first: its directory stays and ours is removed."""
    sync(staged)
    failpoint("directory.publish")
    try:
        os.rename(staged, final)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        shutil.rmtree(staged)
        return False
    failpoint("directory.published")
    sync(final.parent)
    return True


def replace_directory(staged: Path, final: Path, *, named: str) -> None:
    """Give `staged` its name; what had it before is removed afterwards. `named` begins the names of its failpoints.

    The two exchange their names in one step of the kernel. Some file systems cannot do that (NFS); there the old one is
    renamed first, and a kill at that moment leaves it as `.<name>.before`.
    """
    aside = final.with_name(f".{final.name}.before")
    for path in (*staged.rglob("*"), staged):
        sync(path)
    failpoint(f"{named}.rename", staged)
    if not os.path.lexists(final):
        staged.rename(final)
    elif not _exchange(staged, final):
        remove_directory(aside)
        final.rename(aside)
        failpoint(f"{named}.aside", staged)
        staged.rename(final)
    sync(final.parent)
    failpoint(f"{named}.placed", final)
    for old in (staged, aside):
        remove_directory(old)


def remove_directory(path: Path) -> None:
    """With all that is in it; of a link, the link. One that is not there is fine."""
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Each gets the other's name. False where system or file system cannot."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:
        return False
    if rename(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
        return False
    raise OSError(number, os.strerror(number), str(other))


def sync(path: Path) -> None:
    """fsync a file or a directory; a file system that cannot sync a directory is left to its own promises."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        if not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def is_plain_name(name: str) -> bool:
    """A file name that cannot leave its directory."""
    return bool(re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,199}", name))


def _has_no_inodes(place: Path) -> bool:
    """Some file systems count none, and never run out of them."""
    with contextlib.suppress(OSError):
        status = os.statvfs(nearest_existing(place))
        return status.f_files > 0 and status.f_favail == 0
    return False


def nearest_existing(path: Path) -> Path:
    """`path` or the first of its parents that exists."""
    return next(candidate for candidate in (path, *path.absolute().parents) if candidate.exists())


def free_bytes(path: Path) -> int:
    """Bytes this user may still write where `path` lies or will lie."""
    status = os.statvfs(nearest_existing(path))
    return status.f_bavail * status.f_frsize
