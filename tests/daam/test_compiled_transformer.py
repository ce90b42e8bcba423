"""A whole transformer as one graph: compiled, exported, and as regions that equal layers share."""

import io

import pytest
import torch
from helpers import Wrapper, close, tiny_bert
from torch import nn
from torch.export import Dim
from torch.utils import _pytree as pytree

import daam
from daam.pooling import FORGETS_ATTRIBUTES

FEATURES, CLASSES = 16, 3
IDS = torch.randint(30, (3, 8), generator=torch.Generator().manual_seed(0))
MASK = (torch.arange(8) < torch.tensor([[8], [3], [5]])).long()

pytestmark = [
    pytest.mark.usefixtures("one_thread"), pytest.mark.skipif(not FORGETS_ATTRIBUTES, reason="a graph since torch 2.13")
]  # fmt: skip


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(FEATURES, FEATURES)

    def forward(self, x):
        return torch.tanh(self.linear(x)), "more"


class Encoder(nn.Module):
    """Run each layer as run(layer, x) does, which returns what the next one sees."""

    def __init__(self, run=lambda layer, x: layer(x)[0]):
        super().__init__()
        self.embed, self.run = nn.Embedding(30, FEATURES), run
        self.layers = nn.ModuleList(Layer() for _ in range(3))

    def forward(self, input_ids, attention_mask=None):
        x = self.embed(input_ids)
        for layer in self.layers:
            x = self.run(layer, x)
        return x


class Frames(Encoder):
    """Take samples, and have a position for every eight of them, as speech encoders have."""

    def __init__(self):
        super().__init__()
        self.stride = nn.Linear(8, FEATURES)

    def _get_feat_extract_output_lengths(self, lengths):
        return lengths // 8

    def forward(self, input_values, attention_mask=None):
        x = self.stride(input_values.unflatten(1, (-1, 8)))
        for layer in self.layers:
            x = self.run(layer, x)
        return x


class Graphs(list):
    """Hold the graphs that Dynamo made, which run as they are."""

    def __call__(self, graph, inputs):
        self.append(graph)
        return graph


@pytest.fixture(autouse=True)
def fresh():
    torch.manual_seed(0)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def transformer(encoder, **options):
    decoder = daam.DATDecoder(3, FEATURES, CLASSES, num_heads=1, conv_channels=4)
    return daam.DensityAdaptiveTransformer(encoder, decoder, **options)


def bert():
    return tiny_bert(FEATURES)


def with_gradients(call, model, **inputs):
    """Return the output of a call and the gradients of the decoder's parameters."""
    out = call(**inputs, labels=torch.tensor([0, 2, 1]), return_weights=True)
    return out, torch.autograd.grad(out.loss, model.trainable_parameters())


@pytest.mark.parametrize("build", [bert, pytest.param(Encoder, marks=pytest.mark.slow)])
def test_a_model_is_one_graph(build):
    model, graphs = transformer(build()), Graphs()
    expected, gradients = with_gradients(model, model, input_ids=IDS, attention_mask=MASK)
    compiled = torch.compile(model, backend=graphs, fullgraph=True)
    for _ in range(2):
        out, found = with_gradients(compiled, model, input_ids=IDS, attention_mask=MASK)
    assert type(out) is type(expected) and list(out) == ["loss", "logits", "weights", "features"]
    for name in out:
        close(out[name], expected[name], name)
    for one, wanted in zip(found, gradients, strict=True):
        close(one, wanted, "gradient")
    assert len(graphs) == 1
    assert not any("forward" in vars(layer) or layer._forward_hooks for layer in model.pooling.layers)
    targets = [node.target for node in graphs[0].graph.nodes]
    assert targets.count(torch.ops.daam.density.default) == 1, "the decoder is not in the graph"


def twice(layer, x):
    return layer(layer(x)[0])[0]


def directly(layer, x):
    return layer.forward(x)[0]


def compiled_layer():
    encoder = Encoder()
    encoder.layers[1].compile(backend="eager")
    return encoder


POOLINGS = {
    "embeddings, directly": (lambda: Encoder(directly), {"embeddings": True}),
    "twice": (lambda: Encoder(twice), {"layers": "layers,layers"}),
    "wrapped, compiled": (lambda: Wrapper(torch.compile(Encoder(), backend="eager")), {}),
    "compiled layer": (compiled_layer, {}),
}


@pytest.mark.parametrize(
    "name", [n if n != "compiled layer" else pytest.param(n, marks=pytest.mark.slow) for n in POOLINGS]
)
def test_averages_in_a_graph(name):
    build, options = POOLINGS[name]
    pooling, mask = daam.LayerPooling(build(), **options), "all" if name == "twice" else MASK.flip(0)
    means, counts = torch.compile(pooling.average_and_count, backend="eager", fullgraph=True)(
        IDS, attention_mask=MASK, pooling_mask=mask
    )
    expected = pooling.average_and_count(IDS, attention_mask=MASK, pooling_mask=mask)
    close(means, expected[0], "averages")
    assert torch.equal(counts, expected[1])


def test_frames_in_a_graph():
    pooling, x, mask = daam.LayerPooling(Frames()), torch.randn(3, 80), torch.ones(3, 80)
    mask[1, 50:], mask[2, 3:] = 0, 0
    compiled = torch.compile(pooling.average_and_count, backend="eager", fullgraph=True)
    means, counts = compiled(x, attention_mask=mask)
    assert counts.tolist() == [10, 6, 1]
    close(means, pooling(x, attention_mask=mask), "averages")


def test_shapes_in_one_graph():
    pooling, graphs = daam.LayerPooling(Encoder()), Graphs()
    compiled = torch.compile(pooling, backend=graphs, fullgraph=True, dynamic=True)
    for ids, mask in ((IDS, MASK), (IDS[:2, :5].contiguous(), MASK[:2, :5].contiguous())):
        close(compiled(ids, attention_mask=mask), pooling(ids, attention_mask=mask), "averages")
    assert len(graphs) == 1


def breaking(layer, x):
    torch._dynamo.graph_break()
    return layer(x)[0]


def hooked():
    encoder = Encoder()
    encoder.layers[0].register_forward_hook(lambda layer, args, output: (2 * output[0],))
    return encoder


def compiled_inside():
    encoder = Encoder()
    encoder.layers[1] = torch.compile(encoder.layers[1], backend="eager")
    return encoder


@pytest.mark.parametrize(
    "build", [lambda: Encoder(breaking), hooked, pytest.param(compiled_inside, marks=pytest.mark.slow)]
)
def test_what_is_no_graph_runs_uncompiled(build):
    model, graphs = transformer(build()), Graphs()
    expected = model(IDS, attention_mask=MASK).logits
    compiled = torch.compile(model, backend=graphs)
    for _ in range(2):
        close(compiled(IDS, attention_mask=MASK).logits, expected, "logits")
    assert len(graphs) == 1, "the encoder is compiled in pieces, or anew at every call"
    assert not any(len(layer._forward_hooks) > (build is hooked) for layer in model.pooling.layers)
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(model, backend="eager", fullgraph=True)(IDS, attention_mask=MASK)


class PositionsFirst(Encoder):
    def forward(self, input_ids, attention_mask=None):
        return super().forward(input_ids.T)


@pytest.mark.parametrize("build", [PositionsFirst, pytest.param(Encoder, marks=pytest.mark.slow)])
def test_as_many_examples_as_positions(build):
    """Check that a graph too asks the first example alone whether the batch comes first."""
    pooling, ids = daam.LayerPooling(build()), IDS[:, :3]
    found = torch.compile(pooling, backend="eager", fullgraph=True)(ids)
    close(found, pooling(ids), "averages")
    close(found[1], daam.LayerPooling(pooling.encoder, batch_first=build is Encoder)(ids)[1], "of an example")


@pytest.mark.parametrize("build", [Encoder, pytest.param(bert, marks=pytest.mark.slow)])
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects")  # which undo each other
def test_export(strict, build):
    model, inputs = transformer(build()).eval(), {"input_ids": IDS, "attention_mask": MASK}
    batch, positions = Dim("batch", min=2, max=64), Dim("positions", min=2, max=16)
    shapes = {key: {0: batch, 1: positions} for key in inputs}
    program, file = torch.export.export(model, (), inputs, dynamic_shapes=shapes, strict=strict), io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    restored = torch.export.load(file).module()
    for ids, mask in ((IDS, MASK), (IDS[:2, :5], MASK[:2, :5])):
        out, expected = restored(input_ids=ids, attention_mask=mask), model(ids, attention_mask=mask)
        assert type(out) is type(expected) and list(out) == ["logits", "features"]
        close(out.logits, expected.logits, "logits")
        close(out.features, expected.features, "features")


def test_outputs_are_trees():
    out = transformer(Encoder())(IDS, labels=torch.tensor([0, 2, 1]))
    doubled = pytree.tree_map(lambda t: 2 * t, out)
    assert type(doubled) is type(out) and torch.equal(doubled.features, 2 * out.features) and doubled.weights is None
    paths = [pytree.keystr(path) for path, _ in pytree.tree_flatten_with_path(out)[0]]
    assert paths == ["['loss']", "['logits']", "['features']"]


# regions: one graph for layers that are alike

LAYERS = {
    "density": lambda: daam.MultiHeadDAAM(FEATURES, 2),
    "mixture": lambda: daam.MultiHeadDensityAdaptiveAttention(1, 2, 3),
    "stable": lambda: daam.StableMultiHeadDensityAttention(1, 2, 3),
    "block": lambda: daam.DensityBlock([1, 1], [2, 2], [3, 3], 2),
}


@torch.compiler.nested_compile_region
def run_region(layer, x):
    return layer(x)


class Stack(nn.Module):
    def __init__(self, layers, run):
        super().__init__()
        self.layers, self.run = nn.ModuleList(layers), run

    def forward(self, x):
        for layer in self.layers:
            x = self.run(layer, x)
        return x


@pytest.mark.parametrize("name", [n if n == "density" else pytest.param(n, marks=pytest.mark.slow) for n in LAYERS])
def test_equal_layers_share_a_graph(name):
    x, layers = torch.randn(2, 8, FEATURES, requires_grad=True), [LAYERS[name]() for _ in range(4)]
    expected = Stack(layers, lambda layer, x: layer(x))(x)
    graphs = Graphs()
    close(torch.compile(Stack(layers, run_region), backend=graphs, fullgraph=True)(x), expected, "y of regions")
    assert len(graphs) == 1 and [name for name, _ in graphs[0].named_children()] == ["subgraph_0"]
    torch._dynamo.reset()
    graphs = Graphs()
    for layer in layers:
        layer.compile(backend=graphs, fullgraph=True)
    close(Stack(layers, lambda layer, x: layer(x))(x), expected, "y of compiled layers")
    assert len(graphs) == 1


def test_compiled_layers_of_a_block_run_compiled():
    block, graphs = daam.DensityBlock([1] * 4, [2] * 4, [3] * 4, 4), Graphs()
    x = torch.randn(2, 8, FEATURES, requires_grad=True)
    expected = block(x)
    for layer in block.layers:
        layer.compile(backend=graphs, fullgraph=True)
    close(block(x), expected, "y")
    assert len(graphs) == 1
    assert block.fusion_for(x)[0] == "layers"
