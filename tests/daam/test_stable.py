"""The stabilised mixture beside the authors' formulas, and what it alone promises: clamps, equal weights, its cost."""

import itertools

import pytest
import torch
from helpers import GRADS, LAYOUTS, Case, Counting, Inputs, attend, broadcast, close, error, inputs, run, within
from torch import nn

import daam
from daam import stable_mixture_attention
from daam.reference import stable


def weigh(v, offsets, widths, eps, padding):
    """Return the weights of the values of one chunk, a vector, as the authors' code has them."""
    mean = v.mean()
    var = v.var(unbiased=True) if len(v) > 1 else 0 * v.sum()
    log_w = torch.zeros_like(v)
    for offset, width in zip(offsets, widths, strict=True):
        c = torch.clamp(width, 0.01, 10.0)
        y_norm = torch.clamp((v - mean - offset) / torch.sqrt(var + eps), -10.0, 10.0)
        c2 = c**2 + eps
        log_w = log_w + (-(y_norm**2) / (2 * c2) - 0.5 * torch.log(2 * torch.pi * c2))
    log_w = torch.nan_to_num(log_w, nan=-1e9, posinf=-1e9, neginf=-1e9)
    if padding is not None:
        log_w = torch.where(v == padding, torch.full_like(v, -1e9), log_w)
    return torch.nan_to_num(torch.softmax(log_w, 0), nan=0.0, posinf=0.0, neginf=0.0)


def authors(case, x, offsets, widths, mask):
    """Return (y, weights) head by head and chunk by chunk; a mask leaves positions out before anything is computed."""
    rows, mask = x.movedim(case.axis, -1), broadcast(mask, case)
    valid = torch.ones_like(rows, dtype=torch.bool) if mask is None else mask.expand_as(x).movedim(case.axis, -1)
    size, weights = rows.shape[-1] // case.heads, torch.zeros_like(rows)
    for h, place in itertools.product(range(case.heads), itertools.product(*map(range, rows.shape[:-1]))):
        stop = rows.shape[-1] if h == case.heads - 1 else (h + 1) * size
        positions = h * size + valid[(*place, slice(h * size, stop))].nonzero()[:, 0]
        if len(positions):
            found = weigh(rows[place][positions], offsets[h], widths[h], case.eps_or_default, case.padding)
            weights = weights.index_put((*map(torch.tensor, place), positions), found)
    y = rows.masked_fill(~valid, 0) * weights
    if case.padding is not None:
        y = torch.where(rows == case.padding, rows, y)
    y = y + rows if case.residual else y
    return y.movedim(-1, case.axis), weights.movedim(-1, case.axis)


def judged(case, given):
    """Return what `helpers.run` does, by the authors' formulas under autograd."""
    leaves = given.leaves()
    y, weights = authors(case, *leaves, given.mask)
    loss = (y * given.grad_y).sum() + (weights * given.grad_weights).sum()
    return {"y": y, "weights": weights} | dict(zip(case.gradients, torch.autograd.grad(loss, leaves), strict=True))


CASES = [
    Case((5, 9), 0, params=2),
    Case((2, 13, 3), 1, heads=3, clamps=True, residual=True),
    Case((2, 14), 1, heads=3, mask=True, clamps=True),
    Case((2, 14, 3), 1, heads=2, padding=0.0, clamps=True, eps=0.1),
    Case((2, 9, 3), 1, heads=2, padding=-1.5, residual=True),
    Case((2, 2, 11), -1, heads=2, mask=True, residual=True, clamps=True, eps=0.1),
    Case((150, 2), 0, params=1, clamps=True),
    Case((2, 3, 2, 5), 1, clamps=True),
]
CASES = [
    case.but(algorithm="stable", layout=layout, grads=grads)
    for case, layout, grads in zip(CASES, LAYOUTS * 2, GRADS[1:] + GRADS, strict=False)
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_all_functions_agree_with_the_authors_formulas(case):
    """Check formula, its derivatives, closed form and both lean functions."""
    given = inputs(case)
    expected = judged(case, given)
    leaves, mask = given.leaves(), broadcast(given.mask, case)
    settings = (case.positive_axis, *case.spec.settings(case), case.residual)
    y, weights = stable.formula(*leaves, mask, *settings)
    loss = (y * given.grad_y).sum() + (weights * given.grad_weights).sum()
    arguments = (given.grad_y, given.grad_weights, given.x, *given.params, mask, *settings)
    found = {
        "formula": (y, weights, *torch.autograd.grad(loss, leaves)),
        "closed form": (y, weights, *stable.gradient(*arguments)),
        "lean": (
            *stable.forward(given.x, *given.params, mask, *settings, True),
            *stable.backward(*arguments, True, True),
        ),
        "public": run(case, given, "eager").values(),
    }
    for which, results in found.items():
        for (name, exact), result in zip(expected.items(), results, strict=True):
            within(error(result, exact), 1e-11, f"{name}, {which}")


def test_the_cases_clamp():
    """Check that the cases above clamp some positions of a chunk and not others, and c at both ends."""
    for case in CASES:
        given, far, size = inputs(case), [], case.shape[case.axis] // case.heads
        for h, offsets in enumerate(given.params[0]):
            stop = case.shape[case.axis] if h == case.heads - 1 else (h + 1) * size
            chunk = given.x.movedim(case.axis, -1)[..., h * size : stop]
            z = (chunk[..., None] - chunk.mean(-1)[..., None, None] - offsets) / chunk.std(-1)[..., None, None]
            far.append((z.abs() > 10).flatten())
        far, (_, c) = torch.cat(far), given.params
        assert far.any() == (c > 10).any() == case.clamps and not far.all(), str(case)
        assert (c < 0.01).any() == (case.clamps and case.heads > 1)


@pytest.mark.parametrize(("c", "factor"), [(0.00999, 0), (0.01, 1), (10.0, 1), (10.001, 0), (-1.0, 0)])
def test_c_has_a_gradient_between_its_limits(c, factor):
    """Check that the limits are inside, in fp32 too, which rounds them."""
    x = torch.randn(2, 5, 3)
    for dtype in (torch.float32, torch.float64):
        q = torch.full((1, 1), c, dtype=dtype, requires_grad=True)
        (y := stable_mixture_attention(x.to(dtype), torch.zeros(1, 1, dtype=dtype), q, norm_axis=1)).square().sum()
        (lean,) = torch.autograd.grad(y.square().sum(), q, retain_graph=True)
        (closed,) = torch.autograd.grad(y.square().sum(), q, create_graph=True)
        assert (lean != 0) == (closed != 0) == bool(factor)


def operations(case):
    """Return how many operations a forward and a backward pass take."""
    given = inputs(case, torch.float32)
    with Counting() as counting:
        run(case, given, "eager")
    return counting.count


def test_gaussians_cost_nothing_where_nothing_clamps():
    case = Case((2, 24, 5), 1, heads=1, algorithm="stable", residual=True)
    for plain in (case, case.but(mask=True), case.but(padding=0.0)):
        few, many = (operations(plain.but(params=gaussians)) for gaussians in (2, 16))
        assert few == many
        few, many = (operations(plain.but(params=gaussians, clamps=True)) for gaussians in (2, 16))
        assert few < many


def test_a_chunk_does_not_depend_on_its_neighbours():
    """Check bits of chunks that clamp nowhere, alone and beside some that do, and of those, few and half of all."""
    case = Case((3, 12, 4), 1, heads=2, algorithm="stable")
    given = inputs(case, torch.float32)
    plain = run(case, given, "eager")
    given.x[1, 3, 2] = 1e4
    given.x[2, :6] *= 1e-4  # where offsets are far
    mixed = run(case, given, "eager")
    last = Inputs(given.x[2:], given.params, None, given.grad_y[2:], given.grad_weights[2:])
    alone = run(case.but(shape=(1, 12, 4)), last, "eager")
    for name in ("y", "weights", "dx"):
        assert torch.equal(plain[name][0], mixed[name][0]) and torch.equal(alone[name][0], mixed[name][2]), name
        assert not torch.equal(plain[name], mixed[name])


@pytest.mark.parametrize("clamps", [False, True])
def test_chunks_of_nothing_but_padding_have_equal_weights_and_no_gradient(clamps):
    case = Case((2, 10, 3), 1, heads=2, padding=1.5, algorithm="stable", clamps=clamps)
    given = inputs(case)
    given.x[0, :5] = 1.5
    result = run(case, given, "eager")
    assert (result["weights"][0, :5] == 0.2).all() and (result["y"][0, :5] == 1.5).all()
    assert torch.equal(result["dx"][0, :5], given.grad_y[0, :5])
    for name, exact in judged(case, given).items():
        within(error(result[name], exact), 1e-10, name)


@pytest.mark.parametrize("what", ["NaN", "inf", "overflow", "offset", "c"])
@pytest.mark.parametrize("compiled", [False, True])
def test_weights_of_what_is_not_finite_are_equal(what, compiled):
    """Check that log w of NaN counts as -1e9 everywhere in its chunk, and nowhere else."""
    x, offsets, c = torch.randn(2, 6, 3), torch.zeros(2, 2), torch.ones(2, 2)
    if what in ("offset", "c"):
        (offsets if what == "offset" else c)[1, 0] = float("nan")
    else:
        x[0, 4, 1] = {"NaN": float("nan"), "inf": float("inf"), "overflow": 1e30}[what]
    attend = torch.compile(stable_mixture_attention, backend="aot_eager") if compiled else stable_mixture_attention
    _, weights = attend(x, offsets, c, norm_axis=1, return_weights=True)
    hit = torch.zeros(2, 6, 3, dtype=torch.bool)
    hit[(slice(None), slice(3, None)) if what in ("offset", "c") else (0, slice(3, None), 1)] = True
    close(weights[hit], torch.full_like(weights[hit], 1 / 3), "weights")
    assert not (weights[~hit] == 1 / 3).any() and weights.isfinite().all()
    reference = stable.formula(x, offsets, c, None, 1, 1e-8, None, False)[1]
    close(weights, reference, "weights by the formula")


def test_y_is_rounded_once():
    x, p = torch.randn(2, 6, 3).bfloat16(), torch.full((1, 2), 0.5)
    y, weights = stable_mixture_attention(x, p, p, norm_axis=1, return_weights=True)
    exact = stable_mixture_attention(x.float(), p, p, norm_axis=1)
    assert torch.equal(y, exact.bfloat16()) and not torch.equal(y, x * weights)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_what_clamps_is_compiled_mapped_and_batched():
    """Check that what cannot branch gives the numbers of what can: compiled graphs, vmap, and gradients in batches."""
    case = Case((3, 9, 2), 1, params=2, algorithm="stable", clamps=True)
    given = inputs(case)
    expected = run(case, given, "eager")
    leaves = given.leaves()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def call(*tensors):
        return attend(case, *tensors)

    upstream = [given.grad_y, given.grad_weights]
    results = (*call(*leaves), *torch.autograd.grad(call(*leaves), leaves, upstream))
    for (name, exact), result in zip(expected.items(), results, strict=True):
        within(error(result, exact), 1e-12, name)
    one = case.but(axis=0)
    mapped = torch.func.vmap(lambda x: attend(one, x, *given.params))(given.x)
    for name, result in zip(("y", "weights"), mapped, strict=True):
        within(error(result, expected[name]), 1e-12, name)
    batches = [torch.stack([g, 2 * g]) for g in upstream]
    rows = torch.autograd.grad(attend(case, *leaves), leaves, batches, is_grads_batched=True)
    for name, row in zip(case.gradients, rows, strict=True):
        within(error(row[1], 2 * expected[name]), 1e-12, name)


def test_fp32_is_accurate_where_some_gaussians_are_far():
    """Check offsets of 1e4 beside near ones: what is clamped may not round the others away."""
    case = Case((3, 24, 5), 1, heads=2, params=3, algorithm="stable")
    given = inputs(case, torch.float32)
    given.params[0][:, 2] = 1e4
    exact = inputs(case)
    exact.x, exact.params = given.x.double(), tuple(p.double() for p in given.params)
    exact.grad_y, exact.grad_weights = given.grad_y.double(), given.grad_weights.double()
    result, expected = run(case, given, "eager"), judged(case, exact)
    for name in expected:
        within(error(result[name], expected[name]), 1e-5, name)


X = torch.randn(2, 16, 9, generator=torch.Generator().manual_seed(0))
SPELLINGS = [wrapper + heads for wrapper in ("", "gaatn.") for heads in ("heads", "attention_heads")]


def published(module, spelling, prefix=""):
    """Return the checkpoint that published code would hold with a module's parameters, in one of the spellings."""
    wrapper, _, heads = spelling.rpartition(".")
    wrapper = f"{wrapper}." if wrapper else ""
    layers = {"": module} if not hasattr(module, "layers") else {f"layers.{i}.": m for i, m in enumerate(module.layers)}
    return {
        f"{prefix}{wrapper}{layer}{heads}.{h}.{name}": getattr(m, name).detach()[h].clone()
        for layer, m in layers.items()
        for h in range(m.num_heads)
        for name in ("mean_offsets", "c")
    }


def heads():
    return daam.StableMultiHeadDensityAttention(1, 3, 2)


def block():
    return daam.StableDensityBlock([1, 2], [2, 3], [3, 4], 2)


def drawn(build):
    module = build()
    for p in module.parameters():
        nn.init.uniform_(p, 0.5, 1.5)
    return module


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("build", [heads, block])
def test_published_checkpoints_load_in_every_spelling(build, spelling):
    source = drawn(build)
    checkpoint = published(source, spelling)
    target = build()
    before = dict(checkpoint)
    target.load_state_dict(checkpoint, strict=True)
    assert checkpoint.keys() == before.keys(), "the caller's dict was changed"
    for p, q in zip(source.parameters(), target.parameters(), strict=True):
        assert torch.equal(p, q)
    assert daam.to_published_state_dict(target).keys() == published(source, "heads").keys()
    for key, value in published(source, "heads").items():
        assert torch.equal(daam.to_published_state_dict(target)[key], value)
    model = nn.Sequential(nn.Linear(2, 2), nn.ModuleDict({"attention": build()}))
    state = {key: t for key, t in model.state_dict().items() if key.startswith("0.")}
    model.load_state_dict(state | published(source, spelling, "1.attention."), strict=True)
    assert all(torch.equal(p, q) for p, q in zip(source.parameters(), model[1].parameters(), strict=True))
    model.load_state_dict(model.state_dict(), strict=True)
    model.load_state_dict(daam.to_published_state_dict(model), strict=True)


@pytest.mark.parametrize("build", [heads, block])
def test_a_wrapper_of_the_users_keeps_its_own_keys(build):
    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.gaatn = drawn(build)

    source, target = Wrapper(), Wrapper()
    for state in (source.state_dict(), daam.to_published_state_dict(source), published(source.gaatn, SPELLINGS[-1])):
        target = Wrapper()
        target.load_state_dict(state, strict=True)
        assert all(torch.equal(p, q) for p, q in zip(source.parameters(), target.parameters(), strict=True))


def test_checkpoints_that_do_not_fit():
    source = drawn(heads)
    for checkpoint, message in (
        (published(source, "heads") | published(source, "attention_heads"), "heads and attention_heads are both"),
        (published(source, "heads") | published(source, "gaatn.attention_heads"), "heads and attention_heads are both"),
        (
            published(source, "heads") | published(source, "gaatn.heads"),
            r"gaatn\.heads\.0\.mean_offsets and heads\.0\.mean_offsets are both in the state dict, expected one",
        ),
        (source.state_dict() | published(source, "gaatn.heads"), "heads and mean_offsets are both in the state dict"),
        ({key: t for key, t in published(source, "gaatn.heads").items() if "1" not in key}, r"for heads \[0, 2\], exp"),
        (
            {key: t[:1] for key, t in published(source, "heads").items()},
            r"has shape \(1,\), expected a Tensor of shape \(2,\) or \(1, 2",
        ),
    ):
        with pytest.raises(RuntimeError, match=message):
            heads().load_state_dict(checkpoint)
    longer = published(daam.StableDensityBlock([1, 2, 1], [2, 3, 1], [3, 4, 1], 3), "gaatn.heads")
    with pytest.raises(RuntimeError, match=r"Unexpected key.*layers\.2\.heads\.0\.c"):
        block().load_state_dict(longer)


def test_modules_begin_as_published():
    torch.manual_seed(0)
    module = daam.StableMultiHeadDensityAttention(2, 3, 4, 1e-6, 0.5)
    assert (module.norm_axis, module.num_heads, module.num_gaussians) == (2, 3, 4)
    assert (module.eps, module.padding_value) == (1e-6, 0.5)
    torch.manual_seed(0)
    assert torch.equal(module.c, torch.stack([torch.randn(4).exp() for _ in range(3)]))
    assert (module.mean_offsets == 0).all() and module.c.requires_grad
    assert repr(daam.StableDensityBlock([1], [1], [3], 1, 1e-6, False, 0.5)).startswith(
        "StableDensityBlock(\n  residual=False\n"
    )


@pytest.mark.parametrize("residual", [True, False])
def test_a_block_is_its_layers(residual):
    module = daam.StableDensityBlock([1, -1], [2, 3], [3, 4], 2, 1e-6, residual)
    mask, x = torch.arange(16).expand(2, 16) < torch.tensor([[16], [9]]), X
    expected = {}
    for i, layer in enumerate(module.layers):
        layer_mask = mask if i == 0 else mask[..., None].expand(2, 16, 9)
        x, expected[f"layer_{i}"] = stable_mixture_attention(
            x, layer.mean_offsets, layer.c, norm_axis=layer.norm_axis, eps=1e-6, mask=layer_mask, residual=residual,
            return_weights=True,
        )  # fmt: skip
    y, details = module(X, return_attention_details=True, mask=mask)
    assert torch.equal(y, x) and torch.equal(module(X, mask=mask), y) and details.keys() == expected.keys()
    assert all(torch.equal(details[name], expected[name]) and not details[name].requires_grad for name in details)
    padded = daam.StableMultiHeadDensityAttention(1, 2, 3, padding_value=0.0)
    given = X.masked_fill(~mask[..., None], 0.0)
    assert torch.equal(
        padded(given), stable_mixture_attention(given, padded.mean_offsets, padded.c, norm_axis=1, padding_value=0.0)
    )
    with pytest.raises(ValueError, match="both given"):
        padded(given, mask=mask)


def test_arguments_that_do_not_fit():
    with pytest.raises(TypeError, match="num_heads is 4, expected a list of num_layers, 1, ints"):
        daam.StableDensityBlock([2], 4, [4], 1)
    with pytest.raises(ValueError, match="num_gaussians has 2 entries, expected num_layers, 1"):
        daam.StableDensityBlock([2], [4], [4, 4], 1)
    with pytest.raises(ValueError, match="eps is None, expected a finite number"):
        daam.StableMultiHeadDensityAttention(2, 4, 4, None)
