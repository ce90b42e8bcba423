"""The public function: its errors, and what it promises of dtypes and memory order."""

import re

import pytest
import torch
from helpers import LAYOUTS, Case, inputs, run

from daam import density_attention

X = torch.randn(2, 6, 4)
P = torch.ones(3, 4)
Q = torch.ones(4, 4)


class FakeDTensor(torch.Tensor):
    device_mesh = None


@pytest.mark.parametrize(
    ("error", "message", "args", "options"),
    [
        (TypeError, "x is a list, expected a Tensor", ([1.0], P, P), {}),
        (TypeError, "x has dtype torch.int64, expected one of float16", (X.long(), P, P), {}),
        (TypeError, "x has dtype torch.complex64", (X.cfloat(), P, P), {}),
        (ValueError, "x has rank 1 (shape (6,)), expected rank 2 or more", (X[0, :, 0], P, P), {}),
        (ValueError, "norm_axis is 3, expected -3 to 2 for x of shape (2, 6, 4)", (X, P, P), {"norm_axis": 3}),
        (ValueError, "norm_axis is -4, expected -3 to 2", (X, P, P), {"norm_axis": -4}),
        (TypeError, "norm_axis is 1.0, expected an int", (X, P, P), {"norm_axis": 1.0}),
        (ValueError, "num_heads is 4, expected a divisor of the 6 positions", (X, Q, Q), {}),
        (ValueError, "num_heads is 3, more heads than the 2 positions of norm_axis 0", (X, P, P), {"norm_axis": 0}),
        (ValueError, "num_heads is 3, more heads than the 0 positions", (X[:, :0], P, P), {}),
        (TypeError, "mean_offset is a float, expected a Tensor", (X, 0.0, P), {}),
        (TypeError, "c has dtype torch.int64", (X, P, P.long()), {}),
        (ValueError, "mean_offset has shape (4,), expected (num_heads, P)", (X, P[0], P), {}),
        (ValueError, "c has shape (2, 4), expected (3, 4), the shape of mean_offset", (X, P, P[:2]), {}),
        (ValueError, "mean_offset and c have shape (3, 2), expected (3, 4) or (3, 1)", (X, P[:, :2], P[:, :2]), {}),
        (ValueError, "expected (2, 2) or (2, 1), since norm_axis 2 is the last", (X, P[:2], P[:2]), {"norm_axis": 2}),
        (ValueError, "mean_offset is on meta, expected x's device cpu", (X, P.to("meta"), P), {}),
        (ValueError, "c is on meta, expected x's device cpu", (X, P, P.to("meta")), {}),
        (TypeError, "mask has dtype torch.float32, expected bool", (X, P, P), {"mask": torch.ones(2, 6)}),
        (TypeError, "mask is a list", (X, P, P), {"mask": [True]}),
        (ValueError, "mask has shape (2, 6, 4), expected x's shape up to norm_axis", (X, P, P), {"mask": X > 0}),
        (ValueError, "mask is on meta", (X, P, P), {"mask": (X[..., 0] > 0).to("meta")}),
        (ValueError, "eps is -1.0, expected a finite number, 0 or more", (X, P, P), {"eps": -1.0}),
        (ValueError, "eps is nan", (X, P, P), {"eps": float("nan")}),
        (ValueError, "eps is inf", (X, P, P), {"eps": float("inf")}),
        (ValueError, "eps is '1e-5'", (X, P, P), {"eps": "1e-5"}),
        (ValueError, "backend is 'cuda', expected one of 'auto', 'triton', 'eager'", (X, P, P), {"backend": "cuda"}),
        (TypeError, "x is a DTensor, expected a plain Tensor: call this under", (X.as_subclass(FakeDTensor), P, P), {}),
        (TypeError, "c is a DTensor", (X, P, P.as_subclass(FakeDTensor)), {}),
    ],
)  # fmt: skip
def test_errors(error, message, args, options):
    with pytest.raises(error, match=re.escape(message)):
        density_attention(*args, **options)


def test_a_real_dtensor_is_refused(tmp_path):
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        x = distribute_tensor(X, init_device_mesh("cpu", (1,)), [Shard(0)])
        with pytest.raises(TypeError, match="x is a DTensor"):
            density_attention(x, P, P)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mask", [False, True])
def test_memory_order_is_kept(layout, mask):
    given = inputs(Case((2, 6, 5, 4), 1, layout=layout, mask=mask))
    result = run(Case((2, 6, 5, 4), 1, layout=layout, mask=mask), given, "eager")
    for name in ("y", "weights", "dx"):
        assert result[name].stride() == torch.empty_like(given.x).stride(), name


def test_expanded_x_has_dense_outputs():
    x = X[:1].expand(3, 6, 4).requires_grad_()
    y = density_attention(x, P, P)
    assert y.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_dtypes_and_autocast(dtype):
    case = Case((2, 6, 5), 1, heads=2)
    given = inputs(case, dtype)
    plain = run(case, given, "eager")
    with torch.autocast("cpu", torch.bfloat16):
        cast = run(case, given, "eager")
    for name, t in plain.items():
        assert t.dtype == (given.c.dtype if name.startswith("d_") else dtype), name
        assert torch.equal(t, cast[name]), name


def test_returns():
    y = density_attention(X, P, P)
    z, weights = density_attention(X, P, P, return_weights=True)
    residual = density_attention(X, P, P, residual=True)
    assert y.shape == weights.shape == X.shape
    torch.testing.assert_close(y, X * weights)
    torch.testing.assert_close(residual, X * weights + X)
    assert torch.equal(y, z)


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
def test_outputs_can_be_changed_in_place(backend, layout, dtype):
    given = inputs(Case((2, 6, 5), 1, layout=layout), dtype)
    x = given.x.detach().requires_grad_()
    y, weights = density_attention(x, given.mean_offset, given.c, return_weights=True, backend=backend)
    expected = (y * 2).sum() + (weights + 1).sum()
    y, weights = density_attention(x, given.mean_offset, given.c, return_weights=True, backend=backend)
    assert torch.equal(y.mul_(2).sum() + weights.add_(1).sum(), expected)
    y.sum().backward()


@pytest.mark.parametrize("backend", ["eager", pytest.param("triton", marks=pytest.mark.kernel)])
def test_eps_0_and_chunks_of_nothing(backend):
    """All-False chunks give zeros, never NaN, in results and gradients, whatever eps is; so do the rims of tiles."""
    for case in (Case((3, 5), 1, params="one"), Case((3, 6, 5), 1, heads=2, mask=True), Case((2, 80, 3), 1, mask=True)):
        result = run(case, inputs(case), backend, eps=0.0)
        for name, t in result.items():
            assert t.isfinite().all(), (str(case), name)
