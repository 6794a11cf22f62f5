"""Models by size, and what a run of one costs.

    --model_size 124m                                  # instead of a JSON file; the vocabulary is the tokenizer's
    fields("124m", vocab_size=32_000, seq_len=1024)    # the JSON's fields

Shapes are published ones; every block is moai's (RMSNorm, grouped-query attention with QK norm, SwiGLU, RoPE), so the
parameters differ from the model a shape is named after. SwiGLU layers are 8/3 as wide as the model, not 4 times
(Shazeer 2020, arXiv:2002.05202), where the shape comes from a model without.
"""

from __future__ import annotations

import time
from typing import Any, NamedTuple


class Shape(NamedTuple):
    """Of a decoder, in the words of transformers' configurations."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int
    tie_word_embeddings: bool
    of: str


SHAPES = {
    "10m": Shape(256, 6, 8, 8, 704, True, "Pythia-31M, arXiv:2304.01373"),
    "124m": Shape(768, 12, 12, 12, 2048, True, "GPT-2 small"),
    "350m": Shape(1024, 24, 16, 16, 2816, True, "GPT-2 medium"),
    "1b": Shape(2048, 16, 32, 8, 8192, True, "Llama 3.2 1B"),
    "2b": Shape(3840, 14, 30, 5, 10240, False, "configs/model_config_2b.json"),
    "5b": Shape(3840, 28, 30, 5, 10240, False, "configs/model_config_5b.json"),
}
SIZES = tuple(SHAPES)

_POSITIONS = 32_768
_VOCABULARY_MULTIPLE = 64
"""A vocabulary of whole tiles makes the last matrix product faster on GPUs (nanoGPT pads GPT-2's 50,257 to 50,304)."""
_OPTIMAL_TOKENS = 20
"""Tokens a parameter of a compute-optimal model (Hoffmann et al. 2022, arXiv:2203.15556)."""
_USEFUL_PASSES = 4
"""Up to here repeated tokens are worth almost as much as new ones (Muennighoff et al. 2023, arXiv:2305.16264)."""
_REACHED = 0.5
"""Share of a large matrix product's speed that training is assumed to reach."""


def fields(size: str, *, vocab_size: int, seq_len: int) -> dict[str, Any]:
    """The JSON of a model of one of SIZES, for a tokenizer of `vocab_size` ids and rows of `seq_len`."""
    shape = SHAPES[size]._asdict()
    del shape["of"]
    whole = -(-vocab_size // _VOCABULARY_MULTIPLE) * _VOCABULARY_MULTIPLE
    return {**shape, "vocab_size": whole, "max_position_embeddings": max(_POSITIONS, seq_len)}


def budget(*, parameters: int, tokens: int, distinct_tokens: int, flops_per_second: float) -> str:
    """A run in one line: tokens a parameter beside the optimum, passes over the data, hours.

    parameters        without the input embeddings: what 6 FLOPs a token and parameter are counted of (Kaplan et al.
                      2020, arXiv:2001.08361)
    tokens            of the whole run
    distinct_tokens   in the data
    flops_per_second  of a matrix product, over all ranks
    """
    passes = tokens / max(1, distinct_tokens)
    hours = 6 * parameters * tokens / max(1.0, flops_per_second * _REACHED) / 3600
    optimum = _OPTIMAL_TOKENS * parameters
    line = (
        f"{_short(tokens)} tokens, {tokens / parameters:.1f} a parameter (compute-optimal is about {_OPTIMAL_TOKENS}: "
        f"{_short(optimum)}), {passes:.1f} passes over the data, roughly {_hours(hours)} here"
    )
    if passes > _USEFUL_PASSES:
        line += f"; beyond {_USEFUL_PASSES} passes repeated tokens add little: more data would add more"
    return line


def matrix_flops(device: Any, dtype: Any, *, size: int = 1024, seconds: float = 0.1) -> float:
    """FLOPs a second that a product of two square matrices reaches on `device` now."""
    import torch

    left, right = (torch.ones(size, size, device=device, dtype=dtype) for _ in range(2))
    done, began = 0, 0.0
    while not done or time.monotonic() - began < seconds:
        (left @ right)[0, 0].item()  # waits for the device
        began = began or time.monotonic()  # the first product warms up
        done += 1
    return (done - 1 or 1) * 2 * size**3 / max(time.monotonic() - began, 1e-9)


def _short(number: float) -> str:
    for unit, name in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= unit:
            return f"{number / unit:.1f} {name}"
    return f"{number:.0f}"


def _hours(hours: float) -> str:
    if hours >= 1:
        return f"{hours:,.1f} hours"
    return f"{hours * 60:.0f} minutes" if hours * 60 >= 2 else "a minute or less"
