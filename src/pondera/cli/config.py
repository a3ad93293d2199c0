"""Loads and checks the config of a run before slow imports."""

from __future__ import annotations

from typing import Any

from pondera.core import run_config, spec
from pondera.core.errors import UserError
from pondera.core.flow_config import FlowConfig, check
from pondera.core.run_config import RunConfig


def load_config(source: str, overrides: dict[str, Any]) -> RunConfig:
    """Loads a recipe or YAML file with dotted overrides and checks that its methods exist."""
    config = run_config.load(source, overrides)
    for seam in spec.SEAMS:
        text = getattr(config, seam)
        if text is not None:
            try:
                spec.find(spec.parse(text).name, seam)
            except UserError as error:
                raise UserError(f"{seam}: {error}") from None
    return config


def load_flow_config(source: str, overrides: dict[str, Any]) -> FlowConfig:
    """Loads a recipe or YAML file of a GFlowNet with dotted overrides and checks that its parts exist."""
    config = run_config.load(source, overrides, FlowConfig)
    check(config)
    for part in spec.FLOWS:
        try:
            spec.find(spec.parse(getattr(config, part)).name, part)
        except UserError as error:
            raise UserError(f"{part}: {error}") from None
    return config
