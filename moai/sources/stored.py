"""What a URL means as data: an object, the objects below a prefix, or those that a pattern matches. A prefix is read by
the rules of folders.
"""

from __future__ import annotations

import re

from moai.core.errors import SourceError
from moai.core.files import Stamp, input_errors, storage_of
from moai.core.stores import Found, listed, parts_of
from moai.sources.folders import NOT_DATA, PREPARED, Chosen, is_about_data, splits_of, taken_split
from moai.sources.kinds import File, Kind, endings, kind_of

_SPECIAL = re.compile(r"[*?\[]")


def objects_in(spec: str) -> tuple[list[tuple[Kind, File]], Chosen]:
    """The objects to read, in order, with their kinds, and what is left out. Raises SourceError."""
    parts_of(spec)
    with input_errors(spec):
        if _SPECIAL.search(spec) and not spec.startswith("http"):
            return _matching(spec)
        if kind_of(spec) and not spec.endswith("/"):
            return [_file(spec, spec.rpartition("/")[2], storage_of(spec).stamp(spec))], Chosen()
        match = re.fullmatch(r"(?P<prefix>.+?)(?:@(?P<split>[^@/]+))?", spec)
        assert match
        return _below(match["prefix"].rstrip("/") + "/", match["split"])


def _matching(spec: str) -> tuple[list[tuple[Kind, File]], Chosen]:
    prefix = spec[: _SPECIAL.search(spec).start()].rpartition("/")[0] + "/"  # type: ignore[union-attr]
    pattern = re.compile(_regular_expression(spec))
    chosen, found = Chosen(), []
    for one in _all(prefix):
        name = one.url.removeprefix(prefix)
        if not pattern.fullmatch(one.url) or not kind_of(one.url):
            continue
        if is_about_data(name.rpartition("/")[2]):
            chosen.leave_out(NOT_DATA, name)
        else:
            found.append(_file(one.url, name, one.stamp))
    if not found:
        raise SourceError(f"{spec}: no object matches (readable endings: {endings()})")
    return found, chosen


def _below(prefix: str, split: str | None) -> tuple[list[tuple[Kind, File]], Chosen]:
    chosen, found = Chosen(), dict[str, Found]()
    names = {one.url.removeprefix(prefix): one for one in _all(prefix)}
    if PREPARED.issubset(names):
        raise SourceError(f"{prefix}: is a prepared directory, whose rows are ready; train on it with --prepared")
    for name, one in names.items():
        if any(part.startswith((".", "__")) for part in name.split("/")):
            continue
        if kind_of(name) is None:
            chosen.passed_over.append(name)
        elif is_about_data(name.rpartition("/")[2]):
            chosen.leave_out(NOT_DATA, name)
        else:
            found[name] = one
    splits = splits_of(found)
    if splits:
        taken = taken_split(prefix.rstrip("/"), splits, split)
        for other, its in splits.items():
            if other != taken and (rest := [name for name in its if name not in splits[taken]]):
                chosen.leave_out(f"split {other}", *rest)
        known = {name for its in splits.values() for name in its}
        if unnamed := [name for name in found if name not in known]:
            chosen.leave_out("no split", *unnamed)
        found = {name: found[name] for name in found if name in splits[taken]}
    if not found:
        raise SourceError(f"{prefix}: no readable object below it (readable endings: {endings()})")
    return [_file(one.url, name, one.stamp) for name, one in found.items()], chosen


def _all(prefix: str) -> list[Found]:
    """Sorted by their names' bytes, as files of a folder are."""
    if prefix.startswith("http"):
        raise SourceError(f"{prefix}: a web server does not list what it has; name each file")
    return sorted(listed(prefix), key=lambda one: one.url.encode())


def _file(url: str, name: str, stamp: Stamp) -> tuple[Kind, File]:
    known = kind_of(url)
    assert known
    return known[0], File(url, name, known[1], stamp)


def _regular_expression(pattern: str) -> str:
    """Of a pattern with * and ? within a name, ** over names and [...]."""
    parts = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    return "".join(
        parts.get(part, part if part.startswith("[") else re.escape(part))
        for part in re.findall(r"\*\*/|\*\*|\*|\?|\[[^]/]+\]|[^*?[]+|\[", pattern)
    )
