"""One command: fine-tune, evaluate on held-out data, calibrate, draw, summarise.

    python run_complete_pipeline.py                                # embedded model, dataset/
    python run_complete_pipeline.py --model llama-3.1-8b --quantization 4bit
    python run_complete_pipeline.py --config my_run.toml
    python run_complete_pipeline.py --data my.csv --question "Is this spam? Answer yes or no." \\
        --labels spam=yes,ham=no --output-dir my_run

Each stage is a script of its own and skips itself when its manifest says that it would make the
same again. A TOML file given by --config holds the same settings under their names in the tables
[task], [model], [data], [training], [evaluation] and [output]; a flag wins over the file.
Exit codes: 0 done, 1 a stage failed, 2 bad usage.
"""

import argparse
import shlex
import subprocess
import sys
import time
import tomllib
from dataclasses import fields
from pathlib import Path

from report import summary_rows, text_table
from settings import (
    ROOT,
    DataSettings,
    EvaluationSettings,
    ModelSettings,
    OutputSettings,
    TaskSettings,
    TrainingSettings,
    UserError,
    add_arguments,
    changed_flags,
    first_type,
    from_arguments,
    settings_table,
)

SETTINGS = (
    TaskSettings,
    ModelSettings,
    DataSettings,
    TrainingSettings,
    EvaluationSettings,
    OutputSettings,
)


def read_config(path):
    """{field name: value} of a TOML file. Raises UserError for what does not belong there."""
    try:
        tables = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid TOML: {error}") from error
    known = {settings_table(cls): {f.name: f for f in fields(cls)} for cls in SETTINGS}
    values = {}
    for table, entries in tables.items():
        if table not in known or not isinstance(entries, dict):
            raise UserError(f"{path}: [{table}] is no table of settings; known: {', '.join(known)}")
        for name, value in entries.items():
            if name not in known[table]:
                names = ", ".join(known[table])
                raise UserError(f"{path}: [{table}] has no setting {name!r}; known: {names}")
            kind = first_type(known[table][name].type)
            if isinstance(value, bool) or not isinstance(
                value, (int, float) if kind is float else kind
            ):
                wanted = {int: "a whole number", float: "a number", str: "text"}[kind]
                raise UserError(f"{path}: [{table}] {name} must be {wanted}, got {value!r}")
            values[name] = value
    return values


def flags(arguments, *classes):
    """The command-line flags of these settings where they differ from their defaults."""
    return [flag for cls in classes for flag in changed_flags(from_arguments(cls, arguments))]


def stages(arguments, output):
    """[(title, script, flags)] in order."""
    adapter = (output.fine_tuned / "manifest.json").exists()
    plan = []
    if not arguments.skip_finetuning:
        force = ["--force-retrain"] if arguments.force_retrain else []
        classes = (TaskSettings, ModelSettings, DataSettings, TrainingSettings, OutputSettings)
        plan.append(("fine-tuning", "fine_tune_model.py", flags(arguments, *classes) + force))
    base_only = ["--base-only"] if arguments.skip_finetuning and not adapter else []
    classes = (TaskSettings, ModelSettings, DataSettings, EvaluationSettings, OutputSettings)
    plan.append(
        ("evaluation", "generate_evaluation_cache.py", flags(arguments, *classes) + base_only)
    )
    if not arguments.skip_images:
        folders = [f"--cache-dir={output.cache}", f"--images-dir={output.images}"]
        plan.append(("charts", "generate_all_charts.py", folders))
    return plan


def run_stages(plan):
    """Run the stages with their output streaming; [(title, seconds)]. Raises UserError."""
    times = []
    for number, (title, script, stage_flags) in enumerate(plan, start=1):
        command = shlex.join(["python", script, *stage_flags])
        print(f"[{number}/{len(plan)}] {title}: {command}", flush=True)
        started = time.perf_counter()
        code = subprocess.run([sys.executable, str(ROOT / script), *stage_flags]).returncode
        times.append((title, time.perf_counter() - started))
        if code != 0:
            raise UserError(
                f"the stage {title!r} ended with exit code {code}; mend what it says above and run "
                "the same command again (what is finished is not done twice)"
            )
        print()
    return times


def parse(argv):
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="Exit codes: 0 done, 1 a stage failed, 2 bad usage.",
    )
    parser.add_argument("--config", metavar="FILE", help="TOML file with settings; flags win")
    parser.add_argument(
        "--skip-finetuning",
        action="store_true",
        help="train nothing: evaluate with the adapter that is there, or the base model alone",
    )
    parser.add_argument("--force-retrain", action="store_true", help="train even if up to date")
    parser.add_argument("--skip-images", action="store_true", help="draw no charts")
    add_arguments(parser, *SETTINGS)
    config = parser.parse_args(argv).config
    if config is not None:
        parser.set_defaults(**read_config(config))
    return parser.parse_args(argv)


def main(argv=None):
    try:
        arguments = parse(argv)
        output = from_arguments(OutputSettings, arguments)
        times = run_stages(stages(arguments, output))
        rows = summary_rows(output.cache)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command continues where it stopped", file=sys.stderr)
        return 1
    header, *body = ([title, *values] for title, values in rows)
    print(text_table(header, body))
    print("\nseconds: " + ", ".join(f"{title} {seconds:.0f}" for title, seconds in times))
    print(f"results: {output.cache}" + ("" if arguments.skip_images else f", {output.images}"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
