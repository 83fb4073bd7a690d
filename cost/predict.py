"""Memory, step time and what bounds it, of one configuration on one kind of GPU."""

from dataclasses import dataclass
from typing import Any

from cost import memory, time
from cost.hardware import Hardware
from cost.record import Report
from parallel import ParallelConfig

USABLE = 0.9  # of a GPU's memory; CUDA's context, NCCL's buffers and the allocator's gaps take the rest
HELP = {  # what would help against a part of a step that is large
    "exposed TP": "TP's collectives stand in the way: a smaller tp, if it fits (fewer rows, more checkpointing)",
    "exposed FSDP": "FSDP's collectives take longer than what runs beside them: more rows at once, or dp_replicate",
    "rest": "the host launches kernels more slowly than they run: compile, or more rows at once",
    "optimizer": "the update is large for so few tokens: a larger global_batch_size",
}


@dataclass
class Prediction:
    """Seconds and bytes by parts, which add up to the whole."""

    gpu: Hardware
    plan: ParallelConfig
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
            more = f"{self.memory_gib:.1f} GiB, more than {USABLE:.0%} of {self.gpu.memory_gib:g} GiB"
            return f"It takes {more}: most of it is {most}; --choose finds what fits."
        part = max(HELP, key=self.seconds.__getitem__)
        part = part if self.seconds[part] > 0.15 * self.step_seconds else "compute"
        plan, share = self.plan, f"{self.seconds[part] / self.step_seconds:.0%} of the step is {part}"
        faster = ["param_dtype=bfloat16"] * (plan.param_dtype == "float32") + ["compile"] * (not plan.compile)
        faster += ["less checkpointing, if it fits"] * (plan.activation_checkpointing != "none")
        kernels = f"would help: {'; '.join(faster)}" if faster else "what is left is the speed of the GPU"
        return f"{share}: {HELP.get(part, kernels)}."

    def as_json(self) -> dict[str, Any]:
        gib = {part: nbytes / 2**30 for part, nbytes in self.bytes.items()}
        speed = {"tokens_per_second_per_gpu": self.tokens_per_second, "mfu": self.mfu}
        whole = {"gpu": self.gpu.name, "step_seconds": self.step_seconds} | speed
        memory = {"memory_gib": self.memory_gib, "memory_parts_gib": gib, "fits": self.fits, "bound": self.bound()}
        return whole | {"step_parts_seconds": self.seconds} | memory


def predict(report: Report, gpu: Hardware, local_world: int, plan: ParallelConfig | None = None) -> Prediction:
    """What `report` costs on such GPUs, `local_world` in each node. `plan`: its own, or one with another FSDP."""
    config, trace, plan = report.config, report.trace, plan or report.config.parallel
    dp, tp = len(report.ranks) * len(report.ranks[0]), len(report.ranks[0][0])
    ranks = {"dp_replicate": plan.dp_replicate, "dp_shard": dp // plan.dp_replicate, "tp": tp}
    sharding = memory.Sharding(plan, ranks, local_world, report.micro_steps)
    seconds = time.step(trace, sharding, gpu)
    # the optimizer keeps as many bytes for each parameter, however they are cut
    cut = trace.numbers(ranks["dp_shard"]) / trace.numbers(len(report.ranks[0]))
    state = {key: round(report.memory[key] * cut) for key in ("parameters", "gradients", "optimizer state")}
    tokens = config.train.global_batch_size * config.data.seq_len / sum(seconds.values()) / (dp * tp)
    mfu = tokens * report.flops_per_token / gpu.flops
    return Prediction(gpu, plan, seconds, memory.peak(trace, sharding, state), tokens, mfu)
