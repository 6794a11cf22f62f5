"""The flags of scripts/prepare_entity_coref_v2.py and of `python -m moai entity-coref`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from moai.core.config import option
from moai.core.errors import ConfigError
from moai.coref.korean import KIWI_MODELS
from moai.coref.placement import MASKS, MODES
from moai.coref.selection import POLICIES
from moai.coref.wording import LANGUAGES

keyed = partial(option, affects_output=True)

PRESETS = {
    "naver_news": ("dev7halo/naver-news-summarization-ko-with-gen@train", "document"),
    "hplt": ("HPLT/HPLT2.0_cleaned:kor_Hang@train", "text"),
    "air_bench": ("AIR-Bench/qa_news_ko:AIR-Bench_24.05@corpus_default", "text"),
    "twice_summ": ("nmixx-fin/twice_kr_finance_news_summ@train", "text"),
    "twice_bqa": ("nmixx-fin/twice_kr_news_bqa_cls@train", "text"),
}
"""Public data sets, with the column of their text: what is read where --input names nothing, in this order."""
RULES = ("mention", "v2")
_BY_RULES: dict[str, tuple[Any, Any]] = {
    "min_length": (300, 800),
    "max_length": (20_000, 2_500),
    "min_nnp_ratio": (0.01, 0.05),
    "max_nnp_ratio": (0.5, 0.2),
    "mask": ("all-later", "one"),
    "cap_policy": ("hardest", "hash"),
    "max_name_share": (0.02, 1.0),
    "min_difficulty": (0.2, 0.0),
}
"""Defaults that --rules decides: of `mention`, of `v2`."""
_AT_LEAST = {
    "seq_len": 8, "max_entity_freq": 1, "max_samples": 1, "max_documents": 1, "token_chunk_size": 1,
    "tokenizer_batch_size": 1, "shard_bytes": 1000, "min_length": 0, "max_mentions": 1, "min_distance": 1,
    "report_samples": 0, "num_workers": 0,
}  # fmt: skip
_SHARES = (
    "min_hangul_ratio", "max_special_ratio", "min_nnp_ratio", "max_nnp_ratio", "validation_ratio", "max_bad_ratio",
    "max_name_share", "min_difficulty",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class CorefConfig:
    """Entity-coref: from Korean text to samples in which a repeated name is masked and labelled."""

    input: tuple[str, ...] = option(
        (), "files, folders, globs or Hub names (name[:config][@split]); an existing path wins over a name"
    )
    sources: tuple[str, ...] = option(
        (), f"data sets by name: {', '.join(PRESETS)}; all of them where --input names nothing"
    )
    text_column: str | None = keyed(
        None, "the column of --input that holds the text; without it the shape is found from the schema"
    )
    text_template: str | None = keyed(None, "text from several columns of --input, as in '{title}\\n\\n{body}'")
    id_column: str = keyed("id", "the column that names a document; one without it is named by the hash of its text")
    model: str = option(
        "kakaobank/kf-deberta-base", "directory or Hub name with the tokenizer.json of the model to train, or that file"
    )
    mask_token: str | None = keyed(None, "the tokenizer's mask, where it is neither [MASK] nor <mask>")
    output_dir: str = option("./prepared_datasets", "the corpus is published under it, as entity_coref_v2_<seq_len>")
    seq_len: int = keyed(2048, "tokens in a row at most, ends included")
    mode: str = keyed(
        "span",
        "one mask a token of the mention; only mentions of one token; or the prior textual form, without labels",
        choices=MODES,
    )
    rules: str = keyed(
        "mention",
        "drop what they judge, a mention or a document, and find whole names; or the prior program's rules on "
        "documents and names, with its masks",
        choices=RULES,
    )
    mask: str | None = keyed(
        None,
        "hide every other copy of a name that is asked for, or only the one; all-later, but one with --rules v2 and "
        "--mode text",
        choices=MASKS,
    )
    skip_widened: bool = keyed(
        False, "leave out mentions whose tokens hold more than the name: always so without --rules v2"
    )
    max_documents: int | None = keyed(None, "documents of each input, about: whole shards until there are as many")
    max_entity_freq: int = keyed(1000, "samples of one name at most, over the whole corpus")
    cap_policy: str | None = keyed(
        None,
        "which samples of a name stay: those that most need the text, by hash (with --rules v2), or the first ones of "
        "the input",
        choices=POLICIES,
    )
    max_name_share: float | None = keyed(
        None, "a name that a larger share of the documents repeats is not asked for (0.02; v2: 1), as countries"
    )
    min_difficulty: float | None = keyed(
        None,
        "samples that are easier are left out: distance, names in between, rarity of the name, 0 to 1 (0.2; v2: 0)",
    )
    max_samples: int | None = keyed(
        None, "samples in all, exactly, if there are that many; chosen as --cap-policy says"
    )
    validation_ratio: float = keyed(0.1, "share of the documents whose samples have 'validation' in the column split")
    min_length: int | None = keyed(None, "rule 1: characters of a document at least (300; v2: 800)")
    max_length: int | None = keyed(None, "rule 1: characters of a document at most (20,000; v2: 2,500)")
    min_doc_score: float = keyed(5.0, "rule 0, where records are HPLT's: the first of doc_scores at least")
    pii: str = keyed("drop", "rule 0: HPLT's documents with personal data in them", choices=("drop", "keep"))
    min_sentences: int = keyed(3, "rule 2: full stops, question and exclamation marks at least")
    min_hangul_ratio: float = keyed(0.40, "rule 3: share of Hangul syllables at least")
    max_special_ratio: float = keyed(
        0.30, "rule 4: share of characters that are neither alphanumeric nor space, newline or tab, at most"
    )
    min_nnp_ratio: float | None = keyed(
        None, "rule 5: share of proper nouns among the morphemes at least (0.01; v2: 0.05)"
    )
    max_nnp_ratio: float | None = keyed(
        None, "rule 5: share of proper nouns among the morphemes at most (0.5; v2: 0.2)"
    )
    pronoun_filter: bool = keyed(
        True,
        "rule 6: drop mentions with a pronoun beside them that may mean the same (v2: documents with any pronoun); "
        "--no-pronoun-filter keeps them",
    )
    entity_tags: tuple[str, ...] = keyed(("NNP",), "Kiwi's tags that make a name")
    merge_latin: bool = keyed(
        False,
        "read Latin letters and a noun right behind them as one name (SK + 하이닉스): always so without --rules v2",
    )
    entities: str | None = option(
        None, "names from a recognizer instead of rules: JSON lines of {id, spans: [[begin, end, label], ...]}"
    )
    max_mentions: int = keyed(3, "later mentions of a name that become samples, in one document at most")
    min_distance: int = keyed(10, "characters from the first mention to the masked one at least")
    max_distance: int = keyed(2000, "characters from the first mention to the masked one at most")
    kiwi_model: str = keyed("cong", "Kiwi's model type", choices=KIWI_MODELS)
    executor: str = option(
        "auto", "what works on the shards: processes of this machine, or a Ray cluster", choices=("auto", "ray")
    )
    num_workers: int | None = option(
        None, "worker processes, or tasks of Ray at a time; 0 works in this process", env="DATASET_NUM_PROC"
    )
    start_method: str = option(
        "auto",
        "how workers start: forked from one process that holds Kiwi, or spawned with one Kiwi each; auto spawns only "
        "where a loaded process cannot be forked",
        env="MOAI_START_METHOD",
        choices=("auto", "forkserver", "spawn"),
    )
    token_chunk_size: int = keyed(20_000, "samples in a file of the corpus, about")
    tokenizer_batch_size: int = option(
        4096, "documents tokenized in one call at most; a worker has 16 at hand at a time"
    )
    shard_bytes: int = keyed(1_000_000, "source bytes in a shard, the unit of work and of resume")
    max_bad_ratio: float = option(
        0.001, "share of unreadable records and of documents Kiwi fails on (of more than 10) above which the run fails"
    )
    stall_timeout: float = option(600.0, "seconds a worker may take for one document", env="MOAI_STALL_TIMEOUT")
    cache_dir: str | None = option(None, "where unfinished work lives; by default OUTPUT_DIR/cache_entity_coref")
    replace: bool = option(False, "set aside a corpus of other settings that stands where this one shall be published")
    rehash: bool = option(False, "read and digest all input again instead of trusting unchanged file stamps")
    report_samples: int = keyed(50, "samples shown in report.html")
    lang: str = option("ko", "language of progress lines", choices=LANGUAGES)

    def __post_init__(self) -> None:
        for name, defaults in _BY_RULES.items():
            if getattr(self, name) is None:
                text = name == "mask" and self.mode == "text"
                object.__setattr__(self, name, "one" if text else defaults[RULES.index(self.rules)])
        for name in ("sources", "entity_tags"):  # a,b is as good as a b
            object.__setattr__(self, name, tuple(part for word in getattr(self, name) for part in word.split(",")))
        for name, least in _AT_LEAST.items():
            if (value := getattr(self, name)) is not None and value < least:
                raise ConfigError(f"{name} = {value}: must be at least {least}")
        for name in _SHARES:
            if not 0 <= (value := getattr(self, name)) <= 1:
                raise ConfigError(f"{name} = {value}: must lie between 0 and 1")
        if self.executor == "ray" and self.num_workers == 0:
            raise ConfigError("num_workers = 0 with executor = ray: tasks at a time; leave it away for all of its CPUs")
        for what in ("length", "nnp_ratio", "distance"):
            low, high = getattr(self, f"min_{what}"), getattr(self, f"max_{what}")
            if low > high:
                raise ConfigError(f"min_{what} = {low} is above max_{what} = {high}: no document could pass")
        if self.mode == "text" and self.mask != "one":
            raise ConfigError(f"mask = {self.mask}: mode text writes one mask into the text; leave --mask out")
        for name in self.sources:
            if name not in PRESETS:
                raise ConfigError(
                    f"sources: {name!r} is none of {', '.join(PRESETS)}; files and other data sets are named with "
                    f"--input"
                )
        if not self.entity_tags:
            raise ConfigError("entity_tags is empty: no name could be found; the default is NNP")

    @property
    def inputs(self) -> tuple[tuple[str, str | None], ...]:
        """(what to read, the column of its text if it is known), in order."""
        names = self.sources or (() if self.input else tuple(PRESETS))
        return (*((spec, self.text_column) for spec in self.input), *(PRESETS[name] for name in names))
