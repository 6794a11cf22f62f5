"""What is already done: receipts by shard key, and digests of ranges by file stamps.

<cache>/shards/<shard-key>.arrow        a finished shard
<cache>/shards/<shard-key>.json         its receipt, renamed after it: a shard without one does not exist
<cache>/shards/<shard-key>.bad.jsonl    its quarantined records, where it has any
<cache>/shards/<shard-key>.documents    what became of each of its documents (Arrow), where its recipe asks for it
<cache>/ranges/<xx>/<stamp-id>.json     digest of a range as it was under these stamps: saves reading it again
<cache>/transforms/<transform-key>.json what the transform is; there once it has made anything here
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moai.core.failpoints import failpoint
from moai.core.files import canonical_json, digest_file, make_way, regular_size, sealed, unsealed, write_atomic
from moai.core.fsops import read_regular
from moai.engine.pipeline import RECEIPT_VERSION, Raw, Receipt

_MOST_BYTES = 1 << 26
"""Of a record: the ends of a million ranges take a sixth of it."""


@dataclass(frozen=True)
class Ledger:
    cache: Path

    def shard(self, shard_key: str) -> Path:
        return self.cache / "shards" / f"{shard_key}.arrow"

    def quarantine(self, shard_key: str) -> Path:
        return self.cache / "shards" / f"{shard_key}.bad.jsonl"

    def documents(self, shard_key: str) -> Path:
        return self.cache / "shards" / f"{shard_key}.documents"

    def files(self, receipt: Receipt) -> dict[Path, str]:
        """The files of a finished shard but its bad records, and their digests."""
        found = {self.shard(receipt.shard_key): receipt.xxh3_128}
        return found | (
            {self.documents(receipt.shard_key): receipt.documents_xxh3_128} if receipt.documents_xxh3_128 else {}
        )

    def receipt(self, shard_key: str) -> Receipt | None:
        """The receipt, if the shard it speaks of is there with the size it says, and its bad records if it has any."""
        value = _read(self.cache / "shards" / f"{shard_key}.json")
        if value is None or value.get("version") != RECEIPT_VERSION or value["shard_key"] != shard_key:
            return None
        receipt = Receipt.from_json(value)
        sizes = {self.shard(shard_key): receipt.bytes}
        if receipt.documents_xxh3_128:
            sizes[self.documents(shard_key)] = receipt.documents_bytes
        if any(regular_size(path) != size for path, size in sizes.items()):
            return None
        bad = self.quarantine(shard_key)
        if receipt.quarantine_xxh3_128 and (
            regular_size(bad) is None or digest_file(bad) != receipt.quarantine_xxh3_128
        ):
            return None
        return receipt

    def commit(self, receipt: Receipt) -> None:
        """The act that makes a shard exist: its data is already in place under its final name."""
        failpoint("receipt.commit", self.shard(receipt.shard_key))
        # Cut by a crash it is no JSON, and the shard is made again.
        _write(self.cache / "shards" / f"{receipt.shard_key}.json", sealed(receipt.as_json()))
        failpoint("receipt.committed", self.shard(receipt.shard_key))

    def forget(self, which: Callable[[Receipt], bool]) -> int:
        """Remove the receipts of which that is true; their shards then do not exist. Returns how many there were."""
        forgotten = 0
        for path in (self.cache / "shards").glob("*.json"):
            receipt = self.receipt(path.stem)
            if receipt and which(receipt):
                path.unlink(missing_ok=True)
                forgotten += 1
        return forgotten

    def known(self, stamp_id: str) -> dict[str, Any] | None:
        """What was remembered of an unread range or file, whose stamps are as they were then. What is said of another
        one, whose record was copied here, is not.
        """
        value = _read(self._range(stamp_id))
        return value if value and value.pop("of", None) == stamp_id else None

    def known_raw(self, stamp_id: str) -> Raw | None:
        value = self.known(stamp_id) if stamp_id else None
        return Raw.from_json(value) if value else None

    def remember(self, stamp_id: str, value: dict[str, Any]) -> None:
        """Record something found by reading. The caller has made sure that the stamps are not racy."""
        path = self._range(stamp_id)
        path.parent.mkdir(parents=True, exist_ok=True)
        failpoint("range.remember")
        _write(path, sealed({**value, "of": stamp_id}))  # lost in a crash, the range is merely read again

    def remember_raw(self, stamp_id: str, raw: Raw) -> None:
        self.remember(stamp_id, asdict(raw))

    def has_transform(self, transform_key: str) -> bool:
        return (self.cache / "transforms" / f"{transform_key}.json").exists()

    def note_transform(self, transform_key: str, identity: Mapping[str, Any]) -> None:
        path = self.cache / "transforms" / f"{transform_key}.json"
        if not path.exists():
            failpoint("transform.note")
            _write(path, canonical_json(identity))

    def _range(self, stamp_id: str) -> Path:
        return self.cache / "ranges" / stamp_id[:2] / f"{stamp_id}.json"


def _read(path: Path) -> dict[str, Any] | None:
    """What was sealed; None where it is absent, was cut by a crash or changed since (the work is then done again)."""
    try:
        return unsealed(read_regular(path, _MOST_BYTES))
    except PermissionError:
        raise  # another user's: nothing could be put in its place
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None


def _write(path: Path, data: bytes) -> None:
    """A record, whatever stands in its place."""
    make_way(path)
    write_atomic(path, data, durable=False)
