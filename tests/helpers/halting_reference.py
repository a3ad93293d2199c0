"""A think method with a varying number of passes and complete traces, for tests of traces, probes and reports."""

from __future__ import annotations

from pathlib import Path

METHOD = '''
import torch

from pondera.cost.schedule import DecoderPass
from pondera.methods.think.base import MethodOutput, Think
from pondera.methods.think.common.interleave import interleaved_cache


class Halting(Think):
    """Runs two passes per token, except for every third token, which halts after its first pass."""

    paper, cost = "no paper, for tests", "5/3 passes"

    def new_cache(self, backbone, kv_cache=None):
        return interleaved_cache(backbone, 1, kv_cache)

    def forward(self, backbone, batch):
        first_BTD = backbone.step(batch.h_BTD, None, batch.mask, batch.position_ids)
        second_BTD = backbone.step(first_BTD, None, batch.mask, batch.position_ids)
        continue_BT = (batch.position_ids % 3 > 0).expand(first_BTD.shape[:2])
        last_BTD = torch.where(continue_BT[..., None], second_BTD, first_BTD)
        change = (last_BTD - first_BTD).abs().max().item()
        trace = {"states": [first_BTD, last_BTD], "residuals": [change, change / 10]} if self.record else {}
        return MethodOutput(last_BTD, 1 + continue_BT.long(), trace=trace)

    def cost_schedule(self, tokens, context=0, *others, **given):
        return [DecoderPass(tokens, context + tokens, repeats=2)]
'''


def write_method(folder: Path) -> Path:
    """Writes the method into a folder; returns the folder, for PONDERA_METHODS."""
    (folder / "think").mkdir(parents=True)
    (folder / "think" / "halting.py").write_text(METHOD)
    return folder
