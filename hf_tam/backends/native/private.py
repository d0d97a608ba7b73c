"""Folders and files that nobody but the user can have written: what lies there may be executed."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["NotPrivateError", "create", "enter", "read"]

_WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH


class NotPrivateError(Exception):
    """Somebody else could have put something there."""


def create(folder: Path) -> None:
    """Create `folder` and those above it that are missing, for the user alone.

    Raises:
        NotPrivateError: Root would leave a folder in another user's, who could then neither use nor remove it.
        OSError: It cannot be created.
    """
    for part in (*reversed(folder.parents), folder):
        if part.is_dir():
            continue
        owner = part.parent.stat().st_uid
        if os.geteuid() == 0 and owner != 0:
            raise NotPrivateError(f"{part.parent} belongs to user {owner}, and this is root; {_REMEDY}")
        part.mkdir(mode=0o700, exist_ok=True)  # pathlib's `parents=True` would leave the parents to the umask


@contextmanager
def enter(folder: Path) -> Iterator[Path]:
    """A path to `folder` that leads to this very folder, whatever others do meanwhile; for the length of the context.

    Raises:
        NotPrivateError: It is a link, belongs to somebody else, or others can write to it.
        OSError: It cannot be opened.
    """
    # On clusters homes are links: what counts is where they lead, and that the folder itself is none.
    folder = folder.parent.resolve() / folder.name
    if folder.is_symlink():
        raise NotPrivateError(f"{folder} is a symbolic link; {_REMEDY}")
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        _require_private(descriptor, folder, f"chmod go-w {folder}")
        yield folder if _stays_where_it_is(folder) else _by_descriptor(descriptor, folder)
    finally:
        os.close(descriptor)


def read(path: Path) -> bytes:
    """What is in a file of the user's own.

    Raises:
        NotPrivateError: It belongs to somebody else, or others can write to it.
        OSError: It cannot be read, or is a link.
    """
    # O_NONBLOCK: of a pipe, nothing is waited for.
    flags = os.O_NOFOLLOW | os.O_NONBLOCK
    with open(path, "rb", opener=lambda name, usual: os.open(name, usual | flags)) as file:
        _require_private(file.fileno(), path.resolve(), "delete it")
        return file.read()


_REMEDY = "let XDG_CACHE_HOME name a folder of your own"


def _require_private(descriptor: int, path: Path, remedy: str) -> None:
    found, user = os.fstat(descriptor), os.geteuid()
    if found.st_uid != user:
        raise NotPrivateError(f"{path} belongs to user {found.st_uid}, and this is user {user}; {_REMEDY}")
    if found.st_mode & _WRITABLE_BY_OTHERS:
        mode = stat.S_IMODE(found.st_mode)
        raise NotPrivateError(f"others can write to {path} (mode {mode:o}); {remedy}")


def _stays_where_it_is(folder: Path) -> bool:
    """Whether nobody else can move it, or a folder above it, and put another in its place."""
    for above in folder.parents:
        found = above.stat()
        if found.st_uid not in (0, os.geteuid()):
            return False
        if found.st_mode & _WRITABLE_BY_OTHERS and not found.st_mode & stat.S_ISVTX:
            return False
    return True


def _by_descriptor(descriptor: int, folder: Path) -> Path:
    """A path to the folder that is open, for this process and its children; Linux has one."""
    path = Path(f"/proc/{os.getpid()}/fd/{descriptor}")
    # Another folder, or none, where /proc shows other processes than this one sees; and children may not use it where
    # its owner is root, since this process may not be looked into (PR_SET_DUMPABLE, as of a Python with capabilities).
    is_it = path.is_dir() and os.path.samestat(path.stat(), os.fstat(descriptor))
    if not is_it or path.parent.stat().st_uid != os.geteuid():
        raise NotPrivateError(f"others can put another folder in the place of {folder}; {_REMEDY}")
    return path
