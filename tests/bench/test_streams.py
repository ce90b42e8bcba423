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


def test_tiles_hold_what_threads_load():
    for one in streams.STREAMS:
        assert one.rows * one.columns * 2 == 32 * one.num_warps * one.thread
        assert one.in_flight == 32 * one.warps * one.thread * (2 if (one.reads, one.rounds) == (2, 1) else 1)
        assert one.warps // one.num_warps <= 32 and (one.mib << 19) % (one.rows * streams.WIDTH) == 0
