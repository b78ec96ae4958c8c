"""Sampling: prompts of any length in, one response each out, with the log-probability of every sampled token.

    responses = generate(model, [[1, 5, 9], [1, 7]], max_new_tokens=64, eos_token_ids=[2])
    responses[0].ids, responses[0].logprobs, responses[0].finished

One file, torch alone; it takes any Hugging Face causal LM of a tested family (FAMILIES) by its calling convention.
Token ids go in and come out: no text, no padding ids and no generation config are involved. Three ideas make it fast.

SLOTS. Responses differ in length by ten times. A slot is one row of the batch; when its response ends, the next prompt takes its place
while the others go on. When no prompt is left, the last row moves into the gap: rows in use always come first, and the batch shrinks.

CACHE. Keys and values stand in one tensor, allocated once, written by index. Position t of a sequence stands at index t of its row,
whatever the other rows do, and a row at position p may look at indices <= p: what an earlier sequence left there is never seen.

    stage (prompts, some at a time)        cache (slots x length)             x prompt   y response   . not yet written, or stale
    x x x x x   --- copied when a    --->  slot 0  x x x x x y y y y . .
    x x . . .       slot is free,          slot 1  x x y y . . . . . . .   every step feeds one token a row, at the row's own
    x x x . .       once a sample          slot 2  x x x x x y y y y y y   position, and samples the next one

Prompts go through the model ahead of their turn, some at a time, without their last tokens, which are the first inputs of the decode step
(the only place where anything is sampled). On the stage they are padded on the RIGHT: with positions counted from zero and causal
attention padding influences nothing, and decoding overwrites it. A prompt that is sampled n times is computed once and copied n times.

STEP. `Decoder.step` reads and writes nothing but tensors that stay where they are, and the host only counts. Every few steps (on the CPU
at every one) it looks at what ended, and drops what was sampled behind an EOS. So a step of fixed shape can be captured as a CUDA graph.
"""

import inspect
import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial

import torch

# Families compared with plain full forwards in tests/test_rollout.py. Their layers ask of a cache only `update` and take a ready 4-D mask
# (a dict of them where layers differ). Recurrent, linear- or chunked-attention, ALiBi and encoder-decoder models would go wrong: refused.
FAMILIES = {
    "cohere", "cohere2", "gemma", "gemma2", "gemma3_text", "glm4", "gpt2", "gpt_neox", "granite", "llama", "mistral", "mixtral",
    "olmo2", "olmo3", "olmoe", "phi3", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "smollm3", "stablelm", "starcoder2",
}  # fmt: skip
PREFILL_TOKENS = 8192  # the most prompt tokens, padding included, in one forward (a single longer prompt is still one)
signature = cache(inspect.signature)


@dataclass
class Rollout:
    """One sampled response."""

    ids: list[int] = field(default_factory=list)  # sampled tokens, the EOS included
    logprobs: list[float] = field(default_factory=list)  # of each of them, in nats, under the distribution it was drawn from
    finished: bool = False  # True: ended by an EOS; False: cut by max_new_tokens

    @property
    def without_eos(self):
        return self.ids[:-1] if self.finished else self.ids


class Stage:
    """Takes what the layers write in a forward over prompts, which attend to themselves alone."""

    is_compileable = False  # asked for by StableLM of transformers 5.0

    def __init__(self):
        self.written: list[torch.Tensor] = []

    # What the attention layers call; the name and the first three arguments are the Hugging Face convention.
    def update(self, key: torch.Tensor, value: torch.Tensor, layer: int, *args, **kwargs):
        self.written += [key, value]  # [B, heads, T, size] each
        return key, value

    def get_seq_length(self, *args) -> int:  # asked only for default position ids, and ours are always given
        return 0


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
        hidden = key > query if window is None else (key > query) | (key <= query - window)
        return hidden.to(dtype).mul_(torch.finfo(dtype).min)

    key, query = torch.arange(length, device=positions.device), positions[:, None, :, None]
    window, kinds = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)  # no kinds: the window holds for all
    return mask(window) if kinds is None else {kind: mask(window if kind == "sliding_attention" else None) for kind in set(kinds)}


def forward(model, cache, tokens: torch.Tensor, positions: torch.Tensor, length: int) -> torch.Tensor:
    """Tokens [B, T] at positions [B or 1, T], attending to `length` keys of the cache -> logits of the last one [B, V]."""
    masks = attention_masks(model.config, positions, length, model.dtype)
    name = "cache" if "cache" in signature(type(model).forward).parameters else "past_key_values"  # renamed in transformers 5.2x
    kwargs = {name: cache, "position_ids": positions, "attention_mask": masks, "use_cache": True, "logits_to_keep": 1}
    return model(input_ids=tokens, **kwargs).logits[:, -1]


def prefill(model, prompts: list[tuple[int, ...]]) -> torch.Tensor:
    """Keys and values of prompts without their last tokens: [2 x layers, B, heads, longest - 1 (at least 1), size]."""
    stage, width = Stage(), max(1, max(map(len, prompts)) - 1)
    padded = torch.tensor([p[:-1] + (0,) * (width + 1 - len(p)) for p in prompts], device=model.device)
    forward(model, stage, padded, torch.arange(width, device=model.device)[None], width)  # one mask for all rows
    return torch.stack(stage.written)


def draw(weights: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
    """One index a row, with probability proportional to its weight. weights [n, V] -> [n, 1].

    Inverse of the distribution function: one random number a row, where torch.multinomial draws one for every entry. A large vocabulary
    is cut into blocks: a block is drawn by its sum, then an entry in it, so that nothing but sums runs over all of it."""
    if weights.shape[1] > 1024:
        blocks = torch.nn.functional.pad(weights, (0, -weights.shape[1] % 128)).view(len(weights), -1, 128)
        block = draw(blocks.sum(-1), generator)
        return 128 * block + draw(blocks.gather(1, block[:, :, None].expand(-1, -1, 128))[:, 0], generator)
    cumulative = weights.double().cumsum(-1)
    u = cumulative[:, -1:] * torch.rand(len(weights), 1, dtype=torch.float64, device=weights.device, generator=generator)
    return torch.searchsorted(cumulative, u, right=True)  # the first index above u: never one of weight 0


def sample(logits: torch.Tensor, temperature: float, top_p: float, generator: torch.Generator | None = None, vocab_size: int | None = None):
    """Draw one token a row. logits: [n, V] -> ids [n], log-probabilities [n] under the distribution that was drawn from.

    softmax(logits / temperature), cut to its nucleus: the fewest most likely tokens that hold at least top_p, renormalised.
    Temperature 0 takes the most likely token; its log-probability is the one at temperature 1 (under its own it would be 0)."""
    logits = logits[:, :vocab_size].to(torch.promote_types(logits.dtype, torch.float32))
    if temperature not in (0, 1):
        logits = logits / temperature
    if top_p < 1 and temperature:
        ordered, order = logits.softmax(-1).sort(-1, descending=True)
        before = ordered.cumsum(-1) - ordered  # the mass in front of each token; the first one always stays
        logits = logits.masked_fill(torch.empty_like(order, dtype=torch.bool).scatter_(-1, order, before >= top_p), float("-inf"))
    logits = logits - logits.amax(-1, keepdim=True)
    weights = logits.exp()  # [n, V]
    ids = draw(weights, generator) if temperature else logits.argmax(-1, keepdim=True)
    return ids[:, 0], logits.gather(-1, ids)[:, 0] - weights.sum(-1).log()


class Decoder(Stage):
    """The cache and the state of all slots, in tensors that stay where they are, and the decode step over the first n of them."""

    def __init__(self, model, staged: torch.Tensor, slots: int, length: int, eos: list[int], sampler, static: bool):
        self.model, self.sampler, self.static, device = model, sampler, static, model.device
        layers, _, heads, _, size = staged.shape  # of keys and values as `prefill` returns them
        self.kv = staged.new_zeros(layers, slots, heads, length, size)
        self.flat = self.kv.view(layers, -1, size).unbind(0)
        self.base = torch.arange(0, slots * heads * length, length, device=device).view(slots, heads)  # where index 0 stands in flat
        self.tokens = torch.zeros(slots, length, dtype=torch.long, device=device)  # index t: the token at position t
        self.logprobs = torch.zeros(slots, length, dtype=torch.promote_types(model.dtype, torch.float32), device=device)  # index t: of it
        self.position = torch.zeros(slots, dtype=torch.long, device=device)  # where each row's next input stands
        self.ended = torch.zeros(slots, dtype=torch.bool, device=device)  # an EOS was sampled
        self.eos = torch.tensor(eos, dtype=torch.long, device=device)
        self.graphs: dict[tuple[int, int], torch.cuda.CUDAGraph | None] = {}

    def update(self, key: torch.Tensor, value: torch.Tensor, layer: int, *args, **kwargs):
        for i, new in enumerate((key, value), 2 * layer):
            self.flat[i].index_copy_(0, self.where, new.reshape(len(self.where), -1))  # from [n, heads, 1, size]
        return self.seen[2 * layer], self.seen[2 * layer + 1]

    def admit(self, kv: torch.Tensor, rows: list[int], sources: list[int], prompts: list[list[int]]):
        """Slots `rows` take `prompts`, which stand in rows `sources` of the stage."""
        host = [rows, sources, [len(p) - 1 for p in prompts], [p[-1] for p in prompts]]
        row, source, position, token = torch.tensor(host, device=self.eos.device)
        self.kv[:, row, :, : kv.shape[3]] = kv[:, source]
        self.tokens[row, position], self.position[row], self.ended[row] = token, position, False

    def move(self, sources: list[int], targets: list[int], length: int):
        source, target = torch.tensor([sources, targets], device=self.eos.device)
        for x in (self.kv[:, :, :, :length].transpose(0, 1), self.tokens, self.logprobs, self.position, self.ended):
            x[target] = x[source]

    def step(self, n: int, length: int):
        """One token for each of the first n rows, whose positions are below `length`. The host reads nothing in here."""
        position = self.position[:n]
        self.where = (self.base[:n] + position[:, None]).view(-1)  # this step's keys and values go there: [n * heads]
        self.seen = self.kv[:, :n, :, :length].unbind(0)  # and are read from here
        token = self.tokens[:n].gather(1, position[:, None])
        ids, logprobs = self.sampler(forward(self.model, self, token, position[:, None], length))
        position.add_(1).clamp_(max=self.tokens.shape[1] - 1)  # the limit is for rows that fixed shapes drag along unused
        self.tokens[:n].scatter_(1, position[:, None], ids[:, None])
        self.logprobs[:n].scatter_(1, position[:, None], logprobs[:, None])
        self.ended[:n] |= (ids[:, None] == self.eos).any(-1)

    def run(self, n: int, length: int):
        """`step`, or a replay of it with fixed shapes: rows rounded up to a power of two, length to an eighth of the cache's."""
        if not self.static:
            return self.step(n, length)
        slots, longest = self.tokens.shape
        block = 64 * -(-longest // 512)
        shape = min(1 << (n - 1).bit_length(), slots), min(-(-length // block) * block, longest)
        if shape not in self.graphs or self.eos.device.type != "cuda":
            self.graphs[shape] = None  # a shape runs eagerly once, which warms it up; when it comes back it is captured
            return self.step(*shape)
        if self.graphs[shape] is None:
            pool = next((g.pool() for g in self.graphs.values() if g), None)  # one memory for all: they never run at the same time
            graph = self.graphs[shape] = torch.cuda.CUDAGraph()
            if generator := self.sampler.keywords["generator"]:
                graph.register_generator_state(generator)
            with torch.cuda.graph(graph, pool=pool):
                self.step(*shape)
        self.graphs[shape].replay()


@torch.inference_mode()
def generate(model, prompts: list[list[int]], *, max_new_tokens: int | list[int], eos_token_ids, temperature: float = 1.0,
             top_p: float = 1.0, slots: int | None = None, generator: torch.Generator | None = None, vocab_size: int | None = None,
             progress: Callable | None = None, check_every: int | None = None, cuda_graph: bool = False) -> list[Rollout]:  # fmt: skip
    """Sample one response for each prompt (list a prompt n times for n of them); the results come in the prompts' order.

    model: a Hugging Face causal LM, run in eval mode without gradient; its modules' modes are put back afterwards.
    prompts: token ids, one list each, not empty. max_new_tokens: the limit of all responses, or a list with one for each.
    eos_token_ids: every id that ends a response (looked for there alone, kept in it). temperature, top_p: see `sample`; nothing is taken
    from the model's generation config. slots: the most sequences decoded at once; the cache takes slots x (prompt + max_new_tokens) tokens
    of keys and values, logged (INFO) before it starts. None: 64, or on CUDA what fits into three quarters of the free memory.
    generator: random state, on the model's device. vocab_size: ids from this one on are never sampled (an output layer may be wider than
    the tokenizer). progress: called with 1 when a response is complete. check_every: steps between two looks at what ended; None: 1 on the
    CPU, 8 elsewhere. cuda_graph: decode in fixed shapes, captured and replayed on CUDA. NOT YET RUN ON A GPU, hence off by default;
    without CUDA the same shapes run eagerly (for the tests). Raises ValueError for a family that is not supported and for bad input.
    """
    check_supported(model)
    limits = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else list(max_new_tokens)
    if min(limits, default=1) < 1 or (slots or 1) < 1 or (check_every or 1) < 1 or temperature < 0 or not 0 < top_p <= 1:
        raise ValueError("generate needs max_new_tokens, slots and check_every >= 1, temperature >= 0 and 0 < top_p <= 1")
    if len(limits) != len(prompts) or not all(prompts):
        raise ValueError("generate got an empty prompt" if not all(prompts) else "generate needs one limit for each prompt")
    if not prompts:
        return []
    longest, length, device = max(map(len, prompts)), max(len(p) + limit for p, limit in zip(prompts, limits)), model.device
    modes, what = [(module, module.training) for module in model.modules()], "one token"
    model.eval()
    try:
        probe = prefill(model, [(0, 0)])  # of one token, to learn what the layers write
        token_bytes = probe.numel() * probe.element_size()
        if slots is None and device.type == "cuda":  # three quarters of what is free, fp32 logits and their copies counted
            free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
            slots = max(1, min(256, int(0.75 * free) // (token_bytes * (length + longest // 2) + 16 * model.config.vocab_size)))
        slots = min(slots or 64, len(prompts))
        ahead = max(1, min(slots // 4, PREFILL_TOKENS // longest))
        what = f"{slots} slots x {length} + {ahead} x {longest} tokens, {token_bytes * (slots * length + ahead * longest) / 1e9:.3g} GB"
        logging.getLogger(__name__).info("keys and values of %s", what)
        sampler = partial(sample, temperature=temperature, top_p=top_p, generator=generator, vocab_size=vocab_size)
        decoder = Decoder(model, probe, slots, length, list(eos_token_ids), sampler, cuda_graph)
        return decode_all(decoder, prompts, limits, ahead, check_every or (1 if device.type == "cpu" else 8), progress or (lambda n: None))
    except RuntimeError as error:  # torch.OutOfMemoryError is one; the CPU's allocator raises the plain one
        if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
        raise torch.OutOfMemoryError(f"out of memory: keys and values of {what}; lower slots or max_new_tokens") from error
    finally:
        for module, mode in modes:
            module.training = mode


def decode_all(decoder: Decoder, prompts: list[list[int]], limits: list[int], ahead: int, check_every: int, progress) -> list[Rollout]:
    """The host's part: who sits in which slot, who is next, and whose response is complete."""
    same: dict[tuple[int, ...], list[int]] = {}
    for i, prompt in enumerate(prompts):
        same.setdefault(tuple(prompt), []).append(i)
    waiting = deque(same.items())  # equal prompts follow each other, and are computed once
    staged: deque[tuple[int, int]] = deque()  # (prompt, the row of the stage where it stands)
    rows: dict[int, tuple[int, int, int]] = {}  # slots in use: (step of the last allowed token, position - step, prompt)
    slots, eos, now = len(decoder.position), set(decoder.eos.tolist()), 0  # now: steps so far
    rollouts = [Rollout() for _ in prompts]
    while True:
        while (staged or waiting) and len(rows) < slots:  # free slots take the next prompts
            if not staged:
                groups = [waiting.popleft() for _ in range(min(len(waiting), ahead))]
                kv = prefill(decoder.model, [prompt for prompt, _ in groups])
                staged.extend((i, row) for row, (_, indices) in enumerate(groups) for i in indices)
            free = [row for row in range(slots) if row not in rows][: len(staged)]
            new, sources = zip(*[staged.popleft() for _ in free])
            decoder.admit(kv, free, sources, [prompts[i] for i in new])
            rows.update({row: (now + limits[i], len(prompts[i]) - 1 - now, i) for row, i in zip(free, new)})
        if not rows:
            return rollouts
        n, length = len(rows), now + 1 + max(offset for _, offset, _ in rows.values())
        if sources := [row for row in rows if row >= n]:  # nobody is left to take some slots: the last rows move there
            targets = [row for row in range(n) if row not in rows]
            decoder.move(sources, targets, length)
            rows.update(zip(targets, [rows.pop(row) for row in sources]))
        for _ in range(min(check_every, min(rows.values())[0] - now)):
            decoder.run(n, length)
            now, length = now + 1, length + 1
        ended = decoder.ended[:n].tolist()
        if complete := [row for row in range(n) if ended[row] or rows[row][0] == now]:
            tokens, scores = decoder.tokens[complete, :length].tolist(), decoder.logprobs[complete, :length].tolist()
            for row, ids, logprobs in zip(complete, tokens, scores):
                deadline, _, i = rows.pop(row)
                start, stop = len(prompts[i]), len(prompts[i]) + limits[i] - (deadline - now)
                stop = next((t + 1 for t in range(start, stop) if ids[t] in eos), stop)  # behind an EOS: sampled before the host looked
                rollouts[i] = Rollout(ids[start:stop], logprobs[start:stop], ids[stop - 1] in eos)
                progress(1)


@torch.inference_mode()
def cache_bytes_per_token(model) -> int:
    probe = prefill(model, [(0, 0)])
    return probe.numel() * probe.element_size()
