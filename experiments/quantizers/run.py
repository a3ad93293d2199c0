"""How much do quantizers lose at equal bits? Each one between encoder and decoder, at 8 and at 12 bits per vector.

    python -m experiments.quantizers.run                                everything, about a quarter of an hour on two cores
    python -m experiments.quantizers.run --data clusters --seeds 1      a first look
    python -m experiments.quantizers.run --smoke      a check that it runs

Data, networks and measurements are those of ``experiments/collapse``, with half the steps. Every quantizer is initialised as
its docstring recommends: codebooks by k-means after a warm-up, SimVQ with the authors' straight-through gradient from the
first step, and quantizers with fixed values without a warm-up, because they have nothing to initialise. The control,
`Identity`, does not quantize. Results go to ``results/quantizers.json``.
"""

from __future__ import annotations

from experiments.common.autoencoders import WIDTH, Setting, sweep


def settings(steps: int) -> dict[str, Setting]:
    """Settings by name, in the order of the table."""
    late = steps // 4

    def started(codes: int) -> str:
        return f"VQ({codes}, init='kmeans', start_step={late})"

    found = {}
    for bits, lattice in ((8, [8, 6, 5]), (12, [8, 8, 8, 8])):
        levels = [4] * (bits // 2) + [1] * (WIDTH - bits // 2)
        found |= {
            f"VQ, {bits} bits": Setting(started(2**bits), warmup=late),
            f"SimVQ, {bits} bits": Setting(f"SimVQ({2**bits}, estimator='straight_through')"),
            f"Residual, {bits} bits": Setting(f"Residual({started(2 ** (bits // 2))}, levels=2)", warmup=late),
            f"Product, {bits} bits": Setting(f"Product({started(2 ** (bits // 2))}, groups=2)", warmup=late),
            f"FSQ, {bits} bits": Setting(f"FSQ({lattice})"),
            f"LFQ, {bits} bits": Setting(f"LFQ({bits})"),
            f"Scalar, {bits} bits": Setting(f"Scalar({levels}, steps={late})"),
        }
    return {**found, "Identity": Setting("Identity()")}


if __name__ == "__main__":
    sweep(__doc__, "quantizers", settings, steps=1000)
