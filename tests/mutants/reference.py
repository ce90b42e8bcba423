"""Slips in the eager backend: its specification, the same in place, layers, and heads spread over processes."""

REFERENCE = "compiled tests/daam/test_reference.py"
LEAN = f"{REFERENCE} -k 'test_lean_functions and"
DENSITY, GATE, MIXTURE = f"{LEAN} density'", f"{LEAN} gate'", f"{LEAN} mixture'"
STABLE = "compiled tests/daam/test_stable.py -k authors"
PUBLISHED = f"{REFERENCE} -k published_cases"
MASKED = f"{REFERENCE} -k test_what_is_masked_reaches_nothing"
LIMITS = "compiled tests/daam/test_extremes.py -k at_a_limit"
SPREAD = "compiled tests/daam/test_extremes.py -k test_a_spread"
LARGE_MEAN = f"{REFERENCE} -k test_a_large_mean_costs_no_accuracy"
EXTREMES = "compiled tests/daam/test_extremes.py -k 'test_constant or 1e_8'"
ROUNDED = "compiled tests/daam/test_functional.py -k test_the_padding_value_is_rounded"
GATED = "compiled tests/daam/test_gated.py -k 'closed_form or opcheck'"
BLOCKS = "compiled tests/daam/test_block.py -k recomputing"
PIECES = "compiled tests/daam/test_sharded.py -k test_pieces_of_three"
ONNX = "compiled tests/daam/test_onnx.py -k test_chunks_without_variance"

MUTANTS = [
    # --- parts common to the algorithms
    ("chunks-variance-without-mask", "daam/reference/chunks.py",
     "d = self.valid(self.x - self.mean(self.x))", "d = self.x - self.mean(self.x)", DENSITY),
    ("chunks-mean-as-it-is-rounded", "daam/reference/chunks.py",
     "d = self.valid(d - self.mean(d))  # see", "d = self.valid(d)  # see", LARGE_MEAN),
    ("chunks-squares-with-the-mean-s-error", "daam/reference/chunks.py",
     "(self.sum(d * d) - self.count * mean_error * mean_error).clamp(min=0)", "self.sum(d * d)", SPREAD),
    ("chunks-biased-variance", "daam/reference/chunks.py",
     "isinstance(self.count, Tensor) else self.count - 1", "isinstance(self.count, Tensor) else self.count", PUBLISHED),
    ("chunks-biased-variance-under-a-mask", "daam/reference/chunks.py",
     "return (self.count - 1).clamp(min=1) if", "return self.count if", STABLE),
    ("chunks-eps-twice", "daam/reference/chunks.py",
     "sum_squares / self.freedom + (addend(eps, sum_squares) + self.empty)",
     "sum_squares / self.freedom + (2 * addend(eps, sum_squares) + self.empty)", PUBLISHED),
    ("chunks-features-before-the-axis", "daam/reference/chunks.py",
     "precedes = feature_axis < self.axis", "precedes = feature_axis > self.axis", DENSITY),
    ("chunks-last-head-without-remainder", "daam/reference/chunks.py",
     "Part(heads - 1, 1, first, size - first)", "Part(heads - 1, 1, first, chunk)", MIXTURE),
    ("chunks-gradients-of-the-last-slice", "daam/reference/chunks.py",
     "if i < n_like_x else outputs[i].add_(t)", "if i < n_like_x else outputs[i].copy_(t)", DENSITY),
    ("chunks-residual-without-masked-x", "daam/reference/chunks.py", "y += self.raw", "y += self.x", DENSITY),
    ("chunks-residual-without-masked-gradient", "daam/reference/chunks.py", "dx += raw", "dx += g", DENSITY),
    ("chunks-masked-gradient-of-weights", "daam/reference/chunks.py",
     "h = h + self.valid(self.split(grad_weights))", "h = h + self.split(grad_weights)", MASKED),
    ("chunks-padding-reaches-its-weight", "daam/reference/chunks.py",
     "h = h.masked_fill(self.padded, 0)", "h = h.masked_fill(self.padded & (h != h), 0)", MIXTURE),
    ("chunks-eps-that-an-exporter-drops", "daam/reference/chunks.py",
     "t.new_full((1,), eps) if torch.compiler.is_exporting() else eps", "eps", ONNX),
    ("chunks-padding-value-not-rounded", "daam/reference/chunks.py",
     "self.split(x == padding)", "self.split(x.double() == padding)", ROUNDED),
    ("chunks-y-and-weights-share-memory", "daam/reference/chunks.py",
     "y = weights * self.x if return_weights else weights.mul_(self.x)", "y = weights.mul_(self.x)", DENSITY),
    # --- algorithms
    ("reference-density-missing-half", "daam/reference/density.py",
     "torch.exp(-z * z / (2 * chunks.param(c, feature_axis)))", "torch.exp(-z * z / chunks.param(c, feature_axis))",
     DENSITY),
    ("reference-density-sign-of-dx", "daam/reference/density.py", ".sub_(he)", ".add_(he)", DENSITY),
    ("reference-density-unbiased", "daam/reference/density.py",
     "sum_squares / chunks.count + (addend", "sum_squares / chunks.freedom + (addend", PUBLISHED),
    ("reference-density-c-squared", "daam/reference/density.py",
     "mul_(inv_var / scale)", "mul_(inv_var / scale / scale)", DENSITY),
    ("reference-gate-without-floor-of-variance", "daam/reference/gate.py",
     ".clamp_(min=VARIANCE_FLOOR).sqrt_()\n    n_gaussians", ".sqrt_()\n    n_gaussians", EXTREMES),
    ("reference-gate-slope-below-the-floor", "daam/reference/gate.py",
     "(variance >= VARIANCE_FLOOR).to(d.dtype).div_(std)", "1 / std", EXTREMES),
    ("reference-gate-sign-of-d-log-sigma", "daam/reference/gate.py",
     "d_sigmas.append(-chunks.param_grad(chunks.sum(qz)", "d_sigmas.append(chunks.param_grad(chunks.sum(qz)", GATE),
    ("reference-gate-sum-for-mean-of-gaussians", "daam/reference/gate.py",
     "chunks.valid(weights / log_sigma.shape[1])", "chunks.valid(weights)", GATE),
    ("reference-mixture-sign-of-c", "daam/reference/mixture.py", "scale.abs().log()", "scale.log()", MIXTURE),
    ("reference-mixture-clamp-of-the-logarithm", "daam/reference/mixture.py",
     "log_sum.clamp(min=math.log(eps))", "log_sum.clamp(min=eps)", MIXTURE),
    ("reference-mixture-clamped-taken-for-free", "daam/reference/mixture.py",
     "    clamped = sum_h * (1 - free)", "    clamped = sum_h * free", MIXTURE),
    ("reference-mixture-biased-gradient", "daam/reference/mixture.py",
     "slope = fit.inv_var * sum_kee / fit.freedom", "slope = fit.inv_var * sum_kee / chunks.count", MIXTURE),
    ("reference-product-mirror", "daam/reference/product.py",
     "self.m - self.origin + self.m", "self.m - self.origin", MIXTURE),
    ("reference-product-weight-of-what-is-hidden", "daam/reference/product.py",
     "weights if hidden is None else weights.masked_fill(hidden, 0), min_s", "weights, min_s", MIXTURE),
    ("reference-stable-c-at-its-limit", "daam/reference/stable.py",
     "((c >= low) & (c <= high))", "((c > low) & (c < high))", LIMITS),
    ("reference-stable-slope-of-what-clamps", "daam/reference/stable.py", "e.masked_fill(clamps, 0)", "e", STABLE),
    ("reference-stable-clamps-on-one-side", "daam/reference/stable.py",
     "(high - first <= self.limit) & (low - last >= -self.limit)", "(high - first <= self.limit)", STABLE),
    ("reference-stable-padding-without-its-gradient", "daam/reference/stable.py",
     "weights.masked_fill_(chunks.padded, 1)", "weights.masked_fill_(chunks.padded, 0)", STABLE),
    ("reference-gated-d-alpha-of-y", "daam/reference/gated.py",
     "h, d_alpha, dx = factor * s, (s * weights).sum(),", "h, d_alpha, dx = factor * s, s.sum(),", GATED),
    ("reference-gated-y-of-masked-x", "daam/reference/gated.py",
     "y = torch.where(mask.unsqueeze(1), y, x.permute(order))", "y = torch.where(mask.unsqueeze(1), y, 0)", GATED),
    # --- layers, and processes
    ("reference-layers-first-ones-without-gradient", "daam/reference/layers.py",
     "needed = need_x or layer > 0", "needed = need_x", BLOCKS),
    ("reference-layers-weights-of-another", "daam/reference/layers.py",
     "differentiate(grad, grad_weights[layer], like,", "differentiate(grad, grad_weights[-1], like,", BLOCKS),
    ("reference-sharded-one-where-there-is-none", "daam/reference/sharded.py",
     "(chunks.count - chunks.empty)", "chunks.count", PIECES),
    ("reference-sharded-squares-without-2", "daam/reference/sharded.py",
     "2 * self.shape(d_squares) * d", "self.shape(d_squares) * d", PIECES),
    ("reference-sharded-statistics-of-padding", "daam/reference/sharded.py",
     "dx = dx.masked_fill(chunks.padded, 0)", "dx = dx + 0", PIECES),
]  # fmt: skip
