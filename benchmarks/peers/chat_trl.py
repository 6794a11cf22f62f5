"""Conversations as TRL's SFTTrainer prepares them (its own method, with assistant_only_loss), saved.

python chat_trl.py DATA.jsonl OUT TOKENIZER TEMPLATE
"""

import sys
from pathlib import Path
from types import SimpleNamespace

from datasets import load_dataset
from transformers import PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

if __name__ == "__main__":
    data, out, path, template = sys.argv[1:5]
    tokenizer = PreTrainedTokenizerFast.from_pretrained(path)
    tokenizer.chat_template = Path(template).read_text()
    rows = load_dataset("json", data_files=data, split="train", cache_dir=out + "/rest")
    config = SFTConfig(output_dir=out + "/run", assistant_only_loss=True, max_length=None, report_to=[], use_cpu=True)
    # The method reads these of its trainer; a whole one would want a model.
    trainer = SimpleNamespace(_is_vlm=False, chat_template=None, _tokenize=None, tools=None)
    trainer._tokenize = SFTTrainer._tokenize.__get__(trainer) if hasattr(SFTTrainer, "_tokenize") else None
    rows = SFTTrainer._prepare_dataset(trainer, rows, tokenizer, config, False, None, "train")
    rows.save_to_disk(out + "/saved")
