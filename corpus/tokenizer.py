"""The tokenizer: trained on the documents, read or downloaded; and its special tokens."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from corpus.cache import cache_folder, cache_key, written
from corpus.config import BOS_TOKENS, EOS_TOKENS, PAD_TOKENS, DataConfig
from corpus.sources import all_texts
from runtime.ranks import UserError


def train_tokenizer(texts: Iterable[str | None], vocab_size: int, train_mib: int) -> Tokenizer:
    """Byte-level BPE (arXiv:1508.07909, on bytes as in GPT-2) with a BOS and an EOS token."""

    def until_enough() -> Iterator[str]:
        left = train_mib * 2**20
        for text in texts:
            if left <= 0:
                return
            if text:
                left -= len(text.encode())
                yield text

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS_TOKENS[0], EOS_TOKENS[0]],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(until_enough(), trainer)
    return tokenizer


def load_tokenizer(config: DataConfig) -> Tokenizer:
    """Train (once per documents and size, then from the cache), read, or download. Raises UserError."""
    if config.tokenizer == "train":
        texts, identity = all_texts(config)
        key = cache_key("tokenizer", identity, config.tokenizer_vocab_size, config.tokenizer_train_mib)
        path = cache_folder() / f"tokenizer-{key}.json"
        if not path.exists():
            tokenizer = train_tokenizer(texts, config.tokenizer_vocab_size, config.tokenizer_train_mib)
            with written(path) as file:
                file.write(tokenizer.to_str(pretty=True).encode())
        return Tokenizer.from_file(str(path))
    is_file = config.tokenizer.endswith(".json") or Path(config.tokenizer).exists()
    try:
        return Tokenizer.from_file(config.tokenizer) if is_file else Tokenizer.from_pretrained(config.tokenizer)
    except Exception as error:  # the library raises plain Exception
        raise UserError(
            f"data.tokenizer={config.tokenizer!r} cannot be loaded: {error}\n"
            'it must be "train", a path to a tokenizer.json, or the id of a model on the Hub that has one'
        ) from error


def own_tokenizer(run_dir: Path) -> Tokenizer:
    """That of a run. Raises UserError."""
    try:
        return Tokenizer.from_file(str(run_dir / "tokenizer.json"))
    except Exception as error:  # the library raises plain Exception
        raise UserError(f"{run_dir}/tokenizer.json cannot be read: {error}") from error


@dataclass(frozen=True)
class SpecialTokens:
    """Token ids. `pad` is only ever an input behind EOS, with target -100, so its value does not matter."""

    bos: int
    eos: int
    pad: int


def special_tokens(tokenizer: Tokenizer, config: DataConfig) -> SpecialTokens:
    """The configured tokens, or the first known ones; a tokenizer with only one of the two uses it for both."""

    def find(key: str, name: str, known: list[str]) -> int | None:
        if name and tokenizer.token_to_id(name) is None:
            raise UserError(f"data.{key}={name!r} is not in the tokenizer: name a token that it has")
        return next((i for i in map(tokenizer.token_to_id, [name] if name else known) if i is not None), None)

    bos = find("bos_token", config.bos_token, BOS_TOKENS)
    eos = find("eos_token", config.eos_token, EOS_TOKENS)
    bos, eos = (eos if bos is None else bos), (bos if eos is None else eos)
    if bos is None or eos is None:
        raise UserError(
            f"data.tokenizer={config.tokenizer!r} has none of {' '.join(BOS_TOKENS + EOS_TOKENS)}: "
            "name its tokens with data.bos_token and data.eos_token"
        )
    pad = find("pad_token", "", PAD_TOKENS)
    return SpecialTokens(bos, eos, eos if pad is None else pad)


def without_rules(tokenizer: Tokenizer, special: SpecialTokens) -> Tokenizer:
    """A copy that pads nothing, cuts nothing, and takes "<|begin_of_text|>" written out in a text for text."""
    tokenizer = Tokenizer.from_str(tokenizer.to_str())
    for token in {special.bos, special.eos, special.pad}:  # some files do not say that they are special
        tokenizer.add_special_tokens([AddedToken(tokenizer.id_to_token(token), special=True)])
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer.encode_special_tokens = True
    return tokenizer


def vocabulary_size(tokenizer: Tokenizer) -> int:
    """Largest id + 1: ids may have gaps, so the number of tokens is not enough."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
