"""A model without weights: built from its config on the meta device, and filled tensor by tensor."""

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from textwrap import shorten
from typing import Any

import torch
from torch import Tensor, nn

from compress.errors import ModelError
from compress.loop.catcher import by_layers
from compress.model.arch import Arch, find_arch
from compress.model.numbers import check_padding


def skeleton(folder: Path, dtype: torch.dtype, trust_remote_code: bool) -> tuple[Any, Arch]:
    """The model with parameters on the meta device and buffers in place, and where its parts are."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        config.return_dict = True  # what is read of its outputs is read by name
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    except MemoryError:
        raise
    except Exception as error:  # what a model's own code raises for a config that it can't be built of may be anything
        if isinstance(error, AssertionError) and "adding_idx" in str(error):
            check_padding(config.to_dict(), folder / "config.json")
        reason = shorten(str(error).strip() or repr(error), 300, placeholder=" ...")
        raise ModelError(f"{folder}: transformers cannot build this model: {reason}") from error
    with by_layers(model):
        for module in model.modules():  # buffers again, not in `dtype`: as from_pretrained makes them
            model._init_weights(module)
        model.tie_weights()
    return model.eval().requires_grad_(False), find_arch(model, config.to_dict())


def head_name(model: Any, arch: Arch) -> str:
    """Name of the output head's module; some families store it under another one (gpt_neox: embed_out)."""
    heads = {id(model.get_output_embeddings())}
    return next((name for name, module in model.named_modules() if id(module) in heads), arch.head)


def stored_name(name: str, head: str, arch: Arch, stored: Collection[str]) -> str:
    """A parameter's name in a checkpoint, from its name in the model.

    Args:
        name: of the parameter.
        head: name of the output head's module in the model.
        arch: of the model.
        stored: names of the checkpoint's tensors.
    """
    if name not in stored and name.startswith(head + "."):
        return arch.head + name.removeprefix(head)
    return name


def check_builds(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse a config of which transformers does not build a model with these tensors.

    Args:
        config: config.json.
        shapes: of the tensors, by name; the model may have more.

    Raises:
        ModelError: with transformers' reason, or the first tensor that differs.
    """
    with TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config), encoding="utf-8")
        try:
            model, _ = skeleton(Path(folder), torch.bfloat16, False)
        except ModelError as error:
            raise ModelError(str(error).removeprefix(f"{folder}: ")) from error
    own = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    odd = next((name for name, shape in shapes.items() if own.get(name, shape) != shape), None)
    if odd is not None:
        raise ModelError(f"transformers gives {odd} the shape {list(own[odd])} and not {list(shapes[odd])}")


def check_present(missing: Sequence[str]) -> None:
    """Refuse a checkpoint that lacks tensors.

    Raises:
        ModelError: naming the first of them.
    """
    if missing:
        raise ModelError(f"the checkpoint lacks {', '.join(missing[:3])}; config.json and weights do not match")


def assign(
    module: nn.Module, tensors: dict[str, Tensor], device: torch.device, dtype: torch.dtype, prefix: str = ""
) -> None:
    """Set parameters and persistent buffers by name, floats cast to `dtype`; other names are passed over.

    A buffer that is not persistent (`inv_freq`) is the model's own, also where an old checkpoint stores one.
    """
    own = module.state_dict(keep_vars=True)
    for name, tensor in tensors.items():
        if name not in own:
            continue
        if tensor.shape != own[name].shape:
            raise ModelError(
                f"{prefix}{name} has shape {list(tensor.shape)}, the config says {list(own[name].shape)}; "
                "config.json and weights do not belong together"
            )
        moved = tensor.to(device, dtype if tensor.is_floating_point() else None)
        is_parameter = isinstance(own[name], nn.Parameter)
        set_tensor(module, name, nn.Parameter(moved, requires_grad=False) if is_parameter else moved)


def set_tensor(module: nn.Module, name: str, value: Tensor) -> None:
    """Put a parameter or buffer in the place of the one of that name."""
    parent, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(parent), leaf, value)
