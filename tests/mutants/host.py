"""Slips in host code: plans, launches that are kept, operators, transforms, modules, checkpoints, processes."""

KERNELS = "interpreted tests/kernels/test_kernels.py -k"
FROZEN = f"{KERNELS} 'test_frozen_inputs and density'"
UNEVEN = f"{KERNELS} 'test_agrees_with_float64 and (gate-17x33 or gate-151x21 or gate-2x27x21)'"
ENTRIES = f"{KERNELS} 'test_agrees_with_float64 and (density-150x21 or density-2x26x21)'"
ROUNDED = f"{KERNELS} test_the_padding_value_is_rounded"
KEPT = "compiled tests/kernels/test_kept.py -k"
OWN = f"{KEPT} 'has_its_own or asked_again'"
CHANGED = f"{KEPT} 'test_one_change and density and (unaligned or residual or strides)'"
LAYOUT = "compiled tests/kernels/test_layout.py"
LAUNCH = "compiled tests/kernels/test_launch.py"
THREADS = "interpreted tests/kernels/test_launch.py -k test_threads"
WHOLE = "compiled tests/kernels/test_whole.py"
LAYERS = "interpreted tests/kernels/test_layers.py -k test_gradients_that_nobody_needs"
GATED = "interpreted tests/kernels/test_gated.py -k test_what_is_not_needed"
DTYPES = "interpreted tests/daam/test_gated.py -k test_dtypes"
ORDER = "compiled tests/daam/test_functional.py -k test_memory_order"
SAMPLES = "compiled tests/daam/test_vmap.py -k 'test_operators_run_once or test_functions_run'"
SECOND = "compiled tests/daam/test_ops.py -k test_gradient_penalty"
MODULES = "compiled tests/daam/test_modules.py -k 'defaults or published or passes or eps or takes_a_mask or heads'"
BLOCKS = "compiled tests/daam/test_block.py -k 'settings_differ or kept_plan'"
BACKENDS = "compiled tests/daam/test_backend.py"
CUTS = "compiled tests/daam/test_sharded.py -k test_cuts"
PIECES = "compiled tests/daam/test_sharded.py"
PLACEMENTS = "compiled tests/daam/test_dtensor.py"

MUTANTS = [
    # --- layouts, plans and launches
    ("layout-merges-what-one-tensor-has", "kernels/operands.py",
     "bool(groups) and all(a == b * size", "bool(groups) and any(a == b * size", LAYOUT),
    ("layout-unit-whatever-the-inner-size", "kernels/operands.py", "steps |= {self.inner}", "steps |= set()", LAYOUT),
    ("layout-padding-value-not-rounded", "kernels/operands.py",
     "struct.pack(\"<d\", torch.tensor(value, dtype=dtype).item())", "struct.pack(\"<d\", value)", ROUNDED),
    ("layout-eps-in-fp32", "kernels/operands.py", "Split(high, value - high)", "Split(high, 0.0)", LAUNCH),
    ("tiles-heads-of-equal-length", "kernels/tiles.py",
     "shortest = max(0, shortest - (layout.heads - 1))", "shortest = max(0, shortest)", UNEVEN),
    ("tiles-offsets-of-rows-alone", "kernels/tiles.py",
     "(tile.length - 1) * along + (tile.columns - 1) * across", "(tile.length - 1) * along", LAUNCH),
    ("host-sources-of-kernels-alone", "kernels/host.py",
     "find_sources((*kernels, *constants))", "find_sources(kernels)", WHOLE),
    ("launch-kept-for-any-grid", "kernels/launch.py", "(kernel.fn, grid, device,", "(kernel.fn, device,", OWN),
    ("launch-kept-for-any-device", "kernels/launch.py", "(kernel.fn, grid, device,", "(kernel.fn, grid,", OWN),
    ("launch-kept-for-any-constants", "kernels/launch.py",
     "*constants, *constants.values(), *traits", "*constants, *traits", CHANGED),
    ("launch-kept-whether-it-debugs", "kernels/launch.py", "knobs.runtime.debug, *constants", "*constants", OWN),
    ("launch-kept-for-any-alignment", "kernels/launch.py",
     "found += (data.dtype, data.data_ptr() % 16 == 0, strides)", "found += (data.dtype, strides)", CHANGED),
    ("launch-interpreter-without-lock", "kernels/launch.py",
     "with _interpreter if type(kernel).__name__", "with contextlib.nullcontext() if type(kernel).__name__", THREADS),
    ("launch-recorder-of-all-threads", "kernels/launch.py",
     "_recorder = threading.local()", "_recorder = type(\"Recorder\", (), {})()", LAUNCH),
    ("passes-needs-swapped", "kernels/passes.py",
     "*settings, residual, need_x, need_params = settings_and_flags",
     "*settings, residual, need_params, need_x = settings_and_flags", FROZEN),
    ("passes-gradients-of-the-first-entries", "kernels/passes.py",
     "(-(-n_params // entries), call.heads)", "(max(1, n_params // entries), call.heads)",
     ENTRIES),
    # --- operators and transforms
    ("ops-parameters-needed-together", "daam/ops.py",
     "needs[0], needs[1] or needs[2]", "needs[0], needs[1] and needs[2]", FROZEN),
    ("ops-second-order-dropped", "daam/ops.py",
     "if torch.is_grad_enabled() or _transformed():\n            # under", "if _transformed():\n            # under",
     SECOND),
    ("batching-features-of-one-sample", "daam/batching.py",
     "None if feature_axis is None else feature_axis + 1", "feature_axis", SAMPLES),
    ("batching-samples-along-0", "daam/batching.py",
     "else self.tensor.movedim(self.dim, 0)", "else self.tensor", SAMPLES),
    ("batching-masks-along-0", "daam/batching.py",
     "masks if mask.dim is None else masks.movedim(mask.dim, 0)", "masks", SAMPLES),
    ("batching-parts-joined-along-another-axis", "daam/batching.py",
     "_join(outputs, axis + 1)", "_join(outputs, axis)", SAMPLES),
    ("gated-parameters-needed-together", "daam/gated.py",
     "flags = (*needs[:4], needs[4] or needs[5])", "flags = (*needs[:4], needs[4] and needs[5])", GATED),
    ("launch-kept-for-any-strides", "kernels/launch.py",
     "found += (data.dtype, data.data_ptr() % 16 == 0, strides)",
     "found += (data.dtype, data.data_ptr() % 16 == 0, len(strides))",
     "compiled tests/kernels/test_launch.py -k traits"),
    ("gated-rounded-gate-kept", "daam/gated.py",
     "gate if gate.dtype == p.dtype else gates, p, stats)", "gate.to(p.dtype), p, stats)",
     "interpreted tests/kernels/test_gated.py -k test_alpha"),
    ("gated-autocast-ignored", "daam/gated.py",
     "return torch.get_autocast_dtype(device)", "return t.dtype", DTYPES),
    # --- functions, modules and checkpoints
    ("functional-axis-of-another-order", "daam/functional.py",
     "None if axis is None else order.index(axis)", "None if axis is None else order[axis]", ORDER),
    ("functional-mask-of-another-order", "daam/functional.py", "mask.permute(order)", "mask", ORDER),
    ("modules-published-eps", "daam/modules.py",
     "c: float = 2.0, eps: float = 1e-5", "c: float = 2.0, eps: float = 1e-8", MODULES),
    ("modules-eps-of-published-heads", "daam/modules.py",
     "padding_value, 0, eps, *place)", "padding_value, 0, 1e-8, *place)", MODULES),
    ("modules-residual-lost", "daam/modules.py",
     "eps=self.eps, mask=mask, residual=self.residual", "eps=self.eps, mask=mask, residual=False", MODULES),
    ("checkpoints-heads-sorted-as-text", "daam/checkpoints.py",
     ".reshape(features) for h in range(heads)]",
     ".reshape(features) for h in sorted(range(heads), key=str)]", MODULES),
    ("checkpoints-vectors-published-as-matrices", "daam/checkpoints.py", "p[h : h + 1] if keep_dim else p[h]",
     "p[h : h + 1]", MODULES),
    ("checkpoints-prefix-forgotten", "daam/checkpoints.py",
     "for head_list in (prefix + name for name in lists):", "for head_list in lists:", MODULES),
    ("backend-context-of-all-threads", "daam/backend.py",
     "_context = threading.local()", "_context = type(\"Context\", (), {})()", BACKENDS),
    ("backend-context-forgets-the-outer-one", "daam/backend.py",
     "_context.backend = previous", "_context.backend = None", BACKENDS),
    # --- blocks
    ("blocks-layers-of-any-eps-together", "daam/blocks.py", "        layer.eps,\n", "", BLOCKS),
    ("blocks-layers-of-any-padding-together", "daam/blocks.py", "        layer.padding_value,\n", "", BLOCKS),
    ("blocks-mask-of-the-first-axis", "daam/blocks.py",
     "rank = max(mask.dim(), norm_axis % x.dim() + 1)", "rank = mask.dim()", MODULES),
    ("block-plan-of-other-strides", "daam/block.py", "key = (x.shape, x.stride(), x.dtype,", "key = (x.shape, x.dtype,",
     BLOCKS),
    ("block-plan-whether-differentiated", "daam/block.py", "backend, differentiates(x, params))", "backend)", BLOCKS),
    ("block-needs-swapped", "daam/block_ops.py",
     "mask, *how, need_x, any(needs))", "mask, *how, any(needs), need_x)", LAYERS),
    # --- processes
    ("pieces-last-head-without-remainder", "daam/pieces.py",
     "[total // heads * head for head in range(heads)] + [total]",
     "[total // heads * head for head in range(heads + 1)]", CUTS),
    ("pieces-numbers-of-other-sizes", "daam/pieces.py",
     "        known[kind] = told\n        return None", "        known[kind] = told", PIECES),
    ("sharded-parameters-from-the-piece-s-start", "daam/sharded.py",
     "_narrow(t, 1, part.offset, part.length)", "_narrow(t, 1, part.start, part.length)", PIECES),
    ("dtensors-pieces-of-equal-size", "daam/dtensors.py",
     "max(0, min(each, size - each * rank))", "size // n + (size % n if rank == n - 1 else 0)", PLACEMENTS),
    ("dtensors-gradients-of-one-process", "daam/dtensors.py",
     "Partial() if one == Replicate() and of_x != Replicate() else one", "one", PLACEMENTS),
]  # fmt: skip
