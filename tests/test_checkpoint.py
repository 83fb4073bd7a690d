"""Checkpoints come back on any mesh; a kill, a full disk or a flipped bit at any instant leaves one that loads.

And generate.py samples from them.
"""

import ast
import builtins
import contextlib
import copy
import dataclasses
import os
import pickle
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from harm import Bomb, flip, halve, plant_bomb, plant_bytes, pretend, quota
from tokenizers import Tokenizer
from torch.distributed.checkpoint import default_planner
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode

import checkpoint
import configs
import generate
import parallel
import train
from checkpoint import CheckpointConfig, Saver
from configs import Config, OptimConfig
from corpus.tokenizer import train_tokenizer
from model import Llama, ModelConfig
from runtime import rundir, storage
from runtime.ranks import UserError
from runtime.storage import MetadataUnpickler

ROOT = Path(__file__).parent.parent
FIXTURE = Path(__file__).parent / "fixtures/cc6ef64/run"
CPU = torch.device("cpu")
OPTIM = OptimConfig(lr=1e-2, weight_decay=0.1, betas=(0.9, 0.95))
STATE = {"tokens": 123, "total_steps": 9, "identity": {"train.seed": 0}}
WINDOW = 16


def shape(tied: bool = False) -> ModelConfig:
    sizes = {"vocab_size": 384, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return ModelConfig(**sizes, **heads, max_position_embeddings=WINDOW, tie_word_embeddings=tied)


# ---------------------------------------------------------------------------------------------------------------------
# What runs on the ranks


class Trainee:
    """This rank's part of a small model and its optimizer, as train.py makes them."""

    def __init__(
        self,
        tp: int,
        tied: bool = False,
        seed: int = 0,
        optim: OptimConfig = OPTIM,
        make_optimizer: Callable = train.make_optimizer,
    ):
        plan = parallel.ParallelConfig(tp=tp)
        self.mesh = parallel.build_mesh(plan, CPU)
        with torch.device("meta"):
            self.model = Llama(shape(tied))
        parallel.parallelize(self.model, self.mesh, plan)
        self.model.to_empty(device=CPU)
        self.model.init_weights(seed, parallel.place_shard)
        self.optimizer = make_optimizer(self.model, optim)

    def advance(self, steps: int) -> None:
        generator = torch.Generator().manual_seed(steps)
        for _ in range(steps):
            rows = torch.randint(0, 384, (2, WINDOW + 1), generator=generator)  # the same on all ranks
            with parallel.loss_context(self.mesh):
                self.model(rows[:, :-1], rows[:, 1:]).backward()
            _, dp_size = parallel.dp_rank_and_size(self.mesh)
            parallel.scale_gradients(self.model, torch.tensor(1e-2 / dp_size))  # FSDP sums the same gradient so often
            self.optimizer.step()
            self.optimizer.zero_grad()

    def values(self) -> dict[str, np.ndarray]:
        """Weights, moments and step counts, whole."""
        tensors = dict(self.model.named_parameters())
        for name, parameter in self.model.named_parameters():
            tensors |= {f"{name}/{key}": value for key, value in self.optimizer.state[parameter].items()}
        whole = {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in tensors.items()}
        return {name: tensor.detach().numpy().copy() for name, tensor in whole.items()}


def train_and_save(
    run_dir: Path, tp: int, tied: bool = False, tokenizer: str = "", async_save: bool = False
) -> tuple[dict, dict]:
    """Three steps, a checkpoint, and one step more: the values at the checkpoint, and after."""
    trainee = Trainee(tp, tied)
    trainee.advance(3)
    if dist.get_rank() == 0:
        rundir.prepare_run(run_dir, configs.to_toml(Config(model=shape(tied))), tokenizer, None, [])
    dist.barrier()
    saver = Saver(run_dir, CheckpointConfig(async_save=async_save))
    saver.save(3, trainee.model, trainee.optimizer, STATE)
    saver.wait()
    saved = trainee.values()
    trainee.advance(1)
    return saved, trainee.values()


def load_and_train(path: Path, tp: int, tied: bool) -> tuple[dict, dict]:
    """The values as `train_and_save` returns them, in a model that was born different."""
    trainee = Trainee(tp, tied, seed=1)
    checkpoint.load(path, trainee.model, trainee.optimizer)
    loaded = trainee.values()
    trainee.advance(1)
    return loaded, trainee.values()


def hyperparameters_around_load(path: Path, optim: OptimConfig) -> list[list[dict[str, Any]]]:
    """Of each parameter group, before and after a load."""
    trainee, seen = Trainee(tp=1, optim=optim), []
    for load in (lambda: None, lambda: checkpoint.load(path, trainee.model, trainee.optimizer)):
        load()
        groups = trainee.optimizer.param_groups
        seen.append([{key: value for key, value in group.items() if key != "params"} for group in groups])
    return seen


def names_after_saves(run_dir: Path, steps: list[int], keep: int) -> list[list[str]]:
    """What the folder holds after each save."""
    trainee, seen = Trainee(tp=1), []
    (run_dir / "checkpoints").mkdir(parents=True)
    saver = Saver(run_dir, CheckpointConfig(keep=keep))
    for step in steps:
        saver.save(step, trainee.model, trainee.optimizer, STATE)
        seen.append(sorted(path.name for path in (run_dir / "checkpoints").iterdir()))
    return seen


@contextlib.contextmanager
def power_cut(number: int) -> Iterator[None]:
    """The `number`th change of a name on disk does not happen, nor does any after it."""
    numbers = count(1)

    def cut(change, *arguments, **options):
        if next(numbers) >= number:
            raise RuntimeError(f"power cut at {change.__name__}")
        return change(*arguments, **options)

    with contextlib.ExitStack() as stack:
        for change in (os.rename, os.replace, os.unlink, os.rmdir, os.mkdir):
            stack.enter_context(mock.patch.object(os, change.__name__, partial(cut, change)))
        yield


def save_under_power_cuts(run_dir: Path, async_save: bool, planned: bool) -> list[tuple[str, int]]:
    """Cut the power at every point of a save that also prunes; `planned`: its saver has saved before.

    After each cut every checkpoint loads; returns the newest one's name and the step that its state.json claims.
    """
    trainee, survivors, config = Trainee(tp=1), [], CheckpointConfig(keep=1, async_save=async_save)
    rundir.prepare_run(run_dir, "", "", None, [])

    def save(step: int) -> None:
        saver.save(step, trainee.model, trainee.optimizer, STATE)
        saver.wait()

    for cut in count(1):
        trainee.advance(1)
        saver = Saver(run_dir, config)
        save(step=2 * cut)
        saver = saver if planned else Saver(run_dir, config)
        before = trainee.values()
        trainee.advance(1)
        after = trainee.values()
        try:
            with power_cut(cut):
                save(step=2 * cut + 1)
            break
        except BaseException as error:  # torch wraps what happens inside a save in a BaseException of its own
            if "power cut" not in repr(error):
                raise
        for path in checkpoint.complete_checkpoints(run_dir):
            checkpoint.load(path, trainee.model, trainee.optimizer)
            step = checkpoint.read_state(path)["step"]
            assert_equal(trainee.values(), {2 * cut: before, 2 * cut + 1: after}[step])
        rundir.prepare_run(run_dir, "", "", None, [])
        left = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
        assert left[-1] == path.name and all(name.startswith("step_") for name in left)
        survivors.append((path.name, step))
    return survivors


@contextlib.contextmanager
def held_up() -> Iterator[Callable[[], None]]:
    """Nothing is written before the yielded function is called."""
    go, write = threading.Event(), dcp.save

    def wait_and_write(*arguments, **options):
        assert go.wait(60)
        return write(*arguments, **options)

    with mock.patch.object(dcp, "save", wait_and_write):
        try:
            yield go.set
        finally:
            go.set()


def train_during_a_save(run_dir: Path, tp: int) -> tuple[dict, dict, list[str]]:
    """The values when `save` returned and when writing began, and what the folder held until then."""
    trainee, state = Trainee(tp), {**STATE}
    trainee.advance(2)
    make_folder(run_dir)
    saver = Saver(run_dir, CheckpointConfig(async_save=True))
    with held_up() as go:
        saver.save(3, trainee.model, trainee.optimizer, state)
        saved = trainee.values()
        trainee.advance(2)
        state["tokens"] = -1
        later = trainee.values()
        assert saver.writing() and not saver.problems()
        seen = [path.name for path in (run_dir / "checkpoints").iterdir()]
        go()
        saver.wait()
    assert not saver.writing() and not saver.problems()
    return saved, later, seen


def make_folder(run_dir: Path) -> None:
    if dist.get_rank() == 0:
        (run_dir / "checkpoints").mkdir(parents=True)
    dist.barrier()


def save_twice(run_dir: Path) -> tuple[bool, bool]:
    """Whether the first save is complete when `save` is called for the second, and when that returns."""
    trainee, first = Trainee(tp=1), run_dir / "checkpoints/step_00000001"
    make_folder(run_dir)
    saver = Saver(run_dir, CheckpointConfig(async_save=True))
    with held_up() as go:
        saver.save(1, trainee.model, trainee.optimizer, STATE)
        threading.Timer(0.2, go).start()
        before = first.exists()
        saver.save(2, trainee.model, trainee.optimizer, STATE)
        after = first.exists()
        saver.wait()
    return before, after


def watch_saves(run_dir: Path, saves: int) -> tuple[int, list[str]]:
    """How often a complete checkpoint was looked at while others were written and removed, and what was missing."""
    trainee, stop, looks, found = Trainee(tp=1), threading.Event(), [], []
    make_folder(run_dir)

    def look() -> None:
        while not stop.is_set():
            for path in checkpoint.complete_checkpoints(run_dir):
                damage = checkpoint.damage(path)
                if path.exists():  # else it has been removed meanwhile, by its name first
                    looks.append(path)
                    found.extend(damage)

    watcher = threading.Thread(target=look)
    watcher.start()
    saver = Saver(run_dir, CheckpointConfig(keep=1, async_save=True))
    for step in range(saves):
        saver.save(step, trainee.model, trainee.optimizer, STATE)
        time.sleep(0.01)
    saver.wait()
    stop.set()
    watcher.join()
    return len(looks), found


def fill_the_disk_of_one_rank(
    run_dir: Path, full_rank: int, async_save: bool, planned: bool
) -> tuple[list[str], list[str]]:
    """A save that succeeds, then one for which one rank has no room: messages, and what is left."""
    trainee, messages, config = Trainee(tp=2), [], CheckpointConfig(keep=1, async_save=async_save)
    make_folder(run_dir)
    saver = Saver(run_dir, config)
    saver.save(1, trainee.model, trainee.optimizer, STATE)
    saver.wait()
    saver = saver if planned else Saver(run_dir, config)
    shard = run_dir / f"checkpoints/step_00000001/__{full_rank}_0.distcp"
    with quota(shard.stat().st_size // 2) if dist.get_rank() == full_rank else contextlib.nullcontext():
        try:
            saver.save(2, trainee.model, trainee.optimizer, STATE)
            deadline = time.monotonic() + 60
            while not saver.problems():  # it is known before anybody asks for the result
                assert async_save and time.monotonic() < deadline
                time.sleep(0.01)
        except UserError as error:
            messages.append(str(error))
    assert len(saver.problems()) == 1
    for again in (lambda: saver.save(3, trainee.model, trainee.optimizer, STATE), saver.wait) if async_save else ():
        with pytest.raises(UserError) as error:
            again()
        messages.append(str(error.value))
    dist.barrier()
    return messages, sorted(path.name for path in (run_dir / "checkpoints").iterdir())


@contextlib.contextmanager
def counted_plans() -> Iterator[mock.Mock]:
    """Counts how often this rank plans for all."""
    name = "create_default_global_save_plan"
    with mock.patch.object(default_planner, name, wraps=getattr(default_planner, name)) as calls:
        yield calls


def save_three_times(run_dir: Path, async_save: bool) -> tuple[list[dict], list[int]]:
    """The values at each of three saves, and how often this rank had planned by then."""
    trainee, values, counts = Trainee(tp=2), [], []
    make_folder(run_dir)
    with counted_plans() as plans, Saver(run_dir, CheckpointConfig(keep=3, async_save=async_save)) as saver:
        for step in (1, 2, 3):
            trainee.advance(1)
            saver.save(step, trainee.model, trainee.optimizer, STATE)
            saver.wait()
            values.append(trainee.values())
            counts.append(plans.call_count)
    return values, counts


def save_two_models_in_turn(run_dirs: list[Path]) -> tuple[list[dict], int]:
    """Untied and tied, each with a saver of its own: what both have at the last save, and plans made on this rank."""
    trainees = [Trainee(tp=2, tied=tied) for tied in (False, True)]
    for run_dir in run_dirs:
        make_folder(run_dir)
    savers = [Saver(run_dir, CheckpointConfig()) for run_dir in run_dirs]
    with counted_plans() as plans:
        for step in (1, 2, 3):
            for trainee, saver in zip(trainees, savers, strict=True):
                trainee.advance(1)
                saver.save(step, trainee.model, trainee.optimizer, STATE)
    return [trainee.values() for trainee in trainees], plans.call_count


def save_after_a_failure(run_dir: Path, fails: int, broken: str, on_rank: int) -> dict:
    """Save number `fails` does, as a function of torch's is broken on one rank: the values at the next saver's save."""
    trainee, config = Trainee(tp=2), CheckpointConfig(keep=1)
    make_folder(run_dir)
    saver = Saver(run_dir, config)
    for step in range(1, fails):
        trainee.advance(1)
        saver.save(step, trainee.model, trainee.optimizer, STATE)
    trainee.advance(1)
    with breaking(broken, [on_rank]), pytest.raises(UserError, match="could not be written: broken"):
        saver.save(fails, trainee.model, trainee.optimizer, STATE)
    if dist.get_rank() == 0:
        rundir.prepare_run(run_dir, "", "", None, [])
    dist.barrier()
    trainee.advance(1)
    Saver(run_dir, config).save(fails + 1, trainee.model, trainee.optimizer, STATE)
    return trainee.values()


@contextlib.contextmanager
def breaking(name: str, on_ranks: list[int]) -> Iterator[None]:
    """A function of torch.distributed.checkpoint fails on some ranks."""
    broken = mock.patch(f"torch.distributed.checkpoint.{name}", side_effect=OSError("broken"))
    with broken if dist.get_rank() in on_ranks else contextlib.nullcontext():
        yield


def save_what_changes(run_dir: Path, changed_rank: int) -> int:
    """How many of four saves are planned: with a tensor more, its dtype changed on one rank, its files longer there."""
    trainee = Trainee(tp=2)
    trainee.advance(1)
    make_folder(run_dir)
    moments = trainee.optimizer.state[trainee.model.lm_head.weight]
    with counted_plans() as plans, Saver(run_dir, CheckpointConfig(keep=4)) as saver:
        saver.save(1, trainee.model, trainee.optimizer, STATE)
        moments["longer_average"] = torch.full_like(moments["exp_avg"], 3.0)
        saver.save(2, trainee.model, trainee.optimizer, STATE)
        if dist.get_rank() == changed_rank:
            moments["longer_average"] = moments["longer_average"].double()
        saver.save(3, trainee.model, trainee.optimizer, STATE)
        if dist.get_rank() == changed_rank:
            saver.layout = dataclasses.replace(saver.layout, written=[])
        saver.save(4, trainee.model, trainee.optimizer, STATE)
    return plans.call_count


class PartlyCounting(torch.optim.Optimizer):
    """Counts the steps of vectors only."""

    def __init__(self, model: Llama, optim: OptimConfig):
        super().__init__(model.parameters(), {"lr": optim.lr})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for parameter in self.param_groups[0]["params"]:
            state = self.state[parameter]
            if not state:
                state["average"] = torch.zeros_like(parameter)
                state |= {} if parameter.ndim > 1 else {"step": torch.tensor(0.0)}
            state["average"].lerp_(parameter.grad, 0.1)
            parameter.sub_(state["average"])
            if "step" in state:
                state["step"] += 1


def momentum(model: Llama, optim: OptimConfig) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=optim.lr, momentum=0.9)


def two_scalars(model: Llama, optim: OptimConfig) -> torch.optim.Optimizer:
    return torch.optim.NAdam(model.parameters(), lr=optim.lr, foreach=False)


def save_and_load_state(run_dir: Path, make_optimizer: Callable, late: bool) -> tuple[dict, dict, list[str]]:
    """Values saved and values loaded, and the names in the checkpoint; `late`: one parameter has made a step less."""
    trainee, other = (Trainee(tp=2, seed=seed, make_optimizer=make_optimizer) for seed in (0, 1))
    trainee.advance(3)
    if late:
        trainee.optimizer.state[trainee.model.lm_head.weight]["step"] -= 1
    make_folder(run_dir)
    Saver(run_dir, CheckpointConfig()).save(3, trainee.model, trainee.optimizer, STATE)
    path = checkpoint.step_folder(run_dir, 3)
    checkpoint.load(path, other.model, other.optimizer)
    values = trainee.values(), other.values()
    for each in (trainee, other):  # a step count that two parameters shared would be counted twice
        each.advance(1)
    assert_equal(trainee.values(), other.values())
    return *values, sorted(raw_metadata(path).state_dict_metadata)


def raw_metadata(path: Path) -> Metadata:
    return dcp.FileSystemReader(path).read_metadata()


def collectives_of_a_load(path: Path) -> dict[str, int]:
    trainee = Trainee(tp=2)
    with CommDebugMode() as communication:
        checkpoint.load(path, trainee.model, trainee.optimizer)
    return {str(name): count for name, count in communication.get_comm_counts().items()}


def fail_to_read(path: Path, failing: list[int]) -> str:
    trainee = Trainee(tp=2)
    with breaking("FileSystemReader.read_data", failing), pytest.raises(UserError) as error:
        checkpoint.load(path, trainee.model, trainee.optimizer)
    return str(error.value)


def fail_to_load(path: Path) -> None:
    trainee = Trainee(tp=1)
    with pytest.raises(UserError, match="which no checkpoint needs"):
        checkpoint.load(path, trainee.model, trainee.optimizer)


# ---------------------------------------------------------------------------------------------------------------------
# Save and load


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["def naïve(): return 日本語 🙂"] * 3, vocab_size=300, train_mib=1)


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def written(request, ranks, tokenizer, tmp_path_factory) -> tuple[bool, Path, dict, dict]:
    """A run directory written on a 2 x 2 mesh: is its embedding tied, where is it, its values, and one step later."""
    run_dir = tmp_path_factory.mktemp("run")
    (saved, later), *_ = ranks(4, train_and_save, run_dir, 2, request.param, tokenizer.to_str())
    return request.param, run_dir, saved, later


@pytest.fixture(scope="module")
def run_dir(ranks, tokenizer, tmp_path_factory) -> Path:
    """A run directory written on a 2 x 2 mesh."""
    folder = tmp_path_factory.mktemp("run")
    ranks(4, train_and_save, folder, 2, False, tokenizer.to_str())
    return folder


def assert_equal(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> None:
    assert ours.keys() == theirs.keys()
    for name in theirs:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)


@pytest.mark.parametrize(("world", "tp"), [(4, 2), (1, 1), (2, 2), (4, 4)])
def test_weights_and_moments_come_back_exactly_on_any_mesh(ranks, written, world, tp):
    tied, folder, saved, later = written
    path = folder / "checkpoints/step_00000003"
    state = checkpoint.read_state(path)
    assert state.pop("files").keys() == {".metadata", *(f"__{rank}_0.distcp" for rank in range(4))}
    assert state.pop("save_seconds") > 0
    assert state == {"step": 3, **STATE}
    for loaded, next_step in ranks(world, load_and_train, path, tp, tied):
        assert_equal(loaded, saved)
        assert any(name.endswith("/exp_avg_sq") and value.any() for name, value in loaded.items())
        if (world, tp) == (4, 2):
            assert_equal(next_step, later)
        # The moments are not only there, they are used: without them a step of Adam is lr long in every element, and a
        # mesh apart it differs by rounding, some 1e-7.
        for name, value in later.items():
            np.testing.assert_allclose(next_step[name], value, rtol=0, atol=OPTIM.lr / 10, err_msg=name)


def test_hyperparameters_are_those_of_the_configuration_not_of_the_checkpoint(ranks, run_dir):
    optim = OptimConfig(lr=0.5, weight_decay=0.7, betas=(0.5, 0.6), eps=1e-3)
    ((before, after),) = ranks(1, hyperparameters_around_load, run_dir / "checkpoints/step_00000003", optim)
    assert after == before
    assert [group["weight_decay"] for group in after] == [0.7, 0.0]
    assert all((group["lr"], tuple(group["betas"]), group["eps"]) == (0.5, (0.5, 0.6), 1e-3) for group in after)


@pytest.mark.parametrize("keep", [1, 2, 5])
def test_the_newest_checkpoints_are_kept_and_nothing_else(ranks, tmp_path, keep):
    steps = [1, 2, 9, 10, 100]
    (seen,) = ranks(1, names_after_saves, tmp_path, steps, keep)
    names = [f"step_{step:08d}" for step in steps]
    assert seen == [names[max(0, i + 1 - keep) : i + 1] for i in range(len(steps))]


@pytest.mark.parametrize("planned", [False, True])
@pytest.mark.parametrize("async_save", [False, True])
def test_a_power_cut_at_any_point_of_a_save_leaves_a_checkpoint_that_loads(ranks, tmp_path, async_save, planned):
    (survivors,) = ranks(1, save_under_power_cuts, tmp_path, async_save, planned)
    assert all(name == f"step_{step:08d}" for name, step in survivors)
    before, after = ([step for _, step in survivors if step % 2 == odd] for odd in (0, 1))
    assert len(before) >= 4 and len(after) >= 4, "cuts before the new one is complete, and while the old one goes"
    assert before + after == [step for _, step in survivors], "complete once, and from then on"


# ---------------------------------------------------------------------------------------------------------------------
# What is planned, and by whom


@pytest.mark.parametrize("async_save", [False, True], ids=["sync", "async"])
def test_only_the_first_save_is_planned_and_all_of_them_load_bit_for_bit(ranks, tmp_path, async_save):
    (values, plans), *others = ranks(4, save_three_times, tmp_path, async_save)
    assert plans == [1, 1, 1] and all(counts == [0, 0, 0] for _, counts in others)
    paths = checkpoint.complete_checkpoints(tmp_path)
    assert len(paths) == 3 and len({(path / ".metadata").read_bytes() for path in paths}) == 1
    for path, saved in zip(paths, values, strict=True):
        assert checkpoint.damage(path) == []
        places = raw_metadata(path).storage_data.values()
        for name in ("__0_0.distcp", "__1_0.distcp", "__2_0.distcp", "__3_0.distcp"):
            ends = [place.offset + place.length for place in places if place.relative_path == name]
            assert max(ends) == (path / name).stat().st_size
        for loaded, _ in ranks(2, load_and_train, path, 2, False):
            assert_equal(loaded, saved)


def test_two_savers_of_different_models_in_one_process_do_not_mix(ranks, tmp_path):
    run_dirs = [tmp_path / "untied", tmp_path / "tied"]
    (values, plans), *_ = ranks(2, save_two_models_in_turn, run_dirs)
    assert plans == 2, "one each"
    for run_dir, tied, saved in zip(run_dirs, (False, True), values, strict=True):
        (loaded, _), *_ = ranks(1, load_and_train, checkpoint.step_folder(run_dir, 3), 1, tied)
        assert_equal(loaded, saved)


@pytest.mark.parametrize(
    ("fails", "broken", "on_rank"),
    [
        (1, "default_planner._validate_global_plan", 0),
        (1, "FileSystemWriter._write_data", 1),
        (2, "FileSystemWriter._write_data", 1),
    ],
    ids=["planning", "writing", "writing again"],
)
def test_the_save_after_one_that_failed_is_whole(ranks, tmp_path, fails, broken, on_rank):
    saved, _ = ranks(2, save_after_a_failure, tmp_path, fails, broken, on_rank)
    (loaded, _), *_ = ranks(1, load_and_train, checkpoint.step_folder(tmp_path, fails + 1), 1, False)
    assert_equal(loaded, saved)


@pytest.mark.parametrize("changed_rank", [0, 1])
def test_what_changes_on_one_rank_is_planned_anew(ranks, tmp_path, changed_rank):
    assert ranks(2, save_what_changes, tmp_path, changed_rank) == [4, 0]
    paths = checkpoint.complete_checkpoints(tmp_path)
    names = [set(raw_metadata(path).state_dict_metadata) for path in paths]
    assert names[0] < names[1] == names[2] == names[3]
    for path, ratio in zip(paths[1:], (1, 2, 2), strict=True):  # 4 bytes an element, and then 8 on one rank
        places = raw_metadata(path).storage_data
        lengths = {p.relative_path: p.length for index, p in places.items() if index.fqn.endswith("longer_average")}
        changed, other = (lengths[f"__{rank}_0.distcp"] for rank in (changed_rank, 1 - changed_rank))
        assert changed == pytest.approx(ratio * other, rel=0.1)  # and some 1,000 bytes around them


@pytest.mark.parametrize(
    ("make_optimizer", "late", "one_step"),
    [
        (train.make_optimizer, False, True),
        (train.make_optimizer, True, False),
        (two_scalars, False, True),
        (momentum, False, False),
        (PartlyCounting, False, False),
    ],
    ids=["AdamW", "AdamW, one late", "two scalars", "no step", "vectors only"],
)
def test_step_counts_are_saved_once_if_they_are_the_same_and_come_back_to_each(
    ranks, tmp_path, make_optimizer, late, one_step
):
    (saved, loaded, names), _ = ranks(2, save_and_load_state, tmp_path, make_optimizer, late)
    assert_equal(loaded, saved)
    assert any("/" in name and value.any() for name, value in loaded.items())
    assert ("optimizer.step" in names) == one_step
    assert not (one_step and any(name.endswith(".step") for name in names if name != "optimizer.step"))


def test_a_checkpoint_with_a_step_count_for_each_parameter_loads_as_before(ranks, tmp_path, monkeypatch):
    """As earlier commits wrote them; tests/test_old_runs.py goes on from some."""
    path = FIXTURE / "checkpoints/step_00000006"
    steps = {name for name in raw_metadata(path).state_dict_metadata if name.endswith(".step")}
    assert len(steps) > 9 and "optimizer.step" not in steps
    ours, theirs = storage.Reader(path).read_metadata(), raw_metadata(path)
    assert (ours.state_dict_metadata, ours.storage_data) == (theirs.state_dict_metadata, theirs.storage_data)


def test_a_load_talks_to_others_once_to_say_how_it_went(ranks, run_dir):
    for counts in ranks(4, collectives_of_a_load, run_dir / "checkpoints/step_00000003"):
        assert counts == {"c10d.allgather_": 2}, "sizes and texts of `together`"


@pytest.mark.parametrize("failing", [[0], [2], [1, 3]])
def test_a_load_that_fails_on_some_ranks_gives_one_message_on_all(ranks, run_dir, failing):
    path = run_dir / "checkpoints/step_00000003"
    said = ranks(4, fail_to_read, path, failing)
    assert said == [f"{path} could not be loaded: broken"] * 4


# ---------------------------------------------------------------------------------------------------------------------
# In the background


@pytest.mark.parametrize(("world", "tp"), [(1, 1), (4, 2)])
def test_an_asynchronous_save_holds_what_was_when_it_was_asked_for_whatever_is_trained_meanwhile(
    ranks, tmp_path, world, tp
):
    (saved, later, seen), *_ = ranks(world, train_during_a_save, tmp_path, tp)
    assert seen == [".tmp-step_00000003"], "complete only when it is written"
    assert all((saved[name] != value).any() for name, value in later.items()), "the optimizer changed all of it"
    path = tmp_path / "checkpoints/step_00000003"
    assert checkpoint.read_state(path)["tokens"] == STATE["tokens"]
    for loaded, _ in ranks(world, load_and_train, path, tp, False):
        assert_equal(loaded, saved)


def test_a_save_waits_for_the_one_before(ranks, tmp_path):
    assert ranks(1, save_twice, tmp_path) == [(False, True)]


def test_a_checkpoint_is_complete_whenever_its_directory_can_be_seen(ranks, tmp_path):
    ((looks, found),) = ranks(1, watch_saves, tmp_path, 15)
    assert looks > 15
    assert not found


def test_synchronous_and_asynchronous_saves_write_the_same_bytes(ranks, tmp_path):
    for name, async_save in (("sync", False), ("async", True)):
        (tmp_path / name).mkdir()
        ranks(4, train_and_save, tmp_path / name, 2, False, "", async_save)
    ours, theirs = (tmp_path / name / "checkpoints/step_00000003" for name in ("async", "sync"))
    shards = sorted(path.name for path in theirs.glob("*.distcp"))
    assert len(shards) == 4
    assert sorted(path.name for path in ours.glob("*.distcp")) == shards
    for shard in shards:
        assert (ours / shard).read_bytes() == (theirs / shard).read_bytes()


# ---------------------------------------------------------------------------------------------------------------------
# Full disks


@pytest.mark.parametrize("planned", [False, True], ids=["first", "next"])
@pytest.mark.parametrize("async_save", [False, True], ids=["sync", "async"])
def test_a_disk_that_is_full_for_one_rank_fails_the_save_on_all_and_leaves_the_one_before(
    ranks, tmp_path, async_save, planned
):
    """A limit on the size of this rank's files stands for the full disk: `write` fails half-way in the shard."""
    results = ranks(4, fill_the_disk_of_one_rank, tmp_path, 2, async_save, planned)
    folder = tmp_path / "checkpoints"
    for messages, left in results:
        assert len(messages) == (2 if async_save else 1) and set(messages) == set(results[0][0])
        assert messages[0].startswith(f"{folder}/step_00000002 could not be written: ")
        assert "File too large" in messages[0]
        assert f"{folder}/step_00000001 is intact" in messages[0] and "the same command goes on" in messages[0]
        assert left == [".tmp-step_00000002", "step_00000001"]
    assert checkpoint.damage(folder / "step_00000001") == []
    ranks(2, load_and_train, folder / "step_00000001", 1, False)
    rundir.prepare_run(tmp_path, "", "", None, [])
    assert [path.name for path in folder.iterdir()] == ["step_00000001"]


# ---------------------------------------------------------------------------------------------------------------------
# Damage


def put(text: str) -> Callable[[Path], object]:
    return lambda path: path.write_text(text)


DAMAGE = {
    "a flipped bit in a shard": ("__2_0.distcp", flip, "has another checksum"),
    "a truncated shard": ("__3_0.distcp", halve, "bytes instead of"),
    "an empty shard": ("__0_0.distcp", put(""), "has 0 bytes instead of"),
    "a longer shard": ("__0_0.distcp", lambda path: path.write_bytes(path.read_bytes() + b"x"), "bytes instead of"),
    "a missing shard": ("__1_0.distcp", Path.unlink, "cannot be read: No such file"),
    "a flipped bit in .metadata": (".metadata", flip, "has another checksum"),
    "a missing .metadata": (".metadata", Path.unlink, "cannot be read: No such file"),
    "a truncated state.json": ("state.json", halve, "is damaged or missing"),
    "another digit in state.json": (
        "state.json",
        lambda path: path.write_text(path.read_text().replace('"tokens": 123', '"tokens": 124')),
        "is damaged or missing",
    ),
    "a missing state.json": ("state.json", Path.unlink, "is damaged or missing"),
    "no JSON in state.json": ("state.json", put("\0" * 80), "is damaged or missing"),
    "other JSON in state.json": ("state.json", put("[1, 2]"), "is damaged or missing"),
    "nothing in state.json": ("state.json", put(""), "is damaged or missing"),
    "state.json without its checksum": ("state.json", put('{"step": 3, "files": {}}'), "is damaged or missing"),
}


@pytest.fixture
def copied(run_dir, tmp_path) -> Path:
    """A run directory whose checkpoint may be damaged."""
    return Path(shutil.copytree(run_dir, tmp_path / "copy"))


@pytest.mark.parametrize(("name", "change", "words"), DAMAGE.values(), ids=DAMAGE)
def test_damage_is_found_and_named(copied, name, change, words):
    path = copied / "checkpoints/step_00000003"
    assert checkpoint.damage(path) == []
    change(path / name)
    (found,) = checkpoint.damage(path)
    assert found.startswith(f"{path}/{name} ") and words in found


def test_every_byte_of_a_checkpoint_counts(copied):
    """A sample of them, and in state.json all that mean something."""
    path = copied / "checkpoints/step_00000003"
    for file in path.iterdir():
        content, missed = file.read_bytes(), []
        for i in range(0, len(content), 1 if file.name == "state.json" else max(1, len(content) // 20)):
            file.write_bytes(content[:i] + bytes([content[i] ^ 1]) + content[i + 1 :])
            if not checkpoint.damage(path):
                missed.append(content[i : i + 1])
        file.write_bytes(content)
        # "\n" and " " between JSON's tokens become other white space only by chance
        assert file.name == "state.json" or not missed, file
        assert all(byte.isspace() for byte in missed)


def test_ranks_share_the_files_out_and_each_is_read_once(copied):
    path = copied / "checkpoints/step_00000003"
    for file in path.iterdir():
        if file.name != "state.json":
            flip(file)
    for parts in (1, 2, 3, 7):
        found = [line for part in range(parts) for line in checkpoint.damage(path, part, parts)]
        assert sorted(found) == sorted(checkpoint.damage(path)) and len(found) == 5


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints of strangers


BOMBS = {"a call": (plant_bomb, "posix.mkdir"), "bytes for a tensor": (plant_bytes, "BytesStorageMetadata")}


@pytest.mark.parametrize(("plant", "named"), BOMBS.values(), ids=BOMBS)
def test_a_bomb_in_a_checkpoint_with_correct_checksums_is_refused_and_does_not_go_off(
    ranks, copied, tmp_path, monkeypatch, capsys, plant, named
):
    path, marker = copied / "checkpoints/step_00000003", tmp_path / "went_off"
    plant(path, marker)
    (refusal,) = checkpoint.damage(path)
    assert refusal.startswith(f"{path}/.metadata is refused: ") and f"{named}, which no checkpoint needs" in refusal
    with pytest.raises(SystemExit) as stopped:
        main(monkeypatch, copied)
    assert (str(stopped.value), capsys.readouterr().out) == (f"error: {refusal}", "")
    ranks(1, fail_to_load, path)  # nor without that look beforehand
    assert not marker.exists()
    with contextlib.suppress(CheckpointException), pytest.warns(match="torch.distributed is disabled"):
        dcp.load({"model": Llama(shape()).state_dict()}, storage_reader=dcp.FileSystemReader(path))
    assert marker.exists(), "the bomb is a real one"


@pytest.mark.parametrize(
    "function",
    [os.system, builtins.eval, builtins.exec, builtins.getattr, builtins.open, torch.load, pickle.loads, time.sleep],
    ids=lambda function: function.__name__,
)
def test_metadata_can_call_nothing(tmp_path, function):
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Bomb(function, "1")))
    with pytest.raises(ValueError, match="which no checkpoint needs"), (tmp_path / ".metadata").open("rb") as file:
        MetadataUnpickler(file).load()


def test_only_the_restricted_unpickler_unpickles():
    """In all sources: torch.load with weights_only=True, dcp.load only in `Reader`, pickle only as a base class."""
    seen = []
    folders = (".", "configs", "corpus", "runtime", "benchmarks")
    for path in (path for folder in folders for path in ROOT.glob(f"{folder}/*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
        bases = {id(base) for node in classes for base in node.bases}
        readers = {id(inner) for node in classes if node.name == "Reader" for inner in ast.walk(node)}
        for node in ast.walk(tree):
            where = f"{path.name}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.ImportFrom):
                assert node.module not in ("pickle", "torch.serialization", "marshal", "shelve"), where
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "pickle":
                assert (node.attr, id(node) in bases) == ("Unpickler", True), where
            if isinstance(node, ast.Call):
                function = ast.unparse(node.func)
                options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                assert function not in ("eval", "exec", "os.system"), where
                assert function != "torch.load" or options.get("weights_only") == "True", where
                if function == "dcp.load":
                    assert options["storage_reader"] == "self" and id(node) in readers, where
                    seen.append(where)
    assert len(seen) == 1, "this test has found the place it is about"


# ---------------------------------------------------------------------------------------------------------------------
# generate.py


@pytest.fixture(scope="module")
def model() -> Iterator[Llama]:
    """Random, and sharper than at birth, so that its choices differ."""
    model = Llama(shape())
    model.init_weights(seed=3)
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # so small a model only loses by more
    yield model
    torch.set_num_threads(threads)


def sample(model: Llama, prompt: list[int], **options) -> list[int]:
    defaults = {"eos": -1, "max_new_tokens": 12, "temperature": 1.0, "top_k": 0, "seed": 0}
    return list(generate.sample(model, list(prompt), **{**defaults, **options}))


def greedy(model: Llama, prompt: list[int], length: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(length):
        tokens.append(int(model(torch.tensor([tokens[-WINDOW:]]))[0, -1].argmax()))
    return tokens[len(prompt) :]


def test_the_same_seed_samples_the_same_text_and_another_one_another(model):
    assert sample(model, [1, 2], seed=5) == sample(model, [1, 2], seed=5) != sample(model, [1, 2], seed=6)


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"temperature": 0.0, "top_k": 7}, {"top_k": 1}])
@pytest.mark.parametrize("prompt", [[1], [1, 2, 3], list(range(WINDOW)), list(range(3 * WINDOW))])
def test_temperature_0_and_top_k_1_take_the_likeliest_also_beyond_the_window(model, options, prompt):
    expected = greedy(model, prompt, 12)
    assert len(set(expected)) > 2, "a model that says more than one thing"
    assert sample(model, prompt, seed=9, **options) == expected


def test_top_k_takes_only_the_k_likeliest_and_all_of_them(model):
    likeliest = model(torch.tensor([[1, 2]]))[0, -1].topk(3).indices.tolist()
    options = {"max_new_tokens": 1, "top_k": 3, "temperature": 5.0}
    assert {sample(model, [1, 2], seed=seed, **options)[0] for seed in range(60)} == set(likeliest)


def test_a_top_k_beyond_the_vocabulary_takes_all(model):
    assert sample(model, [1, 2], top_k=10_000) == sample(model, [1, 2], top_k=0)


def test_sampling_stops_at_eos_without_yielding_it(model):
    whole = greedy(model, [1], 12)
    eos = whole[5]
    assert sample(model, [1], temperature=0.0, eos=eos) == whole[: whole.index(eos)]
    assert sample(model, [1], temperature=0.0, max_new_tokens=4) == whole[:4]
    assert sample(model, [1], max_new_tokens=0) == []


def test_one_process_loads_the_weights_that_four_ranks_wrote(written):
    tied, folder, saved, _ = written
    model, _, special = generate.load_run(folder, CPU)
    weights = {name: value for name, value in saved.items() if "/" not in name}
    assert_equal({name: parameter.detach().numpy() for name, parameter in model.named_parameters()}, weights)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    expected = Llama(shape(tied))
    expected.init_weights(seed=0)
    expected.load_state_dict({name: torch.from_numpy(value) for name, value in weights.items()}, strict=not tied)
    ids = torch.tensor([[special.bos, 5, 6, 7]])
    torch.testing.assert_close(model(ids), expected(ids), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["__3_0.distcp", ".metadata", "state.json"])
def test_a_damaged_checkpoint_is_not_sampled_from(copied, name, monkeypatch, capsys):
    path = copied / "checkpoints/step_00000003" / name
    flip(path)
    with pytest.raises(SystemExit) as stopped:
        main(monkeypatch, copied)
    assert str(stopped.value).startswith(f"error: {path} ")
    assert capsys.readouterr().out == ""


def command_line(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, ROOT / "generate.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, timeout=200)


def main(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["generate.py", *map(str, arguments)])
    generate.main()


def test_the_command_line_prints_prompt_and_text_and_nothing_else(run_dir, monkeypatch, capsys):
    arguments = (run_dir, "--prompt", "def naïve 日", "--max-new-tokens", 20, "--seed", 4)
    result = command_line(*arguments)
    assert (result.returncode, result.stderr) == (0, b"")
    text = result.stdout.decode()
    assert text.startswith("def naïve 日") and text.endswith("\n") and len(text) > len("def naïve 日") + 5
    main(monkeypatch, *arguments)
    assert capsys.readouterr().out == text, "the same seed, the same text"


@pytest.mark.parametrize("text", ["日本語 🙂 naïve", "🙂", "a\nb  c\t日"])
@pytest.mark.parametrize("prompt", ["", "déf "])
def test_characters_of_several_bytes_are_printed_whole(run_dir, tokenizer, monkeypatch, text, prompt):
    bytewise = []
    for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text):
        bytewise += [tokenizer.token_to_id(symbol) for symbol in piece]  # a token a byte: no character is one token
    assert tokenizer.decode(bytewise) == text and len(bytewise) == len(text.encode())
    printed = []
    monkeypatch.setattr(generate, "sample", lambda *arguments: iter(bytewise))
    monkeypatch.setattr("builtins.print", lambda *parts, end="\n", flush=False: printed.append("".join(parts) + end))
    main(monkeypatch, run_dir, "--prompt", prompt)
    assert "".join(printed) == prompt + text + "\n"
    assert not any("\ufffd" in part for part in printed)


def test_the_prompt_is_read_whole_whatever_the_tokenizer_pads_or_truncates(run_dir, tokenizer, monkeypatch, tmp_path):
    padded, prompts = copy.deepcopy(tokenizer), []
    padded.enable_truncation(3)
    padded.enable_padding(length=8)
    for folder, chosen in (("plain", tokenizer), ("padded", padded)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "checkpoints").symlink_to(run_dir / "checkpoints")
        (tmp_path / folder / "config.toml").write_text((run_dir / "config.toml").read_text())
        (tmp_path / folder / "tokenizer.json").write_text(chosen.to_str())
        monkeypatch.setattr(generate, "sample", lambda model, tokens, *arguments: iter(prompts.append(tokens) or []))
        main(monkeypatch, tmp_path / folder, "--prompt", "def return (): 日本語 xyz")
    assert prompts[0] == prompts[1] and len(prompts[0]) > 8


@pytest.mark.parametrize("folder", ["nowhere", "empty", "unfinished"])
def test_a_directory_without_a_checkpoint_gets_one_message(tmp_path, folder, monkeypatch, capsys):
    (tmp_path / "empty").mkdir()
    pretend(tmp_path / "unfinished", 3, prefix=".tmp-step_")
    with pytest.raises(SystemExit, match=rf"error: .*{folder} holds no complete checkpoint"):
        main(monkeypatch, tmp_path / folder)
    assert capsys.readouterr().out == ""


def test_the_command_line_reports_a_missing_run_on_standard_error(tmp_path):
    result = command_line(tmp_path / "nowhere")
    assert result.returncode != 0 and result.stdout == b""
    (line,) = result.stderr.decode().splitlines()
    assert line.startswith("error: ") and str(tmp_path / "nowhere") in line
