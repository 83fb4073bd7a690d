"""Training speed next to what people would use instead: `make bench`, or `python benchmarks/bench.py [--rounds 7]`.

Everything runs in one go on the same shape, data and dtype. Each contender lives in processes of its own, on all cores
together; the rounds go round robin, so that what else the machine does hits all of them alike. The table shows how many
times as fast as the contender ours is, as a median over the rounds. The result goes to benchmarks/results/ as JSON,
with the machine's description.

    tutorial      what widely read tutorials do: q, k and v gathered under TP, a dense float mask, parameters in the
                  compute dtype itself, unfused AdamW, loss.item() in every step
    transformers  LlamaForCausalLM in a plain loop, parameters in the compute dtype, fused AdamW
    torch.nn      our model in a plain loop without anything distributed: what parallelism costs at size 1
    matmul        the rate of large matrix products on this machine, the limit, in model FLOPs
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent))
import parallel
from configs import OptimConfig
from model import Llama, ModelConfig, apply_rope, flops_per_token
from train import make_optimizer

SEQ_LEN, BATCH = 256, 16
SHAPE = ModelConfig(
    vocab_size=4096,
    hidden_size=256,
    intermediate_size=1024,
    num_hidden_layers=6,
    num_attention_heads=8,
    num_key_value_heads=4,
    max_position_embeddings=SEQ_LEN,
)
LR = 1e-3


def batch(rank: int, ranks: int) -> Tensor:
    """(BATCH / ranks, SEQ_LEN + 1) token ids; a global batch is the same for everybody."""
    rows = torch.randint(0, SHAPE.vocab_size, (BATCH, SEQ_LEN + 1), generator=torch.Generator().manual_seed(0))
    return rows.chunk(ranks)[rank]


# ---------------------------------------------------------------------------------------------------------------------
# Contenders: each returns a function that does one optimizer step


def ours(dtype: str, tp: int, compiled: bool) -> Callable[[], None]:
    """What train.py does in a step."""
    config = parallel.ParallelConfig(tp=tp, param_dtype=dtype, compile=compiled)
    mesh = parallel.build_mesh(config, torch.device("cpu"))
    with torch.device("meta"):
        model = Llama(SHAPE)
    parallel.parallelize(model, mesh, config)
    model.to_empty(device="cpu")
    model.init_weights(0, parallel.place_shard)
    optimizer = make_optimizer(model, OptimConfig(lr=LR))
    rows = batch(*parallel.dp_rank_and_size(mesh))
    input_ids, targets = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()

    def step() -> None:
        with parallel.loss_context(mesh):
            loss = model(input_ids, targets)
            loss.backward()
        tokens = torch.tensor(float(targets.numel()))
        square = parallel.gradient_square(model)
        loss, tokens, square = parallel.sum_over_ranks(parallel.to_local(loss.detach()) / tp, tokens / tp, square)
        norm = square.sqrt() / tokens
        parallel.scale_gradients(model, (1.0 / (norm + 1e-6)).clamp(max=1.0) / tokens)
        optimizer.step()
        optimizer.zero_grad()

    return step


class TutorialAttention(nn.Module):
    """Every rank runs all heads: projections are gathered, the mask is a dense tensor of floats."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.head_dim, self.groups = config.head_dim, config.num_attention_heads // config.num_key_value_heads
        self.q_proj = nn.Linear(config.hidden_size, config.num_attention_heads * config.head_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, config.num_key_value_heads * config.head_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, config.num_key_value_heads * config.head_dim, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * config.head_dim, config.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        heads = (x.size(0), x.size(1), -1, self.head_dim)
        q, k, v = (p(x).view(heads).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        k, v = k.repeat_interleave(self.groups, 1), v.repeat_interleave(self.groups, 1)
        mask = torch.full((x.size(1), x.size(1)), float("-inf"), dtype=x.dtype).triu(1)
        mask = mask.expand(x.size(0), 1, -1, -1).contiguous()  # (B, 1, T, T), padding would go in here
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.o_proj(y.transpose(1, 2).flatten(2))


def tutorial(dtype: str, tp: int, compiled: bool) -> Callable[[], None]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    model = Llama(SHAPE)
    for block in model.model.layers:
        block.self_attn = TutorialAttention(SHAPE)
    model.init_weights(0)
    model.to(getattr(torch, dtype))
    world = dist.get_world_size()
    if tp > 1:
        gathered = {name: ColwiseParallel(output_layouts=Replicate()) for name in ("q_proj", "k_proj", "v_proj")}
        plan = {f"self_attn.{name}": style for name, style in gathered.items()}
        plan |= {"self_attn.o_proj": RowwiseParallel(input_layouts=Replicate()), "mlp.down_proj": RowwiseParallel()}
        plan |= {"mlp.gate_proj": ColwiseParallel(), "mlp.up_proj": ColwiseParallel()}
        mesh = init_device_mesh("cpu", (tp,))
        for block in model.model.layers:
            parallelize_module(block, mesh, plan)
        parallelize_module(model, mesh, {"lm_head": ColwiseParallel(output_layouts=Replicate())})
    elif world > 1:
        mesh = init_device_mesh("cpu", (world,))
        for block in model.model.layers:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=LR, foreach=False, fused=False)
    rows = batch(0, 1) if tp > 1 else batch(dist.get_rank(), world)
    input_ids, targets = rows[:, :-1], rows[:, 1:]

    def step() -> None:
        logits = model(input_ids)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        loss.backward()
        nn.utils.clip_grad_norm_([p for p in parameters if type(p.grad) is type(parameters[-1].grad)], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()

    return step


def transformers(dtype: str, tp: int, compiled: bool) -> Callable[[], None]:
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {key: getattr(SHAPE, key) for key in ("vocab_size", "hidden_size", "intermediate_size", "head_dim")}
    heads = {key: getattr(SHAPE, key) for key in ("num_hidden_layers", "num_attention_heads", "num_key_value_heads")}
    config = LlamaConfig(**shape, **heads, max_position_embeddings=SEQ_LEN, tie_word_embeddings=False, use_cache=False)
    model = LlamaForCausalLM(config).to(getattr(torch, dtype))
    forward = torch.compile(model) if compiled else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, fused=True)
    input_ids = batch(0, 1)[:, :-1].contiguous()

    def step() -> None:
        forward(input_ids=input_ids, labels=input_ids).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def torch_nn(dtype: str, tp: int, compiled: bool) -> Callable[[], None]:
    """float32 parameters, as ours; bf16 compute through autocast."""
    model = Llama(SHAPE)
    model.init_weights(0)
    if compiled:
        for block in model.model.layers:
            block.compile()
    optimizer = make_optimizer(model, OptimConfig(lr=LR))
    rows = batch(0, 1)
    input_ids, targets = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = model(input_ids, targets) / targets.numel()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def matmul(dtype: str, tp: int, compiled: bool) -> Callable[[], None]:
    """As many FLOPs as a step of the model."""
    size = 2048
    a, b = (torch.randn(size, size, dtype=getattr(torch, dtype)) for _ in range(2))
    products = BATCH * SEQ_LEN * flops_per_token(SHAPE, SEQ_LEN) / (2 * size**3)

    def step() -> None:
        for _ in range(max(1, round(products))):
            torch.mm(a, b)

    return step


# name -> contender, ranks, tp, compile
CONTENDERS: dict[str, tuple[Callable, int, int, bool]] = {
    "ours": (ours, 1, 1, False),
    "ours, compiled": (ours, 1, 1, True),
    "tutorial": (tutorial, 1, 1, False),
    "transformers": (transformers, 1, 1, False),
    "transformers, compiled": (transformers, 1, 1, True),
    "torch.nn": (torch_nn, 1, 1, False),
    "torch.nn, compiled": (torch_nn, 1, 1, True),
    "matmul": (matmul, 1, 1, False),
    "ours, tp 2": (ours, 2, 2, False),
    "ours, tp 2, compiled": (ours, 2, 2, True),
    "tutorial, tp 2": (tutorial, 2, 2, False),
    "ours, dp 2": (ours, 2, 1, False),
    "ours, dp 2, compiled": (ours, 2, 1, True),
    "tutorial, dp 2": (tutorial, 2, 1, False),
}
# ours, the other, the goal
RATIOS = {
    "bfloat16": [
        ("ours, compiled", "tutorial", 1.5),
        ("ours, tp 2, compiled", "tutorial, tp 2", 1.4),
        ("ours, dp 2, compiled", "tutorial, dp 2", 1.4),
        ("ours, compiled", "transformers", 1.25),
        ("ours, compiled", "transformers, compiled", 1.05),
        ("ours, compiled", "torch.nn, compiled", 0.97),
        ("ours", "torch.nn", 0.97),
        ("ours, compiled", "matmul", 0.55),
    ],
    "float32": [
        ("ours, compiled", "tutorial", 1.3),
        ("ours, compiled", "transformers", 1.25),
        ("ours, compiled", "transformers, compiled", 1.05),
        ("ours, compiled", "torch.nn, compiled", 0.97),
        ("ours", "torch.nn", 0.97),
    ],
}


# ---------------------------------------------------------------------------------------------------------------------
# Processes


def serve(rank: int, pipe: Any, store: str, name: str, dtype: str, cores: int) -> None:
    contender, ranks, tp, compiled = CONTENDERS[name]
    torch.set_num_threads(max(1, cores // ranks))
    dist.init_process_group("gloo", store=dist.FileStore(store, ranks), rank=rank, world_size=ranks)
    torch.manual_seed(0)
    step = contender(dtype, tp, compiled)
    for _ in range(3):  # compile, allocate
        step()
    pipe.send("ready")
    while steps := pipe.recv():
        start = time.perf_counter()
        for _ in range(steps):
            step()
        pipe.send((time.perf_counter() - start) / steps)
    os._exit(0)


class Contender:
    """Processes that wait for `seconds()`."""

    def __init__(self, name: str, dtype: str, folder: str, cores: int):
        context, self.pipes = mp.get_context("spawn"), []
        store = f"{folder}/{dtype} {name}"
        for rank in range(CONTENDERS[name][1]):
            ours, theirs = context.Pipe()
            context.Process(target=serve, args=(rank, theirs, store, name, dtype, cores), daemon=True).start()
            self.pipes.append(ours)
        for pipe in self.pipes:
            pipe.recv()

    def seconds(self, steps: int) -> float:
        """Of one step."""
        for pipe in self.pipes:
            pipe.send(steps)
        return max(pipe.recv() for pipe in self.pipes)

    def stop(self) -> None:
        for pipe in self.pipes:
            pipe.send(0)


def machine(cores: int) -> dict[str, Any]:
    cpu = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").open() if "model name" in line), "")
    return {"cpu": cpu or platform.processor(), "cores": cores, "torch": torch.__version__, "load": os.getloadavg()[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7, help="measurements of each contender")
    parser.add_argument("--steps", type=int, default=2, help="optimizer steps of one measurement")
    parser.add_argument("--dtypes", nargs="+", default=list(RATIOS), choices=list(RATIOS))
    arguments = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    result = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "machine": machine(cores), "ratios": []}
    print(f"{result['machine']}; {arguments.rounds} rounds of {arguments.steps} steps, medians [min, max]")
    for dtype in arguments.dtypes:
        with tempfile.TemporaryDirectory() as folder:
            names = dict.fromkeys(name for left, right, _ in RATIOS[dtype] for name in (left, right))
            contenders = {name: Contender(name, dtype, folder, cores) for name in names}
            seconds = {name: [] for name in names}
            for _ in range(arguments.rounds):
                for name, contender in contenders.items():
                    seconds[name].append(contender.seconds(arguments.steps))
            for contender in contenders.values():
                contender.stop()
        print(f"\n{dtype:24} {'against':24} {'ratio':>6}  {'spread':14} goal")
        for left, right, goal in RATIOS[dtype]:
            ratios = [b / a for a, b in zip(seconds[left], seconds[right], strict=True)]  # of the same round
            ratio, low, high = statistics.median(ratios), min(ratios), max(ratios)
            print(f"{left:24} {right:24} {ratio:6.2f}  [{low:.2f}, {high:.2f}]   {goal:.2f}")
            result["ratios"].append({"dtype": dtype, "ours": left, "other": right, "ratio": ratio, "goal": goal})
            result["ratios"][-1] |= {"lowest": low, "highest": high}
    folder = Path(__file__).parent / "results"
    folder.mkdir(exist_ok=True)
    with (folder / "bench.jsonl").open("a") as file:
        file.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
