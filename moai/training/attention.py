"""Which attention a run computes with, and why.

All of them get documents that share a row from the positions alone (training/packed_attention.py proves it on the
model):

    sdpa, eager, flex    a block-diagonal mask; sdpa and eager hold it as a matrix of seq_len x seq_len a row, flex as a
                         table of blocks
    flash                the lengths of the documents (`cu_seqlens`), all of a batch in one row without padding

flex trains on GPUs only: torch compiles its forward pass for the CPU, and has no backward pass there.
"""

from __future__ import annotations

from typing import Any

from moai.core.config import Setting
from moai.core.errors import ConfigError

FLASH = "flash_attention_2"
_NAMES = {"sdpa": "sdpa", "eager": "eager", "flex": "flex_attention", "flash": FLASH}
"""Our names and transformers'."""
_SUPPORT = {"sdpa": "_supports_sdpa", "flex": "_supports_flex_attn", "flash": "_supports_flash_attn"}
"""What a model's class says of itself; eager is in all of them."""


def choose_attention(wish: str, architecture: Any, *, on_gpu: bool, half: bool) -> Setting:
    """transformers' name of the attention, with the reason; another than the wish only for auto, and for flash where it
    cannot run.

    architecture  the model's class
    half          whether the run computes in 16 bits, which is all that flash attention does
    Raises ConfigError for an attention that this model does not have, or cannot train with here.
    """
    if wish in ("auto", "flash"):
        lacking = _flash_lacks(architecture, on_gpu=on_gpu, half=half)
        if not lacking:
            return Setting(FLASH, "set" if wish == "flash" else "fastest for packed rows")
        instead = "sdpa" if _has(architecture, "sdpa") else "eager"
        return Setting(instead, lacking)
    if not _has(architecture, wish):
        there = ", ".join(name for name in _NAMES if _has(architecture, name))
        raise ConfigError(f"--attention {wish}: {architecture.__name__} does not have it; choose from {there}")
    if wish == "flex" and not on_gpu:
        raise ConfigError(
            "--attention flex: torch has no backward pass of it on the CPU, so it trains on GPUs only; use --attention "
            "sdpa here"
        )
    return Setting(_NAMES[wish], "set")


def _flash_lacks(architecture: Any, *, on_gpu: bool, half: bool) -> str:
    """What keeps this run from flash attention, or nothing."""
    from transformers.utils.import_utils import is_flash_attn_2_available

    if not on_gpu:
        return "flash attention needs a GPU"
    if not is_flash_attn_2_available():
        return "flash attention needs the package flash-attn, which is not installed"
    if not half:
        return "flash attention computes in 16 bits: set --bf16"
    return "" if _has(architecture, "flash") else f"{architecture.__name__} has no flash attention"


def _has(architecture: Any, name: str) -> bool:
    return name not in _SUPPORT or bool(getattr(architecture, _SUPPORT[name], False))
