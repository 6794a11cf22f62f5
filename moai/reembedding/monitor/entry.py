"""How the monitors' scripts start: a person's mistake is one line and an exit code, Ctrl-C is an end like any other."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from moai.core.errors import MoaiError


def run(main: Callable[[Sequence[str]], int], prog: str) -> int:
    try:
        return main(sys.argv[1:])
    except MoaiError as error:
        print(f"{prog}: error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        return 141
