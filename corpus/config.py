"""What can be said of the data."""

from dataclasses import dataclass
from typing import Annotated, Literal

BOS_TOKENS = ["<|begin_of_text|>", "<s>", "<bos>", "[BOS]", "<|startoftext|>", "<|bos|>"]
EOS_TOKENS = ["<|end_of_text|>", "</s>", "<eos>", "[EOS]", "<|endoftext|>", "<|eos|>"]
PAD_TOKENS = ["<|pad|>", "<pad>", "[PAD]", "<|padding|>", "<|finetune_right_pad_id|>"]


@dataclass
class DataConfig:
    """Where the text comes from and how it becomes rows."""

    dataset: Annotated[
        str, 'documents: "stdlib" (Python\'s own), a Hub id, or a path to .txt (a document a line), .jsonl or .parquet'
    ] = "stdlib"
    subset: Annotated[str, "the Hub's name of a part of the dataset"] = ""
    split: Annotated[str, "the Hub's name of a split"] = "train"
    text_column: Annotated[str, "the column that holds a document's text"] = "text"
    tokenizer: Annotated[str, '"train" = byte-level BPE on the documents; a path to tokenizer.json; a Hub id'] = "train"
    tokenizer_vocab_size: Annotated[int, "size of a trained tokenizer"] = 4096
    tokenizer_train_mib: Annotated[
        int, "train the tokenizer on this much text, from the first document on (MiB)", (">=", 1)
    ] = 64
    bos_token: Annotated[str, f'"" = the first of {" ".join(BOS_TOKENS)} that the tokenizer has'] = ""
    eos_token: Annotated[str, f'"" = the first of {" ".join(EOS_TOKENS)} that the tokenizer has'] = ""
    seq_len: Annotated[int, "inputs and targets in a row", (">=", 1)] = 256
    layout: Annotated[Literal["pad", "pack"], "rows of one document, padded; or documents end to end, cut"] = "pad"
    document_mask: Annotated[bool, "packed documents do not see each other, and positions count from 0 in each"] = False
    val_fraction: Annotated[
        float,
        "share of the documents held out for validation; 0 = none; a validation set named below replaces it",
        (">=", 0),
        ("<", 1),
    ] = 0.01
    val_dataset: Annotated[str, 'validation documents, named like data.dataset, same column; "" = data.dataset'] = ""
    val_subset: Annotated[str, 'subset of val_dataset; "" = data.subset if val_dataset is "", else none'] = ""
    val_split: Annotated[str, 'split of the validation documents; "" = data.split'] = ""
    streaming: Annotated[
        bool, "read the files of data.dataset as training reaches them and keep no copy; val_fraction is of the first"
    ] = False
    stream_files: Annotated[int, "files whose rows are shuffled together when streaming", (">=", 1)] = 4
    stream_first_files: Annotated[int, "the same for the first ones, to start sooner; 0 = as many", (">=", 0)] = 0
    num_workers: Annotated[int, "loader processes per rank; 0 = load in the training process", (">=", 0)] = 0
