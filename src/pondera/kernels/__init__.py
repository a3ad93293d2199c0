"""Native kernels: what a CPU does many times faster in C than torch's own operations can, built where it runs.

A kernel is a file ``NAME.c`` here, and `pondera.kernels.build.library` makes a library of it at first use. Its caller keeps a
form in torch, which is the oracle in the tests, and runs wherever the library is None or the tensors do not
`fit <pondera.kernels.call.fit>`.
"""
