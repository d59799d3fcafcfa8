"""Labelled examples: loading, near-duplicate groups and the division into splits.

    examples = load_splits(DataSettings(), SENTIMENT)      # the 10,000 texts of dataset/
    for row in describe(examples):
        print(row)

Layer 1: numpy; pyarrow only when a Parquet file is read. Nothing depends on the order of the rows:
the same texts with the same seed are divided alike, however they are sorted.
"""

import hashlib
import json
import re
import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from records import Example
from settings import DATASET_DIR, SPLITS, DataSettings, Task, UserError, fingerprint
from table_files import (
    csv_records,
    file_format,
    json_records,
    open_parquet,
    parquet_batches,
    text_lines,
)

DATASET_LABELS = ("positive", "negative")
CATEGORIES = tuple(
    f"{tone}_{label}"
    for tone in ("strong", "medium", "weak", "neutral")
    for label in DATASET_LABELS
)
PARQUET_ROWS = 10_000  # of one batch
GRAM_WORDS = 5  # words of an n-gram; a text with fewer words is one n-gram as a whole
CONTAINMENT = 0.5  # share of the shorter text's n-grams from which two texts are near-duplicates
# Rows of a thousand that are held out; the rest is the train split. 80/20, then a tenth of the 80.
HELD_OUT_PER_MILLE = {"test": 100, "calibration": 100, "validation": 80}

CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
# Chinese and Japanese are written without spaces: there every character counts as a word.
UNSPACED = "\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
WORD = re.compile(rf"[{UNSPACED}]|[^\W{UNSPACED}]+")

Stratum = tuple[str, str]  # label, category
Row = tuple[str, dict[str, Any]]  # where it stands ("line 7"), its columns


def load_splits(data: DataSettings, task: Task) -> list[Example]:
    """The examples of `data` with `group` and `split` set: load, group, split.

    Splits that the file itself gives stay as they are; a warning counts the near-duplicate groups
    that lie in more than one of them, because each makes the test look easier than it is.
    Raises UserError as `load_examples` and `split_examples` do.
    """
    examples = group_examples(load_examples(data, task))
    if any(e.split is None for e in examples):
        return split_examples(examples, data.split_seed)
    splits: dict[str, set] = {}
    for e in examples:
        splits.setdefault(e.group or e.id, set()).add(e.split)
    if torn := sum(len(s) > 1 for s in splits.values()):
        warnings.warn(
            f"{data.data}: {torn} near-duplicate groups lie in more than one split; remove the "
            "column 'split' to have the rows divided by group",
            stacklevel=2,
        )
    return examples


def load_examples(data: DataSettings, task: Task) -> list[Example]:
    """The labelled texts of dataset/, or of the file `data.data`, in the order of the files.

    dataset/: eight files, the category is the file name and its suffix the label. A text listed in
    index.csv has its domain, and its sentence frame as a first `group`; a line added by hand has
    neither. No line may occur twice, upper and lower case taken as equal.

    A file of your own: .csv, .tsv, .jsonl or .json (one JSON object a line), each also as .gz, or
    .parquet, in UTF-8. Labels are the task's label names; case and outer spaces do not matter, and
    every label must occur. Optional columns: `id` (else an id is made from the text) and `split`
    (train, validation, calibration, test; respected as it is, every split needs every label).
    Texts lose outer white space. A text that occurs several times with one label is kept as often
    as it occurs, and `group_examples` keeps the copies together; with two labels, or in two given
    splits, it is an error.

    Raises UserError for everything else, naming the file, the row and the next step.
    """
    if data.data is not None:
        return _load_file(Path(data.data), data, task)
    if set(task.label_names) != set(DATASET_LABELS):
        raise UserError(
            f"the files of dataset/ are labelled {' and '.join(DATASET_LABELS)}, task "
            f"{task.name!r} asks for {', '.join(task.label_names)}; give your own rows: --data FILE"
        )
    return _load_dataset(DATASET_DIR)


def group_examples(examples: list[Example]) -> list[Example]:
    """The same examples with `group` set: the smallest id of their near-duplicate group.

    Two texts are near-duplicates if they arrive with the same `group` (the sentence frame of the
    shipped texts), or if at least `CONTAINMENT` of the word 5-grams of the one with fewer occur in
    the other; case, punctuation and apostrophes do not count. Groups are the connected components.
    The search is exact and about linear: an inverted index finds the texts that share one of a
    text's rarest n-grams, so many that a near-duplicate cannot share none of them.
    Measured: the 10,000 shipped texts, each of a frame of its own, are 9,999 groups. In 15 public
    sets of 2,400 to 165,000 texts the largest group held 4.4 % of the rows; word 3-grams chained
    up to 60 % of them together.
    Source of the search: prefix filter of Chaudhuri, Ganti and Kaushik, ICDE 2006.
    """
    parent = list(range(len(examples)))

    def find(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    leader: dict[str, int] = {}
    for i, e in enumerate(examples):
        if e.group is not None:
            parent[i] = find(leader.setdefault(e.group, i))

    gram, doc, size = _shared_grams([e.text for e in examples])
    frequency = np.bincount(gram)
    docs_of = np.split(doc, np.cumsum(frequency)[:-1])  # gram → the texts that have it
    n_shared = np.bincount(doc, minlength=len(examples))
    grams_of = np.split(gram[np.argsort(doc, kind="stable")], np.cumsum(n_shared)[:-1])
    need = np.ceil(CONTAINMENT * size).astype(np.int64)  # n-grams in common that make the link
    settled = set()  # n-grams whose texts are all in one group already
    for i in np.flatnonzero(n_shared >= need).tolist():
        rarest = sorted(grams_of[i].tolist(), key=frequency.__getitem__)
        candidates: set[int] = set()
        for g in rarest[: n_shared[i] - need[i] + 1]:
            if g in settled:
                continue
            others = [j for j in docs_of[g].tolist() if find(j) != find(i)]
            if not others:
                settled.add(g)
            candidates.update(j for j in others if size[j] >= size[i])
        mine = set(rarest)
        for j in candidates:
            if find(j) != find(i) and len(mine.intersection(grams_of[j].tolist())) >= need[i]:
                parent[find(j)] = find(i)

    name: dict[int, str] = {}
    for i, e in enumerate(examples):
        name[find(i)] = min(e.id, name.get(find(i), e.id))
    return [replace(e, group=name[find(i)]) for i, e in enumerate(examples)]


def split_examples(
    examples: list[Example], seed: int, held_out: dict[str, int] = HELD_OUT_PER_MILLE
) -> list[Example]:
    """The same examples with `split` set: 72 % train, 8 % validation, 10 % calibration, 10 % test.

    held_out: other shares of test, calibration and validation, in rows of a thousand.
    A group is never divided; an example without a group is one by itself. Every stratum, that is
    every label and category, gives each split its share as exactly as the sizes of the groups
    allow. A group that spans strata counts as one of its majority; such groups are dealt out first,
    so that the others can make up for what they bring. Which groups are chosen depends on the seed
    and the group names alone.
    Warns if groups are so large that a split has less than half of its share.
    Raises UserError if a label is the majority of fewer than 4 groups, one for each split.
    """
    parts: dict[str, Counter[Stratum]] = {}  # group → its rows by stratum
    for e in examples:
        parts.setdefault(e.group or e.id, Counter())[e.label, e.category or ""] += 1
    # Ordered by a hash: shuffled, yet unmoved by groups that are added or removed.
    shuffled = sorted(parts, key=lambda name: _digest(f"{seed}:{name}"))
    lead = {n: min(part, key=lambda s: (-part[s], s)) for n, part in parts.items()}

    split_of: dict[str, str] = {}
    rows: Counter[Stratum] = Counter()  # of the groups so far
    held: Counter[tuple[Stratum, str]] = Counter()  # those of them that are held out, by split
    for spanning in (True, False):
        led_by: dict[Stratum, list[str]] = {}
        for name in shuffled:
            if (len(parts[name]) > 1) == spanning:
                led_by.setdefault(lead[name], []).append(name)
                rows.update(parts[name])
        owed: Counter[tuple[str, str]] = Counter()  # 1/1000 rows by label and split, carried on
        for stratum in sorted(led_by):
            dealt = _deal_out(stratum, led_by[stratum], parts, rows, held, owed, held_out)
            split_of.update(dealt)

    for label in sorted({e.label for e in examples}):
        names = sorted(n for n in parts if lead[n][0] == label)
        if len(names) < len(SPLITS):
            raise UserError(
                f"label {label!r} has {len(names)} near-duplicate groups of texts and at least "
                f"{len(SPLITS)} are needed, one for each split; add different texts of this label"
            )
        for split in SPLITS:  # small data: a split without the label gets its smallest spare group
            counts = Counter(split_of[n] for n in names)
            if not counts[split]:
                spare = [n for n in names if split_of[n] == max(SPLITS, key=counts.__getitem__)]
                split_of[min(spare, key=lambda n: parts[n].total())] = split
    total = Counter(split_of[e.group or e.id] for e in examples)
    for split, share in held_out.items():
        if 2000 * total[split] < share * len(examples):
            warnings.warn(
                f"only {total[split]} of {len(examples)} rows fell to {split}, not {share / 10} %; "
                f"the largest near-duplicate group has {max(p.total() for p in parts.values())}",
                stacklevel=2,
            )
    return [replace(e, split=split_of[e.group or e.id]) for e in examples]


def data_fingerprint(examples: list[Example]) -> str:
    """16 hex digits over ids, texts, labels and splits; the order of the rows does not count."""
    return fingerprint(sorted([e.id, e.text, e.label, e.split] for e in examples))


def describe(examples: list[Example]) -> list[dict[str, str | int]]:
    """Rows of a table: for each category (else label) the number of examples by split and in all.

    Keys: category, train, validation, calibration, test, total. The last row, `all`, is the sum.
    """
    counts = Counter((e.category or e.label, e.split) for e in examples)
    rows: list[dict[str, str | int]] = []
    for category in sorted({category for category, _ in counts}):
        mine = {split: n for (name, split), n in counts.items() if name == category}
        by_split = {split: mine.get(split, 0) for split in SPLITS}
        rows.append({"category": category, **by_split, "total": sum(mine.values())})
    sums = {key: sum(int(row[key]) for row in rows) for key in (*SPLITS, "total")}
    return [*rows, {"category": "all", **sums}]


def _shared_grams(texts: list[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Every distinct (n-gram, text) pair whose n-gram occurs in at least two texts.

    Returns gram (m,) int numbered from 0, doc (m,) int index into `texts`, sorted by gram then doc,
    and size (len(texts),) int, the distinct n-grams of each text, shared or not.
    """
    number: dict[str, int] = {}
    flat: list[int] = []  # word numbers from 1, every text followed by zeros
    start, count = [], []
    for text in texts:
        bare = text.casefold().replace("'", "").replace("’", "")
        words = WORD.findall(bare) or [bare]  # emoji alone: the whole text is the word
        start.append(len(flat))
        count.append(max(1, len(words) - GRAM_WORDS + 1))
        flat.extend(number.setdefault(word, len(number) + 1) for word in words)
        flat.extend([0] * (GRAM_WORDS - 1))
    word = np.array(flat, dtype=np.uint64)
    counts = np.array(count, dtype=np.int64)
    doc = np.repeat(np.arange(len(texts)), counts)
    first = np.array(start, dtype=np.int64) - np.cumsum(counts) + counts
    position = np.arange(len(doc)) + first[doc]
    # A random linear hash modulo 2^64: two n-grams of a million rows meet with a chance near 1e-5.
    factors = np.random.default_rng(0).integers(1, 2**64, GRAM_WORDS, dtype=np.uint64)
    key = np.zeros(len(doc), dtype=np.uint64)
    for k, factor in enumerate(factors | np.uint64(1)):
        key += word[position + k] * factor
    order = np.lexsort((doc, key))
    key, doc = key[order], doc[order]
    distinct = np.append(True, (key[1:] != key[:-1]) | (doc[1:] != doc[:-1]))[: len(key)]
    key, doc = key[distinct], doc[distinct]
    size = np.bincount(doc, minlength=len(texts))
    _, gram, frequency = np.unique(key, return_inverse=True, return_counts=True)
    shared = frequency[gram] > 1
    _, gram = np.unique(gram[shared], return_inverse=True)
    return gram, doc[shared], size


def _deal_out(
    stratum: Stratum,
    names: list[str],
    parts: dict[str, Counter[Stratum]],
    rows: Counter[Stratum],
    held: Counter[tuple[Stratum, str]],
    owed: Counter[tuple[str, str]],
    held_out: dict[str, int],
) -> dict[str, str]:
    """The split of every group in `names`, all led by `stratum`; updates `held` and `owed`."""
    split_of: dict[str, str] = {}
    for split, share in held_out.items():
        debt = stratum[0], split
        owed[debt] += share * rows[stratum] - 1000 * held[stratum, split]
        # What other strata owe because their groups are large must not empty a small stratum.
        most = -(-share * rows[stratum] // 1000) - held[stratum, split]
        target = max(0, min((owed[debt] + 500) // 1000, most))
        free = [n for n in names if n not in split_of]
        for i in _subset_near_sum([parts[n][stratum] for n in free], target):
            split_of[free[i]] = split
            owed[debt] -= 1000 * parts[free[i]][stratum]
            held.update({(s, split): count for s, count in parts[free[i]].items()})
    return {n: split_of.get(n, "train") for n in names}


def _subset_near_sum(sizes: list[int], target: int) -> list[int]:
    """Indices of sizes whose sum is as near to `target` as possible, from as few first ones as do.

    Exact dynamic programming over the sums up to 2 · target; beyond that the empty set is nearer.
    """
    reached = np.zeros(2 * target + 1, dtype=bool)
    reached[0] = True
    reached_by = np.full(2 * target + 1, -1)
    for i, size in enumerate(sizes):
        if reached[target]:
            break
        new = np.flatnonzero(reached[: max(0, len(reached) - size)] & ~reached[size:]) + size
        reached[new] = True
        reached_by[new] = i
    total = min(np.flatnonzero(reached).tolist(), key=lambda s: (abs(s - target), s))
    chosen = []
    while total:
        chosen.append(int(reached_by[total]))
        total -= sizes[chosen[-1]]
    return chosen


def _load_dataset(folder: Path) -> list[Example]:
    """The eight category files and index.csv of `folder`."""
    restore = "run: python dataset/generate_dataset.py"
    index_path = folder / "index.csv"
    columns, entries = _csv_rows(index_path, ",", restore)
    if columns != ["id", "frame", "domain"]:
        raise UserError(f"{index_path} must have the columns id,frame,domain; {restore}")
    index = {entry["id"]: entry for _, entry in entries}
    examples: list[Example] = []
    seen: dict[str, str] = {}
    for category in CATEGORIES:
        path = folder / f"{category}.txt"
        n_before = len(examples)
        for number, line in enumerate(text_lines(path, restore), 1):
            where = f"{path} line {number}"
            if found := CONTROL.search(line):
                raise UserError(
                    f"{where} has the control character U+{ord(found[0]):04X}; remove it"
                )
            text = line.strip()
            if not text or text.startswith("# "):
                continue
            if (first := seen.setdefault(text.casefold(), where)) != where:
                raise UserError(f"{where} repeats {first}: {text!r}; remove one of the two")
            identity = f"{category}-{_digest(text)[:10]}"
            entry = index.get(identity, {})
            examples.append(
                Example(
                    id=identity,
                    text=text,
                    label=category.partition("_")[2],
                    category=category,
                    domain=entry.get("domain"),
                    group=entry.get("frame"),
                )
            )
        if len(examples) == n_before:
            raise UserError(f"{path} has no texts; {restore}")
    return examples


def _load_file(path: Path, data: DataSettings, task: Task) -> list[Example]:
    """The rows of a user's own file, validated."""
    used = (data.text_column, data.label_column, data.category_column, "id", "split")
    columns, rows = _table_rows(path, used)
    for column, flag in (
        (data.text_column, "--text-column"),
        (data.label_column, "--label-column"),
        (data.category_column, "--category-column"),
    ):
        if column is not None and column not in columns:
            found = ", ".join(map(repr, columns))
            raise UserError(f"{path} has no column {column!r} but {found}; name yours with {flag}")
    examples = []
    ids: dict[str, str] = {}
    first_of: dict[str, tuple[str, Example]] = {}
    copies: Counter[str] = Counter()
    for place, row in rows:
        where = f"{path} {place}"
        text = _text(row.get(data.text_column), where, data.text_column)
        label = _label(row.get(data.label_column), where, data.label_column, task)
        category = _plain(row.get(data.category_column)) if data.category_column else ""
        if "id" in columns:
            identity = _plain(row.get("id"))
            if not identity:
                raise UserError(f"{where} has no id; fill it in, or remove the column 'id'")
            if (other := ids.setdefault(identity, where)) != where:
                raise UserError(
                    f"{where} has the id {identity!r} of {other}; make the ids unique, or remove "
                    "the column 'id'"
                )
        else:
            identity = _digest(text)[:16]
            copies[identity] += 1
            if copies[identity] > 1:
                identity += f"-{copies[identity]}"
        split = _plain(row.get("split")).lower() if "split" in columns else None
        if split is not None and split not in SPLITS:
            raise UserError(
                f"{where} has the split {split!r}, not one of {', '.join(SPLITS)}; correct it, or "
                "remove the column 'split' to have the rows divided"
            )
        example = Example(identity, text, label, category or None, split=split)
        other, twin = first_of.setdefault(text, (where, example))
        for key, mine, theirs in (("label", label, twin.label), ("split", split, twin.split)):
            if mine != theirs:
                raise UserError(
                    f"{where} gives the text of {other} the {key} {mine!r} instead of {theirs!r}; "
                    "correct or remove one of the two"
                )
        examples.append(example)
    _require_labels(path, examples, task, SPLITS if "split" in columns else (None,))
    return examples


def _require_labels(
    path: Path, examples: list[Example], task: Task, splits: tuple[str | None, ...]
) -> None:
    """Every label must occur in each of `splits`; None stands for rows that are not divided yet."""
    counts = Counter((e.split, e.label) for e in examples)
    for split in splits:
        for label in task.label_names:
            if not counts[split, label]:
                found = ", ".join(f"{name} {counts[split, name]}" for name in task.label_names)
                kind, step = "row", "add some"
                if split is not None:
                    kind, step = f"{split} row", "add some, or remove the column 'split'"
                raise UserError(f"{path} has no {kind} of the label {label!r} ({found}); {step}")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def _plain(value: Any) -> str:
    """A cell as text without outer white space: '' if it is missing, '1' for 1 and 1.0."""
    if value is None or value != value:
        return ""
    return str(int(value) if isinstance(value, float) and value.is_integer() else value).strip()


def _text(value: Any, where: str, column: str) -> str:
    if not _plain(value):
        raise UserError(f"{where} has no text in column {column!r}; fill it in or delete the row")
    if not isinstance(value, str):
        raise UserError(
            f"{where} has {value!r} in column {column!r}, not a text; name yours with --text-column"
        )
    return value.strip()


def _label(value: Any, where: str, column: str, task: Task) -> str:
    name = _plain(value)
    if name in task.label_names:
        return name
    matches = [label for label in task.label_names if label.casefold() == name.casefold()]
    if len(matches) == 1:
        return matches[0]
    said = f"the label {name!r}" if name else "no label"
    raise UserError(
        f"{where} has {said} in column {column!r}, not one of {', '.join(task.label_names)}; "
        "correct the row, or name the labels with --labels"
    )


def _table_rows(path: Path, used: tuple[str | None, ...]) -> tuple[list[str], list[Row]]:
    """All column names, and the rows with at least the columns `used`; by the file's extension."""
    kind = file_format(path, ("csv", "tsv", "jsonl", "json"))
    restore = "give the path of an existing file with --data"
    if kind in ("csv", "tsv"):
        return _csv_rows(path, "," if kind == "csv" else "\t", restore)
    if kind == "parquet":
        return _parquet_rows(path, restore, used)
    return _json_rows(path, restore)


def _csv_rows(path: Path, delimiter: str, restore: str) -> tuple[list[str], list[Row]]:
    records = csv_records(path, delimiter, restore)
    _, columns = next(records, (1, []))
    rows = [(f"line {line}", dict(zip(columns, cells, strict=True))) for line, cells in records]
    if not rows:
        raise UserError(f"{path} has no rows; it needs a header line and a line for every text")
    return columns, rows


def _json_rows(path: Path, restore: str) -> tuple[list[str], list[Row]]:
    rows: list[Row] = []
    for number, line, row in json_records(path, restore):
        if "\\u" in line:  # an escape can spell half a character, which no file can hold
            try:
                json.dumps(row, ensure_ascii=False).encode("utf-8")
            except UnicodeEncodeError as error:
                raise UserError(
                    f"{path} line {number} holds half a character ({error.reason}); correct it"
                ) from None
        rows.append((f"line {number}", row))
    if not rows:
        raise UserError(f"{path} has no rows; it needs a JSON object on a line for every text")
    return list(dict.fromkeys(name for _, row in rows for name in row)), rows


def _parquet_rows(
    path: Path, restore: str, used: tuple[str | None, ...]
) -> tuple[list[str], list[Row]]:
    with open_parquet(path, restore) as file:
        columns = file.schema_arrow.names
    wanted = [name for name in columns if name in used]
    batches = parquet_batches(path, restore, wanted, PARQUET_ROWS)
    rows = [row for batch in batches for row in batch.to_pylist()]
    if not rows:
        raise UserError(f"{path} has no rows; it needs a row for every text")
    return columns, [(f"row {n}", row) for n, row in enumerate(rows, 1)]
