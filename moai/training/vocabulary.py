"""A saved model and a tokenizer with more ids than it: new rows for its embeddings.

    grow(model, 50_300, seed=42)          # a model of 50,257 ids gets 43 new rows, in an untied head too

New rows begin near the mean of the old ones (transformers' mean_resizing: their mean, and a billionth of their
covariance), so that a new token is first as likely as an average one and takes little from the others:
https://nlp.stanford.edu/~johnhew/vocab-expansion.html. Rows around zero, as a new model has them, can have larger
logits than all that was learned. A model with more rows than the tokenizer has ids, as they are padded to a multiple of
64, keeps them.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)


def grow(model: Any, ids: int, *, seed: int) -> int:
    """Add rows until the model has `ids` of them; the number added. The same on every rank: the random numbers follow
    from `seed`.
    """
    from transformers import set_seed
    from transformers.utils import logging as library

    old = model.get_input_embeddings().weight.shape[0]
    if ids <= old:
        return 0
    untyped: Any = library
    verbosity = untyped.get_verbosity()
    untyped.set_verbosity_error()  # it explains at length how to switch off what is wanted here
    try:
        set_seed(seed)
        model.resize_token_embeddings(ids, mean_resizing=True)
    finally:
        untyped.set_verbosity(verbosity)
    head = model.get_output_embeddings()
    tied = head is None or head.weight is model.get_input_embeddings().weight
    of = "embeddings (the head shares them)" if tied else "embeddings and of the head"
    new = f"{ids - old} new rows of the {of} begin near the mean of the old ones"
    logger.info("Vocabulary: %s -> %s ids; %s", f"{old:,}", f"{ids:,}", new)
    return int(ids - old)


def warn_of_moved_ids(pretrained_model: Path, tokenizer: Any) -> int:
    """Say when this tokenizer gives tokens of the model's own another id: their embeddings were learned for something
    else. The number of them.
    """
    path = pretrained_model / "tokenizer.json"
    if not path.is_file():
        return 0
    from tokenizers import Tokenizer

    own, given = Tokenizer.from_file(str(path)).get_vocab(), tokenizer.get_vocab()
    moved = [token for token, number in own.items() if given.get(token) != number]
    if moved:
        logger.warning(
            "%s: %s have another id, or none, in this run's tokenizer (the first: %r), so its embeddings stand for "
            "other tokens; a tokenizer to continue with keeps the old ids and adds new ones behind them",
            pretrained_model,
            f"{len(moved):,} of its {len(own):,} tokens",
            min(moved, key=own.__getitem__),
        )
    return len(moved)
