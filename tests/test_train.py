"""The command line from end to end: laws 1, 2, 6 and 7 as a user meets them, each command in processes of its own."""

import contextlib
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

import configs
import train
from configs import Config, OptimConfig, TrainConfig
from model import Llama, ModelConfig

ROOT = Path(__file__).parent.parent
TRAIN = ROOT / "train.py"
STEPS = 20
STEPS_PER_EPOCH = 4  # so checkpoint 6 and 18 lie inside an epoch, and 12 at its end
TIMES = {"step_seconds", "tokens_per_second", "mfu", "peak_memory_gib", "data_seconds"}
TRAINING = {"step", "loss", "grad_norm", "lr", "tokens"} | TIMES
EVALUATION = {"step", "val_loss", "val_bits_per_byte", "val_tokens"}
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
lr = 1e-2
warmup_steps = 4
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
            "HF_HOME": str(folder / "hf"),
            "HF_DATASETS_CACHE": str(folder / "hf/d"),
        }
        self.environment = inherited | caches | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        self.environment["OMP_WAIT_POLICY"] = "PASSIVE"  # several threads that spin make a busy machine crawl

    def start(
        self, *arguments: object, ranks: int = 1, before: tuple = (), torchrun: tuple = (), script: tuple = (TRAIN,)
    ) -> subprocess.Popen:
        """`before` the interpreter: nohup; options of torchrun; instead of train.py another script."""
        if ranks > 1:
            torchrun = ("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", *torchrun)
        first = [] if str(arguments[0]).endswith(".toml") else [self.config, f"--data.dataset={self.documents}"]
        return subprocess.Popen(
            [*before, sys.executable, *torchrun, *script, *map(str, [*first, *arguments])],
            cwd=self.cwd,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *arguments: object, ranks: int = 1) -> subprocess.CompletedProcess:
        process = self.start(*arguments, ranks=ranks)
        try:
            output, errors = process.communicate(timeout=400)
        except subprocess.TimeoutExpired:
            pytest.fail("\n".join(["it hangs:", *kill(process)]))
        return subprocess.CompletedProcess(process.args, process.returncode, output, errors)

    def run_to_end(self, *arguments: object, ranks: int = 1) -> subprocess.CompletedProcess:
        result = self.run(*arguments, ranks=ranks)
        assert result.returncode == 0, result.stderr
        return result

    def run_and_kill(self, *arguments: object, when: Callable[[], bool], ranks: int = 1) -> None:
        process, deadline = self.start(*arguments, ranks=ranks), time.monotonic() + 400
        while not when() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        reached, (_, errors) = when(), kill(process)
        assert reached, errors

    @cache  # noqa: B019
    def reference(self, ranks: int) -> tuple[Path, subprocess.CompletedProcess]:
        """An uninterrupted run, on one process or on the 2 x 2 mesh of four."""
        run_dir = self.folder / f"reference_{ranks}"
        return run_dir, self.run_to_end(f"--run.dir={run_dir}", f"--parallel.tp={1 if ranks == 1 else 2}", ranks=ranks)


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


def children(parent: int) -> list[int]:
    """Process ids in the order in which they were started: those of torchrun are its ranks."""
    listing = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    pairs = (map(int, line.split()) for line in listing.splitlines())
    return sorted(pid for pid, ppid in pairs if ppid == parent)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(tmp_path_factory.mktemp("lab"))


def without_bars(text: str) -> str:
    """What standard error holds beside progress bars."""
    return re.sub(r"(tokenize:)? *\d+%\|[^|]*\|[^\]]*\]", "", text).strip()


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def facts(run_dir: Path) -> list[dict[str, Any]]:
    """The metrics without what the clock says."""
    return [{key: value for key, value in line.items() if key not in TIMES} for line in read_metrics(run_dir)]


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
    """Law 1: float32 sums in another order, over 20 steps."""
    assert [line.keys() for line in lines] == [line.keys() for line in reference]
    for line, expected in zip(lines, reference, strict=True):
        assert line == pytest.approx(expected, rel=1e-5), f"step {expected['step']}"


# ---------------------------------------------------------------------------------------------------------------------
# A complete run


@pytest.mark.parametrize("ranks", [1, 4])
def test_a_complete_run_shows_its_progress_and_nothing_else(lab, ranks):
    run_dir, result = lab.reference(ranks)
    assert without_bars(result.stderr) == ""
    shape, batch, *evaluations, complete, hint = result.stdout.splitlines()
    mesh = "dp_replicate 1 x dp_shard 1 x tp 1" if ranks == 1 else "dp_replicate 1 x dp_shard 2 x tp 2"
    assert shape.startswith("Llama with ") and mesh in shape
    rows = int(re.search(r"(\d+) training rows of 32 tokens", batch).group(1))
    assert rows // 8 == STEPS_PER_EPOCH and rows % 8 > 0, "this run is to span several epochs, each with rows to spare"
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
    assert all(line.keys() == TRAINING for line in training)
    assert training[0]["loss"] == pytest.approx(math.log(384), abs=0.05), "the first guess is uniform"
    assert training[-1]["loss"] < training[0]["loss"] - 0.5
    assert all(line["grad_norm"] > 0 and line["peak_memory_gib"] > 0 and line["mfu"] is None for line in training)
    optim = OptimConfig(lr=1e-2, warmup_steps=4)
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


def test_extending_a_run_continues_it_and_says_that_the_cosine_changes(lab):
    reference, _ = lab.reference(1)
    run_dir = lab.folder / "extended"
    shutil.copytree(reference, run_dir)
    # the recorded configuration is one that can be given
    result = lab.run_to_end(reference / "config.toml", f"--run.dir={run_dir}", "--train.steps=23")
    assert f"resumed from {run_dir}/checkpoints/step_00000020" in result.stdout
    assert re.search(r"23 steps.* 20.*cosine", result.stdout)
    lines = facts(run_dir)
    assert lines[:-4] == facts(reference)
    training, evaluation = split(lines[-4:])
    assert [line["step"] for line in training] == [21, 22, 23] and [line["step"] for line in evaluation] == [23]
    optim = OptimConfig(lr=1e-2, warmup_steps=4)
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
    assert f"resumed from {checkpoints}/step_000000" in result.stdout and "cosine" not in result.stdout
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
def observed(lab) -> tuple[Path, subprocess.CompletedProcess]:
    """A run that wandb and the profiler watch."""
    run_dir = lab.folder / "observed"
    return run_dir, lab.run_to_end(f"--run.dir={run_dir}", "--run.wandb=offline", "--run.profile_steps=[2,3]")


def test_offline_wandb_needs_no_account_prints_nothing_and_writes_into_the_run_directory(lab, observed):
    run_dir, result = observed
    reference, expected = lab.reference(1)
    assert result.stdout == expected.stdout.replace(str(reference), str(run_dir))
    notes = re.sub(r"USDT:.*ActivityProfiler.*", "", result.stderr)  # torch's profiler says that it starts and stops
    assert without_bars(notes) == ""
    (log,) = run_dir.glob("wandb/offline-run-*/run-*.wandb")
    assert {key for key in TRAINING | EVALUATION if key.encode() in log.read_bytes()} == TRAINING | EVALUATION
    assert list(lab.cwd.iterdir()) == []


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


@pytest.fixture(scope="module")
def branch(lab, observed) -> tuple[Path, Path]:
    """A run directory that branched off `observed` two steps before its end, and `observed`, untouched."""
    original, run_dir = observed[0], lab.folder / "branch"
    before = snapshot(original)
    older = original / "checkpoints/step_00000018"
    result = lab.run_to_end(f"--run.dir={run_dir}", f"--checkpoint.resume={older}", "--run.wandb=offline")
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


def test_a_resumed_run_stays_the_same_in_wandb(lab, observed):
    run_dir = lab.folder / "observed_further"
    shutil.copytree(observed[0], run_dir, symlinks=True)
    result = lab.run_to_end(f"--run.dir={run_dir}", "--run.wandb=offline", "--train.steps=21")
    assert without_bars(result.stderr) == ""
    before, after = (json.loads((run_dir / f"checkpoints/step_{n:08d}/state.json").read_text()) for n in (20, 21))
    assert after["wandb_id"] == before["wandb_id"]


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
    assert max(rates) == pytest.approx(0.5, rel=1e-3)
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


@pytest.mark.parametrize(
    ("model", "options", "words"),
    [
        ({"vocab_size": 256}, {}, ["model.vocab_size=256", "300", "384"]),
        ({}, {"global_batch_size": 51}, ["50 training rows", "train.global_batch_size=51"]),
        ({}, {"epochs": 9}, ["optim.warmup_steps=100", "54 steps"]),
    ],
    ids=["vocabulary", "rows", "warm-up"],
)
def test_what_does_not_fit_the_data_is_refused_with_value_rule_and_remedy(model, options, words):
    config = Config(model=ModelConfig(**model), train=TrainConfig(**{"global_batch_size": 8, **options}))
    with pytest.raises(ValueError) as error:
        train.resolve_with_data(config, vocabulary=300, num_rows=50)
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize(("vocabulary", "rounded"), [(256, 256), (257, 384), (1, 128)])
def test_the_data_settles_vocabulary_and_steps(vocabulary, rounded):
    config = Config(train=TrainConfig(global_batch_size=8, epochs=3), optim=OptimConfig(warmup_steps=5))
    train.resolve_with_data(config, vocabulary, num_rows=47)
    assert (config.model.vocab_size, config.train.steps) == (rounded, 3 * 5)
    train.resolve_with_data(config, vocabulary, num_rows=1000)
    assert config.train.steps == 15, "what was given stays"
    assert configs.flatten(config)["train.epochs"] == 3
