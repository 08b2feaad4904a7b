"""Computing in bfloat16 while the weights stay float32 (Micikevicius et al. 2018).

At a learning rate of 1e-6 a step is smaller than the spacing of bfloat16 numbers, and most bfloat16 weights would never
move. So the weights that learn are float32, and beside them stands a network whose weights are these, rounded. All
texts are read and written by that network, in sampling and in the update alike. It is rounded anew once per step, where
autocast would round every weight in every forward pass.

    float32 weights  ── rounded after each step ──>  network in bfloat16
           ^                                                 │
           └──── each gradient, as soon as it is there ──────┘
"""

import copy
import functools

import torch

LARGE = 30e6  # parameters; in a smaller model most of the time goes to launching operations


def pays(model):
    """Whether a model computes faster in bfloat16: a large one, on a GPU or a CPU that multiplies in it."""
    known, hardware = getattr(torch.cpu, "get_capabilities", dict)(), False
    if model.device.type == "cuda":
        hardware = torch.cuda.is_bf16_supported(including_emulation=False)
    elif model.device.type == "cpu":
        hardware = known.get("avx512_bf16") or known.get("amx_bf16")
    return bool(hardware) and sum(p.numel() for p in model.parameters()) >= LARGE


def rounded(model):
    """A copy of a network with weights in bfloat16, whose gradients arrive at the weights of `model`.

    Weights that are tied stay tied. Buffers stay float32: positions need it.
    """
    low = {id(p): torch.nn.Parameter(p.detach().to(torch.bfloat16), p.requires_grad) for p in model.parameters()}
    network = copy.deepcopy(model, dict(low))  # the memo: what deepcopy takes for already copied
    for weight in model.parameters():
        if weight.requires_grad:
            low[id(weight)].register_post_accumulate_grad_hook(functools.partial(_deliver, weight))
    return network


def _deliver(weight, low):
    """In the backward pass: add the gradient of a rounded weight to that of the float32 weight."""
    gradient, low.grad = low.grad, None  # first: where the next line runs out of memory, nothing of this step may stay
    weight.grad = gradient.float() if weight.grad is None else weight.grad.add_(gradient)


@torch.no_grad()
def round_again(network, model):
    """After the weights of `model` have moved: the network's are these again, rounded."""
    for low, weight in zip(network.parameters(), model.parameters()):
        low.copy_(weight)
