"""Kinds of text that are on every machine, or are generated there: what is learned in sequence."""

import ast
import os
import random
import sysconfig
import warnings
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from hope.data import Document, encode
from hope.errors import HopeError

_LINES, _LOG_LINES = 200, 25  # of a generated document
_LEFT_OUT = {"site-packages", "dist-packages", "test"}  # others' code, and the library's tests
_LONGEST = 16_384  # bytes of a document, so that no file is most of a text


@dataclass(frozen=True)
class Domain:
    """A kind of text: tokens to learn from, and others, held out, to be judged by (1-D int16)."""

    name: str
    train: Tensor
    held_out: Tensor


def make_domain(name: str, train: int, held_out: int, seed: int = 0) -> Domain:
    """The domain of that name, with so many tokens.

    The same name, sizes and seed give the same texts (of the standard library: with the same
    version of Python). Raises HopeError for an unknown name, and where there is too little text.
    """
    if name not in DOMAINS:
        raise HopeError(f"domain must be one of {', '.join(DOMAINS)}, not {name!r}")
    sides = []
    for is_held_out, size in ((False, train), (True, held_out)):
        draw = random.Random(f"{name} {seed} {is_held_out}")
        documents, have = [], 0
        for text in DOMAINS[name](draw, is_held_out):
            documents.append(Document(f"{name}-{len(documents)}", text.encode()[:_LONGEST]))
            have += 1 + len(documents[-1].text)
            if have >= size:
                break
        else:
            raise HopeError(f"domain {name} has {have:,} bytes here, not {size:,}")
        sides.append(encode(documents)[:size])
    return Domain(name, *sides)


# ---- the standard library ------------------------------------------------------------------------


def _files(draw: random.Random, kind: int, held_out: bool) -> Iterator[str]:
    """Source files in a random order, without the library's own tests.

    Docstrings come from other files than the source does, and held-out text from files of its own:
    the checksum of a file's name decides.
    """
    root, names = Path(sysconfig.get_path("stdlib")), []
    for folder, folders, files in os.walk(root):
        folders[:] = [x for x in folders if x not in _LEFT_OUT]
        inside = Path(folder).relative_to(root)
        names += [(inside / file).as_posix() for file in files if file.endswith(".py")]
    for name in draw.sample(sorted(names), len(names)):
        share = zlib.crc32(name.encode())
        if share % 2 != kind or (share // 2 % 10 == 0) != held_out:
            continue
        try:
            text = (root / name).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):  # its tests hold files in odd encodings on purpose
            continue
        if text and "\0" not in text:
            yield text


def _source(draw: random.Random, held_out: bool) -> Iterator[str]:
    return _files(draw, 0, held_out)


def _docstrings(draw: random.Random, held_out: bool) -> Iterator[str]:
    """The docstrings of a file, as `inspect.getdoc` shows them, with an empty line between them."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for source in _files(draw, 1, held_out):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in old code
            try:
                tree = ast.parse(source)
            except (SyntaxError, ValueError, RecursionError):  # so are files in a broken syntax
                continue
        found = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds)]
        if text := "\n\n".join(filter(None, found)):
            yield text + "\n"


# ---- generated texts -----------------------------------------------------------------------------


def _arithmetic(draw: random.Random, held_out: bool) -> Iterator[str]:
    """Sums, differences and products; the pairs of numbers decide who sees them, never both."""
    while True:
        lines = []
        while len(lines) < _LINES:
            a, b = (draw.randrange(10 ** draw.randint(1, 3)) for _ in "ab")
            if ((7 * a + b) % 10 == 0) == held_out:
                sign = draw.choice("+-*")
                answer = {"+": a + b, "-": a - b, "*": a * b}[sign]
                lines.append(f"{a} {sign} {b} = {answer}\n")
        yield "".join(lines)


_SERVICES = {
    "auth": (
        "user {user} logged in from {ip}",
        "user {user} logged out",
        "wrong password: {user}",
    ),
    "db": ("query took {ms} ms", "connection {number} opened", "connection {number} closed"),
    "web": (
        'GET /{page} {status} {ms} ms "{ip}"',
        'POST /{page} {status} {ms} ms "{ip}"',
    ),
    "queue": ("job {number} started", "job {number} finished in {ms} ms", "{count} jobs waiting"),
    "disk": ("{count} % of /var in use", "backup {number} written: {ms} MiB"),
}
_LEVELS = ("INFO", "INFO", "INFO", "INFO", "DEBUG", "WARNING", "ERROR")


def _logs(draw: random.Random, held_out: bool) -> Iterator[str]:
    """Log files of servers: rising times, services with messages of their own, requests that fail.

    Every document is an hour or so of one host. The days are those of even years, or of odd ones
    for what is held out.
    """
    while True:
        host = f"{draw.choice(('node', 'edge', 'store'))}-{draw.randrange(100):02d}"
        year = 2000 + 2 * draw.randrange(13) + held_out
        day = f"{year}-{draw.randint(1, 12):02d}-{draw.randint(1, 28):02d}"
        second, number, lines = draw.randrange(20 * 3600), draw.randrange(10_000), []
        for _ in range(_LOG_LINES):
            second += draw.randrange(60)
            number += draw.randrange(3)
            service = draw.choice(tuple(_SERVICES))
            message = draw.choice(_SERVICES[service]).format(
                user=draw.choice(("ada", "grace", "alan", "edsger", "barbara", "donald")),
                ip=f"10.0.{draw.randrange(4)}.{draw.randrange(256)}",
                ms=round(draw.lognormvariate(4, 1)),
                number=number,
                page=draw.choice(("", "index.html", "login", "search", "static/logo.png")),
                status=draw.choice((200, 200, 200, 304, 404, 500)),
                count=draw.randrange(100),
            )
            clock = f"{second // 3600:02d}:{second // 60 % 60:02d}:{second % 60:02d}"
            lines.append(f"{day}T{clock}Z {host} {service} {draw.choice(_LEVELS)} {message}\n")
        yield "".join(lines)


# A domain's texts, one after the other: documents drawn for one side of the split.
DOMAINS: dict[str, Callable[[random.Random, bool], Iterator[str]]] = {
    "source": _source,
    "docstrings": _docstrings,
    "arithmetic": _arithmetic,
    "logs": _logs,
}
