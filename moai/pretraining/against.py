"""A prepared directory whose documents are there already (--dedup_against): what is a copy of one of them goes. Its own
documents all stay, and nothing of it is written again.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from moai.core.errors import ConfigError
from moai.engine.documents import read_documents
from moai.engine.part import Signal
from moai.prepared.manifest import Prepared
from moai.quality.corpus import ShardSidecars


@dataclass(frozen=True)
class Against:
    """Its shards, and which of their documents stand in it, on either side of its split."""

    shards: tuple[ShardSidecars, ...]
    stays: npt.NDArray[np.bool_]


def digest_of(directory: str) -> str:
    """Of what it holds. Raises DamagedError where it is no prepared directory."""
    return Prepared.open(Path(directory).expanduser()).content_digest


def open_against(directory: str, signals: tuple[Signal, ...]) -> Against:
    """`signals` are what must have been measured there as it is here. Raises ConfigError, DamagedError."""
    path = Path(directory).expanduser()
    content = Prepared.open(path).content
    known = content.get("quality", {}).get("signals", [])
    for signal in signals:
        if signal.identity() not in known:
            raise ConfigError(
                f"--dedup_against {directory}: its documents have no {signal.name} as this moai measures it; prepare "
                f"it again, with the same --dedup"
            )
    digests = {entry["file"]: entry["xxh3_128"] for entry in content["files"]}
    shards, stays = [], []
    for number in range(len(content["shards"])):
        names = {signal.name: f"signals-{number:05d}-{signal.name}.arrow" for signal in signals}
        with pa.memory_map(str(path / f"verdicts-{number:05d}.arrow")) as file:
            verdicts = pa.ipc.open_file(file).read_all()
        reasons = read_documents(path / f"signals-{number:05d}.arrow")["reason"]
        shards.append(
            ShardSidecars(
                verdicts.num_rows,
                {name: str(path / file) for name, file in names.items()},
                {name: digests[file] for name, file in names.items()},
            )
        )
        kept = reasons.is_null().to_numpy() & (verdicts["failed"].to_numpy() == 0)
        stays.append(kept & verdicts["keeper_shard"].is_null().to_numpy())
    return Against(tuple(shards), np.concatenate(stays) if stays else np.empty(0, bool))
