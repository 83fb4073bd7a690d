"""Signals, dying and hanging ranks, a dying torchrun: each job of a story takes up the run that the one before it left.

A story ends with the last step, and its metrics are then those of an uninterrupted run, bit for bit: so each of its
jobs has resumed from where the one before it had stopped, or from the last checkpoint before that went wrong.
"""

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from test_train import TRAIN, Lab, facts, kill, ranks_of, read_metrics, snapshot, split, without_bars

import checkpoint

SABOTEUR = Path(__file__).parent / "saboteur.py"
EVAL_EVERY = 8


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(tmp_path_factory.mktemp("shutdown"))


# ---------------------------------------------------------------------------------------------------------------------
# A story


@dataclass
class Ended:
    """What a job has left behind."""

    status: int
    output: str
    errors: str
    checkpoints: dict[str, Any]  # each with its times and bytes
    damage: list[str]
    state: dict[str, Any]  # of the newest checkpoint
    last_step: int  # in metrics.jsonl


@dataclass
class Story:
    """Jobs with the same command, one after the other, in one run directory."""

    lab: Lab
    name: str
    ranks: int
    tp: int
    steps: int
    warm: bool = False  # as in Lab.start
    jobs: list[Ended] = field(default_factory=list)

    def __post_init__(self):
        self.run_dir = self.lab.folder / self.name

    @property
    def step(self) -> int:
        """From which the current job goes on."""
        return self.jobs[-1].state["step"] if self.jobs else 0

    def command(self, *arguments: str) -> list[str]:
        return [f"--run.dir={self.run_dir}", f"--parallel.tp={self.tp}", f"--train.steps={self.steps}", *arguments]

    def job(self, *acts: Callable, arguments: tuple = (), sabotage: str = "", **options: Any) -> Ended:
        """Start, do each of the acts to the process and wait for the end."""
        for path in self.lab.cwd.iterdir():
            path.unlink()
        script = (SABOTEUR, sabotage) if sabotage else (TRAIN,)
        process = self.lab.start(*self.command(*arguments), ranks=self.ranks, script=script, warm=self.warm, **options)
        try:
            for act in acts:
                act(self, process)
            output, errors = process.communicate(timeout=200)
        except (subprocess.TimeoutExpired, TooLate) as error:  # tell the test of this job, and go on
            output, errors = kill(process)
            errors += f"\n{error}"
        newest = checkpoint.complete_checkpoints(self.run_dir)
        ended = Ended(
            status=process.returncode,
            output=output,
            errors=errors,
            checkpoints=snapshot(self.run_dir / "checkpoints"),
            damage=[line for path in newest for line in checkpoint.damage(path)],
            state=checkpoint.read_state(newest[-1]) if newest else {},
            last_step=last_step(self.run_dir),
        )
        self.jobs.append(ended)
        return ended

    def reference(self) -> list[dict[str, Any]]:
        """Metrics of an uninterrupted run."""
        run_dir = self.lab.folder / f"{self.name}_reference"
        self.lab.run_to_end(*self.command(f"--run.dir={run_dir}")[1:], ranks=self.ranks)
        return facts(run_dir)


class TooLate(Exception):
    pass


def last_step(run_dir: Path) -> int:
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("\n")), default=0)


def until(condition: Callable[[], bool], process: subprocess.Popen, what: str) -> None:
    deadline = time.monotonic() + 200
    while not condition():
        if process.poll() is not None or time.monotonic() > deadline:
            raise TooLate(f"there was no {what}")
        time.sleep(0.002)


# Acts. Who gets a signal: a rank, or None = the process that was started, torchrun or train.py itself.


def resumed(story: Story, process: subprocess.Popen) -> None:
    """Metrics of steps that this job does again are gone."""
    until(lambda: last_step(story.run_dir) <= story.step, process, "resumption")


def after_steps(number: int) -> Callable:
    """Of this job, which has `resumed`."""

    def act(story: Story, process: subprocess.Popen) -> None:
        until(lambda: last_step(story.run_dir) >= story.step + number, process, f"step {number} of the job")

    return act


def send(number: signal.Signals, rank: int | None = None) -> Callable:
    def act(story: Story, process: subprocess.Popen) -> None:
        os.kill(process.pid if rank is None else ranks_of(process.pid)[rank], number)

    return act


def appear(*names: str) -> Callable:
    """Files that the saboteur makes."""

    def act(story: Story, process: subprocess.Popen) -> None:
        for name in names:
            until((story.lab.cwd / name).exists, process, name)

    return act


def go(story: Story, process: subprocess.Popen) -> None:
    (story.lab.cwd / "go").touch()


def stop(number: signal.Signals, rank: int | None = None) -> list[Callable]:
    return [resumed, after_steps(3), send(number, rank)]


def assert_stopped(job: Ended, before: int, steps: int) -> None:
    """At a step after `before`, the same on all ranks, with a checkpoint of it."""
    step = job.state["step"]
    assert before < step < steps
    assert job.output.splitlines()[-1] == f"stopped at step {step}"
    assert job.state["status"] == f"stopped at step {step}"
    assert max(name for name in job.checkpoints if name.startswith("step_")).split("/")[0] == f"step_{step:08d}"
    assert job.last_step == step, "all steps that were taken are in the checkpoint"
    assert job.damage == [] and not any(name.startswith(".tmp") for name in job.checkpoints)
    assert 'train.py", line' not in job.errors, "no worker shows a traceback"
    assert "forcefully exiting" not in job.errors, "nobody had to be killed after torchrun's 30 s"


def assert_nothing_lost(job: Ended, before: Ended) -> None:
    """The checkpoints of the job before are still there, none is new."""
    assert job.checkpoints == before.checkpoints and job.damage == []


# ---------------------------------------------------------------------------------------------------------------------
# Four ranks, and one of them gets a signal

ONE_RANK = [(signal.SIGTERM, 3), (signal.SIGINT, 1), (signal.SIGUSR1, 2)]


@pytest.fixture(scope="module")
def four(lab) -> Story:
    story = Story(lab, "four", ranks=4, tp=2, steps=40, warm=True)
    for number, rank in ONE_RANK:
        story.job(*stop(number, rank))
    story.job()
    return story


@pytest.mark.parametrize("job", range(3), ids=[f"{number.name}-rank{rank}" for number, rank in ONE_RANK])
def test_a_signal_to_one_rank_stops_all_four_after_the_same_step_with_a_checkpoint_and_status_0(four, job):
    ended = four.jobs[job]
    assert ended.status == 0
    assert_stopped(ended, four.jobs[job - 1].state["step"] if job else 0, four.steps)
    assert without_bars(ended.errors) == ""
    assert f"the same command goes on from {four.run_dir}/checkpoints/step_" in ended.output


def test_four_ranks_that_were_stopped_three_times_end_with_the_metrics_of_an_uninterrupted_run(four):
    assert four.jobs[-1].status == 0 and four.jobs[-1].state["status"] == f"complete at step {four.steps}"
    assert facts(four.run_dir) == four.reference()


# ---------------------------------------------------------------------------------------------------------------------
# Two ranks: signals to torchrun itself, then everything that can happen to a rank

TORCHRUN = {signal.SIGTERM: 1, signal.SIGINT: 1, signal.SIGUSR1: -signal.SIGUSR1, signal.SIGKILL: -signal.SIGKILL}
WORKER, ASYNCHRONOUS, TIMEOUT = "--data.num_workers=1", "--checkpoint.async_save=true", "--parallel.timeout_seconds=8"


@pytest.fixture(scope="module")
def two(lab) -> dict[str, Ended]:
    story = Story(lab, "two", ranks=2, tp=1, steps=72)
    jobs = {"story": story}
    arguments = {signal.SIGTERM: (WORKER,), signal.SIGUSR1: (ASYNCHRONOUS,), signal.SIGKILL: (WORKER,)}
    for number in TORCHRUN:
        jobs[number.name] = story.job(*stop(number), arguments=arguments.get(number, ()))
    both = appear("waiting-0", "waiting-1")
    stop_one = [both, send(signal.SIGTERM, 1), appear("signalled-1"), go]
    jobs["evaluation"] = story.job(*stop_one, sabotage="wait@evaluation=1")
    jobs["catch-up"] = story.job(*stop_one, sabotage="wait@catch-up=1")
    jobs["raise"] = story.job(
        sabotage="raise@forward=3:1"
    )  # has made up for the evaluation: the next job does it again
    # in its third step, which follows a save, as do all
    jobs["hang"] = story.job(sabotage="hang@forward=5:1", arguments=(TIMEOUT, "--checkpoint.every=1"))
    jobs["kill"] = story.job(resumed, after_steps(3), send(signal.SIGKILL, 0))
    twice = [both, send(signal.SIGINT), appear("signalled-0", "signalled-1"), send(signal.SIGINT)]
    jobs["twice"] = story.job(*twice, sabotage="wait@forward=5")
    restart = [resumed, after_steps(7), send(signal.SIGKILL, 1)]
    jobs["restart"] = story.job(*restart, sabotage="nap6@set-up=1:0", torchrun=("--max-restarts=1",))
    return jobs


def before(jobs: dict[str, Ended], name: str) -> Ended:
    names = list(jobs)
    return jobs[names[names.index(name) - 1]]


@pytest.mark.parametrize("number", TORCHRUN)
def test_a_signal_to_torchrun_or_its_death_stops_its_ranks_with_a_checkpoint(two, number):
    """TERM and INT are passed on, and torchrun ends with status 1; USR1 and KILL end it, and its orphans see that."""
    ended = two[number.name]
    assert ended.status == TORCHRUN[number]
    assert_stopped(ended, 0 if number == signal.SIGTERM else before(two, number.name).state["step"], two["story"].steps)


def test_a_signal_during_an_evaluation_abandons_it_and_it_is_made_up_for(two):
    ended = two["evaluation"]
    assert ended.status == 0 and ended.state["unevaluated"] and ended.state["step"] % EVAL_EVERY == 0
    assert_stopped(ended, two["SIGKILL"].state["step"], two["story"].steps)


def test_a_signal_while_an_evaluation_is_made_up_for_loses_nothing(two):
    ended = two["catch-up"]
    assert ended.status == 0 and ended.output.splitlines()[-1] == f"stopped at step {ended.state['step']}"
    assert ended.state["unevaluated"] and ended.state["step"] == before(two, "catch-up").state["step"]
    assert_nothing_lost(ended, before(two, "catch-up"))


def test_an_error_on_one_rank_ends_the_job_and_torchrun_names_the_rank_and_shows_its_traceback(two):
    ended = two["raise"]
    assert ended.status == 1
    assert ended.last_step == before(two, "raise").state["step"] + 1, "after a first step that was slow, but no hang"
    report = ended.errors[ended.errors.index("Root Cause") :]
    assert re.search(r"rank +: 1 \(local_rank: 1\)", report)
    assert 'train.py", line' in report and "RuntimeError: sabotage on rank 1" in report
    assert_nothing_lost(ended, before(two, "raise"))


def test_a_rank_that_hangs_ends_the_job_after_the_time_out_and_shows_where(two):
    ended = two["hang"]
    assert ended.status == 1
    trace = r'(?s)Timeout \(0:00:13\)!.*most recent call first.*saboteur.py", line \d+ in misbehave.*train.py", line'
    assert re.search(trace, ended.errors), ended.errors  # after the time-out and 5 seconds
    assert "waited 0:00:08 in vain. Ranks that did not come: 1\n" in ended.errors
    assert ended.damage == [] and ended.state["step"] == before(two, "hang").state["step"] + 2


def test_a_rank_that_is_killed_ends_the_job(two):
    ended = two["kill"]
    assert ended.status == 1
    assert re.search(r"(?s)exitcode +: -9.*Signal 9 \(SIGKILL\)", ended.errors)
    assert ended.damage == [] and ended.state["step"] >= before(two, "kill").state["step"]


def test_a_second_sigint_to_torchrun_ends_all_ranks_at_once(two):
    ended = two["twice"]
    assert ended.status == 1 and "stopped at" not in ended.output
    assert "closing signal SIGINT" in ended.errors and "closing signal SIGTERM" in ended.errors
    assert "forcefully exiting" not in ended.errors, "they did not wait for the 30 seconds to end"
    assert_nothing_lost(ended, before(two, "twice"))


def test_with_max_restarts_a_killed_worker_costs_a_restart_that_needs_no_help(two):
    ended = two["restart"]
    assert ended.status == 0 and ended.state["status"] == f"complete at step {two['story'].steps}"
    # rank 0 is the later one: rank 1 must not take the address of the rank 0 that is gone for the new one's
    first, second = re.findall(r"resumed from \S+/step_(\d+)", ended.output)
    assert int(first) == before(two, "restart").state["step"] < int(second)


def test_whatever_happened_to_two_ranks_the_metrics_are_those_of_an_uninterrupted_run(two):
    story = two["story"]
    assert facts(story.run_dir) == story.reference()


# ---------------------------------------------------------------------------------------------------------------------
# One process, without torchrun


@pytest.fixture(scope="module")
def one(lab) -> dict[str, Ended]:
    story = Story(lab, "one", ranks=1, tp=1, steps=80)
    jobs = {"story": story}
    hung_up = [after_steps(3), send(signal.SIGHUP), after_steps(6), send(signal.SIGTERM)]
    jobs["SIGTERM"] = story.job(*hung_up, before=("nohup",), arguments=(WORKER,))
    jobs["SIGINT"] = story.job(*stop(signal.SIGINT), arguments=(WORKER,))
    jobs["SIGUSR1"] = story.job(*stop(signal.SIGUSR1))
    twice = [appear("waiting-0"), send(signal.SIGINT), appear("signalled-0"), send(signal.SIGINT)]
    jobs["twice"] = story.job(*twice, sabotage="wait@forward=5")
    last = [appear("waiting-0"), send(signal.SIGTERM), appear("signalled-0"), go]
    jobs["last"] = story.job(*last, sabotage=f"wait@step={story.steps}")
    return jobs


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_a_signal_to_a_single_process_stops_it_with_a_checkpoint_and_status_0(one, name):
    ended = one[name]
    assert ended.status == 0
    assert_stopped(ended, 0 if name == "SIGTERM" else before(one, name).state["step"], one["story"].steps)
    assert without_bars(ended.errors) == ""


def test_a_hang_up_is_ignored_under_nohup(one):
    assert one["SIGTERM"].state["step"] >= 6, "it went on after the SIGHUP at step 3"


def test_a_second_sigint_ends_a_single_process_at_once_and_leaves_the_last_checkpoint_alone(one):
    ended = one["twice"]
    assert ended.status == 128 + signal.SIGINT
    assert "stopped at" not in ended.output and without_bars(ended.errors) == ""
    assert_nothing_lost(ended, before(one, "twice"))


def test_a_signal_during_the_last_step_comes_too_late_to_stop_anything(one):
    ended = one["last"]
    assert ended.status == 0 and ended.state["status"] == f"complete at step {one['story'].steps}"
    assert f"complete at step {one['story'].steps}: checkpoint" in ended.output and "stopped" not in ended.output


def test_a_single_process_that_was_stopped_ends_with_the_metrics_of_an_uninterrupted_run(one):
    assert facts(one["story"].run_dir) == one["story"].reference()


# ---------------------------------------------------------------------------------------------------------------------
# What is slow is not hanging


@pytest.fixture(scope="module", autouse=True)
def slow(tmp_path_factory) -> Iterator[Future]:
    """A job that mostly sleeps, while the others here run."""
    story = Story(Lab(tmp_path_factory.mktemp("slow")), "slow", ranks=2, tp=1, steps=4)
    naps = "nap14@forward=1:1,nap14@save=1:1,nap5@evaluation=1:1,nap5@evaluation=2:1,nap5@evaluation=3:1"
    with ThreadPoolExecutor(1) as thread:
        yield thread.submit(lambda: (story, story.job(sabotage=naps, arguments=(TIMEOUT,))))


def test_a_slow_first_step_a_slow_save_and_a_slow_last_evaluation_are_no_hangs(slow):
    """Each takes longer than the time-out and 5 seconds more; the evaluation gives a sign of life with each batch."""
    story, ended = slow.result()
    assert ended.status == 0 and ended.state["status"] == "complete at step 4", ended.errors
    training, evaluation = split(read_metrics(story.run_dir))
    assert training[0]["step_seconds"] > 13 and len(evaluation) == 1
