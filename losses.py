"""The distillation objectives of SD-Zero (METHOD.md, equations (4) to (6)) as pure functions, and how to run them without ever
holding tokens x vocabulary.

Shapes: N tokens (rows), V vocabulary entries, K of them, D hidden size. Every objective takes the logits of the student and
of the teacher for the SAME N tokens, [N, V] each, and returns one number a token, [N], in nats: the caller masks, sums and divides.
Half-precision logits are computed in fp32, float64 stays float64. The gradient flows into `student` alone if `teacher` has none.

Ids that can never be sampled must be cut off both sides (`logits[:, :n]`), not set to -inf: 0 x inf has no gradient.

Which one? `full_logits(alpha=1)` is the paper's equation (4). `topk_logits` is the same with less to store, `sampled_token` needs
one log-probability a side. To start reading: `full_logits`; `backward_by_chunks` is how they are called in training.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

# What `backward_by_chunks` works on at a time, by device: logits of a chunk, chunks that share a matrix product.
CHUNK = {"cpu": (2**17, 96), "cuda": (2**24, 8)}  # in fp32 a chunk is 0.5 MB, which a core's cache holds, and 64 MB


def _log_softmax(logits: torch.Tensor) -> torch.Tensor:
    return F.log_softmax(logits if logits.dtype == torch.float64 else logits.float(), dim=-1)


def _kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """D_KL(p || q) of log-probabilities [N, K] -> [N]. Never clamped: rounding may give -1e-9, and a clamp would kill its gradient."""
    return (p.exp() * (p - q)).sum(-1)


def _divergence(student: torch.Tensor, teacher: torch.Tensor, alpha: float) -> torch.Tensor:
    """The family of equation (5) on log-probabilities [N, K] -> [N]."""
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must lie in [0, 1], not {alpha}")
    if alpha == 1:
        return _kl(student, teacher)
    if alpha == 0:
        return _kl(teacher, student)
    mixture = torch.logaddexp(student + math.log(1 - alpha), teacher + math.log(alpha))
    return alpha * _kl(teacher, mixture) + (1 - alpha) * _kl(student, mixture)


def full_logits(student: torch.Tensor, teacher: torch.Tensor, alpha: float = 1.0) -> torch.Tensor:
    """Divergence over the whole vocabulary, METHOD.md (4) and (5). student, teacher: [N, V] -> [N].

    alpha = 1: reverse KL D_KL(student || teacher), the paper's. alpha = 0: forward KL D_KL(teacher || student). Between: the generalised
    Jensen-Shannon divergence alpha D_KL(teacher || M) + (1 - alpha) D_KL(student || M), M = (1 - alpha) student + alpha teacher.
    The family JUMPS at its ends: (5) goes to 0 as alpha goes to 0 or 1, where the full KLs take over; alpha = 0.999 is not almost
    reverse KL but almost no loss at all. Raises ValueError for alpha outside [0, 1].
    """
    return _divergence(_log_softmax(student), _log_softmax(teacher), alpha)


def topk_logits(student: torch.Tensor, teacher: torch.Tensor, k: int, alpha: float = 1.0, tail: bool = True) -> torch.Tensor:
    """The same divergence on the student's k most likely tokens (METHOD.md, topk_logits). student, teacher: [N, V] -> [N].

    tail=True: all other tokens are one more bucket, so the value is at most the full one's, and equal to it at k = V.
    tail=False: both sides are renormalised on the k tokens; what the student puts elsewhere is then invisible.
    """
    indices = student.detach().topk(min(k, student.shape[-1]), dim=-1).indices  # [N, K]

    def on_support(logits: torch.Tensor) -> torch.Tensor:
        logits = logits if logits.dtype == torch.float64 else logits.float()
        top = logits.gather(-1, indices)
        if tail and k < logits.shape[-1]:
            # the bucket from the rest's own logsumexp: 1 - sum(top) has no digits left when the top k hold nearly everything
            rest = logits.scatter(-1, indices, float("-inf")).logsumexp(-1, keepdim=True)
            top = torch.cat([top, rest], dim=-1)  # [N, K + 1]
        return F.log_softmax(top, dim=-1)

    return _divergence(on_support(student), on_support(teacher), alpha)


def sampled_token(student: torch.Tensor, teacher: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """Score-function estimate of (4): stop_gradient(log pi - log pi_bar) * log pi at the sampled tokens.

    student, teacher: [N, V], token_ids: [N] -> [N]. Averaged over tokens drawn from the student, its GRADIENT is that of the reverse KL;
    its VALUE is not a KL. That holds for a teacher that does not know y_t. SD-Zero's has read y: where it copies, the estimate favours the
    sampled tokens, and its mean over y is another gradient than that of (4); `full_logits` has neither flaw.
    """
    log_pi, log_pi_bar = token_logprobs(student, token_ids), token_logprobs(teacher, token_ids)
    return (log_pi - log_pi_bar).detach() * log_pi


def mixed_kl(student: torch.Tensor, teacher: torch.Tensor, w: float = 0.5, k: int | None = None) -> torch.Tensor:
    """The authors' code: w D_KL(teacher || student) + (1 - w) D_KL(student || teacher). student, teacher: [N, V] -> [N].

    k: on the teacher's k most likely tokens, both sides renormalised there (theirs: 64); None: on the whole vocabulary. With k it is blind
    to what the student puts outside the support: nearly all mass on one such token gives loss 0 and gradient 0.
    """
    if k is not None:
        indices = teacher.topk(min(k, teacher.shape[-1]), dim=-1).indices
        student, teacher = student.gather(-1, indices), teacher.gather(-1, indices)
    student, teacher = _log_softmax(student), _log_softmax(teacher)
    return w * _kl(teacher, student) + (1 - w) * _kl(student, teacher)


def importance_weight(logprobs: torch.Tensor, old_logprobs: torch.Tensor, cap: float) -> torch.Tensor:
    """METHOD.md (6): min(pi(y_t) / pi_old(y_t), cap), without gradient. Log-probabilities of the sampled tokens, [N] each -> [N]."""
    return (logprobs - old_logprobs).detach().exp().clamp(max=cap)


def token_logprobs(logits: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """log softmax(logits) at the given tokens: [N, V], [N] -> [N]."""
    return _log_softmax(logits).gather(-1, token_ids[:, None])[:, 0]


class OutputLayer:
    """From last hidden states [N, D] to logits [N, V] of a Hugging Face causal LM, cut to the first vocab_size ids.

    It does what the model does behind its last hidden state: scaling (Cohere, Granite) and soft capping (Gemma 2) included. Families with
    another step there are found by comparison with the model's own logits on a few tokens, and refused: ValueError, by name.
    """

    def __init__(self, model, vocab_size: int | None = None):
        head, config = model.get_output_embeddings(), model.config
        self.weight, self.bias = head.weight, head.bias  # [at least V, D], [at least V] or None
        self.vocab_size = min(vocab_size or len(head.weight), len(head.weight))
        self.scale = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1)
        self.cap = getattr(config, "final_logit_softcapping", None)

        modes = [(module, module.training) for module in model.modules()]
        model.eval()
        try:
            with torch.no_grad():
                ids = torch.arange(8, device=head.weight.device)[None] % len(head.weight)
                ours, theirs = self(model.base_model(input_ids=ids).last_hidden_state), model(input_ids=ids).logits[..., : self.vocab_size]
        finally:
            for module, mode in modes:
                module.training = mode
        if not torch.allclose(
            ours.float(), theirs.float(), rtol=1e-2 if ours.dtype in (torch.bfloat16, torch.float16) else 1e-4, atol=1e-4
        ):
            raise ValueError(f"losses.py does not know how the family {config.model_type!r} gets from its last hidden state to its logits")

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.finish(self.linear(hidden))

    def linear(self, hidden: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        weight, bias = self.weight[: self.vocab_size], None if self.bias is None else self.bias[: self.vocab_size]
        if out is None:
            return F.linear(hidden, weight, bias)
        return torch.mm(hidden, weight.T, out=out) if bias is None else torch.addmm(bias, hidden, weight.T, out=out)

    def finish(self, logits: torch.Tensor) -> torch.Tensor:
        logits = logits * self.scale if self.scale != 1 else logits
        return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap

    @torch.no_grad()
    def linear_backward(self, hidden: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
        """`linear`'s backward by hand: [N, D], [N, V] -> gradient of hidden [N, D]; that of the weights is added where it lies."""
        for parameter, product in ((self.weight, (grad.T, hidden)), (self.bias, None)):
            if parameter is None or not parameter.requires_grad:
                continue
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter, dtype=parameter.grad_dtype)
            total = parameter.grad[: self.vocab_size]
            if product is None:
                total += grad.sum(0)
            elif total.dtype == grad.dtype:
                total.addmm_(*product)  # no second [V, D] tensor
            else:
                total += product[0] @ product[1]
        return grad @ self.weight[: self.vocab_size]


def backward_by_chunks(
    loss: Callable[..., torch.Tensor],
    layer: OutputLayer,
    hidden: torch.Tensor,
    *tensors: torch.Tensor,
    divisor: float,
    teacher: tuple[OutputLayer, torch.Tensor] | None = None,
    size: int | None = None,
) -> torch.Tensor:
    """Forward AND backward of sum(loss) / divisor through the output layer, `size` rows (tokens) at a time.

    hidden: [N, D], with a graph behind it; teacher: another output layer with its hidden states [N, any], which get no gradient; tensors:
    [N, ...] each. loss(logits [n, V], teacher's logits [n, V] if there is one, *tensors [n, ...]) -> [n, C]: column 0 is the loss, the
    others are figures to log. Gradients are added to the layer's weights and to all that `hidden` depends on. Returns all columns, [N, C],
    detached. It equals

        columns = loss(layer(hidden), other_layer(other_hidden), *tensors);  (columns[:, 0].sum() / divisor).backward()

    but what the loss computes of a chunk is dropped once the gradient is known, before the next chunk's turn. A block of chunks shares the
    large matrix products, which few rows make slow. So a dozen tensors of a chunk's logits and two of a block's are the most there is, and
    nothing is computed twice. With N = 0 the gradients are zeros. Default size: `CHUNK`.
    """
    logits_of_chunk, chunks = CHUNK.get(hidden.device.type, CHUNK["cuda"])
    size = size or max(1, logits_of_chunk // layer.vocab_size)
    height = max(1, min(chunks * size, len(hidden)))  # rows of a block
    columns, grad = None, torch.empty_like(hidden)
    sides = [(layer, hidden.detach())] + ([teacher] if teacher else [])
    buffers = [h.new_empty(height, side.vocab_size) for side, h in sides]
    for start in range(0, max(len(hidden), 1), height):
        block = slice(start, min(start + height, len(hidden)))
        with torch.no_grad():
            logits, *others = [side.linear(h[block], out=buffer[: len(h[block])]) for (side, h), buffer in zip(sides, buffers)]
        for i in range(0, max(len(logits), 1), size):
            rows, chunk = slice(start + i, min(start + i + size, block.stop)), logits[i : i + size].detach().requires_grad_()
            part = loss(layer.finish(chunk), *(teacher[0].finish(x[i : i + size]) for x in others), *(x[rows] for x in tensors))
            (part[:, 0].sum() / divisor).backward()
            logits[i : i + size] = chunk.grad  # they are not needed any more: the gradient takes their place
            columns = part.new_empty(len(hidden), part.shape[1]) if columns is None else columns  # outside the chunks' memory
            columns[rows] = part.detach()
        grad[block] = layer.linear_backward(sides[0][1][block], logits)
    hidden.backward(grad)
    return columns
