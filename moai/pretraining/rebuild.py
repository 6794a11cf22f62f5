"""Shards of a prepared directory made again from its manifest: flags, tokenizer and input as they were, in a cache of
its own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow as pa

from moai.cache.ledger import Ledger
from moai.core.errors import ConfigError, DamagedError, MoaiError, SourceError
from moai.core.files import canonical_json, link_or_copy, storage_of
from moai.engine.documents import read_documents
from moai.engine.pipeline import Raw, Receipt, Shard, run_shard, shard_key
from moai.engine.run import Done
from moai.prepared.bad_records import bad_records
from moai.prepared.places import Processed, sources_listing
from moai.pretraining.assembly import Request, Stream, pipeline, streams
from moai.pretraining.dataset import DatasetEntry, parse_dataset
from moai.pretraining.keys import plans
from moai.pretraining.options import DataConfig
from moai.pretraining.tokenizer_backend import Chosen
from moai.quality.verdicts import JudgedShard, JudgedSource, Verdict, read_gone, write_verdict
from moai.sources.discover import Input, discover
from moai.sources.placed import OfSource
from moai.tokenizers.backends import Reference
from moai.tokenizers.load import TokenizerSpec, load_file, load_tokenizer
from moai.transforms.named import parse_parts
from moai.transforms.template import ChatTemplate

_BATCH_BYTES = 4 << 20
_FILES_NAMED = 3

Entry = Mapping[str, Any]
"""What a manifest says of a shard."""


@dataclass(frozen=True)
class Recipe:
    """How the shards of `directory` were made. `own` is a place for what is made again; `cache`, if any, holds plans
    and finished shards.
    """

    directory: Path
    manifest: Mapping[str, Any]
    own: Path
    cache: Path | None
    dataset: tuple[str, ...]

    def make(self, shards: Sequence[Entry]) -> Iterator[tuple[Entry, Path | MoaiError]]:
        """Each of these entries with the file that was made for it, whose hash is still to be compared, or why there is
        none.
        """
        for stream in self._streams if shards else []:
            wanted = {position: entry for position, entry in enumerate(self._shards_of(stream)) if entry in shards}
            done: list[Entry] = []
            try:
                for entry, path in self._make(stream, wanted):
                    done.append(entry)
                    yield entry, path
            except MoaiError as error:
                yield from ((entry, error) for entry in wanted.values() if entry not in done)

    def quarantine(self) -> bytes:
        """quarantine.jsonl, which needs a look at every shard: the finished ones' own lists, and those without one are
        made again.
        """
        return b"".join(
            canonical_json(entry) + b"\n" for part in self._processed for entry in bad_records(self.own, part)
        )

    def sources(self) -> bytes:
        """sources.json, which needs the same look."""
        return sources_listing(self._processed)

    @cached_property
    def _processed(self) -> list[Processed[Stream]]:
        parts = []
        for stream in self._streams:
            done = []
            for entry, (_, shard, raw) in zip(self._shards_of(stream), self._ranges(stream, None), strict=True):
                if not self._is_of(entry, raw):
                    raise self._changed(entry, shard)
                done.append(Done(0, shard, self._finished(entry) or self._run(stream, shard, entry, raw)[0], False))
            parts.append(Processed(stream, done))
        return parts

    def _make(self, stream: Stream, wanted: Mapping[int, Entry]) -> Iterator[tuple[Entry, Path]]:
        """From the range at the same place, or else from any with the same content: files may have been added."""
        left = dict(wanted)
        found_at: dict[int, Shard] = {}
        for entry in wanted.values():
            self._check_key(stream, entry)
        for positions in (frozenset(wanted), None):
            for position, shard, raw in self._ranges(stream, positions) if left else ():
                found_at.setdefault(position, shard)
                same = [number for number, entry in left.items() if self._is_of(entry, raw)]
                path = self._run(stream, shard, left[same[0]], raw)[1] if same else Path()
                for number in same:
                    yield left.pop(number), path
                if not left:
                    break
        if left:
            position, entry = next(iter(left.items()))
            raise self._changed(entry, found_at.get(position))

    def _ranges(self, stream: Stream, positions: frozenset[int] | None) -> Iterator[tuple[int, Shard, Raw]]:
        """The shards at these places of the source, or all, each with its digest as it is now."""
        for position, shard in enumerate(stream.source.shards()):
            try:
                if positions is None or position in positions:
                    yield position, shard, shard.raw or stream.source.digest(shard)
            finally:
                for segment in shard.segments:
                    if spool := getattr(segment, "spool", None):
                        Path(spool).unlink(missing_ok=True)

    def _is_of(self, entry: Entry, raw: Raw) -> bool:
        """Whether a shard was made from this range; of a judged one, from what its verdict leaves of it."""
        verdict = self._verdict(entry, raw)
        return bool(entry["raw_digest"] == (verdict.named(raw) if verdict else raw).digest)

    def _verdict(self, entry: Entry, raw: Raw) -> Verdict | None:
        """Which documents of a range do not go into a shard, as the directory says. Raises DamagedError."""
        content = self.manifest["content"]
        if "quality" not in content:
            return None
        number = content["shards"].index(entry)
        signals, verdicts = (self.directory / f"{name}-{number:05d}.arrow" for name in ("signals", "verdicts"))
        try:
            return write_verdict(self.own, entry["shard_key"], raw.digest, read_documents(signals), read_gone(verdicts))
        except (OSError, pa.ArrowException) as error:
            raise DamagedError(
                f"{self.directory}: {signals.name} and {verdicts.name} tell what was judged away, and one of them is "
                f"damaged ({' '.join(str(error).split())[:160]}); prepare again: whole shards are reused"
            ) from error

    def _run(self, stream: Stream, shard: Shard, entry: Entry, raw: Raw) -> tuple[Receipt, Path]:
        if verdict := self._verdict(entry, raw):
            stream = replace(stream, source=JudgedSource(source=stream.source, verdicts={shard.id: verdict}))
            shard = JudgedShard(**vars(shard), verdict=verdict)
        reference = Reference(spec=self._tokenizer, split_special_tokens=self._config.split_special_tokens)
        made = pipeline(self._request, stream, Chosen(reference, reference, "it decides"), self.own)
        receipt, _ = run_shard(replace(made, probe=False), replace(shard, raw=None))
        return receipt, Ledger(self.own).shard(receipt.shard_key)

    def _finished(self, entry: Entry) -> Receipt | None:
        """The receipt of a finished shard of the cache, with its bad records brought over."""
        receipt = Ledger(self.cache).receipt(entry["shard_key"]) if self.cache else None
        if receipt and receipt.quarantine_xxh3_128 and self.cache:
            with contextlib.suppress(FileExistsError):
                link_or_copy(
                    Ledger(self.cache).quarantine(receipt.shard_key), Ledger(self.own).quarantine(receipt.shard_key)
                )
        return receipt

    def _check_key(self, stream: Stream, entry: Entry) -> None:
        """Raises DamagedError where what would be done now is known to be something else than was done then."""
        now = shard_key(Raw(entry["raw_digest"], (), ()), stream.transform_key)
        if now != entry["shard_key"]:
            then = self.manifest["content"]["tokenizer"].get("tokenizers")
            raise DamagedError(
                f"{self.directory / _name(entry)}: cannot be made again here: it was made with tokenizers {then}, this "
                f"is {version('tokenizers')}, by other versions of "
                f"its parts, or it leaves out records that its worker died of; remove {self.directory} and prepare "
                f"again"
            )

    def _changed(self, entry: Entry, shard: Shard | None) -> SourceError:
        """Which files are to be looked at: those whose stamps are no more what a plan says, or else all that the range
        spans.
        """
        files = (
            list(dict.fromkeys(segment.file.path for segment in shard.segments if hasattr(segment, "file")))
            if shard
            else []
        )
        stamps: Mapping[str, Any] = (
            next(
                (
                    record["fields"]["files"]
                    for _, record in plans(self.cache)
                    if record["directory"] == self.directory.name
                ),
                {},
            )
            if self.cache
            else {}
        )
        changed = [
            file for file in files if file in stamps and stamps[file] != storage_of(file).stamp(file).as_list()
        ] or files
        names = ", ".join(changed[:_FILES_NAMED]) or f"the input {entry['source']}"
        return SourceError(
            f"{names}: changed since {self.directory.name} was prepared: no range of it has the content "
            f"{entry['raw_digest']} any more that {_name(entry)} was made from; "
            f"bring back the old file (--dataset names another place), or prepare again"
        )

    def _shards_of(self, stream: Stream) -> list[Entry]:
        return [shard for shard in self.manifest["content"]["shards"] if shard["source"] == stream.given.name]

    @cached_property
    def _config(self) -> DataConfig:
        content = self.manifest["content"]
        known = {field.name for field in fields(DataConfig)}
        try:
            if unknown := content["config"].keys() - known:
                raise ConfigError(f"unknown flags {sorted(unknown)}")
            return DataConfig(
                **content["config"], transforms=self._named(parse_parts, "transforms"), num_proc=0, max_bad_files=1.0
            )
        except (TypeError, ConfigError) as error:
            raise DamagedError(
                f"{self.directory}: its flags are none that this moai takes ({error}); remove it and prepare again"
            ) from error

    @cached_property
    def _tokenizer(self) -> TokenizerSpec:
        said = self.manifest["content"]["tokenizer"]
        file = self.directory / "tokenizer.json"
        spec = load_tokenizer(str(file), eos_token=said["eos_token"])
        bos = said["bos_id"]
        return (
            spec if bos is None else replace(spec, bos_id=bos, bos_token=load_file(file, spec.digest).id_to_token(bos))
        )

    @cached_property
    def _entries(self) -> tuple[DatasetEntry, ...]:
        """One for each source of the manifest, with the settings that it had."""
        found: tuple[DatasetEntry, ...] = self._named(parse_dataset, "entries")
        return found

    def _named(self, parse: Callable[..., Any], what: str) -> Any:
        """Parts and sources, of which some may be a user's. Raises SourceError where these are not found."""
        try:
            return parse(self.manifest["run"].get(what, []), place=f"{self.directory}: {what}")
        except ConfigError as error:
            raise SourceError(
                f"{error}; run repair in the folder that holds what it was prepared with, or prepare again"
            ) from error

    @cached_property
    def _inputs(self) -> tuple[Input, ...]:
        """As `prepare` found them, under the names that the manifest has for them."""
        sources = self.manifest["content"]["sources"]
        if len(self._entries) != len(sources):
            raise DamagedError(
                f"{self.directory}: its manifest names {len(self._entries)} entries for {len(sources)} sources; remove "
                f"it and prepare again"
            )
        given = [
            str(spec) for spec, entry in zip(self.manifest["run"].get("inputs", []), self._entries) if not entry.source
        ]
        specs = list(self.dataset) or given
        found: list[Input] = []
        while specs or (len(found) < len(sources) and self._entries[len(found)].source):
            if len(found) < len(sources) and self._entries[len(found)].source:
                found.append(
                    Input(str(self._entries[len(found)]), "", OfSource(source=self._entries[len(found)].source), (), {})
                )
                continue
            inputs = self._look_up(specs[0], sources[len(found) :], self._config.dataset_config if not found else None)
            # A folder of several kinds stands in the manifest once for each of them.
            specs = specs[1 if self.dataset else len(inputs) :]
            found += inputs
        if [given.kind.name for given in found] != [source["kind"] for source in sources]:
            now, then = (
                ", ".join(given.spec for given in found),
                ", ".join(f"{source['name']} ({source['kind']})" for source in sources),
            )
            raise SourceError(
                f"{now or 'no input'}: not the inputs that {self.directory.name} was made from: {then}; name them with "
                f"--dataset, in that order"
            )
        return tuple(replace(given, name=source["name"]) for given, source in zip(found, sources))

    def _look_up(self, spec: str, sources: Sequence[Entry], dataset_config: str | None) -> list[Input]:
        """What `prepare` would read under that name. `sources` are those of the manifest that it may stand for."""
        if self.dataset:
            return discover(spec, dataset_config)
        is_local = not (sources and sources[0].get("origin"))
        where = (
            str(Path(spec).expanduser().absolute()) if is_local else spec
        )  # a path that is absent is not asked for at the Hub
        try:
            return discover(where, dataset_config)
        except SourceError as error:
            relative = "" if where == spec else f"run repair in the directory where prepare was given {spec}, or "
            raise SourceError(f"{error}; {relative}name the input with --dataset, where it is now") from error

    @cached_property
    def _request(self) -> Request:
        for folder in ("shards", "ranges", "transforms"):
            (self.own / folder).mkdir(parents=True, exist_ok=True)
        tokenizer = self._tokenizer
        return Request(
            self._config,
            self.own,
            self._inputs,
            self._entries,
            Path(tokenizer.path),
            True,
            tokenizer,
            {},
            "",
            self._template,
        )

    @cached_property
    def _template(self) -> ChatTemplate | None:
        chat = self.manifest["content"].get("chat")
        return ChatTemplate(**chat["template"]) if chat else None

    @cached_property
    def _streams(self) -> list[Stream]:
        return streams(self._request, self.own, _BATCH_BYTES)


def _name(entry: Entry) -> str:
    """The shard's file; of one without rows the file of its documents."""
    return str(entry["file"] or entry["documents_file"]["file"])
