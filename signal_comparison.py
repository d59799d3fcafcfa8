"""Every way to ask how sure a model is, judged side by side: ranking, calibration, cost.

    judged = judge_signals(load_results("evaluation_cache/base_model_results.json"))
    judged["methods"]["entropy"]["metrics"]["auroc"]

What is fitted (Platt scaling of each method, the blend) is fitted on calibration rows, what is
measured is measured on test rows. Differences are paired row by row and clustered by near-duplicate
group. Results are dicts ready for JSON. Layer 1: no model, no plots.
"""

import numpy as np

from blend import (
    SignalBlend,
    blend_identity,
    blendable_parts,
    fit_blend,
    signal_rows,
)
from calibration_metrics import compare, holm, measure
from records import TOKEN_PROBABILITY
from signals import METHODS, method_arrays, method_cost, usable_methods

COMBINED = SignalBlend.name
FIT_ACCURACY = 1e-8  # probabilities closer than this are the same: the rest is the optimiser's
TITLES = {name: method.title for name, method in METHODS.items()} | {COMBINED: "combined"}


def judge_signals(results, n_bins=20, n_resamples=1000, seed=0):
    """A model's part of calibrated_results.json about its signals.

    results: `ModelResults`. Platt scaling of a method is the blend with it as the only part.
    Returns a dict:
      n: test rows scored by token_probability; n_groups; n_calibration;
      methods: one dict a method that can be compared, in the order of `signals.METHODS`, combined
        last:
        scale: unit and range of its score;
        n: test rows that it scored; label_mass: mean over them, None where it has none;
        cost: `signals.method_cost`;
        metrics: of `calibration_metrics.measure`: accuracy, auroc and aurc of its answer and
            score, log_loss and ece after Platt scaling;
        difference: to token_probability on the rows that both scored, None for itself: log_loss
            and accuracy as in `compare`, Holm's correction being over the methods; auroc and aurc
            as in `measure` with a reference;
      left_out: {method: why it cannot be compared};
      combined: "identity" and "blend": `SignalBlend` as JSON; "selection" of `fit_blend`;
        "left_out": {signal: why it is no part}; "best_part": the part with the lowest log-loss on
        the test rows; "difference": {part: log-loss of combined minus that of the part, as in
        `compare`}; "worse_than", "better_than": parts from which it differs by more than chance
        (p < 0.05 after Holm's correction over the parts).
    """
    names, left_out = usable_methods(results)
    own = results.arrays("test")
    judged = {name: _platt_scaled(results, name) for name in names}
    parts, not_blended = blendable_parts(results)
    blend, selection = fit_blend(signal_rows(results, "calibration", parts), seed=seed)
    test = signal_rows(results, "test", blend.parts)
    judged[COMBINED] = _blended(blend, test)
    methods = {}
    for name, one in judged.items():
        known = METHODS.get(name)
        cost_of = [name] if known else blend.parts
        methods[name] = {
            "scale": known.scale if known else "probability, 0 to 1",
            "n": len(one["id"]),
            "label_mass": _label_mass(results, known.source) if known else None,
            "cost": method_cost(results, cost_of),
            "metrics": _metrics(one, n_bins, n_resamples, seed),
            "difference": None,
        }
    for name in methods:
        if name != TOKEN_PROBABILITY:
            pair = _on_common_rows(judged[TOKEN_PROBABILITY], judged[name])
            methods[name]["difference"] = _differences(*pair, n_resamples, seed)
    for score in ("log_loss", "accuracy"):
        _correct([m["difference"][score] for m in methods.values() if m["difference"]])
    return {
        "n": len(own["id"]),
        "n_groups": len(np.unique(own["group"])),
        "n_calibration": len(results.arrays("calibration")["id"]),
        "methods": methods,
        "left_out": left_out,
        "combined": {
            "identity": blend_identity(results),
            "blend": blend.to_json(),
            "selection": selection,
            "left_out": not_blended,
            **_against_parts(judged, parts, seed),
        },
    }


def _metrics(one, n_bins, n_resamples, seed):
    """How well a score ranks the answers and, once made a probability, is believed."""
    options = {"group": one["group"], "n_bins": n_bins, "n_resamples": n_resamples, "seed": seed}
    ranked = {
        metric: measure(metric, one["score"], one["correct"], **options)
        for metric in ("auroc", "aurc")
    }
    believed = {
        metric: measure(metric, one["probabilities"], one["label"], **options)
        for metric in ("log_loss", "ece")
    }
    certain = np.ones(len(one["correct"]))  # of whatever confidence: accuracy is the same
    return {
        "accuracy": measure("accuracy", certain, one["correct"], **options),
        **ranked,
        **believed,
    }


def _answers(arrays, probabilities):
    """What judging needs of a method: its rows, its answers and what Platt scaling made of them."""
    keys = ("id", "group", "label", "predicted", "correct", "score")
    return {key: arrays[key] for key in keys} | {"probabilities": probabilities}


def _platt_scaled(results, name):
    platt = SignalBlend().fit(signal_rows(results, "calibration", [name]), name)
    test = method_arrays(results, "test", name)
    return _answers(test, platt.predict_proba(signal_rows(results, "test", [name])))


def _blended(blend, rows):
    probabilities = blend.predict_proba(rows)
    predicted = probabilities.argmax(axis=1)
    answers = {
        "predicted": predicted,
        "correct": predicted == rows["label"],
        "score": probabilities.max(axis=1),
    }
    return _answers(rows | answers, probabilities)


def _label_mass(results, source):
    mass = results.arrays("test", source).get("label_mass")
    return None if mass is None else float(mass.mean())


def _on_common_rows(first, second):
    common = first["id"][np.isin(first["id"], second["id"])]
    return [
        {key: column[np.isin(one["id"], common)] for key, column in one.items()}
        for one in (first, second)
    ]


def _differences(first, second, n_resamples, seed):
    """Log-loss, accuracy, AUROC and AURC of `second` minus those of `first`, on the same rows."""
    label, group = first["label"], first["group"]
    if np.allclose(first["probabilities"], second["probabilities"], rtol=0, atol=FIT_ACCURACY):
        second = second | {"probabilities": first["probabilities"]}
    soft, hard = (
        compare({"first": of(first), "second": of(second)}, label, "first", group, seed=seed)[
            "second"
        ]
        for of in (lambda one: one["probabilities"], _as_hard_answers)
    )
    pair = [(one["score"], one["correct"]) for one in (first, second)]
    error = hard["brier"]  # of hard answers: 1 where they are wrong, else 0
    accuracy = error | {
        "estimate": 0.0 - error["estimate"],  # not −0.0
        "low": 0.0 - error["high"],
        "high": 0.0 - error["low"],
    }
    ranking = {
        metric: measure(
            metric, *pair[1], reference=pair[0], group=group, n_resamples=n_resamples, seed=seed
        )
        for metric in ("auroc", "aurc")
    }
    return {"log_loss": soft["log_loss"], "accuracy": accuracy, **ranking}


def _as_hard_answers(one):
    return np.eye(one["probabilities"].shape[1])[one["predicted"]]


def _correct(differences):
    """Replace "p_value_holm" by Holm's correction over all these differences."""
    if differences:
        corrected = holm([d["p_value"] for d in differences])
        for difference, p_value in zip(differences, corrected, strict=True):
            difference["p_value_holm"] = float(p_value)


def _against_parts(judged, parts, seed):
    """The blend against each signal that it could use, by log-loss on the test rows."""
    differences, losses = {}, {}
    for name in parts:
        part, blend = _on_common_rows(judged[name], judged[COMBINED])
        pair = {name: part["probabilities"], COMBINED: blend["probabilities"]}
        tested = compare(pair, part["label"], name, part["group"], seed=seed)[COMBINED]["log_loss"]
        differences[name] = tested
        losses[name] = -tested["estimate"]
    _correct(list(differences.values()))
    significant = {n: d for n, d in differences.items() if d["p_value_holm"] < 0.05}
    return {
        "best_part": min(losses, key=losses.get),
        "difference": differences,
        "worse_than": [n for n, d in significant.items() if d["estimate"] > 0],
        "better_than": [n for n, d in significant.items() if d["estimate"] < 0],
    }
