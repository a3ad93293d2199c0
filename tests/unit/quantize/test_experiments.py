"""The experiments with quantizers: their settings are what they say, and one short run has all that tables read."""

from __future__ import annotations

import re

import pytest
from helpers import scripts

from pondera.core import spec
from pondera.methods.quantize.common.diagnosis import KINDS, judge

autoencoders, collapse, quantizers = (
    scripts.load(f"experiments.{name}") for name in ("common.autoencoders", "collapse.run", "quantizers.run")
)


def test_quantizers_are_compared_at_equal_bits():
    settings = quantizers.settings(1000)
    for name, setting in settings.items():
        made = spec.build(setting.quantizer, "quantize").build(autoencoders.WIDTH)
        said = re.search(r"(\d+) bits", name)
        assert made.bits == (int(said[1]) if said else 0), name
        assert ("start_step" in setting.quantizer) == (setting.warmup > 0), name
    methods = {spec.build(one.quantizer, "quantize").__class__.__name__ for one in settings.values()}
    assert methods == set(spec.index(("quantize",)))


def test_a_setting_warms_up_as_long_as_its_codebook_waits():
    for name, setting in collapse.settings(2000).items():
        made = spec.build(setting.quantizer, "quantize")
        assert made.start_step == setting.warmup and made.codes == 256, name
        assert name.startswith(("warm-up", "encoder")) == (setting.warmup == 500), name


def test_a_run_says_what_the_tables_read_and_the_same_each_time(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(autoencoders, "LEARNT_ON", 4096)
    monkeypatch.setattr(autoencoders, "HELD_OUT", 1024)
    setting = collapse.settings(12)["encoder of width 4"]
    found, again = (autoencoders.learn(setting, "clusters", 0, 12) for _ in range(2))
    assert {**found, "seconds": 0} == {**again, "seconds": 0}
    assert set(autoencoders.JUDGED_BY) < set(found["diagnosis"]) and judge(found["diagnosis"], 16) in KINDS
    assert 0 < found["purity"] <= 1 and found["bits"] == 8
    before = found["after_warmup"]
    assert before["perplexity"] is None and "diagnosis" not in before
    assert 0 < before["effective_rank_input"] <= 4  # as many as the encoder is wide
    assert found["perplexity"] <= found["usage"] * 256 + 1e-6
