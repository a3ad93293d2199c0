"""`transformers serve` with an AdaptiveLM in it, asked by the `openai` client."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
import torch
from helpers.architectures import BACKBONES
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from pondera import AdaptiveConfig, AdaptiveLM

CHOSEN = {
    "plain": {},
    "thinking": {"think": "PonderLM2(thoughts=1)"},
    "remembering": {"kv_cache": "H2O(budget=64)"},
}
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
PROMPT = "the sea was calm"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """One checkpoint of each, with its tokenizer."""
    words = {word: number for number, word in enumerate(["<eos>", *PROMPT.split(), *(f"w{n}" for n in range(90))])}
    inner = Tokenizer(models.WordLevel(words, unk_token="<eos>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<eos>", pad_token="<eos>", chat_template=TEMPLATE
    )
    made = tmp_path_factory.mktemp("served")
    for name, chosen in CHOSEN.items():
        torch.manual_seed(0)
        backbone = dict(BACKBONES["llama"], vocab_size=len(tokenizer), eos_token_id=0, pad_token_id=0)
        AdaptiveLM(AdaptiveConfig(backbone=backbone, **chosen)).save_pretrained(made / name)
        tokenizer.save_pretrained(made / name)
    return made


@pytest.fixture(scope="module")
def client(folder: Path) -> Iterator[openai.OpenAI]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    serve = "import pondera.models.adaptive_lm; from transformers.cli.transformers import main; main()"
    command = [sys.executable, "-c", serve, "serve", "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    log = folder / "log"
    with log.open("w") as out:
        server = subprocess.Popen(command, stdout=out, stderr=out, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    try:
        asked = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=60)
        for _ in range(600):
            try:
                socket.create_connection(("127.0.0.1", port)).close()
                break
            except OSError:
                assert server.poll() is None, log.read_text()
                time.sleep(0.1)
        yield asked
    finally:
        server.terminate()
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()


@pytest.mark.parametrize("name", CHOSEN)
def test_a_checkpoint_is_served_and_streamed(name: str, folder: Path, client: openai.OpenAI):
    asked = {
        "model": str(folder / name),
        "messages": [{"role": "user", "content": PROMPT}],
        "max_tokens": 5,
        "temperature": 0,
    }
    whole = client.chat.completions.create(**asked)
    pieces = [
        part.choices[0].delta.content or ""
        for part in client.chat.completions.create(**asked, stream=True)
        if part.choices
    ]
    tokenizer, model = (
        PreTrainedTokenizerFast.from_pretrained(folder / name),
        AdaptiveLM.from_pretrained(folder / name).eval(),
    )
    x = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    right = model.generate(x, attention_mask=torch.ones_like(x), max_new_tokens=5, do_sample=False)
    text = tokenizer.decode(right[0, x.shape[1] :], skip_special_tokens=True)
    assert text and whole.choices[0].message.content == text and "".join(pieces).strip() == text
