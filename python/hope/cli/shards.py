"""`hope shards`."""

import argparse
from pathlib import Path

from tqdm import tqdm

from hope.cli.options import Commands, add_source, add_tokenizer, positive, source
from hope.data import SHARD_TOKENS, open_documents, tokenized, write_shards
from hope.tokenizers import open_tokenizer


def add(commands: Commands) -> None:
    parser = commands.add_parser(
        "shards",
        help="write a large corpus as tokens",
        description=(
            "Tokenizes text, a document at a time, into files that training maps into memory: so\n"
            "a corpus may be larger than the memory, and is tokenized once."
        ),
        epilog=(
            "examples:\n"
            "  hope shards --data corpus/*.parquet --tokenizer tokenizer.json --out shards\n"
            "  hope train --data shards"
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_source(parser)
    add_tokenizer(parser)
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIRECTORY", help="a new directory for them"
    )
    parser.add_argument(
        "--shard-tokens",
        type=positive,
        default=SHARD_TOKENS,
        help="tokens of a file, which ends with a document (default: %(default)s)",
    )
    parser.set_defaults(command=_run)


def _run(options: argparse.Namespace) -> int:
    documents, tokenizer = open_documents(source(options)), open_tokenizer(options.tokenizer)
    shown = tqdm(documents, unit=" documents", dynamic_ncols=True, disable=None)
    index = write_shards(tokenized(shown, tokenizer), tokenizer, options.out, options.shard_tokens)
    print(f"data   {documents.description}")
    for side in ("train", "validation"):
        sizes = index[side]
        print(
            f"{side:<10} {sizes['tokens']:,} tokens of {sizes['documents']:,} documents, "
            f"shards: {len(sizes['files']):,}"
        )
    print(f"out    {options.out}\n\ntrain: hope train --data {options.out}")
    return 0
