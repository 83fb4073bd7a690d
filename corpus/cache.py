"""The folder in which `datasets` keeps what it has converted, and corpus/ what it has made of that."""

import contextlib
import fcntl
import hashlib
import uuid
from pathlib import Path


def cache_folder() -> Path:
    from datasets import config

    folder = Path(config.HF_DATASETS_CACHE)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def cache_key(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def unfinished(folder: Path) -> Path:
    """A name of its own for a file that is renamed once it is complete."""
    return folder / f".tmp-{uuid.uuid4().hex}"


def remove_unfinished(folder: Path) -> None:
    """Files that a killed process was writing. One that is still being written is locked by its writer, and stays."""
    for path in folder.glob(".tmp-*"):
        with contextlib.suppress(OSError), path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.stat().st_size > 0:  # else its writer may be about to lock it
                path.unlink()
