"""When do codebooks collapse? Initialisation x encoder width x start of quantization, on clusters, images and text states.

    python -m experiments.collapse.run                                  everything, about half an hour on two cores
    python -m experiments.collapse.run --data clusters --seeds 1        a first look
    python -m experiments.collapse.run --smoke      a check that it runs

A small autoencoder with a codebook of 256 codes learns to reconstruct vectors; ``common/autoencoders.py`` describes the data
and the measurements. Results go to ``results/collapse.json``.
"""

from __future__ import annotations

from experiments.common.autoencoders import Setting, sweep


def settings(steps: int) -> dict[str, Setting]:
    """Settings by name, in the order of the table."""
    late = steps // 4
    return {
        "random, std 1": Setting("VQ(256, scale=1.0)"),
        "random, std 1/256": Setting("VQ(256, scale=0.00390625)"),
        "random, std 8": Setting("VQ(256, scale=8.0)"),
        "k-means at step 0": Setting("VQ(256, init='kmeans')"),
        "warm-up, then k-means": Setting(f"VQ(256, init='kmeans', start_step={late})", warmup=late),
        "warm-up, then random": Setting(f"VQ(256, scale=1.0, start_step={late})", warmup=late),
        "warm-up, k-means, respawn": Setting(f"VQ(256, init='kmeans', start_step={late}, respawn=0.01)", warmup=late),
        "random, std 1, rotation": Setting("VQ(256, scale=1.0, estimator='rotation')"),
        "SimVQ": Setting("SimVQ(256, estimator='straight_through')"),
        "SimVQ, rotation": Setting("SimVQ(256, estimator='rotation')"),
        "warm-up, then SimVQ": Setting(
            f"SimVQ(256, init='match', start_step={late}, estimator='straight_through')", warmup=late
        ),
        "warm-up, then SimVQ, rotation": Setting(
            f"SimVQ(256, init='match', start_step={late}, estimator='rotation')", warmup=late
        ),
        "encoder of width 4": Setting(f"VQ(256, init='kmeans', start_step={late})", encoder=4, warmup=late),
    }


if __name__ == "__main__":
    sweep(__doc__, "collapse", settings, steps=2000)
