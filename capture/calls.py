"""What the calls of a model and of its parts are given, and what they answer."""

import inspect
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor


def takes(module: nn.Module) -> inspect.Signature:
    """What a module's forward takes by name, its class's where another one stands before it."""
    own = inspect.signature(module.forward)
    if any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in own.parameters.values()):
        of_class = inspect.signature(type(module).forward).parameters.values()
        return inspect.Signature([*of_class][1:])  # without self
    return own


def by_name(
    signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """A call's arguments, those that the signature takes as further keywords too."""
    if not args:
        return dict(kwargs)
    inputs = dict(signature.bind_partial(*args, **kwargs).arguments)
    for name, parameter in signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            inputs.update(inputs.pop(name, {}))
    return inputs


def around(model: nn.Module, base: nn.Module) -> list[nn.Module]:
    """Modules from the model to the base model in it, which is left out."""
    name = next(name for name, module in model.named_modules() if module is base)
    parts = name.split(".") if name else []
    return [model.get_submodule(".".join(parts[:i])) for i in range(len(parts))]


def is_traced(inputs: dict[str, Any]) -> bool:
    """Whether a model is not run but traced or measured: exported, or on tensors without values."""
    if torch.compiler.is_exporting() or torch._C._get_tracing_state() is not None:
        return True
    for name in ("input_ids", "inputs_embeds"):
        given = inputs.get(name)
        if given is not None:
            return not isinstance(given, Tensor) or isinstance(given, FakeTensor) or given.is_meta
    return False


def chosen_in(given: tuple[Any, ...], *, like: Tensor) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """(T, K) indices and weights among what experts are given, None if they are not there."""
    tensors = [t for t in given if isinstance(t, Tensor) and t.shape == like.shape]
    experts = [t for t in tensors if t.dtype in (torch.int64, torch.int32)]
    weights = [t for t in tensors if t.is_floating_point()]
    if len(experts) != 1 or len(weights) != 1:
        return None, None
    return experts[0].detach().to(like), weights[0].detach().to(like.device)


def head_logits(output: Any, vocabularies: Collection[int]) -> Tensor | None:
    """(B, H, V) logits of the vocabulary in what a model with a head returned.

    Other heads answer too: by labels of a token, or by a value.
    """
    found = [getattr(output, "logits", None), *(output if isinstance(output, tuple) else ())]
    for tensor in found:
        if isinstance(tensor, Tensor) and tensor.dim() == 3 and tensor.shape[2] in vocabularies:
            return tensor
    return None


def vocabularies(model: Any) -> frozenset[int]:
    """Numbers of ids that the logits of a model's head may be over."""
    config: Any = getattr(model, "config", None)
    text = getattr(config, "get_text_config", lambda: config)()
    head = getattr(model, "get_output_embeddings", lambda: None)()
    sizes = [getattr(config, "vocab_size", None), getattr(text, "vocab_size", None)]
    sizes.append(getattr(head, "out_features", None))
    return frozenset(size for size in sizes if size is not None)
