"""Files of recipes, broken in ways that hypothesis chooses: one line of error and exit status 2, or read whole."""

import contextlib
import io
import json
import shutil

import numpy as np
import pytest
import torch
from drawn import sized
from hypothesis import strategies as st

pytestmark = pytest.mark.usefixtures("one_thread")


WRONG = st.sampled_from([None, 0, -1, 7, 1.5, True, "x", "", [], [None], {}, {"x": 1}])


def change_json(draw, data):
    """Replace a value inside what JSON holds by another, or take it out, in place."""
    while True:
        key = draw(st.sampled_from(sorted(data) if isinstance(data, dict) else range(len(data))))
        if isinstance(data[key], dict | list) and data[key] and draw(st.booleans()):
            data = data[key]
        elif draw(st.booleans()):
            data[key] = draw(WRONG)
            return
        else:
            del data[key]
            return


def damage(draw, path):
    """Cut a file off, flip some bits of it, or change what its JSON says; tell whether it was cut."""
    data, way = path.read_bytes(), draw(st.sampled_from(["cut", "flip", "value"]))
    if way == "cut":
        path.write_bytes(data[: draw(st.integers(0, len(data) - 1))])
    elif way == "value" and path.suffix == ".json":
        content = json.loads(data)
        change_json(draw, content)
        path.write_text(json.dumps(content))
    elif way == "value" and path.name.startswith("part-"):
        change_settings(draw, path)
    else:
        flipped = bytearray(data)
        for _ in range(draw(st.integers(1, 3))):
            flipped[draw(st.integers(0, len(data) - 1))] ^= 1 << draw(st.integers(0, 7))
        path.write_bytes(flipped)
    return way == "cut"


def change_settings(draw, path):
    """Replace something in what the file of a model says of how it is built."""
    from safetensors.torch import load_file, safe_open, save_file

    with safe_open(path, framework="pt") as file:
        about = file.metadata()
    content = json.loads(about["settings"])
    change_json(draw, content)
    save_file(load_file(path), path, about | {"settings": json.dumps(content)})


def end(read, name):
    """Return what a command reads, and None; or None, and the line of its error, which has the name of a file."""
    from daam.recipes.errors import guarded

    found = []
    with contextlib.redirect_stderr(io.StringIO()) as errors, contextlib.redirect_stdout(io.StringIO()):
        try:
            guarded(lambda _argv: found.append(read()))()
        except SystemExit as stopped:
            line = errors.getvalue().splitlines()[-1]
            assert stopped.code == 2 and line.startswith("error: ") and name in line, line
            return None, line
    return found[0], None


def write_media(folder):
    """Write pictures and sounds of all kinds, small ones; return the path of each."""
    image, sound = pytest.importorskip("PIL.Image"), pytest.importorskip("soundfile")
    pytest.importorskip("soxr")
    noise = np.random.default_rng(0)
    picture, wave = noise.integers(0, 256, (9, 8, 3), np.uint8), noise.normal(0, 0.1, 2000)
    for kind in ("png", "jpg", "bmp", "gif", "webp", "tif"):
        image.fromarray(picture).save(folder / f"a.{kind}")
    for kind in ("wav", "flac", "ogg", "mp3", "aiff"):
        sound.write(folder / f"a.{kind}", wave, 16000)
    return sorted(folder.iterdir())


# a decoder may do without the last bytes, and of these formats without more
CUT_UNSEEN = {"mp3": "frames have no checksum that tells of the last one"}


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's own
@sized(30, 3000)
def test_media(examine, tmp_path):
    """Check that a broken picture or sound is read or refused by name, and a shortened one refused or whole."""
    from daam.recipes.media import read_image, read_sound

    paths = write_media(tmp_path)
    whole = {path: path.read_bytes() for path in paths}

    def read(path):
        image = path.suffix[1:] in ("png", "jpg", "bmp", "gif", "webp", "tif")
        return np.asarray(read_image(path) if image else read_sound(path, 16000))

    expected = {path: read(path) for path in paths}

    def check(data):
        path = data.draw(st.sampled_from(paths))
        cut = damage(data.draw, path)
        found, line = end(lambda: read(path), path.name)
        path.write_bytes(whole[path])
        if line is None and cut and path.suffix[1:] not in CUT_UNSEEN:
            assert np.array_equal(found, expected[path]), path
        if line is None and found.dtype == np.float32:
            assert np.isfinite(found).all()

    examine(check, data=st.data())


TABLES = {
    "a.csv": 'text,label\n"a, b",x\nc d,y\n\u00e9,x\n',
    "a.tsv": 'text\tlabel\na, b\tx\n"c ""d"""\ty\n',
    "a.jsonl": '{"text": "a, b", "label": "x"}\n{"text": "c", "label": 2}\n',
}


@sized(60, 3000)
def test_tables(examine, tmp_path):
    """Check that a broken table gives whole examples, or an error."""
    from daam.recipes.data import read_examples
    from daam.recipes.examples import Example

    def check(data):
        name = data.draw(st.sampled_from(sorted(TABLES)))
        path = tmp_path / name
        path.write_text(TABLES[name])
        damage(data.draw, path)
        found, line = end(lambda: read_examples(path), name)
        if line is None:
            modality, rows = found
            assert modality == "text" and len({row.label for row in rows}) > 1
            assert all(type(row) is Example and row.source.strip() and row.label.strip() for row in rows)

    examine(check, data=st.data())


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """Make a cache of 16 examples of two classes in `cache`, and a finished run on it in `run`; return their folder."""
    for name in ("safetensors", "sklearn", "matplotlib", "tqdm"):
        pytest.importorskip(name)
    from daam.recipes.writer import Writer

    folder, generator = tmp_path_factory.mktemp("made"), torch.Generator().manual_seed(0)
    about = {"examples": 16, "shard": 8, "layers": 3, "features": 8, "names": ["a", "b"], "encoder": "e", "groups": "g"}
    about["checked"] = {"batches": "any", "shape": None}
    listed = [(f"name {i}", "ab"[i % 2], f"{i:064x}") for i in range(16)]
    writer = Writer(folder / "cache", about, listed)
    for index in range(2):
        x = torch.randn(8, 3, 8, generator=generator)
        writer.write(index, x, torch.arange(8) % 2, groups=torch.arange(8) + 8 * index)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("plot_curves", "plot_confusion"):
            patch.setattr("daam.recipes.training." + name, lambda *arguments: None)
        yield folder


def train(folder):
    """Train, or go on with, the run of a folder."""
    from daam.recipes import train

    options = ["--method", "daam", "--folds", "2", "--epochs", "1", "--rate", "1e-2", "--conv-channels", "2"]
    train.main([str(folder / "cache"), "--output", str(folder / "run"), *options])


@sized(80, 4000)
def test_caches(examine, run_folder, tmp_path):
    """Check that a cache with a broken file is refused, or is what it was but for what cache.json says in words."""
    from daam.recipes.cache import read_cache

    whole = read_cache(run_folder / "cache")
    files = sorted(path.name for path in (run_folder / "cache").iterdir() if path.name != "examples.csv")

    def check(data):
        shutil.copytree(run_folder / "cache", tmp_path / "cache", dirs_exist_ok=True)
        path = tmp_path / "cache" / data.draw(st.sampled_from(files))
        cut = damage(data.draw, path)
        found, line = end(lambda: read_cache(tmp_path / "cache"), str(tmp_path / "cache"))
        if line is None:
            assert found.features.equal(whole.features) and found.labels.equal(whole.labels)
            assert found.about == whole.about or (path.name == "cache.json" and not cut)

    examine(check, data=st.data())


@pytest.fixture(scope="module")
def finished(run_folder):
    """Return the folder of a cache and of a run on it that is finished."""
    train(run_folder)
    return run_folder


@sized(25, 2000)
def test_models(examine, finished, tmp_path):
    """Check that a model with a broken file is refused, whatever was cut off, or is one of the run's sizes."""
    from daam.recipes.saved import load_model

    def check(data):
        shutil.copytree(finished / "run", tmp_path / "run", dirs_exist_ok=True)
        path = tmp_path / "run" / data.draw(st.sampled_from(["results.json", "part-0.safetensors"]))
        cut = damage(data.draw, path)
        model, line = end(lambda: load_model(tmp_path / "run", 0), str(tmp_path / "run"))
        if line is None:
            assert not cut or path.read_bytes() == (finished / "run" / path.name).read_bytes().rstrip()
            assert model(torch.zeros(1, 3, 8)).shape == (1, 2)

    examine(check, data=st.data())


@sized(25, 600)
def test_runs(examine, finished, tmp_path):
    """Check that training is refused, or goes on to the same numbers, where a file of its run was cut off or is
    another's.
    """
    score = json.loads((finished / "run/results.json").read_text())["accuracy"]

    def check(data):
        for name in ("cache", "run"):
            shutil.copytree(finished / name, tmp_path / name, dirs_exist_ok=True)
        path = tmp_path / "run" / data.draw(st.sampled_from(["results.json", "run.json", "part-0.json"]))
        if path.name != "results.json" and data.draw(st.booleans()):
            (tmp_path / "run/results.json").unlink()  # so that training goes on, and writes it anew
        cut = damage(data.draw, path)
        _, line = end(lambda: train(tmp_path), "run")
        if line is None and cut:
            assert json.loads((tmp_path / "run/results.json").read_text())["accuracy"] == score

    examine(check, data=st.data())
