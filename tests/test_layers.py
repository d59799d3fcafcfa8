"""Imports go down only, libraries stay in their layer, and every command answers --help at once."""

import ast
import json
import resource
import runpy
import subprocess
import sys
import time

import pytest

from settings import ROOT

ENTRY_POINTS = 3
LAYERS = {
    "settings": 0,
    "records": 0,
    "blend": 1,
    "calibration": 1,
    "calibration_metrics": 1,
    "comparison": 1,
    "decisions": 1,
    "dataset_loader": 1,
    "report": 1,
    "risk_control": 1,
    "engine": 2,
    "ray_engine": 2,
    "http_client": 2,
    "openai_backend": 2,
    "table_files": 1,
    "signal_comparison": 1,
    "signals": 1,
    "logprobs_confidence": 2,
    "consistency_confidence": 2,
    "prompted_confidence": 2,
    "sentence_teacher": 2,
    "charts": 2,
    "run_all_tasks": ENTRY_POINTS,
    "serving": 2,  # a folder: each of its files is of this layer
    "run_complete_pipeline": ENTRY_POINTS,
    "fine_tune_model": ENTRY_POINTS,
    "generate_evaluation_cache": ENTRY_POINTS,
    "generate_all_charts": ENTRY_POINTS,
    "business_reliability": ENTRY_POINTS,
    "calibration_demo": ENTRY_POINTS,
    "classify_cli": ENTRY_POINTS,
    "combined_confidence": ENTRY_POINTS,
    "classify_api": ENTRY_POINTS,
    "compare_base_vs_finetuned": ENTRY_POINTS,
    "compare_objectives": ENTRY_POINTS,
    "logprob_demo_cli": ENTRY_POINTS,
    "sample_size_thresholds": ENTRY_POINTS,
    "train_embedded_model": ENTRY_POINTS,
    "update_readme": ENTRY_POINTS,
}
# What a layer may import besides the standard library; layers 2 and 3 may import anything but
# matplotlib, which is for charts alone.
LIBRARIES = {0: {"numpy"}, 1: {"numpy", "scipy", "sklearn", "pandas", "pyarrow"}}
HEAVY = {"torch", "transformers", "peft", "matplotlib", "ray"}  # --help must not wait for them
HELP_CPU_SEC = 1.0
HELP_WALL_SEC = 2.0  # twice that: the machine may be busy with other things

FOLDERS = ("serving",)
FILES = sorted([*ROOT.glob("*.py"), *(p for f in FOLDERS for p in (ROOT / f).glob("*.py"))])
SCRIPTS = [path for path in FILES if "ArgumentParser(" in path.read_text(encoding="utf-8")]


def layer_name(path):
    """The name of a file in LAYERS: its own, or that of its folder."""
    return path.stem if path.parent == ROOT else path.parent.name


# Runs a script as __main__; the last line of stderr names the libraries it had imported at the end.
PROBE = """
import json, runpy, sys
folder, *sys.argv = sys.argv[1:]
sys.path.insert(0, folder)
code = 0
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as end:
    code = end.code
print("\\n" + json.dumps(sorted({m.partition(".")[0] for m in sys.modules})), file=sys.stderr)
sys.exit(code)
"""


def imported(source):
    """{top-level module name: line} of every import statement, those inside functions included."""
    found = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module] if not node.level else []
        else:
            continue
        for name in names:
            found.setdefault(name.partition(".")[0], node.lineno)
    return found


def wrong_arrows(name, source):
    """Imports of project files that go up, or into an entry point."""
    return [
        f"{name}.py:{line} imports {other}, layer {LAYERS[other]}"
        for other, line in imported(source).items()
        if other in LAYERS and (LAYERS[other] == ENTRY_POINTS or LAYERS[other] > LAYERS[name])
    ]


def wrong_libraries(name, source):
    """Imports of libraries that have no place in the layer of this file."""

    def allowed(library):
        if library == "matplotlib":
            return name == "charts"
        return LAYERS[name] not in LIBRARIES or library in LIBRARIES[LAYERS[name]]

    return [
        f"{name}.py:{line} imports {other}, not for layer {LAYERS[name]}"
        for other, line in imported(source).items()
        if other not in LAYERS and other not in sys.stdlib_module_names and not allowed(other)
    ]


def test_every_root_file_is_in_a_layer():
    assert [path.name for path in FILES if layer_name(path) not in LAYERS] == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_imports_go_down_and_never_into_an_entry_point(path):
    if layer_name(path) in LAYERS:
        assert wrong_arrows(layer_name(path), path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_libraries_stay_in_their_layer(path):
    if layer_name(path) in LAYERS:
        assert wrong_libraries(layer_name(path), path.read_text(encoding="utf-8")) == []


def test_the_checks_see_imports_inside_functions_and_in_every_form():
    source = """
import json, os.path as p
def run():
    import generate_evaluation_cache
    from charts import load_evaluation
    if True:
        import torch.nn as nn
"""
    assert wrong_arrows("calibration", source) == [
        "calibration.py:4 imports generate_evaluation_cache, layer 3",
        "calibration.py:5 imports charts, layer 2",
    ]
    assert wrong_arrows("run_complete_pipeline", source) == [
        "run_complete_pipeline.py:4 imports generate_evaluation_cache, layer 3"
    ]
    assert wrong_libraries("calibration", source) == [
        "calibration.py:7 imports torch, not for layer 1"
    ]
    assert wrong_libraries("charts", source) == []
    assert wrong_libraries("settings", "import numpy, scipy") == [
        "settings.py:1 imports scipy, not for layer 0"
    ]
    plots = "from matplotlib import pyplot"
    assert wrong_libraries("charts", plots) == []
    assert wrong_libraries("generate_all_charts", plots) == [
        "generate_all_charts.py:1 imports matplotlib, not for layer 3"
    ]


def test_every_entry_point_has_a_command_line():
    scripts = [p for p in FILES if LAYERS.get(layer_name(p)) == ENTRY_POINTS]
    assert [p.name for p in scripts if p not in SCRIPTS] == []


def run(path, *arguments):
    """(result, wall seconds, CPU seconds) of a script, started as a user would."""
    command = [sys.executable, "-c", PROBE, str(ROOT), str(path), *arguments]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.perf_counter()
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    wall = time.perf_counter() - started
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return result, wall, cpu


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_help_is_quick_and_waits_for_nothing_heavy(path):
    result, wall, cpu = run(path, "--help")
    message, _, modules = result.stderr.rstrip().rpartition("\n")
    assert (result.returncode, message.strip()) == (0, "")
    assert result.stdout.startswith("usage: ")
    assert HEAVY.intersection(json.loads(modules)) == set()
    if cpu >= HELP_CPU_SEC or wall >= HELP_WALL_SEC:  # again: something else may have been at work
        _, wall, cpu = run(path, "--help")
    assert cpu < HELP_CPU_SEC
    assert wall < HELP_WALL_SEC


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_bad_usage_is_exit_code_2(path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(path), "--no-such-flag"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(path), run_name="__main__")
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("usage: ")
