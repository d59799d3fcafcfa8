"""The charts: `prepare_*` gives the numbers of a picture, `plot_*` draws it, `draw` writes a file.

    evaluation = load_evaluation("evaluation_cache")
    numbers = prepare_reliability(evaluation.base, "platt", evaluation.bins)
    plot_reliability(numbers, axes)

Everything but the training history comes from test rows alone. Probabilities, accuracies and
calibration errors are fractions in [0, 1]; only the labels on paper speak of percent. An interval
is a 95 % interval. A bin or zone without rows is NaN in the numbers and empty in the picture.

Layer 2: matplotlib lives here, and no model does.
"""

import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import matplotlib.style
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap, to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image
from scipy.stats import binom

from calibration_metrics import (
    as_count,
    clustered_wilson_interval,
    reliability_diagram,
    risk_coverage_band,
    risk_coverage_curve,
)
from comparison import ModelEvaluation, calibrator_comparison, load_models
from decisions import (
    ZONES,
    automation,
    enough_groups,
    sample_size_curves,
    score_answers,
    zone_table,
)
from records import CONSISTENCY, atomic_path, read_json
from settings import IMAGES_MANIFEST, EvaluationSettings, UserError
from signal_comparison import COMBINED, TITLES
from signals import method_arrays, usable_methods

NEXT_STEP = "run: python generate_evaluation_cache.py --force"
METHODS = {
    "raw": "raw model output",
    "platt": "Platt scaling",
    "isotonic": "isotonic regression",
}
MODELS = {"base": "base model", "finetuned": "fine-tuned model"}

PROGRESSION_SIZES = (100, 200, 500, 1000)
MOST_CATEGORIES = 12
MOST_LABELS = 12  # of a confusion matrix: with more its cells have no room for numbers
CONFIDENCE_LABEL = "confidence: probability of the predicted label"
LONGEST_NAME = 28  # characters of a category name on an axis

STYLE = "seaborn-v0_8-pastel"
COLORS = matplotlib.style.library[STYLE]["axes.prop_cycle"].by_key()["color"]
MODEL_COLORS = {"base": COLORS[0], "finetuned": COLORS[1]}
WRONG_COLOR = COLORS[2]
INK = "#333333"
BAND = "#9a9a9a"
RC = {
    "figure.dpi": 150,
    "figure.titlesize": 14,
    "figure.titleweight": "bold",
    "figure.constrained_layout.w_pad": 0.1,
    "figure.constrained_layout.h_pad": 0.06,
    "font.size": 11,
    "axes.titlesize": 11,
    "axes.titlepad": 10,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": "#e6e6e6",
    "legend.frameon": False,
    "errorbar.capsize": 3,
    "text.parse_math": False,  # a category may be called "$5 to $10"
}


# ---------------------------------------------------------------------------------------- numbers


@dataclass(frozen=True)
class Evaluation:
    """An evaluation cache, as far as charts need it.

    finetuned: None when only a base model was evaluated.
    bins: equal-width bins of its calibration errors, which the reliability diagrams share.
    history: None, or for each measured quantity of the training an array over the validation
        passes, NaN where it was not measured. `run` is the number of the run, NaN before training.
    chosen_steps: the checkpoints whose mean the adapter is; one: that checkpoint.
    mean_of_runs: None, or validation numbers of the mean of several runs.
    """

    base: ModelEvaluation
    finetuned: ModelEvaluation | None
    bins: int
    history: dict | None
    chosen_steps: list[int] | None
    mean_of_runs: dict | None

    @property
    def models(self):
        return [model for model in (self.base, self.finetuned) if model is not None]

    @property
    def countable(self):
        """The evaluation itself, or None if its labels are too many for a confusion matrix."""
        return self if len(self.base.results.task.labels) <= MOST_LABELS else None

    @property
    def sampled(self):
        """The models, or None if samples of one were hardly ever an answer."""
        judged = [model.entry["signals"]["methods"] for model in self.models]
        return self.models if all(CONSISTENCY in methods for methods in judged) else None

    @property
    def divisible(self):
        """The last model, or None if its calibration rows are too few to fit and to certify."""
        model = self.models[-1]
        return model if enough_groups(model.results.arrays("calibration")) else None


def load_evaluation(cache_dir):
    """The `Evaluation` in the folder `cache_dir`.

    Raises UserError when a file is missing or damaged, when the files belong to different models,
    or when a reported row is no test row.
    """
    models = load_models(cache_dir)
    metadata_path = Path(cache_dir) / "evaluation_metadata.json"
    metadata = read_json(metadata_path, NEXT_STEP)
    try:
        bins = as_count("bins", metadata["settings"]["evaluation"]["bins"])
        training = _training_history(metadata["training"])
    except (KeyError, TypeError, ValueError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else error
        raise UserError(f"{metadata_path} is damaged ({reason}); {NEXT_STEP}") from error
    return Evaluation(models["base"], models.get("finetuned"), bins, *training)


def _training_history(training):
    if not training or not training["history"]:
        return None, None, None
    keys = (
        "run",
        "step",
        "training_loss",
        "validation_loss",
        "validation_accuracy",
        "validation_ece",
        "validation_calibrated_log_loss",
    )
    history = {
        key: np.array([row[key] for row in training["history"]], dtype=np.float64) for key in keys
    }
    chosen = [int(step) for step in training["chosen_steps"]]
    if unknown := set(chosen) - set(history["step"]):
        raise ValueError(f"the chosen steps {sorted(unknown)} are not in the history")
    mean = training["mean_of_runs"]
    return history, chosen, mean and {key: float(mean[key]) for key in keys if key in mean}


def _about(model, method):
    """What a title says: whose rows, how many, and the calibration error with its yardsticks."""
    confidence, correct = model.confidence(method)
    return {
        "model": model.name,
        "method": method,
        "n": len(correct),
        "overall_accuracy": float(correct.mean()),
        "overall_confidence": float(confidence.mean()),
        "ece": model.metrics[method]["ece"],
    }


def prepare_confidence_histogram(model, method, n_bins=20):
    """Right and wrong answers by confidence, in equal-width bins over [0, 1].

    Returns edges (n_bins + 1,), correct and wrong (n_bins,) counts, beside what the title says.
    """
    confidence, correct = model.confidence(method)
    right, edges = np.histogram(confidence[correct], bins=n_bins, range=(0, 1))
    wrong, _ = np.histogram(confidence[~correct], bins=n_bins, range=(0, 1))
    return {**_about(model, method), "edges": edges, "correct": right, "wrong": wrong}


def prepare_histogram_comparison(models):
    """One row of histograms a method (raw, Platt), one column a model; see the histogram."""
    return [
        [prepare_confidence_histogram(model, method) for model in models]
        for method in ("raw", "platt")
    ]


def prepare_reliability(model, method, n_bins=20):
    """The arrays of `calibration_metrics.reliability_diagram`, beside what the title says."""
    diagram = reliability_diagram(*model.confidence(method), n_bins=n_bins, group=model.group)
    return {**_about(model, method), **diagram}


def prepare_zones(model, method="platt"):
    """What acting on the confidence means: the rows of each of ZONES and how often they are right.

    Returns count, accuracy, wilson_low, wilson_high, mean_confidence, (zones,) each, of
    `decisions.zone_table`, NaN for a zone without rows, beside what the title says.
    """
    confidence, correct = model.confidence(method)
    return {**_about(model, method), **_zone_numbers(confidence, correct, model.group)}


def _zone_numbers(confidence, correct, group):
    table = zone_table(confidence, correct, group)
    columns = {
        "accuracy": "accuracy",
        "wilson_low": "low",
        "wilson_high": "high",
        "mean_confidence": "mean_confidence",
    }
    numbers = {"count": np.array([zone["count"] for zone in table])}
    for name, key in columns.items():
        numbers[name] = np.array([zone[key] for zone in table], dtype=np.float64)
    return numbers


def prepare_zone_progression(model, method="platt", seed=EvaluationSettings.evaluation_seed):
    """`prepare_zones` on the first 100, 200, 500, 1,000 test rows of one random order.

    Sizes beyond the number of rows give way to all rows. Returns sizes (S,), and count, accuracy,
    wilson_low, wilson_high, mean_confidence, (S, zones) each.
    """
    columns = (*model.confidence(method), model.group)
    order = np.random.default_rng(seed).permutation(len(model.label))
    sizes = sorted({min(size, len(order)) for size in PROGRESSION_SIZES})
    steps = [_zone_numbers(*(column[order[:size]] for column in columns)) for size in sizes]
    stacked = {key: np.array([step[key] for step in steps]) for key in steps[0]}
    return {**_about(model, method), "sizes": np.array(sizes), **stacked}


def prepare_certified_thresholds(model):
    """What certified and naive thresholds do to the test rows; see `decisions.automation`.

    Returns automation, and curve: risk and coverage at every threshold on the test rows.
    """
    scored = score_answers(*_calibration_and_test(model))
    return {
        "model": model.name,
        "curve": risk_coverage_curve(scored.test.confidence, scored.test.correct),
        "automation": automation(scored),
    }


def prepare_sample_size(model):
    """`decisions.sample_size_curves` of a model."""
    curves = sample_size_curves(*_calibration_and_test(model), n_bins=model.bins)
    return {"model": model.name, **curves}


def _calibration_and_test(model):
    return (model.results.arrays(split) for split in ("calibration", "test"))


def prepare_accuracy_comparison(models, method="raw"):
    """Accuracy of all test rows and of every category, for each model.

    Where no row has a category, the true labels stand in their place.
    Returns names (G,): "all test rows", then the categories (the MOST_CATEGORIES largest) from the
    largest gain of the last model over the first to the smallest; what: "categories" or "labels";
    left_out: how many of these were too many; for each model count, accuracy, wilson_low,
    wilson_high, (G,) each.
    """
    what, part_of = "categories", {model.name: model.category for model in models}
    if not any(part.any() for part in part_of.values()):
        what, part_of = "labels", {model.name: model.label_name for model in models}
    categories, sizes = np.unique(np.concatenate(list(part_of.values())), return_counts=True)
    categories = categories[np.argsort(-sizes, kind="stable")]
    kept = categories[:MOST_CATEGORIES]

    def numbers(model, categories):
        _, correct = model.confidence(method)
        part = part_of[model.name]
        parts = [np.ones(len(correct), dtype=bool), *(part == c for c in categories)]
        columns = []
        for rows in parts:
            column = (0, np.nan, np.nan, np.nan)
            if rows.any():
                low, high = clustered_wilson_interval(correct[rows], model.group[rows])
                column = (rows.sum(), correct[rows].mean(), low, high)
            columns.append(column)
        keys = ("count", "accuracy", "wilson_low", "wilson_high")
        return dict(zip(keys, map(np.array, zip(*columns, strict=True)), strict=True))

    first, last = (numbers(model, kept)["accuracy"][1:] for model in (models[0], models[-1]))
    kept = kept[np.argsort(first - last, kind="stable")]
    return {
        "method": method,
        "names": ["all test rows", *(str(c) or "no category" for c in kept)],
        "what": what,
        "left_out": len(categories) - len(kept),
        "models": {model.name: numbers(model, kept) for model in models},
    }


def prepare_confusion(models, method="raw"):
    """Which label each model answered, by the true label.

    Returns labels (K,), and for each model counts (K, K) int: true label by answered label; share
    (K, K): the same as fractions of a row, NaN for a label without test rows; accuracy.
    """
    labels = models[0].results.task.label_names
    numbers = {}
    for model in models:
        _, correct = model.confidence(method)
        answered = model.probabilities[method].argmax(axis=1)
        counts = np.zeros((len(labels), len(labels)), dtype=np.int64)
        np.add.at(counts, (model.label, answered), 1)
        rows = counts.sum(axis=1, keepdims=True)
        share = counts / np.where(rows == 0, np.nan, rows)
        numbers[model.name] = {"counts": counts, "share": share, "accuracy": correct.mean()}
    return {"method": method, "labels": labels, "models": numbers}


def prepare_calibration_errors(models):
    """The ECE of each of METHODS: for each model estimate, low, high, null_mean; (methods,) each.

    low, high: its interval, chance included; null_mean: the ECE that a perfectly calibrated model
    with these confidences shows on average.
    """
    keys = ("estimate", "low", "high", "null_mean")
    return {
        "n": {model.name: len(model.label) for model in models},
        "models": {
            model.name: {
                key: np.array([model.metrics[method]["ece"][key] for method in METHODS])
                for key in keys
            }
            for model in models
        },
    }


def prepare_calibrator_comparison(models):
    """What every calibrator does to log-loss and ECE, from `comparison.calibrator_comparison`.

    Returns names (C,) of the calibrators, from simple to flexible; for each model selected: the
    index of the one that cross-fitting chose; difference, low, high (C,): log-loss minus that of
    the raw output, nats, 0 for raw itself; ece, null_mean (C,).
    """
    tables = {model.name: calibrator_comparison(model) for model in models}
    names = [row["name"] for row in tables[models[0].name]["calibrators"]]

    def numbers(table):
        nothing = {"estimate": 0.0, "low": 0.0, "high": 0.0}
        rows = table["calibrators"]
        gains = [row["difference"]["log_loss"] if row["difference"] else nothing for row in rows]
        ece = [row["metrics"]["ece"] for row in rows]
        return {
            "selected": names.index(table["selection"]["chosen"]),
            "difference": np.array([gain["estimate"] for gain in gains]),
            "low": np.array([gain["low"] for gain in gains]),
            "high": np.array([gain["high"] for gain in gains]),
            "ece": np.array([one["estimate"] for one in ece]),
            "null_mean": np.array([one["null_mean"] for one in ece]),
        }

    return {
        "n": {model.name: len(model.label) for model in models},
        "names": names,
        "models": {name: numbers(table) for name, table in tables.items()},
    }


def prepare_risk_coverage(models):
    """Risk against coverage for each model, ranked by its raw and by its Platt confidence.

    Returns curves: for each (model, method) coverage and risk, from the highest confidence down,
    of `calibration_metrics.risk_coverage_curve`, and aurc with its interval; bands: for each model
    `risk_coverage_band` of the raw confidence, unless there is one group alone.
    """
    shares = np.linspace(0.02, 1, 50)
    return {
        "n": {model.name: len(model.label) for model in models},
        "curves": {
            (model.name, method): {
                **risk_coverage_curve(*model.confidence(method)),
                "aurc": model.metrics[method]["aurc"],
            }
            for model in models
            for method in ("raw", "platt")
        },
        "bands": {
            model.name: risk_coverage_band(*model.confidence("raw"), shares, model.group)
            for model in models
            if len(np.unique(model.group)) > 1
        },
    }


def prepare_agreement(models):
    """How often samples and wordings agree with the answer of token probability, by its confidence.

    Returns for each model n_samples and their temperature; token_probability (n,): the probability
    of that answer among all that could be said; agreement (n,): share of the samples that gave it;
    low, high: for each of grid (g,) probabilities the central 95 % of the share of so many
    independent samples at temperature 1; wordings: None, or count, mean_confidence, agreement
    (bins,): the mean share of the wordings that gave the answer over the rows of each of ten
    equal-width bins of token_probability, NaN in a bin without rows.
    """
    return {
        "n": {model.name: len(model.label) for model in models},
        "models": {model.name: _agreement(model.results) for model in models},
    }


def _agreement(results):
    own, sampled = results.arrays("test"), results.arrays("test", CONSISTENCY)
    both = np.isin(own["id"], sampled["id"])
    answer, probability = own["predicted"][both], np.exp(own["label_logprobs"]).max(axis=1)
    n_samples = results.run["evaluation"]["samples"]
    temperature = results.run["evaluation"]["temperature"]
    grid = np.linspace(0, 1, 201)
    numbers = {
        "n_samples": n_samples,
        "temperature": temperature,
        "token_probability": np.minimum(probability[both], 1.0),
        "agreement": sampled["label_counts"][np.arange(len(answer)), answer] / n_samples,
        "grid": grid,
        "low": binom.ppf(0.025, n_samples, grid) / n_samples,
        "high": binom.ppf(0.975, n_samples, grid) / n_samples,
        "wordings": None,
    }
    if "paraphrase_agreement" in usable_methods(results)[0]:
        worded = method_arrays(results, "test", "paraphrase_agreement")
        confidence = probability[np.isin(own["id"], worded["id"])]
        member = np.minimum((confidence * 10).astype(int), 9)
        count = np.bincount(member, minlength=10)
        sums = [np.bincount(member, weights=x, minlength=10) for x in (confidence, worded["score"])]
        means = [total / np.where(count, count, np.nan) for total in sums]
        keys = ("mean_confidence", "agreement")
        numbers["wordings"] = {"count": count, **dict(zip(keys, means, strict=True))}
    return numbers


def prepare_signal_quality(models):
    """What each method is worth and costs, from `signal_comparison.judge_signals`.

    Returns names (M,) of the methods of any model, from the fewest milliseconds a text to the most,
    combined last; for each model milliseconds, passes, and auroc and log_loss after Platt scaling
    (_estimate, _low, _high): (M,) each, NaN for a method that it lacks.
    """
    tables = {model.name: model.entry["signals"]["methods"] for model in models}

    def place(name):
        costs = [table[name]["cost"]["milliseconds"] for table in tables.values() if name in table]
        return name == COMBINED, max(costs), list(TITLES).index(name)

    names = sorted({name for table in tables.values() for name in table}, key=place)

    def numbers(table):
        rows = [table.get(name) for name in names]

        def column(part, *path):
            found = [row and row[part] for row in rows]
            for key in path:
                found = [one and one[key] for one in found]
            return np.array(found, dtype=np.float64)  # None becomes NaN

        return {
            "milliseconds": column("cost", "milliseconds"),
            "passes": column("cost", "passes"),
            **{
                f"{key}_{part}": column("metrics", key, part)
                for key in ("auroc", "log_loss")
                for part in ("estimate", "low", "high")
            },
        }

    return {
        "n": {model.name: len(model.label) for model in models},
        "names": names,
        "models": {name: numbers(table) for name, table in tables.items()},
    }


def prepare_training_progress(evaluation):
    """The training history of an evaluation, and what was kept of it."""
    return {
        **evaluation.history,
        "chosen_steps": evaluation.chosen_steps,
        "mean_of_runs": evaluation.mean_of_runs,
    }


# --------------------------------------------------------------------------------------- pictures


def darker(color, fraction=0.3):
    """`color` with that fraction of its light taken away, as RGB."""
    return tuple((1 - fraction) * channel for channel in to_rgb(color))


def _fill(color):
    return {"facecolor": color, "edgecolor": darker(color)}


def _percent(value):
    return f"{100 * value:.1f} %"


def _interval(low, high):
    return f"[{100 * low:.1f}, {100 * high:.1f}]"


def _ece_text(ece):
    return (
        f"ECE {_percent(ece['estimate'])} {_interval(ece['low'], ece['high'])}; "
        f"if perfectly calibrated {_percent(ece['null_mean'])}"
    )


def _means_text(data):
    return (
        f"accuracy {_percent(data['overall_accuracy'])}, "
        f"mean confidence {_percent(data['overall_confidence'])}"
    )


def _wide_subtitle(data):
    return f"n = {data['n']:,} test rows, {_means_text(data)}\n{_ece_text(data['ece'])}"


def _narrow_subtitle(data):
    return (
        f"{MODELS[data['model']]}, {METHODS[data['method']]}, n = {data['n']:,}\n"
        f"{_means_text(data)}\n{_ece_text(data['ece'])}"
    )


def _rows_text(n):
    """{model: rows} in words, told apart only where the models differ."""
    if len(set(n.values())) == 1:
        return f"n = {next(iter(n.values())):,} test rows"
    return "test rows: " + ", ".join(f"{MODELS[name]} {rows:,}" for name, rows in n.items())


def _short(name):
    return name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 1] + "…"


def _percent_axis(ax, which, whole=True):
    """Fractions written as percent; the whole axis from 0 to 100 % unless told otherwise."""
    axis = {"x": ax.xaxis, "y": ax.yaxis}[which]
    axis.set_major_formatter(lambda value, _: f"{100 * value:.6g} %")
    if whole:
        axis.set_ticks(np.linspace(0, 1, 6))
        ax.set(**{f"{which}lim": (0, 1)})


def _frame(figure, title, legend_rows=1):
    """The body of a figure, under its title, and the strip at its foot for the legend."""
    foot_inches = 0.15 + 0.25 * legend_rows
    height = figure.get_figheight()
    body, foot = figure.subfigures(2, 1, height_ratios=[height - foot_inches, foot_inches])
    body.suptitle(title)
    return body, foot


def _whiskers(ax, position, data, filled, horizontal=False):
    """The Wilson intervals of the accuracies; an estimate always lies inside its own."""
    value, low, high = (data[key][filled] for key in ("accuracy", "wilson_low", "wilson_high"))
    reach = np.abs(np.stack([value - low, high - value]))
    where = {"x": value, "y": position} if horizontal else {"x": position, "y": value}
    ax.errorbar(
        **where,
        **{"xerr" if horizontal else "yerr": reach},
        fmt="none",
        ecolor=INK,
        elinewidth=1.4,
        zorder=4,
        label="95 % interval (clustered)",
    )


def _legend(figure, axes, ncols, loc="center"):
    """One legend for all axes, each entry once."""
    handles = {}
    for ax in axes:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(handles.values(), handles.keys(), loc=loc, ncols=ncols)


def _dashes(ax, x, half_width, height, label):
    """What the bar or point at each x is to be compared with."""
    look = {"color": INK, "linewidth": 2, "linestyle": (0, (2, 1)), "zorder": 5}
    ax.hlines(height, x - half_width, x + half_width, label=label, **look)


def plot_confidence_histogram(data, ax):
    """Stacked bars of right and wrong answers by confidence; mean confidence beside accuracy."""
    left, width = data["edges"][:-1], np.diff(data["edges"])
    bars = {"align": "edge", "width": width, "linewidth": 1}
    right, wrong = data["correct"], data["wrong"]
    ax.bar(left, right, label="right", **bars, **_fill(MODEL_COLORS[data["model"]]))
    ax.bar(left, wrong, bottom=right, label="wrong", **bars, **_fill(WRONG_COLOR))
    line = {"color": INK, "linewidth": 1.6}
    ax.axvline(data["overall_confidence"], linestyle="-", label="mean confidence", **line)
    ax.axvline(data["overall_accuracy"], linestyle=":", label="accuracy", **line)
    _percent_axis(ax, "x")
    ax.yaxis.set_major_locator(MaxNLocator(integer=True))
    ax.yaxis.set_major_formatter("{x:,.0f}")


def plot_histogram_figure(data, figure):
    title = f"Confidence of the {MODELS[data['model']]}, {METHODS[data['method']]}"
    body, foot = _frame(figure, title)
    ax = body.subplots()
    plot_confidence_histogram(data, ax)
    ax.set_xlabel(CONFIDENCE_LABEL)
    ax.set_ylabel("test rows")
    ax.set_title(_wide_subtitle(data))
    _legend(foot, [ax], ncols=4)


def plot_histogram_comparison(rows, figure):
    body, foot = _frame(figure, "Confidence before and after fine-tuning, test rows")
    axes = body.subplots(len(rows), len(rows[0]), sharex=True, sharey=True, squeeze=False)
    for row, line in zip(rows, axes, strict=True):
        for data, ax in zip(row, line, strict=True):
            plot_confidence_histogram(data, ax)
            ax.set_title(_narrow_subtitle(data))
        line[0].set_ylabel("test rows")
    for ax in axes[-1]:
        ax.set_xlabel(CONFIDENCE_LABEL)
    _legend(foot, axes.flat, ncols=6)


def plot_reliability(data, ax):
    """A square reliability diagram with the counts of its bins below it.

    Bars: accuracy of the rows in a bin. Points: the same at their mean confidence, with its
    interval. Line: accuracy by confidence without bins (CORP). Grey: at each confidence, where 95 %
    of these lines would lie if the confidences were perfectly calibrated.
    """
    color = MODEL_COLORS[data["model"]]
    filled = data["count"] > 0
    left, width = data["edges"][:-1][filled], np.diff(data["edges"])[filled]
    bars = {"align": "edge", "width": width, "linewidth": 1}
    accuracy, mean_confidence = data["accuracy"][filled], data["mean_confidence"][filled]
    ax.bar(left, accuracy, label="accuracy of the bin", **bars, **_fill(color))
    curve, low, high = (data[f"corp_{key}"] for key in ("confidence", "null_low", "null_high"))
    band = {"color": BAND, "alpha": 0.45, "linewidth": 0, "zorder": 2}
    ax.fill_between(curve, low, high, label="95 % range if perfectly calibrated", **band)
    line = {"color": darker(color, 0.5), "linewidth": 1.8, "zorder": 3}
    ax.plot(curve, data["corp_accuracy"], label="accuracy without bins (CORP)", **line)
    ax.plot([0, 1], [0, 1], color=INK, linewidth=1, linestyle="--", label="accuracy = confidence")
    _whiskers(ax, mean_confidence, data, filled)
    points = {"color": darker(color, 0.5), "markersize": 5, "zorder": 5, "clip_on": False}
    ax.plot(mean_confidence, accuracy, "o", **points)
    ax.set_box_aspect(1)
    _percent_axis(ax, "x")
    _percent_axis(ax, "y")
    ax.tick_params(labelbottom=False)

    strip = ax.inset_axes((0, -0.22, 1, 0.17), sharex=ax)
    count = data["count"][filled]
    strip.bar(left, count, **bars, **_fill(color))
    upright = count.max() >= 100  # three digits are as wide as a bin
    for x, height in zip(left + width / 2, count, strict=True):
        strip.annotate(
            f"{height:,}",
            (x, height),
            xytext=(0, 2),
            textcoords="offset points",
            ha="center",
            va="bottom",
            fontsize=7,
            rotation=90 if upright else 0,
        )
    strip.set_ylim(0, (2.4 if upright else 1.6) * count.max())
    strip.set_yticks([])
    strip.grid(False)
    strip.set_ylabel("rows", fontsize="small")
    strip.set_xlabel(CONFIDENCE_LABEL)


def plot_reliability_figure(panels, figure):
    """One reliability diagram, or several of the same method side by side.

    The squares are placed by hand, in inches: automatic layouts leave gaps around fixed aspects.
    """
    figure.set_layout_engine("none")
    width, height = figure.get_size_inches()
    left, right, top = 0.85, 0.3, 1.2
    side = (width - len(panels) * (left + right)) / len(panels)
    axes = []
    for i, data in enumerate(panels):
        x, y = left + i * (left + side + right), height - top - side
        ax = figure.add_axes((x / width, y / height, side / width, side / height))
        plot_reliability(data, ax)
        ax.set_ylabel("accuracy: share of right answers")
        ax.set_title(_narrow_subtitle(data))
        axes.append(ax)
    title = f"Reliability on test rows, {METHODS[panels[0]['method']]}"
    figure.suptitle(title, y=1 - 0.15 / height, va="top")
    _legend(figure, axes, ncols=2, loc="lower center")


def plot_zones(data, figure):
    """A bar a zone: its accuracy with the interval, its mean confidence, its rows, the action."""
    title = f"What to do with an answer: {MODELS[data['model']]}, {METHODS[data['method']]}"
    body, foot = _frame(figure, title)
    ax = body.subplots()
    filled = data["count"] > 0
    x = np.flatnonzero(filled)
    fill = _fill(MODEL_COLORS[data["model"]])
    ax.bar(x, data["accuracy"][filled], width=0.6, label="accuracy", **fill)
    _whiskers(ax, x, data, filled)
    _dashes(ax, x, 0.4, data["mean_confidence"][filled], "mean confidence")
    names = []
    for i, (_, name, action) in enumerate(ZONES):
        count = data["count"][i]
        lines = [name, f"{count:,} rows ({_percent(count / data['n'])})"]
        if count:
            lines.append(f"accuracy {_percent(data['accuracy'][i])}")
            lines.append(_interval(data["wilson_low"][i], data["wilson_high"][i]))
            lines.append(f"mean confidence {_percent(data['mean_confidence'][i])}")
        else:
            ax.text(i, 0.5, "no rows", ha="center", va="center", color=BAND)
        names.append("\n".join(lines))
        ax.annotate(
            action,
            (i, 1),
            xytext=(0, 6),
            textcoords="offset points",
            ha="center",
            fontsize="large",
            fontweight="bold",
            color=INK,
        )
    ax.set_xticks(range(len(ZONES)), names)
    ax.set_xlim(-0.5, len(ZONES) - 0.5)
    ax.grid(axis="x", visible=False)
    _percent_axis(ax, "y")
    ax.set_ylabel("share of right answers")
    ax.set_xlabel(f"zone of the {CONFIDENCE_LABEL}", labelpad=8)
    ax.set_title(_wide_subtitle(data), pad=30)
    _legend(foot, [ax], ncols=3)


def plot_zone_progression(data, figure):
    """A panel a zone: its accuracy and interval as more test rows are seen."""
    title = f"Accuracy of the zones: {MODELS[data['model']]}, {METHODS[data['method']]}"
    body, foot = _frame(figure, f"{title}, up to n = {data['sizes'][-1]:,} test rows")
    axes = body.subplots(1, len(ZONES), sharey=True)
    color = MODEL_COLORS[data["model"]]
    x = np.arange(len(data["sizes"]))
    keys = ("count", "accuracy", "wilson_low", "wilson_high", "mean_confidence")
    for i, (ax, (_, name, action)) in enumerate(zip(axes, ZONES, strict=True)):
        zone = {key: data[key][:, i] for key in keys}
        filled = zone["count"] > 0
        if filled.any():
            _whiskers(ax, x[filled], zone, filled)
            _dashes(ax, x[filled], 0.3, zone["mean_confidence"][filled], "mean confidence")
            ax.plot(
                x[filled],
                zone["accuracy"][filled],
                "o",
                color=color,
                markeredgecolor=darker(color),
                markersize=10,
                zorder=6,
                clip_on=False,
                label="accuracy",
            )
        else:
            ax.text(0.5, 0.5, "no rows", transform=ax.transAxes, ha="center", color=BAND)
        half = (zone["wilson_high"] - zone["wilson_low"]) / 2
        ax.set_xticks(
            x,
            [
                f"{size:,}\n{count:,}" + (f"\n±{100 * h:.2g}" if count else "\n–")
                for size, count, h in zip(data["sizes"], zone["count"], half, strict=True)
            ],
        )
        ax.set_xlim(-0.5, len(x) - 0.5)
        ax.grid(axis="x", visible=False)
        ax.set_title(f"{name}\n{action}")
    _percent_axis(axes[0], "y")
    axes[0].set_ylabel("share of right answers")
    body.supxlabel(
        "test rows seen; below: rows of them in the zone, half the width of the interval (points)",
        fontsize="medium",
    )
    _legend(foot, axes, ncols=3)


def plot_certified_thresholds(data, figure):
    """A panel a promise: error against automated share, with the certified and the naive one."""
    table = data["automation"]
    title = f"Thresholds that promise right answers: {MODELS[data['model']]}"
    body, foot = _frame(figure, f"{title}, n = {table['n_test']:,} test rows")
    axes = body.subplots(1, len(table["promises"]), sharex=True, sharey=True)
    color = MODEL_COLORS[data["model"]]
    marks = {
        "certified": {"marker": "o", "markersize": 12, "color": darker(color)},
        "naive": {"marker": "X", "markersize": 12, "color": darker(WRONG_COLOR)},
    }
    for ax, row in zip(axes, table["promises"], strict=True):
        ax.axhspan(0, row["alpha"], color=BAND, alpha=0.3, linewidth=0, label="promise kept")
        ax.step(
            data["curve"]["coverage"],
            data["curve"]["risk"],
            where="post",
            color=darker(color),
            linewidth=1.8,
            label="every threshold, on test rows",
        )
        lines = [f"promise: {100 * row['promise']:g} % right"]
        for way, look in marks.items():
            test = row[way]["test"]
            ax.plot([], [], linestyle="none", label=f"{way} threshold", **look)
            if test["automated"] == 0:
                lines += [f"{way}: nothing automated,", "a person answers all"]
                continue
            edge = {"markeredgecolor": "white", "zorder": 6, "clip_on": False}
            ax.plot(test["coverage"], test["risk"], **look, **edge)
            lines.append(f"{way}: {_percent(test['coverage'])} automated,")
            lines.append(f"{_percent(test['risk'])} of them wrong")
        ax.set_title("\n".join(lines))
        _percent_axis(ax, "x")
        ax.set_xlabel("automated test rows")
    highest = max(0.2, *data["curve"]["risk"])
    axes[0].set_ylim(0, np.ceil(10 * highest) / 10)
    _percent_axis(axes[0], "y", whole=False)
    axes[0].set_ylabel("share of wrong answers among them")
    body.supxlabel(
        f"calibrator: {table['calibrator']}, chosen on {table['n_fitting']:,} calibration rows; "
        f"thresholds from {table['n_certifying']:,} others\n"
        f"in {table['n_certifying_groups']:,} near-duplicate groups, δ = {table['delta']:g}",
        fontsize="medium",
    )
    _legend(foot, axes, ncols=4)


def plot_sample_size(data, figure):
    """Four panels against the number of labelled rows; see `decisions.sample_size_curves`."""
    title = f"What more labelled rows buy: {MODELS[data['model']]}"
    body, foot = _frame(figure, f"{title}, n = {data['n_test']:,} test rows", legend_rows=2)
    axes = body.subplots(2, 2, sharex=True)
    (loss, error), (coverage, null) = axes
    n = np.array([size["n"] for size in data["sizes"]])
    colors = {"platt": MODEL_COLORS[data["model"]], "isotonic": COLORS[3]}

    def band(ax, method, bands):
        mean, low, high = (np.array([b[key] for b in bands]) for key in ("mean", "low", "high"))
        ax.fill_between(n, low, high, color=colors[method], alpha=0.35, linewidth=0)
        line = {"color": darker(colors[method]), "markersize": 5, "linewidth": 1.8}
        ax.plot(n, mean, "o-", label=METHODS[method], **line)
        return mean

    for ax, key in ((loss, "log_loss"), (error, "ece")):
        means = [band(ax, m, [size[m][key] for size in data["sizes"]]) for m in colors]
        ax.axhline(data["raw"][key], color=INK, linewidth=1.4, linestyle=":", label="uncalibrated")
        shown = np.array([*np.ravel(means), data["raw"][key]])
        ax.set_ylim(top=shown.max() + 0.3 * np.ptp(shown))  # bands of few rows reach far beyond
    perfect = {"color": INK, "linewidth": 2, "linestyle": (0, (2, 1))}
    error.axhline(data["test_null"]["mean"], label="mean if perfectly calibrated", **perfect)
    certified = [size["certified"] for size in data["sizes"]]
    band(coverage, "platt", [one["coverage"] for one in certified])
    if not any(one["share"] for one in certified):
        middle = {"transform": coverage.transAxes, "ha": "center", "color": BAND}
        coverage.text(0.5, 0.5, "no threshold could be certified", **middle)
    chance = [size["null_ece"] for size in data["sizes"]]
    high = {"color": BAND, "alpha": 0.45, "linewidth": 0}
    likely = "95 % of perfectly calibrated models"
    null.fill_between(n, 0, [one["p95"] for one in chance], label=likely, **high)
    null.plot(n, [one["mean"] for one in chance], label="mean if perfectly calibrated", **perfect)
    loss.set_title("log-loss of calibrators fitted on them")
    error.set_title("calibration error of calibrators fitted on them")
    coverage.set_title(f"automated, {100 * data['promise']:g} % right certified on them")
    null.set_title("calibration error by chance, measured on them")
    loss.set_ylabel("nats, on test rows")
    for ax in (error, null):
        ax.set_ylabel("ECE")
        ax.set_ylim(bottom=0)
        _percent_axis(ax, "y", whole=False)
    _percent_axis(coverage, "y")
    coverage.set_ylabel("share of test rows")
    for ax in axes.flat:
        ax.set_xscale("log")
        ax.set_xticks(n, [f"{size:,}" for size in n], minor=False)
        ax.set_xticks([], minor=True)
    body.supxlabel(
        "labelled rows (logarithmic); coloured bands: 5 to 95 % of "
        f"{data['n_draws']} draws of near-duplicate groups",
        fontsize="medium",
    )
    _legend(foot, axes.flat, ncols=3)


def plot_accuracy_comparison(data, figure):
    """Horizontal bars: all test rows, then each category, one bar a model."""
    body, foot = _frame(figure, f"Accuracy before and after fine-tuning, {METHODS[data['method']]}")
    ax = body.subplots()
    y = np.arange(len(data["names"]))
    height = 0.8 / len(data["models"])
    for i, (name, numbers) in enumerate(data["models"].items()):
        filled = numbers["count"] > 0
        at = y + (i - (len(data["models"]) - 1) / 2) * height
        look = {"label": MODELS[name], **_fill(MODEL_COLORS[name])}
        ax.barh(at[filled], numbers["accuracy"][filled], height=height, **look)
        _whiskers(ax, at[filled], numbers, filled, horizontal=True)
        for j, position in enumerate(at):
            if filled[j]:
                interval = _interval(numbers["wilson_low"][j], numbers["wilson_high"][j])
                text = f"{_percent(numbers['accuracy'][j])} {interval}  n = {numbers['count'][j]:,}"
            else:
                text = "no rows"
            ax.annotate(
                text,
                (1, position),
                xytext=(8, 0),
                textcoords="offset points",
                va="center",
                fontsize="small",
                annotation_clip=False,
            )
    ax.set_yticks(y, [_short(name) for name in data["names"]])
    ax.set_ylim(len(y) - 0.5, -0.5)
    ax.axhline(0.5, color=INK, linewidth=0.8)
    ax.grid(axis="y", visible=False)
    _percent_axis(ax, "x")
    ax.set_xlabel("accuracy: share of right answers among the test rows")
    if data["left_out"]:
        more = f"{data['left_out']:,} more not shown"
        ax.set_ylabel(f"the {len(y) - 1} largest {data['what']}; {more}")
    n = {name: numbers["count"][0] for name, numbers in data["models"].items()}
    ax.set_title(_rows_text(n))
    _legend(foot, [ax], ncols=3)


def plot_confusion(data, figure):
    """A matrix a model: rows are true labels, columns answers; each row adds up to 100 %.

    Beside each other while the numbers have room, else below each other; the height follows.
    """
    k, n = len(data["labels"]), len(data["models"])
    names = [_short(name) for name in data["labels"]]
    longest = max(map(len, names))
    beside = k <= 5 and longest <= 14
    side = min(10 / n - 1.5, 5.5) if beside else min(7.5, 1.5 * k)  # inches
    figure.set_size_inches(10, (side + 1.5) * (1 if beside else n) + 0.6)
    figure.suptitle(f"Which label is taken for which, {METHODS[data['method']]}")
    axes = figure.subplots(*((1, n) if beside else (n, 1)), squeeze=False).flat
    upright = longest * k > (40 if beside else 90)
    for (name, numbers), ax in zip(data["models"].items(), axes, strict=True):
        color = darker(MODEL_COLORS[name], 0.15)
        shades = LinearSegmentedColormap.from_list(name, ["white", color])
        ax.imshow(numbers["share"], cmap=shades, vmin=0, vmax=1)
        for i, j in np.ndindex(k, k):
            share, count = numbers["share"][i, j], numbers["counts"][i, j]
            text = f"{100 * share:.0f} %\n{count:,}" if count else "0"
            weight = "bold" if i == j else "normal"
            size = 11 if k <= 3 else 9
            ax.text(j, i, text, ha="center", va="center", fontsize=size, fontweight=weight)
        rows = numbers["counts"].sum(axis=1)
        ax.set_yticks(range(k), [f"{one}\nn = {m:,}" for one, m in zip(names, rows, strict=True)])
        ax.set_xticks(range(k), names, rotation=90 if upright else 0)
        ax.set_xticks(np.arange(k + 1) - 0.5, minor=True)
        ax.set_yticks(np.arange(k + 1) - 0.5, minor=True)
        ax.grid(which="major", visible=False)
        ax.grid(which="minor", color="white", linewidth=2)
        ax.tick_params(which="both", length=0)
        ax.spines[:].set_visible(False)
        ax.set_ylabel("true label")
        ax.set_xlabel("answer of the model")
        accuracy = _percent(numbers["accuracy"])
        ax.set_title(f"{MODELS[name]}: accuracy {accuracy}\nn = {rows.sum():,} test rows")


def plot_calibration_errors(data, figure):
    """Grouped bars: the ECE of each method, with its interval and what chance alone would give."""
    body, foot = _frame(figure, "Calibration error before and after fine-tuning")
    ax = body.subplots()
    x = np.arange(len(METHODS))
    width = 0.8 / len(data["models"])
    for i, (name, ece) in enumerate(data["models"].items()):
        at = x + (i - (len(data["models"]) - 1) / 2) * width
        look = {"label": MODELS[name], **_fill(MODEL_COLORS[name])}
        ax.bar(at, ece["estimate"], width=width, **look)
        # Not an error bar: the interval of an ECE may lie above the estimate.
        line = {"color": INK, "linewidth": 1.4, "zorder": 4, "label": "95 % interval"}
        ax.vlines(at, ece["low"], ece["high"], **line)
        _dashes(ax, at, width / 2, ece["null_mean"], "mean if perfectly calibrated")
        for position, estimate, low, high in zip(
            at, ece["estimate"], ece["low"], ece["high"], strict=True
        ):
            ax.annotate(
                f"{_percent(estimate)}\n{_interval(low, high)}",
                (position, max(estimate, high)),
                xytext=(0, 5),
                textcoords="offset points",
                ha="center",
                fontsize="small",
            )
    ax.set_xticks(x, METHODS.values())
    ax.grid(axis="x", visible=False)
    ax.margins(y=0.15)
    ax.set_ylim(bottom=0)
    _percent_axis(ax, "y", whole=False)
    ax.set_ylabel("expected calibration error (ECE), lower is better")
    ax.set_title(_rows_text(data["n"]))
    _legend(foot, [ax], ncols=4)


def plot_calibrator_comparison(data, figure):
    """A line a calibrator: its log-loss against that of the raw output, and its ECE."""
    title = "Every calibrator against the raw output"
    body, foot = _frame(figure, title, legend_rows=2)
    gains, errors = body.subplots(1, 2, sharey=True)
    y = np.arange(len(data["names"]))
    height = 0.8 / len(data["models"])
    for i, (name, numbers) in enumerate(data["models"].items()):
        at = y + (i - (len(data["models"]) - 1) / 2) * height
        color = MODEL_COLORS[name]
        fitted = numbers["low"] < numbers["high"]  # all but raw, which differs by 0 from itself
        points = {"markersize": 8, "linestyle": "none", "zorder": 5}
        gains.plot(
            numbers["difference"],
            at,
            "o",
            color=color,
            markeredgecolor=darker(color),
            label=MODELS[name],
            **points,
        )
        line = {"color": INK, "linewidth": 1.4, "zorder": 4, "label": "95 % interval (clustered)"}
        gains.hlines(at[fitted], numbers["low"][fitted], numbers["high"][fitted], **line)
        chosen = numbers["selected"]
        gains.plot(
            numbers["difference"][chosen],
            at[chosen],
            "o",
            color="none",
            markeredgecolor=INK,
            markeredgewidth=1.6,
            label="chosen on the calibration rows",
            **{**points, "markersize": 14},
        )
        errors.barh(at, numbers["ece"], height=height, **_fill(color))
        mark = {"color": INK, "linewidth": 2, "zorder": 5, "label": "mean if perfectly calibrated"}
        errors.vlines(numbers["null_mean"], at - height / 2, at + height / 2, **mark)
    gains.axvline(0, color=INK, linewidth=1, linestyle="--", label="raw output")
    gains.set_yticks(y, [name.replace("_", " ") for name in data["names"]])
    gains.set_ylim(len(y) - 0.5, -0.5)
    gains.xaxis.set_major_locator(MaxNLocator(nbins=5))
    gains.set_xlabel("minus that of the raw output, nats; lower is better")
    gains.set_title("log-loss")
    errors.set_xlim(left=0)
    _percent_axis(errors, "x", whole=False)
    errors.set_xlabel("ECE, lower is better")
    errors.set_title("expected calibration error")
    for ax in (gains, errors):
        ax.grid(axis="y", visible=False)
    body.supxlabel(_rows_text(data["n"]), fontsize="medium")
    _legend(foot, [gains, errors], ncols=3)


def plot_risk_coverage(data, figure):
    """The share of wrong answers among the most confident ones, against how many these are."""
    body, foot = _frame(
        figure, "What the confidence can rank: risk against coverage", legend_rows=2
    )
    ax = body.subplots()
    for name, band in data["bands"].items():
        color = MODEL_COLORS[name]
        ax.fill_between(
            band["coverage"], band["low"], band["high"], color=color, alpha=0.3, linewidth=0
        )
    for (name, method), curve in data["curves"].items():
        aurc = curve["aurc"]
        area = f"{aurc['estimate']:.3f} [{aurc['low']:.3f}, {aurc['high']:.3f}]"
        ax.step(
            curve["coverage"],
            curve["risk"],
            where="post",
            color=darker(MODEL_COLORS[name]),
            linewidth=2,
            linestyle={"raw": "-", "platt": (0, (4, 1.5))}[method],
            label=f"{MODELS[name]}, {method}: AURC {area}",
        )
    _percent_axis(ax, "x")
    ax.set_ylim(bottom=0)
    _percent_axis(ax, "y", whole=False)
    ax.set_xlabel("coverage: share of the test rows answered, the most confident first")
    ax.set_ylabel("risk: share of wrong answers among them")
    ax.set_title(f"{_rows_text(data['n'])}; shaded: 95 % intervals of raw, one by one")
    _legend(foot, [ax], ncols=2)


def plot_training_progress(data, figure):
    """Three panels against the optimizer step: losses, accuracy, calibration error; run by run."""
    chosen, mean = data["chosen_steps"], data["mean_of_runs"]
    steps = " and ".join(f"{step:,}" for step in chosen)
    several = len(chosen) > 1
    kept = (
        f"the mean of the checkpoints of steps {steps}" if several else f"the one of step {steps}"
    )
    body, foot = _frame(figure, f"Fine-tuning: kept was {kept}", legend_rows=2 if mean else 1)
    axes = body.subplots(1, 3)
    color = MODEL_COLORS["finetuned"]
    validation = {"color": darker(color), "marker": "o", "markersize": 5, "linewidth": 1.8}
    training = {"color": darker(COLORS[3]), "marker": "s", "markersize": 4}
    runs = sorted(set(data["run"][~np.isnan(data["run"])]))

    def line(ax, key, **look):
        measured = ~np.isnan(data[key])
        for run in runs:
            of = measured & ((data["run"] == run) | ((run == 1) & np.isnan(data["run"])))
            ax.plot(data["step"][of], data[key][of], **look)
        if mean and key in mean:
            look |= {"marker": "D", "markersize": 8, "linestyle": "none", "label": None}
            ax.plot(data["step"][-1], mean[key], **look)

    line(axes[0], "training_loss", label="training rows", **training)
    line(axes[0], "validation_loss", label="validation rows", **validation)
    line(
        axes[0],
        "validation_calibrated_log_loss",
        label="validation rows, calibrated log-loss",
        linestyle="--",
        **validation,
    )
    line(axes[1], "validation_accuracy", label="validation rows", **validation)
    line(axes[2], "validation_ece", label="validation rows", **validation)
    if mean:
        mark = validation | {"marker": "D", "markersize": 8, "linestyle": "none"}
        axes[0].plot([], [], label=f"mean of the {len(runs)} runs", **mark)
    titles = ("loss (nats)", "accuracy", "expected calibration error (ECE)")
    for ax, title in zip(axes, titles, strict=True):
        for step in chosen:
            label = "checkpoint averaged" if several else "checkpoint kept"
            ax.axvline(step, color=INK, linewidth=1.4, linestyle=":", label=label)
        ax.set_title(title)
        ax.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
        ax.set_ylim(bottom=0)
        ax.set_xlabel("optimizer step")
    _percent_axis(axes[1], "y")
    _percent_axis(axes[2], "y", whole=False)
    _legend(foot, axes, ncols=4)


def plot_agreement(data, figure):
    """A panel a model: samples and wordings that agree with the answer, against its probability."""
    body, foot = _frame(figure, "Does the answer stay? Agreement against token probability", 2)
    axes = body.subplots(1, len(data["models"]), sharey=True, squeeze=False)[0]
    for ax, (name, numbers) in zip(axes, data["models"].items(), strict=True):
        color = MODEL_COLORS[name]
        band = {"color": BAND, "alpha": 0.35, "linewidth": 0, "step": "mid"}
        label = "95 % of independent samples"
        ax.fill_between(numbers["grid"], numbers["low"], numbers["high"], label=label, **band)
        ax.plot(
            numbers["token_probability"],
            numbers["agreement"],
            "o",
            color=darker(color, 0.1),
            alpha=0.35,
            markersize=5,
            markeredgewidth=0,
            clip_on=False,
            label="a test row: share of its samples",
        )
        if worded := numbers["wordings"]:
            filled = worded["count"] > 0
            ax.plot(
                worded["mean_confidence"][filled],
                worded["agreement"][filled],
                "s-",
                color=darker(color, 0.6),
                markersize=6,
                linewidth=1.6,
                zorder=5,
                clip_on=False,
                label="mean share of the wordings",
            )
        ax.plot([0, 1], [0, 1], color=INK, linewidth=1, linestyle="--", label="equal")
        _percent_axis(ax, "x")
        _percent_axis(ax, "y")
        ax.set_xlabel("token probability of the answer")
        n = len(numbers["agreement"])
        samples = f"{numbers['n_samples']} samples each"
        if numbers["temperature"] != 1.0:
            samples += f" at temperature {numbers['temperature']:g}"
        ax.set_title(f"{MODELS[name]}, n = {n:,} test rows, {samples}")
    axes[0].set_ylabel("share that gives the same answer")
    _legend(foot, axes, ncols=2)


def plot_signal_quality(data, figure):
    """A line a method, from cheap to dear: AUROC, log-loss after Platt scaling, time a text."""
    body, foot = _frame(figure, "Every way to ask how sure: quality against cost")
    panels = body.subplots(1, 3, sharey=True)
    y = np.arange(len(data["names"]))
    height = 0.8 / len(data["models"])
    for i, (name, numbers) in enumerate(data["models"].items()):
        at = y + (i - (len(data["models"]) - 1) / 2) * height
        color = MODEL_COLORS[name]
        for ax, key in zip(panels, ("auroc", "log_loss"), strict=False):
            line = {"color": INK, "linewidth": 1.4, "zorder": 4, "label": "95 % interval"}
            ax.hlines(at, numbers[f"{key}_low"], numbers[f"{key}_high"], **line)
            ax.plot(
                numbers[f"{key}_estimate"],
                at,
                "o",
                color=color,
                markeredgecolor=darker(color),
                markersize=8,
                zorder=5,
                label=MODELS[name],
            )
        known = np.isfinite(numbers["milliseconds"])
        panels[2].barh(
            at[known], numbers["milliseconds"][known], height=height, left=0, **_fill(color)
        )
        for position, passes in zip(at[known], numbers["passes"][known], strict=True):
            panels[2].annotate(
                f"{round(passes, 1):g}",
                (0, position),
                xytext=(3, 0),
                textcoords="offset points",
                va="center",
                fontsize=7,
            )
    panels[0].set_yticks(y, [TITLES[name] for name in data["names"]])
    panels[0].set_ylim(len(y) - 0.5, -0.5)
    labels = (
        "AUROC of right against wrong,\nhigher is better",
        "log-loss after Platt scaling,\nnats, lower is better",
        "milliseconds a text\n(in the bar: forward passes)",
    )
    for ax, label in zip(panels, labels, strict=True):
        ax.set_xlabel(label)
        ax.grid(axis="y", visible=False)
        ax.xaxis.set_major_locator(MaxNLocator(nbins=4))
    body.supxlabel(_rows_text(data["n"]), fontsize="medium")
    _legend(foot, panels, ncols=3)


# ------------------------------------------------------------------------------------------ files


@dataclass(frozen=True)
class Chart:
    """One file of the images folder.

    needs: the part of an `Evaluation` without which it cannot be drawn.
    prepare: evaluation → numbers; plot: numbers, empty figure → None; size: inches.
    """

    file: str
    needs: str
    prepare: Callable
    plot: Callable
    size: tuple[float, float]


def _reliability_chart(file, method):
    return Chart(
        f"calibration/{file}.png",
        "base",
        lambda evaluation: [prepare_reliability(evaluation.base, method, evaluation.bins)],
        plot_reliability_figure,
        (6.7, 9.35),
    )


def _reliability_comparison_chart(method):
    return Chart(
        f"fine_tuning/finetuning_{method}_reliability_comparison.png",
        "finetuned",
        lambda evaluation: [
            prepare_reliability(model, method, evaluation.bins) for model in evaluation.models
        ],
        plot_reliability_figure,
        (10, 7.35),
    )


CHARTS = (
    Chart(
        "calibration/raw_confidence_histogram.png",
        "base",
        lambda evaluation: prepare_confidence_histogram(evaluation.base, "raw"),
        plot_histogram_figure,
        (10, 5.6),
    ),
    _reliability_chart("reliability_raw_model_output", "raw"),
    _reliability_chart("reliability_platt_scaling", "platt"),
    _reliability_chart("reliability_isotonic_regression", "isotonic"),
    Chart(
        "calibration/calibrator_comparison.png",
        "base",
        lambda evaluation: prepare_calibrator_comparison(evaluation.models),
        plot_calibrator_comparison,
        (10, 6.4),
    ),
    Chart(
        "calibration/confusion_matrix.png",
        "countable",
        lambda evaluation: prepare_confusion(evaluation.models),
        plot_confusion,
        (10, 5.6),
    ),
    Chart(
        "calibration/risk_coverage.png",
        "base",
        lambda evaluation: prepare_risk_coverage(evaluation.models),
        plot_risk_coverage,
        (10, 6),
    ),
    Chart(
        "calibration/business_reliability.png",
        "base",
        lambda evaluation: prepare_zones(evaluation.models[-1]),
        plot_zones,
        (10, 6.4),
    ),
    Chart(
        "calibration/business_reliability_progression.png",
        "base",
        lambda evaluation: prepare_zone_progression(evaluation.models[-1]),
        plot_zone_progression,
        (10, 5.6),
    ),
    Chart(
        "calibration/certified_thresholds.png",
        "divisible",
        lambda evaluation: prepare_certified_thresholds(evaluation.divisible),
        plot_certified_thresholds,
        (10, 5.8),
    ),
    Chart(
        "calibration/sample_size.png",
        "divisible",
        lambda evaluation: prepare_sample_size(evaluation.divisible),
        plot_sample_size,
        (10, 7.4),
    ),
    Chart(
        "fine_tuning/accuracy_comparison.png",
        "finetuned",
        lambda evaluation: prepare_accuracy_comparison(evaluation.models),
        plot_accuracy_comparison,
        (10, 7.2),
    ),
    Chart(
        "fine_tuning/calibration_error_comparison.png",
        "finetuned",
        lambda evaluation: prepare_calibration_errors(evaluation.models),
        plot_calibration_errors,
        (10, 5.6),
    ),
    Chart(
        "fine_tuning/confidence_distribution_changes.png",
        "finetuned",
        lambda evaluation: prepare_histogram_comparison(evaluation.models),
        plot_histogram_comparison,
        (10, 7.6),
    ),
    _reliability_comparison_chart("raw"),
    _reliability_comparison_chart("platt"),
    _reliability_comparison_chart("isotonic"),
    Chart(
        "fine_tuning/training_progress.png",
        "history",
        prepare_training_progress,
        plot_training_progress,
        (10, 4.4),
    ),
    Chart(
        "calibration/agreement.png",
        "sampled",
        lambda evaluation: prepare_agreement(evaluation.sampled),
        plot_agreement,
        (10, 5.8),
    ),
    Chart(
        "calibration/signal_quality.png",
        "base",
        lambda evaluation: prepare_signal_quality(evaluation.models),
        plot_signal_quality,
        (10, 7.2),
    ),
)


def drawable(evaluation):
    """The charts this evaluation has the numbers for, and those it has not."""
    possible = [chart for chart in CHARTS if getattr(evaluation, chart.needs) is not None]
    return possible, [chart for chart in CHARTS if chart not in possible]


def render(chart, evaluation):
    """The canvas with one chart drawn on it, in the style of the project."""
    numbers = chart.prepare(evaluation)
    with matplotlib.style.context([STYLE, RC], after_reset=True), warnings.catch_warnings():
        # A script that the font lacks shows as boxes; a warning for each character says no more.
        warnings.filterwarnings("ignore", "Glyph .* missing from font", UserWarning)
        figure = Figure(figsize=chart.size, layout="constrained")
        canvas = FigureCanvasAgg(figure)
        chart.plot(numbers, figure)
        canvas.draw()
    return canvas


def draw(chart, evaluation, images_dir):
    """Write the PNG of one chart whole or not at all; the same numbers give the same bytes.

    Returns the path. Raises UserError when it cannot be written.
    """
    path = Path(images_dir) / chart.file
    pixels = np.asarray(render(chart, evaluation).buffer_rgba())
    # 256 colours keep every flat colour as it is and make the file a third as large.
    image = Image.fromarray(pixels).convert("RGB").quantize(256)
    with atomic_path(path) as partial:
        image.save(partial, format="PNG")
    return path


def named(files):
    """The charts of these file names."""
    return [chart for chart in CHARTS if chart.file in files]


def draw_some(chosen, evaluation, images_dir):
    """Draw some charts by themselves, and name each file on stderr.

    The manifest of the folder is removed: it vouches for a whole set of one cache, which
    `generate_all_charts.py` then draws again.
    """
    try:
        (Path(images_dir) / IMAGES_MANIFEST).unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{error}; choose another --images-dir") from error
    for chart in chosen:
        print(draw(chart, evaluation, images_dir), file=sys.stderr)
