"""The folder in which `datasets` keeps what it has converted, and corpus/ what it has made of that."""

import contextlib
import fcntl
import hashlib
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


def cache_folder() -> Path:
    from datasets import config

    folder = Path(config.HF_DATASETS_CACHE)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def cache_key(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


@contextlib.contextmanager
def written(path: Path) -> Iterator[BinaryIO]:
    """A file to write to, under a name of its own and locked until it is complete and gets the name `path`."""
    unfinished = path.with_name(f".tmp-{uuid.uuid4().hex}")
    try:
        with unfinished.open("wb") as file:
            with contextlib.suppress(OSError):  # there are file systems without locks
                fcntl.flock(file, fcntl.LOCK_EX)
            yield file
            file.flush()
            unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)  # of one that failed: tried again and again it would fill the disk


def remove_unfinished(folder: Path) -> None:
    """Files that a killed process was writing. One that is still being written is locked by its writer, and stays."""
    for path in folder.glob(".tmp-*"):
        with contextlib.suppress(OSError), path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.stat().st_size > 0:  # else its writer may be about to lock it
                path.unlink()
