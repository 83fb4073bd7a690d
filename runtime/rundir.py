"""The run directory: who may use it, which checkpoint goes on, what must not change, and what is written when.

    runs/quickstart/
      config.toml                      the resolved configuration of the last start, and what started it
      tokenizer.json
      metrics.jsonl                    one JSON object a line, appended, flushed
      .lock                            held by rank 0 of the job that runs here; the system lets go of it after a crash
      checkpoints/                     see checkpoint.py

A directory that exists is locked before anybody looks into it; one that does not is claimed by making it. Until the
checkpoint is loaded nothing else is written: a start that is refused leaves everything as it was (law 7). Rank 0 alone
decides what is there and what is removed.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
import tomllib
import uuid
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import IO, Any

import torch
import torch.distributed as dist
from torch import nn

import checkpoint
import configs
from configs import Config
from huggingface import weights
from huggingface.config import tokenizer_names
from runtime import ranks, storage
from runtime.monitor import check_wandb, say
from runtime.ranks import UserError

FREE = ("data.num_workers", "data.tokenizer_train_mib")  # of the model and the data, what may change within a run


class RunDirectory:
    """One run's directory, within a `with` block. All ranks have one and call its methods together.

    After entering, `step`, `resume_from` and `state` say where the run goes on: 0, None and {} for a new one.
    """

    def __init__(self, config: Config):
        self.path, self.config = Path(config.run.dir), config
        self.lock: IO | None = None
        self.pretrained: dict[str, weights.Stored] = {}  # where a new run finds the weights of checkpoint.init_from

    def __enter__(self) -> "RunDirectory":
        """Lock it if it exists, and choose the newest intact checkpoint. Raises UserError, on all ranks."""
        try:
            candidates = ranks.on_rank_0(self.look)
            self.resume_from, self.damaged = choose_checkpoint(candidates)
            self.state = ranks.on_rank_0(self.read_state)
            if self.resume_from is None and (init_from := self.config.checkpoint.init_from):
                with ranks.patience():  # it may come from the Hub
                    self.pretrained = ranks.on_each_node(partial(weights.find, init_from, self.config.model))
                fingerprint = ranks.together(partial(weights.fingerprint, self.pretrained))
                ranks.same_everywhere(f"checkpoint.init_from={init_from}", fingerprint, "copy it from one")
        except BaseException:
            self.__exit__()
            raise
        self.step = self.state.get("step", 0)
        return self

    def __exit__(self, *_: object) -> None:
        if self.lock is not None:
            self.lock.close()

    @property
    def own_tokenizer(self) -> Path | None:
        """The tokenizer.json of a run that goes on from a checkpoint of its own, if none is named beside that."""
        unnamed = ["train", *tokenizer_names(self.state.get("init_from", ""))]
        own = self.is_own(self.resume_from) and self.config.data.tokenizer in unnamed
        return self.path / "tokenizer.json" if own else None

    def is_own(self, path: Path | None) -> bool:
        """Else it is a checkpoint of the run that this one branches off."""
        return path is not None and self.path in path.parents

    def look(self) -> list[Path]:
        check_wandb(self.config.run.wandb)
        check_writable(self.path)
        if self.path.exists():
            self.lock = hold(self.path)
        return find_resume(self.path, self.config.checkpoint.resume)

    def read_state(self) -> dict[str, Any]:
        if self.resume_from is None:
            return {}
        state = checkpoint.read_state(self.resume_from)
        recorded_config(self.path)  # said before anything is tokenised, if it is damaged
        refuse_another_run(self.resume_from, state, identity(configs.flatten(self.config)))
        if not self.is_own(self.resume_from):  # a branch is a run of its own
            state |= {"wandb_id": None, "branched_from": self.config.checkpoint.resume}
        return state

    def is_complete(self, config: Config, fingerprint: str, tokenizer_json: str) -> bool:
        """Whether there is nothing left to do; if there is, the directory is ours from here on.

        `config` is settled; `fingerprint` is the data's. Raises UserError if the run was of something else.
        """
        self.config, self.tokenizer_json = config, tokenizer_json
        tokenizer = hashlib.sha256(tokenizer_json.encode()).hexdigest()[:32]
        self.identity = identity(configs.flatten(config)) | {"tokenizer": tokenizer, "data": fingerprint}
        ranks.on_rank_0(partial(refuse_another_run, self.resume_from, self.state, self.identity))
        if self.step >= config.train.steps:
            say(
                f"complete at step {self.step}, {self.resume_from}: go on with --train.steps=N (N > {self.step}), "
                "or start over with another --run.dir"
            )
            return True
        token = ranks.on_rank_0(self.claim)
        ranks.together(partial(self.check_shared, token))
        return False

    def claim(self) -> str:
        """Make the directory unless it is there, and leave a token in it that every node must see."""
        self.metrics = kept_metrics(self.path / "metrics.jsonl", self.step + 1, self.state.get("unevaluated", False))
        if self.lock is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            try:
                self.path.mkdir()
            except FileExistsError as error:
                raise in_use(self.path) from error
            self.lock = hold(self.path)
        token = uuid.uuid4().hex
        self.lock.truncate(0)
        self.lock.write(token)
        self.lock.flush()
        os.fsync(self.lock.fileno())
        return token

    def check_shared(self, token: str) -> None:
        lock = self.path / ".lock"
        if not lock.exists() or lock.read_text() != token:
            raise UserError(f"run.dir={self.path} is not the same directory on all nodes: use a shared file system")

    def load(self, model: nn.Module, optimizer: torch.optim.Optimizer, place: Callable) -> None:
        """Load the checkpoint, or the weights of `checkpoint.init_from`, if there is one; `place` as in `init_weights`.

        When that has succeeded, write what a run starts with.
        """
        if self.resume_from is not None:
            checkpoint.load(self.resume_from, model, optimizer)
        elif self.pretrained:
            ranks.together(partial(weights.load, self.pretrained, model, place))
            init_from, tokenizer = self.config.checkpoint.init_from, self.config.data.tokenizer
            say(f"started from the weights of {init_from}, with the tokenizer {tokenizer}")
        ranks.on_rank_0(self.prepare)
        if self.resume_from is not None:
            say(f"resumed from {self.resume_from}")
            if self.state["total_steps"] != self.config.train.steps:
                before, now = self.state["total_steps"], self.config.train.steps
                say(f"{now} steps now instead of {before}: the schedule is another one from here on")

    def prepare(self) -> None:
        config = configs.to_toml(self.config)
        if not checkpoint.complete_checkpoints(self.path) and self.is_another(config):
            say(f"{self.path}/config.toml was of another configuration, of which there is no checkpoint: replaced")
        own = [path for path in self.damaged if self.is_own(path)]  # nothing is done to what we branch off
        prepare_run(self.path, f"# {made_by()}\n\n{config}", self.tokenizer_json, self.metrics, own)

    def is_another(self, config: str) -> bool:
        try:
            return recorded_config(self.path) not in ({}, tomllib.loads(config))
        except UserError:  # damaged
            return True

    def record(self, step: int, stopping: bool, **values: Any) -> dict[str, Any]:
        """What a checkpoint keeps beside the tensors: `values`, and what the run is."""
        defaults = configs.defaults()
        at_default = [key for key, value in self.identity.items() if key in defaults and value == defaults[key]]
        steps = self.config.train.steps
        status = "stopped" if stopping else "complete" if step == steps else "saved"
        total = {"total_steps": steps, "status": f"{status} at step {step}"}
        total["init_from"] = self.state.get("init_from", self.config.checkpoint.init_from)
        return self.state | total | {"identity": self.identity, "at_default": at_default} | values

    def say_how_it_ended(self, step: int, stopping: bool, failure: UserError | None) -> None:
        """Raises `failure`, for which the run was stopped, if there is one."""
        own = checkpoint.complete_checkpoints(self.path)
        newest = own[-1] if own else self.resume_from
        if stopping:
            say(f"the same command goes on from {newest}" if newest else "the same command starts anew")
            say(f"stopped at step {step}")
            if failure is not None:
                raise failure
        else:
            say(f"complete at step {step}: checkpoint {newest}, metrics {self.path}/metrics.jsonl")
            say(f'sample from it: python generate.py {self.path} --prompt "def "')

    def needed_from(self) -> int:
        """The step from which on a run may have to be resumed: that of the oldest of the `keep` newest checkpoints."""
        newest = checkpoint.complete_checkpoints(self.path)[-self.config.checkpoint.keep :]
        return checkpoint.step_of(newest[0]) if newest else 0


# ---------------------------------------------------------------------------------------------------------------------
# Who may use it


def check_writable(run_dir: Path) -> None:
    """Raise UserError if the run directory cannot be made or written. Writes nothing."""
    existing = next(path for path in (run_dir, *run_dir.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"run.dir={run_dir} cannot be written: {existing} is not a writable directory")


def in_use(run_dir: Path) -> UserError:
    return UserError(f"run.dir={run_dir} is in use by another job: wait until that has ended, or use another --run.dir")


def hold(run_dir: Path) -> IO:
    """Hold the directory until the file is closed. Raises UserError while another job holds it.

    The system lets go of the lock when the process ends, however it ends.
    """
    file = (run_dir / ".lock").open("a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise in_use(run_dir) from error
    except OSError as error:  # some file systems of clusters have no locks
        say(f"WARNING: {run_dir} cannot be locked ({error.strerror}): see to it that no two jobs run in it at a time")
    return file


# ---------------------------------------------------------------------------------------------------------------------
# Which checkpoint goes on


def find_resume(run_dir: Path, resume: str) -> list[Path]:
    """Checkpoints to start from, the best first; [] for a new run. Raises UserError when a start would do damage."""
    own = checkpoint.complete_checkpoints(run_dir)
    if resume == "auto":
        return own[::-1]
    if resume == "never":
        if own:
            raise UserError(
                f'checkpoint.resume="never", but {run_dir} holds {own[-1].name}: start over in another --run.dir'
            )
        return []
    path = Path(resume)
    found = [path] if (path / "state.json").exists() else checkpoint.complete_checkpoints(path)
    if not found:
        raise UserError(f"checkpoint.resume={resume} is neither a checkpoint nor a run directory that holds one")
    if not own:
        return found[::-1]
    if found[-1].resolve() != own[-1].resolve() and branched_from(own) != resume:
        raise UserError(
            f"checkpoint.resume={resume} is not the newest checkpoint of {run_dir}, nor what that run branched off: "
            f"{own[-1].name} there would be overwritten; branch off into another --run.dir"
        )
    return own[::-1]  # a branch that was begun before: the same command continues it


def branched_from(checkpoints: list[Path]) -> str | None:
    """What the run of these checkpoints branched off, according to the newest that can be read."""
    for path in reversed(checkpoints):
        with contextlib.suppress(UserError):
            return checkpoint.read_state(path).get("branched_from")
    return None


def choose_checkpoint(candidates: list[Path]) -> tuple[Path | None, list[Path]]:
    """The first of the candidates, the newest, that is intact, and the damaged ones before it. All ranks read along."""
    ranks.together(partial(check_all_there, candidates))
    damaged = []
    for path in candidates:
        found = ranks.gather(checkpoint.damage(path, dist.get_rank(), dist.get_world_size()))
        found = list(dict.fromkeys(line for lines in found for line in lines))
        if not found:
            return path, damaged
        damaged.append(path)
        say("WARNING: a damaged checkpoint, trying the one before it:\n  " + "\n  ".join(found))
    if damaged:
        raise UserError(f"no checkpoint is intact, {damaged[-1]} was the last: start over in another --run.dir")
    return None, damaged


def check_all_there(candidates: list[Path]) -> None:
    if not all(path.is_dir() for path in candidates):
        raise UserError("run.dir is not the same directory on all nodes: use a shared file system")


# ---------------------------------------------------------------------------------------------------------------------
# What is written at the start


def prepare_run(run_dir: Path, config: str, tokenizer_json: str, metrics: str | None, damaged: list[Path]) -> None:
    """Rank 0: drop unfinished saves and lines of what will be done again, put damaged checkpoints aside.

    Each change is atomic, and a start that is killed between two of them is made up for by the next. `metrics`: what is
    kept of metrics.jsonl, None for all of it.
    """
    (run_dir / "checkpoints").mkdir(exist_ok=True)
    for unfinished in (run_dir / "checkpoints").glob(".tmp-*"):
        shutil.rmtree(unfinished)
    storage.write_atomically(run_dir / "tokenizer.json", tokenizer_json)
    storage.write_atomically(run_dir / "config.toml", config)
    if metrics is not None:
        storage.write_atomically(run_dir / "metrics.jsonl", metrics)
    for path in damaged:
        path.rename(path.with_name(f"damaged-{path.name}-{time.time_ns()}"))


def made_by() -> str:
    """With what a run can be explained a year later: the commit, torch's version and the command line."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    return f"commit {commit}, torch {torch.__version__}: {shlex.join(sys.argv)}".replace("\n", " ")


def kept_metrics(path: Path, first_step: int, unevaluated: bool = False) -> str | None:
    """The whole lines of steps before first_step; None when that is all there is. Raises UserError for a damaged one.

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
                raise UserError(f"{path}, line {number}, is damaged: remove that line") from error
            kept += [] if again else [line]
    return b"".join(kept).decode() if kept != lines else None


# ---------------------------------------------------------------------------------------------------------------------
# What must not change within a run


def identity(flat: dict[str, Any]) -> dict[str, Any]:
    """What must not change within a run: the shape of the model, the data and its order, by "section.key".

    How many ranks there are, the micro-batch and how rows are loaded may change. A vocab_size of 0 is not known yet.
    """
    fixed = {key: value for key, value in flat.items() if key.startswith(("model.", "data.")) and key not in FREE}
    fixed |= {key: flat[key] for key in ("train.seed", "train.global_batch_size")}
    return {key: value for key, value in fixed.items() if (key, value) != ("model.vocab_size", 0)}


def refuse_another_run(path: Path | None, state: dict[str, Any], current: dict[str, Any]) -> None:
    """Raise UserError, naming what differs, if the checkpoint at `path` with this state is of another run.

    A key that its record lacks had its default. One that only the record has is refused unless it had its default then.
    """
    if path is None:
        return
    recorded, defaults = state["identity"], configs.defaults()
    there = {key: recorded.get(key, defaults.get(key)) for key in current}
    lines = [f"  {key}: {there[key]!r} there, {now!r} now" for key, now in current.items() if there[key] != now]
    lines += [
        f"  {key}: {value!r} there, and no such key now"
        for key, value in recorded.items()
        if "." in key and key not in defaults and key not in state.get("at_default", ())
    ]
    if lines:
        raise UserError("\n".join([f"{path} is of another run:", *lines, "use another --run.dir, or the same values"]))


def read_run(run_dir: Path, step: int | None = None) -> tuple[Path, configs.ModelConfig, configs.DataConfig]:
    """The checkpoint of that step, or the newest, and what it is of. Raises UserError if one file is damaged."""
    complete = checkpoint.complete_checkpoints(run_dir)
    if not complete:
        raise UserError(f"{run_dir} holds no complete checkpoint: name a run directory, such as runs/quickstart")
    path = complete[-1] if step is None else checkpoint.step_folder(run_dir, step)
    if path not in complete:
        steps = ", ".join(str(checkpoint.step_of(path)) for path in complete)
        raise UserError(f"{run_dir} holds no complete checkpoint of step {step}: there are those of {steps}")
    if damage := checkpoint.damage(path):
        raise UserError("\n".join(damage))
    tables = recorded_config(run_dir)
    try:
        return path, configs.ModelConfig(**tables["model"]), configs.DataConfig(**tables["data"])
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{run_dir}/config.toml is missing, or of other code ({error}): use that, or mend it"
        ) from error


def recorded_config(run_dir: Path) -> dict[str, dict[str, Any]]:
    """What config.toml holds; {} without one. Raises UserError if it is damaged."""
    path = run_dir / "config.toml"
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        if not all(isinstance(keys, dict) for keys in tables.values()):
            raise ValueError("a key stands outside a section")
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): remove it, it is written again") from error
    return tables
