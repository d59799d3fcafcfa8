"""Tasks, fingerprints, presets, and settings that travel between flags and dataclasses."""

import argparse
import hashlib
import json
from dataclasses import FrozenInstanceError, fields, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from settings import (
    CACHE_DIR,
    EMBEDDED_MODEL_DIR,
    FINE_TUNED_DIR,
    IMAGES_DIR,
    MODEL_PRESETS,
    ROOT,
    SENTIMENT,
    TASKS_DIR,
    DataSettings,
    EvaluationSettings,
    Label,
    ModelSettings,
    OutputSettings,
    Task,
    TaskSettings,
    TrainingSettings,
    UserError,
    add_arguments,
    case_variants,
    changed_flags,
    exit_code,
    fingerprint,
    first_type,
    from_arguments,
    read_task,
    resolve_model,
    settings_table,
)

CLASSES = (
    TaskSettings,
    ModelSettings,
    DataSettings,
    TrainingSettings,
    EvaluationSettings,
    OutputSettings,
)
MOOD = Task(
    "mood",
    "Which mood is it?",
    (Label("glad", ("happy",)), Label("sad", ("not happy",)), Label("mad", ("angry",))),
    lettered=True,
)
SPAM = Task("spam", "Is this spam?", (Label("spam", ("yes",)), Label("ham", ("no",))))


# Tasks


def test_the_default_task_is_sentiment_with_positive_first():
    assert SENTIMENT.label_names == ("positive", "negative")
    assert [label.words for label in SENTIMENT.labels] == [
        ("Yes", "yes", "YES"),
        ("No", "no", "NO"),
    ]


def test_the_prompt_is_the_question_and_then_the_text_as_it_is():
    message = SENTIMENT.user_message("  {text} 100 % ")
    assert message == f"{SENTIMENT.question}\n\nText:   {{text}} 100 % "


@pytest.mark.parametrize(
    ("name", "words"), [("", ("yes",)), ("spam", ()), ("spam", ("yes", "")), ("spam", ("yes", " "))]
)
def test_a_label_needs_a_name_and_words(name, words):
    with pytest.raises(UserError, match="needs a name and at least one answer word"):
        Label(name, words)


@pytest.mark.parametrize(
    ("question", "labels", "message"),
    [
        (" ", SPAM.labels, "empty question"),
        ("Is it?", (), "0 label, at least 2"),
        ("Is it?", SPAM.labels[:1], "1 label, at least 2"),
        ("Is it?", (Label("a", ("x",)), Label("a", ("y",))), "names the label 'a' twice"),
        ("Is it?", (SPAM.labels[0], SPAM.labels[0]), "names the label 'spam' twice"),
        (
            "Is it?",
            (Label("a", ("x", "y")), Label("b", ("z",)), Label("c", ("y",))),
            "'y' belongs to both 'a' and 'c'",
        ),
    ],
)
def test_a_task_that_cannot_be_asked_is_refused(question, labels, message):
    with pytest.raises(UserError, match=message):
        Task("odd", question, labels)


def test_a_task_survives_json():
    for task in (SENTIMENT, SPAM, MOOD):
        assert Task.from_json(json.loads(json.dumps(task.to_json()))) == task
    optional = ("wordings", "negated", "lettered")
    without = {k: v for k, v in SPAM.to_json().items() if k not in optional}
    assert Task.from_json(without) == SPAM


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"wordings": [" "]}, "empty question"),
        ({"wordings": ["Spam?", "Spam? "]}, "has a wording twice"),
        ({"wordings": ["Spam?"], "negated": ["Spam?"]}, "has a wording twice"),
        ({"wordings": ["Is {it} spam?"]}, "has {it}; the one slot"),
        ({"negated": ["Ham? {text} {text}"]}, "has {text}, {text}; the one slot"),
        (
            {"labels": [*SPAM.labels, Label("?", ("maybe",))], "negated": ["Is it ham?"]},
            "has 3 labels; negated questions swap",
        ),
    ],
)
def test_other_wordings_must_be_questions_of_their_own(more, message):
    with pytest.raises(UserError, match=message):
        replace(SPAM, **more)


# Lettered options


def test_a_plain_task_has_one_order_itself():
    assert SENTIMENT.orders == (SENTIMENT,)
    assert SENTIMENT.asked.orders == (replace(SENTIMENT, wordings=(), negated=()),)


def test_lettered_options_are_listed_below_the_question_and_answered_with_the_letter():
    first, second, third = MOOD.orders
    assert first.user_message("Ha!") == (
        "Which mood is it?\n\nA. happy\nB. not happy\nC. angry\n\nAnswer with one letter."
        "\n\nText: Ha!"
    )
    assert [label.words for label in first.labels] == [("A",), ("B",), ("C",)]
    assert "\n\nA. angry\nB. happy\nC. not happy\n\n" in second.question
    assert [label.words for label in second.labels] == [("B",), ("C",), ("A",)]
    assert "\n\nA. not happy\nB. angry\nC. happy\n\n" in third.question
    slot = replace(MOOD, question="Read this: {text} Which mood is it?")
    assert slot.orders[0].user_message("Ha!").startswith("Read this: Ha! Which mood is it?\n\nA. ")


@pytest.mark.parametrize("k", [2, 3, 4, 26])
def test_over_all_orders_every_label_is_once_at_every_letter(k):
    labels = tuple(Label(f"name {i}", (f"option {i}",)) for i in range(k))
    orders = Task("t", "Which?", labels, lettered=True).orders
    assert len(set(orders)) == len(orders) == k
    assert all(order.label_names == tuple(label.name for label in labels) for order in orders)
    for i, label in enumerate(labels):
        letters = [order.labels[i].words[0] for order in orders]
        assert sorted(letters) == [chr(ord("A") + j) for j in range(k)]
        for order, letter in zip(orders, letters, strict=True):
            assert f"\n{letter}. {label.words[0]}\n" in order.question


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"labels": tuple(Label(f"l{i}", (f"o{i}",)) for i in range(27))},
            "has 27 labels; lettered options go from A to Z, 26 at most",
        ),
        (
            {"labels": (Label("glad", case_variants("happy")), *MOOD.labels[1:])},
            "needs exactly one word, the text of its option, got 'Happy', 'happy', 'HAPPY'",
        ),
        ({"labels": (Label("glad", ("{text}",)), *MOOD.labels[1:])}, "needs exactly one word"),
        ({"labels": MOOD.labels[:1]}, "has 1 label, at least 2"),
        (
            {"labels": (MOOD.labels[0], replace(MOOD.labels[0], name="sad"))},
            "'happy' belongs to both",
        ),
        ({"labels": MOOD.labels[:2], "negated": ["Is it not?"]}, "has lettered options; negated"),
    ],
)
def test_options_that_cannot_be_lettered_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        replace(MOOD, **change)


def test_lists_become_tuples_so_that_a_task_can_be_a_key():
    task = Task("spam", "Is this spam?", [Label("spam", ["yes"]), Label("ham", ["no"])], [], [])
    assert task == SPAM and hash(task) == hash(SPAM)


def test_tasks_and_settings_are_frozen():
    with pytest.raises(FrozenInstanceError):
        SENTIMENT.question = "Is it negative?"
    with pytest.raises(FrozenInstanceError):
        ModelSettings().model = "qwen2.5-0.5b"


@pytest.mark.parametrize(
    ("word", "variants"),
    [
        ("yes", ("Yes", "yes", "YES")),
        ("NO", ("No", "no", "NO")),
        ("A", ("A", "a")),
        ("7", ("7",)),
        ("喜", ("喜",)),
        ("très bien", ("Très bien", "très bien", "TRÈS BIEN")),
    ],
)
def test_case_variants_are_distinct_and_capitalised_first(word, variants):
    assert case_variants(word) == variants


# A task from flags


def test_without_flags_the_task_is_sentiment():
    assert TaskSettings().build() is SENTIMENT


def test_labels_are_read_with_their_words():
    task = TaskSettings(None, "Is this spam?", " spam = yes , ham=no,unsure", "mail").build()
    assert (task.name, task.question) == ("mail", "Is this spam?")
    assert {label.name: label.words for label in task.labels} == {
        "spam": ("Yes", "yes", "YES"),
        "ham": ("No", "no", "NO"),
        "unsure": ("Unsure", "unsure", "UNSURE"),
    }
    assert TaskSettings(None, "Is this spam?", "spam=yes,ham=no").build().name == "custom"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"question": "Is this spam?"}, "both --question and --labels"),
        ({"labels": "spam=yes,ham=no"}, "both --question and --labels"),
        ({"question": "Is it?", "labels": ""}, "empty label name"),
        ({"question": "Is it?", "labels": "spam=yes,"}, "empty label name"),
        ({"question": "Is it?", "labels": "spam=yes,=no"}, "empty label name"),
        ({"question": "Is it?", "labels": "spam=yes"}, "at least 2"),
        ({"question": "Is it?", "labels": "spam,spam"}, "names the label 'spam' twice"),
        ({"question": "Is it?", "labels": "spam=yes,ham=YES"}, "belongs to both 'spam' and 'ham'"),
        ({"question": "  ", "labels": "spam=yes,ham=no"}, "empty question"),
    ],
)
def test_task_flags_that_make_no_task_are_refused(flags, message):
    with pytest.raises(UserError, match=message):
        TaskSettings(**flags).build()


# A task from a file


def test_every_shipped_task_is_a_task_and_the_default_is_among_them():
    tasks = {path.stem: read_task(path.stem) for path in TASKS_DIR.glob("*.json")}
    assert set(tasks) == {
        "sentiment",
        "spam",
        "toxicity",
        "irony",
        "news_topic",
        "financial_sentiment",
    }
    assert tasks["sentiment"] == SENTIMENT
    assert all(task.name == name for name, task in tasks.items())
    assert len(tasks["news_topic"].labels) == 4


def test_a_task_file_needs_no_words(tmp_path):
    path = tmp_path / "mood.json"
    labels = [{"name": "happy"}, {"name": "sad", "words": ["Sad", "Unhappy"]}]
    path.write_text(json.dumps({"name": "mood", "question": "Which mood?", "labels": labels}))
    task = TaskSettings(task=str(path)).build()
    assert [label.words for label in task.labels] == [
        ("Happy", "happy", "HAPPY"),
        ("Sad", "Unhappy"),
    ]


def test_a_task_file_can_ask_for_letters(tmp_path):
    path = tmp_path / "mood.json"
    labels = [{"name": "Sci/Tech"}, {"name": "sad", "words": ["not happy"]}]
    task = {"name": "mood", "question": "Which?", "labels": labels, "lettered": True}
    path.write_text(json.dumps(task))
    read = read_task(str(path))
    assert read.lettered and [label.words[0] for label in read.labels] == ["Sci/Tech", "not happy"]
    path.write_text(json.dumps(task | {"lettered": "yes"}))
    with pytest.raises(UserError, match="lettered must be true or false, got 'yes'"):
        read_task(str(path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": None}, "labels must be a list, got NoneType"),
        ({"labels": [{"name": "a"}]}, "at least 2 are needed"),
        ({"labels": ["a", "b"]}, "a label must be an object, got str"),
        ({"labels": [{"name": "a", "word": "b"}]}, "unknown key 'word'; it may have name, words"),
        ({"labels": [{"words": ["b"]}]}, "a label has no 'name'"),
        ({"labels": [{"name": "a", "words": "b"}]}, "must be a list of texts"),
        ({"prompt": "?"}, "unknown key 'prompt'"),
        ({"wordings": "?"}, "the questions 'wordings' of a task must be a list of texts, got '?'"),
        (
            {"negated": ["?", 3]},
            "the questions 'negated' of a task must be a list of texts, got ['?', 3]",
        ),
        ({"wordings": ["Q?"]}, "a wording repeats the question 'Q?'"),
        ({"negated": [""]}, "task 't' has an empty question"),
        ({"question": 3}, "question of a task must be text, got 3"),
        ({"question": "Is {it} so?"}, "has {it}; the one slot"),
        ({"question": "Is {text} {text}?"}, "the one slot it may have"),
    ],
)
def test_a_task_file_that_is_no_task_is_refused_in_one_line(tmp_path, change, message):
    task = {"name": "t", "question": "Q?", "labels": [{"name": "a"}, {"name": "b"}]}
    path = tmp_path / "t.json"
    path.write_text(json.dumps(task | change))
    with pytest.raises(UserError) as error:
        read_task(str(path))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_missing_task_names_the_shipped_ones(tmp_path):
    with pytest.raises(UserError, match="shipped tasks are: financial_sentiment, irony"):
        read_task("spamm")
    (tmp_path / "t.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        read_task(str(tmp_path / "t.json"))
    with pytest.raises(UserError, match="leave the flags out"):
        TaskSettings(task="spam", question="Is this spam?").build()


def test_a_question_with_a_slot_is_the_whole_message():
    labels = (Label("a", ("A",)), Label("b", ("B",)))
    assert Task("t", "Read {text} now.", labels).user_message("a {text}") == "Read a {text} now."
    assert Task("t", "What?", labels).user_message("x") == "What?\n\nText: x"


# Flags


def parsed(cls, *arguments):
    parser = argparse.ArgumentParser()
    add_arguments(parser, cls)
    return from_arguments(cls, parser.parse_args(arguments))


@pytest.mark.parametrize("cls", CLASSES, ids=settings_table)
def test_no_flags_give_the_defaults(cls):
    assert parsed(cls) == cls()


@pytest.mark.parametrize("cls", CLASSES, ids=settings_table)
def test_every_field_has_a_flag_of_its_type(cls):
    values = {int: 7, float: 0.125, str: "some=thing, else"}
    wanted = cls(**{f.name: values[first_type(f.type)] for f in fields(cls)})
    arguments = [f"--{f.name.replace('_', '-')}={getattr(wanted, f.name)}" for f in fields(cls)]
    assert parsed(cls, *arguments) == wanted != cls()


@pytest.mark.parametrize("cls", CLASSES, ids=settings_table)
def test_changed_flags_name_what_differs_and_give_the_settings_back(cls):
    assert changed_flags(cls()) == []
    first = fields(cls)[0]
    value = {int: 7, float: 0.125, str: "some=thing, else"}[first_type(first.type)]
    one = replace(cls(), **{first.name: value})
    assert changed_flags(one) == [f"--{first.name.replace('_', '-')}={value}"]
    assert parsed(cls, *changed_flags(one)) == one


@pytest.mark.parametrize("cls", CLASSES, ids=settings_table)
def test_defaults_have_the_type_of_their_field(cls):
    for f in fields(cls):
        optional = f.default is None and f.type == first_type(f.type) | None
        assert optional or type(f.default) is f.type, f.name


def test_one_command_can_take_all_settings_and_says_what_they_are(capsys):
    parser = argparse.ArgumentParser()
    add_arguments(parser, *CLASSES)
    assert [from_arguments(cls, parser.parse_args([])) for cls in CLASSES] == [c() for c in CLASSES]
    with pytest.raises(SystemExit):
        parser.parse_args(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for cls in CLASSES:
        assert f"{settings_table(cls)}:" in shown
        for f in fields(cls):
            assert f"--{f.name.replace('_', '-')} {f.name.upper()}" in shown
            assert f.default is None or f"(default: {f.default})" in shown


def test_a_flag_of_the_wrong_type_is_bad_usage(capsys):
    with pytest.raises(SystemExit) as stopped:
        parsed(EvaluationSettings, "--bins", "many")
    assert stopped.value.code == 2
    assert "--bins: invalid int value: 'many'" in capsys.readouterr().err


# Fingerprints


def test_a_fingerprint_stays_the_same_for_ever():
    # Caches and calibrators on disk carry fingerprints: another value would disown all of them.
    assert fingerprint({"model": "embedded", "é": [1, 2.5, None, True]}) == "bc4cec4300940528"
    expected = hashlib.sha256('{"b":[1],"é":"x"}'.encode()).hexdigest()[:16]
    assert fingerprint({"é": "x", "b": (1,)}) == expected


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(st.characters(codec="utf-8")),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abé"), inner, max_size=3),
    max_leaves=8,
)


@hypothesis_settings(deadline=None)
@given(JSON, JSON)
def test_fingerprints_differ_exactly_where_the_values_do(a, b):
    same = json.dumps(a, sort_keys=True) == json.dumps(b, sort_keys=True)
    assert (fingerprint(a) == fingerprint(b)) is same


def test_fingerprints_ignore_the_order_of_keys_and_see_every_field():
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})
    assert fingerprint([1, 2]) != fingerprint([2, 1])
    print_of_sentiment = fingerprint(SENTIMENT.to_json())
    first, second = SENTIMENT.labels
    for other in (
        replace(SENTIMENT, name="tone"),
        replace(SENTIMENT, question=SENTIMENT.question + " "),
        replace(SENTIMENT, labels=(second, first)),
        replace(SENTIMENT, labels=(replace(first, words=first.words[:2]), second)),
        replace(SENTIMENT, wordings=()),
        replace(SENTIMENT, negated=SENTIMENT.negated[:1]),
        replace(MOOD, lettered=False),
    ):
        assert fingerprint(other.to_json()) != print_of_sentiment


# Models, training, output


def test_presets_resolve_and_other_names_stay_as_they_are():
    assert Path(resolve_model("embedded")) == EMBEDDED_MODEL_DIR
    assert resolve_model("llama-3.1-8b") == "meta-llama/Llama-3.1-8B-Instruct"
    for name in ("someone/some-model", "./folder", "Embedded"):
        assert resolve_model(name) == name
    assert all("/" in model for model in MODEL_PRESETS.values())


SMALL_MODEL = {
    "rank": 64,
    "alpha": 128,
    "dropout": 0.3,
    "target_modules": "all-linear+embeddings",
    "learning_rate": 3e-4,
    "epochs": 1,
    "soup": 2,
    "accumulation": 1,
}
LARGE_MODEL = {
    "rank": 8,
    "alpha": 16,
    "dropout": 0.1,
    "target_modules": "all-linear",
    "learning_rate": 2e-4,
    "epochs": 2,
    "soup": 1,
    "accumulation": 1,
}


@pytest.mark.parametrize(
    ("parameters", "values"),
    [(7e6, SMALL_MODEL), (999_999_999, SMALL_MODEL), (10**9, LARGE_MODEL), (8e9, LARGE_MODEL)],
)
def test_training_settings_left_open_follow_the_size_of_the_model(parameters, values):
    assert TrainingSettings().for_model(parameters) == TrainingSettings(**values)


def test_training_settings_that_were_given_stay():
    given = TrainingSettings(
        rank=3,
        alpha=5,
        dropout=0.0,
        learning_rate=1e-5,
        batch_size=3,
        accumulation=2,
        epochs=9,
        soup=3,
        target_modules="q_proj",
    )
    assert given.for_model(1e6) == given.for_model(1e10) == given
    assert TrainingSettings(rank=3).for_model(1e6).alpha == 6
    assert TrainingSettings(batch_size=3).for_model(1e10).learning_rate == 2e-4


def test_results_go_below_one_folder_the_project_by_default(tmp_path):
    default = OutputSettings()
    assert (default.folder, default.fine_tuned, default.cache, default.images) == (
        ROOT,
        FINE_TUNED_DIR,
        CACHE_DIR,
        IMAGES_DIR,
    )
    own = OutputSettings(str(tmp_path))
    assert [p.relative_to(tmp_path) for p in (own.fine_tuned, own.cache, own.images)] == [
        Path("fine_tuned_sentiment_model"),
        Path("evaluation_cache"),
        Path("images"),
    ]


def test_an_interruption_is_said_in_one_line_or_raised(capsys):
    def interrupted():
        raise KeyboardInterrupt

    assert exit_code(interrupted, interrupted="nothing was written") == 1
    assert capsys.readouterr().err == "interrupted; nothing was written\n"
    with pytest.raises(KeyboardInterrupt):
        exit_code(interrupted)
