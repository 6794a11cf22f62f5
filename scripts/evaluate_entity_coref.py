"""Score a masked language model on entity-coref samples:  python scripts/evaluate_entity_coref.py --help"""

import sys
from pathlib import Path

sys.path.insert(
    0, str(Path(__file__).resolve().parent.parent)
)  # as for train.py: this checkout's moai, installed or not

from moai.coref.mlm_evaluate import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
