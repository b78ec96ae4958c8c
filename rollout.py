"""Sampling: prompts of any length in, one response each out, with the log-probability of every sampled token.

    responses = generate(model, [[1, 5, 9], [1, 7]], max_new_tokens=64, eos_token_ids=[2])
    responses[0].ids, responses[0].logprobs, responses[0].finished

One file, torch alone; it takes any Hugging Face causal LM of a tested family (FAMILIES) by its calling convention.
Token ids go in and come out: no text, no padding ids and no generation config are involved.

A SLOT is one row of the key/value cache, and the rows in use always come first. A response that ended frees its slot (the
last row moves into the gap) and the next prompt is written into the free one while the others go on. So the batch stays
full while prompts are left, and shrinks when none are:

    slot 0  x x x y y y y y .        position t of a sequence stands at index t of its row,
    slot 1  x y y y .                whatever the other rows do. Row r may look at index j when
    slot 2  x x x x x y y y y y .    j <= position of r: what an earlier sequence left behind it is never seen.

A prompt is prefilled without its last token; that one is the first input of the decode step, which is then the only place
where anything is sampled. Prompts of different lengths are padded on the RIGHT in the prefill: with position ids counted from
zero in every row, and causal attention, padding influences nothing; decoding overwrites it index by index.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice

import torch

# Families whose cached decoding is compared with plain full forwards in tests/test_rollout.py. The layers of these models ask
# of a cache only `update` and take a ready 4-D mask (a dict of them where layers differ). Recurrent, linear-attention,
# chunked-attention, ALiBi and encoder-decoder models would be sampled wrongly by this file, so it refuses what it does not know.
FAMILIES = {
    "cohere", "cohere2", "gemma", "gemma2", "gemma3_text", "glm4", "gpt2", "gpt_neox", "granite", "llama", "mistral", "mixtral",
    "olmo2", "olmo3", "olmoe", "phi3", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "smollm3", "stablelm", "starcoder2",
}  # fmt: skip


@dataclass
class Rollout:
    """One sampled response."""

    ids: list[int] = field(default_factory=list)  # sampled tokens, the EOS included
    logprobs: list[float] = field(default_factory=list)  # of each of them, in nats, under the distribution it was drawn from
    finished: bool = False  # True: ended by an EOS; False: cut by max_new_tokens


class Cache:
    """Keys and values of every layer in tensors [slots, heads, length, head size], allocated once, written by index."""

    def __init__(self, slots: int, length: int):
        self.slots, self.length = slots, length
        self.layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def prefill(self, rows: slice):
        """The next forward writes positions 0, 1, ... of `rows`; it attends to itself alone."""
        self.rows, self.positions = rows, None

    def decode(self, positions: torch.Tensor):
        """The next forward writes one token a row, at `positions` [n] of the first n rows; it attends to all that they hold."""
        self.rows, self.positions, self.filled = torch.arange(len(positions), device=positions.device), positions, int(positions.max()) + 1

    def move(self, source: int, target: int):
        for tensors in self.layers.values():
            for x in tensors:
                x[target] = x[source]

    # What the attention layers call; the name and the first three arguments are the Hugging Face convention.
    def update(self, key: torch.Tensor, value: torch.Tensor, layer: int, *args, **kwargs):
        if layer not in self.layers:  # here the layer's own head count, head size and dtype are known
            self.layers[layer] = tuple(x.new_zeros(self.slots, x.shape[1], self.length, x.shape[3]) for x in (key, value))
        out = []
        for cached, new in zip(self.layers[layer], (key, value)):
            if self.positions is None:
                cached[self.rows, :, : new.shape[2]] = new  # [n, heads, T, size]
                out.append(new)
            else:
                cached[self.rows, :, self.positions] = new[:, :, 0]  # [n, heads, size]
                out.append(cached[: len(self.rows), :, : self.filled])
        return tuple(out)

    def get_seq_length(self, *args) -> int:
        return 0  # asked only for default position ids, and ours are always given


def check_supported(model) -> None:
    """Raise ValueError, naming the family or the setting, where `generate` could sample from another distribution than the model's."""
    config = model.config
    if config.model_type not in FAMILIES:
        raise ValueError(f"rollout.py does not support the family {config.model_type!r}; it is tested on {', '.join(sorted(FAMILIES))}")
    if config._attn_implementation not in ("sdpa", "eager"):
        raise ValueError(f"rollout.py needs attention 'sdpa' or 'eager' (4-D masks), not {config._attn_implementation!r}")
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if kinds:
        raise ValueError(f"rollout.py does not support layers of type {', '.join(sorted(kinds))} ({config.model_type})")
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    types = {str(r.get("rope_type", r.get("type"))) for r in (rope, *rope.values()) if isinstance(r, dict)}
    if types & {"dynamic", "longrope"}:  # their frequencies depend on the longest sequence of the BATCH: rows would influence each other
        raise ValueError(f"rollout.py does not support rotary embeddings of type {', '.join(sorted(types))} ({config.model_type})")


def attention_masks(config, positions: torch.Tensor, length: int, dtype: torch.dtype):
    """Additive masks for queries at `positions` [B, T] over `length` keys, as the model takes them: [B, 1, T, length], or
    a dict of those by layer type. A key at index j is seen from position p when j <= p and, under a window w, j > p - w."""

    def mask(window: int | None) -> torch.Tensor:
        key, query = torch.arange(length, device=positions.device), positions[:, None, :, None]
        hidden = key > query if window is None else (key > query) | (key <= query - window)
        return torch.zeros(hidden.shape, dtype=dtype, device=positions.device).masked_fill_(hidden, torch.finfo(dtype).min)

    window, kinds = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
    if kinds is None:  # one kind of layer: a window, where there is one, holds for all
        return mask(window)
    return {kind: mask(window if kind == "sliding_attention" else None) for kind in set(kinds)}


def sample(logits: torch.Tensor, temperature: float, top_p: float, generator: torch.Generator | None = None):
    """Draw one token a row. logits: [n, V] -> ids [n], log-probabilities [n] under the distribution that was drawn from.

    softmax(logits / temperature), cut to its nucleus: the fewest most likely tokens that hold at least top_p, renormalised.
    Temperature 0 takes the most likely token; its log-probability is the one at temperature 1 (under its own it would be 0).
    """
    if logits.dtype != torch.float64:
        logits = logits.float()
    if temperature == 0:
        return logits.argmax(-1), logits.log_softmax(-1).amax(-1)
    logprobs = (logits / temperature).log_softmax(-1)  # [n, V]
    if top_p < 1:
        ordered, order = logprobs.sort(-1, descending=True)
        before = ordered.exp().cumsum(-1) - ordered.exp()  # the mass in front of each token; the first one always stays
        logprobs = logprobs.masked_fill(torch.empty_like(order, dtype=torch.bool).scatter_(-1, order, before >= top_p), float("-inf"))
        logprobs = logprobs.log_softmax(-1)
    # Inverse of the distribution function: one random number a row, where torch.multinomial draws one for every vocabulary entry.
    cumulative = logprobs.double().exp().cumsum(-1)
    u = torch.rand(len(logits), 1, dtype=torch.float64, device=logits.device, generator=generator)
    ids = torch.searchsorted(cumulative, u * cumulative[:, -1:], right=True)  # first index above u: never one of probability 0
    return ids[:, 0], logprobs.gather(-1, ids)[:, 0]


@torch.no_grad()
def generate(
    model,
    prompts: list[list[int]],
    *,
    max_new_tokens: int,
    eos_token_ids,
    temperature: float = 1.0,
    top_p: float = 1.0,
    slots: int = 64,
    generator: torch.Generator | None = None,
    vocab_size: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[Rollout]:
    """Sample one response for each prompt (list a prompt n times for n of them); the results come in the prompts' order.

    model: a Hugging Face causal LM, run in eval mode without gradient; its modules' modes are put back afterwards.
    prompts: token ids, one list each, not empty. eos_token_ids: every id that ends a response (looked for there alone, kept in it).
    temperature, top_p: see `sample`; nothing is taken from the model's generation config. slots: rows of the cache, that is the
    most sequences decoded at once; memory is slots x (longest prompt + max_new_tokens) tokens of keys and values.
    generator: random state, on the model's device. vocab_size: ids from this one on are never sampled (an output layer may be wider than
    the tokenizer). progress: called with 1 when a response is complete (tqdm's `update` fits).
    Raises ValueError for a family that is not supported, an empty prompt, or settings outside their range.
    """
    check_supported(model)
    if max_new_tokens < 1 or slots < 1 or temperature < 0 or not 0 < top_p <= 1:
        raise ValueError("generate needs max_new_tokens >= 1, slots >= 1, temperature >= 0 and 0 < top_p <= 1")
    if not all(prompts):
        raise ValueError("generate got an empty prompt")
    if not prompts:
        return []
    device, dtype, eos = model.device, model.dtype, set(eos_token_ids)
    slots = min(slots, len(prompts))
    cache = Cache(slots, max(map(len, prompts)) + max_new_tokens)
    cache_name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"  # renamed in transformers 5.2x

    def forward(tokens, positions, length):
        masks = attention_masks(model.config, positions, length, dtype)
        kwargs = {cache_name: cache, "position_ids": positions, "attention_mask": masks, "use_cache": True, "logits_to_keep": 1}
        return model(input_ids=tokens, **kwargs).logits[:, -1, :vocab_size]

    rollouts = [Rollout() for _ in prompts]
    waiting = iter(range(len(prompts)))
    active: list[int] = []  # active[row] is the index of the prompt in that slot
    token = torch.zeros(slots, dtype=torch.long, device=device)  # the next input of each row
    position = torch.zeros(slots, dtype=torch.long, device=device)  # and where it stands
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        while True:
            if new := list(islice(waiting, slots - len(active))):  # fill the free slots
                rows = slice(len(active), len(active) + len(new))
                longest = max(len(prompts[i]) for i in new) - 1
                if longest:
                    padded = torch.tensor([prompts[i][:-1] + [0] * (longest - len(prompts[i]) + 1) for i in new], device=device)
                    cache.prefill(rows)
                    forward(padded, torch.arange(longest, device=device).expand(len(new), -1), longest)
                token[rows] = torch.tensor([prompts[i][-1] for i in new], device=device)
                position[rows] = torch.tensor([len(prompts[i]) - 1 for i in new], device=device)
                active += new
            if not active:
                return rollouts
            n = len(active)
            cache.decode(position[:n])
            logits = forward(token[:n, None], position[:n, None], cache.filled)  # [n, V]
            ids, logprobs = sample(logits, temperature, top_p, generator)
            token[:n] = ids
            position[:n] += 1
            sampled = list(zip(ids.tolist(), logprobs.tolist()))
            for row in reversed(range(n)):  # from the end, so that the last row, which moves into a gap, has been looked at
                rollout = rollouts[active[row]]
                rollout.ids.append(sampled[row][0])
                rollout.logprobs.append(sampled[row][1])
                rollout.finished = sampled[row][0] in eos
                if rollout.finished or len(rollout.ids) == max_new_tokens:
                    last = len(active) - 1
                    if row != last:
                        cache.move(last, row)
                        active[row], token[row], position[row] = active[last], token[last], position[last]
                    active.pop()
                    if progress:
                        progress(1)
    finally:
        for module, mode in modes:
            module.training = mode
