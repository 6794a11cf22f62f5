"""Re-embed a law database:  python scripts/migrations/re_embed_existing_data_optimized.py --help"""

import sys
from functools import partial
from pathlib import Path

sys.path.insert(
    0, str(Path(__file__).resolve().parent.parent.parent)
)  # as for train.py: this checkout's moai, installed or not

from moai.core.stopping import end
from moai.reembedding.command import main
from moai.reembedding.monitor import run

NAME = "re_embed_existing_data_optimized.py"

if __name__ == "__main__":
    end(run(partial(main, prog=NAME), NAME))  # waits for no thread that is deep in a library
