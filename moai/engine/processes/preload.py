"""Loaded in the process that workers are forked from, before the first of them: what each would otherwise load for
itself. Where workers are spawned, each loads it for itself before its first shard.

`WARM` holds JSON: {"modules": [...], "calls": [["module:function", {arguments}], ...]}. What these functions keep in
their modules every worker inherits without loading it, and shares the memory. Nothing that keeps threads may be loaded
here: a forked child has none of them.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from multiprocessing import resource_tracker
from typing import Any

from moai.core.without_pandas import numpy_without_threads, without_pandas

WARM = "MOAI_WARM"


def warm(wanted: str) -> None:
    without_pandas()
    numpy_without_threads()
    given = json.loads(wanted)
    # Beside the imports: a tokenizer is built without the interpreter's lock. Its thread has ended before anything is
    # forked.
    calls = [threading.Thread(target=_call, args=call) for call in given["calls"]]
    for call in calls:
        call.start()
    for module in given["modules"]:
        import_module(module)
    for call in calls:
        call.join()
    gc.freeze()  # what is here stays: a collection in a child would only copy its pages


def begin(wanted: str, name: str, *arguments: Any) -> None:
    """The first thing in a worker: load what is not there yet ("" for nothing), then call `name`, which is text because
    what it imports must come after.
    """
    if wanted:
        warm(wanted)
    module, function = name.split(":")
    getattr(import_module(module), function)(*arguments)


@contextmanager
def without_interrupts() -> Iterator[None]:
    """What is started within inherits that Ctrl-C is for the driver, from its first moment on."""
    resource_tracker.ensure_running()  # which unblocks it when it starts
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def _call(name: str, arguments: dict[str, Any]) -> None:
    module, function = name.split(":")
    getattr(import_module(module), function)(**arguments)


if WARM in os.environ:  # set by the executor while it starts that process, and nowhere else
    warm(os.environ.pop(WARM))
