"""final_model/: a finished model gets the name when it is whole, and one that has the name keeps it until then.

    staged = staging(output_dir / FINAL)
    model.save_pretrained(staged)
    put(staged, output_dir / FINAL)

Where there is one already, of a run that went on for longer, the two are swapped (moai.core.files.replace_directory):
there is no moment without a model.
"""

from __future__ import annotations

import os
from pathlib import Path

from moai.core.files import remove_directory, replace_directory

FINAL = "final_model"


def staging(final: Path, *, writes: bool = True) -> Path:
    """Where to write what will be `final`. A rank that `writes` removes what a crash left there."""
    staged = final.with_name(f".{final.name}")
    if writes:
        remove_directory(staged)
    return staged


def put(staged: Path, final: Path) -> None:
    """Give `staged` its name; what had it before is removed afterwards."""
    replace_directory(staged, final, named="final_model")


def point(name: Path, target: str) -> None:
    """Make `name` a link to `target`, in one step too."""
    if name.is_symlink() and os.readlink(name) == target:
        return
    link = name.with_name(f".{name.name}.link")
    link.unlink(missing_ok=True)
    link.symlink_to(target, target_is_directory=True)
    link.replace(name)
