"""python -m moai generate: what the model would say, from a model that has learned to count, and one line for what
cannot be opened.
"""

import io
import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from tiny_training import train_here
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from moai.cli import main
from moai.core.config import resolve
from moai.core.errors import ConfigError, DamagedError
from moai.training.generate import GenerateConfig, Stream, generate, load

PROMPT = "+,-./012"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A model trained for 40 steps on counting documents, with a checkpoint."""
    return train_here(
        tmp_path_factory.mktemp("run"),
        "--max_steps",
        "40",
        "--save_steps",
        "40",
        "--learning_rate",
        "1e-2",
        "--dataloader_num_workers",
        "0",
    )


def said(run, *flags):
    out = io.StringIO()
    generate(
        resolve([GenerateConfig], ["--model", str(run), "--use_cpu", *flags], {}, prog="generate")[
            GenerateConfig
        ].require(),
        write=out.write,
    )
    return out.getvalue()


def test_greedy_is_argmax_without_a_cache(run):
    config = resolve([GenerateConfig], ["--model", str(run), "--prompt", PROMPT, "--use_cpu"], {}, prog="generate")[
        GenerateConfig
    ]
    model, tokenizer = load(config)
    ids = tokenizer(PROMPT, add_special_tokens=False)["input_ids"]
    new = []
    for _ in range(12):
        with torch.no_grad():
            new.append(int(model(input_ids=torch.tensor([ids + new]), use_cache=False).logits[0, -1].argmax()))
        if new[-1] == tokenizer.eos_token_id:
            break
    assert (
        said(run, "--prompt", PROMPT, "--temperature", "0", "--max_new_tokens", "12")
        == tokenizer.decode(new, skip_special_tokens=True) + "\n"
    )
    assert len(set(new)) > 3, "a model that says one letter for ever would prove little"


def test_a_seed_draws_the_same_again_and_each_prompt_begins_from_it(run):
    drawn = ["--temperature", "2", "--top_p", "1", "--max_new_tokens", "12"]
    alone = said(run, "--prompt", PROMPT, "--seed", "3", *drawn)
    assert said(run, "--prompt", "abc", PROMPT, "--seed", "3", *drawn).endswith(f"> {PROMPT}\n{alone}")
    assert alone != said(run, "--prompt", PROMPT, "--seed", "4", *drawn)


def test_a_prompt_may_come_from_standard_input_and_a_checkpoint_will_do(run, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(PROMPT + "\n"))
    greedy = ["--temperature", "0", "--max_new_tokens", "5"]
    assert said(run / "checkpoint-40", "--prompt", "-", *greedy) == said(run, "--prompt", PROMPT, *greedy)


def test_the_chat_template_is_used(run, tmp_path):
    folder = shutil.copytree(run / "final_model", tmp_path / "chat")
    (folder / "chat_template.jinja").write_text("{% for m in messages %}" + PROMPT[:-1] + "{{ m.content }}{% endfor %}")
    greedy = ["--temperature", "0", "--max_new_tokens", "5"]
    assert said(folder, "--chat", "--prompt", PROMPT[-1], *greedy) == said(run, "--prompt", PROMPT, *greedy)


def test_a_letter_is_written_when_all_its_bytes_are_there(run):
    tokenizer = load(
        resolve([GenerateConfig], ["--model", str(run), "--prompt", "x", "--use_cpu"], {}, prog="generate")[
            GenerateConfig
        ]
    )[1]
    pieces = []
    stream = Stream(tokenizer, pieces.append)
    stream.put(torch.tensor([[1, 2]]))  # the prompt
    for number in tokenizer("가a")["input_ids"]:
        stream.put(torch.tensor([number]))
    stream.end()
    assert [piece for piece in pieces if piece] == ["가", "a", "\n"]


TEXTS = (
    "서울은 대한민국의 수도이다. 뷁 힣 쀍, 한자 漢字도 있다.",
    "👩‍👩‍👧‍👦🏳️‍🌈 👍🏽 e\u0301 𝒳𠮷",
    "def f(x):\n    return {'a': [1, 2]}\n\n\n# 끝  ",
    "  앞과 뒤에 공백  ",
    "it 's said , don 't . \ufffd\ufffd 가",
    "",
    "한글 " * 300 + "뷁" * 300,
)


def trained(model, decoder, **before):
    """A tokenizer of 400 ids or so, which spells in bytes, pieces or letters what it has no token for."""
    tokenizer = Tokenizer(model)
    tokenizer.decoder = decoder
    for name, part in before.items():
        setattr(tokenizer, name, part)
    kind = {"BPE": trainers.BpeTrainer, "WordPiece": trainers.WordPieceTrainer, "Unigram": trainers.UnigramTrainer}[
        type(model).__name__
    ]
    more = {"unk_token": "<unk>"} if type(model) is models.Unigram else {}
    more |= {"end_of_word_suffix": "</w>"} if isinstance(decoder, decoders.BPEDecoder) else {}
    if type(tokenizer.pre_tokenizer).__name__ == "ByteLevel":
        more["initial_alphabet"] = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        TEXTS[2:5], kind(vocab_size=420, show_progress=False, special_tokens=["<unk>", "<s>"], **more)
    )
    if getattr(model, "byte_fallback", False):
        tokenizer = Tokenizer.from_str(json.dumps(with_bytes(json.loads(tokenizer.to_str()))))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>")


def with_bytes(described):
    """A letter that training has not seen is spelt in these."""
    vocabulary = described["model"]["vocab"]
    for byte in range(256):
        vocabulary[f"<0x{byte:02X}>"] = len(vocabulary)
    return described


MADE = {
    "shipped": lambda: PreTrainedTokenizerFast.from_pretrained(Path(__file__).parents[2] / "tokenizers" / "demo"),
    "bytes": lambda: trained(
        models.BPE(), decoders.ByteLevel(), pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=False)
    ),
    "byte fallback": lambda: trained(
        models.BPE(byte_fallback=True, unk_token="<unk>"),
        decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        ),
        normalizer=normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
    ),
    "word pieces": lambda: trained(
        models.WordPiece(unk_token="<unk>"), decoders.WordPiece(), pre_tokenizer=pre_tokenizers.BertPreTokenizer()
    ),
    "unigram": lambda: trained(models.Unigram(), decoders.Metaspace(), pre_tokenizer=pre_tokenizers.Metaspace()),
    "ends of words": lambda: trained(
        models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"),
        decoders.BPEDecoder(),
        pre_tokenizer=pre_tokenizers.WhitespaceSplit(),
    ),
}


class Counting:
    """A tokenizer that remembers the most ids it was asked to decode at once."""

    def __init__(self, tokenizer):
        self.tokenizer, self.most = tokenizer, 0

    def decode(self, ids, **how):
        self.most = max(self.most, len(ids))
        return self.tokenizer.decode(ids, **how)


def streamed(tokenizer, ids):
    """The pieces written for `ids`, and the most ids decoded at once."""
    pieces, counting = [], Counting(tokenizer)
    stream = Stream(counting, pieces.append)
    stream.put(torch.tensor([[1, 2]]))  # the prompt
    for number in ids:
        stream.put(torch.tensor([number]))
    stream.end()
    return pieces, counting.most


@pytest.mark.parametrize("made", MADE)
def test_what_is_written_piece_by_piece_is_what_all_tokens_say_together(made):
    """With special tokens strewn in, which are not shown, and a model's nonsense at the end. A token costs the same
    however many came before.
    """
    tokenizer, draw = MADE[made](), random.Random(7)
    special = [number for number, token in tokenizer.added_tokens_decoder.items() if token.special]
    for text in TEXTS:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        for number in special:
            ids.insert(draw.randint(0, len(ids)), number)
        pieces, most = streamed(tokenizer, ids)
        assert (
            "".join(pieces)
            == tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False) + "\n"
        )
        assert not [piece for piece in pieces if "\ufffd" in piece and "\ufffd" not in text]
        assert most <= 64
    nonsense = [draw.randrange(len(tokenizer)) for _ in range(2000)]
    assert streamed(tokenizer, nonsense)[1] <= 64
    endless = [*tokenizer("가", add_special_tokens=False)["input_ids"][:1] * 500, *special * 500]
    assert streamed(tokenizer, endless)[1] <= 64


def test_what_cannot_be_opened_is_one_line(run, tmp_path, capsys):
    without = shutil.copytree(
        run / "checkpoint-40", tmp_path / "checkpoint-40", ignore=shutil.ignore_patterns("tokenizer*")
    )
    parts = shutil.copytree(run / "final_model", tmp_path / "parts", ignore=shutil.ignore_patterns("*.safetensors"))
    empty = shutil.copytree(parts, tmp_path / "empty")
    (parts / "pytorch_model_fsdp_0").mkdir()
    for directory, kind, message in (
        (tmp_path / "nowhere", ConfigError, "no such directory"),
        (without, ConfigError, "--tokenizer_path DIR"),
        (empty, DamagedError, "model.safetensors is missing"),
        (parts, ConfigError, "accelerate merge-weights"),
    ):
        with pytest.raises(kind, match=message):
            said(directory, "--prompt", "a")
    assert said(without, "--prompt", PROMPT, "--tokenizer_path", str(run / "final_model"), "--max_new_tokens", "1")
    for flags, message in (
        (["--chat", "--prompt", "a"], "no chat template"),
        (["--prompt", ""], "is empty"),
        (["--prompt", "a" * 70], "takes 64"),
    ):
        with pytest.raises(ConfigError, match=message):
            said(run, *flags)
    assert main(["generate", "--prompt", "a"]) == 2
    assert "set --model DIR" in capsys.readouterr().err
