"""LoRA: a frozen backbone whose attention and MLP matrices learn updates of low rank.

A checkpoint has the merged weights under their ordinary names, so nothing that reads it knows LoRA, and the two factors of each
update in a file of their own, from which training resumes.

Shapes: I inputs, O outputs, R rank; the rows of an input have any leading dimensions.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import cast

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from pondera.arch.families import listed, modules
from pondera.core.errors import UserError
from pondera.core.run_config import TrainConfig
from pondera.models.adaptive_lm import AdaptiveLM
from pondera.models.checkpoints import LORA

A, B = "lora_a_RI", "lora_b_OR"
CLOSE = 1e-4
"""How far rebuilt weights may be from saved ones, as a share of the largest; another device or library rounds differently."""

log = logging.getLogger(__name__)


class LoraLinear(nn.Linear):
    """A linear layer with a frozen weight ``W`` and a trained update of low rank: ``y = x W^T + b + s (x A^T) B^T``.

    ``B`` starts at zero, so the layer starts as the one that it replaces. The gradient of ``W`` is never computed.

    Source: Hu et al., LoRA, arXiv 2106.09685, equation 3, with ``s = alpha / rank`` (section 4.1). The paper draws ``A`` from a
    Gaussian without a scale; here ``A`` is drawn like the weight of a linear layer in torch.

    Args:
        linear: the layer to replace; its tensors are shared.
        rank: rank of the update.
        scale: ``s``.
        generator: draws ``A``, on the CPU.

    Example:
        >>> linear = nn.Linear(6, 4)
        >>> layer = LoraLinear(linear, rank=2, scale=8.0, generator=torch.Generator().manual_seed(0))
        >>> x = torch.ones(3, 6)
        >>> torch.equal(layer(x), linear(x)), [name for name, each in layer.named_parameters() if each.requires_grad]
        (True, ['lora_a_RI', 'lora_b_OR'])
    """

    def __init__(self, linear: nn.Linear, rank: int, scale: float, generator: torch.Generator) -> None:
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        self.weight, self.bias, self.scale = linear.weight, linear.bias, scale
        for frozen in linear.parameters():
            frozen.requires_grad_(False)
        bound, place = linear.in_features**-0.5, {"device": linear.weight.device, "dtype": linear.weight.dtype}
        drawn_RI = torch.empty(rank, linear.in_features, device="cpu").uniform_(-bound, bound, generator=generator)
        self.lora_a_RI = nn.Parameter(drawn_RI.to(**place))
        self.lora_b_OR = nn.Parameter(torch.zeros(linear.out_features, rank, **place))

    def forward(self, input: Tensor) -> Tensor:
        """``x W^T + b + s (x A^T) B^T``, ``[..., O]``."""
        low = F.linear(input, self.lora_a_RI) * self.scale  # scaled where it is narrow
        return super().forward(input) + F.linear(low, self.lora_b_OR)

    def merged_weight(self) -> Tensor:
        """``W + s B A``, ``[O, I]``."""
        return _sum(self.weight.detach(), self.lora_a_RI.detach(), self.lora_b_OR.detach(), self.scale)


def put_lora(model: AdaptiveLM, settings: TrainConfig) -> None:
    """Freezes the backbone of a model and gives its attention and MLP matrices LoRA; what methods add still trains.

    Embeddings, norms and the output matrix of the backbone are frozen without LoRA. For the same seed ``A`` is the same,
    whatever the method of the model is.

    Args:
        model: changed in place.
        settings: ``lora``, ``lora_alpha`` and ``seed``.

    Raises:
        UserError: the linear layers of this architecture are not known, or the rank exceeds their smallest dimension.
    """
    found = _linears(model)
    name, smallest = min(
        ((name, min(linear.weight.shape)) for name, linear in found.items()), key=lambda named: named[1]
    )
    if settings.lora > smallest:
        raise UserError(
            f"train.lora: rank {settings.lora} exceeds the {smallest} dimensions of {name}; use --train.lora {smallest} or less"
        )
    added = {id(parameter) for parameter in model.added_parameters()}
    for parameter in model.parameters():
        if id(parameter) not in added:
            parameter.requires_grad_(False)
    generator = torch.Generator("cpu").manual_seed(settings.seed)
    for name, linear in found.items():
        model.set_submodule(name, LoraLinear(linear, settings.lora, scale(settings), generator))
    trained, count = trained_parameters(model), own_parameters(model)
    log.info(
        "LoRA of rank %d in %d matrices: %s parameters train; the model has %s",
        *(settings.lora, len(found), f"{trained:,}", f"{count:,}"),
    )


def scale(settings: TrainConfig) -> float:
    """The factor of the updates."""
    return settings.lora_alpha / settings.lora


def trained_parameters(model: nn.Module) -> int:
    """The number of parameters that train: those of methods, ``A`` and ``B``; without LoRA all."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def own_parameters(model: nn.Module) -> int:
    """The number of parameters that the model has when LoRA is merged."""
    return sum(parameter.numel() for name, parameter in model.named_parameters() if not name.endswith((A, B)))


def merged(weights: dict[str, Tensor], settings: TrainConfig) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Separates a state dict into the merged weights and the factors of LoRA; without LoRA all of it is weights."""
    factors = {name: tensor for name, tensor in weights.items() if name.endswith((A, B))}
    whole = {name: tensor for name, tensor in weights.items() if name not in factors}
    for name in factors:
        if name.endswith(A):
            layer = name.removesuffix(A)
            weight = f"{layer}weight"
            whole[weight] = _sum(whole[weight], factors[name], factors[layer + B], scale(settings))
    return whole, factors


@torch.no_grad()
def merge(model: nn.Module) -> None:
    """Replaces LoRA in a model by ordinary linear layers with the merged weights."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, LoraLinear):
            plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
            plain.weight, plain.bias = nn.Parameter(layer.merged_weight(), requires_grad=False), layer.bias
            model.set_submodule(name, plain)


def restore(model: AdaptiveLM, original: AdaptiveLM, folder: Path) -> None:
    """Puts the frozen weights and the factors back under a model that was loaded from a checkpoint with merged weights.

    Args:
        model: the loaded model; changed in place.
        original: the model of the first step, with LoRA, from the same backbone; its frozen weights are taken.
        folder: the checkpoint.

    Raises:
        UserError: the frozen weights and the factors do not give the weights of the checkpoint.
    """
    factors, added = load_file(folder / LORA), {id(parameter) for parameter in model.added_parameters()}
    for parameter in model.parameters():
        if id(parameter) not in added:
            parameter.requires_grad_(False)
    for name, layer in list(original.named_modules()):
        if not isinstance(layer, LoraLinear):
            continue
        saved_OI = cast(nn.Linear, model.get_submodule(name)).weight
        with torch.no_grad():
            layer.lora_a_RI.copy_(factors[f"{name}.{A}"])
            layer.lora_b_OR.copy_(factors[f"{name}.{B}"])
        off = float((layer.merged_weight() - saved_OI).abs().max())
        if not off <= CLOSE * float(saved_OI.abs().max()):
            raise UserError(
                f"backbone: {name} of {original.config._checkpoint!r} with LoRA is not the weight of {folder.name}, so the "
                "backbone has changed since the run was started; restore it, or start again with another --out"
            )
        model.set_submodule(name, layer)


def _linears(model: AdaptiveLM) -> dict[str, nn.Linear]:
    """The attention and MLP matrices of the backbone, by name in the model; another kind of layer raises."""
    config, known = model.backbone.config, listed(lambda each: each.modules and each.modules.linears)
    parts = modules(config)
    if parts is None or not parts.linears:
        raise UserError(
            f"train.lora: the linear layers of {config.model_type} are not known; supported: {known}; "
            "leave train.lora out to train all weights"
        )
    layers = cast(nn.ModuleList, getattr(model.backbone.decoder, parts.layers))
    place = next(name for name, module in model.named_modules() if module is layers)
    found: dict[str, nn.Linear] = {}
    for index, layer in enumerate(layers):
        inside = dict(layer.named_modules())
        for name in parts.linears:
            linear = inside.get(name)
            if type(linear) is not nn.Linear:
                what = "nothing" if linear is None else f"a {type(linear).__name__}"
                raise UserError(
                    f"train.lora: a {config.model_type} has a linear layer {name}, and layer {index} of this backbone has "
                    f"{what} there; leave train.lora out, or give another backbone"
                )
            found[f"{place}.{index}.{name}"] = linear
    return found


def _sum(weight_OI: Tensor, a_RI: Tensor, b_OR: Tensor, scale: float) -> Tensor:
    return (weight_OI.float() + scale * (b_OR.float() @ a_RI.float())).to(weight_OI.dtype)
