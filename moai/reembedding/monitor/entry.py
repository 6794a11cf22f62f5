"""How the scripts start: a person's mistake is one line and an exit code, Ctrl-C is an end like any other."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence

from moai.core.errors import MoaiError
from moai.core.without_pandas import without_pandas


def run(main: Callable[[Sequence[str]], int], prog: str) -> int:
    without_pandas()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        return main(sys.argv[1:])
    except MoaiError as error:
        print(f"{prog}: error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        return 141
