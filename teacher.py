"""The teacher of stage 2, pi_bar in README (4): the model that scores the student's own tokens.

    teacher = Teacher(student, "ema", rate=0.05, interval=10)
    with teacher.scoring() as model:      # eval mode, no gradient
        logits = model(input_ids).logits
    optimizer.step()
    teacher.update(step)                  # after every optimizer step, counted from 1

- base: the weights that the student started from (in stage 2 those of SRT, not the "base" of the
        README's tables), never updated. This is the paper's, and the default.
- live: the student itself, as it is now.
- ema:  teacher <- (1 - rate) teacher + rate student, every `interval` optimizer steps. rate = 1 is
        a hard copy, the paper's teacher synchronisation (section 3.4).

Whichever it is, before the first optimizer step the teacher equals the student, weight by weight:
the first targets are the student's own predictions in the teacher's context.
"""

import copy
from contextlib import contextmanager

import torch


class Teacher:
    """A scoring model: inside `scoring` it is in eval mode and computes no gradient.

    student: any torch module; `base` and `ema` copy it, weights and buffers.
    kind: "base", "live" or "ema". Only `ema` uses rate, in (0, 1], and interval, >= 1 optimizer
    steps. Raises ValueError for other values.

    `module` is what scores, in the student's dtype. The average of `ema` is kept in fp32: in bf16
    it would not move, since rate x difference is less than half of its last bit. Buffers are copied
    once and never updated.
    """

    def __init__(
        self, student: torch.nn.Module, kind: str = "base", rate: float = 0.05, interval: int = 1
    ):
        if kind not in ("base", "live", "ema"):
            raise ValueError(f"teacher must be base, live or ema, not {kind!r}")
        if not 0 < rate <= 1 or interval < 1:
            raise ValueError(f"teacher needs 0 < rate <= 1, interval >= 1, not {rate}, {interval}")
        self.student, self.kind, self.rate, self.interval = student, kind, rate, interval
        self.module = student
        if kind != "live":
            self.module = copy.deepcopy(student).requires_grad_(False).eval()
        # fp32 and float64 weights share storage with the average, so no second copy is needed.
        self.average = {}
        if kind == "ema":
            for name, weight in self.module.named_parameters():
                precision = torch.promote_types(weight.dtype, torch.float32)
                self.average[name] = weight.detach().to(precision)

    @contextmanager
    def scoring(self):
        """The teacher's module in eval mode, without gradient, inside a `with` block.

        Afterwards each of its modules is back in its own mode: the `live` teacher is the student.
        """
        modes = [(m, m.training) for m in self.module.modules()]
        self.module.eval()
        try:
            with torch.no_grad():
                yield self.module
        finally:
            for module, mode in modes:
                module.training = mode

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Call after optimizer step `step`, from 1: moves `ema` when `interval` divides it."""
        if step % self.interval:
            return
        for name, average in self.average.items():
            average.lerp_(self.student.get_parameter(name).to(average.dtype), self.rate)
            self.module.get_parameter(name).copy_(average)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """What a checkpoint needs: the average of `ema`, not copied.

        It is empty for the others: `base` is the model that the run started from, `live` is the
        student.
        """
        return self.average

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Put a `state_dict` back, by value. Raises ValueError for another model's or kind's."""
        shapes = {name: average.shape for name, average in self.average.items()}
        found = {name: average.shape for name, average in state.items()}
        if different := sorted(name for name, _ in shapes.items() ^ found.items()):
            raise ValueError(
                f"not this {self.kind} teacher's state: {different[0]!r} does not match"
            )
        for name, average in self.average.items():
            average.copy_(state[name])
            self.module.get_parameter(name).copy_(average)
