"""Checkpoints: written under a temporary name, renamed when complete, so a directory counts by its very name.

    runs/quickstart/
      config.toml                      the resolved configuration of the last start
      tokenizer.json
      metrics.jsonl                    one JSON object a line, appended, flushed
      checkpoints/
        step_00000200/                 complete
          .metadata  __0_0.distcp ...  torch.distributed.checkpoint: each rank's slices; any mesh can read them
          state.json                   step, tokens seen, and what must not change (see `identity`)
        .tmp-step_00000400/            a save that did not finish; removed at the next start

All ranks call `save`, `load` and `prepare_run` together. Rank 0 alone decides what is there and what is removed.
"""

import json
import os
import shutil
import tomllib
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

# By parameter name instead of by group and index: a change of the groups does not shift anybody's moments.
OPTIONS = StateDictOptions(flatten_optimizer_state_dict=True)


@dataclass
class CheckpointConfig:
    """When to save and where to start from."""

    every: Annotated[int, "steps between checkpoints; 0 = only at the end"] = 0
    keep: Annotated[int, "newest checkpoints that are kept"] = 2
    resume: Annotated[
        str, '"auto" = from the newest in the run directory; "never"; or the checkpoint or run directory to branch off'
    ] = "auto"


# ---------------------------------------------------------------------------------------------------------------------
# The run directory


def complete_checkpoints(run_dir: Path) -> list[Path]:
    """Oldest first."""
    return sorted((run_dir / "checkpoints").glob("step_" + "[0-9]" * 8))


def read_state(path: Path) -> dict[str, Any]:
    return json.loads((path / "state.json").read_text())


def find_resume(run_dir: Path, resume: str) -> Path | None:
    """The checkpoint to start from, or None. Raises ValueError when a start would damage what is there."""
    own = complete_checkpoints(run_dir)
    if resume == "auto":
        return own[-1] if own else None
    if resume == "never":
        if own:
            raise ValueError(
                f'checkpoint.resume="never", but {run_dir} holds {own[-1].name}: start over in another --run.dir'
            )
        return None
    path = Path(resume)
    found = [path] if (path / "state.json").exists() else complete_checkpoints(path)
    if not found:
        raise ValueError(f"checkpoint.resume={resume} is neither a checkpoint nor a run directory that holds one")
    if not own:
        return found[-1]
    if found[-1].resolve() != own[-1].resolve() and read_state(own[-1]).get("branched_from") != resume:
        raise ValueError(
            f"checkpoint.resume={resume} is not the newest checkpoint of {run_dir}, nor what that run branched off: "
            f"{own[-1].name} there would be overwritten; branch off into another --run.dir"
        )
    return own[-1]  # a branch that was begun before: the same command continues it


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
    recorded = {}
    if (run_dir / "config.toml").exists():
        tables = tomllib.loads((run_dir / "config.toml").read_text(encoding="utf-8"))
        recorded = {f"{section}.{key}": value for section, keys in tables.items() for key, value in keys.items()}
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


def prepare_run(run_dir: Path, config_toml: str, tokenizer: str, first_step: int) -> None:
    """Rank 0: make the directory, drop unfinished saves and metrics of steps that will be done again."""
    (run_dir / "checkpoints").mkdir(parents=True, exist_ok=True)
    for unfinished in (run_dir / "checkpoints").glob(".tmp-*"):
        shutil.rmtree(unfinished)
    write_atomically(run_dir / "config.toml", config_toml)
    write_atomically(run_dir / "tokenizer.json", tokenizer)
    metrics = run_dir / "metrics.jsonl"
    if metrics.exists():
        lines = metrics.read_text().splitlines(keepends=True)
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] < first_step]
        if kept != lines:
            write_atomically(metrics, "".join(kept))


def write_atomically(path: Path, text: str) -> None:
    """Old content or new, never half."""
    unfinished = path.with_name(f".tmp-{path.name}")
    with unfinished.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)


# ---------------------------------------------------------------------------------------------------------------------
# Save and load


def save(
    run_dir: Path, step: int, keep: int, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]
) -> Path:
    """Write step_<step>, then remove the oldest beyond `keep`. Collective; returns when it is complete everywhere."""
    folder = run_dir / "checkpoints"
    final, unfinished = folder / f"step_{step:08d}", folder / f".tmp-step_{step:08d}"
    model_state, optimizer_state = get_state_dict(model, optimizer, options=OPTIONS)
    dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=unfinished)
    if dist.get_rank() == 0:
        write_atomically(unfinished / "state.json", json.dumps({**state, "step": step}, indent=1))
        unfinished.rename(final)
        for old in complete_checkpoints(run_dir)[:-keep]:
            trash = old.with_name(f".tmp-{old.name}")  # so that a kill leaves no half-removed checkpoint behind
            old.rename(trash)
            shutil.rmtree(trash)
    dist.barrier()
    return final


def load(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Load weights and moments into a model and optimizer on any mesh. Collective.

    The optimizer's hyperparameters stay those of the configuration: only its moments come from the checkpoint.
    """
    hyperparameters = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    model_state, optimizer_state = get_state_dict(model, optimizer, options=OPTIONS)
    dcp.load({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=path)
    set_state_dict(model, optimizer, model_state_dict=model_state, optim_state_dict=optimizer_state, options=OPTIONS)
    for group, values in zip(optimizer.param_groups, hyperparameters, strict=True):
        group.update(values)


def load_weights(path: Path, model: nn.Module) -> None:
    """Load weights alone into an unsharded model, without a process group."""
    with warnings.catch_warnings():  # there is no process group, on purpose
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.load({"model": model.state_dict()}, checkpoint_id=path)
