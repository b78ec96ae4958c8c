"""What the README's two commands need for three models, in GB, by the scripts' own estimate:

|            | stage 1, training | at once      | stage 2, training | at once      |
| ---------- | ----------------- | ------------ | ----------------- | ------------ |
| Qwen3-0.6B | 18.3              | 5 / 19 / 35  | 17.0              | 14 / 68 / 126 |
| Qwen3-1.7B | 40.4              | – / 19 / 34  | 39.2              | – / 52 / 111  |
| Qwen3-4B   | 82.2              | – / 13 / 25  | 83.1              | – / 15 / 61  |

"At once": on an RTX 4090, H100 and H200, which have 25.3, 85.0 and 150.0 GB.

    python tests/memory_table.py [--parts]

Nothing is allocated: the models have Qwen3's shapes on the meta device. Problems have 512 tokens,
P_r has 16. GB are 10^9 bytes. Sequences decoded at once are those of full length: revisions in
stage 1, which is when it has no optimizer yet, and responses in stage 2, beside optimizer and
teacher; a dash means that training does not fit the card. --parts prints what the sums consist of.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common
import sdzero
import srt
from rollout import cache_bytes_per_token

SHAPES = {  # hidden size, feed-forward width, layers, heads: of Qwen3
    "0.6B": (1024, 3072, 28, 16),
    "1.7B": (2048, 6144, 28, 16),
    "4B": (2560, 9728, 36, 32),
}
CARDS = {
    24: 25.3e9,
    80: 85.0e9,
    141: 150.0e9,
}  # bytes that torch reports of an RTX 4090, H100, H200
PROMPT, PHRASE = 512, [0] * 16


def on_meta(name: str) -> common.LM:
    hidden, inner, layers, heads = SHAPES[name]
    config = AutoConfig.for_model(
        "qwen3",
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=151936,
        max_position_embeddings=262144,  # Qwen3-4B-Instruct-2507's
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    lm = common.LM(model, None, {0}, 151669, config.max_position_embeddings)
    lm.phrase_ids = lambda phrase: PHRASE
    return lm


def estimate(lm: common.LM, script) -> tuple[dict, list[str]]:
    """The parts in bytes with the README's command, and for each card the sequences at once."""
    nowhere = Path(tempfile.gettempdir()) / "nothing is here"
    flags = ["--model", "-", "--dataset", "-", "--output", str(nowhere)]
    args = script.parse_arguments([*flags, "--gradient-checkpointing"])
    parts = common.estimate_memory(lm, args, PROMPT)
    parts = {name: n for name, n in parts.items() if not name.startswith("slot")}
    length, standing = PROMPT + args.max_new_tokens, parts["weights"]
    if script is sdzero:
        standing += parts["optimizer"] + parts["teacher"]
    else:
        length += len(PHRASE) + args.max_new_tokens
    slot, found = cache_bytes_per_token(lm.model) * length, []
    for card in CARDS.values():
        slots = min(common.MAX_SLOTS, int(0.9 * card - standing) // slot)
        found.append(str(max(1, slots)) if sum(parts.values()) < card else "–")
    return parts, found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", action="store_true", help="what the sums consist of")
    options = parser.parse_args()
    for name in SHAPES:
        lm, cells = on_meta(name), [f"Qwen3-{name}"]
        for script in (srt, sdzero):
            parts, slots = estimate(lm, script)
            cells += [f"{sum(parts.values()) / 1e9:.1f}", " / ".join(slots)]
            if options.parts:
                figures = ", ".join(f"{part} {n / 1e9:.2f}" for part, n in parts.items())
                print(f"{script.__name__}, {name}: {figures}")
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
