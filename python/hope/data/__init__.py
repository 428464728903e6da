"""Data: documents of many sources, as tokens, in a seeded order, packed or in windows.

documents.py: where text comes from. corpus.py: its tokens, split in two. tokens.py, shards.py:
streams of tokens in memory and on disk. sampler.py: batches.
"""

from hope.data.corpus import (
    Corpus,
    corpus_tokenizer,
    encode,
    load_corpus,
    open_documents,
    tokenized,
    training_sampler,
)
from hope.data.documents import VALIDATION_FRACTION, Document
from hope.data.sampler import (
    IGNORED,
    Batch,
    PackedSampler,
    Sampler,
    WindowSampler,
    validation_batches,
)
from hope.data.shards import SHARD_TOKENS, load_shards, write_shards
from hope.data.tokens import MappedTokens, Tokens
from hope.tokenizers import SEPARATOR, VOCAB_SIZE

__all__ = [
    "IGNORED",
    "SEPARATOR",
    "SHARD_TOKENS",
    "VALIDATION_FRACTION",
    "VOCAB_SIZE",
    "Batch",
    "Corpus",
    "Document",
    "MappedTokens",
    "PackedSampler",
    "Sampler",
    "Tokens",
    "WindowSampler",
    "corpus_tokenizer",
    "encode",
    "load_corpus",
    "load_shards",
    "open_documents",
    "tokenized",
    "training_sampler",
    "validation_batches",
    "write_shards",
]
