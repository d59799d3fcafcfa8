"""Which calibrator, which model: the comparisons that reports print and charts draw, made once.

    models = load_models("evaluation_cache")
    table = calibrator_comparison(models["base"])
    gains = model_comparison(models["base"], models["finetuned"])
    table = against_reference({"cross-entropy": ..., "focal": ...}, label, group)
    lessons = pitfalls(models["base"])

Calibrators, and the choice among them, come from calibration rows; what is reported of them comes
from test rows, but for `pitfalls`, which shows what goes wrong otherwise. Differences are paired
row by row, and rows of a near-duplicate group do not count as independent: intervals draw whole
groups, p-values are clustered by them. Results are dicts ready for JSON. Layer 1: no model, no
plots.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.stats import binomtest

from calibration import (
    CALIBRATORS,
    PlattScalingCalibrator,
    calibrated_probabilities,
    calibrators_for,
    evaluate_calibrator,
    fit_calibrator,
    rows_margin,
    select_calibrator,
)
from calibration_metrics import (
    HIGH_CONFIDENCE,
    as_count,
    as_flags,
    as_labels,
    as_probabilities,
    aurc,
    brier_score,
    check_same_length,
    clustered_wilson_interval,
    compare,
    expected_calibration_error,
    holm,
    log_loss,
    maximum_calibration_error,
    measure,
    null_calibration_error,
)
from records import (
    MODEL_FILES,
    SCHEMA_VERSION,
    ModelResults,
    label_probabilities,
    load_results,
    read_json,
)
from risk_control import certify_threshold, naive_threshold
from settings import UserError

NEXT_STEP = "run: python generate_evaluation_cache.py --force"
REQUIRED_METHODS = ("raw", "platt", "isotonic")  # what every report speaks of
SIGNIFICANT = 0.05  # a p-value below it, after Holm's correction, decides


# ------------------------------------------------------------------------------------- the cache


@dataclass(frozen=True)
class ModelEvaluation:
    """One model's answers to the n test rows; K labels in the task's order.

    name: "base" or "finetuned".
    label: (n,) int index of the true label; category, domain, group: (n,) str, "" where a row has
        no category or domain; group is the near-duplicate group.
    probabilities: for each calibrator (n, K) float, rows summing to 1.
    metrics: for each calibrator the measurements of calibrated_results.json.
    results: the `ModelResults` behind it, calibration rows included.
    entry: the model's part of calibrated_results.json.
    """

    name: str
    label: np.ndarray
    category: np.ndarray
    domain: np.ndarray
    group: np.ndarray
    probabilities: dict
    metrics: dict
    results: ModelResults
    entry: dict

    def confidence(self, method):
        """(n,) probability of the predicted label, and (n,) bool whether that label is right."""
        probabilities = self.probabilities[method]
        return probabilities.max(axis=1), probabilities.argmax(axis=1) == self.label

    @property
    def label_name(self):
        """(n,) str, the name of each true label."""
        return np.array(self.results.task.label_names)[self.label]

    @property
    def selected(self):
        """Name of the calibrator that cross-fitting on the calibration rows chose."""
        return self.entry["selection"]["chosen"]

    @property
    def n_groups(self):
        """{"calibration": near-duplicate groups of the scored calibration rows, "test": ...}"""
        group = {"calibration": self.results.arrays("calibration")["group"], "test": self.group}
        return {split: len(np.unique(names)) for split, names in group.items()}

    @property
    def bins(self):
        """Equal-width bins of the calibration errors in `metrics`."""
        return self.results.run["evaluation"]["bins"]


def load_models(cache_dir):
    """{"base": `ModelEvaluation`, and "finetuned" if it was evaluated} of the folder `cache_dir`.

    Raises UserError when a file is missing or damaged, when the files belong to different models,
    or when a reported row is no test row.
    """
    cache_dir = Path(cache_dir)
    path = cache_dir / "calibrated_results.json"
    calibrated = read_json(path, NEXT_STEP)
    if calibrated.get("schema_version") != SCHEMA_VERSION:
        found = calibrated.get("schema_version")
        raise UserError(f"{path} has schema {found}, not {SCHEMA_VERSION}; {NEXT_STEP}")
    try:
        return {
            name: _model_evaluation(
                name, calibrated["models"][name], load_results(cache_dir / file)
            )
            for name, file in MODEL_FILES.items()
            if name == "base" or name in calibrated["models"]
        }
    except (KeyError, TypeError, ValueError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else error
        raise UserError(f"{path} is damaged ({reason}); {NEXT_STEP}") from error


def load_model(cache_dir, name=None):
    """The `ModelEvaluation` of an evaluation cache that is called `name`.

    name: "base", "finetuned", or None for the fine-tuned one where there is one. Raises UserError
    when a file is missing or damaged, or when the fine-tuned model was not evaluated.
    """
    models = load_models(cache_dir)
    if name is None:
        return list(models.values())[-1]
    if name not in models:
        raise UserError(
            f"{cache_dir} has no fine-tuned model; run: python fine_tune_model.py, then "
            "python generate_evaluation_cache.py"
        )
    return models[name]


def _model_evaluation(name, entry, results):
    if entry["identity"]["fingerprint"] != results.identity["fingerprint"]:
        raise ValueError(f"{name}_model_results.json is of another model")
    if missing := {"calibrators", "selection", "comparison", "signals"} - set(entry):
        raise ValueError(f"{name} has no {min(missing)!r}")
    test, rows = entry["test"], results.arrays("test")
    if strangers := set(test["ids"]).difference(rows["id"]):
        raise ValueError(f"{name}: {min(strangers)!r} is no test row")
    if test["ids"] != rows["id"].tolist():
        raise ValueError(f"{name}: its ids are not the test rows in their order")
    label = as_labels(f"{name} label", test["label"], len(results.task.labels))
    if not np.array_equal(label, rows["label"]):
        raise ValueError(f"{name}: its labels differ from those of {name}_model_results.json")
    expected = (len(label), len(results.task.labels))
    if missing := [method for method in REQUIRED_METHODS if method not in test["methods"]]:
        raise ValueError(f"{name} has no {missing[0]!r}")
    probabilities, metrics = {}, {}
    for method in test["methods"]:
        values = test["methods"][method]["probabilities"]
        probabilities[method] = as_probabilities(f"{name} {method} probabilities", values)
        if probabilities[method].shape != expected:
            shape = probabilities[method].shape
            raise ValueError(f"{name} {method} probabilities must be {expected}, got {shape}")
        metrics[method] = test["methods"][method]["metrics"]
        for key in ("estimate", "low", "high", "null_mean"):
            if not isinstance(metrics[method]["ece"][key], int | float):
                raise ValueError(f"{name}: the ECE of {method} has no {key}")
    as_count("bins", results.run["evaluation"]["bins"])
    columns = (rows[key] for key in ("label", "category", "domain", "group"))
    return ModelEvaluation(name, *columns, probabilities, metrics, results, entry)


# ----------------------------------------------------------------------------------- calibrators


def judge_calibrators(results, n_bins=20, n_resamples=1000, seed=0):
    """A model's part of calibrated_results.json, but for its identity.

    results: `ModelResults`. Every calibrator that applies to its number of labels is fitted on the
    scored calibration rows and judged on the scored test rows.
    Returns a dict:
      calibrators: {name: its JSON};
      selection: {"chosen": name, "calibrators": table} of `select_calibrator` on calibration rows;
      test: {"ids", "label", "methods": {name: {"probabilities" (9 digits), "metrics"}}};
      comparison: `calibration_metrics.compare` of every calibrator with "raw".
    Raises UserError when the rows of a split are of fewer than 2 near-duplicate groups.
    """
    fitting, test = results.arrays("calibration"), results.arrays("test")
    for rows in (fitting, test):
        if (n_groups := len(np.unique(rows["group"]))) < 2:
            raise UserError(
                f"{results.name}: the scored {rows['split']} rows are of {n_groups} near-duplicate "
                "groups; at least 2 are needed to measure anything: label more texts"
            )
    calibrators, probabilities, methods = {}, {}, {}
    for name in calibrators_for(len(results.task.labels)):
        calibrator = fit_calibrator(name, fitting)
        calibrators[name] = calibrator.to_json()
        probabilities[name] = calibrated_probabilities(calibrator, test)
        methods[name] = {
            "probabilities": [[float(f"{p:.9g}") for p in row] for row in probabilities[name]],
            "metrics": evaluate_calibrator(calibrator, test, n_bins, n_resamples, seed),
        }
    chosen, table = select_calibrator(fitting, seed=seed)
    return {
        "calibrators": calibrators,
        "selection": {"chosen": chosen, "calibrators": table},
        "test": {"ids": test["id"].tolist(), "label": test["label"].tolist(), "methods": methods},
        "comparison": compare(probabilities, test["label"], group=test["group"], seed=seed),
    }


def calibrator_comparison(model):
    """Every calibrator of a `ModelEvaluation` beside the raw probabilities, on its test rows.

    Returns a dict:
      model, n, n_groups, n_calibration: whose rows, how many, in how many near-duplicate groups;
      calibrators: from simple to flexible, each {"name", "metrics", "difference"}; metrics as in
          `calibration_metrics.calibration_metrics`; difference of log-loss and Brier score to raw
          as in `compare`, None for raw itself; negative is better;
      better, worse: names whose log-loss differs from that of raw by more than chance (Holm);
      selection: {"chosen", "calibrators"}, `select_calibrator` on the calibration rows;
      venn_abers_width: {"mean", "median", "largest"} of p1 − p0 over the test rows (and labels,
          for K > 2);
      isotonic_clipped: {"calibration", "test"}: share of the values moved off 0 and 1.
    """
    test = model.results.arrays("test")
    margin = rows_margin(test)
    fitted = {
        name: CALIBRATORS[name].from_json(model.entry["calibrators"][name])
        for name in ("isotonic", "venn_abers")
    }
    p0, p1 = fitted["venn_abers"].predict_interval(margin)
    clipped = [one["clipped_fraction"] for one in fitted["isotonic"].parameters["maps"]]
    rows = [
        {"name": name, "metrics": metrics, "difference": model.entry["comparison"].get(name)}
        for name, metrics in model.metrics.items()
    ]

    def decided(sign):
        return [
            row["name"]
            for row in rows
            if row["difference"]
            and is_significant(row["difference"]["log_loss"])
            and sign * row["difference"]["log_loss"]["estimate"] > 0
        ]

    return {
        "model": model.name,
        "n": len(model.label),
        "n_groups": model.n_groups["test"],
        "n_calibration": len(model.results.arrays("calibration")["label"]),
        "calibrators": rows,
        "better": decided(-1),
        "worse": decided(1),
        "selection": model.entry["selection"],
        "venn_abers_width": {
            "mean": float((p1 - p0).mean()),
            "median": float(np.median(p1 - p0)),
            "largest": float((p1 - p0).max()),
        },
        "isotonic_clipped": {
            "calibration": float(np.mean(clipped)),
            "test": fitted["isotonic"].clipped_fraction(margin),
        },
    }


# ---------------------------------------------------------------------------------------- models


def mcnemar_test(correct_first, correct_second):
    """Exact McNemar test: is one of two classifiers right on more of the same rows?

    correct_first, correct_second: (n,) bool. Rows count as independent: where near-duplicates are
    among them, p is too small.
    Returns {"only_first", "only_second": rows that one alone has right, "p_value": two-sided}.
    Source: McNemar 1947, https://doi.org/10.1007/BF02295996
    """
    first = as_flags("correct_first", correct_first)
    second = as_flags("correct_second", correct_second)
    check_same_length(correct_first=first, correct_second=second)
    only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
    discordant = only_first + only_second
    p_value = binomtest(only_first, discordant).pvalue if discordant else 1.0
    return {"only_first": only_first, "only_second": only_second, "p_value": float(p_value)}


def _accuracy(probabilities, label):
    return float((probabilities.argmax(axis=1) == label).mean())


SCORES = {"accuracy": _accuracy, "log_loss": log_loss, "brier": brier_score}


def _paired_scores(pair, names, label, group, seed):
    """{score: value of each model, and the paired difference second − first} for each of SCORES.

    pair: (n, K) probabilities of both models. A difference is {"estimate", "low", "high",
    "p_value"}; all but the estimate are None where the rows form a single group.
    """
    table = {
        score: {name: measure(p, label) for name, p in zip(names, pair, strict=True)}
        for score, measure in SCORES.items()
    }
    if len(np.unique(group)) < 2:
        for values in table.values():
            estimate = values[names[1]] - values[names[0]]
            values |= {"estimate": estimate, "low": None, "high": None, "p_value": None}
        return table
    # As probabilities, hard answers have a Brier score of 1 where they are wrong, else 0.
    hard = [np.eye(p.shape[1])[p.argmax(axis=1)] for p in pair]
    soft, wrong = (
        compare(dict(zip(names, of, strict=True)), label, names[0], group, seed=seed)[names[1]]
        for of in (pair, hard)
    )
    error = wrong["brier"]
    soft["accuracy"] = error | {
        "estimate": 0.0 - error["estimate"],  # not −0.0
        "low": 0.0 - error["high"],
        "high": 0.0 - error["low"],
    }
    for score, difference in soft.items():
        table[score] |= {k: difference[k] for k in ("estimate", "low", "high", "p_value")}
    return table


def _with_holm(differences):
    """Add "p_value_holm" over all differences that have a p-value, None to the others."""
    tested = [d for d in differences if d["p_value"] is not None]
    for difference in differences:
        difference["p_value_holm"] = None
    if tested:
        corrected = holm([d["p_value"] for d in tested])
        for difference, p_value in zip(tested, corrected, strict=True):
            difference["p_value_holm"] = float(p_value)


def is_significant(difference):
    """Whether a difference has a p-value, and one below 0.05 after Holm's correction."""
    p_value = difference["p_value_holm"]
    return p_value is not None and p_value < SIGNIFICANT


def _breakdown(values, pair, names, label, group, seed):
    """`_paired_scores` of the rows of each of (n,) `values`, from the largest gain to the least.

    Holm's correction is over the values, for each score by itself.
    """
    parts = []
    for value in sorted(set(values.tolist()) - {""}):
        rows = values == value
        scores = _paired_scores([p[rows] for p in pair], names, label[rows], group[rows], seed)
        n_groups = len(np.unique(group[rows]))
        parts.append({"name": value, "n": int(rows.sum()), "n_groups": n_groups, **scores})
    for score in SCORES:
        _with_holm([part[score] for part in parts])
    return sorted(parts, key=lambda part: -part["accuracy"]["estimate"])


def _high_confidence(probabilities, label, group):
    """How many rows reach the high confidence, and how many of these are right."""
    high = probabilities.max(axis=1) >= HIGH_CONFIDENCE
    result = {"threshold": HIGH_CONFIDENCE, "count": int(high.sum()), "accuracy": None}
    if high.any():
        correct = (probabilities.argmax(axis=1) == label)[high]
        low, high_end = clustered_wilson_interval(correct, group[high])
        result["accuracy"] = {"estimate": float(correct.mean()), "low": low, "high": high_end}
    return result


def _ranking(candidates, label, group, seed):
    """Candidates by log-loss, each with those that it beats by more than chance.

    candidates: {(model, calibrator): (n, K) probabilities}. All pairs are tested, because the order
    is found on the same rows; Holm's correction is over the pairs.
    """
    loss = {key: log_loss(p, label) for key, p in candidates.items()}
    order = sorted(loss, key=loss.__getitem__)
    pairs = []
    for i, worse in enumerate(order[1:], start=1):
        ahead = {key: candidates[key] for key in order[: i + 1]}
        tests = compare(ahead, label, worse, group, seed=seed)
        pairs += [(better, worse, tests[better]["log_loss"]) for better in order[:i]]
    _with_holm([test for _, _, test in pairs])
    return [
        {
            "model": key[0],
            "calibrator": key[1],
            "log_loss": loss[key],
            "better_than": [
                {"model": worse[0], "calibrator": worse[1], **test}
                for better, worse, test in pairs
                if better == key and is_significant(test)
            ],
        }
        for key in order
    ]


def _curve_differences(pair, names, label, group, n_bins, seed):
    """{"ece", "aurc"}: value of each model, and the interval of the paired difference.

    The ECE also has the null_mean and the null_p95 of each model.
    """
    first, second = pair
    answers = [(p.max(axis=1), p.argmax(axis=1) == label) for p in pair]
    table = {
        "ece": [expected_calibration_error(*one, n_bins) for one in answers],
        "aurc": [aurc(*one) for one in answers],
    }
    for measured, values in table.items():
        table[measured] = dict(zip(names, values, strict=True)) | measure(
            measured, second, label, (first, label), group, n_bins=n_bins, seed=seed
        )
    null = [
        null_calibration_error(confidence, n_bins, seed=seed, correct=correct, group=group)
        for confidence, correct in answers
    ]
    for key, values in zip(("null_mean", "null_p95"), zip(*null, strict=True), strict=True):
        table["ece"][key] = dict(zip(names, values, strict=True))
    return table


def model_comparison(first, second, seed=0):
    """Two `ModelEvaluation`s, paired on the test rows that both have; differences second − first.

    Returns a dict, in which the names of the models are keys where each has a value of its own:
      models: the two names; n, n_groups: what is compared; left_out: rows only one of them scored;
      methods: "raw", and "selected", the calibrator that cross-fitting chose for each model:
        calibrator: its name for each model;
        accuracy, log_loss, brier: value of each model, "estimate", "low", "high" of the
            difference, "p_value" of the clustered t-test, "p_value_holm" over both methods and
            the three scores;
        ece, aurc: likewise without p-values, for they are no means over rows; ece also with
            null_mean and null_p95, what either model would show if it were perfectly calibrated;
        mcnemar: `mcnemar_test`;
        high_confidence: for each model rows of confidence ≥ 0.9 and their accuracy, None if none;
      labels, categories, domains: the three scores under "selected", one entry a true label (or
        category, domain), from the largest gain in accuracy to the least; p_value_holm is over
        the entries, score by score;
      ranking: both models, raw and selected, by log-loss, with those that each beats (Holm over all
        pairs).
    Raises UserError when the rows that both have are of fewer than 2 groups.
    """
    models, names = (first, second), (first.name, second.name)
    ids = [np.array(model.entry["test"]["ids"]) for model in models]
    _, *places = np.intersect1d(*ids, assume_unique=True, return_indices=True)
    label, label_name, category, domain, group = (
        getattr(first, key)[places[0]]
        for key in ("label", "label_name", "category", "domain", "group")
    )
    n_groups = len(np.unique(group))
    if n_groups < 2:
        raise UserError(
            f"{first.name} and {second.name} have scored test rows of {n_groups} near-duplicate "
            "groups in common; at least 2 are needed"
        )
    methods, candidates = {}, {}
    for method in ("raw", "selected"):
        used = {m.name: "raw" if method == "raw" else m.selected for m in models}
        pair = [m.probabilities[used[m.name]][at] for m, at in zip(models, places, strict=True)]
        candidates |= {(name, used[name]): p for name, p in zip(names, pair, strict=True)}
        methods[method] = {
            "calibrator": used,
            **_paired_scores(pair, names, label, group, seed),
            **_curve_differences(pair, names, label, group, first.bins, seed),
            "mcnemar": mcnemar_test(*(p.argmax(axis=1) == label for p in pair)),
            "high_confidence": {
                name: _high_confidence(p, label, group) for name, p in zip(names, pair, strict=True)
            },
        }
    _with_holm([table[score] for table in methods.values() for score in SCORES])
    return {
        "models": list(names),
        "n": len(label),
        "n_groups": n_groups,
        "left_out": len(set(ids[0].tolist()) ^ set(ids[1].tolist())),
        "methods": methods,
        "labels": _breakdown(label_name, pair, names, label, group, seed),
        "categories": _breakdown(category, pair, names, label, group, seed),
        "domains": _breakdown(domain, pair, names, label, group, seed),
        "ranking": _ranking(candidates, label, group, seed),
    }


def against_reference(answers, label, group, n_bins=20, seed=0):
    """Several models, each against the first of them, paired on the same rows.

    answers: {model: {method: (n, K) probabilities}}, the same methods for every model; label: (n,)
    int; group: (n,) str.
    Returns {method: {model: scores}} of all models but the first: accuracy, log_loss, brier, ece
    and aurc as in `model_comparison`, differences model − first; p_value_holm is over all models,
    methods and the first three scores.
    """
    first, *others = answers
    table = {}
    for method, reference in answers[first].items():
        table[method] = {}
        for name in others:
            pair, names = (reference, answers[name][method]), (first, name)
            table[method][name] = {
                **_paired_scores(pair, names, label, group, seed),
                **_curve_differences(pair, names, label, group, n_bins, seed),
            }
    _with_holm([row[score] for of in table.values() for row in of.values() for score in SCORES])
    return table


# -------------------------------------------------------------------------------------- pitfalls

PITFALL_BINS = (5, 10, 15, 20, 50)
ERROR_RATES = (0.3, 0.2, 0.1, 0.05)  # promised at most among the automated rows
CUTOFF_DRAWS = 200


def pitfalls(model, seed=0):
    """How numbers like these go wrong, on the rows of a `ModelEvaluation`: wrong beside right.

    Returns a dict:
      same_rows: log-loss and ECE of isotonic regression on the calibration rows that it was fitted
        on, and on test rows, with the ECE of a perfectly calibrated model;
      platt_on_probabilities: test log-loss of "raw", of Platt scaling on the "margin", and of
        Platt scaling on the "probabilities"; "difference" probabilities − margin as in `compare`;
      empty_bins: MCE of the test confidences after Platt scaling for several numbers of bins, each
        {"n_bins", "mce", "count": rows of the bin that decided, "null_mean": of a perfectly
        calibrated model, "ece", "ece_null_mean"};
      naive_cutoffs: see `_naive_cutoffs`.
    """
    fitting, test = (model.results.arrays(split) for split in ("calibration", "test"))
    return {
        "model": model.name,
        "same_rows": _same_rows(fitting, test, seed),
        "platt_on_probabilities": _platt_on_probabilities(model, fitting, seed),
        "empty_bins": _empty_bins(*model.confidence("platt"), model.group, seed),
        "naive_cutoffs": _naive_cutoffs(fitting, seed),
    }


def _same_rows(fitting, test, seed):
    isotonic = fit_calibrator("isotonic", fitting)
    result = {"calibrator": isotonic.name}
    for rows in (fitting, test):
        probabilities = calibrated_probabilities(isotonic, rows)
        confidence = probabilities.max(axis=1)
        correct = probabilities.argmax(axis=1) == rows["label"]
        result[rows["split"]] = {
            "n": len(correct),
            "log_loss": log_loss(probabilities, rows["label"]),
            "ece": expected_calibration_error(confidence, correct),
            "ece_null_mean": null_calibration_error(
                confidence, seed=seed, correct=correct, group=rows["group"]
            )[0],
        }
    return result


def _platt_on_probabilities(model, fitting, seed):
    given, target = label_probabilities(fitting["label_logprobs"]), model.probabilities["raw"]
    wrong = np.empty_like(target)
    for k in range(target.shape[1]):
        platt = PlattScalingCalibrator().fit(given[:, k], fitting["label"] == k)
        wrong[:, k] = platt.predict_proba(target[:, k])
    wrong /= wrong.sum(axis=1, keepdims=True)
    measured = {"margin": model.probabilities["platt"], "probabilities": wrong}
    difference = compare(measured, model.label, "margin", model.group, seed=seed)
    return {
        "raw": log_loss(target, model.label),
        **{name: log_loss(p, model.label) for name, p in measured.items()},
        "difference": difference["probabilities"]["log_loss"],
    }


def _empty_bins(confidence, correct, group, seed):
    rows = []
    for n_bins in PITFALL_BINS:
        mce, count = maximum_calibration_error(confidence, correct, n_bins)
        null = {
            metric: null_calibration_error(
                confidence, n_bins, seed=seed, metric=metric, correct=correct, group=group
            )[0]
            for metric in ("mce", "ece")
        }
        rows.append(
            {
                "n_bins": n_bins,
                "mce": mce,
                "count": count,
                "null_mean": null["mce"],
                "ece": expected_calibration_error(confidence, correct, n_bins),
                "ece_null_mean": null["ece"],
            }
        )
    return rows


def _naive_cutoffs(rows, seed):
    """How often a cut-off keeps its promise, when it is chosen on a draw of `rows`.

    The rows stand for the population, whose errors are known exactly. From it as many groups as it
    has are drawn with replacement, again and again. On each draw the lowest raw confidence is taken
    at which the error rate among the rows at or above it is at most alpha (naive), or at which that
    is certified (delta = 0.1).
    Returns for each alpha {"alpha", "naive", "certified"}, either {"broken": share of the draws
    whose cut-off has an error rate above alpha in the population, "automated": mean share of the
    population at or above the cut-off}.
    """
    confidence = label_probabilities(rows["label_logprobs"]).max(axis=1)
    correct = rows["correct"]
    names, member = np.unique(rows["group"], return_inverse=True)
    members = [np.flatnonzero(member == i) for i in range(len(names))]
    rng = np.random.default_rng(seed)
    outcome = np.zeros((len(ERROR_RATES), 2, 2))  # alpha; naive, certified; broken, automated
    for _ in range(CUTOFF_DRAWS):
        drawn = [members[i] for i in rng.integers(len(names), size=len(names))]
        row = np.concatenate(drawn)
        group = np.repeat(np.arange(len(drawn)), [len(one) for one in drawn])
        for i, alpha in enumerate(ERROR_RATES):
            data = (confidence[row], correct[row], alpha)
            cutoffs = naive_threshold(*data), certify_threshold(*data, group=group)["threshold"]
            for j, cutoff in enumerate(cutoffs):
                outcome[i, j] += _broken_and_automated(confidence, correct, cutoff, alpha)
    return [
        {
            "alpha": alpha,
            "naive": {"broken": float(naive[0]), "automated": float(naive[1])},
            "certified": {"broken": float(certified[0]), "automated": float(certified[1])},
        }
        for alpha, (naive, certified) in zip(ERROR_RATES, outcome / CUTOFF_DRAWS, strict=True)
    ]


def _broken_and_automated(confidence, correct, cutoff, alpha):
    """(whether the error rate at or above the cut-off exceeds alpha, share of the rows there)."""
    if cutoff is None:
        return False, 0.0
    automated = confidence >= cutoff
    return bool((~correct[automated]).mean() > alpha), float(automated.mean())
