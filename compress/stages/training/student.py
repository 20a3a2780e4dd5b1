"""The model that is trained: built empty, filled from a checkpoint, split over processes, written as a checkpoint.

Names are those of the checkpoint's tensors; what transformers, LoRA and the module around the model add to them is
taken off here alone.
"""

import json
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from compress import records
from compress.errors import UserError
from compress.formats.base import DTYPES
from compress.loop.activations import Activations
from compress.loop.skeleton import check_present, head_name, skeleton, stored_name
from compress.loop.stream import LayerStream
from compress.model.checkpoint import Checkpoint
from compress.model.shapes import find_modules, has_own_head, is_tied
from compress.recipe.train import Lora
from compress.stages.layerwise import LayerTransform, check_finite
from compress.system import distributed
from compress.system.files import write_text
from compress.train import sharded
from compress.train.memory import Setup
from compress.train.trainee import Objective, Trainee

_SPARSE = 0.01  # share of zeros from which on those of a linear are kept; trained weights have next to none


class Student:
    """A checkpoint that is trained, as a `Source` of the layer loop: with the trained weights once there are some.

    Args:
        parent: dense.
        folder: where its config.json is put.
        tied: whether its head is its embeddings from here on, whatever the parent's is.
    """

    def __init__(self, parent: Checkpoint, folder: Path, tied: bool) -> None:
        self.parent, self.folder = parent, folder
        modules = find_modules(parent)
        self.config: dict[str, Any] = dict(parent.config)
        head = f"{modules.head}.weight"
        if tied:
            self.config["tie_word_embeddings"] = True
        elif has_own_head(parent, modules):
            self.config["tie_word_embeddings"] = False
        drop = tied or is_tied(parent, modules)
        self.tensors: Mapping[str, Any] = {n: i for n, i in parent.tensors.items() if not (drop and n == head)}
        self.gather: Gather | None = None
        if distributed.rank() == 0:
            folder.mkdir(parents=True, exist_ok=True)
            write_text(folder / "config.json", json.dumps(self.config))
        distributed.barrier()

    def load(self, names: Iterable[str], device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """Tensors in the dtype in which they are stored."""
        wanted = list(names)
        if self.gather is not None:
            return {name: tensor.to(device) for name, tensor in self.gather(wanted).items()}
        return self.parent.load(wanted, device)

    def dtype(self, name: str) -> torch.dtype:
        """In which a tensor is stored."""
        return DTYPES[self.parent.tensors[name].dtype]


class Gather:
    """Trained weights as whole tensors, rounded to the dtypes in which they are stored. Called in all processes.

    Args:
        student: where they come from.
        trainee: what was trained.
        names: for each parameter of the trainee, its tensor in the checkpoint.
    """

    def __init__(self, student: Student, trainee: Trainee, names: Mapping[str, str]) -> None:
        self._student, self._trainee = student, trainee
        self._places = {stored: own for own, stored in names.items()}

    def __call__(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Tensors of the checkpoint, on the CPU."""
        own = dict(self._trainee.named_parameters())
        trained = {name for name in names if name in self._places and own[self._places[name]].requires_grad}
        # what is frozen may be held in fewer bits than it is stored in
        loaded = self._student.parent.load([name for name in names if name not in trained])
        for name in names:
            if name in trained:
                loaded[name] = sharded.whole(own[self._places[name]]).to("cpu", self._student.dtype(name))
            elif name in self._places:
                added = additions(self._trainee, self._places[name].removesuffix(".base_layer.weight"))
                if added is not None:
                    loaded[name] = (loaded[name].float() + added.cpu()).to(loaded[name].dtype)
        return {name: loaded[name] for name in names}


def additions(trainee: Trainee, module: str) -> Tensor | None:
    """What LoRA adds to a linear's weight, float32 [O, I]; None where it adds nothing.

    W + (alpha / rank) B A (Hu et al. 2021, arXiv:2106.09685).
    """
    own = dict(trainee.named_parameters())
    down, up = (f"{module}.lora_{part}.default.weight" for part in "AB")
    if down not in own:
        return None
    linear: Any = trainee.get_submodule(module)
    return float(linear.scaling["default"]) * (sharded.whole(own[up]).float() @ sharded.whole(own[down]).float())


def build(
    student: Student, objective: Objective, widths: tuple[int, int] | None, lora: Lora | None, trust_remote_code: bool
) -> tuple[Trainee, nn.ModuleList, dict[str, str]]:
    """The trainee on the meta device, its decoder layers, and for each parameter its tensor in the checkpoint."""
    model, arch = skeleton(student.folder, torch.float32, trust_remote_code)
    decoder: nn.ModuleList = model.get_submodule(arch.layers)
    head = head_name(model, arch)
    if lora is not None:
        _add_lora(model, lora, f"{arch.layers}.")
    trainee = Trainee(model, decoder, objective, widths)
    names = {}
    for own, _ in trainee.named_parameters():
        plain = own.removeprefix("model.").replace(".base_layer.", ".")
        stored = stored_name(plain, head, arch, student.tensors)
        if stored in student.tensors:
            names[own] = stored
    new = (".lora_", "projections.")
    check_present([own for own, _ in trainee.named_parameters() if own not in names and not any(n in own for n in new)])
    return trainee, decoder, names


def _add_lora(model: nn.Module, lora: Lora, layers: str) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    linears = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n.startswith(layers)]
    chosen = [name for name in linears if lora.takes(name)]
    if not chosen:
        known = ", ".join(sorted({name.rpartition(".")[2] for name in linears}))
        raise UserError(f"lora.targets: no linear of the layers is called {', '.join(lora.targets or [])}; use {known}")
    alpha = 2 * lora.rank if lora.alpha is None else lora.alpha
    # a factor that is no whole number is as good; peft's annotation is too narrow
    config = LoraConfig(r=lora.rank, lora_alpha=alpha, target_modules=chosen, lora_dropout=0.0)  # type: ignore[arg-type]
    inject_adapter_in_model(config, model, low_cpu_mem_usage=True)


def chosen(own: str, names: Mapping[str, str], globs: Sequence[str] | None, lora: bool) -> bool:
    """Whether a parameter is trained."""
    if lora:
        return ".lora_" in own or own.startswith("projections.")
    stored = names.get(own)
    return stored is None or globs is None or any(fnmatchcase(stored, glob) for glob in globs)


def fill(
    trainee: Trainee,
    decoder: nn.ModuleList,
    student: Student,
    names: Mapping[str, str],
    mesh: DeviceMesh,
    compute: torch.dtype,
    device: torch.device,
    setup: Setup,
    compiled: bool,
) -> None:
    """Give the trainee its weights, and split it over the processes."""
    shapes = {name: parameter.shape for name, parameter in trainee.named_parameters()}

    def load(wanted: Sequence[str]) -> dict[str, Tensor]:
        stored = student.parent.load({names[own] for own in wanted if own in names})
        return {own: stored[names[own]] if own in names else initial(own, shapes[own]) for own in wanted}

    sharded.shard(trainee, decoder, mesh, compute, load, device, again=setup.again, compiled=compiled)


def refill(trainee: Trainee, student: Student, names: Mapping[str, str]) -> None:
    """Give the trainee the weights again that it had at the start."""
    for own, parameter in trainee.named_parameters():
        stored = names.get(own)
        value = initial(own, parameter.shape) if stored is None else student.parent.load([stored])[stored]
        sharded.set_whole(parameter, value)


def initial(own: str, shape: torch.Size) -> Tensor:
    """A parameter that no checkpoint has: LoRA's are drawn as by its authors, a projection keeps lengths."""
    if ".lora_B." in own:
        return torch.zeros(shape)
    generator = torch.Generator().manual_seed(int.from_bytes(sha256(own.encode()).digest()[:8], "little", signed=True))
    if ".lora_A." in own:
        return nn.init.kaiming_uniform_(torch.empty(shape), a=math.sqrt(5), generator=generator)
    return torch.randn(shape, generator=generator) / math.sqrt(shape[-1])


@torch.no_grad()
def zeros_of(trainee: Trainee, names: Mapping[str, str], linears: Collection[str]) -> list[tuple[nn.Parameter, Tensor]]:
    """Linears of which so many weights are zero that an earlier stage has made them so, and where those are."""
    found = []
    for own, parameter in trainee.named_parameters():
        if names.get(own, "").removesuffix(".weight") not in linears:
            continue
        zeros = sharded.own_part(parameter) == 0
        share = sharded.mean_over_processes(zeros, parameter.numel())
        if share >= _SPARSE:
            found.append((parameter, zeros))
    return found


class Written(LayerTransform):
    """Writes the trained weights as a checkpoint, and runs the probe through them as they are written."""

    calibrated = False

    def __init__(self, student: Student, stream: LayerStream) -> None:
        self._student, self._stream = student, stream

    def transform(
        self, index: int, tensors: dict[str, Tensor], calibration: Activations | None, probe: Activations
    ) -> tuple[dict[str, Tensor], Sequence[records.AnyModule]]:
        """The layer as it is."""
        return tensors, []

    def restore(self, index: int, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The layer as it was written."""
        return dict(tensors)

    def after_layers(
        self, tensors: dict[str, Tensor], calibration: Activations | None
    ) -> tuple[dict[str, Tensor], Sequence[records.AnyModule]]:
        """Embeddings, norm and head."""
        inside = self._stream.arch.layers + "."
        outer = self._student.load([name for name in self._student.tensors if not name.startswith(inside)])
        check_finite(outer)
        return outer, []

    def config(self) -> dict[str, Any]:
        """The student's."""
        return dict(self._student.config)
