"""Conversations as users prepare them: datasets.map over batches with apply_chat_template and its mask, save_to_disk.

python chat_map.py DATA.jsonl OUT TOKENIZER TEMPLATE
"""

import sys
from pathlib import Path

from datasets import load_dataset
from transformers import PreTrainedTokenizerFast

if __name__ == "__main__":
    data, out, path, template = sys.argv[1:5]
    tokenizer = PreTrainedTokenizerFast.from_pretrained(path)
    tokenizer.chat_template = Path(template).read_text()
    rows = load_dataset("json", data_files=data, split="train", cache_dir=out + "/rest")

    def encode(batch):
        made = tokenizer.apply_chat_template(
            batch["messages"], tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        return {"input_ids": made["input_ids"], "assistant_masks": made["assistant_masks"]}

    rows = rows.map(encode, batched=True, batch_size=1000, remove_columns=rows.column_names)
    rows.save_to_disk(out + "/saved")
