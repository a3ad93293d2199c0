"""Texts in which something has to be recalled, made by rule, and a small model that learns to.

Tokens are numbers. All texts run over the same chain, in which each token is followed by one of four; what is to be
recalled is random, so nothing but the past tells it. Four kinds of text, of which the second half is what is asked:

needle   eight keys with four random tokens each stand in a text; one key comes back, and its four tokens are asked for
list     a list of 12 random tokens stands in a text; its mark comes back, and the list is asked for
copy     the whole text is random tokens; its mark comes back, and the first 12 are asked for
text     eight random phrases of six tokens stand in a text twice each; the loss on its last 48 tokens is taken

Shapes: B batch, T tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

VOCAB, PROMPT, ANSWER, TEXT_ANSWER = 96, 128, 12, 48
LIST, COPY = 1, 2
KEYS = range(3, 19)
WORDS = range(19, VOCAB)
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}


@dataclass(frozen=True)
class Texts:
    """Some texts of one kind.

    Args:
        ids_BT: the prompt and what is asked for.
        prompt: tokens of the prompt; in `needle` and `list` its last is the key or mark that comes back.
        counts_BT: tokens whose prediction counts in training.
    """

    ids_BT: Tensor
    prompt: int
    counts_BT: Tensor


@cache
def _chain() -> Tensor:
    """``[words, 4]``: what may follow each word."""
    return torch.randint(len(WORDS), (len(WORDS), 4), generator=torch.Generator().manual_seed(1234))


def _text(batch: int, tokens: int, draw: torch.Generator) -> Tensor:
    word_B = torch.randint(len(WORDS), (batch,), generator=draw)
    found = []
    for _ in range(tokens):
        found.append(word_B)
        word_B = _chain()[word_B, torch.randint(4, (batch,), generator=draw)]
    return torch.stack(found, dim=1) + WORDS[0]


def _random(batch: int, tokens: int, draw: torch.Generator) -> Tensor:
    return torch.randint(WORDS[0], VOCAB, (batch, tokens), generator=draw)


def needle(batch: int, draw: torch.Generator) -> Texts:
    """See above."""
    ids_BT = _text(batch, PROMPT + 4, draw)
    for row in ids_BT:
        places = (torch.randperm((PROMPT - 2) // 6, generator=draw)[:8] * 6).tolist()
        keys = (torch.randperm(len(KEYS), generator=draw)[:8] + KEYS[0]).tolist()
        for place, key in zip(places, keys, strict=True):
            row[place] = key
            row[place + 1 : place + 5] = _random(1, 4, draw)[0]
        asked = int(torch.randint(8, (1,), generator=draw))
        row[PROMPT - 1] = keys[asked]
        row[PROMPT:] = row[places[asked] + 1 : places[asked] + 5]
    return _counted(ids_BT, PROMPT)


def list_(batch: int, draw: torch.Generator) -> Texts:
    """See above."""
    ids_BT = _text(batch, PROMPT + ANSWER, draw)
    for row in ids_BT:
        place = int(torch.randint(PROMPT - 2 * ANSWER, (1,), generator=draw))
        row[place] = row[PROMPT - 1] = LIST
        row[place + 1 : place + 1 + ANSWER] = row[PROMPT:] = _random(1, ANSWER, draw)[0]
    return _counted(ids_BT, PROMPT)


def copy(batch: int, draw: torch.Generator, tokens: int = PROMPT - 2) -> Texts:
    """See above; shorter ones, whose copies are longer, in training."""
    ids_BT = torch.full((batch, PROMPT + ANSWER), COPY)
    ids_BT[:, 1 : 1 + tokens] = _random(batch, tokens, draw)
    rest = PROMPT + ANSWER - tokens - 2
    again_BT = ids_BT[:, 1 : 1 + min(rest, tokens)]
    ids_BT[:, 2 + tokens : 2 + tokens + again_BT.shape[1]] = again_BT
    return _counted(ids_BT[:, : 2 + tokens + again_BT.shape[1]], 2 + tokens)


def text(batch: int, draw: torch.Generator) -> Texts:
    """See above."""
    ids_BT = _text(batch, PROMPT + TEXT_ANSWER, draw)
    for row in ids_BT:
        for phrase in range(8):
            words = _random(1, 6, draw)[0]
            row[16 * phrase + 2 : 16 * phrase + 8] = words
            back = PROMPT + 6 * phrase if phrase % 2 else 16 * phrase + 9
            row[back : back + 6] = words
    return Texts(ids_BT, PROMPT, torch.ones_like(ids_BT, dtype=torch.bool))


def _counted(ids_BT: Tensor, prompt: int) -> Texts:
    return Texts(ids_BT, prompt, torch.arange(ids_BT.shape[1]).expand(ids_BT.shape) >= prompt)


KINDS = {"needle": needle, "list": list_, "copy": copy, "text": text}


def trained(seed: int, steps: int, batch: int, folder: Path) -> LlamaForCausalLM:
    """The model of this seed: from the folder if it is there, else trained and left there."""
    if (folder / "model.safetensors").is_file():
        return LlamaForCausalLM.from_pretrained(folder).eval()
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, initializer_range=0.02, **SIZES)).train()
    draw = torch.Generator().manual_seed(1000 + seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.98), weight_decay=0.01)
    for step in range(steps):
        # Half of the time goes to copies alone, short ones first: heads that copy are learnt from nothing else as soon.
        begun = 2 * step / steps
        longest = int(12 + 40 * begun if begun < 1 else PROMPT - 2)
        length = int(torch.randint(8, longest + 1, (1,), generator=draw))
        parts = [copy(batch if begun > 1 else 4 * batch, draw, length)]
        if begun > 1:
            parts += [needle(batch, draw), list_(batch, draw), text(batch, draw)]
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1, step / 50) * (0.05 + 0.95 * (1 + math.cos(math.pi * step / steps)) / 2)
        loss = torch.stack([_loss(model, part) for part in parts]).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0:
            print(f"seed {seed}, step {step}: loss {loss.item():.3f}", flush=True)
    model.save_pretrained(folder)
    return model.eval()


def _loss(model: LlamaForCausalLM, part: Texts) -> Tensor:
    labels_BT = part.ids_BT.masked_fill(~part.counts_BT, -100)
    loss = model(part.ids_BT, labels=labels_BT).loss
    assert loss is not None
    return loss
