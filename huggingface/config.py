"""A model's config.json and tokenizer_config.json, both ways; anything that is not this Llama is refused by name."""

import json
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from model import ModelConfig
from runtime.ranks import UserError

# Keys that have our names there, and transformers' values where config.json lacks one
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
OTHERS = {
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.02,
}
# What this Llama is beyond that: what config.json says of it, and what it may leave unsaid
FIXED: dict[str, Any] = {"model_type": "llama", "hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
PLAIN: dict[str, Any] = {"attention_dropout": 0.0, "partial_rotary_factor": 1.0, "quantization_config": None}
SCALING = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
# All keys that a ModelConfig and transformers' Llama have in common
KNOWN = {*SIZES, *OTHERS, *FIXED, "num_key_value_heads", "head_dim", "rope_theta", "rope_scaling"}
# What the command line may change, as no weight's shape depends on it
FREE = [f"model.{key}" for key in (*OTHERS, "rope_theta", "rope_scaling") if key != "tie_word_embeddings"]


def fetch(name: str, file: str) -> Path:
    """A file of a model: a folder's, or the Hub's, from the node's cache (`HF_HOME`). Raises UserError."""
    try:
        path = Path(name) / file if Path(name).is_dir() else Path(huggingface_hub.hf_hub_download(name, file))
        path.open("rb").close()
    except Exception as error:  # no such model, no access, no network: of many kinds
        reason = next(iter(str(error).splitlines()), "") or repr(error)
        remedy = "it takes a folder that holds config.json and *.safetensors, or the id of such a model on the Hub"
        raise UserError(f"checkpoint.init_from={name}: {file} cannot be read ({reason}): {remedy}") from error
    return path


def read_json(name: str, file: str, optional: bool = False) -> dict[str, Any]:
    """A JSON object of a model; {} where it is not there and need not be. Raises UserError."""
    try:
        return dict(json.loads(fetch(name, file).read_text(encoding="utf-8")).items())
    except UserError as error:
        cause = error.__cause__
        unknown = isinstance(cause, LocalEntryNotFoundError) and not huggingface_hub.constants.HF_HUB_OFFLINE
        if optional and isinstance(cause, FileNotFoundError | EntryNotFoundError) and not unknown:  # by a bad network
            return {}
        raise
    except (ValueError, AttributeError) as error:
        raise UserError(f"checkpoint.init_from={name}: {file} is no JSON object ({error}): fetch it again") from error


def keys(name: str) -> dict[str, Any]:
    """What a model says of itself, by "section.key": all of [model], and the tokenizer. Raises UserError."""
    found = {f"model.{key}": value for key, value in model_keys(name).items()}
    return found | {f"data.{key}": value for key, value in tokenizer_keys(name).items()}


def model_keys(name: str) -> dict[str, Any]:
    """[model] as config.json has it, of transformers 5 or 4. Raises UserError, with all that differs."""
    there = {key: value for key, value in read_json(name, "config.json").items() if value is not None}
    rope = {"rope_theta": there.get("rope_theta", 10000.0), "type": "default"}
    for part in (there.get("rope_scaling", {}), there.get("rope_parameters", {})):  # of transformers 4, and of 5
        rope |= part if isinstance(part, dict) else {"type": part}
    kind, theta = rope.pop("type"), rope.pop("rope_theta")
    kind = rope.pop("rope_type", kind)  # the newer name, beside which the older one may stand
    ours = {**FIXED, **PLAIN}
    raw = {**ours, "model_type": "unknown", **there}
    raw["partial_rotary_factor"] = rope.pop("partial_rotary_factor", raw["partial_rotary_factor"])
    wrong = [f"{key} = {raw[key]!r} instead of {value!r}" for key, value in ours.items() if raw[key] != value]
    sizes = {key: raw.get(key, 0) for key in SIZES}
    wrong += [f"{key} = {size!r} is no size" for key, size in sizes.items() if type(size) is not int or size < 1]
    if (kind, sorted(rope)) not in (("default", []), ("llama3", sorted(SCALING))):
        wrong.append(f"RoPE of type {kind!r} with {rope} instead of 'default', or 'llama3' with {', '.join(SCALING)}")
    if wrong:
        raise UserError("\n  ".join([f"checkpoint.init_from={name} is not this Llama:", *wrong]))
    heads = raw["num_attention_heads"]
    found = {"num_key_value_heads": heads, "head_dim": raw["hidden_size"] // heads, **OTHERS}
    found |= {key: raw[key] for key in vars(ModelConfig()) if key in raw}  # sizes, and what a fork has added, too
    return found | {"rope_theta": theta, "rope_scaling": {"rope_type": kind, **rope} if rope else {}}


def tokenizer_names(name: str) -> list[str]:
    """The model's own tokenizer, as `data.tokenizer` names it: of a folder, and of the Hub."""
    return [str(Path(name) / "tokenizer.json"), name] if name else []


def tokenizer_keys(name: str) -> dict[str, Any]:
    """The keys of [data] that make its tokenizer ours: its file, and which tokens begin and end a document."""
    raw = read_json(name, "tokenizer_config.json", optional=True)
    tokens = {key: raw.get(key) for key in ("bos_token", "eos_token")}
    named = {key: token.get("content") if isinstance(token, dict) else token for key, token in tokens.items()}
    tokenizer = tokenizer_names(name)[not Path(name).is_dir()]
    return {"tokenizer": tokenizer, **{key: token for key, token in named.items() if token}}


def config_json(model: ModelConfig, dtype: str, ids: dict[str, int]) -> dict[str, Any]:
    """What `transformers` 5 reads, and 4: rope_theta, rope_scaling and torch_dtype are its names for the same.

    Raises UserError for a key that it would pass over in silence, and with it compute something else.
    """
    off = vars(type(model)())
    own = [f"model.{key}={value!r}" for key, value in vars(model).items() if key not in KNOWN and value != off[key]]
    if own:
        remedy = "if they change no logits, or a model class there has them, add them to KNOWN in huggingface/config.py"
        raise UserError(f"transformers' Llama has no {', '.join(own)}, and would compute without: {remedy}")
    ours = {key: value for key, value in vars(model).items() if key != "rope_scaling"}
    parameters = {"rope_type": "default", **model.rope_scaling, "rope_theta": model.rope_theta}
    now = {"architectures": ["LlamaForCausalLM"], "rope_parameters": parameters, "dtype": dtype}
    return {**now, **FIXED, **ours, **ids, "rope_scaling": model.rope_scaling or None, "torch_dtype": dtype}
