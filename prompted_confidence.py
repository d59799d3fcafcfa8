"""Confidence that the model is asked for: P(True), stated confidence, and its answer to nothing.

    siblings = p_true_siblings(classifier)
    rows = p_true_predictions(siblings, texts, token_probability_rows)

P(True): the model reads the question, the text and its own answer, and is asked whether that is
true; its probability of true is the confidence. Verbalised confidence: it is asked how sure it is,
from 0 to 100, and what it generates is read strictly. Both need a model that follows instructions;
from any other they are what it happens to say, and a reply that is no number is an error row.
Content-free texts show which answer the model prefers before it has read anything.
"""

from records import P_TRUE, VERBALISED, Prediction
from settings import Label, Task, case_variants
from signals import CONTENT_FREE_TEXTS, stated_confidence

TRUE_OR_FALSE = (Label("true", case_variants("true")), Label("false", case_variants("false")))
SCALE = (Label("not at all", ("0",)), Label("certain", ("100",)))
REPLY_TOKENS = 8  # "100 %" and the end of the turn are fewer in every tokenizer; a sentence is more


def content_free_rows(classifier):
    """[{"text", "label_logprobs": (K,) nats}] of the content-free texts that could be scored."""
    predictions = classifier.classify_batch(list(CONTENT_FREE_TEXTS))
    return [
        {"text": text, "label_logprobs": list(row.label_logprobs)}
        for text, row in zip(CONTENT_FREE_TEXTS, predictions, strict=True)
        if row.error is None
    ]


def p_true_task(task, answer):
    """The `Task` of asking whether the answer word `answer` to `task` is true."""
    question = (
        f"{task.user_message('{text}')}\n\n"
        f"Proposed answer: {answer}\n\n"
        "Is the proposed answer true or false? Answer true or false."
    )
    return Task("p_true", question, TRUE_OR_FALSE)


def stated_task(task, answer):
    """The `Task` whose prompt asks how sure the answer word `answer` to `task` is.

    Its labels are the ends of the scale; only its prompt is used.
    """
    question = (
        f"{task.user_message('{text}')}\n\n"
        f"Proposed answer: {answer}\n\n"
        "How sure are you that the proposed answer is right, from 0 to 100? "
        "Answer with the number alone."
    )
    return Task("verbalised", question, SCALE)


def p_true_siblings(classifier):
    """{label name: the classifier that is asked whether this label is right}."""
    return _siblings(classifier, p_true_task)


def stated_siblings(classifier):
    """{label name: the classifier that is asked how sure this label is}."""
    return _siblings(classifier, stated_task)


def _siblings(classifier, make):
    return {
        label.name: classifier.for_task(make(classifier.task, label.words[0]))
        for label in classifier.task.labels
    }


def p_true_predictions(siblings, texts, own):
    """P(True) of the answer that `own`, the token-probability `Prediction` of each text, gives.

    siblings: of `p_true_siblings`. The confidence is the probability of true among true and false;
    the label mass says how much of the distribution these two are. The paper offers "(A) True" and
    "(B) False"; here the words themselves are the answers, so that one token decides.
    Source: Kadavath et al. 2022, section 3, https://arxiv.org/abs/2207.05221
    """

    def ask(sibling, texts, own):
        rows = sibling.classify_batch(texts, [row.example_id for row in own])
        return [
            Prediction(row.example_id, P_TRUE, error=row.error)
            if row.error is not None
            else Prediction(
                row.example_id,
                P_TRUE,
                label_mass=row.label_mass,
                predicted=first.predicted,
                confidence=row.probability,
                truncated=row.truncated,
            )
            for first, row in zip(own, rows, strict=True)
        ]

    return _by_answer(ask, siblings, texts, own)


def verbalised_predictions(siblings, texts, own):
    """The confidence that the model states for the answer of `own`, as in `p_true_predictions`.

    siblings: of `stated_siblings`. The reply is generated greedily. One that is no whole number
    from 0 to 100 (`signals.stated_confidence`) gives a row with an error that quotes it.
    Source: Tian et al. 2023, https://arxiv.org/abs/2305.14975
    """

    def ask(sibling, texts, own):
        encoded = sibling.encoder.encode([text.strip() for text in texts])
        replies = sibling.greedy_replies([ids for ids, _ in encoded], REPLY_TOKENS)
        rows = []
        for first, (_, truncated), reply in zip(own, encoded, replies, strict=True):
            confidence = stated_confidence(reply)
            if confidence is None:
                error = f"the reply {reply!r} is no whole number from 0 to 100"
                rows.append(Prediction(first.example_id, VERBALISED, error=error))
                continue
            rows.append(
                Prediction(
                    first.example_id,
                    VERBALISED,
                    predicted=first.predicted,
                    confidence=confidence,
                    truncated=truncated,
                )
            )
        return rows

    return _by_answer(ask, siblings, texts, own)


def _by_answer(ask, siblings, texts, own):
    """ask(sibling, texts, own) for the rows of each answer; the rows in the order of the texts."""
    rows = [None] * len(own)
    for name, sibling in siblings.items():
        places = [i for i, row in enumerate(own) if row.predicted == name]
        if not places:
            continue
        asked = ask(sibling, [texts[i] for i in places], [own[i] for i in places])
        for place, row in zip(places, asked, strict=True):
            rows[place] = row
    return rows
