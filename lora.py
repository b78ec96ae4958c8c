"""LoRA (arXiv 2106.09685): train a small change of each weight matrix, and leave the rest frozen.

    y = W x + (alpha / rank) B A x        W [out, in] frozen, A [rank, in], B [out, rank] trained

    add_lora(model, rank=64, alpha=128, seed=0)     # in place: the model is called as before
    optimizer = AdamW(p for p in model.parameters() if p.requires_grad)
    teacher = LoraTeacher(model, "base")            # the model without its adapter: 0 bytes
    with teacher.scoring() as module:               # ... and only in this block
        logits = module(input_ids).logits
    model.save_pretrained(folder, state_dict=merged_state_dict(model))     # an ordinary model

Every nn.Linear except the output layer gets an adapter; embeddings, norms and biases are frozen. A
and B are kept in fp32, since an update in bf16 would be rounded away, and are cast to the input's
dtype when they are used. B starts at 0, so that the model starts as it was.

From public experience: rank 64, alpha = 2 x rank, and ten times the learning rate of full
fine-tuning. There is no dropout.
"""

from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn


class LoraLinear(nn.Linear):
    """A linear layer with an adapter. It takes over weight and bias of `linear`, not copied.

    lora_A: [rank, in], Gaussian as in the paper, which does not give the standard deviation: we use
    that of the authors' code, (3 x in) ** -0.5. lora_B: [out, rank], zeros.
    """

    def __init__(self, linear: nn.Linear, rank: int, alpha: float, generator: torch.Generator):
        super().__init__(linear.in_features, linear.out_features, device="meta")
        self.weight, self.bias, self.training = linear.weight, linear.bias, linear.training
        self.rank, self.alpha = rank, alpha
        A = torch.randn(rank, linear.in_features, generator=generator)
        A *= (3 * linear.in_features) ** -0.5
        device, dtype = linear.weight.device, linear.weight.dtype
        A = A.to(device, torch.promote_types(dtype, torch.float32))
        self.lora_A = nn.Parameter(A)
        self.lora_B = nn.Parameter(A.new_zeros(linear.out_features, rank))
        # A teacher's choice: its own [A, B] in place of ours, or no adapter at all.
        self.other_pair, self.enabled = [], True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] -> [..., out]"""
        y = F.linear(x, self.weight, self.bias)
        if not self.enabled:
            return y
        A, B = self.other_pair or (self.lora_A, self.lora_B)
        low = F.linear(x, A.to(x.dtype)) * (self.alpha / self.rank)  # [..., rank]
        return y + F.linear(low, B.to(x.dtype))


def add_lora(model: nn.Module, rank: int, alpha: float, seed: int = 0) -> None:
    """Freeze a Hugging Face causal LM and give each of its linear layers an adapter, in place.

    Raises ValueError, before anything is changed, for rank < 1, for alpha <= 0, and with its name
    for a family that keeps matrices elsewhere: GPT-2 in its Conv1D, mixtures of experts in one
    tensor for all experts.
    """
    if not (rank >= 1 and alpha > 0):
        raise ValueError(f"add_lora needs rank >= 1 and alpha > 0, not {rank} and {alpha}")
    head, linears = model.get_output_embeddings(), {}
    for name, module in model.named_modules():
        if module is head or isinstance(module, nn.Embedding):
            continue
        if type(module) is nn.Linear:
            linears[name] = module
        elif any(p.dim() > 1 for p in module.parameters(recurse=False)):
            raise ValueError(
                f"lora.py adapts nn.Linear only, but the family {model.config.model_type!r} has "
                f"weights in {type(module).__name__} ({name})"
            )
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)  # on the CPU: the same A on every device
    for name, linear in linears.items():
        parent, _, own_name = name.rpartition(".")
        adapted = LoraLinear(linear, rank, alpha, generator)
        setattr(model.get_submodule(parent), own_name, adapted)


def lora_layers(model: nn.Module) -> dict[str, LoraLinear]:
    """The layers that `add_lora` made, by their names in the Hugging Face model."""
    modules = unwrapped(model).named_modules()
    return {name: module for name, module in modules if isinstance(module, LoraLinear)}


def unwrapped(model: nn.Module) -> nn.Module:
    """The Hugging Face model inside DistributedDataParallel and torch.compile, which put `module.`
    and `_orig_mod.` in front of names."""
    inside = (m for m in model.modules() if hasattr(type(m), "get_output_embeddings"))
    return next(inside, model)


# ------------------------------------------------------------------------------------- the teacher


class LoraTeacher:
    """pi_bar in README (4) for a student with adapters, with the interface of teacher.Teacher.

    student: a model after `add_lora`. It is also the `module` that scores; its adapters are
    switched inside `scoring` only. kind: "base", "live" or "ema"; rate, in (0, 1], and interval, in
    optimizer steps, belong to ema. Raises ValueError for other values, and without adapters.

    - base: the frozen weights without adapter, which takes no memory. For stage 2 these are stage
            1's, merged.
    - live: the student as it is now.
    - ema:  adapters of its own, A <- (1 - rate) A + rate A of the student, and B in the same way,
            in fp32. That averages the factors; the average of the products B A would be another
            one, of a higher rank. They start as a copy of the student's: from zeros, which is often
            seen, both factors would be too small for many steps, and a student whose adapter has
            been trained would first be drawn back to `base`.

    The output layer has no adapter: it may be applied to hidden states outside of `scoring`.
    """

    def __init__(
        self, student: nn.Module, kind: str = "base", rate: float = 0.05, interval: int = 1
    ):
        if kind not in ("base", "live", "ema"):
            raise ValueError(f"teacher must be base, live or ema, not {kind!r}")
        if not 0 < rate <= 1 or interval < 1:
            raise ValueError(f"teacher needs 0 < rate <= 1, interval >= 1, not {rate}, {interval}")
        if not lora_layers(student):
            raise ValueError("LoraTeacher needs a student with adapters: call add_lora first")
        self.module, self.kind, self.rate, self.interval = student, kind, rate, interval
        self.average = {}
        if kind == "ema":
            self.average = {name: x.clone() for name, x in adapter_state(student).items()}

    @contextmanager
    def scoring(self):
        """The teacher in eval mode, without gradient, inside a `with` block. Afterwards adapters
        and modes are the student's again, also after an exception."""
        modes = [(module, module.training) for module in self.module.modules()]
        layers = lora_layers(self.module)
        before = [(layer, layer.other_pair, layer.enabled) for layer in layers.values()]
        try:
            self.module.eval()
            for name, layer in layers.items():
                layer.enabled = self.kind != "base"
                names = peft_names(name) if self.kind == "ema" else ()
                layer.other_pair = [self.average[n] for n in names]  # empty: none
            with torch.no_grad():
                yield self.module
        finally:
            for module, mode in modes:
                module.training = mode
            for layer, pair, enabled in before:
                layer.other_pair, layer.enabled = pair, enabled

    def update(self, step: int) -> None:
        """Call after optimizer step `step`, from 1: moves `ema` when `interval` divides it."""
        if self.kind == "ema" and step % self.interval == 0:
            for name, tensor in adapter_state(self.module).items():
                self.average[name].lerp_(tensor, self.rate)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """What a checkpoint needs besides the student: the average of `ema`, not copied."""
        return self.average

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Put a `state_dict` back, by value. Raises ValueError for another model's or kind's."""
        copy_into(self.average, state)


# ------------------------------------------------------------------------------------------ saving


def peft_names(layer_name: str) -> list[str]:
    """What PEFT's files call the A and the B of a layer."""
    return [f"base_model.model.{layer_name}.lora_{factor}.weight" for factor in "AB"]


def adapter_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """All A and B, not copied: the content of PEFT's adapter_model.safetensors, which vLLM reads,
    too. `adapter_config` is that of the file beside it."""
    state = {}
    for name, layer in lora_layers(model).items():
        state.update(zip(peft_names(name), (layer.lora_A.detach(), layer.lora_B.detach())))
    return state


def load_adapter(model: nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Put an `adapter_state` back, by value. Raises ValueError for another model's or rank's."""
    copy_into(adapter_state(model), state)


def adapter_config(model: nn.Module, base: str) -> dict:
    """The content of PEFT's adapter_config.json. base: name or folder of the model without it.
    Raises ValueError for a model without adapters."""
    layers = lora_layers(model)
    if not layers:
        raise ValueError("adapter_config needs a model with adapters: call add_lora first")
    first = next(iter(layers.values()))
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": first.rank,
        "lora_alpha": first.alpha,
        "target_modules": sorted({name.rpartition(".")[2] for name in layers}),
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }


@torch.no_grad()
def merged_state_dict(model: nn.Module, seed: int = 0) -> dict[str, torch.Tensor]:
    """The state dict of the model without LoRA that computes the same: W + (alpha / rank) B A.

    The model is left as it is: merging in place and taking B A out again would not give W back in
    bf16. Merged matrices are new tensors on the CPU, so that a GPU needs no second copy.

    Entries of a small B A are below half of the last bit of a bf16 weight, and rounding to nearest
    loses them. Each sum is rounded up or down at random instead, with probabilities that make it
    right on average, so that what a layer adds up over its inputs is kept. `seed`: the same each
    time. Measured as KL between adapter and merged model: where a quarter of the entries survive
    rounding to nearest, that loses a sixth of the update, ours a fiftieth; where nearly all
    survive, ours loses up to four times as much: still less than a thousandth of the update.
    """
    model = unwrapped(model)
    state = {n: t for n, t in model.state_dict().items() if not n.endswith((".lora_A", ".lora_B"))}
    generator = torch.Generator(model.device).manual_seed(seed)
    for name, layer in lora_layers(model).items():
        merged = layer.weight + (layer.alpha / layer.rank) * layer.lora_B @ layer.lora_A
        if layer.weight.dtype == torch.bfloat16:
            merged = round_at_random(merged, generator)
        state[f"{name}.weight"] = merged.to(layer.weight.dtype).cpu()
    return state


def round_at_random(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """fp32 -> bf16, to one of the two neighbours, the nearer the likelier: right on average.

    bf16 is the upper half of fp32. Adding a random lower half carries into the upper one with just
    that probability; then the lower half is cut off. What bf16 can hold stays as it is.
    """
    noise = torch.randint(2**16, x.shape, dtype=torch.int32, device=x.device, generator=generator)
    return ((x.view(torch.int32) + noise) >> 16 << 16).view(torch.float32).bfloat16()


@torch.no_grad()
def copy_into(mine: dict[str, torch.Tensor], state: dict[str, torch.Tensor]) -> None:
    """Copy tensors by name. Raises ValueError where names or shapes differ."""
    for name in sorted(mine.keys() | state.keys()):
        if name not in mine or name not in state or mine[name].shape != state[name].shape:
            raise ValueError(f"the state of another model or rank: {name!r} does not match")
    for name, tensor in mine.items():
        tensor.copy_(state[name])
