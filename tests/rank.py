"""One rank of a launch in test_protocol.py: prepare or wait, open the result, say what it holds."""

from __future__ import annotations

import logging
import os
import sys

if __name__ == "__main__":
    from moai.core.config import resolve
    from moai.core.errors import MoaiError
    from moai.pretraining.options import DataConfig
    from moai.pretraining.recipe import prepare_or_wait

    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    resolved = resolve([DataConfig], sys.argv[1:], os.environ, prog="rank.py")
    try:
        prepared = prepare_or_wait(resolved[DataConfig], origins=resolved.origins)
    except MoaiError as error:
        print(f"rank {os.environ['RANK']} ended: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    import datasets

    print(
        f"rank {os.environ['RANK']} holds {len(datasets.load_from_disk(str(prepared.path)))} rows of "
        f"{prepared.path.name}"
    )
