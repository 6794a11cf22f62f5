"""Train a masked language model on the entity-coref corpus:  python scripts/run_entity_coref_finetune.py --help"""

import sys
from pathlib import Path

sys.path.insert(
    0, str(Path(__file__).resolve().parent.parent)
)  # as for train.py: this checkout's moai, installed or not

from moai.coref.mlm_finetune import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
