"""Chat templates in the manner of known models, a tokenizer with their tokens, and a look at what is learned: what the
tests of instruction data share.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from moai.engine.pipeline import Tally, _tally
from moai.prepared.manifest import Prepared
from moai.tokenizers.backends import Backend, Fastokens, Reference
from moai.transforms.chat import ToExamples
from moai.transforms.conversation import choose_chat_shape
from moai.transforms.encode_examples import EncodeExamples
from moai.transforms.template import ChatTemplate

ROOT = Path(__file__).parent.parent
SPECIALS = (
    "<|begin_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "[INST]",
    "[/INST]",
    "[AVAILABLE_TOOLS]",
    "<start_of_turn>",
    "<end_of_turn>",
)
TOKENS = {"bos_token": "<s>", "eos_token": "<|endoftext|>", "pad_token": "<pad>", "unk_token": "<unk>"}

DEMO = (ROOT / "configs" / "chat_template_demo.jinja").read_text(encoding="utf-8")
LLAMA_MARKED = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<|eot_id|>' }}{% endgeneration %}{% else %}{{ "
    "m.content | trim + '<|eot_id|>' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
REASONING_MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}{% generation %}"
    "{% if m.reasoning_content and loop.last %}{{ '<think>' + m.reasoning_content + '</think>' }}{% endif %}{{ "
    "m.content + '<|im_end|>' }}{% endgeneration %}"
    "{{ '\n' }}{% else %}{{ m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
)
PLAIN_MARKED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ 'A: ' }}{% generation %}{{ m.content }}{% endgeneration "
    "%}{{ '\n\n' }}"
    "{% else %}{{ 'Q: ' + m.content + '\n' }}{% endif %}{% endfor %}"
)
MARKED = {
    "chatml with tools": DEMO,
    "llama": LLAMA_MARKED,
    "reasoning of the last": REASONING_MARKED,
    "without special tokens": PLAIN_MARKED,
}

CHATML = (
    "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}{% if "
    "add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
THINKING = (
    "{%- set ns = namespace(last=-1) -%}{%- for m in messages -%}{%- if m.role == 'user' -%}{%- set ns.last = "
    "loop.index0 -%}{%- endif -%}{%- endfor -%}"
    "{%- for m in messages -%}{{- '<|im_start|>' + m.role + '\n' -}}"
    "{%- if m.role == 'assistant' and loop.index0 > ns.last -%}{{- '<think>\n' + (m.reasoning_content or '') + '\n"
    "</think>\n\n' -}}{%- endif -%}"
    "{{- m.content + '<|im_end|>\n' -}}{%- endfor -%}{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' "
    "-}}{%- endif -%}"
)
LLAMA = LLAMA_MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{% if tools and loop.last %}{{ '[AVAILABLE_TOOLS]' "
    "+ tools | tojson }}{% endif %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}{% else %}{{ raise_exception('only user and "
    "assistant') }}{% endif %}{% endfor %}"
)
"""Tools stand before the last turn if that is the user's, so that what follows them moves."""
GEMMA = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('System role not supported') "
    "}}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + m.content | trim + '<end_of_turn>\n"
    "' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
FORCED_THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' }}{% endfor "
    "%}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
)


def write_tokenizer(folder: Path, *, trim_offsets: bool = False, template: str | None = None) -> Path:
    """The shipped tokenizer with the special tokens of all these templates. `trim_offsets`: its tokens' places leave
    out spaces before them.
    """
    from tokenizers import AddedToken, Tokenizer, processors

    tokenizer = Tokenizer.from_file(str(ROOT / "tokenizers" / "demo" / "tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIALS])
    if trim_offsets:
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                **TOKENS,
                **({"chat_template": template} if template else {}),
            }
        )
    )
    return folder


def turns(*contents: str, system: str = "") -> list[dict[str, Any]]:
    """Question, answer, question, answer, ..."""
    roles = ("user", "assistant")
    return [
        *([{"role": "system", "content": system}] if system else []),
        *({"role": roles[i % 2], "content": text} for i, text in enumerate(contents)),
    ]


def encode(
    reference: Reference, source: str, record: dict[str, Any], **options: Any
) -> tuple[list[tuple[list[int], list[int]]], dict[str, int]]:
    """(ids, trained) of each example of one record, and what was counted; the same from a fast backend."""
    import pyarrow as pa

    from moai.sources.records import SCHEMA

    kinds = {name: "list" if isinstance(value, list) else "string" for name, value in record.items()}
    given = {"seq_len": 4096, **options}
    reading = {name: given.pop(name) for name in ("train_on", "max_doc_bytes") if name in given}
    shape, template = choose_chat_shape(kinds, source="a test"), ChatTemplate(source=source, tokens=TOKENS)
    to_examples = ToExamples(shape=shape, template=template, reference=reference, **reading)
    batch = pa.record_batch([[json.dumps(record).encode()], pa.nulls(1, pa.string()), [0], [0], [0]], schema=SCHEMA)

    def made_by(backend: Backend) -> tuple[list[tuple[list[int], list[int]]], dict[str, int]]:
        encode_examples = EncodeExamples(backend=backend, reference=reference, **given)
        tally = Tally()
        token = _tally.set(tally)
        try:
            made = [
                (ids, trained)
                for out in encode_examples(to_examples(iter([batch])))
                for ids, trained in zip(out["tokens"].to_pylist(), out["trained_runs"].to_pylist())
            ]
        finally:
            _tally.reset(token)
        return made, {name: number for name, number in tally.counts.items() if not name.startswith("backend.")}

    wanted = made_by(reference)
    if not reference.split_special_tokens:
        assert made_by(Fastokens(spec=reference.spec)) == wanted
    return wanted


def learned(reference: Reference, ids: Sequence[int], trained: Sequence[int]) -> list[str]:
    """The stretches that are learned, as text."""
    found: list[list[int]] = []
    for before, (token, learn) in zip([0, *trained], zip(ids, trained)):
        if learn:
            if not before:
                found.append([])
            found[-1].append(token)
    return [reference.decode(stretch) for stretch in found]


def rows_of(prepared: Prepared) -> Iterator[list[tuple[list[int], list[int]]]]:
    """Each row as its examples, (ids, trained), as `datasets` gives them."""
    import datasets

    for row in datasets.load_from_disk(str(prepared.path)):
        trained = [number % 2 for number, run in enumerate(row["trained_runs"]) for _ in range(run)]
        ends = [sum(row["seq_lengths"][: index + 1]) for index in range(len(row["seq_lengths"]))]
        yield [(row["input_ids"][start:end], trained[start:end]) for start, end in zip([0, *ends], ends)]
