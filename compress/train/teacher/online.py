"""A teacher that is asked at each step: a frozen model, in the precision of the forward passes.

Where there are several processes its layers are split over them; its head is whole in each, since the loss reads it
beside the student's.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from compress.train import sharded
from compress.train.losses.inputs import Head
from compress.train.trainee import Inputs, States, check_head, head_of, isolate, states_of, uncompiled


class OnlineTeacher(nn.Module):
    """A causal language model that is only asked.

    Args:
        model: on the meta device.
        decoder: its decoder layers.
    """

    head: Head

    def __init__(self, model: nn.Module, decoder: nn.ModuleList) -> None:
        super().__init__()
        self.model = model
        self._decoder = [decoder]

    def fill(
        self,
        mesh: DeviceMesh,
        compute: torch.dtype,
        load: sharded.Load,
        device: torch.device,
        name: str,
        compiled: bool,
    ) -> None:
        """Give it its weights and try them; what messages call it is its name.

        Args:
            mesh: the processes.
            compute: precision.
            load: tensors by the names of the model's parameters.
            device: where to.
            name: for messages.
            compiled: whether its layers are compiled.

        Raises:
            ModelError: a family whose logits or documents are not what training takes them to be.
        """
        sharded.set_trained(self, lambda _: False, compute)

        def read(wanted: Sequence[str]) -> dict[str, Tensor]:
            found = load([own.removeprefix("model.") for own in wanted])
            return {f"model.{own}": tensor for own, tensor in found.items()}

        sharded.shard(self, self._decoder[0], mesh, compute, read, device, compiled=compiled, alone=mesh.size() == 1)
        head = head_of(self.model)
        weight = sharded.whole(head.weight)
        bias = None if head.bias is None else sharded.whole(head.bias)
        self.head = Head(weight, bias, head.scale, head.softcap)
        self(None, (), name, device)

    @torch.no_grad()
    def forward(
        self, inputs: Inputs | None, layers: Sequence[int] = (), name: str = "", device: torch.device | None = None
    ) -> States | None:
        """States of the rows; without inputs, the trial of the family."""
        if inputs is None:
            assert device is not None
            with uncompiled():
                check_head(self.model, torch.arange(3, 19, device=device)[None], name)
                isolate(self.model, device)
            return None
        return states_of(self.model, self._decoder[0], inputs, layers)
