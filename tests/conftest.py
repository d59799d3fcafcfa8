"""Shared fixtures: the real embedded model, tiny random models of other architectures."""

import gc
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "2")

import pytest

gc.disable()  # until all tests are loaded: none of that is garbage

ARCHITECTURES = {  # name: (config class, model class, what differs from the common shape)
    "llama": ("LlamaConfig", "LlamaForCausalLM", {}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", {}),
    "glm4": ("Glm4Config", "Glm4ForCausalLM", {"head_dim": 8}),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", {}),
    "mistral": ("MistralConfig", "MistralForCausalLM", {"sliding_window": 16}),
    "gemma2": (
        "Gemma2Config",
        "Gemma2ForCausalLM",
        {"head_dim": 8, "sliding_window": 16, "query_pre_attn_scalar": 8},
    ),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", {}),
    "granite": ("GraniteConfig", "GraniteForCausalLM", {"logits_scaling": 4.0}),
    "lfm2": ("Lfm2Config", "Lfm2ForCausalLM", {"layer_types": ["conv", "full_attention"]}),
}
HYBRID = {"lfm2"}  # remembers more of a prompt than keys and values, so prompts are not shared


# The files of tests that take longest, from the longest on. Each is the work of one process: begun
# last, it would leave the other one idle.
LONGEST = (
    "test_fine_tune_model",
    "test_run_complete_pipeline",
    "test_charts",
    "test_generate_evaluation_cache",
    "test_api_process",
    "test_logprobs_confidence",
    "test_classify_server",
    "test_openai_backend",
    "test_model_process",
    "test_logprob_demo_cli",
    "test_calibration_metrics",
    "test_classify_cli",
    "test_classify_api",
    "test_consistency_confidence",
    "test_run_all_tasks",
    "test_business_reliability",
    "test_calibration_demo",
    "test_layers",
    "test_sample_size_thresholds",
    "test_benchmarks",
    "test_records",
    "test_signal_comparison",
)


def pytest_collection_finish():
    """What is loaded by now stays: the collector need not look through it again and again."""
    gc.collect()
    gc.freeze()
    gc.enable()


def pytest_collection_modifyitems(items):
    rank = {name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))


GLM_LIKE_TEMPLATE = (  # the answer begins after a line break that the generation prompt lacks
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n"
    "{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}"
    "<|start_header_id|>assistant<|end_header_id|>{% endif %}"
)


@pytest.fixture(scope="session", autouse=True)
def shared_folder(tmp_path_factory):
    """What takes long to make and is only read is made once for all processes of the tests."""
    import simulated_cache

    own = tmp_path_factory.getbasetemp()
    together = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own
    simulated_cache.SHARED = together / "simulated_caches"
    simulated_cache.SHARED.mkdir(exist_ok=True)


@pytest.fixture(scope="session")
def forked_models():
    """A server in this process forks the process of its model; only a server in a process of its
    own starts it as users' servers do."""
    import serving.model_process
    from forked_scripts import FORKING

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(serving.model_process, "get_context", lambda method: FORKING)
        yield


@pytest.fixture(scope="session")
def classifier():
    """The embedded model with the sentiment task, in float32."""
    from logprobs_confidence import TransformerLogprobsClassifier

    return TransformerLogprobsClassifier()


def metaspace_tokenizer(texts):
    """A SentencePiece-like tokenizer: no byte-level alphabet, and a space before the first word
    only, so that the pieces of a prompt tokenised one by one differ from the whole."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    specials = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=specials + [f"<0x{i:02X}>" for i in range(256)],
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["[INST]", "[/INST]"],
    )
    fast.chat_template = (
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}"
        "[INST]{{ m['content'] }}[/INST]{% else %} {{ m['content'] }}</s>{% endif %}{% endfor %}"
    )
    return fast


@pytest.fixture(scope="session")
def tiny_model_folder(tmp_path_factory):
    """name → folder of a tiny random model: Mistral with a SentencePiece-like tokenizer, GPT-2
    without a chat template, the others with the embedded model's tokenizer."""
    import torch
    import transformers

    from settings import EMBEDDED_MODEL_DIR, SENTIMENT

    folders = {}

    def build(name):
        if name in folders:
            return folders[name]
        tokenizer = transformers.AutoTokenizer.from_pretrained(EMBEDDED_MODEL_DIR)
        if name == "mistral":
            words = [word for label in SENTIMENT.labels for word in label.words]
            tokenizer = metaspace_tokenizer([SENTIMENT.user_message("a good text"), *words] * 20)
        if name == "gpt2":
            tokenizer.chat_template = None
        if name == "glm4":
            tokenizer.chat_template = GLM_LIKE_TEMPLATE
        config_class, model_class, extra = ARCHITECTURES[name]
        shape = {
            "vocab_size": len(tokenizer),
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 64,
            "max_position_embeddings": 512,
            "pad_token_id": 0,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
        }
        if name == "gpt2":
            shape = {"vocab_size": len(tokenizer), "n_embd": 32, "n_layer": 2, "n_head": 4}
        torch.manual_seed(0)
        config = getattr(transformers, config_class)(**{**shape, **extra})
        model = getattr(transformers, model_class)(config)
        with torch.no_grad():
            for parameter in model.parameters():  # far from uniform, so that errors show
                parameter.mul_(4.0 if parameter.ndim > 1 else 1.0)
        folder = tmp_path_factory.mktemp(name)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        folders[name] = folder
        return folder

    return build
