"""`moai quality`: read and judge, pack nothing. What was measured stays in the cache, where `prepare` finds it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from moai.cache.staging import attempt
from moai.core.config import option
from moai.core.distributed import Ranks
from moai.core.errors import ConfigError
from moai.core.files import storage_errors
from moai.pretraining import judging
from moai.pretraining.assembly import cluster_of, complete, executor_of, find, streams
from moai.pretraining.options import DataConfig
from moai.pretraining.recipe import machine_plan, make_folders


@dataclass(frozen=True, kw_only=True)
class QualityConfig:
    """The report."""

    report: str = option("quality", "folder for quality.json and quality.html")


def judge(
    config: DataConfig, where: QualityConfig, origins: Mapping[str, str], environ: Mapping[str, str] = os.environ
) -> Iterator[str]:
    """Measure, decide and write the report. Gives the path of the page. Raises ConfigError."""
    if not config.require().judges:
        raise ConfigError(
            "nothing to judge by: name a profile with --quality (gopher, fineweb, ..., or a YAML file), or what "
            "else goes with --dedup, --languages or --decontaminate"
        )
    found = find(config)
    planned = machine_plan(found, origins, Ranks(), environ)
    wanted = complete(found)
    make_folders(wanted.cache)
    with cluster_of(config, Ranks(), environ) as cluster, attempt(wanted.cache, wanted.key) as staging:
        executor = executor_of(found, planned, cluster=cluster)
        executor.start()
        inputs = streams(wanted, staging, planned.batch_bytes.value)
        judgement = judging.judge(wanted, inputs, executor, staging, label="Rank 0", report=lambda _: None)
    folder = Path(where.report).expanduser()
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in judgement.reports().items():
            (folder / name).write_bytes(data)
    yield str(folder / judging.QUALITY_HTML)
