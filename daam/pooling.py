"""A frozen encoder that gives the outputs of its layers, averaged over valid positions as they come."""

from __future__ import annotations

import contextlib
import inspect
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from daam.leaf import call_leaf, find_proxy
from daam.masks import NAMELESS, as_valid, find_mask, parts_of, unwrap

# Dynamo of torch 2.13 knows that an attribute which was added and deleted while it traced is none; not tried before
FORGETS_ATTRIBUTES = torch.__version__ >= (2, 13)


class LayerPooling(nn.Module):
    """Run a frozen encoder and average the outputs of its layers over positions as they come.

    Args:
        encoder: a Hugging Face model, or any module that runs a list of layers; it is put in eval mode and stays there,
            and its parameters require no gradient. A layer's output is a tensor (batch, positions, features), or the
            first entry of a tuple. Compiled encoders, or parts of them, run as they would uncompiled.
        layers: the layers, as a name (`"encoder.layer"`), several names between commas, or a sequence of modules, in
            which a module stands as often as it runs. Not needed where the encoder holds one `nn.ModuleList` of
            `config.num_hidden_layers` entries, or only one; without such a config, one of more than one. All must have
            one width: of a hierarchical encoder name the layers of one stage.
        batch_first: False where layers give (positions, batch, features), as those of XLNet and of
            `nn.TransformerEncoder` by default. None tells by the sizes of the input, and asks where they do not tell.
        embeddings: whether what goes into the first layer is averaged too, and comes before the layers.

    Whether features of an example depend on the batch it stands in is a matter of the encoder: `check` measures it.

    Compiled or exported, the encoder is part of the graph, and values of masks are not looked at: an example without a
    valid position has NaN. An encoder that breaks the graph, or whose layers have hooks or are compiled each, runs as
    it would uncompiled, between two graphs, and is an error with fullgraph; so does any before torch 2.13, where
    torch.export takes strict=False.

    Raises:
        ValueError: the layers are not found, or not unique; the message names those there are.
    """

    def __init__(
        self, encoder: nn.Module, layers: str | Sequence[nn.Module] | None = None, batch_first: bool | None = None,
        embeddings: bool = False,
    ):  # fmt: skip
        super().__init__()
        self.encoder = encoder.requires_grad_(False).eval()
        self.batch_first, self.embeddings = batch_first, embeddings
        self._layers = find_layers(unwrap(encoder), layers)  # a plain list: the encoder has registered them
        modules = (module for layer in self._layers for module in layer.modules())
        if batch_first is None and any(isinstance(m, nn.MultiheadAttention) and not m.batch_first for m in modules):
            raise ValueError(
                "batch_first is None, but the layers hold nn.MultiheadAttention(batch_first=False): pass "
                "batch_first=False where they give (positions, batch, features), else True"
            )

    @property
    def layers(self) -> list[nn.Module]:
        """Return the layers, in order."""
        return list(self._layers)

    @property
    def num_layers(self) -> int:
        """Return how many layers are averaged, the embeddings among them where they are."""
        return len(self._layers) + self.embeddings

    def train(self, mode: bool = True) -> LayerPooling:
        """Leave the encoder in eval mode: nothing of it learns."""
        super().train(mode)
        self.encoder.eval()
        return self

    @torch.no_grad()
    def forward(self, *inputs: Any, **kwargs: Any) -> Tensor:
        """Return means (batch, layers, features) as `average` does, without gradients."""
        if (proxy := find_proxy((*inputs, *kwargs.values()))) is not None:
            return call_leaf(self, proxy, *inputs, **kwargs)
        return self.average(*inputs, **kwargs)

    def average(
        self, *inputs: Any, attention_mask: Tensor | None = None, pooling_mask: Tensor | Literal["all"] | None = None,
        **kwargs: Any,
    ) -> Tensor:  # fmt: skip
        """Return the mean of each layer's output over valid positions, (batch, layers, features), in fp32, or fp64 for
        such an encoder. No layer outlives the next one.

        Args:
            inputs, kwargs: go to the encoder.
            attention_mask: (batch, positions), 1 where valid; goes to the encoder where that takes one. Where layers
                have fewer positions, as in speech encoders, it is shortened as the encoder says.
            pooling_mask: (batch, positions), 1 where valid, for averaging alone; "all" where all positions are valid.
                None: attention_mask, or the encoder's pixel_attention_mask, or all positions.

        Raises:
            ValueError: which positions are valid is not clear, or no position of an example is; a mask does not fit the
                layers' positions; a layer's output has another layout, or ran another number of times.
        """
        return self.average_and_count(*inputs, attention_mask=attention_mask, pooling_mask=pooling_mask, **kwargs)[0]

    def average_and_count(
        self, *inputs: Any, attention_mask: Tensor | None = None, pooling_mask: Tensor | Literal["all"] | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Return the means of `average`, and the number of positions of each example, (batch,) of int64."""
        run = self._average_in_graph if torch.compiler.is_dynamo_compiling() else self._average
        return run(inputs, kwargs, attention_mask, pooling_mask)

    def check(self, collate: Callable[[list], Mapping[str, Any]], examples: Sequence[Any]):
        """Measure what features of this encoder depend on; see `daam.encoder_check.check_encoder`."""
        from daam.encoder_check import check_encoder  # it needs this class

        return check_encoder(self, collate, examples)

    def _average(
        self, inputs: tuple, kwargs: dict[str, Any], attention_mask: Tensor | None, pooling_mask: Any
    ) -> tuple[Tensor, Tensor]:
        call = self._prepare(inputs, kwargs, attention_mask, pooling_mask)
        with _lock(unwrap(self.encoder)):
            try:
                return call.run(self._layers, self.embeddings)
            except _UnclearLayoutError:
                call.batch_first = self._find_layout(call)
                return call.run(self._layers, self.embeddings)

    def _average_in_graph(
        self, inputs: tuple, kwargs: dict[str, Any], attention_mask: Tensor | None, pooling_mask: Any
    ) -> tuple[Tensor, Tensor]:
        """Return what `_average` does while Dynamo traces, as part of its graph where the encoder can be one."""
        # not compiling: something in the encoder broke the graph; Dynamo, which cannot let one end within a try
        # statement, gave this frame up and runs it as it is
        if not torch.compiler.is_dynamo_compiling() or not FORGETS_ATTRIBUTES or not self._is_traceable():
            return torch.compiler.disable(LayerPooling._average)(self, inputs, kwargs, attention_mask, pooling_mask)
        try:
            call = self._prepare(inputs, kwargs, attention_mask, pooling_mask)
            return call.run(self._layers, self.embeddings)
        except _UnclearLayoutError:
            call.batch_first = self._find_layout(call)
            return call.run(self._layers, self.embeddings)

    def _is_traceable(self) -> bool:
        """Tell whether a graph can see what layers give: not with hooks of others, nor where compiled by themselves."""
        layers = set(self._layers)
        hooked = any(layer._forward_hooks or layer._forward_pre_hooks for layer in layers)
        return not (
            hooked or any("_orig_mod" in m._modules and layers & {m, m._orig_mod} for m in self.encoder.modules())
        )

    def _look_at_encoder(self) -> tuple[tuple[tuple[str, str], ...], str]:
        """Return the fields of an `_Interface`, as the encoder is now."""
        encoder = unwrap(self.encoder)
        parameters = inspect.signature(encoder.forward).parameters.values()
        path = next((name for name, module in encoder.named_modules() if module is self._layers[0]), "")
        return tuple((p.name, p.kind.name) for p in parameters), path

    # run while Dynamo traces: what torch.compiler.assume_constant_result does, which would import all of Dynamo here
    _is_traceable._dynamo_marked_constant = _look_at_encoder._dynamo_marked_constant = True

    def _prepare(
        self, inputs: tuple, kwargs: dict[str, Any], attention_mask: Tensor | None, pooling_mask: Any
    ) -> _Call:
        """Return the call of an encoder on these inputs."""
        interface = _Interface(*self._look_at_encoder())
        if attention_mask is not None and interface.takes("attention_mask"):
            kwargs = {**kwargs, "attention_mask": attention_mask}
        named = interface.name_arguments(inputs, kwargs)
        mask = find_mask(named, attention_mask, pooling_mask, interface.path)
        return _Call(self.encoder, inputs, kwargs, named, mask, self.batch_first)

    def _find_layout(self, call: _Call) -> bool:
        """Tell whether layers give the batch first, by a call on its first example alone."""
        try:
            return _cut_to_first(call).tells_batch_first(self._layers)
        except Exception as error:  # inputs may be of other kinds than one row an example
            raise ValueError(
                f"as many examples as positions, and one alone does not tell the layout ({error}): pass batch_first="
            ) from error


@dataclass
class _Interface:
    """Hold what an encoder's call looks like: names and kinds of its parameters, and the name of its first layer."""

    parameters: tuple[tuple[str, str], ...]
    path: str

    def takes(self, name: str) -> bool:
        """Tell whether the encoder takes an argument of that name."""
        return any(kind == "VAR_KEYWORD" or parameter == name for parameter, kind in self.parameters)

    def name_arguments(self, inputs: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return arguments by name, in the order of the encoder's signature."""
        named: dict[str, Any] = {}
        inputs, others = list(inputs), dict(kwargs)
        for name, kind in self.parameters:
            if kind == "VAR_POSITIONAL":
                named.update({f"{NAMELESS}, {i}": value for i, value in enumerate(inputs)})
                inputs = []
            elif kind == "VAR_KEYWORD":
                named.update(others)
                others = {}
            elif inputs and kind != "KEYWORD_ONLY":
                named[name] = inputs.pop(0)
            elif name in others and kind != "POSITIONAL_ONLY":
                named[name] = others.pop(name)
        return dict(kwargs) if inputs or others else named  # left over: the encoder says it better


class _UnclearLayoutError(Exception):
    """Report as many examples as positions: the sizes of a layer's output do not tell which is which."""


class _LayoutFound(Exception):  # noqa: N818 (no error)
    """Report whether a layer's output has the batch first, which ends a call that nothing else was asked of."""


@dataclass
class _Call:
    """Hold one call of an encoder: its inputs by position and by name, and the mask of valid positions."""

    encoder: nn.Module
    inputs: tuple
    kwargs: dict[str, Any]
    named: dict[str, Any]
    mask: tuple[str, Tensor] | None
    batch_first: bool | None
    valid: tuple[torch.Size, Tensor | None] | None = None  # of the layer before, and its output's first two sizes

    def run(self, layers: list[nn.Module], embeddings: bool = False) -> tuple[Tensor, Tensor]:
        """Return averages (batch, layers, features) and the number of positions of each example. embeddings: whether
        those of what goes into the first layer come first.
        """
        averages: dict[nn.Module, list[Tensor]] = {layer: [] for layer in layers}
        counts: list[Tensor] = []
        first: list[Tensor] = []

        def keep(layer: nn.Module, output: Any) -> None:
            hidden = self._as_batch_first(_first_tensor(layer, output))
            average, count = _average(hidden, self._valid(hidden))
            averages[layer].append(average)
            counts.append(count)

        def keep_input(layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            if not first:  # one that runs repeatedly has them the first time
                hidden = self._as_batch_first(_first_tensor(layer, args or tuple(kwargs.values())))
                first.append(_average(hidden, self._valid(hidden))[0])

        start = keep_input if embeddings else None
        if not torch.compiler.is_dynamo_compiling():  # which sees no hooks that come and go, but a replaced forward
            self._watch(layers, keep, start)
        if not counts:  # layers whose forward is called directly have no hooks
            self._watch(layers, keep, start, direct=True)
        _check_runs(layers, averages)
        runs = {layer: iter(runs) for layer, runs in averages.items()}
        means = first + [next(runs[layer]) for layer in layers]
        if len(widths := {mean.shape[-1] for mean in means}) > 1:
            raise ValueError(
                f"layers have {', '.join(map(str, sorted(widths)))} features, expected one width: name the layers of "
                "one stage with layers=, like 'encoder.layers.2.blocks'"
            )
        return torch.stack(means, 1), counts[-1]

    def tells_batch_first(self, layers: list[nn.Module]) -> bool:
        """Tell the layout from a call on one example, which ends after its first layer."""

        def look(layer: nn.Module, output: Any) -> None:
            shape = tuple(_first_tensor(layer, output).shape)
            if shape[:2].count(1) != 1:
                raise ValueError(f"as many examples as positions, and one alone gives {shape}: pass batch_first=")
            raise _LayoutFound(shape[0] == 1)

        try:
            if not torch.compiler.is_dynamo_compiling():
                self._watch(layers, look)
            self._watch(layers, look, direct=True)
        except _LayoutFound as found:
            return found.args[0]
        raise ValueError("layers did not run, expected once each")

    def _watch(
        self, layers: list[nn.Module], keep: Callable, start: Callable | None = None, direct: bool = False
    ) -> None:
        with _run_uncompiled(self.encoder), _watch_layers(layers, keep, start, direct):
            self.encoder(*self.inputs, **self.kwargs)

    def _as_batch_first(self, hidden: Tensor) -> Tensor:
        """Return a layer's output as (batch, positions, features)."""
        if hidden.is_nested:  # nn.TransformerEncoder's fast path leaves padding out
            length = None if self.mask is None else (self.mask[1].shape[0], self.mask[1].shape[1], hidden.size(2))
            hidden = hidden.to_padded_tensor(0.0, length)
        batch = self._batch()
        if hidden.dim() != 3:
            raise ValueError(
                f"a layer's output has shape {tuple(hidden.shape)}, expected (batch, positions, features): name other "
                "layers with layers="
            )
        if self.batch_first is None and batch is not None and hidden.shape[0] == hidden.shape[1] == batch > 1:
            raise _UnclearLayoutError
        if self.batch_first is False:
            hidden = hidden.transpose(0, 1)
            batch = self._batch(positions_first=hidden.shape[0])
        if batch is not None and hidden.shape[0] != batch:
            hint = (
                "pass batch_first=False where positions come first" if self.batch_first is None else "see batch_first"
            )
            raise ValueError(
                f"a layer's output has shape {tuple(hidden.shape)} for a batch of {batch}, expected ({batch}, "
                f"positions, features): {hint}"
            )
        return hidden

    def _batch(self, positions_first: int | None = None) -> int | None:
        """Return the number of examples, by the mask or the first input. Where layers give positions first, what goes
        in may do so too: then it is positions_first, if that is one of its first two sizes.
        """
        if self.mask is not None and positions_first is not None:
            return self.mask[1].shape[0]
        values = [t for v in self.named.values() for t in (parts_of(v) if isinstance(v, Mapping | tuple) else [v])]
        shapes = [value.shape for value in values if isinstance(value, Tensor) and value.dim() > 1]
        if shapes:
            return positions_first if positions_first in shapes[0][:2] else shapes[0][0]
        return None if self.mask is None else self.mask[1].shape[0]

    def _valid(self, hidden: Tensor) -> Tensor | None:
        size = hidden.shape[:2]
        if self.valid is None or self.valid[0] != size:  # most layers have as many positions as the one before
            self.valid = size, as_valid(self.mask, self.named, unwrap(self.encoder), hidden)
        return self.valid[1]


def _cut_to_first(call: _Call) -> _Call:
    """Return the call on its first example alone."""
    batch = call._batch()

    def cut(value: Any) -> Any:
        return value[:1] if isinstance(value, Tensor) and value.dim() and len(value) == batch else value

    inputs = tuple(cut(value) for value in call.inputs)
    kwargs = {name: cut(value) for name, value in call.kwargs.items()}
    return _Call(call.encoder, inputs, kwargs, {}, None, call.batch_first)


def _average(hidden: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """Average (batch, positions, features) over valid positions: (batch, features), and their numbers, (batch,)."""
    hidden = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    if valid is None:
        return hidden.mean(1), torch.full((hidden.shape[0],), hidden.shape[1], device=hidden.device)
    count = valid.sum(1)
    # what stands at invalid positions, NaN included, does not count
    return torch.where(valid.unsqueeze(-1), hidden, 0).sum(1) / count.unsqueeze(-1), count


def _first_tensor(layer: nn.Module, output: Any) -> Tensor:
    tensor = output[0] if isinstance(output, tuple | list) and output else output
    if not isinstance(tensor, Tensor):
        raise ValueError(
            f"a {type(layer).__name__} gives a {type(output).__name__}, expected a tensor (batch, positions, features) "
            "or a tuple that begins with one: name other layers with layers="
        )
    return tensor


def _check_runs(layers: list[nn.Module], averages: dict[nn.Module, list[Tensor]]) -> None:
    expected = Counter(layers)
    if misfits := [i for i, layer in enumerate(layers) if len(averages[layer]) != expected[layer]]:
        times = [len(averages[layers[i]]) for i in misfits]
        raise ValueError(
            f"layers {misfits} ran {times} times in one call, expected {[expected[layers[i]] for i in misfits]}: one "
            "that runs repeatedly stands as often in layers="
        )


@contextlib.contextmanager
def _watch_layers(layers: list[nn.Module], keep: Callable, start: Callable | None, direct: bool) -> Iterator[None]:
    """Call keep(layer, output) whenever a layer ran in this thread, by hooks or, if direct, by a replaced forward; and
    start(layer, args, kwargs), if given, before the first one runs.
    """
    thread, undo = _find_thread(), []

    def hook(layer: nn.Module, args: Any, output: Any) -> None:
        if _find_thread() == thread:
            keep(layer, output)

    def pre_hook(layer: nn.Module, args: Any, kwargs: Any) -> None:
        if _find_thread() == thread and start is not None and layer is layers[0]:
            start(layer, args, kwargs)

    try:
        for layer in dict.fromkeys(layers):
            if direct:
                undo.append(_replace_forward(layer, pre_hook, hook))
            else:
                undo.append(layer.register_forward_pre_hook(pre_hook, with_kwargs=True).remove)
                undo.append(layer.register_forward_hook(hook).remove)
        yield
    finally:
        for step in reversed(undo):
            step()


def _find_thread() -> int:
    """Return a number of this thread, and 0 in a graph, whose trace no other thread runs."""
    return 0 if torch.compiler.is_dynamo_compiling() else threading.get_ident()


def _replace_forward(layer: nn.Module, pre_hook: Callable, hook: Callable) -> Callable[[], None]:
    """Let a layer's forward begin and end with a hook; return a function that takes that back."""
    # as entries of __dict__: Dynamo sees that what was added there is gone again, and leaves the layer alone
    original, entries = layer.forward, vars(layer)
    override = entries.get("forward")

    def forward(*args: Any, **kwargs: Any) -> Any:
        pre_hook(layer, args, kwargs)
        output = original(*args, **kwargs)
        hook(layer, args, output)
        return output

    def undo() -> None:
        if override is None:
            del entries["forward"]
        else:
            entries["forward"] = override

    entries["forward"] = forward
    return undo


_LOCKS: weakref.WeakKeyDictionary[nn.Module, threading.RLock] = weakref.WeakKeyDictionary()
_STANCE = threading.RLock()  # torch has one stance for all threads


def _lock(encoder: nn.Module) -> threading.RLock:
    """Return the lock of an encoder, under which one thread at a time watches its layers."""
    with _STANCE:
        return _LOCKS.setdefault(encoder, threading.RLock())


@contextlib.contextmanager
def _run_uncompiled(encoder: nn.Module) -> Iterator[None]:
    """Run compiled parts of an encoder as they are written, since graphs do not see hooks that come and go."""
    if not torch.compiler.is_dynamo_compiling() and any(
        m._compiled_call_impl is not None or "_orig_mod" in m._modules for m in encoder.modules()
    ):
        with _STANCE, torch.compiler.set_stance("force_eager"):
            yield
    else:
        yield


def find_layers(encoder: nn.Module, layers: str | Sequence[nn.Module] | None) -> list[nn.Module]:
    """Return the layers of an encoder: those that are named, or those that can be no others.

    Raises:
        ValueError: they are not found, or not unique.
    """
    if isinstance(layers, str):
        return [layer for name in layers.split(",") for layer in _layers_by_name(encoder, name.strip())]
    if layers is not None:
        if not (modules := list(layers)) or not all(isinstance(layer, nn.Module) for layer in modules):
            raise ValueError(f"layers is {layers!r}, expected a name, or modules")
        return modules
    config = getattr(encoder, "config", None)
    wanted = getattr(config, "num_hidden_layers", None)
    if groups := getattr(config, "num_hidden_groups", None):  # ALBERT: groups of layers that run again and again
        named = next((m for m in encoder.modules() if isinstance(m, nn.ModuleList) and len(m) == groups), None)
        if named is not None:
            return [named[i * groups // wanted] for i in range(wanted)]
    lists = {name: m for name, m in encoder.named_modules() if isinstance(m, nn.ModuleList) and len(m)}
    # the only list is taken whatever the config says: its number may be the decoder's
    fits_any = len(lists) == 1 and wanted is not None
    fitting = [m for m in lists.values() if fits_any or (len(m) > 1 if wanted is None else len(m) == wanted)]
    if len(fitting) > 1:  # as many convolutions before the layers
        fitting = [m for name, m in lists.items() if m in fitting and "conv" not in name]
    if len(fitting) != 1:
        names = ", ".join(f"{name!r} ({len(m)})" for name, m in lists.items()) or "none"
        raise ValueError(f"layers of the encoder are not clear, pass layers=: its module lists are {names}")
    return list(fitting[0])


def _layers_by_name(encoder: nn.Module, name: str) -> list[nn.Module]:
    try:
        module = encoder.get_submodule(name)
    except AttributeError as error:
        raise ValueError(f"layers: {error}") from None
    return list(module) if isinstance(module, nn.ModuleList | nn.Sequential) else [module]
