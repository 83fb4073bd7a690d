"""What a cluster meets and a laptop does not: long waits, short patience, missing locks, many sockets, slow ranks."""

import contextlib
import errno
import gc
import io
import multiprocessing
import os
import re
import resource
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from test_shutdown import until
from test_train import Lab, read_metrics, without_bars
from torch import nn
from torch.distributed.launcher.api import LaunchConfig

import configs
import parallel
import train
from parallel import ParallelConfig
from runtime import ranks as runtime_ranks
from runtime import rundir, shutdown
from runtime.monitor import Pace
from runtime.ranks import UserError

KNOWN = "shutdown_timeout" in LaunchConfig.__dataclass_fields__  # since torch 2.12
CPU, SABOTEUR = torch.device("cpu"), Path(__file__).parent / "saboteur.py"


# ---------------------------------------------------------------------------------------------------------------------
# Time-outs


def timeouts(mesh: parallel.DeviceMesh) -> set[timedelta]:
    """Of the default group and of all of the mesh."""
    groups = [dist.distributed_c10d._get_default_group(), *mesh.get_all_groups()]
    return {group._get_backend(CPU).options._timeout for group in groups}


def life_of_a_run() -> list[set[timedelta]]:
    mesh = parallel.build_mesh(ParallelConfig(tp=2, dp_replicate=2), CPU)
    found, before = [], runtime_ranks.timeout_of_group()
    with runtime_ranks.patience():
        found.append({runtime_ranks.timeout_of_group()})
    found.append({runtime_ranks.timeout_of_group() == before})
    with shutdown.Shutdown(mesh, 77, owns_process=False) as ours:
        found.append(timeouts(mesh))
        ours.vote(watch=False)
        found.append(timeouts(mesh))
        ours.vote()
        found.append(timeouts(mesh))
        with ours.unwatched():
            found.append({runtime_ranks.timeout_of_group()})
        found.append(timeouts(mesh))
    found.append({runtime_ranks.timeout_of_group() == before})
    return found


def test_groups_of_the_mesh_wait_as_long_as_the_default_group_and_long_only_while_one_works_for_all(ranks):
    """While data is prepared and on a slow disk long; an hour up to the first step; then as configured."""
    work, set_up, step = runtime_ranks.WORK_TIMEOUT, runtime_ranks.SETUP_TIMEOUT, timedelta(seconds=77)
    assert step < set_up <= timedelta(hours=1) < work
    for found in ranks(4, life_of_a_run):
        assert found == [{work}, {True}, {set_up}, {set_up}, {step}, {work}, {step}, {True}]


def open_and_look(arguments: list[str], cache: str) -> list[timedelta]:
    """The time-outs while the corpus is opened, and behind it."""
    import datasets

    import corpus

    datasets.config.HF_DATASETS_CACHE = Path(cache)
    found, config = [], configs.load(arguments)
    with pytest.MonkeyPatch.context() as patch:
        tokenize_all = corpus.tokenize_all
        look = lambda *given: found.append(runtime_ranks.timeout_of_group()) or tokenize_all(*given)  # noqa: E731
        patch.setattr(corpus, "tokenize_all", look)
        with corpus.opened(config.data, Path("run"), 1, None, lambda: 0):
            found.append(runtime_ranks.timeout_of_group())
    return found


def test_data_may_take_long_to_be_prepared_and_what_follows_may_not(lab, ranks):
    arguments = [str(lab.config), f"--data.dataset={lab.documents}", f"--run.dir={lab.folder / 'none'}"]
    (found,) = ranks(1, open_and_look, arguments, str(lab.folder / "hf/d"))
    assert found[0] == runtime_ranks.WORK_TIMEOUT and found[1] < found[0]


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(tmp_path_factory.mktemp("cluster"))


# ---------------------------------------------------------------------------------------------------------------------
# Jobs that mostly sleep, while the other tests run


def stop_in_a_long_step(folder: Path, patience_seconds: int) -> tuple[subprocess.CompletedProcess, bool]:
    """torchrun gets SIGTERM in a step that takes 6 s: how it ended, and whether there is a checkpoint."""
    lab, run_dir = Lab(folder), folder / "run"

    def stop(process: subprocess.Popen) -> None:
        until((lab.cwd / "waiting-1").exists, process, "step in which both wait")
        process.send_signal(signal.SIGTERM)
        until((lab.cwd / "signalled-1").exists, process, "signal")
        (lab.cwd / "go").touch()

    arguments = [f"--run.dir={run_dir}", "--parallel.tp=1", "--checkpoint.every=0"]
    script = (SABOTEUR, "wait@forward=5,nap6@forward=6")
    environment = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(patience_seconds)}
    result = lab.run(*arguments, ranks=2, script=script, environment=environment, meanwhile=stop)
    return result, any((run_dir / "checkpoints").glob("step_*"))


def hang_in_set_up(folder: Path) -> tuple[subprocess.CompletedProcess, float]:
    """Rank 1 hangs before the model is loaded; ranks wait for each other 6 s there. How long the job took."""
    started, script = time.monotonic(), (SABOTEUR, "hurry6@set-up=1,hang@load=1:1")
    result = Lab(folder).run(f"--run.dir={folder / 'run'}", "--parallel.tp=1", ranks=2, script=script)
    return result, time.monotonic() - started


def two_runs_with_long_steps(folder: Path) -> list[str]:
    """What they say; the second resumes. torchrun would wait a second; a step takes two."""
    lab, arguments = Lab(folder), [f"--run.dir={folder / 'run'}", "--parallel.tp=1", "--checkpoint.every=1"]
    arguments.append("--optim.warmup_steps=1")
    options = {"script": (SABOTEUR, "nap2@step=2,nap2@step=3"), "environment": {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "1"}}
    return [lab.run_to_end(*arguments, f"--train.steps={n}", ranks=2, **options).stdout for n in (3, 5)]


@pytest.fixture(scope="module", autouse=True)
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Future]]:
    make = tmp_path_factory.mktemp
    with ThreadPoolExecutor(4) as pool:
        yield {
            "short": pool.submit(stop_in_a_long_step, make("short"), 2),
            "long": pool.submit(stop_in_a_long_step, make("long"), 120),
            "set-up": pool.submit(hang_in_set_up, make("set-up")),
            "steps": pool.submit(two_runs_with_long_steps, make("steps")),
        }


def test_torchrun_waits_for_the_save_as_long_as_its_environment_says(jobs):
    """What the Makefile, the recipes and docs/cluster.md set. The other job shows that the variable does it."""
    long, saved = jobs["long"].result()
    assert saved and "stopped at step" in long.stdout and "forcefully" not in long.stderr, long.stderr
    if not KNOWN:
        return
    short, saved = jobs["short"].result()
    assert short.returncode != 0 and not saved and "stopped at step" not in short.stdout, "killed before it could save"


def test_a_rank_that_hangs_in_set_up_ends_the_job(jobs):
    result, seconds = jobs["set-up"].result()
    assert result.returncode == 1 and "Timed out" in result.stderr
    assert seconds < 120


def told_of_the_time(known: bool) -> list[str]:
    said = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shutdown, "say", said.append)
        patch.setenv("TORCHELASTIC_RUN_ID", "1")
        patch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "100")
        patch.setattr(shutdown.LaunchConfig, "__dataclass_fields__", {"shutdown_timeout": None} if known else {})
        ours = shutdown.Shutdown(parallel.build_mesh(ParallelConfig(tp=1), CPU), 60, owns_process=True)
        for step, save in ((20.0, 0.0), (1000.0, 0.0), (4.0, 25.0), (4.0, 30.0), (90.0, 30.0), (900.0, 30.0)):
            ours.check_time(step, save)
    return said


@pytest.mark.parametrize("known", [True, False])
def test_a_torchrun_that_knows_no_other_time_waits_30_seconds_whatever_its_environment_says(ranks, known):
    """As before torch 2.12. It is said once, and not before a save has told how long one takes."""
    ((said,),) = ranks(1, told_of_the_time, known)
    if known:
        assert "up to 120 s (a step 90, a save 30)" in said and "100 s after it was sent a signal" in said
        assert "lost: set TORCH_ELASTIC_SHUTDOWN_TIMEOUT=240 for torchrun, or send the signal to a process" in said
    else:
        assert "up to 34 s (a step 4, a save 30)" in said and "30 s after it was sent a signal" in said
        assert said.endswith("would be lost: send the signal to a process of train.py instead")


@pytest.mark.skipif(not KNOWN, reason="this torchrun always waits for 30 s: the test above")
def test_who_could_not_save_in_time_is_told_after_the_first_save_and_when_it_resumes(jobs):
    expected = (
        r"WARNING: a stop takes up to \d+ s \(a step \d, a save \d\), and torchrun kills its processes 1 s after it "
        r"was sent a signal, so that the save would be lost: set TORCH_ELASTIC_SHUTDOWN_TIMEOUT=\d+ for torchrun, or "
        r"send the signal to a process of train.py instead\n"
    )
    for output in jobs["steps"].result():
        assert len(re.findall(expected, output)) == 1, output
    assert "torchrun kills" not in jobs["long"].result()[0].stdout, "where there is time enough, nothing is said"


# ---------------------------------------------------------------------------------------------------------------------
# The system


def test_a_file_system_without_locks_is_told_of_and_used_all_the_same(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(rundir, "say", said.append)
    for number in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):

        def flock(file: object, how: int, number: int = number) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(rundir.fcntl, "flock", flock)
        with rundir.hold(tmp_path) as file:
            file.write("token")
        assert said.pop() == (
            f"WARNING: {tmp_path} cannot be locked ({os.strerror(number)}): "
            "see to it that no two jobs run in it at a time"
        )
    assert said == []


def test_a_run_has_as_many_files_as_the_system_permits():
    """gloo keeps a socket per peer and group: 512 ranks want more than the 1,024 that many shells allow."""
    script = """
import resource
_, most = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (64, most))
from runtime import ranks
ranks.init_distributed()
print(*resource.getrlimit(resource.RLIMIT_NOFILE))
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=SABOTEUR.parent.parent, capture_output=True, text=True)
    soft, hard = done.stdout.split()
    assert soft == hard == str(resource.getrlimit(resource.RLIMIT_NOFILE)[1]), done.stderr


def test_ranks_that_do_not_find_each_other_say_what_to_look_at():
    """Another port than the others': as where the name of the first node is 127.0.1.1 on every node."""
    script = "from datetime import timedelta; from runtime import ranks; ranks.CONNECT_TIMEOUT = timedelta(seconds=1)\n"
    script += "try: ranks.init_distributed()\nexcept ranks.UserError as error: print(error)"
    group = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "LOCAL_RANK": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=SABOTEUR.parent.parent,
        env=os.environ | group,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert re.match(r"rank 1 did not meet the others at 127.0.0.1:1 within 0:00:01: .* 127.0.1.1", done.stdout), done


# ---------------------------------------------------------------------------------------------------------------------
# Garbage, replicas, and who is slow


def test_only_the_imports_of_train_as_a_command_are_without_the_collector():
    script = """
import gc, runpy, sys
from unittest import mock
import train
print("imported:", gc.isenabled())
sys.argv = ["train.py", "--help"]
with mock.patch("train.configs.print_help"):
    runpy.run_path("train.py", run_name="__main__")
print("started:", gc.isenabled())
train.ranks.init_distributed()
print("together:", gc.isenabled(), gc.get_freeze_count() > 10_000)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=SABOTEUR.parent.parent, capture_output=True, text=True)
    assert done.stdout.split("\n")[:-1] == ["imported: True", "started: False", "together: True True"], done.stderr


def test_garbage_is_frozen_after_the_first_step_and_then_collected_at_the_same_steps_on_all_ranks(monkeypatch):
    done = []
    for name in ("collect", "freeze", "disable"):
        monkeypatch.setattr(runtime_ranks.gc, name, lambda name=name: done.append((steps, name)))
    every = runtime_ranks.COLLECT_EVERY
    for steps in range(2 * every + 2):
        runtime_ranks.collect_garbage(steps, owns_process=True)
    assert [what for what in done if what[1] != "disable"] == [
        (1, "collect"),
        (1, "freeze"),
        (every, "collect"),
        (2 * every, "collect"),
    ]
    assert {steps for steps, what in done if what == "disable"} == set(range(1, 2 * every + 2)), "not before step 1"
    done.clear()
    for steps in range(every + 1):
        runtime_ranks.collect_garbage(steps, owns_process=False)
    assert done == [], "the process is somebody else's"


def asked_while_signals_are_held() -> list[bool]:
    """As while loader workers are started, which asks for the first rows, and so waits for their files."""
    found = []
    with shutdown.Shutdown(parallel.build_mesh(ParallelConfig(tp=1), CPU), 60, owns_process=False) as ours:
        with runtime_ranks.signals_held():
            found.append(ours.vote(watch=False)[0])
            if dist.get_rank() == 1:
                os.kill(os.getpid(), signal.SIGUSR1)
            try:
                ours.meet(lambda: None)
                found.append(False)
            except shutdown.Stopped:
                found.append(True)
        found.append(ours.vote(watch=False)[0])
    return found


def test_a_signal_that_is_held_back_stops_the_run_all_the_same(ranks):
    assert ranks(2, asked_while_signals_are_held) == [[False, True, True]] * 2


def wait_in_vain(absent: int) -> str:
    """What this rank says of the others on standard error. `absent` hangs for a while."""
    heard = io.StringIO()
    runtime_ranks.set_timeout(timedelta(seconds=3))
    if dist.get_rank() == absent:
        time.sleep(9)
        return ""
    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(RuntimeError):
        patch.setattr(sys, "stderr", heard)
        with shutdown.Shutdown(parallel.build_mesh(ParallelConfig(tp=1), CPU), 3, owns_process=True) as ours:
            ours.watching = True  # the set-up is over
            runtime_ranks.set_timeout(timedelta(seconds=3))
            ours.watch = lambda: None
            ours.vote()
    return heard.getvalue()


def serve_alone(rank: int, size: int, folder: str, pipe: Any, absent: int) -> None:
    store = dist.FileStore(f"{folder}/store", size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    pipe.send(wait_in_vain(absent))
    os._exit(0)


def test_only_ranks_that_did_not_come_are_named_and_once(tmp_path):
    """gloo lets one rank time out, and the others hear that their connections are closed."""
    spawn, (ours, theirs) = multiprocessing.get_context("spawn"), multiprocessing.Pipe(duplex=False)
    processes = [spawn.Process(target=serve_alone, args=(rank, 4, str(tmp_path), theirs, 1)) for rank in range(4)]
    for process in processes:
        process.start()
    said = [ours.recv() for _ in processes]
    for process in processes:
        process.join()
    assert "".join(said) == "waited 0:00:03 in vain. Ranks that did not come: 1\n"


def test_other_things_that_time_out_are_no_reason_to_call_ranks(capsys):
    for error in (UserError("part.parquet cannot be read: [Errno 110] Connection timed out"), KeyError("timed out")):
        runtime_ranks.call_the_roll(error)  # which would need a process group
    runtime_ranks.call_the_roll(runtime_ranks.PeerFailed("rank 3: RuntimeError: Timed out waiting"))
    assert capsys.readouterr() == ("", "")


def live_and_leave() -> bool:
    """Whether what was there when garbage was frozen is gone after the end of the group, and the imports frozen."""

    class Cycle:
        def __init__(self):
            self.me = self

    cycle = Cycle()
    alive = weakref.ref(cycle)
    runtime_ranks.collect_garbage(1, owns_process=True)
    del cycle
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dist, "destroy_process_group", lambda: None)
            runtime_ranks.leave_together()
    finally:
        gc.enable()
    return alive() is None and gc.get_freeze_count() > 10_000


def test_what_was_frozen_is_let_go_of_before_the_process_group_ends(ranks):
    assert ranks(1, live_and_leave) == [True]


def sums_over_replicas(arguments: list[str], cache: str) -> tuple[int, list[float]]:
    """How many all-reduces of this rank a run's FSDP starts, and its losses."""
    import datasets

    datasets.config.HF_DATASETS_CACHE = Path(cache)
    calls, losses = [], []
    with pytest.MonkeyPatch.context() as patch:
        all_reduce = dist.all_reduce

        def count(tensor: torch.Tensor, *args: Any, **options: Any) -> Any:
            group = options.get("group")
            if group is not None and "dp_replicate" in (group.group_desc or ""):
                calls.append(tensor.numel())
            return all_reduce(tensor, *args, **options)

        patch.setattr(dist, "all_reduce", count)
        for kind, line in train.train(configs.load(arguments), CPU):
            losses += [line["grad_norm"]] if kind == "line" and "loss" in line else []
    return len(calls), losses


def test_replicas_sum_their_gradients_once_a_step_and_not_in_each_micro_step(lab, ranks):
    found = {}
    for rows in (1, 2):
        arguments = [str(lab.config), f"--data.dataset={lab.documents}", f"--run.dir={lab.folder / str(rows)}"]
        arguments += ["--parallel.tp=1", "--parallel.dp_replicate=2", f"--train.micro_batch_size={rows}"]
        arguments += ["--train.steps=2", "--optim.warmup_steps=1", "--train.eval_every=0"]
        found[rows] = ranks(4, sums_over_replicas, arguments, str(lab.folder / "hf/d"))
    assert found[1][0][0] == found[2][0][0] == 2 * (2 + 1), "in each of two steps two blocks and what is left"
    assert parallel.sums_once(ParallelConfig(param_dtype="bfloat16"))
    assert not parallel.sums_once(ParallelConfig(reduce_dtype="bfloat16")), "it would add up micro-steps in bfloat16"
    for many, one in zip(found[1], found[2], strict=True):
        assert many[1] == pytest.approx(one[1], rel=1e-5)


class Slow(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(0.6 if dist.get_rank() == 2 else 0.06)
        return x


def find_the_slowest() -> list[dict]:
    mesh, block, found = parallel.build_mesh(ParallelConfig(tp=1), CPU), Slow(), []
    pace = Pace(block, CPU)
    with shutdown.Shutdown(mesh, 60, owns_process=False) as ours:
        ours.vote(seconds=pace())
        found.append(ours.slowest())
        block(torch.ones(1))
        dist.barrier()  # where the fast ones wait, as in a step
        ours.vote(seconds=pace())
        found.append(ours.slowest())
        with torch.no_grad():
            block(torch.ones(1))  # an evaluation, say, of which ranks may have different shares
        ours.agreed()
        ours.vote(seconds=pace())
        found.append(ours.slowest())
    return found


def test_the_slowest_rank_is_found_although_all_take_the_same_time_for_a_step(ranks):
    for before, after, again in ranks(3, find_the_slowest):
        assert before == {"slowest_rank": None, "slowest_ratio": None}, "before there is anything to compare"
        assert after == again and after["slowest_rank"] == 2 and after["slowest_ratio"] > 2


def test_metrics_say_which_rank_is_slow(lab):
    run_dir = lab.folder / "two"
    result = lab.run_to_end(f"--run.dir={run_dir}", "--parallel.tp=1", "--train.steps=6", ranks=2)
    first, *lines = [line for line in read_metrics(run_dir) if "loss" in line]
    assert without_bars(result.stderr) == "" and first["slowest_rank"] is None
    assert {line["slowest_rank"] for line in lines} <= {0, 1} and all(line["slowest_ratio"] >= 1 for line in lines)
