"""Train a fast byte-level BPE tokenizer, or convert a slow-only one:  python scripts/train_tokenizer.py --help"""

import sys
from pathlib import Path

sys.path.insert(
    0, str(Path(__file__).resolve().parent.parent)
)  # as for train.py: this checkout's moai, installed or not

from moai.tokenizers.train import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
