"""The guides' pipeline: load_dataset, filter, map(tokenize), map(group), save_to_disk. Runs in moai's own environment.

    python guides.py DATA.jsonl OUT TOKENIZER SEQ_LEN NUM_PROC

The rows are in OUT/saved; OUT/rest is the cache it leaves behind.
"""

import sys

from datasets import load_dataset
from transformers import PreTrainedTokenizerFast

if __name__ == "__main__":
    data, out = sys.argv[1:3]
    tokenizer = PreTrainedTokenizerFast.from_pretrained(sys.argv[3])
    seq_len, processes = int(sys.argv[4]), int(sys.argv[5])
    rows = load_dataset("json", data_files=data, split="train", cache_dir=out + "/rest")
    rows = rows.filter(
        lambda batch: [len(text.strip()) > 0 for text in batch["text"]], batched=True, num_proc=processes
    )

    def encode(batch):
        return {
            "input_ids": [
                [*ids, tokenizer.eos_token_id]
                for ids in tokenizer(batch["text"], return_attention_mask=False)["input_ids"]
            ]
        }

    def group(batch):
        ids = [i for row in batch["input_ids"] for i in row]
        return {"input_ids": [ids[at : at + seq_len] for at in range(0, len(ids), seq_len)]}

    rows = rows.map(
        encode,
        batched=True,
        batch_size=10000,
        writer_batch_size=50000,
        num_proc=processes,
        remove_columns=rows.column_names,
    )
    rows = rows.map(group, batched=True, batch_size=10000, writer_batch_size=50000, num_proc=processes)
    rows.save_to_disk(out + "/saved", num_proc=processes)
