"""Law 4 (it is a Llama) and law 5 (nothing is uninitialised), on one process."""

import math
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import transformers
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import model as model_module
from model import IGNORE_INDEX, Llama, Mask, ModelConfig, flops_per_token, needs_mask, parameter_count

CONFIGS = Path(__file__).parent.parent / "configs"
SHAPES = {
    "grouped": {"num_attention_heads": 8, "num_key_value_heads": 2},
    "one kv head": {"num_attention_heads": 6, "num_key_value_heads": 1, "hidden_size": 48},
    "a kv head each": {"num_attention_heads": 4, "num_key_value_heads": 4},
    "wide heads": {"num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 32, "hidden_size": 48},
    "tied": {"tie_word_embeddings": True},
    "llama 3 rope": {
        "rope_theta": 500000.0,
        "head_dim": 32,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    },
    "odd sizes": {"vocab_size": 131, "intermediate_size": 77, "rope_theta": 500000.0, "rms_norm_eps": 1e-6},
}


def make_config(**changes) -> ModelConfig:
    sizes = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    return ModelConfig(**{**sizes, "max_position_embeddings": 64, **changes})


def make_model(config: ModelConfig, seed: int = 0) -> Llama:
    with torch.device("meta"):
        model = Llama(config)
    model.to_empty(device="cpu")
    model.init_weights(seed)
    return model


def sharp_model(**changes) -> Llama:
    """Weights larger than at the start, so that attention is not almost uniform."""
    model = make_model(make_config(**changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0 if parameter.ndim > 1 else 1.3)
    return model


def reference(model: Llama) -> transformers.LlamaForCausalLM:
    """Hugging Face's model with the same weights, which need no key map."""
    c = model.config
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    names += ("num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps")
    names += ("tie_word_embeddings",)
    rope = {"rope_type": "default", **c.rope_scaling, "rope_theta": c.rope_theta}
    config = transformers.LlamaConfig(**{name: getattr(c, name) for name in names}, rope_parameters=rope)
    theirs = transformers.LlamaForCausalLM(config)
    theirs.load_state_dict(model.state_dict(), strict=True)
    return theirs


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_logits_and_gradients_equal_transformers(shape):
    """To float32's rounding: today the operations are the same to the bit, but theirs may come in another order."""
    model = sharp_model(**shape)
    theirs = reference(model)
    torch.manual_seed(0)
    input_ids = torch.randint(model.config.vocab_size, (3, 41))
    targets = torch.randint(model.config.vocab_size, (3, 41))
    targets[1, 7:] = IGNORE_INDEX

    logits = theirs(input_ids).logits
    torch.testing.assert_close(model(input_ids), logits, rtol=1e-5, atol=1e-5)

    theirs_loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    loss = model(input_ids, targets)
    torch.testing.assert_close(loss, theirs_loss, rtol=1e-6, atol=0)
    loss.backward()
    theirs_loss.backward()
    for name, ours in model.named_parameters():
        other = theirs.get_parameter(name)
        error = (ours.grad - other.grad).norm() / other.grad.norm()
        assert error < 1e-5, f"{name}: {error}"


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("tokens_at_once", [1, 7, 41, 1000])
def test_the_loss_in_chunks_is_that_of_whole_logits(monkeypatch, tokens_at_once, tied):
    """With its gradients, whatever backward starts with; without; and never twice, which would scale them twice.

    A hundred float32 losses added up in another order differ by a few ulps of 6e-8, their gradients by some more.
    """
    monkeypatch.setattr(model_module, "LOGITS_AT_ONCE", tokens_at_once * 128)
    whole, chunks = (sharp_model(tie_word_embeddings=tied) for _ in range(2))
    input_ids, targets, positions = packed_rows([20, 1, 30, 9], [60])
    logits = whole(input_ids, positions=positions).flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, targets.flatten(), reduction="sum")
    loss = chunks(input_ids, targets, positions)
    with torch.no_grad():
        for computed in (loss, chunks(input_ids, targets, positions)):
            torch.testing.assert_close(computed, expected, rtol=2e-6, atol=0)
    (3 * expected).backward()
    (3 * loss).backward(retain_graph=True)
    for name, parameter in chunks.named_parameters():
        error = (parameter.grad - whole.get_parameter(name).grad).norm() / parameter.grad.norm()
        assert error < 1e-5, f"{name}: {error}"
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_every_parameter_and_buffer_is_written():
    with torch.device("meta"):
        model = Llama(make_config())
    model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(math.nan)
    model.init_weights(0)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        assert tensor.isfinite().all(), name
    assert model(torch.arange(8)[None]).isfinite().all()


def test_initial_weights_are_a_function_of_seed_and_name():
    first, again, other = make_model(make_config()), make_model(make_config()), make_model(make_config(), seed=1)
    shallow = make_model(make_config(num_hidden_layers=1))
    for name, parameter in first.named_parameters():
        assert torch.equal(parameter, again.get_parameter(name))
        if parameter.ndim > 1:
            assert not torch.equal(parameter, other.get_parameter(name))
            if name in shallow.state_dict() and "o_proj" not in name and "down_proj" not in name:
                assert torch.equal(parameter, shallow.get_parameter(name))
    layers = first.model.layers
    assert not torch.equal(layers[0].mlp.up_proj.weight, layers[1].mlp.up_proj.weight)
    assert not torch.equal(layers[0].mlp.up_proj.weight, layers[0].mlp.gate_proj.weight)


def test_residual_projections_are_scaled_with_depth():
    model = make_model(make_config(hidden_size=256, intermediate_size=512, num_hidden_layers=8))
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            residual = name.endswith(("o_proj.weight", "down_proj.weight"))
            expected = 0.02 / math.sqrt(16) if residual else 0.02
            assert parameter.std().item() == pytest.approx(expected, rel=0.03), name  # > 4 sigma of 32k numbers


def test_state_dict_has_exactly_the_parameters():
    model = make_model(make_config())
    assert set(model.state_dict()) == {name for name, _ in model.named_parameters()}


def test_tied_weights_stay_one_parameter():
    model = make_model(make_config(tie_word_embeddings=True))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert parameter_count(model.config) == parameter_count(make_config()) - 128 * 64


def test_far_positions_have_angles_of_their_own():
    """In bf16, positions above 256 would share theirs."""
    model = make_model(make_config(max_position_embeddings=1024))
    assert model.rope.dtype == torch.float32
    angles = torch.cat(tuple(model.rope), dim=1)
    assert len(angles.unique(dim=0)) == 1024


def test_a_pad_on_the_right_changes_no_real_token():
    """But for rounding: kernels sum in another order where rows are longer."""
    model = make_model(make_config())
    row = torch.randint(128, (1, 20))
    padded = torch.cat((row, torch.full((1, 12), 5)), dim=1)
    torch.testing.assert_close(model(padded)[:, :20], model(row), rtol=1e-5, atol=1e-6)


def packed_rows(*rows: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random input_ids and targets, and positions in documents of the given lengths; the next BOS is no target."""
    generator = torch.Generator().manual_seed(0)
    positions = torch.stack([torch.cat([torch.arange(length) for length in lengths]) for lengths in rows])
    input_ids, targets = torch.randint(128, (2, *positions.shape), generator=generator)
    targets[:, :-1][positions[:, 1:] == 0] = IGNORE_INDEX
    return input_ids, targets, positions


def test_packed_documents_have_the_logits_loss_and_gradients_that_they_have_alone():
    """To 1e-5, as kernels sum in another order where rows are longer; without positions they see each other."""
    rows = ([20, 1, 30, 9], [60], [2, 50, 8])
    input_ids, targets, positions = packed_rows(*rows)
    packed, alone = (sharp_model(num_attention_heads=8, num_key_value_heads=2) for _ in range(2))
    loss, total = packed(input_ids, targets, positions), 0.0
    logits, mixed = packed(input_ids, positions=positions), packed(input_ids)
    for row, lengths in enumerate(rows):
        for end, length in zip(torch.tensor(lengths).cumsum(0).tolist(), lengths, strict=True):
            document = slice(row, row + 1), slice(end - length, end)
            total += alone(input_ids[document], targets[document])
            torch.testing.assert_close(logits[document], alone(input_ids[document]), rtol=1e-5, atol=1e-5)
            assert (end == length) == torch.allclose(mixed[document], logits[document], rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(loss, total, rtol=1e-6, atol=0)
    loss.backward()
    total.backward()
    for name, parameter in packed.named_parameters():
        expected = alone.get_parameter(name).grad
        assert (parameter.grad - expected).norm() < 1e-5 * expected.norm(), name


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@torch.no_grad()
def test_flex_attention_is_given_the_mask_that_a_cpu_uses(monkeypatch):
    """What runs on a GPU, here without its kernel: forward only, on rows that no block of 128 divides.

    To a few ulps of float32, 6e-8, since it takes softmax in another order.
    """
    batch, model = packed_rows([100, 1, 150, 49], [300], [3, 290, 7]), sharp_model(max_position_embeddings=300)
    dense = model(*batch)
    monkeypatch.setattr(model_module, "compiled", lambda function: function)
    monkeypatch.setattr(model_module, "dense_mask", model_module.block_mask)
    torch.testing.assert_close(model(*batch), dense, rtol=1e-6, atol=0)


# ---------------------------------------------------------------------------------------------------------------------
# Kinds of mask: what a fork writes for a sliding window in every second block

WINDOW = 7


@dataclass(frozen=True)
class Window(Mask):
    size: int

    def sees(self, query, key):
        return super().sees(query, key) & (query - key < self.size)

    def keys_per_query(self, seq_len):
        return min(seq_len, self.size)


def window_in_every_second_block(config: ModelConfig, layer: int) -> Mask:
    return Window(WINDOW) if layer % 2 else Mask()


@pytest.fixture
def windows(monkeypatch):
    monkeypatch.setattr(model_module, "mask_of", window_in_every_second_block)


def test_every_block_sees_what_its_mask_says(monkeypatch, windows):
    """With and without documents, against masks that are written out here; and each kind is made once."""
    made, dense_mask = [], model_module.dense_mask
    monkeypatch.setattr(model_module, "dense_mask", lambda mask, of: made.append(mask) or dense_mask(mask, of))
    model = sharp_model(num_hidden_layers=4)
    input_ids, _, positions = packed_rows([20, 1, 30, 9], [60])
    for given in (None, positions):
        made.clear()
        logits = model(input_ids, positions=given)
        assert sorted(made, key=str) == [*([] if given is None else [Mask()]), Window(WINDOW)]
        places = torch.arange(60).expand(2, 60) if given is None else given  # a document begins at i - positions[i]
        cos, sin = (table[places].unsqueeze(1) for table in model.rope)
        causal, window = torch.zeros(2, 2, 1, 60, 60, dtype=torch.bool)
        for row, of_row in enumerate(places.tolist()):
            for query, place in enumerate(of_row):
                causal[row, 0, query, query - place : query + 1] = True
                window[row, 0, query, max(query - place, query - WINDOW + 1) : query + 1] = True
        x = model.model.embed_tokens(input_ids)
        for layer, block in enumerate(model.model.layers):
            x = block(x, cos, sin, window if layer % 2 else causal)
        torch.testing.assert_close(logits, model.lm_head(model.model.norm(x)), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@torch.no_grad()
def test_flex_attention_is_given_every_kind_of_mask(monkeypatch, windows):
    """As above, forward only, on a CPU."""
    (input_ids, _, positions), model = packed_rows([100, 1, 150, 49], [300]), sharp_model(max_position_embeddings=300)
    dense = [model(input_ids, positions=given) for given in (None, positions)]
    monkeypatch.setattr(model_module, "compiled", lambda function: function)
    monkeypatch.setattr(model_module, "dense_mask", model_module.block_mask)
    for given, expected in zip((None, positions), dense, strict=True):
        torch.testing.assert_close(model(input_ids, positions=given), expected, rtol=1e-5, atol=1e-5)


def test_padded_rows_need_no_mask(monkeypatch):
    """They take the fused causal kernel: so FlexAttention's rules are none of theirs."""
    for make in ("dense_mask", "block_mask"):
        monkeypatch.delattr(model_module, make)
    model = make_model(make_config())
    model(torch.arange(8)[None])
    assert not needs_mask(model.config, document_mask=False)
    assert needs_mask(model.config, document_mask=True)


def test_flops_and_the_rules_of_configs_follow_the_mask(windows):
    """In two of four blocks a query is counted for 7 keys in place of 64, and only where 7 are fewer."""
    config = make_config(num_hidden_layers=4)
    scores = 12 * config.num_attention_heads * config.head_dim
    multiplied = flops_per_token(config, 0)
    assert flops_per_token(config, 64) == multiplied + scores * (2 * 64 + 2 * WINDOW)
    assert flops_per_token(config, 5) == multiplied + scores * 4 * 5
    assert needs_mask(config, document_mask=False)
    assert not needs_mask(make_config(num_hidden_layers=1), document_mask=False)


# ---------------------------------------------------------------------------------------------------------------------
# Counts


@pytest.mark.parametrize(
    ("layers", "hidden", "ffn", "heads", "tied", "published"),
    [
        (16, 2048, 8192, 32, True, 1_235_814_400),
        (32, 4096, 14336, 32, False, 8_030_261_248),
        (80, 8192, 28672, 64, False, 70_553_706_496),
    ],
    ids=["1B", "8B", "70B"],
)
def test_parameter_count_is_the_published_one(layers, hidden, ffn, heads, tied, published):
    shape = {"num_hidden_layers": layers, "hidden_size": hidden, "intermediate_size": ffn, "tie_word_embeddings": tied}
    config = ModelConfig(**shape, num_attention_heads=heads, num_key_value_heads=8, vocab_size=128256)
    assert parameter_count(config) == published


def test_flops_per_token_equal_those_that_torch_counts():
    """Forward and backward; PaLM's formula counts attention without the causal mask's half, and so does torch."""
    config = make_config(num_key_value_heads=4)
    model, seq_len = make_model(config), 64
    tokens = torch.randint(128, (1, seq_len))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # the CPU's fused one is not counted
        model(tokens, tokens).backward()
    norms = sum(p.numel() for p in model.parameters() if p.ndim == 1)  # in PaLM's N, but no matrix product
    assert counter.get_total_flops() == seq_len * (flops_per_token(config, seq_len) - 6 * norms)


@pytest.mark.parametrize(
    ("recipe", "parameters", "flops"),
    [
        ("quickstart", 1_836_160, 9_444_096),
        ("llama_125m", 179_522_304, 903_135_744),
        ("llama3_1b", 1_235_814_400, 9_025_499_136),
        ("llama3_8b", 8_030_261_248, 57_914_449_920),
        ("llama3_70b", 70_553_706_496, 481_442_709_504),
    ],
)
def test_counts_of_the_recipes_are_what_they_were(recipe, parameters, flops):
    """PaLM's formula by hand, once for all: what is reported as MFU must not change."""
    tables = tomllib.loads((CONFIGS / f"{recipe}.toml").read_text())
    config, seq_len = ModelConfig(**{"vocab_size": 4096} | tables["model"]), tables["data"].get("seq_len", 256)
    assert (parameter_count(config), flops_per_token(config, seq_len)) == (parameters, flops)
    looked_up = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    scores = config.num_hidden_layers * config.num_attention_heads * config.head_dim * seq_len
    assert flops == 6 * (parameters - looked_up) + 12 * scores
