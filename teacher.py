"""The teacher of stage 2, pi_bar in METHOD.md (4): the reviser that scores the student's own tokens. One file, torch alone.

    teacher = Teacher(student, "ema", rate=0.05, interval=10)
    with teacher.scoring() as model:      # eval mode, no gradient
        logits = model(input_ids).logits
    ...optimizer.step()...
    teacher.update(step)                  # after every optimizer step, counted from 1

- base: the weights that the student started from, for ever (the paper's, and the default of sdzero.py).
- live: the student itself, as it is now.
- ema:  teacher <- (1 - rate) teacher + rate student, every `interval` optimizer steps. rate 1 is a hard copy, the paper's
        teacher synchronisation (section 3.4).
"""

import copy
from contextlib import contextmanager

import torch


class Teacher:
    """A scoring model that never gets a gradient and never runs in train mode.

    student: any torch module; `base` and `ema` copy it, weights and buffers, so that the first targets are the student's own.
    kind: "base", "live" or "ema". rate in (0, 1] and interval >= 1 (optimizer steps): `ema` alone. Raises ValueError otherwise.

    Buffers stay as they were. The average is kept in fp32: a bf16 one would stand still, since rate x difference is below half of its
    last bit. `module`, which scores, is in the student's dtype.
    """

    def __init__(self, student: torch.nn.Module, kind: str = "base", rate: float = 1.0, interval: int = 1):
        if kind not in ("base", "live", "ema"):
            raise ValueError(f"teacher must be base, live or ema, not {kind!r}")
        if not 0 < rate <= 1 or interval < 1:
            raise ValueError(f"teacher needs 0 < rate <= 1 and interval >= 1, not {rate} and {interval}")
        self.student, self.kind, self.rate, self.interval = student, kind, rate, interval
        self.module = student if kind == "live" else copy.deepcopy(student).requires_grad_(False).eval()
        # fp32 and float64 weights are not copied once more: the average and the weights that score are then the same tensors
        moving = self.module.named_parameters() if kind == "ema" else ()
        self.average = {n: p.detach().to(torch.promote_types(p.dtype, torch.float32)) for n, p in moving}

    @contextmanager
    def scoring(self):
        """The teacher's module in eval mode, without gradient. For `live` each of the student's modules gets its own mode back."""
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
        """Call after optimizer step `step` (counted from 1). Moves the `ema` teacher when `interval` divides it; else nothing."""
        if self.kind != "ema" or step % self.interval:
            return
        student = dict(self.student.named_parameters())
        for name, weight in self.module.named_parameters():  # matched by name
            self.average[name].lerp_(student[name].to(self.average[name].dtype), self.rate)
            weight.copy_(self.average[name])

    def state_dict(self) -> dict[str, torch.Tensor]:
        """What a checkpoint needs: the fp32 average of `ema`. `base` is the model the run started from, `live` is the student."""
        return self.average

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Put a `state_dict` back. Raises KeyError where a weight is missing."""
        for name, weight in self.module.named_parameters() if self.kind == "ema" else ():
            self.average[name].copy_(state[name])
            weight.copy_(self.average[name])
