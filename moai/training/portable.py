"""A saved model that other programs read: transformers 4, vLLM and llama.cpp's converter, and other users.

    trainer._save(directory)
    make_portable(directory)              # configuration, tokenizer, permissions
    cast_weights(directory, "bfloat16")   # weights at another precision than they were trained in

transformers 5 writes what only transformers 5 reads: the base of the rotary embedding stands in `rope_parameters` alone
(an older one takes its own default without a word), the tokenizer's class is `TokenizersBackend`, and where a tokenizer
was loaded from. Weights get the permissions of a temporary file.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SAVE_DTYPES = ("float32", "bfloat16", "float16")
_OF_LOADING = ("is_local", "local_files_only", "backend")


def make_portable(directory: Path) -> None:
    """Mend what `save_pretrained` wrote into `directory`: files readable as the umask says, `use_cache` true,
    `rope_theta` and the scaling of positions beside `rope_parameters`, a tokenizer class that every version has.
    """
    config = directory / "config.json"
    mode = config.stat().st_mode  # made by open(), so as the umask says
    for path in directory.glob("*.safetensors"):
        path.chmod(mode)
    _edit(config, _config)
    _edit(directory / "tokenizer_config.json", _tokenizer)


def cast_weights(directory: Path, dtype: str) -> None:
    """Write the weights of `directory` again in `dtype`, one of SAVE_DTYPES; memory for one file of them at a time."""
    import torch
    from safetensors.torch import load_file, save_file

    wanted = getattr(torch, dtype)
    for path in sorted(directory.glob("*.safetensors")):
        weights = {
            name: value.to(wanted) if value.is_floating_point() else value for name, value in load_file(path).items()
        }
        mode = path.stat().st_mode
        save_file(weights, path, metadata={"format": "pt"})
        path.chmod(mode)
    index = directory / "model.safetensors.index.json"
    if index.exists():
        size = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
        _edit(index, lambda fields: fields["metadata"].update(total_size=size))
    _edit(directory / "config.json", lambda fields: fields.update(dtype=dtype))


def _config(fields: dict[str, Any]) -> None:
    fields["use_cache"] = True
    rope = fields.get("rope_parameters")
    if isinstance(rope, dict) and "rope_theta" in rope:
        scaling = {name: value for name, value in rope.items() if name != "rope_theta"}
        fields["rope_theta"] = rope["rope_theta"]
        if scaling.get("rope_type", "default") != "default":  # transformers 5 warns of the field
            fields["rope_scaling"] = scaling


def _tokenizer(fields: dict[str, Any]) -> None:
    for name in _OF_LOADING:
        fields.pop(name, None)
    if fields.get("tokenizer_class") == "TokenizersBackend":
        fields["tokenizer_class"] = "PreTrainedTokenizerFast"


def _edit(path: Path, change: Any) -> None:
    if path.exists():
        fields = json.loads(path.read_text(encoding="utf-8"))
        change(fields)
        path.write_text(json.dumps(fields, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
