"""Sampling: one response per prompt, with the log-probability of every sampled token.

    responses = generate(model, [[1, 5, 9], [1, 7]], max_new_tokens=64, eos_token_ids=2)
    responses[0].ids, responses[0].logprobs, responses[0].finished

This file needs only torch. It calls a Hugging Face causal LM of a tested family (FAMILIES) by the
usual arguments of its forward. Token ids go in and come out: no text, no padding ids and no
generation config are involved. Three ideas make it fast.

SLOTS. Some responses are ten times as long as others. A slot is one row of the batch; when its
response ends, the next prompt takes its place while the other rows go on. When no prompt is left,
the last row moves into the gap: the rows in use are always the first ones, and the batch shrinks.

CACHE. Each layer has one tensor of keys and values, allocated once and written by index.
Position t of a sequence is index t of its row, whatever the other rows do, and a row at position p
attends to the indices <= p: what an earlier sequence left after them is never seen.

    prefilled prompts                  cache (slots x length)          x prompt
    x x x x x  --- copied when a --->  slot 0  x x x x x y y y y . .   y response
    x x . . .      slot is free,       slot 1  x x y y . . . . . . .   . not written, or stale
    x x x . .      once per sample     slot 2  x x x x x y y y y y y

Prompts go through the model before their turn, a few at a time. Their last tokens are left out:
these are the first inputs of the decode step, the only place where anything is sampled. Prompts
are padded on the RIGHT: positions count from zero and attention is causal, so the padding
influences nothing, and decoding overwrites it. A prompt that is sampled n times is computed once
and copied n times.

STEP. A decode step feeds one token per row, at the row's own position, and samples the next one.
It reads and writes only tensors that stay where they are, and the host only counts. Every few steps
(on the CPU after each) the host looks which rows have ended, and drops what they sampled after
their EOS. So a step of fixed shape can be captured as a CUDA graph (FixedShapes, below). Its layers
can also be compiled, and their weights packed.

Read `generate`, `decode_all` and `Decoder.step` first.
"""

import gc
import inspect
import logging
import math
import operator
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache, partial

import torch
import torch.nn.functional as F

# Families that tests/test_rollout.py compares with plain full forwards. Their layers need only
# `update` from a cache, and take a finished 4-D mask (where layers differ: a dict of masks). Models
# with recurrent, linear- or chunked-attention layers, with ALiBi, or with an encoder would be
# sampled wrongly, so they are refused.
FAMILIES = frozenset(
    "cohere cohere2 gemma gemma2 gemma3_text glm4 gpt2 gpt_neox granite llama mistral mixtral "
    "olmo2 olmo3 olmoe phi3 qwen2 qwen2_moe qwen3 qwen3_moe smollm3 stablelm starcoder2".split()
)
PREFILL_TOKENS = 8192  # of prompts, with their padding, in one forward (or one longer prompt)


@dataclass
class Rollout:
    """One sampled response."""

    ids: list[int] = field(default_factory=list)  # the sampled tokens, with the EOS
    logprobs: list[float] = field(default_factory=list)  # of each, in nats, as it was drawn
    finished: bool = False  # True: ended by an EOS; False: cut by max_new_tokens

    @property
    def without_eos(self) -> list[int]:
        """The ids as another prompt quotes them: without the EOS that ended the response."""
        return self.ids[:-1] if self.finished else self.ids


# --------------------------------------------------------------------------------- for the caller


@torch.inference_mode()
def generate(
    model,
    prompts,
    *,
    max_new_tokens: int | list[int],
    eos_token_ids: int | list[int] | None,
    temperature: float = 1.0,
    top_p: float = 1.0,
    slots: int | None = None,
    seed: int | list[int] | None = None,
    vocab_size: int | None = None,
    progress: Callable | None = None,
    check_every: int | None = None,
    cuda_graph: bool = False,
    compile_layers: bool = False,
) -> list[Rollout]:
    """Sample one response for each prompt; the results are in the order of the prompts.

    model: a Hugging Face causal LM, also inside DistributedDataParallel or torch.compile (the model
        itself is then called, not compiled). It runs in eval mode without gradient; its modes are
        restored afterwards. Inside torch.autocast it computes, and is cached, as autocast has it.
    prompts: token ids without padding, none empty: lists, 1-D tensors, or one 2-D tensor. To draw n
        responses to a prompt, list it n times.
    max_new_tokens: the limit of all responses, or a list with one for each.
    eos_token_ids: the ids that end a response, one id or several or none ([] or None). They are
        looked for only in the response, which keeps its EOS.
    temperature, top_p: as in `sample`. Nothing is taken from the model's generation config.
    slots: the most sequences decoded at once. The cache holds slots x (prompt + max_new_tokens)
        tokens, the sum rounded up to 64s with cuda_graph; its size is logged (INFO) before it is
        allocated. None: `fit_slots`, which on CUDA depends on the memory that is free.
    seed: of the random numbers; None takes one from torch's own generator. Every response has a
        stream of its own, so that neither slots nor the other prompts change what it samples, apart
        from rounding errors of a forward over other rows. Response i of generate(..., seed=s) has
        `stream_seeds(s, len(prompts))[i]`; a list gives each response's own, for a part of a batch.
    vocab_size: ids from this one on are never sampled (output layers may be wider than tokenizers).
    progress: called with 1 whenever a response is complete. It must leave the model alone.
    check_every: steps between two looks at what has ended. None: 1 on the CPU, 8 elsewhere.
    cuda_graph: decode in fixed shapes, on CUDA by replaying graphs: 1.2 to 6 times as fast (4B on
        an H100: the most with few slots and a slow host). Each call captures them anew, some 0.1 s
        for each of up to 64 shapes (256 slots). The forward must not read tensors on the host, as
        some mixtures of experts do, or capturing fails. Without CUDA the same shapes run eagerly
        (for the tests).
    compile_layers: torch.compile the layers and the drawing of the decode step. With cuda_graph a
        step is 1.2 to 1.4 times as fast, with a third of the kernels; it takes some 20 s in the
        first call of a process. By default transformers' attention is compiled with the layer, and
        then copies keys and values for every query head. To leave it as it is, first call
        AttentionInterface.register("sdpa", torch.compiler.disable(sdpa_attention_forward)), with
        the function of that name from transformers.integrations.sdpa_attention.

    After `pack_weights(model)` the projections to q, k and v are one matrix product, and gate and
    up another, compiled or not.

    Raises ValueError for a model that `check_supported` refuses, for prompts that do not fit into
    the model's positions together with their responses, for EOS ids that are never sampled, and
    for other bad arguments; TypeError for what is not token ids; FloatingPointError for logits that
    are nan or +inf.
    """
    model = unwrapped(model)
    check_supported(model)
    prompts, limits, eos, seeds = as_lists(prompts, max_new_tokens, eos_token_ids, seed)
    check_numbers(model, prompts, limits, eos, temperature, top_p, slots, vocab_size, check_every)
    if not prompts:
        return []
    longest_prompt = max(map(len, prompts))
    length = max(len(p) + limit for p, limit in zip(prompts, limits))
    with sampling_mode(model), packed_products(model):
        slots = min(slots or fit_slots(model, longest_prompt, length), len(prompts))
        ahead = max(1, min(slots // 4, PREFILL_TOKENS // longest_prompt))
        probe = prefill(model, [(0, 0)])  # shows which tensors the layers write
        allocated = -(-length // 64) * 64 if cuda_graph else length  # see FixedShapes
        size = bytes_per_token(probe) * (slots * allocated + ahead * longest_prompt) / 1e9
        memory = f"{slots} slots x {allocated} + {ahead} x {longest_prompt} tokens, {size:.3g} GB"
        logging.getLogger(__name__).info("keys and values of %s", memory)
        sampler = partial(sample, temperature=temperature, top_p=top_p, vocab_size=vocab_size)
        every = check_every or (1 if model.device.type == "cpu" else 8)
        try:
            decoder = Decoder(model, probe, slots, allocated, length - 1, eos, sampler)
            if compile_layers:
                decoder.compile()
            step = FixedShapes(decoder) if cuda_graph else decoder.step
            rollouts = decode_all(decoder, step, prompts, limits, seeds, ahead, every, progress)
            if compile_layers:  # which may leave the decoder in a reference cycle
                del decoder, step
                gc.collect()
            return rollouts
        except RuntimeError as error:  # on CPUs and Apple's GPUs it is no torch.OutOfMemoryError
            if not any(words in str(error) for words in ("allocate memory", "out of memory")):
                raise
            message = f"out of memory: keys and values of {memory}; lower slots or max_new_tokens"
            raise torch.OutOfMemoryError(message) from error


def as_lists(prompts, max_new_tokens, eos_token_ids, seed) -> tuple[list, list, list, list]:
    """These arguments of `generate` as ids of each prompt, limit of each, EOS ids, seed of each."""
    prompts = [integers(p, "each prompt must be a list of token ids") for p in prompts]
    eos = [] if eos_token_ids is None else plain(eos_token_ids)
    eos = integers(eos if isinstance(eos, Iterable) else [eos], "eos_token_ids must be ids")
    limits = plain(max_new_tokens)
    limits = limits if isinstance(limits, Iterable) else [limits] * len(prompts)
    limits = integers(limits, "max_new_tokens must be integers")
    seeds = torch.randint(2**62, ()).item() if seed is None else plain(seed)
    seeds = seeds if isinstance(seeds, Iterable) else stream_seeds(seeds, len(prompts))
    seeds = [signed(n) for n in integers(seeds, "seed must be an integer, or one for each prompt")]
    if not len(limits) == len(seeds) == len(prompts):
        raise ValueError("generate needs one limit for each prompt, and one seed")
    return prompts, limits, eos, seeds


def check_numbers(
    model, prompts, limits, eos, temperature, top_p, slots, vocab_size, check_every
) -> None:
    """Raise ValueError for what `generate` cannot do."""
    counts = limits + [n for n in (slots, check_every, vocab_size) if n is not None]
    if min(counts, default=1) < 1:
        raise ValueError("generate needs max_new_tokens, slots, check_every and vocab_size >= 1")
    sampled = min(vocab_size or model.config.vocab_size, model.config.vocab_size)
    if eos and not any(0 <= token < sampled for token in eos):
        raise ValueError(f"no response could end: eos_token_ids {eos} are not among {sampled} ids")
    # Logits divided by less would overflow. Both conditions are written so that nan is refused.
    if not (temperature == 0 or temperature >= 1e-5) or not 0 < top_p <= 1:
        raise ValueError("generate needs a temperature of 0 or >= 1e-5, and 0 < top_p <= 1")
    if not all(prompts):
        raise ValueError("generate got an empty prompt")
    length = max((len(p) + limit for p, limit in zip(prompts, limits)), default=0)
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions and length > positions:
        has = f"the model has {positions} positions (max_position_embeddings)"
        raise ValueError(f"a prompt and its max_new_tokens are {length} tokens, but {has}")


def plain(value):
    """Python's own numbers in place of a tensor or an array."""
    return value.tolist() if hasattr(value, "tolist") else value


def integers(values, needed: str) -> list[int]:
    """The values as Python ints. Raises TypeError, with what is needed, for anything else."""
    try:
        return [operator.index(value) for value in plain(values)]
    except TypeError:
        raise TypeError(f"{needed}, not {values!r:.60}") from None


def fit_slots(model, longest_prompt: int, length: int, free_bytes: int | None = None) -> int:
    """The number that `generate` takes for slots=None. To sample the same again, call this once
    and save what it returns: on CUDA the number depends on the memory that is free.

    longest_prompt, length: the most tokens of a prompt, and of a prompt with its response.
    free_bytes: None: what is free on the model's device, where that is CUDA.
    Returns the slots that fit into three quarters of free_bytes, at most 256; without CUDA 64."""
    model = unwrapped(model)
    device = model.device
    if free_bytes is None and device.type != "cuda":
        return 64
    if free_bytes is None:
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        free_bytes = torch.cuda.mem_get_info(device)[0] + unused
    # A slot's part of the cache, of the prefilled prompts and of the logits with their copies.
    slot = cache_bytes_per_token(model) * (length + longest_prompt // 2)
    slot += 32 * model.config.vocab_size
    return max(1, min(256, int(0.75 * free_bytes) // slot))


@torch.inference_mode()
def cache_bytes_per_token(model) -> int:
    """The bytes of one token's keys and values in all layers."""
    model = unwrapped(model)
    with sampling_mode(model):
        return bytes_per_token(prefill(model, [(0, 0)]))


def check_supported(model) -> None:
    """Raise ValueError, with the reason, where `generate` would not sample from the model."""
    config = getattr(unwrapped(model), "config", None)
    family = getattr(config, "model_type", None)
    if family is None:
        raise ValueError(f"rollout.py needs a Hugging Face causal LM, not {type(model).__name__}")
    if family not in FAMILIES:
        tested = ", ".join(sorted(FAMILIES))
        raise ValueError(f"rollout.py does not support the family {family!r}, only {tested}")
    attention = config._attn_implementation
    if attention not in ("sdpa", "eager"):  # the others do not take our 4-D masks
        raise ValueError(f"rollout.py needs attention 'sdpa' or 'eager', not {attention!r}")
    layers = set(getattr(config, "layer_types", None) or ())
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    settings = [rope, *rope.values()]  # one dict, or one dict for each layer type
    types = {str(r.get("rope_type", r.get("type"))) for r in settings if isinstance(r, dict)}
    refused = layers - {"full_attention", "sliding_attention"}
    # The frequencies of these two depend on the longest sequence of the BATCH.
    refused |= types & {"dynamic", "longrope"}
    if refused:
        names, what = ", ".join(sorted(refused)), "layers or rotary embeddings"
        raise ValueError(f"rollout.py does not support {what} of type {names} ({family})")


# -------------------------------------------------------------------------------- random numbers

# A random number is a pure function of (seed of the response, position): no state has to be saved,
# captured in a graph, or kept in step between processes. It is SplitMix64 (Steele et al., 2014):
# a counter that grows by GOLDEN, mixed. int64 wraps around as the unsigned numbers of the paper do.
GOLDEN = 0x9E3779B97F4A7C15 - 2**64
LEVELS = 3  # random numbers for one token, see `draw`


def signed(n: int) -> int:
    """The int64 with the same last 64 bits."""
    return (n + 2**63) % 2**64 - 2**63


def mix(x: torch.Tensor) -> torch.Tensor:
    """SplitMix64's mixing of 64 bits, in int64. The masks make the shifts those of unsigned."""
    x = (x ^ (x >> 30 & 2**34 - 1)) * signed(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> 27 & 2**37 - 1)) * signed(0x94D049BB133111EB)
    return x ^ (x >> 31 & 2**33 - 1)


def stream_seeds(seed: int, n: int) -> list[int]:
    """The seeds of n responses that `generate` samples with this seed."""
    return mix(signed(seed) + GOLDEN * torch.arange(1, n + 1)).tolist()


def uniforms(seeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """LEVELS numbers in [0, 1) for each row. seeds, positions: [n], int64. Returns [n, LEVELS]:
    float64 with 53 random bits, or fp32 with 24 on Apple's GPUs, which have no float64."""
    counter = LEVELS * positions[:, None] + torch.arange(1, LEVELS + 1, device=seeds.device)
    bits = mix(seeds[:, None] + GOLDEN * counter)
    if seeds.device.type == "mps":
        return (bits >> 40 & 2**24 - 1).float() * 2**-24
    return (bits >> 11 & 2**53 - 1).double() * 2**-53


def sample(
    logits: torch.Tensor, u: torch.Tensor, temperature=1.0, top_p=1.0, vocab_size: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw one token per row.

    logits: [n, V]. u: [n, LEVELS], random numbers in [0, 1), unused at temperature 0. Returns ids
    [n] and their log-probabilities [n], fp32 or wider, under the distribution that was drawn from:
    softmax(logits / temperature), cut to its nucleus (the fewest most likely tokens that hold at
    least top_p) and renormalised. Temperature 0 takes the most likely token; its log-probability is
    the one at temperature 1 (at 0 it would always be 0).
    In a row with a logit of nan or +inf, the log-probability is nan and the id means nothing."""
    logits = logits[:, :vocab_size].to(torch.promote_types(logits.dtype, torch.float32))
    if temperature not in (0, 1):
        logits = logits / temperature
    if top_p < 1 and temperature:
        ordered, order = logits.softmax(-1).sort(-1, descending=True)
        before = ordered.cumsum(-1) - ordered  # the mass of all likelier tokens: 0 for the first
        cut = torch.empty_like(order, dtype=torch.bool).scatter_(-1, order, before >= top_p)
        logits = logits.masked_fill(cut, float("-inf"))
    logits = logits - logits.amax(-1, keepdim=True)
    weights = logits.exp()  # [n, V]
    ids = draw(weights, u) if temperature else logits.argmax(-1, keepdim=True)  # [n, 1]
    return ids[:, 0], logits.gather(-1, ids)[:, 0] - weights.sum(-1).log()


def draw(weights: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """One index per row, with probability proportional to its weight. weights [n, V], u [n, LEVELS]
    -> [n, 1].

    torch.multinomial draws V random numbers per row; this uses one for each level. A large
    vocabulary is cut into blocks of 128 entries (and these into blocks of blocks): we draw a block
    by its sum, then an entry in it, so that only the sums touch the whole row. Three levels are
    enough for 1024 * 128 * 128 entries."""
    levels, last = [], weights.shape[1] - 1
    while weights.shape[1] > 1024:
        padded = F.pad(weights, (0, -weights.shape[1] % 128))
        levels.append(padded.view(len(weights), -1, 128))
        weights = levels[-1].sum(-1)
    index = invert(weights, u[:, :1])
    # The clamps are for a row with nan, whose index may lie in the padding.
    for level, blocks in enumerate(reversed(levels), 1):
        index = index.clamp(max=blocks.shape[1] - 1)
        block = blocks.gather(1, index[:, :, None].expand(-1, -1, 128))[:, 0]  # [n, 128]
        index = 128 * index + invert(block, u[:, level : level + 1])
    return index.clamp(max=last)


def invert(weights: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """The inverse of the distribution function at u: the first index whose cumulative weight
    exceeds u's share of the sum. weights [n, m], u [n, 1] -> [n, 1]."""
    cumulative = weights.to(u.dtype).cumsum(-1)
    index = torch.searchsorted(cumulative, u * cumulative[:, -1:], right=True)
    index = index.clamp(max=weights.shape[1] - 1)  # where a weight is nan, no sum exceeds u
    if u.dtype == torch.float32:
        # A parallel sum rounds differently at each entry, so in one of some 10^7 draws (10^16 in
        # float64) an entry of weight 0 seems to add something. The likeliest takes its place.
        index = index.where(weights.gather(1, index) > 0, weights.argmax(-1, keepdim=True))
    return index


# ------------------------------------------------------------------------------- the model's side


def unwrapped(model):
    """The Hugging Face model inside DistributedDataParallel and torch.compile, in any order."""
    while True:
        parallel = isinstance(model, torch.nn.parallel.DistributedDataParallel)
        inner = model.module if parallel else getattr(model, "_orig_mod", model)
        if inner is model:
            return model
        model = inner


@contextmanager
def sampling_mode(model):
    """Eval mode, and attention without cuDNN; both are restored afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    cudnn = torch.backends.cuda.cudnn_sdp_enabled()
    model.eval()
    # cuDNN makes a plan for every new shape, which takes longer than a step, and the number of
    # keys grows with every step.
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(cudnn)
        for module, mode in modes:
            module.training = mode


def attention_masks(config, positions: torch.Tensor, length: int, dtype: torch.dtype):
    """Additive masks of queries at `positions` [B, T] over `length` keys, as the model takes them:
    [B, 1, T, length], or a dict of those by layer type. The query at position p attends to the
    indices j <= p and, with a sliding window w, only to j > p - w."""
    key, query = torch.arange(length, device=positions.device), positions[:, None, :, None]

    def mask(window: int | None) -> torch.Tensor:
        masked = key > query
        if window is not None:
            masked = masked | (key <= query - window)
        return masked.to(dtype).mul_(torch.finfo(dtype).min)

    window, kinds = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
    if kinds is None:
        return mask(window)
    return {k: mask(window if k == "sliding_attention" else None) for k in set(kinds)}


signature = lru_cache(inspect.signature)  # asked at every step


def forward(model, cache, tokens: torch.Tensor, positions: torch.Tensor, length: int):
    """Tokens [B, T] at positions [B or 1, T], which attend to `length` keys of the cache.
    Returns the logits after the last token [B, V]."""
    renamed = "cache" in signature(type(model).forward).parameters  # in transformers 5.2x
    return model(
        input_ids=tokens,
        position_ids=positions,
        attention_mask=attention_masks(model.config, positions, length, model.dtype),
        use_cache=True,
        logits_to_keep=1,
        **{"cache" if renamed else "past_key_values": cache},
    ).logits[:, -1]


class HuggingFaceCache:
    """What the models ask of a cache besides `update(key, value, layer)`, by which every attention
    layer hands in what it computed and gets back what to attend to."""

    is_compileable = False  # asked for by StableLM of transformers 5.0

    def get_seq_length(self, *args) -> int:  # only for default position ids; ours are always given
        return 0


class Recorder(HuggingFaceCache):
    """Records the keys and values of whole prompts, which attend only to themselves."""

    def __init__(self):
        self.written: list[torch.Tensor] = []  # for each layer [B, 2, heads, T, size]

    def update(self, key: torch.Tensor, value: torch.Tensor, layer: int, *args, **kwargs):
        self.written.append(torch.stack((key, value), 1))  # from [B, heads, T, size] each
        return key, value


def prefill(model, prompts: list[tuple[int, ...]]) -> list[torch.Tensor]:
    """Keys and values of B prompts without their last tokens: for each layer a tensor
    [B, 2, heads, T, size], where T is the longest prompt's length - 1, but at least 1."""
    recorder, width = Recorder(), max(1, max(map(len, prompts)) - 1)
    padded = [p[:-1] + (0,) * (width + 1 - len(p)) for p in prompts]
    positions = torch.arange(width, device=model.device)[None]  # one mask for all rows
    forward(model, recorder, torch.tensor(padded, device=model.device), positions, width)
    return recorder.written


def bytes_per_token(written: list[torch.Tensor]) -> int:
    return sum(x[0, :, :, 0].numel() * x.element_size() for x in written)


class SlotCache(HuggingFaceCache):
    """Keys and values of all slots: for each layer a tensor [slots, 2, heads, length, size]."""

    one: torch.Tensor | None = None  # the tensor of the layer that runs, if that is compiled

    def __init__(self, like: list[torch.Tensor], slots: int, length: int):
        two, heads, _, size = like[0].shape[1:]
        self.layers = [x.new_zeros(slots, two, heads, length, size) for x in like]

    def point(self, positions: torch.Tensor, length: int):
        """The next forward writes each row at its position ([rows]) and attends to the first
        `length` indices."""
        self.rows = torch.arange(len(positions), device=positions.device)
        self.positions, self.length = positions, length

    def update(self, key: torch.Tensor, value: torch.Tensor, layer: int, *args, **kwargs):
        if self.one is None:
            cached = self.layers[layer]
            new = torch.stack((key, value), 1)[:, :, :, 0]  # from [rows, heads, 1, size] each
        else:  # the same; a compiler makes one kernel of it, with the writing
            cached, is_key = self.one, torch.arange(2, device=key.device)[:, None, None] == 0
            new = torch.where(is_key, key.transpose(1, 2), value.transpose(1, 2))
        cached[self.rows, :, :, self.positions] = new
        return cached[: len(new), :, :, : self.length].unbind(1)


# -------------------------------------------------------------------------------------- decoding


class Decoder:
    """The state of all slots, in tensors that stay where they are, and the decode step."""

    def __init__(self, model, like, slots: int, length: int, last: int, eos: list[int], sampler):
        """like: keys and values as `prefill` returns them. length: tokens allocated per slot.
        last: the last position that can be used, at most length - 1."""
        self.model, self.last, device = model, last, model.device
        self.uniforms, self.sampler = uniforms, sampler
        self.cache = SlotCache(like, slots, length)
        precision = torch.promote_types(model.dtype, torch.float32)
        self.tokens = torch.zeros(slots, length, dtype=torch.long, device=device)  # by position
        self.logprobs = torch.zeros(slots, length, dtype=precision, device=device)  # of the tokens
        self.position = torch.zeros(slots, dtype=torch.long, device=device)  # of each next input
        self.seeds = torch.zeros(slots, dtype=torch.long, device=device)  # of the responses
        self.ended = torch.zeros(slots, dtype=torch.bool, device=device)  # by an EOS, or by nan
        self.eos = torch.tensor(eos, dtype=torch.long, device=device)
        self.compiled: list[tuple] = []  # layers of the model, with their compiled forwards

    def compile(self):
        """Compile the step's layers, and the drawing."""
        self.compiled = compile_forwards(self.model, len(self.cache.layers))
        self.uniforms = torch.compile(self.uniforms, dynamic=True)
        self.sampler = torch.compile(self.sampler, dynamic=True)

    def admit(self, written, rows: list[int], sources: list[int], prompts, seeds: list[int]):
        """Slots `rows` take `prompts`, whose keys and values are rows `sources` of `written`."""
        host = [rows, sources, [len(p) - 1 for p in prompts], [p[-1] for p in prompts], seeds]
        row, source, position, token, seed = torch.tensor(host, device=self.eos.device)
        for cached, new in zip(self.cache.layers, written):
            cached.narrow(3, 0, new.shape[3]).index_copy_(0, row, new.index_select(0, source))
        self.tokens[row, position], self.position[row], self.ended[row] = token, position, False
        self.seeds[row] = seed

    def move(self, sources: list[int], targets: list[int], length: int):
        """Slots `targets` take over from slots `sources`, whose sequences are `length` at most."""
        source, target = torch.tensor([sources, targets], device=self.eos.device)
        layers = [cached.narrow(3, 0, length) for cached in self.cache.layers]
        for x in (*layers, self.tokens, self.logprobs, self.position, self.seeds, self.ended):
            x.index_copy_(0, target, x.index_select(0, source))

    def step(self, n: int, length: int):
        """Sample one token for each of the first n rows, whose sequences are `length` at most.

        The layers find the place of their keys and values through `self.cache`, which is pointed
        at this step's positions before the forward. The host must not read any tensor in here."""
        position = self.position[:n].unsqueeze(1)  # [n, 1], a view: it changes in place below
        self.cache.point(self.position[:n], length)
        token = self.tokens[:n].gather(1, position)
        u = self.uniforms(self.seeds[:n], self.position[:n])
        with compiled_in(self.compiled, self.cache):
            logits = forward(self.model, self.cache, token, position, length)
        ids, logprobs = self.sampler(logits, u)
        ids = ids.unsqueeze(1)  # [n, 1]
        # Fixed shapes drag unused rows along: the clamp keeps these inside the cache.
        position.add_(1).clamp_(max=self.last)
        self.tokens[:n].scatter_(1, position, ids)
        self.logprobs[:n].scatter_(1, position, logprobs.unsqueeze(1))
        # Rows with logits that are not finite end too, so that the host sees them at its next look.
        self.ended[:n] |= (ids == self.eos).any(-1) | logprobs.isnan()


@dataclass
class Row:
    """What the host knows of a slot in use. Lengths count the prompt's tokens too."""

    prompt: int  # the index of its prompt
    length: int  # tokens so far
    limit: int  # the length at which the response is cut


def decode_all(decoder, step, prompts, limits, seeds, ahead: int, check_every: int, progress):
    """The host's part: which prompt is in which slot, which is next, which response is complete.

    step: `decoder.step`, or the same in fixed shapes. ahead: how many prompts are prefilled at
    once. The rest is as in `generate`, which returns what this returns."""
    same: dict[tuple[int, ...], list[int]] = {}  # equal prompts are computed once
    for i, prompt in enumerate(prompts):
        same.setdefault(tuple(prompt), []).append(i)
    waiting = deque(same.items())
    prefilled: deque[tuple[int, int]] = deque()  # (index of a prompt, its row in `written`)
    rows: dict[int, Row] = {}  # the slots in use
    slots, eos = len(decoder.position), set(decoder.eos.tolist())
    rollouts = [Rollout() for _ in prompts]
    while waiting or prefilled or rows:
        # 1. Free slots take the next prompts.
        while (waiting or prefilled) and len(rows) < slots:
            if not prefilled:
                groups = [waiting.popleft() for _ in range(min(len(waiting), ahead))]
                written = prefill(decoder.model, [prompt for prompt, _ in groups])
                for source, (_, indices) in enumerate(groups):
                    prefilled.extend((i, source) for i in indices)
            free = [slot for slot in range(slots) if slot not in rows][: len(prefilled)]
            taken, sources = zip(*[prefilled.popleft() for _ in free])
            asked = [prompts[i] for i in taken]
            decoder.admit(written, free, sources, asked, [seeds[i] for i in taken])
            for slot, i in zip(free, taken):
                rows[slot] = Row(i, len(prompts[i]), len(prompts[i]) + limits[i])
        # 2. When no prompt is left, the last rows move into the gaps.
        n, length = len(rows), max(row.length for row in rows.values())
        if sources := [slot for slot in rows if slot >= n]:
            targets = [slot for slot in range(n) if slot not in rows]
            decoder.move(sources, targets, length)
            for source, target in zip(sources, targets):
                rows[target] = rows.pop(source)
        # 3. Some steps, without a look at what they sample.
        steps = min(check_every, min(row.limit - row.length for row in rows.values()))
        for t in range(steps):
            step(n, length + t)
        for row in rows.values():
            row.length += steps
        # 4. Responses that reached an EOS or their limit leave.
        ended = decoder.ended[:n].tolist()
        complete = [s for s in range(n) if ended[s] or rows[s].length == rows[s].limit]
        if complete:
            tokens = decoder.tokens[complete, : length + steps].tolist()
            scores = decoder.logprobs[complete, : length + steps].tolist()
        for k, slot in enumerate(complete):
            row = rows.pop(slot)
            start, ids, logprobs = len(prompts[row.prompt]), tokens[k], scores[k]
            # Drop what was sampled after the EOS, before the host looked.
            stop = next((t + 1 for t in range(start, row.length) if ids[t] in eos), row.length)
            if any(map(math.isnan, logprobs[start:stop])):
                why = "its weights hold nan or inf, or its dtype overflows"
                raise FloatingPointError(f"the model's logits are not finite: {why}")
            finished = ids[stop - 1] in eos
            rollouts[row.prompt] = Rollout(ids[start:stop], logprobs[start:stop], finished)
            if progress is not None:
                progress(1)
    return rollouts


# -------- for speed only: packed weights, compiled layers, CUDA graphs (not for a first reading)

# Linear layers that read the same input, by their names in a module. In all FAMILIES (the tests
# compare them) each is called once for an input, in this order.
SAME_INPUT = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")


def same_input(model) -> Iterator[tuple[torch.nn.Module, dict[str, torch.nn.Linear]]]:
    """The modules that have such layers, with those layers by name: only layers that are alike and
    do nothing else, as they would with an adapter, with hooks or with a forward of their own."""

    def kind(linear):
        if type(linear) is not torch.nn.Linear or "forward" in vars(linear):
            return None
        if linear._forward_hooks or linear._forward_pre_hooks:
            return None
        return linear.weight.dtype, linear.weight.device, linear.bias is None

    for module in model.modules():
        for names in SAME_INPUT:
            linears = {name: module._modules.get(name) for name in names}
            kinds = {kind(linear) for linear in linears.values()}
            if len(kinds) == 1 and None not in kinds:
                yield module, linears


@torch.no_grad()
def pack_weights(model) -> None:
    """Lay the weights of linear layers that read the same input side by side in memory, so that
    `generate` can compute these layers by one matrix product. The product with a small weight, such
    as that of k_proj, takes longer than it takes to read the weight from memory.

    The parameters stay the same objects with the same values, to be trained and saved as before
    (but safetensors' save_model wants no shared memory). Call it when the model is on its device:
    `model.to` moves each weight separately, and then each layer is computed by itself again, as are
    layers with an adapter or with hooks, and their neighbours."""
    for _, linears in same_input(unwrapped(model)):
        weights = [linear.weight for linear in linears.values()]
        with torch.inference_mode(weights[0].is_inference()):  # as they are, not as the caller is
            for weight, part in zip(weights, torch.cat(weights).split([len(w) for w in weights])):
                weight.data = part


class PackedLinears(torch.nn.Module):
    """One object that takes the place of each of several layers. The first call computes them all,
    and each call returns the result of one, in the order of the layers."""

    def __init__(self, linears: list[torch.nn.Linear]):
        super().__init__()
        first, self.sizes = linears[0].weight, [len(linear.weight) for linear in linears]
        self.weight = first.as_strided((sum(self.sizes), first.shape[1]), first.stride())
        has_bias = linears[0].bias is not None
        self.bias = torch.cat([linear.bias for linear in linears]) if has_bias else None
        self.results: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.results:
            y = F.linear(x, self.weight, self.bias)
            self.results.extend(y.split(self.sizes, -1))
        return self.results.pop(0)


def side_by_side(weights: list[torch.Tensor]) -> bool:
    """Whether they follow one another in one storage, as `pack_weights` left them. (Two storages
    may be neighbours by chance, but no view spans them.)"""
    if not all(type(w.data) is torch.Tensor and w.is_contiguous() for w in weights):
        return False
    storages = {w.untyped_storage().data_ptr() for w in weights}
    starts, ends = [w.data_ptr() for w in weights], [w.data_ptr() + w.nbytes for w in weights]
    return len(storages) == 1 and starts[1:] == ends[:-1]


@contextmanager
def packed_products(model):
    """Layers whose weights lie side by side are computed by one product."""
    packed = [
        (module, linears)
        for module, linears in same_input(model)
        if side_by_side([linear.weight for linear in linears.values()])
    ]
    try:
        for module, linears in packed:
            together = PackedLinears(list(linears.values()))
            for name in linears:
                setattr(module, name, together)
        yield
    finally:
        for module, linears in packed:
            for name, linear in linears.items():
                setattr(module, name, linear)


def compile_forwards(model, layers: int) -> list[tuple]:
    """The model's layers, each with its compiled forward. layers: how many there are; they are the
    ModuleList of this length.

    To the compiler a layer's index is a constant: it would compile `cache.layers[index]` anew for
    each layer. So `compiled_in` hands over each layer's tensor as `cache.one`, and one compilation
    serves all layers, which are the same code otherwise."""
    lists = (m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == layers)
    return [(layer, torch.compile(layer.forward, dynamic=True)) for layer in next(lists)]


@contextmanager
def compiled_in(compiled: list[tuple], cache: SlotCache):
    """While a step runs, its layers are the compiled ones."""

    def run(compiled_forward, tensor, *args, **kwargs):
        # Cut here, not inside: compilers take "all slots" and "some of them" for two cases.
        cache.one = tensor[: len(cache.rows)]
        return compiled_forward(*args, **kwargs)

    # Some layers have a forward of their own, such as accelerate's hooks set, beside their class's.
    own = [vars(layer).get("forward") for layer, _ in compiled]
    try:
        for (layer, compiled_forward), tensor in zip(compiled, cache.layers):
            layer.forward = partial(run, compiled_forward, tensor)
        yield
    finally:
        cache.one = None
        for (layer, _), own_forward in zip(compiled, own):
            vars(layer).pop("forward", None)
            if own_forward is not None:
                layer.forward = own_forward


class FixedShapes:
    """`Decoder.step` in a few fixed shapes, as CUDA graphs need them.

    The number of rows is rounded up to 2, 4, 8, ... or all slots (a compiler takes one row for
    another case), the length to multiples of an eighth of the cache's, which is itself rounded up
    to 64s: at most 8 lengths for each number of rows. They are multiples of 64 because attention
    kernels would pad a mask whose rows are not aligned. On CUDA a shape runs eagerly the first
    time, which warms it up; the second time it is captured, and from then on replayed."""

    def __init__(self, decoder: Decoder):
        self.decoder = decoder
        self.graphs: dict[tuple[int, int], torch.cuda.CUDAGraph | None] = {}

    def __call__(self, n: int, length: int):
        slots, allocated = self.decoder.tokens.shape
        block = 64 * -(-allocated // 512)  # an eighth, rounded up to 64s
        rows = min(max(2, 1 << (n - 1).bit_length()), slots)
        shape = rows, min(-(-length // block) * block, allocated)
        if shape not in self.graphs or self.decoder.eos.device.type != "cuda":
            self.graphs[shape] = None  # it has run once
            return self.step(*shape)
        if self.graphs[shape] is None:
            self.graphs[shape] = self.capture(*shape)
        self.graphs[shape].replay()

    def step(self, n: int, length: int):
        """`Decoder.step` with cuDNN's attention, which torch chooses on an H100 if it is allowed,
        and which is the fastest there. It plans for each shape anew, once in a process, some 50 ms:
        worth it for these few shapes. `sampling_mode`, in which this runs, has it off elsewhere."""
        torch.backends.cuda.enable_cudnn_sdp(True)
        try:
            self.decoder.step(n, length)
        finally:
            torch.backends.cuda.enable_cudnn_sdp(False)

    def capture(self, n: int, length: int) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        # One memory pool for all graphs: they never run at the same time.
        pool = next((g.pool() for g in self.graphs.values() if g is not None), None)
        with torch.cuda.device(self.decoder.eos.device), torch.cuda.graph(graph, pool=pool):
            self.step(n, length)
        return graph
