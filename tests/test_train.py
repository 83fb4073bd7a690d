"""The command line from end to end: laws 1, 2, 6 and 7 as a user meets them, each command in processes of its own."""

import contextlib
import io
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Sequence
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import harm
import pytest
import torch
import torch.distributed as dist
import warm as warm_torchrun
from laws import digest

import checkpoint
import configs
import data
import parallel
import train
from checkpoint import step_of
from configs import Config, OptimConfig
from model import Llama, ModelConfig
from runtime.ranks import UserError

ROOT = Path(__file__).parent.parent
TRAIN = ROOT / "train.py"
STEPS = 20
STEPS_PER_EPOCH = 4  # so checkpoint 6 and 18 lie inside an epoch, and 12 at its end
TIMES = {"step_seconds", "tokens_per_second", "mfu", "peak_memory_gib", "data_seconds"}
SLOWEST = {"slowest_rank", "slowest_ratio"}  # of several ranks
TRAINING = {"step", "loss", "grad_norm", "lr", "tokens"} | TIMES
EVALUATION = {"step", "val_loss", "val_bits_per_byte", "val_tokens"}
# eps as in test_mesh.py. At twice this lr the gradient's norm jumps to 10 for a step, and what rounding did with it.
CONFIG = f"""
[model]
hidden_size = 32
intermediate_size = 64
num_hidden_layers = 2
num_attention_heads = 4
num_key_value_heads = 2
[data]
tokenizer_vocab_size = 320
seq_len = 32
val_fraction = 0.2
[optim]
lr = 5e-3
warmup_steps = 4
eps = 1e-4
[train]
steps = {STEPS}
global_batch_size = 8
micro_batch_size = 2
eval_every = 8
[checkpoint]
every = 6
"""


class Lab:
    """A folder with a corpus, a configuration and caches of its own, and the command line to run in it."""

    def __init__(self, folder: Path):
        self.folder, self.cwd, self.documents = folder, folder / "cwd", folder / "documents.jsonl"
        self.cwd.mkdir()
        (folder / "tmp").mkdir()
        words, generator = ["def", "return", "x", "(y)", "naïve", "日本", "🙂", "+"], random.Random(0)
        lengths = [0, 1, 2, 4, 7, 9, 12, 30, 150, 0, 3, 5, 11, 60, 200, 90, 1, 20, 8, 120]
        texts = [" ".join(generator.choices(words, k=length)) for length in lengths]
        self.documents.write_text(
            "".join(json.dumps({"text": text, "source": i}) + "\n" for i, text in enumerate(texts))
        )
        self.config = folder / "tiny.toml"
        self.config.write_text(CONFIG)
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB_", "HF_"))}
        caches = {
            "HOME": str(folder / "home"),
            "TMPDIR": str(folder / "tmp"),
            "HF_HOME": str(folder / "hf"),
            "HF_DATASETS_CACHE": str(folder / "hf/d"),
        }
        self.environment = inherited | caches | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        self.environment["OMP_WAIT_POLICY"] = "PASSIVE"  # several threads that spin make a busy machine crawl

    def start(
        self,
        *arguments: object,
        ranks: int = 1,
        before: tuple = (),
        torchrun: tuple = (),
        script: tuple = (TRAIN,),
        environment: dict[str, str] | None = None,
        warm: bool = False,
    ) -> subprocess.Popen:
        """`before` the interpreter: nohup; options of torchrun; instead of train.py another script.

        `warm`: with warm.py instead of torchrun, for tests that are about neither it nor a start.
        """
        if ranks > 1:
            module = (warm_torchrun.__file__, *warm_torchrun.OPTIONS) if warm else ("-m", "torch.distributed.run")
            torchrun = (*module, "--standalone", f"--nproc_per_node={ranks}", *torchrun)
        first = [] if str(arguments[0]).endswith(".toml") else [self.config, f"--data.dataset={self.documents}"]
        return subprocess.Popen(
            [*before, sys.executable, *torchrun, *script, *map(str, [*first, *arguments])],
            cwd=self.cwd,
            env=self.environment | (environment or {}),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(
        self,
        *arguments: object,
        meanwhile: Callable[[subprocess.Popen], object] = lambda process: None,
        **options: Any,
    ) -> subprocess.CompletedProcess:
        """`options`: as of `start`."""
        process = self.start(*arguments, **options)
        try:
            meanwhile(process)
            output, errors = process.communicate(timeout=400)
        except subprocess.TimeoutExpired:
            pytest.fail("\n".join(["it hangs:", *kill(process)]))
        except BaseException:
            kill(process)
            raise
        return subprocess.CompletedProcess(process.args, process.returncode, output, errors)

    def run_to_end(self, *arguments: object, warm: bool = True, **options: Any) -> subprocess.CompletedProcess:
        result = self.run(*arguments, warm=warm, **options)
        assert result.returncode == 0, result.stderr
        return result

    def run_and_kill(self, *arguments: object, when: Callable[[], bool], ranks: int = 1) -> None:
        process, deadline = self.start(*arguments, ranks=ranks, warm=True), time.monotonic() + 400
        while not when() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        reached, (_, errors) = when(), kill(process)
        assert reached, errors

    @cache  # noqa: B019
    def reference(self, ranks: int) -> tuple[Path, subprocess.CompletedProcess]:
        """An uninterrupted run, on one process or on the 2 x 2 mesh of four, as a user starts it."""
        run_dir, mesh = self.folder / f"reference_{ranks}", f"--parallel.tp={1 if ranks == 1 else 2}"
        return run_dir, self.run_to_end(f"--run.dir={run_dir}", mesh, ranks=ranks, warm=False)


def kill(process: subprocess.Popen) -> tuple[str, str]:
    """SIGKILL to a command and all that it started: torchrun puts every worker into a session of its own.

    What it had printed so far comes back once the last of them is gone.
    """
    table = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    parents = dict(map(int, line.split()) for line in table.splitlines())
    doomed, found = set(), {process.pid}
    while found:
        doomed |= found
        found = {pid for pid, parent in parents.items() if parent in doomed} - doomed
    for pid in doomed:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return process.communicate()


def ranks_of(torchrun: int) -> dict[int, int]:
    """Process ids by rank, of the ranks that torchrun has started so far, which it does in their order."""
    started = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended
            state, parent, *_, when = stat.read_text().rpartition(")")[2].split()[:20]
            if int(parent) == torchrun and state != "Z":
                started.append((int(when), int(stat.parent.name)))
    return {rank: pid for rank, (_, pid) in enumerate(sorted(started))}


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(tmp_path_factory.mktemp("lab"))


def without_bars(text: str) -> str:
    """What standard error holds beside progress bars."""
    return re.sub(r"(tokenize:)? *\d+%\|[^|]*\|[^\]]*\]", "", text).strip()


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Strict JSON, which has no NaN."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON")) for line in lines]


def facts(run_dir: Path) -> list[dict[str, Any]]:
    """The metrics without what the clock says."""
    return [{key: value for key, value in line.items() if key not in TIMES | SLOWEST} for line in read_metrics(run_dir)]


def split(lines: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Training lines and evaluation lines."""
    return [line for line in lines if "loss" in line], [line for line in lines if "loss" not in line]


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every file and folder below, with its time and its bytes."""
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else b"")
        for path in folder.rglob("*")
    }


def assert_close(lines: list[dict[str, Any]], reference: list[dict[str, Any]]) -> None:
    """Law 1: float32 sums in another order, over 20 steps; to 1e-6 at step 1, before Adam has used any of them."""
    assert [line.keys() for line in lines] == [line.keys() for line in reference]
    for line, expected in zip(lines, reference, strict=True):
        tolerance = 1e-6 if expected["step"] == 1 else 1e-5
        assert line == pytest.approx(expected, rel=tolerance), f"step {expected['step']}"


def train_here(
    arguments: list[str],
    cache: str,
    broken: dict[int, tuple[str, Sequence[int]]] = {},  # noqa: B006
    frozen: Sequence[int] = (),
    meanwhile: dict[int, Callable[[Path], object]] = {},  # noqa: B006
    access: Callable[..., bool] = os.access,
) -> dict[str, Any]:
    """The training loop on this rank, in the process group that is already there.

    `broken`: steps whose loss or gradient is not finite, how, and on which dp ranks. `frozen`: steps in which the
    optimizer does nothing. `meanwhile`: what happens after a step on this rank. `access`: instead of os.access. Returns
    the message that ended it, what was printed, and digests of weights and moments before and after each step.
    """
    import datasets

    datasets.config.HF_DATASETS_CACHE = Path(cache)
    config, printed, message, states = configs.load(arguments), io.StringIO(), None, []
    forward, make_optimizer = Llama.forward, train.make_optimizer

    def broken_forward(model: Llama, input_ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        loss = forward(model, input_ids, targets)
        how, where = broken.get(len(states) + 1, ("", ()))
        if torch.is_grad_enabled() and dist.get_rank() // config.parallel.tp in where:
            if how == "gradient":
                loss.register_hook(lambda gradient: gradient * math.inf)
            else:
                loss = loss * float(how)
        return loss

    def make_watched_optimizer(model: Llama, optim: OptimConfig) -> torch.optim.AdamW:
        optimizer = make_optimizer(model, optim)
        step = optimizer.step

        def state() -> dict[str, str]:
            tensors = dict(model.named_parameters())
            for name, parameter in model.named_parameters():
                moments = optimizer.state.get(parameter, {})
                tensors |= {f"{name}/{key}": value for key, value in moments.items()}
            return {name: digest(parallel.to_local(tensor)) for name, tensor in tensors.items()}

        def watched_step(**options: Any) -> None:
            if options:  # torch's, to make the moments that it is about to load
                return step(**options)
            before, number = state(), len(states) + 1
            if number not in frozen:
                step()
            states.append((before, state()))
            meanwhile.get(number, lambda run_dir: None)(Path(config.run.dir))
            return None

        optimizer.step = watched_step
        return optimizer

    screen = io.StringIO()  # no file: what `meanwhile` does to disks is not to break the progress bar
    screen.fileno = lambda: sys.__stderr__.fileno()  # faulthandler asks for it

    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    with (
        mock.patch.object(Llama, "forward", broken_forward),
        mock.patch.object(train, "make_optimizer", make_watched_optimizer),
        mock.patch.object(os, "access", access),
        contextlib.redirect_stdout(printed),
        contextlib.redirect_stderr(screen),
    ):
        try:
            for _ in train.train(config, torch.device("cpu")):
                pass
        except UserError as error:
            message = str(error)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    return {"message": message, "printed": printed.getvalue(), "states": states}


@pytest.fixture(scope="module")
def train_on(lab, ranks) -> Callable[..., list[dict[str, Any]]]:
    """`train_on(4, run_dir, [arguments], ...)`: `train_here` on four ranks, a 2 x 2 mesh; on two it is tp2."""

    def run(world: int, run_dir: Path, arguments: Sequence[str] = (), **options: Any) -> list[dict[str, Any]]:
        mesh = f"--parallel.tp={1 if world == 1 else 2}"
        command = [str(lab.config), f"--data.dataset={lab.documents}", f"--run.dir={run_dir}", mesh, *arguments]
        return ranks(world, partial(train_here, **options), command, str(lab.folder / "hf/d"))

    return run


# ---------------------------------------------------------------------------------------------------------------------
# A complete run


@pytest.mark.parametrize("ranks", [1, 4])
def test_a_complete_run_shows_its_progress_and_nothing_else(lab, ranks):
    run_dir, result = lab.reference(ranks)
    assert without_bars(result.stderr) == ""
    shape, batch, start_up, *evaluations, complete, hint = result.stdout.splitlines()
    mesh = "dp_replicate 1 x dp_shard 1 x tp 1" if ranks == 1 else "dp_replicate 1 x dp_shard 2 x tp 2"
    assert shape.startswith("Llama with ") and mesh in shape
    rows = int(re.search(r"(\d+) training rows of 32 tokens", batch).group(1))
    assert rows // 8 == STEPS_PER_EPOCH and rows % 8 > 0, "this run is to span several epochs, each with rows to spare"
    whole, *parts = map(float, re.findall(r"\d+\.\d", start_up))
    assert start_up.startswith("first step ") and whole == pytest.approx(sum(parts), abs=0.3), "each is rounded"
    assert len(parts) == 5 and parts[0] > 0.5, "importing torch takes its time"
    assert [line.split(":")[0] for line in evaluations] == ["step 8", "step 16", "step 20"], "one rank speaks"
    assert "complete at step 20" in complete and str(run_dir) in complete
    assert str(run_dir) in hint


@pytest.mark.parametrize("ranks", [1, 4])
def test_the_run_directory_holds_what_is_documented_and_the_newest_two_checkpoints(lab, ranks):
    run_dir, _ = lab.reference(ranks)
    shards = [f"__{rank}_0.distcp" for rank in range(ranks)]
    files = {
        f"checkpoints/step_{step:08d}/{file}" for step in (18, 20) for file in [".metadata", "state.json", *shards]
    }
    files |= {"config.toml", "tokenizer.json", "metrics.jsonl", ".lock"}
    assert {str(path.relative_to(run_dir)) for path in run_dir.rglob("*") if path.is_file()} == files
    config = tomllib.loads((run_dir / "config.toml").read_text())
    assert config["train"]["steps"] == STEPS and config["data"]["dataset"] == str(lab.documents)
    assert config["model"]["vocab_size"] == 384, "the tokenizer's, rounded up to a multiple of 128"
    assert config["parallel"]["tp"] == (1 if ranks == 1 else 2)


@pytest.mark.parametrize("ranks", [1, 4])
def test_metrics_are_complete_and_sane(lab, ranks):
    training, evaluation = split(read_metrics(lab.reference(ranks)[0]))
    assert [line["step"] for line in training] == list(range(1, STEPS + 1))
    assert all(line.keys() == TRAINING | (SLOWEST if ranks > 1 else set()) for line in training)
    assert training[0]["loss"] == pytest.approx(math.log(384), abs=0.05), "the first guess is uniform"
    assert training[-1]["loss"] < training[0]["loss"] - 0.5
    assert all(line["grad_norm"] > 0 and line["peak_memory_gib"] > 0 and line["mfu"] is None for line in training)
    optim = OptimConfig(lr=5e-3, warmup_steps=4)
    assert [line["lr"] for line in training] == [
        train.learning_rate(step, STEPS, optim) for step in range(1, STEPS + 1)
    ]
    tokens = [0, *(line["tokens"] for line in training)]
    assert all(0 < after - before <= 8 * 32 for before, after in pairwise(tokens))
    for line, before in zip(training, tokens, strict=False):
        assert line["tokens_per_second"] == pytest.approx((line["tokens"] - before) / line["step_seconds"])
        assert 0 <= line["data_seconds"] < line["step_seconds"]
    assert [line["step"] for line in evaluation] == [8, 16, STEPS]
    assert all(line.keys() == EVALUATION for line in evaluation)
    assert evaluation[-1]["val_loss"] < evaluation[0]["val_loss"]
    assert len({line["val_tokens"] for line in evaluation}) == 1


def test_four_ranks_on_two_axes_compute_what_one_rank_does(lab):
    assert_close(facts(lab.reference(4)[0]), facts(lab.reference(1)[0]))


# ---------------------------------------------------------------------------------------------------------------------
# Again, and further


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_same_command_again_says_what_can_be_done_and_changes_nothing(lab, ranks):
    run_dir, _ = lab.reference(1)
    before = snapshot(run_dir)
    result = lab.run_to_end(f"--run.dir={run_dir}", ranks=ranks)
    assert without_bars(result.stderr) == ""
    (line,) = result.stdout.splitlines()
    assert "complete at step 20" in line and "--train.steps" in line and "--run.dir" in line
    assert snapshot(run_dir) == before


def test_extending_a_run_continues_it_and_says_that_the_schedule_changes(lab):
    reference, _ = lab.reference(1)
    run_dir = lab.folder / "extended"
    shutil.copytree(reference, run_dir)
    # the recorded configuration is one that can be given
    result = lab.run_to_end(reference / "config.toml", f"--run.dir={run_dir}", "--train.steps=23")
    assert f"resumed from {run_dir}/checkpoints/step_00000020" in result.stdout
    assert re.search(r"23 steps.* 20.*schedule", result.stdout)
    lines = facts(run_dir)
    assert lines[:-4] == facts(reference)
    training, evaluation = split(lines[-4:])
    assert [line["step"] for line in training] == [21, 22, 23] and [line["step"] for line in evaluation] == [23]
    optim = OptimConfig(lr=5e-3, warmup_steps=4)
    assert [line["lr"] for line in training] == [train.learning_rate(step, 23, optim) for step in (21, 22, 23)]


# ---------------------------------------------------------------------------------------------------------------------
# Killed


def test_resume_after_two_kills_is_bitwise_identical_also_with_a_loader_worker(lab):
    run_dir = lab.folder / "killed_1"
    checkpoints, command = run_dir / "checkpoints", (f"--run.dir={run_dir}", "--data.num_workers=1")
    lab.run_and_kill(*command, when=(checkpoints / "step_00000006").exists)
    saves = [checkpoints / ".tmp-step_00000012", checkpoints / "step_00000012"]  # during a save, if we are quick enough
    lab.run_and_kill(*command, when=lambda: any(save.exists() for save in saves))
    assert not (checkpoints / "step_00000018").exists(), "killed too late to tell anything"
    result = lab.run_to_end(*command)
    assert without_bars(result.stderr) == ""
    assert f"resumed from {checkpoints}/step_000000" in result.stdout and "schedule" not in result.stdout
    assert facts(run_dir) == facts(lab.reference(1)[0])


@pytest.fixture(scope="module")
def killed(lab) -> Path:
    """A run of four ranks, killed after checkpoint 12, an epoch's end, with half a line and half a save behind it."""
    run_dir = lab.folder / "killed_4"
    final = run_dir / "checkpoints/step_00000020"
    done = run_dir / "checkpoints/step_00000012"
    lab.run_and_kill(f"--run.dir={run_dir}", "--parallel.tp=2", when=done.exists, ranks=4)
    assert not final.exists(), "killed too late to tell anything"
    with (run_dir / "metrics.jsonl").open("a") as metrics:
        metrics.write('{"step": 14, "lo')
    unfinished = run_dir / "checkpoints/.tmp-step_00000099"
    shutil.copytree(done, unfinished)
    return run_dir


@pytest.mark.parametrize("ranks", [4, 1])
def test_a_killed_run_of_four_ranks_resumes_bitwise_on_its_mesh_and_within_rounding_on_one_rank(lab, killed, ranks):
    run_dir = lab.folder / f"killed_4_resumed_{ranks}"
    shutil.copytree(killed, run_dir)
    newest = max(path.name for path in (run_dir / "checkpoints").glob("step_*"))
    result = lab.run_to_end(f"--run.dir={run_dir}", f"--parallel.tp={1 if ranks == 1 else 2}", ranks=ranks)
    assert result.stdout.count(f"resumed from {run_dir}/checkpoints/{newest}") == 1
    assert without_bars(result.stderr) == ""
    reference = facts(lab.reference(4)[0])
    if ranks == 4:
        assert facts(run_dir) == reference
    else:
        assert_close(facts(run_dir), reference)
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == ["step_00000018", "step_00000020"]


# ---------------------------------------------------------------------------------------------------------------------
# Refused


@pytest.fixture(scope="module")
def another_run(lab) -> str:
    """What a run directory says to another model, data, tokenizer, seed and global batch, all at once."""
    run_dir, _ = lab.reference(1)
    before, other = snapshot(run_dir), lab.folder / "other.jsonl"
    other.write_text(lab.documents.read_text())
    changes = ["--model.hidden_size=64", "--train.seed=7", "--train.global_batch_size=16", f"--data.dataset={other}"]
    result = lab.run(f"--run.dir={run_dir}", *changes, f"--data.tokenizer={run_dir}/tokenizer.json")
    assert (result.returncode, result.stdout) == (2, "")
    assert snapshot(run_dir) == before
    return result.stderr


@pytest.mark.parametrize(
    ("key", "there", "now"),
    [
        ("model.hidden_size", "32", "64"),
        ("model.head_dim", "8", "16"),
        ("data.dataset", "documents.jsonl", "other.jsonl"),
        ("data.tokenizer", "'train'", "tokenizer.json"),
        ("train.seed", "0", "7"),
        ("train.global_batch_size", "8", "16"),
    ],
)
def test_a_run_directory_refuses_another_run_and_names_each_key_with_both_values(another_run, key, there, now):
    assert another_run.startswith("error: ") and "Traceback" not in another_run
    (line,) = (line for line in another_run.splitlines() if f"{key}:" in line)
    assert re.search(f"{re.escape(there)}.*there.*{re.escape(now)}.*now", line)


@pytest.mark.parametrize("ranks", [1, 2])
def test_starting_over_in_a_run_directory_with_checkpoints_is_refused(lab, ranks):
    run_dir, _ = lab.reference(1)
    before = snapshot(run_dir)
    result = lab.run(f"--run.dir={run_dir}", "--checkpoint.resume=never", ranks=ranks)
    assert (result.returncode, result.stdout) == (2 if ranks == 1 else 1, "")
    assert result.stderr.count("error: checkpoint.resume=") == 1
    assert re.search(r'error: checkpoint.resume="never".*step_00000020.*--run.dir', result.stderr)
    assert snapshot(run_dir) == before


def test_documents_that_have_changed_are_refused(lab):
    run_dir, _ = lab.reference(1)
    before, documents, times = snapshot(run_dir), lab.documents.read_text(), lab.documents.stat()
    try:
        lab.documents.write_text(documents + '{"text": "one more", "source": 99}\n')
        result = lab.run(f"--run.dir={run_dir}", "--train.steps=30")
    finally:
        lab.documents.write_text(documents)
        os.utime(lab.documents, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert (result.returncode, result.stdout) == (2, "")
    assert re.fullmatch(r"(?s)error: .*another run:\n +data: '\w+' there, '\w+' now\n.*", without_bars(result.stderr))
    assert snapshot(run_dir) == before


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("reference_1", ["--train.steps=30"], r"step_00000018 is not the newest.*--run.dir"),
        ("branch_of_another_seed", ["--train.seed=7"], r"(?s)another run:.*train.seed: 0 there, 7 now"),
    ],
)
def test_a_branch_that_would_do_damage_or_is_of_another_run_is_refused(lab, name, arguments, message):
    reference, _ = lab.reference(1)
    before, run_dir = snapshot(reference), lab.folder / name
    result = lab.run(f"--run.dir={run_dir}", f"--checkpoint.resume={reference}/checkpoints/step_00000018", *arguments)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("error: ") and re.search(message, result.stderr)
    assert snapshot(reference) == before
    assert run_dir == reference or not run_dir.exists()


# ---------------------------------------------------------------------------------------------------------------------
# Damaged


def copy_of_reference(lab: Lab, name: str, ranks: int = 1) -> Path:
    """A complete run with checkpoints 18 and 20, to do harm to."""
    return Path(shutil.copytree(lab.reference(ranks)[0], lab.folder / name))


def names_of_checkpoints(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


@pytest.mark.parametrize(
    ("ranks", "file", "change"),
    [(1, "__0_0.distcp", harm.flip), (1, "state.json", harm.halve), (4, "__3_0.distcp", Path.unlink)],
    ids=["a bit flipped, one rank", "state.json cut off, one rank", "a shard lost, four ranks"],
)
def test_a_damaged_checkpoint_is_passed_over_and_put_aside_and_does_not_change_the_result(lab, ranks, file, change):
    run_dir = copy_of_reference(lab, f"damaged_{ranks}_{file}", ranks)
    damaged, intact = (run_dir / f"checkpoints/step_{step:08d}" for step in (20, 18))
    change(damaged / file)
    result = lab.run_to_end(f"--run.dir={run_dir}", f"--parallel.tp={1 if ranks == 1 else 2}", ranks=ranks)
    assert result.stdout.count("WARNING: ") == 1
    assert re.search(rf"WARNING: a damaged checkpoint, trying the one before.*\n +{damaged}/{file} ", result.stdout)
    assert f"resumed from {intact}\n" in result.stdout and without_bars(result.stderr) == ""
    assert facts(run_dir) == facts(lab.reference(ranks)[0])
    aside, *complete = names_of_checkpoints(run_dir)
    assert aside.startswith("damaged-step_00000020-") and complete == ["step_00000018", "step_00000020"]


def test_without_an_intact_checkpoint_a_run_stops_and_changes_nothing(lab):
    run_dir = copy_of_reference(lab, "all_damaged")
    harm.halve(run_dir / "checkpoints/step_00000020/state.json")
    harm.flip(run_dir / "checkpoints/step_00000018/.metadata")
    before = snapshot(run_dir)
    result = lab.run(f"--run.dir={run_dir}", "--train.steps=22")
    assert result.returncode == 2
    message = without_bars(result.stderr)
    assert re.fullmatch(r"error: no checkpoint is intact, .*step_00000018 was the last: .*another --run.dir", message)
    assert result.stdout.count("WARNING: ") == 2
    assert snapshot(run_dir) == before


def test_a_branch_off_a_run_whose_newest_checkpoint_is_damaged_leaves_that_run_alone(lab, train_on):
    original, run_dir = copy_of_reference(lab, "damaged_original"), lab.folder / "branch_of_damaged"
    harm.flip(original / "checkpoints/step_00000020/__0_0.distcp")
    before = snapshot(original)
    (result,) = train_on(1, run_dir, [f"--checkpoint.resume={original}"])
    assert result["message"] is None
    assert f"resumed from {original}/checkpoints/step_00000018\n" in result["printed"]
    assert snapshot(original) == before
    assert names_of_checkpoints(run_dir) == ["step_00000020"]


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("config.toml", "[model]", "model]"),
        ("metrics.jsonl", '{"step": 7, "loss": ', '{"step": 7, "loss" '),
        ("tokenizer.json", '"model"', '"mod'),
    ],
)
def test_another_damaged_file_of_the_run_directory_gets_one_message_and_nothing_is_changed(
    lab, train_on, name, old, new
):
    run_dir = copy_of_reference(lab, f"damaged_{name}")
    path = run_dir / name
    path.write_text(path.read_text().replace(old, new, 1))
    before = snapshot(run_dir)
    messages = {result["message"] for result in train_on(4, run_dir, ["--train.steps=22"])}
    (message,) = messages
    assert str(path) in message
    assert "remove" in message or name == "tokenizer.json"
    assert snapshot(run_dir) == before


@pytest.mark.parametrize("how", ["resume", "branch"])
@pytest.mark.parametrize("plant", [harm.plant_bomb, harm.plant_bytes], ids=["a call", "bytes for a tensor"])
def test_a_bomb_in_a_checkpoint_does_not_go_off_in_a_run_that_resumes_or_branches_off(lab, train_on, plant, how):
    original = copy_of_reference(lab, f"bomb_{plant.__name__}_{how}")
    run_dir, marker = lab.folder / f"target_of_{original.name}", lab.folder / f"marker_of_{original.name}"
    for step in (18, 20):
        plant(original / f"checkpoints/step_{step:08d}", marker)
    before = snapshot(original)
    if how == "resume":
        (result,) = train_on(1, original, ["--train.steps=22"])
    else:
        (result,) = train_on(1, run_dir, ["--train.steps=22", f"--checkpoint.resume={original}"])
    assert result["message"].startswith("no checkpoint is intact")
    assert result["printed"].count(".metadata is refused: it names ") == 2
    assert snapshot(original) == before
    assert not marker.exists() and not run_dir.exists()


# ---------------------------------------------------------------------------------------------------------------------
# Full, vanished and read-only disks


@pytest.mark.parametrize("async_save", ["false", "true"], ids=["sync", "async"])
def test_a_disk_that_fills_up_during_a_save_costs_nothing_once_there_is_room_again(lab, async_save):
    """As killed after step 18, with room for half a checkpoint. Where no disk can be mounted, files have a limit."""
    reference, run_dir = lab.reference(1)[0], lab.folder / f"full_{async_save}"
    kept = [path for path in reference.rglob("*") if path.is_file() and path.parent.name != "step_00000020"]
    shard = (reference / "checkpoints/step_00000020/__0_0.distcp").stat().st_size
    most_bytes = sum(path.stat().st_size + 4096 for path in kept) + shard // 2
    command = (f"--run.dir={run_dir}", f"--checkpoint.async_save={async_save}")
    with harm.own_disk(run_dir, most_bytes) as mounted:
        shutil.copytree(reference, run_dir, ignore=lambda *_: {"step_00000020"}, dirs_exist_ok=True)
        intact = snapshot(run_dir / "checkpoints/step_00000018")
        result = lab.run(
            *command, meanwhile=lambda process: None if mounted else harm.limit_files(process.pid, shard // 2)
        )
        assert result.returncode == 2, result.stderr
        message = without_bars(result.stderr)
        assert message.startswith(f"error: {run_dir}/checkpoints/step_00000020 could not be written: ")
        assert ("No space left on device" if mounted else "File too large") in message
        assert f"{run_dir}/checkpoints/step_00000018 is intact" in message and "the same command" in message
        assert "Traceback" not in message and len(message.splitlines()) == 1
        assert "complete" not in result.stdout
        assert names_of_checkpoints(run_dir) == [".tmp-step_00000020", "step_00000018"]
        assert snapshot(run_dir / "checkpoints/step_00000018") == intact
        assert not mounted or harm.mount(run_dir, f"remount,size={most_bytes + 2**22}")
        result = lab.run_to_end(*command)
        assert f"resumed from {run_dir}/checkpoints/step_00000018\n" in result.stdout
        assert facts(run_dir) == facts(reference)
        assert names_of_checkpoints(run_dir) == ["step_00000018", "step_00000020"]


SHORT = ["--train.steps=8", "--checkpoint.every=3", "--data.val_fraction=0"]


def fill_disk(run_dir: Path) -> None:
    """No room for another line of metrics."""
    if dist.get_rank() == 0:
        harm.limit_files(0, (run_dir / "metrics.jsonl").stat().st_size + 5)


def test_metrics_that_cannot_be_written_end_the_run_with_one_message_and_are_made_up_for(lab, train_on):
    run_dir, reference = lab.folder / "metrics_full", lab.folder / "metrics_reference"
    train_on(2, reference, SHORT)
    messages = {result["message"] for result in train_on(2, run_dir, SHORT, meanwhile={4: fill_disk})}
    (message,) = messages
    assert message.startswith(f"{run_dir}/metrics.jsonl cannot be written: ") and "File too large" in message
    assert names_of_checkpoints(run_dir) == ["step_00000003"]
    result, *_ = train_on(2, run_dir, SHORT)
    assert result["message"] is None and "resumed from" in result["printed"]
    assert facts(run_dir) == facts(reference)


def fill_disk_of_rank_1(run_dir: Path) -> None:
    if dist.get_rank() == 1:
        harm.limit_files(0, 2**13)


def wait_for_the_background(run_dir: Path) -> None:
    time.sleep(2)


def test_an_asynchronous_save_that_fails_ends_the_run_long_before_the_next_save(lab, train_on):
    run_dir = lab.folder / "failed_in_background"
    arguments = ["--train.steps=20", "--checkpoint.every=9", "--checkpoint.async_save=true"]
    meanwhile = {9: fill_disk_of_rank_1, 10: wait_for_the_background}
    messages = {result["message"] for result in train_on(4, run_dir, arguments, meanwhile=meanwhile)}
    (message,) = messages
    assert re.search(r"step_00000009 could not be written: .*File too large.*; there is no earlier one", message)
    assert facts(run_dir)[-1]["step"] in (9, 10), "noticed after the step that waited for it, at the latest"


def remove(run_dir: Path) -> None:
    if dist.get_rank() == 0:
        run_dir.rename(run_dir.with_name("removed"))


@pytest.mark.parametrize("async_save", ["false", "true"], ids=["sync", "async"])
def test_a_run_directory_that_vanishes_ends_the_run_with_one_message_and_is_not_made_anew(lab, train_on, async_save):
    run_dir = lab.folder / f"vanishing_{async_save}/run"
    arguments = [*SHORT, f"--checkpoint.async_save={async_save}"]
    messages = {result["message"] for result in train_on(2, run_dir, arguments, meanwhile={4: remove})}
    (message,) = messages
    assert message.startswith(f"{run_dir}/checkpoints/step_00000006 could not be written: ")
    assert "No such file or directory" in message and "there is no earlier one" in message
    assert not run_dir.exists()
    assert names_of_checkpoints(run_dir.with_name("removed")) == ["step_00000003"]


def no_access(*arguments: object) -> bool:
    return False


def test_a_run_directory_that_cannot_be_written_is_refused_with_one_message(lab, train_on):
    """A disk mounted read-only; where that is not possible, a folder without permission, or for root a pretence."""
    run_dir = lab.folder / "read_only"
    with harm.own_disk(run_dir, 2**24) as mounted:
        shutil.copytree(lab.reference(1)[0], run_dir, dirs_exist_ok=True)
        before = snapshot(run_dir)
        run = partial(train_on, 1, run_dir, ["--train.steps=22"])
        if mounted:
            assert harm.mount(run_dir, "remount,ro")
            (result,) = run()
        elif os.geteuid() != 0:
            run_dir.chmod(0o555)
            (result,) = run()
            run_dir.chmod(0o755)
        else:
            (result,) = run(access=no_access)
        assert result["message"].startswith(f"run.dir={run_dir} cannot be written: ")
        assert snapshot(run_dir) == before


# ---------------------------------------------------------------------------------------------------------------------
# One job at a time


def test_a_second_job_in_a_run_directory_is_refused_until_the_first_has_ended_even_if_killed(lab):
    run_dir, command = lab.folder / "locked", f"--run.dir={lab.folder / 'locked'}"
    first, deadline = lab.start(command, "--data.num_workers=1"), time.monotonic() + 400
    while not (run_dir / "checkpoints/step_00000006").exists() and time.monotonic() < deadline:
        time.sleep(0.002)
    first.send_signal(signal.SIGSTOP)  # so that what is there can be compared
    try:
        assert first.poll() is None, "the first job was too quick to tell anything"
        before = snapshot(run_dir)
        second = lab.run(command)
        assert (second.returncode, second.stdout) == (2, "")
        assert re.fullmatch(rf"error: run.dir={run_dir} is in use by another job: .*", without_bars(second.stderr))
        assert snapshot(run_dir) == before
    finally:
        first.kill()  # this process alone: what it has started may live on for a while
    third = lab.run_to_end(command)
    first.communicate()
    assert "resumed from" in third.stdout
    assert facts(run_dir) == facts(lab.reference(1)[0])


def test_a_second_job_hears_within_seconds_that_the_first_one_which_goes_on_saving_has_the_directory(lab):
    """Whatever checkpoint the first one is just writing or removing, nothing is called damaged, and nothing is read."""
    run_dir = lab.folder / "busy"
    command = (f"--run.dir={run_dir}", "--train.steps=100000", "--checkpoint.every=1", "--checkpoint.keep=1")
    first, deadline = lab.start(*command, "--train.eval_every=0"), time.monotonic() + 400
    while not (run_dir / "checkpoints/step_00000003").exists() and time.monotonic() < deadline:
        time.sleep(0.002)
    try:
        for ranks in (1, 2, 1):
            before = max(step_of(path) for path in checkpoint.complete_checkpoints(run_dir))
            second = lab.run(*command, "--data.dataset=nowhere.jsonl", ranks=ranks)  # refused before it is looked for
            assert second.stdout == "" and second.stderr.count("is in use by another job: ") == 1
            assert "damaged" not in second.stderr and "nowhere" not in second.stderr
            assert max(step_of(path) for path in checkpoint.complete_checkpoints(run_dir)) > before, "it goes on"
        assert first.poll() is None
    finally:
        kill(first)


def test_of_two_jobs_that_start_together_in_a_new_run_directory_one_trains_and_the_other_is_told(lab):
    run_dir = lab.folder / "together"
    jobs = [lab.start(f"--run.dir={run_dir}", "--train.steps=4") for _ in range(2)]
    results = sorted((job.returncode, without_bars(errors)) for job in jobs for _, errors in [job.communicate()])
    (status, errors), (other, message) = results
    assert (status, errors, other) == (0, "", 2)
    assert re.fullmatch(rf"error: run.dir={run_dir} is in use by another job: .*", message)
    assert facts(run_dir)[-1]["step"] == 4


def settle_late(run_dir: Path, *arguments: Any) -> Config:
    """Another job makes the directory while this one tokenizes."""
    if dist.get_rank() == 0:
        run_dir.mkdir()
    return settle(*arguments)


settle = configs.settle


def claim_too_late(arguments: list[str], cache: str) -> str:
    run_dir = Path(configs.load(arguments).run.dir)
    with mock.patch.object(configs, "settle", partial(settle_late, run_dir)):
        return train_here(arguments, cache)["message"]


def test_who_comes_second_to_a_new_run_directory_hears_it_at_the_claim_and_writes_nothing(lab, ranks):
    run_dir = lab.folder / "claimed"
    arguments = [str(lab.config), f"--data.dataset={lab.documents}", f"--run.dir={run_dir}", "--parallel.tp=2"]
    for message in ranks(2, claim_too_late, arguments, str(lab.folder / "hf/d")):
        assert message.startswith(f"run.dir={run_dir} is in use by another job: ")
    assert list(run_dir.iterdir()) == []


@pytest.mark.parametrize("content", [[], [".lock"]], ids=["empty", "only .lock"])
def test_a_directory_that_is_empty_or_holds_only_a_lock_is_a_new_run(lab, train_on, content):
    run_dir = lab.folder / f"new_{len(content)}"
    run_dir.mkdir()
    for name in content:
        (run_dir / name).touch()
    (result,) = train_on(1, run_dir, ["--train.steps=4", "--checkpoint.resume=never"])
    assert result["message"] is None and facts(run_dir)[-1]["step"] == 4


# ---------------------------------------------------------------------------------------------------------------------
# Skipped steps


BROKEN = {
    "nan": (1, ("nan", [0])),
    "inf": (1, ("inf", [0])),
    "a gradient": (1, ("gradient", [0])),
    "nan on one dp rank": (4, ("nan", [1])),
    "a gradient on one dp rank": (4, ("gradient", [0])),
}


@pytest.mark.parametrize(("world", "how"), BROKEN.values(), ids=BROKEN)
def test_a_step_that_is_not_finite_leaves_weights_and_moments_as_they_were_on_all_ranks(
    lab, train_on, world, how, request
):
    """Also the very first one. The run goes on as if only the update had been left out, bit for bit."""
    steps, name = (1, 4, 5), re.sub(r"\W", "_", request.node.callspec.id)
    run_dir, frozen = lab.folder / f"skipping_{name}", lab.folder / f"frozen_{world}"
    results = train_on(world, run_dir, SHORT, broken=dict.fromkeys(steps, how))
    if not frozen.exists():
        train_on(world, frozen, SHORT, frozen=steps)
    for result in results:
        assert result["message"] is None
        for step, (before, after) in enumerate(result["states"], 1):
            if step == 1:  # moments are made in the first step, with zeros
                assert before.items() <= after.items() and len(after) == 4 * len(before)
            elif step in steps:
                assert after == before
            else:
                # a row of the embedding whose token has never come up still decays, but has no moments yet
                assert all(after[key] != before[key] for key in before if "embed_tokens.weight/" not in key)
    lines = {line["step"]: line for line in facts(run_dir) if "loss" in line}
    for step, line in ((line["step"], line) for line in facts(frozen)):
        if step in steps:
            assert lines[step].keys() == line.keys()
            assert lines[step]["grad_norm"] is None
            assert (lines[step]["loss"] is None) == (how[0] != "gradient")
            assert lines[step]["lr"] == line["lr"] and lines[step]["tokens"] == line["tokens"]
        else:
            assert lines[step] == line
    assert checkpoint.read_state(run_dir / "checkpoints/step_00000008")["step"] == 8


def test_a_skipped_step_is_reported_with_its_rows_on_the_screen_and_in_the_metrics(lab, train_on):
    run_dir = lab.folder / "reported"
    (result,) = train_on(1, run_dir, [*SHORT, "--train.log_every=2"], broken={2: ("nan", [0]), 5: ("nan", [0])})
    num_rows = int(re.search(r"(\d+) training rows", result["printed"])[1])
    skipped = {line["step"]: line["skipped_rows"] for line in read_metrics(run_dir) if "skipped_rows" in line}
    assert skipped.keys() == {2, 5}
    config = configs.load([str(lab.config), *SHORT]).train
    source = mock.Mock(window=0, counts=[num_rows])
    for step, rows in skipped.items():
        assert rows == data.rows_of_step(source, step, config.global_batch_size, config.seed).tolist()
        assert f"step {step} skipped: its loss or gradient is not finite; rows {rows}\n" in result["printed"]
    steps = [line["step"] for line in read_metrics(run_dir)]
    assert steps == [2, 2, 4, 5, 6, 8], "with the next line or checkpoint"


@pytest.mark.parametrize(
    ("world", "most", "broken", "more"),
    [
        (4, 2, (4, 5, 6), ["--checkpoint.async_save=true"]),
        (2, 0, (4,), []),
        (1, 2, (4, 5, 6), ["--train.log_every=4"]),
    ],
    ids=["three of two", "one of none", "between two lines of metrics"],
)
def test_more_skipped_steps_in_a_row_than_allowed_end_the_run_on_all_ranks_after_the_last_checkpoint(
    lab, train_on, world, most, broken, more, request
):
    run_dir = lab.folder / re.sub(r"\W", "_", f"too_many_{request.node.callspec.id}")
    arguments = [*SHORT, f"--train.max_skipped_steps={most}", *more]
    results = train_on(world, run_dir, arguments, broken=dict.fromkeys(broken, ("nan", [world // 4])))
    (message,) = {result["message"] for result in results}
    assert f"{most + 1} steps in a row" in message and f"train.max_skipped_steps={most}" in message
    assert sum(f"step {step} skipped" in results[0]["printed"] for step in broken) == len(broken)
    newest = checkpoint.complete_checkpoints(run_dir)[-1]
    assert newest.name == "step_00000003" and checkpoint.damage(newest) == []
    assert read_metrics(run_dir)[-1]["step"] in (broken[-1], 8)


def test_a_finite_step_in_between_starts_the_count_again(lab, train_on):
    run_dir, broken = lab.folder / "in_between", dict.fromkeys((1, 2, 4, 5, 7, 8), ("inf", [0]))
    (result,) = train_on(1, run_dir, [*SHORT, "--train.max_skipped_steps=2"], broken=broken)
    assert result["message"] is None
    assert [line["step"] for line in read_metrics(run_dir) if "skipped_rows" in line] == [1, 2, 4, 5, 7, 8]


# ---------------------------------------------------------------------------------------------------------------------
# Bad input

BAD_INPUT = {
    "two mistakes at once": (
        ["--model.hiden_size=32", "--train.steps=many"],
        ["model.hiden_size", "did you mean model.hidden_size?", "train.steps='many'", "integer"],
    ),
    "no such configuration": (["{folder}/nowhere.toml"], ["nowhere.toml", "{folder}/tiny.toml"]),
    "no such documents": (["--data.dataset={folder}/nowhere.jsonl"], ["data.dataset", "nowhere.jsonl"]),
    "empty .jsonl": (["--data.dataset={folder}/empty.jsonl"], ["data.dataset", "empty.jsonl", "one document"]),
    "empty .txt": (["--data.dataset={folder}/empty.txt"], ["data.dataset", "empty.txt", "one document"]),
    "broken .jsonl": (["--data.dataset={folder}/broken.jsonl"], ["data.dataset", "broken.jsonl", "JSON parse error"]),
    "no such column": (["--data.text_column=body"], ["data.text_column='body'", "text, source"]),
    "a column of numbers": (["--data.text_column=source"], ["data.text_column='source'", "int64"]),
    "broken tokenizer": (["--data.tokenizer={folder}/broken.json"], ["data.tokenizer", "broken.json"]),
    "vocabulary below the tokenizer's": (
        ["--data.tokenizer={folder}/reference_1/tokenizer.json", "--model.vocab_size=256"],
        ["model.vocab_size=256", "tokens: raise it to 384"],
    ),
    "fewer rows than a global batch": (["--train.global_batch_size=64"], ["train.global_batch_size=64", "rows"]),
    "a file in the way": (["--run.dir={folder}/in_the_way/run"], ["run.dir", "in_the_way"]),
}


@pytest.fixture(scope="module")
def bad_files(lab) -> None:
    lab.reference(1)  # its tokenizer.json
    contents = {
        "empty.jsonl": "",
        "empty.txt": "",
        "broken.jsonl": '{"text": "x"\n',
        "broken.json": "{",
        "in_the_way": "",
    }
    for name, text in contents.items():
        (lab.folder / name).write_text(text)


def refusal(lab: Lab, arguments: list[str], ranks: int) -> subprocess.CompletedProcess:
    """Run with bad input; whatever the input, standard output stays empty and no run directory appears."""
    run_dir = lab.folder / "never_written"
    arguments = [argument.format(folder=lab.folder) for argument in arguments]
    elsewhere = [] if any(argument.startswith("--run.dir") for argument in arguments) else [f"--run.dir={run_dir}"]
    before = {path.name for path in lab.folder.iterdir()}
    result = lab.run(*arguments, *elsewhere, ranks=ranks)
    assert result.stdout == ""
    assert {path.name for path in lab.folder.iterdir()} == before
    return result


@pytest.mark.usefixtures("bad_files")
@pytest.mark.parametrize(("arguments", "words"), BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input_gets_one_message_and_writes_nothing(lab, arguments, words):
    result = refusal(lab, arguments, ranks=1)
    assert result.returncode == 2, result.stderr
    message = without_bars(result.stderr)
    assert (
        message.startswith("error: ") and len(re.findall("(?m)^error: ", message)) == 1 and "Traceback" not in message
    )
    for word in words:
        assert word.format(folder=lab.folder) in message


@pytest.mark.usefixtures("bad_files")
@pytest.mark.parametrize(
    "case", ["two mistakes at once", "no such column", "a file in the way"], ids=["config", "data", "run directory"]
)
def test_under_torchrun_bad_input_is_reported_by_one_rank(lab, case):
    arguments, words = BAD_INPUT[case]
    result = refusal(lab, arguments, ranks=2)
    assert result.returncode != 0
    assert len(re.findall("(?m)^error: ", result.stderr)) == 1
    assert all(word in result.stderr for word in words)
    assert 'train.py", line' not in result.stderr, "the only traceback is torchrun's own"


# ---------------------------------------------------------------------------------------------------------------------
# Who else hears of it


@pytest.fixture(scope="module")
def observed(lab) -> tuple[Path, subprocess.CompletedProcess, set[Path]]:
    """A run that wandb and the profiler watch, and what it wrote elsewhere than into its run directory."""
    lab.reference(1)
    run_dir, before = lab.folder / "observed", everywhere(lab)
    result = lab.run_to_end(f"--run.dir={run_dir}", "--run.wandb=offline", "--run.profile_steps=[2,3]")
    elsewhere = {path for path in everywhere(lab) - before if run_dir not in (path, *path.parents)}
    return run_dir, result, elsewhere


def everywhere(lab: Lab) -> set[Path]:
    """What is in the folder with cwd, home, caches and temporary files, and in the repository."""
    ours = {path for path in ROOT.rglob("*") if not {"__pycache__", ".git", ".venv"} & set(path.parts)}
    return {path for path in ours if "cache" not in str(path)} | set(lab.folder.rglob("*"))


def test_offline_wandb_needs_no_account_prints_nothing_and_writes_into_the_run_directory(lab, observed):
    run_dir, result, _ = observed
    reference, expected = lab.reference(1)
    timeless = partial(re.sub, r"(?m)^first step .*$", "first step ?")  # it says how long everything took
    assert timeless(result.stdout) == timeless(expected.stdout.replace(str(reference), str(run_dir)))
    notes = re.sub(r"USDT:.*ActivityProfiler.*", "", result.stderr)  # torch's profiler says that it starts and stops
    assert without_bars(notes) == ""
    (log,) = run_dir.glob("wandb/offline-run-*/run-*.wandb")
    assert {key for key in TRAINING | EVALUATION if key.encode() in log.read_bytes()} == TRAINING | EVALUATION


def test_a_run_writes_into_its_run_directory_and_the_caches_only(lab, observed):
    _, _, elsewhere = observed
    caches = (lab.folder / "hf", lab.folder / "home")
    assert {path for path in elsewhere if not any(cache in (path, *path.parents) for cache in caches)} == set()


def test_wandb_without_an_account_is_refused_with_one_message(lab):
    result = lab.run(f"--run.dir={lab.folder / 'no_account'}", "--run.wandb=online")
    assert result.returncode == 2, result.stderr
    message = without_bars(result.stderr)
    assert message.startswith("error: ") and "run.wandb" in message and "Traceback" not in message


def test_being_watched_does_not_change_the_result(lab, observed):
    assert facts(observed[0]) == facts(lab.reference(1)[0])


def test_profile_steps_writes_a_chrome_trace(observed):
    (trace,) = observed[0].glob("*trace*.json")
    events = json.loads(trace.read_text())["traceEvents"]
    assert any(event.get("name", "").startswith("aten::") for event in events)
    assert sum("Optimizer.step" in event.get("name", "") for event in events if event.get("ph") == "X") == 2


def test_profile_steps_after_the_end_of_the_run_cost_nothing_of_it(lab):
    run_dir = lab.folder / "profiled_too_late"
    result = lab.run(f"--run.dir={run_dir}", "--train.steps=5", "--run.profile_steps=[7,8]")
    assert "Traceback" not in result.stderr
    if result.returncode == 2:  # said beforehand
        assert result.stderr.startswith("error: run.profile_steps") and not run_dir.exists()
    else:
        assert result.returncode == 0 and (run_dir / "checkpoints/step_00000005").exists()


SECRETS = {"WANDB_API_KEY": "5ec7e7" * 6 + "cafe", "HF_TOKEN": "hf_" + "NeverWriteThisDown"}


@pytest.fixture(scope="module")
def branch(lab, observed) -> tuple[Path, Path]:
    """A run directory that branched off `observed` two steps before its end, and `observed`, untouched."""
    original, run_dir = observed[0], lab.folder / "branch"
    before = snapshot(original)
    older = original / "checkpoints/step_00000018"
    command = (f"--run.dir={run_dir}", f"--checkpoint.resume={older}", "--run.wandb=offline")
    result = lab.run_to_end(*command, environment=SECRETS)
    assert not any(secret in result.stdout + result.stderr for secret in SECRETS.values())
    assert f"resumed from {older}" in result.stdout
    assert without_bars(result.stderr) == ""
    assert snapshot(original) == before
    return run_dir, original


def test_a_branch_continues_the_checkpoint_and_leaves_the_original_alone(branch):
    run_dir, original = branch
    assert facts(run_dir) == [line for line in facts(original) if line["step"] > 18]
    assert (run_dir / "tokenizer.json").read_text() == (original / "tokenizer.json").read_text()
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == ["step_00000020"]


def test_a_branch_is_a_run_of_its_own_in_wandb(branch):
    own, original = (json.loads((path / "checkpoints/step_00000020/state.json").read_text()) for path in branch)
    assert own["wandb_id"] and original["wandb_id"] and own["wandb_id"] != original["wandb_id"]


def test_secrets_of_the_environment_are_in_no_file_and_not_on_the_screen(lab, branch):
    """The screen is looked at where the branch is made."""
    files = [path for path in [*branch[0].rglob("*"), *(lab.folder / "home").rglob("*")] if path.is_file()]
    assert any(path.suffix == ".wandb" for path in files)
    for path in files:
        assert not any(secret.encode() in path.read_bytes() for secret in SECRETS.values()), path


def test_a_resumed_run_stays_the_same_in_wandb(lab, observed):
    run_dir = lab.folder / "observed_further"
    shutil.copytree(observed[0], run_dir, symlinks=True)
    result = lab.run_to_end(f"--run.dir={run_dir}", "--run.wandb=offline", "--train.steps=21")
    assert without_bars(result.stderr) == ""
    before, after = (json.loads((run_dir / f"checkpoints/step_{n:08d}/state.json").read_text()) for n in (20, 21))
    assert before["wandb_id"] is not None and after["wandb_id"] == before["wandb_id"]
    recordings = [path.name for path in (run_dir / "wandb").glob("offline-run-*")]
    assert len(recordings) == 2 and all(name.endswith(f"-{before['wandb_id']}") for name in recordings)


# ---------------------------------------------------------------------------------------------------------------------
# Pure functions


@pytest.mark.parametrize("warmup_steps", [0, 1, 10])
@pytest.mark.parametrize("min_lr_ratio", [0.0, 0.1, 1.0])
def test_learning_rate_warms_up_to_lr_then_falls_to_its_floor_at_the_last_step(warmup_steps, min_lr_ratio):
    optim = OptimConfig(lr=0.5, min_lr_ratio=min_lr_ratio, warmup_steps=warmup_steps)
    rates = [train.learning_rate(step, 110, optim) for step in range(1, 111)]
    assert rates[:warmup_steps] == pytest.approx([0.5 * step / warmup_steps for step in range(1, warmup_steps + 1)])
    after = rates[max(0, warmup_steps - 1) :]
    assert all(later <= earlier for earlier, later in pairwise(after))
    assert max(rates) == pytest.approx(0.5, rel=1e-3)  # without warm-up the cosine has begun at step 1
    assert rates[-1] == pytest.approx(min_lr_ratio * 0.5, abs=1e-12)
    if warmup_steps == 10:  # half-way down the cosine
        assert rates[60 - 1] == pytest.approx((0.5 + min_lr_ratio * 0.5) / 2)


def test_learning_rate_of_a_run_that_is_all_warm_up_ends_at_the_peak():
    optim = OptimConfig(lr=0.5, warmup_steps=8)
    assert train.learning_rate(8, 8, optim) == 0.5


def tiny_model() -> Llama:
    shape = ModelConfig(
        vocab_size=128, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    shape.num_key_value_heads, shape.max_position_embeddings = 1, 8
    model = Llama(shape)
    model.init_weights(seed=0)
    return model


def test_weight_decay_shrinks_every_matrix_and_no_norm():
    model = tiny_model()
    optimizer = train.make_optimizer(model, OptimConfig(lr=0.1, weight_decay=0.5, betas=(0.8, 0.9), eps=1e-7))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert {len(before[name].shape) for name in before if "norm" in name} == {1}
    for name, parameter in model.named_parameters():
        decay = 1.0 if "norm" in name else 1 - 0.1 * 0.5
        torch.testing.assert_close(parameter.detach(), before[name] * decay)
    assert all((group["betas"], group["eps"]) == ((0.8, 0.9), 1e-7) for group in optimizer.param_groups)
