"""Synthetic recall sequences, and a small model that learns to solve them.

All sequences follow the same Markov chain, in which each token has four possible successors. The tokens to recall are random,
so only the context determines them. There are four kinds of sequences:

needle   contains eight keys, each followed by four random tokens; one key is repeated, and its four tokens are the answer
list     contains a mark and 12 random tokens; the mark is repeated, and the 12 tokens are the answer
copy     consists of a mark and random tokens; the mark is repeated, and the first 12 tokens are the answer
text     contains eight random phrases of six tokens, each of them twice; the loss is that of the last 48 tokens

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
    """Sequences of one kind.

    Args:
        ids_BT: the prompt and the answer.
        prompt: tokens of the prompt; in `needle` and `list` the last one is the repeated key or mark.
        counts_BT: the tokens that count in the training loss.
    """

    ids_BT: Tensor
    prompt: int
    counts_BT: Tensor


@cache
def _chain() -> Tensor:
    """``[words, 4]``: the possible successors of each word."""
    return torch.randint(len(WORDS), (len(WORDS), 4), generator=torch.Generator().manual_seed(1234))


def _text(batch: int, tokens: int, draw: torch.Generator) -> Tensor:
    word_B = torch.randint(len(WORDS), (batch,), generator=draw)
    words = []
    for _ in range(tokens):
        words.append(word_B)
        word_B = _chain()[word_B, torch.randint(4, (batch,), generator=draw)]
    return torch.stack(words, dim=1) + WORDS[0]


def _random(batch: int, tokens: int, draw: torch.Generator) -> Tensor:
    return torch.randint(WORDS[0], VOCAB, (batch, tokens), generator=draw)


def needle(batch: int, draw: torch.Generator) -> Texts:
    """Sequences of the kind `needle`; see the top of the file."""
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
    """Sequences of the kind `list`; see the top of the file."""
    ids_BT = _text(batch, PROMPT + ANSWER, draw)
    for row in ids_BT:
        place = int(torch.randint(PROMPT - 2 * ANSWER, (1,), generator=draw))
        row[place] = row[PROMPT - 1] = LIST
        row[place + 1 : place + 1 + ANSWER] = row[PROMPT:] = _random(1, ANSWER, draw)[0]
    return _counted(ids_BT, PROMPT)


def copy(batch: int, draw: torch.Generator, tokens: int = PROMPT - 2) -> Texts:
    """Sequences of the kind `copy`; see the top of the file. Training also uses shorter ones with longer answers."""
    ids_BT = torch.full((batch, PROMPT + ANSWER), COPY)
    ids_BT[:, 1 : 1 + tokens] = _random(batch, tokens, draw)
    rest = PROMPT + ANSWER - tokens - 2
    again_BT = ids_BT[:, 1 : 1 + min(rest, tokens)]
    ids_BT[:, 2 + tokens : 2 + tokens + again_BT.shape[1]] = again_BT
    return _counted(ids_BT[:, : 2 + tokens + again_BT.shape[1]], 2 + tokens)


def text(batch: int, draw: torch.Generator) -> Texts:
    """Sequences of the kind `text`; see the top of the file."""
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
    """The model of this seed: loaded from the folder, or trained and saved there."""
    if (folder / "model.safetensors").is_file():
        return LlamaForCausalLM.from_pretrained(folder).eval()
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, initializer_range=0.02, **SIZES)).train()
    draw = torch.Generator().manual_seed(1000 + seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.98), weight_decay=0.01)
    for step in range(steps):
        # The first half of training uses only copies, short ones first: it forms copying heads fastest.
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
