"""What FSDP makes of parameters: resets from meta, published checkpoints, the gate. For test_distributed.py."""

import functools
import re
from pathlib import Path

import torch
import torch.nn.utils.prune
from helpers import close
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

import daam

MIGRATING = Path(daam.__file__).with_name("MIGRATING.md")
MODULES = {  # on (batch, 6, 8); three heads do not divide among two processes
    "attention": lambda: daam.MultiHeadDAAM(8, 2),
    "head": lambda: daam.DensityAdaptiveAttention(1, 1, 3, None),
    "block": lambda: daam.DensityBlock([1], [3], [2], 1),
    "stable": lambda: daam.StableDensityBlock([1], [3], [2], 1),
    "gate": lambda: daam.DensityGate(6, 3),
    "decoder": lambda: daam.DATDecoder(6, 8, 2, attention="mha_bn", conv_channels=2, standardize=True),
}
TOLERANCES = (1e-5, 1e-6)


def model():
    found = nn.Sequential()
    for name, build in MODULES.items():
        found.add_module(name, build())
    return found


def whole(t):
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def check_resets(mesh):
    """Check that a reset of DTensors from the meta device fills them with what one process draws for the seed, and the
    layers of torch with their distribution.
    """
    with torch.device("meta"):
        net = fully_shard(model(), mesh=mesh)
    net.to_empty(device="cpu")
    for name in ("attention", "head", "block", "stable"):
        torch.manual_seed(3)
        expected, number = MODULES[name]().state_dict(), torch.rand(1)
        torch.manual_seed(3)
        getattr(net, name).reset_parameters()
        assert torch.equal(torch.rand(1), number), name
        for key, t in getattr(net, name).state_dict().items():
            assert hasattr(t, "placements") and torch.equal(t.full_tensor(), expected[key]), (name, key)
    net.gate.reset_parameters()
    net.decoder.reset_parameters()
    assert (whole(net.gate.alpha) == 0.05).all() and (whole(net.gate.gaa.mean_offsets) == 0).all()
    bound = (6 / (9 * 8)) ** 0.5
    assert 0.8 * bound < whole(net.decoder.conv1.weight).abs().max() <= bound
    assert (net.decoder.standardize.std == 1).all() and (whole(net.decoder.standard.in_proj_bias) == 0).all()


def published():
    """Return a published checkpoint of the model, the same in each process, with parameters from 0.5 to 1.5."""
    torch.manual_seed(4)
    net = model()
    for p in net.parameters():
        nn.init.uniform_(p, 0.5, 1.5)
    return {key: t.clone() for key, t in daam.to_published_state_dict(net).items()}


def load_whole(net, checkpoint):
    set_model_state_dict(net, dict(checkpoint), options=StateDictOptions(full_state_dict=True))


def load_shares(net, checkpoint):
    source = fully_shard(model(), mesh=init_device_mesh("cpu", (2,)))
    load_whole(source, checkpoint)
    shares = daam.to_published_state_dict(source)
    assert all(hasattr(t, "placements") for key, t in shares.items() if "norm." not in key and "ize." not in key)
    net.load_state_dict(shares)


def load_plain(net, checkpoint):
    """Load whole tensors by load_state_dict, which torch's own layers refuse."""
    foreign = [key for key in checkpoint if re.search(r"standard\.|norm\.", key)]
    state = net.state_dict()
    net.load_state_dict(checkpoint | {key: state[key] for key in foreign})
    load_whole(net, {key: checkpoint[key] for key in foreign})


def check_published(mesh):
    """Check that published checkpoints load into shares, by each way, and come back."""
    checkpoint = published()
    for load in (load_whole, load_shares, load_plain):
        net = fully_shard(model(), mesh=mesh)
        load(net, checkpoint)
        compare(daam.to_published_state_dict(net), checkpoint, load.__name__)
    with torch.device("meta"):
        net = fully_shard(model(), mesh=mesh)
    load_whole(net, checkpoint)  # which assigns
    compare(daam.to_published_state_dict(net), checkpoint, "assignment")
    (code,) = re.findall(r"```python\n(import torch.*?)```", MIGRATING.read_text(), re.DOTALL)
    exec(code, names := {})
    layer = fully_shard(daam.MultiHeadDAAM(8, 2), mesh=mesh)
    with torch.no_grad():
        layer(torch.ones(1, 6, 8))  # after which FSDP leaves the parameters whole
    layer.load_state_dict({key[10:]: t for key, t in checkpoint.items() if key.startswith("attention.")})
    close(layer.c.full_tensor()[1], checkpoint["attention.daams.1.c"][0], "c after a forward pass", TOLERANCES)
    net = model()
    for layer in (net.attention, net.stable.layers[0]):
        nn.utils.parametrize.register_parametrization(layer, "c", names["Positive"]())
    mask = torch.ones(2, 6, 3, 3)
    mask[0] = 0
    torch.nn.utils.prune.custom_from_mask(net.decoder.conv1, "weight", mask)
    net = fully_shard(net, mesh=mesh)
    load_whole(net, checkpoint)
    expected = checkpoint | {"decoder.conv1.weight": checkpoint["decoder.conv1.weight"] * mask}
    compare(daam.to_published_state_dict(net), expected, "parametrised and pruned")


def compare(found, expected, label):
    assert found.keys() == expected.keys(), label
    for key, t in found.items():
        assert t.shape == expected[key].shape, (label, key)
        close(whole(t), expected[key], f"{key} by {label}", TOLERANCES)


def check_gates(rank, mesh):
    """Check a step of training of gates under FSDP1 and FSDP2 against that of one process."""
    x = torch.randn(4, 8, 6, generator=torch.Generator().manual_seed(1))

    def trained(wrap, x):
        torch.manual_seed(0)
        net = wrap(nn.Sequential(nn.Conv1d(8, 8, 1), daam.DensityGate(8, 3)))
        y, gate = net(x)
        (y.square().mean() + gate.square().mean()).backward()
        torch.optim.SGD(net.parameters(), lr=1.0).step()
        return net

    expected = dict(trained(lambda net: net, x).named_parameters())
    before = daam.DensityGate(8, 3).alpha
    assert (expected["1.alpha"] - before).abs() > 1e-3
    share = x.chunk(2)[rank]
    found = {
        "FSDP2": {n: whole(p) for n, p in trained(functools.partial(fully_shard, mesh=mesh), share).named_parameters()}
    }
    for original in (True, False):
        wrap = functools.partial(FullyShardedDataParallel, use_orig_params=original, device_id=torch.device("cpu"))
        net = trained(wrap, share)
        with FullyShardedDataParallel.summon_full_params(net):
            parameters = {n.replace("_fsdp_wrapped_module.", ""): p for n, p in net.named_parameters()}
            found[f"FSDP1, {original}"] = {n: p.detach().clone() for n, p in parameters.items()}
    for label, parameters in found.items():
        compare(parameters, expected, label)


def check(rank):
    mesh = init_device_mesh("cpu", (2,))
    check_resets(mesh)
    check_published(mesh)
    check_gates(rank, mesh)
