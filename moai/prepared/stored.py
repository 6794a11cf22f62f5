"""Prepared directories in a store: published under the digest of their content, fetched into a cache.

    publish([prepared, held_out], "s3://bucket/ready")     # s3://bucket/ready/<content digest>/
    fetch("s3://bucket/ready/<content digest>", cache)     # <cache>/fetched/<content digest>

The manifest goes last, by a put that creates or fails: a directory without one is not there, and nothing that is there
is replaced.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from moai.cache.staging import locked
from moai.core.distributed import Report
from moai.core.errors import ConfigError, DamagedError
from moai.core.files import digest_file, input_errors, publish_directory, storage_errors, sync
from moai.core.stores import create, download, put, read, size_of
from moai.prepared.manifest import HELD_OUT, MANIFEST, Prepared, listed_files, manifest_bytes, read_manifest

logger = logging.getLogger(__name__)

FETCHED = "fetched"
_AT_ONCE = 8
_DIGEST = re.compile("[0-9a-f]{64}")


def url_of(prepared: Prepared, to: str) -> str:
    return f"{to.rstrip('/')}/{prepared.content_digest}/"


def publish(sides: Sequence[Prepared], to: str) -> str:
    """Upload a directory, and what is held out of it. Returns its URL; equal content that is there already is fine.
    Raises ConfigError for other content, SourceError where the store refuses.
    """
    prepared, *others = sides
    held_out = others[0] if others else None
    url = url_of(prepared, to)
    if _is_there(url, sides):
        logger.info("The same content is there already: %s", url)
        return url
    names = [(prepared.path, name, size) for name, size in _files(prepared)]
    if held_out:
        names += [
            (held_out.path.parent / held_out.path.name, f"{HELD_OUT}/{name}", size) for name, size in _files(held_out)
        ]
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        list(pool.map(lambda one: _upload(one[0] / one[1].removeprefix(f"{HELD_OUT}/"), url + one[1], one[2]), names))
    other = {name: held_out.manifest[name] for name in ("content", "content_digest", "run")} if held_out else None
    manifest = manifest_bytes(prepared.manifest["content"], prepared.manifest["run"], other)
    with input_errors(url):
        if not create(url + MANIFEST, manifest) and not _is_there(url, sides):
            raise ConfigError(f"--publish {to}: {url} was published by another meanwhile, with other content")
    logger.info("Published %d files, %s bytes: %s", len(names) + 1, f"{sum(size for *_, size in names):,}", url)
    return url


def fetch(url: str, cache: Path, report: Report = lambda _: None) -> Path:
    """The directory in the cache, every file checked by its hash; what is there already is not fetched again. Raises
    SourceError, DamagedError.
    """
    url = f"{url.rstrip('/')}/"
    with input_errors(url):
        manifest = read(url + MANIFEST)
    try:
        digest = str(json.loads(manifest)["content_digest"])
    except (ValueError, LookupError, TypeError) as error:
        raise DamagedError(f"{url}{MANIFEST}: not readable as a manifest") from error
    named = url.rstrip("/").rpartition("/")[2]
    if not _DIGEST.fullmatch(digest) or (_DIGEST.fullmatch(named) and named != digest):
        raise DamagedError(f"{url}: its manifest is that of {digest[:64]}, so it was exchanged or copied")
    final = cache / FETCHED / digest
    with storage_errors(cache):
        (cache / "locks").mkdir(parents=True, exist_ok=True)
        with locked(cache, digest, report):
            if (final / MANIFEST).exists():
                return final
            staged = final.with_name(f".{digest}.fetching")
            staged.mkdir(parents=True, exist_ok=True)
            (staged / MANIFEST).write_bytes(manifest)
            _fill(url, staged, report)
            publish_directory(staged, final)
    return final


def _fill(url: str, staged: Path, report: Report) -> None:
    """The files that the manifest lists, beside it. What an earlier fetch left whole is kept."""
    content = read_manifest(staged)
    wanted = [("", entry) for entry in listed_files(content["content"])]
    if HELD_OUT in content:
        (staged / HELD_OUT).mkdir(exist_ok=True)
        wanted += [(f"{HELD_OUT}/", entry) for entry in listed_files(content[HELD_OUT]["content"])]

    def one(folder: str, entry: dict[str, object]) -> None:
        name = f"{folder}{entry['file']}"
        path = staged / name
        if path.exists() and path.stat().st_size == entry["bytes"] and digest_file(path) == entry["xxh3_128"]:
            return
        with input_errors(url + name):
            download(url + name, path)
        if digest_file(path) != entry["xxh3_128"]:
            raise DamagedError(f"{url}{name}: has another hash than the manifest says; publish it again")
        sync(path)

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for number, _ in enumerate(pool.map(lambda given: one(given[0], dict(given[1])), wanted), 1):
            report({"line": f"fetching {url}: {number} of {len(wanted)} files"})


def _files(side: Prepared) -> Iterator[tuple[str, int]]:
    for entry in listed_files(side.manifest["content"]):
        yield entry["file"], entry["bytes"]


def _upload(path: Path, url: str, size: int) -> None:
    """Unless it is there: below a digest only that content is ever written, and a put is whole or absent."""
    with input_errors(url):
        if size_of(url) != size:
            put(url, path)


def _is_there(url: str, sides: Sequence[Prepared]) -> bool:
    """Whether this content has been published. Raises ConfigError where other content has its place."""
    with input_errors(url):
        if size_of(url + MANIFEST) is None:
            return False
        data = read(url + MANIFEST)
    try:
        there = json.loads(data)
        found = [there["content_digest"], *([there[HELD_OUT]["content_digest"]] if HELD_OUT in there else [])]
    except (ValueError, LookupError, TypeError):
        found = []
    if found != [side.content_digest for side in sides]:
        raise ConfigError(f"--publish: {url} holds other content, or another held-out side; name another prefix")
    return True
