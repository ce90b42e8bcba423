"""The runs on other versions: what their logs say is read right."""

import matrix

LOG = """...
FAILED tests/daam/test_ops.py::test_export[gate] - RuntimeError: no
1665 passed, 18 skipped, 1920 deselected, 1 warning in 192.05s (0:03:12)
ERROR tests/test_none.py
1 failed, 3 passed, 2 errors in 7.10s
3 deselected in 0.10s
"""


def test_logs():
    assert matrix.read_log(LOG) == {
        "passed": 1668, "failed": 3, "skipped": 18, "runs": 2,
        "failures": ["tests/daam/test_ops.py::test_export[gate]", "tests/test_none.py"],
    }  # fmt: skip


def test_a_part_that_ran_nothing_is_not_green():
    ran = "\n".join(["1 passed in 1.00s"] * len(matrix.PARTS))
    assert matrix.is_green(matrix.read_log(ran))
    assert not matrix.is_green(matrix.read_log(ran.replace("1 passed", "1 error", 1)))
    assert not matrix.is_green(matrix.read_log(ran.replace("1 passed", "no tests ran", 1)))
