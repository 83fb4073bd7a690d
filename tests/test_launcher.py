"""train() called by others: a generator in a process group that is there already, which owns no process."""

import contextlib
import io
import os
import re
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from test_train import Lab, facts

import checkpoint
import configs
import parallel
import train
from runtime import ranks as runtime_ranks
from runtime import rundir
from runtime.ranks import UserError

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(tmp_path_factory.mktemp("launcher"))


def command(lab: Lab, run_dir: Path, *more: str) -> list[str]:
    options = [f"--data.dataset={lab.documents}", f"--run.dir={run_dir}", "--parallel.tp=1", "--train.steps=8"]
    return [str(lab.config), *options, "--checkpoint.every=3", "--train.eval_every=4", *more]


def told(event: tuple[str, Any]) -> tuple[str, Any]:
    """Of an event, what is the same on all ranks: the clock's numbers are not."""
    kind, item = event
    return kind, str(item) if kind == "checkpoint" else (item["step"], item.get("loss"), item.get("val_loss"))


def run_all(cache: str, *commands: list[str], thread: bool = False, leave_after: int = 0) -> tuple[list, str]:
    """The events of runs in this process, one after the other, and what was printed."""
    import datasets

    datasets.config.HF_DATASETS_CACHE = Path(cache)
    events, printed, handlers = [], io.StringIO(), [signal.getsignal(number) for number in runtime_ranks.SIGNALS]
    timeout = runtime_ranks.timeout_of_group()

    def run() -> None:
        for arguments in commands:
            with contextlib.closing(train.train(configs.load(arguments), CPU)) as these:
                for event in these:
                    events.append(told(event))
                    if len(events) == leave_after:
                        break

    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(io.StringIO()):
        if thread:
            other = threading.Thread(target=run)
            other.start()
            other.join()
        else:
            run()
    assert [signal.getsignal(number) for number in runtime_ranks.SIGNALS] == handlers, "given back"
    assert timeout is not None and runtime_ranks.timeout_of_group() == timeout, "so is the group"
    return events, printed.getvalue()


def test_events_are_the_lines_and_checkpoints_on_all_ranks_alike_and_twice_in_one_process(lab, ranks):
    first, second = lab.folder / "first", lab.folder / "second"
    results = ranks(2, run_all, str(lab.folder / "hf/d"), command(lab, first), command(lab, second))
    (events, printed), *_ = results
    assert all(others == events for others, _ in results)
    half = len(events) // 2
    for run_dir, own in ((first, events[:half]), (second, events[half:])):
        lines = [(line["step"], line.get("loss"), line.get("val_loss")) for line in facts(run_dir)]
        assert [item for kind, item in own if kind == "line"] == lines
        paths = [str(checkpoint.step_folder(run_dir, step)) for step in (3, 6, 8)]
        assert [item for kind, item in own if kind == "checkpoint"] == paths
    assert facts(first) == facts(second)
    assert printed.count("complete at step 8") == 2 and "signals" not in printed


def test_an_asynchronous_save_is_told_once_on_all_ranks_after_all_have_seen_it_complete(lab, ranks):
    arguments = command(lab, lab.folder / "asynchronous", "--checkpoint.async_save=true")
    (events, _), (others, _) = ranks(2, run_all, str(lab.folder / "hf/d"), arguments)
    assert others == events
    paths = [str(checkpoint.step_folder(lab.folder / "asynchronous", step)) for step in (3, 6, 8)]
    assert [item for kind, item in events if kind == "checkpoint"] == paths


def in_a_thread(*arguments: Any) -> tuple[list, str]:
    return run_all(*arguments, thread=True)


def test_outside_the_main_thread_it_trains_without_signal_handlers_and_says_so_once(lab, ranks):
    run_dir = lab.folder / "thread"
    (events, printed), _ = ranks(2, in_a_thread, str(lab.folder / "hf/d"), command(lab, run_dir))
    assert events[-1] == ("checkpoint", str(checkpoint.step_folder(run_dir, 8)))
    assert len(re.findall("outside the main thread.*signals", printed)) == 1


def leave_early(*arguments: Any) -> tuple[list, str]:
    return run_all(*arguments, leave_after=5)


def test_who_leaves_early_leaves_no_lock_and_nothing_armed_and_the_run_goes_on(lab, ranks):
    run_dir, whole = lab.folder / "left", lab.folder / "whole"
    ranks(2, run_all, str(lab.folder / "hf/d"), command(lab, whole))
    arguments = command(lab, run_dir, "--parallel.timeout_seconds=3")
    for events, _ in ranks(2, leave_early, str(lab.folder / "hf/d"), arguments):
        assert len(events) == 5
    rundir.hold(run_dir).close()
    results = ranks(2, linger_and_run, str(lab.folder / "hf/d"), command(lab, run_dir))
    assert "resumed from" in results[0][1]
    assert facts(run_dir) == facts(whole)


def linger_and_run(*arguments: Any) -> tuple[list, str]:
    """Long enough for a watch that is still armed to speak."""
    threading.Event().wait(9)
    return run_all(*arguments)


def refusal(cache: str, arguments: list[str], how: str) -> str:
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
        if how == "no CPU backend":
            patch.setattr(dist, "all_reduce", no_cpu_backend)
        try:
            run_all(cache, arguments)
        except UserError as error:
            return str(error)
    return ""


def no_cpu_backend(*_: object) -> None:
    raise RuntimeError("No backend type associated with device type cpu")


@pytest.mark.parametrize(
    ("how", "more", "message"),
    [
        ("no CPU backend", [], 'cannot reduce CPU tensors.*backend="cpu:gloo,cuda:nccl"'),
        ("switch off", ["--train.deterministic=true"], r"train.deterministic=true: call torch.use_deterministic"),
    ],
)
def test_a_launcher_that_has_not_prepared_what_a_run_needs_is_told(lab, ranks, how, more, message):
    run_dir = lab.folder / "refused"
    for said in ranks(2, refusal, str(lab.folder / "hf/d"), command(lab, run_dir, *more), how):
        assert re.search(message, said)
    assert not run_dir.exists()


def test_a_bare_call_does_nothing(lab):
    train.train(configs.load(command(lab, lab.folder / "bare")), CPU)
    assert not (lab.folder / "bare").exists() and not dist.is_initialized()
    with pytest.raises(UserError, match="there is no process group"):
        next(train.train(configs.load(command(lab, lab.folder / "bare")), CPU))


def test_launcher_and_command_line_compute_the_same(lab):
    """Under torchrun, with a process group that is not ours; tests/launcher.py."""
    run_dir, reference = lab.folder / "launched", lab.folder / "reference"
    arguments = command(lab, run_dir)[2:]
    process = lab.start(*arguments, ranks=2, script=(Path(__file__).parent / "launcher.py", "nothing"))
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    lab.run_to_end(*command(lab, reference)[2:], ranks=2)
    assert facts(run_dir) == facts(reference)
    events = [(lab.cwd / f"events-{rank}").read_text() for rank in (0, 1)]
    assert events[0] == events[1] and events[0].count("checkpoint ") == 3


def described(slow: bool) -> str:
    """What is said at the start of a run in bfloat16 on a CPU."""
    from runtime import monitor

    config = configs.load(["--parallel.tp=1", "--parallel.param_dtype=bfloat16"], world=1, local_world=1)
    mesh = parallel.build_mesh(config.parallel, CPU)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(monitor, "slow_bfloat16", lambda device: slow)
        return monitor.summary(5, config, mesh, CPU, micro_steps=2, rows="3 rows")


def test_bfloat16_on_a_cpu_that_is_slow_with_it_is_said_once_with_the_remedy(ranks):
    (quiet,), (told,) = ranks(1, described, False), ranks(1, described, True)
    (line,) = told.removeprefix(quiet).strip().splitlines()
    assert "bfloat16" in line and "parallel.param_dtype=float32" in line


class HalfTheRate(torch.optim.AdamW):
    """Norms learn at half the rate of matrices, as a group may say."""

    seen: list[list[float]] = []

    def __init__(self, model: torch.nn.Module, optim: configs.OptimConfig):
        matrices, vectors = ([p for p in model.parameters() if (p.ndim > 1) == many] for many in (True, False))
        super().__init__([{"params": matrices}, {"params": vectors, "lr_ratio": 0.5}], fused=True)

    def step(self, *arguments: Any, **options: Any) -> Any:
        self.seen.append([group["lr"] for group in self.param_groups])
        return super().step(*arguments, **options)


def rates(cache: str, arguments: list[str]) -> list[list[float]]:
    HalfTheRate.seen.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "make_optimizer", HalfTheRate)
        run_all(cache, arguments)
    return HalfTheRate.seen


def test_a_group_of_the_optimizer_may_carry_its_own_share_of_the_learning_rate(lab, ranks):
    (seen,) = ranks(1, rates, str(lab.folder / "hf/d"), command(lab, lab.folder / "rates", "--train.steps=5"))
    optim = configs.load(command(lab, lab.folder / "rates")).optim
    expected = [train.learning_rate(step, 5, optim) for step in range(1, 6)]
    assert [pair[0] for pair in seen] == expected
    assert all(norms == matrices * 0.5 for matrices, norms in seen)


def signal_after_evaluation(cache: str, arguments: list[str]) -> tuple[list, str]:
    evaluate = train.evaluate

    def evaluate_and_signal(*everything: Any) -> Any:
        result = evaluate(*everything)
        os.kill(os.getpid(), signal.SIGTERM)
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "evaluate", evaluate_and_signal)
        return run_all(cache, arguments)


def test_a_run_that_stops_right_after_an_evaluation_was_made_up_for_does_not_do_it_again(lab, ranks):
    run_dir, whole = lab.folder / "made_up", lab.folder / "not_made_up"
    ranks(2, run_all, str(lab.folder / "hf/d"), command(lab, whole, "--checkpoint.every=4"))
    arguments, cache = command(lab, run_dir, "--checkpoint.every=4"), str(lab.folder / "hf/d")
    ranks(2, run_all, cache, [*arguments, "--train.steps=4"])
    path = checkpoint.step_folder(run_dir, 4)
    tensors = (path / "__0_0.distcp").read_bytes()
    checkpoint.write_state(path, {**checkpoint.read_state(path), "unevaluated": True})
    ((events, printed),) = ranks(1, signal_after_evaluation, cache, arguments)  # on fewer ranks than have written it
    assert [kind for kind, _ in events] == ["line", "checkpoint"] and "stopped at step 4" in printed
    assert not checkpoint.read_state(path)["unevaluated"] and checkpoint.damage(path) == []
    assert checkpoint.read_state(path)["files"].keys() == {".metadata", "__0_0.distcp", "__1_0.distcp"}
    assert (path / "__0_0.distcp").read_bytes() == tensors
    (events, _), *_ = ranks(2, run_all, cache, arguments)
    assert events[0][1][0] == 5, "with the next step"
    assert facts(run_dir) == facts(whole)
