"""The training stages: what they write opens in stock transformers and is what a plain loop in float64 makes."""

import json
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from command import invoke
from dense_losses import dense_terms
from peft import LoraConfig, get_peft_model
from quantized import PROBE, opens
from random_models import load_stock, make_model, random_tokens
from torch import Tensor
from trained import (
    LENGTH,
    Tensors,
    apart,
    context,
    documents,
    log_of,
    missed,
    plain_loop,
    planned,
    sparse,
    spec,
    state_of,
    train,
    trained,
    weights,
    write_text,
)

from compress.data.mixture import Mixture
from compress.model.checkpoint import Checkpoint, read_part
from compress.recipe.prune import PruneStage
from compress.recipe.shape import Shape
from compress.recipe.text import CalibrationSpec
from compress.recipe.train import TrainStage
from compress.stages.contract import Setting
from compress.stages.training import student as student_module
from compress.stages.training.parts import parts
from compress.stages.training.texts import mixture_of
from compress.train.losses.fused import Weights
from compress.train.packed import boundaries
from compress.train.teacher.online import OnlineTeacher
from compress.train.trainee import Inputs, States, states_of

NORMS, LORA = ["*norm*"], {"rank": 4, "alpha": 6, "targets": ["q_proj", "down_proj"]}
MIXED = {"kl": 0.5, "reverse_kl": 0.2, "jsd": 0.7, "ce": 0.3}
CASES: dict[str, dict[str, Any]] = {
    "ce": {},
    "kl online": {"loss": "kl"},
    "kl cached": {"loss": "kl", "targets": "cached", "draws": 200},
    "mixed": {"kind": "distill", "losses": MIXED, "temperature": 2.0, "beta": 0.3},
    "hidden": {"kind": "distill", "losses": {"kl": 1, "hidden": 1}, "hidden_layers": {0: 1, 1: 0}},
    "lora": {"lora": LORA, "learning_rate": 2e-2},
    "norms": {"train": NORMS, "learning_rate": 5e-2},
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Models as small as these only wait for a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@dataclass(frozen=True)
class Models:
    """Two random models in float32, the second one narrower, and a text."""

    base: Checkpoint
    small: Checkpoint
    text: Path


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    folder = tmp_path_factory.mktemp("models")
    base = make_model(folder / "base", dtype=torch.float32)
    small = make_model(
        folder / "small", dtype=torch.float32, hidden_size=48, num_attention_heads=3, num_key_value_heads=1,
        tie_word_embeddings=True,
    )  # fmt: skip
    return Models(Checkpoint(base), Checkpoint(small), write_text(folder / "text.jsonl"))


def assert_arrived(folder: Path, wanted: Tensors, start: Checkpoint) -> None:
    """The weights are those wanted, but for a two-thousandth of the way there: processors add up in other orders."""
    found = weights(folder)
    assert missed(found, wanted, weights(start.folder)) < 5e-4 and apart(found, wanted) < 2e-4


def mixture(stage: TrainStage, models: Models, work: Path, parent: Checkpoint | None = None) -> Mixture:
    """The batches of a stage."""
    parent = parent or models.small
    found = planned(parent, stage, models.base).spec
    with ExitStack() as held:
        return mixture_of(found, parent.folder, context(work, models.base), held)  # type: ignore[arg-type]


# What is written


@pytest.mark.parametrize("case", CASES)
def test_training_lowers_the_held_out_loss_and_what_is_written_is_what_was_trained(
    case: str, models: Models, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    record = train(models.small, output, spec(models.text, **CASES[case]), base=models.base)
    found = trained(record)
    assert found.held_out[-1][1] < 0.97 * found.held_out[0][1]
    assert (found.best_step, found.steps, found.tokens) == (8, 8, 8 * 4 * LENGTH)
    stock = opens(output / "checkpoint", torch.float32)
    with torch.no_grad():
        logits = stock(random_tokens(1, 24, 2)).logits[0]
    assert torch.equal(logits, read_part(output / PROBE)[0]["logits"])
    before, after = weights(models.small.folder), weights(output / "checkpoint")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    expected = {
        "lora": {name for name in before if name.endswith(("q_proj.weight", "down_proj.weight"))},
        "norms": {name for name in before if "norm" in name},
    }
    assert changed == expected.get(case, set(before))
    own = sum(tensor.numel() for tensor in before.values())
    sizes = {"lora": 2 * 4 * ((48 + 48) + (96 + 48)), "norms": 5 * 48, "hidden": own + 2 * 48 * 64}
    assert found.trainable == sizes.get(case, own)
    log = (output / "checkpoint" / "train_log.jsonl").read_bytes()
    assert log == (output / "train_log.jsonl").read_bytes()


@pytest.mark.parametrize("loss", ["ce", "kl"])
def test_the_last_measurement_is_what_stock_models_give_document_by_document(
    loss: str, models: Models, tmp_path: Path
) -> None:
    stage = spec(models.text, loss=loss)
    record = train(models.small, tmp_path / "out", stage, base=models.base)
    text = mixture(stage, models, tmp_path / "work")
    batch = text.read(text.held_out())
    small, base = (load_stock(f, torch.float64) for f in (tmp_path / "out" / "checkpoint", models.base.folder))
    total, count = 0.0, 0
    for row, place in documents(batch):
        tokens = batch.tokens[row, place]
        rows = batch.scored[row, place][1:].nonzero()[:, 0]
        student, teacher = (model(tokens[None]).logits[0, rows] for model in (small, base))
        terms = dense_terms(student, teacher, tokens[rows + 1], Weights(**{loss: 1.0}))
        total, count = total + float(terms[loss]), count + len(rows)
    step, measured = trained(record).held_out[-1]
    assert step == 8 and measured == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize("how", [{"train": NORMS}, {"lora": LORA}], ids=["norms", "lora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_what_is_not_trained_keeps_its_bits_where_passes_run_in_bf16(
    dtype: torch.dtype, how: dict[str, Any], models: Models, tmp_path: Path
) -> None:
    parent = Checkpoint(make_model(tmp_path / "model", dtype=dtype))
    there = context(tmp_path / "work", parent, torch.bfloat16)
    train(parent, tmp_path / "out", spec(models.text, steps=2, **how), there)
    before, after = weights(parent.folder), weights(tmp_path / "out" / "checkpoint")
    touched = ("norm",) if "train" in how else ("q_proj", "down_proj")
    for name in before:
        assert before[name].dtype == after[name].dtype == dtype
        if not any(part in name for part in touched):
            assert torch.equal(before[name], after[name]), name


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft's own
def test_lora_is_merged_as_by_hand_and_as_by_peft(models: Models, tmp_path: Path) -> None:
    output = tmp_path / "out"
    train(models.small, output, spec(models.text, lora=LORA, learning_rate=2e-2, steps=3))
    before, after, parts = weights(models.small.folder), weights(output / "checkpoint"), state_of(output)
    parts = {name: tensor for name, tensor in parts.items() if ".lora_" in name}
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"], lora_dropout=0.0)
    peft: Any = get_peft_model(load_stock(models.small.folder, torch.float32), config)
    trained_names = {f"base_model.{name}": tensor for name, tensor in parts.items()}
    assert trained_names.keys() == {name for name, _ in peft.named_parameters() if ".lora_" in name}
    peft.load_state_dict(trained_names, strict=False)
    merged = peft.merge_and_unload().state_dict()
    for module in {name.partition(".lora_")[0] for name in parts}:
        down, up = (parts[f"{module}.lora_{part}.default.weight"] for part in "AB")
        name = f"{module.removeprefix('model.')}.weight"
        by_hand = before[name].double() + 6 / 4 * (up.double() @ down.double())
        assert float((up.double() @ down.double()).abs().max()) > 1e-3
        assert torch.allclose(after[name].double(), by_hand, rtol=0, atol=1e-6)
        assert torch.allclose(after[name], merged[name], rtol=0, atol=1e-6)


def test_lora_starts_from_matrices_that_differ_and_add_nothing() -> None:
    """Of kaiming's bound, 1 / sqrt(inputs)."""
    names = [f"model.model.layers.{n}.mlp.{m}.lora_A.default.weight" for n in (0, 1, 10) for m in ("up_proj", "q_proj")]
    drawn = [student_module.initial(name, torch.Size((8, 400))) for name in names]
    for number, one in enumerate(drawn):
        assert 0.99 / 20 < float(one.abs().max()) <= 1 / 20
        assert all(abs(float(torch.corrcoef(torch.stack([one, two]).flatten(1))[0, 1])) < 0.1 for two in drawn[:number])
    assert torch.equal(drawn[0], student_module.initial(names[0], torch.Size((8, 400))))
    assert not student_module.initial(names[0].replace("_A", "_B"), torch.Size((4, 8))).any()


# Right values

LOSSES = {
    "ce": ({}, Weights(ce=1.0)),
    "kl": ({"loss": "kl"}, Weights(kl=1.0)),
    "mixed": ({**CASES["mixed"]}, Weights(**MIXED, temperature=2.0, beta=0.3)),
}
HOW: dict[str, Any] = {"steps": 3, "learning_rate": 5e-4, "weight_decay": 0.1, "warm_up": 0.34, "held_out": 0}


@pytest.mark.parametrize(("loss", "micro"), [("ce", 1), ("ce", 8), ("kl", 2), ("mixed", 2), ("mixed", 8)])
def test_three_steps_are_those_of_a_plain_loop_over_documents(
    loss: str, micro: int, models: Models, tmp_path: Path
) -> None:
    """A document is a sequence of its own there; so nothing reaches from one to the next here."""
    settings, of = LOSSES[loss]
    stage = spec(models.text, **HOW, micro_batch=micro, **settings)
    train(models.small, tmp_path / "out", stage, base=models.base)
    batches = mixture(stage, models, tmp_path / "work")
    losses, wanted = plain_loop(models.small, models.base, batches, 3, of, rate=5e-4, warm_up=0.34, decay=0.1)
    assert [line["loss"] for line in log_of(tmp_path / "out")] == pytest.approx(losses, rel=1e-6)
    assert_arrived(tmp_path / "out" / "checkpoint", wanted, models.small)


def test_the_temperature_is_applied(models: Models, tmp_path: Path) -> None:
    first = []
    for number, temperature in enumerate((1.0, 4.0)):
        stage = spec(models.text, kind="distill", temperature=temperature, steps=1)
        train(models.small, tmp_path / str(number) / "out", stage, base=models.base)
        first.append(log_of(tmp_path / str(number) / "out")[0]["held_out"])
    assert first[1] < 0.9 * 16 * first[0] and first[1] != pytest.approx(first[0], rel=1e-3)


def test_how_a_batch_is_split_changes_nothing(models: Models, tmp_path: Path) -> None:
    found: list[Tensors] = []
    for micro in (1, 2, 8):
        output = tmp_path / str(micro) / "out"
        stage = spec(models.text, **HOW | {"batch_size": 8}, micro_batch=micro, loss="kl")
        train(models.small, output, stage, base=models.base)
        found.append(weights(output / "checkpoint"))
    assert apart(found[1], found[0]) < 1e-6 and apart(found[2], found[0]) < 1e-6


def test_layers_that_are_computed_again_change_nothing(models: Models, tmp_path: Path) -> None:
    found: list[Tensors] = []
    for again in (False, True):
        output = tmp_path / str(again) / "out"
        stage = spec(models.text, **HOW, checkpoint_activations=again, **CASES["hidden"])
        train(models.small, output, stage, base=models.base)
        found.append(weights(output / "checkpoint"))
    assert apart(*found) < 1e-6


TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def test_only_what_the_assistant_says_is_learned_also_where_a_sequence_has_none_of_it(
    models: Models, tmp_path: Path
) -> None:
    """Micro-batches then have all numbers of rows, none included, and each token weighs the same."""
    folder = tmp_path / "model"
    shutil.copytree(models.small.folder, folder)
    config = json.loads((folder / "tokenizer_config.json").read_text()) | {"chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    said = [" ".join(["the red fox ran"] * (1 if n % 4 else 12)) for n in range(60)]
    rows = [
        {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "a dog saw the old house"}]}
        for text in said
    ]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    parent = Checkpoint(folder)
    stage = spec(tmp_path / "chats.jsonl", **HOW, assistant_only=True, micro_batch=1)
    train(parent, tmp_path / "out", stage, base=models.base)
    batches = mixture(stage, models, tmp_path / "work", parent)
    counts = [int(batches.batch(step).scored[:, 1:].sum(1).min()) for step in range(3)]
    assert 0 in counts  # a sequence of these has nothing to learn
    losses, wanted = plain_loop(parent, models.base, batches, 3, Weights(ce=1.0), rate=5e-4, warm_up=0.34, decay=0.1)
    lines = log_of(tmp_path / "out")
    assert [line["loss"] for line in lines] == pytest.approx(losses, rel=1e-6)
    assert [line["scored"] for line in lines] == [int(batches.batch(step).scored[:, 1:].sum()) for step in range(3)]
    assert_arrived(tmp_path / "out" / "checkpoint", wanted, parent)


@pytest.mark.parametrize("padded", ["student", "teacher"])
def test_vocabularies_of_another_padding_are_compared_over_their_common_part(
    padded: str, models: Models, tmp_path: Path
) -> None:
    wide = Checkpoint(make_model(tmp_path / "wide", dtype=torch.float32, vocab_size=4096 + 64, num_hidden_layers=1))
    parent, teacher = (wide, models.base) if padded == "student" else (models.base, wide)
    stage = spec(models.text, **HOW, loss="kl")
    train(parent, tmp_path / "out", stage, base=teacher)
    batches = mixture(stage, models, tmp_path / "work", models.base)
    losses, wanted = plain_loop(
        parent, teacher, batches, 3, Weights(kl=1.0), rate=5e-4, warm_up=0.34, decay=0.1, vocabulary=4096
    )
    assert [line["loss"] for line in log_of(tmp_path / "out")] == pytest.approx(losses, rel=1e-6)
    assert_arrived(tmp_path / "out" / "checkpoint", wanted, parent)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "phi3"])
def test_a_document_does_not_see_the_one_in_front_of_it(family: str, tmp_path: Path) -> None:
    extra: dict[str, Any] = {"sliding_window": 8, "query_pre_attn_scalar": 16} if family == "gemma2" else {}
    model = load_stock(make_model(tmp_path / "model", family, torch.float32, **extra), torch.float32)
    tokens = random_tokens(2, 24)
    tokens[1, 10:] = tokens[0, 10:]
    positions = torch.cat([torch.arange(10), torch.arange(14)]).expand(2, -1)
    rows = torch.arange(48)
    inputs = Inputs(tokens, positions, rows, rows, boundaries(positions))
    packed: States = states_of(model, model.model.layers, inputs, [0])
    alone = model.model(tokens[:1, 10:]).last_hidden_state[0]
    for state in (packed.last, packed.behind[0]):
        one, two = state.unflatten(0, (2, 24))
        assert torch.equal(one[10:], two[10:]) and not torch.allclose(one[:10], two[:10])
    assert torch.allclose(packed.last[10:24], alone, rtol=0, atol=1e-5 * float(alone.abs().max()))


# The teacher


@pytest.mark.parametrize("again", [False, True])
def test_the_teacher_is_asked_once_for_each_forward_pass_and_stays_as_it_is(
    again: bool, models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[OnlineTeacher, int]] = []
    forward = OnlineTeacher.forward

    def counted(self: OnlineTeacher, inputs: Inputs | None, *rest: Any, **more: Any) -> States | None:
        if inputs is not None:
            asked.append((self, len(inputs.tokens)))
        return forward(self, inputs, *rest, **more)

    monkeypatch.setattr(OnlineTeacher, "forward", counted)
    stage = spec(models.text, loss="kl", micro_batch=2, checkpoint_activations=again, evaluate_every=8)
    train(models.small, tmp_path / "out", stage, base=models.base)
    assert [count for _, count in asked] == [2, 1] + [2] * 16 + [2, 1]  # measured, trained, measured
    (teacher,) = {id(each): each for each, _ in asked}.values()
    stored = weights(models.base.folder)
    for name, parameter in teacher.model.named_parameters():
        assert not parameter.requires_grad and parameter.grad is None
        assert (parameter.dtype, parameter.device.type) == (torch.float32, "cpu")
        assert torch.equal(parameter, stored[name]), name


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # torch, of what it looks at itself
def test_compiled_layers_stay_so_in_one_stage_behind_another(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where torch has to compile for more kinds of inputs than it takes, it gives up and only warns of it."""
    import torch._dynamo.config as config
    from torch._dynamo.utils import counters

    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *args, **rest: compiled(*args, backend="aot_eager", **rest))
    monkeypatch.setattr(config, "fail_on_recompile_limit_hit", True)
    stage = spec(models.text, loss="kl", micro_batch=2, compile=True)
    for folder in ("one", "two", "three"):
        counters.clear()
        train(models.small, tmp_path / folder, stage, base=models.base)
        assert counters["stats"]["unique_graphs"] == 5  # teacher and measured student with 2 rows and 1, trained with 2
        assert not counters["unimplemented"] and not counters["graph_break"]
    plain = spec(models.text, loss="kl", micro_batch=2)
    train(models.small, tmp_path / "plain", plain, base=models.base)
    theirs = weights(tmp_path / "plain" / "checkpoint")
    for name, tensor in weights(tmp_path / "one" / "checkpoint").items():
        assert torch.allclose(tensor, theirs[name], atol=1e-5), name


def test_cached_targets_are_drawn_once_and_read_again_by_another_stage(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    forward = OnlineTeacher.forward

    def counted(self: OnlineTeacher, inputs: Inputs | None, *rest: Any, **more: Any) -> States | None:
        asked.append(0 if inputs is None else len(inputs.tokens))
        return forward(self, inputs, *rest, **more)

    monkeypatch.setattr(OnlineTeacher, "forward", counted)
    stage = spec(models.text, loss="kl", targets="cached")
    train(models.small, tmp_path / "one", stage, base=models.base)
    assert sum(asked) == 8 * 4 + 3
    train(models.small, tmp_path / "two", stage.model_copy(update={"learning_rate": 1e-3}), base=models.base)
    assert sum(asked) == 8 * 4 + 3


# What earlier stages made


def test_zeros_of_a_pattern_are_kept(models: Models, tmp_path: Path) -> None:
    parent = sparse(models.base, tmp_path / "pruned")
    record = train(parent, tmp_path / "out", spec(models.text), base=models.base)
    before, after = weights(parent.folder), weights(tmp_path / "out" / "checkpoint")
    halved = {name for name, tensor in before.items() if float((tensor == 0).double().mean()) == 0.5}
    assert len(halved) == trained(record).zeros_kept == 2 * 7
    for name in halved:
        assert torch.equal(before[name] == 0, after[name] == 0) and not torch.equal(before[name], after[name])


def test_a_head_that_is_tied_from_now_on_is_the_embeddings_and_is_stored_no_more(
    models: Models, tmp_path: Path
) -> None:
    assert not models.base.config["tie_word_embeddings"] and "lm_head.weight" in models.base.tensors
    tied = spec(models.text, kind="distill", shape={"num_hidden_layers": 1, "tie_word_embeddings": True})
    pruning, stage = parts(tied, models.base, Setting("stages.0", CalibrationSpec(source="text.txt")))
    assert isinstance(pruning, PruneStage) and pruning.shape == Shape(num_hidden_layers=1)
    record = train(models.base, tmp_path / "out", stage)  # type: ignore[arg-type]
    folder = tmp_path / "out" / "checkpoint"
    written = Checkpoint(folder)
    assert "lm_head.weight" not in written.tensors and written.config["tie_word_embeddings"] is True
    stock: Any = opens(folder, torch.float32)
    assert stock.lm_head.weight is stock.model.embed_tokens.weight
    assert trained(record).held_out[-1][1] < trained(record).held_out[0][1]
    with torch.no_grad():
        logits = stock(random_tokens(1, 24, 2)).logits[0]
    assert torch.equal(logits, read_part(tmp_path / "out" / PROBE)[0]["logits"])


def test_a_student_of_its_own_is_trained_and_keeps_its_own_files(
    models: Models, tiny_model: Path, tmp_path: Path
) -> None:
    student, output = tmp_path / "student", tmp_path / "out"
    shutil.copytree(tiny_model, student)
    (student / "chat_template.jinja").write_text("{{ messages }}")
    stage = f"{{kind: distill, student: {student}, losses: {{ce: 1}}, tokens: 512, batch_size: 4, held_out: 2"
    (tmp_path / "recipe.yaml").write_text(
        f"name: a\nmodel: {tiny_model}\noutput: {output}\nevaluate: false\n"
        f"stages:\n  - {stage}, data: {{source: {models.text}, sequence_length: 32}}}}\n"
    )
    for _ in range(2):  # the second time what the first one made is taken up
        result = invoke("run", tmp_path / "recipe.yaml")
        assert result.exit_code == 0, result.stderr
        assert (output / "chat_template.jinja").read_text() == "{{ messages }}"
    assert "distill: finished before" in result.stderr
    before, after = weights(student), weights(output)
    assert any(not torch.equal(before[name], after[name]) for name in before)


# Which weights are kept


def test_the_weights_of_the_best_measurement_are_written(models: Models, tmp_path: Path) -> None:
    """At a rate at which the loss soon climbs; measured again by stock transformers."""
    stage = spec(models.text, learning_rate=1.0, warm_up=0.0, clip=100.0, steps=6)
    record = trained(train(models.small, tmp_path / "out", stage))
    measured = dict(record.held_out)
    assert record.best_step is not None and measured[record.best_step] == min(measured.values())
    assert 0 < record.best_step < 6
    text = mixture(stage, models, tmp_path / "work")
    batch = text.read(text.held_out())
    model = load_stock(tmp_path / "out" / "checkpoint", torch.float64)
    found, count = torch.zeros((), dtype=torch.float64), 0
    for row, place in documents(batch):
        tokens: Tensor = batch.tokens[row, place]
        rows = batch.scored[row, place][1:].nonzero()[:, 0]
        logits = model(tokens[None]).logits[0, rows]
        found += torch.nn.functional.cross_entropy(logits, tokens[rows + 1], reduction="sum")
        count += len(rows)
    assert float(found) / count == pytest.approx(min(measured.values()), rel=1e-5)
