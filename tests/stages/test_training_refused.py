"""What training does not do: refused before the work with the reason and a remedy, or said as a warning."""

import json
import shutil
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from quantized import quantize
from random_models import make_model
from tokenizers import Tokenizer
from trained import LENGTH, Heard, context, planned, sparse, spec, train, trained, write_text

from compress.errors import CalibrationError, DscompressError, ModelError, UserError
from compress.model.checkpoint import Checkpoint
from compress.recipe.quantize import WeightOnlyStage
from compress.stages.training import plan as plan_module
from compress.stages.training import run as run_module
from compress.stages.training.plan import tokenizers_differ, tokens_of
from compress.stages.training.run import reads
from compress.train import trainee


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Models as small as these only wait for a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint(make_model(tmp_path_factory.mktemp("models") / "base", dtype=torch.float32))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("texts") / "text.jsonl")


def problem(parent: Checkpoint, text: Path, base: Checkpoint | None = None, **settings: Any) -> str:
    (found,) = planned(parent, spec(text, **settings), base).problems
    return found


def fails(parent: Checkpoint, text: Path, output: Path, error: type[DscompressError], **settings: Any) -> str:
    with pytest.raises(error) as caught:
        train(parent, output, spec(text, **settings))
    assert not list(output.glob("state-*")) and not (output / "train_log.jsonl").exists()
    return str(caught.value)


# Before the run


def test_a_glob_that_no_parameter_matches(base: Checkpoint, text: Path) -> None:
    assert problem(base, text, train=["*nrom*", "head"]) == (
        "stages.0.train: no parameter is called *nrom* or head; one is lm_head.weight"
    )


def test_a_quantized_model(base: Checkpoint, text: Path, tmp_path: Path) -> None:
    there = context(tmp_path / "work", base)
    quantize(WeightOnlyStage(kind="quantize", group_size=32, method="rtn"), base, tmp_path / "quantized", there)
    quantized = Checkpoint(tmp_path / "quantized" / "checkpoint")
    assert problem(quantized, text, base) == (
        "stages.0: the model is quantized, and dense weights are trained; put this stage before quantize"
    )
    assert problem(base, text, quantized, loss="kl") == "stages.0.teacher: is quantized; name a dense model"


def test_a_teacher_with_another_tokenizer(base: Checkpoint, text: Path, tmp_path: Path) -> None:
    shutil.copytree(base.folder, tmp_path / "other")
    file = tmp_path / "other" / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    file.write_text(json.dumps(tokenizer))  # other bytes, the same tokens
    assert not planned(base, spec(text, loss="kl"), Checkpoint(tmp_path / "other")).problems
    vocabulary = tokenizer["model"]["vocab"]
    one, two = list(vocabulary)[300:302]
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
    file.write_text(json.dumps(tokenizer))
    assert problem(base, text, Checkpoint(tmp_path / "other"), loss="kl") == (
        "stages.0.teacher: its tokenizer is another one (model in tokenizer.json), so its predictions are of other "
        "tokens; use a teacher with the student's tokenizer"
    )
    file.unlink()
    assert "(they are stored in different forms)" in problem(base, text, Checkpoint(tmp_path / "other"), loss="kl")


def tokenizer_folder(folder: Path, **files: str) -> Path:
    folder.mkdir()
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(content)
    return folder


GPT2 = {"vocab__json": '{"a": 0, "b": 1}', "merges__txt": "#version: 0.2\na b\n"}


@pytest.mark.parametrize(
    ("form", "change", "different"),
    [
        (GPT2, {"vocab__json": '{"a": 0,\n "b": 1}'}, None),  # laid out otherwise
        (GPT2, {"vocab__json": '{"a": 1, "b": 0}'}, "vocab.json"),
        (GPT2, {"merges__txt": "#version: 0.2\nb a\n"}, "merges.txt"),
        (GPT2, {"added_tokens__json": '{"<x>": 2}'}, "added_tokens.json"),
        (GPT2, {"vocab__json": "{"}, "vocab.json"),
        ({"tokenizer__model": "abc"}, {}, None),
        ({"tokenizer__model": "abc"}, {"tokenizer__model": "abd"}, "tokenizer.model"),
        ({"vocab__txt": "a\nb\n"}, {"vocab__txt": "b\na\n"}, "vocab.txt"),
    ],
)
def test_tokenizers_of_older_forms_are_compared_by_their_files(
    form: dict[str, str], change: dict[str, str], different: str | None, tmp_path: Path
) -> None:
    one, two = tokenizer_folder(tmp_path / "one", **form), tokenizer_folder(tmp_path / "two", **form | change)
    assert tokenizers_differ(one, two) == tokenizers_differ(two, one) == different
    assert tokenizers_differ(one, tmp_path / "two" / ".." / "one") is None
    # beside a tokenizer.json that the other lacks, the files that both have decide
    (two / "tokenizer.json").write_text("{}")
    assert tokenizers_differ(one, two) == tokenizers_differ(two, one) == different


def test_a_folder_has_its_own_tokenizer_whatever_it_is(tmp_path: Path) -> None:
    folder = tokenizer_folder(tmp_path / "one", tekken__json="{}")
    (tmp_path / "link").symlink_to(folder)
    assert tokenizers_differ(folder, folder) is None and tokenizers_differ(folder, tmp_path / "link") is None
    other = tokenizer_folder(tmp_path / "two", tekken__json="{}")
    assert tokenizers_differ(folder, other) == "they are stored in different forms"


@pytest.mark.parametrize(
    ("losses", "teacher", "said"),
    [
        (
            {"ce": 1},
            None,
            "student: its tokenizer is not that of the recipe's model (model in tokenizer.json), and what it becomes "
            "is measured on that one's tokens; make the student `model`",
        ),
        ({"kl": 1}, "same", "student: its tokenizer is not that of the recipe's model (model in tokenizer.json)"),
        ({"kl": 1}, None, "teacher: its tokenizer is another one (model in tokenizer.json)"),  # base; said once
    ],
)
def test_a_student_of_its_own_with_another_tokenizer(
    losses: dict[str, int], teacher: str | None, said: str, base: Checkpoint, text: Path, tmp_path: Path
) -> None:
    shutil.copytree(base.folder, tmp_path / "other")
    file = tmp_path / "other" / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    tokenizer["model"]["vocab"] = dict(zip(tokenizer["model"]["vocab"], reversed(range(4096)), strict=False))
    file.write_text(json.dumps(tokenizer))
    stage = spec(text, kind="distill", student="own", losses=losses, **({"teacher": teacher} if teacher else {}))
    (found,) = planned(base, stage, own=tmp_path / "other", same=tmp_path / "other").problems
    assert found.startswith(f"stages.0.{said}")
    assert not planned(base, stage, own=base.folder, same=base.folder).problems


def test_layers_that_a_model_does_not_have(base: Checkpoint, text: Path) -> None:
    stage = {"kind": "distill", "losses": {"kl": 1, "hidden": 1}, "hidden_layers": {0: 1, 2: 1, 1: 7}}
    assert planned(base, spec(text, **stage)).problems == [
        "stages.0.hidden_layers: the student has layers 0 to 1, and no 2",
        "stages.0.hidden_layers: the teacher has layers 0 to 1, and no 7",
    ]


def test_texts_of_two_lengths_and_one_longer_than_the_model(base: Checkpoint, text: Path) -> None:
    several = [{"source": str(text), "sequence_length": length} for length in (32, 64)]
    assert problem(base, text, data=several) == (
        "stages.0.data: its texts have sequence_length 32 and 64; a batch has one, so give them the same"
    )
    assert problem(base, text, data={"source": str(text), "sequence_length": 129}) == (
        "stages.0.data: sequence_length 129 is more than the model's 128 positions"
    )


def test_a_teacher_with_fewer_positions_than_the_text_is_long(base: Checkpoint, text: Path, tmp_path: Path) -> None:
    shutil.copytree(base.folder, tmp_path / "short")
    config = base.config | {"max_position_embeddings": 16}
    (tmp_path / "short" / "config.json").write_text(json.dumps(config))
    teacher = tmp_path / "short"
    found = planned(base, spec(text, loss="kl", teacher="short"), base, short=teacher)
    assert found.problems == [f"stages.0.data: sequence_length {LENGTH} is more than the teacher's 16 positions"]
    whole = {"source": str(text)}  # a length that nobody names fits both
    found = planned(base, spec(text, loss="kl", teacher="short", data=whole), base, short=teacher)
    assert not found.problems and found.spec is not None and found.spec.data[0].length == 16  # type: ignore[attr-defined]


def test_packages_that_are_missing(base: Checkpoint, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compress.system.extras.find_spec", lambda name: None)
    monkeypatch.setattr("compress.system.tracker.importlib.util.find_spec", lambda name: None)
    stage = spec(text, lora={}, optimizer="adamw8bit", tracker="wandb")
    assert planned(base, stage).problems == [
        "stages.0: peft is not installed; pip install 'dscompress[train]'",
        "stages.0: torchao is not installed; pip install 'dscompress[train]'",
        "stages.0: wandb is not installed; pip install wandb, or remove tracker",
    ]


def test_all_problems_come_at_once(base: Checkpoint, text: Path) -> None:
    stage = spec(text, train=["nope"], data={"source": str(text), "sequence_length": 1000})
    assert len(planned(base, stage).problems) == 2


# Before the first step


def test_too_little_memory_says_what_to_lower(
    base: Checkpoint, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The teacher's weights are inside of what --max-memory allows, also where more is free."""
    needs: list[int] = []
    demand_of = run_module.demand_of

    def noted(*arguments: Any) -> Any:
        demand = demand_of(*arguments)
        needs.append(demand.bytes(run_module.Setup(1, "adamw", False)))
        return demand

    monkeypatch.setattr(run_module, "demand_of", noted)
    monkeypatch.setattr(run_module, "available", lambda device, limit=None: min(10**12, limit or 10**12))
    settings: dict[str, Any] = {"loss": "kl", "micro_batch": 1, "optimizer": "adamw", "checkpoint_activations": False}
    train(base, tmp_path / "enough" / "out", spec(text, steps=1, **settings))
    there = context(tmp_path / "work", base)
    for limit, fits in ((needs[0], True), (needs[0] - 1000, False)):
        limited = type(there)(**{**vars(there), "max_memory": limit})
        output = tmp_path / str(fits) / "out"
        if fits:
            train(base, output, spec(text, steps=1, **settings), limited)
            continue
        with pytest.raises(UserError) as caught:
            train(base, output, spec(text, steps=1, **settings), limited)
        assert str(caught.value).startswith("finetune: training needs about ")
        assert str(caught.value).endswith(
            "use lora: {}, optimizer: adamw8bit, checkpoint_activations: true, targets: cached"
        )
        assert not list(output.glob("state-*"))


@pytest.mark.parametrize(
    ("settings", "cacheable"),
    [
        ({"loss": "kl"}, True),
        ({"kind": "distill"}, True),
        ({"kind": "distill", "losses": {"kl": 1, "ce": 0.5}}, True),
        ({"kind": "distill", "temperature": 2}, False),
        ({"kind": "distill", "losses": {"reverse_kl": 1}}, False),
        ({"kind": "distill", "losses": {"kl": 1, "hidden": 1}, "hidden_layers": {0: 0}}, False),
    ],
)
def test_cached_targets_are_a_remedy_where_the_recipe_may_say_them(
    settings: dict[str, Any], cacheable: bool, base: Checkpoint, text: Path
) -> None:
    """What the recipe's own schema allows is the reference."""
    demand = run_module.demand_of(spec(text, **settings), base, base, LENGTH, 4, "cpu", 1)
    with pytest.raises(UserError) as caught:
        demand.choose(1, 0, "stages.0", None, "auto", None)
    assert str(caught.value).endswith(", targets: cached") == cacheable
    with nullcontext() if cacheable else pytest.raises(ValidationError):
        spec(text, **settings, targets="cached")


def test_small_moments_are_not_chosen_where_nothing_can_keep_them(
    base: Checkpoint, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compress.system.extras.find_spec", lambda name: None)
    exact, small = (
        run_module.demand_of(spec(text), base, None, LENGTH, 4, "cpu", 1).bytes(run_module.Setup(1, each, True))  # type: ignore[arg-type]
        for each in ("adamw", "adamw8bit")
    )
    there = context(tmp_path / "work", base)
    limited = type(there)(**{**vars(there), "max_memory": (exact + small) // 2})
    with pytest.raises(UserError, match="training needs about") as caught:
        train(base, tmp_path / "out", spec(text), limited)
    assert str(caught.value).endswith(
        "lora: {}, optimizer: adamw8bit (torchao is not installed; pip install 'dscompress[train]')"
    )


def test_a_micro_batch_that_is_changed_counts_when_training_goes_on(
    base: Checkpoint, text: Path, tmp_path: Path
) -> None:
    """It is the remedy for a step that ran out of memory."""
    for micro, changed in ((None, 4), (1, 1), (2, 2), (2, 2)):
        there = context(tmp_path / "work", base)
        train(base, tmp_path / "out", spec(text, steps=1, micro_batch=micro), there)
        assert isinstance(there.reporter, Heard)
        assert f"finetune (ce): 1 steps of 4 x 32 tokens, {changed} sequences at a time, adamw" in there.reporter.said


def test_a_batch_that_processes_cannot_share(
    base: Checkpoint, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compress.stages.training.run.distributed.world", lambda: 3)
    assert fails(base, text, tmp_path / "out", UserError) == (
        "batch_size: 4 sequences can't be shared by 3 processes; use a multiple of their number, such as 6"
    )


def test_a_vocabulary_that_lacks_tokens(
    base: Checkpoint, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the run where tokenizer.json says how many tokens there are, and else before the first step."""
    small = Checkpoint(make_model(tmp_path / "small", dtype=torch.float32, vocab_size=4000))
    said = (
        "teacher: the vocabularies have 4000 (teacher) and 4096 logits and the tokenizer 4096 tokens; they may differ "
        "in padding alone: use a teacher and a student with a logit for each token"
    )
    assert problem(base, text, small, loss="kl") == f"stages.0.{said}"
    monkeypatch.setattr(plan_module, "tokens_of", lambda folder: None)
    with pytest.raises(UserError) as caught:
        train(base, tmp_path / "out", spec(text, loss="kl"), base=small)
    assert str(caught.value) == said


@pytest.mark.parametrize(
    "vocabulary",
    [
        {"a": 0, "b": 1, "<s>": 2},
        [["<s>", 0.0], ["a", -1.0], ["b", -2.0]],  # unigram
    ],
)
def test_tokens_are_counted_once_as_the_tokenizers_library_counts_them(vocabulary: Any, tmp_path: Path) -> None:
    models: dict[str, Any] = {"type": "Unigram", "vocab": vocabulary, "unk_id": 0}
    if isinstance(vocabulary, dict):
        models = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "a"}
    tokenizer = Tokenizer.from_str(json.dumps({"version": "1.0", "added_tokens": [], "model": models}))
    tokenizer.add_tokens(["<s>", "<new>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert tokens_of(tmp_path) == tokenizer.get_vocab_size() == 4
    for damaged in ("{", "[]", '{"model": {}}', '{"model": {"vocab": 3}}'):
        (tmp_path / "tokenizer.json").write_text(damaged)
        assert tokens_of(tmp_path) is None
    assert tokens_of(tmp_path / "nowhere") is None


@pytest.mark.parametrize(
    ("family", "sizes"),
    [
        ("bloom", {"n_head": 4, "n_layer": 2}),
        ("mpt", {"d_model": 64, "n_heads": 4, "n_layers": 2, "expansion_ratio": 2}),
    ],
)
def test_a_family_whose_attention_crosses_documents(
    family: str, sizes: dict[str, int], base: Checkpoint, text: Path, tmp_path: Path
) -> None:
    """As student, and as teacher."""
    model = Checkpoint(make_model(tmp_path / "model", family, torch.float32, **sizes))
    wanted = (
        f"model_type '{family}': its attention looks across the documents of a packed sequence; train a model of a "
        "family that transformers masks by positions, such as llama or qwen2"
    )
    with pytest.raises(ModelError) as caught:
        train(model, tmp_path / "out", spec(text))
    assert str(caught.value) == wanted
    with pytest.raises(ModelError) as caught:
        train(base, tmp_path / "other", spec(text, loss="kl"), base=model)
    assert str(caught.value) == wanted


def test_a_mask_that_forgets_documents(
    base: Checkpoint, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if transformers no longer took documents from positions."""
    from transformers.models.llama.modeling_llama import LlamaModel

    forward = LlamaModel.forward

    def whole(self: Any, *rest: Any, position_ids: Any = None, **more: Any) -> Any:
        return forward(self, *rest, **more)

    monkeypatch.setattr(LlamaModel, "forward", whole)
    assert "looks across the documents" in fails_in_training(base, text, tmp_path / "out")


def test_a_head_that_does_something_else(
    base: Checkpoint, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    head_of = trainee.head_of
    monkeypatch.setattr(trainee, "head_of", lambda model: head_of(model).__class__(2 * head_of(model).weight))
    assert fails_in_training(base, text, tmp_path / "out") == (
        "the model that is trained: model_type 'llama' computes its logits otherwise than from its last hidden states "
        "and its head; it can't be trained or teach here"
    )


def fails_in_training(base: Checkpoint, text: Path, output: Path) -> str:
    with pytest.raises(ModelError) as caught:
        train(base, output, spec(text))
    assert not list(output.glob("state-*"))
    return str(caught.value)


def test_additions_to_a_matrix_whose_zeros_are_wanted(base: Checkpoint, text: Path, tmp_path: Path) -> None:
    parent = sparse(base, tmp_path / "pruned")
    assert fails(parent, text, tmp_path / "out", UserError, lora={}) == (
        "lora: 14 matrices have zeros that an earlier stage made, and low-rank additions would fill them; train the "
        "weights themselves (remove lora)"
    )


def test_additions_to_linears_that_are_not_there(base: Checkpoint, text: Path) -> None:
    assert problem(base, text, lora={"targets": ["qkv", "proj"]}) == (
        "stages.0.lora.targets: no linear of the layers is called qkv, proj; use down_proj, gate_proj, k_proj, o_proj, "
        "q_proj, up_proj, v_proj"
    )
    assert not planned(base, spec(text, lora={"targets": ["qkv", "q_proj"]})).problems


def test_a_text_that_is_too_short_or_has_no_assistant(base: Checkpoint, tmp_path: Path) -> None:
    few = write_text(tmp_path / "few.jsonl", documents=1)
    assert "tokens are fewer than one sequence of 128" in fails(
        base, few, tmp_path / "out", CalibrationError, data={"source": str(few), "sequence_length": 128}
    )


# Said


def warnings(base: Checkpoint, text: Path, output: Path, **settings: Any) -> tuple[list[str], int]:
    there = context(output.parent / "work", base)
    record = train(base, output, spec(text, **settings), there)
    return there.reporter.warnings, trained(record).steps


def test_a_text_that_is_gone_through_again_or_ends_training(base: Checkpoint, tmp_path: Path) -> None:
    short = write_text(tmp_path / "short.jsonl", documents=16)
    said, steps = warnings(base, short, tmp_path / "wrap", steps=6)
    assert steps == 6 and len(said) == 1
    assert said[0].startswith("training: short.jsonl: has fewer tokens than are trained on, and is gone through ")
    said, steps = warnings(base, short, tmp_path / "stop", steps=6, exhausted="stop")
    assert 1 <= steps < 6
    assert said == [
        f"training: the text has tokens for {steps} steps and not 6; training stops there, as exhausted: stop says"
    ]


def test_a_text_that_is_enough_is_not_warned_of(base: Checkpoint, text: Path, tmp_path: Path) -> None:
    for exhausted in ("wrap", "stop"):
        assert warnings(base, text, tmp_path / exhausted / "out", steps=6, exhausted=exhausted) == ([], 6)


# What makes another result


def test_what_a_result_hangs_on_is_in_its_fingerprint(base: Checkpoint, text: Path, tmp_path: Path) -> None:
    """And what only says how the work is done is not."""
    other = write_text(tmp_path / "other.jsonl", seed=1)
    copy = Path(shutil.copy(text, tmp_path / "copy.jsonl"))
    teacher = make_model(tmp_path / "teacher", dtype=torch.float32, num_hidden_layers=1)
    there = context(tmp_path / "work", base, teacher=teacher)

    def key(**settings: Any) -> str:
        found = planned(base, spec(settings.pop("text", text), **settings), base, teacher=teacher)
        assert found.spec is not None and not found.problems, found.problems
        return json.dumps([found.spec.identity(), reads(found.spec, there)], sort_keys=True)  # type: ignore[arg-type]

    same = key()
    for settings in ({}, {"text": copy}, {"micro_batch": 2}, {"checkpoint_activations": True}, {"save_every": 3}):
        assert key(**settings) == same, settings
    weighed = [[{"source": str(each), "sequence_length": LENGTH, "samples": 4, "weight": weight}
                for each, weight in ((text, 1), (other, share))] for share in (1, 3)]  # fmt: skip
    keys = [
        same, key(text=other), key(seed=1), key(learning_rate=1e-3), key(steps=9), key(loss="kl"),
        key(train=["*norm*"]),
        key(loss="kl", teacher="teacher"), key(loss="kl", targets="cached"), key(held_out=5), key(weight_decay=0.1),
        key(data=weighed[0]), key(data=weighed[1]), key(clip=0.5), key(batch_size=8), key(lora={}), key(patience=3),
    ]  # fmt: skip
    assert len(set(keys)) == len(keys)
