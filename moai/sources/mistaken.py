"""Files that are not what they are called: pointers of Git LFS and git-annex, and what a server answers in place of a
file. Their first bytes tell.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import replace

import orjson

from moai.core.errors import TooManyBadRecords
from moai.core.files import input_errors, storage_of
from moai.sources.discover import Input, some
from moai.sources.kinds import File

logger = logging.getLogger(__name__)

_HEAD_BYTES = 4096
_POINTERS = (
    (re.compile(rb"version https://(git-lfs|hawser)\.github\.com/spec/"), "a Git LFS pointer", "run `git lfs pull`"),
    (re.compile(rb"(/|(\.\./)*\.git/)annex/objects/"), "a git-annex pointer", "run `git annex get`"),
)
_XML_ERROR = re.compile(rb"(<\?xml[^>]*>\s*)?<(\w+:)?(Error|Fault)\b[^>]*>.*?(<Code>(?P<said>[^<]*)<|\Z)", re.DOTALL)
_XML = re.compile(rb"<\?xml\b")
_HTML = re.compile(rb"<(!doctype\s+html|html|head|body)\b", re.IGNORECASE)
_TITLE = re.compile(rb"<title[^>]*>\s*(?P<said>[^<]*?)\s*<", re.IGNORECASE)
_SORRY = re.compile(
    r"\b[45]\d\d\b|error|not found|forbidden|denied|unauthori[sz]ed|sign ?in|log ?in|gateway|unavailable|too many req"
    r"|just a moment|captcha|moved permanently",
    re.IGNORECASE,
)
_ANSWER = re.compile(
    rb"((HTTP[ /\d.]*)?[45]\d\d[: -]+[a-z' ]{3,40}|(entry|repository|revision|file) not found|access denied"
    rb"|invalid username or password)\.?",
    re.IGNORECASE,
)
_KEY = re.compile(
    r"errors?|error_(description|code)|message|msg|details?|code|status|status_?code|reason|documentation_url|type|title"
    r"|request_?id|timestamp|path|success|instance|url",
    re.IGNORECASE,
)
"""Of what servers answer in JSON where they have no file."""


def without_mistaken(inputs: Sequence[Input], max_share: float, *, flag: str = "") -> tuple[Input, ...]:
    """The inputs without such files, which are named in a warning. Raises TooManyBadRecords where they are more than
    this share of all files, which `flag` can raise.
    """
    kept, said = [], []
    of = sum(len(given.files) for given in inputs)
    for given in inputs:
        found = {file.name: what for file in given.files if (what := instead(given, file))}
        if len(found) == len(given.files) > 1 and all(what == _PAGE for what in found.values()):
            found = {}  # texts that are pages, all of them: then nothing was mistaken
        said += [f"{name} is {what}: {way_out}" for name, (what, way_out) in found.items()]
        bad: dict[str, tuple[str, ...]] = {}
        for name, (kind, _) in found.items():
            bad[kind] = (*bad.get(kind, ()), name)
        kept.append(replace(given, files=tuple(f for f in given.files if f.name not in found), bad=bad))
    if not said:
        return tuple(inputs)
    line = f"{len(said)} of {of} files hold no data: {some(said, '; ')}"
    if len(said) > max_share * of:
        raise TooManyBadRecords(line + (f"; or leave such files out by {flag} {above(len(said) / of)}" if flag else ""))
    if lost := [given.spec for given, before in zip(kept, inputs) if before.files and not given.files]:
        raise TooManyBadRecords(f"{lost[0]}: nothing is left of it; {line}")
    logger.warning("%s; left out, as was allowed", line)
    return tuple(kept)


def instead(given: Input, file: File) -> tuple[str, str] | None:
    """What a file is instead of data, and the way out; None where nothing tells."""
    with input_errors(file.path), storage_of(file.path).open(file.path) as opened:
        head = (opened.read(_HEAD_BYTES) or b"").removeprefix(b"\xef\xbb\xbf").strip()
    for pattern, what, way_out in _POINTERS:
        if pattern.match(head):
            return what, way_out
    if answer := _XML_ERROR.match(head):
        return _answer("an error page of a server", answer["said"])
    plain = given.kind.plain and not file.compression
    if _HTML.match(head):
        title = _TITLE.search(head)
        if not plain or (title and _SORRY.search(title["said"].decode("utf-8", "replace"))):
            return _answer("an HTML page", title["said"] if title else None)
        return _PAGE
    if _XML.match(head):
        return None if plain else _answer("an XML page", None)
    if file.stamp.size <= _HEAD_BYTES and (_ANSWER.fullmatch(head) or _is_error(head)):
        return _answer("an answer of a server", head)
    return None


def above(share: float) -> str:
    """A share to write that is not below this one."""
    return f"{min(1.0, share + 0.0005):.3f}".rstrip("0").rstrip(".")


_PAGE = ("an HTML page", "fetch the file again")


def _answer(what: str, said: bytes | None) -> tuple[str, str]:
    text = " ".join((said or b"").decode("utf-8", "replace").split())[:80]
    return what, f"{text + '; ' if text else ''}fetch the file again"


def _is_error(head: bytes) -> bool:
    """Whether a file is one JSON object that tells of an error."""
    try:
        found = orjson.loads(head)
    except orjson.JSONDecodeError:
        return False
    if not isinstance(found, dict) or not all(map(_KEY.fullmatch, found)):
        return False
    status = [str(found.get(name, "")) for name in ("code", "status", "status_code", "statusCode")]
    about = "; ".join(value for value in found.values() if isinstance(value, str))
    return bool({"error", "errors"} & found.keys() or any(map(_SORRY.fullmatch, status)) or _SORRY.search(about))
