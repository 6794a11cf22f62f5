"""What to tell a person when a model of the Hugging Face Hub is not to be had."""

from __future__ import annotations


def absent(name: str, error: Exception) -> str:
    """One line for the error that `snapshot_download` raised: what is missing, and how to get it here."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if isinstance(error, RevisionNotFoundError):
        return f"{name}: the Hub has no such revision of it; check --revision"
    if isinstance(error, RepositoryNotFoundError | HFValidationError):
        return (
            f"{name}: no directory here, and no model that the Hub shows you; check the name, or set HF_TOKEN if it "
            f"is private"
        )
    if not isinstance(error, LocalEntryNotFoundError):
        return (
            f"{name}: not fetched from the Hub ({type(error).__name__}: {' '.join(str(error).split())[:160]}); mend "
            f"that and run again"
        )
    why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the Hub cannot be reached"
    return (
        f"{name}: no directory here, not in the Hub's cache ({constants.HF_HUB_CACHE}), and {why}. Where there is a "
        f"network run: hf download {name}; "
        "then copy that cache here and set HF_HOME, or name a local directory instead"
    )
