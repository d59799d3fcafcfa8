"""Response consistency: in law what real sampling gives, intervals, seeds, errors."""

import numpy as np
import pytest
import torch
from scipy import stats

from consistency_confidence import (
    answer_distribution,
    consistency_predictions,
    main,
    sample_consistency,
)
from records import CONSISTENCY, Prediction
from settings import SENTIMENT, EvaluationSettings

LOGPROBS = (np.log(0.62), np.log(0.35))


def outcome_of(classifier, token):
    ids = classifier.encoder.label_ids
    return next((k for k, label in enumerate(ids) if token in label), len(ids))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_drawn_samples_agree_in_law_with_real_generation(classifier, temperature):
    text, n = "It was fine, I suppose, but not for me.", 600
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


def test_zero_samples_are_refused():
    with pytest.raises(ValueError, match="n_samples"):
        sample_consistency(LOGPROBS, 0, np.random.default_rng(0))


def test_script_shows_agreement_from_one_sample_to_n(capsys):
    assert main(["It was fine.", "--samples", "30"]) == 0
    out = capsys.readouterr().out
    assert out.count("agreement") == 1 and "\n      30  " in out
    with pytest.raises(SystemExit):
        main(["x", "--samples", "0"])


def test_script_asks_any_task(capsys):
    assert main(["Shares rose.", "--task", "financial_sentiment", "--samples", "5"]) == 0
    out = capsys.readouterr().out
    assert all(f"{name} " in out for name in ("positive", "neutral", "negative"))
    assert main(["x", "--task", "no_such_task"]) == 1
    assert "the shipped tasks are" in capsys.readouterr().err


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
