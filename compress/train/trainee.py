"""The model that is trained, as one module whose forward pass ends in the loss.

The loss needs the head's weight itself, so it is computed inside the one forward that owns the head: where parameters
are sharded over processes, they are whole only in there.

Shapes: B sequences, S tokens, N rows (tokens whose next one has a loss), D width, V vocabulary.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from compress.errors import ModelError
from compress.train.losses.fused import Weights, logit_loss
from compress.train.losses.hidden import hidden_loss
from compress.train.losses.inputs import Head, Sampled
from compress.train.packed import attend_in_documents, boundaries, of_documents, takes_documents

_CHECKED = 32  # tokens on which a head is tried
_TOLERANCE = 0.02  # of the largest logit: two orders of summation in 16 bits


@dataclass(frozen=True)
class Inputs:
    """What one forward pass reads.

    Args:
        tokens: int64 [B, S].
        positions: int64 [B, S], places inside documents; attention stays inside them.
        rows: int64 [N], places in the flattened tokens whose next token has a loss.
        targets: int64 [N], those next tokens.
        documents: int32, where documents start (compress/train/packed.py).
    """

    tokens: Tensor
    positions: Tensor
    rows: Tensor
    targets: Tensor
    documents: Tensor


def inputs_of(batch: Any, device: torch.device) -> Inputs:
    """What a forward pass reads, from sequences with their documents and scored tokens.

    A row is a token whose next one is scored, so what is predicted always lies one place further on.
    """
    scored = batch.scored.numpy().copy()  # torch would wake a thread on each core for so little
    scored[:, 0] = False
    next_ones = torch.from_numpy(np.flatnonzero(scored))
    targets = torch.from_numpy(batch.tokens.numpy().reshape(-1)[next_ones.numpy()])
    positions = batch.positions
    made = (batch.tokens, positions, next_ones - 1, targets, boundaries(positions))
    return Inputs(*(each.to(device, non_blocking=True) for each in made))


class States(NamedTuple):
    """Last hidden states of the rows, [N, D], and those behind other layers, by number."""

    last: Tensor
    behind: dict[int, Tensor]


@dataclass(frozen=True)
class Taught:
    """What a teacher says of the rows: its states and head, or draws from its predictions."""

    states: States | None = None
    head: Head | None = None
    sampled: Sampled | None = None


@dataclass(frozen=True)
class Objective:
    """What is minimised.

    Args:
        weights: of the terms over next tokens.
        hidden: weight of the hidden states' term.
        layers: the student's layers and the teacher's that each follows.
        vocabulary: logits that count, where the two models are padded differently; None: all.
    """

    weights: Weights
    hidden: float = 0.0
    layers: Mapping[int, int] | None = None
    vocabulary: int | None = None


class Trainee(nn.Module):
    """A causal language model with its loss.

    Args:
        model: as transformers builds it, or with LoRA inside.
        decoder: its decoder layers.
        objective: what is minimised.
        widths: of student and teacher, where hidden states are compared.
    """

    def __init__(
        self, model: nn.Module, decoder: nn.ModuleList, objective: Objective, widths: tuple[int, int] | None = None
    ) -> None:
        super().__init__()
        self.model, self.objective = model, objective
        self._decoder = [decoder]  # in a list: it is the model's, and no second child
        self._checked = False
        self.projections = nn.ParameterDict()  # [width of the teacher, width of the student], by layer
        if objective.layers and widths is not None and widths[0] != widths[1]:
            for layer in objective.layers:
                self.projections[str(layer)] = nn.Parameter(torch.empty(widths[::-1], device="meta"))

    def forward(self, inputs: Inputs, taught: Taught | None) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted loss, summed over rows, and the sum of each of its terms."""
        if not self._checked:
            with torch.no_grad(), uncompiled():
                check_head(self.model, inputs.tokens[:1], "the model that is trained")
                isolate(self.model, inputs.tokens.device)
            self._checked = True
        wanted = tuple(self.objective.layers or ())
        states = states_of(self.model, self._decoder[0], inputs, wanted)
        teacher: tuple[Tensor, Head] | Sampled | None = None
        if taught is not None and taught.sampled is not None:
            teacher = taught.sampled
        elif taught is not None and taught.states is not None:
            assert taught.head is not None
            teacher = taught.states.last, taught.head
        loss, parts = logit_loss(
            states.last, head_of(self.model), self.objective.weights, targets=inputs.targets, teacher=teacher,
            vocabulary=self.objective.vocabulary,
        )  # fmt: skip
        if self.objective.layers:
            assert taught is not None and taught.states is not None
            missed = torch.zeros((), device=loss.device)
            for own, theirs in self.objective.layers.items():
                projection = self.projections.get(str(own))
                missed = missed + hidden_loss(states.behind[own], taught.states.behind[theirs], projection)
            loss = loss + self.objective.hidden * missed
            parts["hidden"] = missed.detach()
        return loss, parts


def uncompiled() -> Any:
    """Inside, compiled layers run as they are: each short input of a trial would be compiled for."""
    return torch.compiler.set_stance("force_eager")


def states_of(model: nn.Module, decoder: nn.ModuleList, inputs: Inputs, layers: Sequence[int] = ()) -> States:
    """A model's hidden states of the rows: the last ones, as its head reads them, and those behind some layers."""
    with _watching(decoder, layers) as seen:
        last = _states(model, inputs.tokens, inputs.positions, inputs.documents)
    behind = {layer: _rows(state, inputs.rows) for layer, state in seen.items()}
    return States(_rows(last, inputs.rows), behind)


def _states(model: nn.Module, tokens: Tensor, positions: Tensor, documents: Tensor) -> Tensor:
    """A model's last hidden states [B, S, D] of packed sequences."""
    packed = of_documents(documents, tokens.shape[1]) if takes_documents(model) else {}
    out = backbone_of(model)(input_ids=tokens, position_ids=positions, attention_mask=None, use_cache=False, **packed)
    states: Tensor = out.last_hidden_state
    return states


def _rows(state: Tensor, rows: Tensor) -> Tensor:
    """[B, S, D] -> [N, D]."""
    return state.flatten(0, 1).index_select(0, rows)


@contextmanager
def _watching(decoder: nn.ModuleList, layers: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """Inside, what some layers put out is kept."""
    seen: dict[int, Tensor] = {}

    def keep(layer: int) -> Any:
        def hook(_: nn.Module, __: Any, out: Any) -> None:
            seen[layer] = out[0] if isinstance(out, tuple) else out

        return hook

    handles = [decoder[layer].register_forward_hook(keep(layer)) for layer in layers]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def backbone_of(model: Any) -> Any:
    """The model without its head."""
    return getattr(model, model.base_model_prefix)


def head_of(model: Any) -> Head:
    """How the model's last hidden states become its logits, in its family's terms."""
    linear, config = model.get_output_embeddings(), model.config
    scale = getattr(config, "logit_scale", None)
    divided = getattr(config, "logits_scaling", None)
    factor = float(scale) if scale is not None else 1.0 if divided is None else 1.0 / float(divided)
    softcap = getattr(config, "final_logit_softcapping", None)
    return Head(linear.weight, getattr(linear, "bias", None), factor, None if softcap is None else float(softcap))


@torch.no_grad()
def check_head(model: Any, tokens: Tensor, name: str) -> None:
    """Refuse a family whose logits are not what its head makes of its last hidden states: it would be trained wrongly.

    Args:
        model: whole, on one device.
        tokens: int64 [1, S].
        name: what messages call it.

    Raises:
        ModelError: its logits are computed otherwise.
    """
    tokens = tokens[:, :_CHECKED]
    hidden = backbone_of(model)(input_ids=tokens, use_cache=False).last_hidden_state[0]
    head, logits = head_of(model), model(input_ids=tokens, use_cache=False).logits[0].float()
    own = head.scale * (hidden.float() @ head.weight.float().T)
    if head.bias is not None:
        own = own + head.scale * head.bias.float()
    if head.softcap is not None:
        own = head.softcap * torch.tanh(own / head.softcap)
    missed = float((own - logits).abs().max())
    if not missed <= _TOLERANCE * float(logits.abs().max()):
        raise ModelError(
            f"{name}: model_type {model.config.model_type!r} computes its logits otherwise than from its last hidden "
            "states and its head; it can't be trained or teach here"
        )


@torch.no_grad()
def isolate(model: Any, device: torch.device) -> None:
    """Make a model's attention stay inside the documents of a packed sequence, without a mask where that can be.

    Raises:
        ModelError: a family that looks across them: what the first document says changes the states of the second.
    """
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, model.get_input_embeddings().num_embeddings, (2, 24), generator=generator)
    tokens[1, 10:] = tokens[0, 10:]
    positions = torch.cat([torch.arange(10), torch.arange(14)]).expand(2, -1)
    trial = [each.to(device) for each in (tokens, positions, boundaries(positions))]
    try:
        both = _states(model, *trial)
        one, other = both[:, 10:].float()
        isolated = float((one - other).abs().max()) <= 1e-3 * float(one.abs().max())
    except TypeError:  # it takes no positions
        isolated = False
    if isolated:
        attend_in_documents(model, lambda: _states(model, *trial), both)
    else:
        raise ModelError(
            f"model_type {model.config.model_type!r}: its attention looks across the documents of a packed sequence; "
            "train a model of a family that transformers masks by positions, such as llama or qwen2"
        )
