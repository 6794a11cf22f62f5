"""See moai/doctor/reembedding.py:  python scripts/check_pytorch_threads.py --help"""

import sys
from pathlib import Path

sys.path.insert(
    0, str(Path(__file__).resolve().parent.parent)
)  # as for train.py: this checkout's moai, installed or not

from moai.doctor.reembedding import threads
from moai.reembedding.monitor import run

if __name__ == "__main__":
    sys.exit(run(threads, "check_pytorch_threads.py"))
