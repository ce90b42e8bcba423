"""What PyTorch's users do around a layer: averaged weights, quantised neighbours, threads, scaled losses, compiled
files. `daam/SUPPORT.md` lists these tests and all others of the kind.
"""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

import daam

LAYERS = {
    "density": lambda: daam.MultiHeadDAAM(8, 2),
    "mixture": lambda: daam.MultiHeadDensityAdaptiveAttention(1, 2, 3),
    "stable": lambda: daam.StableMultiHeadDensityAttention(1, 2, 3),
    "block": lambda: daam.DensityBlock([1, 2], [2, 2], [3, 3], 2),
}
layers = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)


def model(make):
    """Return a model of a layer and its neighbours."""
    return nn.Sequential(nn.Linear(8, 8), make(), nn.Linear(8, 4))


def step(net, x, optimizer):
    """Take a step of training."""
    optimizer.zero_grad()
    net(x).square().mean().backward()
    optimizer.step()


@layers
def test_averaged_weights(make):
    """Check that an exponential average holds the average of parameters, and computes with it."""
    net, x, decay = model(make), torch.randn(4, 6, 8), 0.75
    average = torch.optim.swa_utils.AveragedModel(net, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(decay))
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    average.update_parameters(net)
    expected = [p.detach().clone() for p in net.parameters()]
    for _ in range(3):
        step(net, x, optimizer)
        average.update_parameters(net)
        expected = [decay * p + (1 - decay) * q.detach() for p, q in zip(expected, net.parameters(), strict=True)]
    for p, q, wanted in zip(average.parameters(), net.parameters(), expected, strict=True):
        assert not torch.equal(p, q), "training moved every parameter"
        torch.testing.assert_close(p, wanted)
    reached = copy.deepcopy(net)
    reached.load_state_dict(average.module.state_dict())
    assert torch.equal(average(x), reached(x))


@layers
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning", "ignore:torch.ao:DeprecationWarning")
@pytest.mark.skipif("x86" not in torch.backends.quantized.supported_engines, reason="torch quantises nothing here")
def test_quantised_neighbours(make):
    """Check that linear layers around one may be quantised, and that it computes in fp32 between them."""
    net, x = model(make).eval(), torch.randn(4, 6, 8)
    for name, p in net.named_parameters():
        if name.endswith("c"):
            nn.init.ones_(p)  # a Gaussian as narrow as some that are drawn magnifies what 8 bits leave out
    quantised = torch.ao.quantization.quantize_dynamic(net, {nn.Linear}, dtype=torch.qint8)
    first, layer, last = quantised
    assert "quantized" in type(first).__module__ and type(layer) is type(net[1])
    assert torch.equal(quantised(x), last(net[1](first(x))))
    assert (quantised(x) - net(x)).abs().max() < 0.2 * net(x).abs().max()


@layers
def test_threads_share_a_layer(make):
    """Check on the eager backend that threads which call one layer at once get what one thread gets, bit for bit."""
    layer, xs = make(), [torch.randn(4, 6, 8) for _ in range(8)]

    def run(x):
        x = x.clone().requires_grad_()
        y = layer(x)
        return y, *torch.autograd.grad(y.square().sum(), (x, *layer.parameters()))

    expected = [run(x) for x in xs]
    with ThreadPoolExecutor(4) as pool:
        for found, wanted in zip(pool.map(run, 4 * xs), 4 * expected, strict=True):
            assert all(map(torch.equal, found, wanted))


@layers
def test_a_scaled_loss_in_half_precision(make):
    """Check that a step of `GradScaler`, which takes half precision for what it is, moves parameters as one in fp32."""
    nets = [model(make)]
    nets.append(copy.deepcopy(nets[0]))
    x = torch.randn(4, 6, 8)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for net, scaled in zip(nets, (True, False), strict=True):
        optimizer = torch.optim.SGD(net.parameters(), 0.1)
        with torch.autocast("cpu", torch.bfloat16, enabled=scaled):
            loss = net(x).float().square().mean()
        (scaler.scale(loss) if scaled else loss).backward()
        scaler.step(optimizer) if scaled else optimizer.step()
    for p, q in zip(*(net.parameters() for net in nets), strict=True):
        assert (p - q).abs().max() <= 1e-2 * (1 + q.abs().max())


@pytest.mark.slow
@layers
def test_a_compiled_file(make, tmp_path):
    """Check that AOTInductor's file, of any batch, computes what the model does."""
    net = model(make).eval()
    batch = {"input": {0: torch.export.Dim("batch", min=1, max=64)}}
    with torch.no_grad():
        program = torch.export.export(net, (torch.randn(4, 6, 8),), dynamic_shapes=batch)
        path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
        run = torch._inductor.aoti_load_package(path)
        for size in (4, 7):
            x = torch.randn(size, 6, 8)
            torch.testing.assert_close(run(x), net(x), rtol=1e-5, atol=1e-6)
