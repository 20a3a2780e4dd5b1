"""What reports show of training and of chains of stages: the record's own figures, nothing of what did not train."""

import copy
import html as entities
import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from compress.recipe.train import DistillStage, FinetuneStage
from compress.records import Report, Trained
from compress.report import figures
from compress.report.paths import without_folders
from compress.report.plots import chain_curve, loss_curve
from compress.report.write import write_model_card, write_report

HOSTILE = """<script>alert("x")</script> & | </td> {{ 7 * 7 }} ```\n# a $x_1$"""
COST = {"seconds": 240.0, "peak_memory_bytes": 1_300_000_000, "cached": False}
LOSSES = [[10, 2.5], [20, 1.7], [30, 1.1], [40, 0.9], [50, 1.0]]
HELD_OUT = [[0, 3.0], [20, 1.5], [40, 0.75], [50, 0.8]]


def _trained(**changes: Any) -> dict[str, Any]:
    return {
        "loss": "kl", "teacher": "base", "tokens": 20_000_000, "scored": 19_500_000, "steps": 50, "planned_steps": 610,
        "batch_size": 16, "sequence_length": 2048, "learning_rate": 3e-5, "optimizer": "adamw8bit",
        "trainable": 90_500_000, "texts": [
            {"name": "web", "licence": "ODC-BY-1.0", "tokens": 15_000_000, "passes": 1.0},
            {"name": "wiki", "licence": None, "tokens": 2_000_000, "passes": 2.5},
        ],
        "losses": LOSSES, "held_out": HELD_OUT, "best_step": 40, "tokens_per_second": 48_123.4, "mfu": 0.412,
        "cached_bytes_per_token": 131.2, "rolled_back": [12, 33], "stopped": "no better for 3 measurements",
        "zeros_kept": 1_250_000,
    } | changes  # fmt: skip


def _prune() -> dict[str, Any]:
    sizes = {"intermediate_size": 1536, "num_hidden_layers": 30}
    pruned = {
        "before": sizes, "after": sizes | {"intermediate_size": 1024}, "parameters_before": 134_515_008,
        "parameters": 106_012_800, "share": 0.212, "share_of_layers": 0.27,
    }  # fmt: skip
    figures = {"parameters": 106_012_800, "bytes": 212_025_600, "perplexity": 74.314, "kl": 1.4123}
    return {"kind": "prune", "spec": {"kind": "prune", "axes": ["ffn"]}, "pruned": pruned, **figures, **COST}


def _heal() -> dict[str, Any]:
    data = [{"source": "/home/jo/secret/web.jsonl.gz", "licence": "ODC-BY-1.0"}, "wiki"]
    spec = FinetuneStage.model_validate({"kind": "finetune", "loss": "kl", "tokens": "20M", "data": data})
    figures = {"parameters": 106_012_800, "bytes": 212_025_600, "perplexity": 26.804, "kl": 0.23121, "seconds": 1912}
    return {"kind": "finetune", "spec": spec.model_dump(mode="json"), "trained": _trained(), **COST, **figures}


def _distill(**spec: Any) -> dict[str, Any]:
    spec = {"kind": "distill", "losses": {"kl": 1.0, "ce": 0.1}, "tokens": "1B"} | spec
    trained = _trained(loss="kl + 0.1 ce", teacher="/srv/models/big", tokens=98_300_000)
    figures = {"parameters": 95_012_000, "bytes": 190_024_000, "perplexity": 24.91, "kl": 0.17912, "seconds": 9912}
    dumped = DistillStage.model_validate(spec).model_dump(mode="json")
    return {"kind": "distill", "spec": dumped, "trained": trained, **COST, **figures}


def _quantize() -> dict[str, Any]:
    matrix = {"name": "model.layers.0.mlp.up_proj", "shape": [8, 8], "bits": 4, "group_size": 8, "symmetric": True}
    return {
        "kind": "quantize", "spec": {"kind": "quantize", "method": "gptq", "bits": 4}, **COST, "seconds": 71,
        "layers": [{"layer": 0, "seconds": 1.0, "modules": [matrix]}], "format": "compressed-tensors",
        "parameters": 95_012_000, "bytes": 70_004_000, "perplexity": 26.12, "kl": 0.21041,
    }  # fmt: skip


def _record(*stages: dict[str, Any]) -> dict[str, Any]:
    chain = list(stages) or [_prune(), _heal(), _distill(), _quantize()]
    return {
        "name": "tiny", "created": "2026-03-04T05:06:07+00:00", "seconds": 9000.0, "stages": chain,
        "recipe": {"name": "tiny", "model": "owner/tiny", "stages": [stage["spec"] for stage in chain]},
        "base": {"model": "owner/tiny", "bytes": 269_030_016, "parameters": 134_515_008},
        "compressed": {"path": "out/tiny", "bytes": 70_004_000, "parameters": 95_012_000, "bits_per_weight": 5.9},
        "size_ratio": 3.843, "verified": None, "versions": {},
        "quality": {
            "perplexity": {
                "base": 21.913, "compressed": 26.12, "dataset": "wikitext2", "sequence_length": 512, "tokens": 2044,
            },
            "kl": {"mean": 0.21041, "ci95": None, "p99": 0.7}, "top1_agreement": {"mean": 0.8, "ci95": None},
        },
    }  # fmt: skip


def _written(record: dict[str, Any], folder: Path) -> tuple[str, str, str]:
    report = Report.model_validate(record)
    write_report(report, folder)
    write_model_card(report, folder)
    html, md, card = ((folder / name).read_text(encoding="utf-8") for name in ("report.html", "report.md", "README.md"))
    return html, md, card


def _rows(html: str, md: str) -> list[list[list[str]]]:
    """The cells of all table rows: of the page, and of the Markdown."""
    cells = [
        re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.DOTALL) for row in re.findall(r"<tr.*?</tr>", html, re.DOTALL)
    ]
    page = [[entities.unescape(re.sub(r"<[^>]+>", "", cell)).strip() for cell in row] for row in cells]
    lines = [line for line in md.splitlines() if line.startswith("|")]
    return [page, [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]]


def _points(svg: str, gid: str) -> list[tuple[float, float]]:
    """Where a line of a picture, or else its markers, are drawn."""
    group = next(each for each in ElementTree.fromstring(svg).iter("g") if (each.get("id") or "").endswith(f"-{gid}"))
    path = group.find("path")
    if path is not None:
        return [(float(x), float(y)) for x, y in re.findall(r"[ML] ([\d.-]+) ([\d.-]+)", path.get("d", ""))]
    return [(float(use.get("x", "")), float(use.get("y", ""))) for use in group.iter("use")]


def _assert_drawn(pairs: Any, points: list[tuple[float, float]], log: bool = False) -> None:
    """Both coordinates of the picture are a line's worth (a x + b) of the figures."""
    figures, drawn = np.array(pairs, dtype=float), np.array(points)
    assert figures.shape == drawn.shape
    if log:
        figures[:, 1] = np.log(figures[:, 1])
    for axis, sign in ((0, 1), (1, -1)):  # down is up
        a, b = np.polyfit(figures[:, axis], drawn[:, axis], 1)
        assert a * sign > 0
        np.testing.assert_allclose(a * figures[:, axis] + b, drawn[:, axis], atol=1e-3)


def test_the_chain_has_a_row_for_the_base_and_for_every_stage(tmp_path: Path) -> None:
    html, md, _ = _written(_record(), tmp_path)
    expected = [
        ["0", "base: owner/tiny", "135M", "269 MB", "21.91", "0", "–", "–"],
        ["1", "prune ffn", "106M", "212 MB", "74.31", "1.41", "–", "4 min 00 s"],
        ["2", "heal (kl)", "106M", "212 MB", "26.80", "0.231", "20.0M", "31 min 52 s"],
        ["3", "distill (kl + 0.1 ce)", "95.0M", "190 MB", "24.91", "0.179", "98.3M", "2 h 45 min"],
        ["4", "quantize gptq 4-bit", "95.0M", "70.0 MB", "26.12", "0.21", "–", "1 min 11 s"],
    ]
    for rows in _rows(html, md):
        start = rows.index(expected[0])
        assert rows[start : start + 5] == expected


def test_what_the_last_stage_leaves_out_is_the_reports_own_and_other_gaps_are_dashes(tmp_path: Path) -> None:
    record = _record()
    for stage in record["stages"]:
        stage |= dict.fromkeys(("parameters", "bytes", "perplexity", "kl"))
    html, md, _ = _written(record, tmp_path)
    for rows in _rows(html, md):
        assert ["2", "heal (kl)", "–", "–", "–", "–", "20.0M", "31 min 52 s"] in rows
        assert ["4", "quantize gptq 4-bit", "95.0M", "70.0 MB", "26.12", "0.21", "–", "1 min 11 s"] in rows
    record["quality"] = None
    for rows in _rows(*_written(record, tmp_path)[:2]):
        assert ["0", "base: owner/tiny", "135M", "269 MB", "–", "–", "–", "–"] in rows


def test_nothing_is_shown_of_training_where_no_stage_trained_nor_of_a_chain_of_one(tmp_path: Path) -> None:
    html, md, card = _written(_record(_prune(), _quantize()), tmp_path)
    for content in (html, md):
        assert "Stage by stage" in content and "What was trained" not in content
    assert "Trained on" not in card and "texts" not in card and "healed" not in card
    html, md, _ = _written(_record(_quantize()), tmp_path)
    for content in (html, md):
        assert "Stage by stage" not in content and "What was trained" not in content


def test_a_chain_of_an_older_version_is_shown_without_the_new_figures(tmp_path: Path) -> None:
    record = _record(_prune(), _quantize())
    for stage in record["stages"]:
        for new in ("parameters", "bytes", "perplexity", "kl"):
            del stage[new]
    older = Report.model_validate_json(json.dumps(record))
    assert older.stages[0].trained is None and older.stages[0].kl is None
    html, md, _ = _written(record, tmp_path)
    for rows in _rows(html, md):
        assert ["1", "prune ffn", "–", "–", "–", "–", "–", "4 min 00 s"] in rows
    assert chain_curve(older) is None


def test_a_section_states_every_figure_of_what_was_trained(tmp_path: Path) -> None:
    html, md, _ = _written(_record(_heal()), tmp_path)
    expected = [
        ["Loss", "kl"], ["Teacher", "the base model"], ["Tokens", "20.0M, 19.5M of them scored (97.5 %)"],
        ["Steps", "50 of 610 planned"], ["Stopped early", "no better for 3 measurements"],
        ["Batch", "16 sequences of 2,048 tokens (32.8K tokens)"], ["Learning rate", "3e-05 at its peak"],
        ["Optimizer", "adamw8bit"], ["Trainable parameters", "90.5M"],
        ["Weights kept", "those of step 40, the best on held-out text"],
        ["Rolled back", "2 times, at steps 12 and 33"], ["Zeros kept", "1.25M"], ["Speed", "48,123 tokens/s"],
        ["Arithmetic used (MFU)", "41.2 % of the device's peak"], ["Cached predictions", "131 bytes per token"],
        ["web", "ODC-BY-1.0", "15.0M", "1", "15.0M"], ["wiki", "–", "2.00M", "2.5", "5.00M"],
    ]  # fmt: skip
    for rows in _rows(html, md):
        assert [row for row in rows if row in expected] == expected
    outcome = "90.5M parameters were trained on 20.0M tokens; the loss on held-out text went from 3 to 0.75 (-75.0 %)."
    for content in (html, md):
        assert outcome in content and "<h2>What was trained</h2>" in html and "## What was trained\n" in md


def test_what_was_not_measured_has_no_row(tmp_path: Path) -> None:
    stage = _heal()
    absent = {"teacher": None, "stopped": None, "tokens_per_second": None, "mfu": None, "cached_bytes_per_token": None}
    nothing = {"rolled_back": [], "zeros_kept": 0, "held_out": [], "best_step": None, "losses": []}
    stage["trained"] |= absent | nothing
    html, md, _ = _written(_record(stage), tmp_path)
    for rows in _rows(html, md):
        labels = [row[0] for row in rows if row]
        gone = {"Teacher", "Stopped early", "Speed", "Arithmetic used (MFU)", "Cached predictions", "Rolled back"}
        assert not {*gone, "Zeros kept"} & set(labels)
        assert ["Weights kept", "those of step 50"] in rows
    assert "over the steps" not in html and "None" not in md


@pytest.mark.parametrize(
    ("passes", "noted", "cautioned"), [(0.4, False, False), (1.0, False, False), (3.9, True, False), (4.5, True, True)]
)
def test_repeated_text_is_said_and_too_much_of_it_cautioned(
    passes: float, noted: bool, cautioned: bool, tmp_path: Path
) -> None:
    stage = _heal()
    stage["trained"]["texts"] = [{"name": "wiki", "tokens": 1_000_000, "passes": passes}]
    for content in _written(_record(stage), tmp_path)[:2]:
        assert (f"wiki was gone through {passes} times. Up to 4 passes cost little" in content) == noted
        assert ("More than 4 passes over wiki hurt" in content) == cautioned


def test_training_that_made_nothing_better_is_said(tmp_path: Path) -> None:
    stage = _heal()
    stage["trained"]["best_step"] = 0
    for content in _written(_record(stage), tmp_path)[:2]:
        assert "and nothing came of it." in content and "No step was better on held-out text" in content


def test_hostile_text_of_training_stays_text(tmp_path: Path) -> None:
    record = _record()
    text = {"name": HOSTILE, "licence": HOSTILE, "tokens": 10, "passes": 9.0}
    free = {"loss": HOSTILE, "teacher": HOSTILE, "optimizer": HOSTILE, "stopped": HOSTILE, "texts": [text]}
    record["stages"][1]["trained"] |= free
    record["stages"][2]["spec"]["losses"] = {HOSTILE: HOSTILE}
    record["base"]["model"] = HOSTILE
    record["recipe"] = {}
    html, md, card = _written(record, tmp_path)
    assert "<script" not in html and html.count("{{ 7 * 7 }}") >= 10
    for content in (md, card):
        assert "<script" not in content.replace("\\<script", "") and content.count("{{ 7 \\* 7 }}") >= 2
    page, markdown = _rows(html, md)
    for rows in (page, markdown):  # no cell became two
        assert {len(row) for row in rows if row[0] in ("Loss", "Teacher", "Optimizer", "Stopped early")} == {2}
        start = next(index for index, row in enumerate(rows) if row[:1] == ["0"] and row[1].startswith("base: "))
        assert [len(row) for row in rows[start : start + 5]] == [8] * 5


def test_the_loss_curves_have_the_points_of_the_record() -> None:
    svg = loss_curve(Trained.model_validate(_trained()), 2)
    assert svg is not None
    training, held_out = _points(svg, "training"), _points(svg, "held-out")
    _assert_drawn(LOSSES + HELD_OUT, training + held_out)
    assert _points(svg, "best") == [pytest.approx(held_out[2])]
    scale = np.polyfit([step for step, _ in LOSSES], [x for x, _ in training], 1)
    lines = [_points(svg, f"rolled-back-{index}")[0][0] for index in (0, 1)]
    assert lines == pytest.approx([np.polyval(scale, 12), np.polyval(scale, 33)], abs=1e-3)
    assert "step (400K tokens each, 20.0M in all)" in svg and "best, step 40" in svg


def test_a_loss_that_falls_far_is_drawn_on_a_log_scale() -> None:
    held_out = [(0, 4.0), (20, 0.5), (40, 0.1)]
    svg = loss_curve(Trained.model_validate(_trained(losses=[], held_out=held_out)), 1)
    assert svg is not None
    _assert_drawn(held_out, _points(svg, "held-out"), log=True)


@pytest.mark.parametrize("pairs", [{"losses": [], "held_out": []}, {"losses": [(5, 1.0)], "held_out": [(0, 1.0)]}])
def test_fewer_than_two_losses_make_no_picture(pairs: dict[str, Any]) -> None:
    assert loss_curve(Trained.model_validate(_trained(**pairs)), 1) is None


def test_the_curve_of_the_chain_has_the_base_and_every_stage() -> None:
    svg = chain_curve(Report.model_validate(_record()))
    assert svg is not None
    stages = [(stage["parameters"], stage["kl"]) for stage in _record()["stages"]]
    _assert_drawn([(134_515_008, 0.0), *stages], _points(svg, "way"))
    assert all(f">{verb}</text>" in svg for verb in ("base", "prune", "heal", "distill", "quantize"))


def test_there_is_no_curve_of_the_chain_without_two_figures_or_with_one_size() -> None:
    record = _record(_prune(), _heal())
    record["quality"], record["stages"][1]["kl"] = None, None
    assert chain_curve(Report.model_validate(record)) is None
    record = _record(_heal(), _heal())
    record["base"]["parameters"] = record["stages"][0]["parameters"]
    assert chain_curve(Report.model_validate(record)) is None


def test_every_picture_of_a_chain_is_valid_with_ids_and_colours_of_its_own(tmp_path: Path) -> None:
    html, _, _ = _written(_record(), tmp_path)
    pictures = re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL)
    assert len(pictures) == 3
    ids = [each.get("id") for svg in pictures for each in ElementTree.fromstring(svg).iter() if each.get("id")]
    assert len(ids) == len(set(ids))
    assert re.findall(r"#[0-9a-f]{6}\b", "".join(pictures)) == []


@pytest.mark.parametrize(
    ("stages", "words", "tags", "relation"),
    [
        ([_heal()], "A finetuned version of", ["finetuned"], "finetune"),
        ([_prune(), _heal()], "A pruned and healed version of", ["pruned", "healed"], "finetune"),
        ([_prune() | {"trained": _trained()}], "A pruned and healed version of", ["pruned", "healed"], "finetune"),
        ([_prune(), _heal(), _prune(), _heal()], "A pruned and healed version of", ["pruned", "healed"], "finetune"),
        ([_distill()], "A distilled version of", ["distilled"], "finetune"),
        ([_distill(), _quantize()], "A 4-bit GPTQ quantization of a distilled version of",
         ["gptq", "distilled", "4-bit"], "quantized"),
        ([_prune(), _heal(), _distill(), _quantize()],
         "A 4-bit GPTQ quantization of a pruned, healed and distilled version of",
         ["gptq", "pruned", "healed", "distilled", "4-bit"], "quantized"),
    ],
)  # fmt: skip
def test_the_card_says_what_training_made_of_the_base(
    stages: list[dict[str, Any]], words: str, tags: list[str], relation: str, tmp_path: Path
) -> None:
    card = _written(_record(*stages), tmp_path)[2]
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["tags"] == ["dscompress", *tags] and words + " [owner/tiny]" in card
    assert (front["base_model"], front["base_model_relation"]) == ("owner/tiny", relation)
    assert ("quantized_by" in front) == (relation == "quantized")


def test_the_card_names_the_texts_with_their_licences_and_no_folders(tmp_path: Path) -> None:
    record = _record()
    record["stages"][2]["trained"]["texts"] = [
        {"name": "web", "licence": "ODC-BY-1.0", "tokens": 1_000_000, "passes": 3.0},
        {"name": "/home/jo/secret/notes.jsonl", "licence": None, "tokens": 500, "passes": 1.0},
    ]
    _, _, card = _written(record, tmp_path)
    lines = ["- web: 18.0M tokens, licence ODC-BY-1.0", "- wiki: 5.00M tokens, licence not stated"]
    assert "\n".join([*lines, "- notes.jsonl: 500 tokens, licence not stated"]) in card
    assert "teacher: big:" in card and "what the licences of the texts and of the teacher ask for" in card
    assert "secret" not in card and "/srv" not in card and "source: web.jsonl.gz" in card


def test_the_card_of_another_student_names_that_as_the_base(tmp_path: Path) -> None:
    card = _written(_record(_distill(student="someone/small")), tmp_path)[2]
    assert yaml.safe_load(card.split("---\n")[1])["base_model"] == "someone/small"
    assert "A distilled version of [someone/small](https://huggingface.co/someone/small)" in card


def test_settings_of_stages_that_train_are_shown_without_folders_and_unused_losses(tmp_path: Path) -> None:
    for content in _written(_record(), tmp_path)[:2]:
        assert "data (source web.jsonl.gz, licence ODC-BY-1.0, seed 0, split train, weight 1.0) and wiki" in content
        assert "tokens 1,000,000,000" in content and "losses (kl 1.0, ce 0.1)" in content


def test_a_shape_of_a_distill_stage_is_shown_as_pruning(tmp_path: Path) -> None:
    stage = _distill(shape={"intermediate_size": 1024}) | {"pruned": _prune()["pruned"]}
    html, md, card = _written(_record(stage, _quantize()), tmp_path)
    for rows in _rows(html, md):
        assert "prune ffn, distill (kl + 0.1 ce)" in [row[1] for row in rows if row[0] == "1"]
        assert ["intermediate_size", "1536", "1024"] in rows
    assert "of a pruned and distilled version of" in card


def test_sections_of_several_stages_say_which(tmp_path: Path) -> None:
    for content in _written(_record(_prune(), _heal(), _prune(), _heal()), tmp_path)[:2]:
        titles = re.findall(r"What was (?:pruned|trained): stage \d(?:, heal \(kl\))?", content)
        assert titles == [
            "What was pruned: stage 1", "What was pruned: stage 3",
            "What was trained: stage 2, heal (kl)", "What was trained: stage 4, heal (kl)",
        ]  # fmt: skip


def test_lora_is_said(tmp_path: Path) -> None:
    stage = copy.deepcopy(_heal())
    stage["spec"] |= {"lora": {"rank": 16, "alpha": None, "targets": None}}
    for content in _written(_record(_prune(), stage), tmp_path)[:2]:
        assert "heal (kl, LoRA of rank 16)" in content


def test_a_model_that_kept_its_size_is_not_called_smaller() -> None:
    record = _record(_heal()) | {"size_ratio": 1.0000003}
    report = Report.model_validate(record)
    assert figures.ratio(report) == "unchanged"
    assert figures.verdict(report).startswith("The checkpoint is as large as its base (70.0 MB);")


NAMES = st.text("abcXYZ019_-", min_size=1, max_size=8)
PATHS = st.builds("{}{}/{}.jsonl".format, st.sampled_from(["/", "./", "~/", "../", ""]), NAMES, NAMES)


@given(st.lists(PATHS, min_size=1), NAMES, NAMES)
def test_paths_are_cut_to_their_names_wherever_they_are(paths: list[str], owner: str, name: str) -> None:
    hub, site = f"{owner}/{name}", f"https://{owner}/{name}.txt"
    spec = {"data": [{"source": path, "weight": 1.0} for path in paths], "prompts": paths, "more": [paths, hub, site]}
    last = [path.rpartition("/")[2] for path in paths]
    sources = [{"source": each, "weight": 1.0} for each in last]
    assert without_folders(spec) == {"data": sources, "prompts": paths, "more": [last, hub, site]}


def test_a_folder_that_reads_like_a_hub_id_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "corpora" / "mine").mkdir(parents=True)
    assert without_folders({"source": "corpora/mine"}) == {"source": "mine"}
    assert without_folders("a" * 300 + "/" + "b" * 300) == "a" * 300 + "/" + "b" * 300
