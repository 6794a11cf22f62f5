"""Training and evaluation measure what the corpus promises: labels are asked for, names are decoded whole, antecedents
are in sight.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from coref_corpus import news, rows, wordpiece, write

from moai import coref as entity_coref
from moai.core.errors import ConfigError, DamagedError
from moai.coref import mlm_evaluate
from moai.coref.mlm import (
    Corpus,
    PadBatch,
    RandomMasking,
    check_window,
    fill,
    in_batches,
    likeliest,
    span_scores,
    with_one_mask,
)
from moai.coref.mlm_evaluate import EvaluateConfig, evaluate, lenient
from moai.coref.mlm_finetune import FinetuneConfig, finetune
from moai.coref.mlm_trainer import LikeLengths, logits_at, newest_whole
from moai.coref.options import CorefConfig

TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "relative_attention": True,
    "position_buckets": 32,
    "pos_att_type": ["p2c", "c2p"],
    "share_att_key": True,
    "norm_rel_ebd": "layer_norm",
    "position_biased_input": False,
    "type_vocab_size": 0,
    "max_position_embeddings": 64,
    "max_relative_positions": -1,
}
"""The shape of kf-deberta-base, small."""


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`corpora("span")`: the corpus of 30 documents in that mode."""
    folder = tmp_path_factory.mktemp("corpora")
    file, model = write(folder / "news.jsonl", [news(seed) for seed in range(30)]), wordpiece(folder / "wp")
    made: dict[str, Path] = {}

    def of(mode: str) -> Path:
        if mode not in made:
            config = CorefConfig(
                input=(str(file),),
                model=str(model),
                output_dir=str(folder / mode),
                mode=mode,
                seq_len=96,
                validation_ratio=0.3,
                num_workers=0,
            )
            made[mode] = entity_coref.prepare(config, origins={"num_workers": "flag"})
        return made[mode]

    return of


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory, corpora: Callable[[str], Path]) -> Path:
    """A configuration of a model that knows the corpus's vocabulary."""
    path = tmp_path_factory.mktemp("model") / "config.json"
    path.write_text(json.dumps({**TINY, "vocab_size": Corpus.open(str(corpora("span"))).tokenizer.spec.vocab_size}))
    return path


class Table:
    """A "model" whose answer at every position is a row of a table, chosen by how many masks (id 9) are left in the
    row.
    """

    device = "cpu"

    def __init__(self, *steps: dict[int, tuple[int, float]]) -> None:
        self.steps = steps

    def eval(self) -> None: ...

    def __call__(self, input_ids: Any, attention_mask: Any) -> Any:
        import torch

        logits = torch.zeros(*input_ids.shape, 10)
        for row, ids in enumerate(input_ids):
            left = int((ids == 9).sum())
            for place, (token, sureness) in self.steps[len(self.steps) - left].items() if left else ():
                logits[row, place, token] = sureness
        return type("Output", (), {"logits": logits})


def test_batches_are_as_long_as_their_longest_row() -> None:
    batch = PadBatch(pad_id=7)(
        [{"input_ids": [1, 2, 3], "labels": [-100, 5, -100]}, {"input_ids": [4] * 9, "labels": [-100] * 9}]
    )
    assert batch["input_ids"].shape == (2, 16)
    assert batch["input_ids"][0].tolist() == [1, 2, 3, *[7] * 13]
    assert batch["labels"][0].tolist() == [-100, 5, *[-100] * 14]
    assert batch["attention_mask"].sum(1).tolist() == [3, 9]


def test_random_masking_never_asks_for_a_mask_that_was_there(corpora: Callable[[str], Path]) -> None:
    corpus = Corpus.open(str(corpora("text")))
    tokenizer = corpus.tokenizer
    masking = RandomMasking(
        pad=PadBatch(pad_id=0),
        mask_id=tokenizer.mask_id,
        special_ids=tokenizer.spec.special_ids,
        vocab_size=tokenizer.spec.vocab_size,
        seed=1,
    )
    samples = list(rows(corpus.path))[:4]
    asked = number = 0
    for _ in range(200):
        batch = masking(samples)
        for row, sample in enumerate(samples):
            there = sample["input_ids"].index(tokenizer.mask_id)
            assert batch["labels"][row, there] == -100  # so training on the textual form trains no coreference
            asked, number = asked + int((batch["labels"][row] != -100).sum()), number + len(sample["input_ids"])
    assert 0.13 < asked / number < 0.17


def test_the_surest_mask_is_filled_first_and_the_next_sees_it() -> None:
    # Two masks: first 1 is surer at place 2; with it filled, place 1 changes its mind from 3 to 4.
    model = Table({1: (3, 2.0), 2: (5, 4.0)}, {1: (4, 3.0)})
    batch = PadBatch(pad_id=0)(
        [
            {"input_ids": [1, 9, 9, 2], "labels": [-100, 4, 5, -100]},
            {"input_ids": [1, 6, 9, 2], "labels": [-100, -100, 4, -100]},
        ]
    )
    model_alone = Table({2: (4, 1.0)})
    assert fill(model, {name: tensor[:1] for name, tensor in batch.items()})[0, :4].tolist() == [1, 4, 5, 2]
    scores = span_scores(model, [{name: tensor[:1] for name, tensor in batch.items()}])
    assert (scores.exact, scores.spans, scores.tokens) == (1.0, 1, 2)
    uniform = np.log(np.exp(4.0) + 9)  # place 2 gives 5 a logit of 4, nine others 0
    other = np.log(np.exp(2.0) + 9)  # place 1 gives 3 a logit of 2; 4, which is right, has 0
    assert scores.nll == pytest.approx((uniform - 4.0) + other)
    assert likeliest(model_alone, {name: tensor[1:] for name, tensor in batch.items()}, 1) == [[4]]


def test_one_wrong_token_is_no_exact_match() -> None:
    model = Table({1: (3, 2.0), 2: (5, 4.0)}, {1: (3, 3.0)})
    batch = PadBatch(pad_id=0)([{"input_ids": [1, 9, 9, 2], "labels": [-100, 4, 5, -100]}])
    assert span_scores(model, [batch]).exact == 0.0


def test_one_mask_stands_for_the_whole_name(corpora: Callable[[str], Path]) -> None:
    tokenizer = Corpus.open(str(corpora("span"))).tokenizer
    sample = next(sample for sample in rows(corpora("span")) if sum(label != -100 for label in sample["labels"]) > 2)
    one = with_one_mask(sample)
    assert one["input_ids"].count(tokenizer.mask_id) == 1
    assert sum(label != -100 for label in one["labels"]) == 1
    assert [token for token in one["input_ids"] if token != tokenizer.mask_id] == [
        token for token in sample["input_ids"] if token != tokenizer.mask_id
    ]


def test_a_row_that_lost_its_antecedent_is_not_scored(corpora: Callable[[str], Path]) -> None:
    sample = next(rows(corpora("span")))
    check_window(sample)
    for change in (
        {"antecedent_begin": -3, "antecedent_end": -1},
        {"antecedent_begin": 400, "antecedent_end": 402},
        {"labels": [-100] * len(sample["labels"])},
    ):
        with pytest.raises(DamagedError, match=sample["doc_id"]):
            check_window({**sample, **change})


def test_training_on_the_labels_beats_what_it_began_with_and_is_scored(
    corpora: Callable[[str], Path], tiny: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForMaskedLM, DebertaV2Config, DebertaV2ForMaskedLM

    corpus = Corpus.open(str(corpora("span")))
    held_out = corpus.rows("validation")
    assert {sample["doc_id"] for sample in held_out}.isdisjoint(sample["doc_id"] for sample in corpus.rows("train"))
    untrained = DebertaV2ForMaskedLM(DebertaV2Config(**json.loads(tiny.read_text())))
    before = span_scores(untrained, in_batches(held_out, 8, PadBatch(pad_id=0)))
    config = FinetuneConfig(
        model_config=str(tiny),
        dataset=str(corpus.path),
        max_steps=16,
        batch_size=8,
        gradient_accumulation=1,
        lr=5e-3,
        eval_steps=16,
        output_dir=str(tmp_path),
        run_name="a",
    )
    results = finetune(config)
    assert results["spans"] == len(held_out) == before.spans > 20
    assert results["nll"] < before.nll - 2
    assert json.loads((tmp_path / "a" / "final_results.json").read_text()) == results
    assert json.loads((tmp_path / "a" / "eval_history.json").read_text())[0]["step"] == 16
    again = evaluate(
        EvaluateConfig(
            checkpoint=str(tmp_path / "a" / "final_model"),
            dataset=str(corpus.path),
            per_document=1000,
            output=str(tmp_path / "scores.json"),
        )
    )
    assert again["nll"] == pytest.approx(results["nll"], rel=1e-3)
    assert again["exact"] == results["exact"]
    assert 0 <= again["real_at_1"] <= again["real_at_5"] <= 1
    assert json.loads((tmp_path / "scores.json").read_text()) == again
    (tmp_path / "words.jsonl").write_text('{"text": "서울의 시장은 서울.", "target": "서울"}\n')
    model = AutoModelForMaskedLM.from_pretrained(tmp_path / "a" / "final_model")
    words = list(mlm_evaluate._lambada(tmp_path / "words.jsonl", corpus.tokenizer, 128))
    assert words[0][0]["input_ids"][-2:] == [corpus.tokenizer.mask_id, 3]
    assert lenient(model, corpus.tokenizer, words, 4, (1,))[1] in (0.0, 1.0)


def test_lenient_hits_are_nouns_that_equal_hold_or_are_held(corpora: Callable[[str], Path]) -> None:
    tokenizer = Corpus.open(str(corpora("span"))).tokenizer
    token = tokenizer.reference.encode_batch(["서울"])[0].tolist()

    class Always:
        device = "cpu"

        def __call__(self, input_ids: Any, attention_mask: Any) -> Any:
            import torch

            logits = torch.zeros(*input_ids.shape, tokenizer.spec.vocab_size)
            logits[..., token[0]] = 9.0
            return type("Output", (), {"logits": logits})

    row = {"input_ids": [2, tokenizer.mask_id, 3], "labels": [-100, token[0], -100]}
    for target, hit in (("서울", 1.0), ("서울시", 1.0), ("부산", 0.0)):
        assert lenient(Always(), tokenizer, [(row, target)], 1, (1,))[1] == hit
    assert not mlm_evaluate.is_noun("했다")


def test_mistakes_are_named(
    corpora: Callable[[str], Path], tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError, match="name one model"):
        finetune(FinetuneConfig(dataset="x"))
    with pytest.raises(ConfigError, match="python -m moai entity-coref"):
        finetune(FinetuneConfig(model_config=str(tiny), dataset=str(tmp_path)))
    with pytest.raises(ConfigError, match=r"mode text.*--masking random"):
        finetune(FinetuneConfig(model_config=str(tiny), dataset=str(corpora("text"))))
    (tmp_path / "small.json").write_text(json.dumps({**TINY, "vocab_size": 12}))
    with pytest.raises(ConfigError, match="vocab_size 12"):
        finetune(FinetuneConfig(model_config=str(tmp_path / "small.json"), dataset=str(corpora("span"))))
    assert mlm_evaluate.main([]) == 2
    assert "--checkpoint DIR" in capsys.readouterr().err


# --- logits where there is a label, order, resume, ranks --------------------------------------------------------------


def test_logits_at_labels_are_those_of_the_whole_row(corpora: Callable[[str], Path], tiny: Path) -> None:
    """Of every kind of head: the narrowed forward gives what the full one gives there, and the same gradients."""
    import torch
    from transformers import (
        BertConfig,
        BertForMaskedLM,
        DebertaV2Config,
        DebertaV2ForMaskedLM,
        ElectraConfig,
        ElectraForMaskedLM,
        RobertaConfig,
        RobertaForMaskedLM,
    )

    small = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    small |= {"intermediate_size": 32, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    deberta = {name: value for name, value in TINY.items() if name not in small}
    batch = {
        "input_ids": torch.randint(0, 50, (3, 8)),
        "attention_mask": torch.ones(3, 8, dtype=torch.long),
    }
    wanted = torch.zeros(3, 8, dtype=torch.bool)
    wanted[0, 2] = wanted[0, 5] = wanted[2, 1] = True
    for model in (
        BertForMaskedLM(BertConfig(**small)),
        RobertaForMaskedLM(RobertaConfig(**small)),
        ElectraForMaskedLM(ElectraConfig(**small, embedding_size=16)),
        DebertaV2ForMaskedLM(DebertaV2Config(**{**deberta, **small})),
    ):
        full = model(**batch).logits[wanted]
        narrow = logits_at(model, batch, wanted)
        assert torch.allclose(full, narrow, atol=1e-6)
        gradients = []
        for logits in (full, narrow):
            model.zero_grad()
            logits.square().sum().backward(retain_graph=True)
            gradients.append([weight.grad.clone() for weight in model.parameters() if weight.grad is not None])
        assert all(torch.allclose(one, other, atol=1e-5) for one, other in zip(*gradients, strict=True))
        assert model(**batch).logits.shape == (3, 8, 50)  # the model is as it was


def test_rows_of_like_length_stand_together_in_an_order_of_their_own() -> None:
    lengths = np.random.default_rng(1).integers(100, 1400, 4000)
    order = LikeLengths(lengths, 16, seed=3)
    first, again = list(order), list(order)
    order.set_epoch(1)
    second = list(order)
    assert first == again != second
    assert sorted(first) == sorted(second) == list(range(4000))

    def padding(rows: list[int]) -> float:
        batches = lengths[np.array(rows)].reshape(-1, 16)
        return float(batches.max(1).sum() * 16 / batches.sum()) - 1

    assert padding(first) < 0.1 < 0.5 < padding(list(range(4000)))
    longest = lengths[np.array(first)].reshape(-1, 16).max(1)
    assert abs(np.corrcoef(longest, np.arange(len(longest)))[0, 1]) < 0.2  # batches stand anywhere


def finetuned(corpus: Path, tiny: Path, output: Path, **options: Any) -> FinetuneConfig:
    usual = {"batch_size": 4, "gradient_accumulation": 2, "lr": 1e-3, "eval_steps": 2, "eval_samples": 8}
    return FinetuneConfig(
        model_config=str(tiny), dataset=str(corpus), output_dir=str(output), **{**usual, "max_steps": 4, **options}
    )


def test_a_resumed_run_ends_with_the_same_weights(
    corpora: Callable[[str], Path], tiny: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    import shutil

    from safetensors.numpy import load_file as weights

    corpus = corpora("span")
    finetune(finetuned(corpus, tiny, tmp_path / "whole"))
    whole = weights(tmp_path / "whole" / "checkpoint-4" / "model.safetensors")
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "part" / "checkpoint-2")
    shutil.copytree(tmp_path / "whole" / "checkpoint-4", tmp_path / "part" / "checkpoint-4")
    (tmp_path / "part" / "checkpoint-4" / "trainer_state.json").unlink()  # killed while it was written
    with caplog.at_level("INFO"):
        finetune(finetuned(corpus, tiny, tmp_path / "part", resume=True))
    assert "checkpoint-4: passed over, it is not whole" in caplog.text
    assert f"from {tmp_path / 'part' / 'checkpoint-2'}" in caplog.text
    again = weights(tmp_path / "part" / "checkpoint-4" / "model.safetensors")
    assert all(np.array_equal(whole[name], again[name]) for name in whole)
    assert newest_whole(tmp_path / "absent") is None


def test_the_final_model_and_its_tokenizer_open_alone(
    corpora: Callable[[str], Path], tiny: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    finetune(finetuned(corpora("span"), tiny, tmp_path, max_steps=2))
    tokenizer = AutoTokenizer.from_pretrained(str(tmp_path / "final_model"))
    assert (tokenizer.mask_token, tokenizer.pad_token, tokenizer.cls_token) == ("[MASK]", "[PAD]", "[CLS]")
    assert tokenizer.model_max_length == 96
    model = AutoModelForMaskedLM.from_pretrained(str(tmp_path / "final_model"))
    assert tokenizer("한국은행은 [MASK]", return_tensors="pt")["input_ids"].max() < model.config.vocab_size


def test_evaluation_stands_beside_its_baselines(corpora: Callable[[str], Path], tiny: Path, tmp_path: Path) -> None:
    finetune(finetuned(corpora("span"), tiny, tmp_path, max_steps=2))
    model = str(tmp_path / "final_model")
    found = evaluate(EvaluateConfig(checkpoint=model, before=model, dataset=str(corpora("span"))))
    samples = Corpus.open(str(corpora("span"))).rows("validation")
    assert found["baselines"]["before"] == found["exact"]
    assert 0 < found["baselines"]["nearest"] < 1
    assert sum(part["samples"] for part in found["by_distance"].values()) == found["spans"] <= len(samples)
    assert set(found["by_kind"]) <= {"name", "joined", "latin", "surname"}
    for parts in (found["by_kind"], found["by_distance"]):
        mean = sum(part["samples"] * part["nearest"] for part in parts.values()) / found["spans"]
        assert mean == pytest.approx(found["baselines"]["nearest"])


@pytest.mark.long
def test_two_ranks_train_as_one_does_on_twice_the_rows(
    corpora: Callable[[str], Path], tiny: Path, tmp_path: Path
) -> None:
    import subprocess
    import sys

    scores = []
    script = Path(__file__).parents[2] / "scripts" / "run_entity_coref_finetune.py"
    dropless = tmp_path / "config.json"
    dropless.write_text(
        json.dumps({**json.loads(tiny.read_text()), "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0})
    )
    for ranks in (1, 2):
        flags = [
            "--model-config",
            dropless,
            "--dataset",
            corpora("span"),
            "--output-dir",
            tmp_path / str(ranks),
            "--max-steps",
            3,
            "--batch-size",
            8 // ranks,
            "--lr",
            1e-3,
            "--eval-steps",
            3,
            "--eval-samples",
            8,
        ]
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", script]
        ended = subprocess.run([*map(str, [*command, *flags])], capture_output=True, text=True, timeout=300)
        assert ended.returncode == 0, ended.stderr[-3000:]
        assert ended.stdout.count('"masking"') == 1  # one rank speaks
        json.loads(ended.stdout)
        [first] = re.findall(r"step 1: loss ([\d.e-]+), grad_norm ([\d.e-]+)", ended.stderr)
        scores.append([float(figure) for figure in first])
    assert scores[1] == pytest.approx(scores[0], rel=2e-3)  # of the same rows, and over all ranks
