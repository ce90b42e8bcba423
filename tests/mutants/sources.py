"""Slips that somebody made who read the sources alone, not the tests and not the other slips."""

KERNELS = "interpreted tests/kernels/test_kernels.py -k"
STRIPS = f"{KERNELS} 'test_agrees_where_chunks_have_several_strips and"
STRIPS_DENSITY, STRIPS_MIXTURE, STRIPS_STABLE = f"{STRIPS} density'", f"{STRIPS} mixture'", f"{STRIPS} stable'"
MIXTURE = f"{KERNELS} 'test_agrees_with_float64 and mixture-2x201x9'"
SHORTER = f"{KERNELS} 'test_agrees_with_float64 and mixture-2043x3'"
BESIDE = f"{KERNELS} test_a_nan_beside_padding"
STRIDES = f"{KERNELS} 'test_parameters_of_other_strides and gate'"
EXTREMES = "interpreted tests/daam/test_extremes.py -k"
RIMS = f"{EXTREMES} 'test_eps_0 and density'"
CLAMPED = f"{EXTREMES} test_a_mixture_far_from_its_chunk_under"
LIMITS = f"{EXTREMES} at_a_limit"
FLOOR = f"{EXTREMES} test_a_variance_below_the_floor"
GATED = "interpreted tests/kernels/test_gated.py -k test_results_and_gradients"
GATED_STRIPS = "interpreted tests/kernels/test_gated.py -k test_several_strips_of_several_rows"
LAYERS = "interpreted tests/kernels/test_layers.py -k 'test_fused_layers_equal and stable'"
WEIGHTS = "interpreted tests/kernels/test_layers.py -k test_gradients_of_weights"
ALONE = "interpreted tests/hardening/test_memory.py -k 'test_kernels_touch_their_tensors_alone and (mixture or gate)'"
BARRIER = "interpreted tests/kernels/test_whole.py -k test_a_barrier_follows"
PIECES = "interpreted tests/daam/test_sharded.py"
CUTS = "compiled tests/daam/test_sharded.py -k test_cuts"
NUMBERS = "compiled tests/daam/test_modules.py -k order_of_their_numbers"
LEAN = "compiled tests/daam/test_reference.py -k 'test_lean_functions and density'"
MASKS = "compiled tests/daam/test_modules.py -k test_gate_masks"
INNER = f"{KERNELS} 'test_agrees_with_float64 and (density-2x13x328 or density-2x40x21 or density-13x3x21)'"
LARGE_MEAN = f"{KERNELS} 'test_a_large_mean and mixture'"
MASKED_GATE = f"{KERNELS} 'test_agrees_with_float64 and gate-3x75'"
REMAINDER = f"{KERNELS} 'test_agrees_with_float64 and mixture-1025x3'"
ALONE_PARAMS = f"{KERNELS} test_parameters_alone"
MASKED_LAYERS = "interpreted tests/kernels/test_layers.py -k 'test_fused_layers_equal and 2x37x9'"
DTYPES = "interpreted tests/daam/test_gated.py -k test_dtypes"
EAGER_PIECES = "compiled tests/daam/test_sharded.py -k test_pieces_of_three"
PLACEMENTS = "compiled tests/daam/test_dtensor.py"
HALF = "compiled tests/daam/test_functional.py -k half_precision_parameters"
ROUNDED_EAGER = "compiled tests/daam/test_functional.py -k test_the_padding_value_is_rounded"
REFERENCE = "compiled tests/daam/test_reference.py"
AUTHORS = "compiled tests/daam/test_stable.py"
FORWARD_MODE = "compiled tests/daam/test_block.py -k test_forward_mode"
NEEDS = "compiled tests/laws/test_properties.py -k test_eager"
POOLING = "compiled tests/daam/test_pooling.py -k test_what_is_not_finite"

MUTANTS = [
    ("density-streamed-totals-reshaped", "kernels/density.py",
     "totals = totals.transpose(1, 2)", "totals = totals.reshape(2, totals.shape[2], totals.shape[1])", STRIPS_DENSITY),
    ("density-infinite-precision-outside", "kernels/density.py",
     "inv_var = tl.where(columns_inside(tile.position, view), inv_var, 0.0)",
     "inv_var = tl.where(centred.inv_count > 0, inv_var, 0.0)", RIMS),
    ("mixture-c-gradient-without-v", "kernels/mixture.py",
     "(kee - 2.0 * offset * ke + (offset * offset - v) * cr) / c / c / c - cl / c",
     "(kee - 2.0 * offset * ke + offset * offset * cr) / c / c / c - cl / c", CLAMPED),
    ("mixture-streamed-slope-biased", "kernels/mixture.py",
     "slope = kee * inv_var * inverse_count_less_one(inv_count)", "slope = kee * inv_var * inv_count", MIXTURE),
    ("stable-widest-c-has-no-gradient", "kernels/stable.py",
     "free = (c >= narrowest) & (c <= WIDEST)", "free = (c >= narrowest) & (c < WIDEST)", LIMITS),
    ("stable-streamed-nan-beside-padding", "kernels/stable_blocks.py",
     "return tl.where((total == 0) | (log2_factor == 0), -inv_count, scale) if PADDED else scale",
     "return tl.where(total == 0, -inv_count, scale) if PADDED else scale", BESIDE),
    ("gate-sigma-by-strides-of-offsets", "kernels/gate.py",
     "tl.load(log_sigmas.data + head * log_sigmas.strides[0] + place * log_sigmas.strides[1])",
     "tl.load(log_sigmas.data + head * mean_offsets.strides[0] + place * mean_offsets.strides[1])", STRIDES),
    ("gate-gradient-below-the-floor", "kernels/gate.py",
     "return floored * inverse, tl.where(variance >= floor, inverse, 0.0)",
     "return floored * inverse, tl.where(variance > 0, inverse, 0.0)", FLOOR),
    ("gated-partials-of-batches-collide", "kernels/gated.py",
     "row = program // (sizes.n_strips * sizes.n_groups) * sizes.n_strips + program % sizes.n_strips",
     "row = program // (sizes.n_strips * sizes.n_groups) + program % sizes.n_strips", GATED_STRIPS),
    ("gated-unit-without-stride-of-batch", "kernels/gated_tiles.py",
     "steps = (strides[0], strides[other] if shape[other] > 1 else 0, shape[fastest])",
     "steps = (strides[other] if shape[other] > 1 else 0, shape[fastest])", GATED),
    ("layer-gradients-a-layer-too-near", "kernels/layers.py",
     "(layer * N_SUMS + entries[None, :] * EACH) * distance",
     "(layer * N + entries[None, :] * EACH) * distance", LAYERS),
    ("layers-room-for-the-first-alone", "kernels/layers.py",
     "n_sums = self.kernels.n_sums(max(q.shape[1] for q in qs))",
     "n_sums = self.kernels.n_sums(qs[0].shape[1])", LAYERS),
    ("strip-that-a-shorter-head-lacks", "kernels/walk.py",
     "strip_end = tl.maximum(strip_row, tl.minimum(strip_row + view.strip, length))",
     "strip_end = tl.minimum(strip_row + view.strip, length)", SHORTER),
    ("whole-barrier-after-merges-alone", "kernels/whole.py",
     "tl.debug_barrier()", "if MERGES[i]:\n            tl.debug_barrier()", BARRIER),
    ("streamed-remainder-never-ragged", "kernels/host.py",
     "ragged = 0 if layout.chunk == layout.longest and layout.chunk % tile.length == 0 else tile.n_blocks",
     "ragged = 0 if layout.chunk % tile.length == 0 else tile.n_blocks", ALONE),
    ("sharded-absent-strips-are-likeliest", "kernels/sharded.py",
     "least.masked_fill_(total == 0, FAR.value)  # of absent strips",
     "total.masked_fill_(least == FAR.value, 0)  # of absent strips", PIECES),
    ("pieces-last-head-among-equal-ones", "daam/pieces.py",
     "elif parts and parts[-1].slot is None and length * parts[-1].heads == parts[-1].length:",
     "elif parts and parts[-1].slot is None:", CUTS),
    ("checkpoint-heads-by-their-names", "daam/checkpoints.py",
     ".reshape(features) for h in range(heads)]", ".reshape(features) for h in sorted(map(str, numbers))]", NUMBERS),
    ("block-gradient-of-weights-ignored", "daam/block_ops.py",
     'elif call.backend == "triton" and call.fused_backward and not given:',
     'elif call.backend == "triton" and call.fused_backward:', WEIGHTS),
    ("slices-along-the-features", "daam/reference/chunks.py",
     "axes = [args[i] for i in (x_index + 4, *feature_axis)]", "axes = [args[x_index + 4]]", LEAN),
    ("gate-projects-what-is-masked", "daam/modules.py",
     "gate = self.gaa(self.to_attn(valid), mask, self.backend, **spread)",
     "gate = self.gaa(self.to_attn(x), mask, self.backend, **spread)", MASKS),
    ("inner-totals-past-the-features", "kernels/params.py",
     "inside = columns_inside(position, view)", "inside = tl.full([1, PLAN.BLOCK_C], True, tl.int1)", INNER),
    ("layers-lose-what-is-masked", "kernels/layers.py",
     "raw, x = load_blocks(inputs.x, inputs.mask, tile, view, RESIDUAL, PLAN)",
     "raw, x = load_blocks(inputs.x, inputs.mask, tile, view, False, PLAN)", MASKED_LAYERS),
    ("split-mean-loses-its-rest", "kernels/streamed.py",
     "return rounded, (mean - rounded).to(ACC)", "return rounded, mean.to(ACC) - rounded", LARGE_MEAN),
    ("gradient-of-masked-weights", "kernels/tile.py",
     "load_blocks(inputs.grad_weights, inputs.mask, tile, view, False, PLAN)",
     "load_blocks(inputs.grad_weights, None, tile, view, False, PLAN)", MASKED_GATE),
    ("strips-without-the-remainder", "kernels/host.py",
     "strip and -(-layout.longest // (strip * tile.length)), strip, layout.chunk,",
     "strip and -(-layout.chunk // (strip * tile.length)), strip, layout.chunk,", REMAINDER),
    ("streamed-totals-with-dx-alone", "kernels/passes.py",
     "if dx is not None or row_partials is not None:", "if dx is not None:", ALONE_PARAMS),
    ("merged-mean-error-of-other-sign", "kernels/merges.py",
     "for t in (rounded, whole - rounded, squares, count)])",
     "for t in (rounded, rounded - whole, squares, count)])", PIECES),
    ("moved-tile-keeps-its-channel-masks", "kernels/gated_blocks.py",
     "return Tile(place, mask_channels(place, sizes, PLAN), tile.time_masks, tile.valid)",
     "return Tile(place, tile.channel_masks, tile.time_masks, tile.valid)", GATED),
    ("sharded-mixture-counts-padding-as-it-is", "kernels/algorithms.py",
     "    zeroes_padding=True,\n", "", EAGER_PIECES),
    ("reference-softplus-in-the-parameters-dtype", "daam/reference/gate.py",
     "sigmas = softplus(log_sigma.to(chunks.dtype)) + SIGMA_FLOOR",
     "sigmas = softplus(log_sigma).to(chunks.dtype) + SIGMA_FLOOR", HALF),
    ("closed-form-has-statistics-of-padding", "daam/reference/mixture.py",
     "        common = common.masked_fill(chunks.padded, 0)\n", "", REFERENCE),
    ("lowest-position-by-the-first-offset", "daam/reference/stable.py",
     "& (low - last >= -self.limit)", "& (low - first >= -self.limit)", AUTHORS),
    ("padding-compared-after-conversion", "daam/reference/chunks.py",
     "None if padding is None else self.split(x == padding)",
     "None if padding is None else self.raw == padding", ROUNDED_EAGER),
    ("gradient-of-the-widths-alone", "daam/ops.py",
     "(x.requires_grad or p.requires_grad or q.requires_grad)", "(x.requires_grad or p.requires_grad)", NEEDS),
    ("gate-rounds-fp64-under-autocast", "daam/gated.py",
     "if t.dtype == torch.float64 or not has_autocast(device):", "if not has_autocast(device):", DTYPES),
    ("dtensor-gradients-of-replicas-added", "daam/dtensors.py",
     "Partial() if one == Replicate() and of_x != Replicate() else one for one, of_x in pairs]",
     "Partial() if one == Replicate() else one for one, _of_x in pairs]", PLACEMENTS),
    ("averages-multiply-by-the-mask", "daam/pooling.py",
     "return torch.where(valid.unsqueeze(-1), hidden, 0).sum(1) / count.unsqueeze(-1), count",
     "return (hidden * valid.unsqueeze(-1)).sum(1) / count.unsqueeze(-1), count", POOLING),
    ("layers-together-in-forward-mode", "daam/ways.py",
     "if _transformed() or _forward_mode():", "if _transformed():", FORWARD_MODE),
]  # fmt: skip
