"""How the scripts of masked language models start: flags in, JSON out; a person's mistake is one line and an exit code,
never a traceback.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from moai.core.config import resolve
from moai.core.errors import MoaiError

T = TypeVar("T")


def run(
    config: type[T], work: Callable[[T], dict[str, Any]], argv: Sequence[str], *, prog: str, description: str
) -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        resolved = resolve([config], argv, os.environ, prog=prog, description=description)
        print(json.dumps(work(resolved[config]), indent=1))
    except MoaiError as error:
        print(f"{prog}: error: {error}", file=sys.stderr)
        return error.exit_code
    return 0
