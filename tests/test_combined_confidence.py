"""The comparison of all methods as a user runs it: tables, JSON, pictures, mistakes."""

import json
import shutil
import subprocess
import sys
import time
from dataclasses import replace

import pytest
from PIL import Image

from combined_confidence import IMAGES, main, model_text
from records import CONSISTENCY, Prediction, load_results, write_json
from settings import ROOT
from signal_comparison import TITLES, judge_signals
from simulated_cache import simulated_cache


def run(*arguments):
    command = [sys.executable, str(ROOT / "combined_confidence.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_the_script_prints_every_method_and_draws_its_two_pictures(tmp_path):
    cache = simulated_cache("two")
    result = run("--cache-dir", cache, "--images-dir", tmp_path)
    assert result.returncode == 0, result.stderr
    for title in TITLES.values():
        assert result.stdout.count(f"\n{title} ") >= 1
    assert "base model: 1,000 test rows" in result.stdout
    assert "fine-tuned: 1,000 test rows" in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 110
    assert "nan" not in result.stdout.lower().replace("finance", "")
    assert [p for p in IMAGES if (tmp_path / p).exists()] == list(IMAGES)
    for file in IMAGES:
        assert Image.open(tmp_path / file).size[0] == 1500
        assert file in result.stderr


def test_json_holds_the_judged_numbers_of_the_cache(capsys):
    cache = simulated_cache("four")
    assert main(["--cache-dir", str(cache), "--json", "--no-images", "--model=finetuned"]) == 0
    shown = capsys.readouterr()
    kept = json.loads((cache / "calibrated_results.json").read_text(encoding="utf-8"))
    assert json.loads(shown.out) == {"finetuned": kept["models"]["finetuned"]["signals"]}
    assert shown.err == ""


def test_the_analysis_loads_no_model_and_is_quick():
    code = (
        "import sys, combined_confidence as c; "
        f"code = c.main(['--cache-dir', {str(simulated_cache('two'))!r}, '--no-images']); "
        "sys.exit(code or ('torch' in sys.modules) or ('matplotlib' in sys.modules))"
    )
    started = time.process_time()
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert time.process_time() - started < 20


def test_the_text_names_who_wins_and_what_was_left_out():
    cache = simulated_cache("two")
    entry = json.loads((cache / "calibrated_results.json").read_text(encoding="utf-8"))
    table = entry["models"]["base"]["signals"]
    text = " ".join(model_text("base", table).split())
    assert (
        "Left out: Monte-Carlo dropout, entropy under dropout, mutual information: the base" in text
    )
    assert "No part of the blend: verbalised confidence: scored" in text
    assert ", the cheapest good part, and pays for every other" in text
    table["methods"]["p_true"]["label_mass"] = 4e-7
    table["combined"]["selection"]["penalty"] = None
    table["methods"]["margin"]["metrics"]["auroc"] |= {"estimate": None, "low": None, "high": None}
    text = model_text("base", table)
    assert "P(True): the words that are read hold less than 0.1 %" in text
    assert "The blend is P(True) alone" in text
    assert "–" in next(line for line in text.splitlines() if line.startswith("margin"))


def test_samples_that_were_never_an_answer_draw_no_agreement(tmp_path, capsys):
    """A model that says nothing the task asks for: the rest is compared all the same."""
    cache = tmp_path / "cache"
    shutil.copytree(simulated_cache("alone"), cache)
    results = load_results(cache / "base_model_results.json")
    failed = [
        Prediction(p.example_id, CONSISTENCY, error="none of 20 samples was an answer", passes=0.0)
        if p.method == CONSISTENCY
        else p
        for p in results.predictions
    ]
    failed = [replace(p, latency_sec=p.latency_sec or 1e-5) for p in failed]
    results = replace(results, predictions=tuple(failed))
    write_json(cache / "base_model_results.json", results.to_json())
    path = cache / "calibrated_results.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    data["models"]["base"]["signals"] = judge_signals(results, n_resamples=20)
    write_json(path, data)
    assert main(["--cache-dir", str(cache), "--images-dir", str(tmp_path / "images")]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "Left out: consistency of samples, entropy over samples: scored 0 of 60" in out
    drawn = sorted(p.name for p in (tmp_path / "images").rglob("*.png"))
    assert drawn == ["signal_quality.png"]


def test_a_model_that_was_not_evaluated_and_a_missing_cache_are_one_clear_line(tmp_path, capsys):
    alone = ["--cache-dir", str(simulated_cache("alone")), "--no-images"]
    assert main([*alone, "--model", "finetuned"]) == 1
    assert "has no fine-tuned model; run: python fine_tune_model.py" in capsys.readouterr().err
    assert main(alone) == 0
    assert main(["--cache-dir", str(tmp_path), "--no-images"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    with pytest.raises(SystemExit) as caught:
        main(["--model", "both"])
    assert caught.value.code == 2


def test_a_cache_without_judged_signals_names_the_next_step(tmp_path, capsys):
    shutil.copytree(simulated_cache("alone"), tmp_path / "cache")
    path = tmp_path / "cache" / "calibrated_results.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    del data["models"]["base"]["signals"]
    path.write_text(json.dumps(data), encoding="utf-8")
    assert main(["--cache-dir", str(tmp_path / "cache"), "--no-images"]) == 1
    error = capsys.readouterr().err
    assert "base has no 'signals'" in error and "generate_evaluation_cache.py --force" in error
