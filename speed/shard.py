"""Sharded training: of weights, gradients and the optimizer's moments each rank holds its share (`--shard`).

FSDP2 (`fully_shard`, Zhao et al. 2023) gathers a layer's weights before the layer runs, forward or backward, frees them
after it, and leaves each rank its share of the gradients' mean. It sees a layer by its hooks: by what goes in, what comes
out, and the gradient that comes back through that. Two things here would pass it by, so they are put in its sight:

1. A layer's keys and values leave through the cache, not as its result. When a prompt is read only for them, no
   gradient ever comes through the result of the last layer. So a layer returns all three (recompute.py).
2. The update runs the body three times and the head in chunks, never the model as such. So `one_forward` declares all
   of `rollout.score` to be one forward pass of the model: embedding, final norm and head are gathered once around it.

Sampling reads every weight once per token, which no gathering could keep up with: it has a whole copy (grace.py).
"""

import functools
import warnings

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

from plumbing import ranks
from speed.recompute import pure_layers, recompute_layers


def prepare(policy, reference, config):
    """Make a policy and the one it started from, or None, ready to train. Returns the policy to sample from.

    That is a whole copy, with weights in the compute type, where the policy's own are sharded or in another type.
    """
    rounded = config.dtype == "bfloat16"
    sampler = policy.frozen_copy(torch.bfloat16 if rounded else None) if config.shard or rounded else policy
    if config.shard:
        shard(policy, config.recompute)
        if reference:
            shard(reference)
    elif config.recompute:
        recompute_layers(policy)
    return sampler


def newest(policy, sampler):
    """What reads texts, with the newest weights: the copy to sample from, where there is one, else the policy itself."""
    if sampler is not policy:
        sampler.copy_weights(policy)
    return sampler


def shard(policy, recompute=False):
    """Leave this rank its share of a policy's weights. From now on only `one_forward` functions can use it.

    recompute: as `recompute_layers`, too. Raises GraceError where `pure_layers` does.
    """
    # Said of results that are views, because changing one in place would hide it: nothing here does that.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view", UserWarning)
    model, split = policy.model, dict(mesh=init_device_mesh(policy.device.type, (ranks.size(),)), reshard_after_forward=True)
    pure_layers(policy, recompute, lambda layer: fully_shard(layer, **split))
    fully_shard(model, **split)
    model.one_forward = lambda function, *args, **kwargs: function(*args, **kwargs)
    register_fsdp_forward_method(model, "one_forward")


def one_forward(function):
    """`function(policy, ...)`, as one forward pass of the policy's network. It returns a tuple of tensors."""

    @functools.wraps(function)
    def run(policy, *args, **kwargs):
        if not hasattr(policy.model, "one_forward"):
            return function(policy, *args, **kwargs)
        return policy.model.one_forward(function, policy, *args, **kwargs)

    return run
