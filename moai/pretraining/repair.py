"""Make the damaged and missing files of a prepared directory again, to the same bytes, and nothing else.

    python -m moai repair DIR [--dataset ...] [--tokenizer_path ...]

A shard is a range of the input under the directory's own flags and tokenizer. So the input is looked up as `prepare`
did, the range is found by its recorded digest, and that range alone is worked on, by the reference tokenizer. A file
that was made again replaces the damaged one, by one rename, only if its hash is the recorded one. Whatever is killed on
the way, and whatever has changed since: nothing that is whole is touched, and nothing but the recorded bytes takes the
place of what is not.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import stat
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from moai.cache.ledger import Ledger
from moai.cache.staging import OWNER
from moai.core.distributed import owner
from moai.core.errors import DamagedError, MoaiError
from moai.core.failpoints import failpoint
from moai.core.files import canonical_json, digest_file, link_or_copy, storage_errors, sync, write_atomic
from moai.coref.options import CorefConfig
from moai.coref.verify import METADATA, metadata
from moai.engine.schema import arrow_schema, columns_from_json
from moai.prepared.formats import ENTITY_COREF
from moai.prepared.manifest import HELD_OUT, Prepared, listed_files, read_manifest, write_dataset_files
from moai.pretraining.keys import dataset_key
from moai.pretraining.publish import SOURCES
from moai.pretraining.rebuild import Recipe
from moai.tokenizers.load import FILES


def repair(directory: Path, *, dataset: Sequence[str] = (), tokenizer_path: str = "") -> Iterator[str]:
    """Lines about what was made again. What can be is; then the first thing that could not is raised.

    dataset         where the input is now, if not where `prepare` was told
    tokenizer_path  a copy of the tokenizer, if the directory's own is damaged
    Raises DamagedError on a damaged manifest, SourceError where the input is not what it was, naming the file. An
    entity-coref corpus is not made again in pieces: if it is damaged, DamagedError says how its command makes all of it
    again from what is finished.
    """
    manifest = read_manifest(directory, None)
    directory = directory.resolve()
    if manifest["content"]["recipe"] == ENTITY_COREF:
        yield from _corpus(directory, manifest)
        return
    cache = (
        directory.parent.parent
        if directory.parent.name == "datasets" and (directory.parent.parent / "shards").is_dir()
        else None
    )
    sides = [(directory, manifest), *([(directory / HELD_OUT, manifest[HELD_OUT])] if HELD_OUT in manifest else [])]
    if all(_holds(place / entry["file"], entry) for place, side in sides for entry in listed_files(side["content"])):
        yield f"nothing to repair: every file of {directory} has its recorded hash"
        return
    with storage_errors(directory), _staging(directory, cache) as staging:
        failed: MoaiError | None = None
        if HELD_OUT in manifest:  # first: at the end of the other both are looked at
            for folder in (directory / HELD_OUT, staging / HELD_OUT):
                folder.mkdir(exist_ok=True)
            try:
                yield from _Repair(
                    directory / HELD_OUT, manifest[HELD_OUT], staging / HELD_OUT, cache, dataset, tokenizer_path
                ).run()
            except MoaiError as error:
                failed = error
        yield from _Repair(directory, manifest, staging, cache, dataset, tokenizer_path).run()
        if failed:
            raise failed


@dataclass(frozen=True)
class _Repair:
    directory: Path
    manifest: Mapping[str, Any]
    staging: Path
    cache: Path | None
    """Whose finished shards are looked at: the one that the directory lies in."""
    dataset: Sequence[str]
    tokenizer_path: str

    def run(self) -> Iterator[str]:
        content = self.manifest["content"]
        shards = [shard for shard in content["shards"] if not all(self._is_whole(part) for part in _parts(shard))]
        files = [file for file in content["files"] if not self._is_whole(file)]
        if not shards and not files:
            yield f"nothing to repair: every file of {self.directory} has its recorded hash"
            return
        listings = [entry for entry in files if entry["file"] in ("quarantine.jsonl", SOURCES)]
        for entry in (entry for entry in files if entry not in listings):
            self._put(entry, self._small_file(entry["file"]))
            yield f"repaired     {entry['file']}"
        for shard in list(shards):
            if self._finished(shard):
                yield (
                    f"repaired     {self._put_shard(shard, self.cache)}, linked from the finished shard "
                    f"{shard['shard_key']}"
                )
                shards.remove(shard)
        yield from self._rebuild(shards, listings)
        Prepared.open(self.directory)
        yield from self._also_damaged()
        yield f"whole        {self.directory}"

    def _rebuild(self, shards: Sequence[Mapping[str, Any]], listings: Sequence[Mapping[str, Any]]) -> Iterator[str]:
        if not shards and not listings:
            return
        recipe = Recipe(self.directory, self.manifest, self.staging / "cache", self.cache, tuple(self.dataset))
        failures: list[MoaiError] = []
        for shard, made in recipe.make(shards):
            if isinstance(made, MoaiError):
                failures.append(made)
                continue
            names = self._put_shard(shard, recipe.own)
            self._heal_finished(shard)
            yield f"repaired     {names}, {shard['rows']:,} rows made again from {shard['source']}"
        if failures:
            raise failures[0]
        for entry in listings:
            made = self.staging / f"listing-{entry['file']}"
            made.write_bytes(recipe.sources() if entry["file"] == SOURCES else recipe.quarantine())
            self._put(entry, made)
            yield f"repaired     {entry['file']}"

    def _is_whole(self, entry: Mapping[str, Any]) -> bool:
        return _holds(self.directory / entry["file"], entry)

    def _put(self, entry: Mapping[str, Any], made: Path) -> None:
        """Replace a file of the directory by one that holds the recorded bytes. Raises DamagedError if `made` does
        not.
        """
        final = self.directory / entry["file"]
        if final.is_dir() and not final.is_symlink():
            raise DamagedError(f"{final}: a directory, not a regular file; remove it and repair again")
        staged = self.staging / uuid.uuid4().hex
        link_or_copy(made, staged)
        failpoint("repair.check", staged)
        if not _holds(staged, entry):
            raise DamagedError(
                f"{final}: made again it has the hash {digest_file(staged)}, the manifest says {entry['xxh3_128']}; "
                f"left as it is, {self._made_by()}"
            )
        sync(staged)
        failpoint("repair.replace", staged)
        os.replace(staged, final)
        sync(self.directory)

    def _put_shard(self, shard: Mapping[str, Any], cache: Path | None) -> str:
        """Replace what is damaged of a shard by the finished one of `cache`. Returns the names of the files."""
        damaged = [
            (part, path) for part, path in zip(_parts(shard), _finished_files(shard, cache)) if not self._is_whole(part)
        ]
        for part, path in damaged:
            self._put(part, path)
        return ", ".join(part["file"] for part, _ in damaged)

    def _made_by(self) -> str:
        content = self.manifest["content"]
        versions = (
            f"tokenizers {content['tokenizer'].get('tokenizers')} and "
            f"{', '.join(map(str, self.manifest['run'].get('tokenizer_backends', [])))}"
        )
        return f"it was made with {versions}: remove {self.directory} and prepare again"

    def _small_file(self, name: str) -> Path:
        """state.json and dataset_info.json follow from the manifest; the tokenizer's files must be given."""
        content = self.manifest["content"]
        if name in FILES:
            return self._tokenizer(name)
        place = self.staging / "small"
        if not place.exists():
            place.mkdir()
            names = [shard["file"] for shard in content["shards"] if shard["file"]]
            schema = arrow_schema(columns_from_json(content["columns"]))
            write_dataset_files(place, names, schema, dataset_key(shard["shard_key"] for shard in content["shards"]))
        if not (place / name).exists():
            raise DamagedError(
                f"{self.directory / name}: damaged, and nothing tells how to make it again; remove {self.directory} "
                f"and prepare again"
            )
        return place / name

    def _tokenizer(self, name: str) -> Path:
        given = Path(self.tokenizer_path).expanduser()
        given = given / name if given.is_dir() else given if name == FILES[0] else given.with_name(name)
        if not self.tokenizer_path or not given.is_file():
            raise DamagedError(
                f"{self.directory / name}: damaged; name the tokenizer that made the ids with --tokenizer_path DIR"
            )
        return given

    def _finished(self, shard: Mapping[str, Any]) -> bool:
        """Whether the cache holds the finished shard, whole."""
        return bool(self.cache) and all(
            _holds(path, part) for part, path in zip(_parts(shard), _finished_files(shard, self.cache))
        )

    def _heal_finished(self, shard: Mapping[str, Any]) -> None:
        """The finished shard was the same file as the damaged one, where links work."""
        for part, path in zip(_parts(shard), _finished_files(shard, self.cache)) if self.cache else ():
            if path.is_file() and not _holds(path, part):
                staged = self.staging / uuid.uuid4().hex
                link_or_copy(self.directory / part["file"], staged)
                failpoint("repair.relink", staged)
                os.replace(staged, path)

    def _also_damaged(self) -> Iterator[str]:
        """Other directories may hold the file that was damaged, under a link of their own."""
        for other in sorted(self.cache.glob("datasets/*")) if self.cache else []:
            with contextlib.suppress(DamagedError):
                if other != self.directory:
                    shards = {
                        shard["shard_key"]: shard
                        for shard in read_manifest(other)["content"]["shards"]
                        if shard["file"]
                    }
                    ours = [
                        shard["shard_key"]
                        for shard in self.manifest["content"]["shards"]
                        if shard["shard_key"] in shards
                    ]
                    if any(not _holds(other / part["file"], part) for key in ours for part in _parts(shards[key])):
                        yield f"damaged too  {other}: shares shards with this one; repair it as well"


def _parts(shard: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The files of a shard: its rows, if it has any, and what became of its documents."""
    return [*([shard] if shard["file"] else []), shard["documents_file"]]


def _finished_files(shard: Mapping[str, Any], cache: Path | None) -> list[Path]:
    assert cache
    ledger = Ledger(cache)
    return [*([ledger.shard(shard["shard_key"])] if shard["file"] else []), ledger.documents(shard["shard_key"])]


def _corpus(directory: Path, manifest: Mapping[str, Any]) -> Iterator[str]:
    """Samples depend on a choice over the whole corpus, so that its own command is the only way to them; it reuses the
    finished shards that are whole.
    """
    content, run = manifest["content"], manifest["run"]
    wrong = [entry["file"] for entry in listed_files(content) if not _holds(directory / entry["file"], entry)]
    wrong += [] if metadata(Prepared(directory, manifest)).ok else [METADATA]
    if not wrong:
        yield f"nothing to repair: every file of {directory} has its recorded hash"
        return
    read = [name for name in sorted(run["plan"]["files"]) if name.startswith("/")]
    words = [
        "python",
        "-m",
        "moai",
        "entity-coref",
        "--output-dir",
        str(directory.parent),
        *_flags_of(content["config"]),
    ]
    raise DamagedError(
        f"{directory}: damaged or missing: {', '.join(wrong[:5])}{', ...' if len(wrong) > 5 else ''}; a corpus is not "
        f"made again in pieces"
        f"{f' (it was made from {read[0]}' + (', ...)' if read[1:] else ')') if read else ''}: move it away, then run "
        f"its command with the --input or --sources, --model "
        f"and --cache-dir of then, finished work is reused: {shlex.join(words)}"
    )


def _flags_of(config: Mapping[str, Any]) -> Iterator[str]:
    """The options that a corpus depends on, where they are not at their defaults."""
    for option in (option for option in fields(CorefConfig) if option.name in config):
        value, usual = config[option.name], option.default
        if value != (list(usual) if isinstance(usual, tuple) else usual):
            words = value if isinstance(value, list) else [str(value).lower() if isinstance(value, bool) else value]
            yield from (f"--{option.name.replace('_', '-')}", *map(str, words))


def _holds(path: Path, entry: Mapping[str, Any]) -> bool:
    """Whether a regular file of the recorded size and hash is there."""
    try:
        found = os.lstat(path)
        return (
            stat.S_ISREG(found.st_mode) and found.st_size == entry["bytes"] and digest_file(path) == entry["xxh3_128"]
        )
    except OSError:
        return False


@contextlib.contextmanager
def _staging(directory: Path, cache: Path | None) -> Iterator[Path]:
    """A private place on the same file system; in a cache an attempt like that of a preparation, which tells `gc` to
    leave the shards alone.
    """
    place = (
        cache / "attempts" / f"repair-{uuid.uuid4().hex}"
        if cache
        else directory.with_name(f".{directory.name}.repair-{uuid.uuid4().hex}")
    )
    place.mkdir(parents=True)
    try:
        write_atomic(place / OWNER, canonical_json(owner()), durable=False)
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)
