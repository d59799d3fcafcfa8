"""Draw every chart of images/ from the numbers of an evaluation cache; no model is loaded.

    python generate_all_charts.py
    python generate_all_charts.py --force
    python generate_all_charts.py --cache-dir my_cache --images-dir my_images

images/manifest.json is written last: it names the cache that was drawn and the files. A second run
on the same cache has nothing to do. Exit codes: 0 done, 1 failed, 2 bad usage.
"""

import argparse
import sys
import time

from records import read_json, write_json
from settings import IMAGES_MANIFEST, UserError, add_cache_arguments

NEEDS = {
    "finetuned": "a fine-tuned model",
    "history": "a training history",
    "countable": "a task of at most 12 labels",
    "sampled": "samples of response consistency that were answers",
    "divisible": "calibration rows of at least 4 near-duplicate groups",
}


def parse_arguments(arguments=None):
    parser = argparse.ArgumentParser(
        description="Draw the charts of an evaluation cache.",
        epilog="Exit codes: 0 done, 1 failed, 2 bad usage.",
    )
    add_cache_arguments(parser)
    parser.add_argument(
        "--force", action="store_true", help="draw again even if the charts are up to date"
    )
    return parser.parse_args(arguments)


def read_manifest(path):
    """What an earlier run wrote, or None. Raises UserError for a file of something else."""
    if not path.exists():
        return None
    next_step = "remove it or choose another --images-dir"
    manifest = read_json(path, next_step)
    files = manifest.get("files")
    if not (
        "cache_fingerprint" in manifest
        and isinstance(files, list)
        and all(isinstance(file, str) for file in files)
    ):
        raise UserError(f"{path} is no manifest of charts; {next_step}")
    return manifest


def generate(cache_dir, images_dir, force):
    started = time.perf_counter()
    next_step = "run: python generate_evaluation_cache.py --force"
    metadata_path = cache_dir / "evaluation_metadata.json"
    fingerprint = read_json(metadata_path, next_step).get("fingerprint")
    if not isinstance(fingerprint, str):
        raise UserError(f"{metadata_path} has no fingerprint; {next_step}")
    manifest_path = images_dir / IMAGES_MANIFEST
    manifest = read_manifest(manifest_path)
    if (
        manifest
        and not force
        and manifest["cache_fingerprint"] == fingerprint
        and all((images_dir / file).exists() for file in manifest["files"])
    ):
        print(f"{images_dir} is up to date with {cache_dir}; --force draws it again")
        return

    import charts

    evaluation = charts.load_evaluation(cache_dir)
    possible, impossible = charts.drawable(evaluation)
    try:
        for chart in possible:
            (images_dir / chart.file).parent.mkdir(parents=True, exist_ok=True)
        if manifest:
            for chart in impossible:  # drawn from an earlier cache: it would tell of another model
                if chart.file in manifest["files"]:
                    (images_dir / chart.file).unlink(missing_ok=True)
            manifest_path.unlink()
    except OSError as error:
        raise UserError(f"{error}; choose another --images-dir") from error
    for chart in possible:
        before = time.perf_counter()
        path = charts.draw(chart, evaluation, images_dir)
        print(f"{path}  {time.perf_counter() - before:.1f} s", flush=True)
    for chart in impossible:
        print(f"left out: {images_dir / chart.file} needs {NEEDS[chart.needs]}")
    write_json(
        manifest_path,
        {"cache_fingerprint": fingerprint, "files": [chart.file for chart in possible]},
    )
    print(f"{len(possible)} charts in {time.perf_counter() - started:.1f} s")


def main(arguments=None):
    settings = parse_arguments(arguments)
    try:
        generate(settings.cache_dir, settings.images_dir, settings.force)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
