"""Loaded in the process that workers are forked from, before the first of them: what each would otherwise load for itself.

`WARM` holds JSON: {"modules": [...], "calls": [["module:function", {arguments}], ...]}. What these functions keep in their modules
every worker inherits without loading it, and shares the memory. Nothing that starts threads may be loaded here: a forked child has
none of them.
"""

from __future__ import annotations

import gc
import importlib.abc
import json
import os
import sys
from importlib import import_module

WARM = "MOAI_WARM"


class _WithoutPandas(importlib.abc.MetaPathFinder):
    """pyarrow imports pandas, where there is one, merely to ask whether a list is a Series: an eighth of a second and 40 MB."""

    def find_spec(self, fullname: str, path: object, target: object = None) -> None:
        if fullname == "pandas":
            raise ModuleNotFoundError("no worker needs pandas", name="pandas")


def warm(wanted: str) -> None:
    sys.meta_path.insert(0, _WithoutPandas())
    given = json.loads(wanted)
    for module in given["modules"]:
        import_module(module)
    for name, arguments in given["calls"]:
        module, function = name.split(":")
        getattr(import_module(module), function)(**arguments)
    gc.freeze()  # what is here stays: a collection in a child would only copy its pages


if WARM in os.environ:  # set by the executor while it starts that process, and nowhere else
    warm(os.environ.pop(WARM))
