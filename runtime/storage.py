"""How files are written and read: whole or not at all, with the system's own errors, and no stranger's code."""

import os
import pickle
import warnings
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

from runtime.ranks import UserError


def write_atomically(path: Path, text: str) -> None:
    """Old content or new, never half."""
    unfinished = path.with_name(f".tmp-{path.name}")
    with unfinished.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)


def cause(error: BaseException) -> str:
    """Why a save failed: what the system said on one of the ranks, if it did."""
    failures = [failure for failure, _ in getattr(error, "failures", {}).values()] or [error]
    return str(min(failures, key=lambda failure: not isinstance(failure, OSError)))


class Writer(dcp.FileSystemWriter):
    """Raises the system's own error, which torch's zip writer hides behind one about positions in its file."""

    def write_data(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().write_data(*args, **kwargs)
        except RuntimeError as error:
            raise error.__context__ if isinstance(error.__context__, OSError) else error from None


class Reader(dcp.FileSystemReader):
    """Reads `.metadata`, a pickle, without running what a stranger may have put into it."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with (Path(self.path) / ".metadata").open("rb") as file:
            metadata = MetadataUnpickler(file).load()
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class MetadataUnpickler(pickle.Unpickler):
    """Knows what describes tensors, and nothing else. Tensors themselves are read with weights_only=True."""

    NAMES = {
        "torch": {"Size", "float32", "bfloat16", "int64"},
        "torch.serialization": {"_get_layout"},
        "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
        "torch.distributed.checkpoint.metadata": {
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        },
        "pathlib": {"PosixPath", "Path"},
        "pathlib._local": {"PosixPath", "Path"},
    }

    def find_class(self, module: str, name: str) -> Any:
        if name not in self.NAMES.get(module, ()):
            raise UserError(f"it names {module}.{name}, which no checkpoint needs")
        return super().find_class(module, name)


def load_weights(path: Path, model: nn.Module) -> None:
    """Load weights alone into an unsharded model, without a process group."""
    with warnings.catch_warnings():  # there is no process group, on purpose
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.load({"model": model.state_dict()}, storage_reader=Reader(path))
