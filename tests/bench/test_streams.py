"""Streams move what they say, and their plan has what it needs."""

import pytest
import torch

from bench.device import streams
from bench.device.streams import Stream


@pytest.mark.kernel
@pytest.mark.parametrize("one", [
    Stream(mib=1), Stream(2, 1, thread=16, mib=1), Stream(2, 1, rounds=2, warps=64, mib=1), Stream(run=32, mib=1),
    Stream(1, 0, mib=1), Stream(1, 0, mib=1, times=3),
])  # fmt: skip
def test_streams_move_what_they_say(one, device):
    x, other = torch.randint(4, (2, 512, 1024), device=device).half()
    y, totals = torch.zeros_like(x), torch.zeros(64, device=device)
    streams.launch(one, x, other, y, totals, 1)
    if one.writes:
        assert torch.equal(y, x + other if one.reads == 2 else x)
    else:
        expected = one.times * x.double().sum()
        assert not y.any() and abs(totals.double().sum() - expected) < 0.001 * expected


def test_what_is_asked_for_and_what_fits():
    assert Stream(2, 1, thread=64, warps=16).asked == 2 * Stream(2, 1, rounds=2).asked == 2 * 64 * 32 * 16
    assert [Stream(warps=64).resident(registers) for registers in (32, 33, 64, 65)] == [64, 48, 32, 28]
    assert Stream(warps=8).resident(255) == 8


def test_tiles_hold_what_threads_load():
    for one in streams.STREAMS:
        assert one.rows * one.columns * 2 == 32 * one.num_warps * one.thread
        assert one.warps // one.num_warps <= 32 and (one.mib << 19) % (one.rows * streams.WIDTH) == 0
