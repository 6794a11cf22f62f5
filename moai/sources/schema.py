"""Which columns an input has, by its files' schemas or first records: what the text's shape is chosen from."""

from __future__ import annotations

from collections.abc import Mapping

from moai.core.errors import PartFailed, SourceError
from moai.engine.part import named
from moai.engine.schema import Columns
from moai.sources.discover import Input
from moai.sources.kinds import NoObjects
from moai.sources.kinds.kind import asking

_FILES = 100
"""Of records no more files than these are looked into, spread over all of them."""


def columns_of(given: Input) -> Columns:
    """The columns of all files together, so that no file's place in the order decides anything. What does not tell or
    is not readable is passed over here.

    Raises SourceError when none of the files tells.
    """
    every = 1 if given.kind.columnar else -(-len(given.files) // _FILES)
    columns = Columns()
    complaint, refused, looked = "there is none", None, False
    for file in dict.fromkeys((*given.files[::every], given.files[-1])):
        try:
            with asking(given.kind, file.path):
                found = given.kind.schema(file)
        except NoObjects as none:
            complaint = str(none) or complaint
            continue
        except SourceError as error:  # named when it is read
            refused = refused or error
            continue
        if not isinstance(found, Mapping):
            raise PartFailed(
                f"{file.path}: kind {named(type(given.kind))} gave {type(found).__name__} as its schema, not column "
                f"names with their types"
            )
        looked = True
        columns.add(found)
        if given.kind.columnar:
            columns.of_files.append((file.path, found))
    if columns:
        return columns
    if refused:
        raise refused
    if looked:
        raise SourceError(f"{given.spec}: its first records are JSON objects without any key; nothing to make text of")
    raise SourceError(
        f"{given.spec}: none of its first records is a JSON object ({complaint}); is it UTF-8, and JSON lines or a "
        f"JSON array? "
        "(plain text belongs in a .txt file)"
    )
