"""Every error a person can cause or must act on, as one family.

The command line prints these as one line, without a traceback, and exits with `exit_code`; anything else is a defect of
moai and keeps its traceback. Codes above 64 follow BSD's sysexits.h where it has a fitting one.

    MoaiError
    ├── ConfigError            a flag, a YAML key, an environment variable
    ├── SourceError            an input that is absent, empty or of a kind nobody reads
    │   └── TooManyBadRecords  more bad records, or files of nothing else, than is allowed
    ├── TokenizerError
    │   ├── SlowTokenizerError
    │   ├── BackendRefused     a fast tokenizer backend that does not take this tokenizer.json
    │   └── BackendDisagrees   one that gave other ids than the reference; the recipe falls back
    ├── StorageError           disk full, read-only, no permission
    ├── NotProven              a version that finds too little to serve
    ├── DamagedError           a prepared directory that differs from its manifest
    ├── PartFailed             a filter, map or signal that raised, or gave something else than it must
    ├── WorkerDied             a worker process ended without a receipt
    ├── PreparationFailed      what a waiting rank raises, with the preparer's cause
    └── Interrupted            SIGINT, SIGTERM or SIGHUP; committed work is kept
"""

from __future__ import annotations

import re

_STEERING = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """Without what would steer a terminal, or could not be written: names of files and what data says may hold it."""
    return _STEERING.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


class MoaiError(Exception):
    """Base of the family. The message names the value, the place and the way out."""

    exit_code = 1

    def __str__(self) -> str:
        return printable(super().__str__())


class ConfigError(MoaiError, ValueError):
    exit_code = 2


class SourceError(MoaiError, ValueError):
    exit_code = 66


class TooManyBadRecords(SourceError):
    exit_code = 65


class TokenizerError(MoaiError, ValueError):
    exit_code = 2


class SlowTokenizerError(TokenizerError):
    pass


class BackendRefused(TokenizerError):
    pass


class BackendDisagrees(TokenizerError):
    pass


class StorageError(MoaiError, OSError):
    exit_code = 74


class NotProven(MoaiError):
    exit_code = 65


class DamagedError(MoaiError):
    exit_code = 65


class PartFailed(MoaiError):
    exit_code = 70


class WorkerDied(MoaiError):
    exit_code = 70


class PreparationFailed(MoaiError):
    exit_code = 75


class Interrupted(MoaiError):
    """`signum` decides the exit code: 130 for SIGINT, 143 for SIGTERM, 129 for SIGHUP."""

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signum
