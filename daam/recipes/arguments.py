"""Types of command-line arguments, each with an error that says what was expected."""

from __future__ import annotations

import argparse
import math
import warnings

import torch

LARGEST = 10**9  # of whole numbers: torch counts in 64 bits
MOST_LAYERS = 1000  # of a range
MOST_SEEDS = 1000  # their splits are all drawn before the first one trains


def positive(text: str, largest: int = LARGEST) -> int:
    """Return the whole number, 1 to largest, that a text says; raise ArgumentTypeError where it says none."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r}, expected a whole number of 1 or more")
    if value > largest:
        raise argparse.ArgumentTypeError(f"{text!r}, expected {largest} or less")
    return value


def seeds(text: str) -> int:
    """Return the number of seeds, 1 to MOST_SEEDS, that a text says; raise ArgumentTypeError where it says none."""
    return positive(text, MOST_SEEDS)


def layer_range(text: str) -> range:
    """Return the layers, counted from 0, that a text like 4-6 or 12 says, counted from 1; -1 for 0, the embeddings.
    Raise ArgumentTypeError where it says none.
    """
    first, dash, last = text.partition("-")
    try:
        found = range(int(first) - 1, int(last if dash else first))
    except ValueError:
        found = range(0)
    if not 0 < len(found) <= MOST_LAYERS or found.start < -1:
        raise argparse.ArgumentTypeError(f"{text!r}, expected a layer from 1 on or a range like 4-6")
    return found


def number(text: str) -> float:
    """Return the finite number, 0 or more, that a text says; raise ArgumentTypeError where it says none."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r}, expected a number of 0 or more")
    return value


def device(text: str) -> str:
    """Return a text that names a device of this machine; raise ArgumentTypeError where it does not."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of names that torch no longer uses, like mkldnn
            found = torch.device(text)
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"{text!r}, expected cpu, cuda or cuda:1") from None
    if found.type == "cpu":
        return text
    other = torch.accelerator.current_accelerator(check_available=True)
    if other is None or other.type != found.type:
        kinds = "cpu" if other is None else f"cpu or {other.type}"
        raise argparse.ArgumentTypeError(f"{text!r}, but torch finds no such device here: expected {kinds}")
    if found.index is not None and found.index >= (count := torch.accelerator.device_count()):
        raise argparse.ArgumentTypeError(f"{text!r}, but torch finds {count} of these, from {found.type}:0 on")
    return text
