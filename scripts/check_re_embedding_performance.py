"""See moai/reembedding/monitor.py:  python scripts/check_re_embedding_performance.py --help"""

import sys
from pathlib import Path

sys.path.insert(
    0, str(Path(__file__).resolve().parent.parent)
)  # as for train.py: this checkout's moai, installed or not

from moai.reembedding.monitor import performance, run

if __name__ == "__main__":
    sys.exit(run(performance, "check_re_embedding_performance.py"))
