"""Examples that hypothesis draws, a few in `make test` and many in `make test-long`."""

import pytest
from hypothesis import given, settings


def examples(few, many):
    """Return how many examples a test has, and the variant of `make test-long`."""
    return pytest.mark.parametrize(
        "count", [pytest.param(few, id="few"), pytest.param(many, id="many", marks=pytest.mark.long)]
    )


def fuzz(check, count, **strategies):
    """Call a function on examples, the same ones in each run."""
    settings(max_examples=count, deadline=None, derandomize=True, database=None)(given(**strategies)(check))()
