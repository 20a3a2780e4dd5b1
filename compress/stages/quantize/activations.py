"""What 8-bit inputs add to the quantize stage: how each linear's inputs are rounded, decided as they arrive.

The layer loop goes on with rounded inputs, so that every later matrix is calibrated on what the finished model
computes. Linears that share an input share the decision too: runtimes fuse them.
"""

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from compress.errors import CalibrationError
from compress.formats.base import AnyQuantized
from compress.loop.activations import Activations
from compress.loop.interleave import Passes
from compress.loop.stream import LayerStream
from compress.quant.activations import Sample, output_error, static_fake_quantize
from compress.quant.gptq import round_to_nearest
from compress.quant.grid import FakeQuantize, Grid, dynamic_fake_quantize
from compress.recipe.quantize import WeightActivationStage
from compress.records import Module
from compress.stages.quantize.cache_scales import CacheScales
from compress.stages.quantize.matrix import Matrix
from compress.stages.quantize.smoothing import Smoothing
from compress.stages.quantize.solve import Solved


class ActivationScales:
    """How the inputs of a stage's linears are rounded.

    Args:
        spec: the stage.
        matrices: its matrices, by name.
        grids: their grids.
        stream: the layer loop, which gets each decision as soon as it is made.
        in_kernels: whether the linears' kernels round their inputs, so that the layer loop must not.

    Attributes:
        rounding: what was decided, by name.
        errors: output errors under both methods where one was chosen by them.
    """

    def __init__(
        self,
        spec: WeightActivationStage,
        matrices: Mapping[str, Matrix],
        grids: Mapping[str, Grid],
        stream: LayerStream,
        in_kernels: bool = False,
    ) -> None:
        self.spec, self.matrices, self.grids, self.stream = spec, matrices, grids, stream
        self.rounding: dict[str, FakeQuantize] = {}
        self.errors: dict[str, dict[str, float]] = {}
        self._float8, self._in_kernels = spec.dtype == "fp8", in_kernels
        self._smoothing = Smoothing(spec, matrices, grids, stream) if spec.smooth is not None else None
        self._cache: CacheScales | None = None
        if spec.kv_cache is not None:
            scale_dtype = next(iter(grids.values())).scale_dtype
            self._cache = CacheScales(stream, scale_dtype, spec.kv_cache == "fp8_per_head")
        self._sample: Tensor | None = None
        self._tokens = 0

    def prepare(
        self, index: int, tensors: dict[str, Tensor], activations: Activations | None, probe: Activations
    ) -> None:
        """What a filled layer needs before its linears are visited: smoothed weights, scales of its cache.

        Args:
            index: the layer.
            tensors: its tensors, by full name; smoothed ones are replaced, here and in the layer.
            activations: in front of the layer.
            probe: a few tokens in front of it.

        Raises:
            RecipeError: a layer that can't be smoothed, or whose cache no loader could round.
        """
        self._tokens = 0 if activations is None else activations.tokens
        if activations is not None and self._smoothing is not None:
            self._smoothing.fold(index, tensors, activations, probe)
        if activations is not None and self._cache is not None:
            self._cache.calibrate(index, activations)

    def decide(self, names: Sequence[str], inputs: Iterable[Tensor], weights: Mapping[str, Tensor]) -> Iterable[Tensor]:
        """Settle how the inputs of linears that share them are rounded.

        Args:
            names: the linears.
            inputs: batches [B, S, I] of what they share, gone through as often as the observer needs and never held
                together; none where nothing is calibrated.
            weights: the layer's tensors, by full name.

        Returns:
            The inputs. One pass through them, here or later, keeps the sample that `described` measures errors on.

        Raises:
            CalibrationError: inputs that are all zero, or too few for the observer.
        """
        self._sample = None
        batches = Passes(partial(self._sampling, inputs))
        choices = {"dynamic": dynamic_fake_quantize(self.grids[names[0]])}
        wanted = {name: self.matrices[name].inputs or "dynamic" for name in names}
        if set(wanted.values()) != {"dynamic"}:
            choices |= self._static(names, batches, needed="static" in wanted.values())
        chosen = [name for name in names if wanted[name] == "auto"]
        if chosen:
            best = self._choose({n: weights[f"{n}.weight"] for n in chosen}, choices)
            wanted |= dict.fromkeys(chosen, best)
        self._settle({name: choices[wanted[name]] for name in names})
        if self._sample is None and self.spec.weight_rounding == "rtn":
            for _ in batches:  # nothing else goes through them
                pass
        return batches

    def _sampling(self, inputs: Iterable[Tensor]) -> Iterator[Tensor]:
        taken = Sample(self._tokens)
        for batch in inputs:
            taken.add(batch)
            yield batch
        self._sample = taken.total()

    def _settle(self, decided: Mapping[str, FakeQuantize]) -> None:
        self.rounding |= decided
        if not self._in_kernels:
            self.stream.inputs |= decided

    def _static(self, names: Sequence[str], batches: Iterable[Tensor], needed: bool) -> dict[str, FakeQuantize]:
        where = ", ".join(names)
        try:
            found = static_fake_quantize(batches, self.spec.observer, self._float8, self.grids[names[0]].scale_dtype)
        except CalibrationError as error:
            raise CalibrationError(f"{where}: {error}") from None
        if found is None and needed:
            raise CalibrationError(
                f"{where}: all inputs are zero on the calibration text, which gives no scale; "
                "add it to ignore, use method: dynamic for it, or calibrate on other text"
            )
        return {} if found is None else {"static": found}

    def _choose(self, weights: Mapping[str, Tensor], choices: Mapping[str, FakeQuantize]) -> str:
        """Static where it raises the mean output error by no more than the budget, with weights rounded to nearest."""
        assert self._sample is not None, "auto calibrates"
        stored = {}
        for name, weight in weights.items():
            ones = torch.ones(weight.shape[1], device=weight.device)
            stored[name] = round_to_nearest(weight.float(), ones, self.grids[name]).dequantize()
        found = {method: output_error(self._sample, weights, stored, each) for method, each in choices.items()}
        for name in weights:
            self.errors[name] = {method: errors[name] for method, errors in found.items()}
        costs = {method: sum(errors.values()) for method, errors in found.items()}
        return "static" if costs.get("static", math.inf) <= (1 + self.spec.budget) * costs["dynamic"] else "dynamic"

    def described(self, solved: Mapping[str, Solved], weights: Mapping[str, Tensor]) -> dict[str, Solved]:
        """The linears that were decided last, with errors that count the rounding of their inputs too."""
        return {
            name: replace(each, module=self._describe(each.module, each.quantized, weights))
            for name, each in solved.items()
        }

    def _describe(self, module: Module, quantized: AnyQuantized, weights: Mapping[str, Tensor]) -> Module:
        name, rounding = module.name, self.rounding[module.name]
        more: dict[str, Any] = {"inputs": "dynamic" if rounding.scale is None else "static"}
        if self._sample is not None:
            weight, stored = {name: weights[f"{name}.weight"]}, {name: quantized.dequantize()}
            more["error"] = output_error(self._sample, weight, stored, rounding)[name]
        if self._smoothing is not None:
            more["smooth"] = self._smoothing.alphas.get(name)
        return module.model_copy(update=more | {"errors": self.errors.get(name, {})})

    def tensors(self, index: int, names: Collection[str]) -> dict[str, Tensor]:
        """Static scales of these linears, [1] each, and of layer `index`'s cache, by full name, as they are stored."""
        scales = {} if self._cache is None else self._cache.tensors(index)
        for name in names:
            scale = self.rounding[name].scale
            if scale is not None:  # which linears of a group share; a file does not
                scales[f"{name}.input_scale"] = scale.to(self.grids[name].scale_dtype).view(1).clone()
        return scales

    def restore(self, prefix: str, tensors: Mapping[str, Tensor]) -> None:
        """Take up what was decided for a finished layer.

        Args:
            prefix: of the layer.
            tensors: what was written for it.
        """
        for name in (name for name in self.matrices if name.startswith(prefix)):
            scale = tensors.get(f"{name}.input_scale")
            static = None if scale is None else FakeQuantize(self._float8, scale.float().view(()))
            self._settle({name: static or dynamic_fake_quantize(self.grids[name])})
        if self._cache is not None:
            self._cache.restore(tensors)

    @property
    def cache_strategy(self) -> str | None:
        """What shares a scale in the cache, as compressed-tensors calls it: tensor or attn_head; None without one."""
        if self._cache is None:
            return None
        return "attn_head" if self._cache.per_head else "tensor"
