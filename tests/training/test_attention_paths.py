"""Every way to compute attention keeps documents apart, on the architectures people train; those that cannot are
caught.
"""

import contextlib
import json

import pytest
import torch
from tiny_run import write_model_config

from moai.core.errors import ConfigError, MoaiError
from moai.prepared.rows import Row
from moai.training.attention import FLASH, choose_attention
from moai.training.data import IGNORE, PackedCollator
from moai.training.model import architecture, build_model, load_config
from moai.training.packed_attention import TOLERANCE, packed_forward_selfcheck

ROWS = [[[5, 6, 7, 8, 9], [40], [12, 13, 14]], [[20, 21, 22, 23]]]
COLLATOR = PackedCollator(pad_id=257)
BASE = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
HONEST = {
    "llama": {},
    "mistral": {"num_key_value_heads": 2, "sliding_window": None},
    "gpt_neox": {},
    "qwen2": {"num_key_value_heads": 2},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
}
LEAKING = {
    "falcon": {"alibi": False},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "bloom": {"n_head": 4, "n_layer": 2},
    "mamba": {"state_size": 4},
}


def model_of(kind, attention, tmp_path, **changes):
    if kind == "moai":
        path = write_model_config(tmp_path, initializer_range=0.2)
    else:
        path = tmp_path / "model.json"
        path.write_text(
            json.dumps({**BASE, **HONEST.get(kind, {}), **LEAKING.get(kind, {}), **changes, "model_type": kind})
        )
    return build_model(
        load_config(str(path), None), pretrained_model=None, attention=attention, special_ids={}, seed=1
    ).eval()


FLEX = [
    pytest.param("flex_attention", kind, marks=[] if kind in ("moai", "gpt2") else pytest.mark.long)
    for kind in ("moai", *HONEST)
]  # compiled: seconds each


@pytest.mark.filterwarnings("ignore")  # of torch about itself, while it compiles flex
@pytest.mark.parametrize(
    ("attention", "kind"),
    [*((attention, kind) for attention in ("sdpa", "eager") for kind in ("moai", *HONEST)), *FLEX],
)
def test_packed_documents_give_the_logits_they_give_alone(kind, attention, tmp_path):
    if (kind, attention) == ("gpt2", "flex_attention"):
        with pytest.raises(ConfigError, match="does not have it; choose from sdpa, eager"):
            choose_attention("flex", architecture(model_of(kind, "sdpa", tmp_path).config), on_gpu=True, half=True)
        return
    model = model_of(kind, attention, tmp_path)
    batch = COLLATOR([Row.of(pieces) for pieces in ROWS])
    batch.pop("labels")
    with torch.no_grad():
        packed = model(**batch).logits
        for row, pieces in enumerate(ROWS):
            start = 0
            for piece in pieces:
                alone = model(input_ids=torch.tensor([piece])).logits[0]
                torch.testing.assert_close(packed[row, start : start + len(piece)], alone, atol=1e-5, rtol=0)
                start += len(piece)
    assert model.config._attn_implementation == attention
    if attention != "flex_attention":  # which compiles anew for every length
        assert packed_forward_selfcheck(model, COLLATOR) < TOLERANCE["float32"] / 10


@pytest.mark.parametrize("kind", LEAKING)
def test_an_architecture_that_does_not_look_at_positions_is_caught(kind, tmp_path):
    with pytest.raises(MoaiError, match="attention leaks across documents"):
        packed_forward_selfcheck(model_of(kind, "eager", tmp_path), COLLATOR)


@pytest.mark.parametrize("recomputed", [False, True], ids=["", "gradient checkpointing"])
@pytest.mark.parametrize(
    ("attention", "autocast"),
    [("sdpa", None), ("eager", None), ("sdpa", torch.bfloat16)],
    ids=["sdpa", "eager", "sdpa bf16"],
)
@pytest.mark.parametrize("kind", ["moai", "gpt_neox"])
def test_a_batch_has_the_gradients_of_its_documents_alone(kind, attention, autocast, recomputed, tmp_path):
    """No target crosses a boundary, no padding is learned from, every other token counts once."""
    model = model_of(kind, attention, tmp_path).train()  # these have no dropout
    if recomputed:
        model.activation_checkpointing_enable({"use_reentrant": False})
    batch = COLLATOR([Row.of(pieces) for pieces in ROWS])
    targets = int((batch["labels"] != IGNORE).sum())
    assert targets == sum(len(piece) - 1 for row in ROWS for piece in row)
    context = torch.autocast("cpu", dtype=autocast) if autocast else contextlib.nullcontext()
    with context:
        loss = model(**batch, num_items_in_batch=targets).loss
    loss.backward()
    packed = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    for piece in (piece for row in ROWS for piece in row if len(piece) > 1):
        with context:
            logits = model(input_ids=torch.tensor([piece])).logits[0].float()
        (torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(piece[1:]), reduction="sum") / targets).backward()
    largest = max(float(parameter.grad.abs().max()) for parameter in model.parameters())
    assert largest > 1e-2
    for name, parameter in model.named_parameters():
        difference = float((packed[name] - parameter.grad).abs().max()) / largest
        assert difference < (3e-2 if autocast else 1e-5), name


def test_what_is_chosen_and_why(tmp_path):
    qwen = architecture(model_of("moai", "sdpa", tmp_path).config)
    assert choose_attention("auto", qwen, on_gpu=False, half=True).value == "sdpa"
    asked = choose_attention("flash", qwen, on_gpu=False, half=True)
    assert (asked.value, asked.reason) == ("sdpa", "flash attention needs a GPU")
    assert choose_attention("eager", qwen, on_gpu=False, half=False).value == "eager"
    assert choose_attention("flex", qwen, on_gpu=True, half=False).value == "flex_attention"
    bloom = architecture(model_of("bloom", "eager", tmp_path).config)
    assert choose_attention("auto", bloom, on_gpu=False, half=False).value == "eager"
    with pytest.raises(ConfigError, match="no backward pass of it on the CPU"):
        choose_attention("flex", qwen, on_gpu=False, half=False)


def test_flash_is_taken_where_it_can_run(tmp_path, monkeypatch):
    from transformers.utils import import_utils

    qwen = architecture(model_of("moai", "sdpa", tmp_path).config)
    monkeypatch.setattr(import_utils, "is_flash_attn_2_available", lambda: True)  # there is no GPU to install it for
    assert choose_attention("auto", qwen, on_gpu=True, half=True).value == FLASH
    in_32_bits = choose_attention("flash", qwen, on_gpu=True, half=False)
    assert (in_32_bits.value, in_32_bits.reason) == ("sdpa", "flash attention computes in 16 bits: set --bf16")


@pytest.mark.filterwarnings("ignore")  # of torch about itself, while it compiles flex
def test_flex_has_no_backward_pass_on_the_cpu(tmp_path):
    """Why it is refused. When this fails, torch has one, and the refusal can go."""
    model = model_of("moai", "flex_attention", tmp_path).train()
    batch = COLLATOR([Row.of(ROWS[0])])
    with pytest.raises(NotImplementedError, match="does not support backward on CPU"):
        model(**batch).loss.backward()
