"""The charts: their numbers against brute force, their look, and the command that draws them."""

import contextlib
import io
import itertools
import json
import re
import shutil
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import matplotlib.style
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.container import BarContainer
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from PIL import Image

import charts
import generate_all_charts
from calibration_metrics import clustered_wilson_interval, expected_calibration_error
from comparison import calibrator_comparison
from records import CONSISTENCY, PARAPHRASE, TOKEN_PROBABILITY, ModelResults, load_results
from settings import ROOT, SENTIMENT, Label, Task, UserError
from simulated_cache import CATEGORIES, simulated_cache


@pytest.fixture(scope="module")
def caches():
    """Three evaluation caches: two labels, four labels, and a base model alone."""
    return {name: simulated_cache(name) for name in ("two", "four", "alone")}


@pytest.fixture(scope="module")
def evaluations(caches):
    return {name: charts.load_evaluation(folder) for name, folder in caches.items()}


def model_of(confidence, correct, category=None):
    """A two-label model whose confidences and right answers are given row by row."""
    confidence = np.asarray(confidence, dtype=np.float64)
    label = np.where(correct, 0, 1)
    probabilities = np.stack([confidence, 1 - confidence], axis=1)
    metrics = {
        "ece": {"estimate": 0.1, "low": 0.05, "high": 0.2, "null_mean": 0.08},
        "aurc": {"estimate": 0.1, "low": 0.05, "high": 0.2},
    }
    empty = np.full(len(label), "")
    return charts.ModelEvaluation(
        name="base",
        label=label,
        category=empty if category is None else np.array(category),
        domain=empty,
        group=np.arange(len(label)).astype(str),
        probabilities=dict.fromkeys(charts.METHODS, probabilities),
        metrics=dict.fromkeys(charts.METHODS, metrics),
        results=ModelResults("base", SENTIMENT, {}, (), (), {}),
        entry={},
    )


# Numbers.


@pytest.mark.parametrize("name", ["two", "four"])
def test_confidence_is_the_largest_probability_and_correct_its_label(evaluations, caches, name):
    test = json.loads((caches[name] / "calibrated_results.json").read_text())
    test = test["models"]["finetuned"]["test"]
    rows = test["methods"]["platt"]["probabilities"]
    confidence, correct = evaluations[name].finetuned.confidence("platt")
    assert confidence.tolist() == [max(row) for row in rows]
    expected = [row.index(max(row)) == y for row, y in zip(rows, test["label"], strict=True)]
    assert correct.tolist() == expected


def test_only_test_rows_are_shown(evaluations, caches):
    results = load_results(caches["two"] / "base_model_results.json")
    assert len(results.examples) == 2000
    assert len(evaluations["two"].base.label) == 1000
    arrays = results.arrays("test")
    confidence, correct = evaluations["two"].base.confidence("raw")
    np.testing.assert_array_equal(correct, arrays["correct"])
    np.testing.assert_array_equal(evaluations["two"].base.category, arrays["category"])
    np.testing.assert_allclose(
        confidence, np.maximum(arrays["probability"], 1 - arrays["probability"])
    )


@pytest.mark.parametrize("name", ["two", "four"])
def test_histogram_counts_every_row_once(evaluations, name):
    model = evaluations[name].base
    confidence, correct = model.confidence("raw")
    data = charts.prepare_confidence_histogram(model, "raw")
    assert data["correct"].sum() == correct.sum()
    assert data["wrong"].sum() == (~correct).sum()
    for b in range(20):
        inside = (confidence >= b / 20) & ((confidence < (b + 1) / 20) | (b == 19))
        assert data["correct"][b] == (inside & correct).sum()
        assert data["wrong"][b] == (inside & ~correct).sum()


@pytest.mark.parametrize("name", ["two", "four"])
@pytest.mark.parametrize("method", charts.METHODS)
def test_reliability_bins_add_up_to_the_ece_of_the_title(evaluations, name, method):
    model = evaluations[name].finetuned
    bins = evaluations[name].bins
    data = charts.prepare_reliability(model, method, bins)
    assert len(data["count"]) == bins == {"two": 20, "four": 12}[name]
    filled = data["count"] > 0
    gaps = np.abs(data["accuracy"] - data["mean_confidence"])[filled]
    assert data["count"].sum() == data["n"] == len(model.label)
    assert (gaps * data["count"][filled]).sum() / data["n"] == pytest.approx(
        data["ece"]["estimate"]
    )
    assert data["ece"]["estimate"] == pytest.approx(
        expected_calibration_error(*model.confidence(method), bins)
    )


def test_a_confidence_on_an_edge_belongs_to_the_zone_above():
    data = charts.prepare_zones(
        model_of([1.0, 0.9, 0.8999, 0.7, 0.6999, 0.5], [True, False, True, True, False, False])
    )
    assert data["count"].tolist() == [2, 2, 2, 0]
    assert data["accuracy"][:3].tolist() == [0.5, 1.0, 0.0]
    np.testing.assert_allclose(data["mean_confidence"][:3], [0.95, 0.79995, 0.59995])


def test_a_zone_without_rows_has_no_accuracy():
    data = charts.prepare_zones(model_of([0.95, 0.97], [True, True]))
    assert data["count"].tolist() == [2, 0, 0, 0]
    for key in ("accuracy", "wilson_low", "wilson_high", "mean_confidence"):
        assert np.isnan(data[key][1:]).all()
        assert np.isfinite(data[key][0])


def test_zones_of_four_labels_reach_below_half(evaluations):
    data = charts.prepare_zones(evaluations["four"].base)
    confidence, correct = evaluations["four"].base.confidence("platt")
    below = confidence < 0.5
    assert data["count"][3] == below.sum() > 0
    assert data["accuracy"][3] == pytest.approx(correct[below].mean())
    assert data["wilson_low"][3] < data["accuracy"][3] < data["wilson_high"][3]


@pytest.mark.parametrize(
    ("n", "sizes"),
    [
        (60, [60]),
        (100, [100]),
        (350, [100, 200, 350]),
        (998, [100, 200, 500, 998]),
        (3000, [100, 200, 500, 1000]),
    ],
)
def test_progression_takes_the_sizes_that_fit(n, sizes):
    rng = np.random.default_rng(0)
    data = charts.prepare_zone_progression(model_of(rng.uniform(0.5, 1, n), rng.random(n) < 0.7))
    assert data["sizes"].tolist() == sizes
    assert data["count"].sum(axis=1).tolist() == sizes


def test_progression_ends_at_all_rows_with_shorter_intervals(evaluations):
    model = evaluations["two"].finetuned
    data, whole = charts.prepare_zone_progression(model), charts.prepare_zones(model)
    for key in ("count", "accuracy", "wilson_low", "wilson_high", "mean_confidence"):
        np.testing.assert_allclose(data[key][-1], whole[key])
    assert (np.diff(data["count"], axis=0) >= 0).all()
    width = (data["wilson_high"] - data["wilson_low"])[:, :3]
    assert (width[-1] < width[0] / 2).all()
    again = charts.prepare_zone_progression(model)
    np.testing.assert_array_equal(data["accuracy"], again["accuracy"])
    other = charts.prepare_zone_progression(model, seed=1)
    assert not np.array_equal(data["accuracy"][0], other["accuracy"][0], equal_nan=True)


def test_accuracy_of_each_category_is_its_share_of_right_answers(evaluations):
    models = evaluations["two"].models
    data = charts.prepare_accuracy_comparison(models)
    assert data["names"][0] == "all test rows"
    assert sorted(data["names"][1:]) == sorted(CATEGORIES)
    for model in models:
        _, correct = model.confidence("raw")
        numbers = data["models"][model.name]
        assert numbers["accuracy"][0] == correct.mean()
        for i, category in enumerate(data["names"][1:], start=1):
            rows = model.category == category
            assert numbers["count"][i] == rows.sum()
            assert numbers["accuracy"][i] == pytest.approx(correct[rows].mean())
    gain = data["models"]["finetuned"]["accuracy"] - data["models"]["base"]["accuracy"]
    assert (np.diff(gain[1:]) <= 0).all()


def test_intervals_count_near_duplicates_once(evaluations):
    model = evaluations["two"].finetuned
    _, correct = model.confidence("raw")
    copies = replace(model, group=np.where(correct, "right", "wrong"))  # two groups of copies
    for group_of, wide in ((model, False), (copies, True)):
        data = charts.prepare_accuracy_comparison([group_of])
        expected = clustered_wilson_interval(correct, group_of.group)
        numbers = data["models"]["finetuned"]
        assert (numbers["wilson_low"][0], numbers["wilson_high"][0]) == expected
        diagram = charts.prepare_reliability(group_of, "raw")
        filled = diagram["count"] > 1
        width = (diagram["wilson_high"] - diagram["wilson_low"])[filled]
        assert (width.min() > 0.5) == wide


@pytest.mark.parametrize("name", ["two", "four", "alone"])
def test_calibrators_are_compared_with_the_numbers_of_the_report(evaluations, name):
    models = evaluations[name].models
    data = charts.prepare_calibrator_comparison(models)
    for model in models:
        table, numbers = calibrator_comparison(model), data["models"][model.name]
        assert data["names"] == [row["name"] for row in table["calibrators"]]
        assert data["names"][numbers["selected"]] == table["selection"]["chosen"]
        assert [numbers[key][0] for key in ("difference", "low", "high")] == [0, 0, 0]  # raw
        for i, row in enumerate(table["calibrators"][1:], start=1):
            log_loss = row["difference"]["log_loss"]
            assert numbers["difference"][i] == log_loss["estimate"]
            assert (numbers["low"][i], numbers["high"][i]) == (log_loss["low"], log_loss["high"])
            assert numbers["ece"][i] == row["metrics"]["ece"]["estimate"]
            assert numbers["null_mean"][i] == row["metrics"]["ece"]["null_mean"]


def test_risk_at_full_coverage_is_the_error_of_all_test_rows(evaluations):
    models = evaluations["two"].models
    data = charts.prepare_risk_coverage(models)
    assert list(data["curves"]) == [(m.name, method) for m in models for method in ("raw", "platt")]
    for model in models:
        for method in ("raw", "platt"):
            confidence, correct = model.confidence(method)
            curve = data["curves"][model.name, method]
            assert curve["coverage"][-1] == 1
            assert curve["risk"][-1] == pytest.approx(1 - correct.mean())
            half = np.searchsorted(curve["coverage"], 0.5)
            sure = confidence >= curve["threshold"][half]
            assert curve["risk"][half] == pytest.approx(1 - correct[sure].mean())
            assert curve["aurc"] == model.metrics[method]["aurc"]
        band = data["bands"][model.name]
        assert band["coverage"][-1] == 1
        assert band["low"][-1] < 1 - model.confidence("raw")[1].mean() < band["high"][-1]


def test_only_the_largest_categories_are_shown():
    category = [f"c{i:02}" for i in range(20) for _ in range(i + 1)]
    model = model_of([0.8] * len(category), [True] * len(category), category)
    data = charts.prepare_accuracy_comparison([model])
    assert sorted(data["names"][1:]) == [f"c{i:02}" for i in range(8, 20)]
    assert data["left_out"] == 8
    assert data["models"]["base"]["count"][0] == len(category)


def test_rows_without_categories_are_shown_by_label():
    data = charts.prepare_accuracy_comparison([model_of([0.8, 0.7, 0.9], [True, False, True])])
    assert (data["names"][0], data["what"]) == ("all test rows", "labels")
    of = data["models"]["base"]
    by_name = dict(zip(data["names"], zip(of["count"], of["accuracy"], strict=True), strict=True))
    assert by_name == {"all test rows": (3, 2 / 3), "positive": (2, 1.0), "negative": (1, 0.0)}
    with_category = model_of([0.8, 0.7], [True, False], ["a", "a"])
    assert charts.prepare_accuracy_comparison([with_category])["what"] == "categories"


@pytest.mark.parametrize("name", ["two", "four"])
def test_the_confusion_matrix_counts_every_row_once(evaluations, name):
    models = evaluations[name].models
    data = charts.prepare_confusion(models)
    assert data["labels"] == models[0].results.task.label_names
    for model in models:
        of, answered = data["models"][model.name], model.probabilities["raw"].argmax(axis=1)
        for i, j in np.ndindex(of["counts"].shape):
            assert of["counts"][i, j] == ((model.label == i) & (answered == j)).sum()
        np.testing.assert_allclose(of["share"].sum(axis=1), 1)
        assert of["counts"].trace() == of["accuracy"] * len(model.label)


def test_a_label_without_test_rows_has_an_empty_line_in_the_confusion_matrix():
    of = charts.prepare_confusion([model_of([0.8, 0.7], [True, True])])["models"]["base"]
    assert of["counts"].tolist() == [[2, 0], [0, 0]]
    assert of["share"][0].tolist() == [1, 0] and np.isnan(of["share"][1]).all()


def labels_of(k, name):
    """A base model of k labels called `name` and a number, three test rows a label."""
    task = Task("many", "Which?", tuple(Label(f"{name}{i}", (f"w{i}",)) for i in range(k)))
    row = model_of([0.8] * 3 * k, [True] * 3 * k)
    return replace(
        row,
        label=np.arange(3 * k) % k,
        probabilities={"raw": np.random.default_rng(k).dirichlet(np.ones(k), 3 * k)},
        results=replace(row.results, task=task),
    )


@pytest.mark.parametrize(
    ("k", "name"), [(2, "a rather long name of a label "), (5, "five "), (12, "kind ")]
)
def test_a_confusion_matrix_shows_every_count_and_stays_inside_its_picture(evaluations, k, name):
    base = labels_of(k, name)
    many = replace(evaluations["two"], base=base, finetuned=replace(base, name="finetuned"))
    (chart,) = charts.named(["calibration/confusion_matrix.png"])
    figure = charts.render(chart, many).figure
    counts = charts.prepare_confusion([base])["models"]["base"]["counts"]
    for ax in figure.axes:
        shown = [text.get_text().split("\n")[-1] for text in ax.texts]
        assert shown == [str(count) for count in counts.ravel()]
    for words, box in visible_texts(figure):
        assert figure.bbox.containsx(box.x0) and figure.bbox.containsx(box.x1), words
        assert figure.bbox.containsy(box.y0) and figure.bbox.containsy(box.y1), words
    assert figure.get_figwidth() == 10


def test_too_many_labels_have_no_confusion_matrix(evaluations):
    (chart,) = charts.named(["calibration/confusion_matrix.png"])
    for k, possible in ((12, True), (13, False)):
        many = replace(evaluations["two"], base=labels_of(k, "k"))
        assert (getattr(many, chart.needs) is not None) == possible
    assert f"{charts.MOST_LABELS} labels" in generate_all_charts.NEEDS[chart.needs]


def test_a_category_one_model_failed_on_has_no_accuracy():
    first = model_of([0.8, 0.7, 0.9], [True, True, True], ["a", "a", "b"])
    second = replace(model_of([0.8, 0.7], [True, False], ["a", "a"]), name="finetuned")
    data = charts.prepare_accuracy_comparison([first, second])
    at = data["names"].index("b")
    assert data["models"]["finetuned"]["count"][at] == 0
    assert np.isnan(data["models"]["finetuned"]["accuracy"][at])
    assert data["models"]["base"]["accuracy"][at] == 1


def test_calibration_errors_are_those_of_the_cache(evaluations):
    data = charts.prepare_calibration_errors(evaluations["two"].models)
    for model in evaluations["two"].models:
        for i, method in enumerate(charts.METHODS):
            for key, values in data["models"][model.name].items():
                assert values[i] == model.metrics[method]["ece"][key]


def test_a_loss_that_was_not_measured_is_nan(evaluations):
    data = charts.prepare_training_progress(evaluations["two"])
    assert np.isnan(data["training_loss"][0])
    assert np.isfinite(data["training_loss"][1:]).all()
    assert data["chosen_steps"] == [450] and data["mean_of_runs"] is None


def test_every_run_of_a_training_is_a_line_and_their_mean_a_mark(evaluations):
    """The last five passes become a second run, whose line does not begin where the first ends."""
    one = evaluations["two"]
    numbers = {"validation_loss": 0.2, "validation_accuracy": 0.9, "validation_ece": 0.03}
    mean = numbers | {"validation_calibrated_log_loss": 0.19}
    run = np.where(one.history["step"] > 300, 2.0, one.history["run"])
    history = one.history | {"run": run}
    two = replace(one, history=history, chosen_steps=[225, 600], mean_of_runs=mean)
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    charts.plot_training_progress(charts.prepare_training_progress(two), figure)
    accuracy = next(ax for ax in figure.findobj(Axes) if ax.get_title() == "accuracy")
    first, second, mark, *averaged = accuracy.get_lines()
    assert list(first.get_xdata()) == list(one.history["step"][:5])
    assert list(second.get_xdata()) == list(one.history["step"][5:])
    assert (list(mark.get_xdata()), list(mark.get_ydata())) == ([675], [0.9])
    assert [line.get_xdata()[0] for line in averaged] == [225, 600]
    shown = " ".join(words for words, _ in visible_texts(figure))
    assert "the mean of the checkpoints of steps 225 and 600" in shown
    assert "mean of the 2 runs" in shown and "checkpoint averaged" in shown


# Pictures.

# Their numbers come from calibration rows and from bootstraps, which no single row allows.
FROM_MANY_ROWS = {
    f"calibration/{name}.png"
    for name in (
        "calibrator_comparison",
        "certified_thresholds",
        "sample_size",
        "agreement",
        "signal_quality",
    )
}


def visible_texts(figure):
    """Every text a reader sees, as (words, box in pixels)."""
    texts = [text for legend in figure.findobj(Legend) for text in legend.get_texts()]
    for part in (figure, *figure.subfigs):
        texts += [t for t in (part._suptitle, part._supxlabel) if t is not None]
    for ax in figure.findobj(Axes):
        texts += [ax.title, ax.xaxis.label, ax.yaxis.label, *ax.texts]
        for axis in (ax.xaxis, ax.yaxis):
            low, high = sorted(axis.get_view_interval())
            texts += [
                tick.label1
                for tick in axis.get_major_ticks()
                if low <= tick.get_loc() <= high and tick.label1.get_visible()
            ]
    return [
        (t.get_text(), t.get_window_extent()) for t in texts if t.get_visible() and t.get_text()
    ]


def bars(ax):
    return [container for container in ax.containers if isinstance(container, BarContainer)]


@pytest.fixture(scope="module")
def figures(evaluations):
    """{cache: {file: figure}} of every chart; a warning while drawing is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return {
            name: {
                chart.file: charts.render(chart, evaluation).figure
                for chart in charts.drawable(evaluation)[0]
            }
            for name, evaluation in evaluations.items()
        }


@pytest.mark.parametrize("name", ["two", "four", "alone"])
def test_every_text_lies_inside_the_picture_and_on_no_other(figures, name):
    for file, figure in figures[name].items():
        texts = visible_texts(figure)
        assert len(texts) > 10
        for words, box in texts:
            inside = figure.bbox.containsx(box.x0) and figure.bbox.containsx(box.x1)
            inside &= figure.bbox.containsy(box.y0) and figure.bbox.containsy(box.y1)
            assert inside, f"{file}: {words!r} leaves the picture"
        for (first, box), (second, other) in itertools.combinations(texts, 2):
            shrunk = box.shrunk(0.9, 0.9)
            assert not shrunk.overlaps(other), f"{file}: {first!r} lies on {second!r}"


def test_titles_state_n_and_the_ece_with_its_yardsticks(figures):
    ece = re.compile(r"ECE [\d.]+ % \[[\d.]+, [\d.]+\]; if perfectly calibrated [\d.]+ %")
    stated = 0
    for file, figure in figures["four"].items():
        if file == "fine_tuning/training_progress.png":  # of validation rows
            continue
        titles = [ax.get_title() for ax in figure.findobj(Axes)]
        for part in (figure, *figure.subfigs):
            titles += [part.get_suptitle(), part.get_supxlabel()]
        assert any("n = 300" in title for title in titles), file
        for title in titles:
            if "ECE" in title:
                assert ece.search(title), title
                stated += 1
    assert stated == 1 + 3 + 1 + 4 + 3 * 2  # histogram, reliability, zones, comparisons


def test_reliability_diagrams_are_square_and_share_their_axes(figures, evaluations):
    figure = figures["two"]["fine_tuning/finetuning_raw_reliability_comparison.png"]
    squares = [ax for ax in figure.axes if ax.get_ylabel().startswith("accuracy")]
    assert len(squares) == 2
    for ax, model in zip(squares, ("base", "finetuned"), strict=True):
        box = ax.get_window_extent()
        assert box.width == pytest.approx(box.height, rel=1e-3)
        assert ax.get_xlim() == ax.get_ylim() == (0, 1)
        data = charts.prepare_reliability(getattr(evaluations["two"], model), "raw")
        heights = [bar.get_height() for bar in bars(ax)[0]]
        np.testing.assert_allclose(heights, data["accuracy"][data["count"] > 0])
        bar = bars(ax)[0][0]
        assert bar.get_facecolor()[:3] == to_rgb(charts.MODEL_COLORS[model])
        np.testing.assert_allclose(
            bar.get_edgecolor()[:3], 0.7 * np.array(to_rgb(charts.MODEL_COLORS[model]))
        )
        strip = ax.child_axes[0]
        counts = [int(text.get_text().replace(",", "")) for text in strip.texts]
        assert counts == data["count"][data["count"] > 0].tolist()


def test_base_is_colour_0_and_fine_tuned_colour_1():
    cycle = matplotlib.style.library["seaborn-v0_8-pastel"]["axes.prop_cycle"]
    colors = cycle.by_key()["color"]
    assert charts.MODEL_COLORS["base"] == colors[0]
    assert charts.MODEL_COLORS["finetuned"] == colors[1]


def test_zones_without_rows_say_so(figures):
    ax = figures["two"]["calibration/business_reliability.png"].axes[0]
    assert [text.get_text() for text in ax.texts].count("no rows") == 1  # two labels: none below ½
    assert len(bars(ax)[0]) == 3
    assert ax.get_ylim() == (0, 1)


def test_a_single_row_is_drawn(evaluations):
    row = model_of([0.8], [True], ["a"])
    evaluation = replace(evaluations["two"], base=row, finetuned=replace(row, name="finetuned"))
    drawn = {
        chart.plot: charts.render(chart, evaluation)
        for chart in charts.CHARTS
        if chart.file not in FROM_MANY_ROWS
    }
    assert len(drawn) == 10  # one of each kind


def test_no_threshold_is_drawn_from_rows_that_cannot_be_divided(evaluations):
    alone = evaluations["alone"]
    examples = tuple(replace(e, group="one") for e in alone.base.results.examples)
    results = replace(alone.base.results, examples=examples)
    few = replace(alone, base=replace(alone.base, results=results))
    left_out = {chart.file for chart in charts.drawable(few)[1]}
    left_out -= {chart.file for chart in charts.drawable(alone)[1]}
    assert left_out == {"calibration/certified_thresholds.png", "calibration/sample_size.png"}


def test_category_names_are_shown_as_they_are(evaluations):
    names = ["costs $5_{ to $10", "b", "a name far too long for the margin of a picture"]
    row = model_of([0.8, 0.7, 0.6], [True, False, True], names)
    evaluation = replace(evaluations["two"], base=row, finetuned=replace(row, name="finetuned"))
    chart = next(c for c in charts.CHARTS if c.file.endswith("accuracy_comparison.png"))
    shown = [words for words, _ in visible_texts(charts.render(chart, evaluation).figure)]
    assert "costs $5_{ to $10" in shown
    assert "a name far too long for the…" in shown


# Signals.


def test_agreement_is_the_share_of_samples_and_wordings_that_give_the_answer(evaluations):
    for evaluation in evaluations.values():
        for name, numbers in charts.prepare_agreement(evaluation.sampled)["models"].items():
            results = getattr(evaluation, name).results
            test = {e.id for e in results.examples if e.split == "test"}
            of = {m: {} for m in (TOKEN_PROBABILITY, CONSISTENCY, PARAPHRASE)}
            for p in results.predictions:
                if p.method in of and p.example_id in test:
                    of[p.method][p.example_id] = p
            names = results.task.label_names
            own = of[TOKEN_PROBABILITY]
            drawn = [i for i in own if of[CONSISTENCY][i].error is None]
            expected = [
                of[CONSISTENCY][i].label_counts[names.index(own[i].predicted)] / 20 for i in drawn
            ]
            np.testing.assert_allclose(numbers["agreement"], expected)
            np.testing.assert_allclose(
                numbers["token_probability"], [own[i].confidence for i in drawn]
            )
            inside = np.interp(numbers["token_probability"], numbers["grid"], numbers["low"])
            assert (numbers["agreement"] >= inside - 0.05).mean() > 0.95
            worded = numbers["wordings"]
            assert worded["count"].sum() == len(own)
            shares = [
                np.mean([np.argmax(q) == names.index(own[i].predicted) for q in p.pass_logprobs])
                for i, p in of[PARAPHRASE].items()
            ]
            mean = np.nansum(worded["agreement"] * worded["count"]) / len(own)
            assert mean == pytest.approx(np.mean(shares))


def test_quality_runs_from_cheap_to_dear_and_ends_with_the_blend(evaluations):
    data = charts.prepare_signal_quality(evaluations["two"].models)
    cost = np.fmax(*(numbers["milliseconds"] for numbers in data["models"].values()))
    assert data["names"][-1] == "combined" and (np.diff(cost[:-1]) >= 0).all()
    base = data["models"]["base"]
    at = data["names"].index("mc_dropout")
    assert np.isnan(base["auroc_estimate"][at]) and np.isnan(base["passes"][at])
    for name, numbers in data["models"].items():
        methods = getattr(evaluations["two"], name).entry["signals"]["methods"]
        for i, method in enumerate(data["names"]):
            if method in methods:
                for key in ("auroc", "log_loss"):
                    for part in ("estimate", "low", "high"):
                        assert numbers[f"{key}_{part}"][i] == methods[method]["metrics"][key][part]


# Damaged caches.


def damage(folder, tmp_path, file, change):
    """A copy of a cache in which `change` was applied to the JSON of one file."""
    copy = tmp_path / "damaged"
    shutil.copytree(folder, copy)
    data = json.loads((copy / file).read_text())
    change(data)
    (copy / file).write_text(json.dumps(data))
    return copy


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        (
            "calibrated_results.json",
            lambda d: d["models"]["base"]["test"]["ids"].__setitem__(0, "e0"),
            "'e0' is no test row",
        ),
        (
            "calibrated_results.json",
            lambda d: d["models"]["base"]["test"]["label"].__setitem__(
                0, (d["models"]["base"]["test"]["label"][0] + 1) % 4
            ),
            "its labels differ",
        ),
        (
            "calibrated_results.json",
            lambda d: (
                d["models"]["base"]["test"]["methods"]["platt"]["probabilities"][3].reverse()
                or d["models"]["base"]["test"]["methods"]["platt"]["probabilities"][3].append(0.5)
            ),
            "base platt probabilities must",
        ),
        (
            "calibrated_results.json",
            lambda d: d["models"]["base"]["test"]["methods"]["raw"]["probabilities"].pop(),
            "base raw probabilities must",
        ),
        (
            "calibrated_results.json",
            lambda d: d["models"]["base"]["test"]["methods"].pop("isotonic"),
            "no 'isotonic'",
        ),
        (
            "calibrated_results.json",
            lambda d: d["models"]["base"]["test"]["methods"]["raw"]["metrics"]["ece"].update(
                null_mean=None
            ),
            "the ECE of raw has no null_mean",
        ),
        (
            "calibrated_results.json",
            lambda d: d["models"]["finetuned"]["identity"].update(fingerprint="other"),
            "finetuned_model_results.json is of another model",
        ),
        ("calibrated_results.json", lambda d: d.update(schema_version=99), "has schema 99, not "),
        ("calibrated_results.json", lambda d: d.pop("models"), "no 'models'"),
        (
            "evaluation_metadata.json",
            lambda d: d["training"].update(chosen_steps=[75, 451]),
            "the chosen steps [451] are not in the history",
        ),
        (
            "evaluation_metadata.json",
            lambda d: d["training"]["history"][2].pop("validation_ece"),
            "no 'validation_ece'",
        ),
        (
            "evaluation_metadata.json",
            lambda d: d["settings"]["evaluation"].update(bins=0),
            "bins must be an integer of at least 1, got 0",
        ),
    ],
)
def test_damaged_caches_are_refused(caches, tmp_path, file, change, message):
    folder = damage(caches["four"], tmp_path, file, change)
    with pytest.raises(UserError) as caught:
        charts.load_evaluation(folder)
    assert message in str(caught.value)
    assert file in str(caught.value)
    assert "run: python generate_evaluation_cache.py" in str(caught.value)


# The command.

FILES = [
    *(
        f"calibration/{name}.png"
        for name in (
            "raw_confidence_histogram",
            "reliability_raw_model_output",
            "reliability_platt_scaling",
            "reliability_isotonic_regression",
            "calibrator_comparison",
            "confusion_matrix",
            "risk_coverage",
            "business_reliability",
            "business_reliability_progression",
            "certified_thresholds",
            "sample_size",
        )
    ),
    *(
        f"fine_tuning/{name}.png"
        for name in (
            "accuracy_comparison",
            "calibration_error_comparison",
            "confidence_distribution_changes",
            "finetuning_raw_reliability_comparison",
            "finetuning_platt_reliability_comparison",
            "finetuning_isotonic_reliability_comparison",
            "training_progress",
        )
    ),
    "calibration/agreement.png",
    "calibration/signal_quality.png",
]


ALONE = [file for file in FILES if file.startswith("calibration/")]  # with a base model only


def run(*arguments, code=None):
    start = (
        [sys.executable, "generate_all_charts.py"] if code is None else [sys.executable, "-c", code]
    )
    return subprocess.run(
        [*start, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, timeout=60
    )


def take_from(figures, monkeypatch):
    """Pictures of the caches are not drawn once more: they are those of `figures`."""

    def rendered(chart, evaluation):
        return figures["alone" if evaluation.finetuned is None else "two"][chart.file].canvas

    monkeypatch.setattr(charts, "render", rendered)


@pytest.fixture(scope="module")
def drawn(caches, figures, tmp_path_factory):
    """The images folder of the two-label cache, and what the command printed that made it."""
    images, shown = tmp_path_factory.mktemp("drawn") / "images", io.StringIO()
    arguments = ["--cache-dir", str(caches["two"]), "--images-dir", str(images)]
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(shown):
        take_from(figures, patch)
        assert generate_all_charts.main(arguments) == 0
    return images, shown.getvalue()


def files_below(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def test_command_draws_without_a_model(caches, tmp_path):
    """As a user runs it, but for a few charts; test_run_complete_pipeline.py draws them all."""
    code = (
        "import sys, charts, generate_all_charts as g\n"
        "charts.CHARTS = charts.named(sys.argv.pop().split())\n"
        "code = g.main(sys.argv[1:])\n"
        "unwanted = {'torch', 'transformers', 'peft', 'matplotlib.pyplot'} & set(sys.modules)\n"
        "sys.exit(f'imported {unwanted}' if unwanted else code)"
    )
    few = [ALONE[0], "calibration/sample_size.png", "calibration/signal_quality.png"]
    flags = ["--cache-dir", caches["alone"], "--images-dir", tmp_path]
    result = run(*flags, " ".join(few), code=code)
    assert (result.returncode, result.stderr) == (0, "")
    assert {*few, "manifest.json"} == set(files_below(tmp_path))


def test_command_draws_every_chart(drawn):
    images, shown = drawn
    lines = shown.splitlines()
    assert [line.split("  ")[0] for line in lines[:-1]] == [str(images / f) for f in FILES]
    assert re.fullmatch(rf"{len(FILES)} charts in \d+\.\d s", lines[-1])
    assert files_below(images) == sorted([*FILES, "manifest.json"])


def test_pictures_are_wide_and_small(drawn):
    images, _ = drawn
    for file in FILES:
        width, _ = Image.open(images / file).size
        assert width >= 1000, file
        assert (images / file).stat().st_size < 200_000, file


def test_manifest_names_the_cache_and_the_files(drawn, caches):
    images, _ = drawn
    metadata = json.loads((caches["two"] / "evaluation_metadata.json").read_text())
    manifest = json.loads((images / "manifest.json").read_text())
    assert manifest == {"cache_fingerprint": metadata["fingerprint"], "files": FILES}


def test_the_same_cache_gives_the_same_bytes(drawn, evaluations, tmp_path):
    images, _ = drawn
    for chart in (charts.CHARTS[1], charts.CHARTS[4]):
        again = charts.draw(chart, evaluations["two"], tmp_path)
        assert again.read_bytes() == (images / chart.file).read_bytes(), chart.file


@pytest.fixture
def images(drawn, tmp_path):
    """A copy of the drawn folder that a test may change."""
    return Path(shutil.copytree(drawn[0], tmp_path / "images"))


def test_a_second_run_has_nothing_to_do(images, caches, capsys):
    before = {f: (images / f).stat().st_mtime_ns for f in files_below(images)}
    arguments = ["--cache-dir", str(caches["two"]), "--images-dir", str(images)]
    assert generate_all_charts.main(arguments) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert "up to date" in line
    assert {f: (images / f).stat().st_mtime_ns for f in files_below(images)} == before


@pytest.fixture
def few(monkeypatch):
    """The first two charts of ALONE are all that there are."""
    monkeypatch.setattr(charts, "CHARTS", charts.named(ALONE[:2]))


def test_a_missing_picture_is_drawn_again(images, caches, few):
    (images / FILES[0]).unlink()
    manifest = {"cache_fingerprint": "sentiment-120-False", "files": ALONE}
    (images / "manifest.json").write_text(json.dumps(manifest))
    arguments = ["--cache-dir", str(caches["alone"]), "--images-dir", str(images)]
    assert generate_all_charts.main(arguments) == 0
    assert (images / FILES[0]).exists()


def test_pictures_of_an_earlier_cache_do_not_stay(images, caches, figures, monkeypatch, capsys):
    take_from(figures, monkeypatch)
    (images / "fine_tuning" / "my_own.png").write_bytes(b"mine")
    arguments = ["--cache-dir", str(caches["alone"]), "--images-dir", str(images)]
    assert generate_all_charts.main(arguments) == 0
    assert files_below(images) == sorted([*ALONE, "fine_tuning/my_own.png", "manifest.json"])
    left_out = [line for line in capsys.readouterr().out.splitlines() if "left out" in line]
    assert len(left_out) == len(FILES) - len(ALONE)
    assert "accuracy_comparison.png needs a fine-tuned model" in left_out[0]
    assert "training_progress.png needs a training history" in left_out[-1]
    assert json.loads((images / "manifest.json").read_text())["files"] == ALONE


def test_force_draws_again(images, caches, few):
    (images / FILES[0]).write_bytes(b"spoilt")
    manifest = {"cache_fingerprint": "sentiment-120-False", "files": ALONE}
    (images / "manifest.json").write_text(json.dumps(manifest))
    arguments = ["--cache-dir", str(caches["alone"]), "--images-dir", str(images)]
    assert generate_all_charts.main(arguments) == 0
    assert (images / FILES[0]).read_bytes() == b"spoilt"
    assert generate_all_charts.main([*arguments, "--force"]) == 0
    assert (images / FILES[0]).read_bytes() != b"spoilt"


def test_a_failed_run_leaves_no_manifest(images, caches, few, capsys):
    (images / FILES[1]).unlink()
    (images / FILES[1]).mkdir()  # a folder where a picture belongs
    arguments = ["--cache-dir", str(caches["two"]), "--images-dir", str(images), "--force"]
    assert generate_all_charts.main(arguments) == 1
    assert capsys.readouterr().err.startswith(f"error: cannot write {images / FILES[1]}")
    assert not (images / "manifest.json").exists()
    assert not list(images.rglob("*.partial"))


def test_an_images_dir_that_is_a_file_is_refused(caches, tmp_path, capsys):
    (tmp_path / "images").write_text("")
    arguments = ["--cache-dir", str(caches["two"]), "--images-dir", str(tmp_path / "images")]
    assert generate_all_charts.main(arguments) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert line.endswith("choose another --images-dir")


def test_a_missing_cache_is_one_line_and_exit_code_1(tmp_path):
    result = run("--cache-dir", tmp_path / "nowhere", "--images-dir", tmp_path)
    assert result.returncode == 1
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert "run: python generate_evaluation_cache.py" in line


def test_a_damaged_cache_leaves_the_pictures_alone(images, caches, tmp_path, capsys):
    folder = damage(
        caches["two"],
        tmp_path,
        "evaluation_metadata.json",
        lambda d: d.update(training={}, fingerprint="new"),
    )
    (folder / "calibrated_results.json").write_text("{")
    before = files_below(images)
    arguments = ["--cache-dir", str(folder), "--images-dir", str(images)]
    assert generate_all_charts.main(arguments) == 1
    assert "calibrated_results.json is damaged" in capsys.readouterr().err
    assert files_below(images) == before


@pytest.mark.parametrize(
    "text", ['{"name": "a web page"}', '{"cache_fingerprint": "", "files": 5}', "not JSON"]
)
def test_a_manifest_of_something_else_is_not_overwritten(caches, tmp_path, capsys, text):
    (tmp_path / "manifest.json").write_text(text)
    arguments = ["--cache-dir", str(caches["two"]), "--images-dir", str(tmp_path), "--force"]
    assert generate_all_charts.main(arguments) == 1
    assert "choose another --images-dir" in capsys.readouterr().err
    assert files_below(tmp_path) == ["manifest.json"]
    assert (tmp_path / "manifest.json").read_text() == text


def test_bad_usage_is_exit_code_2():
    result = run("--images")
    assert result.returncode == 2
    assert "Traceback" not in result.stderr


def test_help_imports_nothing_heavy():
    code = (
        "import sys, generate_all_charts as g\n"
        "try:\n    g.main(['--help'])\n"
        "except SystemExit as end:\n"
        "    heavy = {'matplotlib', 'scipy', 'sklearn', 'torch'} & set(sys.modules)\n"
        "    sys.exit(f'imported {heavy}' if heavy else end.code)"
    )
    result = run(code=code)
    assert (result.returncode, result.stderr) == (0, "")
    assert "--force" in result.stdout
