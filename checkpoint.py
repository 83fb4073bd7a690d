"""Checkpoints: written under a temporary name, renamed when complete, so a directory counts by its very name (law 6).

    runs/quickstart/checkpoints/
      step_00000200/                 complete
        .metadata  __0_0.distcp ...  torch.distributed.checkpoint: each rank's slices; any mesh can read them (law 2)
        state.json                   step, tokens, status, what must not change within a run, checksums
      .tmp-step_00000400/            a save that did not finish; removed at the next start
      damaged-step_00000300-.../     a checkpoint with wrong checksums, put aside when the run went on without it

All ranks save and load together; what goes wrong on one is raised on all. runtime/rundir.py says which one a run goes
on from.
"""

import json
import shutil
import threading
import time
import zlib
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import BlockingAsyncStager
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from runtime import ranks, storage
from runtime.storage import Reader, cause, write_atomically

# By parameter name instead of by group and index: a change of the groups does not shift anybody's moments.
OPTIONS = StateDictOptions(flatten_optimizer_state_dict=True)


@dataclass
class CheckpointConfig:
    """When to save and where to start from."""

    every: Annotated[int, "steps between checkpoints; 0 = only at the end", (">=", 0)] = 0
    keep: Annotated[int, "newest checkpoints that are kept", (">=", 1)] = 2
    keep_every: Annotated[int, "the checkpoint of every N-th step is kept for good; 0 = none", (">=", 0)] = 0
    async_save: Annotated[bool, "write from a copy in CPU memory while training goes on"] = False
    resume: Annotated[str, '"auto" = from its newest; "never"; or a checkpoint or run directory to branch off'] = "auto"
    init_from: Annotated[
        str, "start a new run from a Llama in Hugging Face's format: a folder, or an id on the Hub; weights only"
    ] = ""


def step_folder(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step_{step:08d}"


def complete_checkpoints(run_dir: Path) -> list[Path]:
    """Oldest first."""
    return sorted((run_dir / "checkpoints").glob("step_" + "[0-9]" * 8))


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


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


def write_state(path: Path, state: dict[str, Any]) -> None:
    write_atomically(path / "state.json", json.dumps({**state, "crc32": state_checksum(state)}, indent=1))


def read_state(path: Path) -> dict[str, Any]:
    """A checkpoint's state.json. Raises UserError if it is damaged."""
    try:
        state = json.loads((path / "state.json").read_bytes())
        whole = state.pop("crc32") == state_checksum(state)
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        whole = False
    if not whole:
        raise ranks.UserError(f"{path}/state.json is damaged or missing")
    return state


def damage(path: Path, part: int = 0, parts: int = 1) -> list[str]:
    """What is wrong with a checkpoint: state.json, every `parts`-th of the other files, a stranger's `.metadata`."""
    try:
        files = read_state(path)["files"]
    except ranks.UserError as error:
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
# Save


class Saver:
    """Saves one checkpoint after the other. Every rank has one.

    With `async_save` a daemon thread with a process group of its own writes a copy in CPU memory while training goes
    on. The next save, and `wait`, first wait for it and raise what went wrong in it; `problems` tells earlier. Leaving
    the `with` block waits for nobody: a save that is under way then stays unfinished.
    """

    def __init__(self, run_dir: Path, config: CheckpointConfig, seconds: float = 0.0):
        self.run_dir, self.config, self.seconds = run_dir, config, seconds  # that the last save took, or one before
        # The thread's collectives must not mix with the training loop's. A slow disk is no reason to end the job;
        # without a thread, Shutdown.unwatched sees to that, and the default group saves a socket for each other rank.
        self.group = dist.new_group(backend="gloo", timeout=ranks.WORK_TIMEOUT) if config.async_save else None
        self.gpu = torch.cuda.current_device() if torch.cuda.is_available() else None
        self.pending: Future[Path] | None = None  # of the newest save, until its completion has been told
        self.layout: storage.Layout | None = None  # of the last save that succeeded
        self.abandoned, self.lock = False, threading.Lock()

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, *_: object) -> None:
        with self.lock:  # waits for this rank's disk at most
            self.abandoned = True

    def writing(self) -> bool:
        return self.pending is not None and not self.pending.done()

    def problems(self) -> list[BaseException]:
        """What went wrong in the background."""
        failure = self.pending.exception() if self.pending is not None and self.pending.done() else None
        return [] if failure is None else [failure]

    def wait(self) -> None:
        if self.pending is not None:
            self.pending.result()

    def completed(self) -> list[tuple[str, Path]]:
        """The newest checkpoint as train() yields it, once; to be asked when no rank is `writing` any more."""
        self.pending, told = None, self.pending
        return [] if told is None else [("checkpoint", told.result())]

    def save(self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> list[tuple]:
        """Write step_<step> and remove old checkpoints. All ranks together; raises UserError on all of them.

        Returns what is complete now and was not told before, as `completed` does.
        """
        self.wait()
        told = self.completed()
        model_state, optimizer_state = get_state_dict(model, optimizer, options=OPTIONS)
        optimizer_state = storage.with_one_step(moments(optimizer_state))
        tensors, state = {"model": model_state, "optimizer": optimizer_state}, {**state, "step": step}
        self.pending = Future()
        if self.config.async_save:
            arguments = (self.pending, BlockingAsyncStager().stage(tensors), state)
            threading.Thread(target=self.finish, args=arguments, daemon=True).start()
            return told
        self.finish(self.pending, tensors, state)
        self.wait()
        return told + self.completed()

    def finish(self, pending: Future, tensors: dict[str, Any], state: dict[str, Any]) -> None:
        if self.gpu is not None:
            torch.cuda.set_device(self.gpu)  # a new thread starts on GPU 0
        try:
            pending.set_result(self.write(tensors, state))
        except BaseException as error:
            pending.set_exception(error)

    def write(self, tensors: dict[str, Any], state: dict[str, Any]) -> Path:
        """The complete checkpoint. A failure on any rank raises UserError on all of them."""
        started = time.perf_counter()
        rank, final = dist.get_rank(), step_folder(self.run_dir, state["step"])
        unfinished, together = final.with_name(f".tmp-{final.name}"), partial(ranks.together, group=self.group)
        try:
            if any(ranks.gather(rank == 0 and final.is_dir(), self.group)):  # only state.json has changed since
                written, state["files"] = final, together(partial(read_state, final))["files"]
            else:
                written = unfinished
                together(unfinished.mkdir if rank == 0 else None)  # dcp would make a run that has vanished anew
                self.layout = storage.save(tensors, unfinished, self.layout, self.group)
                sums = together(lambda: {file.name: checksum(file) for file in written_by(rank, unfinished)})
                state["files"] = {name: entry for own in ranks.gather(sums, self.group) for name, entry in own.items()}
                self.seconds = round(time.perf_counter() - started, 3)
            state["save_seconds"] = self.seconds
            together(partial(self.complete, written, final, state) if rank == 0 else None)
        except (CheckpointException, ranks.UserError) as error:
            done = complete_checkpoints(self.run_dir)
            intact = f"{done[-1]} is intact" if done else "there is no earlier one"
            raise ranks.UserError(
                f"{final} could not be written: {cause(error)}; {intact}: "
                "make room or give back access, and the same command goes on from it"
            ) from error
        return final

    def complete(self, written: Path, final: Path, state: dict[str, Any]) -> None:
        """Rank 0: from here on it counts; then remove what is older than the newest `keep`, but for milestones."""
        with self.lock:
            if self.abandoned:
                raise ranks.UserError("the run has ended meanwhile")
            write_state(written, state)
            written.rename(final)
            for old in complete_checkpoints(self.run_dir)[: -self.config.keep]:
                if not self.config.keep_every or step_of(old) % self.config.keep_every:
                    trash = old.with_name(f".tmp-{old.name}")  # so that a kill leaves no half-removed checkpoint behind
                    old.rename(trash)
                    shutil.rmtree(trash)


def written_by(rank: int, path: Path) -> list[Path]:
    """The files of a checkpoint that this rank has written."""
    return [*path.glob(f"__{rank}_*.distcp"), *([path / ".metadata"] if rank == 0 else [])]


def moments(optimizer_state: dict[str, Any]) -> dict[str, Any]:
    """Of a flat optimizer state dict, what is saved: hyperparameters are the configuration's."""
    return {name: value for name, value in optimizer_state.items() if name.startswith("state.")}


# ---------------------------------------------------------------------------------------------------------------------
# Load


def load(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Load weights and moments into a model and optimizer on any mesh. All ranks together; raises UserError on all.

    The optimizer's hyperparameters stay those of the configuration: only its moments come from the checkpoint.
    """
    model_state, optimizer_state = get_state_dict(model, optimizer, options=OPTIONS)
    tensors = {"model": model_state, "optimizer": moments(optimizer_state)}
    ranks.together(partial(read, Reader(path), tensors))
    set_state_dict(model, optimizer, model_state_dict=model_state, optim_state_dict=optimizer_state, options=OPTIONS)


def read(reader: Reader, tensors: dict[str, dict[str, Any]]) -> None:
    """This rank's slices, in place. No communication."""
    check_fit(reader, tensors)
    reader.load(tensors)


def check_fit(reader: Reader, tensors: dict[str, dict[str, Any]]) -> None:
    """Raise UserError, naming each, if the checkpoint has other tensors, or tensors of other shapes."""
    saved = reader.read_metadata().state_dict_metadata
    there = {name: tuple(entry.size) for name, entry in saved.items() if hasattr(entry, "size")}
    here = {f"{part}.{name}": tuple(tensor.shape) for part, state in tensors.items() for name, tensor in state.items()}
    if lines := storage.misfits(there, here):
        remedy = "go on with the code and configuration that wrote it, or start over in another --run.dir"
        raise ranks.UserError("\n".join([f"{reader.path} does not fit this model and optimizer:", *lines, remedy]))
