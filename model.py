"""A Llama decoder in plain PyTorch: GQA, RoPE, RMSNorm, SwiGLU. Nothing here knows that it may run on many ranks.

Parameter names are those of Hugging Face's `LlamaForCausalLM`, and RoPE is the half-split form, so weights move in
and out with no key map (law 4; README.md lists the laws). The head axis of every `view` is -1: under tensor parallelism
(parallel.py) q/k/v hold only this rank's heads, and the same code runs on them.

Shapes, as seen by one rank (tp = 1 here; parallel.py lists what changes under TP):

    B rows   T sequence   D hidden_size   H query heads   K kv heads   hd head_dim   F intermediate_size   V vocab_size

How a model comes to life (train.py does exactly this):

    1. with torch.device("meta"): model = Llama(config)    shapes only, no memory, whatever the size
    2. parallel.parallelize(model, ...)                     decides which slice of each parameter this rank keeps
    3. model.to_empty(device=device)                        allocates those slices; parameters *and buffers* are garbage
    4. model.init_weights(seed, ...)                        writes every parameter and every buffer (law 5)
"""

import functools
import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

IGNORE_INDEX = -100  # a target that is no target: padding
LOGITS_AT_ONCE = 2**27  # at least, of a rank's rows, over all its TP peers: 2 GiB, at 16 bytes each at work


@dataclass
class ModelConfig:
    """The shape of the model, under Hugging Face's names. `configs` and train.py resolve the zeros."""

    vocab_size: Annotated[int, "rows of the embedding; 0 = the tokenizer's size, to a multiple of 128", (">=", 0)] = 0
    hidden_size: Annotated[int, "width of the residual stream", (">=", 1)] = 256
    intermediate_size: Annotated[int, "width of the feed-forward layer", (">=", 1)] = 768
    num_hidden_layers: Annotated[int, "number of decoder blocks", (">=", 1)] = 4
    num_attention_heads: Annotated[int, "query heads", (">=", 1)] = 8
    num_key_value_heads: Annotated[int, "key/value heads; each serves heads / kv heads query heads, GQA", (">=", 1)] = 4
    head_dim: Annotated[int, "width of one head; 0 = hidden_size / num_attention_heads", (">=", 0)] = 0
    max_position_embeddings: Annotated[int, "positions in the RoPE tables; 0 = data.seq_len", (">=", 0)] = 0
    tie_word_embeddings: Annotated[bool, "the head uses the embedding's weight"] = False
    rope_theta: Annotated[float, "base wavelength of RoPE", (">", 0)] = 10000.0
    rope_scaling: Annotated[
        dict[str, Any],
        'Llama 3\'s stretching of RoPE, {rope_type = "llama3", factor, low_freq_factor, high_freq_factor, '
        "original_max_position_embeddings}; {} = none",
    ] = field(default_factory=dict)
    rms_norm_eps: Annotated[float, "added to the mean square inside RMSNorm", (">", 0)] = 1e-5
    initializer_range: Annotated[float, "standard deviation of the initial weights", (">", 0)] = 0.02

    def __post_init__(self):
        self.head_dim = self.head_dim or self.hidden_size // max(1, self.num_attention_heads)


def rope_tables(config: ModelConfig, device: torch.device) -> Tensor:
    """cos and sin, (2, max_position_embeddings, hd), always float32: in bf16 positions above 256 collide.

    Row t is of the angles t * theta^(-2i/hd), i < hd/2, twice (half-split form). RoFormer, arXiv:2104.09864, eq. 34.
    """
    exponents = torch.arange(0, config.head_dim, 2, device=device, dtype=torch.float32) / config.head_dim
    frequencies = 1.0 / config.rope_theta**exponents  # (hd/2,)
    if scaling := config.rope_scaling:
        # Llama 3.1: waves that fit high_freq_factor times or more into the original context stay, those that fit less
        # than low_freq_factor times become `factor` times longer, in between it is blended
        fits = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        keep = ((fits - low) / (high - low)).clamp(0, 1)
        frequencies = frequencies * (keep + (1 - keep) / scaling["factor"])
    positions = torch.arange(config.max_position_embeddings, device=device, dtype=torch.float32)
    angles = torch.outer(positions, frequencies).repeat(1, 2)
    return torch.stack((angles.cos(), angles.sin()))


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs (i, i + hd/2) of x (B, H, T, hd), in float32. cos and sin are (T, hd), or (B, 1, T, hd)."""
    left, right = x.float().chunk(2, dim=-1)
    rotated = torch.cat((-right, left), dim=-1)
    return (x * cos + rotated * sin).to(x.dtype)


@dataclass(frozen=True)
class Mask:
    """Which tokens a query sees. This kind: itself and what stands before it.

    It holds no tensor. A fork's kind is a field that `mask_of` sets; blocks with equal masks share their tensor. In
    every kind, documents of one row do not see each other.
    """

    def sees(self, query: Tensor, key: Tensor) -> Tensor:
        """Whether the token at position `query` of a row sees the one at `key`; positions broadcast."""
        return key <= query

    def keys_per_query(self, seq_len: int) -> int:
        """For FLOPs: all, although half of them are hidden, as PaLM counts them, so that MFU compares."""
        return seq_len


def mask_of(config: ModelConfig, layer: int) -> Mask:
    """The one place that decides on a block's mask: forward, FLOPs, configs and explain.py follow."""
    return Mask()


def needs_mask(config: ModelConfig, document_mask: bool) -> bool:
    """Whether a block needs more than the fused causal kernel: FlexAttention, on a GPU."""
    return document_mask or any(mask_of(config, layer) != Mask() for layer in range(config.num_hidden_layers))


# For FlexAttention: not compiled, it makes the (T, T) matrices that it is there to avoid. Not at import time, as the
# compiler takes seconds to import.
compiled = functools.cache(torch.compile)


def dense_mask(mask: Mask, documents: Tensor) -> Tensor:
    """(B, 1, T, T), true where a token may look: `documents` (B, T) numbers those of each row."""
    token = torch.arange(documents.size(1), device=documents.device)
    return mask.sees(token[:, None], token) & (documents[:, None, :, None] == documents[:, None, None, :])


def block_mask(mask: Mask, documents: Tensor) -> BlockMask:
    """The same for FlexAttention, which leaves out the blocks where it is false throughout (arXiv:2412.05496)."""

    def visible(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return mask.sees(query, key) & (documents[b, key] == documents[b, query])

    rows, length = documents.shape
    return compiled(create_block_mask)(visible, rows, None, length, length, documents.device)


class Attention(nn.Module):
    """Self-attention with grouped queries (arXiv:2305.13245).

    Without a mask it is causal, which is all that one document a row asks for: on the right of it there is only
    padding, which no real token sees.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.head_dim = config.head_dim
        q_width, kv_width = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, q_width, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_width, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_width, bias=False)
        self.o_proj = nn.Linear(q_width, config.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | BlockMask | None) -> Tensor:
        heads = (x.size(0), x.size(1), -1, self.head_dim)
        # (B, H, T, hd), and (B, K, T, hd) twice
        q, k, v = (project(x).view(heads).transpose(1, 2) for project in (self.q_proj, self.k_proj, self.v_proj))
        q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        if q.is_cuda and q.dtype == torch.float32 and k.size(1) < q.size(1):
            # the kernel for float32 without a (T, T) matrix knows no grouped queries
            k, v = (x.repeat_interleave(q.size(1) // x.size(1), dim=1) for x in (k, v))
        if isinstance(mask, BlockMask):
            attend = flex_attention if torch.compiler.is_compiling() else compiled(flex_attention)
            y = attend(q, k, v, block_mask=mask, enable_gqa=True)
        else:
            y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=True)
        return self.o_proj(y.transpose(1, 2).flatten(2))  # (B, T, D)


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)). arXiv:2002.05202."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))  # (B, T, F) inside


class Block(nn.Module):
    """Pre-norm decoder block."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.mask = mask_of(config, layer)  # its kind; `forward` is handed the one for these rows
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = FeedForward(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | BlockMask | None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask)
        return x + self.mlp(self.post_attention_layernorm(x))


def summed_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), targets, ignore_index=IGNORE_INDEX, reduction="sum")


class LossOfChunks(torch.autograd.Function):
    """`SummedLoss` with gradients: those of a chunk follow its loss at once, and backward only hands them over."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, head: nn.Linear, loss_of: Callable, size: int):
        loss, hidden_grads = 0.0, []
        weight_grad: Any = None
        for chunk, some in zip(hidden.detach().split(size), targets.split(size), strict=True):
            logits = head(chunk).requires_grad_()
            with torch.enable_grad():
                chunk_loss = loss_of(logits, some)
            (grad,) = torch.autograd.grad(chunk_loss, logits)
            loss = loss + chunk_loss.detach()
            hidden_grads.append(grad @ weight)
            more = grad.T @ chunk
            weight_grad = more.float() if weight_grad is None else weight_grad.add_(more)  # bf16 would round each sum
            del logits, chunk_loss, grad, more  # else they live through the next chunk
        ctx.save_for_backward(torch.cat(hidden_grads), weight_grad.to(weight.dtype))
        return loss

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden_grad, weight_grad = ctx.saved_tensors
        # in place, which saves copies, and has autograd refuse a second backward
        return hidden_grad.mul_(grad), weight_grad.mul_(grad), None, None, None, None


def logits_at_once(device: torch.device) -> int:
    """How large a chunk of the loss may be. On a GPU a tenth of its memory, as each chunk has a price.

    For each the head's whole float32 gradient is read and written again: with the shape of Llama 3.2 1B, 16,384 tokens
    and 2^27 logits 16 times, some 3 GB each, which is near 5 % of a step (estimated from the bandwidth of an H100).
    """
    memory = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0
    return max(LOGITS_AT_ONCE, memory // 10 // 16)


class SummedLoss(nn.Module):
    """The *sum* of the float32 loss of head(hidden) over real targets: hidden (B, T, D), targets (B, T).

    With a large vocabulary, the logits and what backward makes of them would be most of all memory. So they come in
    chunks, of which nothing is kept or computed again. It is a module so that a plan can gather `hidden` once for all.
    """

    cross_entropy = staticmethod(summed_cross_entropy)  # or a compiled one

    def forward(self, hidden: Tensor, targets: Tensor, head: nn.Linear) -> Tensor:
        hidden, targets = hidden.flatten(0, 1), targets.flatten()  # (B * T, D), (B * T)
        size = max(1, logits_at_once(hidden.device) // head.out_features)
        if torch.is_grad_enabled():
            return LossOfChunks.apply(hidden, head.weight, targets, head, self.cross_entropy, size)
        chunks = zip(hidden.split(size), targets.split(size), strict=True)
        return sum(summed_cross_entropy(head(chunk), some) for chunk, some in chunks)


class Llama(nn.Module):
    """The whole model. Build it on the meta device, then `to_empty` and `init_weights` (see the top of this file)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        # A name space: it gives the parameters Hugging Face's names
        self.model = nn.ModuleDict({"embed_tokens": embedding, "layers": layers, "norm": norm})
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.loss = SummedLoss()
        self.tie_weights()
        self.register_buffer("rope", rope_tables(config, self.lm_head.weight.device), persistent=False)

    def tie_weights(self) -> None:
        """Make head and embedding one parameter again, if configured: replacing either one unties them."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, input_ids: Tensor, targets: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
        """Logits (B, T, V) of input_ids (B, T); with targets (B, T), the *sum* of the float32 loss over real targets.

        A sum, not a mean: whoever calls knows how many targets the whole global batch has, this rank does not (law 1).
        Where a row holds several documents, positions (B, T) count from 0 in each, and none sees another.
        """
        # (T, hd) each, or with positions (B, 1, T, hd)
        cos, sin = self.rope[:, : input_ids.size(1)] if positions is None else self.rope[:, positions].unsqueeze(2)
        documents = torch.zeros_like(input_ids) if positions is None else (positions == 0).cumsum(1)  # (B, T)
        kinds = {block.mask for block in self.model.layers if positions is not None or block.mask != Mask()}
        # FlexAttention has no backward on a CPU
        masks = {kind: (block_mask if input_ids.is_cuda else dense_mask)(kind, documents) for kind in kinds}
        x = self.model.embed_tokens(input_ids)  # (B, T, D)
        for block in self.model.layers:
            x = block(x, cos, sin, masks.get(block.mask))  # without one, the causal kernel is enough
        x = self.model.norm(x)
        return self.lm_head(x) if targets is None else self.loss(x, targets, self.lm_head)

    @torch.no_grad()
    def init_weights(self, seed: int, place: Callable[[Tensor, Tensor], object] = Tensor.copy_) -> None:
        """Write every parameter and buffer (law 5) as a function of (seed, parameter name) alone, on any mesh (law 1).

        Each full parameter is drawn from a generator of its own, on its device, one at a time; `place(parameter, full)`
        then keeps what this rank owns. Normal with `initializer_range`, norms at one, and the two projections that
        write into the residual stream scaled by 1/sqrt(2 * layers), so that its variance does not grow with depth
        (GPT-2, section 2.3).
        """
        self.tie_weights()  # `to_empty` gave each its own memory
        for name, parameter in self.named_parameters():
            full = torch.ones(parameter.shape, device=parameter.device)
            if parameter.ndim > 1:
                residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                std = self.config.initializer_range / math.sqrt(2 * self.config.num_hidden_layers if residual else 1)
                digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
                generator = torch.Generator(parameter.device).manual_seed(int.from_bytes(digest[:7], "big"))
                full.normal_(0.0, std, generator=generator)
            place(parameter, full)
        self.rope.copy_(rope_tables(self.config, self.rope.device))


def parameter_count(config: ModelConfig) -> int:
    """Number of parameters, embedding and head included; a tied one counts once."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in Llama(config).parameters())


def multiplications(module: nn.Module, seq_len: int) -> int:
    """Forward's for one token by the module itself, not by those in it: one for each weight, unless it is named here.

    Norms count with all weights, as in PaLM's N. The embedding table is looked up.
    """
    if isinstance(module, Block):  # each head's scores, and its sum of values
        return 2 * module.self_attn.q_proj.out_features * module.mask.keys_per_query(seq_len)
    return 0 if isinstance(module, nn.Embedding) else sum(p.numel() for p in module.parameters(recurse=False))


def flops_per_token(config: ModelConfig, seq_len: int) -> int:
    """Model FLOPs of forward and backward for one token, 6 N + 12 L H hd T (PaLM, arXiv:2204.02311, appendix B).

    Backward multiplies twice as often as forward, and each time one adds too. Recomputed activations do not count.
    """
    with torch.device("meta"):
        return 6 * sum(multiplications(module, seq_len) for module in Llama(config).modules())
