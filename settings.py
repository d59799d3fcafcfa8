"""Contracts: tasks, prompts, model presets, paths and the settings of every stage.

Layer 0: standard library only, nothing here loads a model or a file of data. Every default of the
project is stated in this module, once.
"""

import hashlib
import json
import re
import string
import sys
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent
DATASET_DIR = ROOT / "dataset"
TASKS_DIR = ROOT / "tasks"
EMBEDDED_MODEL_DIR = ROOT / "embedded_model"
FINE_TUNED_DIR = ROOT / "fine_tuned_sentiment_model"
CACHE_DIR = ROOT / "evaluation_cache"
IMAGES_DIR = ROOT / "images"
IMAGES_MANIFEST = "manifest.json"  # in the folder of the charts

SPLITS = ("train", "validation", "calibration", "test")

# Short names for `--model`. Any other hub id or local folder works as well.
MODEL_PRESETS = {
    "embedded": str(EMBEDDED_MODEL_DIR),
    "smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "qwen2.5-0.5b": "Qwen/Qwen2.5-0.5B-Instruct",
    "llama-3.2-1b": "meta-llama/Llama-3.2-1B-Instruct",
    "gemma-2-2b": "google/gemma-2-2b-it",
    "phi-3-mini": "microsoft/Phi-3-mini-4k-instruct",
    "qwen2.5-7b": "Qwen/Qwen2.5-7B-Instruct",
    "mistral-7b": "mistralai/Mistral-7B-Instruct-v0.3",
    "llama-3.1-8b": "meta-llama/Llama-3.1-8B-Instruct",
    "glm-4-9b": "zai-org/glm-4-9b-chat-hf",
}


class UserError(Exception):
    """A mistake the user can mend: its message names what is wrong and the next step."""


def resolve_model(name):
    """Hub id or folder for a preset name; any other string is returned as it is."""
    return MODEL_PRESETS.get(name, name)


def fingerprint(value):
    """First 16 hex digits of the SHA-256 of `value` as canonical JSON."""
    canonical = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(canonical.encode("utf-8")).hexdigest()[:16]


@dataclass(frozen=True)
class Label:
    """One answer of a task: its name in the data and the words a model may say for it.

    In a lettered task the one word is the text of its option.
    """

    name: str
    words: tuple[str, ...]

    def __post_init__(self):
        if isinstance(self.words, str):
            raise TypeError(f"words must be a sequence of strings, got the string {self.words!r}")
        object.__setattr__(self, "words", tuple(self.words))
        if not self.name or not self.words or not all(w.strip() for w in self.words):
            raise UserError(f"label {self.name!r} needs a name and at least one answer word")


@dataclass(frozen=True)
class Task:
    """A question about a text and its possible answers; K = len(labels) ≥ 2, in fixed order.

    For two labels the first one is the class that `P(...)`, the signed margin and the calibrators
    speak of: P(positive) for sentiment. A question that contains `{text}` is the whole message;
    any other is followed by the text.
    lettered: the labels are offered as options A, B, C, ... below the question and answered with a
    letter; see `orders`. wordings: other questions with the same answers; negated: questions to
    which the two labels answer with each other's words. They serve the paraphrase method alone.
    """

    name: str
    question: str
    labels: tuple[Label, ...]
    wordings: tuple[str, ...] = ()
    negated: tuple[str, ...] = ()
    lettered: bool = False

    def __post_init__(self):
        for key in ("labels", "wordings", "negated"):
            object.__setattr__(self, key, tuple(getattr(self, key)))
        others = (*self.wordings, *self.negated)
        if len({question.strip() for question in others}) < len(others):
            raise UserError(f"task {self.name!r} has a wording twice; leave one out")
        for question in (self.question, *others):
            if not question.strip():
                raise UserError(f"task {self.name!r} has an empty question")
            slots = re.findall(r"\{\w*\}", question)
            if slots not in ([], ["{text}"]):
                raise UserError(
                    f"the question {question!r} of task {self.name!r} has {', '.join(slots)}; the "
                    "one slot it may have is {text}, once (without it the text follows the "
                    "question)"
                )
        if self.negated and (self.lettered or len(self.labels) != 2):
            what = "lettered options" if self.lettered else f"{len(self.labels)} labels"
            raise UserError(
                f"task {self.name!r} has {what}; negated questions swap the answer words of two "
                "labels, so leave them out"
            )
        if len(self.labels) < 2:
            raise UserError(
                f"task {self.name!r} has {len(self.labels)} label, at least 2 are needed"
            )
        seen = {}
        for label in self.labels:
            if self.label_names.count(label.name) > 1:
                raise UserError(f"task {self.name!r} names the label {label.name!r} twice")
            for word in label.words:
                if seen.setdefault(word, label.name) != label.name:
                    raise UserError(
                        f"answer word {word!r} belongs to both {seen[word]!r} and {label.name!r}"
                    )
        if self.lettered:
            self._check_options()

    def _check_options(self):
        if len(self.labels) > len(LETTERS):
            raise UserError(
                f"task {self.name!r} has {len(self.labels)} labels; lettered options go from A to "
                f"Z, {len(LETTERS)} at most"
            )
        for label in self.labels:
            if len(label.words) != 1 or "{text}" in label.words[0]:
                raise UserError(
                    f"label {label.name!r} of the lettered task {self.name!r} needs exactly one "
                    f"word, the text of its option, got {', '.join(map(repr, label.words))}"
                )

    @property
    def label_names(self):
        return tuple(label.name for label in self.labels)

    @property
    def orders(self):
        """The plain tasks that this one asks: itself or, if it is lettered, K of them.

        In order s, from 0 to K − 1, label k stands at letter k + s, counted on from A after the
        last: over all orders every label is once at every letter, so a preference for a letter or
        a place cancels out of the mean. The labels stay in the order of the task.
        Source: Zheng et al. 2024, cyclic permutations, https://arxiv.org/abs/2309.03882
        """
        if not self.lettered:
            return (self,)
        k = len(self.labels)
        return tuple(self._with_letters([LETTERS[(i + s) % k] for i in range(k)]) for s in range(k))

    def _with_letters(self, letters):
        """The plain task with these letters of the labels."""
        options = dict(zip(letters, self.labels, strict=True))
        listed = "\n".join(f"{letter}. {options[letter].words[0]}" for letter in sorted(options))
        return Task(
            self.name,
            f"{self.question}\n\n{listed}\n\nAnswer with one letter.",
            tuple(
                Label(label.name, (letter,))
                for letter, label in zip(letters, self.labels, strict=True)
            ),
        )

    @property
    def asked(self):
        """This task without its other wordings: what training and its plain answers depend on."""
        return replace(self, wordings=(), negated=())

    def user_message(self, text):
        """What the user's turn of the chat says; the prompt is this inside the chat template."""
        if "{text}" in self.question:
            return self.question.replace("{text}", text)
        return f"{self.question}\n\nText: {text}"

    def to_json(self):
        return asdict(self)

    @classmethod
    def from_json(cls, data):
        labels = tuple(Label(item["name"], item["words"]) for item in data["labels"])
        return cls(
            name=data["name"],
            question=data["question"],
            labels=labels,
            wordings=data.get("wordings", ()),
            negated=data.get("negated", ()),
            lettered=data.get("lettered", False),
        )


LETTERS = string.ascii_uppercase  # of the options of a lettered task


def case_variants(word):
    """The surface forms of an answer word that are summed: Yes, yes, YES."""
    return tuple(dict.fromkeys([word[:1].upper() + word[1:].lower(), word.lower(), word.upper()]))


SENTIMENT = Task(
    name="sentiment",
    question="Is this text positive in sentiment? Answer yes or no.",
    labels=(
        Label("positive", case_variants("yes")),
        Label("negative", case_variants("no")),
    ),
    wordings=(
        "Is the sentiment of this text positive? Answer yes or no.",
        "Does this text express a positive opinion? Answer yes or no.",
        "Did the writer like it? Answer yes or no.",
    ),
    negated=(
        "Is this text negative in sentiment? Answer yes or no.",
        "Does this text express a negative opinion? Answer yes or no.",
    ),
)


def setting(default, help, **extra):
    """A dataclass field that also describes its command-line flag."""
    return field(default=default, metadata={"help": help, **extra})


@dataclass(frozen=True)
class TaskSettings:
    """The question; without flags it is sentiment."""

    task: str | None = setting(
        None, "name of a task in tasks/, or a JSON file like those there (default: sentiment)"
    )
    question: str | None = setting(None, "question put to the model about each text")
    labels: str | None = setting(
        None,
        "label names in order, each with its answer word: spam=yes,ham=no "
        "(a name alone is its own answer word)",
    )
    task_name: str | None = setting(None, "name of the task in files and charts")

    def build(self):
        """The `Task` of these settings. Raises UserError for what is no task."""
        own = (self.question, self.labels, self.task_name)
        if self.task is not None:
            if own != (None, None, None):
                raise UserError("--task brings its own question and labels; leave the flags out")
            return read_task(self.task)
        if own == (None, None, None):
            return SENTIMENT
        if self.question is None or self.labels is None:
            raise UserError("a task of your own needs both --question and --labels")
        labels = []
        for part in self.labels.split(","):
            name, _, word = part.strip().partition("=")
            if not name.strip():
                raise UserError(f"--labels {self.labels!r} has an empty label name")
            labels.append(Label(name.strip(), case_variants(word.strip() or name.strip())))
        return Task(self.task_name or "custom", self.question, tuple(labels))


def read_task(name):
    """The task called `name` in tasks/, or of the JSON file `name`.

    The file holds {"name", "question", "labels": [{"name", "words"}]}; without "words" a label is
    answered with its own name, as in `case_variants`. It may hold "lettered", true or false, and
    "wordings" and "negated", lists of questions. Raises UserError for anything else.
    """
    path = Path(name) if name.endswith(".json") else TASKS_DIR / f"{name}.json"
    known = ", ".join(sorted(p.stem for p in TASKS_DIR.glob("*.json")))
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"cannot read the task {path}: {error.strerror}; the shipped tasks are: {known}"
        ) from error
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error
    questions = {"wordings", "negated"}
    _check_keys(path, "a task", data, {"name", "question", "labels"}, {"lettered", *questions})
    for key in questions & set(data):
        _check_texts(path, f"the questions {key!r} of a task", data[key])
    if not isinstance(lettered := data.get("lettered", False), bool):
        raise UserError(f"{path}: lettered must be true or false, got {lettered!r}")
    if not isinstance(data["labels"], list):
        raise UserError(f"{path}: labels must be a list, got {type(data['labels']).__name__}")
    labels = []
    for item in data["labels"]:
        _check_keys(path, "a label", item, required={"name"}, optional={"words"})
        name = str(item["name"])
        words = item.get("words", [name] if lettered else case_variants(name))
        _check_texts(path, f"the words of label {item['name']!r}", words)
        labels.append({"name": item["name"], "words": words})
    task = Task.from_json(data | {"labels": labels})
    if task.question in task.wordings + task.negated:
        raise UserError(f"{path}: a wording repeats the question {task.question!r}; leave it out")
    return task


def _check_texts(path, what, value):
    """Raises UserError unless `value` is a list of texts."""
    if not isinstance(value, list | tuple) or not all(isinstance(text, str) for text in value):
        raise UserError(f"{path}: {what} must be a list of texts, got {value!r}")


def _check_keys(path, what, data, required, optional=frozenset()):
    """Raises UserError unless `data` is an object with these keys, its name and question texts."""
    if not isinstance(data, dict):
        raise UserError(f"{path}: {what} must be an object, got {type(data).__name__}")
    if missing := required - set(data):
        raise UserError(f"{path}: {what} has no {min(missing)!r}")
    if unknown := set(data) - required - set(optional):
        allowed = ", ".join(sorted(required | set(optional)))
        raise UserError(
            f"{path}: {what} has the unknown key {min(unknown)!r}; it may have {allowed}"
        )
    for key in {"name", "question"} & set(data):
        if not isinstance(data[key], str):
            raise UserError(f"{path}: the {key} of {what} must be text, got {data[key]!r}")


@dataclass(frozen=True)
class ModelSettings:
    """Which model is asked, and where it runs. `check` says whether the settings fit together."""

    model: str = setting(
        "embedded", f"preset ({', '.join(MODEL_PRESETS)}), hub id or local folder of the model"
    )
    backend: str = setting(
        "local",
        "local, or openai: an OpenAI-compatible server (vLLM, SGLang, llama.cpp) has the model and "
        "calls it --model; docs/SCALING.md",
    )
    base_url: str | None = setting(
        None,
        "address of that server's API, such as http://127.0.0.1:8000/v1; if it wants a key, it is "
        "that of OPENAI_API_KEY",
    )
    tokenizer: str | None = setting(
        None,
        "folder or hub id of the tokenizer of that server's model (default: --model, where it is a "
        "preset, a folder or a hub id)",
    )
    concurrency: int = setting(32, "requests that this server works on at the same time")
    device: str = setting("auto", "auto, cuda, mps or cpu")
    dtype: str = setting(
        "auto",
        "auto (float32 on a CPU, so that machines agree), fastest (float32 or bfloat16, tried out "
        "on this CPU), float32, bfloat16 or float16",
    )
    quantization: str = setting("none", "none, 8bit or 4bit (bitsandbytes)")
    batch_tokens: int | None = setting(
        None,
        "most tokens of a batch at evaluation, padding included (default: 1024 on a CPU, 16384 on "
        "a GPU, fewer where memory is short)",
    )
    max_tokens: int = setting(4096, "longest prompt in tokens; longer texts lose their middle")
    attention: str = setting("auto", "auto, eager, sdpa, flash_attention_2 or flash_attention_3")
    device_map: str = setting(
        "none", "none (one device), or auto, balanced or sequential: spread over the GPUs there are"
    )

    def check(self):
        """Raises UserError for a setting of one backend that is given with the other."""
        if self.backend not in BACKENDS:
            raise UserError(f"--backend must be {' or '.join(BACKENDS)}, got {self.backend!r}")
        for name in BACKENDS[OPENAI if self.backend == LOCAL else LOCAL]:
            if getattr(self, name) != getattr(ModelSettings, name):
                flag = name.replace("_", "-")
                raise UserError(
                    f"--{flag} is not for --backend {self.backend}; leave it out, or change "
                    "--backend"
                )
        if self.backend == OPENAI and self.base_url is None:
            raise UserError(
                "--backend openai needs --base-url, the address of the server's API; it is like "
                "http://127.0.0.1:8000/v1"
            )
        if self.concurrency < 1:
            raise UserError(f"--concurrency must be at least 1, got {self.concurrency}")


LOCAL, OPENAI = "local", "openai"
BACKENDS = {  # where the model can be, with the settings that only this backend reads
    LOCAL: ("device", "dtype", "quantization", "batch_tokens", "attention", "device_map"),
    OPENAI: ("base_url", "tokenizer", "concurrency"),
}


@dataclass(frozen=True)
class DataSettings:
    """Where the labelled examples are and how they are divided."""

    data: str | None = setting(
        None, "CSV, JSONL or Parquet file of your own (default: the files of dataset/)"
    )
    text_column: str = setting("text", "column of the text")
    label_column: str = setting("label", "column of the label")
    category_column: str | None = setting(None, "column by which results are also broken down")
    split_seed: int = setting(42, "seed of the division into splits")


# What fine-tuning can minimise, each with the settings that it alone reads; docs/OBJECTIVES.md.
OBJECTIVES = {
    "cross-entropy": (),
    "label-smoothing": ("label_smoothing",),
    "focal": ("focal_gamma",),
    "brier": (),
    "multi-task": (),
}


@dataclass(frozen=True)
class TrainingSettings:
    """LoRA fine-tuning. The defaults suit the embedded model; `for_model` adapts them."""

    rank: int | None = setting(None, "LoRA rank (default: 64 below 1 billion parameters, else 8)")
    alpha: int | None = setting(
        None, "LoRA alpha; the update is scaled by alpha / rank (default: twice the rank)"
    )
    dropout: float | None = setting(
        None,
        "LoRA dropout, of features of a whole text, 0 to 1 "
        "(default: 0.3 below 1 billion parameters, else 0.1)",
    )
    target_modules: str | None = setting(
        None,
        "modules that get an adapter: all-linear, all-linear+embeddings, or names joined by commas "
        "(default: all-linear+embeddings below 1 billion parameters, else all-linear)",
    )
    learning_rate: float | None = setting(
        None, "peak learning rate (default: 3e-4 below 1 billion parameters, else 2e-4)"
    )
    epochs: int | None = setting(
        None, "passes over the training rows (default: 1 below 1 billion parameters, else 2)"
    )
    soup: int | None = setting(
        None,
        "runs from one start, each in an order of its own, whose weights are averaged "
        "(default: 2 below 1 billion parameters, else 1)",
    )
    batch_size: int = setting(16, "rows of one forward pass")
    accumulation: int = setting(1, "forward passes of one optimizer step")
    warmup_fraction: float = setting(0.05, "share of the steps with a rising learning rate")
    weight_decay: float = setting(0.01, "AdamW weight decay")
    evaluations_per_epoch: int = setting(2, "validation passes an epoch")
    patience: int = setting(2, "validation passes without improvement before training stops")
    train_seed: int = setting(42, "seed of initialisation, order and dropout")
    objective: str = setting(
        "cross-entropy", f"what training minimises: {', '.join(OBJECTIVES)}; docs/OBJECTIVES.md"
    )
    label_smoothing: float = setting(  # Szegedy et al. 2016 and Müller et al. 2019 take 0.1
        0.1, "share of the target that label-smoothing divides among all labels, 0 to 1"
    )
    focal_gamma: float = setting(  # the best of Lin et al. 2017
        2.0, "power of (1 − p) by which focal weights a row; 0 is cross-entropy"
    )

    def relevant(self):
        """{name: value} of the settings that the adapter depends on.

        A parameter of another objective is left out, and so is the objective where it is plain
        cross-entropy: that adapter is the same as before there was a choice.
        """
        own = OBJECTIVES.get(self.objective, ())
        left_out = {name for names in OBJECTIVES.values() for name in names} - set(own)
        if self.objective == TrainingSettings.objective:
            left_out.add("objective")
        return {name: value for name, value in asdict(self).items() if name not in left_out}

    def for_model(self, parameters):
        """These settings with what was left open filled in for a model of so many parameters."""
        large = parameters >= 1e9
        rank = self.rank or (8 if large else 64)
        filled = {
            "rank": rank,
            "alpha": 2 * rank,
            "dropout": 0.1 if large else 0.3,
            "learning_rate": 2e-4 if large else 3e-4,
            "epochs": 2 if large else 1,
            "soup": 1 if large else 2,
            "target_modules": "all-linear" if large else "all-linear+embeddings",
        }
        return replace(
            self, **{name: v for name, v in filled.items() if getattr(self, name) is None}
        )


@dataclass(frozen=True)
class EvaluationSettings:
    """The held-out evaluation."""

    signals: str = setting(
        "paraphrase,mc_dropout,p_true,verbalised",
        "what the model is asked beside its token probability, joined by commas, or none; a text "
        "then takes one more forward pass for each wording of the question, --dropout-passes "
        "(fine-tuned model only), 1, and 1 and a few tokens",
    )
    samples: int = setting(20, "samples of response consistency for a text; they cost no pass")
    temperature: float = setting(1.0, "sampling temperature of response consistency")
    dropout_passes: int = setting(5, "forward passes of Monte-Carlo dropout for a text")
    bins: int = setting(20, "equal-width bins of the calibration error")
    resamples: int = setting(1000, "bootstrap resamples of an interval")
    evaluation_seed: int = setting(42, "seed of sampling and of the bootstrap")


@dataclass(frozen=True)
class OutputSettings:
    """Where the results go: fine_tuned_sentiment_model/, evaluation_cache/ and images/ below it."""

    output_dir: str | None = setting(None, "folder of the results (default: the project folder)")

    @property
    def folder(self):
        return Path(self.output_dir) if self.output_dir else ROOT

    @property
    def fine_tuned(self):
        return self.folder / FINE_TUNED_DIR.name

    @property
    def cache(self):
        return self.folder / CACHE_DIR.name

    @property
    def images(self):
        return self.folder / IMAGES_DIR.name


def first_type(annotation):
    """int for both `int` and `int | None`."""
    return getattr(annotation, "__args__", (annotation,))[0]


def settings_table(cls):
    """The name of a settings class in help texts and configuration files: `training`."""
    return cls.__name__.removesuffix("Settings").lower()


def add_arguments(parser, *classes, leave_out=()):
    """One flag for every field of the settings classes, with the default in its help."""
    for cls in classes:
        group = parser.add_argument_group(settings_table(cls))
        for f in (f for f in fields(cls) if f.name not in leave_out):
            kind = {int: int, float: float}.get(first_type(f.type), str)
            text = f.metadata["help"]
            if f.default is not None:
                text += f" (default: {f.default})"
            group.add_argument(
                "--" + f.name.replace("_", "-"),
                type=kind,
                default=f.default,
                metavar=f.name.upper(),
                help=text.replace("%", "%%"),
            )


def from_arguments(cls, arguments):
    """The settings object of class `cls` out of parsed arguments."""
    return cls(**{f.name: getattr(arguments, f.name) for f in fields(cls)})


def changed_flags(settings):
    """The command-line flags of a settings object, where it differs from the defaults."""
    return [
        f"--{f.name.replace('_', '-')}={value}"
        for f in fields(settings)
        if (value := getattr(settings, f.name)) != f.default
    ]


def _add_folder(parser, flag, folder, use):
    parser.add_argument(
        flag,
        type=Path,
        default=folder,
        metavar="FOLDER",
        help=f"folder {use} (default: {folder.name}/ beside this script)",
    )


def add_cache_arguments(parser):
    """--cache-dir and --images-dir, for the scripts that read a finished evaluation."""
    _add_folder(parser, "--cache-dir", CACHE_DIR, "of the evaluation")
    _add_folder(parser, "--images-dir", IMAGES_DIR, "the charts go to")


def add_classifier_arguments(parser):
    """--model, --adapter, --task and --cache-dir, for the command lines that classify texts."""
    parser.add_argument(
        "--model",
        help="base (the embedded model), finetuned (what fine_tune_model.py made), or a preset "
        f"({', '.join(MODEL_PRESETS)}), hub id or folder (default: base; with --adapter the model "
        "that the adapter was trained on)",
    )
    parser.add_argument(
        "--adapter",
        metavar="FOLDER",
        help=f"LoRA adapter (default of finetuned: {FINE_TUNED_DIR.name}/)",
    )
    parser.add_argument(
        "--task",
        metavar="NAME|FILE",
        help="task in tasks/, or a JSON file like those there (default: what the adapter was "
        "trained for, else sentiment)",
    )
    _add_folder(parser, "--cache-dir", CACHE_DIR, "of the evaluation that has the calibrators")


def add_report_arguments(parser):
    """The flags that every analysis of a finished evaluation has."""
    add_cache_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object, no tables")
    parser.add_argument("--no-images", action="store_true", help="draw nothing")


def exit_code(action, *arguments, interrupted=None):
    """0 when `action` is done; 1, with a message on stderr, when the user can mend what failed.

    interrupted: what to say after Ctrl-C; without it the interruption is raised.
    """
    try:
        action(*arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        if interrupted is None:
            raise
        print(f"interrupted; {interrupted}", file=sys.stderr)
        return 1
    return 0
