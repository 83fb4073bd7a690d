"""How files are written and read: whole or not at all, with the system's own errors, and no stranger's code."""

import contextlib
import gc
import os
import pickle
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.checkpoint.storage import WriteResult

from runtime import ranks
from runtime.ranks import UserError


def write_atomically(path: Path, content: str | bytes) -> None:
    """Old content or new, never half."""
    unfinished = path.with_name(f".tmp-{path.name}")
    with unfinished.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)


def misfits(there: dict[str, tuple[int, ...]], here: dict[str, tuple[int, ...]]) -> list[str]:
    """A line for each tensor whose shape differs, or that is on one side only; of many, the first eight."""
    names = sorted(name for name in here | there if here.get(name) != there.get(name))
    lines = [f"  {name}: {there.get(name, 'absent')} there, {here.get(name, 'absent')} now" for name in names[:8]]
    return lines + ([f"  and {len(names) - 8} more"] if names[8:] else [])


def cause(error: BaseException) -> str:
    """Why a save or a load failed: what the system said on one of the ranks, if it did."""
    failures = [failure for failure, _ in getattr(error, "failures", {}).values()] or [error]
    return str(min(failures, key=lambda failure: not isinstance(failure, OSError)))


@contextlib.contextmanager
def collector_paused() -> Iterator[None]:
    """Else Python's garbage collector walks again and again through a million objects that describe slices."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


# ---------------------------------------------------------------------------------------------------------------------
# Save


@dataclass(frozen=True)
class Layout:
    """Which rank has written which slices, and where: what a save settles, and the next one need not ask again."""

    offered: SavePlan  # this rank's slices
    assigned: SavePlan  # those of them that it writes: what several ranks hold is written once
    written: list[WriteResult]  # at which bytes of its file
    metadata: bytes  # rank 0: `.metadata`, which says all that of all ranks


def save(tensors: dict[str, Any], path: Path, last: Layout | None, group: dist.ProcessGroup | None) -> Layout:
    """Write the slices of all ranks and `.metadata` into a directory. All ranks together, with what the last save gave.

    `dcp.save` has rank 0 look at each slice of each rank, which takes minutes at hundreds of ranks. If all ranks have
    the slices of the last time, each of them writes those that it wrote then, and `.metadata` stays the same. Raises
    UserError or CheckpointException on all ranks.
    """
    planner, writer = dcp.DefaultSavePlanner(), Writer(path)
    offered = ranks.together(partial(local_plan, planner, tensors), group)
    if all(ranks.gather(last is not None and last.offered == offered, group)) and last:
        written = ranks.together(lambda: writer.write_data(last.assigned, planner).value(), group)
        if all(ranks.gather(last.written == written, group)):
            again = partial(write_atomically, path / ".metadata", last.metadata)
            ranks.together(again if dist.get_rank() == 0 else None, group)
            return last
    with collector_paused():
        dcp.save(tensors, storage_writer=writer, planner=planner, process_group=group)
    return Layout(offered, planner.plan, writer.written, writer.metadata)


def local_plan(planner: dcp.DefaultSavePlanner, tensors: dict[str, Any]) -> SavePlan:
    planner.set_up_planner(tensors, is_coordinator=dist.get_rank() == 0)
    return planner.create_local_plan()


class Writer(dcp.FileSystemWriter):
    """Keeps what `Layout` is made of, and raises the system's own error."""

    metadata = b""

    def write_data(self, *args: Any, **kwargs: Any) -> Any:
        try:
            future = super().write_data(*args, **kwargs)
        except RuntimeError as error:  # torch's zip writer hides the system's behind one about positions in its file
            raise error.__context__ if isinstance(error.__context__, OSError) else error from None
        self.written = future.value()
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        super().finish(metadata, results)
        self.metadata = (Path(self.path) / ".metadata").read_bytes()
        vars(metadata).clear()  # dcp goes on to send it to all ranks, none of which looks at it


# ---------------------------------------------------------------------------------------------------------------------
# Step counts: an optimizer such as AdamW has one for each parameter, all the same, and a checkpoint holds it once


def with_one_step(state: dict[str, Any]) -> dict[str, Any]:
    """An optimizer's flat state with "step" instead of each parameter's "state.NAME.step".

    As it is where these are not scalars, or differ, or where a parameter has none or nothing else.
    """
    steps = {name: value for name, value in state.items() if name.endswith(".step")}
    others = {name: value for name, value in state.items() if name not in steps}
    scalars = [step for step in steps.values() if type(step) is torch.Tensor and step.ndim == 0]
    if steps.keys() != steps_beside(others) or len(scalars) < len(steps):
        return state
    if len({(step.dtype, step.item()) for step in scalars}) != 1:
        return state
    return others | {"step": scalars[0]}


def with_all_steps(metadata: Metadata) -> None:
    """The other way round, for who reads: the one "step" that was written stands under the name of each."""
    tensors, places, one = metadata.state_dict_metadata, metadata.storage_data, "optimizer.step"
    if one in tensors:
        names = steps_beside(name for name in tensors if name.startswith("optimizer.state."))
        tensors |= dict.fromkeys(names, tensors.pop(one))
        place = places.pop(MetadataIndex(one, ()))
        places |= {MetadataIndex(name, ()): place for name in names}


def steps_beside(names: Iterable[str]) -> set[str]:
    """Of "state.NAME.exp_avg" and the like, "state.NAME.step"."""
    return {f"{name.rpartition('.')[0]}.step" for name in names}


# ---------------------------------------------------------------------------------------------------------------------
# Load


class Reader(dcp.FileSystemReader):
    """Reads `.metadata`, a pickle, once, and without running what a stranger may have put into it."""

    metadata: Metadata | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        if self.metadata is None:
            with (Path(self.path) / ".metadata").open("rb") as file, collector_paused():
                self.metadata = MetadataUnpickler(file).load()
            self.metadata.storage_meta = self.metadata.storage_meta or StorageMeta()
            self.metadata.storage_meta.load_id = self.load_id
            with_all_steps(self.metadata)
        return self.metadata

    def load(self, tensors: dict[str, Any]) -> None:
        """Read this rank's slices, in place, without a word to the others. Raises UserError.

        With them, `dcp.load` would send what each rank wants to rank 0 and back.
        """
        try:
            with collector_paused(), warnings.catch_warnings():  # it takes no_dist for an oversight
                warnings.filterwarnings("ignore", message="torch.distributed is disabled")
                dcp.load(tensors, storage_reader=self, no_dist=True)
        except CheckpointException as error:  # which is no Exception
            raise UserError(f"{self.path} could not be loaded: {cause(error)}") from error


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
    Reader(path).load({"model": model.state_dict()})
