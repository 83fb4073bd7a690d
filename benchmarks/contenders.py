"""What bench.py, profile_step.py and gpu.py measure: this code's real loop, and what people would use instead.

Each contender runs in processes of its own, as endless training that calls `pace()` before each step but the first:

    ours          train.py itself: its data, loop and logging, packed rows of the standard library
    tutorial      what widely read tutorials do: q, k and v gathered under TP, a dense float mask, parameters in the
                  compute dtype itself, unfused AdamW, loss.item() in every step
    transformers  LlamaForCausalLM in a plain loop, parameters in the compute dtype, fused AdamW
    plain         our model in a loop without anything distributed: float32 parameters, bf16 by autocast, fused AdamW,
                  and our setting of the CPU's allocator, so that the difference is what parallelism costs
    matmul        as many FLOPs as a step's, all in large matrix products: the limit

All but ours train on one batch of random tokens that lies ready on the device.
"""

import os
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent))
import configs
import train
from configs import OptimConfig
from model import Attention, Llama, ModelConfig, apply_rope, flops_per_token
from runtime import ranks
from runtime.monitor import peak_memory_gib

LR = 1e-3
WARM_UP_STEPS = 3  # compile, allocate


@dataclass
class Job:
    """What to train. `batch` rows are a step; each rank takes them `micro_batch` at a time."""

    shape: ModelConfig
    seq_len: int
    batch: int
    micro_batch: int
    dtype: str
    ranks: int = 1
    tp: int = 1
    compiled: bool = False

    def flops(self) -> int:
        """Model FLOPs of a step."""
        return self.batch * self.seq_len * flops_per_token(self.shape, self.seq_len)


def micro_batches(job: Job, device: torch.device, rank: int = 0, ranks: int = 1) -> list[Tensor]:
    """(micro_batch, seq_len + 1) each: this data-parallel rank's share of a batch that is the same for everybody."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(0, job.shape.vocab_size, (job.batch, job.seq_len + 1), generator=generator)
    return list(rows.chunk(ranks)[rank].to(device).split(job.micro_batch))


def loop(step: Callable[[], Any], pace: Callable[[], None]) -> None:
    while True:
        step()
        pace()


# ---------------------------------------------------------------------------------------------------------------------
# Contenders


def ours(job: Job, device: torch.device, folder: Path, pace: Callable[[], None]) -> None:
    ranks.init_distributed()
    shape = asdict(job.shape)
    shape.pop("rope_scaling")  # costs nothing in a step
    settings = {f"model.{key}": value for key, value in shape.items()} | {
        "data.seq_len": job.seq_len,
        "data.layout": "pack",
        "data.val_fraction": 0,
        "train.global_batch_size": job.batch,
        "train.micro_batch_size": job.micro_batch,
        "train.steps": 1_000_000,
        "checkpoint.every": 0,
        "optim.lr": LR,
        "parallel.tp": job.tp,
        "parallel.param_dtype": job.dtype,
        "parallel.compile": job.compiled,
        "parallel.timeout_seconds": 86400,  # others have their turn in between
        "run.dir": folder,
    }
    config = configs.load([f"--{key}={configs.toml_value(value)}" for key, value in settings.items()])
    for kind, _ in train.train(config, device):
        if kind == "line":  # one a step
            pace()


class TutorialAttention(Attention):
    """Every rank runs all heads: projections are gathered, kv heads copied, the mask is a dense tensor of floats."""

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        heads = (x.size(0), x.size(1), -1, self.head_dim)
        q, k, v = (projection(x).view(heads).transpose(1, 2) for projection in (self.q_proj, self.k_proj, self.v_proj))
        q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        groups = q.size(1) // k.size(1)
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.o_proj(y.transpose(1, 2).flatten(2))


class TutorialLlama(Llama):
    def __init__(self, config: ModelConfig):
        super().__init__(config)
        for block in self.model.layers:
            block.self_attn = TutorialAttention(config)

    def forward(self, input_ids: Tensor) -> Tensor:
        x, length = self.model.embed_tokens(input_ids), input_ids.size(1)
        mask = torch.full((length, length), float("-inf"), dtype=x.dtype, device=x.device).triu(1)
        mask = mask.expand(input_ids.size(0), 1, length, length).contiguous()  # where padding would be marked
        cos, sin = self.rope[:, :length]
        for block in self.model.layers:
            x = block(x, cos, sin, mask)
        return self.lm_head(self.model.norm(x))


def tutorial(job: Job, device: torch.device, folder: Path, pace: Callable[[], None]) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    dist.init_process_group()
    model = TutorialLlama(job.shape)
    model.init_weights(0)
    model.to(device, getattr(torch, job.dtype))
    gathered = ColwiseParallel(output_layouts=Replicate())
    plan = {f"self_attn.{name}": gathered for name in ("q_proj", "k_proj", "v_proj")}
    plan |= {"self_attn.o_proj": RowwiseParallel(input_layouts=Replicate()), "mlp.down_proj": RowwiseParallel()}
    plan |= {"mlp.gate_proj": ColwiseParallel(), "mlp.up_proj": ColwiseParallel()}
    mesh = init_device_mesh(device.type, (job.ranks,))
    if job.tp > 1:
        for block in model.model.layers:
            parallelize_module(block, mesh, plan)
        parallelize_module(model, mesh, {"lm_head": gathered})
    elif job.ranks > 1:
        for module in (*model.model.layers, model):
            fully_shard(module, mesh=mesh)
    parameters = list(model.parameters())
    kinds = {type(parameter) for parameter in parameters}  # under TP the norms are no DTensors, and are clipped apart
    optimizer = torch.optim.AdamW(parameters, lr=LR)
    batches = micro_batches(job, device) if job.tp > 1 else micro_batches(job, device, dist.get_rank(), job.ranks)

    def step() -> None:
        for rows in batches:
            logits = model(rows[:, :-1])
            loss = F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
            (loss / len(batches)).backward()
        for kind in kinds:
            nn.utils.clip_grad_norm_([parameter for parameter in parameters if type(parameter) is kind], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()

    loop(step, pace)


def transformers(job: Job, device: torch.device, folder: Path, pace: Callable[[], None]) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = asdict(job.shape)
    scaling, theta = shape.pop("rope_scaling"), shape.pop("rope_theta")
    rope = scaling | {"rope_theta": theta} if scaling else {"rope_type": "default", "rope_theta": theta}
    model = LlamaForCausalLM(LlamaConfig(**shape, rope_parameters=rope, use_cache=False))
    model.to(device, getattr(torch, job.dtype))
    forward = torch.compile(model) if job.compiled else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, fused=True)
    batches = micro_batches(job, device)

    def step() -> None:
        for rows in batches:
            (forward(input_ids=rows[:, :-1], labels=rows[:, :-1]).loss / len(batches)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    loop(step, pace)


def plain(job: Job, device: torch.device, folder: Path, pace: Callable[[], None]) -> None:
    ranks.tune_process()
    with device:
        model = Llama(job.shape)
    model.init_weights(0)
    if job.compiled:
        for block in model.model.layers:
            block.compile()
    optimizer = train.make_optimizer(model, OptimConfig(lr=LR))
    batches = micro_batches(job, device)

    def step() -> None:
        for rows in batches:
            with torch.autocast(device.type, torch.bfloat16, enabled=job.dtype == "bfloat16"):
                loss = model(rows[:, :-1], rows[:, 1:])
            (loss / (job.batch * job.seq_len)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    loop(step, pace)


def matmul(job: Job, device: torch.device, folder: Path, pace: Callable[[], None]) -> None:
    size = 8192 if device.type == "cuda" else 2048
    a, b, out = (torch.randn(size, size, dtype=getattr(torch, job.dtype), device=device) for _ in range(3))
    products = max(1, round(job.flops() / (2 * size**3)))

    def step() -> None:
        for _ in range(products):
            torch.mm(a, b, out=out)

    loop(step, pace)


# ---------------------------------------------------------------------------------------------------------------------
# Processes


class Pace:
    """Lets a contender go on for as many steps as the pipe says, then answers with the seconds that one took."""

    def __init__(self, pipe: Any, device: torch.device):
        self.pipe, self.device, self.steps, self.left = pipe, device, WARM_UP_STEPS, WARM_UP_STEPS
        self.start = time.perf_counter()

    def __call__(self) -> None:
        self.left -= 1
        if self.left > 0:
            return
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.pipe.send(self.answer())
        self.steps = self.left = self.pipe.recv()
        if self.steps == 0:
            sys.exit()
        self.begin()

    def begin(self) -> None:
        self.start = time.perf_counter()

    def answer(self) -> Any:
        return (time.perf_counter() - self.start) / self.steps


class PaceWithMemory(Pace):
    """Answers with the seconds of a step and the peak memory in GiB."""

    def answer(self) -> Any:
        return super().answer(), peak_memory_gib(self.device)


def serve(rank: int, port: int, pipe: Any, contender: Callable, job: Job, folder: Path, make_pace: Callable) -> None:
    """One rank of a contender; what it prints goes into its log."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"WORLD_SIZE": str(job.ranks), "LOCAL_WORLD_SIZE": str(job.ranks)}
    log = (folder / "log").open("a")
    os.dup2(log.fileno(), sys.stdout.fileno())  # what libraries print in C++ too
    os.dup2(log.fileno(), sys.stderr.fileno())
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // job.ranks))
    torch.manual_seed(0)
    contender(job, device, folder / "run", make_pace(pipe, device))


class Contender:
    """The processes of one contender, warm and waiting for `seconds()`."""

    def __init__(self, contender: Callable, job: Job, folder: Path, make_pace: Callable = Pace):
        self.log, context = folder / "log", mp.get_context("spawn")
        folder.mkdir(parents=True)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.pipes, self.processes = [], []
        for rank in range(job.ranks):
            pipe, theirs = context.Pipe()
            arguments = (rank, port, theirs, contender, job, folder, make_pace)
            self.processes.append(context.Process(target=serve, args=arguments, daemon=True))
            self.processes[-1].start()
            theirs.close()
            self.pipes.append(pipe)
        self.answers()

    def answers(self) -> list[Any]:
        try:
            return [pipe.recv() for pipe in self.pipes]
        except EOFError:
            raise RuntimeError(f"{self.log.parent.name} ended:\n{self.log.read_text()[-3000:]}") from None

    def ask(self, steps: int) -> list[Any]:
        """Each rank's answer after so many steps more."""
        for pipe in self.pipes:
            pipe.send(steps)
        return self.answers()

    def seconds(self, steps: int) -> float:
        """Of one step, on the slowest rank."""
        return max(self.ask(steps))

    def stop(self) -> None:
        for pipe in self.pipes:
            pipe.send(0)
        for process in self.processes:
            process.join()
