"""Memory, step time and what bounds it, of one configuration on one kind of GPU."""

from dataclasses import dataclass
from typing import Any

import torch

import parallel
from cost import memory, time
from cost.hardware import Hardware
from cost.record import Report

USABLE = 0.9  # of a GPU's memory; CUDA's context, NCCL's buffers and the allocator's gaps take the rest
HELP = {  # what would help against a part of a step that is large
    "exposed TP": "TP's collectives stand in the way: a smaller tp, if it fits (fewer rows, more checkpointing)",
    "exposed FSDP": "FSDP's collectives take longer than what runs beside them: more rows at once, or dp_replicate",
    "rest": "the host launches kernels more slowly than they run: compile, or more rows at once",
    "optimizer": "the update is large for so few tokens: a larger global_batch_size",
    "compute": "kernels are the bound: less checkpointing, if it fits, would help, and compile, if it is off",
}


@dataclass
class Prediction:
    """Seconds and bytes by parts, which add up to the whole."""

    gpu: Hardware
    seconds: dict[str, float]
    bytes: dict[str, int]
    tokens_per_second: float  # of one GPU
    mfu: float

    @property
    def step_seconds(self) -> float:
        return sum(self.seconds.values())

    @property
    def memory_gib(self) -> float:
        """The peak as torch.cuda.max_memory_allocated would report it."""
        return sum(self.bytes.values()) / 2**30

    @property
    def fits(self) -> bool:
        return self.memory_gib <= USABLE * self.gpu.memory_gib

    def bound(self) -> str:
        """One sentence on what bounds the step and what would help."""
        if not self.fits:
            most = max(self.bytes, key=self.bytes.__getitem__)
            return (
                f"It takes {self.memory_gib:.1f} GiB, more than {USABLE:.0%} of {self.gpu.memory_gib:g} GiB: most of "
                f"it is {most}; --choose finds what fits."
            )
        share = {part: self.seconds[part] / self.step_seconds for part in HELP}
        part = max(HELP.keys() - {"compute"}, key=share.__getitem__)
        part = part if share[part] > 0.15 else "compute"
        return f"{share[part]:.0%} of the step is {part}: {HELP[part]}."

    def as_json(self) -> dict[str, Any]:
        gib = {part: nbytes / 2**30 for part, nbytes in self.bytes.items()}
        whole = {
            "step_seconds": self.step_seconds,
            "tokens_per_second_per_gpu": self.tokens_per_second,
            "mfu": self.mfu,
        }
        memory = {"memory_gib": self.memory_gib, "memory_parts_gib": gib, "fits": self.fits, "bound": self.bound()}
        return {"gpu": self.gpu.name} | whole | {"step_parts_seconds": self.seconds} | memory


def predict(
    report: Report, gpu: Hardware, local_world: int, dp_replicate: int = 0, reshard: bool | None = None
) -> Prediction:
    """What `report` costs on such GPUs, `local_world` in each node; with FSDP as in it, unless it is said here."""
    config, plan, trace = report.config, report.config.parallel, report.trace
    dp, tp = len(report.ranks) * len(report.ranks[0]), len(report.ranks[0][0])
    replicas = dp_replicate or plan.dp_replicate
    sharding = memory.Sharding(
        replicas,
        dp // replicas,
        tp,
        local_world,
        plan.reshard_after_forward if reshard is None else reshard,
        report.micro_steps,
        parallel.sums_once(plan),
        getattr(torch, plan.reduce_dtype).itemsize / getattr(torch, plan.param_dtype).itemsize,
    )
    seconds = time.step(trace, sharding, gpu, plan.param_dtype == "float32")
    # the optimizer keeps as many bytes for each parameter, however they are cut
    cut = trace.numbers(sharding.dp_shard) / trace.numbers(len(report.ranks[0]))
    state = {key: round(report.memory[key] * cut) for key in ("parameters", "gradients", "optimizer state")}
    tokens = config.train.global_batch_size * config.data.seq_len / sum(seconds.values()) / (dp * tp)
    mfu = tokens * report.flops_per_token / gpu.flops
    return Prediction(gpu, seconds, memory.peak(trace, sharding, state), tokens, mfu)
