"""The eager backend: plain PyTorch, on any device, in fp32 (fp64 for fp64 x). One module per algorithm.

Every module has two pairs of functions. `formula` and `gradient` are the specification: they read like the paper, are
differentiable to any order, and serve vmap, forward-mode AD and double backward. `forward` and `backward` compute the
same numbers in place, with few temporaries; they are what runs otherwise. The tests tie the pairs.

All of them take what the operators in `daam.ops` take: `axis` is the axis that is normalised, non-negative; `mask` is
None or a bool tensor that broadcasts against x and has the size of x along the axis. They return y and the weights, or
the gradients of x and of both parameters; `forward` and `backward` return None for what was not asked for.
"""
