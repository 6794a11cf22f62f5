"""Check tokenizer, cores, memory, disk, locks and environment on this machine: see moai/doctor."""

import os
import sys

from moai.doctor import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], os.environ))
