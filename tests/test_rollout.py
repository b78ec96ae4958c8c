"""rollout.py against plain full forwards without any cache, in float64."""

import pytest
import torch
from tiny import tiny

from rollout import FAMILIES, generate

PROMPTS = [[5, 9, 3, 7, 2, 8, 11], [4], [6, 6, 13, 9, 22, 31, 8, 2, 2, 17, 12], [7, 3], [9, 4, 4, 21, 5]]


@torch.no_grad()
def greedy_reference(model, prompt, max_new_tokens, eos):
    """One full forward a token: no cache, no batch, no mask. Returns (ids, log-probabilities at temperature 1)."""
    ids, logprobs = [], []
    while len(ids) < max_new_tokens and not (ids and ids[-1] in eos):
        logits = model(input_ids=torch.tensor([prompt + ids])).logits[0, -1]
        ids.append(logits.argmax().item())
        logprobs.append(logits.log_softmax(-1).max().item())
    return ids, logprobs


@torch.no_grad()
def full_forward_logprobs(model, prompt, ids, temperature=1.0):
    logits = model(input_ids=torch.tensor([prompt + ids])).logits[0] / temperature
    rows = logits.log_softmax(-1)[len(prompt) - 1 : -1]  # position t-1 predicts token t
    return rows.gather(-1, torch.tensor(ids)[:, None])[:, 0]


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_greedy_equals_a_loop_without_cache(family):
    """Catches rows that see each other's padding, wrong positions, a window that is off by one, stale keys of an earlier sequence in the slot."""
    model = tiny(family)
    eos = {1, 2, 3, 14, 15}
    tolerance = 1e-6 if model.config._attn_implementation == "eager" else 1e-9  # eager attention has its softmax in fp32
    expected = [greedy_reference(model, p, 14, eos) for p in PROMPTS]
    assert len({len(ids) for ids, _ in expected}) > 1 or family != "llama"  # rows must end at different times
    for slots in (1, 2, 64):  # 2: rows are reused while others go on; 64: the batch only shrinks
        got = generate(model, PROMPTS, max_new_tokens=14, eos_token_ids=eos, temperature=0, slots=slots)
        for rollout, (ids, logprobs) in zip(got, expected):
            assert rollout.ids == ids
            assert rollout.logprobs == pytest.approx(logprobs, abs=tolerance)
            assert rollout.finished == (ids[-1] in eos)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text", "gpt2"])
def test_sampled_logprobs_equal_one_full_forward(family):
    model = tiny(family)
    generator = torch.Generator().manual_seed(0)
    got = generate(model, PROMPTS, max_new_tokens=20, eos_token_ids=[1], temperature=1.7, slots=3, generator=generator)
    for prompt, rollout in zip(PROMPTS, got):
        expected = full_forward_logprobs(model, prompt, rollout.ids, temperature=1.7)
        assert rollout.logprobs == pytest.approx(expected.tolist(), abs=1e-9)


def test_float32_and_eager_attention():
    for attention in ("sdpa", "eager"):
        model = tiny("qwen3", dtype=torch.float32, attention=attention)
        got = generate(model, PROMPTS, max_new_tokens=20, eos_token_ids=[1], slots=3, generator=torch.Generator().manual_seed(0))
        for prompt, rollout in zip(PROMPTS, got):
            assert rollout.logprobs == pytest.approx(full_forward_logprobs(model, prompt, rollout.ids).tolist(), abs=1e-4)


def test_eos_and_length_limit():
    model = tiny("llama")
    free = [r.ids for r in generate(model, PROMPTS, max_new_tokens=9, eos_token_ids=[], temperature=0)]
    assert all(len(ids) == 9 for ids in free)
    eos = {free[0][4], free[1][2]}  # two ids end a response; PROMPTS hold some of these ids too, which must end nothing
    for ids, rollout in zip(free, generate(model, PROMPTS, max_new_tokens=9, eos_token_ids=eos, temperature=0)):
        end = next((i + 1 for i, t in enumerate(ids) if t in eos), 9)
        assert rollout.ids == ids[:end] and rollout.finished == (ids[end - 1] in eos)
    on_the_last = generate(model, PROMPTS[:1], max_new_tokens=5, eos_token_ids=[free[0][4]], temperature=0)[0]
    assert on_the_last.finished == (free[0].index(free[0][4]) <= 4)  # an EOS as the last allowed token still counts as an end


def chi_square(counts, probabilities, n):
    expected = probabilities * n
    keep = expected > 5
    rest = torch.tensor([counts[~keep].sum(), expected[~keep].sum()])
    value = ((counts[keep] - expected[keep]) ** 2 / expected[keep]).sum() + (rest[0] - rest[1]) ** 2 / rest[1].clamp(min=1e-9)
    return value.item(), int(keep.sum())  # degrees of freedom: the kept cells and the rest, less one


@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.6, 1.0), (1.3, 0.8)])
def test_distribution(temperature, top_p):
    """First and second tokens of 6,000 samples against the softmax. Under the right sampler the fixed seed gives z < 4."""
    model, prompt, n = tiny("llama"), PROMPTS[0], 6000
    got = generate(model, [prompt] * n, max_new_tokens=2, eos_token_ids=[], temperature=temperature, top_p=top_p, slots=1000,
                   generator=torch.Generator().manual_seed(1))  # fmt: skip
    most_common = torch.tensor([r.ids[0] for r in got]).mode().values.item()
    for prefix, tokens in [([], [r.ids[0] for r in got]), ([most_common], [r.ids[1] for r in got if r.ids[0] == most_common])]:
        with torch.no_grad():
            p = (model(input_ids=torch.tensor([prompt + prefix])).logits[0, -1] / temperature).softmax(-1)
        order = p.argsort(descending=True)
        nucleus, mass = [], 0.0
        for token in order.tolist():  # the fewest most likely tokens that hold top_p
            nucleus.append(token)
            mass += p[token].item()
            if mass >= top_p:
                break
        q = torch.zeros_like(p)
        q[nucleus] = p[nucleus] / mass
        assert set(tokens) <= set(nucleus)
        value, df = chi_square(torch.tensor(tokens).bincount(minlength=len(p)).double(), q, len(tokens))
        assert (value - df) / (2 * df) ** 0.5 < 4
        for r in got[:50]:
            if not prefix:
                assert r.logprobs[0] == pytest.approx(q[r.ids[0]].log().item(), abs=1e-9)


def test_ids_beyond_the_tokenizer_are_never_sampled():
    model = tiny("llama")
    with torch.no_grad():
        model.lm_head.weight[30:] *= 20  # make the forbidden ids the likely ones
    got = generate(model, [PROMPTS[0]] * 200, max_new_tokens=3, eos_token_ids=[], vocab_size=30, generator=torch.Generator().manual_seed(0))
    assert max(t for r in got for t in r.ids) < 30
    assert max(t for r in generate(model, [PROMPTS[0]] * 20, max_new_tokens=3, eos_token_ids=[]) for t in r.ids) >= 30
    with torch.no_grad():
        first = model(input_ids=torch.tensor([PROMPTS[0]])).logits[0, -1, :30].log_softmax(-1)
    assert got[0].logprobs[0] == pytest.approx(first[got[0].ids[0]].item(), abs=1e-9)


def test_modes_are_put_back_and_dropout_is_off_while_sampling():
    model = tiny("gpt2", resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
    expected = [greedy_reference(model, p, 6, {1})[0] for p in PROMPTS]
    model.train()
    model.transformer.h[0].eval()
    got = generate(model, PROMPTS, max_new_tokens=6, eos_token_ids=[1], temperature=0)
    assert [r.ids for r in got] == expected
    assert model.training and model.transformer.h[1].training and not model.transformer.h[0].training


def test_refusals_name_the_family():
    from transformers import AutoConfig, AutoModelForCausalLM

    bloom = AutoModelForCausalLM.from_config(AutoConfig.for_model("bloom", hidden_size=16, n_layer=1, n_head=2, vocab_size=20))
    with pytest.raises(ValueError, match="bloom"):
        generate(bloom, [[3]], max_new_tokens=1, eos_token_ids=[1])
    dynamic = tiny("llama", rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0})
    with pytest.raises(ValueError, match="dynamic.*llama"):
        generate(dynamic, [[3]], max_new_tokens=1, eos_token_ids=[1])
    with pytest.raises(ValueError, match="empty prompt"):
        generate(tiny("llama"), [[3], []], max_new_tokens=1, eos_token_ids=[1])
    with pytest.raises(ValueError, match="top_p"):
        generate(tiny("llama"), [[3]], max_new_tokens=1, eos_token_ids=[1], top_p=0.0)
    assert generate(tiny("llama"), [], max_new_tokens=1, eos_token_ids=[1]) == []
