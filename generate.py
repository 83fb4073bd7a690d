"""Sample text from a run's checkpoint, whatever mesh wrote it, on one process.

python generate.py runs/quickstart --prompt "def " --max-new-tokens 200 --temperature 0.8 --top-k 50 --seed 1
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer

from corpus.tokenizer import SpecialTokens, own_tokenizer, special_tokens, without_rules
from model import Llama
from runtime.ranks import UserError
from runtime.rundir import read_run
from runtime.storage import load_weights


def load_run(run_dir: Path, device: torch.device) -> tuple[Llama, Tokenizer, SpecialTokens]:
    """The newest checkpoint of a run with its tokenizer. Raises UserError where there is none."""
    checkpoint, config, data = read_run(run_dir)
    tokenizer = own_tokenizer(run_dir)
    with torch.device("meta"):
        model = Llama(config)
    model.to_empty(device=device)
    model.init_weights(seed=0)  # for the buffers, which checkpoints do not hold
    load_weights(checkpoint, model)
    special = special_tokens(tokenizer, data)
    return model, tokenizer, special


@torch.no_grad()
def sample(
    model: Llama, tokens: list[int], eos: int, max_new_tokens: int, temperature: float, top_k: int, seed: int
) -> Iterator[int]:
    """Yield tokens until EOS. Temperature 0 takes the likeliest; top_k 0 takes all into account."""
    device = model.lm_head.weight.device
    generator = torch.Generator(device).manual_seed(seed)
    window = model.config.max_position_embeddings
    for _ in range(max_new_tokens):
        logits = model(torch.tensor([tokens[-window:]], device=device))[0, -1]  # (V,)
        if top_k > 0:
            lowest = logits.topk(min(top_k, logits.numel())).values[-1]
            logits = logits.masked_fill(logits < lowest, float("-inf"))
        if temperature > 0:
            token = int(torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator))
        else:
            token = int(logits.argmax())
        if token == eos:
            return
        tokens.append(token)
        yield token


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run_dir", type=Path, help="a run directory, such as runs/quickstart")
    parser.add_argument("--prompt", default="", help="the beginning of a document")
    parser.add_argument("--max-new-tokens", type=int, default=200, help="stop after this many, or at EOS")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 = always the likeliest token")
    parser.add_argument("--top-k", type=int, default=50, help="sample from the k likeliest tokens; 0 = from all")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if min(arguments.temperature, arguments.top_k, arguments.max_new_tokens) < 0:
        parser.error("--temperature, --top-k and --max-new-tokens must not be negative")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        model, tokenizer, special = load_run(arguments.run_dir, device)
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")
    prompt = without_rules(tokenizer, special).encode(arguments.prompt, add_special_tokens=False).ids
    tokens, printed = [special.bos, *prompt], ""
    print(arguments.prompt, end="", flush=True)
    new = []
    for token in sample(
        model, tokens, special.eos, arguments.max_new_tokens, arguments.temperature, arguments.top_k, arguments.seed
    ):
        new.append(token)
        text = tokenizer.decode(new)
        if not text.endswith("\ufffd"):  # half of a multi-byte character: wait for the rest
            print(text[len(printed) :], end="", flush=True)
            printed = text
    print(tokenizer.decode(new)[len(printed) :])  # a character that stayed incomplete


if __name__ == "__main__":
    main()
