"""SIGKILL at any moment: to one rank, or to torchrun and all ranks; then the same command again, and again.

`make kill-test` does it 100 times. A moment is aimed at by watching the run directory, but counted by what the kill
left behind: during "start-up" no step was taken, "saving" leaves a half-written checkpoint, "pruning" one checkpoint
too many, or half of an old one, and "training" nothing but lines of metrics.
"""

import contextlib
import json
import math
import os
import random
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path

import pytest
from test_train import Lab, facts, kill, ranks_of, without_bars

import checkpoint
import configs

KILLS_PER_RUN = 8
STEPS, EVERY, KEEP = 120, 4, 2
MOMENTS = ("start-up", "training", "saving", "pruning")
MESHES = {  # name: (ranks, tp)
    "dp2": (2, 1),
    "tp2": (2, 2),
    "dp2_tp2": (4, 2),
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One run for 8 kills; two ranks start faster than four, so most runs have two."""
    if {"seed", "kills", "mesh"} <= {*metafunc.fixturenames}:
        total, order = metafunc.config.getoption("--kills"), ["dp2", "tp2", "dp2", "dp2_tp2"]
        runs = [
            (seed, min(KILLS_PER_RUN, total - first), order[seed % len(order)])
            for seed, first in enumerate(range(0, total, KILLS_PER_RUN))
        ]
        metafunc.parametrize(("seed", "kills", "mesh"), runs, ids=[f"{mesh}-seed{seed}" for seed, _, mesh in runs])


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(tmp_path_factory.mktemp("kill"))


@pytest.fixture(scope="module")
def tally() -> Counter:
    """Kills by moment, and by who was killed."""
    return Counter()


@pytest.fixture(scope="module")
def references(lab) -> dict[str, tuple[Path, float]]:
    """Of each mesh, an uninterrupted run and the seconds until its first step; made when asked for."""
    return {}


def command(run_dir: Path, mesh: str, **options: object) -> list[str]:
    options |= {"run.dir": run_dir, "parallel.tp": MESHES[mesh][1], "train.steps": STEPS, "train.eval_every": 10}
    options |= {"checkpoint.every": EVERY, "checkpoint.keep": KEEP}
    return [f"--{key}={configs.toml_value(value)}" for key, value in options.items()]


def reference(lab: Lab, references: dict[str, tuple[Path, float]], mesh: str) -> tuple[Path, float]:
    if mesh not in references:
        run_dir, start = lab.folder / f"reference_{mesh}", time.monotonic()
        process = lab.start(*command(run_dir, mesh), ranks=MESHES[mesh][0])
        while lines(run_dir) == 0 and process.poll() is None:
            time.sleep(0.01)
        references[mesh] = run_dir, time.monotonic() - start
        _, errors = process.communicate(timeout=400)
        assert process.returncode == 0, errors
    return references[mesh]


# ---------------------------------------------------------------------------------------------------------------------
# What a run directory shows


def metrics_of(run_dir: Path) -> bytes:
    with contextlib.suppress(FileNotFoundError):
        return (run_dir / "metrics.jsonl").read_bytes()
    return b""


def lines(run_dir: Path) -> int:
    """Whole lines of metrics so far."""
    return metrics_of(run_dir).count(b"\n")


def steps_of(run_dir: Path, prefix: str) -> list[int]:
    """Of the folders `prefix`<step> below checkpoints/."""
    with contextlib.suppress(FileNotFoundError):
        names = [path.name for path in (run_dir / "checkpoints").iterdir()]
        return sorted(int(name.removeprefix(prefix)) for name in names if name.startswith(prefix))
    return []


def newest_step(run_dir: Path) -> int:
    return max(steps_of(run_dir, "step_"), default=0)


def left_behind(run_dir: Path, metrics_before: list[bytes]) -> str:
    """The moment of the kill. `metrics_before`: as they were before the start, and as the start leaves them."""
    complete, unfinished = steps_of(run_dir, "step_"), steps_of(run_dir, ".tmp-step_")
    if metrics_of(run_dir) in metrics_before:
        return "start-up"
    if any(step > newest_step(run_dir) for step in unfinished):
        return "saving"
    return "pruning" if unfinished or len(complete) > KEEP else "training"


def settled_metrics(run_dir: Path) -> bytes:
    """The lines up to the newest checkpoint, with the seconds that they took: doing a step again would change them."""
    number = newest_step(run_dir)
    return b"".join(line for line in metrics_of(run_dir).splitlines(keepends=True) if step_of(line) <= number)


def step_of(line: bytes) -> float:
    """Of a line of metrics; infinity when it was torn."""
    return json.loads(line)["step"] if line.endswith(b"\n") else math.inf


# ---------------------------------------------------------------------------------------------------------------------
# Killing


def wait_for(
    moment: str, run_dir: Path, process: subprocess.Popen, start_seconds: float, chance: random.Random
) -> list[int]:
    """Return at the moment, with the ranks' process ids if there are any yet."""
    begin, lines_before, step_before = time.monotonic(), lines(run_dir), newest_step(run_dir)
    if moment == "start-up":
        end = begin + chance.uniform(0, start_seconds)
        while time.monotonic() < end and newest_step(run_dir) == step_before:  # it may start faster than the reference
            time.sleep(0.01)
        return [*ranks_of(process.pid).values()]
    training, saving, pruning = chance.randint(1, 7), chance.randint(1, 2), chance.randint(1, 2)
    delay = chance.uniform(0, {"training": 0.1, "saving": 0.02, "pruning": 0.002}[moment])
    ranks, saves, stale = [], set(), {*steps_of(run_dir, ".tmp-step_")}  # the start removes what the last kill left
    while process.poll() is None:
        if not ranks and time.monotonic() - begin > start_seconds / 2:  # looked up early: it takes its time
            ranks = [*ranks_of(process.pid).values()]
        newest, unfinished = newest_step(run_dir), {*steps_of(run_dir, ".tmp-step_")}
        stale &= unfinished
        saves |= {step for step in unfinished - stale if step > newest}
        reached = {
            "training": lines(run_dir) > lines_before + training,  # `lines_before` may count some to be done again
            "saving": len(saves) >= saving,
            "pruning": newest >= step_before + pruning * EVERY,
        }
        if reached[moment]:
            time.sleep(delay)
            break
        time.sleep(0.001)
    return ranks or [*ranks_of(process.pid).values()]


def strike(process: subprocess.Popen, ranks: list[int], victim: str, chance: random.Random) -> str:
    """SIGKILL; what was on standard error comes back when every process of the job is gone."""
    if victim == "one rank":
        with contextlib.suppress(ProcessLookupError):
            os.kill(chance.choice(ranks), signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.communicate(timeout=120)[1]  # torchrun ends the others: at most 30 s
        pytest.fail("\n".join(["one rank was killed, and the job went on without it:", *kill(process)]))
    for pid in [process.pid, *ranks]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return kill(process)[1]


@pytest.mark.timeout(3600)
def test_a_run_that_is_killed_again_and_again_loses_nothing_but_the_steps_since_its_last_checkpoint(
    lab, references, tally, seed, kills, mesh
):
    """Laws 2 and 6: whatever is killed at whatever moment, every checkpoint is intact and the metrics are the same."""
    print(f"\nseed {seed}, mesh {mesh}")
    expected, start_seconds = reference(lab, references, mesh)
    chance, run_dir = random.Random(seed), lab.folder / f"killed_{seed}"
    moments = chance.sample(MOMENTS * 2, k=kills)
    settled, resumable = b"", 0
    for number, moment in enumerate(moments):
        asynchronous, victim = chance.choice([True, False]), chance.choice(["one rank", "all"])
        metrics_before = [metrics_of(run_dir), settled]
        process = lab.start(*command(run_dir, mesh, **{"checkpoint.async_save": asynchronous}), ranks=MESHES[mesh][0])
        ranks = wait_for(moment, run_dir, process, start_seconds, chance)
        victim = victim if ranks else "all"
        output = strike(process, ranks, victim, chance)
        what = left_behind(run_dir, metrics_before)
        note = f"kill {number}, {victim}, aimed at {moment}, hit {what}, async_save {asynchronous}"
        print(f"{note}, checkpoints {steps_of(run_dir, 'step_')}, {lines(run_dir)} lines")
        assert newest_step(run_dir) < STEPS, f"{note}: killed too late to tell anything"
        assert process.returncode != 0, f"{note}: {output}"
        damage = [line for path in checkpoint.complete_checkpoints(run_dir) for line in checkpoint.damage(path)]
        assert damage == [], f"{note}: {damage}"
        assert newest_step(run_dir) >= resumable, f"{note}: a checkpoint is gone"
        assert metrics_of(run_dir).startswith(settled), f"{note}: steps were done again, or lost"
        settled, resumable = settled_metrics(run_dir), newest_step(run_dir)
        tally[what] += 1
        tally[victim] += 1
        tally["asynchronous" if asynchronous else "synchronous"] += 1
    result = lab.run_to_end(*command(run_dir, mesh), ranks=MESHES[mesh][0])
    assert without_bars(result.stderr) == ""
    if resumable:
        assert f"resumed from {run_dir}/checkpoints/step_{resumable:08d}" in result.stdout
    assert metrics_of(run_dir).startswith(settled)
    assert facts(run_dir) == facts(expected)
    assert steps_of(run_dir, "step_") == [STEPS - EVERY, STEPS] and steps_of(run_dir, ".tmp-step_") == []


def test_the_kills_have_hit_different_moments(tally, request):
    total = sum(tally[moment] for moment in MOMENTS)
    if total == 0:
        pytest.skip("nothing was killed")
    print(f"\n{total} kills: {dict(tally)}")
    enough = len(MOMENTS) if total >= 100 else min(2, total)
    assert sum(tally[moment] > 0 for moment in MOMENTS) >= enough, tally
