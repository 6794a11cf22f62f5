"""Which columns an input has, from its first records or its own schema: what the text's shape is chosen from."""

from __future__ import annotations

from collections.abc import Mapping

from moai.core.errors import PartFailed, SourceError
from moai.engine.part import named
from moai.sources.discover import Input
from moai.sources.kinds import NoObjects
from moai.sources.kinds.kind import asking

_FILES = 10


def columns_of(given: Input) -> Mapping[str, str]:
    """Column name -> "string", "list" or another type's name. A file that does not tell is passed over for the next
    one.

    Raises SourceError when none of the first files tells.
    """
    complaint = "there is none"
    for file in given.files[:_FILES]:
        try:
            with asking(given.kind, file.path):
                found = given.kind.schema(file)
        except NoObjects as none:
            complaint = str(none) or complaint
            continue
        if not isinstance(found, Mapping):
            raise PartFailed(
                f"{file.path}: kind {named(type(given.kind))} gave {type(found).__name__} as its schema, not column "
                f"names with their types"
            )
        if not found:
            raise SourceError(
                f"{given.spec}: its first records are JSON objects without any key; nothing to make text of"
            )
        return found
    raise SourceError(
        f"{given.spec}: none of its first records is a JSON object ({complaint}); is it UTF-8, and JSON lines or a "
        f"JSON array? "
        "(plain text belongs in a .txt file)"
    )
