"""Prepare the entity-coref corpus.

    python scripts/prepare_entity_coref_v2.py --seq-len 2048 --model kakaobank/kf-deberta-base --max-entity-freq 1000

The same as `python -m moai entity-coref`. Worker processes import this file again, so all work is behind the guard at
its end.
"""

import sys
from pathlib import Path

sys.path.insert(
    0, str(Path(__file__).resolve().parent.parent)
)  # as for train.py: this checkout's moai, installed or not

if __name__ == "__main__":
    from moai.cli import main

    sys.exit(main(["entity-coref", *sys.argv[1:]]))
