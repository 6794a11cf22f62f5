"""The kinds of file there are, by their endings.

    register(MyKind)        in Python; or the entry point group `moai.kinds`, where an ending without its dot names the
                            class

Entry points are asked only for an ending that none of these knows, and only the one of that name is imported.
"""

from __future__ import annotations

import functools
import logging
import os
from importlib.metadata import EntryPoint
from typing import Any

from moai.core.errors import ConfigError
from moai.sources.kinds.arrow import Arrow
from moai.sources.kinds.csv import Csv, Tsv
from moai.sources.kinds.json import Json
from moai.sources.kinds.kind import File, Kind, NoObjects, Segment
from moai.sources.kinds.lines import Lines
from moai.sources.kinds.parquet import Parquet
from moai.sources.kinds.stream import Stream
from moai.sources.kinds.text import Text
from moai.sources.streams import COMPRESSIONS

__all__ = ["File", "Kind", "NoObjects", "Segment", "Stream", "endings", "kind_of", "register"]

GROUP = "moai.kinds"
logger = logging.getLogger(__name__)


def register(kind: type[Kind]) -> type[Kind]:
    """Read files of these endings with this class from now on; it can decorate the class. Raises ConfigError."""
    if not (isinstance(kind, type) and issubclass(kind, Kind)):
        raise ConfigError(f"{kind!r}: is no kind of file; write a class that inherits from moai.sources.kinds.Kind")
    lacking = [name for name in ("name", "endings") if not hasattr(kind, name)] + sorted(kind.__abstractmethods__)
    if lacking:
        raise ConfigError(
            f"{kind.__qualname__}: has no {' and no '.join(lacking)}; a kind of file has name, endings, schema and read"
        )
    written: Any = kind.endings
    if isinstance(written, str):
        raise ConfigError(f"{kind.__qualname__}: endings is a string; write a tuple, endings = ({written!r},)")
    for ending in kind.endings:
        if ending != f".{ending[1:].lower()}" or ending in COMPRESSIONS:
            raise ConfigError(
                f"{kind.__qualname__}: the ending {ending!r} must be a dot and lower case, and none of "
                f"{', '.join(COMPRESSIONS)}"
            )
        if ending in _KINDS and _KINDS[ending] is not kind:
            logger.warning(
                "%s: read by %s from now on, not by %s", ending, kind.__qualname__, _KINDS[ending].__qualname__
            )
        _KINDS[ending] = kind
    return kind


def kind_of(path: str | os.PathLike[str]) -> tuple[Kind, str] | None:
    """(kind, compression) of a file by its endings, in any case; None where nobody reads it."""
    stem, ending = os.path.splitext(os.fspath(path).lower())
    compression = COMPRESSIONS.get(ending, "")
    kind = _by_ending(os.path.splitext(stem)[1] if compression else ending)
    return None if kind is None or (compression and not issubclass(kind, Stream)) else (kind(), compression)


def endings() -> str:
    """Those known, for people."""
    return ", ".join(_KINDS) + "; text also with " + " or ".join(COMPRESSIONS)


_KINDS: dict[str, type[Kind]] = {}
for _kind in (Lines, Json, Text, Csv, Tsv, Parquet, Arrow):
    register(_kind)


def _by_ending(ending: str) -> type[Kind] | None:
    if ending not in _KINDS and (point := _entry_points().get(ending.removeprefix("."))):
        package = point.dist.name if point.dist else point.module
        try:
            kind = register(point.load())
        except Exception as error:
            raise ConfigError(
                f"{ending}: the package {package} says it reads such files, but fails ({type(error).__name__}: {error})"
            ) from error
        if ending not in kind.endings:
            raise ConfigError(
                f"{ending}: the package {package} names {kind.__qualname__} for such files, which reads "
                f"{', '.join(kind.endings)}"
            )
        logger.info("%s: read by %s of the package %s", ending, kind.__qualname__, package)
    return _KINDS.get(ending)


@functools.cache
def _entry_points() -> dict[str, EntryPoint]:
    from importlib.metadata import entry_points

    return {point.name.lower(): point for point in entry_points(group=GROUP)}
