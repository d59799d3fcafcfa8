"""Consistency of samples, wordings and dropout passes: laws, known values, seeds, errors."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats

from consistency_confidence import (
    answer_distribution,
    consistency_predictions,
    convergence_lines,
    dropout_predictions,
    main,
    other_wordings,
    paraphrase_predictions,
    sample_consistency,
)
from logprobs_confidence import TransformerLogprobsClassifier
from records import CONSISTENCY, MC_DROPOUT, PARAPHRASE, Prediction, label_probabilities
from settings import SENTIMENT, EvaluationSettings, Label, Task, UserError, read_task
from signals import dropout_uncertainty
from test_fine_tune_model import MODEL, TASK, small_rows, train, write_csv

TEXTS = ["I loved it.", "A dull evening.", "It was fine, I suppose.", "Best worst thing ever"]
LOGPROBS = (np.log(0.62), np.log(0.35))


def outcome_of(classifier, token):
    ids = classifier.encoder.label_ids
    return next((k for k, label in enumerate(ids) if token in label), len(ids))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_drawn_samples_agree_in_law_with_real_generation(classifier, temperature):
    text, n = "It was fine, I suppose, but not for me.", 300
    ids, _ = classifier.encoder.encode([text])[0]
    torch.manual_seed(3)
    with torch.inference_mode():
        generated = classifier.model.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            do_sample=True,
            temperature=temperature,
            top_k=0,
            top_p=1.0,
            max_new_tokens=1,
            num_return_sequences=n,
        )[:, -1].tolist()
    observed = np.bincount([outcome_of(classifier, t) for t in generated], minlength=3)
    logprobs = classifier.classify(text, temperature=temperature).label_logprobs
    expected = answer_distribution(logprobs) * n
    enough = expected >= 5
    observed = np.append(observed[enough], observed[~enough].sum())
    expected = np.append(expected[enough], expected[~enough].sum())
    kept = expected > 0.5
    chi_square = ((observed - expected)[kept] ** 2 / expected[kept]).sum()
    assert stats.chi2.sf(chi_square, max(1, kept.sum() - 1)) > 0.001


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """The embedded model with a small adapter, trained with dropout."""
    folder = tmp_path_factory.mktemp("tuned")
    train(folder, write_csv(folder / "rows.csv", small_rows(120)))
    return TransformerLogprobsClassifier(MODEL, folder / "fine_tuned_sentiment_model", TASK)


def test_ten_thousand_draws_of_a_real_text_follow_its_closed_form(classifier):
    for seed, text in enumerate(TEXTS):
        logprobs = classifier.classify(text).label_logprobs
        drawn = sample_consistency(logprobs, 10_000, np.random.default_rng(seed))
        observed, expected = (
            np.array([*drawn.counts, drawn.other]),
            answer_distribution(logprobs) * 10_000,
        )
        enough = expected >= 5
        observed = np.append(observed[enough], observed[~enough].sum())
        expected = np.append(expected[enough], expected[~enough].sum())
        kept = expected > 0.01
        chi_square = ((observed - expected)[kept] ** 2 / expected[kept]).sum()
        assert stats.chi2.sf(chi_square, max(1, kept.sum() - 1)) > 0.001


def test_samples_follow_the_distribution():
    drawn = sample_consistency(LOGPROBS, 10_000, np.random.default_rng(0))
    observed = [*drawn.counts, drawn.other]
    expected = np.array([0.62, 0.35, 0.03]) * 10_000
    assert stats.chisquare(observed, expected).pvalue > 0.001
    assert drawn.majority == 0 and drawn.agreement == drawn.counts[0] / 10_000
    assert drawn.low < drawn.agreement < drawn.high


def test_temperature_flattens_the_classified_distribution(classifier):
    cold, warm, hot = (
        classifier.classify("I loved it.", temperature=t).label_mass for t in (0.5, 1.0, 5.0)
    )
    assert cold > warm > hot
    with pytest.raises(ValueError, match="temperature must be above 0"):
        classifier.classify("x", temperature=0.0)


def test_rows_keep_order_errors_and_seed():
    good = Prediction("a", "token_probability", label_logprobs=LOGPROBS)
    bad = Prediction("b", "token_probability", error="the text is empty")
    settings = EvaluationSettings(samples=10)
    rows = consistency_predictions(SENTIMENT, [good, bad, good], settings)
    assert [r.example_id for r in rows] == ["a", "b", "a"]
    assert all(r.method == CONSISTENCY for r in rows)
    assert rows[1].error == "the text is empty" and rows[1].predicted is None
    assert sum(rows[0].label_counts) <= 10 and rows[0].confidence == max(rows[0].label_counts) / 10
    assert rows == consistency_predictions(SENTIMENT, [good, bad, good], settings)
    assert rows[0] == consistency_predictions(SENTIMENT, [good], settings)[0]
    assert rows[2:] == consistency_predictions(SENTIMENT, [good], settings, positions=[2])


def test_zero_samples_are_refused():
    with pytest.raises(ValueError, match="n_samples"):
        sample_consistency(LOGPROBS, 0, np.random.default_rng(0))


def test_no_answer_among_the_samples_is_an_error_and_no_default():
    unlikely = Prediction("a", "token_probability", label_logprobs=(-30.0, -31.0))
    (row,) = consistency_predictions(SENTIMENT, [unlikely], EvaluationSettings(samples=5))
    assert row.error == "none of 5 samples was an answer"
    assert row.predicted is None and row.probability is None


def test_ties_are_broken_by_lot():
    even = (np.log(0.5), np.log(0.5))
    rng = np.random.default_rng(0)
    drawn = [sample_consistency(even, 2, rng) for _ in range(400)]
    tied = [c.majority for c in drawn if c.counts == (1, 1)]
    assert 0.4 < np.mean(tied) < 0.6


# Other wordings.


def test_wordings_are_those_of_the_task_and_negated_ones_swap_the_words():
    others = other_wordings(SENTIMENT)
    assert [task.question for task in others] == [*SENTIMENT.wordings, *SENTIMENT.negated]
    for task in others:
        assert task.label_names == SENTIMENT.label_names
        assert task.wordings == task.negated == ()
    plain, negated = others[0], others[-1]
    assert plain.labels == SENTIMENT.labels
    assert [label.words for label in negated.labels] == [
        label.words for label in reversed(SENTIMENT.labels)
    ]


@pytest.mark.parametrize("question", ["Is this spam? Answer yes or no.", "Spam? {text} Say it."])
def test_a_task_without_wordings_is_asked_in_frames_that_fit_any_question(question):
    task = replace(SENTIMENT, question=question, wordings=(), negated=())
    others = other_wordings(task)
    messages = {other.user_message("TEXT") for other in (task, *others)}
    assert len(messages) == 4
    assert all(message.count("TEXT") == 1 for message in messages)
    bare = question.replace(" {text}", "")
    assert all(bare.split("?")[0] in message for message in messages)
    assert all(other.labels == task.labels for other in others)


def test_only_what_a_task_has_is_asked():
    assert len(other_wordings(replace(SENTIMENT, negated=()))) == len(SENTIMENT.wordings)
    assert len(other_wordings(replace(SENTIMENT, wordings=()))) == len(SENTIMENT.negated)


def test_paraphrase_averages_log_probabilities_over_full_passes(classifier):
    own = classifier.classify_batch(TEXTS, list("abcd"))
    siblings = [classifier.for_task(task) for task in other_wordings(SENTIMENT)]
    rows = paraphrase_predictions(siblings, TEXTS, own)
    assert [row.example_id for row in rows] == list("abcd")
    for text, first, row in zip(TEXTS, own, rows, strict=True):
        alone = [first, *(sibling.classify(text) for sibling in siblings)]
        expected = np.array([p.label_logprobs for p in alone])
        assert row.method == PARAPHRASE
        np.testing.assert_allclose(row.pass_logprobs, expected, atol=1e-3)
        np.testing.assert_allclose(row.label_logprobs, expected.mean(axis=0), atol=1e-3)
        assert row.predicted == SENTIMENT.label_names[int(np.argmax(row.label_logprobs))]


def test_the_mean_over_wordings_of_upper_bounds_is_one(classifier):
    """The least that the mean can be is that of what was read."""
    (own,) = classifier.classify_batch(TEXTS[:1])
    p = np.exp(own.label_logprobs)
    siblings = [classifier.for_task(task) for task in other_wordings(SENTIMENT)[:1]]
    for unread in (0.3 * p, p):
        bounded = replace(own, label_slack=tuple(unread * [p[0] < p[1], p[1] < p[0]]))
        (row,) = paraphrase_predictions(siblings, TEXTS[:1], [bounded])
        first, other = np.exp(row.pass_logprobs)
        least = np.sqrt((first - bounded.label_slack).clip(0) * other)
        np.testing.assert_allclose(np.exp(row.label_logprobs) - row.label_slack, least, atol=1e-5)
    unsure = replace(own, label_slack=tuple(p))
    (row,) = paraphrase_predictions(siblings, TEXTS[:1], [unsure])
    assert "too few tokens" in row.error


def test_a_negated_question_is_answered_with_the_other_word(classifier):
    """P(positive) of a negated wording is the probability of "No" to that question."""
    other = other_wordings(SENTIMENT)[-1]
    asked = classifier.for_task(replace(other, labels=SENTIMENT.labels))
    swapped = classifier.for_task(other)
    for text in TEXTS:
        yes, no = asked.classify(text).label_logprobs
        assert swapped.classify(text).label_logprobs == pytest.approx((no, yes), abs=1e-4)


def test_a_wording_that_cannot_be_asked_of_a_text_is_an_error_row(tiny_model_folder):
    classifier = TransformerLogprobsClassifier(str(tiny_model_folder("mistral")))
    own = classifier.classify_batch(["good", "bad"])
    siblings = [classifier.for_task(other_wordings(SENTIMENT)[0])]
    good, bad = paraphrase_predictions(siblings, ["good", "a [/INST] b"], own)
    assert good.error is None and "'[/INST]'" in bad.error and bad.predicted is None


# Dropout.


def test_passes_with_almost_no_dropout_have_no_mutual_information(tuned):
    layers = [
        module
        for name, module in tuned.model.named_modules()
        if "lora_dropout" in name and isinstance(module, torch.nn.Dropout)
    ]
    own = tuned.classify_batch(TEXTS)
    probabilities = [layer.p for layer in layers]
    try:
        for layer in layers:
            layer.p = 1e-9
        rows = dropout_predictions(tuned, TEXTS, own, 3, seed=0)
    finally:
        for layer, p in zip(layers, probabilities, strict=True):
            layer.p = p
    logprobs = np.array([row.pass_logprobs for row in rows])
    np.testing.assert_allclose(logprobs[:, 0], [row.label_logprobs for row in own], atol=1e-5)
    unsure = dropout_uncertainty(label_probabilities(logprobs))
    assert unsure["mutual_information"] == pytest.approx(np.zeros(len(TEXTS)), abs=1e-12)


def test_dropout_passes_differ_and_average_probabilities(tuned):
    before = [row.label_logprobs for row in tuned.classify_batch(TEXTS)]
    own = tuned.classify_batch(TEXTS, list("abcd"))
    rows = dropout_predictions(tuned, TEXTS, own, 6, seed=1)
    assert [row.example_id for row in rows] == list("abcd")
    for row in rows:
        assert row.method == MC_DROPOUT and len(row.pass_logprobs) == 6
        assert len(set(row.pass_logprobs)) == 6
        mean = np.exp(row.pass_logprobs).mean(axis=0)
        assert np.exp(row.label_logprobs) == pytest.approx(mean, abs=1e-6)
        unsure = dropout_uncertainty(label_probabilities(row.pass_logprobs))
        assert unsure["mutual_information"] > 0
    assert dropout_predictions(tuned, TEXTS, own, 6, seed=1) == rows
    assert dropout_predictions(tuned, TEXTS, own, 6, seed=2) != rows
    assert [row.label_logprobs for row in tuned.classify_batch(TEXTS)] == before


def test_a_model_without_adapter_has_nothing_to_drop_out(classifier, tuned):
    own = classifier.classify_batch(TEXTS)
    with pytest.raises(UserError, match="dropout"):
        dropout_predictions(classifier, TEXTS, own, 2, seed=0)
    with tuned.without_adapter(), pytest.raises(UserError, match="dropout"):
        dropout_predictions(tuned, TEXTS, own, 2, seed=0)


# One text in detail.


def test_convergence_draws_more_and_more_of_the_same_samples():
    lines = convergence_lines(SENTIMENT, LOGPROBS, 100, seed=3)
    sizes = [int(line.split()[0]) for line in lines[1:]]
    assert sizes == [1, 2, 5, 10, 20, 50, 100]
    positive = [int(line.split("positive ")[-1].split(",")[0]) for line in lines[1:]]
    assert positive == sorted(positive)
    assert convergence_lines(SENTIMENT, LOGPROBS, 100, seed=3) == lines
    assert [line.split()[0] for line in convergence_lines(SENTIMENT, LOGPROBS, 7)[1:]] == [
        "1",
        "2",
        "5",
        "7",
    ]
    last = convergence_lines(SENTIMENT, LOGPROBS, 20_000)[-1]
    assert abs(float(last.split()[6])) < 0.02  # the share minus p(positive)


def test_convergence_of_many_labels_and_of_no_answer():
    topic = Task("topic", "Which?", tuple(Label(n, (n,)) for n in ("a", "b", "c")))
    lines = convergence_lines(topic, (np.log(0.2), np.log(0.5), np.log(0.2)), 10)
    assert "minus p(b)" in lines[0] and "a " in lines[1] and "other" in lines[1]
    nothing = convergence_lines(topic, (-40.0, -41.0, -42.0), 2)
    assert nothing[1].split()[1] == "none" and nothing[1].endswith("other 1")


def test_script_shows_samples_and_wordings(capsys):
    assert main(["It was fine.", "--samples", "30"]) == 0
    out = capsys.readouterr().out
    assert out.count("agreement") == 1 and "\n      30  " in out
    assert "(negated)" in out and f"of {1 + len(other_wordings(SENTIMENT))} wordings give" in out
    assert "dropout" not in out
    assert main(["Buy now!", "--task", "spam", "--samples", "5"]) == 0
    assert read_task("spam").wordings[0] in capsys.readouterr().out


def test_script_shows_dropout_where_there_is_an_adapter(tuned, capsys):
    flags = ["--adapter", tuned.adapter, "--dropout-passes", "3", "--samples", "5"]
    assert main(["It was fine.", *flags]) == 0
    out = capsys.readouterr().out
    assert "3 passes: P(animal) from" in out and "mutual information" in out


@pytest.mark.parametrize(
    ("flags", "code"),
    [
        (["x", "--samples", "0"], 2),
        (["x", "--dropout-passes", "0"], 2),
        (["x", "--temperature", "0"], 2),
        (["x", "--temperature", "nan"], 2),
        (["x", "--seed", "-1"], 2),
        (["  "], 1),
        (["x", "--model", "no-such-model"], 1),
        (["x", "--adapter", "no/such/folder"], 1),
        (["x", "--task", "no-such-task"], 1),
    ],
)
def test_bad_input_is_one_clear_line(flags, code, capsys):
    if code == 2:
        with pytest.raises(SystemExit) as caught:
            main(flags)
        assert caught.value.code == 2
    else:
        assert main(flags) == 1
    error = capsys.readouterr().err
    assert "error: " in error and "Traceback" not in error
