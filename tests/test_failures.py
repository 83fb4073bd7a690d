"""How a run fails: on all ranks, soon, with the lock free, and so that the same command goes on."""

import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest
import torch.distributed as dist
from test_train import Lab, facts, kill, without_bars

import checkpoint
from runtime import ranks as runtime_ranks
from runtime import rundir
from runtime.ranks import UserError

HERE = Path(__file__).parent
SABOTEUR, LAUNCHER = HERE / "saboteur.py", HERE / "launcher.py"
MOST_SECONDS = 60  # the time-out of the group, and what a process takes to end


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(tmp_path_factory.mktemp("failures"))


# ---------------------------------------------------------------------------------------------------------------------
# Together


def outcome(kinds: list[str], call: str) -> str:
    """What this rank hears when each rank does what `kinds` says; `call` is a function of runtime.ranks."""
    kind = kinds[dist.get_rank()]

    def act() -> str:
        if kind == "user":
            raise UserError("value, rule, remedy")
        if kind == "disk":
            raise OSError(28, "No space left on device")
        if kind == "bug":
            raise KeyError("of this rank")
        return f"result of rank {dist.get_rank()}"

    try:
        return str(getattr(runtime_ranks, call)(act))
    except Exception as error:
        return f"{type(error).__name__}: {error}"


USER, BUG = "UserError: value, rule, remedy", "KeyError: 'of this rank'"
PEER = "PeerFailed: rank {}: KeyError: 'of this rank'"
CASES = [
    ("together", ["fine"] * 3, ["result of rank 0", "result of rank 1", "result of rank 2"]),
    ("together", ["fine", "user", "fine"], [USER] * 3),
    ("together", ["fine", "disk", "user"], ["UserError: [Errno 28] No space left on device"] * 3),
    ("together", ["fine", "bug", "fine"], [PEER.format(1), BUG, PEER.format(1)]),
    ("together", ["user", "fine", "bug"], [PEER.format(2), PEER.format(2), BUG]),
    ("together", ["bug", "fine", "bug"], [BUG, PEER.format(0), BUG]),
    ("on_rank_0", ["fine", "bug", "user"], ["result of rank 0"] * 3),
    ("on_rank_0", ["user", "fine", "fine"], [USER] * 3),
    ("on_rank_0", ["bug", "fine", "fine"], [BUG, PEER.format(0), PEER.format(0)]),
    ("on_each_node", ["fine", "bug", "bug"], ["result of rank 0"] * 3),
    ("on_each_node", ["disk", "fine", "fine"], ["UserError: [Errno 28] No space left on device"] * 3),
]


@pytest.mark.parametrize(("call", "kinds", "expected"), CASES, ids=[f"{c}-{'-'.join(k)}" for c, k, _ in CASES])
def test_an_error_of_one_rank_is_raised_on_all_and_a_bug_outranks_what_a_user_got_wrong(ranks, call, kinds, expected):
    assert ranks(3, outcome, kinds, call) == expected


def on_two_nodes(function_of_rank: str) -> object:
    """Ranks 0 and 1 pretend to be on one node, 2 and 3 on another."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runtime_ranks.socket, "gethostname", lambda: f"node {dist.get_rank() // 2}")
        if function_of_rank == "leaders":
            return runtime_ranks.node_leaders()
        return runtime_ranks.on_each_node(lambda: f"prepared by rank {dist.get_rank()}")


def test_the_first_rank_of_each_node_leads_it_whatever_the_environment_says(ranks):
    assert ranks(4, on_two_nodes, "leaders") == [[0, 0, 2, 2]] * 4
    assert ranks(4, on_two_nodes, "result") == ["prepared by rank 0"] * 2 + ["prepared by rank 2"] * 2


def compare(same: bool) -> str:
    try:
        runtime_ranks.same_everywhere("a value", "x" if same else f"x{dist.get_rank()}", "copy it")
    except UserError as error:
        return str(error)
    return ""


def test_what_must_be_the_same_everywhere_is_compared(ranks):
    assert ranks(3, compare, True) == [""] * 3
    assert ranks(3, compare, False) == ["a value is not the same on all nodes: copy it"] * 3


# ---------------------------------------------------------------------------------------------------------------------
# A job whose rank 1 fails, with and without an asynchronous save in flight

FAILURES = {  # script and what it does, what is found on standard error
    "a bug inside together": ((SABOTEUR, "raise@together=2:1"), r"RuntimeError: sabotage on rank 1"),
    "a bug in forward": ((SABOTEUR, "raise@forward=6:1"), r"RuntimeError: sabotage on rank 1"),
    "the caller raises": ((LAUNCHER, "raise"), r"KeyError: 'of the caller'"),
    "the caller leaves": ((LAUNCHER, "close"), ""),
}


@pytest.mark.parametrize("asynchronous", [False, True], ids=["no save", "a save in flight"])
@pytest.mark.parametrize(("script", "words"), FAILURES.values(), ids=FAILURES)
def test_when_one_rank_fails_all_end_soon_the_lock_is_free_and_the_next_start_resumes(
    lab, request, script, words, asynchronous
):
    begun, run_dir = lab.folder / "begun", lab.folder / re.sub(r"\W", "_", request.node.callspec.id)
    command = ["--parallel.tp=1", "--parallel.timeout_seconds=20", "--train.steps=8", "--optim.warmup_steps=2"]
    command += ["--checkpoint.every=2", f"--checkpoint.async_save={str(asynchronous).lower()}"]
    if not begun.exists():
        lab.run_to_end(*command, f"--run.dir={begun}", "--train.steps=2", ranks=2)
    shutil.copytree(begun, run_dir)  # what the failing job resumes from
    command += [f"--run.dir={run_dir}"]
    in_flight = {"SAVE_SECONDS": "5"} if asynchronous else {}
    if asynchronous and script[0] == SABOTEUR:
        script = (SABOTEUR, f"{script[1]},nap5@save")
    process = lab.start(*command, ranks=2, script=script, environment=in_flight)
    try:
        _, errors = process.communicate(timeout=200)
    except subprocess.TimeoutExpired:
        pytest.fail("\n".join(["it hangs:", *kill(process)]))
    assert process.returncode != 0, "the rank that was left behind fails"
    assert time.time() - (lab.cwd / "failed-1").stat().st_mtime < MOST_SECONDS
    (lab.cwd / "failed-1").unlink()
    assert re.search(words, errors), errors
    rundir.hold(run_dir).close()
    damaged = [line for path in checkpoint.complete_checkpoints(run_dir) for line in checkpoint.damage(path)]
    assert damaged == []
    result = lab.run_to_end(*command, ranks=2)
    assert "resumed from" in result.stdout and without_bars(result.stderr) == ""
    assert facts(run_dir)[-1]["step"] == 8


def test_a_bug_is_shown_by_its_own_rank_and_the_others_keep_silent(lab):
    process = lab.start(f"--run.dir={lab.folder / 'bug'}", ranks=2, script=(SABOTEUR, "raise@together=1:1"))
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 1
    report = errors[errors.index("Root Cause") :]
    assert re.search(r"rank +: 1 \(local_rank: 1\)", report) and "sabotage on rank 1" in report
    assert "PeerFailed" not in errors
