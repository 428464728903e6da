"""`hope evaluate lm`."""

import argparse

from tqdm import tqdm

from hope.cli.options import Commands, add_judged, add_source, judged_out, positive, source
from hope.data import open_documents
from hope.device import choose_device
from hope.evaluate.lm import predict, table
from hope.evaluate.reader import Reader
from hope.evaluate.result import write_result


def add(commands: Commands) -> None:
    parser = commands.add_parser(
        "lm",
        help="how well a trained run predicts texts",
        description=(
            "Reads every document in one pass, in bounded memory, and shows bits per byte and\n"
            "perplexity, also by how much of a document was read before."
        ),
        epilog=(
            "examples:\n"
            "  hope evaluate lm runs/hope-tiny --data book.txt notes/\n"
            "  hope evaluate lm runs/hope-tiny --data book.txt --length 256 1024 4096"
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_judged(parser, "lm")
    add_source(parser, required=True)
    parser.add_argument(
        "--length",
        nargs="+",
        type=positive,
        metavar="N",
        help="forget after N tokens; several are compared (default: only where documents end)",
    )
    parser.set_defaults(command=_run)


def _run(options: argparse.Namespace) -> int:
    reader = Reader.of_run(options.run, choose_device(options.device), batch=options.batch)
    out = judged_out(options, "lm")
    documents = open_documents(source(options))
    results = []
    for length in options.length or [None]:
        name = f"{length:,} tokens" if length else "whole texts"
        bar = tqdm(documents, desc=name, unit=" documents", leave=False)
        results.append(predict(reader, (document.text for document in bar), length))
    print(f"data   {documents.description}\n\n{table(results)}")
    content = {"data": options.data, "field": options.field, "results": results}
    write_result(out, options.run, reader.device, "lm", content)
    print(f"\nout    {out}")
    return 0
