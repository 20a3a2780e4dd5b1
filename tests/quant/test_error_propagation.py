"""The correction of propagated against least squares in float64, and what it is worth on a trained model."""

from pathlib import Path

import numpy as np
import pytest
import torch
from quantized import quantize
from random_models import load_stock, make_model, random_tokens
from safetensors.torch import load_file, save_file
from small_model import TRAINED
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma2Config, GPTNeoXConfig, PreTrainedConfig

from compress.data.calibration import TokenSet, load_calibration
from compress.errors import NumericalError
from compress.loop.activations import Activations
from compress.loop.context import Context
from compress.loop.groups import carriers
from compress.loop.stream import LayerStream
from compress.model.checkpoint import Checkpoint
from compress.quant.error_propagation import PropagatedError
from compress.quant.grid import Grid
from compress.quant.statistics import Gram
from compress.recipe.quantize import WeightOnlyStage
from compress.recipe.schema import bundled_dir
from compress.recipe.text import CalibrationSpec
from compress.stages.quantize.solve import Solver
from compress.system.progress import Reporter


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("carries", [False, True])
@pytest.mark.parametrize("share", [1.0, 0.5])
def test_correction_is_the_ridge_regression_onto_the_original_outputs(
    weighted: bool, carries: bool, share: float
) -> None:
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    weight, batches = draw(7, 12), []
    propagated, gram = PropagatedError(weight if carries else None), Gram()
    for _ in range(3):
        x0 = draw(2, 10, 12)
        x, r0, r = x0 + 0.2 * draw(2, 10, 12), draw(2, 10, 7), draw(2, 10, 7)
        w = torch.rand(2, 10, generator=generator) if weighted else None
        gram.add(x, w)
        propagated.add(x, x0, w, (r, r0))
        batches.append((x, x0, r, r0, torch.ones(2, 10) if w is None else w))
    hessian = gram.total()
    assert hessian is not None
    found = propagated.correct(weight, hessian, share)
    x, x0, r, r0 = (torch.cat([b[i].flatten(0, 1) for b in batches]).double().numpy() for i in range(4))
    root = np.sqrt(torch.cat([b[4].flatten() for b in batches]).double().numpy())[:, None]
    wanted = (x0 - x) @ weight.double().numpy().T + (r0 - r if carries else 0)
    ridge = np.sqrt(0.1 * float(hessian.diagonal().mean())) * np.eye(12)
    moved = np.linalg.lstsq(np.vstack([root * x, ridge]), np.vstack([root * wanted, np.zeros((12, 7))]), rcond=None)[0]
    assert np.allclose(found.numpy(), weight.numpy() + share * moved.T, atol=1e-4)


def test_without_drift_nothing_is_corrected() -> None:
    x = torch.randn(4, 8, 16, generator=torch.Generator().manual_seed(1))
    propagated, gram, weight = PropagatedError(), Gram(), torch.randn(5, 16, generator=torch.Generator().manual_seed(2))
    propagated.add(x, x, None, None)
    gram.add(x)
    hessian = gram.total()
    assert hessian is not None and torch.equal(propagated.correct(weight, hessian, 0.5), weight)


def test_sums_hold_the_weights_that_float16_allows_and_take_tokens_in_a_row() -> None:
    x = torch.randn(1, 2048, 32, generator=torch.Generator().manual_seed(4)).half()
    x0, weight = x.clone(), torch.full((1, 2048), 0.01)
    x0[0, 0] += 40
    weight[0, 0] = 2000  # as of a token that all others look at
    propagated, row = PropagatedError(), PropagatedError()
    propagated.add(x, x0, weight, None)
    row.add(x[0], x0[0], weight, None)
    expected = (weight[0, :, None] * (x0 - x)[0].double()).t() @ x[0].double()
    assert torch.allclose(propagated.total().double(), expected, rtol=0.01)
    assert torch.equal(row.total(), propagated.total())


def test_inputs_that_are_all_zero_correct_nothing() -> None:
    propagated, weight, zeros = PropagatedError(), torch.ones(5, 16), torch.zeros(2, 8, 16)
    propagated.add(zeros, zeros, None, None)
    assert torch.equal(propagated.correct(weight, torch.zeros(16, 16), 0.5), weight)


def test_a_hessian_that_can_not_be_factored_corrects_nothing() -> None:
    propagated, weight = PropagatedError(), torch.randn(5, 16, generator=torch.Generator().manual_seed(4))
    propagated.add(torch.ones(4, 16), torch.zeros(4, 16), None, None)
    hessian = 100 * torch.ones(16, 16) - 99 * torch.eye(16)
    assert torch.equal(propagated.correct(weight, hessian, 0.5), weight)


@pytest.mark.parametrize("broken", ["inputs", "original"])
def test_inputs_that_are_not_finite_are_named(broken: str) -> None:
    """Also where only those of the original model are, which the Hessian can't show."""
    generator = torch.Generator().manual_seed(3)
    inputs, original = (torch.randn(4, 8, 32, generator=generator) for _ in range(2))
    (inputs if broken == "inputs" else original)[2, 3, 5] = torch.inf
    propagated, gram = PropagatedError(), Gram()
    propagated.add(inputs, original, None, None)
    gram.add(inputs)
    spec = WeightOnlyStage(kind="quantize", group_size=32)
    solver = Solver(spec, {"up": Grid(4, 32, True)}, 400)
    with pytest.raises(NumericalError, match=r"^NaN or inf in the inputs of up; the weights may be damaged$"):
        solver.solve({"up": torch.randn(8, 32, generator=generator)}, gram.total(), propagated)


CPU = torch.device("cpu")
NEOX = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "vocab_size": 4096,
}
GEMMA = NEOX | {"num_key_value_heads": 2, "head_dim": 16}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (None, {"self_attn.o_proj", "mlp.down_proj"}),
        (Gemma2Config(**GEMMA), set()),  # norms stand between
        (GPTNeoXConfig(**NEOX, use_parallel_residual=True), set()),  # both are added at once
        (GPTNeoXConfig(**NEOX, use_parallel_residual=False), {"attention.dense", "mlp.dense_4h_to_h"}),
    ],
    ids=["llama", "gemma2", "gpt_neox", "gpt_neox in sequence"],
)
def test_linears_that_write_to_the_residual_stream_are_found(
    config: PreTrainedConfig | None, expected: set[str], tmp_path: Path
) -> None:
    if config is None:
        folder = make_model(tmp_path / "model")
    else:
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder := tmp_path / "model")
    with torch.no_grad():
        stream = LayerStream(Checkpoint(folder), CPU, torch.bfloat16)
        activations = stream.start(random_tokens(1, 12))
        layer = stream.fill_layer(0, stream.load_layer(0))

        def run() -> torch.Tensor:
            stream.run_layer(0, activations)
            return activations.get(0)

        assert carriers(layer, run) == expected


def test_a_linear_that_puts_out_zeros_writes_nothing(tmp_path: Path) -> None:
    with torch.no_grad():
        stream = LayerStream(Checkpoint(make_model(tmp_path / "model")), CPU, torch.bfloat16)
        activations = stream.start(random_tokens(1, 12))
        raw = stream.load_layer(0)
        raw["model.layers.0.self_attn.q_proj.weight"].zero_()
        layer = stream.fill_layer(0, raw)

        def run() -> torch.Tensor:
            stream.run_layer(0, activations)
            return activations.get(0)

        assert carriers(layer, run) == {"self_attn.o_proj", "mlp.down_proj"}


def test_a_trained_model_is_closer_to_its_original_with_the_correction(tmp_path: Path) -> None:
    """KL in stock transformers, on other text than that of the calibration."""
    tokenizer = AutoTokenizer.from_pretrained(TRAINED)
    source = bundled_dir("calibration") / "text" / "general_en.jsonl.gz"
    spec = CalibrationSpec(source=str(source), samples=40, sequence_length=128)
    ids = load_calibration(spec, tokenizer).tokens
    calibration, held_out = ids[:32], ids[32:]
    base, kl = load_stock(TRAINED, torch.float32), {}
    for share in (0.0, 0.5):
        context = Context(
            CPU, torch.float32, TokenSet(calibration, "t", "t", None), held_out[:1], Reporter(quiet=True), False
        )
        spec = WeightOnlyStage(kind="quantize", bits=3, group_size=64, drift_correction=share)
        quantize(spec, Checkpoint(TRAINED), tmp_path / str(share), context)
        found = load_stock(tmp_path / str(share) / "checkpoint", torch.float32)
        with torch.no_grad():
            p, q = (m(held_out, use_cache=False).logits.log_softmax(-1) for m in (base, found))
        kl[share] = float((p.exp() * (p - q)).sum(-1).mean())
    assert kl[0.5] < 0.97 * kl[0.0]


@pytest.mark.parametrize("dead", ["self_attn.v_proj", "mlp.up_proj", "self_attn.q_proj"])
def test_a_linear_of_zeros_stops_nothing(dead: str, tmp_path: Path) -> None:
    """As pruned layers have; what comes behind it has inputs that are all zero."""
    name, source = f"model.layers.1.{dead}.weight", make_model(tmp_path / "model")
    tensors = load_file(source / "model.safetensors")
    tensors[name].zero_()
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    tokens = TokenSet(random_tokens(6, 24), "random", "random", None)
    context = Context(CPU, torch.float32, tokens, random_tokens(1, 24, 2), Reporter(quiet=True), False)
    quantize(WeightOnlyStage(kind="quantize", group_size=32), Checkpoint(source), tmp_path / "work", context)
    found = load_stock(tmp_path / "work" / "checkpoint", torch.float32)
    assert all(parameter.isfinite().all() for parameter in found.parameters())
    assert not found(random_tokens(1, 8), use_cache=False).logits.isnan().any()
    assert not found.get_submodule(f"model.layers.1.{dead}")(torch.randn(3, tensors[name].shape[1])).any()


def test_states_in_host_memory_give_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The probe's too. Numbers of 64 bits play those in host memory here, which no layer takes."""
    source, written = make_model(tmp_path / "model"), []
    tokens = TokenSet(random_tokens(6, 24), "random", "random", None)
    context = Context(CPU, torch.bfloat16, tokens, random_tokens(1, 24, 2), Reporter(quiet=True), False)
    usual = LayerStream.start
    for where in ("device", "host"):
        if where == "host":
            monkeypatch.setattr(Activations, "get", lambda self, number: self.hidden[number].bfloat16())
            monkeypatch.setattr(Activations, "put", lambda self, n, hidden: self.hidden[n].copy_(hidden))
            monkeypatch.setattr(Activations, "copy", lambda self: in_host(self, [h.clone() for h in self.hidden]))
            monkeypatch.setattr(
                LayerStream, "start", lambda *a: in_host(s := usual(*a), [h.double() for h in s.hidden])
            )
        quantize(WeightOnlyStage(kind="quantize", group_size=32), Checkpoint(source), tmp_path / where, context)
        written.append((tmp_path / where / "checkpoint" / "model.safetensors").read_bytes())
    assert written[0] == written[1]


def in_host(activations: Activations, hidden: list[torch.Tensor]) -> Activations:
    return Activations(hidden, activations.arguments, activations.device)
