"""Documents in one row never see one another: proved on real models, and the proof is shown to fail where they do."""

import math
from dataclasses import dataclass

import pytest
import torch
from tiny_run import write_model_config

from moai.core.errors import MoaiError
from moai.prepared.rows import Row
from moai.training.data import IGNORE, PackedCollator
from moai.training.model import build_model, load_config
from moai.training.packed_attention import TOLERANCE, packed_forward_selfcheck

ROWS = [[[5, 6, 7, 8, 9], [40], [12, 13, 14]], [[20, 21, 22, 23]]]
COLLATOR = PackedCollator(pad_id=257)


def model_with(attention, tmp_path, **changes):
    config = load_config(str(write_model_config(tmp_path, initializer_range=0.2, **changes)), None)
    return build_model(config, pretrained_model=None, attention=attention, special_ids={}, seed=1).eval()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "collator",
    [COLLATOR, PackedCollator(pad_id=257, pad_to=32), PackedCollator(pad_id=257, flatten=True)],
    ids=["padded", "fixed width", "flat"],
)
def test_packed_documents_give_the_logits_they_give_alone(attention, collator, tmp_path):
    difference = packed_forward_selfcheck(model_with(attention, tmp_path), collator)
    assert 0 <= difference < TOLERANCE["float32"] / 10


def test_every_attention_of_a_llama_like_configuration_of_transformers_too(tmp_path):
    (tmp_path / "llama.json").write_text(
        '{"model_type": "llama", "vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": '
        '2, "num_attention_heads": 4}'
    )
    model = build_model(
        load_config(str(tmp_path / "llama.json"), None), pretrained_model=None, attention="sdpa", special_ids={}, seed=1
    )
    assert type(model).__name__ == "LlamaForCausalLM"
    assert packed_forward_selfcheck(model, COLLATOR) < TOLERANCE["float32"] / 10
    assert model.training, "the check leaves the model as it found it"


def test_dropout_is_off_during_the_check_and_on_again_after(tmp_path):
    model = model_with("sdpa", tmp_path, attention_dropout=0.5).train()
    assert packed_forward_selfcheck(model, COLLATOR) < TOLERANCE["float32"] / 10
    assert model.training


def test_bfloat16_is_checked_by_its_own_tolerance(tmp_path):
    difference = packed_forward_selfcheck(model_with("sdpa", tmp_path), COLLATOR, autocast=torch.bfloat16)
    assert TOLERANCE["float32"] < difference < TOLERANCE["bfloat16"]


@dataclass(frozen=True, kw_only=True)
class Masked(PackedCollator):
    """What most training loops do: a mask of ones beside the rows, which switches the detection of documents off."""

    def __call__(self, rows):
        batch = super().__call__(rows)
        return batch | {"attention_mask": torch.ones_like(batch["input_ids"])}


@dataclass(frozen=True, kw_only=True)
class Unbroken(PackedCollator):
    """Positions that run through the row."""

    def __call__(self, rows):
        batch = super().__call__(rows)
        return batch | {"position_ids": torch.arange(batch["input_ids"].shape[1]).expand_as(batch["input_ids"])}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "collator", [Masked(pad_id=257), Unbroken(pad_id=257)], ids=["mask of ones", "positions run on"]
)
def test_the_check_fails_when_documents_see_one_another(attention, collator, tmp_path):
    with pytest.raises(MoaiError, match=r"attention leaks across documents: .* differ by [0-9]"):
        packed_forward_selfcheck(model_with(attention, tmp_path), collator)


def test_the_check_fails_in_bfloat16_too(tmp_path):
    with pytest.raises(MoaiError, match="attention leaks across documents"):
        packed_forward_selfcheck(model_with("sdpa", tmp_path), Masked(pad_id=257), autocast=torch.bfloat16)


def test_the_check_fails_with_a_cache(tmp_path):
    model = model_with("sdpa", tmp_path)
    assert not model.config.use_cache
    model.config.use_cache = True
    with pytest.raises(MoaiError, match="attention leaks across documents"):
        packed_forward_selfcheck(model, COLLATOR)


def test_the_check_fails_when_the_model_gives_nan(tmp_path):
    model = model_with("sdpa", tmp_path)
    torch.nn.init.constant_(model.model.norm.weight, math.nan)
    with pytest.raises(MoaiError, match="differ by nan"):
        packed_forward_selfcheck(model, COLLATOR)


def test_a_batch_has_the_loss_and_the_gradients_of_its_documents_alone(tmp_path):
    """The whole chain of training: no target crosses a boundary, no padding is learned from, every other token counts
    once.
    """
    model = model_with("sdpa", tmp_path)
    batch = COLLATOR([Row.of(pieces) for pieces in ROWS])
    targets = int((batch["labels"] != IGNORE).sum())
    assert targets == sum(len(piece) - 1 for row in ROWS for piece in row)
    model(**batch, num_items_in_batch=targets).loss.backward()
    packed = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    for row in ROWS:
        for piece in row:
            logits = model(input_ids=torch.tensor([piece])).logits[0]
            if len(piece) > 1:
                (
                    torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(piece[1:]), reduction="sum") / targets
                ).backward()
    alone = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert packed.keys() == alone.keys()
    assert any(gradient.abs().max() > 1e-3 for gradient in alone.values())
    for name, gradient in alone.items():
        torch.testing.assert_close(
            packed[name], gradient, atol=1e-5, rtol=1e-3, msg=lambda text, name=name: f"{name}: {text}"
        )
