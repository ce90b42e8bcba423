"""Launch configurations: pure functions, tested as such."""

import itertools
import sys
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import pytest
import torch
from helpers import Case, inputs, run

from daam.kernels import budgets, launch, tiles
from daam.kernels.algorithms import ALGORITHMS
from daam.kernels.operands import Strided, find_layout, split_float, varies

GATE = [find(k) for find in (budgets.gate_forward, budgets.gate_backward) for k in (1, 4, 8, 40)]
PASSES = (budgets.FORWARD, budgets.FORWARD_MIXTURE, budgets.BACKWARD, budgets.BACKWARD_MIXTURE, *GATE)


def tiles_of_passes(shape, axis, feature_axis, dtype=torch.bfloat16, heads=1):
    """Return (budget, tile, whether the chunk is streamed) of every pass on x of this shape."""
    x = torch.empty(shape, dtype=dtype, device="meta")
    plan = find_layout(x, [], axis, heads, feature_axis)
    dimension, found = varies(axis, feature_axis), []
    for budget in PASSES:
        streamed = tiles.streams(budget, x, axis, heads, feature_axis)
        for flags in itertools.product((False, True), repeat=2):
            found.append((budget, tiles.find_tile(budget, plan, streamed, dimension, dtype, *flags), streamed))
    return found


@pytest.mark.parametrize(("n", "feature_axis"), [(3, 2), (40, 2), (600, None)])
def test_no_batch_size_changes_a_tile(n, feature_axis):
    assert len({str(tiles_of_passes((batch, n, 100), 1, feature_axis)) for batch in (1, 2, 7, 1000)}) == 1


@pytest.mark.parametrize("n", [2, 5, 500, 4096, 5000])
def test_no_number_of_rows_changes_a_tile(n):
    assert len({str(tiles_of_passes((rows, n), 1, 1)) for rows in (1, 2, 7, 100_000)}) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("n", [1, 2, 3, 64, 65, 255, 256, 257, 1024, 1025, 4096, 4097, 100_000])
@pytest.mark.parametrize("rows", [False, True])
def test_resident_tiles_hold_a_chunk(n, rows, dtype):
    for budget, tile, streamed in tiles_of_passes((5, n) if rows else (5, n, 100), 1, 1 if rows else 2, dtype):
        longest = budget.longest_strided
        if rows:
            longest = budget.longest_masked if dtype == torch.float64 else budget.longest_along
        assert streamed == (n > (longest // 4 if dtype == torch.float64 else longest))
        if not streamed:
            low, high = tiles.find_lengths(find_layout(torch.empty((5, n) if rows else (5, n, 100)), [], 1, 1, None))
            assert low < n <= high <= tile.length < high + tile.rows, "no block that holds nothing of any chunk"
        assert tile.num_warps <= 16 and tile.length * tile.columns <= 2**16


@pytest.mark.parametrize("table", [tiles.ROWS, tiles.COLUMNS], ids=["rows", "columns"])
def test_lengths_of_tiles(table):
    """Check that they grow by no more than half past 32, and begin with the shortest."""
    assert list(table) == sorted(set(table)) and table[0] == 1
    assert all(high <= (1.5 if low >= 32 else 2) * low for low, high in itertools.pairwise(table))


@pytest.mark.parametrize("n", [1, 2, 3, 6, 8, 12, 24, 40, 96, 192, 256])
def test_common_chunks_fill_their_tiles(n):
    """Check that columns of common lengths have tiles without rows outside the chunk."""
    plan = find_layout(torch.empty(5, n, 1024), [], 1, 1, 2)
    assert tiles.find_tile(budgets.FORWARD, plan, False, "inner", torch.bfloat16).length == n


@pytest.mark.parametrize("n", [64, 512, 768, 1024])
def test_a_row_is_one_warps(n):
    tile = tiles.find_tile(
        budgets.FORWARD, find_layout(torch.empty(64, n), [], 1, 1, None), False, "nothing", torch.bfloat16
    )
    assert (tile.num_warps, tile.length) == (1, n)


@pytest.mark.parametrize("n", [300, 5000, 100_000])
@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("feature_axis", [1, 2, None])
def test_strips(n, rows, feature_axis):
    """Check that strips are of enough tiles for their numbers not to count; one where parameters vary along
    the chunk.
    """
    feature_axis = 1 if rows and feature_axis == 2 else feature_axis
    shape = (5, n) if rows else (5, n, 64)
    plan, dimension = find_layout(torch.empty(shape, device="meta"), [], 1, 1, feature_axis), varies(1, feature_axis)
    for budget in PASSES:
        tile = tiles.find_tile(budget, plan, True, dimension, torch.bfloat16)
        strip = tiles.find_strip(tile, plan, dimension)
        assert strip == 1 if dimension == "chunk" else strip * tile.length >= 512


@pytest.mark.parametrize("n_tiles", [1, 3, 100, 5000, 10**6, 2**33])
@pytest.mark.parametrize("heads", [1, 8])
@pytest.mark.parametrize("multiple", [1, 3, 100])
@pytest.mark.parametrize("tiles_each", [1, 16, 48])
@pytest.mark.parametrize("num_warps", [1, 8])
def test_programs(n_tiles, heads, multiple, tiles_each, num_warps):
    n_tiles = -(-n_tiles // multiple) * multiple  # as it is: `multiple` tiles to every outer place
    programs = tiles.count_programs(n_tiles, heads, num_warps, multiple, tiles_each)
    assert 1 <= programs <= n_tiles and programs % multiple == 0
    assert programs <= max(tiles.MAX_PROGRAMS, multiple) + multiple
    assert programs * heads >= min(tiles.FILL // num_warps, n_tiles * heads) / 2, "too few to fill a GPU"
    assert -(-n_tiles // programs) <= max(2 * tiles_each, 2 * -(-n_tiles // tiles.MAX_PROGRAMS))


def test_index_bits():
    x = torch.empty(1, device="meta").as_strided((3, 16), (2**30 + 16, 1))
    plan = find_layout(x, [], 0, 1, 1)
    assert tiles.index_bits(plan, tiles.Tile(4, 16, 1)) == 64
    assert tiles.index_bits(plan, tiles.Tile(2, 16, 1)) == 32
    plan = find_layout(x, [], 1, 1, None)
    assert tiles.index_bits(plan, tiles.Tile(16, 4, 1)) == 64
    assert tiles.index_bits(plan, tiles.Tile(16, 2, 1)) == 32
    assert tiles.index_bits(find_layout(torch.empty(3, 16), [], 0, 1, 1), tiles.Tile(4, 16, 1)) == 32


@pytest.mark.parametrize("value", [1e-5, 1e-5 + 1e-8, 0.1, 0.0, 1.0, 1e-30])
def test_split_float(value):
    high, low = split_float(value)
    assert torch.tensor(high, dtype=torch.float32).item() == high
    assert abs(high + torch.tensor(low, dtype=torch.float32).double().item() - value) <= 2**-46 * value


def test_more_heads_than_the_grid_takes():
    with pytest.raises(ValueError, match='num_heads is 70000, the backend "triton" takes at most 65535'):
        launch.launch(mock.Mock(), (1, 70_000), device=torch.device("cpu"), num_warps=1)


def test_stats_are_kept_for_long_chunks_only_and_cost_little():
    for shape, axis, feature_axis in (((2, 257, 9), 1, 2), ((3, 8193), 1, 1)):
        for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            x = torch.empty(shape, dtype=dtype)
            numbers = torch.Size(tiles.stats_shape(budgets.FORWARD, x, axis, 1, feature_axis)).numel()
            assert tiles.worth_keeping(x, axis, 1)
            assert numbers * (8 if dtype == torch.float64 else 4) <= 0.05 * x.nbytes
    assert not tiles.worth_keeping(torch.empty(2, 79, 9, dtype=torch.float64), 1, 1)
    assert tiles.worth_keeping(torch.empty(2, 80, 9, dtype=torch.float64), 1, 1)
    assert tiles.stats_shape(budgets.FORWARD, torch.empty(2, 256, 9), 1, 1, 2) is None


def test_a_mask_leaves_no_room_for_the_longest_rows():
    x = torch.empty(3, 8192, dtype=torch.bfloat16)
    for masked, shape in ((False, None), (True, (4, 3, 1))):
        assert tiles.stats_shape(budgets.FORWARD_MIXTURE, x, 1, 1, None, masked) == shape
        assert tiles.stats_shape(budgets.BACKWARD_MIXTURE, x, 1, 1, None, masked) == shape


def test_stats_of_heads_of_unequal_length():
    """Check that there is room for all heads as soon as the last, the longest, is streamed."""
    assert tiles.stats_shape(budgets.FORWARD, torch.empty(2, 513, 9), 1, 2) == (4, 2, 2, 9)
    assert tiles.stats_shape(budgets.FORWARD, torch.empty(2, 512, 9), 1, 2) is None


@pytest.mark.parametrize("algorithm", ["mixture", "stable"])
@pytest.mark.parametrize(
    ("shape", "lengths"),
    [((32, 64, 30_000), (7500, 7500)), ((32, 128, 3750), (937, 939)), ((32, 256, 750), (187, 189))],
)
def test_shapes_of_the_authors_are_one_launch(shape, lengths, algorithm):
    """Check the launches of their own training, four heads of four Gaussians, and how long heads are, the last too."""
    pytest.importorskip("triton")
    from bench.modelled import extent_of, record_passes

    x, p = torch.empty(shape, dtype=torch.float16, device="meta"), torch.empty(4, 4, device="meta")
    passes = record_passes(algorithm, x, p, None, 2, None, full=False)
    names = {which: [one.name for one in found] for which, found in passes.items()}
    assert names == {"forward": [f"{algorithm}_forward"], "backward": [f"{algorithm}_backward", "param_gradients"]}
    for forward_or_backward, *_ in passes.values():
        plan = forward_or_backward.meta["PLAN"]
        extent = forward_or_backward.args[-1].decode(plan.UNIT, plan.FASTEST)
        assert (extent.chunk, extent.longest) == lengths
        assert extent_of(forward_or_backward).chunk == shape[2] / 4


@pytest.mark.parametrize("algorithm", ALGORITHMS.values(), ids=ALGORITHMS)
def test_forward_streams_whatever_the_number_of_parameters(algorithm):
    """Check what fakes rely on, which may see a symbolic number."""
    budgets = [algorithm.forward(n) for n in (1, 4, 8, 40)]
    names = [name for name in budgets[0]._fields if name.startswith("longest_") and name != "longest_long"]
    assert len({tuple(getattr(budget, name) for name in names) for budget in budgets}) == 1


@pytest.mark.parametrize("args", [(((1,), 1), ((1, 1),)), ((), ((),)), (((1, 1), 1), ((1,), 1, 1))], ids=str)
def test_arguments_that_differ_have_other_traits(args):
    assert launch.traits(args[0]) != launch.traits(args[1])


def test_strides_are_traits():
    t = torch.empty(4)
    assert launch.traits((Strided(t, (1,)),)) != launch.traits((Strided(t, (2,)),))


def test_where_a_tensor_begins_is_a_trait():
    """Check one that begins at a multiple of 8 bytes and not of 16: neither serves the other's loads of 16."""
    t = torch.empty(8)
    assert launch.traits((Strided(t, (1,)),)) != launch.traits((Strided(t[2:], (1,)),))


def test_each_thread_records_its_own_launches():
    pytest.importorskip("triton")

    def launch_on_meta():
        launch.launch(mock.MagicMock(), (1, 1), device=torch.device("meta"), num_warps=1)

    def record():
        with launch.recording() as found:
            launch_on_meta()
        return found

    with launch.recording() as launches, ThreadPoolExecutor(1) as thread:
        launch_on_meta()
        assert len(thread.submit(record).result()) == 1
        launch_on_meta()
    assert len(launches) == 2


@pytest.mark.kernel
def test_threads(device):
    """Check that launches of several threads, both passes, do what they do one after the other: in the interpreter the
    program that runs is known to all of them.
    """
    cases = [Case((2, 6, 3), 1, heads=2, algorithm=name) for name in ("gate", "density")]
    given = [inputs(case, torch.float32, seed, device) for seed, case in enumerate(cases)]
    calls = [(case, one, "triton") for case, one in zip(cases, given, strict=True)]
    expected, interval = [run(*call) for call in calls], sys.getswitchinterval()
    try:
        sys.setswitchinterval(1e-4)
        with ThreadPoolExecutor(3) as threads:
            futures = [threads.submit(run, *call) for call in calls * 3]
            found = [future.result() for future in futures]
    finally:
        sys.setswitchinterval(interval)
    for wanted, results in zip(expected * 3, found, strict=True):
        assert all(torch.equal(results[name], t) for name, t in wanted.items())
