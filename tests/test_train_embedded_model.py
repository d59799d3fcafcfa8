"""Training of the embedded model, and what the shipped model keeps of its promises."""

import json
import re

import numpy as np
import pytest
import torch

from settings import EMBEDDED_MODEL_DIR, ROOT, SENTIMENT, UserError
from train_embedded_model import (
    SOURCES,
    EmbeddedTraining,
    TrainingBatches,
    closing_sentences,
    fit_teacher,
    learning_rate_share,
    main,
    normalised,
    question_tasks,
    read_rows,
    rejoin,
    tokenised,
)

SHARED = ROOT.parent / "shared" / "data"
OPINIONS = (("a good", 1), ("a bad", 0), ("not good", 0), ("not bad", 1), ("a fine", 1))


def test_tokenised_texts_are_written_as_a_person_would():
    assert rejoin("it 's fine , really . i did n't mind !") == "It's fine, really. I didn't mind!"
    assert rejoin("-lrb- a gem -rrb-") == "(a gem)"


def test_held_out_texts_are_recognised_whatever_their_spelling():
    assert normalised("It's FINE, really.") == normalised("it 's fine , really .")
    assert normalised("fine") != normalised("fined")


def test_closing_sentences_end_the_review():
    text = "One. Two! Three? Four."
    for seed in range(5):
        assert text.endswith(closing_sentences(text, np.random.default_rng(seed)))


def test_tokenised_is_undone_by_rejoin():
    text = "It's fine, really. I didn't mind!"
    assert tokenised(text) == "it 's fine , really . i did n't mind !"
    assert rejoin(tokenised(text)) == text


def test_the_teacher_learns_words_and_their_negation():
    rows = [(f"{a} {n}", float(p)) for n in ("film", "book", "hotel", "meal") for a, p in OPINIONS]
    teacher = fit_teacher(rows * 5)
    good, bad, not_good = teacher(["a good song", "a bad song", "It's not good."])
    assert good > 0.8 and bad < 0.2 and not_good < 0.5


def test_questions_hold_negated_ones_and_the_default_task():
    tasks = question_tasks()
    assert (SENTIMENT, 10.0, False) in tasks
    negated = [task for task, _, is_negated in tasks if is_negated]
    assert len(negated) == 5
    for task in negated:  # positive is answered with No
        assert task.labels[0].name == "positive" and task.labels[0].words[0] == "No"


def test_learning_rate_rises_then_falls():
    config = EmbeddedTraining(steps=1000, warmup_steps=100)
    rates = [learning_rate_share(step, config) for step in range(1000)]
    assert np.argmax(rates) in (99, 100) and rates[-1] < 0.03 * max(rates)


def test_batches_are_a_pure_function_of_seed_step_and_rank():
    from transformers import AutoTokenizer

    texts = [f"review number {i} " + "good " * (i % 90) for i in range(400)]
    asked = [[(t, (i % 3) / 2) for i, t in enumerate(texts)] for _ in SOURCES]
    plain = {
        "lm_text/imdb_unsup.txt.gz": texts,
        "lm_text/gutenberg_novels.txt.gz": [],
        "labelled": texts,
    }
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_MODEL_DIR)
    config = EmbeddedTraining(steps=10)
    first, second = (TrainingBatches(tokenizer, asked, plain, config) for _ in range(2))
    for step in (0, 9):
        for a, b in zip(first.questions(step, 0), second.questions(step, 0), strict=True):
            assert a.tolist() == b.tolist()
        assert first.plain_text(step, 0).tolist() == second.plain_text(step, 0).tolist()
    assert first.plain_text(0, 0).tolist() != first.plain_text(0, 1).tolist()
    prefix, tails, last, answers, targets = first.questions(0, 0)
    assert prefix.shape[0] == 1 and answers.tolist() in first.answers
    assert torch.allclose(targets.sum(1), torch.ones(len(tails)))
    for row, position, target in zip(tails, last, targets, strict=True):
        drawn = answers.tolist().index(int(row[position + 1]))
        assert target[drawn] > 0


def test_a_text_is_answered_as_probably_as_it_is_positive():
    """Whatever the wording, also a negated one: the words for positive share P(positive)."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_MODEL_DIR)
    share = [i / len(SOURCES) for i in range(len(SOURCES))]
    asked = [
        [(f"Source {number}: " + "good " * n, share[number]) for n in (2, 9, 25, 60, 200)]
        for number in range(len(SOURCES))
    ]
    plain = {"lm_text/imdb_unsup.txt.gz": ["text " * 400], "lm_text/gutenberg_novels.txt.gz": []}
    config = EmbeddedTraining(steps=20, word_dropout=0.0, negated_from=0.0)
    batches = TrainingBatches(tokenizer, asked, plain | {"labelled": []}, config)
    seen = set()
    for step in range(20):
        _, tails, _, _, targets = batches.questions(step, 0)
        for row, target in zip(tails.tolist(), targets, strict=True):
            number = int(re.search(r"Source (\d)", tokenizer.decode(row))[1])
            assert float(target[:3].sum()) == pytest.approx(share[number])
            seen.add(number)
    assert seen == set(range(len(SOURCES)))


def test_missing_data_is_one_clear_error(tmp_path, capsys):
    with pytest.raises(UserError, match="is missing"):
        read_rows(tmp_path, "sst2/dev.jsonl", ("stanfordnlp/sst2", "validation", "sentence"))
    assert main(["--data-root", str(tmp_path)]) == 1
    assert "error:" in capsys.readouterr().err


def test_shipped_model_is_small_and_its_card_measured():
    size = sum(path.stat().st_size for path in EMBEDDED_MODEL_DIR.iterdir())
    assert size < 30_000_000
    run = json.loads((EMBEDDED_MODEL_DIR / "training.json").read_text(encoding="utf-8"))
    card = (EMBEDDED_MODEL_DIR / "README.md").read_text(encoding="utf-8")
    dev = run["measured"]["sst2_dev"]
    assert dev["accuracy"]["estimate"] >= 0.81 and dev["label_mass"] >= 0.98
    assert f"{dev['accuracy']['estimate']:.3f} [" in card


def test_shipped_model_scores_what_its_card_says(classifier):
    if not SHARED.is_dir():
        pytest.skip("the SST-2 development set is not on this machine")
    rows = read_rows(SHARED, "sst2/dev.jsonl", None)
    predictions = classifier.classify_batch([text for text, _ in rows])
    right = [
        (p.predicted == "positive") == is_positive
        for p, (_, is_positive) in zip(predictions, rows, strict=True)
    ]
    run = json.loads((EMBEDDED_MODEL_DIR / "training.json").read_text(encoding="utf-8"))
    expected = run["measured"]["sst2_dev"]["accuracy"]["estimate"]
    assert np.mean(right) == pytest.approx(expected, abs=0.003)
    assert np.mean([p.label_mass for p in predictions]) >= 0.98
