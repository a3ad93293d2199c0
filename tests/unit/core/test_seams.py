"""The table of seams is the one place that names them: settings, configs, index and imports follow from it."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path

from pondera.core import run_config, spec
from pondera.core.run_config import RunConfig
from pondera.core.seams import SEAMS, SeamSettings
from pondera.models.config import SETTINGS, AdaptiveConfig

SOURCES = spec.PACKAGE.parent
FIELD = '    draft: str | None = option(None, "what proposes tokens, e.g. Guess(2)")\n'
GUESS = '''class Guess:
    """Proposes the last token again."""
    paper, cost = "none", "nothing"
    def __init__(self, tokens: int = 1) -> None:
        self.tokens = tokens
'''
USE = """
from pondera import AdaptiveConfig, Guess
from pondera.core import run_config, spec
from pondera.training.build import adaptive_config
backbone = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
run = run_config.from_dict({"backbone": backbone, "draft": "Guess(2)"})
saved = AdaptiveConfig.from_dict(adaptive_config(run, 97).to_diff_dict())
assert saved.draft == "Guess(2)" and isinstance(spec.build(saved.draft, "draft"), Guess)
assert run_config.fields()["draft"].metadata["help"].startswith("what proposes")
try:
    AdaptiveConfig(draft="Gues(2)")
except ValueError as error:
    assert "did you mean 'Guess'" in str(error)
    print("done")
"""


def test_runs_and_configs_have_the_settings_of_the_table():
    for config in (RunConfig, AdaptiveConfig):
        own = [setting.name for setting in dataclasses.fields(config) if setting.name in SEAMS]
        assert own == list(SEAMS) and issubclass(config, SeamSettings)
        assert not set(SEAMS) & set(vars(config).get("__annotations__", {})), "named in the table, and there alone"
    assert set(SEAMS) < set(SETTINGS) and list(run_config.fields())[:4] == ["name", "about", "backbone", "init"]
    assert all((spec.PACKAGE / seam / "__init__.py").is_file() for seam in SEAMS)


def test_a_new_seam_is_one_field_and_one_folder(tmp_path: Path):
    """On a copy of the package: what its methods do in a model is the third place, `AdaptiveLM`."""
    shutil.copytree(SOURCES, tmp_path / "pondera", ignore=shutil.ignore_patterns("__pycache__"))
    table = tmp_path / "pondera" / "core" / "seams.py"
    table.write_text(table.read_text().replace("    head: str", f"{FIELD}    head: str"))
    folder = tmp_path / "pondera" / "methods" / "draft"
    folder.mkdir()
    (folder / "guess.py").write_text(GUESS)
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", USE], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.stdout == "done\n", done.stderr
