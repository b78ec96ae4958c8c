"""rollout.py against plain full forwards without any cache, in float64."""

import weakref
from functools import partial
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny import tiny
from torch._dynamo.utils import counters

import rollout as rollout_module
from rollout import (
    FAMILIES,
    LEVELS,
    Decoder,
    Rollout,
    cache_bytes_per_token,
    check_supported,
    draw,
    fit_slots,
    generate,
    pack_weights,
    prefill,
    sample,
    signed,
    stream_seeds,
    uniforms,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PROMPTS = [[5, 9, 3, 7, 2, 8, 11], [4], [6, 6, 13, 9, 22, 31, 8, 2, 2, 17, 12], [7, 3]]
PROMPTS.append([9, 4, 4, 21, 5])
EOS = {1, 2, 3, 14, 15}
MIXTURES = {"mixtral", "olmoe", "qwen2_moe", "qwen3_moe"}


def build(family, **settings):
    return tiny(family, **settings).to(DEVICE)


@torch.no_grad()
def full_logits(model, ids):
    return model(input_ids=torch.tensor([ids], device=DEVICE)).logits[0].cpu()


def greedy_reference(model, prompt, max_new_tokens, eos):
    """One full forward per token: no cache, no batch, no mask. Returns (ids, log-probabilities at
    temperature 1)."""
    ids, logprobs = [], []
    while len(ids) < max_new_tokens and not (ids and ids[-1] in eos):
        logits = full_logits(model, prompt + ids)[-1]
        ids.append(logits.argmax().item())
        logprobs.append(logits.log_softmax(-1).max().item())
    return ids, logprobs


def full_forward_logprobs(model, prompt, ids, temperature=1.0):
    logprobs = (full_logits(model, prompt + ids) / temperature).log_softmax(-1)
    rows = logprobs[len(prompt) - 1 : -1]  # position t - 1 predicts token t
    return rows.gather(-1, torch.tensor(ids)[:, None])[:, 0].tolist()


def tolerance_of(model):  # eager attention has its softmax in fp32
    return 1e-6 if model.config._attn_implementation == "eager" else 1e-9


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_greedy_equals_a_loop_without_cache(family):
    """Catches rows that see each other's padding, wrong positions, a window that is off by one,
    stale keys of an earlier sequence in the slot."""
    model = build(family)
    expected = [greedy_reference(model, p, 14, EOS) for p in PROMPTS]
    assert len({len(ids) for ids, _ in expected}) > 1  # rows must end at different times
    for slots in (1, 2, 64):  # 2: rows are reused while others go on; 64: the batch only shrinks
        got = generate(
            model, PROMPTS, max_new_tokens=14, eos_token_ids=EOS, temperature=0, slots=slots
        )
        for rollout, (ids, logprobs) in zip(got, expected):
            assert rollout.ids == ids
            assert rollout.logprobs == pytest.approx(logprobs, abs=tolerance_of(model))
            assert rollout.finished == (ids[-1] in EOS)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text", "gpt2"])
def test_sampled_logprobs_equal_one_full_forward(family):
    model = build(family)
    settings = dict(max_new_tokens=20, eos_token_ids=[1], temperature=1.7, slots=3)
    for prompt, rollout in zip(PROMPTS, generate(model, PROMPTS, seed=0, **settings)):
        expected = full_forward_logprobs(model, prompt, rollout.ids, temperature=1.7)
        assert rollout.logprobs == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_float32_and_eager_attention(attention):
    model = build("qwen3", dtype=torch.float32, attention=attention)
    settings = dict(max_new_tokens=20, eos_token_ids=[1], slots=3)
    for prompt, rollout in zip(PROMPTS, generate(model, PROMPTS, seed=0, **settings)):
        expected = full_forward_logprobs(model, prompt, rollout.ids)
        assert rollout.logprobs == pytest.approx(expected, abs=1e-4)


def test_eos_and_length_limit():
    """Catches an EOS that is looked for in the prompt, one of several ids that is not looked for,
    and an EOS as the last allowed token that does not count as an end."""
    model, settings = build("llama"), dict(temperature=0)
    free = generate(model, PROMPTS, max_new_tokens=9, eos_token_ids=[], **settings)
    free = [r.ids for r in free]
    assert all(len(ids) == 9 for ids in free)
    eos = {free[0][4], free[1][2]}
    assert eos & {t for prompt in PROMPTS for t in prompt}
    got = generate(model, PROMPTS, max_new_tokens=9, eos_token_ids=eos, **settings)
    for ids, rollout in zip(free, got):
        end = next((i + 1 for i, t in enumerate(ids) if t in eos), 9)
        assert rollout.ids == ids[:end] and rollout.finished == (ids[end - 1] in eos)
    end = free[0].index(free[0][4]) + 1
    last = generate(model, PROMPTS[:1], max_new_tokens=end, eos_token_ids=[free[0][4]], **settings)
    assert last[0].ids == free[0][:end] and last[0].finished is True
    one = generate(model, PROMPTS[:1], max_new_tokens=9, eos_token_ids=free[0][4], **settings)
    assert one[0].ids == free[0][:end]  # an int, as tokenizer.eos_token_id is one


def test_without_eos():
    assert Rollout([5, 2], [-1.0, -2.0], True).without_eos == [5]
    assert Rollout([5, 2], [-1.0, -2.0], False).without_eos == [5, 2]  # cut: no EOS, whatever 2 is


def chi_square(counts, probabilities, n):
    """Standard deviations by which counts differ from n draws with these probabilities."""
    expected = probabilities * n
    keep = expected > 5
    seen, rest = counts[~keep].sum(), expected[~keep].sum().clamp(min=1e-9)
    value = ((counts[keep] - expected[keep]) ** 2 / expected[keep]).sum() + (
        seen - rest
    ) ** 2 / rest
    df = int(keep.sum())  # degrees of freedom: the kept cells and the rest, less one
    return (value.item() - df) / (2 * df) ** 0.5


@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.6, 1.0), (1.3, 0.8)])
def test_distribution(temperature, top_p):
    """First and second tokens of 6,000 samples against the softmax. Under the right sampler the
    fixed seed gives less than 4 standard deviations."""
    model, prompt, n = build("llama"), PROMPTS[0], 6000
    settings = dict(temperature=temperature, top_p=top_p, slots=1000, seed=1)
    got = generate(model, [prompt] * n, max_new_tokens=2, eos_token_ids=[], **settings)
    first = [r.ids[0] for r in got]
    most_common = torch.tensor(first).mode().values.item()
    second = [r.ids[1] for r in got if r.ids[0] == most_common]
    for prefix, tokens in [([], first), ([most_common], second)]:
        p = (full_logits(model, prompt + prefix)[-1] / temperature).softmax(-1)
        nucleus, mass = [], 0.0
        for token in p.argsort(descending=True).tolist():  # the fewest that hold top_p
            nucleus.append(token)
            mass += p[token].item()
            if mass >= top_p:
                break
        q = torch.zeros_like(p)
        q[nucleus] = p[nucleus] / mass
        assert set(tokens) <= set(nucleus)
        counts = torch.tensor(tokens).bincount(minlength=len(p)).double()
        assert chi_square(counts, q, len(tokens)) < 4
        for r in got[:50]:
            if not prefix:
                assert r.logprobs[0] == pytest.approx(q[r.ids[0]].log().item(), abs=1e-9)


def test_ids_beyond_the_tokenizer_are_never_sampled():
    model = build("llama")
    with torch.no_grad():
        model.lm_head.weight[30:] *= 20  # make the forbidden ids the likely ones
    settings = dict(max_new_tokens=3, eos_token_ids=[], seed=0)
    got = generate(model, [PROMPTS[0]] * 200, vocab_size=30, **settings)
    assert max(t for r in got for t in r.ids) < 30
    assert max(t for r in generate(model, [PROMPTS[0]] * 20, **settings) for t in r.ids) >= 30
    expected = full_logits(model, PROMPTS[0])[-1, :30].log_softmax(-1)
    assert got[0].logprobs[0] == pytest.approx(expected[got[0].ids[0]].item(), abs=1e-9)


def test_modes_are_restored_and_dropout_is_off_while_sampling():
    model = build("gpt2", resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
    expected = [greedy_reference(model, p, 6, {1})[0] for p in PROMPTS]
    model.train()
    model.transformer.h[0].eval()
    got = generate(model, PROMPTS, max_new_tokens=6, eos_token_ids=[1], temperature=0)
    assert [r.ids for r in got] == expected
    assert model.training and model.transformer.h[1].training
    assert not model.transformer.h[0].training
    state = torch.get_rng_state()
    cache_bytes_per_token(model)
    assert model.training and torch.get_rng_state().equal(state)  # no dropout was drawn


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("before", [False, True])
def test_cudnn_attention_is_for_fixed_shapes(fixed, before, monkeypatch):
    """cuDNN makes a plan for every new length, on an H100 in 50 to 480 ms: not for prompts and
    steps of growing length. Afterwards it is as it was, on errors too."""
    model, seen, enabled = build("llama"), set(), torch.backends.cuda.cudnn_sdp_enabled
    forward, at_first = rollout_module.forward, enabled()

    def watched(model, cache, *rest):
        seen.add((type(cache).__name__, enabled()))
        return forward(model, cache, *rest)

    monkeypatch.setattr(rollout_module, "forward", watched)
    settings = dict(max_new_tokens=3, eos_token_ids=[], cuda_graph=fixed)
    try:
        torch.backends.cuda.enable_cudnn_sdp(before)
        generate(model, PROMPTS, **settings)
        assert seen == {("Recorder", False), ("SlotCache", fixed)} and enabled() == before
        with pytest.raises(ZeroDivisionError):
            generate(model, PROMPTS, progress=lambda n: n / 0, **settings)
        assert enabled() == before
    finally:
        torch.backends.cuda.enable_cudnn_sdp(at_first)


def dynamic_llama():
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    return build("llama", rope_parameters=rope)


def bloom():
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = dict(hidden_size=16, n_layer=1, n_head=2, vocab_size=20)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("bloom", **sizes))


@pytest.mark.parametrize(
    "model, changed, message",
    [
        (bloom, {}, "bloom"),
        (dynamic_llama, {}, "dynamic.*llama"),
        (lambda: torch.nn.Linear(2, 2), {}, "Hugging Face causal LM, not Linear"),
        (None, dict(prompts=[[3], []]), "empty prompt"),
        (None, dict(top_p=0.0), "top_p"),
        (None, dict(temperature=-1), "temperature"),
        (None, dict(temperature=float("nan")), "temperature"),
        (None, dict(temperature=1e-40), "temperature"),
        (None, dict(slots=0), "slots"),
        (None, dict(max_new_tokens=0), "max_new_tokens"),
        (None, dict(max_new_tokens=[1, 1]), "one limit for each"),
        (None, dict(vocab_size=0), "vocab_size"),
        (None, dict(eos_token_ids=[38, 39], vocab_size=38), "no response could end.* 38 ids"),
        (None, dict(eos_token_ids=40), "no response could end.* 40 ids"),
        (None, dict(eos_token_ids=45, vocab_size=50), "no response could end.* 40 ids"),
        (None, dict(eos_token_ids=[-1]), "no response could end"),
        (None, dict(seed=[1, 2]), "one seed"),
        (None, dict(prompts=[[3], [3] * 60], max_new_tokens=[60, 5]), "65 tokens.*64 positions"),
    ],
)
def test_refusals_say_why(model, changed, message):
    settings = {**dict(prompts=[[3]], max_new_tokens=1, eos_token_ids=[1]), **changed}
    with pytest.raises(ValueError, match=message):
        generate(build("llama") if model is None else model(), **settings)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("settings", [{"temperature": 0}, {}, {"top_p": 0.9}])
def test_logits_that_are_not_finite_are_named(value, settings):
    """They looked like a fault of an index. The last id of a large vocabulary (blocks of 128, with
    padding) is spoilt; -inf, which a mask may write, is sampled as before."""
    model, calls = build("llama", vocab_size=1100), []

    def spoil(module, inputs, output):
        calls.append(1)
        output.logits[..., -1] = value

    model.register_forward_hook(spoil)
    settings = dict(max_new_tokens=40, eos_token_ids=[], check_every=4, **settings)
    if value == float("-inf"):
        assert all(
            len(r.ids) == 40 and 1099 not in r.ids for r in generate(model, PROMPTS, **settings)
        )
        return
    with pytest.raises(FloatingPointError, match="logits are not finite"):
        generate(model, PROMPTS, **settings)
    assert len(calls) < 15  # the prompts and 4 steps: at the next look, not at the end


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_all_positions_of_the_model_can_be_used(family):
    model = build(family)  # 64 positions
    got = generate(model, [[3] * 50], max_new_tokens=14, eos_token_ids=[], temperature=0)
    assert got[0].ids == greedy_reference(model, [3] * 50, 14, set())[0]
    assert generate(model, [], max_new_tokens=1, eos_token_ids=[1]) == []


def test_prompts_as_tensors(monkeypatch):
    """Tensors of equal ids are equal prompts, too: each is prefilled once."""
    model, prefilled = build("llama"), count_prefills(monkeypatch)
    settings = dict(max_new_tokens=5, eos_token_ids=[1], temperature=0)
    expected = generate(model, PROMPTS, **settings)
    prefilled.clear()
    tensors = [torch.tensor(p, device=DEVICE) for p in PROMPTS + PROMPTS]
    assert generate(model, tensors, **settings) == expected + expected
    assert sorted(prefilled) == sorted(map(tuple, PROMPTS))
    rectangle = torch.tensor([PROMPTS[0], PROMPTS[2][:7]], device=DEVICE)
    assert generate(model, rectangle, **settings) == generate(model, rectangle.tolist(), **settings)


def test_numbers_of_any_kind():
    """np.int64 is no int, and a 0-d tensor cannot be iterated."""
    model, settings = build("llama"), dict(temperature=0)
    free = generate(model, PROMPTS, max_new_tokens=5, eos_token_ids=None, **settings)
    assert free == generate(model, PROMPTS, max_new_tokens=5, eos_token_ids=[], **settings)
    end = free[0].ids[2]
    expected = generate(model, PROMPTS, max_new_tokens=5, eos_token_ids=[end], **settings)
    prompts = [np.array(p) for p in PROMPTS[:2]] + [[np.int64(t) for t in p] for p in PROMPTS[2:]]
    for eos in (end, np.int64(end), torch.tensor(end), torch.tensor([end]), np.array([end]), {end}):
        for limit in (np.int64(5), torch.tensor(5), np.array([5] * 5), torch.tensor([5] * 5)):
            got = generate(model, prompts, max_new_tokens=limit, eos_token_ids=eos, **settings)
            assert got == expected


@pytest.mark.parametrize(
    "changed, message",
    [
        (dict(prompts=[5, 9, 3]), "each prompt must be a list of token ids, not 5"),
        (dict(prompts=torch.tensor([5, 9, 3])), "each prompt must be a list of token ids"),
        (dict(prompts="text"), "each prompt"),
        (dict(prompts=["text"]), "each prompt must be a list of token ids, not 'text'"),
        (dict(prompts={"input_ids": [[5, 9]]}), "each prompt"),
        (dict(prompts=[[5.0, 9.0]]), "each prompt"),
        (dict(eos_token_ids=[None]), "eos_token_ids must be ids"),
        (dict(eos_token_ids="</s>"), "eos_token_ids must be ids"),
        (dict(max_new_tokens=2.5), "max_new_tokens must be integers"),
        (dict(max_new_tokens=None), "max_new_tokens must be integers"),
    ],
)
def test_what_is_not_ids_is_named(changed, message):
    settings = {**dict(prompts=[[3]], max_new_tokens=1, eos_token_ids=[1]), **changed}
    with pytest.raises(TypeError, match=message):
        generate(build("llama"), **settings)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_inside_autocast(attention):
    """Catches keys of one dtype and values of another, and copies of the weights, made without
    gradient, that autocast would hand to the training forward in the same block."""
    model = build("llama", dtype=torch.float32, attention=attention)
    with torch.autocast(DEVICE, torch.bfloat16):
        got = generate(model, PROMPTS, max_new_tokens=8, eos_token_ids=[1], seed=0)
        for prompt, r in zip(PROMPTS, got):
            expected = full_forward_logprobs(model, prompt, r.ids)
            assert r.logprobs == pytest.approx(expected, abs=0.25)  # bf16: 8 bits
        ids = torch.tensor([PROMPTS[0]], device=DEVICE)
        model(input_ids=ids).logits.float().logsumexp(-1).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


def test_wrapped_models():
    """DistributedDataParallel has no config; torch.compile would compile anew for every length."""
    import torch.distributed as dist

    model, settings = build("llama"), dict(max_new_tokens=5, eos_token_ids=[1], temperature=0)
    expected = generate(model, PROMPTS, **settings)
    compiled = torch.compile(model, backend=lambda graph, inputs: pytest.fail("compiled"))
    assert generate(compiled, PROMPTS, **settings) == expected
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        parallel = torch.nn.parallel.DistributedDataParallel(model)
        assert generate(parallel, PROMPTS, **settings) == expected
        both = torch.compile(parallel, backend=lambda graph, inputs: pytest.fail("compiled"))
        assert generate(both, PROMPTS, **settings) == expected
        assert cache_bytes_per_token(parallel) == cache_bytes_per_token(model)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_what_the_samples_depend_on(dtype):
    """On the seed alone: not on the slots, the order, the other prompts, or how often the host
    looks. Catches random numbers that belong to a row, and a row that moves without them."""
    model, prompts = build("llama", dtype=dtype), PROMPTS * 3
    limits = [20, 3, 11, 7, 2, 9, 16, 5, 20, 1, 8, 13, 4, 20, 6]

    def ids(order=range(15), **settings):
        chosen, cut = [prompts[i] for i in order], [limits[i] for i in order]
        settings = dict(max_new_tokens=cut, eos_token_ids=[1, 2, 3], slots=4) | settings
        return [r.ids for r in generate(model, chosen, **settings)]

    first = ids(seed=5)
    assert len({tuple(y) for y in first}) > 10 and {len(y) for y in first} > {1, 2}
    for settings in (dict(slots=1), dict(slots=3), dict(slots=64), dict(check_every=5)):
        assert ids(seed=5, **settings) == first
    assert ids(seed=5, slots=4, cuda_graph=True) == first
    assert ids(seed=6) != first and ids(seed=5 + 2**64) == first
    seeds = torch.tensor(stream_seeds(5, 15))
    for part in (range(0, 15, 2), range(14, -1, -1), [7]):
        assert ids(part, seed=seeds[list(part)]) == [first[i] for i in part]
    torch.manual_seed(0)
    unseeded = ids()  # from torch's own generator
    assert ids() != unseeded
    torch.manual_seed(0)
    assert ids() == unseeded


def splitmix64(seed):
    """The generator of the paper, in Python's integers: an endless stream of 64 bits."""
    while True:
        seed = (seed + 0x9E3779B97F4A7C15) % 2**64
        z = (seed ^ seed >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
        yield z ^ z >> 31


def test_random_numbers_are_those_of_splitmix64():
    """Catches shifts that drag the sign along, sums that do not wrap around, and a counter by
    which two positions share a number."""
    known = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert list(islice(splitmix64(1234567), 3)) == known  # published with the algorithm
    for seed in (0, 1234567, 2**63 - 1, 2**63, 2**64 - 1, -1):
        assert stream_seeds(seed, 5) == [signed(z) for z in islice(splitmix64(seed), 5)]
        bits = islice(splitmix64(signed(seed)), 3 * LEVELS)
        expected = torch.tensor([z >> 11 for z in bits], dtype=torch.float64) * 2**-53
        seeds = torch.tensor([signed(seed)] * 3, device=DEVICE)
        found = uniforms(seeds, torch.arange(3, device=DEVICE)).cpu()
        assert found.flatten().equal(expected) and found.dtype == torch.float64


def test_quality_of_random_numbers():
    """Neighbours by seed, position and level are uniform and independent: each digit, each pair of
    digits at several distances, and each bit. Catches a stream that another one repeats later."""
    n, m = 500, 200  # responses, positions
    seeds = torch.tensor(stream_seeds(3, n)).repeat_interleave(m)
    u = uniforms(seeds, torch.arange(m).repeat(n)).view(n, m, LEVELS)
    assert 0 <= u.min() and u.max() < 1 and u.unique().numel() == u.numel()
    digit = (u * 10).long()
    neighbours = [(digit[:-1], digit[1:]), (digit[:, :-1], digit[:, 1:])]
    neighbours += [(digit[..., :-1], digit[..., 1:]), (digit[:-1, 1:], digit[1:, :-1])]
    neighbours += [(digit[:, :-7], digit[:, 7:]), (digit[:-64], digit[64:])]
    for a, b in neighbours:
        counts = (10 * a + b).flatten().bincount(minlength=100).double()
        uniform = torch.full((100,), 0.01, dtype=torch.float64)
        assert abs(chi_square(counts, uniform, counts.sum().item())) < 4
    for bit in range(1, 54):
        ones = (u * 2**bit).long() & 1
        assert abs(ones.double().mean().item() - 0.5) < 4 * 0.5 / ones.numel() ** 0.5


def count_prefills(monkeypatch):
    """Every call's prompts, without the one-token probe of each `generate`."""
    calls, prefill = [], rollout_module.prefill

    def counted(model, prompts):
        calls.extend(p for p in prompts if p != (0, 0))
        return prefill(model, prompts)

    monkeypatch.setattr(rollout_module, "prefill", counted)
    return calls


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2"])
@pytest.mark.parametrize("slots", [1, 3, 64])
def test_a_prompt_sampled_n_times_is_prefilled_once(family, slots, monkeypatch):
    """Copies after each other, far apart, waiting and admitted together: each must continue like
    one that was computed alone."""
    model, prefilled = build(family), count_prefills(monkeypatch)
    prompts = [PROMPTS[i] for i in (0, 0, 1, 2, 0, 3, 2, 2, 4, 0, 1, 2)]
    settings = dict(max_new_tokens=14, slots=slots)
    got = generate(model, prompts, eos_token_ids=EOS, temperature=0, **settings)
    assert sorted(prefilled) == sorted(map(tuple, PROMPTS))
    expected = {tuple(p): greedy_reference(model, p, 14, EOS) for p in PROMPTS}
    for prompt, r in zip(prompts, got):
        ids, logprobs = expected[tuple(prompt)]
        assert r.ids == ids and r.logprobs == pytest.approx(logprobs, abs=1e-9)
    got = generate(model, prompts, eos_token_ids=[1], seed=0, **settings)
    for prompt, r in zip(prompts, got):
        assert r.logprobs == pytest.approx(full_forward_logprobs(model, prompt, r.ids), abs=1e-9)
    # Copies share the prompt, not the random numbers.
    assert len({tuple(r.ids) for r in got}) > len(PROMPTS)


def test_a_limit_for_each_prompt_and_progress():
    model, limits, ticks = build("llama"), [3, 1, 9, 4, 2], []
    settings = dict(eos_token_ids=[], temperature=0, slots=2, progress=ticks.append)
    got = generate(model, PROMPTS, max_new_tokens=limits, **settings)
    assert [len(r.ids) for r in got] == limits and not any(r.finished for r in got)
    assert ticks == [1] * 5
    for prompt, r, limit in zip(PROMPTS, got, limits):
        assert r.ids == greedy_reference(model, prompt, limit, set())[0]


def step_without_values(model, sampler):
    """A decode step on the meta device, where tensors have no values: whoever reads one raises."""
    model = model.to("meta")
    with torch.inference_mode():
        Decoder(model, prefill(model, [(0, 0)]), 4, 64, 63, [1, 2], sampler).step(3, 20)


@pytest.mark.parametrize("top_p", [1.0, 0.9])
@pytest.mark.parametrize("family", sorted(FAMILIES - MIXTURES))
def test_the_host_reads_nothing_in_a_step(family, top_p):
    """On a GPU a read would stall the queue, and a step with one cannot be captured. Mixtures of
    experts are left out: their eager experts read the router's choice."""
    step_without_values(tiny(family), partial(sample, temperature=0.7, top_p=top_p))


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.max().item(),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: bool(x.any()),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: [7, 8][x.argmax()],
    ],
    ids=["item", "tolist", "cpu", "bool", "boolean index", "nonzero", "index"],
)
def test_a_read_by_the_host_is_seen(read):
    """The test above must not be blind, as it was once: it asks a sampler that reads."""

    def sampler(logits, u):
        read(logits)
        return sample(logits, u)

    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        step_without_values(tiny("llama"), sampler)


@pytest.mark.parametrize("family", sorted(FAMILIES - MIXTURES))
def test_fixed_shapes(family, monkeypatch):
    """Few shapes, buffers that stay where they are, and the same tokens, though rows run on after
    their EOS and unused rows run along. On CUDA the steps are captured and replayed."""
    model, step, seen = build(family), Decoder.step, []
    prompts = [p + [t] for t in (7, 8) for p in PROMPTS]

    def watched(decoder, n, length):
        step(decoder, n, length)
        buffers = [decoder.tokens, decoder.logprobs, decoder.position, decoder.ended]
        buffers += decoder.cache.layers
        seen.append((n, length, tuple(x.data_ptr() for x in buffers)))

    monkeypatch.setattr(Decoder, "step", watched)
    settings = dict(max_new_tokens=14, eos_token_ids=EOS, temperature=0, slots=6)
    expected = generate(model, prompts, check_every=1, **settings)
    assert len({shape[:2] for shape in seen}) > 4  # elsewhere: any number of rows, any length
    for every in (4, 100):
        seen.clear()
        got = generate(model, prompts, check_every=every, cuda_graph=True, **settings)
        for r, e in zip(got, expected):
            assert r.ids == e.ids and r.finished == e.finished
            assert r.logprobs == pytest.approx(e.logprobs, abs=tolerance_of(model))
        assert {shape[0] for shape in seen} <= {1, 2, 4, 6} and {shape[1] for shape in seen} == {64}
        assert len({shape[2] for shape in seen}) == 1


@pytest.mark.parametrize("family", ["qwen3", "gpt2"])
def test_fixed_lengths_and_sampled_logprobs(family):
    """Several lengths, a host that looks every third step, and a row that is dragged along unused
    for longer than the model has positions (144, where the cache is allocated for 192)."""
    positions = dict(n_positions=144) if family == "gpt2" else {}
    model = build(family, max_position_embeddings=144, **positions)
    prompts, limits = [PROMPTS[0], PROMPTS[1], PROMPTS[4], PROMPTS[2] * 6], [100, 143, 100, 10]
    settings = dict(slots=4, check_every=3, cuda_graph=True, seed=0)
    got = generate(model, prompts, max_new_tokens=limits, eos_token_ids=[], **settings)
    assert [len(r.ids) for r in got] == limits
    for prompt, r in zip(prompts, got):
        assert r.logprobs == pytest.approx(full_forward_logprobs(model, prompt, r.ids), abs=1e-9)


@pytest.fixture
def products(monkeypatch):
    """The widths of the packed products, in their order."""
    seen, forward = [], rollout_module.PackedLinears.forward

    def watched(packed, x):
        if not packed.results:
            seen.append(len(packed.weight))
        return forward(packed, x)

    monkeypatch.setattr(rollout_module.PackedLinears, "forward", watched)
    return seen


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_packed_weights_sample_the_same(family, products):
    """Most families have two groups of them in a layer, mixtures one, as those whose MLP has no
    gate; three pack their weights themselves."""
    model = build(family)
    settings = dict(max_new_tokens=9, eos_token_ids=EOS, seed=0, slots=4)
    expected = generate(model, PROMPTS * 2, **settings)
    assert not products
    weights = {name: (p, p.clone()) for name, p in model.named_parameters()}
    pack_weights(model)
    for name, p in model.named_parameters():
        assert p is weights[name][0] and torch.equal(p, weights[name][1])
    modules = list(map(id, model.modules()))
    got = generate(model, PROMPTS * 2, **settings)
    assert list(map(id, model.modules())) == modules
    for r, e in zip(got, expected):
        assert r.ids == e.ids and r.finished == e.finished
        assert r.logprobs == pytest.approx(e.logprobs, abs=tolerance_of(model))
    groups = 2 - (family in MIXTURES - {"qwen2_moe"} or family in ("glm4", "starcoder2"))
    groups = 0 if family in ("gpt2", "gpt_neox", "phi3") else groups
    layers = model.config.num_hidden_layers
    assert len(list(rollout_module.same_input(model))) == layers * groups
    assert bool(products) == bool(groups) and len(products) % max(1, layers * groups) == 0


def assert_right(model, settings):
    for prompt, r in zip(PROMPTS, generate(model, PROMPTS, **settings)):
        assert r.logprobs == pytest.approx(full_forward_logprobs(model, prompt, r.ids), abs=1e-9)


def test_packed_weights_are_the_ones_that_are_trained(products):
    """Also by an optimizer that was there before. Weights that no longer lie side by side, as after
    `model.to`, are not packed."""
    model, settings = build("qwen2"), dict(max_new_tokens=9, eos_token_ids=[], seed=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=1)
    pack_weights(model)
    assert_right(model, settings)
    everything = set(products)
    ids = torch.tensor([PROMPTS[0]], device=DEVICE)
    model(input_ids=ids).logits[0, :, 5].sum().backward()
    before = model.model.layers[0].self_attn.v_proj.weight.clone()
    optimizer.step()
    assert (before - model.model.layers[0].self_attn.v_proj.weight).abs().max() > 1e-3
    products.clear()
    assert_right(model, settings)
    assert set(products) == everything == {64, 96}
    for layer in model.model.layers:
        weight = layer.self_attn.k_proj.weight
        weight.data = weight.data + 1
    products.clear()
    assert_right(model, settings)
    assert set(products) == {96}
    products.clear()
    assert generate(model.float(), PROMPTS, **settings) and not products


def unlike_bias(mlp):
    mlp.up_proj.bias = torch.nn.Parameter(mlp.up_proj.weight[:, 0].detach() + 1)


def another_class(mlp):
    mlp.up_proj = torch.nn.utils.parametrizations.weight_norm(mlp.up_proj)


def with_hook(mlp):
    mlp.up_proj.register_forward_hook(lambda module, inputs, output: output + 1)


def with_early_hook(mlp):
    mlp.up_proj.register_forward_pre_hook(lambda module, inputs: (inputs[0] + 1,))


def with_own_forward(mlp):
    mlp.up_proj.forward = lambda x: F.linear(x, mlp.up_proj.weight) + 1


CHANGES = [unlike_bias, another_class, with_hook, with_early_hook, with_own_forward]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("before", [True, False])
def test_layers_that_are_not_alike_are_not_packed(change, before, products):
    """Nor any more, if they were packed before."""
    model = build("llama")
    if before:
        pack_weights(model)
    for layer in model.model.layers:
        change(layer.mlp)
    pack_weights(model)
    assert_right(model, dict(max_new_tokens=9, eos_token_ids=[], seed=0))
    assert set(products) == {64}


def test_packing_weights_of_two_dtypes_changes_none():
    model = build("llama", dtype=torch.float32)
    model.model.layers[0].mlp.up_proj.double()
    before = {name: p.dtype for name, p in model.named_parameters()}
    pack_weights(model)
    assert {name: p.dtype for name, p in model.named_parameters()} == before


def test_packed_weights_train_wherever_they_were_packed():
    model = build("llama")
    with torch.inference_mode():
        pack_weights(model)
    model(input_ids=torch.tensor([[3, 4]], device=DEVICE)).logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


class Forwarding(torch.nn.Module):
    """Has the attributes of what it wraps, as a compiled or checkpointed layer has."""

    def __init__(self, wrapped):
        super().__init__()
        self.wrapped = wrapped

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.wrapped, name)

    def forward(self, *args, **kwargs):
        return self.wrapped(*args, **kwargs)


def test_packed_layers_of_wrapped_modules(products):
    model = build("llama")
    for layer in model.model.layers:
        layer.mlp, layer.self_attn = Forwarding(layer.mlp), Forwarding(layer.self_attn)
    pack_weights(model)
    names = [name for name, _ in model.named_modules()]
    assert_right(model, dict(max_new_tokens=9, eos_token_ids=[], seed=0))
    assert set(products) == {64, 96} and [name for name, _ in model.named_modules()] == names


def test_packed_layers_are_put_back_on_errors(products, monkeypatch):
    model = build("llama")
    pack_weights(model)
    modules = list(model.modules())

    def broken(*args, **kwargs):
        assert isinstance(model.model.layers[0].mlp.up_proj, rollout_module.PackedLinears)
        raise KeyboardInterrupt

    monkeypatch.setattr(model.model.norm, "forward", broken)
    with pytest.raises(KeyboardInterrupt):
        generate(model, PROMPTS, max_new_tokens=3, eos_token_ids=[])
    assert products and list(map(id, model.modules())) == list(map(id, modules))


@pytest.fixture
def compiles(monkeypatch):
    """torch.compile without Inductor. Returns a function that counts what it has compiled."""
    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    yield lambda: counters["stats"]["unique_graphs"]
    torch._dynamo.reset()


# gemma2: eager attention, compiled as well; gemma3_text: layers of two kinds; gpt2: other names
@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "gpt2", "mixtral", "qwen3"])
def test_compiled_layers_sample_the_same(family, compiles, monkeypatch):
    """And the cache is free afterwards, which an exception that the compiler keeps may hold."""
    model, init, caches = build(family), Decoder.__init__, []
    pack_weights(model)
    prompts, settings = PROMPTS * 2, dict(max_new_tokens=14, eos_token_ids=EOS, seed=0, slots=4)
    expected = generate(model, prompts, **settings)

    def watched(decoder, *rest):
        init(decoder, *rest)
        caches.extend(map(weakref.ref, decoder.cache.layers))

    monkeypatch.setattr(Decoder, "__init__", watched)
    for fixed in (False, True):
        got = generate(model, prompts, compile_layers=True, cuda_graph=fixed, **settings)
        assert caches and not any(cache() is not None for cache in caches)
        for r, e in zip(got, expected):
            assert r.ids == e.ids and r.finished == e.finished
            assert r.logprobs == pytest.approx(e.logprobs, abs=tolerance_of(model))
    assert compiles()
    assert not any("forward" in vars(module) for module in model.modules())


def test_layers_are_compiled_once(compiles):
    """For all layers, numbers of rows, lengths, calls, models of the same shape, and between steps
    of training: 36 layers would take minutes. One slot is another case: sizes of 1 are."""
    settings = dict(eos_token_ids=[], compile_layers=True, cuda_graph=True)
    # With heads of 20 the packed products have no width that is also a length.
    sizes = dict(max_position_embeddings=300, head_dim=20)
    few, many = (build("qwen3", num_hidden_layers=n, **sizes) for n in (2, 5))
    pack_weights(few)
    pack_weights(many)
    generate(few, PROMPTS, max_new_tokens=200, slots=4, **settings)
    graphs = compiles()
    assert 0 < graphs <= 5  # random numbers, drawing, layers: those in at most three cases
    for slots, limit in ((4, 200), (3, 9), (5, 70)):
        generate(many, PROMPTS, max_new_tokens=limit, slots=slots, **settings)
        many.train()(input_ids=torch.tensor([[3, 4]], device=DEVICE)).logits.sum().backward()
        for p in many.parameters():
            p.data.add_(p.grad, alpha=1e-3)
    assert compiles() <= graphs + 1  # one more where two sizes are no longer equal by chance
    generate(many, PROMPTS, max_new_tokens=9, slots=1, **settings)
    assert compiles() <= graphs + 4


def test_compiled_layers_are_put_back_on_errors(monkeypatch):
    """And forwards of their own, as accelerate sets them, stay."""
    model = build("llama")
    first, second, _ = model.model.layers
    second.forward = own = partial(second.forward)
    with torch.inference_mode():
        decoder = Decoder(model, prefill(model, [(0, 0)]), 4, 64, 63, [], sample)
    decoder.compiled = rollout_module.compile_forwards(model, 3)

    def broken(*args, **kwargs):
        assert vars(first)["forward"] is not vars(second)["forward"] is not own
        raise KeyboardInterrupt

    monkeypatch.setattr(model.model.embed_tokens, "forward", broken)
    enabled = torch.backends.cuda.cudnn_sdp_enabled()
    for step in (decoder.step, rollout_module.FixedShapes(decoder)):
        with pytest.raises(KeyboardInterrupt), torch.inference_mode():
            step(4, 64)
        assert vars(second)["forward"] is own and "forward" not in vars(first)
        assert decoder.cache.one is None
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(enabled)


def test_memory_is_named_before_and_on_running_out(caplog):
    model = build("llama", max_position_embeddings=10**13)
    with caplog.at_level("INFO", "rollout"):
        generate(model, PROMPTS * 2, max_new_tokens=5, eos_token_ids=[1], slots=4)
    # keys and values, layers, heads, head size, bytes, tokens
    size = 2 * 3 * 2 * 8 * 8 * (4 * 16 + 1 * 11) / 1e9
    assert f"4 slots x 16 + 1 x 11 tokens, {size:.3g} GB" in caplog.text
    message = "1 slots x 1000000000[0-9]* .* GB; lower slots or max_new_tokens"
    with pytest.raises(torch.OutOfMemoryError, match=message):
        generate(model.train(), [[3, 4]], max_new_tokens=10**12, eos_token_ids=[1])
    assert model.training  # restored on errors, too


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "gemma3_text"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_slots_that_fit(family, dtype, monkeypatch):
    """The estimate against the tensors that are really allocated: catches keys without values,
    query heads for key heads, the wrong width of a number."""
    model, prompt, length = build(family, dtype=dtype), 16, 64
    per_token = cache_bytes_per_token(model)
    with torch.inference_mode():
        decoder = Decoder(model, prefill(model, [(0, 0)]), 5, length, 63, [], None)
        written = prefill(model, [tuple(range(prompt + 1))] * 3)
    assert sum(x.nbytes for x in decoder.cache.layers) == 5 * length * per_token
    assert sum(x.nbytes for x in written) == 3 * prompt * per_token
    slots = fit_slots(model, prompt, length, free_bytes=2_000_000)
    logits = 32 * 40  # bytes per entry, vocabulary
    needed = (slots * length + slots // 4 * prompt) * per_token + slots * logits
    assert 0.6 * 2_000_000 < needed < 0.75 * 2_000_000
    assert fit_slots(model, prompt, length, free_bytes=1) == 1
    assert fit_slots(model, prompt, length, free_bytes=10**12) == 256
    if DEVICE == "cpu":
        assert fit_slots(model, prompt, length) == 64
    rows, asked = [], []
    monkeypatch.setattr(Decoder, "step", watch_rows(Decoder.step, rows))
    monkeypatch.setattr(rollout_module, "fit_slots", lambda *args: asked.append(args[1:]) or 2)
    generate(model, PROMPTS, max_new_tokens=5, eos_token_ids=[])
    assert max(rows) == 2 and asked == [(11, 16)]  # slots=None takes what fit_slots says


def watch_rows(step, rows):
    def watched(decoder, n, length):
        rows.append(n)
        step(decoder, n, length)

    return watched


LARGE = torch.randn(3, 1500, generator=torch.Generator().manual_seed(0))
LARGE[:, 300:1400] = float("-inf")
LARGE[2, :] = float("-inf")
LARGE[2, 1499] = 5.0  # certain: the last entry of the padded block


def random_numbers(rows, dtype=torch.float64):
    """Of `rows` responses, at position 0."""
    seeds = torch.tensor(stream_seeds(0, rows), device=DEVICE)
    return uniforms(seeds, torch.zeros_like(seeds)).to(dtype).clamp(max=1 - 2**-24)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("size", [1500, 300])
def test_draw(dtype, size):
    """Blocks, the last of them not full, whole blocks without weight, one cumulative sum without
    blocks; float64 and what devices without it do. Counts against the weights."""
    n, logits = 8000, LARGE[:, -size:].to(DEVICE)
    ids = draw(logits.exp().repeat(n, 1), random_numbers(3 * n, dtype)).view(n, 3).cpu()
    assert (ids[:, 2] == size - 1).all()
    for row in (0, 1):
        p = logits[row].double().softmax(-1).cpu()
        counts = ids[:, row].bincount(minlength=size).double()
        assert counts[p == 0].sum() == 0
        assert chi_square(counts, p, n) < 4


def test_draw_takes_no_weight_of_zero_when_sums_round(monkeypatch):
    """Parallel sums round differently at each entry, so that an entry of weight 0 can seem to add
    something, and the last sum can be the smallest. The CPU's do not; so this makes it happen."""
    cumsum = torch.Tensor.cumsum

    def rounded(x, dim):
        return cumsum(x, dim) * (1 + 0.02 * torch.rand(x.shape, device=DEVICE))

    monkeypatch.setattr(torch.Tensor, "cumsum", rounded)
    weights = torch.ones(4000, 40, device=DEVICE)
    weights[:, 3::2] = 0
    weights[:, 30:] = 0
    u = random_numbers(4000, torch.float32)
    ids = draw(weights, u)
    assert (weights.gather(1, ids) > 0).all()
    assert len(ids.unique()) == 16  # all others
    least = torch.full((4000, 3), 1e-45, device=DEVICE)  # a random part of them can round to all
    assert draw(least, u).max() == 2


def test_blocks_of_blocks():
    """A vocabulary of more than 128 x 1,024 entries has three levels."""
    weights = torch.zeros(2000, 140_000, device=DEVICE)
    places = [0, 127, 128, 16_383, 16_384, 131_071, 131_072, 139_999]
    weights[:, places] = torch.arange(1.0, 9.0, device=DEVICE)
    ids = draw(weights, random_numbers(2000))[:, 0].cpu()
    counts = torch.stack([(ids == place).sum() for place in places]).double()
    assert counts.sum() == 2000
    assert chi_square(counts, torch.arange(1.0, 9.0).double() / 36, 2000) < 4


@pytest.mark.parametrize("size", [1500, 140_000, 151_669])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_row_with_nan_stays_inside_a_large_vocabulary(value, size):
    """Its index reached into the padding of the blocks of blocks: on CUDA that ends the process."""
    logits = torch.zeros(2, size, device=DEVICE)
    logits[0, size // 3] = value
    ids, logprobs = sample(logits, random_numbers(2))
    assert ids.max() < size and logprobs.isnan().tolist() == [True, False]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_of_a_large_vocabulary(temperature):
    drawn, logprobs = sample(LARGE, random_numbers(3).cpu(), temperature)
    expected = (LARGE.double() / temperature).log_softmax(-1).gather(-1, drawn[:, None])[:, 0]
    assert logprobs.tolist() == pytest.approx(expected.tolist(), abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_zero_takes_no_entry_without_weight(dtype):
    logits = torch.tensor([[float("-inf"), 0.0, 0.0]])
    assert sample(logits, torch.zeros(1, LEVELS, dtype=dtype))[0].item() == 1


def test_edges_of_nucleus_and_temperature():
    """One of two equal tokens holds half. At temperature 0 the nucleus cuts no log-probability."""
    u = torch.full((1, LEVELS), 0.9, dtype=torch.float64)
    logits = torch.tensor([[1.0, 1.0, float("-inf")]])
    assert sample(logits, u, top_p=0.5)[1].item() == 0
    logits = torch.tensor([[1.0, 2.0, 0.0]])
    ids, logprobs = sample(logits, u, temperature=0, top_p=0.1)
    assert ids.item() == 1
    assert logprobs.item() == pytest.approx(logits.log_softmax(-1).max().item())


# ------------------------------------------------------------- what is refused, and what is limited


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
@pytest.mark.parametrize("form", ["plain", "by layer type", "as older configs have it"])
def test_rotary_embeddings_that_depend_on_the_batch_are_refused(kind, form):
    rope = {
        "plain": dict(rope_parameters={"rope_type": kind}),
        "by layer type": dict(rope_parameters={"full_attention": {"rope_type": kind}}),
        "as older configs have it": dict(rope_scaling={"type": kind, "factor": 2.0}),
    }
    config = SimpleNamespace(model_type="phi3", _attn_implementation="sdpa", **rope[form])
    with pytest.raises(ValueError, match=f"of type {kind} "):
        check_supported(SimpleNamespace(config=config))


@pytest.mark.parametrize("attention", ["flash_attention_2", "flex_attention"])
def test_attention_that_ignores_our_masks_is_refused(attention):
    config = SimpleNamespace(model_type="llama", _attn_implementation=attention)
    with pytest.raises(ValueError, match=f"not '{attention}'"):
        check_supported(SimpleNamespace(config=config))


@pytest.mark.parametrize("check_every", [1, 4])
def test_one_step_of_nan_is_named(check_every):
    """Not the last one before the host looks; what follows it is finite."""
    model, calls = build("llama"), []

    def spoil(module, inputs, output):
        calls.append(1)
        if len(calls) == 4:  # after the probe, the prompt and a step
            output.logits[..., -1] = float("nan")

    model.register_forward_hook(spoil)
    with pytest.raises(FloatingPointError, match="logits are not finite"):
        generate(model, PROMPTS[:1], max_new_tokens=40, eos_token_ids=[], check_every=check_every)


def test_slots_by_hand(monkeypatch):
    """Three quarters of what CUDA and torch's allocator have left, by what a slot takes."""
    model = SimpleNamespace(device=torch.device("cuda"), config=SimpleNamespace(vocab_size=40))
    monkeypatch.setattr(rollout_module, "cache_bytes_per_token", lambda model: 100)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1_000_000, 9_000_000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 700_000)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 200_000)
    slot = 100 * (64 + 16 // 2) + 32 * 40
    assert fit_slots(model, 16, 64) == int(0.75 * 1_500_000) // slot
    assert fit_slots(model, 16, 64, free_bytes=10**6) == int(0.75 * 10**6) // slot


def test_prompts_are_prefilled_a_few_tokens_at_a_time(monkeypatch):
    sizes, real = [], rollout_module.prefill

    def watched(model, prompts):
        sizes.append(len(prompts) * max(map(len, prompts)))
        return real(model, prompts)

    monkeypatch.setattr(rollout_module, "prefill", watched)
    monkeypatch.setattr(rollout_module, "PREFILL_TOKENS", 24)
    prompts = [p + [t] for t in range(8) for p in PROMPTS]
    generate(build("llama"), prompts, max_new_tokens=2, eos_token_ids=[])
    assert 12 < max(sizes) <= 24


@pytest.mark.parametrize("cuda_graph, length", [(False, 16), (True, 64)])
def test_what_is_logged_is_what_is_allocated(cuda_graph, length, caplog, monkeypatch):
    """No more slots than prompts; fixed shapes have lengths in 64s."""
    made, real = [], rollout_module.SlotCache

    def watched(*args):
        made.append(real(*args))
        return made[0]

    monkeypatch.setattr(rollout_module, "SlotCache", watched)
    settings = dict(max_new_tokens=5, eos_token_ids=[1], slots=64, cuda_graph=cuda_graph)
    with caplog.at_level("INFO", "rollout"):
        generate(build("llama"), PROMPTS, **settings)
    assert f"keys and values of 5 slots x {length} + " in caplog.text
    assert made[0].layers[0].shape[0] == 5 and made[0].layers[0].shape[3] == length
