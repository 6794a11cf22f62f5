"""`reembed search` and `reembed evaluate`: ask a version, and measure how well it answers."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from moai.core.config import option, resolve
from moai.core.errors import ConfigError, SourceError
from moai.reembedding import evaluation, versions
from moai.reembedding.evaluation import Measured
from moai.reembedding.kinds import KINDS, check_tables
from moai.reembedding.options import ReembedConfig, check_device, check_number
from moai.reembedding.retrieval import MODES, Searcher

_SHOWN = 100
_WORSE_SHOWN = 20


@dataclass(frozen=True, kw_only=True)
class AskConfig:
    """Asking the versions of one database."""

    db: str = option("data/lawfirm_v2.db", "the law database")
    version_id: int | None = option(None, "which version; the default is the one that serves")
    versions: tuple[str, ...] = option((), "of evaluate: which versions, the first is what the others are held against")
    chunking_strategy: str | None = option(None, "the active version of this strategy")
    query: tuple[str, ...] = option((), "what to search for; several questions are asked at once")
    queries: str | None = option(None, "a file of questions, one a line")
    questions: str | None = option(None, "JSON lines with question, source_type and source_id of its answer")
    mode: str = option("hybrid", "by words, by meaning, or both", choices=MODES)
    source_type: tuple[str, ...] = option((), "only these source types")
    top: int = option(5, "chunks to find")
    json: bool = option(False, "print JSON")
    model: str | None = option(None, "where the version's model is now, if it has moved", env="EMBEDDING_MODEL")
    device: str = option("auto", "auto, cpu, cuda or cuda:N")

    def __post_init__(self) -> None:
        check_number("version_id", self.version_id)
        check_number("top", self.top)
        check_device(self.device)
        for version_id in self.versions:
            if not version_id.isdecimal():
                raise ConfigError(f"versions = {version_id!r}: numbers of versions, such as --versions 1 5")
            check_number("versions", int(version_id))
        for name in self.source_type:
            if name not in KINDS:
                raise ConfigError(f"source_type = {name!r}: choose from {', '.join(KINDS)}")

    def asked(self) -> list[str]:
        """Raises ConfigError without a question, SourceError for a file that cannot be read."""
        found = list(self.query)
        if self.queries:
            try:
                found += Path(self.queries).read_text(encoding="utf-8").splitlines()
            except (OSError, UnicodeDecodeError) as error:
                raise SourceError(f"{self.queries}: no file of questions that can be read: {error}") from error
        found = [question for question in found if question.strip()]
        if not found:
            raise ConfigError("nothing to search for: give --query TEXT")
        return found


def act(name: str, flags: list[str], environ: Mapping[str, str], prog: str) -> Iterable[str]:
    action = ACTIONS[name]
    said = action.__doc__ or ""
    config = resolve([AskConfig], flags, environ, prog=prog, description=said, others=[ReembedConfig])[AskConfig]
    with Searcher.open(config.db, model=config.model, device=config.device) as searcher:
        check_tables(searcher.database)
        if "embedding_version_id" not in searcher.database.columns("text_chunks"):
            raise ConfigError(
                f"{config.db}: its chunks know no versions yet: build one first with python -m moai reembed --db "
                f"{config.db}"
            )
        yield from action(config, searcher)


def _search(config: AskConfig, searcher: Searcher) -> Iterator[str]:
    """Find the chunks that answer a question (--query TEXT): by words, by meaning, or both."""
    asked = config.asked()
    searcher.version_id = _meant(config, searcher)
    found = searcher.ask_all(asked, mode=config.mode, top=config.top, source_types=config.source_type)
    if config.json:
        answers = [
            {"question": question, "version": searcher.version_id, "mode": config.mode, "hits": list(map(asdict, hits))}
            for question, hits in zip(asked, found)
        ]
        yield json.dumps(answers, ensure_ascii=False, indent=2)
        return
    for question, hits in zip(asked, found):
        if len(asked) > 1:
            yield f"# {question}"
        for hit in hits:
            place = f"{hit.source_type} {hit.source_id} [{hit.start_char}:{hit.end_char}]"
            own = hit.text[hit.context_chars + bool(hit.context_chars) :]
            yield f"{hit.score:.4f}  {hit.citation}  ({place})  {' '.join(own.split())[:_SHOWN]}"
        if not hits:
            yield "nothing found"


def _evaluate(config: AskConfig, searcher: Searcher) -> Iterator[str]:
    """Measure versions on questions with known answers (--questions FILE): recall, MRR, nDCG, and what got worse."""
    if not config.questions:
        raise ConfigError(
            "questions is needed: give --questions FILE, JSON lines with question, source_type, source_id"
        )
    asked = evaluation.read(Path(config.questions))
    wanted = tuple(map(int, config.versions)) or (_meant(config, searcher),)
    measured = [
        evaluation.measure(searcher, versions.get(searcher.database, version_id), asked) for version_id in wanted
    ]
    if config.json:
        yield json.dumps({str(one.version_id): one.as_json() for one in measured}, indent=2, ensure_ascii=False)
        return
    yield f"{len(asked):,} questions; in brackets the 95% interval"
    yield f"{'version':>7}  {'mode':8}" + "".join(f"{name:>22}" for name in evaluation.NAMES)
    for one in measured:
        yield from _table(one)
    for one in measured[1:]:
        yield from _worse(measured[0], one, searcher)


def _table(measured: Measured) -> Iterator[str]:
    for mode, figures in measured.modes.items():
        cells = (
            f"{figures.values[name]:.3f} [{low:.3f}, {high:.3f}]" for name, (low, high) in figures.intervals.items()
        )
        yield f"{measured.version_id:7}  {mode:8}" + "".join(f"{cell:>22}" for cell in cells)
    if measured.unsearchable:
        yield f"{measured.version_id:7}  dense and hybrid: not searchable: {measured.unsearchable}"


def _worse(before: Measured, after: Measured, searcher: Searcher) -> Iterator[str]:
    mode = next(mode for mode in MODES if mode in before.modes and mode in after.modes)
    worse = evaluation.got_worse(before.modes[mode], after.modes[mode])
    yield (
        f"{len(worse):,} questions have their answer further down in version {after.version_id} than in version "
        f"{before.version_id} ({mode})" + (f", the first {_WORSE_SHOWN}:" if len(worse) > _WORSE_SHOWN else "")
    )
    for place in worse[:_WORSE_SHOWN]:
        ranks = (figures.ranks[place] for figures in (before.modes[mode], after.modes[mode]))
        was, now = (str(rank) if rank else f">{evaluation.DEEPEST}" for rank in ranks)
        question = before.questions[place]
        yield f"  {was:>4} -> {now:<4} {question.source_type} {question.source_id}  {question.text[:_SHOWN]}"


Action = Callable[[AskConfig, Searcher], Iterator[str]]
ACTIONS: dict[str, Action] = {"search": _search, "evaluate": _evaluate}


def _meant(config: AskConfig, searcher: Searcher) -> int:
    """By number, by strategy, else the one that serves, else the newest active one."""
    database = searcher.database
    if config.version_id is not None:
        return versions.get(database, config.version_id).id
    strategy = config.chunking_strategy
    if strategy is None:
        found = versions.serving(database) or next(
            iter(v for v in versions.listing(database)[::-1] if v.is_active), None
        )
    else:
        found = versions.active(database, strategy)
    if found is None:
        raise ConfigError(
            f"{f'strategy {strategy} has' if strategy else 'there is'} no active version: name one with --version-id"
            + (", or another strategy" if strategy else "")
        )
    return found.id
