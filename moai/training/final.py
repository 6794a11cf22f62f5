"""final_model/: a finished model gets the name when it is whole, and one that has the name keeps it until then.

    staged = staging(output_dir / FINAL)
    model.save_pretrained(staged)
    put(staged, output_dir / FINAL)

Where there is one already, of a run that went on for longer, the two exchange their names in one step of the kernel: there is
no moment without a model. Some file systems cannot do that (NFS); there the old one is renamed first, and a kill at that moment
leaves it as `.final_model.before`.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
from pathlib import Path

from moai.failpoints import failpoint
from moai.files import sync

FINAL = "final_model"
_HERE, _EXCHANGE = -100, 2
"""AT_FDCWD and RENAME_EXCHANGE of Linux's renameat2(2)."""


def staging(final: Path, *, writes: bool = True) -> Path:
    """Where to write what will be `final`. A rank that `writes` removes what a crash left there."""
    staged = final.with_name(f".{final.name}")
    if writes:
        _remove(staged)
    return staged


def put(staged: Path, final: Path) -> None:
    """Give `staged` its name; what had it before is removed afterwards."""
    aside = final.with_name(f".{final.name}.before")
    for path in (*staged.rglob("*"), staged):
        sync(path)
    failpoint("final_model.rename", staged)
    if not os.path.lexists(final):
        staged.rename(final)
    elif not _exchange(staged, final):
        _remove(aside)
        final.rename(aside)
        failpoint("final_model.aside", staged)
        staged.rename(final)
    sync(final.parent)
    failpoint("final_model.placed", final)
    for old in (staged, aside):
        _remove(old)


def point(name: Path, target: str) -> None:
    """Make `name` a link to `target`, in one step too."""
    if name.is_symlink() and os.readlink(name) == target:
        return
    link = name.with_name(f".{name.name}.link")
    link.unlink(missing_ok=True)
    link.symlink_to(target, target_is_directory=True)
    link.replace(name)


def _exchange(one: Path, other: Path) -> bool:
    """Each gets the other's name. False where system or file system cannot."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:
        return False
    if rename(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
        return False
    raise OSError(number, os.strerror(number), str(other))


def _remove(path: Path) -> None:
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)
