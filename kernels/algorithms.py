"""What an algorithm is, in plain Python: operators, their fakes, benchmarks, the audit and tests ask these records.

Another algorithm adds one here; CONTRIBUTING lists the files beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from . import budgets

VARIANCE_FLOOR, SIGMA_FLOOR, WIDTH_FLOOR = 1e-6, 1e-3, 1e-8  # of the density gate, in the kernels and the reference


@dataclass(frozen=True)
class Algorithm:
    """Describe an algorithm of x and two parameters (heads, P).

    Args:
        name: of the modules `daam.kernels.{name}` and `daam.reference.{name}`, and of the operators.
        function: name of the public function in daam.
        params: names of the parameters.
        settings: its own arguments of the operators, after axis and before residual: name to type, as a schema has it.
        eps: the default, None where there is none.
        forward, backward: the budget of a pass, from P.
        draw: parameters out of a standard normal and a uniform tensor of their shape.
        streamed: kernels of a forward and a backward pass over streamed chunks, in order.
        reads_again: tensors of x's size that a pass over streamed chunks reads once more, (forward, backward), the
            backward pass with the statistics kept.
        unbiased: whether the variance is of n - 1 positions: a head has two or more.
        strip_sums: sums of a strip in the backward pass over streamed chunks.
        zeroes_padding: whether padding counts as zeros in mean and variance, else as it is.
        layers_backward: the budget of the backward pass of so many layers, which are one launch where they can; None
            where layers make no block.
    """

    name: str
    function: str
    params: tuple[str, str]
    settings: dict[str, str]
    eps: float | None
    forward: Callable[[int], budgets.Budget]
    backward: Callable[[int], budgets.Budget]
    draw: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    streamed: tuple[str, ...]
    reads_again: tuple[int, int]
    unbiased: bool = False
    strip_sums: int = 7
    zeroes_padding: bool = False
    layers_backward: Callable[[int], budgets.Budget] | None = None

    @property
    def on_chip(self) -> tuple[str, ...]:
        """Return the kernels of a forward and a backward pass over chunks that stay on chip, in order."""
        return f"{self.name}_forward", f"{self.name}_backward", "param_gradients"

    @property
    def features(self) -> bool:
        """Tell whether parameters may follow a dimension of x, the setting feature_axis; P is then its size."""
        return "feature_axis" in self.settings

    def find_setting(self, name: str, settings: Sequence) -> Any:
        """Return one of the settings of a call, None where the algorithm has none of that name."""
        return settings[list(self.settings).index(name)] if name in self.settings else None

    def settings_of(self, feature_axis: int | None, eps: float | None, padding: float | None) -> tuple:
        """Return the settings of a call, in order, of all those that algorithms have."""
        values = {"feature_axis": feature_axis, "eps": self.eps if eps is None else eps, "padding": padding}
        return tuple(values[name] for name in self.settings)


DENSITY = Algorithm(
    name="density",
    function="density_attention",
    params=("mean_offset", "c"),
    settings={"feature_axis": "int?", "eps": "float"},
    eps=1e-5,
    forward=lambda _n: budgets.FORWARD,
    backward=lambda _n: budgets.BACKWARD,
    draw=lambda normal, uniform: (0.3 * normal, 0.5 + uniform),
    streamed=(
        "strip_stats", "merge_strip_stats", "forward_streamed",
        "density_sums", "backward_streamed", "param_gradients",
    ),
    reads_again=(1, 2),
    strip_sums=3,
)  # fmt: skip
MIXTURE = Algorithm(
    name="mixture",
    function="mixture_attention",
    params=("mean_offsets", "c"),
    settings={"eps": "float", "padding": "float?"},
    eps=1e-8,
    forward=lambda _n: budgets.FORWARD_MIXTURE,
    backward=lambda _n: budgets.BACKWARD_MIXTURE,
    draw=lambda normal, uniform: (0.3 * normal, (0.5 + uniform) * normal.sign()),
    streamed=(
        "strip_stats", "merge_strip_stats", "mixture_scales", "merge_scales", "forward_streamed",
        "mixture_sums", "merge_mixture_sums", "backward_streamed", "param_gradients",
    ),
    reads_again=(2, 2),
    unbiased=True,
    zeroes_padding=True,
    layers_backward=budgets.layers_backward,
)  # fmt: skip
GATE = Algorithm(
    name="gate",
    function="density_gate",
    params=("mean_offsets", "log_sigma"),
    settings={},
    eps=None,
    forward=budgets.gate_forward,
    backward=budgets.gate_backward,
    draw=lambda normal, uniform: (0.3 * normal, uniform - 1),
    streamed=(
        "strip_stats", "merge_strip_stats", "forward_streamed",
        "gate_sums", "backward_streamed", "param_gradients",
    ),
    reads_again=(1, 2),
    strip_sums=2,
)  # fmt: skip
STABLE = Algorithm(
    name="stable",
    function="stable_mixture_attention",
    params=("mean_offsets", "c"),
    settings={"eps": "float", "padding": "float?"},
    eps=1e-8,
    forward=lambda _n: budgets.FORWARD_MIXTURE,
    backward=lambda _n: budgets.BACKWARD_STABLE,
    draw=lambda normal, uniform: (0.3 * normal, 0.5 + uniform),
    streamed=(
        "strip_stats", "merge_strip_stats", "stable_scales", "merge_scales", "forward_streamed",
        "stable_sums", "merge_stable_sums", "stable_backward_streamed", "param_gradients",
    ),
    reads_again=(2, 2),
    unbiased=True,
    layers_backward=budgets.stable_layers_backward,
)  # fmt: skip
ALGORITHMS = {one.name: one for one in (DENSITY, MIXTURE, GATE, STABLE)}
# Of x's size, what kernels on chip and of strips (read, write), by the last words of their names; those that handle
# their sums begin with merge_, or end with _gradients
TENSORS = {
    "forward": (1, 1), "forward_streamed": (1, 1), "forward_layers": (1, 1),
    "backward": (2, 1), "backward_streamed": (2, 1), "backward_layers": (2, 1),
    "stats": (1, 0), "scales": (1, 0), "sums": (2, 0), "project": (1, 0),
}  # fmt: skip


def count_tensors(kernel: str) -> tuple[int, int] | None:
    """Return how many tensors of x's size a kernel (reads, writes), by its name; None where it handles their sums."""
    if kernel.startswith("merge_") or kernel.endswith("_gradients"):
        return None
    return next(moved for words, moved in TENSORS.items() if kernel.endswith(words))
