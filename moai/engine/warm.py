"""Loaded in the process that workers are forked from, before the first of them: what each would otherwise load for itself.

`WARM` holds JSON: {"modules": [...], "calls": [["module:function", {arguments}], ...]}. What these functions keep in their modules
every worker inherits without loading it, and shares the memory. Nothing that starts threads may be loaded here: a forked child has
none of them.
"""

from __future__ import annotations

import gc
import json
import os
from importlib import import_module

from moai.columns import without_pandas

WARM = "MOAI_WARM"


def warm(wanted: str) -> None:
    without_pandas()
    given = json.loads(wanted)
    for module in given["modules"]:
        import_module(module)
    for name, arguments in given["calls"]:
        module, function = name.split(":")
        getattr(import_module(module), function)(**arguments)
    gc.freeze()  # what is here stays: a collection in a child would only copy its pages


if WARM in os.environ:  # set by the executor while it starts that process, and nowhere else
    warm(os.environ.pop(WARM))
