"""Checkpoints: written under a temporary name, renamed when complete, so a directory counts by its very name.

    runs/quickstart/
      config.toml                      the resolved configuration of the last start
      tokenizer.json
      metrics.jsonl                    one JSON object a line, appended, flushed
      .lock                            held by rank 0 of the job that runs here; the system lets go of it after a crash
      checkpoints/
        step_00000200/                 complete
          .metadata  __0_0.distcp ...  torch.distributed.checkpoint: each rank's slices; any mesh can read them
          state.json                   step, tokens, status, what must not change (see `identity`), checksums
        .tmp-step_00000400/            a save that did not finish; removed at the next start
        damaged-step_00000300-.../     a checkpoint with wrong checksums, put aside when the run went on without it

All ranks save and load together. Rank 0 alone decides what is there and what is removed.
"""

import contextlib
import fcntl
import json
import os
import pickle
import shutil
import time
import tomllib
import warnings
import zlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import IO, Annotated, Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.staging import BlockingAsyncStager
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

# By parameter name instead of by group and index: a change of the groups does not shift anybody's moments.
OPTIONS = StateDictOptions(flatten_optimizer_state_dict=True)


@dataclass
class CheckpointConfig:
    """When to save and where to start from."""

    every: Annotated[int, "steps between checkpoints; 0 = only at the end"] = 0
    keep: Annotated[int, "newest checkpoints that are kept"] = 2
    async_save: Annotated[bool, "write from a copy in CPU memory while training goes on"] = False
    resume: Annotated[
        str, '"auto" = from the newest in the run directory; "never"; or the checkpoint or run directory to branch off'
    ] = "auto"


# ---------------------------------------------------------------------------------------------------------------------
# The run directory


def complete_checkpoints(run_dir: Path) -> list[Path]:
    """Oldest first."""
    return sorted((run_dir / "checkpoints").glob("step_" + "[0-9]" * 8))


def oldest_step(run_dir: Path) -> int:
    """Of the complete checkpoints; 0 without any."""
    return next((int(path.name.removeprefix("step_")) for path in complete_checkpoints(run_dir)), 0)


def find_resume(run_dir: Path, resume: str) -> list[Path]:
    """Checkpoints to start from, the best first; [] for a new run. Raises ValueError when a start would do damage."""
    own = complete_checkpoints(run_dir)
    if resume == "auto":
        return own[::-1]
    if resume == "never":
        if own:
            raise ValueError(
                f'checkpoint.resume="never", but {run_dir} holds {own[-1].name}: start over in another --run.dir'
            )
        return []
    path = Path(resume)
    found = [path] if (path / "state.json").exists() else complete_checkpoints(path)
    if not found:
        raise ValueError(f"checkpoint.resume={resume} is neither a checkpoint nor a run directory that holds one")
    if not own:
        return found[::-1]
    if found[-1].resolve() != own[-1].resolve() and branched_from(own) != resume:
        raise ValueError(
            f"checkpoint.resume={resume} is not the newest checkpoint of {run_dir}, nor what that run branched off: "
            f"{own[-1].name} there would be overwritten; branch off into another --run.dir"
        )
    return own[::-1]  # a branch that was begun before: the same command continues it


def branched_from(checkpoints: list[Path]) -> str | None:
    """What the run of these checkpoints branched off, according to the newest that can be read."""
    for path in reversed(checkpoints):
        with contextlib.suppress(ValueError):
            return read_state(path).get("branched_from")
    return None


def identity(config: dict[str, Any]) -> dict[str, Any]:
    """What must not change within a run: the shape of the model, the data and its order. `config` is flat.

    How many ranks there are, the micro-batch and how rows are loaded may change. train.py adds digests of the tokenizer
    and the data. A vocab_size of 0 is not known yet.
    """
    free = ("data.num_workers", "data.tokenizer_train_mib")
    fixed = {key: value for key, value in config.items() if key.startswith(("model.", "data.")) and key not in free}
    fixed |= {key: config[key] for key in ("train.seed", "train.global_batch_size")}
    return {key: value for key, value in fixed.items() if (key, value) != ("model.vocab_size", 0)}


def refuse_another_run(path: Path | None, run_dir: Path, current: dict[str, Any]) -> None:
    """Raise ValueError, naming what differs, if the checkpoint at `path` or the run directory is of another run."""
    recorded, config = {}, run_dir / "config.toml"
    if config.exists():
        try:
            tables = tomllib.loads(config.read_text(encoding="utf-8"))
            recorded = {f"{section}.{key}": value for section, keys in tables.items() for key, value in keys.items()}
        except (ValueError, AttributeError) as error:
            raise ValueError(f"{config} is damaged ({error}): remove it, it is written again") from error
    if path is not None:
        recorded |= read_state(path)["identity"]
    differences = [
        f"  {key}: {recorded[key]!r} there, {value!r} now"
        for key, value in current.items()
        if key in recorded and recorded[key] != value
    ]
    if differences:
        lines = "\n".join(differences)
        raise ValueError(f"{path or run_dir} is of another run:\n{lines}\nuse another --run.dir, or the same values")


def check_writable(run_dir: Path) -> None:
    """Raise ValueError if the run directory cannot be made or written. Writes nothing."""
    existing = next(path for path in (run_dir, *run_dir.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise ValueError(f"run.dir={run_dir} cannot be written: {existing} is not a writable directory")


def lock(run_dir: Path) -> IO:
    """Hold the run directory, made if need be, until the file is closed. Raises ValueError while another job holds it.

    The system lets go of the lock when the process ends, however it ends.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    file = (run_dir / ".lock").open("a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise ValueError(
            f"run.dir={run_dir} is in use by another job: wait until that has ended, or use another --run.dir"
        ) from error
    return file


def prepare_run(
    run_dir: Path, config_toml: str, tokenizer: str, first_step: int, damaged: list[Path], unevaluated: bool = False
) -> None:
    """Rank 0: drop unfinished saves and metrics of what will be done again, put damaged checkpoints aside.

    Raises ValueError, before it changes anything, if metrics.jsonl is damaged elsewhere than in its last line.
    """
    metrics = kept_metrics(run_dir / "metrics.jsonl", first_step, unevaluated)
    (run_dir / "checkpoints").mkdir(exist_ok=True)
    for unfinished in (run_dir / "checkpoints").glob(".tmp-*"):
        shutil.rmtree(unfinished)
    for path in damaged:
        path.rename(path.with_name(f"damaged-{path.name}-{time.time_ns()}"))
    write_atomically(run_dir / "config.toml", config_toml)
    write_atomically(run_dir / "tokenizer.json", tokenizer)
    if metrics is not None:
        write_atomically(run_dir / "metrics.jsonl", metrics)


def kept_metrics(path: Path, first_step: int, unevaluated: bool = False) -> str | None:
    """The whole lines of steps before first_step; None when that is all there is.

    `unevaluated`: without the evaluation of the last of them, which may have been made up for before.
    """
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    kept = []
    for number, line in enumerate(lines, 1):
        if line.endswith(b"\n"):  # else it is the torn last one
            try:
                record = json.loads(line)
                again = record["step"] >= first_step - ("val_loss" in record and unevaluated)
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path}, line {number}, is damaged: remove that line") from error
            kept += [] if again else [line]
    return b"".join(kept).decode() if kept != lines else None


def write_atomically(path: Path, text: str) -> None:
    """Old content or new, never half."""
    unfinished = path.with_name(f".tmp-{path.name}")
    with unfinished.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)


# ---------------------------------------------------------------------------------------------------------------------
# Checksums: one for each file, kept in state.json, which has one of its own


def checksum(path: Path) -> list[int]:
    """[bytes, CRC-32]"""
    size, crc = 0, 0
    with path.open("rb") as file:
        while block := file.read(2**24):
            size, crc = size + len(block), zlib.crc32(block, crc)
    return [size, crc]


def state_checksum(state: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(state, sort_keys=True).encode())


def read_state(path: Path) -> dict[str, Any]:
    """A checkpoint's state.json. Raises ValueError if it is damaged."""
    try:
        state = json.loads((path / "state.json").read_bytes())
        whole = state.pop("crc32") == state_checksum(state)
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        whole = False
    if not whole:
        raise ValueError(f"{path}/state.json is damaged or missing")
    return state


def damage(path: Path, part: int = 0, parts: int = 1) -> list[str]:
    """What is wrong with a checkpoint: state.json, every `parts`-th of the other files, a stranger's `.metadata`."""
    try:
        files = read_state(path)["files"]
    except ValueError as error:
        return [str(error)]
    found = []
    for name in sorted(files)[part::parts]:
        try:
            size, crc = checksum(path / name)
        except OSError as error:
            found.append(f"{path}/{name} cannot be read: {error.strerror}")
            continue
        if size != files[name][0]:
            found.append(f"{path}/{name} has {size:,} bytes instead of {files[name][0]:,}")
        elif crc != files[name][1]:
            found.append(f"{path}/{name} has another checksum than when it was written")
        elif name == ".metadata":
            try:
                Reader(path).read_metadata()
            except Exception as error:  # a stranger's pickle may raise anything
                found.append(f"{path}/{name} is refused: {error}")
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Save and load


class Saver:
    """Saves one checkpoint after the other. Every rank has one.

    With `async_save` a thread with a process group of its own writes a copy in CPU memory while training goes on. The
    next save, and `wait`, first wait for it and raise what went wrong in it, as OSError; `failed` tells earlier.
    """

    def __init__(self, run_dir: Path, config: CheckpointConfig):
        self.run_dir, self.keep, self.async_save = run_dir, config.keep, config.async_save
        # The thread's collectives must not mix with the training loop's. A slow disk is no reason to end the job.
        self.group = dist.new_group(backend="gloo", timeout=timedelta(hours=12))
        enter = partial(torch.cuda.set_device, torch.cuda.current_device()) if torch.cuda.is_available() else None
        self.thread, self.pending = ThreadPoolExecutor(1, initializer=enter), Future()  # a thread starts on GPU 0
        self.pending.set_result(None)

    def save(self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        """Write step_<step> and remove the oldest checkpoints beyond `keep`. All ranks together."""
        self.wait()
        model_state, optimizer_state = get_state_dict(model, optimizer, options=OPTIONS)
        tensors, state = {"model": model_state, "optimizer": moments(optimizer_state)}, {**state, "step": step}
        if self.async_save:
            self.pending = self.thread.submit(self.write, BlockingAsyncStager().stage(tensors), state)
        else:
            self.write(tensors, state)

    def wait(self) -> None:
        self.pending.result()

    def failed(self) -> bool:
        return self.pending.done() and self.pending.exception() is not None

    def write(self, tensors: dict[str, Any], state: dict[str, Any]) -> None:
        """A failure on any rank raises OSError on all of them."""
        folder, name = self.run_dir / "checkpoints", f"step_{state['step']:08d}"
        unfinished = folder / f".tmp-{name}"
        try:
            self.together(lambda rank: unfinished.mkdir() if rank == 0 else None)  # dcp would make a vanished run anew
            dcp.save(tensors, storage_writer=Writer(unfinished), process_group=self.group)
            files = self.together(lambda rank: {file.name: checksum(file) for file in written_by(rank, unfinished)})
            state["files"] = {name: entry for entries in files for name, entry in entries.items()}
            self.together(lambda rank: self.complete(unfinished, folder / name, state) if rank == 0 else None)
        except (CheckpointException, OSError) as error:
            complete = complete_checkpoints(self.run_dir)
            intact = f"{complete[-1]} is intact" if complete else "there is no earlier one"
            raise OSError(
                f"{folder / name} could not be written: {cause(error)}; {intact}: "
                "make room or give back access, and the same command goes on from it"
            ) from error

    def complete(self, unfinished: Path, final: Path, state: dict[str, Any]) -> None:
        """Rank 0: from here on it counts; then remove the oldest."""
        text = json.dumps({**state, "crc32": state_checksum(state)}, indent=1)
        write_atomically(unfinished / "state.json", text)
        unfinished.rename(final)
        for old in complete_checkpoints(self.run_dir)[: -self.keep]:
            trash = old.with_name(f".tmp-{old.name}")  # so that a kill leaves no half-removed checkpoint behind
            old.rename(trash)
            shutil.rmtree(trash)

    def together(self, function: Callable[[int], Any]) -> list[Any]:
        """`function(rank)` of every rank, on every rank; an OSError on one of them is raised on all."""
        result = None
        try:
            result = function(dist.get_rank())
        except OSError as error:
            result = error
        results = [None] * dist.get_world_size()
        dist.all_gather_object(results, result, group=self.group)
        for result in results:
            if isinstance(result, OSError):
                raise result
        return results


def written_by(rank: int, path: Path) -> list[Path]:
    """The files of a checkpoint that this rank has written."""
    return [*path.glob(f"__{rank}_*.distcp"), *([path / ".metadata"] if rank == 0 else [])]


def cause(error: BaseException) -> str:
    """Why a save failed: what the system said on one of the ranks, if it did."""
    failures = [failure for failure, _ in getattr(error, "failures", {}).values()] or [error]
    return str(min(failures, key=lambda failure: not isinstance(failure, OSError)))


def moments(optimizer_state: dict[str, Any]) -> dict[str, Any]:
    """Of a flat optimizer state dict, what is saved: hyperparameters are the configuration's."""
    return {name: value for name, value in optimizer_state.items() if name.startswith("state.")}


class Writer(dcp.FileSystemWriter):
    """Raises the system's own error, which torch's zip writer hides behind one about positions in its file."""

    def write_data(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().write_data(*args, **kwargs)
        except RuntimeError as error:
            raise error.__context__ if isinstance(error.__context__, OSError) else error from None


class Reader(dcp.FileSystemReader):
    """Reads `.metadata`, which is a pickle, without running what a stranger may have put into it."""

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
            raise ValueError(f"it names {module}.{name}, which no checkpoint needs")
        return super().find_class(module, name)


def load(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Load weights and moments into a model and optimizer on any mesh. All ranks together.

    The optimizer's hyperparameters stay those of the configuration: only its moments come from the checkpoint.
    """
    model_state, optimizer_state = get_state_dict(model, optimizer, options=OPTIONS)
    dcp.load({"model": model_state, "optimizer": moments(optimizer_state)}, storage_reader=Reader(path))  # in place
    set_state_dict(model, optimizer, model_state_dict=model_state, optim_state_dict=optimizer_state, options=OPTIONS)


def load_weights(path: Path, model: nn.Module) -> None:
    """Load weights alone into an unsharded model, without a process group."""
    with warnings.catch_warnings():  # there is no process group, on purpose
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.load({"model": model.state_dict()}, storage_reader=Reader(path))
