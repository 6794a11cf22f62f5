"""The doctor: what this machine does for a preparation, measured in a few seconds, with a verdict and a remedy each.

    python verify_optimization.py --tokenizer_path DIR [--cache_dir DIR] [--json]

Exit 1 if a check failed, 2 on bad usage, else 0. Nothing is left behind.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import NoReturn

from moai.core import resources
from moai.core.config import option, resolve
from moai.core.errors import ConfigError
from moai.doctor.check import FAILED, Check
from moai.doctor.environment import check_cores, check_environment, check_memory, check_versions
from moai.doctor.filesystem import check_storage
from moai.doctor.summary import summarize
from moai.doctor.tokenization import check_tokenizer


@dataclass(frozen=True, kw_only=True)
class DoctorConfig:
    """Doctor: what to look at."""

    tokenizer_path: str = option("", "directory or Hub name with a tokenizer.json, or that file")
    eos_token: str | None = option(None, "end-of-document token, where the tokenizer's configuration names none")
    cache_dir: str = option(
        "~/.cache/moai", "where shards and prepared directories will lie; need not exist yet", env="MOAI_CACHE_DIR"
    )
    json: bool = option(False, "print a list of objects instead of lines")

    def __post_init__(self) -> None:
        if not self.tokenizer_path:
            raise ConfigError("no tokenizer: set --tokenizer_path DIR")


def examine(config: DoctorConfig, environ: Mapping[str, str]) -> list[Check]:
    """Every check, in the order it is printed."""
    machine = resources.detect(Path(config.cache_dir), environ=environ)
    return [
        *check_tokenizer(config.tokenizer_path, eos_token=config.eos_token),
        check_cores(machine, environ),
        check_memory(machine, environ),
        *check_storage(Path(config.cache_dir)),
        *check_environment(machine, environ),
        check_versions(),
    ]


def main(argv: Sequence[str], environ: Mapping[str, str], *, prog: str = "verify_optimization.py") -> int:
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, _leave)  # so that the probe directory is removed
    description = (__doc__ or "").splitlines()[0]
    try:
        config = resolve([DoctorConfig], argv, environ, prog=prog, description=description)[DoctorConfig]
    except ConfigError as error:
        print(f"{prog}: error: {error} (--help lists every flag)", file=sys.stderr)
        return error.exit_code
    asked = dict(environ)
    # The speed of one core is measured, and a pool of the user's size is not started for it.
    os.environ["RAYON_NUM_THREADS"] = "1"
    checks = examine(config, asked)
    if config.json:
        print(json.dumps([asdict(check) for check in checks], indent=1, ensure_ascii=False))
    else:
        print("\n".join((*map(str, checks), "", *summarize(checks))))
    return int(any(check.verdict == FAILED for check in checks))


def _leave(signum: int, frame: FrameType | None) -> NoReturn:
    sys.exit(128 + signum)
