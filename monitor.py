"""What a run says of itself: metrics.jsonl, the progress bar and wandb, all from rank 0; speed; a profiler trace."""

import contextlib
import json
import math
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tqdm import tqdm

import configs
from configs import Config
from model import flops_per_token

# Dense bf16 FLOP/s of one GPU, from the vendors' datasheets. MFU is measured against this, whatever the dtype.
PEAK_FLOPS = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12, "L40S": 362e12}


def say(text: str) -> None:
    """A line on the screen, above the progress bar, from rank 0."""
    if dist.get_rank() == 0:
        tqdm.write(text)


class StartUp:
    """What the time before training went into: `done` ends a part."""

    def __init__(self, started: float):
        self.last, self.parts = started, {}

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


class Meter:
    """What a step costs, as a mean over the steps since the last line; evaluation and checkpoints do not count."""

    def __init__(self, config: Config, device: torch.device, step: int, tokens: int):
        self.device, self.step, self.tokens, self.peak = device, step, tokens, peak_flops(device)
        positions = config.train.global_batch_size * config.data.seq_len  # padding is computed like everything else
        flops = positions * flops_per_token(config.model, config.data.seq_len)
        self.flops_per_step = flops / dist.get_world_size()  # of each rank
        self.restart()

    def restart(self) -> None:
        self.start, self.data_seconds, self.paused_seconds = time.perf_counter(), 0.0, 0.0

    @contextlib.contextmanager
    def loading(self):
        start = time.perf_counter()
        yield
        self.data_seconds += time.perf_counter() - start

    @contextlib.contextmanager
    def paused(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # steps that are still under way are no pause
        start = time.perf_counter()
        yield
        self.paused_seconds += time.perf_counter() - start

    def line(self, step: int, tokens: int) -> dict[str, Any]:
        """`tokens` so far, read from the device just now: the steps have really ended."""
        steps = step - self.step
        seconds = (time.perf_counter() - self.start - self.paused_seconds) / steps
        line = {
            "tokens": tokens,
            "step_seconds": seconds,
            "tokens_per_second": (tokens - self.tokens) / steps / seconds,
            "mfu": self.flops_per_step / seconds / self.peak if self.peak else None,
            "peak_memory_gib": peak_memory_gib(self.device),
            "data_seconds": self.data_seconds / steps,
        }
        self.step, self.tokens = step, tokens
        self.restart()
        return line


# ---------------------------------------------------------------------------------------------------------------------
# Who hears of it


class Monitor:
    """Lines for metrics.jsonl, the progress bar and wandb. Every rank has one; on all but rank 0 it keeps silent."""

    def __init__(self, config: Config, first_step: int, wandb_id: str | None):
        is_main = dist.get_rank() == 0
        self.problems: list[OSError] = []  # what went wrong in writing, for the next time that all ranks meet
        self.metrics = (Path(config.run.dir) / "metrics.jsonl").open("a") if is_main else None
        self.wandb = start_wandb(config, wandb_id) if is_main else None
        steps = {"total": config.train.steps, "initial": first_step - 1}
        self.bar = tqdm(**steps, disable=not is_main, unit="step", dynamic_ncols=True)

    def log(self, line: dict[str, Any]) -> None:
        """A line of training, of an evaluation, or of a step that was skipped. A number that is not finite is null."""
        if self.metrics is None:
            return
        line = {key: None if isinstance(x, float) and not math.isfinite(x) else x for key, x in line.items()}
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

    def close(self) -> None:
        self.bar.close()
        if self.metrics is not None:
            self.metrics.close()
        if self.wandb is not None:
            self.wandb.finish()


def check_wandb(config: Config) -> None:
    """Raise ValueError if the run is to be sent to wandb's server and there is no account to send it with."""
    if config.run.wandb != "online":
        return
    import wandb

    with contextlib.suppress(wandb.errors.Error):
        if wandb.login(prompt=False):
            return
    raise ValueError('run.wandb="online" needs an account: run `wandb login` once, or use run.wandb=offline')


def start_wandb(config: Config, run_id: str | None) -> Any:
    """A run of wandb, the same one when resuming; None when switched off."""
    if config.run.wandb == "disabled":
        return None
    import wandb

    return wandb.init(
        project=config.run.wandb_project,
        dir=config.run.dir,
        mode=config.run.wandb,
        id=run_id,
        resume="allow",
        config=configs.flatten(config),
        settings=wandb.Settings(silent=True),
    )


def make_tracer(config: Config, first_step: int) -> Callable[[int], None]:
    """To be called before the first step and after each: writes rank 0's Chrome trace of run.profile_steps."""
    first, last = config.run.profile_steps or (0, 0)
    if dist.get_rank() != 0 or not first_step <= first <= config.train.steps:
        return lambda step: None
    profiler = torch.profiler.profile()

    def trace(step: int) -> None:
        if step == first - 1:
            profiler.start()
        if step == min(last, config.train.steps):
            profiler.stop()
            profiler.export_chrome_trace(str(Path(config.run.dir) / f"trace_steps_{first}_{last}.json"))

    return trace
