"""Python calls in Pondera of one decode step, by function.

    python -m benchmarks.python_calls "H2O(24)" "SnapKV(24, window=4)"

The model is a llama with two layers and random weights. Every counted step of an eviction policy evicts. Functions that Python
generates, such as the constructors of dataclasses, and functions of torch and transformers are not counted.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import pondera

SIZES: dict[str, Any] = dict(
    hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
)
VOCABULARY, PROMPT, STEPS = 97, 48, 3


def calls_of(work: Callable[[], Any]) -> Counter[str]:
    """Calls of functions of Pondera during `work`, by file and name."""
    calls: Counter[str] = Counter()
    folder = f"{Path(pondera.__file__).parent}{os.sep}"  # not by name alone: a clone may lie in a folder of that name

    def profile(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(folder):
            calls[f"{frame.f_code.co_filename.removeprefix(folder)}: {frame.f_code.co_qualname}"] += 1

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        work()
    finally:
        sys.setprofile(before)
    return calls


def calls_of_step(method: Any, prompt: int = PROMPT) -> Counter[str]:
    """Calls of a decode step with a KV cache method; the cache has seen the prompt and a few more tokens."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **SIZES)).eval()
    if not getattr(method, "fitted", True):
        method.fit(model, [torch.randint(VOCABULARY, (4, 64))])
    cache = method.cache(model)
    with torch.no_grad():
        model(torch.randint(VOCABULARY, (1, prompt)), past_key_values=cache)
        for _ in range(STEPS):
            model(torch.randint(VOCABULARY, (1, 1)), past_key_values=cache)
        token = torch.randint(VOCABULARY, (1, 1))
        return calls_of(lambda: model(token, past_key_values=cache))


def main() -> None:
    from pondera.core import spec

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="+", help="spec strings of KV cache methods")
    for text in parser.parse_args().methods:
        calls = calls_of_step(spec.build(text, "kv_cache"))
        print(f"{text}: {calls.total()} calls")
        for name, count in sorted(calls.items()):
            print(f"{count:6d}  {name}")


if __name__ == "__main__":
    main()
