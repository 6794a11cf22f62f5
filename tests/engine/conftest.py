from __future__ import annotations

import pytest

from moai.engine.executor import Executor, Processes, Serial


@pytest.fixture(params=["serial", "processes"])
def executor(request: pytest.FixtureRequest) -> Executor:
    """Every one that moai ships."""
    return Serial() if request.param == "serial" else Processes(num_proc=2, stall_seconds=60)
