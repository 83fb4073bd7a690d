"""Documents -> tokens on disk: everything that comes before a row. Training calls `opened`.

The files, in the order in which one uses the other:

    config.py      what can be said of the data
    cache.py       where everything is kept, and under which names
    sources.py     documents: the standard library, files, folders, the Hub
    tokenizer.py   trained, read or downloaded; its special tokens
    tokens.py      documents end to end as tokens, in files that are mapped into memory; and how they are cut
    stream.py      the same, file by file, for what no disk holds
    look.py        a look at the data: python -m corpus.look CONFIG.toml
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch.distributed as dist
from tokenizers import Tokenizer

from corpus import stream
from corpus.cache import cache_key
from corpus.config import DataConfig
from corpus.sources import check_not_empty, errors_name_validation, holds_out_training, stream_files, validation_config
from corpus.tokenizer import SpecialTokens, load_tokenizer, special_tokens, vocabulary_size
from corpus.tokens import TokenFiles, cut, tokenize
from data import Source
from runtime import ranks
from runtime.ranks import UserError


@dataclass
class Corpus:
    """What training needs to know of the data. Raises UserError where there is nothing to validate on."""

    tokenizer: Tokenizer
    special: SpecialTokens
    source: Source  # of the training rows
    validation: Source | None  # of one file
    fingerprint: str  # changes with the documents
    num_rows: int | None  # training rows; None where that is found out on the way

    def __post_init__(self):
        if self.validation and self.validation.open(0).num_bytes == 0:  # bits per byte would divide by it
            raise UserError("the validation documents are empty, all of them: raise data.val_fraction or name others")
        self.tokenizer_json = self.tokenizer.to_str()
        self.vocabulary = vocabulary_size(self.tokenizer)  # the largest id + 1


@contextlib.contextmanager
def opened(
    config: DataConfig,
    run_dir: Path,
    global_batch_size: int,
    counts: list[int | None] | None,
    oldest_step: Callable[[], int],
    tokenizer_json: Path | None = None,
) -> Iterator[Corpus]:
    """The corpus, tokenised as far as it has to be, while inside. All ranks enter together; UserError, on all alike.

    `counts` are the rows of each file according to the checkpoint that goes on, `oldest_step` is asked from which step
    on the run may have to be resumed; `tokenizer_json` is that of this very run, to be used again. Leaving waits for no
    other rank.
    """
    with contextlib.ExitStack() as resources:
        with ranks.patience():
            tokenizer = Tokenizer.from_str(ranks.on_rank_0(lambda: tokenizer_of_run(config, tokenizer_json).to_str()))
            show_progress = dist.get_rank() == 0
            if config.streaming:
                addresses = ranks.on_rank_0(partial(stream_files, config))
                prepare = partial(stream.prepare, config, tokenizer, run_dir, addresses, show_progress)
                folder, versions, val_paths = ranks.on_each_node(prepare)
                files = stream.Files(config, special_tokens(tokenizer, config), addresses, folder, versions)
                ahead = None
                if (leaders := ranks.node_leaders())[dist.get_rank()] == dist.get_rank():
                    # the node's trainers keep a core each
                    threads = max(1, ranks.cores() - leaders.count(dist.get_rank()))
                    ahead = stream.Ahead(files, tokenizer.to_str(), oldest_step, threads)
                    resources.callback(ahead.stop)

                # a cache of its own may know more, or less
                known = ranks.on_rank_0(partial(files.known_counts, counts))

                def load() -> Corpus:
                    source = stream.Stream(files, known, global_batch_size, ahead)
                    return load_stream(config, tokenizer, source, val_paths)

                corpus = ranks.together(load)
            else:
                paths = ranks.on_each_node(partial(tokenize_all, config, tokenizer, show_progress))
                corpus = ranks.together(partial(load_corpus, config, tokenizer, *paths))
            ranks.same_everywhere(f"data.dataset={config.dataset}", corpus.fingerprint, "copy it from one")
        yield corpus


def tokenizer_of_run(config: DataConfig, recorded: Path | None) -> Tokenizer:
    """`recorded`: the tokenizer.json of a run that goes on, where it is used again."""
    reuse = recorded is not None and recorded.exists()
    return load_tokenizer(replace(config, tokenizer=str(recorded)) if reuse else config)


def tokenize_all(config: DataConfig, tokenizer: Tokenizer, show_progress: bool = False) -> list[list[Path]]:
    """`tokenize` of the training documents and, where they have a source of their own, of the validation documents."""
    paths, validation = [tokenize(config, tokenizer, show_progress)], validation_config(config)
    if validation is not None:
        with errors_name_validation():
            paths.append(tokenize(validation, tokenizer, show_progress))
        if paths[0] == paths[1]:
            raise holds_out_training(config)
    return paths


def load_corpus(
    config: DataConfig, tokenizer: Tokenizer, paths: list[Path], val_paths: list[Path] | None = None
) -> Corpus:
    """Map what `tokenize_all` wrote and cut it into rows. Raises UserError."""
    special, tokens = special_tokens(tokenizer, config), TokenFiles(paths)
    check_not_empty(config, len(tokens.document_bytes))  # null texts are none
    validation: Source | None
    source, validation = cut(tokens, config, special, config.val_fraction if val_paths is None else 0)
    fingerprint = tokens.fingerprint()
    if val_paths is not None:
        own = load_corpus(validation_config(config) or config, tokenizer, val_paths)
        validation, fingerprint = own.source, cache_key(fingerprint, own.fingerprint)
    return Corpus(tokenizer, special, source, validation, fingerprint, len(source.rows))


def load_stream(
    config: DataConfig, tokenizer: Tokenizer, source: stream.Stream, val_paths: list[Path] | None
) -> Corpus:
    """What `stream.prepare` found. Raises UserError."""
    source.check_enough()
    files, validation, val_fingerprint = source.files, None, None
    if val_paths is not None:
        own = load_corpus(validation_config(config) or config, tokenizer, val_paths)
        validation, val_fingerprint = own.source, own.fingerprint
    elif config.val_fraction > 0:
        _, validation = files.cut(0)
        val_fingerprint = files.tokens(0).fingerprint()
    fingerprint = cache_key(stream.names_of(files.addresses), val_fingerprint)
    return Corpus(tokenizer, files.special, source, validation, fingerprint, None)
