"""Codebook collapse: compares the codebooks of a model, or one from a file, with k-means codebooks of the same size.

Shapes: N vectors, C width, K codes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pondera.core.errors import UserError
from pondera.data.tokenizer import encode
from pondera.methods.probe.base import Plot, Probe, Shown, observed

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerFast

    from pondera.models.adaptive_lm import AdaptiveLM

TENSORS = ("latents", "codebook")
POINTS = 64
"""Maximum number of points of a curve."""


class Collapse(Probe):
    """Diagnoses codebooks: detects two failures that "codebook usage" confuses, and suggests a cure for each.

    *Token collapse*: codebook rows crowd together or die, so codes are wasted. *Embedding collapse*: the vectors vary
    in few directions, so even a perfect codebook has little to distinguish. The reference for both is a k-means
    codebook, fitted to half of the same vectors and measured on the other half. For a model, the vectors are the inputs
    of its quantizer while the model reads the text. A file of tensors (safetensors) contains ``latents [N, C]`` and
    ``codebook [K, C]``.

    Source: arXiv 2411.16550 and 2603.17052.
    Cost: one pass over the text, and k-means for each codebook.
    When not to use it: on the text that the codebook was trained on, or on fewer than a few thousand vectors.
    Resolved: the thresholds, see `pondera.methods.quantize.common.diagnosis`.

    Args:
        rank: effective rank of the vectors before quantization started, or ``None`` if unknown.
        max_tokens: maximum number of tokens to read, from the beginning of the text.

    Example:
        >>> Collapse(rank=12.0)
        Collapse(12.0)
    """

    def __init__(self, rank: float | None = None, max_tokens: int = 65536) -> None:
        if max_tokens < 1:
            raise UserError(f"max_tokens={max_tokens}: give 1 or more")
        self.rank, self.max_tokens = rank, max_tokens

    def look(self, tensors: dict[str, Tensor]) -> dict[str, Any]:
        """See `Probe.look`; reads ``latents`` and ``codebook``."""
        for name in TENSORS:
            if name not in tensors:
                raise UserError(
                    f"the file has no tensor {name!r}; it needs {' and '.join(TENSORS)}, and has: "
                    f"{', '.join(sorted(tensors))}"
                )
            if tensors[name].dim() != 2 or not tensors[name].is_floating_point():
                shape = list(tensors[name].shape)
                raise UserError(f"{name}: give a matrix of floats, got {tensors[name].dtype} of shape {shape}")
        return {"codebooks": [self._judge("codebook", tensors["latents"], tensors["codebook"])]}

    def run(self, model: AdaptiveLM, tokenizer: PreTrainedTokenizerFast, text: str) -> dict[str, Any]:
        """See `Probe.run`.

        Returns:
            ``codebooks``: for each codebook its ``name``, its diagnosis, and the curves for `show`.
        """
        import torch

        if not text:
            raise UserError("the text is empty; give one of a few thousand tokens")
        ids, _ = next(encode([text], tokenizer, model.embedded))
        ids_T = torch.from_numpy(ids[: self.max_tokens].astype("int64"))
        context = min(model.positions or 256, 256)
        quantized_windows: list[tuple[Tensor, Tensor]] = []
        with observed(model):
            for start in range(0, len(ids_T), context):
                quantized = model(ids_T[None, start : start + context].to(model.device)).trace.get("quantized")
                if quantized is None:
                    raise UserError(
                        "this model has no codebook, so none can collapse; give a model that was trained with a "
                        'quantizer, such as chunk: "ConceptLM()", or a .safetensors file with latents and codebook'
                    )
                quantized_windows.append(quantized)
        x_NGC, table_GRKC = torch.cat([x for x, _ in quantized_windows]), quantized_windows[0][1]
        return {
            "codebooks": [
                self._judge(f"segment {group + 1}", x_NGC[:, group], table_GRKC[group, 0])
                for group in range(len(table_GRKC))
            ]
        }

    def _judge(self, name: str, x_NC: Tensor, table_KC: Tensor) -> dict[str, Any]:
        """Diagnosis and curves of one codebook."""
        import torch

        from pondera.methods.quantize.common.diagnosis import diagnose
        from pondera.methods.quantize.common.nearest import nearest

        diagnosis = diagnose(x_NC, table_KC, self.rank).to_dict()
        x_NC, table_KC = x_NC.float().cpu(), table_KC.float().cpu()
        code_N = nearest(x_NC, table_KC)
        counts_K = torch.bincount(code_N, minlength=len(table_KC)).sort(descending=True).values
        return {
            "name": name,
            **diagnosis,
            "shares": _thinned((counts_K / counts_K.sum()).tolist()),
            "spectrum_vectors": _thinned(_spectrum(x_NC)),
            "spectrum_codes": _thinned(_spectrum(table_KC[code_N])),
        }

    def show(self, found: dict[str, Any]) -> Shown:
        """One row per codebook; the curves show the first codebook."""
        measured = ["usage", "perplexity", "of k-means", "error", "error of k-means", "rank", "rank of codes"]
        rows = [
            [
                one["name"],
                one["kind"],
                f"{one['usage']:.0%} of {one['codes']}",
                f"{one['perplexity']:.1f}",
                f"{one['reachable_perplexity']:.1f}",
                f"{one['split_error']:.3f}",
                f"{one['reachable_error']:.3f}",
                f"{one['effective_rank_input']:.1f} of {one['width']}",
                f"{one['effective_rank_codes']:.1f}",
            ]
            for one in found["codebooks"]
        ]
        return Shown(["codebook", "verdict", *measured], rows, _summary(found["codebooks"]), _plots(found["codebooks"]))


def _summary(books: list[dict[str, Any]]) -> str:
    """The verdict as text; explains the worst of several codebooks."""
    sick = [one for one in books if one["kind"] != "healthy"]
    worst = max(sick or books, key=lambda one: one["split_error"] / max(one["reachable_error"], 1e-9))
    prefix = f"{worst['name']}: " if len(books) > 1 else ""
    counted = f"{len(sick)} of {len(books)} codebooks are collapsed. " if len(books) > 1 else ""
    cure = f" Recommended: {worst['cure']}" if worst["cure"] else ""
    return f"{counted}{prefix}{worst['kind']}. {worst['why']}{cure}"


def _plots(books: list[dict[str, Any]]) -> list[Plot]:
    """Charts of the code usage and of the variance per direction."""
    uses = {one["name"]: [(at, share) for at, share in one["shares"] if share > 0] for one in books}
    spectra = {"vectors": books[0]["spectrum_vectors"], "codes, weighted by use": books[0]["spectrum_codes"]}
    return [
        Plot("Code usage", "code, sorted by use", "share of the vectors", uses, log_y=True),
        Plot(
            f"Variance per direction ({books[0]['name']})",
            "direction, sorted by variance",
            "share of the variance",
            {name: [(at, share) for at, share in points if share > 1e-9] for name, points in spectra.items()},
            log_y=True,
        ),
    ]


def _spectrum(x_NC: Tensor) -> list[float]:
    """Share of the variance in each principal direction, in descending order."""
    import torch

    covariance_CC = x_NC.double().T.cov(correction=0).reshape(x_NC.shape[1], -1)
    eigen_C = torch.linalg.eigvalsh(covariance_CC).flip(0).clamp_min(0)
    total = float(eigen_C.sum())
    return (eigen_C / total).tolist() if total else [0.0] * len(eigen_C)


def _thinned(values: list[float]) -> list[list[float]]:
    """Numbers the values from 1 and keeps at most `POINTS` of them, including the last."""
    step = -(-len(values) // POINTS)
    places = sorted({*range(0, len(values), step), len(values) - 1})
    return [[float(at + 1), values[at]] for at in places]
