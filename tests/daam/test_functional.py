"""The public functions: tensors that they refuse, what they promise of dtypes and memory order, and forward mode."""

import math
import re

import numpy as np
import pytest
import torch
from helpers import ALGORITHMS, LAYOUTS, Case, Counting, attend, close, error, inputs, run, within
from torch.autograd import forward_ad
from torch.masked import masked_tensor

from daam import density_attention, density_gate, mixture_attention

X = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(0))
P = torch.ones(3, 4)
algorithms = pytest.mark.parametrize("algorithm", ALGORITHMS)


def not_dense(t):
    """Return {name: tensor} of t's values, or of some of them, in layouts without strides; an error must call them by
    name.
    """
    rows = list(t.unbind())
    return {
        "a sparse_coo tensor": t.to_sparse(),
        "a sparse_csr tensor": t.to_sparse_csr(),
        "a sparse_csc tensor": t.to_sparse_csc(),
        "a sparse_bsr tensor": t.to_sparse_bsr((1, 2)),
        "a nested (strided) tensor": torch.nested.nested_tensor(rows),
        "a nested (jagged) tensor": torch.nested.nested_tensor(rows, layout=torch.jagged),
        "a MaskedTensor": masked_tensor(t, t == t),
        "uninitialized": torch.nn.parameter.UninitializedBuffer(dtype=t.dtype),
    } | ({"a mkldnn tensor": t.to_mkldnn()} if t.dtype == torch.float32 else {})


@pytest.mark.filterwarnings("ignore:.*(nested|Sparse|MaskedTensor|maskedtensor).*:UserWarning")
@algorithms
def test_tensors_that_are_not_dense_are_named(algorithm):
    """Check that x, either parameter and the mask are refused by name, before anything asks for sizes."""
    x, p, mask = X[:, :, 0], torch.ones(2, 6), X[:, :, 0] > -9
    spec = ALGORITHMS[algorithm]
    for place, name in enumerate(("x", *spec.params)):
        for kind, t in not_dense((x, p, p)[place]).items():
            args = [x, p, p]
            args[place] = t
            with pytest.raises(TypeError, match=f"^{re.escape(f'{name} is {kind}, expected a ')}"):
                spec.call(*args, norm_axis=0)
    for kind, t in not_dense(mask).items():
        with pytest.raises(TypeError, match=f"^{re.escape(f'mask is {kind}, expected a ')}"):
            spec.call(x, torch.ones(2, 1), torch.ones(2, 1), norm_axis=1, mask=t)


def test_a_vector_of_the_gate_that_is_not_dense_is_named():
    p = torch.ones(4)
    for kind, t in {"a sparse_coo tensor": p.to_sparse(), "a mkldnn tensor": p.to_mkldnn()}.items():
        with pytest.raises(TypeError, match=f"mean_offsets is {kind}"):
            density_gate(X, t, p)
        with pytest.raises(TypeError, match=f"log_sigma is {kind}"):
            density_gate(X, p, t)


def attend_by_paper(algorithm, x, p, q):
    """Return y of x (batch, positions, features) by nothing but the formula of each head and torch's mean and var."""
    parts = []
    size = x.shape[1] // len(p)
    for h, (offsets, widths) in enumerate(zip(p, q, strict=True)):
        chunk = x[:, h * size : None if h == len(p) - 1 else h * size + size]
        d, var = (
            chunk - chunk.mean(1, keepdim=True),
            chunk.var(1, keepdim=True, correction=ALGORITHMS[algorithm].record.unbiased),
        )
        if algorithm == "density":
            weights = torch.exp(-((d - offsets) ** 2) / (var + 1e-5) / (2 * widths))
        elif algorithm == "mixture":
            densities = [
                torch.exp(-((d - o) ** 2) / (var + 1e-8) / (2 * c**2)) / (2 * math.pi * c**2) ** 0.5
                for o, c in zip(offsets, widths, strict=True)
            ]
            product = torch.stack(densities).prod(0)
            weights = product / product.sum(1, keepdim=True).clamp(min=1e-8)
        elif algorithm == "stable":
            u = [((d - o) / (var + 1e-8).sqrt()).clamp(-10, 10) for o in offsets]
            log_w = sum(-(u**2) / (2 * (c.clamp(0.01, 10) ** 2 + 1e-8)) for u, c in zip(u, widths, strict=True))
            weights = log_w.exp() / log_w.exp().sum(1, keepdim=True)  # softmax's tangent has no backward
        else:
            sigmas = torch.log1p(torch.exp(widths)) + 1e-3
            densities = [
                torch.exp(-(((d - o) / (var.sqrt() * s + 1e-8)) ** 2) / 2) / ((2 * math.pi) ** 0.5 * s)
                for o, s in zip(offsets, sigmas, strict=True)
            ]
            weights = torch.stack(densities).mean(0)
        parts.append(chunk * weights)
    return torch.cat(parts, 1)


def through_tangents(call, tensors, tangents):
    """Return y, its tangent, and gradients of a function of both, for the tensors and for their tangents."""
    leaves, directions = ([t.clone().requires_grad_() for t in ts] for ts in (tensors, tangents))
    with forward_ad.dual_level():
        y, tangent = forward_ad.unpack_dual(call(*map(forward_ad.make_dual, leaves, directions)))
        grads = torch.autograd.grad(tangent.square().sum() + y.sum(), leaves + directions)
    return y, tangent, *grads


def derivatives(call, tensors, tangents):
    """Return derivatives of a function of all tensors by forward and reverse mode inside one another."""
    func, indices = torch.func, (0, 1, 2)

    def loss(*args):
        return call(*args).square().sum()

    def slope(*args):
        return func.jvp(loss, args, tangents)[1]

    nested = (
        func.jvp(func.grad(loss, indices), tensors, tangents)[1],
        func.grad(slope, indices)(*tensors),
        *func.hessian(loss, indices)(*tensors),
        *(outer(inner(loss, 2), 2)(*tensors) for outer in (func.jacfwd, func.jacrev) for inner in (func.jacfwd,)),
    )
    return [t for item in nested for t in (item if isinstance(item, tuple) else (item,))]


def forward_mode_case(algorithm, heads=2):
    """Return (x and both parameters, a direction for each); chunks are of unequal length where they may be."""
    length = 6 if ALGORITHMS[algorithm].features else 7
    tensors = torch.randn(2, length, 3), torch.randn(heads, 3) / 2, torch.rand(heads, 3) + 0.7
    tensors = tuple(t.double() for t in tensors)
    return tensors, tuple(torch.randn_like(t) for t in tensors)


@pytest.mark.parametrize("composite", [False, True])
@algorithms
def test_backward_through_a_tangent(algorithm, composite):
    """Check gradients through a dual number, by the formula and by the operator that compiled graphs hold."""
    spec, (tensors, tangents) = ALGORITHMS[algorithm], forward_mode_case(algorithm)
    case = Case(tuple(tensors[0].shape), 1, heads=2, algorithm=algorithm)

    def attend(*args):
        if composite:
            return getattr(torch.ops.daam, algorithm)(*args, None, 1, *spec.settings(case), False, True, "eager", "")[0]
        return spec.call(*args, norm_axis=1)

    expected = through_tangents(lambda *args: attend_by_paper(algorithm, *args), tensors, tangents)
    found = through_tangents(attend, tensors, tangents)
    names = ("y", "tangent", *case.gradients, *(f"{name} of its direction" for name in case.gradients))
    for name, result, wanted in zip(names, found, expected, strict=True):
        within(error(result, wanted), 1e-12, name)


@algorithms
def test_backward_through_a_tangent_under_a_mask(algorithm):
    """Check that masked positions count as absent, whatever stands there, and that a chunk of nothing adds nothing."""
    (x, p, q), (dx, dp, dq) = forward_mode_case(algorithm, heads=1)
    mask = torch.arange(x.shape[1]) < torch.tensor([[5], [0]])
    hidden = x.masked_fill(~mask[..., None], 7.0)

    def attend(*args):
        return ALGORITHMS[algorithm].call(*args, norm_axis=1, mask=mask)

    found = through_tangents(attend, (hidden, p, q), (dx, dp, dq))
    exact = through_tangents(lambda *args: attend_by_paper(algorithm, *args), (x[:1, :5], p, q), (dx[:1, :5], dp, dq))
    for place, (result, wanted) in enumerate(zip(found, exact, strict=True)):
        if result.shape == x.shape:
            assert (result[~mask] == 0).all(), place
            result = result[:1, :5]
        within(error(result, wanted), 1e-12, str(place))


@algorithms
def test_forward_and_reverse_mode_in_one_another(algorithm):
    """Check jvp of grad, grad of jvp, hessian, forward twice and reverse over forward."""
    spec, given = ALGORITHMS[algorithm], forward_mode_case(algorithm)
    found = derivatives(lambda *args: spec.call(*args, norm_axis=1), *given)
    expected = derivatives(lambda *args: attend_by_paper(algorithm, *args), *given)
    for place, (result, wanted) in enumerate(zip(found, expected, strict=True)):
        within(error(result, wanted), 1e-11, str(place))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mask", [False, True])
@algorithms
def test_memory_order_is_kept(layout, mask, algorithm):
    heads = 1 if ALGORITHMS[algorithm].features else 4  # of unequal length
    case = Case((2, 9, 5, 4), 1, heads, layout=layout, mask=mask, algorithm=algorithm)
    given = inputs(case)
    result = run(case, given, "eager")
    for name in ("y", "weights", "dx"):
        assert result[name].stride() == torch.empty_like(given.x).stride(), name


@algorithms
def test_dx_has_the_memory_order_of_x_and_not_of_grad_y(algorithm):
    case = Case((2, 9, 5, 4), 1, grads="transposed", weights=False, algorithm=algorithm)
    given = inputs(case)
    assert run(case, given, "eager")["dx"].stride() == given.x.stride() != given.grad_y.stride()


def test_expanded_x_has_dense_outputs():
    x = X[:1].expand(3, 6, 4).requires_grad_()
    y = density_attention(x, P, P)
    assert y.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@algorithms
def test_dtypes_and_autocast(dtype, algorithm):
    case = Case((2, 6, 5), 1, heads=2, algorithm=algorithm)
    given = inputs(case, dtype)
    plain = run(case, given, "eager")
    with torch.autocast("cpu", torch.bfloat16):
        cast = run(case, given, "eager")
    for name, t in plain.items():
        assert t.dtype == (given.params[0].dtype if name.startswith("d_") else dtype), name
        assert torch.equal(t, cast[name]), name


@algorithms
def test_returns(algorithm):
    case = Case((2, 6, 4), 1, algorithm=algorithm)
    given = inputs(case)
    args = (given.x, *given.params)
    y, weights = attend(case, *args)
    assert y.shape == weights.shape == given.x.shape
    close(y, given.x * weights, "y")
    close(attend(case, *args, residual=True)[0], given.x * weights + given.x, "y with a residual")
    assert torch.equal(attend(case, *args, return_weights=False), y)


def test_a_gate_of_one_head_takes_vectors():
    p, q = torch.randn(2, 4).requires_grad_()
    y = density_gate(X, p, q)
    assert torch.equal(y, density_gate(X, p[None], q[None]))
    y.sum().backward()


def test_any_real_number_is_a_padding_value():
    x = torch.randn(2, 6, 4).masked_fill_(X > 0.5, 3)
    expected = mixture_attention(x, P, P, padding_value=3.0)
    for value in (3, np.float32(3), np.int64(3)):
        assert torch.equal(mixture_attention(x, P, P, padding_value=value), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_the_padding_value_is_rounded_to_x(dtype):
    x = torch.full((2, 6, 4), 0.1, dtype=dtype)
    x[:, 3:] = 0.2
    y = mixture_attention(x, P[:1], P[:1], padding_value=0.1)
    assert torch.equal(y[:, :3], x[:, :3]) and not torch.equal(y[:, 3:], x[:, 3:])
    x[:, 0] = float("inf")
    y = mixture_attention(x, P[:1], P[:1], padding_value=float("inf"))
    assert torch.equal(y[:, 0], x[:, 0]) and y.isfinite()[:, 1:].all()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_arithmetic_of_half_precision_parameters_is_fp32(dtype, mask, algorithm):
    case = Case((3, 12, 5), 1, heads=2, mask=mask, algorithm=algorithm)
    given, results = inputs(case, torch.float32), []
    for convert in (torch.Tensor.clone, torch.Tensor.float):
        leaves = [t.requires_grad_() for t in (given.x.clone(), *(convert(p.to(dtype)) for p in given.params))]
        found = attend(case, *leaves, given.mask)
        results.append((*found, *torch.autograd.grad(found, leaves, [given.grad_y, given.grad_weights])))
    for i, (half, full) in enumerate(zip(*results, strict=True)):
        assert torch.equal(half, full.to(half.dtype)), i


@pytest.mark.parametrize(("shape", "features"), [((0, 6, 4), 1), ((0, 6, 4), 4), ((2, 0, 6), 1), ((2, 6, 0), 0)])
def test_empty(shape, features):
    x = torch.empty(shape, requires_grad=True)
    c = torch.ones(3, features, requires_grad=True)
    y = density_attention(x, torch.zeros(3, features), c, norm_axis=1 if shape[1] else 2)
    y.sum().backward()
    assert y.shape == x.grad.shape == torch.Size(shape)
    assert (c.grad == 0).all() and c.grad.shape == c.shape


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", ["eager", pytest.param("triton", marks=pytest.mark.kernel)])
@algorithms
def test_outputs_can_be_changed_in_place(backend, layout, dtype, algorithm, device):
    case = Case((2, 6, 5), 1, layout=layout, algorithm=algorithm)
    given = inputs(case, dtype, device=device)
    args = (given.x.detach().requires_grad_(), *given.params)
    y, weights = attend(case, *args, backend=backend)
    expected = (y * 2).sum() + (weights + 1).sum()
    y, weights = attend(case, *args, backend=backend)
    assert torch.equal(y.mul_(2).sum() + weights.add_(1).sum(), expected)
    y.sum().backward()


# one head, forward; they were 28, 84, 85 and 76
@pytest.mark.parametrize(("name", "most"), [("density", 19), ("mixture", 59), ("stable", 63), ("gate", 29)])
def test_a_tiny_x_takes_few_operations(name, most):
    case = Case((2, 8, 4), 1, params=4, weights=False, algorithm=name)
    given = inputs(case, torch.float32)
    with torch.no_grad(), Counting() as counting:
        attend(case, given.x, *given.params, backend="eager")
    assert counting.count <= most, counting.count
