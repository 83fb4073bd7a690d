"""What a run says of itself: metrics.jsonl, the progress bar and wandb, all from rank 0; speed; a profiler trace."""

import contextlib
import json
import math
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from tqdm import tqdm

from runtime.hardware import slow_bfloat16
from runtime.ranks import UserError

# Dense bf16 FLOP/s of one GPU, from the vendors' datasheets. MFU is measured against this, whatever the dtype.
PEAK_FLOPS = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12, "L40S": 362e12}


def say(text: str) -> None:
    """A line on the screen, above the progress bar, from rank 0."""
    if dist.get_rank() == 0:
        tqdm.write(text)


def summary(parameters: int, config: Any, mesh: DeviceMesh, device: torch.device, micro_steps: int, rows: Any) -> str:
    """What is trained, on what, and what a step takes."""
    parallel, train, sizes = config.parallel, config.train, {name: mesh[name].size() for name in mesh.mesh_dim_names}
    dp_size = sizes["dp_replicate"] * sizes["dp_shard"]
    lines = [
        f"Llama with {parameters:,} parameters, {parallel.param_dtype}, on {device.type}; "
        f"mesh {' x '.join(f'{name} {size}' for name, size in sizes.items())}",
        f"{rows} of {config.data.seq_len} tokens; a step takes {train.global_batch_size}, "
        f"in {micro_steps} micro-steps of {train.micro_batch_size} on {dp_size} data-parallel ranks",
    ]
    if parallel.param_dtype == "bfloat16" and slow_bfloat16(device):
        lines.append("this CPU has no bfloat16 instructions: parallel.param_dtype=float32 is many times as fast here")
    return "\n".join(lines)


class StartUp:
    """What the time before training went into: `done` ends a part."""

    def __init__(self, started: float):
        self.last, self.parts = started or time.perf_counter(), {}

    def done(self, part: str) -> "StartUp":
        now = time.perf_counter()
        self.parts[part], self.last = now - self.last, now
        return self

    def summary(self) -> str:
        parts = ", ".join(f"{part} {seconds:.1f}" for part, seconds in self.parts.items())
        return f"first step {sum(self.parts.values()):.1f} s after the start: {parts}"


# ---------------------------------------------------------------------------------------------------------------------
# What a step costs


def peak_memory_gib(device: torch.device) -> float:
    """The device's peak; on CPU the process's largest resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def peak_flops(device: torch.device) -> float | None:
    """Of one device; None where it is not in the table."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((flops for gpu, flops in PEAK_FLOPS.items() if gpu in name), None)


class Pace:
    """How long this rank takes for a block's forward, which all ranks do alike; a step's own time does not tell.

    In a step a fast rank waits for the slow one wherever they communicate. FSDP has gathered the weights when the block
    starts, so what it takes is the rank's own, or with TP that of its peers. On a GPU it is read once it is over.
    """

    def __init__(self, block: nn.Module, device: torch.device):
        self.on_gpu, self.last = device.type == "cuda", 0.0
        self.start: Any = None
        self.ended: Any = None  # start and end of the newest
        block.register_forward_pre_hook(self.before)
        block.register_forward_hook(self.after)

    def now(self) -> Any:
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def before(self, *_: Any) -> None:
        if torch.is_grad_enabled():  # not in an evaluation
            self.start = self.now()

    def after(self, *_: Any) -> None:
        if torch.is_grad_enabled():
            self.ended = self.start, self.now()

    def __call__(self) -> float:
        """Seconds of the newest forward that is over; 0 before there is one."""
        if self.ended is not None and (not self.on_gpu or self.ended[1].query()):
            start, end = self.ended
            self.last, self.ended = start.elapsed_time(end) / 1000 if self.on_gpu else end - start, None
        return self.last


class Meter:
    """What a step costs, as a mean over the steps since the last line; evaluation and checkpoints do not count.

    `flops_per_step` are those of one rank; `step` is the one, and `state` the checkpoint's, that the run goes on from.
    `block`: see `Pace`.
    """

    def __init__(self, flops_per_step: float, device: torch.device, step: int, state: dict[str, Any], block: nn.Module):
        self.pace = Pace(block, device)
        self.flops_per_step, self.device, self.peak = flops_per_step, device, peak_flops(device)
        self.step, self.tokens, self.fresh = step, state.get("tokens", 0), True
        self.step_seconds = state.get("step_seconds", 0.0)  # what a step takes by itself
        self.restart()

    @property
    def state(self) -> dict[str, float]:
        """What a checkpoint keeps of it."""
        return {"step_seconds": self.step_seconds}

    def restart(self) -> None:
        self.start, self.data_seconds, self.paused_seconds = time.perf_counter(), 0.0, 0.0

    def loading(self, batches: Iterator[Any], count: int) -> Iterator[tuple[bool, Any]]:
        """The next `count` batches, each with whether it is the last of them; waiting for them is noted."""
        for number in range(1, count + 1):
            start = time.perf_counter()
            batch = next(batches)
            self.data_seconds += time.perf_counter() - start
            yield number == count, batch

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # steps that are still under way are no pause
        start = time.perf_counter()
        yield
        self.paused_seconds += time.perf_counter() - start

    def line(self, step: int, tokens: int) -> dict[str, Any]:
        """`tokens` so far, read from the device just now: the steps have really ended."""
        steps = step - self.step
        seconds = (time.perf_counter() - self.start - self.paused_seconds) / steps
        if not self.fresh:  # compiling, and waiting for data, belong to no step
            self.step_seconds = seconds - self.data_seconds / steps
        line = {
            "tokens": tokens,
            "step_seconds": seconds,
            "tokens_per_second": (tokens - self.tokens) / steps / seconds,
            "mfu": self.flops_per_step / seconds / self.peak if self.peak else None,
            "peak_memory_gib": peak_memory_gib(self.device),
            "data_seconds": self.data_seconds / steps,
        }
        self.step, self.tokens, self.fresh = step, tokens, False
        self.restart()
        return line


# ---------------------------------------------------------------------------------------------------------------------
# Who hears of it


class Forecast:
    """What explain.py predicts for a run on GPUs of this name, to be said beside what is measured.

    It comes from a process of its own, as it needs a process group of its own, and nobody waits for it.
    """

    def __init__(self, run_dir: Path, gpu: str, world: int, local_world: int):
        script, config = str(Path(__file__).parent.parent / "explain.py"), str(run_dir / "config.toml")
        sizes = [f"--world-size={world}", f"--local-world-size={local_world}"]
        self.world, self.said, silent = world, False, subprocess.DEVNULL
        self.process = subprocess.Popen(
            [sys.executable, script, config, *sizes, f"--gpu={gpu}", "--json"],
            stdin=silent,
            stdout=subprocess.PIPE,
            stderr=silent,
            text=True,
            env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},  # the GPU is ours
        )

    def beside(self, line: dict[str, Any]) -> str:
        """Once, when it is there: the prediction, and a training line's numbers. "" for a GPU that is not known."""
        if self.said or self.process.poll() is None:
            return ""
        self.said = True
        said, _ = self.process.communicate()
        form = "{tokens_per_second_per_gpu:,.0f} tokens/s per GPU and {memory_gib:.1f} GiB at most".format
        measured = {"tokens_per_second_per_gpu": line["tokens_per_second"] / self.world}
        measured |= {"memory_gib": line["peak_memory_gib"]}
        return f"predicted {form(**json.loads(said))}, measured {form(**measured)}" if said else ""

    def stop(self) -> None:
        with self.process:  # closes its pipe
            self.process.kill()


class Monitor:
    """Lines for metrics.jsonl, the progress bar and wandb. Every rank has one; on all but rank 0 it keeps silent."""

    def __init__(self, run: Any, step: int, total_steps: int, wandb_id: str | None, config: dict[str, Any]):
        """`run` is the section of that name; `config`, flat, is for wandb, as is the id of a run that resumes."""
        is_main, run_dir = dist.get_rank() == 0, Path(run.dir)
        self.problems: list[BaseException] = []  # what went wrong in writing, for the next time that all ranks meet
        self.metrics = (run_dir / "metrics.jsonl").open("a") if is_main else None
        self.wandb = start_wandb(run.wandb, run.wandb_project, run.dir, wandb_id, config) if is_main else None
        self.wandb_id = wandb_id if self.wandb is None else self.wandb.id
        self.bar = tqdm(total=total_steps, initial=step, disable=not is_main, unit="step", dynamic_ncols=True)
        first, last = run.profile_steps or (0, 0)
        self.profiled = first, min(last, total_steps), run_dir / f"trace_steps_{first}_{last}.json"
        self.profiler: torch.profiler.profile | None = None  # while it traces
        self.run_dir = run_dir
        self.forecast: Forecast | None = None
        self.trace(step)

    def __enter__(self) -> "Monitor":
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        self.bar.close()
        if self.forecast is not None:
            self.forecast.stop()
        if self.profiler is not None:
            self.profiler.stop()
        if self.metrics is not None:
            with contextlib.suppress(OSError):  # a line that could not be written is among the problems already
                self.metrics.close()
        if self.wandb is not None:
            self.wandb.finish(exit_code=0 if error is None else 1)

    def log(self, line: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        """A line of training, of an evaluation, or of a step that was skipped; returns what train() yields of it.

        A number that is not finite becomes null.
        """
        line = {key: None if isinstance(x, float) and not math.isfinite(x) else x for key, x in line.items()}
        if self.metrics is None:
            return "line", line
        try:
            self.metrics.write(json.dumps(line) + "\n")
            self.metrics.flush()
        except OSError as error:
            self.problems.append(OSError(f"{self.metrics.name} cannot be written: {error}: make room and start again"))
        if self.wandb is not None:
            self.wandb.log(line, step=line["step"])
        if "val_loss" in line:
            say("step {step}: validation loss {val_loss:.4f}, {val_bits_per_byte:.4f} bits per byte".format(**line))
        elif "skipped_rows" in line:
            say("step {step} skipped: its loss or gradient is not finite; rows {skipped_rows}".format(**line))
        else:
            self.bar.update(line["step"] - self.bar.n)
            loss = "not finite" if line["loss"] is None else f"{line['loss']:.3f}"
            self.bar.set_postfix_str(f"loss {loss}, lr {line['lr']:.1e}, {line['tokens_per_second']:,.0f} tokens/s")
            if self.forecast is not None and (said := self.forecast.beside(line)):
                say(said)
            if self.forecast is None and torch.cuda.is_available():
                world, gpus = dist.get_world_size(), torch.cuda.device_count()
                self.forecast = Forecast(self.run_dir, torch.cuda.get_device_name(), world, min(world, gpus))
        return "line", line

    def waits(self, name: str) -> None:
        self.bar.set_postfix_str(name and f"waits for {name}")

    def check(self) -> None:
        if self.problems:
            raise self.problems[0]

    def trace(self, step: int) -> None:
        """After each step: rank 0's Chrome trace of run.profile_steps starts and ends here."""
        first, last, path = self.profiled
        if self.metrics is not None and step == first - 1 < last:
            self.profiler = torch.profiler.profile()
            self.profiler.start()
        if self.profiler is not None and step == last:
            self.profiler.stop()
            self.profiler.export_chrome_trace(str(path))
            self.profiler = None


class SkippedSteps:
    """Which steps the optimizer has skipped because their loss or gradient was not finite.

    `train` is the section of that name; `source` and `rows_of_step` say which rows such a step had; `finish` is called
    before the run is given up.
    """

    def __init__(self, train: Any, source: Any, rows_of_step: Callable, monitor: "Monitor", finish: Callable):
        self.train, self.source, self.rows_of_step = train, source, rows_of_step
        self.monitor, self.finish, self.unread, self.in_a_row, self.most_in_a_row = monitor, finish, [], 0, 0

    def record(self, step: int, flag: Tensor) -> None:
        """The flag, the same on all ranks, stays on the device."""
        self.unread.append((step, flag))

    def report(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Log the skipped steps since the last call; more in a row than allowed are a UserError, on all ranks alike.

        Waits for the device.
        """
        for step, flag in self.unread:
            self.in_a_row = self.in_a_row + 1 if flag else 0
            self.most_in_a_row = max(self.most_in_a_row, self.in_a_row)
            if flag:
                rows = self.rows_of_step(self.source, step, self.train.global_batch_size, self.train.seed)
                yield self.monitor.log({"step": step, "skipped_rows": self.source.names(rows)})
        self.unread.clear()
        allowed = self.train.max_skipped_steps
        if self.most_in_a_row > allowed:
            self.finish()
            raise UserError(
                f"{self.most_in_a_row} steps in a row had no finite loss or gradient, more than "
                f"train.max_skipped_steps={allowed}: lower optim.lr or look at the rows named above"
            )


def check_wandb(mode: str) -> None:
    """Raise UserError if the run is to be sent to wandb's server and there is no account to send it with."""
    if mode != "online":
        return
    import wandb

    with contextlib.suppress(wandb.errors.Error):
        if wandb.login(prompt=False):
            return
    raise UserError('run.wandb="online" needs an account: run `wandb login` once, or use run.wandb=offline')


def start_wandb(mode: Any, project: str, folder: str, run_id: str | None, config: dict[str, Any]) -> Any:
    """A run of wandb, the same one when resuming; None when switched off."""
    if mode == "disabled":
        return None
    import wandb

    settings = wandb.Settings(silent=True)
    return wandb.init(
        project=project, dir=folder, mode=mode, id=run_id, resume="allow", config=config, settings=settings
    )
