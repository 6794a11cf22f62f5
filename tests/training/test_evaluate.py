"""What held-out rows are scored: against a plain loop over documents, against bytes counted by hand, and the same for
any number of ranks.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_run import write_model_config

from moai.cli import main as moai
from moai.core.distributed import ranks
from moai.prepared.manifest import Prepared
from moai.prepared.rows import PackedRows
from moai.tokenizers.load import load_file
from moai.training.data import PackedCollator
from moai.training.evaluate import ALL, HeldOut, Score, evaluate, log_figures
from moai.training.model import build_model, load_config
from moai.training.token_bytes import TokenBytes

ROOT = Path(__file__).parents[2]
ALONE = ranks({})


@pytest.fixture
def held_out(tmp_path: Path, prepare: Callable[..., Prepared]) -> Prepared:
    """Two sources of short whole documents, several to a row."""
    for name, text in (
        ("ko", "한국어 문서 {} 번째 이야기입니다. "),
        ("en", "The story of document number {}, told in English. "),
    ):
        lines = [
            json.dumps({"text": text.format(number) * (number % 3 + 1)}, ensure_ascii=False) for number in range(30)
        ]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return prepare(tmp_path / "ko.jsonl", tmp_path / "en.jsonl", seq_len=128, packing="bfd")


@pytest.fixture
def model(tmp_path: Path) -> Any:
    config = load_config(str(write_model_config(tmp_path, vocab_size=8192, max_position_embeddings=128)), None)
    built = build_model(
        config, pretrained_model=None, attention="sdpa", special_ids={"eos_token_id": 0}, seed=7, device="cpu"
    )
    return built.train()


def score(model: Any, prepared: Prepared, *, limit: int | None = None, batch_size: int = 4) -> dict[str, Score]:
    bytes_of = TokenBytes(load_file(prepared.path / "tokenizer.json"))
    rows = HeldOut.of(prepared, limit=limit)
    return evaluate(model, rows, PackedCollator(pad_id=0), bytes_of, ALONE, batch_size=batch_size, device="cpu")


def documents(prepared: Prepared, source: str) -> list[list[int]]:
    rows = PackedRows.of(prepared)
    numbers = HeldOut.of(prepared).sources[source]
    return [
        part.tolist()
        for row in rows.__getitems__(numbers)
        for part in np.split(row.input_ids, np.cumsum(row.seq_lengths)[:-1])
    ]


def test_scores_are_those_of_a_plain_loop_over_single_documents(held_out: Prepared, model: Any) -> None:
    scores = score(model, held_out)
    tokenizer = load_file(held_out.path / "tokenizer.json")
    model.eval()
    for name in ("ko.jsonl", "en.jsonl"):
        nll, tokens, text_bytes = 0.0, 0, 0
        for ids in documents(held_out, name):
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([ids])).logits[0].double()
            nll -= float(logits.log_softmax(-1)[range(len(ids) - 1), ids[1:]].sum())
            tokens += len(ids) - 1
            text = tokenizer.decode(ids, skip_special_tokens=True).encode()
            first = tokenizer.decode(ids[:1]).encode()
            assert text.startswith(first)  # no character of these documents begins with half a token
            text_bytes += len(text) - len(first)
        assert (scores[name].tokens, scores[name].text_bytes) == (tokens, text_bytes)
        assert scores[name].nll == pytest.approx(nll, rel=1e-6)
        assert scores[name].bits_per_byte == pytest.approx(nll / math.log(2) / text_bytes, rel=1e-6)
    assert scores[ALL].nll == scores["ko.jsonl"].nll + scores["en.jsonl"].nll
    assert log_figures(scores)["eval_ko.jsonl_bits_per_byte"] == round(scores["ko.jsonl"].bits_per_byte, 6)


def test_a_model_that_knows_nothing_costs_the_bits_of_a_uniform_choice() -> None:
    """By hand: 10 tokens of 8 equally likely ids cost 30 bits; over 15 bytes that is 2 bits a byte."""
    found = Score(rows=1, tokens=10, text_bytes=15, nll=10 * math.log(8))
    assert found.bits_per_byte == pytest.approx(2.0)
    assert found.perplexity == pytest.approx(8.0)


def test_the_limit_takes_the_first_rows_of_each_source(held_out: Prepared, model: Any) -> None:
    every = HeldOut.of(held_out)
    some = HeldOut.of(held_out, limit=2)
    assert min(map(len, every.sources.values())) > 2
    assert some.sources == {name: rows[:2] for name, rows in every.sources.items()}
    assert score(model, held_out, limit=2)[ALL].rows == 4


def test_training_does_not_notice(held_out: Prepared, model: Any) -> None:
    """Neither the random state nor the mode of the model nor its gradients."""
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    score(model, held_out)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]
    assert model.training
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


DRIVER = """
import json, os, sys, torch
from pathlib import Path
from moai.core.distributed import Ranks
from moai.prepared.manifest import Prepared
from moai.tokenizers.load import load_file
from moai.training.data import PackedCollator
from moai.training.evaluate import HeldOut, evaluate
from moai.training.token_bytes import TokenBytes
from transformers import AutoModelForCausalLM

path, rank, found = Path(sys.argv[1]), int(sys.argv[4]), {}
torch.set_num_threads(1)
prepared, model = Prepared.open(path), AutoModelForCausalLM.from_pretrained(sys.argv[2])
for world in (3, 2, 1):
    if rank < world:
        store = f"file://{sys.argv[3]}{world}"
        torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
        here = Ranks(rank=rank, local_rank=rank, world_size=world, local_world_size=world)
        bytes_of = TokenBytes(load_file(path / "tokenizer.json"))
        collator = PackedCollator(pad_id=0)
        scores = evaluate(model, HeldOut.of(prepared), collator, bytes_of, here, batch_size=3, device="cpu")
        found[world] = {name: score.figures() for name, score in scores.items()}
        torch.distributed.destroy_process_group()
print(json.dumps(found), flush=True)
os._exit(0)
"""


@pytest.mark.long
def test_any_number_of_ranks_gives_the_same_sums(held_out: Prepared, model: Any, tmp_path: Path) -> None:
    """Also where the batches do not go evenly among the ranks; of two, test_seeing.py shows it. Three processes are a
    group of three, then two of them are one, then one.
    """
    model.save_pretrained(tmp_path / "model")
    batches = len(HeldOut.of(held_out).batches(3))
    assert batches % 2 > 0
    assert batches % 3 > 0
    command = [sys.executable, "-c", DRIVER, held_out.path, tmp_path / "model", tmp_path / "store"]
    started = [
        subprocess.Popen([*map(str, command), str(rank)], stdout=subprocess.PIPE, text=True, cwd=ROOT)
        for rank in range(3)
    ]
    found = [
        (world, scores)
        for process in started
        for world, scores in json.loads(process.communicate(timeout=120)[0]).items()
    ]
    assert sorted(world for world, _ in found) == ["1", "2", "2", "3", "3", "3"]
    alone = next(scores for world, scores in found if world == "1")
    for _, scores in found:
        for name, figures in alone.items():
            assert scores[name] == pytest.approx(figures, rel=1e-12)
    assert alone["all sources"]["rows"] == held_out.content["rows"]


def test_bytes_of_a_tokenizer_that_is_not_byte_level_are_those_of_the_text() -> None:
    """Metaspace and single bytes for what the vocabulary lacks, as SentencePiece's models have them."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    letters = ["▁", "한", "국", "어", "▁한", "a", "b", "▁a"]
    pieces = [
        ("<unk>", -20.0),
        *[(f"<0x{byte:02X}>", -9.0) for byte in range(256)],
        *[(letter, -1.0 - number / 10) for number, letter in enumerate(letters)],
    ]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken("<eos>", special=True)])
    text = "한국어 ab 한강 a"  # "강" is in the vocabulary as bytes only
    ids = np.array([[*tokenizer.encode(text, add_special_tokens=False).ids, tokenizer.token_to_id("<eos>")]])
    assert tokenizer.decode(ids[0].tolist(), skip_special_tokens=True) == text
    predicted = np.ones(ids.shape, bool)
    predicted[:, 0] = False
    bytes_of = TokenBytes(tokenizer)
    assert bytes_of(ids, predicted) == len(text.encode()) - len("한".encode())
    middle = np.zeros(ids.shape, bool)
    middle[0, 1:3] = True  # two runs, as of what an assistant says
    middle[0, 4:6] = True
    pair = tokenizer.decode(ids[0, 3:6].tolist()), tokenizer.decode(ids[0, 3:4].tolist())
    assert bytes_of(ids, middle) == len("국어".encode()) + len(pair[0].encode()) - len(pair[1].encode())


def test_the_command_prints_a_table_and_json(
    held_out: Prepared, model: Any, tmp_path: Path, run_moai: Callable[..., Any]
) -> None:
    model.save_pretrained(tmp_path / "run" / "final_model")
    done = run_moai("evaluate", "--model", tmp_path / "run", "--data", held_out.path, "--use_cpu")
    out = done.stdout
    assert done.returncode == 0, done.stderr
    assert "%|" not in done.stderr, "no bars"
    written = json.loads(out.splitlines()[-1])
    assert " ".join(out.splitlines()[0].split()) == "source rows tokens text bytes loss perplexity bits/byte"
    assert f"{written['scores']['ko.jsonl']['bits_per_byte']:.4f}" in out
    assert written["scores"][ALL]["nll"] == pytest.approx(score(model, held_out, batch_size=8)[ALL].nll, rel=1e-6)


@pytest.mark.parametrize(
    ("flags", "code", "said"),
    [
        ("--model nowhere --data {data}", 2, "--model nowhere"),
        ("--model {model}", 2, "--data"),
        ("--model {data} --data {data}", 65, "--model {data}"),
    ],
)
def test_what_cannot_be_evaluated_is_one_line(
    flags: str, code: int, said: str, held_out: Prepared, model: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model.save_pretrained(tmp_path / "model")
    names = {"data": str(held_out.path), "model": str(tmp_path / "model")}
    capsys.readouterr()
    assert moai(["evaluate", *flags.format(**names).split()]) == code
    error = capsys.readouterr().err
    assert said.format(**names) in error
    assert len(error.strip().splitlines()) == 1
