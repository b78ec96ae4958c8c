"""The distillation objectives of SD-Zero, and how to run them without [tokens, vocabulary] tensors.

The objectives come first: pure functions on logits, equations (4) to (6) of the README. The rest
feeds them: `predicting_last` (which hidden states predict which tokens), `micro_batches` (which
sequences share a forward pass) and `backward_by_chunks` (hidden states -> logits, loss, gradients,
a few rows at a time). To start reading: `full_logits`, then `predicting_last`.

    student_h = predicting_last(student, student_ids, counts)  # [N, H]
    with torch.no_grad():
        teacher_h = predicting_last(teacher, teacher_ids, counts)  # [N, H]
    layer, other = OutputLayer(student), (OutputLayer(teacher), teacher_h)
    kl = backward_by_chunks(full_logits, layer, student_h, divisor=sum(counts), teacher=other)

Shapes: B sequences, T positions, N scored tokens (rows), V vocabulary size, K of its entries, H
hidden size. Every objective takes the logits of the student and of the teacher for the SAME N
tokens and returns one number per token, in nats: the caller masks, sums and divides.

- Log-probabilities are valid logits too: log_softmax leaves them as they are, up to rounding.
- Half-precision logits are computed in fp32; float64 stays float64.
- The gradient flows into the student only if the teacher's logits have none: detach them.
- Ids that can never be sampled must be cut off both sides (`logits[:, :n]`), not set to -inf, since
  0 x inf has no gradient.
"""

import math
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F

# How much `backward_by_chunks` works on at a time, by device: (logits of a chunk, chunks of a
# block). The loss runs chunk by chunk, so that all that it computes from the logits stays small: in
# fp32 a chunk is 0.5 MB on a CPU, whose cache it fits into, 256 MB on a GPU (with 64 MB an earlier
# commit took 1.3 to 1.6 times as long on an H100), 16 MB on an Apple one, which shares the
# machine's memory. The matrix products run block by block, because they are slow with few rows.
CHUNK = {"cpu": (2**17, 96), "mps": (2**22, 8), "cuda": (2**26, 4)}


# --------------------------------------------------------------------------------------- objectives


def log_softmax(logits: torch.Tensor) -> torch.Tensor:
    """Log-probabilities over the last dimension, of the same shape, in fp32 (float64 stays)."""
    return F.log_softmax(logits if logits.dtype == torch.float64 else logits.float(), dim=-1)


def token_logprobs(logits: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """log softmax(logits) at the given tokens. logits: [N, V], token_ids: [N] -> [N]."""
    return log_softmax(logits).gather(-1, token_ids[:, None])[:, 0]


def entropy(logprobs: torch.Tensor) -> torch.Tensor:
    """Entropy in nats of log-probabilities: [N, V] -> [N], between 0 and log V."""
    return -(logprobs.exp() * logprobs).sum(-1)


def _kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """D_KL(p || q) of log-probabilities: [N, K], [N, K] -> [N].

    It is never clamped at 0: rounding may give -1e-9, and a clamp would kill the gradient there.
    """
    return (p.exp() * (p - q)).sum(-1)


def divergence(
    student_logprobs: torch.Tensor, teacher_logprobs: torch.Tensor, alpha: float = 1.0
) -> torch.Tensor:
    """README (5), the family behind `full_logits`, on log-probabilities: [N, K], [N, K] -> [N].

    For callers that need the log-probabilities for something else as well, since each log-softmax
    is a pass over all logits. alpha: see `full_logits`. Raises ValueError for alpha outside [0, 1].
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must lie in [0, 1], not {alpha}")
    if alpha == 1:
        return _kl(student_logprobs, teacher_logprobs)
    if alpha == 0:
        return _kl(teacher_logprobs, student_logprobs)
    mixture = torch.logaddexp(
        student_logprobs + math.log(1 - alpha), teacher_logprobs + math.log(alpha)
    )
    to_teacher, to_student = _kl(teacher_logprobs, mixture), _kl(student_logprobs, mixture)
    return alpha * to_teacher + (1 - alpha) * to_student


def full_logits(student: torch.Tensor, teacher: torch.Tensor, alpha: float = 1.0) -> torch.Tensor:
    """Divergence over the whole vocabulary, README (4) and (5): the paper's section 2.2.

    student, teacher: logits [N, V] -> [N].

    alpha = 1: the reverse KL, D_KL(student || teacher), which is the paper's.
    alpha = 0: the forward KL, D_KL(teacher || student).
    Between:   the generalised Jensen-Shannon divergence,
               alpha D_KL(teacher || M) + (1 - alpha) D_KL(student || M)
               with the mixture M = (1 - alpha) student + alpha teacher.

    The family JUMPS at its ends: (5) goes to 0 as alpha goes to 0 or 1, where the full KLs take
    over. alpha = 0.999 is therefore not almost the reverse KL but almost no loss at all.
    Raises ValueError for alpha outside [0, 1].
    """
    return divergence(log_softmax(student), log_softmax(teacher), alpha)


def topk_logits(
    student: torch.Tensor, teacher: torch.Tensor, k: int, alpha: float = 1.0, tail: bool = True
) -> torch.Tensor:
    """The same divergence on the student's k most likely tokens. The paper's recipe has k = 64.

    student, teacher: logits [N, V] -> [N].

    tail = True:  all other tokens are one more bucket, so that the value is at most that of
                  `full_logits`, and equal to it at k = V.
    tail = False: both sides are renormalised on the k tokens. What the student puts elsewhere is
                  then invisible.
    Raises ValueError for k < 1, and for k = 1 without tail: one token that has all the
    probability on both sides gives the loss 0 whatever the models say.
    """
    if k < 1 or (k == 1 and not tail):
        raise ValueError(f"topk_logits needs k >= 1, and without tail k >= 2, not {k}")
    top_ids = student.detach().topk(min(k, student.shape[-1]), dim=-1).indices  # [N, K]

    def on_top_ids(logits: torch.Tensor) -> torch.Tensor:
        logits = logits if logits.dtype == torch.float64 else logits.float()
        top = logits.gather(-1, top_ids)
        if tail and k < logits.shape[-1]:
            # The bucket comes from the other logits themselves: 1 - sum(top) would have no digits
            # left where the top k hold nearly everything.
            rest = logits.scatter(-1, top_ids, float("-inf")).logsumexp(-1, keepdim=True)
            top = torch.cat([top, rest], dim=-1)  # [N, K + 1]
        return F.log_softmax(top, dim=-1)

    return divergence(on_top_ids(student), on_top_ids(teacher), alpha)


def sampled_token(
    student: torch.Tensor, teacher: torch.Tensor, token_ids: torch.Tensor
) -> torch.Tensor:
    """Score-function estimate of (4): stop_gradient(log pi - log pi_bar) * log pi at y_t.

    student, teacher: logits [N, V], token_ids: the sampled tokens [N] -> [N].

    Averaged over tokens drawn from the student, its VALUE is not a KL, but its GRADIENT is that of
    the reverse KL, if the teacher does not know y_t. SD-Zero's has read y. Where it copies y the
    estimate favours the sampled tokens, and the mean of its gradient over y is not the gradient of
    (4). `full_logits` has neither flaw.
    """
    log_pi, log_pi_bar = token_logprobs(student, token_ids), token_logprobs(teacher, token_ids)
    return (log_pi - log_pi_bar).detach() * log_pi


def mixed_kl(
    student: torch.Tensor, teacher: torch.Tensor, w: float = 0.5, k: int | None = None
) -> torch.Tensor:
    """The authors' code: w D_KL(teacher || student) + (1 - w) D_KL(student || teacher).

    student, teacher: logits [N, V] -> [N].

    k: on the teacher's k most likely tokens, both sides renormalised there (theirs: 64);
    None: on the whole vocabulary. With k it is blind to what the student puts outside the support:
    where both sides agree on the support up to a factor, loss and gradient are 0, even if nearly
    all of the student's mass lies elsewhere.
    Raises ValueError for w outside [0, 1], and for k < 2: on one token the loss is always 0.
    """
    if not 0 <= w <= 1:
        raise ValueError(f"w must lie in [0, 1], not {w}")
    if k is not None:
        if k < 2:
            raise ValueError(f"mixed_kl needs k >= 2, not {k}")
        top_ids = teacher.topk(min(k, teacher.shape[-1]), dim=-1).indices
        student, teacher = student.gather(-1, top_ids), teacher.gather(-1, top_ids)
    student, teacher = log_softmax(student), log_softmax(teacher)
    return w * _kl(teacher, student) + (1 - w) * _kl(student, teacher)


def importance_weight(
    logprobs: torch.Tensor, old_logprobs: torch.Tensor, cap: float
) -> torch.Tensor:
    """README (6): min(pi(y_t) / pi_old(y_t), cap), without gradient.

    logprobs, old_logprobs: of the sampled tokens, [N] each -> [N].
    """
    return (logprobs - old_logprobs).detach().exp().clamp(max=cap)


# ------------------------------------------------------------------ from token ids to hidden states


def _check_unwrapped(model) -> None:
    if not hasattr(model, "base_model"):
        given = f"{type(model).__name__}; of a DDP model pass ddp.module"
        raise ValueError(f"losses.py needs a Hugging Face causal LM, not {given}")


def hidden_states(model, sequences: list[list[int]]) -> torch.Tensor:
    """Last hidden states [B, T, H] of a Hugging Face causal LM, one forward pass for all sequences.

    Sequences are padded on the RIGHT, which causal attention cannot see: no mask is needed, and
    positions count from 0 in every row. Outputs at padded positions must be ignored.

    sequences: token ids as lists, 1-D tensors or arrays. Raises ValueError for none, for a wrapped
    model, and for more ids than GPT-2 and its kin have learned positions.
    """
    _check_unwrapped(model)
    sequences = [s.tolist() if hasattr(s, "tolist") else list(s) for s in sequences]
    if not sequences:
        raise ValueError("there is no sequence")
    longest = max(map(len, sequences))
    learned = getattr(model.base_model, "wpe", None)  # on a GPU its index error would be obscure
    if learned is not None and longest > learned.num_embeddings:
        limit = learned.num_embeddings
        raise ValueError(f"a sequence has {longest} ids, but the model has {limit} positions")
    padded = [ids + [0] * (longest - len(ids)) for ids in sequences]
    input_ids = torch.tensor(padded, device=model.device)
    return model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state


def predicting_last(model, sequences: list[list[int]], counts: list[int]) -> torch.Tensor:
    """The hidden states that predict the LAST counts[i] ids of each sequence i: [N, H].

    This is where student and teacher are aligned. They read different sequences, x + y and
    x + y + P_r + y, but both end with y: with the same counts, row n of the one and row n of the
    other are predictions of the same token. The teacher's rows come from its SECOND copy of y.

    The output at position t-1 predicts token t, so the rows lie one place to the left of the ids:

        position    0    1    2    3    4
        ids         x0   x1   y0   y1   y2       counts[i] = 3: the last three are scored
        output      h0   h1   h2   h3   h4       h1, h2, h3 are returned
                         |    |    |    |
        predicts         y0   y1   y2   what would come next

    A count of 0 adds no row. Raises ValueError for a negative count, and for one that leaves no id
    in front of the scored ones: the first id of a sequence is predicted by nothing. Otherwise as
    `hidden_states`.
    """
    for ids, count in zip(sequences, counts, strict=True):
        if not 0 <= count < len(ids):
            raise ValueError(f"a sequence of {len(ids)} ids has no last {count} that are predicted")
    rows = []
    for hidden, ids, count in zip(hidden_states(model, sequences), sequences, counts):
        end = len(ids)  # what follows in `hidden` is padding
        rows.append(hidden[end - count - 1 : end - 1])
    return torch.cat(rows)


def micro_batches(lengths: list[int], budget: int) -> list[list[int]]:
    """Indices of sequences in groups of similar length, each for one forward and backward pass.

    lengths: of the sequences, in ids; budget: positions of a group, rows x longest. A sequence that
    is longer gets a group of its own.

    Longest first, each sequence joins the last group, unless that would exceed the budget or make
    more than 10% of all positions so far padding: at least 90% of the positions are real. This is
    greedy: the best cut would have about 5% fewer groups for 9 random lengths, 25% for 128. Then
    the budget is lowered while it gives as many groups: the largest decides how much memory a step
    takes, and it gets some 15% smaller for 8 random lengths, 2 to 6% for 128.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])

    def cut(budget: float) -> list[list[int]]:
        groups, real, positions = [], 0, 0
        for i in order:
            real += lengths[i]
            longest = lengths[groups[-1][0]] if groups else 0
            in_budget = groups and (len(groups[-1]) + 1) * longest <= budget
            if in_budget and 10 * real >= 9 * (positions + longest):
                groups[-1].append(i)
                positions += longest
            else:
                groups.append([i])
                positions += lengths[i]
        return groups

    def size(group: list[int]) -> int:
        return len(group) * lengths[group[0]]

    groups = cut(budget)
    while groups:
        largest = max(groups, key=size)
        evener = cut(size(largest) - 1)
        if len(largest) == 1 or len(evener) > len(groups):
            break
        groups = evener
    return groups


# ---------------------------------------------------- from hidden states to logits, loss, gradients


class OutputLayer:
    """From last hidden states [N, H] to logits [N, V] of a Hugging Face causal LM.

    model: the model; vocab_size: V, logits of later ids are cut off (default: none are).

    It applies the model's own steps after the last hidden state, scaling (Cohere, Granite) and soft
    capping (Gemma 2) included. A family that has another step there is found by comparison with the
    model's own logits on a few tokens: ValueError with its name. The weights are the model's own,
    not a copy. Raises ValueError for a wrapped model, too, and for logits that are not finite.
    """

    def __init__(self, model, vocab_size: int | None = None):
        _check_unwrapped(model)
        head, config = model.get_output_embeddings(), model.config
        self.weight, self.bias = head.weight, head.bias  # [at least V, H], [at least V] or None
        self.vocab_size = min(vocab_size or len(head.weight), len(head.weight))
        # R, the rows of the weight that `linear` multiplies with. On a GPU all of them, and the cut
        # to V comes later: Qwen's V is 151,669 of 151,936, and rows of logits that are not a
        # multiple of 16 bytes long keep a GPU from its fast kernels.
        self.rows = len(head.weight) if head.weight.is_cuda else self.vocab_size
        divided_by = getattr(config, "logits_scaling", None) or 1
        self.scale = getattr(config, "logit_scale", None) or 1 / divided_by
        self.cap = getattr(config, "final_logit_softcapping", None)

        modes = [(module, module.training) for module in model.modules()]
        model.eval()
        try:
            with torch.no_grad():
                ids = torch.arange(8, device=head.weight.device)[None] % len(head.weight)
                ours = self(model.base_model(input_ids=ids).last_hidden_state)
                theirs = model(input_ids=ids).logits[..., : self.vocab_size]
        finally:
            for module, mode in modes:
                module.training = mode
        rtol = 1e-2 if ours.dtype in (torch.bfloat16, torch.float16) else 1e-4
        if not torch.allclose(ours.float(), theirs.float(), rtol=rtol, atol=1e-4):
            if not theirs.isfinite().all():
                raise ValueError("the model cannot be used: its logits are not finite")
            family = f"the family {config.model_type!r}"
            raise ValueError(f"losses.py does not know how {family} makes logits of hidden states")

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits of hidden states, by autograd."""
        return self.scale_and_cap(F.linear(hidden, self.weight, self.bias)[..., : self.vocab_size])

    def scale_and_cap(self, logits: torch.Tensor) -> torch.Tensor:
        """The model's scale and cap, of the same shape."""
        logits = logits * self.scale if self.scale != 1 else logits
        return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap

    @torch.no_grad()
    def linear(self, hidden: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """The matrix product by hand, without scale and cap: hidden [N, H], out [N, R] -> out."""
        weight = self.weight[: self.rows].to(hidden.dtype)  # under autocast the two may differ
        if self.bias is None:
            return torch.mm(hidden, weight.T, out=out)
        return torch.addmm(self.bias[: self.rows].to(hidden.dtype), hidden, weight.T, out=out)

    @torch.no_grad()
    def linear_backward(self, hidden: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
        """The backward pass of `linear`: hidden [N, H], grad [N, R] -> hidden's gradient [N, H].

        grad: the gradient of the product. Those of weight and bias are added to their `.grad`.
        """
        if self.weight.requires_grad:
            total = grad_of(self.weight)[: self.rows]
            if total.dtype == grad.dtype:
                total.addmm_(grad.T, hidden)  # needs no second [R, H] tensor
            elif grad.is_cuda and total.dtype == torch.float32:
                # The same for half-precision products with an fp32 sum, which only CUDA has.
                torch.addmm(total, grad.T, hidden, out_dtype=torch.float32, out=total)
            else:
                total += grad.T @ hidden
        if self.bias is not None and self.bias.requires_grad:
            grad_of(self.bias)[: self.rows] += grad.sum(0)
        return grad @ self.weight[: self.rows].to(grad.dtype)


def grad_of(parameter: torch.nn.Parameter) -> torch.Tensor:
    """The parameter's gradient: zeros, in the precision that it asks for, where there is none."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter, dtype=parameter.grad_dtype)
    return parameter.grad


def chunk_backward(
    loss: Callable[..., torch.Tensor],
    layers: list[OutputLayer],
    divisor: float | torch.Tensor,
    logits: list[torch.Tensor],
    tensors: list[torch.Tensor],
    out: torch.Tensor,
    functional: bool = False,
) -> torch.Tensor:
    """One chunk of `backward_by_chunks`, which explains the arguments: returns what the loss
    returns, and writes the gradient with respect to the student's logits into `out`.

    layers: the student's, and the teacher's if there is one. logits: their matrix products, before
    scale and cap. out: [n, V]; it may be logits[0] itself, unless this is compiled.
    functional: let a compiler differentiate by torch.func, since it cannot follow autograd.
    """

    def total(student_logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        sides = zip(layers, [student_logits, *logits[1:]])
        part = loss(*(layer.scale_and_cap(x) for layer, x in sides), *tensors)
        n, V = student_logits.shape
        if part.shape[:1] != (n,):
            raise ValueError(f"loss of {n} rows must return [n] or [n, C], not {list(part.shape)}")
        if part.dim() > 2 or part.shape[1:] == (V,):
            # Such as F.kl_div(..., reduction="none"): column 0 would be the loss of id 0.
            raise ValueError(f"loss returned {list(part.shape)}: sum over the vocabulary first")
        # Cloned, since what the loss returns may be a view of the logits that `out` overwrites.
        return (part if part.dim() == 1 else part[:, 0]).sum() / divisor, part.detach().clone()

    if functional and torch.compiler.is_compiling():
        gradient, part = torch.func.grad(total, has_aux=True)(logits[0])
    else:  # the same, in less time
        student_logits = logits[0].detach().requires_grad_()
        value, part = total(student_logits)
        (gradient,) = torch.autograd.grad(value, student_logits)
    out.copy_(gradient)
    return part


@cache
def compiled_chunk_backward() -> Callable:
    """`chunk_backward`, compiled for each kind of loss and size of vocabulary, once for one row and
    once for any other number.

    Inductor stores an intermediate result that needs more than realize_reads_threshold reads, 4 by
    default. With 8 it computes log pi - log pi_bar again instead, and `full_logits` is one kernel.
    In bf16 this reads both sides' logits three times and writes the gradient once, 14 bytes for a
    pair of logits.
    """

    def run(*arguments):
        return chunk_backward(*arguments, functional=True)

    return torch.compile(run, dynamic=True, options={"realize_reads_threshold": 8})


def backward_by_chunks(
    loss: Callable[..., torch.Tensor],
    layer: OutputLayer,
    hidden: torch.Tensor,
    *tensors: torch.Tensor,
    divisor: float,
    teacher: tuple[OutputLayer, torch.Tensor] | None = None,
    size: int | None = None,
    compiled: bool = False,
) -> torch.Tensor:
    """Forward AND backward pass of a loss through the output layer, a few rows at a time. It equals

        columns = loss(layer(hidden), teacher_layer(teacher_hidden), *tensors)
        (columns[:, 0].sum() / divisor).backward()

    but holds the logits of one block of rows at most, and computes no matrix product twice.

    loss(logits [n, V], the teacher's logits [n, V] if there is a teacher, *tensors [n, ...]) for
        any n rows -> [n], or [n, C]: column 0 is the loss, the others are figures to log.
    layer: the student's; hidden: [N, H], the student's hidden states with their graph.
    tensors: [N, ...] each, cut in the same way. What the loss needs for each token, such as token
        ids, must come through here: a closure would see all N of them.
    divisor: of the sum over rows: the number of tokens in the whole optimizer step, usually.
    teacher: its output layer and its hidden states [N, any], which get no gradient.
    size: rows of a chunk (default: by `CHUNK`).
    compiled: torch.compile the loss and its gradient. It is meant for a GPU, where without it the
        passes over the logits take two to three times as long as the matrix products (measured on
        an H100). The first call of a process then takes up to a minute. torch.func.grad must be
        able to differentiate the loss: it ignores the backward of a custom autograd.Function, and
        the logits do not say that they require a gradient. After torch._dynamo's limit of 8 kinds
        of loss, vocabularies and numbers in closures, what is new is not compiled.

    Returns what the loss returns for all rows, [N] or [N, C], detached. Gradients are added to the
    layer's weights and to everything that `hidden` depends on, except what is frozen; with N = 0
    they are zeros. `tensors`, and what else the loss knows, get none. Raises ValueError for shapes
    that do not fit, before any gradient is touched.

    What the loss computes from a chunk is dropped as soon as its gradient is known. The chunks of a
    block share the large matrix products, which are slow with few rows. Peak memory: about 12
    tensors of a chunk in fp32 and 2 of a block in hidden's dtype; compiled, at most 8 and 3.

    The gradients of the output layer are written by hand, so that hooks on its weights never fire.
    DDP and FSDP add up gradients over devices by such hooks: there, sum `.grad` yourself.
    """
    if hidden.dim() != 2:
        rows = "take rows as predicting_last does, or all by hidden.flatten(0, 1)"
        raise ValueError(f"hidden must be [N, H], not {list(hidden.shape)}: {rows}")
    sides = [(layer, hidden.detach()), *([teacher] if teacher else [])]
    for tensor in (*(states for _, states in sides), *tensors):
        if len(tensor) != len(hidden):
            raise ValueError(f"hidden has {len(hidden)} rows, but a tensor has {len(tensor)}")

    logits_per_chunk, chunks_per_block = CHUNK.get(hidden.device.type, CHUNK["cuda"])
    chunk_rows = size or max(1, logits_per_chunk // layer.vocab_size)
    block_rows = max(1, min(chunks_per_block * chunk_rows, len(hidden)))

    # A tensor [block_rows, R] for each side, used again for each block. The student's is used twice
    # even within a block: when the loss of a chunk is done, nobody needs its logits any more, and
    # the gradient of the loss with respect to them takes their place. But not if it is compiled:
    # code made by torch 2.11 has read logits after their gradient had been written over them.
    buffers = [states.new_empty(block_rows, side.rows) for side, states in sides]
    gradients, run = buffers[0], chunk_backward
    compiled = compiled and len(hidden) > 0
    if compiled:
        gradients, run = torch.empty_like(gradients), compiled_chunk_backward()
        precision = torch.promote_types(hidden.dtype, torch.float32)
        # a number would be compiled in
        divisor = hidden.new_full((), float(divisor), dtype=precision)
    hidden_grad, columns, layers = torch.empty_like(hidden), None, [side for side, _ in sides]
    # With N = 0 there is one empty block of one empty chunk.
    for start in range(0, max(len(hidden), 1), block_rows):
        blocks = [states[start : start + block_rows] for _, states in sides]
        n = len(blocks[0])
        block_logits = [
            side.linear(block, out=buffer[:n])[:, : side.vocab_size]
            for side, block, buffer in zip(layers, blocks, buffers)
        ]
        for begin in range(0, max(n, 1), chunk_rows):
            rows = slice(begin, min(begin + chunk_rows, n))  # of the block
            all_rows = slice(start + rows.start, start + rows.stop)
            logits = [x[rows] for x in block_logits]
            out = gradients[rows, : layer.vocab_size]
            if compiled:
                # For each size of vocabulary anew: else Inductor takes code from its cache on disk
                # that was tuned for another (after a model of 40 ids Qwen3's loss took 3 x as long)
                for x in (*logits, out):
                    torch._dynamo.mark_static(x, 1)
            part = run(loss, layers, divisor, logits, [x[all_rows] for x in tensors], out)
            if columns is None:  # not before memory for a chunk has been found in one piece
                columns = part.new_empty(len(hidden), *part.shape[1:])
            columns[all_rows] = part

        gradients[:n, layer.vocab_size :] = 0  # columns beyond V have no loss
        hidden_grad[start : start + n] = layer.linear_backward(blocks[0], gradients[:n])
    if hidden.requires_grad:  # else only the output layer learns
        hidden.backward(hidden_grad)
    return columns
