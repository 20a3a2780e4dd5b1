"""The layer loop against stock transformers, which holds the whole model: the same numbers, bit for bit."""

import gc
import itertools
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from random_models import load_stock, make_model, random_tokens
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from visits import visit_layer

from compress.errors import ModelError, NumericalError
from compress.loop import stream as stream_module
from compress.loop.activations import Activations
from compress.loop.stream import TOKENS_PER_BATCH, LayerStream
from compress.model.checkpoint import Checkpoint
from compress.quant.gptq import factorize, gptq, round_to_nearest, visiting_order
from compress.quant.grid import Grid
from compress.quant.statistics import gram

CPU = torch.device("cpu")
GROUPS = [
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("stream") / "model", num_hidden_layers=3, shard="100KB")


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def open_stream(folder: Path, dtype: torch.dtype = torch.bfloat16, room: float = math.inf) -> LayerStream:
    return LayerStream(Checkpoint(folder), CPU, dtype, room=room)


def run_all(stream: LayerStream, activations: Activations) -> None:
    for index in range(stream.depth):
        stream.fill_layer(index, stream.load_layer(index))
        stream.run_layer(index, activations)
        stream.empty_layer(index)


def batches(tokens: Tensor, batch: int) -> tuple[Tensor, ...]:
    return tokens.split(batch)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("sequences", "length", "batch"), [(5, 16, 2), (3, 33, 3), (4, 40, 1), (1, 1, 1), (3, 128, 2)])
def test_logits_are_the_stock_models(folder: Path, dtype: torch.dtype, sequences: int, length: int, batch: int) -> None:
    tokens = random_tokens(sequences, length)
    stock = load_stock(folder, dtype)
    stream = open_stream(folder, dtype)
    activations = stream.start(tokens, batch)
    assert [hidden.shape[0] for hidden in activations.hidden] == [len(part) for part in batches(tokens, batch)]
    run_all(stream, activations)
    with stream.outer():
        for part, hidden in zip(batches(tokens, batch), activations.hidden, strict=True):
            expected = stock(part, use_cache=False).logits
            assert expected.float().std() > 0.1
            assert torch.equal(stream.logits(hidden), expected)
            assert torch.equal(stream.logits(hidden, keep=1), stock(part, use_cache=False, logits_to_keep=1).logits)


def test_batches_hold_a_fixed_number_of_tokens(folder: Path) -> None:
    tokens = random_tokens(40, 128)
    sizes = [hidden.shape[0] for hidden in open_stream(folder).start(tokens).hidden]
    assert sizes == [16, 16, 8] and max(sizes) * 128 == TOKENS_PER_BATCH["cpu"]


def test_head_inputs_are_the_stock_models(folder: Path) -> None:
    tokens = random_tokens(2, 20)
    stock, seen = load_stock(folder, torch.bfloat16), []
    stock.lm_head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    stock(tokens, use_cache=False)
    stream = open_stream(folder)
    activations = stream.start(tokens)
    run_all(stream, activations)
    with stream.outer():
        assert torch.equal(stream.head_inputs(activations.hidden[0]), seen[0])


def test_embeddings_and_head_that_are_replaced_are_used(folder: Path) -> None:
    tokens = random_tokens(2, 20)
    stock, stream = load_stock(folder, torch.bfloat16), open_stream(folder)
    new = {
        name: torch.roll(stock.get_parameter(name), 1, 0) for name in ("model.embed_tokens.weight", "lm_head.weight")
    }
    stream.replaced |= new
    for name, weight in new.items():
        stock.get_parameter(name).copy_(weight)
    activations = stream.start(tokens)
    run_all(stream, activations)
    with stream.outer():
        assert torch.equal(stream.logits(activations.hidden[0]), stock(tokens, use_cache=False).logits)


# ---- inside a layer


def test_linears_that_share_an_input_are_found(folder: Path) -> None:
    stream = open_stream(folder)
    activations = stream.start(random_tokens(2, 8))
    assert [stream.groups(index, activations) for index in range(3)] == [GROUPS] * 3
    assert all(parameter.is_meta for parameter in stream.model.parameters())


def test_a_visit_sees_what_hooks_on_the_stock_model_see(folder: Path) -> None:
    tokens = random_tokens(5, 24)
    stock, expected = load_stock(folder, torch.bfloat16), {}
    for name, module in stock.model.layers.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(lambda _, i, n=name: expected.setdefault(n, []).append(i[0]))
    for part in batches(tokens, 2):
        stock(part, use_cache=False)
    stream, calls = open_stream(folder), []
    activations = stream.start(tokens, 2)
    for index in range(stream.depth):
        stream.fill_layer(index, stream.load_layer(index))

        def visit(group: tuple[str, ...], inputs: Iterator[Tensor]) -> None:
            calls.append(group)
            seen = list(inputs)
            for name in group:
                wanted = expected[f"{index}.{name}"]  # noqa: B023
                assert len(seen) == len(wanted) == 3
                assert all(torch.equal(one, other) for one, other in zip(seen, wanted, strict=True))

        visit_layer(stream, index, activations, visit)
    assert calls == GROUPS * 3
    with stream.outer():
        last = stream.logits(activations.hidden[-1])
    assert torch.equal(last, stock(tokens[-1:], use_cache=False).logits)


def test_inputs_that_a_visit_leaves_unread_change_nothing(folder: Path) -> None:
    tokens, results = random_tokens(5, 12), []
    for read in (0, 1, 3):
        stream = open_stream(folder)
        activations = stream.start(tokens, 2)
        stream.fill_layer(0, stream.load_layer(0))
        visit_layer(stream, 0, activations, lambda _, inputs, n=read: [*itertools.islice(inputs, n)] and None)
        results.append(torch.cat(activations.hidden))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def quantized(weight: Tensor, inputs: Iterable[Tensor], method: str) -> Tensor:
    """What a matrix becomes in 3 bits, in its own dtype."""
    grid, hessian = Grid(3, 32, True), gram(inputs)
    assert hessian is not None
    if method == "rtn":
        return round_to_nearest(weight, hessian.diagonal(), grid).dequantize(weight.dtype)
    order = visiting_order(hessian.diagonal(), grid.columns_per_group(weight.shape[1]), True)
    return gptq(weight, factorize(hessian, order, 0.01), grid, "hessian")[0].dequantize(weight.dtype)


def sequential_by_hand(stock: Any, parts: tuple[Tensor, ...], method: str) -> None:
    """Quantize a whole model in place: before each group of linears, everything is run from the tokens on."""
    for layer, group in itertools.product(stock.model.layers, GROUPS):
        inputs: list[Tensor] = []
        handle = layer.get_submodule(group[0]).register_forward_pre_hook(lambda _, i, to=inputs: to.append(i[0]))
        for part in parts:
            stock(part, use_cache=False)
        handle.remove()
        for name in group:
            weight = layer.get_submodule(name).weight
            weight.copy_(quantized(weight, inputs, method))


@pytest.mark.parametrize("method", ["rtn", "gptq"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("room", [math.inf, 0])  # batches stop inside the layer, or are run anew for each group
def test_each_linear_sees_what_the_quantized_ones_before_it_put_out(
    folder: Path, method: str, dtype: torch.dtype, room: float
) -> None:
    tokens = random_tokens(5, 24)
    stock = load_stock(folder, dtype)
    sequential_by_hand(stock, batches(tokens, 2), method)
    stream, written = open_stream(folder, dtype, room), {}
    activations = stream.start(tokens, 2)
    for index in range(stream.depth):
        raw = stream.load_layer(index)
        stream.fill_layer(index, raw)

        def visit(group: tuple[str, ...], inputs: Iterator[Tensor]) -> None:
            seen, prefix = list(inputs), stream.prefix(index)  # noqa: B023
            new = {f"{prefix}{n}.weight": quantized(raw[f"{prefix}{n}.weight"].to(dtype), seen, method) for n in group}  # noqa: B023
            stream.fill_layer(index, new)  # noqa: B023
            written.update(new)

        visit_layer(stream, index, activations, visit)
    assert len(written) == 21
    for name, weight in written.items():
        assert torch.equal(weight, stock.get_parameter(name)), name
    with stream.outer():
        last = stream.logits(activations.hidden[-1])
    assert torch.equal(last, stock(tokens[-1:], use_cache=False).logits)


# ---- what goes wrong


@pytest.mark.parametrize("with_visit", [True, False])
def test_nan_activations_name_the_layer(folder: Path, with_visit: bool) -> None:
    stream = open_stream(folder)
    activations = stream.start(random_tokens(3, 8), 2)
    visit = (lambda group, inputs: None) if with_visit else None
    stream.fill_layer(0, stream.load_layer(0))
    visit_layer(stream, 0, activations, visit)
    raw = stream.load_layer(1)
    raw["model.layers.1.mlp.down_proj.weight"][3, 5] = float("nan")
    stream.fill_layer(1, raw)
    with pytest.raises(NumericalError, match=r"^NaN or inf in the activations behind model\.layers\.1;"):
        visit_layer(stream, 1, activations, visit)


def test_a_layer_keeps_its_batches_where_there_is_room_for_them(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ways = []
    for way in ("interleaved", "recompute"):
        usual = getattr(stream_module, way)
        monkeypatch.setattr(stream_module, way, lambda *a, w=way, u=usual: (ways.append(w), u(*a))[1])
    # tokens x (in front of o_proj: its input, queries, keys, values, the norm's output, what came in) x bytes of bf16
    needed = 4 * 8 * (2 * 64 + 2 * 32 + 2 * 64) * 2
    for room in (needed, needed - 1):
        stream = open_stream(folder, room=room)
        activations = stream.start(random_tokens(4, 8), 2)
        stream.fill_layer(0, stream.load_layer(0))
        visit_layer(stream, 0, activations, lambda group, inputs: None)
    assert ways == ["interleaved", "recompute"]


def held() -> dict[int, int]:
    """Bytes of all CPU tensors with memory of their own (a traced tensor has none), by address."""
    tensors = [each for each in gc.get_objects() if type(each) in (Tensor, nn.Parameter) and each.device.type == "cpu"]
    storages = [each.untyped_storage() for each in tensors]
    return {each.data_ptr(): each.nbytes() for each in storages}


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt_neox", "gemma2", "qwen3", "olmo2"])
def test_what_batches_hold_inside_a_layer_is_what_was_reckoned(family: str, tmp_path: Path) -> None:
    """Outputs of fused linears, held by parts of them, included; attention weights in full; what post-norms read."""
    sizes = {"hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 4}
    own = {"gpt_neox": {"num_key_value_heads": None, "head_dim": None}, "phi3": {"head_dim": None}}.get(family, {})
    stream = open_stream(make_model(tmp_path / family, family, **sizes, **own))
    activations, few = stream.start(random_tokens(16, 64), 2), stream.start(random_tokens(1, 8))
    stream.fill_layer(0, stream.load_layer(0))
    stream.groups(0, few)  # shorter sequences, with smaller attention weights
    reckoned = stream._grouped(0, activations).held * activations.tokens
    gc.unfreeze()
    try:
        before = held()
        most = 0
        for _, arrivals in stream.steps(0, activations):
            for _ in arrivals:
                pass
            most = max(most, sum(size for address, size in held().items() if address not in before))
    finally:
        gc.freeze()
    assert 0.99 * reckoned < most <= 1.01 * reckoned


@pytest.mark.parametrize("path", ["another order", "a linear less", "a linear twice"])
def test_batches_that_take_different_paths_are_caught(folder: Path, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = open_stream(folder)
    activations = stream.start(random_tokens(4, 8), 2)
    stream.fill_layer(0, stream.load_layer(0))
    usual, calls = type(stream.layers[0].mlp).forward, []

    def forward(self: Any, hidden: Tensor) -> Tensor:
        calls.append(hidden)
        if hidden.is_meta or len(calls) < 3:  # on the meta device, then the first batch
            return usual(self, hidden)
        if path == "a linear less":
            return hidden * 1.0
        if path == "another order":
            self.down_proj(torch.zeros(1, 96, dtype=hidden.dtype))
        out = usual(self, hidden)
        return out + self.down_proj(torch.zeros(1, 96, dtype=hidden.dtype)) if path == "a linear twice" else out

    monkeypatch.setattr(type(stream.layers[0].mlp), "forward", forward)
    with pytest.raises((ModelError, AssertionError), match=r"batches take different paths through model\.layers\.0"):
        visit_layer(stream, 0, activations, lambda group, inputs: None)


def test_an_error_in_a_visit_comes_out_and_leaves_the_stream_usable(folder: Path) -> None:
    stream = open_stream(folder)
    activations = stream.start(random_tokens(4, 8), 2)
    before = [hidden.clone() for hidden in activations.hidden]
    stream.fill_layer(0, stream.load_layer(0))

    def visit(group: tuple[str, ...], inputs: Iterator[Tensor]) -> None:
        if group == GROUPS[2]:
            raise NumericalError("as a solver may say")

    with pytest.raises(NumericalError, match="as a solver may say"):
        visit_layer(stream, 0, activations, visit)
    assert all(torch.equal(one, other) for one, other in zip(activations.hidden, before, strict=True))
    stream.run_layer(0, activations)
    other = open_stream(folder)
    expected = other.start(random_tokens(4, 8), 2)
    other.fill_layer(0, other.load_layer(0))
    other.run_layer(0, expected)
    assert all(torch.equal(one, other) for one, other in zip(activations.hidden, expected.hidden, strict=True))


def damaged(folder: Path, to: Path, name: str, tensor: Tensor | None) -> Path:
    """A copy of the model with one tensor replaced, or without it."""
    to.mkdir()
    (to / "config.json").write_bytes((folder / "config.json").read_bytes())
    tensors = {n: t for shard in folder.glob("*.safetensors") for n, t in load_file(shard).items() if n != name}
    if tensor is not None:
        tensors[name] = tensor
    save_file(tensors, to / "model.safetensors", {"format": "pt"})
    return to


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("model.layers.1.mlp.up_proj.weight", torch.zeros(95, 64), r"model\.layers\.1\.mlp\.up_proj\.weight has shape "
         r"\[95, 64\], the config says \[96, 64\]"),
        ("model.layers.1.mlp.up_proj.weight", None, r"the checkpoint lacks model\.layers\.1\.mlp\.up_proj\.weight"),
        ("model.layers.1.input_layernorm.weight", None, r"lacks model\.layers\.1\.input_layernorm\.weight"),
        ("model.norm.weight", None, r"the checkpoint lacks model\.norm\.weight"),
        ("model.embed_tokens.weight", None, r"the checkpoint lacks model\.embed_tokens\.weight"),
        ("model.norm.weight", torch.zeros(65), r"model\.norm\.weight has shape \[65\], the config says \[64\]"),
        ("model.embed_tokens.weight", torch.zeros(4096, 63), r"embed_tokens\.weight has shape \[4096, 63\]"),
        ("lm_head.weight", None, r"the checkpoint lacks lm_head\.weight"),
    ],
)  # fmt: skip
def test_damaged_weights_get_one_line(
    folder: Path, tmp_path: Path, name: str, tensor: Tensor | None, message: str
) -> None:
    copied = damaged(folder, tmp_path / "damaged", name, tensor)
    with pytest.raises(ModelError, match=message) as caught:
        stream = open_stream(copied)
        run_all(stream, stream.start(random_tokens(1, 4)))
    assert "\n" not in str(caught.value)


# ---- memory and reads


def test_only_one_layer_or_the_outer_parts_are_in_memory(folder: Path) -> None:
    stream = open_stream(folder)

    def held() -> set[str]:
        return {name.removeprefix("model.").partition(".")[0] if ".layers." not in name else name.split(".")[2]
                for name, parameter in stream.model.named_parameters() if not parameter.is_meta}  # fmt: skip

    assert held() == set()
    activations = stream.start(random_tokens(2, 4))
    assert held() == set()
    for index in range(stream.depth):
        stream.fill_layer(index, stream.load_layer(index))
        assert held() == {str(index)}
        visit_layer(stream, index, activations, lambda group, inputs: None)
        stream.empty_layer(index)
        assert held() == set()
    with stream.outer():
        assert held() == {"embed_tokens", "norm", "lm_head"}
    assert held() == set()


class Counting:
    """A checkpoint that counts how often each tensor is read."""

    def __init__(self, folder: Path) -> None:
        self.checkpoint, self.reads = Checkpoint(folder), Counter[str]()
        self.folder, self.tensors = folder, self.checkpoint.tensors

    def load(self, names: Iterable[str], device: torch.device | str = "cpu") -> dict[str, Tensor]:
        wanted = list(names)
        self.reads.update(wanted)
        return self.checkpoint.load(wanted, device)


def test_every_tensor_of_a_layer_is_read_once_and_one_layer_ahead(folder: Path) -> None:
    source = Counting(folder)
    stream = LayerStream(source, CPU, torch.bfloat16)
    activations = stream.start(random_tokens(2, 4))
    source.reads.clear()
    for index in range(stream.depth):
        stream.fill_layer(index, stream.load_layer(index))
        stream.run_layer(index, activations)
        stream.empty_layer(index)
        layers = {int(name.split(".")[2]) for name in source.reads}
        assert layers <= set(range(index + 2)) and index in layers
    stream.close()
    assert source.reads == Counter(name for name in source.tensors if ".layers." in name)


def test_layers_can_be_loaded_in_any_order(folder: Path) -> None:
    stream, whole = open_stream(folder), {n: t for s in folder.glob("*.safetensors") for n, t in load_file(s).items()}
    for index in (2, 0, 1, 1):
        tensors = stream.load_layer(index)
        assert len(tensors) == 9 and all(torch.equal(tensor, whole[name]) for name, tensor in tensors.items())
        assert all(name.startswith(f"model.layers.{index}.") for name in tensors)
