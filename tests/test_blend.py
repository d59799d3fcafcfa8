"""The blend: Platt scaling with one part, what it recovers, when it falls back, and its file."""

import json
from dataclasses import replace

import numpy as np
import pytest
from scipy.special import expit, log_softmax

import simulated_cache
from blend import (
    SignalBlend,
    blend_identity,
    blendable_parts,
    cross_fitted_losses,
    fit_blend,
    load_blend,
    rows_where,
    save_blend,
    signal_rows,
)
from calibration import PlattScalingCalibrator, _fit_logistic
from calibration_metrics import compare, holm, log_loss
from records import MC_DROPOUT, P_TRUE, PARAPHRASE, TOKEN_PROBABILITY, VERBALISED, load_results
from settings import UserError


@pytest.fixture(scope="module")
def results():
    return {
        name: load_results(simulated_cache.simulated_cache(name) / "finetuned_model_results.json")
        for name in ("two", "four")
    }


def world(seed, n=900, n_labels=2, planted=0.0, copies=False):
    """Calibration and test rows of a task whose signals are known.

    token_probability sees the truth through noise; paraphrase is a noisier view or, with `copies`,
    the same but for a hair; p_true, a score, is noise plus `planted` times whether the answer is
    right. Three rows are a group.
    """
    rng = np.random.default_rng(seed)
    made = []
    for split in ("calibration", "test"):
        truth = rng.normal(0, 1.5, (n, n_labels))
        label = (np.exp(log_softmax(truth, 1)).cumsum(1) < rng.random((n, 1))).sum(1)
        noise = rng.normal(0, 1.0, (n, n_labels))
        own = log_softmax(truth + noise, 1)
        blur = 0.001 if copies else 1.0
        other = log_softmax(truth + noise + rng.normal(0, blur, (n, n_labels)), 1)
        answer = own.argmax(1)
        score = rng.normal(0, 1, n) + planted * (answer == label)
        made.append(
            {
                "split": split,
                "id": np.array([f"{split}{i}" for i in range(n)]),
                "group": np.array([f"{split}{i // 3}" for i in range(n)]),
                "label": label,
                "answer": answer,
                "n_labels": n_labels,
                "signals": {TOKEN_PROBABILITY: own, PARAPHRASE: other, P_TRUE: score},
            }
        )
    return made


# With one part.


def test_of_two_labels_one_distribution_is_platt_scaling(results):
    one = results["two"]
    for part in (TOKEN_PROBABILITY, PARAPHRASE, "batch_calibration"):
        fitting, test = (signal_rows(one, split, [part]) for split in ("calibration", "test"))
        margin = [-np.diff(rows["signals"][part])[:, 0] for rows in (fitting, test)]
        platt = PlattScalingCalibrator().fit(margin[0], fitting["label"] == 0)
        found = SignalBlend().fit(fitting, part).predict_proba(test)
        np.testing.assert_allclose(found[:, 0], platt.predict_proba(margin[1]), atol=1e-6)


def test_of_two_labels_one_score_is_a_logistic_regression_on_the_signed_score(results):
    fitting, test = (signal_rows(results["two"], s, [P_TRUE]) for s in ("calibration", "test"))

    def features(rows):
        sign = np.where(rows["answer"] == 0, 1.0, -1.0)
        return np.column_stack([sign * rows["signals"][P_TRUE], sign])

    coefficients, intercept = _fit_logistic(features(fitting), fitting["label"] == 0)
    expected = expit(features(test) @ coefficients + intercept)
    found = SignalBlend().fit(fitting, P_TRUE).predict_proba(test)
    np.testing.assert_allclose(found[:, 0], expected, atol=1e-6)


def test_of_four_labels_no_other_slope_or_bias_has_less_loss(results):
    rows = signal_rows(results["four"], "calibration", [TOKEN_PROBABILITY, P_TRUE])
    for anchor in rows["signals"]:
        blend = SignalBlend().fit(rows, anchor)
        probabilities = blend.predict_proba(rows)
        assert probabilities.shape == (len(rows["label"]), 4)
        assert probabilities.sum(axis=1) == pytest.approx(np.ones(len(rows["label"])))
        # Platt's targets keep the optimum a little off that of the plain loss.
        least = log_loss(probabilities, rows["label"])
        for change in (-0.3, 0.3):
            for key in ("weight", 0, 1, 2, 3):
                other = SignalBlend.from_json(json.loads(json.dumps(blend.to_json())))
                if key == "weight":
                    other.parameters["parts"][0]["weight"] += change
                else:
                    other.parameters["bias"][key] += change
                assert log_loss(other.predict_proba(rows), rows["label"]) > least


def test_a_flat_signal_and_rows_of_one_label_stay_finite():
    fitting, test = world(0, n=60)
    fitting["signals"][P_TRUE] = np.full(60, 0.3)
    blend = SignalBlend().fit(fitting, P_TRUE, 10.0)
    assert np.isfinite(blend.predict_proba(test)).all()
    fitting["label"][:] = 1
    probabilities = SignalBlend().fit(fitting, TOKEN_PROBABILITY).predict_proba(test)
    assert np.isfinite(probabilities).all() and (probabilities[:, 1] > 0.9).all()


# With several.


@pytest.mark.parametrize("n_labels", [2, 4])
def test_a_planted_better_signal_is_found(n_labels):
    fitting, test = world(1, n_labels=n_labels, planted=4.0)
    blend, selection = fit_blend(fitting)
    assert selection["anchor"] == P_TRUE
    weight = {part["name"]: part["weight"] for part in blend.parameters["parts"]}
    assert weight[P_TRUE] == max(weight.values())
    loss = {
        part: log_loss(SignalBlend().fit(fitting, part).predict_proba(test), test["label"])
        for part in test["signals"]
    }
    combined = log_loss(blend.predict_proba(test), test["label"])
    assert combined < 0.8 * loss[TOKEN_PROBABILITY]
    assert combined <= min(loss.values()) + 0.002


def test_signals_that_say_the_same_fall_back_to_one_of_them():
    for seed in range(5):
        fitting, test = world(seed, copies=True)
        blend, selection = fit_blend(fitting)
        assert selection["penalty"] is None and blend.parts == [selection["anchor"]]
        assert selection["anchor"] in (TOKEN_PROBABILITY, PARAPHRASE)
        alone = SignalBlend().fit(fitting, selection["anchor"])
        assert (blend.predict_proba(test) == alone.predict_proba(test)).all()


def test_the_blend_is_hardly_ever_worse_than_its_best_part():
    worse = 0
    for seed in range(12):
        fitting, test = world(seed, n=450, planted=(0.0, 0.5, 1.5)[seed % 3])
        blend, _ = fit_blend(fitting)
        probabilities = {"combined": blend.predict_proba(test)} | {
            part: SignalBlend().fit(fitting, part).predict_proba(test) for part in test["signals"]
        }
        tests = [
            difference["log_loss"]
            for difference in compare(
                probabilities, test["label"], "combined", test["group"]
            ).values()
        ]
        corrected = holm([t["p_value"] for t in tests])
        worse += any(p < 0.05 and t["estimate"] < 0 for p, t in zip(corrected, tests, strict=True))
    assert worse == 0


def test_a_larger_penalty_is_nearer_to_the_anchor_alone():
    fitting, test = world(2, planted=1.0)
    alone = SignalBlend().fit(fitting, TOKEN_PROBABILITY).predict_proba(test)
    distance = [
        np.abs(SignalBlend().fit(fitting, TOKEN_PROBABILITY, p).predict_proba(test) - alone).max()
        for p in (1.0, 100.0, 1e9)
    ]
    assert distance[0] > distance[1] > distance[2]
    assert distance[2] < 1e-5


def test_the_choice_is_made_by_what_is_predicted_of_other_groups():
    fitting, _ = world(3, n=240)
    losses = cross_fitted_losses(fitting, TOKEN_PROBABILITY, 10.0, n_folds=4, seed=1)
    assert losses.shape == (240,)
    order = np.random.default_rng(0).permutation(240)
    moved = cross_fitted_losses(rows_where(fitting, order), TOKEN_PROBABILITY, 10.0, 4, 1)
    np.testing.assert_allclose(moved, losses[order], atol=1e-6)
    one_group = rows_where(fitting, np.repeat([True, False], [3, 237]))
    with pytest.raises(ValueError, match="at least 2 groups"):
        fit_blend(one_group)


def test_test_rows_are_refused():
    _, test = world(4, n=60)
    with pytest.raises(ValueError, match="calibration split, got 'test'"):
        SignalBlend().fit(test, TOKEN_PROBABILITY)
    with pytest.raises(ValueError, match="calibration split, got 'test'"):
        fit_blend(test)


def test_an_unfitted_blend_and_rows_of_other_labels_are_refused():
    fitting, test = world(5, n=60)
    with pytest.raises(ValueError, match="must be fitted"):
        SignalBlend().predict_proba(test)
    blend = SignalBlend().fit(fitting, TOKEN_PROBABILITY)
    with pytest.raises(ValueError, match="must be of 2 labels, as fitted, got 4"):
        blend.predict_proba(world(5, n=60, n_labels=4)[1])


# Rows of a cache.


def test_parts_bring_a_signal_of_their_own_and_score_nearly_every_row(results):
    parts, left_out = blendable_parts(results["two"])
    assert parts[0] == TOKEN_PROBABILITY and {P_TRUE, PARAPHRASE, MC_DROPOUT} < set(parts)
    assert not {"margin", "entropy", "batch_calibration"} & set(parts)
    assert set(left_out) == {VERBALISED}
    assert "of 1,000 calibration rows" in left_out[VERBALISED]


def test_rows_hold_what_all_methods_scored(results):
    one = results["four"]
    rows = signal_rows(one, "test", [TOKEN_PROBABILITY, VERBALISED])
    scored = {p.example_id for p in one.predictions if p.method == VERBALISED and not p.error}
    own = one.arrays("test")
    assert rows["id"].tolist() == [i for i in own["id"].tolist() if i in scored]
    kept = np.isin(own["id"], rows["id"])
    np.testing.assert_array_equal(rows["answer"], own["predicted"][kept])
    np.testing.assert_array_equal(rows["signals"][TOKEN_PROBABILITY], own["label_logprobs"][kept])
    stated = {p.example_id: p.confidence for p in one.predictions if p.method == VERBALISED}
    assert rows["signals"][VERBALISED].tolist() == [stated[i] for i in rows["id"]]


# Files.


def test_a_saved_blend_comes_back_for_the_same_model_and_signals(results, tmp_path):
    one = results["two"]
    rows = signal_rows(one, "calibration", [TOKEN_PROBABILITY, P_TRUE])
    blend = SignalBlend().fit(rows, TOKEN_PROBABILITY, 10.0)
    save_blend(tmp_path / "blend.json", blend, one)
    loaded = load_blend(tmp_path / "blend.json", one)
    assert loaded.parts == [TOKEN_PROBABILITY, P_TRUE] and loaded.n_rows == blend.n_rows
    assert (loaded.predict_proba(rows) == blend.predict_proba(rows)).all()
    assert loaded.fitted_ids == tuple(rows["id"])


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda r: replace(r, identity={**r.identity, "model": "another"}), "model"),
        (
            lambda r: replace(
                r, run={**r.run, "evaluation": {**r.run["evaluation"], "dropout_passes": 3}}
            ),
            "signals",
        ),
        (
            lambda r: replace(
                r,
                run={**r.run, "signals": {**r.run["signals"], "wordings": [{"question": "Eh?"}]}},
            ),
            "signals",
        ),
    ],
)
def test_a_blend_refuses_another_model_and_signals_asked_otherwise(
    results, tmp_path, change, named
):
    one = results["two"]
    blend = SignalBlend().fit(signal_rows(one, "calibration", [P_TRUE]), P_TRUE)
    save_blend(tmp_path / "blend.json", blend, one)
    other = change(one)
    assert blend_identity(other)["fingerprint"] != blend_identity(one)["fingerprint"]
    with pytest.raises(UserError, match=f"was fitted for .* different: {named} ") as caught:
        load_blend(tmp_path / "blend.json", other)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "damage",
    [
        lambda c: c.update(name="platt"),
        lambda c: c.update(n_labels=1),
        lambda c: c.pop("parameters"),
        lambda c: c["parameters"].pop("bias"),
        lambda c: c["parameters"].update(bias=[0.0]),
        lambda c: c["parameters"].update(anchor="margin"),
        lambda c: c["parameters"]["parts"][0].update(weight=None),
        lambda c: c["parameters"]["parts"][0].update(scale=0.0),
        lambda c: c["parameters"]["parts"][0].update(name="vibes"),
    ],
)
def test_a_damaged_blend_is_one_clear_line(results, tmp_path, damage):
    one, path = results["two"], tmp_path / "blend.json"
    save_blend(path, SignalBlend().fit(signal_rows(one, "calibration", [P_TRUE]), P_TRUE), one)
    data = json.loads(path.read_text())
    damage(data["calibrator"])
    path.write_text(json.dumps(data))
    with pytest.raises(UserError, match="is damaged") as caught:
        load_blend(path, one)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="does not exist"):
        load_blend(tmp_path / "none.json", one)
