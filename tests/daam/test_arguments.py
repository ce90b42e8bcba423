"""Devices on a command line: those of this machine, and one line for every other."""

import argparse

import pytest
import torch

from daam.recipes.arguments import device
from daam.recipes.errors import Parser

NAMES = "cpu, cuda or cuda:1"
ABSENT = "but torch finds no such device here: expected cpu"


def machine(monkeypatch, kind, count):
    """Let torch find so many devices of a kind, beside the CPU."""
    found = torch.device(kind) if count else None
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: found)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: count)


@pytest.mark.filterwarnings("error")  # torch has one for mkldnn
@pytest.mark.parametrize("text", ["mps", "xpu", "xpu:1", "meta", "cuda", "cuda:9", "hpu", "mkldnn", "privateuseone:0"])
def test_devices_that_are_not_there(text, monkeypatch, capsys):
    machine(monkeypatch, "cpu", 0)
    parser = Parser()
    parser.add_argument("--device", type=device)
    with pytest.raises(SystemExit) as stopped:
        parser.parse_args(["--device", text])
    assert stopped.value.code == 2
    assert capsys.readouterr().err == f"error: argument --device: {text!r}, {ABSENT}\n"


@pytest.mark.parametrize(
    "text", ["nonsense", "", "cpu:x", "cuda:-1", "cuda:1:2", "cuda:99999999999", " cuda", "1", "\0"]
)
def test_texts_that_are_no_device(text):
    with pytest.raises(argparse.ArgumentTypeError) as error:
        device(text)
    assert str(error.value) == f"{text!r}, expected {NAMES}"


@pytest.mark.parametrize("kind", ["cuda", "mps", "xpu"])
def test_devices_that_are_there(kind, monkeypatch):
    machine(monkeypatch, kind, 2)
    for text in ("cpu", "cpu:0", kind, f"{kind}:0", f"{kind}:1"):
        assert device(text) == text
    with pytest.raises(argparse.ArgumentTypeError, match=f"'{kind}:2', but torch finds 2 of these, from {kind}:0 on$"):
        device(f"{kind}:2")
    with pytest.raises(argparse.ArgumentTypeError, match=f"'meta', {ABSENT} or {kind}$"):
        device("meta")
