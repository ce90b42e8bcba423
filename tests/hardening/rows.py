"""The table of bad input: what is wrong, what is called, and the error that says so."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from helpers import ALGORITHMS
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, distribute_tensor
from torch.distributed.tensor.parallel import parallelize_module
from torch.masked import masked_tensor
from torch.utils._pytree import tree_map_only

import daam
from daam.masks import as_valid, find_mask
from daam.parallel import HeadParallel

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


def gives(what, module, arguments, error, words, compiled="", **options):
    """Return the row of a module's call. module: makes it on a backend; arguments: makes what it is called with."""

    def call(_algorithm, backend, device):
        made = module(backend).to(device)
        return made, tuple(t.to(device) if isinstance(t, Tensor) else t for t in arguments()), options

    return Row(f"{module('eager').__class__.__name__}: {what}", call, error, words, compiled=compiled)


def calls(what, function, error, words, *args, compiled=None, **options):
    """Return the row of a function that is called with arguments of the CPU."""
    return Row(f"{function.__name__}: {what}", lambda *_: (function, args, options), error, words, compiled=compiled)


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


TOKENS, HIDDEN = ones(2, 8), ones(2, 2, 3)
CLEAR = "valid is not clear"
MASKS = [
    calls("two masks", find_mask, V,
          f"attention_mask and pixel_attention_mask: which positions of layers.0 are {CLEAR}",
          {"pixel_attention_mask": TOKENS}, TOKENS, None, "layers.0"),
    calls("another's", find_mask, V, f"src_mask goes to the encoder, and which positions it leaves {CLEAR}",
          {"src_mask": TOKENS}, None, None, "layers.0"),
    calls("no tensor", find_mask, V, "pooling_mask has a list, expected a tensor (batch, positions)",
          {}, None, [1], ""),
    calls("negative", find_mask, V, "attention_mask has negative values, expected 1", {}, TOKENS - 2, None, ""),
    calls("nothing valid", find_mask, V, "attention_mask has no valid position in example 0", {}, TOKENS * 0, None, ""),
    calls("shape", as_valid, V, "mask has shape (2, 8), expected (2, 2)", ("mask", TOKENS), {}, nn.Identity(), HIDDEN),
    calls("frames", as_valid, V, "mask of 16 entries makes 4 frames, and layers have 2 positions",
          ("mask", ones(2, 16)), {}, Frames(), HIDDEN),
    calls("valid behind", as_valid, V, "mask has valid samples behind others, expected padding on the right",
          ("mask", TOKENS * (torch.arange(8) > 3)), {}, Frames(), HIDDEN),
]  # fmt: skip


# --- Blocks of layers -----------------------------------------------------------------------------
def block(what, error, words, **change):
    """Return the row of a block of two layers of two heads, of which something is changed."""

    def call(_algorithm, backend, device):
        given = {"mean_offsets": [ones(2, 3)] * 2, "c": [ones(2, 3)] * 2, "backend": backend, **change}
        return daam.density_block, (), tree_map_only(Tensor, lambda t: t.to(device), {"x": ones(2, 8), **given})

    return Row(f"density_block: {what}", call, error, words)


def fusion_while_compiling(x):
    layer = daam.DensityBlock([1], [2], [3], 1)
    return torch.compile(lambda x: layer.fusion_for(x), backend="eager")(x)


TWO_AND_FOUR = [ones(2, 3), ones(4, 3)]
BLOCKS = [
    block("x", T, "x is a list, expected a Tensor", x=[1.0]),
    block("no c", V, "mean_offsets has 2 layers and c has 0, expected as many, 1 or more", c=[]),
    block("c a tensor", T, "c is a Tensor, expected a list of tensors, one a layer", c=ones(2, 2, 3)),
    block("mean_offsets an int", T, "mean_offsets is a int, expected a list of tensors", mean_offsets=3),
    block("mean_offsets of str", T, "mean_offsets[0] is a str, expected a Tensor", mean_offsets=["a", "b"]),
    block("another shape", V, "c[1] has shape (2, 4), expected (2, 3)", c=[ones(2, 3), ones(2, 4)]),
    block("other heads", V, "c[1] has 4 heads, expected 2, as c[0] has", mean_offsets=TWO_AND_FOUR, c=TWO_AND_FOUR),
    block("mask and padding_value", V, "are both given", mask=ones(2, 8, dtype=torch.bool), padding_value=0.0),
    block("mask", V, "mask has shape (2, 7), expected x's shape", mask=ones(2, 7, dtype=torch.bool)),
    block("mask a list", T, "mask is a list, expected a Tensor", mask=[1]),
    block("recompute", T, "recompute is 0, expected True, False or None", recompute=0),
    block("eps", V, "eps is -1.0, expected a finite number", eps=-1.0),
    block("axis", V, "norm_axis is 2, expected -2 to 1", norm_axis=2),
    block("backend", V, "backend is 'gpu', expected one of", backend="gpu"),
    calls("fusion_for", fusion_while_compiling, RuntimeError, "fusion_for is called while compiling", ones(2, 8, 4)),
]


# --- What is spread over processes ----------------------------------------------------------------
def density_of_pieces(x):
    return daam.density_attention(x, ones(2, 4), ones(2, 4), group=SPREAD)


def differentiate_twice(x):
    return torch.autograd.grad(density_of_pieces(x).sum(), x, create_graph=True)


def differentiate_by_batches(x):
    y = density_of_pieces(x)
    return torch.autograd.grad(y, x, torch.stack([torch.ones_like(y)] * 2), is_grads_batched=True)


def differentiate_by_func(x):
    return torch.func.grad(lambda t: density_of_pieces(t).sum())(x)


def mesh(*shape):
    """Return a mesh of this process alone."""
    return init_device_mesh("cpu", shape, mesh_dim_names=tuple("ab"[: len(shape)]))


def with_dtensors(x=False, c=False, **options):
    """Call density attention, x or c of which is a DTensor."""
    given = [(ones(2, 6, 4), x), (ones(1, 4), False), (ones(1, 4), c)]
    given = [distribute_tensor(t, mesh(1), [Replicate()]) if spread else t for t, spread in given]
    return daam.density_attention(*given, **options)


def with_a_mesh(*shape):
    return daam.density_attention(ones(2, 6, 4), ones(1, 4), ones(1, 4), group=mesh(*shape))


def parallel(kind, *sizes, **given):
    return parallelize_module(kind(*sizes), mesh(1), HeadParallel())(**given)


SPREAD_OUT = [
    calls("twice", differentiate_twice, RuntimeError, "a sharded axis is differentiated once",
          ones(2, 6, 4, requires_grad=True)),
    calls("batches", differentiate_by_batches, NotImplementedError, "taken one by one, not by is_grads_batched",
          ones(2, 6, 4, requires_grad=True)),
    calls("func", differentiate_by_func, NotImplementedError, "a sharded axis has no vmap", ones(2, 6, 4)),
    calls("c alone", with_dtensors, T, "x is a plain Tensor and c a DTensor, expected both to be one", c=True),
    calls("group", with_dtensors, V, "group is given beside a DTensor, expected None", x=True, group=SPREAD),
    calls("mask", with_dtensors, V, "mask has shape (2, 5), expected x's shape", x=True, mask=ones(2, 5) > 0),
    calls("two dimensions", with_a_mesh, V, "group is a DeviceMesh of 2 dimensions, expected one", 1, 1),
    calls("no heads", parallel, T, "module is a Linear, expected a MultiHeadDAAM or a mixture with heads",
          nn.Linear, 2, 2),
    calls("x by name", parallel, T, "was called without x by position", daam.MultiHeadDAAM, 4, 2, x=ones(2, 6, 4)),
]  # fmt: skip

# --- Decoders, warmup, importance -----------------------------------------------------------------
SIZES = {"num_layers": 24, "num_features": 32, "num_classes": 4}


def decoder(what, words, **changes):
    return built(what, words, daam.DATDecoder, **SIZES | changes)


def decode(backend, **options):
    return daam.DATDecoder(6, 16, 3, num_heads=2, conv_channels=2, **options, backend=backend)


def warm(what, error, words, *args, layer=None, **options):
    return calls(what, daam.warmup, error, words, layer or daam.MultiHeadDAAM(8, 4), *args, **options)


def mean_of(*shapes):
    """Return the mean of maps of shapes."""
    found = daam.WeightMap()
    for shape in shapes:
        found.update(ones(*shape))
    return found.mean()


SHAPES = [(2, 8, 8)]
OTHERS = [
    decoder("heads", "num_heads is 5, expected a divisor of num_layers, 24", num_heads=5),
    decoder("heads of mixture", "num_heads is 5, expected a divisor of num_layers", num_heads=5, attention="mixture"),
    decoder("chunks of one", "expected 2 or more of the 24 layers for each", num_heads=24, attention="mixture"),
    decoder("attention", "attention is 'daamv2', expected one of 'daam', 'mixture'", attention="daamv2"),
    decoder("no classes", "num_classes is 0, expected 1 or more", num_classes=0),
    decoder("query heads", "num_features is 30, expected a multiple of 8 for 'mha'", attention="mha", num_features=30),
    gives("shape", decode, lambda: (ones(2, 5, 16),), V, "x has shape (2, 5, 16), expected (batch, 6, 16)"),
    gives("a list", decode, lambda: ([1.0],), T, "x is a list, expected a Tensor"),
    gives("sparse", decode, lambda: (ones(2, 6, 16).to_sparse(),), T, "x is a sparse_coo tensor, expected a dense one",
          compiled="does not support sparse"),
    gives("weights", lambda backend: decode(backend, attention="mha"), lambda: (ones(2, 6, 16),), V,
          "return_weights: attention 'mha' has no densities", return_weights=True),
    calls("sparse", daam.focal_loss, T, "scores is a sparse_coo tensor", ones(2, 3).to_sparse(), torch.zeros(2).long()),
    warm("layer", T, "module_or_function is a str, expected a module or a function", SHAPES, layer="x"),
    warm("shapes an int", T, "shapes is 5, expected a list of shapes", 5),
    warm("shapes a shape", T, "shapes[0] is 2, expected the sizes of x, ints", (2, 8, 8)),
    warm("shapes of bools", T, "shapes[1] is (2, True), expected", [*SHAPES, (2, True)]),
    warm("no shapes", V, "shapes is empty, expected one or more", []),
    warm("a negative size", V, "shapes[0] is (2, -8), expected no negative size", [(2, -8)]),
    warm("dtypes a dtype", T, "dtypes is torch.bfloat16, expected a list of dtypes", SHAPES, torch.bfloat16),
    warm("dtypes of str", T, "dtypes[0] is 'bf16', expected a torch.dtype", SHAPES, ["bf16"]),
    warm("dtypes of ints", T, f"x of dtypes[0] has dtype torch.int8, {DTYPES}", SHAPES, [torch.int8]),
    warm("no workers", V, "workers is 0, expected 1 or more", SHAPES, workers=0),
    warm("workers a float", T, "workers is 1.0, expected an int or None", SHAPES, workers=1.0),
    warm("meta", V, "device is meta, expected the device that calls will run on", SHAPES, device="meta"),
    warm("no device", V, "device is None and no tensor tells it, expected", SHAPES, layer=daam.density_attention),
    calls("rank", daam.layer_contribution, V, "weights has shape (3,), expected (layers, features)", ones(3)),
    calls("empty", daam.importance_factor, V, "weights of shape (0, 3) are empty or not finite", ones(0, 3)),
    calls("nan", daam.importance_factor, V, "are empty or not finite", torch.tensor([1.0, float("nan")])),
    calls("maps", mean_of, V, "weights has maps of shape (2, 5), expected (3, 5)", (4, 3, 5), (4, 2, 5)),
    calls("nothing", mean_of, V, "no weights were added, expected one batch or more"),
]  # fmt: skip
NO_TRITON = wrong("triton without a GPU", plain(backend="triton"), RuntimeError, 'backend "triton", requested by the '
                  "argument backend, cannot run: x is on cpu")  # fmt: skip
ON_BACKENDS = [*FUNCTIONS, *MODULES, *BLOCKS, *OTHERS]  # what takes a backend, and what comes before it matters
ROWS = [*ON_BACKENDS, *MASKS, *SPREAD_OUT]
