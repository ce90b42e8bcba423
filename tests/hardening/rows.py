"""The table of bad input: what is wrong, what is called, and the error that says so."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from helpers import ALGORITHMS
from torch import Tensor, nn
from torch.masked import masked_tensor

import daam
from daam.masks import as_valid, find_mask

MIXTURES = tuple(name for name, one in ALGORITHMS.items() if one.record.unbiased)
BY_GAUSSIANS = tuple(name for name, one in ALGORITHMS.items() if not one.features)
BY_FEATURES = tuple(name for name, one in ALGORITHMS.items() if one.features)
WITH_EPS = tuple(name for name, one in ALGORITHMS.items() if one.eps is not None)


@dataclass(frozen=True)
class Row:
    """Hold what is wrong. call: gives the function, its arguments, and those by name, of an algorithm, a backend and a
    device. compiled: what torch.compile says itself, of what it does not take; None: it cannot be compiled.
    """

    what: str
    call: Callable[..., tuple[Callable, tuple, dict[str, Any]]]
    error: type[Exception]
    words: str
    algorithms: tuple[str, ...] = ("density",)
    compiled: str | None = ""

    def __str__(self) -> str:
        return re.sub(r"[^\w.,=-]+", "-", self.what)


def arguments(spec, device) -> dict[str, Any]:
    """Return what a right call takes: x, both parameters, and options."""
    x = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(0)).to(device).requires_grad_()
    p, q = (torch.ones(3, 4, device=device, requires_grad=True) for _ in range(2))
    for t in (x, p, q):
        t.grad = torch.full_like(t, 3.0)
    return {"x": x, "p": p, "q": q, "norm_axis": 1}


def wrong(what, change, error, words, algorithms=tuple(ALGORITHMS), compiled=""):
    """Return the row of a function that is called with its right arguments but for a change of them."""

    def call(name, backend, device):
        right = arguments(ALGORITHMS[name], device)
        found = {**right, "backend": backend, **change(right)}
        x, p, q = (found.pop(key) for key in ("x", "p", "q"))
        return ALGORITHMS[name].call, (x, p, q), found

    return Row(what, call, error, words, algorithms, compiled)


def ones(*shape, **options):
    return torch.ones(shape, **options)


def both(*shape):
    """Return a change of both parameters to a shape."""
    return lambda right: {name: ones(*shape, device=right["x"].device) for name in ("p", "q")}


def plain(**changes):
    """Return a change that asks for no tensor."""
    return lambda right: changes


def mask_of(right):
    return torch.ones(2, 6, dtype=torch.bool, device=right["x"].device)


DTYPES = "expected one of float16, bfloat16, float32, float64"
T, V = TypeError, ValueError
FUNCTIONS = [
    wrong("x a list", plain(x=[1.0]), T, "x is a list, expected a Tensor"),
    wrong("x int64", lambda r: {"x": r["x"].long()}, T, f"x has dtype torch.int64, {DTYPES}"),
    wrong("x complex", lambda r: {"x": r["x"].cfloat()}, T, f"x has dtype torch.complex64, {DTYPES}"),
    wrong("x sparse", lambda r: {"x": r["x"].detach().to_sparse()}, T, "x is a sparse_coo tensor, expected a dense one",
          compiled="does not support sparse"),
    wrong("x nested", lambda r: {"x": torch.nested.nested_tensor(list(r["x"].detach()), layout=torch.jagged)}, T,
          "x is a nested (jagged) tensor, expected a dense one", compiled=None),
    wrong("x masked", lambda r: {"x": masked_tensor(r["x"].detach(), r["x"] == r["x"])}, T,
          "x is a MaskedTensor, expected a plain Tensor", compiled=None),
    wrong("x lazy", plain(x=nn.parameter.UninitializedBuffer()), T, "x is uninitialized, expected a Tensor with sizes",
          compiled=None),
    wrong("x of rank 1", lambda r: {"x": r["x"][0, :, 0]}, V, "x has rank 1 (shape (6,)), expected rank 2 or more"),
    wrong("x of rank 0", lambda r: {"x": r["x"][0, 0, 0]}, V, "x has rank 0 (shape ()), expected rank 2 or more"),
    wrong("norm_axis 3", plain(norm_axis=3), V, "norm_axis is 3, expected -3 to 2 for x of shape (2, 6, 4)"),
    wrong("norm_axis -4", plain(norm_axis=-4), V, "norm_axis is -4, expected -3 to 2 for x of shape (2, 6, 4)"),
    wrong("norm_axis 1.0", plain(norm_axis=1.0), T, "norm_axis is 1.0, expected an int"),
    wrong("norm_axis True", plain(norm_axis=True), T, "norm_axis is True, expected an int"),
    wrong("heads of no divisor", both(4, 4), V, "num_heads is 4, expected a divisor of the 6 positions of norm_axis 1",
          BY_FEATURES),
    wrong("heads of one position", both(4, 4), V, "num_heads is 4, which cuts the 6 positions of norm_axis 1 into "
          "chunks of one element: expected two or more", MIXTURES),
    wrong("too many heads", both(7, 4), V, "num_heads is 7, more heads than the 6 positions of norm_axis 1"),
    wrong("too many heads along axis 0", plain(norm_axis=0), V, "num_heads is 3, more heads than the 2 positions"),
    wrong("no positions", lambda r: {"x": r["x"][:, :0]}, V, "num_heads is 3, more heads than the 0 positions"),
    wrong("p a float", plain(p=0.0), T, "{p} is a float, expected a Tensor"),
    wrong("q None", plain(q=None), T, "{q} is a NoneType, expected a Tensor"),
    wrong("q int64", lambda r: {"q": r["q"].long()}, T, f"{{q}} has dtype torch.int64, {DTYPES}"),
    wrong("p of rank 1", lambda r: {"p": r["p"][0]}, V, "{p} has shape (4,), expected (num_heads, {columns}) with"),
    wrong("p of rank 3", lambda r: {"p": r["p"][..., None]}, V, "{p} has shape (3, 4, 1), expected (num_heads, "),
    wrong("no heads", both(0, 4), V, "{p} has shape (0, 4), expected (num_heads, {columns}) with num_heads at least 1"),
    wrong("no Gaussians", both(3, 0), V, "{p} has shape (3, 0), expected num_gaussians at least 1", BY_GAUSSIANS),
    wrong("q of other heads", lambda r: {"q": r["q"][:2]}, V, "{q} has shape (2, 4), expected (3, 4), the shape of "
          "{p}"),
    wrong("parameters of two features", both(3, 2), V, "mean_offset and c have shape (3, 2), expected (3, 4) or "
          "(3, 1)", BY_FEATURES),
    wrong("parameters along the last axis", lambda r: {**both(2, 4)(r), "norm_axis": 2}, V,
          "expected (2, 2) or (2, 1), since norm_axis 2 is the last axis, which heads cut", BY_FEATURES),
    wrong("p on meta", lambda r: {"p": r["p"].to("meta")}, V, "{p} is on meta, expected x's device "),
    wrong("q on meta", lambda r: {"q": r["q"].to("meta")}, V, "{q} is on meta, expected x's device "),
    wrong("mask fp32", lambda r: {"mask": mask_of(r).float()}, T, "mask has dtype torch.float32, expected bool"),
    wrong("mask a list", plain(mask=[True]), T, "mask is a list, expected a Tensor"),
    wrong("mask of all of x", lambda r: {"mask": r["x"] > 0}, V, "mask has shape (2, 6, 4), expected x's shape up to "
          "norm_axis, (2, 6)"),
    wrong("mask that broadcasts", lambda r: {"mask": mask_of(r)[:1]}, V, "mask has shape (1, 6), expected x's shape"),
    wrong("mask on meta", lambda r: {"mask": mask_of(r).to("meta")}, V, "mask is on meta, expected x's device "),
    *[wrong(f"eps {value}", plain(eps=value), V, f"eps is {value!r}, expected a finite number, 0 or more", WITH_EPS)
      for value in (-1.0, float("nan"), float("inf"), "1e-5", None)],
    wrong("padding_value a string", plain(padding_value="0"), T, "padding_value is '0', expected a number or None",
          MIXTURES),
    wrong("padding_value True", plain(padding_value=True), T, "padding_value is True, expected a number", MIXTURES),
    wrong("padding_value nan", plain(padding_value=float("nan")), V, "padding_value is nan, which equals nothing: "
          "expected a number", MIXTURES),
    wrong("padding_value huge", plain(padding_value=10**400), V, "padding_value is an int of 1329 bits, expected one "
          "that a float can hold", MIXTURES),
    wrong("mask and padding_value", lambda r: {"mask": mask_of(r), "padding_value": 0.0}, V,
          "mask and padding_value are both given, expected one of them", MIXTURES),
    wrong("backend cuda", plain(backend="cuda"), V, "backend is 'cuda', expected one of 'auto', 'triton', 'eager'"),
    wrong("group a list", plain(group=[]), T, "group is a list, expected a ProcessGroup, a DeviceMesh or AxisPieces",
          compiled=None),
    wrong("group of other sizes", lambda r: {"group": daam.AxisPieces("0", (5,))}, V, "x has 6 positions along "
          "norm_axis, expected 5, as group's sizes say", compiled=None),
]  # fmt: skip


def built(what, words, kind, *args, error=ValueError, **options):
    """Return the row of a module that is not to be built."""
    return Row(f"{kind.__name__}: {what}", lambda *_: (kind, args, options), error, words, compiled=None)


def gives(what, module, arguments, error, words, **options):
    """Return the row of a module's call. module: makes it on a backend; arguments: makes what it is called with."""

    def call(_algorithm, backend, device):
        made = module(backend).to(device)
        return made, tuple(t.to(device) if isinstance(t, Tensor) else t for t in arguments()), options

    return Row(f"{module('eager').__class__.__name__}: {what}", call, error, words)


def densities(backend):
    return daam.MultiHeadDAAM(4, 3, backend=backend)


def gate(backend):
    return daam.DensityGate(6, 3, backend=backend)


SPREAD = daam.AxisPieces("0")
MODULES = [
    built("no features", "num_features is 0 and num_heads is 8, expected 1 or more of both", daam.MultiHeadDAAM, 0),
    built("no heads", "num_features is 4 and num_heads is 0, expected 1 or more", daam.MultiHeadDAAM, 4, 0),
    built("heads", "num_heads is 3, expected a divisor of num_features (4)", daam.MultiHeadDAAM, 4, 3, norm_axis=-1),
    built("axis", "norm_axis is '1', expected an int", daam.MultiHeadDensityAdaptiveAttention, "1", 2, 3),
    built("axis", "norm_axis is True, expected an int", daam.DensityAdaptiveAttention, True, 1, 3, None),
    built("heads", "num_heads is 0, expected a positive int", daam.StableMultiHeadDensityAttention, 1, 0, 3),
    built("Gaussians", "num_gaussians is 2.0, expected a positive", daam.MultiHeadDensityAdaptiveAttention, 1, 2, 2.0),
    built("eps", "eps is -1, expected a finite", daam.StableMultiHeadDensityAttention, 1, 2, 3, eps=-1),
    built("channels", "in_ch is 0, expected a positive int", daam.DensityGate, 0),
    built("an int", "num_heads is 2, expected a list of num_layers, 1, ints", daam.DensityBlock, [1], 2, [3], 1,
          error=TypeError),
    built("lengths", "norm_axes has 1 entries, expected num_layers, 2", daam.StableDensityBlock, [1], [2] * 2, [3] * 2,
          2),
    built("recompute", "recompute is 1, expected True, False or None", daam.DensityBlock, [1], [2], [3], 1,
          error=TypeError, recompute=1),
    built("group", "group is given and norm_axes is [1, 2], expected one axis", daam.DensityBlock, [1, 2], [2] * 2,
          [3] * 2, 2, group=SPREAD),
    built("group", "group is a int, expected a ProcessGroup", daam.DensityGate, 4, error=TypeError, group=3),
    built("sizes", "sizes is (3, 3), expected 1 numbers, 0 or more", daam.AxisPieces, "0", (3, 3)),
    built("sizes", "sizes is (-1,), expected 1 numbers, 0 or more", daam.AxisPieces, "0", (-1,)),
    gives("features", densities, lambda: (ones(2, 6, 5),), V, "x has 5 features (shape (2, 6, 5)), expected "
          "num_features 4"),
    gives("a list", densities, lambda: ([1.0],), T, "x is a list, expected a Tensor"),
    gives("mask", densities, lambda: (ones(2, 6, 4), ones(2, 6)), T, "mask has dtype torch.float32, expected bool"),
    gives("dtype", gate, lambda: (ones(2, 6, 8).double(),), T, "x has dtype torch.float64, expected torch.float32, the "
          "dtype of to_attn's weight"),
    gives("channels", gate, lambda: (ones(2, 5, 8),), V, "x has shape (2, 5, 8), expected (batch, 6, length)"),
    gives("mask", gate, lambda: (ones(2, 6, 8),), V, "mask has shape (2, 6), expected x's shape up to norm_axis, "
          "(2, 8)", mask=ones(2, 6, dtype=torch.bool)),
    Row("use_backend", lambda *_: (lambda name: daam.use_backend(name).__enter__(), ("gpu",), {}), V,
        "backend is 'gpu', expected one of 'auto', 'triton', 'eager'", compiled=None),
]  # fmt: skip


class Frames(nn.Module):
    """Say how many frames samples make, four of them one, as encoders of speech do."""

    def _get_feat_extract_output_lengths(self, lengths):
        return lengths // 4


def masks(what, words, function, *args):
    return Row(f"{function.__name__}: {what}", lambda *_: (function, args, {}), ValueError, words, compiled=None)


TOKENS, HIDDEN = ones(2, 8), ones(2, 2, 3)
CLEAR = "valid is not clear"
MASKS = [
    masks("two masks", f"attention_mask and pixel_attention_mask: which positions of layers.0 are {CLEAR}", find_mask,
          {"pixel_attention_mask": TOKENS}, TOKENS, None, "layers.0"),
    masks("another's", f"src_mask goes to the encoder, and which positions it leaves {CLEAR}", find_mask,
          {"src_mask": TOKENS}, None, None, "layers.0"),
    masks("no tensor", "pooling_mask has a list, expected a tensor (batch, positions)", find_mask, {}, None, [1], ""),
    masks("negative", "attention_mask has negative values, expected 1", find_mask, {}, TOKENS - 2, None, ""),
    masks("nothing valid", "attention_mask has no valid position in example 0", find_mask, {}, TOKENS * 0, None, ""),
    masks("shape", "mask has shape (2, 8), expected (2, 2)", as_valid, ("mask", TOKENS), {}, nn.Identity(), HIDDEN),
    masks("frames", "mask of 16 entries makes 4 frames, and layers have 2 positions", as_valid, ("mask", ones(2, 16)),
          {}, Frames(), HIDDEN),
    masks("valid behind", "mask has valid samples behind others, expected padding on the right", as_valid,
          ("mask", TOKENS * (torch.arange(8) > 3)), {}, Frames(), HIDDEN),
]  # fmt: skip
NO_TRITON = wrong("triton without a GPU", plain(backend="triton"), RuntimeError, 'backend "triton", requested by the '
                  "argument backend, cannot run: x is on cpu")  # fmt: skip
ROWS = [*FUNCTIONS, *MODULES, *MASKS]
