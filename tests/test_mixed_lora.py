"""Rows that ask different adapters: what is stacked here gives what PEFT computes one by one."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from engine import is_plain_lora
from serving.mixed_lora import BASE_ROWS, MixedRows
from settings import EMBEDDED_MODEL_DIR

IDS = torch.arange(60).view(6, 10) + 300


def adapter(rank, targets="all-linear", **options):
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=3 * rank,
        target_modules=targets,
        init_lora_weights=False,
        **options,
    )


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(1)
    base = AutoModelForCausalLM.from_pretrained(EMBEDDED_MODEL_DIR, dtype=torch.float32)
    model = get_peft_model(base, adapter(4), adapter_name="four")
    model.add_adapter("other four", adapter(4, use_rslora=True))
    model.add_adapter("eight", adapter(8, ["q_proj", "down_proj", "embed_tokens"]))
    return model.eval()


def logits(model, names, mixed=None):
    with torch.inference_mode():
        if mixed is None:
            return model(input_ids=IDS, adapter_names=[n or BASE_ROWS for n in names]).logits
        with mixed.asking(names):
            return model.base_model.model(input_ids=IDS).logits


@pytest.mark.parametrize(
    "names",
    [
        ["four"] * 6,
        [None] * 6,
        ["four", "other four", "other four", "four", "other four", "four"],
        ["eight", None, "four", "other four", None, "eight"],
        [None, None, "four", None, None, None],
    ],
)
def test_a_mixed_batch_gives_what_peft_gives(model, names):
    expected = logits(model, names)
    mixed = MixedRows()
    mixed.tell(model)
    try:
        found = logits(model, names, mixed)
    finally:
        forget(model)
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
    # adapters of random weights change an answer by far more than that
    others = logits(model, [None if name else "four" for name in names])
    assert (found - others).abs().amax((1, 2)).min() > 0.1


def forget(model):
    for layer in model.modules():
        layer.__dict__.pop("forward", None)


def test_what_is_no_plain_lora_is_left_to_peft(model):
    model.add_adapter("biased", adapter(4, ["v_proj"], lora_bias=True))
    names = ["biased", "four", None, "eight", "biased", "biased"]
    expected = logits(model, names)
    mixed = MixedRows()
    mixed.tell(model)
    try:
        attention = model.base_model.model.model.layers[0].self_attn
        assert is_plain_lora(attention.q_proj) and not is_plain_lora(attention.v_proj)
        assert not is_plain_lora(model.base_model.model.model.embed_tokens)
        found = logits(model, names, mixed)
    finally:
        forget(model)
        model.delete_adapter("biased")
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
