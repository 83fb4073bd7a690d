"""How one model becomes many: mesh, tensor parallelism (TP), activation checkpointing, compile, FSDP2. Nothing else.

The mesh always has three axes, also when some have size 1, so no code asks whether parallelism is on. Eight ranks
with dp_replicate = 1 and tp = 2, on one node (HSDP, dp_replicate > 1, adds such sheets, one per replica):

                    tp 0      tp 1
    dp_shard 0    rank 0    rank 1     TP peers, side by side: the same rows of tokens, different slices of a matrix.
    dp_shard 1    rank 2    rank 3     They talk several times in every block, so they are neighbours in one node.
    dp_shard 2    rank 4    rank 5     DP peers, one below the other: different rows. Each keeps 1/dp_shard of its slice
    dp_shard 3    rank 6    rank 7     and gathers the others' just before a block runs (FSDP).

Ranks talk in three ways. An all-gather gives each rank the slices of all; a reduce-scatter adds up what the ranks have
and leaves each a slice of the sum; an all-reduce leaves each the whole sum. A DTensor is torch's tensor that knows how
it lies on the mesh: cut along a dim (Shard), the same on all ranks (Replicate), or a sum of which each has an addend
(Partial). docs/guide.md explains all this from one rank on.

What TP does. Shapes are local to one rank: B rows, T sequence, D hidden, H and K heads, hd head dim, F feed-forward,
V vocabulary. A branch starts with an all-gather and ends with a reduce-scatter; between blocks T is sharded. Of a
weight (out, in), OUT_FEATURES are its rows, Shard(0), and IN_FEATURES its columns, Shard(1):

    module                     weight on tp    input                  output                       collective (forward)
    embed_tokens               rows, of V      (B, T) ids             (B, T/tp, D)                 reduce-scatter
    input_layernorm            whole           (B, T/tp, D)           (B, T/tp, D)
    self_attn                                  (B, T/tp, D)           (B, T, D) to q, k and v      all-gather
      q_proj                   OUT_FEATURES    (B, T, D)              (B, T, H/tp * hd)
      k_proj, v_proj           OUT_FEATURES    (B, T, D)              (B, T, K/tp * hd)
      o_proj                   IN_FEATURES     (B, T, H/tp * hd)      (B, T/tp, D)                 reduce-scatter
    post_attention_layernorm   whole           (B, T/tp, D)           (B, T/tp, D)
    mlp                                        (B, T/tp, D)           (B, T, D) to gate and up     all-gather
      gate_proj, up_proj       OUT_FEATURES    (B, T, D)              (B, T, F/tp)
      down_proj                IN_FEATURES     (B, T, F/tp)           (B, T/tp, D)                 reduce-scatter
    norm                       whole           (B, T/tp, D)           (B, T/tp, D)
    loss                                       (B, T/tp, D)           (B, T, D) to lm_head         all-gather
      lm_head                  OUT_FEATURES    (n, D), n of B * T     (n, V/tp), kept sharded
      cross-entropy                            (n, V/tp)              sum, the same on all tp      all-reduces of (n,)

The backward pass mirrors it: an all-gather becomes a reduce-scatter and the other way round. What is whole on every tp
rank (norms; k and v where tp does not divide the kv heads) has its gradient summed over tp in addition. Megatron-LM,
arXiv:1909.08053; sequence parallelism, arXiv:2205.05198; FSDP, arXiv:2304.11277.

Four questions on the way:

Why is column-parallel Shard(0)? The papers write y = x A, with A (in, out), and give each rank some columns of A.
nn.Linear keeps A transposed, as its weight W (out, in), and computes x W^T: columns of A are rows of W. So
ColwiseParallel cuts OUT_FEATURES, and a rank computes some outputs from all inputs; RowwiseParallel cuts IN_FEATURES,
and a rank computes an addend of every output from some inputs.

Why are norms in the plan, where nothing of them is cut? A rank normalises its own T/tp positions only, so its gradient
of the weight is an addend. SequenceParallel makes the weight a DTensor that is replicated, and the input one that is
cut along SEQUENCE; from these two DTensor knows that the gradient is partial, and sums it. A plain weight would compute
the same forward, and then each rank would change its copy in its own way.

Why is no gradient counted tp times, when all TP peers call backward on the same loss? To DTensor, what is replicated is
one value, not tp of them. The loss is a sum of the ranks' addends, and backward hands its gradient, 1, to each addend
as it is; to send it through another all-reduce would be the derivative of tp losses added up. From there on each rank
has the gradient of what it computed itself, and whatever is partial is summed once.

Why is the head's input whole, when its plan says SEQUENCE? A style's input_layouts says what to take a plain tensor
for, while a DTensor knows its own layout. In training, `loss` has gathered the hidden states before it cuts them into
chunks, and the head finds nothing left to do. Asked for logits, the model gives it what leaves `norm`, and it gathers.
"""

import contextlib
import math
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_module
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from model import Llama, ModelConfig

SEQUENCE = Shard(1)  # T of activations (B, T, D)
VOCABULARY = Shard(-1)  # V of logits
WHOLE = Replicate()  # the same on every tp rank


@dataclass
class ParallelConfig:
    """The mesh and what is done to each block. The data-parallel size is never configured: it is world size / tp."""

    tp: Annotated[
        int | Literal["auto"],
        "tensor-parallel ranks; auto: on GPUs the fewest that the batch allows, on CPUs TP inside a node and DP across",
        (">=", 1),
    ] = "auto"
    dp_replicate: Annotated[int, "copies of the sharded model: 1 = FSDP, more = HSDP", (">=", 1)] = 1
    param_dtype: Annotated[Literal["float32", "bfloat16"], "dtype of compute and of gathered parameters"] = "float32"
    reduce_dtype: Annotated[Literal["float32", "bfloat16"], "dtype in which gradients are summed over DP"] = "float32"
    activation_checkpointing: Annotated[
        Literal["none", "selective", "full"],
        "what backward recomputes: nothing; all but matmuls and attention; whole blocks",
    ] = "none"
    compile: Annotated[bool, "torch.compile each block, and without TP the cross-entropy"] = False
    reshard_after_forward: Annotated[bool, "free gathered weights after forward, gather again in backward"] = True
    timeout_seconds: Annotated[int, "after the first step: how long ranks wait for one of them", (">=", 1)] = 600


def build_mesh(config: ParallelConfig, device: torch.device) -> DeviceMesh:
    """The ("dp_replicate", "dp_shard", "tp") mesh over all ranks; `config.tp` is resolved."""
    shape = config.dp_replicate, dist.get_world_size() // (config.dp_replicate * config.tp), config.tp
    return init_device_mesh(device.type, shape, mesh_dim_names=("dp_replicate", "dp_shard", "tp"))


def dp_rank_and_size(mesh: DeviceMesh) -> tuple[int, int]:
    """This rank's place among the ranks that see different rows, and their number. TP peers share a place (law 8)."""
    replicate, shard, _ = mesh.get_coordinate()
    return replicate * mesh["dp_shard"].size() + shard, mesh["dp_replicate"].size() * mesh["dp_shard"].size()


# ---------------------------------------------------------------------------------------------------------------------
# The two plans. Beside each line: the local shape that leaves the module, and what is sent for it, forward | backward


def top_level_plan() -> dict[str, ParallelStyle]:
    """Embedding, last norm, loss and head."""
    return {
        # (B, T/tp, D). Each rank looks up what is in its rows, reduce-scatter | all-gather
        "model.embed_tokens": RowwiseParallel(input_layouts=WHOLE, output_layouts=SEQUENCE),
        # (B, T/tp, D). Nothing | all-reduce of the weight's gradient
        "model.norm": SequenceParallel(),
        # (B, T, D) for the head's chunks, a sum for all. All-gather, then all-reduces in the loss | reduce-scatter
        "loss": PrepareModuleInput(input_layouts=(SEQUENCE, None, None), desired_input_layouts=(WHOLE, None, None)),
        # (n, V/tp). Nothing | nothing; without targets (B, T, V/tp), all-gather
        "lm_head": ColwiseParallel(input_layouts=SEQUENCE, output_layouts=VOCABULARY, use_local_output=False),
    }


def block_plan(model: ModelConfig, tp: int) -> dict[str, ParallelStyle]:
    """One decoder block. `PrepareModuleInput` gathers a branch's input once for all the matrices that read it."""
    heads, kv_heads = model.num_attention_heads, model.num_key_value_heads
    kv = ColwiseParallel if kv_heads % tp == 0 else partial(ReplicatedKV, heads, kv_heads)
    return {
        # (B, T/tp, D). Nothing | all-reduce of the weight's gradient
        "input_layernorm": SequenceParallel(),
        # (B, T, D) to q, k and v. All-gather | reduce-scatter
        "self_attn": PrepareModuleInput(
            input_layouts=(SEQUENCE, None, None, None), desired_input_layouts=(WHOLE, None, None, None)
        ),
        "self_attn.q_proj": ColwiseParallel(),  # (B, T, H/tp * hd). Nothing | nothing
        "self_attn.k_proj": kv(),  # (B, T, K/tp * hd), ReplicatedKV: H/tp heads. Nothing | nothing, or its all-reduce
        "self_attn.v_proj": kv(),  # as k
        "self_attn.o_proj": RowwiseParallel(output_layouts=SEQUENCE),  # (B, T/tp, D). Reduce-scatter | all-gather
        # (B, T/tp, D). Nothing | all-reduce of the weight's gradient
        "post_attention_layernorm": SequenceParallel(),
        # (B, T, D) to gate and up. All-gather | reduce-scatter
        "mlp": PrepareModuleInput(input_layouts=(SEQUENCE,), desired_input_layouts=(WHOLE,)),
        "mlp.gate_proj": ColwiseParallel(),  # (B, T, F/tp). Nothing | nothing
        "mlp.up_proj": ColwiseParallel(),  # (B, T, F/tp). Nothing | nothing
        "mlp.down_proj": RowwiseParallel(output_layouts=SEQUENCE),  # (B, T/tp, D). Reduce-scatter | all-gather
    }


# ---------------------------------------------------------------------------------------------------------------------
# Tensor parallelism


class ReplicatedLinear(ParallelStyle):
    """A matrix that is whole on every tp rank, where each rank goes on with a part of the output that is its own.

    The rule: what is computed whole on each rank but consumed sharded has a partial gradient. A rank hears only of its
    own part, so what backward brings is an addend, for the output, the weight and the input alike. Unless told so,
    `to_local` takes it for the whole gradient, the same on all ranks, and nothing is summed. (Where all ranks do the
    same with the whole output, theirs is the whole gradient, and this style would count it tp times.)

    The input is a replicated DTensor, as `PrepareModuleInput` makes it.
    """

    def own_part(self, output: Tensor, mesh: DeviceMesh) -> Tensor:
        """What the module returns on this rank of its local output; the whole, if whoever gets it takes its part."""
        return output

    def _localize(self, module: nn.Module, output: DTensor, mesh: DeviceMesh) -> Tensor:
        return self.own_part(output.to_local(grad_placements=[Partial()]), mesh)

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        return distribute_module(module, device_mesh, None, None, self._localize)  # None: all parameters are replicated


class ReplicatedKV(ReplicatedLinear):
    """k_proj or v_proj when tp does not divide the kv heads.

    Each rank computes all K heads and repeats, for each of its own H/tp query heads h, kv head h // (H/K), so that
    attention pairs them one to one: `enable_gqa` on an uneven local set would pair them wrongly and say nothing.
    """

    def __init__(self, query_heads: int, kv_heads: int):
        self.query_heads, self.kv_heads = query_heads, kv_heads

    def own_part(self, output: Tensor, mesh: DeviceMesh) -> Tensor:
        group, heads = self.query_heads // self.kv_heads, self.query_heads // mesh.size()
        first = mesh.get_local_rank() * heads  # this rank's query heads: first .. first + heads
        low, high = first // group, (first + heads - 1) // group + 1  # and the kv heads that they read
        kv = output.unflatten(-1, (self.kv_heads, -1))  # (B, T, K, hd)
        kv = kv[:, :, low:high].repeat_interleave(group, dim=2)
        return kv[:, :, first - low * group :][:, :, :heads].flatten(-2)  # (B, T, H/tp * hd)


def apply_tp(model: Llama, mesh: DeviceMesh) -> None:
    """Turn every parameter into a DTensor on the tp axis. RuntimeError names those that the plans leave out."""
    parallelize_module(model, mesh, top_level_plan(), src_data_rank=None)
    for block in model.model.layers:
        parallelize_module(block, mesh, block_plan(model.config, mesh.size()), src_data_rank=None)
    model.tie_weights()  # both were cut alike, by rows
    if left_out := [name for name, parameter in model.named_parameters() if not isinstance(parameter, DTensor)]:
        # In training this would be silent: each rank would go its own way with its part of the gradient
        raise RuntimeError(f"the TP plans have no line for {', '.join(left_out)}: see the table in parallel.py")


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

NOT_RANDOM = {"use_reentrant": False, "preserve_rng_state": False}  # there is no dropout: no state to be kept


def selective_policy(ctx: object, op: object, *args: object, **kwargs: object) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in KEPT_BY_SELECTIVE else CheckpointPolicy.PREFER_RECOMPUTE


def keep_selected_activations(block: nn.Module) -> None:
    """Backward recomputes a block's forward except KEPT_BY_SELECTIVE: norms, RoPE, activations, all-gathers."""
    context_fn = partial(create_selective_checkpoint_contexts, selective_policy)
    block.forward = partial(checkpoint, block.forward, **NOT_RANDOM, context_fn=context_fn)


def keep_no_activations(block: nn.Module) -> None:
    """Backward recomputes a block's whole forward: only its input is kept."""
    block.forward = partial(checkpoint, block.forward, **NOT_RANDOM)


def apply_compile(block: nn.Module) -> None:
    """Compile the block's forward: one graph for all blocks of a shape, and FSDP's gathering stays outside of it."""
    compiled = torch.compile(block.forward)

    def forward(x, *rope_and_mask):
        # Under TP the embedding hands over its reduce-scatter as an AsyncCollectiveTensor, and the gradient of such an
        # input to a compiled region is lost (torch 2.13: the embedding's becomes zero). Cloning waits for it.
        return compiled(x.clone() if isinstance(x, AsyncCollectiveTensor) else x, *rope_and_mask)

    block.forward = forward


def apply_fsdp(model: Llama, mesh: DeviceMesh, config: ParallelConfig) -> None:
    """Shard each block, then what is left (embedding, norm, head), over dp_shard; replicate over dp_replicate."""
    param_dtype, reduce_dtype = getattr(torch, config.param_dtype), getattr(torch, config.reduce_dtype)
    # Forward's inputs are not cast: the RoPE tables are to stay float32, and activations follow the embedding's dtype
    policy = MixedPrecisionPolicy(param_dtype, reduce_dtype, cast_forward_inputs=False)
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


def sums_once(config: ParallelConfig) -> bool:
    """Whether HSDP sums gradients over dp_replicate once a step, not once a micro-step: until then each replica adds up
    its own, in reduce_dtype, for which bfloat16 is too coarse.
    """
    return config.reduce_dtype == "float32"


def sum_over_replicas(model: Llama, config: ParallelConfig, last: bool) -> None:
    """Before each micro-step: `last` is whether it is the last one of a step."""
    model.set_requires_all_reduce(last or not sums_once(config))


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


def whole(parameter: Tensor) -> Tensor:
    """The full parameter on every rank, from all their slices: for what needs whole matrices. Collective.

    Of a gradient or an optimizer's state too. Go through them in the model's order, which is the same on all ranks.
    """
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


def to_local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def sum_over_ranks(*values: Tensor) -> Tensor:
    """Sums of scalars over all ranks, as float64 on the device: one all-reduce, no sync."""
    sums = torch.stack([value.double() for value in values])
    dist.all_reduce(sums)
    return sums


def gradient_square(model: nn.Module) -> Tensor:
    """This rank's share of the squared norm of the whole model's gradient: `sum_over_ranks` of it is the whole (law 1).

    A rank adds the squares of its own slices. What is copied on several ranks (norms over tp, everything over
    dp_replicate) counts once: it is divided by the number of copies, which is ranks / slices.
    """
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    if unused := [name for name, gradient in gradients.items() if gradient is None]:
        raise RuntimeError(f"no gradient has reached {', '.join(unused)}: every rank must use every parameter")
    slices = [
        math.prod(g.device_mesh.size(axis) for axis, p in enumerate(g.placements) if not p.is_replicate())
        for g in gradients.values()
    ]
    norms = torch.stack(torch._foreach_norm([gradient.to_local() for gradient in gradients.values()])).double()
    weights = torch.tensor(slices, dtype=torch.float64).to(norms.device, non_blocking=True) / dist.get_world_size()
    return norms.square() @ weights


def scale_gradients(model: nn.Module, factor: Tensor) -> None:
    """Multiply every gradient by a scalar that lives on the device."""
    torch._foreach_mul_([parameter.grad.to_local() for parameter in model.parameters()], factor.float())
