"""The table of encoders that were tried: what is committed, and that it comes out again."""

import json
import os
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported: nothing here downloads
pytest.importorskip("transformers")
pytest.importorskip("soundfile")

import torch

from bench import encoders

TABLE = Path(__file__).parents[2] / "bench/history/encoders.md"


def read(table):
    return {row["family"]: row for row in json.loads(table.with_suffix(".json").read_text())["rows"]}


def test_the_committed_table():
    """Check that at least forty work as they are, in all modalities, and that what works equals the average, alone and
    in a batch.
    """
    rows = read(TABLE)
    works = {name: row for name, row in rows.items() if row["verdict"] == "works"}
    assert len(works) >= 40 and {row["modality"] for row in works.values()} == {"text", "vision", "speech"}
    for name, row in rows.items():
        assert f"| {name} | {row['modality']} | {row['model']} |" in TABLE.read_text()
        if row["verdict"].endswith("works"):
            measured = list(row["tried"].values())[-1]
            assert measured["alone"] <= 1 and measured["together"] <= 1, name
        if row["verdict"] == "not":
            assert row["reason"], name


@pytest.mark.parametrize("only", [["BERT", "ViT", "Whisper"], pytest.param(None, marks=pytest.mark.slow)], ids=str)
def test_the_table_comes_out_again(only, tmp_path):
    threads = torch.get_num_threads()
    try:
        encoders.main(["--output", str(tmp_path / "table.md"), *(["--only", *only] if only else [])])
    finally:
        torch.set_num_threads(threads)
    found, committed = read(tmp_path / "table.md"), read(TABLE)
    assert set(found) == (set(only) if only else set(committed))
    assert {name: row["verdict"] for name, row in found.items()} == {name: committed[name]["verdict"] for name in found}
