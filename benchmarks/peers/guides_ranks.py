"""The guides' pipeline as they launch it: rank 0 prepares while the others wait in a barrier; then all load.

torchrun --nproc_per_node 2 guides_ranks.py DATA.jsonl OUT TOKENIZER SEQ_LEN NUM_PROC
"""

import runpy
import sys
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

if __name__ == "__main__":
    dist.init_process_group("gloo", timeout=timedelta(hours=1))  # the default of half an hour is what ends long ones
    if dist.get_rank() == 0:
        runpy.run_path(str(Path(__file__).with_name("guides.py")), run_name="__main__")
    dist.barrier()
    from datasets import load_from_disk

    rows = load_from_disk(sys.argv[2] + "/saved")
    print(f"rank {dist.get_rank()}: {len(rows):,} rows", flush=True)
    dist.destroy_process_group()
