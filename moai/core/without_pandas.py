"""Leave out what libraries load and nobody here uses. Called before anything else, in processes that are moai's alone.

`pa.array` imports pandas, where there is one, merely to ask whether it was given a Series: an eighth of a second and 40
MB. So it is refused, until something comes that needs it. OpenBLAS starts a thread a core as numpy is imported, and
each spins for a tenth of a second before it sleeps, just when there is most to do.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module

_BLAS_THREADS = "OPENBLAS_NUM_THREADS"


class _WithoutPandas:
    """A finder of modules that finds nothing, and refuses one."""

    def find_spec(self, fullname: str, path: object, target: object = None) -> None:
        if fullname == "pandas":
            raise ModuleNotFoundError("pandas is left out of this process (moai.core.without_pandas)", name="pandas")


def without_pandas() -> None:
    sys.meta_path.insert(0, _WithoutPandas())


def with_pandas() -> None:
    """Before something that needs it, like `datasets`."""
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _WithoutPandas)]


def numpy_without_threads() -> None:
    """Import numpy now; the environment is as before, for other libraries with an OpenBLAS of their own."""
    if _BLAS_THREADS in os.environ:
        return
    os.environ[_BLAS_THREADS] = "1"
    try:
        import_module("numpy")
    finally:
        del os.environ[_BLAS_THREADS]
