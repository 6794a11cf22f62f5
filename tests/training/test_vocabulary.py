"""A saved model goes on with a tokenizer of more ids: what it knew is unchanged, what is new begins near the mean."""

import json
import logging

import pytest
import tiny_run
import torch

from moai.core.errors import ConfigError
from moai.training.model import build_model, check_early, check_fit, load_config
from moai.training.vocabulary import warn_of_moved_ids

SETTINGS = {"attention": "sdpa", "special_ids": {}, "seed": 5}


def saved(folder, **changes):
    config = load_config(str(tiny_run.write_model_config(folder, initializer_range=0.2, **changes)), None)
    build_model(config, pretrained_model=None, **SETTINGS).save_pretrained(folder / "saved")
    return folder / "saved"


def opened(directory, ids):
    return build_model(load_config(None, str(directory)), pretrained_model=str(directory), ids=ids, **SETTINGS).eval()


@pytest.mark.parametrize("tied", [True, False])
def test_new_rows_are_near_the_mean_and_old_ids_keep_their_logits(tied, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    directory = saved(tmp_path, tie_word_embeddings=tied)
    before, after = opened(directory, ids=300), opened(directory, ids=310)
    assert (before.config.vocab_size, after.config.vocab_size) == (300, 310)
    ids = torch.tensor([[3, 141, 59, 26]])
    with torch.no_grad():
        old, new = before(input_ids=ids).logits, after(input_ids=ids).logits
    assert new.shape[-1] == 310
    torch.testing.assert_close(new[..., :300], old, atol=1e-6, rtol=0)
    assert new[..., 300:].max() < old.max(), "a token that nobody has seen is not the likeliest"
    for layer in {id(layer): layer for layer in (after.get_input_embeddings(), after.get_output_embeddings())}.values():
        rows = layer.weight.detach()
        assert torch.isfinite(rows).all()
        assert (rows[300:] - rows[:300].mean(0)).abs().max() < 0.05 * rows[:300].std()
    assert (after.get_output_embeddings().weight is after.get_input_embeddings().weight) == tied
    assert "Vocabulary: 300 -> 310 ids; 10 new rows of the embeddings" in caplog.text
    with torch.no_grad():
        after(input_ids=torch.tensor([[305, 3]]))


def test_a_padded_vocabulary_stays_as_it_is(tmp_path):
    assert opened(saved(tmp_path), ids=258).config.vocab_size == 300


def test_new_rows_are_the_same_whatever_was_drawn_before(tmp_path):
    """As in every rank."""
    directory = saved(tmp_path)
    first = opened(directory, 310).get_input_embeddings().weight
    torch.randn(7)
    assert torch.equal(first, opened(directory, 310).get_input_embeddings().weight)


def test_only_a_saved_model_may_be_smaller_than_the_tokenizer(tmp_path):
    directory = saved(tmp_path)
    config = load_config(None, str(directory))
    check_fit(config, ids=310, seq_len=64, pretrained=True)
    check_early(model_config=None, pretrained_model=str(directory), vocab_size=310, seq_len=64)
    with pytest.raises(ConfigError, match="vocab_size 300 is below the 310 ids"):
        check_fit(config, ids=310, seq_len=64)
    with pytest.raises(ConfigError, match="--seq_len 65 is above"):
        check_fit(config, ids=310, seq_len=65, pretrained=True)


def test_a_tokenizer_that_moves_old_ids_is_said(tmp_path, caplog):
    from transformers import PreTrainedTokenizerFast

    folder = tiny_run.write_tokenizer(tmp_path / "old")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(str(folder))
    tokenizer.add_tokens(["<new>"])
    assert warn_of_moved_ids(folder, tokenizer) == 0
    fields = json.loads((folder / "tokenizer.json").read_text())
    vocab = fields["model"]["vocab"]
    first, second = list(vocab)[:2]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    (folder / "tokenizer.json").write_text(json.dumps(fields))
    assert warn_of_moved_ids(folder, tokenizer) == 2
    assert "2 of its 258 tokens have another id" in caplog.text
