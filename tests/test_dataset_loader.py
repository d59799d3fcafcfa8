"""Loading, near-duplicate groups, splits: exact sizes, no leak, an error for every mistake."""

import csv
import gzip
import io
import json
import random
import re
import shutil
import subprocess
import sys
import time
import warnings
from collections import Counter, defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import dataset_loader
from dataset_loader import (
    CATEGORIES,
    data_fingerprint,
    describe,
    group_examples,
    load_examples,
    load_splits,
    split_examples,
)
from records import Example
from settings import DATASET_DIR, ROOT, SENTIMENT, SPLITS, DataSettings, Label, Task, UserError

SPAM = Task("spam", "Is this message spam?", (Label("spam", ("yes",)), Label("ham", ("no",))))


@pytest.fixture(scope="module")
def shipped():
    """The generated texts with group; lines added by hand have no domain and are left out."""
    examples = load_examples(DataSettings(), SENTIMENT)
    return group_examples([e for e in examples if e.domain is not None])


@pytest.fixture(scope="module")
def divided(shipped):
    return split_examples(shipped, 42)


def word_grams(text, n=5):
    """Word n-grams by a tokenisation of the test's own; a shorter text is one n-gram."""
    words = [w.replace("’", "").replace("'", "") for w in re.findall(r"[\w'’]+", text.lower())]
    words = [w for w in words if w]
    return {tuple(words[i : i + n]) for i in range(max(1, len(words) - n + 1))}


def split_sizes(examples):
    return dict(Counter(e.split for e in examples))


# Splits of the shipped texts


def test_shipped_splits_have_exactly_the_stated_sizes(divided):
    sizes = {"train": 7200, "validation": 800, "calibration": 1000, "test": 1000}
    assert split_sizes(divided) == sizes
    for category in CATEGORIES:
        rows = [e for e in divided if e.category == category]
        assert split_sizes(rows) == {split: n // 8 for split, n in sizes.items()}


@pytest.mark.parametrize("seed", [0, 1, 7])
def test_other_seeds_divide_the_shipped_texts_as_evenly(shipped, divided, seed):
    other = split_examples(shipped, seed)
    assert all(row["test"] == row["calibration"] == 125 for row in describe(other)[:-1])
    moved = sum(a.split != b.split for a, b in zip(divided, other, strict=True))
    assert moved > 3000


def test_no_group_lies_in_two_splits(divided):
    splits = defaultdict(set)
    for e in divided:
        splits[e.group].add(e.split)
    assert max(map(len, splits.values())) == 1


def test_shipped_groups_stay_small(shipped):
    sizes = Counter(Counter(e.group for e in shipped).values())
    print(f"groups of the shipped texts by size: {sorted(sizes.items())}")
    assert sum(sizes.values()) > 9900
    assert max(sizes) <= 5


def test_test_texts_share_few_word_5_grams_with_any_train_text(divided):
    """Largest share of a held-out text's 5-grams that occur in one and the same train text."""
    train = defaultdict(list)
    for i, e in enumerate(divided):
        if e.split == "train":
            for gram in word_grams(e.text):
                train[gram].append(i)
    for split in ("validation", "calibration", "test"):
        shares = []
        for e in divided:
            if e.split == split:
                grams = word_grams(e.text)
                together = Counter(i for gram in grams for i in train.get(gram, ()))
                shares.append(max(together.values(), default=0) / len(grams))
        shares = np.array(shares)
        print(f"{split}: worst {shares.max():.3f}, mean {shares.mean():.4f}")
        assert 0 < shares.max() <= 0.43  # by construction below 0.5
        assert shares.mean() <= 0.025
        assert (shares > 0.25).mean() <= 0.01


def test_division_depends_on_neither_order_nor_chance(shipped, divided):
    again = split_examples(shipped, 42)
    assert again == divided
    mixed = random.Random(3).sample(shipped, len(shipped))
    split_of = {e.id: (e.group, e.split) for e in split_examples(group_examples(mixed), 42)}
    assert split_of == {e.id: (e.group, e.split) for e in divided}


def test_fingerprint_covers_ids_texts_labels_and_splits_but_not_the_order(divided):
    reference = data_fingerprint(divided)
    assert re.fullmatch("[0-9a-f]{16}", reference)
    assert data_fingerprint(divided[::-1]) == reference
    first = divided[0]
    for changed in (
        Example("other", first.text, first.label, split=first.split),
        Example(first.id, "other", first.label, split=first.split),
        Example(first.id, first.text, "other", split=first.split),
        Example(first.id, first.text, first.label, split=None),
        None,
    ):
        assert data_fingerprint([e for e in [changed, *divided[1:]] if e]) != reference


def test_describe_counts_by_category_and_split(divided):
    rows = describe(divided)
    assert [row["category"] for row in rows] == [*sorted(CATEGORIES), "all"]
    assert rows[-1] == {"category": "all", **split_sizes(divided), "total": len(divided)}
    plain = describe([Example("1", "a", "spam"), Example("2", "b", "ham", split="test")])
    assert [(row["category"], row["test"], row["total"]) for row in plain] == [
        ("ham", 1, 1),
        ("spam", 0, 1),
        ("all", 1, 2),
    ]


def test_shipped_texts_load_and_divide_in_under_three_seconds():
    start = time.process_time()
    examples = load_splits(DataSettings(), SENTIMENT)
    assert time.process_time() - start < 3
    assert {e.split for e in examples} == set(SPLITS) and all(e.group for e in examples)


def test_import_loads_no_table_library():
    code = (
        "import sys, dataset_loader; "
        "print([m for m in ('pandas', 'pyarrow', 'torch', 'scipy', 'sklearn') if m in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert result.stdout.strip() == "[]", result.stderr


# Near-duplicate groups


def brute_force_partition(examples):
    """Connected components over all pairs: half of the smaller set of 5-grams in the other's."""
    grams = [word_grams(e.text) for e in examples]
    component = list(range(len(examples)))
    for i in range(len(examples)):
        for j in range(i):
            shared = len(grams[i] & grams[j]) / min(len(grams[i]), len(grams[j]))
            linked = shared >= 0.5 or (
                examples[i].group is not None and examples[i].group == examples[j].group
            )
            if linked:
                old, new = component[i], component[j]
                component = [new if c == old else c for c in component]
    names = defaultdict(list)
    for e, c in zip(examples, component, strict=True):
        names[c].append(e.id)
    return sorted(sorted(ids) for ids in names.values())


def partition(examples):
    names = defaultdict(list)
    for e in examples:
        names[e.group].append(e.id)
    assert all(name == min(ids) for name, ids in names.items())
    return sorted(sorted(ids) for ids in names.values())


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.lists(st.sampled_from("abc"), min_size=1, max_size=14).map(" ".join),
            st.sampled_from([None, None, None, "frame 1", "frame 2"]),
        ),
        max_size=25,
    )
)
def test_groups_equal_those_of_comparing_every_pair(rows):
    examples = [Example(f"{i:02d}", text, "x", group=g) for i, (text, g) in enumerate(rows)]
    assert partition(group_examples(examples)) == brute_force_partition(examples)


@pytest.mark.parametrize(
    ("one", "two", "together"),
    [
        ("Great food!", "GREAT FOOD", True),
        ("It's fine", "its fine", True),
        ("Great food!", "Great service!", False),
        ("👍👍", "👍👍", True),
        ("👍👍", "👎", False),
        ("I waited an hour for a cold soup.", "I waited an hour for a cold pizza.", True),
        ("I waited an hour for a cold soup.", "We left before the soup was even served.", False),
        ("这家餐厅的服务非常好我很喜欢", "这家餐厅的服务非常好我不喜欢", True),
        ("这家餐厅的服务非常好我很喜欢", "电影太长了看到一半就睡着了", False),
    ],
)
def test_near_duplicates_by_example(one, two, together):
    groups = {e.group for e in group_examples([Example("1", one, "x"), Example("2", two, "x")])}
    assert len(groups) == (1 if together else 2)


def test_many_copies_and_a_common_template_take_linear_time():
    rng = random.Random(0)
    words = [f"w{i}" for i in range(3000)]
    texts = ["the very same text again and again"] * 10_000
    texts += [f"order {rng.random()} has not come yet, please help me now" for _ in range(10_000)]
    texts += [" ".join(rng.choices(words, k=15)) for _ in range(10_000)]
    start = time.process_time()
    groups = group_examples([Example(str(i), text, "x") for i, text in enumerate(texts)])
    assert time.process_time() - start < 15  # comparing every pair takes minutes
    sizes = sorted(Counter(e.group for e in groups).values())
    assert sizes[-2:] == [10_000, 10_000] and sizes[-3] <= 2


# Splits in general


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_division_keeps_groups_whole_and_gives_every_split_every_label(data):
    examples = []
    for label in ("a", "b", "c")[: data.draw(st.integers(2, 3))]:
        sizes = data.draw(st.lists(st.integers(1, 12), min_size=4, max_size=30))
        for g, size in enumerate(sizes):
            category = data.draw(st.sampled_from([None, "x", "y"]))
            name = f"{label}{g:02d}"
            examples += [
                Example(f"{name}-{i}", "t", label, category, group=name) for i in range(size)
            ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        result = split_examples(examples, data.draw(st.integers(0, 5)))
    assert [e.id for e in result] == [e.id for e in examples]
    splits = defaultdict(set)
    for e in result:
        splits[e.group].add(e.split)
    assert max(map(len, splits.values())) == 1
    for split in SPLITS:
        assert {e.label for e in result if e.split == split} == {e.label for e in examples}


def test_ungrouped_rows_are_divided_exactly_by_label_and_category():
    examples = [
        Example(f"{label}{category}{i}", "t", label, category)
        for label, category, n in (
            ("a", "x", 700),
            ("a", "y", 100),
            ("b", "x", 200),
            ("b", "y", 33),
        )
        for i in range(n)
    ]
    result = split_examples(examples, 0)
    for label, category, n in (("a", "x", 700), ("a", "y", 100), ("b", "x", 200), ("b", "y", 33)):
        sizes = split_sizes([e for e in result if (e.label, e.category) == (label, category)])
        for split, share in (("test", 0.1), ("calibration", 0.1), ("validation", 0.08)):
            assert abs(sizes[split] - share * n) < 1
    a, b = (split_sizes([e for e in result if e.label == label]) for label in "ab")
    assert a == {"train": 576, "validation": 64, "calibration": 80, "test": 80}
    assert b == {"train": 168, "validation": 19, "calibration": 23, "test": 23}


def test_many_tiny_categories_still_give_the_stated_shares():
    rng = random.Random(0)
    examples = [
        Example(str(i), "t", rng.choice("ab"), f"category {rng.randrange(900)}")
        for i in range(3000)
    ]
    sizes = split_sizes(split_examples(examples, 0))
    assert abs(sizes["test"] - 300) <= 2 and abs(sizes["calibration"] - 300) <= 2
    assert abs(sizes["validation"] - 240) <= 2


def test_groups_across_categories_are_made_up_for_by_the_others():
    examples = [Example(f"{c}{i}", "t", "a", c) for c in "xy" for i in range(400)]
    examples += [Example(f"b{i}", "t", "b") for i in range(40)]
    for g in range(30):  # 7 rows of x with 3 of y
        for i in range(10):
            examples.append(Example(f"g{g}-{i}", "t", "a", "x" if i < 7 else "y", group=f"g{g}"))
    result = split_examples(examples, 1)
    for category, n in (("x", 610), ("y", 490)):
        sizes = split_sizes([e for e in result if e.label == "a" and e.category == category])
        for split, share in (("test", 0.1), ("calibration", 0.1), ("validation", 0.08)):
            assert abs(sizes[split] - share * n) <= 1


def test_a_large_group_elsewhere_does_not_empty_a_small_category():
    examples = [Example(f"x{i}", "t", "a", "x", group="giant") for i in range(900)]
    examples += [Example(f"y{i}", "t", "a", "y") for i in range(100)]
    examples += [Example(f"b{i}", "t", "b", "y") for i in range(100)]
    with pytest.warns(UserWarning, match="near-duplicate group has 900"):
        result = split_examples(examples, 0)
    sizes = split_sizes([e for e in result if e.label == "a" and e.category == "y"])
    assert sizes == {"train": 72, "validation": 8, "calibration": 10, "test": 10}


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 9), max_size=9), st.integers(0, 25))
def test_chosen_groups_come_as_near_to_the_share_as_any_choice(sizes, target):
    chosen = dataset_loader._subset_near_sum(sizes, target)
    assert len(set(chosen)) == len(chosen)
    sums = {0}
    for size in sizes:
        sums |= {s + size for s in sums}
    assert abs(sum(sizes[i] for i in chosen) - target) == min(abs(s - target) for s in sums)


def test_too_few_groups_say_how_many_are_needed():
    examples = [Example(f"a{i}", "t", "a") for i in range(20)]
    examples += [Example(f"b{i}", "t", "b", group=f"g{i % 3}") for i in range(20)]
    with pytest.raises(UserError, match=r"'b' has 3 near-duplicate groups.*at least 4 are needed"):
        split_examples(examples, 0)


# The files of dataset/


def test_every_shipped_text_has_domain_frame_and_a_label_from_its_category(shipped):
    for e in random.Random(0).sample(shipped, 200):
        assert e.domain and e.group and e.category == f"{e.category.split('_')[0]}_{e.label}"
        assert re.fullmatch(rf"{e.category}-[0-9a-f]{{10}}", e.id)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    copy = shutil.copytree(DATASET_DIR, tmp_path / "dataset")
    monkeypatch.setattr(dataset_loader, "DATASET_DIR", copy)
    return copy


def append(path, raw):
    with path.open("ab") as file:
        file.write(raw)
    return path.read_bytes().count(b"\n")


def test_a_line_added_by_hand_is_an_example_without_domain(folder):
    append(folder / "weak_positive.txt", "Naïve as a brochure, and I'd go again. 👍\n".encode())
    examples = load_splits(DataSettings(), SENTIMENT)
    own = next(e for e in examples if e.text.startswith("Naïve"))
    assert own.domain is None and own.group == own.id
    assert (own.category, own.label) == ("weak_positive", "positive") and own.split in SPLITS


def test_windows_line_ends_and_a_byte_order_mark_change_nothing(folder):
    before = load_examples(DataSettings(), SENTIMENT)
    for category in CATEGORIES:
        path = folder / f"{category}.txt"
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert load_examples(DataSettings(), SENTIMENT) == before


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"Caf\xe9 life.\n", r"weak_positive\.txt line {line} is not UTF-8 \(byte 0xe9\)"),
        (b"A tab\there.\n", r"weak_positive\.txt line {line} has the control character U\+0009"),
        (b"A bell\x07 here.\n", r"line {line} has the control character U\+0007; remove it"),
        (b"Twice the same.\nTWICE the same.\n", r"line {line} repeats .*weak_positive\.txt line"),
    ],
)
def test_a_bad_line_is_named_with_file_and_line(folder, raw, message):
    line = append(folder / "weak_positive.txt", raw)
    with pytest.raises(UserError, match=message.format(line=line)):
        load_examples(DataSettings(), SENTIMENT)


def test_a_line_repeated_in_another_file_is_refused(folder):
    text = (folder / "strong_positive.txt").read_text(encoding="utf-8").splitlines()[5]
    line = append(folder / "weak_negative.txt", text.upper().encode() + b"\n")
    with pytest.raises(
        UserError, match=rf"weak_negative\.txt line {line} repeats .*strong_positive\.txt line 6: "
    ):
        load_examples(DataSettings(), SENTIMENT)


@pytest.mark.parametrize("name", ["medium_positive.txt", "index.csv"])
def test_a_missing_or_empty_shipped_file_says_how_to_restore_it(folder, name):
    restore = r"python dataset/generate_dataset\.py"
    (folder / name).write_bytes(b"id,frame,domain\n" if name == "index.csv" else b"# nothing\n")
    with pytest.raises(UserError, match=f"{name} has no"):
        load_examples(DataSettings(), SENTIMENT)
    (folder / name).unlink()
    with pytest.raises(UserError, match=f"{name} does not exist; run: {restore}"):
        load_examples(DataSettings(), SENTIMENT)


def test_an_index_with_other_columns_is_refused(folder):
    (folder / "index.csv").write_text("id,domain\nx,films\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"index\.csv must have the columns id,frame,domain"):
        load_examples(DataSettings(), SENTIMENT)


def test_shipped_texts_refuse_other_labels():
    with pytest.raises(UserError, match=r"'spam' asks for spam, ham; give your own rows: --data"):
        load_examples(DataSettings(), SPAM)


# Files of the user's own


ROWS = [  # no two are near-duplicates
    {
        "text": f"Message {i} speaks of thing{i}, of matter{i} and more",
        "label": SPAM.label_names[i % 2],
    }
    for i in range(50)
]


def csv_bytes(rows, delimiter=","):
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().encode()


def jsonl_bytes(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def write_parquet(path, columns):
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table(columns), path)
    return path


def columns_of(rows):
    return {key: [row[key] for row in rows] for key in rows[0]}


def load(path, task=SPAM, **settings):
    return load_examples(DataSettings(data=str(path), **settings), task)


def test_every_format_gives_the_same_examples(tmp_path):
    files = {
        "a.csv": csv_bytes(ROWS),
        "b.TSV": csv_bytes(ROWS, "\t"),
        "c.jsonl": jsonl_bytes(ROWS),
        "d.json": jsonl_bytes(ROWS),
        "e.csv.gz": gzip.compress(csv_bytes(ROWS), mtime=0),
        "f.jsonl.gz": gzip.compress(jsonl_bytes(ROWS), mtime=0),
        "g.csv": b"\xef\xbb\xbf" + csv_bytes(ROWS).replace(b"\r\n", b"\n"),
    }
    results = []
    for name, raw in files.items():
        (tmp_path / name).write_bytes(raw)
        results.append(load(tmp_path / name))
    results.append(load(write_parquet(tmp_path / "h.parquet", columns_of(ROWS))))
    assert [(e.text, e.label) for e in results[0]] == [(r["text"], r["label"]) for r in ROWS]
    assert all(result == results[0] for result in results)
    assert len({e.id for e in results[0]}) == len(ROWS)


def test_columns_ids_categories_and_line_breaks_are_read(tmp_path):
    rows = [
        {"id": f"r{i}", "body": f'  First line {i},\nsecond "line" ', "class": "SPAM ", "from": ""}
        if i % 2
        else {"id": f"r{i}", "body": f"NA {i}", "class": "ham", "from": " mail "}
        for i in range(10)
    ]
    path = tmp_path / "own.csv"
    path.write_bytes(csv_bytes(rows))
    examples = load(path, text_column="body", label_column="class", category_column="from")
    assert examples[1] == Example("r1", 'First line 1,\nsecond "line"', "spam")
    assert examples[2] == Example("r2", "NA 2", "ham", "mail")


def test_numbers_name_labels_in_every_format(tmp_path):
    task = Task("t", "Is it?", (Label("1", ("yes",)), Label("0", ("no",))))
    rows = [{"text": f"text {i}", "label": i % 2} for i in range(8)]
    (tmp_path / "a.jsonl").write_bytes(jsonl_bytes(rows))
    columns = {**columns_of(rows), "label": [float(row["label"]) for row in rows]}
    write_parquet(tmp_path / "b.parquet", columns)
    for name in ("a.jsonl", "b.parquet"):
        assert [e.label for e in load(tmp_path / name, task)] == ["0", "1"] * 4


def test_own_rows_are_divided_whatever_their_order(tmp_path):
    path, mixed = tmp_path / "own.csv", tmp_path / "mixed.csv"
    path.write_bytes(csv_bytes(ROWS))
    mixed.write_bytes(csv_bytes(random.Random(0).sample(ROWS, len(ROWS))))
    one, two = (load_splits(DataSettings(data=str(p)), SPAM) for p in (path, mixed))
    assert data_fingerprint(one) == data_fingerprint(two)
    for split in SPLITS:
        assert {e.label for e in one if e.split == split} == {"spam", "ham"}


def test_copies_of_a_text_are_kept_together(tmp_path):
    path = tmp_path / "own.csv"
    path.write_bytes(csv_bytes(ROWS + [ROWS[0]] * 3))
    examples = load_splits(DataSettings(data=str(path)), SPAM)
    copies = [e for e in examples if e.text == ROWS[0]["text"]]
    assert len(examples) == len(ROWS) + 3 and len({e.id for e in copies}) == 4
    assert len({(e.group, e.split) for e in copies}) == 1


def with_splits(rows):
    return [{**row, "split": SPLITS[i // 2 % 4]} for i, row in enumerate(rows)]


def test_given_splits_are_respected(tmp_path):
    path = tmp_path / "own.jsonl"
    rows = with_splits(ROWS)
    path.write_bytes(jsonl_bytes(rows))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        examples = load_splits(DataSettings(data=str(path)), SPAM)
    assert [e.split for e in examples] == [row["split"] for row in rows]
    assert all(e.group for e in examples)


def test_given_splits_that_tear_near_duplicates_are_reported(tmp_path):
    path = tmp_path / "own.jsonl"
    extra = [
        {"text": "I waited an hour for a cold soup.", "label": "ham", "split": "train"},
        {"text": "I waited an hour for a cold pizza.", "label": "ham", "split": "test"},
    ]
    path.write_bytes(jsonl_bytes(with_splits(ROWS) + extra))
    with pytest.warns(UserWarning, match="1 near-duplicate groups lie in more than one split"):
        load_splits(DataSettings(data=str(path)), SPAM)


TWO = [{"text": "one text", "label": "spam"}, {"text": "another text", "label": "ham"}]


def rows_with(**changes):
    """Two good rows and a third one, on line 4 of a CSV file and line 3 of a JSONL file."""
    return [*TWO, {"text": "a third text", "label": "ham", **changes}]


BAD_FILES = [
    ("a.xlsx", b"x", r"a\.xlsx has no extension that is read here; use \.csv"),
    ("a.parquet.gz", b"x", r"a\.parquet\.gz has no extension that is read here"),
    ("a.csv", b"", r"a\.csv has no rows; it needs a header line"),
    ("a.csv", b"text,label\n", r"a\.csv has no rows"),
    ("a.jsonl", b"\n", r"a\.jsonl has no rows"),
    ("a.csv", b"txt,label\na,ham\n", r"no column 'text' but 'txt', 'label'; .*--text-column"),
    ("a.csv", b"text,y\na,ham\n", r"no column 'label' but 'text', 'y'; .*--label-column"),
    ("a.csv", b"text,label,text\na,ham,b\n", r"a\.csv has the column 'text' twice"),
    ("a.csv", b"text,label\na,ham\nb, c,ham\n", r"a\.csv line 3 has 3 fields, the header 2; put"),
    ("a.csv", b"text,label\na,ham\nb\n", r"a\.csv line 3 has 1 fields, the header 2"),
    ("a.csv", b'text,label\na,ham\n"b,ham\n', r"a\.csv line 3 is malformed .*close every quote"),
    ("a.csv", b'text,label\n"a\nb",ham\n"c"d,ham\n', r"a\.csv line 4 is malformed"),
    ("a.csv", b"text,label\na,ham\ncaf\xe9,ham\n", r"a\.csv line 3 is not UTF-8 \(byte 0xe9\)"),
    ("a.csv", csv_bytes(rows_with(text=" ")), r"a\.csv line 4 has no text in column 'text'; fill"),
    ("a.csv", csv_bytes(rows_with(label="")), r"a\.csv line 4 has no label in column 'label'"),
    ("a.csv", csv_bytes(rows_with(label="eggs")), r"line 4 has the label 'eggs' .*spam, ham; corr"),
    ("a.csv", csv_bytes(TWO[:1]), r"a\.csv has no row of the label 'ham' \(spam 1, ham 0\)"),
    (
        "a.csv",
        csv_bytes(rows_with(text="one text")),
        r"line 4 gives the text of .*line 2 the label",
    ),
    ("a.jsonl", jsonl_bytes(TWO) + b"{]\n", r"a\.jsonl line 3 is not a JSON object \(.*jq -c"),
    ("a.jsonl", b"[" * 100_000, r"a\.jsonl line 1 is not a JSON object"),
    ("a.json", b'[{"text": "a"}]\n', r"a\.json line 1 is not a JSON object \(a list\)"),
    ("a.jsonl", jsonl_bytes(rows_with(text=None)), r"a\.jsonl line 3 has no text"),
    ("a.jsonl", jsonl_bytes(TWO) + b'{"label": "ham"}\n', r"a\.jsonl line 3 has no text"),
    ("a.jsonl", jsonl_bytes(rows_with(text=float("nan"))), r"a\.jsonl line 3 has no text"),
    ("a.jsonl", jsonl_bytes(rows_with(label=float("nan"))), r"a\.jsonl line 3 has no label"),
    ("a.jsonl", jsonl_bytes(rows_with(text=7)), r"line 3 has 7 in column 'text', not a text; name"),
    ("a.jsonl", jsonl_bytes(rows_with(text="\ud83d")), r"a\.jsonl line 3 holds half a character"),
    ("a.jsonl", b'{"text": "caf\xe9"}', r"a\.jsonl line 1 is not UTF-8"),
    ("a.csv.gz", csv_bytes(TWO), r"a\.csv\.gz is not a whole gzip file"),
    (
        "a.csv.gz",
        gzip.compress(csv_bytes(TWO), mtime=0)[:-9],
        r"a\.csv\.gz is not a whole gzip file",
    ),
    ("a.parquet", b"PAR1 no", r"a\.parquet is not a sound Parquet file"),
    (
        "a.csv",
        csv_bytes([{**row, "id": i} for i, row in zip("121", rows_with(), strict=True)]),
        r"a\.csv line 4 has the id '1' of .*a\.csv line 2; make the ids unique",
    ),
    (
        "a.csv",
        csv_bytes([{**row, "id": i} for i, row in zip("12 ", rows_with(), strict=True)]),
        r"a\.csv line 4 has no id; fill it in, or remove the column 'id'",
    ),
    (
        "a.csv",
        csv_bytes(
            [
                {**row, "split": s}
                for s, row in zip(("train", "test", "dev"), rows_with(), strict=True)
            ]
        ),
        r"line 4 has the split 'dev', not one of train, validation, calibration, test; .*remove",
    ),
    (
        "a.csv",
        csv_bytes([{**row, "split": "train"} for row in TWO]),
        r"no validation row of the label 'spam' \(spam 0, ham 0\); .*remove the column 'split'",
    ),
    (
        "a.csv",
        csv_bytes(with_splits([*ROWS, ROWS[0]])),
        r"line 52 gives the text of .*line 2 the split 'validation' instead of 'train'",
    ),
]


@pytest.mark.parametrize(("name", "raw", "message"), BAD_FILES)
def test_a_bad_file_is_one_clear_error(tmp_path, name, raw, message):
    path = tmp_path / name
    path.write_bytes(raw)
    with pytest.raises(UserError, match=message):
        load(path)


def test_a_bad_parquet_row_is_named(tmp_path):
    import pyarrow

    columns = columns_of(rows_with(label="eggs"))
    with pytest.raises(UserError, match=r"a\.parquet row 3 has the label 'eggs'"):
        load(write_parquet(tmp_path / "a.parquet", columns))
    columns = {**columns_of(TWO), "text": ["fine", None]}
    with pytest.raises(UserError, match=r"b\.parquet row 2 has no text"):
        load(write_parquet(tmp_path / "b.parquet", columns))
    raw = pyarrow.array([b"fine", b"caf\xe9"]).cast(pyarrow.binary()).view(pyarrow.string())
    with pytest.raises(UserError, match=r"c\.parquet is not a sound Parquet file .*UTF8"):
        load(write_parquet(tmp_path / "c.parquet", {**columns_of(TWO), "text": raw}))
    with pytest.raises(UserError, match=r"d\.parquet has no column 'text' but 'body', 'label'"):
        load(write_parquet(tmp_path / "d.parquet", {"body": ["a"], "label": ["ham"]}))
    with pytest.raises(UserError, match=r"e\.parquet has no rows"):
        load(write_parquet(tmp_path / "e.parquet", {"text": [], "label": []}))


def test_a_missing_file_folder_or_category_column_is_named(tmp_path):
    for name in ("none.csv", "none.jsonl.gz", "none.parquet"):
        with pytest.raises(UserError, match=rf"{name} does not exist; give the path .* --data"):
            load(tmp_path / name)
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(UserError, match=r"folder\.csv cannot be read"):
        load(tmp_path / "folder.csv")
    (tmp_path / "a.csv").write_bytes(csv_bytes(TWO))
    with pytest.raises(UserError, match=r"no column 'topic' but .*--category-column"):
        load(tmp_path / "a.csv", category_column="topic")


def test_too_few_own_rows_say_how_many_are_needed(tmp_path):
    (tmp_path / "a.csv").write_bytes(csv_bytes(ROWS[:6]))
    with pytest.raises(UserError, match=r"has 3 near-duplicate groups .* at least 4 are needed"):
        load_splits(DataSettings(data=str(tmp_path / "a.csv")), SPAM)
