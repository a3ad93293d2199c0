"""Native kernels: C functions that are much faster on a CPU than the operations of torch, compiled on first use.

A kernel is a file ``c/NAME.c``; `pondera.kernels.build.library` compiles it on first use. The caller also has an implementation
in torch. It is the reference implementation in the tests, and it runs if the library is `None` or the tensors do not
`fit <pondera.kernels.call.fit>`.
"""

CHOICES = ("native", "torch")
"""The kernels that a model can use for products of a few rows (`pondera.kernels.linear`)."""
WEIGHTS = ("int8", "int8-prompts")
"""How the weights of a loaded model can be stored, apart from its dtype (`pondera.kernels.int8`); with the second, prompts are
multiplied in int8, too."""
