"""P(True), stated confidence and content-free texts: prompts, real numbers, what is refused."""

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from logprobs_confidence import TransformerLogprobsClassifier
from prompted_confidence import (
    REPLY_TOKENS,
    content_free_rows,
    p_true_predictions,
    p_true_siblings,
    p_true_task,
    stated_siblings,
    stated_task,
    verbalised_predictions,
)
from records import P_TRUE, VERBALISED
from settings import EMBEDDED_MODEL_DIR, SENTIMENT, Label, Task
from signals import CONTENT_FREE_TEXTS, mean_probabilities, prior_corrected

TEXTS = ["I loved it.", "A dull evening, and far too long for what it had to say.", "Fine.", "No!"]


def prompt_of(message):
    return (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n"
        f"{message}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    )


def speaking_model(folder, replies):
    """A real model whose next token depends on the last one alone, so that what it says is known.

    replies: [(after this token id, comes that token id)].
    """
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_MODEL_DIR)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=16,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        eos_token_id=tokenizer.convert_tokens_to_ids("<|eot_id|>"),
    )
    model = LlamaForCausalLM(config)
    layer = model.model.layers[0]
    with torch.no_grad():
        for silent in (layer.self_attn.o_proj, layer.mlp.down_proj, model.lm_head):
            silent.weight.zero_()
        embedding = model.model.embed_tokens.weight.normal_()
        for last, following in replies:
            model.lm_head.weight[following] += embedding[last]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return TransformerLogprobsClassifier(str(folder))


# The prompts, to the letter.


def test_the_prompt_of_p_true_holds_question_text_and_answer(classifier):
    siblings = p_true_siblings(classifier)
    assert list(siblings) == ["positive", "negative"]
    for name, word in (("positive", "Yes"), ("negative", "No")):
        assert siblings[name].encoder.prompt("A {text} & <|eot_id|>.") == prompt_of(
            "Is this text positive in sentiment? Answer yes or no.\n\n"
            "Text: A {text} & <|eot_id|>.\n\n"
            f"Proposed answer: {word}\n\n"
            "Is the proposed answer true or false? Answer true or false."
        )


def test_the_prompt_of_the_stated_confidence_asks_for_a_number(classifier):
    assert stated_siblings(classifier)["negative"].encoder.prompt("Fine.") == prompt_of(
        "Is this text positive in sentiment? Answer yes or no.\n\n"
        "Text: Fine.\n\n"
        "Proposed answer: No\n\n"
        "How sure are you that the proposed answer is right, from 0 to 100? "
        "Answer with the number alone."
    )


def test_a_question_with_a_slot_keeps_it():
    task = replace(SENTIMENT, question="Review: {text}\n\nGood?", wordings=(), negated=())
    for make in (p_true_task, stated_task):
        message = make(task, "Yes").user_message("TEXT")
        assert message.startswith("Review: TEXT\n\nGood?\n\nProposed answer: Yes\n\n")
        assert message.count("TEXT") == 1


# P(True).


def test_p_true_is_the_share_of_true_after_the_prompt(classifier):
    own = classifier.classify_batch(TEXTS, list("abcd"))
    siblings = p_true_siblings(classifier)
    rows = p_true_predictions(siblings, TEXTS, own)
    assert [row.example_id for row in rows] == list("abcd")
    for text, first, row in zip(TEXTS, own, rows, strict=True):
        encoder = siblings[first.predicted].encoder
        ids = classifier.tokenizer(encoder.prompt(text), add_special_tokens=False).input_ids
        with torch.inference_mode():
            p = classifier.model(torch.tensor([ids])).logits[0, -1].float().softmax(-1)
        true, false = (sum(float(p[i]) for i in of) for of in encoder.label_ids)
        assert row.confidence == pytest.approx(true / (true + false), abs=1e-4)
        assert row.label_mass == pytest.approx(true + false, rel=1e-3)
        assert (row.method, row.predicted) == (P_TRUE, first.predicted)
        assert row.label_logprobs is None and row.error is None


def test_the_model_is_asked_about_its_own_answer(tmp_path):
    """A model whose answers follow its last token gives all answers the same P(True)."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_MODEL_DIR)
    last = tokenizer("\n\n", add_special_tokens=False).input_ids[-1]
    true = tokenizer("True", add_special_tokens=False).input_ids[0]
    model = speaking_model(tmp_path, [(last, true)])
    own = model.classify_batch(TEXTS)
    rows = p_true_predictions(p_true_siblings(model), TEXTS, own)
    assert all(row.confidence > 0.99 and row.label_mass > 0.99 for row in rows)


def test_many_labels_are_asked_about_one_by_one(classifier):
    topic = Task(
        "topic", "What is it about?", tuple(Label(n, (n,)) for n in ("Film", "Food", "Sport"))
    )
    asked = classifier.for_task(topic)
    own = asked.classify_batch(TEXTS)
    named = [
        replace(row, predicted=name)
        for row, name in zip(own, (*topic.label_names, "Food"), strict=True)
    ]
    siblings = p_true_siblings(asked)
    rows = p_true_predictions(siblings, TEXTS, named)
    assert [row.predicted for row in rows] == ["Film", "Food", "Sport", "Food"]
    for text, row in zip(TEXTS, rows, strict=True):
        alone = siblings[row.predicted].classify(text)
        assert row.confidence == pytest.approx(alone.probability, abs=1e-4)
        assert f"Proposed answer: {row.predicted}\n" in siblings[row.predicted].encoder.prompt(text)


# Verbalised confidence.


def test_a_stated_number_is_the_confidence(tmp_path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_MODEL_DIR)
    number = tokenizer("85", add_special_tokens=False).input_ids
    last = tokenizer("\n\n", add_special_tokens=False).input_ids[-1]
    eot = tokenizer.convert_tokens_to_ids("<|eot_id|>")
    chain = [last, *number, eot]
    model = speaking_model(tmp_path, list(pairwise(chain)))
    rows = verbalised_predictions(stated_siblings(model), TEXTS, model.classify_batch(TEXTS))
    assert [row.confidence for row in rows] == [0.85] * len(TEXTS)
    assert all(row.method == VERBALISED and row.error is None for row in rows)
    # A model that samples and is kept from repeating itself by default still answers greedily.
    model.model.generation_config.update(do_sample=True, temperature=9.0, repetition_penalty=5.0)
    again = verbalised_predictions(stated_siblings(model), TEXTS, model.classify_batch(TEXTS))
    assert again == rows


def test_a_model_that_states_no_number_has_error_rows_that_quote_it(classifier):
    own = classifier.classify_batch(TEXTS, list("abcd"))
    rows = verbalised_predictions(stated_siblings(classifier), TEXTS, own)
    assert [row.example_id for row in rows] == list("abcd")
    for row in rows:
        if row.error is None:
            assert row.confidence * 100 == int(row.confidence * 100)
        else:
            assert row.error.startswith("the reply ") and "from 0 to 100" in row.error
            assert row.confidence is row.predicted is None


@pytest.mark.parametrize("batch_tokens", [64, 100_000])
def test_replies_are_those_of_one_at_a_time_greedy_decoding(classifier, batch_tokens):
    sibling = stated_siblings(classifier)["positive"]
    sibling.settings = replace(sibling.settings, batch_tokens=batch_tokens)
    sequences = [ids for ids, _ in sibling.encoder.encode(TEXTS)]
    replies = sibling.greedy_replies(sequences, REPLY_TOKENS)
    ends = classifier.model.generation_config.eos_token_id
    ends = [ends] if isinstance(ends, int) else ends
    for ids, reply in zip(sequences, replies, strict=True):
        said = []
        while len(said) < REPLY_TOKENS and not (said and said[-1] in ends):
            with torch.inference_mode():
                logits = classifier.model(torch.tensor([ids + said])).logits[0, -1]
            said.append(int(logits.argmax()))
        assert reply == classifier.tokenizer.decode(said, skip_special_tokens=True)


def test_a_model_without_chat_template_states_something_too(tiny_model_folder):
    model = TransformerLogprobsClassifier(str(tiny_model_folder("gpt2")))
    rows = verbalised_predictions(stated_siblings(model), TEXTS, model.classify_batch(TEXTS))
    assert len(rows) == len(TEXTS)
    assert all((row.error is None) != (row.confidence is None) for row in rows)


# Content-free texts.


def test_content_free_texts_are_put_to_the_task_and_corrected_are_uniform(classifier):
    rows = content_free_rows(classifier)
    assert [row["text"] for row in rows] == list(CONTENT_FREE_TEXTS)
    for row in rows:
        logprobs = classifier.classify(row["text"]).label_logprobs
        assert row["label_logprobs"] == pytest.approx(logprobs, abs=1e-4)
        alone = np.array([row["label_logprobs"]])
        corrected = np.exp(prior_corrected(alone, mean_probabilities(alone)))
        assert corrected == pytest.approx(np.array([[0.5, 0.5]]))
    # Averaged, the probabilities over the prior have the same mean for every label.
    all_rows = np.array([row["label_logprobs"] for row in rows])
    shares = np.exp(all_rows - np.logaddexp.reduce(all_rows, axis=1, keepdims=True))
    assert (shares / mean_probabilities(all_rows)).mean(axis=0) == pytest.approx([1.0, 1.0])
    assert all(math.isfinite(v) for row in rows for v in row["label_logprobs"])
