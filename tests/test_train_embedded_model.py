"""Training of the embedded model, and what the shipped model keeps of its promises."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel, BertTokenizer

from sentence_teacher import SentenceTeacher
from settings import EMBEDDED_MODEL_DIR, ROOT, SENTIMENT, UserError
from train_embedded_model import (
    MEANING_STEP,
    PLAIN_TEXT,
    SOURCES,
    EmbeddedTraining,
    TrainingBatches,
    closing_sentences,
    corpus_arrays,
    first_embedding,
    learning_rate_share,
    main,
    normalised,
    prepared_for,
    question_tasks,
    read_judgements,
    read_rows,
    rejoin,
    teach,
    tokenised,
    train_and_save,
)

SHARED = ROOT.parent / "shared" / "data"
WORDS = ["good", "bad", "fine", "poor", "film", "book", "hotel", "meal", "song", "tea"]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A random BERT of ten words, as a hub model lies on disk."""
    folder = tmp_path_factory.mktemp("encoder")
    special = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
    vocabulary = {word: number for number, word in enumerate((*special, *WORDS))}
    BertTokenizer(vocab=vocabulary).save_pretrained(folder)
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    BertModel(
        BertConfig(vocab_size=len(vocabulary), intermediate_size=64, **shape)
    ).save_pretrained(folder)
    return folder


def opinions(n):
    """n opinions on films, books, hotels and meals, and whether they are positive."""
    return [(f"{WORDS[i % 4]} {WORDS[4 + i // 4 % 4]}", float(i % 2 == 0)) for i in range(n)]


def corpus():
    """Texts to ask about: per source one with its label, one too long, one without a label."""
    return [
        [(f"good {word}", 1.0), ("bad film " * 40, 0.0), ("meal", None)]
        for word in WORDS[: len(SOURCES)]
    ]


@pytest.fixture(scope="module")
def judged(encoder, tmp_path_factory):
    """A folder with a teacher and its judgements of `corpus()`."""
    root = tmp_path_factory.mktemp("data")
    (root / "sst2").mkdir()
    (root / "sst2/dev.jsonl").write_text(
        '{"text": "a good film", "label": "positive"}\n', encoding="utf-8"
    )
    folder = root / "teacher"
    teach([[*r[:2], ("meal", 0.5)] for r in corpus()], str(encoder), root, folder, seed=1)
    teach(corpus(), str(encoder), root, folder, seed=1)  # the fitted encoder is kept
    return folder


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


def test_the_teacher_learns_words_and_is_kept(encoder, tmp_path):
    torch.manual_seed(0)
    teacher = SentenceTeacher(str(encoder))
    teacher.fit(opinions(20_000), seed=3)
    texts = ["bad song", "good song", "poor poor song song song", "fine"]
    positive, embeddings = teacher.judge(texts)
    assert (positive > 0.5).tolist() == [False, True, False, True]
    assert embeddings.shape == (4, 32)
    teacher.save(tmp_path)
    again = SentenceTeacher.load(tmp_path).judge(texts[:1])  # alone as among others
    assert again[0] == pytest.approx(positive[:1], abs=5e-3)
    assert again[1] == pytest.approx(embeddings[:1], abs=3e-2)


def test_word_vectors_are_those_of_the_pieces(encoder):
    teacher = SentenceTeacher(str(encoder))
    table = teacher.encoder.get_input_embeddings().weight.detach().numpy()
    good, pair, unknown, empty = teacher.word_vectors(["Good", "good film", "zebra", ""])
    assert good == pytest.approx(table[5])
    assert pair == pytest.approx((table[5] + table[9]) / 2)
    assert not unknown.any() and not empty.any()


def test_a_teacher_that_is_not_there_is_one_clear_error(tmp_path):
    with pytest.raises(UserError, match="--teacher FOLDER"):
        SentenceTeacher(str(tmp_path))


def test_judgements_are_mixed_with_labels(judged):
    config = EmbeddedTraining(label_share=0.5, meaning_size=3)
    asked, meanings, known, accuracy = read_judgements(corpus(), judged, config)
    assert known.tolist() == [True, False, True] * len(SOURCES) and accuracy in (0, 1)
    values = MEANING_STEP * meanings[known]
    assert values.mean(0) == pytest.approx(0, abs=MEANING_STEP / 2)
    assert np.cov(values.T, bias=True) == pytest.approx(np.eye(3), abs=MEANING_STEP / 2)
    assert not meanings[~known].any()
    alone = read_judgements(corpus(), judged, replace(config, label_share=0.0))[0]
    for rows, taught in zip(asked, alone, strict=True):
        assert rows[0][1] == pytest.approx((1 + taught[0][1]) / 2) and rows[0][1] > 0.5
        assert rows[1][1] == taught[1][1] == 0.0  # too long for the teacher
        assert rows[2][1] == taught[2][1] and 0 < rows[2][1] < 1  # no label


def test_judgements_of_other_texts_are_refused(judged, tmp_path):
    with pytest.raises(UserError, match="belongs to other texts"):
        read_judgements(corpus()[1:], judged, EmbeddedTraining())
    with pytest.raises(UserError, match="--stage prepare"):
        read_judgements(corpus(), tmp_path, EmbeddedTraining())


def test_word_vectors_start_the_embedding(encoder):
    """Tokens that are words begin as like each other as their words are; the others at random."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_MODEL_DIR)
    config, teacher = EmbeddedTraining(hidden_size=32), SentenceTeacher(str(encoder))
    table = first_embedding(tokenizer, teacher, config)
    names = [tokenizer.decode([i]).strip().lower() for i in range(config.vocab_size)]
    ids = [i for i, name in enumerate(names) if name in WORDS]
    wanted = teacher.word_vectors([names[i] for i in ids])
    wanted -= wanted.mean(0)
    assert len(ids) > len(WORDS)  # "good", " good", " Good"
    assert (
        np.corrcoef((table[ids] @ table[ids].T).ravel(), (wanted @ wanted.T).ravel())[0, 1] > 0.99
    )
    assert table.std() == pytest.approx(config.embedding_scale, rel=0.1)


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


def without_teacher(asked):
    n = sum(map(len, asked))
    return np.zeros((n, 4), dtype=np.int8), np.zeros(n, dtype=bool)


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
    meanings, known = without_teacher(asked)
    first, second = (
        TrainingBatches(
            tokenizer, corpus_arrays(tokenizer, asked, plain, meanings, known, config), config
        )
        for _ in range(2)
    )
    for step in (0, 9):
        for a, b in zip(first.questions(step, 0), second.questions(step, 0), strict=True):
            assert a.tolist() == b.tolist()
        assert first.plain_text(step, 0).tolist() == second.plain_text(step, 0).tolist()
    assert first.plain_text(0, 0).tolist() != first.plain_text(0, 1).tolist()
    prefix, tails, last, answers, targets, *_ = first.questions(0, 0)
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
    meanings, known = without_teacher(asked)
    meanings += np.repeat(np.arange(len(SOURCES)), 5)[:, None]  # the number of the source
    texts = corpus_arrays(tokenizer, asked, plain | {"labelled": []}, meanings, ~known, config)
    batches = TrainingBatches(tokenizer, texts, config)
    seen = set()
    for step in range(20):
        questions = batches.questions(step, 0)
        assert questions.known.all()
        for row, target, meaning in zip(
            questions.tails.tolist(), questions.targets, questions.meanings, strict=True
        ):
            number = int(re.search(r"Source (\d+)", tokenizer.decode(row))[1])
            assert float(target[:3].sum()) == pytest.approx(share[number])
            assert meaning.tolist() == [number * MEANING_STEP] * 4
            seen.add(number)
    assert seen == set(range(len(SOURCES)))


@pytest.fixture
def prepared(tmp_path):
    """(a folder as `prepare` leaves it, for a tiny model of 4 steps; its settings)."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_MODEL_DIR)
    shape = {"hidden_size": 32, "layers": 1, "heads": 2, "feed_forward": 32}
    text = {"plain_text_rows": 2, "plain_text_tokens": 16}
    config = EmbeddedTraining(**shape, **text, steps=4, warmup_steps=1, checkpoint_every=2)
    texts = [f"review number {i} " + "good " * 4 * i for i in range(100)]
    asked = [[(t, (i % 3) / 2) for i, t in enumerate(texts)] for _ in SOURCES]
    plain = dict.fromkeys((name for name, _ in PLAIN_TEXT), texts)
    corpus = corpus_arrays(tokenizer, asked, plain, *without_teacher(asked), config)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    np.savez(
        tmp_path / "corpus.npz",
        **corpus,
        embedding=np.zeros((config.vocab_size, 32), dtype=np.float16) + 0.1,
        teacher_accuracy=0.9,
        settings=prepared_for(config),
    )
    return tmp_path, config


def test_an_interrupted_training_ends_as_one_that_ran_through(prepared, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)  # it takes a minute
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # whose sums vary
    folder, config = prepared
    once, twice = tmp_path / "once", tmp_path / "twice"
    train_and_save(folder, once, config)
    assert not (folder / "training.pt").exists()

    def interrupt(step, config):
        if step == 3:
            raise KeyboardInterrupt
        return learning_rate_share(step, config)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("train_embedded_model.learning_rate_share", interrupt)
        train_and_save(folder, twice, config)
    assert not twice.exists() and (folder / "training.pt").exists()
    with pytest.raises(UserError, match="other settings; remove it"):
        train_and_save(folder, twice, replace(config, learning_rate=1.0))
    train_and_save(folder, twice, config)
    weights = [(path / "model.safetensors").read_bytes() for path in (once, twice)]
    assert weights[0] == weights[1]
    run = json.loads((twice / "training.json").read_text(encoding="utf-8"))
    assert run["step"] == 4 and run["config"]["batch_scale"] == 1
    assert run["device"] == "1 CPU core(s)" and run["texts"] == [100] * len(SOURCES)


def test_training_wants_what_was_prepared_for_its_settings(prepared, tmp_path):
    folder, config = prepared
    with pytest.raises(UserError, match="other settings; remove it"):
        train_and_save(folder, tmp_path / "out", replace(config, label_share=0.1))
    with pytest.raises(UserError, match="--stage prepare"):
        train_and_save(tmp_path / "none", tmp_path / "out", config)


def test_several_processes_share_the_training_alone(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit) as ended:
        main([])
    assert ended.value.code == 2 and "--stage train" in capsys.readouterr().err


def test_missing_data_is_one_clear_error(tmp_path, capsys, monkeypatch):
    with pytest.raises(UserError, match="is missing"):
        read_rows(tmp_path, "sst2/dev.jsonl", ("stanfordnlp/sst2", "validation", "sentence"))
    monkeypatch.setattr("train_embedded_model.ROOT", tmp_path)  # nothing was prepared there
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
