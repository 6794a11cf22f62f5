"""Prepare the data, or wait for rank 0 to do it, then train.

    torchrun --nproc_per_node 2 train.py --config configs/demo.yaml

The same as `moai train` (moai/training/command.py). Worker processes import this file again: all work is behind the
guard.
"""

import os
import sys

from moai.core.stopping import end, stop_at_once

if __name__ == "__main__":
    stop_at_once()  # all that is imported below takes its time

from moai.training.command import main, run

__all__ = ["end", "main", "run"]

if __name__ == "__main__":
    ended_with = main(sys.argv[1:], os.environ)
    if os.environ.get("WORLD_SIZE", "1") != "1":
        end(ended_with)
    sys.exit(ended_with)
