"""Write a run's weights in Hugging Face's format, from a checkpoint of any mesh, in one process on a CPU.

    python export.py runs/quickstart                                  into runs/quickstart/huggingface/step_00000180
    python export.py runs/quickstart out --step=120 --dtype=float32   another step, in full precision

`transformers.AutoModelForCausalLM.from_pretrained(OUT)` and `AutoTokenizer.from_pretrained(OUT)` load it, and
`train.py --checkpoint.init_from=OUT` starts from it.
"""

import argparse
import json
import os
import shutil
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import nn

from corpus.tokenizer import SpecialTokens, own_tokenizer, special_tokens
from huggingface.config import config_json
from huggingface.weights import write_shards
from model import Llama
from runtime.ranks import UserError
from runtime.rundir import read_run
from runtime.storage import Reader, write_atomically


def shards(parameters: dict[str, nn.Parameter], itemsize: int, most: float) -> list[list[str]]:
    """Their names, in the model's order, in groups of at most `most` bytes; a larger one is on its own."""
    groups, room = [], 0.0
    for name, parameter in parameters.items():
        size = parameter.numel() * itemsize
        if size > room:
            groups.append([])
            room = most
        groups[-1].append(name)
        room -= size
    return groups


def tokenizer_files(tokenizer: Tokenizer, special: SpecialTokens, max_length: int) -> dict[str, str]:
    """The run's own tokenizer.json, and its configuration."""
    names = {f"{kind}_token": tokenizer.id_to_token(token) for kind, token in vars(special).items()}
    if special.pad == special.eos:  # it has none of its own
        del names["pad_token"]
    # "<|end_of_text|>" written out in a text is text, as in training
    rules = {"split_special_tokens": True, "clean_up_tokenization_spaces": False, "model_max_length": max_length}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **names, **rules}
    return {"tokenizer.json": tokenizer.to_str(), "tokenizer_config.json": json.dumps(config, indent=2)}


def export(run_dir: Path, out: Path | None, step: int | None, dtype: str, max_shard_gib: float) -> Path:
    """Returns the folder, which is complete or absent. Raises UserError."""
    checkpoint, model, data = read_run(run_dir, step)
    out = out or run_dir / "huggingface" / checkpoint.name
    if out.exists():
        raise UserError(f"{out} exists: name another folder, or remove it")
    if model.hidden_size % model.num_attention_heads:
        raise UserError(
            f"model.hidden_size={model.hidden_size} is not divisible by model.num_attention_heads="
            f"{model.num_attention_heads}: transformers refuses such a Llama, although head_dim is given"
        )
    tokenizer = own_tokenizer(run_dir)
    special, kind, reader = special_tokens(tokenizer, data), getattr(torch, dtype), Reader(checkpoint)
    ids = {"bos_token_id": special.bos, "eos_token_id": special.eos}
    files = tokenizer_files(tokenizer, special, model.max_position_embeddings) | {
        "config.json": json.dumps(config_json(model, dtype, ids), indent=2),
        "generation_config.json": json.dumps(ids, indent=2),
    }
    with torch.device("meta"):
        parameters = dict(Llama(model).named_parameters())

    def load(names: list[str]) -> dict[str, torch.Tensor]:
        tensors = {name: torch.empty(parameters[name].shape, dtype=kind) for name in names}
        reader.load({"model": tensors})
        return tensors

    unfinished = out.with_name(f".tmp-{out.name}-{os.getpid()}")
    try:
        unfinished.mkdir(parents=True)
        write_shards(unfinished, shards(parameters, kind.itemsize, max_shard_gib * 2**30), load)
        for name, text in files.items():
            write_atomically(unfinished / name, text)
        unfinished.rename(out)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run_dir", type=Path, metavar="RUN", help="a run directory, such as runs/quickstart")
    parser.add_argument("out", type=Path, nargs="?", metavar="OUT", help="default: RUN/huggingface/step_<step>")
    parser.add_argument("--step", type=int, help="of the checkpoint; default: the newest")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--max-shard-gib", type=float, default=4.0, help="size of a file")
    arguments = parser.parse_args()
    if not arguments.max_shard_gib > 0:
        parser.error(f"--max-shard-gib={arguments.max_shard_gib} is not above 0")
    try:
        print(f"written: {export(**vars(arguments))}")
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
