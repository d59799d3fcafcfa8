"""SageMaker deployment: archives, the plan, and every call against botocore's own service model."""

import importlib.util
import io
import json
import math
import subprocess
import sys
import tarfile

import pytest

from records import write_json
from settings import ROOT, SENTIMENT, UserError

PATH = ROOT / "scripts" / "deploy_sagemaker.py"
spec = importlib.util.spec_from_file_location("deploy_sagemaker", PATH)
deploy = importlib.util.module_from_spec(spec)
spec.loader.exec_module(deploy)

CREATE = [
    "create",
    *("--name", "how-sure", "--region", "eu-central-1"),
    *("--role", "arn:aws:iam::123456789012:role/Execution"),
    *("--image", "123456789012.dkr.ecr.eu-central-1.amazonaws.com/lmi:1"),
    *("--instance-type", "ml.g5.xlarge", "--price-per-hour", "2.5", "--instances", "2"),
    *("--adapter", "reviews=s3://bucket/reviews.tar.gz"),
    *("--adapter", "mails=s3://bucket/mails.tar.gz"),
]
ARN = "arn:aws:sagemaker:eu-central-1:123456789012:endpoint/how-sure"


def stubbed(service):
    boto3 = pytest.importorskip("boto3")
    from botocore.stub import Stubber

    client = boto3.client(
        service, "eu-central-1", aws_access_key_id="none", aws_secret_access_key="none"
    )
    return client, Stubber(client)


def no_sleep(_):
    pass


@pytest.fixture
def adapter(tmp_path):
    folder = tmp_path / "adapter"
    folder.mkdir()
    for name in deploy.PACKAGED:
        (folder / name).write_bytes(name.encode())
    (folder / "test_set.json").write_text("texts that do not belong into an archive")
    return folder


def test_an_archive_holds_the_adapter_alone_and_is_the_same_each_time(adapter, tmp_path):
    first, second = tmp_path / "1.tar.gz", tmp_path / "2.tar.gz"
    deploy.package(adapter, first)
    deploy.package(adapter, second)
    assert first.read_bytes() == second.read_bytes()
    with tarfile.open(first) as archive:
        assert sorted(archive.getnames()) == sorted(deploy.PACKAGED)
        assert archive.extractfile("task.json").read() == b"task.json"


def test_an_incomplete_adapter_makes_no_archive(adapter, tmp_path):
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"has no adapter_model\.safetensors"):
        deploy.package(adapter, tmp_path / "1.tar.gz")
    assert not (tmp_path / "1.tar.gz").exists()


def test_a_dry_run_says_what_it_costs_and_needs_no_boto3(capsys):
    assert deploy.main(CREATE) == 0
    output = capsys.readouterr().out
    assert "5.00 USD an hour, 120.00 a day, 3,650.00 in 730 hours" in output
    assert output.rstrip().endswith("dry run: nothing was created; --execute does it")
    assert output.index("cost:") > output.rindex("create_inference_component")


def test_without_a_price_nothing_is_planned(capsys):
    arguments = [a for a in CREATE if a not in ("--price-per-hour", "2.5")]
    with pytest.raises(SystemExit) as caught:
        deploy.main(arguments)
    assert caught.value.code == 2
    assert "--price-per-hour" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--name", "how_sure"], "no name for SageMaker"),
        (["--name", "x" * 60], "at most 63 characters"),
        (["--adapter", "a=http://bucket/a.tar.gz"], "must be NAME=s3://"),
        (["--adapter", "reviews=s3://other/a.tar.gz"], "twice"),
        (["--model", "embedded"], "a folder of this machine"),
    ],
)
def test_a_plan_that_cannot_work_is_refused(change, message, capsys):
    assert deploy.main([*CREATE, *change]) == 1
    assert message in capsys.readouterr().err


def stub_creation(stub):
    """Expect the calls of the plan, each followed by a look that finds it being made, then done."""
    for operation, parameters in deploy.creation_plan(deploy.parse_arguments(CREATE)):
        answers = {
            "create_endpoint_config": {"EndpointConfigArn": ARN},
            "create_endpoint": {"EndpointArn": ARN},
            "create_inference_component": {"InferenceComponentArn": ARN},
        }
        stub.add_response(operation, answers[operation], parameters)
        if operation == "create_endpoint_config":
            continue
        for status in ("Creating", "InService"):
            add_description(stub, operation, parameters, status)


def add_description(stub, operation, parameters, status):
    times = {"CreationTime": 0, "LastModifiedTime": 0}
    if operation == "create_endpoint":
        described = {"EndpointName": "how-sure", "EndpointArn": ARN, "EndpointStatus": status}
        stub.add_response(
            "describe_endpoint", described | times, {"EndpointName": parameters["EndpointName"]}
        )
        return
    name = parameters["InferenceComponentName"]
    described = {
        "InferenceComponentName": name,
        "InferenceComponentArn": ARN,
        "InferenceComponentStatus": status,
        "EndpointName": "how-sure",
        "EndpointArn": ARN,
    }
    if status == "Failed":
        described["FailureReason"] = "no memory"
    expected = {"InferenceComponentName": name}
    stub.add_response("describe_inference_component", described | times, expected)


def test_creation_makes_the_planned_calls_and_waits_for_each(capsys):
    client, stub = stubbed("sagemaker")
    stub_creation(stub)
    with stub:
        deploy.create(deploy.parse_arguments([*CREATE, "--execute"]), client, no_sleep)
        stub.assert_no_pending_responses()
    output = capsys.readouterr().out
    assert output.index("cost:") < output.index("in service: how-sure")


def test_adapters_stand_on_the_base_component():
    plan = deploy.creation_plan(deploy.parse_arguments(CREATE))
    components = [p for operation, p in plan if operation == "create_inference_component"]
    names = [c["InferenceComponentName"] for c in components]
    assert names == ["how-sure-base", "how-sure-reviews", "how-sure-mails"]
    for component in components[1:]:
        assert component["Specification"]["BaseInferenceComponentName"] == "how-sure-base"
        assert "ComputeResourceRequirements" not in component["Specification"]


def test_a_failure_says_how_to_remove_what_was_created():
    client, stub = stubbed("sagemaker")
    plan = deploy.creation_plan(deploy.parse_arguments(CREATE))
    stub.add_response("create_endpoint_config", {"EndpointConfigArn": ARN}, plan[0][1])
    stub.add_response("create_endpoint", {"EndpointArn": ARN}, plan[1][1])
    add_description(stub, *plan[1], "InService")
    stub.add_response("create_inference_component", {"InferenceComponentArn": ARN}, plan[2][1])
    add_description(stub, *plan[2], "Failed")
    with stub, pytest.raises(UserError) as caught:
        deploy.create(deploy.parse_arguments([*CREATE, "--execute"]), client, no_sleep)
    assert "no memory" in str(caught.value)
    assert "delete --name how-sure --execute" in str(caught.value)


def test_deletion_takes_adapters_first_and_minds_nothing_that_is_gone():
    client, stub = stubbed("sagemaker")
    listed = [
        {
            "InferenceComponentName": name,
            "InferenceComponentArn": ARN,
            "EndpointName": "how-sure",
            "EndpointArn": ARN,
            "VariantName": "AllTraffic",
            "CreationTime": 0,
            "LastModifiedTime": 0,
        }
        for name in ("how-sure-base", "how-sure-reviews")
    ]
    where = {"EndpointNameEquals": "how-sure"}
    stub.add_response(
        "list_inference_components",
        {"InferenceComponents": listed[:1], "NextToken": "more"},
        where,
    )
    stub.add_response(
        "list_inference_components",
        {"InferenceComponents": listed[1:]},
        where | {"NextToken": "more"},
    )
    for name in ("how-sure-reviews", "how-sure-base"):
        named = {"InferenceComponentName": name}
        stub.add_response("delete_inference_component", {}, named)
        missing = f"Could not find inference component {name}"
        stub.add_client_error("describe_inference_component", "ValidationException", missing)
    stub.add_client_error("delete_endpoint", "ValidationException", "Could not find endpoint")
    stub.add_response("delete_endpoint_config", {}, {"EndpointConfigName": "how-sure"})
    with stub:
        arguments = deploy.parse_arguments(["delete", "--name", "how-sure", "--execute"])
        deploy.delete(arguments, client, no_sleep)
        stub.assert_no_pending_responses()


def test_deletion_without_execute_calls_nothing(capsys):
    assert deploy.main(["delete", "--name", "how-sure"]) == 0
    assert "nothing was deleted" in capsys.readouterr().out


def test_an_error_of_aws_is_one_line():
    client, stub = stubbed("sagemaker")
    stub.add_client_error("list_inference_components", "AccessDeniedException", "not for you")
    arguments = deploy.parse_arguments(["delete", "--name", "how-sure", "--execute"])
    with stub, pytest.raises(UserError, match="not for you"):
        deploy.delete(arguments, client, no_sleep)


def answer_of(tokens):
    from botocore.response import StreamingBody

    body = json.dumps({"generated_text": "Yes", "details": {"top_tokens": [tokens]}}).encode()
    return {"Body": StreamingBody(io.BytesIO(body), len(body)), "ContentType": "application/json"}


def test_an_invocation_sums_the_answer_words(capsys, tmp_path):
    client, stub = stubbed("sagemaker-runtime")
    tokens = [
        {"id": 1, "text": "Yes", "log_prob": math.log(0.5)},
        {"id": 2, "text": "yes", "log_prob": math.log(0.2)},
        {"id": 3, "text": "No", "log_prob": math.log(0.2)},
        {"id": 4, "text": "Maybe", "log_prob": math.log(0.1)},
    ]
    text = "Best worst thing ever"
    prompt = deploy.prompt_of("embedded", SENTIMENT, text)
    assert text in prompt and not prompt.startswith("<|begin_of_text|>")
    body = {
        "inputs": prompt,
        "parameters": {
            "max_new_tokens": 1,
            "do_sample": False,
            "details": True,
            "top_n_tokens": deploy.TOP_TOKENS,
        },
    }
    expected = {
        "EndpointName": "how-sure",
        "InferenceComponentName": "how-sure-reviews",
        "ContentType": "application/json",
        "Body": json.dumps(body).encode(),
    }
    stub.add_response("invoke_endpoint", answer_of(tokens), expected)
    arguments = deploy.parse_arguments(
        [
            *("invoke", text, "--name", "how-sure", "--adapter", "reviews"),
            *("--model", "embedded", "--folder", str(tmp_path)),
        ]
    )
    with stub:
        deploy.invoke(arguments, client)
    answer = json.loads(capsys.readouterr().out)
    assert answer["label"] == "positive"
    assert answer["label_mass"] == pytest.approx(0.9)
    assert answer["probabilities"] == pytest.approx({"positive": 0.7 / 0.9, "negative": 0.2 / 0.9})
    assert answer["calibrated"] is None


def test_a_token_that_begins_words_of_two_labels_counts_for_none():
    from settings import Label, Task

    task = Task("t", "q?", (Label("a", ("posh",)), Label("b", ("post",))))
    sums = deploy.label_sums(task, [{"text": "pos", "log_prob": 0.0}])
    assert sums == {"a": 0.0, "b": 0.0}
    sums = deploy.label_sums(task, [{"text": " posh", "log_prob": 0.0}])
    assert sums == {"a": 1.0, "b": 0.0}


def test_a_control_token_in_the_text_is_refused():
    with pytest.raises(UserError, match="control token"):
        deploy.prompt_of("embedded", SENTIMENT, "a <|eot_id|> b")


def test_the_task_of_the_adapter_is_asked(tmp_path):
    assert deploy.read_adapter_task(tmp_path) == SENTIMENT
    write_json(tmp_path / "task.json", SENTIMENT.to_json() | {"question": "Is it good?"})
    assert deploy.read_adapter_task(tmp_path).question == "Is it good?"
    write_json(tmp_path / "task.json", {})
    with pytest.raises(UserError, match="damaged"):
        deploy.read_adapter_task(tmp_path)


def test_it_runs_as_a_command():
    result = subprocess.run(
        [sys.executable, PATH, "--help"], capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0 and result.stdout.startswith("usage: ")
