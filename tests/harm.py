"""What can happen to a run directory: flipped bits, files cut off, full disks, checkpoints of strangers."""

import contextlib
import os
import pickle
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.metadata import BytesStorageMetadata

import checkpoint
from runtime.storage import MetadataUnpickler


def flip(path: Path) -> None:
    """One bit, in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def halve(path: Path) -> None:
    """The second half is gone."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


# ---------------------------------------------------------------------------------------------------------------------
# Disks


def limit_files(process: int, most_bytes: int) -> None:
    """A file of this process (0 = this one) that grows beyond it meets an error of the system, as on a full disk."""
    _, hard = resource.prlimit(process, resource.RLIMIT_FSIZE)
    resource.prlimit(process, resource.RLIMIT_FSIZE, (most_bytes, hard))


@contextlib.contextmanager
def quota(most_bytes: int) -> Iterator[None]:
    """The same for a while, in this process."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    limit_files(0, most_bytes)
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def mount(folder: Path, options: str) -> bool:
    """Whether the system lets us put a file system in memory there, or change the one that is there."""
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder]
    return shutil.which("mount") is not None and subprocess.run(command, capture_output=True).returncode == 0


@contextlib.contextmanager
def own_disk(folder: Path, most_bytes: int) -> Iterator[bool]:
    """A new folder on a disk of its own that holds so many bytes; False where the system does not let us."""
    folder.mkdir()
    mounted = mount(folder, f"size={most_bytes}")
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", folder], check=True)


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints of strangers


class Bomb:
    """What, unpickled, calls a function."""

    def __init__(self, function: Callable, *arguments: object):
        self.call = function, arguments

    def __reduce__(self) -> tuple:
        return self.call


def plant(path: Path, metadata: object) -> None:
    """Another `.metadata`, with checksums that fit."""
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    state = checkpoint.read_state(path)
    state["files"] = {name: checkpoint.checksum(path / name) for name in state["files"]}
    checkpoint.write_state(path, state)


def metadata_of(path: Path) -> Any:
    with (path / ".metadata").open("rb") as file:
        return MetadataUnpickler(file).load()


def plant_bomb(path: Path, marker: Path) -> None:
    """`.metadata` as it was, and in it a call that makes `marker`."""
    metadata = metadata_of(path)
    metadata.planner_data = Bomb(os.mkdir, str(marker))
    plant(path, metadata)


def plant_bytes(path: Path, marker: Path) -> None:
    """`.metadata` says that a tensor is a pickle, and in its place there is one that makes `marker`."""
    metadata, name = metadata_of(path), "model.lm_head.weight"
    bomb = pickle.dumps(Bomb(os.mkdir, str(marker)))
    index = next(index for index in metadata.storage_data if index.fqn == name)
    info = metadata.storage_data.pop(index)
    with (path / info.relative_path).open("r+b") as file:
        file.seek(info.offset)
        file.write(bomb)
    metadata.storage_data[type(index)(name)] = type(info)(info.relative_path, info.offset, len(bomb))
    metadata.state_dict_metadata[name] = BytesStorageMetadata()
    plant(path, metadata)


def pretend(run_dir: Path, *steps: int, prefix: str = "step_") -> list[Path]:
    """Directories that look like checkpoints."""
    paths = [run_dir / "checkpoints" / f"{prefix}{step:08d}" for step in steps]
    for path, step in zip(paths, steps, strict=True):
        path.mkdir(parents=True)
        checkpoint.write_state(path, {"step": step, "identity": {}, "files": {}})
    return paths
