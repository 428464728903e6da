"""`hope tokenizer`."""

import argparse
from collections.abc import Iterable, Iterator
from pathlib import Path

from hope.cli.options import Commands, add_source, positive, source
from hope.data import Document, open_documents
from hope.errors import HopeError
from hope.files import atomic_file
from hope.tokenizers import train_tokenizer


def add(commands: Commands) -> None:
    parser = commands.add_parser(
        "tokenizer",
        help="train a tokenizer on text",
        description=(
            "Trains a byte-level BPE and writes it as a tokenizer.json, which hope train, hope\n"
            "compare and hope shards take with --tokenizer. It learns from the documents that a\n"
            "model is trained on, not from those for validation."
        ),
        epilog=(
            "examples:\n"
            "  hope tokenizer --data notes/ --vocab-size 4096 --out tokenizer.json\n"
            "  hope train --data notes/ --tokenizer tokenizer.json"
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_source(parser)
    parser.add_argument(
        "--vocab-size",
        type=positive,
        required=True,
        help="tokens: 256 bytes, the separator of documents, and what is merged of them",
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help="the tokenizer.json to write"
    )
    parser.set_defaults(command=_run)


def _run(options: argparse.Namespace) -> int:
    if not options.out.parent.is_dir():
        raise HopeError(f"--out: there is no directory {options.out.parent}")
    if options.out.exists():
        raise HopeError(f"--out: {options.out} exists; a tokenizer is not written over")
    documents = open_documents(source(options))
    tokenizer = train_tokenizer(_texts(documents), options.vocab_size)
    with atomic_file(options.out) as path:
        tokenizer.write(path)
    print(f"data   {documents.description}")
    print(f"tokens {tokenizer.vocab_size:,}")
    if tokenizer.vocab_size < options.vocab_size:
        print(f"       ({options.vocab_size:,} were asked for: there is nothing left to merge)")
    print(f"out    {options.out}")
    return 0


def _texts(documents: Iterable[Document]) -> Iterator[bytes]:
    """Those of the training documents; of all where there are no others, as with a single file."""
    found = False
    for document in documents:
        if not document.is_validation:
            found = True
            yield document.text
    if not found:
        yield from (document.text for document in documents)
