"""How one model becomes many: process group, mesh, tensor parallelism (TP), activation checkpointing, compile, FSDP2.

The mesh always has three axes, also when some have size 1, so no code asks whether parallelism is on. Eight ranks
with dp_replicate = 1 and tp = 2, on one node (HSDP, dp_replicate > 1, adds such sheets, one per replica):

                    tp 0      tp 1
    dp_shard 0    rank 0    rank 1     TP peers, a row: the same rows of tokens, different slices of every matrix. They
    dp_shard 1    rank 2    rank 3     talk several times in every block, so they are neighbours in one node.
    dp_shard 2    rank 4    rank 5     DP peers, a column: different rows of tokens. Each keeps 1/dp_shard of its slice
    dp_shard 3    rank 6    rank 7     and gathers the others' just before a block runs (FSDP).

What TP does. Shapes are local to one rank: B rows, T sequence, D hidden, H and K heads, hd head dim, F feed-forward,
V vocabulary. A branch starts with an all-gather and ends with a reduce-scatter; between blocks T is sharded:

    module                     weight on tp    input                  output                       collective (forward)
    embed_tokens               Shard(0) on V   (B, T) ids             (B, T/tp, D)                 reduce-scatter
    input_layernorm            Replicate       (B, T/tp, D)           (B, T/tp, D)
    self_attn                                  (B, T/tp, D)           (B, T, D) to q, k and v      all-gather
      q_proj                   Shard(0)        (B, T, D)              (B, T, H/tp * hd)
      k_proj, v_proj           Shard(0)        (B, T, D)              (B, T, K/tp * hd)
      o_proj                   Shard(1)        (B, T, H/tp * hd)      (B, T/tp, D)                 reduce-scatter
    post_attention_layernorm   Replicate       (B, T/tp, D)           (B, T/tp, D)
    mlp                                        (B, T/tp, D)           (B, T, D) to gate and up     all-gather
      gate_proj, up_proj       Shard(0)        (B, T, D)              (B, T, F/tp)
      down_proj                Shard(1)        (B, T, F/tp)           (B, T/tp, D)                 reduce-scatter
    norm                       Replicate       (B, T/tp, D)           (B, T/tp, D)
    loss                                       (B, T/tp, D)           (B, T, D) to lm_head         all-gather
      lm_head                  Shard(0) on V   (n, D), n of B * T     (n, V/tp), kept sharded
      cross-entropy                            (n, V/tp)              sum, the same on all tp      all-reduces of (n,)

The backward pass mirrors it: an all-gather becomes a reduce-scatter and the other way round. What is replicated on tp
(norms; k and v where tp does not divide the kv heads) has its gradient summed over tp in addition. Megatron-LM,
arXiv:1909.08053; sequence parallelism, arXiv:2205.05198; FSDP, arXiv:2304.11277.
"""

import contextlib
import ctypes
import math
import os
import platform
import signal
import sys
import time
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from typing import Annotated, Literal, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout  # there is no public name for it
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)
from torch.nn.attention.flex_attention import BlockMask
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from tqdm import tqdm

from model import Llama, ModelConfig

SETUP_TIMEOUT = timedelta(hours=12)  # the first rank of a node may tokenise a large corpus while the others wait
PEER_PATIENCE_SECONDS = 30  # how long a silent rank waits to be ended after rank 0 has printed an error


@dataclass
class ParallelConfig:
    """The mesh and what is done to each block. The data-parallel size is never configured: it is world size / tp."""

    tp: Annotated[int | Literal["auto"], "tensor-parallel ranks; auto = TP inside a node, DP across"] = "auto"
    dp_replicate: Annotated[int, "copies of the sharded model: 1 = FSDP, more = HSDP"] = 1
    param_dtype: Annotated[Literal["float32", "bfloat16"], "dtype of compute and of gathered parameters"] = "float32"
    reduce_dtype: Annotated[Literal["float32", "bfloat16"], "dtype in which gradients are summed over DP"] = "float32"
    activation_checkpointing: Annotated[
        Literal["none", "selective", "full"],
        "what backward recomputes: nothing; all but matmuls and attention; whole blocks",
    ] = "none"
    compile: Annotated[bool, "torch.compile each block, and without TP the cross-entropy"] = False
    reshard_after_forward: Annotated[bool, "free gathered weights after forward, gather again in backward"] = True
    timeout_seconds: Annotated[int, "after the first step: how long ranks wait for one before the job ends"] = 600


# ---------------------------------------------------------------------------------------------------------------------
# Processes


def world_size() -> int:
    """Ranks in the job, known before there is a process group: torchrun says so in the environment."""
    return int(os.environ.get("WORLD_SIZE", 1))


def local_world_size() -> int:
    """Ranks on this node."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", 0))


def stop_all_ranks(message: str) -> NoReturn:
    """End the job with one message for a person, exit status 2. Every rank must call this; rank 0 speaks.

    torchrun ends all processes as soon as one exits, which would swallow a message that rank 0 was about to print: so
    the other ranks keep silent and wait to be ended. If nobody ended them, the error is this node's alone.
    """
    is_main = int(os.environ.get("RANK", 0)) == 0
    if not is_main:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # torchrun's; `Shutdown` would only take note of it
        time.sleep(PEER_PATIENCE_SECONDS)
    if is_main or local_rank() == 0:
        tqdm.write(f"error: {message}", file=sys.stderr)  # on a line of its own, also below a progress bar
        sys.stderr.flush()
    os._exit(2)


def gather(value: object) -> list:
    """Every rank's value, on every rank."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def from_rank_0(value: object) -> object:
    """Rank 0's value, on every rank."""
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


@contextlib.contextmanager
def errors_stop_all_ranks():
    """Whatever a user can get wrong inside (ValueError, OSError), on any rank, ends all ranks with that one message.

    Every rank enters and leaves it together; no collective may stand inside. Any other exception is a bug and keeps
    its traceback.
    """
    message = None
    try:
        yield
    except (ValueError, OSError) as error:
        message = str(error) or repr(error)
    messages = list(filter(None, gather(message)))
    if messages:
        stop_all_ranks(messages[0])


def tune_process() -> None:
    """What training on a CPU asks of a Linux with glibc. Call it first: threads inherit how they are scheduled."""
    if hasattr(os, "SCHED_BATCH"):
        # A thread that wakes up waits for its turn. gloo's network thread would often push aside the very thread that
        # holds the lock it wants, and spin until that one's next turn.
        with contextlib.suppress(PermissionError):  # in a sandbox
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    if platform.libc_ver()[0] == "glibc":
        # What a step frees is kept: the next one would have every page of its tensors faulted in again.
        libc, m_trim_threshold, m_mmap_threshold = ctypes.CDLL(None), -1, -3  # malloc.h
        libc.mallopt(m_mmap_threshold, 2**30)  # bytes
        libc.mallopt(m_trim_threshold, -1)  # never


def init_distributed() -> torch.device:
    """Start the process group, also for one process; returns this rank's device: CUDA with NCCL, else CPU with gloo."""
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", local_rank()) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    else:  # torchrun sets OMP_NUM_THREADS=1 whatever the number of cores
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        torch.set_num_threads(max(1, cores // local_world_size()))
        tune_process()
    store, rank, size = dist.HashStore(), 0, 1
    if "RANK" in os.environ:
        store, rank, size = next(dist.rendezvous("env://", timeout=SETUP_TIMEOUT))
        # torchrun --max-restarts keeps its store, and in it the addresses of ranks that are gone (pytorch#135712). Only
        # on a single node do all ranks know the same number of restarts.
        restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if size == local_world_size() else "any"
        store = dist.PrefixStore(f"restart_{restarts}", store)
    backend, device_id = ("cpu:gloo,cuda:nccl", device) if on_gpu else ("gloo", None)
    dist.init_process_group(
        backend, store=store, rank=rank, world_size=size, timeout=SETUP_TIMEOUT, device_id=device_id
    )
    return device


def build_mesh(config: ParallelConfig, device: torch.device) -> DeviceMesh:
    """The ("dp_replicate", "dp_shard", "tp") mesh over all ranks; `config.tp` is resolved."""
    dp_shard = dist.get_world_size() // (config.dp_replicate * config.tp)
    names = ("dp_replicate", "dp_shard", "tp")
    return init_device_mesh(device.type, (config.dp_replicate, dp_shard, config.tp), mesh_dim_names=names)


def set_timeout(mesh: DeviceMesh, seconds: int) -> None:
    """How long a collective waits for the slowest rank, on all groups, from now on."""
    for group in (None, *mesh.get_all_groups()):
        _set_pg_timeout(timedelta(seconds=seconds), group)


def dp_rank_and_size(mesh: DeviceMesh) -> tuple[int, int]:
    """This rank's place among the ranks that see different rows, and their number."""
    replicate, shard, _ = mesh.get_coordinate()
    return replicate * mesh["dp_shard"].size() + shard, mesh["dp_replicate"].size() * mesh["dp_shard"].size()


# ---------------------------------------------------------------------------------------------------------------------
# Divisibility: checked with the config, because a length that tp does not divide hangs instead of failing


def divided_by_tp(model: ModelConfig, seq_len: int) -> dict[str, int]:
    """What tp must divide. Not the kv heads: see `ReplicatedKV`. A vocab_size of 0 becomes a multiple of 128."""
    return {
        "model.num_attention_heads": model.num_attention_heads,
        "model.hidden_size": model.hidden_size,
        "model.intermediate_size": model.intermediate_size,
        "model.vocab_size": model.vocab_size or 128,
        "data.seq_len": seq_len,
    }


def resolve_tp(config: ParallelConfig, model: ModelConfig, seq_len: int, local_world: int, world: int) -> int:
    """`tp`, with "auto" replaced: the largest divisor of the node's ranks that passes every rule.

    On a single node of 4 ranks or more at most half of them, so that the mesh is 2-D.
    """
    if config.tp != "auto":
        return config.tp
    most = local_world // 2 if world == local_world >= 4 else local_world
    divisors = [tp for tp in range(1, most + 1) if local_world % tp == 0]
    return max((tp for tp in divisors if not mesh_errors(replace(config, tp=tp), model, seq_len, world)), default=1)


def mesh_errors(config: ParallelConfig, model: ModelConfig, seq_len: int, world: int) -> list[str]:
    """Each violated rule as a message: value, rule, remedy."""
    tp, replicas = config.tp, config.dp_replicate
    if tp < 1 or replicas < 1:
        return [f"parallel.tp={tp} and parallel.dp_replicate={replicas} must be at least 1"]
    rules = {"the number of processes": world} | divided_by_tp(model, seq_len)
    shown = {} if model.vocab_size else {"model.vocab_size": "0, which will be a multiple of 128,"}
    works = [n for n in range(1, world + 1) if all(value % n == 0 for value in rules.values())]
    errors = [
        f"{name}={shown.get(name, value)} is not divisible by parallel.tp={tp}: "
        f"use tp in {{{', '.join(map(str, works))}}} or a multiple of {tp} for {name}"
        for name, value in rules.items()
        if value % tp != 0
    ]
    dp = world // tp
    if world % tp == 0 and dp % replicas != 0:
        divisors = ", ".join(str(n) for n in range(1, dp + 1) if dp % n == 0)
        errors.append(
            f"parallel.dp_replicate={replicas} does not divide the {dp} data-parallel ranks "
            f"({world} processes / tp={tp}): use one of {{{divisors}}}"
        )
    return errors


# ---------------------------------------------------------------------------------------------------------------------
# Tensor parallelism


class ReplicatedKV(ParallelStyle):
    """k_proj or v_proj when tp does not divide the kv heads: the weight is whole on every tp rank.

    Each rank computes all K heads and repeats, for each of its own H/tp query heads h, kv head h // (H/K), so that
    attention pairs them one to one: `enable_gqa` on an uneven local set would pair them wrongly and say nothing.
    A rank's gradient covers its own query heads only, so it is declared partial over tp; DTensor sums it.
    """

    def __init__(self, query_heads: int, kv_heads: int):
        self.query_heads, self.kv_heads = query_heads, kv_heads

    def _replicate_weight(self, name: str, module: nn.Module, mesh: DeviceMesh) -> None:
        weight = distribute_tensor(module.weight, mesh, [Replicate()], src_data_rank=None)
        module.register_parameter("weight", nn.Parameter(weight))

    def _local_heads(self, module: nn.Module, output: DTensor, mesh: DeviceMesh) -> Tensor:
        group, heads = self.query_heads // self.kv_heads, self.query_heads // mesh.size()
        first = mesh.get_local_rank() * heads  # this rank's query heads: first .. first + heads
        low, high = first // group, (first + heads - 1) // group + 1  # and the kv heads that they read
        kv = output.to_local(grad_placements=[Partial()]).unflatten(-1, (self.kv_heads, -1))  # (B, T, K, hd)
        kv = kv[:, :, low:high].repeat_interleave(group, dim=2)
        return kv[:, :, first - low * group :][:, :, :heads].flatten(-2)  # (B, T, H/tp * hd)

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        return distribute_module(module, device_mesh, self._replicate_weight, None, self._local_heads)


def top_level_plan() -> dict[str, ParallelStyle]:
    """Embedding, last norm, loss and head. The table at the top of this file reads along with it."""
    return {
        "model.embed_tokens": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
        "model.norm": SequenceParallel(),
        "loss": PrepareModuleInput(
            input_layouts=(Shard(1), None, None), desired_input_layouts=(Replicate(), None, None)
        ),
        "lm_head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Shard(-1), use_local_output=False),
    }


def block_plan(model: ModelConfig, tp: int) -> dict[str, ParallelStyle]:
    """One decoder block. `PrepareModuleInput` gathers a branch's input once for all the matrices that read it."""
    heads, kv_heads = model.num_attention_heads, model.num_key_value_heads
    kv = ColwiseParallel if kv_heads % tp == 0 else partial(ReplicatedKV, heads, kv_heads)
    return {
        "input_layernorm": SequenceParallel(),
        "self_attn": PrepareModuleInput(
            input_layouts=(Shard(1), None, None, None), desired_input_layouts=(Replicate(), None, None, None)
        ),
        "self_attn.q_proj": ColwiseParallel(),
        "self_attn.k_proj": kv(),
        "self_attn.v_proj": kv(),
        "self_attn.o_proj": RowwiseParallel(output_layouts=Shard(1)),
        "post_attention_layernorm": SequenceParallel(),
        "mlp": PrepareModuleInput(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),)),
        "mlp.gate_proj": ColwiseParallel(),
        "mlp.up_proj": ColwiseParallel(),
        "mlp.down_proj": RowwiseParallel(output_layouts=Shard(1)),
    }


def apply_tp(model: Llama, mesh: DeviceMesh) -> None:
    """Turn every parameter into a DTensor on the tp axis."""
    parallelize_module(model, mesh, top_level_plan(), src_data_rank=None)
    for block in model.model.layers:
        parallelize_module(block, mesh, block_plan(model.config, mesh.size()), src_data_rank=None)
    model.tie_weights()  # both were cut alike, Shard(0)


# ---------------------------------------------------------------------------------------------------------------------
# Activation checkpointing and compile: both replace a block's `forward`, so no parameter changes its name

KEPT_BY_SELECTIVE = [
    torch.ops.aten.mm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.higher_order.flex_attention,  # in compiled blocks; elsewhere it is a kernel of its own, and runs again
    torch.ops._c10d_functional.reduce_scatter_tensor.default,  # else backward repeats o_proj's communication
]


def selective_policy(ctx: object, op: object, *args: object, **kwargs: object) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in KEPT_BY_SELECTIVE else CheckpointPolicy.PREFER_RECOMPUTE


def keep_selected_activations(block: nn.Module) -> None:
    """Backward recomputes a block's forward except KEPT_BY_SELECTIVE: norms, RoPE, activations, all-gathers."""
    context_fn = partial(create_selective_checkpoint_contexts, selective_policy)
    block.forward = partial(checkpoint, block.forward, use_reentrant=False, context_fn=context_fn)


def keep_no_activations(block: nn.Module) -> None:
    """Backward recomputes a block's whole forward: only its input is kept."""
    block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def apply_compile(block: nn.Module) -> None:
    """Compile the block's forward: one graph for all blocks of a shape, and FSDP's gathering stays outside of it."""
    compiled = torch.compile(block.forward)

    def forward(x: Tensor, *rope_and_mask: Tensor | BlockMask | None) -> Tensor:
        # Under TP the embedding hands over its reduce-scatter as an AsyncCollectiveTensor, and the gradient of such an
        # input to a compiled region is lost (torch 2.13: the embedding's becomes zero). Cloning waits for it.
        return compiled(x.clone() if isinstance(x, AsyncCollectiveTensor) else x, *rope_and_mask)

    block.forward = forward


def apply_fsdp(model: Llama, mesh: DeviceMesh, config: ParallelConfig) -> None:
    """Shard each block, then what is left (embedding, norm, head), over dp_shard; replicate over dp_replicate."""
    policy = MixedPrecisionPolicy(
        param_dtype=getattr(torch, config.param_dtype),
        reduce_dtype=getattr(torch, config.reduce_dtype),
        cast_forward_inputs=False,  # it would cast the float32 RoPE tables; activations follow the embedding's dtype
    )
    shard = partial(fully_shard, mesh=mesh["dp_replicate", "dp_shard"], mp_policy=policy)
    for block in model.model.layers:
        shard(block, reshard_after_forward=config.reshard_after_forward)
    shard(model, reshard_after_forward=False)  # backward starts with the head, so freeing it would only gather it again
    for module in (model, *model.model.layers):
        module.set_gradient_divide_factor(1.0)  # gradients of a summed loss add up; FSDP's default is the mean
        module.set_force_sum_reduction_for_comms(True)  # else the factor goes through PREMUL_SUM, which gloo lacks


def parallelize(model: Llama, mesh: DeviceMesh, config: ParallelConfig) -> None:
    """Apply everything to a model on the meta device. No communication, no memory.

    The order matters. TP first, as it decides what a block computes. Selective checkpointing marks operators, so the
    compiler must see it; full checkpointing just calls the (compiled) block again. FSDP goes last, outside of all that,
    as it replaces the parameters between calls.
    """
    if mesh["tp"].size() > 1:
        apply_tp(model, mesh["tp"])
    for block in model.model.layers:
        if config.activation_checkpointing == "selective":
            keep_selected_activations(block)
        if config.compile:
            apply_compile(block)
        if config.activation_checkpointing == "full":
            keep_no_activations(block)
    if config.compile and mesh["tp"].size() == 1:  # with TP the loss communicates in the middle, see `loss_context`
        model.loss.cross_entropy = torch.compile(model.loss.cross_entropy)
    apply_fsdp(model, mesh, config)


def loss_context(mesh: DeviceMesh) -> contextlib.AbstractContextManager:
    """Around forward *and* backward: computes the loss on logits that stay sharded over the vocabulary."""
    return loss_parallel() if mesh["tp"].size() > 1 else contextlib.nullcontext()


# ---------------------------------------------------------------------------------------------------------------------
# Slices and sums


def place_shard(parameter: Tensor, full: Tensor) -> None:
    """Keep this rank's slice of `full`: the `place` that `Llama.init_weights` asks for. No communication.

    FSDP cuts the slice that TP left, so the innermost axis (tp) comes first.
    """
    mesh = parameter.device_mesh
    for axis, coordinate in reversed(list(enumerate(mesh.get_coordinate()))):
        placement = parameter.placements[axis]
        if not placement.is_replicate():
            chunks = full.chunk(mesh.size(axis), placement.dim)
            # rows that do not divide leave the last ranks with fewer rows, or none
            full = chunks[coordinate] if coordinate < len(chunks) else full.narrow(placement.dim, 0, 0)
    parameter.to_local().copy_(full)


def to_local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def sum_over_ranks(*values: Tensor) -> Tensor:
    """Sums of scalars over all ranks, as float64 on the device: one all-reduce, no sync."""
    sums = torch.stack([value.double() for value in values])
    dist.all_reduce(sums)
    return sums


def gradient_square(model: nn.Module) -> Tensor:
    """This rank's share of the squared norm of the whole model's gradient: `sum_over_ranks` of it is the whole.

    A rank adds the squares of its own slices. What is copied on several ranks (norms over tp, everything over
    dp_replicate) counts once: it is divided by the number of copies, which is ranks / slices.
    """
    gradients = [parameter.grad for parameter in model.parameters()]
    slices = [
        math.prod(g.device_mesh.size(axis) for axis, p in enumerate(g.placements) if not p.is_replicate())
        for g in gradients
    ]
    norms = torch.stack(torch._foreach_norm([gradient.to_local() for gradient in gradients])).double()
    weights = torch.tensor(slices, dtype=torch.float64).to(norms.device, non_blocking=True) / dist.get_world_size()
    return norms.square() @ weights


def scale_gradients(model: nn.Module, factor: Tensor) -> None:
    """Multiply every gradient by a scalar that lives on the device."""
    torch._foreach_mul_([parameter.grad.to_local() for parameter in model.parameters()], factor.float())
