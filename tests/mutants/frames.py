"""Slips in what kernels share: where tiles stand, loads and stores, blocks, parameters, strips, layers and pieces."""

KERNELS = "interpreted tests/kernels/test_kernels.py -k"
FLOAT64 = f"{KERNELS} 'test_agrees_with_float64 and"
DENSITY = f"{FLOAT64} (density-150x21 or density-33x24 or density-2x26x21 or density-2x300x9 or density-2x3x2200)'"
RANKS = f"{FLOAT64} (density-2x3x5x2x21 or density-2x2x3x2x3x5)'"
MIXTURE = f"{FLOAT64} mixture and (17x33 or 3x13x9 or 3x33 or 2x201x9)'"
GATE = f"{FLOAT64} (gate-17x33 or gate-151x21 or gate-2x27x21 or gate-2x201x9 or gate-2x3x2200)'"
STRIPS = f"{KERNELS} 'test_agrees_where_chunks_have_several_strips and density'"
TILES = f"{KERNELS} 'test_agrees_where_programs_take_several_tiles and density'"
GROUPS = f"{KERNELS} test_more_partial_sums_than_are_added_at_once"
LARGE_MEAN = f"{KERNELS} 'test_a_large_mean_costs_no_accuracy and density'"
MASKED = f"{KERNELS} 'test_what_is_masked_reaches_nothing and density'"
FAR_APART = "interpreted tests/kernels/test_far_apart.py"
EXTREMES = "interpreted tests/daam/test_extremes.py -k"
SPREAD = f"{EXTREMES} 'test_a_spread and density'"
RIMS = f"{EXTREMES} 'test_eps_0 and density'"
WIDTHS = f"{EXTREMES} test_a_gate_of_every_width"
LAYERS = "interpreted tests/kernels/test_layers.py -k 'test_fused_layers_equal and (3x43 or 2x37x9 or 2x5x66)'"
LAYERS_OF_TILES = "interpreted tests/kernels/test_layers.py -k test_programs_that_take_several_tiles"
GATED_STRIPS = "interpreted tests/kernels/test_gated.py -k test_a_gate_that_is_streamed"
GATED = "interpreted tests/kernels/test_gated.py -k test_results_and_gradients"
REACH = "compiled tests/kernels/test_gated.py -k test_offsets_of_a_gradient"
WHOLE = "interpreted tests/kernels/test_whole.py -k 'density or stable'"
PIECES = "interpreted tests/daam/test_sharded.py"
BARRIER = "interpreted tests/kernels/test_whole.py -k test_a_barrier_follows"

MUTANTS = [
    # --- where a tile stands
    ("walk-next-block-of-columns", "kernels/walk.py",
     "tl.where(over, block - view.n_blocks, block)", "block", TILES),
    ("walk-last-head-without-remainder", "kernels/walk.py",
     "tl.where(head == tl.num_programs(1) - 1, view.longest, view.chunk)", "view.chunk", GATE),
    ("walk-strip-past-its-chunk", "kernels/walk.py",
     "tl.minimum(strip_row + view.strip, length)", "strip_row + view.strip", GATE),
    ("walk-outer-places-in-32-bits", "kernels/walk.py",
     "outer, column = tl.cast(index.outer, tl.int64),", "outer, column = tl.cast(index.outer, tl.int32),", FAR_APART),
    ("walk-columns-in-32-bits", "kernels/walk.py",
     "tl.cast(index.block, tl.int64) * PLAN.BLOCK_C", "tl.cast(index.block, tl.int32) * PLAN.BLOCK_C", FAR_APART),
    ("walk-outer-place-not-decoded", "kernels/walk.py",
     "base += (outer % view.sizes[i]) * stride", "base += outer * stride", RANKS),
    ("walk-head-forgotten", "kernels/walk.py", "axis_row = head * view.chunk + row", "axis_row = row", DENSITY),
    ("walk-blocks-apart-by-x-s-stride", "kernels/walk.py",
     "row_stride = t.strides[0]", "row_stride = view.strides[0]", DENSITY),
    ("walk-last-but-one-block-unmasked", "kernels/walk.py",
     "if i >= PLAN.N_BLOCKS - RAGGED_P:", "if i > PLAN.N_BLOCKS - RAGGED_P:", DENSITY),
    # --- loads and stores
    ("tile-masked-x-in-sums", "kernels/tile.py",
     "blocks = blocks + [tl.where(tile.valid[i], raw[i], 0.0)]", "blocks = blocks + [raw[i]]", MASKED),
    ("tile-residual-without-masked-x", "kernels/tile.py",
     "gated + raw[i] if RESIDUAL else gated", "gated + x[i] if RESIDUAL else gated", DENSITY),
    ("tile-residual-forgotten-in-dx", "kernels/tile.py", "direct + raw[i] if RESIDUAL else direct", "direct", DENSITY),
    ("tile-mask-not-applied-to-dx", "kernels/tile.py",
     "direct = tl.where(tile.valid[i], grad[i], 0.0)", "direct = grad[i]", DENSITY),
    ("tile-y-of-padding-is-0", "kernels/tile.py",
     "gated = tl.where(x[i] == padding, x[i], gated)", "gated = tl.where(x[i] == padding, 0.0, gated)", MIXTURE),
    # --- arithmetic of blocks
    ("blocks-variance-without-mask", "kernels/blocks.py",
     "centred = centred + [tl.where(tile.valid[i], differences[i], 0.0)]", "centred = centred + [differences[i]]",
     DENSITY),
    ("blocks-variance-with-the-mean-s-error", "kernels/blocks.py",
     "tl.sum(add_products(centred, centred), 0)[None, :] - total * mean_error",
     "tl.sum(add_products(centred, centred), 0)[None, :]", SPREAD),
    ("blocks-two-positions-taken-for-one", "kernels/blocks.py", "inv_count < 0.75", "inv_count < 0.5", MIXTURE),
    ("blocks-softplus-that-stops-growing", "kernels/blocks.py",
     "tl.where(x > 20, x, tl.where(u == 1, t, tl.log(u) * (t / tl.where(u == 1, 1.0, u - 1.0))))",
     "tl.where(u == 1, t, tl.log(u) * (t / tl.where(u == 1, 1.0, u - 1.0)))", WIDTHS),
    ("blocks-gradient-of-weights-ignored", "kernels/blocks.py",
     "[h if len(gradients.weights) == 0 else h + gradients.weights[i]]", "[h]", DENSITY),
    ("blocks-padding-reaches-its-weight", "kernels/blocks.py",
     "if padding is None else tl.where(x[i] == padding, 0.0, gradients.y[i] * x[i])", "", MIXTURE),
    ("blocks-eps-in-fp32", "kernels/blocks.py",
     "(tl.cast(eps.high, squares.dtype) + eps.low)", "tl.cast(eps.high, squares.dtype)", MIXTURE),
    # --- parameters
    ("params-head-forgotten", "kernels/params.py",
     "start, blocks = p.data + head * p.strides[0], []", "start, blocks = p.data, []", DENSITY),
    ("params-one-sum-twice", "kernels/params.py",
     "[totals[2 * i + 1] + tl.sum(he[i] * e[i], 1)[:, None]]", "[totals[2 * i + 1] + tl.sum(he[i], 1)[:, None]]",
     DENSITY),
    ("params-columns-outside-in-totals", "kernels/params.py",
     "tl.sum(tl.where(column_mask, numbers, 0.0), 1)", "tl.sum(numbers, 1)", RIMS),
    ("params-group-of-a-tile", "kernels/params.py",
     "walk.first_tile // view.n_blocks * (group_stride >> 1)", "walk.first_tile % view.n_blocks * (group_stride >> 1)",
     DENSITY),
    ("params-first-groups-again", "kernels/params.py",
     "tl.cast(first, tl.int64) + tl.arange(0, BLOCK)[:, None]", "tl.arange(0, BLOCK)[:, None] + 0 * first", GROUPS),
    ("params-neighbouring-entries-forgotten", "kernels/params.py",
     "tl.program_id(0).to(tl.int64) * ENTRIES + tl.arange(0, ENTRIES)", "tl.arange(0, ENTRIES).to(tl.int64)", DENSITY),
    # --- streamed chunks
    ("streamed-places-without-their-number", "kernels/streamed.py",
     "n * distance * distance", "distance * distance", GATE),
    ("streamed-strips-without-distance", "kernels/streamed.py",
     "squares_part + distance * distance * n_before * n_part * inverse_count(n)", "squares_part", STRIPS),
    ("streamed-last-tile-skipped", "kernels/streamed.py",
     "if not ALIKE and end < walk.strip_end:", "if not ALIKE and end > walk.strip_end:", GATE),
    ("streamed-count-rounded-down", "kernels/streamed.py",
     "(left + (PLAN.BLOCK_P - 1)) // PLAN.BLOCK_P", "left // PLAN.BLOCK_P", GATE),
    ("streamed-mean-error-dropped", "kernels/streamed.py",
     "return rounded, (mean - rounded).to(ACC)", "return rounded, tl.zeros_like(rounded)", LARGE_MEAN),
    ("streamed-totals-of-the-last-tile", "kernels/streamed.py",
     "totals = add_row_totals(totals, he, e)", "totals = add_row_totals(zero_totals(PLAN), he, e)", TILES),
    ("streamed-one-strip-needs-no-others", "kernels/streamed.py",
     "if call.extent.n_strips == 1 and not call.exchanges:", "if call.extent.n_strips == 1:", PIECES),
    ("whole-barrier-left-out", "kernels/whole.py", "tl.debug_barrier()", "pass", BARRIER),
    ("whole-turns-of-other-programs", "kernels/whole.py", "tile * turns + turn", "tile + turn", WHOLE),
    ("sharded-parameters-once-a-piece", "kernels/sharded.py",
     "of_whole = partials is None or kernels.merges_partials", "of_whole = partials is None", PIECES),
    ("merges-squares-without-n", "kernels/merges.py",
     "squares + n * torch.where(", "squares + torch.where(", PIECES),
    # --- layers of a block
    ("layers-residual-forgotten", "kernels/layers.py", "gated + x[i] if RESIDUAL else gated", "gated", LAYERS),
    ("layers-residual-forgotten-in-dx", "kernels/layers.py",
     "block + grad_y[i] if RESIDUAL else block", "block", LAYERS),
    ("layers-partial-sums-overlap", "kernels/layers.py", "distance * (layer * N_SUMS)", "distance * layer", LAYERS),
    ("layers-head-of-a-gradient-forgotten", "kernels/layers.py",
     "entries < parameters[i].n, head * parameters[i].n + entries", "entries < parameters[i].n, entries", LAYERS),
    ("layers-masked-x-without-residual", "kernels/layers.py",
     "tl.where(tile.valid[i], blocks[i], raw[i] if RESIDUAL else 0.0)", "tl.where(tile.valid[i], blocks[i], 0.0)",
     LAYERS),
    ("layers-x-of-another-layer", "kernels/layers.py", "xs[N - 1 - i], grad,", "xs[i], grad,", LAYERS),
    ("layers-mixture-totals-of-the-last-tile", "kernels/mixture_layers.py",
     "add_lists(totals, sum_head(ke, kee, clamped, inv_var, inside))", "sum_head(ke, kee, clamped, inv_var, inside)",
     LAYERS_OF_TILES),
    ("layers-stable-gradient-of-weights", "kernels/stable_layers.py",
     "Gradients([], grad_y, [])", "Gradients([], grad_y, grad_y)", LAYERS),
    # --- the fused gate
    ("gated-gradient-of-the-gate-ignored", "kernels/gated.py",
     "rows = add_lists(rows, load_rows(grad_gate, tile, sizes, PLAN))", "rows = rows + []", GATED),
    ("gated-sums-of-another-batch", "kernels/gated.py",
     "program // (sizes.n_strips * sizes.n_groups) * sizes.n_strips + program % sizes.n_strips",
     "program // sizes.n_groups * sizes.n_strips + program % sizes.n_strips", GATED_STRIPS),
    ("gated-first-times-for-all", "kernels/gated.py",
     "blocks[k * len(totals) + i] * dp[k]", "blocks[i] * dp[k]", GATED),
    ("gated-dx-without-projection-s-weight", "kernels/gated.py",
     "weights[i % len(weights)] * dp[i % len(dp)]", "dp[i % len(dp)]", GATED),
    ("gated-expanded-gradient-read-as-contiguous", "kernels/gated_blocks.py",
     "times * t.strides[1]", "times", GATED),
    ("gated-masked-x-in-sums", "kernels/gated_blocks.py",
     "found = found + [tl.where(valid[i], blocks[i], 0.0)]", "found = found + [blocks[i]]", GATED),
    ("gated-batches-in-32-bits", "kernels/gated_blocks.py",
     "batch = (group // sizes.n_groups).to(tl.int64)", "batch = group // sizes.n_groups", FAR_APART),
    ("gated-last-strip-skipped", "kernels/gated_tiles.py",
     "n_strips, n_groups = -(-times // (tile_t * strip)), 1",
     "n_strips, n_groups = max(1, times // (tile_t * strip)), 1", GATED),
    ("gated-strides-of-x-for-others", "kernels/gated_tiles.py",
     "same = all(a == b", "same = any(a == b", GATED),
    ("gated-reach-of-x-alone", "kernels/gated.py",
     "find_call(kind, x.dtype, x.shape, x.stride(), *(t.strides for t in others if t is not None))",
     "find_call(kind, x.dtype, x.shape, x.stride())", REACH),
]  # fmt: skip
