"""LoRA (Hu et al. 2022): the weights stay as they are, and a small adapter beside each linear layer of the body learns.

    W x   becomes   W x + (alpha / R) B A x        A [R, D_in] random, B [D_out, R] zero at the start

Gradients and AdamW's moments are of A and B alone. Without its adapters the model is the one that training started
from, to the bit, so the KL term needs no second one. With B A added to W it is an ordinary model again: that is what is saved.

peft puts adapters into a model, switches them off, merges them, and reads and writes their files. All of it works on
the model's own layers, in place, so whoever holds the model or its body has the adapters, too.
"""

import copy
import os
import warnings

import torch

from plumbing.errors import GraceError, first_line

# The first step of Adam sets each entry of B to the rate, whatever its gradient: B A x grows with R. Divided by R it does
# not, so with one alpha for all ranks one rate fits them all (not alpha = 2 R, for which each rank needs a rate of its own).
ALPHA = 32


def peft():
    """The library, which is installed only for this. Raises GraceError where it is not there."""
    try:
        import peft
    except ImportError as error:
        raise GraceError(f"adapters need peft ({first_line(error)}): pip install peft") from error
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing`|fan_in_fan_out")  # peft's affairs with transformers
    return peft


def adapt(model, rank, seed, folder=None):
    """Put adapters beside all linear layers of a model's body, new ones or those of a folder, and freeze the rest.

    Returns peft's handle on them. New ones depend on the seed alone.
    """
    if folder:
        return load(model, folder, is_trainable=True)
    library = peft()
    settings = library.LoraConfig(r=rank, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapters = library.get_peft_model(model, settings)
    if os.path.isdir(model.name_or_path):  # in their file, so that they find it from any folder
        settings.base_model_name_or_path = os.path.abspath(model.name_or_path)
    return adapters


def load(model, source, **options):
    """The adapters of a folder or hub id beside a model's layers. Returns peft's handle on them.

    Raises GraceError where they are of another model.
    """
    library, base = peft(), model.name_or_path
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "Found missing adapter keys")  # what a file lacks would stay random
            return library.PeftModel.from_pretrained(model, source, torch_device="cpu", **options)
    except (RuntimeError, ValueError, UserWarning) as error:  # other shapes, no such layers, layers without adapters
        raise GraceError(f"{source}: its adapters do not fit {base}: give the model that they were trained on") from error


def off(network):
    """A context in which a network computes without its adapters, to the bit: they are multiplied by 0."""
    return peft().helpers.rescale_adapter_scale(network, 0)


def merged(adapters):
    """A copy of the model with its adapters merged into the weights: an ordinary model."""
    return copy.deepcopy(adapters).merge_and_unload()
