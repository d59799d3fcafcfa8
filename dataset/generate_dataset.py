"""Regenerate the eight text files and index.csv from the sentence frames, byte for byte.

    python dataset/generate_dataset.py            # rewrite the files
    python dataset/generate_dataset.py --check    # fail if a file would change

A frame is one hand-written sentence pattern, a line of frames/CATEGORY.txt. `{slot}` is filled from
lexicon.json, for one domain at a time (films, food, ...); the same slot twice is the same phrase,
`{slot2}` is a different one. `[a|b|c]` picks one of the alternatives. Sentences start with a
capital. Every category but the two neutral ones uses every domain equally often, so the domain of a
text says nothing about its label there.

Texts of your own at the end of a category file stay: a line that index.csv does not list was not
made here, so it is kept, and `--check` accepts it.
"""

import argparse
import csv
import hashlib
import io
import json
import random
import re
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
SEED = 20
LINES_PER_CATEGORY = 1250
MIN_FRAMES, MIN_WORDS, MAX_WORDS = 150, 5, 40
CATEGORY_DOMAINS = {  # None: all domains of the lexicon, equally often
    "strong_positive": None,
    "strong_negative": None,
    "medium_positive": None,
    "medium_negative": None,
    "weak_positive": None,
    "weak_negative": None,
    "neutral_positive": ["neutral_sport"],
    "neutral_negative": ["neutral_workplace"],
}
HEADER = (
    "# {category}: {n} texts, one a line. Made by dataset/generate_dataset.py from\n"
    "# dataset/frames/{category}.txt; dataset/README.md says how to add texts of your own.\n"
)


def example_id(category, text):
    """Stable id of a text: its category and the first ten hex digits of its SHA-256."""
    return f"{category}-{hashlib.sha256(text.encode('utf-8')).hexdigest()[:10]}"


def read_frames(category):
    path = HERE / "frames" / f"{category}.txt"
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    frames = [line for line in lines if line and not line.startswith("# ")]
    if len(frames) < MIN_FRAMES:
        raise ValueError(f"{path.name}: {len(frames)} frames, at least {MIN_FRAMES} are needed")
    if len(set(frames)) < len(frames):
        raise ValueError(f"{path.name}: a frame occurs twice")
    return frames


def fill(frame, slots, rng):
    """One sentence from a frame. Raises ValueError for an unknown slot or an exhausted one."""
    text = re.sub(r"\[([^\[\]]*)\]", lambda m: rng.choice(m.group(1).split("|")), frame)
    chosen = {}

    def value(match):
        name = match.group(1)
        if name not in chosen:
            base = re.sub(r"\d+$", "", name)
            if base not in slots:
                raise ValueError(f"unknown slot {{{name}}} in frame: {frame}")
            used = {v for k, v in chosen.items() if re.sub(r"\d+$", "", k) == base}
            free = [v for v in slots[base] if v not in used]
            if not free:
                raise ValueError(f"slot {{{name}}} has too few phrases in frame: {frame}")
            chosen[name] = rng.choice(free)
        return chosen[name]

    text = re.sub(r"\{(\w+)\}", value, text)
    text = re.sub(r"\s+", " ", text).strip()
    if re.search(r"[\[\]{}]", text):
        raise ValueError(f"unbalanced brackets in frame: {frame}")
    return re.sub(r"(^|[.!?] |\.[\"”] )([\"“]?)([a-z])", lambda m: m[1] + m[2] + m[3].upper(), text)


def generate_category(category, lexicon, taken):
    """The texts of one category as (text, frame number, domain), in frame order."""
    rng = random.Random(f"{SEED}:{category}")
    frames = read_frames(category)
    domains = CATEGORY_DOMAINS[category] or [
        d for d in lexicon["domains"] if not d.startswith("neutral_")
    ]
    schedule = []
    while len(schedule) < LINES_PER_CATEGORY:
        block = list(domains)
        rng.shuffle(block)
        schedule += block
    rows = []
    for number, frame in enumerate(frames):
        first, end = (LINES_PER_CATEGORY * n // len(frames) for n in (number, number + 1))
        for _ in range(end - first):  # frames with one text more lie spread over the file
            domain = schedule[len(rows)]
            slots = {**lexicon["common"], **lexicon["domains"][domain]}
            for _attempt in range(200):
                text = fill(frame, slots, rng)
                if text.lower() not in taken:
                    break
            else:
                raise ValueError(f"{category}: frame has too few variants: {frame}")
            if not MIN_WORDS <= len(text.split()) <= MAX_WORDS:
                raise ValueError(f"{category}: {len(text.split())} words, not 5-40: {text}")
            taken.add(text.lower())
            rows.append((text, number, domain.removeprefix("neutral_")))
    return rows


def present_lines(name):
    """The lines of a generated file as it is, without outer white space; [] if there is none."""
    path = HERE / name
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8").split("\n")]
    except FileNotFoundError:
        return []
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8 ({error}); save it as UTF-8") from None


def own_texts(category, made):
    """The texts of the present category file whose ids are not in `made`: those added by hand."""
    lines = present_lines(f"{category}.txt")
    texts = [line for line in lines if line and not line.startswith("# ")]
    return [text for text in texts if example_id(category, text) not in made]


def generate():
    """{file name: content} of every generated file."""
    lexicon = json.loads((HERE / "lexicon.json").read_text(encoding="utf-8"))
    files, taken = {}, set()
    indexed = {line.partition(",")[0] for line in present_lines("index.csv")}
    index = io.StringIO()
    writer = csv.writer(index, lineterminator="\n")
    writer.writerow(["id", "frame", "domain"])
    for category in CATEGORY_DOMAINS:
        rows = generate_category(category, lexicon, taken)
        entries = [
            (example_id(category, text), f"{category}-{number:03d}", domain)
            for text, number, domain in rows
        ]
        writer.writerows(entries)
        texts = [text for text, _, _ in rows]
        texts += own_texts(category, indexed | {identity for identity, _, _ in entries})
        header = HEADER.format(category=category, n=len(rows))
        files[f"{category}.txt"] = header + "".join(f"{text}\n" for text in texts)
    files["index.csv"] = index.getvalue()
    return files


def main(argv=None):
    parser = argparse.ArgumentParser(description="Regenerate dataset/*.txt and index.csv.")
    parser.add_argument(
        "--check", action="store_true", help="change nothing; exit 1 on a difference"
    )
    args = parser.parse_args(argv)
    try:
        files = generate()
    except (ValueError, OSError) as error:
        print(f"dataset: {error}", file=sys.stderr)
        return 1
    stale = [
        name
        for name, content in files.items()
        if not (HERE / name).exists() or (HERE / name).read_bytes() != content.encode("utf-8")
    ]
    if args.check:
        if stale:
            print(f"out of date: {', '.join(stale)}; run: python dataset/generate_dataset.py")
        return 1 if stale else 0
    for name in stale:
        (HERE / name).write_bytes(files[name].encode("utf-8"))
    print(f"{len(files)} files, {len(stale)} rewritten")
    return 0


if __name__ == "__main__":
    sys.exit(main())
