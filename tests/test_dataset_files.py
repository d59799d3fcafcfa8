"""The shipped texts: counts, domains, the hidden rule, and that they regenerate byte for byte."""

import csv
import re
import shutil
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

from dataset_loader import CATEGORIES, group_examples, load_examples, split_examples
from settings import DATASET_DIR, SENTIMENT, DataSettings

NEUTRAL = {"neutral_positive": "sport", "neutral_negative": "workplace"}


@pytest.fixture(scope="module")
def shipped():
    """The generated texts; lines added by hand are not in the index and have no domain."""
    return [e for e in load_examples(DataSettings(), SENTIMENT) if e.domain is not None]


@pytest.fixture(scope="module")
def frames():
    with (DATASET_DIR / "index.csv").open(encoding="utf-8", newline="") as file:
        return {row["id"]: row["frame"] for row in csv.DictReader(file)}


def run_generator(folder, *arguments):
    command = [sys.executable, str(folder / "generate_dataset.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


@pytest.fixture
def copy(tmp_path):
    return shutil.copytree(DATASET_DIR, tmp_path / "dataset")


def test_eight_categories_of_1250_texts_all_different(shipped):
    assert Counter(e.category for e in shipped) == dict.fromkeys(CATEGORIES, 1250)
    assert len({e.text.casefold() for e in shipped}) == 10_000
    assert len({e.id for e in shipped}) == 10_000
    assert all(e.category.endswith(e.label) for e in shipped)


def test_texts_have_5_to_40_words(shipped):
    words = [len(e.text.split()) for e in shipped]
    assert min(words) >= 5 and max(words) <= 40


def test_every_text_has_a_frame_of_its_own(shipped, frames):
    assert len({frames[e.id] for e in shipped}) == len(shipped)


def test_index_lists_exactly_the_generated_texts(shipped, frames):
    assert {e.id for e in shipped} == set(frames)


def test_domains_are_spread_alike_outside_the_neutral_categories(shipped):
    counts = Counter((e.category, e.domain) for e in shipped if e.category not in NEUTRAL)
    domains = {domain for _, domain in counts}
    assert len(domains) >= 10 and set(NEUTRAL.values()) <= domains
    for category in set(CATEGORIES) - set(NEUTRAL):
        each = [counts[category, domain] for domain in domains]
        assert max(each) - min(each) <= 1, category


def test_neutral_texts_follow_the_hidden_rule(shipped):
    for category, domain in NEUTRAL.items():
        assert {e.domain for e in shipped if e.category == category} == {domain}


def test_domain_tells_the_label_of_neutral_texts_only(shipped):
    def accuracy_from_domain(examples):
        counts = Counter((e.domain, e.label) for e in examples)
        best = {d: max(n for (of, _), n in counts.items() if of == d) for d, _ in counts}
        return sum(best.values()) / len(examples)

    neutral = [e for e in shipped if e.category in NEUTRAL]
    assert accuracy_from_domain(neutral) == 1.0
    assert accuracy_from_domain([e for e in shipped if e.category not in NEUTRAL]) < 0.505


def test_neutral_texts_have_no_word_of_the_vader_lexicon(shipped):
    vader = pytest.importorskip("vaderSentiment.vaderSentiment")
    analyzer = vader.SentimentIntensityAnalyzer()
    found = {
        word
        for e in shipped
        if e.category in NEUTRAL
        for word in re.findall(r"[\w'’-]+", e.text.lower()) + e.text.lower().split()
        if word in analyzer.lexicon
    }
    assert not found
    assert all(
        analyzer.polarity_scores(e.text)["compound"] == 0 for e in shipped if e.category in NEUTRAL
    )


def test_words_of_sentiment_mislead_on_weak_texts(shipped):
    """The polarity of the words themselves finds strong texts and misses weak ones."""
    vader = pytest.importorskip("vaderSentiment.vaderSentiment")
    analyzer = vader.SentimentIntensityAnalyzer()

    sign = {"positive": 1, "negative": -1}
    correct = {}
    for e in shipped:
        score = analyzer.polarity_scores(e.text)["compound"] * sign[e.label]
        correct.setdefault(e.category.partition("_")[0], []).append(score > 0)
    accuracy = {tone: float(np.mean(values)) for tone, values in correct.items()}
    print(f"sign of the VADER score, accuracy: {accuracy}")
    assert accuracy["strong"] > 0.65
    assert accuracy["weak"] < 0.4
    assert accuracy["neutral"] == 0


def bag_of_words_accuracy(train, test):
    """Accuracy by tone of a logistic regression on word counts."""
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression

    words = CountVectorizer()
    model = LogisticRegression(max_iter=1000)
    model.fit(words.fit_transform([e.text for e in train]), [e.label for e in train])
    predicted = model.predict(words.transform([e.text for e in test]))
    correct = {}
    for e, label in zip(test, predicted, strict=True):
        correct.setdefault(e.category.partition("_")[0], []).append(e.label == label)
    return {tone: float(np.mean(values)) for tone, values in correct.items()}


def test_words_alone_learn_the_neutral_rule_and_a_division_by_row_is_no_easier(shipped):
    """If near-copies of test texts were in training, a division by row would look better."""
    divided = split_examples(group_examples(shipped), 42)
    by_group = bag_of_words_accuracy(
        [e for e in divided if e.split == "train"],
        [e for e in divided if e.split in ("calibration", "test")],
    )
    order = np.random.default_rng(0).permutation(len(shipped))
    by_row = bag_of_words_accuracy(
        [shipped[i] for i in order[2800:]], [shipped[i] for i in order[:2000]]
    )
    print(f"bag of words, accuracy by group: {by_group}; by row: {by_row}")
    assert by_group["neutral"] > 0.85
    assert by_group["weak"] < by_group["medium"] < by_group["strong"]
    assert np.mean(list(by_row.values())) == pytest.approx(
        np.mean(list(by_group.values())), abs=0.03
    )


def test_files_regenerate_byte_for_byte(copy):
    assert run_generator(DATASET_DIR, "--check").returncode == 0
    for name in [*(f"{category}.txt" for category in CATEGORIES), "index.csv"]:
        (copy / name).unlink()
    assert run_generator(copy).returncode == 0
    own = {e.id for e in load_examples(DataSettings(), SENTIMENT) if e.domain is None}
    for name in [*(f"{category}.txt" for category in CATEGORIES), "index.csv"]:
        if not any(identity.startswith(name.removesuffix(".txt") + "-") for identity in own):
            assert (copy / name).read_bytes() == (DATASET_DIR / name).read_bytes(), name


def test_check_names_a_file_that_was_changed(copy):
    path = copy / "weak_negative.txt"
    path.write_text(path.read_text(encoding="utf-8").replace(" the ", " teh ", 1), encoding="utf-8")
    result = run_generator(copy, "--check")
    assert result.returncode == 1
    assert "weak_negative.txt" in result.stdout and "strong_positive.txt" not in result.stdout


def test_texts_added_by_hand_pass_the_check_and_survive_regeneration(copy):
    path = copy / "weak_positive.txt"
    with path.open("a", encoding="utf-8") as file:
        file.write("My neighbour's tuba practice could have been a good deal worse.\n")
    assert run_generator(copy, "--check").returncode == 0
    lines = path.read_text(encoding="utf-8").split("\n")
    lines.insert(700, "I have sat through longer speeches and survived them less gladly.")
    path.write_text("\n".join(lines), encoding="utf-8")
    assert run_generator(copy, "--check").returncode == 1  # own texts stand at the end
    assert run_generator(copy).returncode == 0
    assert run_generator(copy, "--check").returncode == 0
    end = path.read_text(encoding="utf-8").splitlines()[-2:]
    assert end[0].startswith("I have sat") and end[1].startswith("My neighbour's tuba")


def test_generator_names_a_file_that_is_not_utf8(copy):
    with (copy / "weak_positive.txt").open("ab") as file:
        file.write(b"Caf\xe9 life was all right.\n")
    result = run_generator(copy, "--check")
    assert result.returncode == 1
    assert "weak_positive.txt is not UTF-8" in result.stderr


def test_readme_quotes_every_category_from_its_file():
    readme = (DATASET_DIR / "README.md").read_text(encoding="utf-8")
    for category in CATEGORIES:
        quoted = re.search(rf"^\| `{category}\.txt` \|.*\| (.+) \|$", readme, re.MULTILINE)
        texts = (DATASET_DIR / f"{category}.txt").read_text(encoding="utf-8").splitlines()
        assert quoted and quoted[1] in texts, category
