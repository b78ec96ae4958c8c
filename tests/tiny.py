"""Tiny random models of every family that rollout.py supports, and a tokenizer for them.

Sliding windows are shorter than the tests' sequences, so that a forgotten window shows.
"""

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
SETTINGS = {  # what a family needs beyond COMMON
    "gpt2": dict(n_embd=32, n_layer=3, n_head=4, n_positions=64, n_inner=48),
    "gemma3_text": dict(sliding_window=5, layer_types=MIXED),
    "gemma2": dict(sliding_window=5, query_pre_attn_scalar=8),
    "cohere2": dict(sliding_window=5, layer_types=MIXED),
    "mistral": dict(sliding_window=5),
    "mixtral": dict(sliding_window=None, num_local_experts=4),
    "qwen2": dict(use_sliding_window=True, sliding_window=5, max_window_layers=1),
    "qwen3": dict(tie_word_embeddings=True),
    "olmo3": dict(sliding_window=5, layer_types=MIXED),
    "phi3": dict(sliding_window=5),
    "starcoder2": dict(sliding_window=5),
    "granite": dict(logits_scaling=4.0, embedding_multiplier=2.0),
    "qwen2_moe": dict(
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
    ),
    "qwen3_moe": dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16),
    "olmoe": dict(num_experts=4, num_experts_per_tok=2),
    "glm4": dict(partial_rotary_factor=0.5),
}
COMMON = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
    bos_token_id=None,
    eos_token_id=1,
    pad_token_id=None,
)


def tiny(
    family: str,
    vocab_size: int = 40,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    attention: str | None = None,
    **settings,
):
    """A model with weights large enough that its distributions are far from uniform."""
    torch.manual_seed(seed)
    settings = {**COMMON, "vocab_size": vocab_size, **SETTINGS.get(family, {}), **settings}
    config = AutoConfig.for_model(family, **settings)
    model = AutoModelForCausalLM.from_config(
        config, attn_implementation=attention, experts_implementation="eager"
    )
    model = model.to(dtype).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() > 1:
                p.normal_(std=1.0 if "embed" in name or "wte" in name else 0.3)
    return model


CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{{ mark or '' }}{% endif %}"
)


def make_tokenizer(eos: bool = True, template: bool = True, adds: str = ""):
    """One token per character, with a chat template; padding is EOS, as SmolLM2-Instruct has it.

    adds: what the tokenizer itself puts around every text, "bos", "eos" or both: "bos eos". The
    BOS is <|user|>.
    """
    special = ["<|im_end|>", "<|unk|>", "<|user|>", "<|assistant|>"]
    words = special + list("\n" + "".join(map(chr, range(32, 127))))
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<|unk|>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    backend.decoder = decoders.Fuse()
    names = dict(eos_token="<|im_end|>", pad_token="<|im_end|>") if eos else {}
    if adds:
        single = " ".join(
            ["<|user|>"] * ("bos" in adds) + ["$A"] + ["<|im_end|>"] * ("eos" in adds)
        )
        backend.post_processor = processors.TemplateProcessing(
            single=single, special_tokens=[("<|im_end|>", 0), ("<|user|>", 2)]
        )
        names["bos_token"] = "<|user|>"
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<|unk|>", additional_special_tokens=special, **names
    )
    if template:
        tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def odd(response: str, answer) -> bool:
    """A verifier that a random model satisfies about half of the time."""
    return sum(map(ord, response)) % 2 == 1


def as_flags(flags, named):
    """call(srt, *FLAGS, model=base, collect_only=True): each as the command line has it."""
    flags = [str(f) for f in flags]
    for name, value in named.items():
        name = f"--{name.replace('_', '-')}"
        flags += [name] if value is True else [name, str(value)]
    return flags


def call(script, *flags, **named):
    script.main(as_flags(flags, named))
