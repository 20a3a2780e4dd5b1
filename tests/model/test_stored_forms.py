"""A model folder in any form that transformers opens is read as transformers reads it: the same logits, bit for bit."""

from collections.abc import Callable
from pathlib import Path

import pytest
import stored as forms
import torch
from random_models import load_stock, make_model, random_tokens
from stored import store, tensors_of
from torch import Tensor

from compress.errors import ModelError
from compress.evaluation.verify import own_logits
from compress.model.checkpoint import Checkpoint
from compress.model.names import canonical_names
from compress.model.shapes import check_depth, find_modules, is_tied, parameter_count, remarks

TOKENS = random_tokens(1, 16, 1)[0]


def streamed(folder: Path) -> Tensor:
    return own_logits(Checkpoint(folder), TOKENS, torch.device("cpu"), torch.float32, False)


def stock(folder: Path) -> Tensor:
    return load_stock(folder, torch.float32)(TOKENS[None], use_cache=False).logits[0]


@pytest.mark.parametrize("form", forms.FORMS, ids=lambda form: form.__name__)
def test_read_as_transformers_reads_it(form: Callable[[Path], None], tmp_path: Path) -> None:
    form(tmp_path / "model")
    assert torch.equal(streamed(tmp_path / "model"), stock(tmp_path / "model"))
    check_depth(Checkpoint(tmp_path / "model"))


@pytest.mark.parametrize(
    ("form", "tied"),
    [
        (forms.tied_and_stored_twice, True),
        (forms.tied_by_the_heads_name, True),
        (forms.tied_without_prefix, True),
        (forms.a_head_of_its_own, False),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_head_is_tied_by_its_values(form: Callable[[Path], None], tied: bool, tmp_path: Path) -> None:
    form(tmp_path / "model")
    checkpoint = Checkpoint(tmp_path / "model")
    assert is_tied(checkpoint, find_modules(checkpoint)) == tied
    model = load_stock(tmp_path / "model", torch.float32)
    assert parameter_count(checkpoint) == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("form", "line"),
    [
        (
            forms.a_head_of_its_own,
            "FOLDER: config.json means tie_word_embeddings: true, but lm_head.weight is stored with other values: it "
            "is kept, as transformers does, and the result says tie_word_embeddings: false",
        ),
        (
            forms.an_index_beside_a_newer_file,
            "FOLDER: model.safetensors is read, as transformers does; model.safetensors.index.json beside it and its "
            "shards are not",
        ),
        (
            forms.a_layer_beyond_the_depth,
            "FOLDER: the depth in config.json is 1, and transformers does not load "
            "model.layers.1.input_layernorm.weight, model.layers.1.mlp.down_proj.weight, "
            "model.layers.1.mlp.gate_proj.weight and 6 more (0.1 MB): left out of the result, and not counted in its "
            "sizes",
        ),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_what_its_user_hears(form: Callable[[Path], None], line: str, tmp_path: Path) -> None:
    form(tmp_path / "model")
    assert remarks(Checkpoint(tmp_path / "model")) == [line.replace("FOLDER", str(tmp_path / "model"))]


def test_what_is_left_out_is_not_counted(tmp_path: Path) -> None:
    whole = Checkpoint(make_model(tmp_path / "whole"))
    forms.a_layer_beyond_the_depth(tmp_path / "model")
    cut = Checkpoint(tmp_path / "model")
    layer = [info for name, info in whole.tensors.items() if name.startswith("model.layers.1.")]
    assert whole.bytes - cut.bytes == sum(info.bytes for info in layer)
    assert parameter_count(whole) - parameter_count(cut) == sum(info.bytes // 2 for info in layer)


def test_names_of_a_backbone_are_mapped(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", "nemotron_h", hybrid_override_pattern="*-")
    stored = list(tensors_of(folder))
    assert any(name.startswith("backbone.") for name in stored)
    names = canonical_names(stored, Checkpoint(folder).config, folder)
    model = load_stock(folder, torch.float32).state_dict()
    for name, tensor in tensors_of(folder).items():
        assert torch.equal(model[names[name]], tensor.float())


def test_a_tensor_under_two_names_is_refused(tmp_path: Path) -> None:
    forms.tied_without_prefix(tmp_path / "model")
    tensors = tensors_of(tmp_path / "model")
    store(tmp_path / "model", tensors | {"model.norm.weight": tensors["norm.weight"]})
    said = (
        "model.norm.weight and norm.weight are both model.norm.weight to transformers; remove the one that is not meant"
    )
    with pytest.raises(ModelError, match=f"^{tmp_path / 'model'}: {said}$"):
        Checkpoint(tmp_path / "model")
