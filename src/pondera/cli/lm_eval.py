"""``pondera lm-eval``: runs EleutherAI's lm-evaluation-harness with ``--model pondera`` registered."""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Sequence

from pondera.cli.parser import Parser
from pondera.core.errors import Failure, UserError
from pondera.data.text import first_line

SUMMARY = "runs tasks of EleutherAI's lm-evaluation-harness on a model"
ABOUT = """\
Registers Pondera's models as --model pondera and runs the command lm-eval with all arguments unchanged.
Its help: `pondera lm-eval run --help`. Arguments of the model go into --model_args: pretrained (a run folder, a model folder or
a hub name), dtype, tokenizer, revision, effort, max_passes, max_length and others.
Requires lm-eval: in a clone of the repository, pip install ".[eval]"."""
EXAMPLES = """
pondera lm-eval --model pondera --model_args pretrained=runs/ponderlm2-seed0 --tasks lambada_openai
pondera lm-eval --model pondera --model_args pretrained=runs/ponderlm3-seed0,effort=0.5 --tasks arc_easy --batch_size 8
pondera lm-eval ls tasks
"""
MODEL, ADAPTER = "pondera", "pondera.evaluation.lm_eval_adapter:PonderaLM"


class PassThrough(Parser):
    """A parser that passes all arguments to another program, except a single ``--help``."""

    def parse(self, words: Sequence[str]) -> argparse.Namespace:
        """All arguments, unparsed; or the help."""
        return (
            super().parse(["--help"]) if list(words) in ([], ["-h"], ["--help"]) else argparse.Namespace(words=[*words])
        )


def parser() -> Parser:
    """The argument parser of ``pondera lm-eval``."""
    return PassThrough("lm-eval", ABOUT, EXAMPLES)


def run(args: argparse.Namespace) -> int:
    """Runs the command line of lm-eval."""
    try:
        import lm_eval.models  # noqa: F401 (fills the registry, from entry points too where lm-eval reads them)
        from lm_eval.__main__ import cli_evaluate
        from lm_eval.api.registry import model_registry
    except ImportError as error:
        raise UserError(f'lm-eval is not installed ({error}); type in a clone: pip install ".[eval]"') from None
    if MODEL not in model_registry:
        model_registry.register(MODEL, target=ADAPTER)
    given, sys.argv = sys.argv, ["lm-eval", *args.words]
    try:
        cli_evaluate()
    except UserError:
        raise
    except Exception as error:  # bugs and wrong input raise the same exceptions, so the traceback is shown
        traceback.print_exc()
        raise Failure(f"lm-eval failed: {first_line(error)}") from None
    finally:
        sys.argv = given
    return 0
