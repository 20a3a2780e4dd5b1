"""SmoothQuant in the layer loop: a look at each layer's inputs, then scales folded into its weights.

The look is a pass of its own through the layer, so that what is calibrated, replayed and written is the folded layer.
"""

import copy
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from compress.errors import RecipeError
from compress.loop.activations import Activations
from compress.loop.folds import Fold, apply_fold, find_folds, gain_offset
from compress.loop.stream import LayerStream
from compress.quant.activations import Sample
from compress.quant.grid import Grid
from compress.quant.smooth import best_scale, smoothing_scale
from compress.recipe.quantize import WeightActivationStage
from compress.stages.quantize.matrix import Matrix

_TOKENS = 1024  # that scales are compared on


class Smoothing:
    """Folds scales into layers.

    Args:
        spec: the stage.
        matrices: to quantize, by full name.
        grids: their grids.
        stream: the layer loop.

    Attributes:
        alphas: the power that each linear's inputs got, by full name.
    """

    def __init__(
        self,
        spec: WeightActivationStage,
        matrices: Mapping[str, Matrix],
        grids: Mapping[str, Grid],
        stream: LayerStream,
    ) -> None:
        self.spec, self.matrices, self.grids, self.stream = spec, matrices, grids, stream
        self.alphas: dict[str, float] = {}

    def fold(self, index: int, tensors: dict[str, Tensor], activations: Activations, probe: Activations) -> None:
        """Smooth a filled layer; its weights in `tensors` (full names) and in the layer become the folded ones.

        Raises:
            RecipeError: a layer whose inputs come from where no scales can go.
        """
        prefix = self.stream.prefix(index)
        folds = self._find(index, probe)
        local = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
        seen = self._look(index, activations, folds)
        found = {name: self._scale(folds[name], local, *seen[name], prefix) for name in folds}
        for name, scale in found.items():
            if scale is not None:
                apply_fold(local, folds[name], scale, lambda linear: prefix + linear in self.grids)
        tensors |= {prefix + name: tensor for name, tensor in local.items()}
        self.stream.fill_layer(index, tensors)

    def _look(self, index: int, activations: Activations, names: Iterable[str]) -> dict[str, tuple[Tensor, Tensor]]:
        """The largest magnitude of each channel [I] of these linears' inputs, and a sample of them [1, N, I]."""
        layer, tokens = self.stream.layers[index], activations.tokens
        samples = {name: Sample(tokens, _TOKENS) for name in names}
        largest: dict[str, list[Tensor]] = {name: [] for name in samples}

        def looking(name: str) -> Callable[[torch.nn.Module, tuple[Any, ...]], None]:
            def hook(_: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
                samples[name].add(inputs[0])
                largest[name].append(inputs[0].abs().flatten(0, -2).amax(0).float())

            return hook

        with ExitStack() as hooks:
            for name in samples:
                hooks.callback(layer.get_submodule(name).register_forward_pre_hook(looking(name)).remove)
            for hidden in activations:
                layer(hidden, **activations.of_layer(index, hidden))
        found = {}
        for name, reaches in largest.items():
            sample = samples[name].total()
            assert sample is not None, "smoothing calibrates"
            found[name] = torch.stack(reaches).amax(0), sample
        return found

    def _scale(
        self, fold: Fold, local: Mapping[str, Tensor], largest: Tensor, inputs: Tensor, prefix: str
    ) -> Tensor | None:
        """Scales [P] of a fold; None where smoothing does not help."""
        wanted = [name for name in fold.group if prefix + name in self.grids]
        channels = local[f"{fold.producer}.weight"].shape[0]
        weights = torch.cat([local[f"{name}.weight"].float() for name in wanted])
        columns = fold.gather(weights.abs().amax(0), channels)
        reach = fold.gather(largest, channels)

        def scale(alpha: float) -> Tensor:
            return smoothing_scale(reach, columns, alpha)

        found: tuple[float, Tensor] | None
        if self.spec.smooth == "auto":
            width, grid = largest.numel(), self.grids[prefix + wanted[0]]
            static = self.matrices[prefix + wanted[0]].inputs == "static"  # auto mostly ends at dynamic
            spread, total = partial(fold.spread, width=width), partial(fold.total, channels=channels)
            found = best_scale(inputs, weights, scale, spread, total, static, grid)
        else:
            found = None if self.spec.smooth is None else (self.spec.smooth, scale(self.spec.smooth))
        if found is None:
            return None
        self.alphas |= dict.fromkeys((prefix + name for name in wanted), float(found[0]))
        return found[1]

    def _find(self, index: int, probe: Activations) -> dict[str, Fold]:
        """The folds of a layer's quantized linears; each layer's own, however many were finished by an earlier run."""
        stream, prefix = self.stream, self.stream.prefix(index)
        groups = stream.groups(index, probe)
        wanted = [group for group in groups if any(prefix + name in self.grids for name in group)]
        layer, hidden = stream.layers[index], probe.get(0)
        arguments = probe.of_layer(index, hidden)
        if stream.dtype == torch.float16:  # whose range half of a number may leave
            layer = copy.deepcopy(layer).float()
            hidden, arguments = tree_map(_widened, (hidden, arguments))

        def run() -> Tensor:
            out = layer(hidden, **arguments)
            whole: Tensor = out[0] if isinstance(out, tuple) else out
            return whole

        config = stream.model.config
        heads = getattr(config, "num_attention_heads", None)
        head_dim = getattr(config, "head_dim", None) or (config.hidden_size // heads if heads else None)
        folds = find_folds(layer, wanted, run, head_dim)
        there = {first: fold for first, fold in folds.items() if fold is not None}
        sources = _norms_before(layer, run)
        for group in wanted:
            source = sources.get(group[0])
            if group[0] in folds or (source is None and group != groups[0]):
                continue
            names = ", ".join(prefix + name for name in group)
            if source is None:
                reason = "their inputs come from no norm or linear that scales could go into"
            elif gain_offset(layer.get_submodule(source)) is None:
                reason = f"their inputs come from {prefix}{source}, a norm of an unknown form"
            else:
                reason = f"what {prefix}{source} puts out goes elsewhere too (a residual branch)"
            raise RecipeError([f"smooth: {names} can't be smoothed: {reason}; use smooth: null"])
        return there


def _widened(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


def _norms_before(layer: torch.nn.Module, run: Any) -> dict[str, str]:
    """The norm whose output each linear gets as it is, by local names."""
    out: list[tuple[Tensor, str]] = []
    found: dict[str, str] = {}

    def note(name: str) -> Any:
        return lambda _, __, output: out.append((output, name))

    def look(name: str) -> Any:
        def hook(_: Any, inputs: tuple[Any, ...]) -> None:
            found.update((name, norm) for tensor, norm in out if tensor is inputs[0])

        return hook

    handles = []
    for name, module in layer.named_modules():
        if isinstance(module, torch.nn.Linear):
            handles.append(module.register_forward_pre_hook(look(name), prepend=True))
        elif not list(module.children()) and isinstance(getattr(module, "weight", None), Tensor):
            handles.append(module.register_forward_hook(note(name)))
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return found
