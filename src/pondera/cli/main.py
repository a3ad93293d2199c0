"""The command `pondera`: dispatches to a verb and turns exceptions into messages and exit codes.

A verb is a module with `SUMMARY` (a line of ``pondera --help``), `parser()`, and `run(args)`, which returns the exit
code. Slow imports are inside `run`, so that help and errors in the input appear at once.
"""

from __future__ import annotations

import io
import logging
import os
import sys
import traceback
from collections.abc import Sequence
from types import ModuleType

from pondera.cli import (
    bench,
    compare,
    compress,
    demo,
    doctor,
    evaluate,
    generate,
    index,
    lm_eval,
    methods,
    probe,
    report,
    train,
)
from pondera.core.errors import Failure, Interrupted, UserError, unknown
from pondera.core.escape import escape_lines

VERBS: dict[str, ModuleType] = {
    "demo": demo,
    "train": train,
    "compare": compare,
    "eval": evaluate,
    "generate": generate,
    "index": index,
    "probe": probe,
    "compress": compress,
    "bench": bench,
    "lm-eval": lm_eval,
    "report": report,
    "methods": methods,
    "doctor": doctor,
}
SUCCESS, FAILURE, MISUSE, INTERRUPTED = 0, 1, 2, 130

HELP = """\
usage: pondera VERB ...

Language models with adaptive compute and memory per token, compared at equal cost.

verbs:
{verbs}

  pondera VERB --help    arguments of a verb, with examples
  pondera --version

start here:
  pondera demo                               a chat model with a compressed cache, and tiny models that think: minutes
  pondera train ponderlm2 --data.text books/ train a small model on your text, with one latent thought per token
  pondera compare plain ponderlm2 --seeds 3  compare two recipes at equal cost

exit codes: 0 success; 1 failure; 2 wrong input; 130 interrupted
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: the arguments after ``pondera``; default: `None`, those of this process.

    Returns:
        The exit code: 0 success, 1 failure, 2 wrong input, 130 interrupted.
    """
    _prepare_streams()
    try:
        code = _dispatch(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
        return code
    except UserError as error:
        _say(str(error))
        return MISUSE
    except BrokenPipeError:  # the reader of the pipe, such as `head`, has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILURE
    except (KeyboardInterrupt, Interrupted) as error:
        _say(str(error) or "interrupted")
        return INTERRUPTED
    except Failure as error:
        _say(str(error))
        return FAILURE
    except Exception:
        print(escape_lines(traceback.format_exc()), end="", file=sys.stderr)
        _say("internal error; please report it with the lines above and the output of `pondera doctor`")
        return FAILURE


def _dispatch(words: list[str]) -> int:
    verb, *rest = words or ["--help"]
    if verb in ("-h", "--help"):
        print(HELP.format(verbs="\n".join(f"  {name:10}{module.SUMMARY}" for name, module in VERBS.items())), end="")
        return SUCCESS
    if verb == "--version":
        from pondera import __version__

        print(f"pondera {__version__}")
        return SUCCESS
    if verb not in VERBS:
        raise unknown("option" if verb.startswith("-") else "verb", verb, [*VERBS, "--help", "--version"])
    parser = VERBS[verb].parser()
    return VERBS[verb].run(parser.parse(rest))


def _prepare_streams() -> None:
    """Makes any text printable in any terminal encoding, and shows log messages of the package."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    logging.basicConfig(format="%(message)s")
    logging.getLogger("pondera").setLevel(logging.INFO)


def _say(message: str) -> None:
    """Prints a message; it is escaped, because it can quote control characters from files."""
    print(f"pondera: {escape_lines(message)}", file=sys.stderr)
