"""Parameters of a head: how a tile has them, how their gradients are summed over a program's tiles, and over programs.

Parameters (heads, P) are one for all of a head, or vary along the chunk, or along the inner dimension: PLAN.VARIES is
"nothing", "chunk" or "inner". Totals leave a program as partials (n, heads, groups, P), a group being programs that
together hold every parameter of a head once; gradients are sums of these, in fixed order and fp64.
"""

import triton
import triton.language as tl

from .walk import columns_inside


@triton.jit
def load_param(p, default, head, position, view, PLAN: tl.constexpr):
    """Return a head's parameter for each block, in a shape that broadcasts to it; the default fills the tile's rim."""
    start, blocks = p.data + head * p.strides[0], []
    for i in tl.static_range(PLAN.N_BLOCKS):
        if PLAN.VARIES == "chunk":
            place = position.row + i * PLAN.BLOCK_P + position.rows
            block = tl.load(start + place * p.strides[1], place < view.chunk, default).to(PLAN.ACC)[:, None]
        elif PLAN.VARIES == "inner":
            place, inside = position.column + position.columns, position.column + position.columns < view.inner
            block = tl.load(start + place[None, :] * p.strides[1], inside[None, :], default).to(PLAN.ACC)
        else:
            block = tl.load(start + tl.zeros([1, 1], tl.int32)).to(PLAN.ACC)
        blocks = blocks + [block]
    return blocks


@triton.jit
def load_entries(p, head, entries, inside, default):
    """Return some entries of a head's parameter in fp64, the default where they are not inside."""
    return tl.load(p.data + head * p.strides[0] + entries * p.strides[1], inside, default).to(tl.float64)


@triton.jit
def zero_blocks(N: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, ACC: tl.constexpr):
    """Return N blocks of zeros [ROWS, COLUMNS]."""
    blocks = []
    for _ in tl.static_range(N):
        blocks = blocks + [tl.zeros([ROWS, COLUMNS], ACC)]
    return blocks


@triton.jit
def add_lists(a, b):
    """Return the sums of the numbers of two lists."""
    sums = []
    for i in tl.static_range(len(a)):
        sums = sums + [a[i] + b[i]]
    return sums


@triton.jit
def sum_columns(numbers, column_mask):
    """Return the sum [1, 1] over columns inside: rows carried through a loop crash LLVM's vectoriser (Triton 3.9)."""
    return tl.sum(tl.where(column_mask, numbers, 0.0), 1)[:, None]


# --- Totals of two sums, he and he·e, of parameters that may vary --------------------------------
@triton.jit
def zero_totals(PLAN: tl.constexpr):
    """Return zeros for Σ he and Σ he·e of a tile's parameters: [BLOCK_P, 1] a block, [1, BLOCK_C], or one number."""
    if PLAN.VARIES == "chunk":
        return zero_blocks(2 * PLAN.N_BLOCKS, PLAN.BLOCK_P, 1, PLAN.ACC)
    elif PLAN.VARIES == "inner":
        return zero_blocks(2, 1, PLAN.BLOCK_C, PLAN.ACC)
    else:
        return zero_blocks(2, 1, 1, PLAN.ACC)


@triton.jit
def add_row_totals(totals, he, e):
    """Return the totals of parameters that vary along the chunk with those of one more tile."""
    more = []
    for i in tl.static_range(len(he)):
        more = more + [totals[2 * i] + tl.sum(he[i], 1)[:, None]]
        more = more + [totals[2 * i + 1] + tl.sum(he[i] * e[i], 1)[:, None]]
    return more


@triton.jit
def add_totals(totals, he, e, sum_he, sum_hee, column_mask, PLAN: tl.constexpr):
    """Return the totals with those of one more tile of whole chunks."""
    if PLAN.VARIES == "chunk":
        return add_row_totals(totals, he, e)
    elif PLAN.VARIES == "inner":
        return add_lists(totals, [sum_he, sum_hee])
    else:
        return add_lists(totals, [sum_columns(sum_he, column_mask), sum_columns(sum_hee, column_mask)])


@triton.jit
def store_totals(partials, totals, walk, position, view, PLAN: tl.constexpr):
    """Store one program's totals in (2, heads, groups, P)."""
    distance, head_stride, group_stride, _one = partials.strides
    start = partials.data + walk.head * (head_stride >> 1)
    for i in tl.static_range(len(totals) // 2):
        if PLAN.VARIES == "chunk":
            places = (walk.strip_row + i * PLAN.BLOCK_P + position.rows)[:, None]
            pointers, inside = start + walk.first_tile * (group_stride >> 1) + places, places < view.chunk
        elif PLAN.VARIES == "inner":
            columns = (position.column + position.columns)[None, :]
            pointers = start + walk.first_tile // view.n_blocks * (group_stride >> 1) + columns
            inside = columns_inside(position, view)
        else:
            pointers = start + walk.first_tile + tl.zeros([1, 1], tl.int32)
            inside = tl.full([1, 1], True, tl.int1)
        tl.store(pointers, totals[2 * i], inside)
        tl.store(pointers + (distance >> 1), totals[2 * i + 1], inside)


# --- Totals of a head -----------------------------------------------------------------------------
@triton.jit
def store_partials(partials, totals, head, program):
    """Store one program's totals, [1, 1] each, at (number, head, program)."""
    distance = tl.cast(partials.strides[0] >> 1, tl.int64)
    start = partials.data + head * (partials.strides[1] >> 1) + program + tl.zeros([1, 1], tl.int64)
    for i in tl.static_range(len(totals)):
        tl.store(start + i * distance, totals[i])


@triton.jit
def sum_groups(
    start, distance, group_stride, n_groups, inside, N: tl.constexpr, BLOCK: tl.constexpr, ENTRIES: tl.constexpr
):
    """Return N sums [ENTRIES] over all groups, in fixed order and fp64. start: [1, ENTRIES] pointers to the first."""
    totals = zero_blocks(N, BLOCK, ENTRIES, tl.float64)
    for first in range(0, n_groups, BLOCK):
        groups, more = tl.cast(first, tl.int64) + tl.arange(0, BLOCK)[:, None], []
        for i in tl.static_range(N):
            pointers = start + tl.cast(distance, tl.int64) * i + groups * group_stride
            more = more + [tl.load(pointers, inside[None, :] & (groups < n_groups), 0.0).to(tl.float64)]
        totals = add_lists(totals, more)
    return [tl.sum(total, 0) for total in totals]


@triton.jit
def store_gradient(pointers, gradient, inside):
    """Store a gradient that comes in fp64, by way of fp32 where it becomes bf16: the interpreter knows no other."""
    DTYPE: tl.constexpr = pointers.dtype.element_ty
    rounded = gradient if tl.float64 == DTYPE else gradient.to(tl.float32)
    tl.store(pointers, rounded.to(DTYPE), inside)


@triton.jit(repr=lambda call: f"{call.constants['NAME']}_param_gradients")
def param_gradients(
    partials, n_groups, parameters, d_p, d_q, n_entries, N: tl.constexpr, K: tl.constexpr, FINISH: tl.constexpr,
    NAME: tl.constexpr, BLOCK: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    """Store entries of a head's gradients, (heads, entries): FINISH of N sums an entry, in fixed order and fp64;
    strides and numbers come encoded (`operands.encode`).
    """
    head = tl.program_id(1).to(tl.int64)
    entries = tl.program_id(0).to(tl.int64) * ENTRIES + tl.arange(0, ENTRIES)
    inside, n_groups = entries < n_entries >> 1, n_groups >> 1
    distance, head_stride, group_stride, entry_stride = [stride >> 1 for stride in partials.strides]
    start = partials.data + head * head_stride + entries[None, :] * entry_stride
    totals = sum_groups(start, distance, group_stride, n_groups, inside, N, BLOCK, ENTRIES)
    p_gradient, q_gradient = FINISH(totals, parameters, head, entries, inside, K)
    store_gradient(d_p.data + head * d_p.strides[0] + entries, p_gradient, inside)
    store_gradient(d_q.data + head * d_q.strides[0] + entries, q_gradient, inside)
