"""Leave out a library that is only asked whether it is there.

`pa.array` imports pandas, where there is one, merely to ask whether it was given a Series: an eighth of a second and 40 MB. So
processes that are moai's alone refuse it, until something comes that needs it. Standard library only: this is called before anything else.
"""

from __future__ import annotations

import sys


class _WithoutPandas:
    """A finder of modules that finds nothing, and refuses one."""

    def find_spec(self, fullname: str, path: object, target: object = None) -> None:
        if fullname == "pandas":
            raise ModuleNotFoundError("pandas is left out of this process (moai.lean)", name="pandas")


def without_pandas() -> None:
    sys.meta_path.insert(0, _WithoutPandas())


def with_pandas() -> None:
    """Before something that needs it, like `datasets`."""
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _WithoutPandas)]
