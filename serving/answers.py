"""What the server answers: its types, and how an answer follows from a prediction."""

from typing import Annotated, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from calibration import calibrated_probabilities
from decisions import PROMISES, ZONES, zone_of
from records import LOW_LABEL_MASS, label_probabilities
from serving.models import BASE, BrokenModel
from serving.settings import MOST_SAMPLES, MOST_TEXTS, MOST_TOP_TOKENS
from settings import EvaluationSettings

TEXT_EXAMPLE = "An absolutely wonderful film, I loved every minute of it."
Share = Annotated[float, Field(ge=0, le=1)]


# ------------------------------------------------------------------------------------- questions


class Question(BaseModel):
    """What every request says of the model it asks."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    model: str | None = Field(
        None,
        max_length=64,
        description="base (the default), finetuned, or the name of an adapter; GET /models lists "
        "them",
        examples=["base"],
    )
    model_type: str | None = Field(
        None,
        max_length=64,
        description="an older name of `model`",
        json_schema_extra={"deprecated": True},
    )

    @model_validator(mode="after")
    def _one_name(self):
        if self.model is not None and self.model_type not in (None, self.model):
            raise ValueError("model and model_type name different models; give one of them")
        return self

    @property
    def asked(self):
        return next(n for n in (self.model, self.model_type, BASE) if n is not None)


class TextQuestion(Question):
    """One text."""

    text: str = Field(
        description="the text; it stays text, whatever control tokens it contains",
        examples=[TEXT_EXAMPLE],
    )


class BatchQuestion(Question):
    """Several texts for one model."""

    texts: list[object] = Field(
        min_length=1,
        max_length=MOST_TEXTS,
        description="the texts; what cannot be scored becomes an error in its place",
        examples=[[TEXT_EXAMPLE, "Terrible service.", ""]],
    )


class ExplainQuestion(TextQuestion):
    """One text, to be looked at."""

    top_k: int = Field(8, ge=1, le=MOST_TOP_TOKENS, description="most probable next tokens shown")
    samples: int = Field(
        EvaluationSettings.samples, ge=1, le=MOST_SAMPLES, description="draws of the consistency"
    )
    seed: int = Field(
        EvaluationSettings.evaluation_seed, ge=0, lt=2**32, description="of these draws"
    )


class DecideQuestion(TextQuestion):
    """One text, to be acted on or not."""

    promise: float | None = Field(
        None,
        description=f"accuracy to be kept among automated answers, one of {list(PROMISES)}: the "
        "certified threshold decides; without it the zone of the calibrated probability",
        json_schema_extra={"anyOf": [{"enum": list(PROMISES)}, {"type": "null"}]},
    )

    @model_validator(mode="after")
    def _known_promise(self):
        if self.promise not in (None, *PROMISES):
            raise ValueError(f"promise must be one of {', '.join(map(str, PROMISES))}")
        return self


# --------------------------------------------------------------------------------------- answers


class LabelProbability(BaseModel):
    """P(label) among the labels."""

    raw: Share
    calibrated: Share | None


class Answer(BaseModel):
    """What the model says of one text, and what that is worth."""

    model_config = ConfigDict(protected_namespaces=())

    label: str = Field(description="the label the model gives", examples=["positive"])
    raw_probability: Share = Field(
        description="P(label) among the labels, as the model says; not how often it is right"
    )
    calibrated_probability: Share | None = Field(
        description="how often such an answer is right, by the calibrator of exactly this model; "
        "null without one. Below 1 / (number of labels) another label is the better answer"
    )
    probabilities: dict[str, LabelProbability] = Field(description="of every label")
    label_mass: Share = Field(
        description="how much of what the model could say is an answer at all"
    )
    low_label_mass: bool = Field(
        description=f"the label mass is below {LOW_LABEL_MASS}: the answer means little"
    )
    truncated: bool = Field(description="the text was too long and lost its middle")
    model: str = Field(examples=["base"])
    adapter: str | None = Field(description="fingerprint of the adapter's files; null for base")
    model_fingerprint: str = Field(
        description="of weights, adapter, prompt, label words, tokenizer and dtype together"
    )
    calibrator: str | None = Field(description="its kind", examples=["temperature"])
    calibrator_fingerprint: str | None
    calibrator_reason: str | None = Field(description="why there is no calibrator, or null")
    latency_sec: float = Field(description="from the arrival of the request to its answer")


class RowError(BaseModel):
    """A text that could not be scored."""

    error: str


class BatchAnswer(BaseModel):
    """One entry a text, in the order of the texts."""

    answers: list[Answer | RowError]
    failed: int = Field(description="texts that could not be scored")
    latency_sec: float


class Token(BaseModel):
    """A row of the next-token distribution; `token` is quoted so that spaces and bytes show."""

    rank: int | None = Field(description="null where the model's server does not name the token")
    token_id: int | None = Field(description="null where the model's server does not tell")
    token: str
    logprob: float | None = Field(description="nats; null where the probability is 0")
    probability: Share
    bound: bool = Field(
        description="whether the probability is the most that it can be: the model's server names "
        "its most probable tokens alone"
    )


class ConsistencyAnswer(BaseModel):
    """How often sampled answers agree."""

    samples: int
    counts: dict[str, int]
    other: int = Field(description="samples that were no answer")
    majority: str | None
    agreement: Share
    low: Share = Field(description="95 % interval of the agreement")
    high: Share


class ExplainAnswer(BaseModel):
    """From the next token to the answer. A lettered task is asked in every order of its options:
    the answer is their mean, prompt, tokens and sums are those of the first."""

    answer: Answer
    prompt: str = Field(description="the prompt, as the model reads it")
    top: list[Token] = Field(description="the most probable next tokens")
    words: dict[str, list[Token]] = Field(description="the answer tokens of each label")
    label_sums: dict[str, Share] = Field(
        description="their probabilities added up; together the label mass of this prompt"
    )
    whole_words: bool = Field(
        description="answer words share a first token, so that each is scored whole; `words` does "
        "not add up then"
    )
    consistency: ConsistencyAnswer


class DecideAnswer(BaseModel):
    """What to do with the answer, and why."""

    decision: Literal["automate", "review", "manual"]
    label: str = Field(description="the label to act on: the most probable one once calibrated")
    why: str = Field(description="the promise that it rests on, in words")
    confidence: Share | None = Field(description="the calibrated probability that decided")
    threshold: Share | None = Field(description="what it was compared with")
    zone: str | None = Field(description="its zone, where no promise was asked for")
    promise: float | None
    answer: Answer


class CalibratorInfo(BaseModel):
    name: str
    fingerprint: str
    rows: int = Field(description="calibration rows it was fitted on")


class ModelInfo(BaseModel):
    """A model that is served."""

    model_config = ConfigDict(protected_namespaces=())

    name: str
    status: Literal["in memory", "on disk", "broken"]
    reason: str | None = Field(description="why it is broken, or null")
    task: str | None = None
    question: str | None = None
    labels: list[str] | None = None
    adapter: str | None = None
    model_fingerprint: str | None = None
    calibrator: CalibratorInfo | None = None
    calibrator_reason: str | None = None
    promises: dict[str, float | None] = Field(
        {}, description="accuracy promised → certified threshold, null where none can be certified"
    )
    decisions_reason: str | None = None


class ZoneInfo(BaseModel):
    """A zone of the calibrated confidence."""

    low: Share = Field(description="its lower edge")
    name: str
    action: Literal["automate", "review", "manual"]


class Limits(BaseModel):
    """What a request may have."""

    texts: int = Field(MOST_TEXTS, description="texts of a batch")
    text_chars: int = Field(description="characters of a text; a longer one is refused")
    prompt_tokens: int = Field(description="tokens of a prompt; a longer text loses its middle")
    body_bytes: int


class ModelsAnswer(BaseModel):
    """All models, the base model first."""

    base: str = Field(description="what the base model is", examples=["embedded"])
    dtype: str
    device: str
    models: list[ModelInfo]
    limits: Limits
    zones: list[ZoneInfo] = Field(
        default=[ZoneInfo(low=low, name=name, action=action) for low, name, action in ZONES],
        description="what to do with an answer, from the highest confidence down",
    )


class Health(BaseModel):
    """The process is alive."""

    status: Literal["starting", "ok", "stopping"]
    base: str
    adapters_in_memory: int
    waiting_rows: int
    waiting_tokens: int
    uptime_sec: float


class Ready(BaseModel):
    """Weights loaded, warmed up, self-check passed."""

    status: Literal["ready"]


# ------------------------------------------------------------------------------- how they follow


def calibrated_row(calibrator, prediction):
    """(K,) calibrated probabilities of one prediction."""
    row = {"label_logprobs": np.array([prediction.label_logprobs])}
    return calibrated_probabilities(calibrator, row)[0]


def answer_to(model, prediction, latency_sec):
    """The `Answer` of a `ServedModel` that follows from its `Prediction`."""
    names = model.task.label_names
    raw = label_probabilities(prediction.label_logprobs).tolist()
    calibrated = [None] * len(names)
    if model.calibrator is not None:
        calibrated = calibrated_row(model.calibrator, prediction).tolist()
    chosen = names.index(prediction.predicted)
    return Answer(
        label=prediction.predicted,
        raw_probability=raw[chosen],
        calibrated_probability=calibrated[chosen],
        probabilities={
            name: LabelProbability(raw=r, calibrated=c)
            for name, r, c in zip(names, raw, calibrated, strict=True)
        },
        label_mass=prediction.label_mass,
        low_label_mass=prediction.label_mass < LOW_LABEL_MASS,
        truncated=prediction.truncated,
        model=model.name,
        adapter=model.key,
        model_fingerprint=model.identity["fingerprint"],
        calibrator=None if model.calibrator is None else model.calibrator.name,
        calibrator_fingerprint=model.calibrator_fingerprint,
        calibrator_reason=model.calibrator_reason,
        latency_sec=latency_sec,
    )


def token_row(token):
    logprob = token.logprob if token.probability > 0 else None
    return Token(
        rank=token.rank,
        token_id=token.token_id,
        token=token.token,
        logprob=logprob,
        probability=min(1.0, token.probability),
        bound=token.bound,
    )


def explanation_of(model, explanation, samples, seed, latency_sec):
    """The `ExplainAnswer` that follows from an `Explanation`."""
    from consistency_confidence import sample_consistency

    said, names = explanation.answer, model.task.label_names
    drawn = sample_consistency(said.label_logprobs, samples, np.random.default_rng(seed))
    sums = np.minimum(1.0, np.exp(explanation.prediction.label_logprobs)).tolist()
    return ExplainAnswer(
        answer=answer_to(model, said, latency_sec),
        prompt=explanation.prompt,
        top=[token_row(t) for t in explanation.top],
        words={name: [token_row(t) for t in tokens] for name, tokens in explanation.words.items()},
        label_sums=dict(zip(names, sums, strict=True)),
        whole_words=model.encoders[0].label_ids is None,
        consistency=ConsistencyAnswer(
            samples=samples,
            counts=dict(zip(names, drawn.counts, strict=True)),
            other=drawn.other,
            majority=None if drawn.majority is None else names[drawn.majority],
            agreement=drawn.agreement,
            low=drawn.low,
            high=drawn.high,
        ),
    )


def percent(share):
    """A share for people, as the page writes it; only exactly 1 is 100 %."""
    if 0 < share < 0.001:
        return "under 0.1 %"
    if 0.999 < share < 1:
        return "over 99.9 %"
    return f"{100 * share:.1f}".removesuffix(".0") + " %"


def decision_on(model, prediction, promise, latency_sec):
    """The `DecideAnswer` to a prediction, by zone, or by the certified threshold of a promise."""
    decide = by_zone if promise is None else by_promise
    fields = {"label": prediction.predicted, "confidence": None, "threshold": None, "zone": None}
    fields |= decide(model, prediction, promise)
    return DecideAnswer(**fields, promise=promise, answer=answer_to(model, prediction, latency_sec))


def best_label(model, calibrator, prediction):
    """{"label", "confidence"}: the most probable label once calibrated, and its probability."""
    calibrated = calibrated_row(calibrator, prediction)
    best = int(calibrated.argmax())
    return {"label": model.task.label_names[best], "confidence": float(calibrated[best])}


def by_zone(model, prediction, _):
    if model.calibrator is None:
        why = f"the confidence is not calibrated, so no zone holds: {model.calibrator_reason}"
        return {"decision": "manual", "why": why}
    fields = best_label(model, model.calibrator, prediction)
    number = int(zone_of(np.array([fields["confidence"]]))[0])
    low, name, action = ZONES[number]
    why = f"the calibrated confidence lies in the zone {name}"
    decisions = model.decisions
    if decisions is None or decisions.zone_calibrator != model.calibrator_fingerprint:
        why += "; how often its answers are right has not been measured for this model"
    elif not decisions.zones[number]["count"]:
        why += "; no test text was in it, so how often its answers are right is not known"
    else:
        zone = decisions.zones[number]
        why += (
            f"; of the {zone['count']} test texts in it {percent(zone['accuracy'])} were answered "
            f"right (95 % interval {percent(zone['low'])} to {percent(zone['high'])})"
        )
    return fields | {"decision": action, "why": why, "zone": name, "threshold": low}


def by_promise(model, prediction, promise):
    decisions = model.decisions
    if decisions is None or decisions.automation is None:
        reason = model.decisions_reason if decisions is None else decisions.reason
        return {"decision": "manual", "why": f"no threshold is certified: {reason}"}
    fields = best_label(model, decisions.calibrator, prediction)
    table = decisions.automation
    row = next(row for row in table["promises"] if row["promise"] == promise)
    certified = row["certified"]
    if certified["threshold"] is None:
        why = f"no threshold for {percent(promise)} right can be certified: {certified['reason']}"
        return fields | {"decision": "manual", "why": why}
    why = (
        f"among the answers with a confidence of at least the threshold, {percent(promise)} are "
        f"right for texts like the {table['n_certifying']} it was certified on; such a promise is "
        f"broken in at most {percent(table['delta'])} of all calibrations"
    )
    if certified["test"]["risk"] is not None:
        why += (
            f"; of the {table['n_test']} test texts {percent(certified['test']['coverage'])} were "
            f"automated, {percent(1 - certified['test']['risk'])} of them right"
        )
    automated = fields["confidence"] >= certified["threshold"]
    return fields | {
        "decision": "automate" if automated else "manual",
        "why": why,
        "threshold": certified["threshold"],
    }


def info_on(model, process):
    """The `ModelInfo` of a `ServedModel` or `BrokenModel`; process: the `ModelProcess`."""
    if isinstance(model, BrokenModel):
        return ModelInfo(name=model.name, status="broken", reason=model.reason)
    status = "in memory" if model.key is None or model.key in process.loaded else "on disk"
    if model.key in process.failed:
        status = "broken"
    calibrator, promises, reason = None, {}, model.decisions_reason
    if model.calibrator is not None:
        calibrator = CalibratorInfo(
            name=model.calibrator.name,
            fingerprint=model.calibrator_fingerprint,
            rows=model.calibrator.n_rows,
        )
    if model.decisions is not None:
        reason = model.decisions.reason
        rows = (model.decisions.automation or {"promises": []})["promises"]
        promises = {str(row["promise"]): row["certified"]["threshold"] for row in rows}
    return ModelInfo(
        name=model.name,
        status=status,
        reason=process.failed.get(model.key),
        task=model.task.name,
        question=model.task.question,
        labels=list(model.task.label_names),
        adapter=model.key,
        model_fingerprint=model.identity["fingerprint"],
        calibrator=calibrator,
        calibrator_reason=model.calibrator_reason,
        promises=promises,
        decisions_reason=reason,
    )
