"""The driver that is not there: how its library is built, and what stops it."""

import os
from unittest import mock

import pytest

from bench import host, stub_driver


def test_without_gcc_there_is_no_stub():
    with (
        mock.patch.object(stub_driver.shutil, "which", lambda name: None),
        pytest.raises(stub_driver.UnavailableError, match="there is no gcc"),
        host.launching(),
    ):
        pass


def test_what_gcc_says_is_told(monkeypatch, tmp_path):
    pytest.importorskip("triton")
    (tmp_path / "libcuda.c").write_text("no C")
    monkeypatch.setattr(stub_driver, "SOURCE", tmp_path / "libcuda.c")
    monkeypatch.setattr(stub_driver, "BUILD", tmp_path)
    with pytest.raises(stub_driver.UnavailableError, match=r"gcc does not compile libcuda\.c: .*error"):
        stub_driver.build()


def test_the_library_is_built_once(monkeypatch, tmp_path):
    pytest.importorskip("triton")
    monkeypatch.setattr(stub_driver, "BUILD", tmp_path)
    folder = stub_driver.build()
    assert os.listdir(folder) == ["libcuda.so.1"]
    monkeypatch.setattr(stub_driver.subprocess, "run", None)
    assert stub_driver.build() == folder
