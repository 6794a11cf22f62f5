from __future__ import annotations

import pytest

from moai.engine.executor import Cluster, Executor, Processes, Ray, Serial


@pytest.fixture(params=["serial", "processes", "ray"])
def executor(request: pytest.FixtureRequest) -> Executor:
    """Every one that moai ships."""
    if request.param == "ray":
        return Ray(cluster=request.getfixturevalue("ray_cluster"), stall_seconds=60)
    return Serial() if request.param == "serial" else Processes(num_proc=2, stall_seconds=60)


@pytest.fixture
def on_ray(ray_cluster: Cluster) -> Ray:
    return Ray(cluster=ray_cluster, num_proc=2, stall_seconds=60)
