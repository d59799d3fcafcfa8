"""Adapters on Amazon SageMaker: one base model, and each adapter an inference component on it.

    python scripts/deploy_sagemaker.py package fine_tuned_sentiment_model --output reviews.tar.gz
    python scripts/deploy_sagemaker.py create --name how-sure --role ROLE_ARN --image IMAGE_URI \\
        --instance-type ml.g5.xlarge --price-per-hour USD --adapter reviews=s3://BUCKET/reviews.tar.gz
    python scripts/deploy_sagemaker.py create ... --execute     # this time it is done
    python scripts/deploy_sagemaker.py invoke --name how-sure --adapter reviews "Best worst thing"
    python scripts/deploy_sagemaker.py delete --name how-sure --execute

`create` and `delete` are dry runs: they print every call and what it costs, and call nothing until
--execute is given. docs/SAGEMAKER_DEPLOYMENT.md describes the steps. Needs: pip install boto3.
Exit codes: 0 done, 1 failed (the last line says what to do), 2 bad usage.
"""

import argparse
import gzip
import io
import json
import math
import re
import sys
import tarfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from records import atomic_path, read_json
from settings import (
    FINE_TUNED_DIR,
    SENTIMENT,
    Task,
    UserError,
    exit_code,
    resolve_model,
)

PACKAGED = ("adapter_config.json", "adapter_model.safetensors", "task.json", "manifest.json")
OPTIONAL = ("calibrator.json",)
NAME = re.compile(r"[a-zA-Z0-9](-*[a-zA-Z0-9])*")
LONGEST_NAME = 63
VARIANT = "AllTraffic"
TOP_TOKENS = 20  # of an answer; a label's words beyond them count as 0
POLL_SEC = 15.0
GIVE_UP_SEC = 3600.0


# --------------------------------------------------------------------------------------- packaging


def package(folder, output):
    """Write `output`, the tar.gz of the adapter in `folder`; equal files give equal archives."""
    folder, output = Path(folder), Path(output)
    names = [name for name in (*PACKAGED, *OPTIONAL) if (folder / name).is_file()]
    if missing := set(PACKAGED) - set(names):
        raise UserError(f"{folder}/ has no {min(missing)}; run: python fine_tune_model.py")
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name in names:
            data = (folder / name).read_bytes()
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode, entry.mtime = len(data), 0o644, 0
            archive.addfile(entry, io.BytesIO(data))
    with atomic_path(output) as partial:
        partial.write_bytes(gzip.compress(buffer.getvalue(), mtime=0))
    print(f"{output}: {', '.join(names)}")
    print(f"next: aws s3 cp {output} s3://YOUR-BUCKET/{output.name}")


# -------------------------------------------------------------------------------------------- plan


def adapter_component(name, adapter):
    return check_name(f"{name}-{adapter}")


def check_name(name):
    if not NAME.fullmatch(name) or len(name) > LONGEST_NAME:
        raise UserError(
            f"{name!r} is no name for SageMaker: letters, digits and single hyphens inside, at "
            f"most {LONGEST_NAME} characters"
        )
    return name


def read_adapters(pairs):
    """{name: S3 address} of NAME=s3://... arguments."""
    adapters = {}
    for pair in pairs:
        name, _, url = pair.partition("=")
        if not url.startswith("s3://") or not url.endswith(".tar.gz"):
            raise UserError(f"--adapter {pair!r} must be NAME=s3://BUCKET/....tar.gz")
        if adapters.setdefault(check_name(name), url) != url:
            raise UserError(f"--adapter names {name!r} twice")
    return adapters


def creation_plan(a):
    """[(operation of the sagemaker client, its parameters)] in order; a: parsed arguments."""
    name, adapters = check_name(a.name), read_adapters(a.adapter)
    model = resolve_model(a.model)
    if Path(model).is_dir():
        raise UserError(
            f"{a.model} is a folder of this machine; SageMaker needs a hub id or an s3:// address"
        )
    environment = {
        "HF_MODEL_ID": model,
        "OPTION_DTYPE": a.dtype,
        "OPTION_ROLLING_BATCH": "vllm",
        "OPTION_ENABLE_LORA": "true",
        "OPTION_MAX_LORAS": str(max(1, len(adapters))),
        "OPTION_MAX_LORA_RANK": str(a.max_rank),
        "SERVING_FAIL_FAST": "true",
    }
    base = f"{name}-base"
    plan = [
        (
            "create_endpoint_config",
            {
                "EndpointConfigName": name,
                "ExecutionRoleArn": a.role,
                "ProductionVariants": [
                    {
                        "VariantName": VARIANT,
                        "InstanceType": a.instance_type,
                        "InitialInstanceCount": a.instances,
                        "RoutingConfig": {"RoutingStrategy": "LEAST_OUTSTANDING_REQUESTS"},
                    }
                ],
            },
        ),
        ("create_endpoint", {"EndpointName": name, "EndpointConfigName": name}),
        (
            "create_inference_component",
            {
                "InferenceComponentName": check_name(base),
                "EndpointName": name,
                "VariantName": VARIANT,
                "Specification": {
                    "Container": {"Image": a.image, "Environment": environment},
                    "ComputeResourceRequirements": {
                        "NumberOfAcceleratorDevicesRequired": a.accelerators,
                        "MinMemoryRequiredInMb": a.memory_mb,
                    },
                },
                "RuntimeConfig": {"CopyCount": a.instances},
            },
        ),
    ]
    plan += [
        (
            "create_inference_component",
            {
                "InferenceComponentName": adapter_component(name, adapter),
                "EndpointName": name,
                "Specification": {
                    "BaseInferenceComponentName": base,
                    "Container": {"ArtifactUrl": url},
                },
            },
        )
        for adapter, url in adapters.items()
    ]
    return plan


def cost_lines(price_per_hour, instance_type, instances):
    """What it costs as long as it exists, from the price that was given."""
    hour = price_per_hour * instances
    return [
        f"cost: {instances} x {instance_type} at {price_per_hour:g} USD an hour, as you said:",
        f"  {hour:,.2f} USD an hour, {24 * hour:,.2f} a day, {730 * hour:,.2f} in 730 hours,",
        "  used or not, until it is deleted; storage, traffic and logs come on top.",
        "  Prices by region: https://aws.amazon.com/sagemaker/ai/pricing/",
    ]


# --------------------------------------------------------------------------------------- execution


def clients(region):
    """(sagemaker, sagemaker-runtime) clients of boto3."""
    try:
        import boto3
        from botocore.config import Config
    except ImportError as error:
        raise UserError("boto3 is not installed; run: pip install boto3") from error
    config = Config(retries={"mode": "standard", "max_attempts": 5})
    names = ("sagemaker", "sagemaker-runtime")
    return tuple(boto3.client(n, region_name=region, config=config) for n in names)


def call(client, operation, parameters):
    """Call AWS; its errors are the user's to mend."""
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        return getattr(client, operation)(**parameters)
    except (BotoCoreError, ClientError) as error:
        raise UserError(f"{operation} failed: {error}") from error


def is_missing(error):
    text = str(error)
    return "Could not find" in text or "does not exist" in text or "NotFound" in text


def wait_for(client, operation, parameters, field, wanted, sleep=time.sleep):
    """Poll until the field of what `operation` describes is `wanted`; None: until it is gone."""
    until = time.monotonic() + GIVE_UP_SEC
    while time.monotonic() < until:
        try:
            described = call(client, operation, parameters)
        except UserError as error:
            if wanted is None and is_missing(error):
                return
            raise
        status = described[field]
        print(f"  {next(iter(parameters.values()))}: {status}", file=sys.stderr)
        if status == wanted:
            return
        if status == "Failed":
            reason = described.get("FailureReason", "no reason given")
            raise UserError(f"{next(iter(parameters.values()))} failed: {reason}")
        sleep(POLL_SEC)
    raise UserError(f"{operation}: not {wanted or 'gone'} within {GIVE_UP_SEC / 60:.0f} minutes")


def wait_after(client, operation, parameters, sleep):
    """What was just created, once it serves."""
    if operation == "create_endpoint":
        named = {"EndpointName": parameters["EndpointName"]}
        wait_for(client, "describe_endpoint", named, "EndpointStatus", "InService", sleep)
    if operation == "create_inference_component":
        named = {"InferenceComponentName": parameters["InferenceComponentName"]}
        wait_for(
            client,
            "describe_inference_component",
            named,
            "InferenceComponentStatus",
            "InService",
            sleep,
        )


def show(plan):
    for operation, parameters in plan:
        print(f"{operation} {json.dumps(parameters, indent=2)}")


def create(arguments, client=None, sleep=time.sleep):
    """Print the plan and its cost; with --execute carry it out."""
    plan = creation_plan(arguments)
    show(plan)
    print(
        "\n".join(
            cost_lines(arguments.price_per_hour, arguments.instance_type, arguments.instances)
        )
    )
    if not arguments.execute:
        print("dry run: nothing was created; --execute does it")
        return
    client = client or clients(arguments.region)[0]
    try:
        for operation, parameters in plan:
            print(operation, file=sys.stderr)
            call(client, operation, parameters)
            wait_after(client, operation, parameters, sleep)
    except (UserError, KeyboardInterrupt) as error:
        raise UserError(
            f"{str(error) or 'interrupted'}; what was created goes on costing, remove it with: "
            f"python scripts/deploy_sagemaker.py delete --name {arguments.name} --execute"
        ) from error
    print(f"in service: {arguments.name}")


def delete(arguments, client=None, sleep=time.sleep):
    """Remove adapters, base component, endpoint and its configuration; what is missing is fine."""
    name = check_name(arguments.name)
    if not arguments.execute:
        print(f"would delete every inference component of the endpoint {name}, adapters first,")
        print(f"the endpoint {name} and the endpoint configuration {name}")
        print("dry run: nothing was deleted; --execute does it")
        return
    client = client or clients(arguments.region)[0]
    components, token = [], {}
    while True:
        page = call(client, "list_inference_components", {"EndpointNameEquals": name} | token)
        components += [c["InferenceComponentName"] for c in page["InferenceComponents"]]
        if "NextToken" not in page:
            break
        token = {"NextToken": page["NextToken"]}
    components.sort(key=lambda component: component == f"{name}-base")  # adapters stand on it
    steps = [
        (
            "delete_inference_component",
            {"InferenceComponentName": component},
            ("describe_inference_component", "InferenceComponentStatus"),
        )
        for component in components
    ]
    steps += [
        ("delete_endpoint", {"EndpointName": name}, ("describe_endpoint", "EndpointStatus")),
        ("delete_endpoint_config", {"EndpointConfigName": name}, None),
    ]
    for operation, parameters, watched in steps:
        print(f"{operation} {next(iter(parameters.values()))}", file=sys.stderr)
        try:
            call(client, operation, parameters)
        except UserError as error:
            if not is_missing(error):
                raise
            continue
        if watched is not None:
            wait_for(client, watched[0], parameters, watched[1], None, sleep)
    print(f"deleted: {name}")


# -------------------------------------------------------------------------------------- invocation


def label_sums(task, tokens):
    """{label: summed probability} of one answer's tokens [{"text", "log_prob"}].

    A label counts the tokens whose text is one of its words, or begins one and no other label's.
    """
    sums = dict.fromkeys(task.label_names, 0.0)
    for token in tokens:
        text = token["text"].strip()
        exact = [label.name for label in task.labels if text in label.words]
        begun = [
            label.name
            for label in task.labels
            if text and any(w.startswith(text) for w in label.words)
        ]
        for names in (exact, begun):
            if len(names) == 1:
                sums[names[0]] += math.exp(token["log_prob"])
                break
    return sums


def invoke(arguments, client=None):
    """Ask the endpoint about one text; print the labels' probabilities as JSON."""
    task, name = read_adapter_task(arguments.folder), check_name(arguments.name)
    component = adapter_component(name, arguments.adapter) if arguments.adapter else f"{name}-base"
    body = {
        "inputs": prompt_of(arguments.model, task, arguments.text),
        "parameters": {
            "max_new_tokens": 1,
            "do_sample": False,
            "details": True,
            "top_n_tokens": TOP_TOKENS,
        },
    }
    client = client or clients(arguments.region)[1]
    parameters = {
        "EndpointName": name,
        "InferenceComponentName": component,
        "ContentType": "application/json",
        "Body": json.dumps(body).encode("utf-8"),
    }
    response = json.loads(call(client, "invoke_endpoint", parameters)["Body"].read())
    try:
        tokens = response["details"]["top_tokens"][0]
        sums = label_sums(task, tokens)
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise UserError(
            f"the container sent no top_tokens ({error!r}); it must be an LMI container whose "
            "answers have details"
        ) from error
    mass = sum(sums.values())
    if mass <= 0:
        raise UserError(f"none of the {TOP_TOKENS} most probable tokens is an answer word")
    print(
        json.dumps(
            {
                "label": max(sums, key=sums.get),
                "probabilities": {label: value / mass for label, value in sums.items()},
                "label_mass": mass,
                "component": component,
                "calibrated": None,
                "calibrated_reason": "no calibrator was fitted for this container and its dtype",
            }
        )
    )


def read_adapter_task(folder):
    path = Path(folder) / "task.json"
    if not path.exists():
        return SENTIMENT
    try:
        return Task.from_json(read_json(path, "run: python fine_tune_model.py"))
    except (KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error!r}); run: python fine_tune_model.py") from error


def prompt_of(model, task, text):
    """The prompt that training and evaluation use, as a string. Raises UserError."""
    from transformers import AutoTokenizer

    from logprobs_confidence import PromptEncoder, text_problem

    if problem := text_problem(text):
        raise UserError(problem)
    try:
        tokenizer = AutoTokenizer.from_pretrained(resolve_model(model), trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0][:200]
        raise UserError(f"cannot load the tokenizer of {model}: {reason}") from error
    encoder = PromptEncoder(tokenizer, task, max_tokens=4096)
    if match := encoder.special.search(text):
        raise UserError(
            f"the text contains {match[0]!r}, a control token of this model, and the container "
            "tokenises prompts as strings; remove it from the text"
        )
    # The container puts the token that begins a text in front itself.
    return encoder.prompt(text.strip()).removeprefix(tokenizer.bos_token or "")


# -------------------------------------------------------------------------------------------- main


def at_least(kind, least):
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be a number, got {text!r}") from None
        if not least <= value < float("inf"):
            raise argparse.ArgumentTypeError(f"must be at least {least} and finite, got {text}")
        return value

    return parse


def parse_arguments(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="Exit codes: 0 done, 1 failed, 2 bad usage.",
    )
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name, help):
        added = commands.add_parser(name, help=help, description=help)
        if name != "package":
            added.add_argument("--name", required=True, help="of the endpoint")
            added.add_argument("--region", help="AWS region (default: that of your configuration)")
        return added

    p = command("package", "write the archive of an adapter")
    p.add_argument("folder", help="of the adapter, as fine_tune_model.py writes it")
    p.add_argument("--output", default="adapter.tar.gz", help="(default: adapter.tar.gz)")

    p = command("create", "create endpoint, base component and adapter components (dry run)")
    p.add_argument("--role", required=True, help="ARN of the execution role")
    p.add_argument("--image", required=True, help="URI of an LMI container with vLLM")
    p.add_argument("--instance-type", required=True, help="for example ml.g5.xlarge")
    p.add_argument(
        "--price-per-hour",
        required=True,
        type=at_least(float, 0),
        help="of one instance in USD, from https://aws.amazon.com/sagemaker/ai/pricing/",
    )
    p.add_argument("--instances", type=at_least(int, 1), default=1, help="(default: 1)")
    p.add_argument(
        "--model", default="llama-3.1-8b", help="preset or hub id (default: llama-3.1-8b)"
    )
    p.add_argument("--dtype", default="bf16", help="of the weights (default: bf16)")
    p.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="NAME=S3URL",
        help="an adapter's archive; can be given several times",
    )
    p.add_argument("--max-rank", type=at_least(int, 1), default=16, help="LoRA rank (default: 16)")
    p.add_argument("--accelerators", type=at_least(int, 1), default=1, help="(default: 1)")
    p.add_argument(
        "--memory-mb", type=at_least(int, 128), default=8192, help="least memory (default: 8192)"
    )
    p.add_argument("--execute", action="store_true", help="do it: this costs money")

    p = command("invoke", "ask a running endpoint about one text")
    p.add_argument("text", metavar="TEXT")
    p.add_argument("--adapter", help="name of the adapter (default: the base model)")
    p.add_argument(
        "--model",
        default="llama-3.1-8b",
        help="whose tokenizer writes the prompt (default as above)",
    )
    p.add_argument(
        "--folder",
        default=str(FINE_TUNED_DIR),
        help="of the adapter, for its task.json (default: fine_tuned_sentiment_model/)",
    )

    p = command("delete", "delete the endpoint and all its components (dry run)")
    p.add_argument("--execute", action="store_true", help="do it")
    return parser.parse_args(arguments)


def main(arguments=None):
    arguments = parse_arguments(arguments)
    if arguments.command == "package":
        return exit_code(package, arguments.folder, arguments.output)
    return exit_code(
        {"create": create, "invoke": invoke, "delete": delete}[arguments.command], arguments
    )


if __name__ == "__main__":
    sys.exit(main())
