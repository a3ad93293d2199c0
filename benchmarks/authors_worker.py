"""Worker process of `benchmarks/authors.py`: builds a model, then runs the command of each line on stdin.

Shapes: B batch, T tokens, V vocabulary.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

OURS = "backbone.lm."
"""The prefix of the backbone's parameter names in `AdaptiveLM`."""


def ours(job: dict[str, Any]) -> torch.nn.Module:
    """AdaptiveLM with the initialisation of the papers and its embedding scale."""
    from pondera import AdaptiveConfig, AdaptiveLM

    return AdaptiveLM(AdaptiveConfig(backbone=dict(job["backbone"]), think=job["think"], init="scaled"))


def theirs(job: dict[str, Any]) -> torch.nn.Module:
    """The authors' class, loaded from their file, with the settings of their loader on the config."""
    spec = importlib.util.spec_from_file_location("authors_modeling", job["file"])
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # transformers looks for a model's module by name
    spec.loader.exec_module(module)
    model_class = getattr(module, job["model"])
    fields = {key: value for key, value in job["backbone"].items() if key != "model_type"}
    config = model_class.config_class(
        **fields, use_cache=False
    )  # otherwise their model fills an unused cache in training
    for name, value in job["settings"].items():
        setattr(config, name, value)
    return model_class(config)


class Worker:
    """A model and a batch of random tokens; each public method is a command."""

    def __init__(self, job: dict[str, Any]) -> None:
        torch.set_num_threads(job["threads"])
        torch.manual_seed(0)
        self.model = {"ours": ours, "theirs": theirs}[job["side"]](job).train()
        self.renamed = job.get("renamed", {})
        shape, vocabulary = (job["batch"], job["context"]), job["backbone"]["vocab_size"]
        self.x_BT = torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(0))

    def describe(self) -> dict[str, Any]:
        """Versions, and the attention implementation."""
        import transformers

        config: Any = getattr(self.model, "backbone", self.model).config
        return {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "attention": config._attn_implementation,
            "dtype": str(next(self.model.parameters()).dtype),
        }

    def step(self) -> Any:
        """Forward and backward."""
        self.model.zero_grad(set_to_none=True)
        out = self.model(input_ids=self.x_BT, labels=self.x_BT)
        out.loss.backward()
        return out

    def go(self) -> dict[str, float]:
        """Seconds of one step."""
        start = time.perf_counter()
        self.step()
        return {"seconds": time.perf_counter() - start}

    def flops(self) -> dict[str, int]:
        """FLOPs of one step, with attention as plain matrix products: torch does not count the fused CPU kernel."""
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            self.step()
        return {"flops": counter.get_total_flops()}

    def write(self, path: str) -> dict[str, float]:
        """Saves each weight that has a gradient, with its gradient, and the logits; returns the loss."""
        out = self.step()
        tensors = {"logits": out.logits.detach().contiguous()}
        for name, parameter in self.model.named_parameters():
            if parameter.grad is not None:
                tensors |= {f"weight {name}": parameter.detach(), f"gradient {name}": parameter.grad}
        save_file(tensors, path)
        count = sum(tensor.numel() for name, tensor in tensors.items() if name.startswith("weight "))
        return {"loss": out.loss.item(), "parameters": count}

    def own_name(self, name: str) -> str:
        """Pondera's name of a parameter of the authors' model."""
        module, _, rest = name.partition(".")
        return f"{OURS}{self.renamed.get(module, module)}.{rest}"

    def compare(self, path: str) -> dict[str, float]:
        """Loads the other side's weights and compares loss, logits and gradients.

        Raises:
            SystemExit: the parameters of the two models differ.
        """
        other = load_file(path)
        names = [name.removeprefix("weight ") for name in other if name.startswith("weight ")]
        parameters = dict(self.model.named_parameters())
        if differing := {self.own_name(name) for name in names} ^ parameters.keys():
            raise SystemExit(f"the parameters of the two sides differ: {sorted(differing)[:8]}")
        pairs = [(parameters[self.own_name(name)], name) for name in names]
        with torch.no_grad():
            for parameter, name in pairs:
                parameter.copy_(other[f"weight {name}"])
        out = self.step()
        off, size = 0.0, 0.0
        for parameter, name in pairs:
            theirs, own = other[f"gradient {name}"], parameter.grad
            off += (theirs if own is None else theirs - own).square().sum().item()
            size += theirs.square().sum().item()
        return {
            "loss": out.loss.item(),
            "logits_difference": (out.logits.detach() - other["logits"]).abs().max().item(),
            "gradient_difference": (off / size) ** 0.5,
        }


def main() -> None:
    answers, sys.stdout = sys.stdout, sys.stderr  # keeps prints of libraries out of the answers
    worker = Worker(json.loads(Path(sys.argv[1]).read_text()))
    for line in sys.stdin:
        command, *arguments = line.split(maxsplit=1)
        action: Callable[..., dict[str, Any]] = getattr(worker, command)
        print(json.dumps(action(*(argument.strip() for argument in arguments))), file=answers, flush=True)


if __name__ == "__main__":
    main()
