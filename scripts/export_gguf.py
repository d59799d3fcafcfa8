"""Write a Llama model with a Llama 3 tokenizer, such as the embedded one, as a GGUF file.

    pip install gguf
    python scripts/export_gguf.py embedded embedded.gguf               # float32: nothing is lost
    python scripts/export_gguf.py embedded embedded.gguf --dtype bf16

llama.cpp and what is built on it can then serve the model. For every other architecture use
llama.cpp's own convert_hf_to_gguf.py.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from logprobs_confidence import load_model_and_tokenizer
from records import atomic_path
from settings import ModelSettings, UserError

INSTALL = "pip install gguf"
OTHERS = "use convert_hf_to_gguf.py of llama.cpp"
# How Llama 3 divides a text before it merges bytes; llama.cpp knows the expression by two names.
LLAMA_3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PRE_TOKENIZERS = {True: "llama-bpe", False: "smaug-bpe"}  # by the tokenizer's ignore_merges
LAYER_TENSORS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
TENSORS = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def pre_tokenizer(tokenizer):
    """llama.cpp's name of how the tokenizer works. Raises UserError for one it does not have."""
    import json

    state = json.loads(tokenizer.backend_tokenizer.to_str())
    splits = (state["pre_tokenizer"] or {}).get("pretokenizers", [])
    patterns = [s["pattern"].get("Regex") for s in splits if s["type"] == "Split"]
    if state["model"]["type"] != "BPE" or patterns != [LLAMA_3_PATTERN]:
        raise UserError(f"the tokenizer does not divide texts as that of Llama 3; {OTHERS}")
    return PRE_TOKENIZERS[state["model"]["ignore_merges"]]


def merges(tokenizer):
    """["Ġ t", ...] the merges of a BPE tokenizer, the first ones first."""
    import json

    pairs = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    return [pair if isinstance(pair, str) else " ".join(pair) for pair in pairs]


def interleaved(weight, heads):
    """Rows of a query or key projection in the order in which llama.cpp rotates them: pairs side by
    side, where transformers has the two halves of a head one after the other."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, -1)


def gguf_name(name):
    """The name in a GGUF file of a tensor of transformers' Llama."""
    if name in TENSORS:
        return TENSORS[name]
    _, _, layer, rest = name.split(".", 3)
    return f"blk.{layer}.{LAYER_TENSORS[rest.removesuffix('.weight')]}.weight"


def write_tokenizer(writer, tokenizer, size):
    """The vocabulary, its merges and the control tokens."""
    import gguf

    names = {token: name for name, token in tokenizer.get_vocab().items()}
    control = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    kinds = [
        gguf.TokenType.UNUSED
        if i not in names
        else gguf.TokenType.CONTROL
        if i in control
        else gguf.TokenType.NORMAL
        for i in range(size)
    ]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer(tokenizer))
    writer.add_token_list([names.get(i, f"[unused {i}]") for i in range(size)])
    writer.add_token_types(kinds)
    writer.add_token_merges(merges(tokenizer))
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_add_bos_token(True)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def export(model_name, path, dtype="f32"):
    """Write the model of a preset, folder or hub id to `path`, whole or not at all. UserError."""
    try:
        import gguf
    except ImportError:
        raise UserError(f"the package gguf is missing; run: {INSTALL}") from None
    import numpy as np

    settings = ModelSettings(model=model_name, device="cpu", dtype="float32")
    model, tokenizer, _ = load_model_and_tokenizer(settings)
    config = model.config
    if config.model_type != "llama" or config.rope_parameters["rope_type"] != "default":
        raise UserError(f"{model_name} is no plain Llama model but {config.model_type}; {OTHERS}")
    kind = gguf.GGMLQuantizationType[dtype.upper()]
    with atomic_path(path) as partial:
        writer = gguf.GGUFWriter(partial, "llama")
        writer.add_name(model_name if "/" not in model_name else Path(model_name).name)
        writer.add_file_type(
            gguf.LlamaFileType["ALL_F32" if dtype == "f32" else f"MOSTLY_{kind.name}"]
        )
        writer.add_vocab_size(config.vocab_size)
        writer.add_context_length(config.max_position_embeddings)
        writer.add_embedding_length(config.hidden_size)
        writer.add_block_count(config.num_hidden_layers)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(config.num_attention_heads)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
        writer.add_rope_dimension_count(config.head_dim)
        write_tokenizer(writer, tokenizer, config.vocab_size)
        for name, tensor in model.state_dict().items():
            if name == "lm_head.weight" and config.tie_word_embeddings:
                continue  # llama.cpp takes the embedding then
            array = tensor.numpy().astype(np.float32)
            for part, heads in (
                ("q_proj", config.num_attention_heads),
                ("k_proj", config.num_key_value_heads),
            ):
                if f".{part}." in name:
                    array = interleaved(array, heads)
            own = kind if array.ndim > 1 else gguf.GGMLQuantizationType.F32  # norms stay exact
            writer.add_tensor(
                gguf_name(name),
                gguf.quants.quantize(np.ascontiguousarray(array), own),
                raw_dtype=own,
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="preset, hub id or folder")
    parser.add_argument("file", type=Path, help="the .gguf file to write")
    parser.add_argument("--dtype", choices=("f32", "bf16", "f16"), default="f32")
    arguments = parser.parse_args(argv)
    try:
        export(arguments.model, arguments.file, arguments.dtype)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{arguments.file}: {arguments.file.stat().st_size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
