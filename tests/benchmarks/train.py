"""What training a small model gives, by ways of doing it, and how fast a large one trains.

    python tests/benchmarks/train.py heal MODEL CALIBRATION[:FIELD] --text FILE .. [--tokens 20M] [--tasks FOLDER]
    python tests/benchmarks/train.py distill MODEL CALIBRATION[:FIELD] --text FILE .. [--tokens 20M]
    python tests/benchmarks/train.py size [--steps 6] [--micro-batch 8]
    torchrun --nproc-per-node 2 tests/benchmarks/train.py size

`heal` prunes the MLPs of a folder or GGUF file and trains what is left, beside controls: the unpruned model trained on
the same tokens, cross-entropy instead of KL, healing of what was cut and not solved. `distill` makes a student of half
the parameters outside the embeddings: by cross-entropy, forward KL from the teacher online, from its cached draws, from
its most likely tokens at as many bytes, and from random weights. All rows of a table train on the same tokens in the
same order; each result is compared with the original on WikiText-2's test text (and C4's validation text), and on tasks
where there is a folder with their rows: the answer with the highest log-likelihood for each of its bytes.

`size` takes random weights of Llama-3.1-8B's shape, and of a student of 1.3B parameters, on random text.
"""

import argparse
import gzip
import json
import shutil
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from large_model import Shape, write_model
from prune import note, prune, table

from compress.data.calibration import load_calibration, load_windows
from compress.errors import ModelError
from compress.evaluation.compare import compare
from compress.evaluation.verify import probe_tokens
from compress.formats.dequantized import DequantizedCheckpoint
from compress.loop.context import Context
from compress.model.checkpoint import Checkpoint
from compress.model.source import resolve_model
from compress.model.tokenizer import load_tokenizer
from compress.recipe.text import CalibrationSpec
from compress.recipe.train import DistillStage, FinetuneStage, TrainStage
from compress.recipe.types import parse_count
from compress.stages.contract import Result, Setting
from compress.stages.training import teachers
from compress.stages.training.plan import plan
from compress.stages.training.run import run
from compress.system import distributed
from compress.system.compute import pick_device, pick_dtype
from compress.system.progress import Reporter
from compress.train.losses.inputs import Sampled
from compress.train.trainee import Taught


class Bench:
    """A model, its texts, and where things lie."""

    def __init__(self, options: argparse.Namespace, work: Path) -> None:
        self.options, self.work = options, work
        self.device = pick_device(options.device)
        self.model = resolve_model(options.model, None, work, note)
        self.tokenizer, self.base = load_tokenizer(self.model, False), Checkpoint(self.model)
        file, _, field = options.calibration.partition(":")
        self.text = CalibrationSpec(
            source=str(Path(file).resolve()), field=field or None, samples=options.samples,
            sequence_length=options.length,
        )  # fmt: skip
        tokens = load_calibration(self.text, self.tokenizer)
        probe = probe_tokens(self.model, False)[None]
        reporter = Reporter(quiet=not options.verbose)
        self.context = Context(
            self.device, pick_dtype(self.device, torch.bfloat16), tokens, probe, reporter, False, base=self.base,
            work=work,
        )  # fmt: skip
        sources = {"WikiText-2": "wikitext2"} | ({"C4": str(options.c4.resolve())} if options.c4 else {})
        self.windows = {
            name: load_windows(source, self.tokenizer, sequence_length=options.length, windows=options.windows)
            for name, source in sources.items()
        }
        self.tasks = read_tasks(options.tasks) if options.tasks else {}

    def data(self) -> list[dict[str, Any]]:
        """The texts to train on, as a recipe has them."""
        found = []
        for each in self.options.text:
            file, _, weight = each.partition("=")
            found.append(
                {
                    "source": str(Path(file).resolve()),
                    "sequence_length": self.options.length,
                    "weight": float(weight or 1),
                }
            )
        return found

    def train(self, parent: Path, output: Path, kind: type[TrainStage] = FinetuneStage, **settings: Any) -> Path:
        """Train by the stage; returns the checkpoint's folder."""
        options = self.options
        common = {"tokens": options.tokens, "data": self.data(), "batch_size": options.batch, "held_out": 16}
        common["compile"] = options.compile
        name = "finetune" if kind is FinetuneStage else "distill"
        if options.rate:
            common["learning_rate"] = options.rate
        spec = kind.model_validate({"kind": name} | common | settings)
        planned = plan(spec, Checkpoint(parent), Setting("stages.0", self.text, (), self.base))
        if planned.problems:
            raise ModelError("; ".join(planned.problems))
        result: Result = run(planned.spec or spec, Checkpoint(parent), output, self.context)  # type: ignore[arg-type]
        trained = result.record.trained
        assert trained is not None
        curve = ", ".join(f"{step}: {loss:.4f}" for step, loss in trained.held_out)
        note(f"  held out {curve}; {trained.tokens_per_second:,.0f} tokens/s, MFU {trained.mfu}")
        if trained.cached_bytes_per_token:
            note(f"  {trained.cached_bytes_per_token:.1f} bytes a token")
        return output / "checkpoint"

    def row(self, name: str, folder: Path, seconds: float) -> list[str]:
        """Figures of a result."""
        result = Checkpoint(folder)
        figures = []
        for windows in self.windows.values():
            one, other = DequantizedCheckpoint(self.base), DequantizedCheckpoint(result)
            found = compare(one, other, windows, self.context, self.work / "hidden", "base")
            figures += [f"{found['kl']['mean']:.4f}", f"{found['perplexity']['compressed']:.2f}"]
        scores = score_tasks(folder, self.tokenizer, self.tasks, self.context)
        figures += [f"{100 * share:.1f}" for share in scores.values()]
        parameters = sum(torch.Size(info.shape).numel() for info in result.tensors.values())
        row = [name, f"{parameters / 1e6:.1f}M", *figures, f"{seconds:.0f}"]
        note(" | ".join(row))
        return row

    def print(self, rows: Sequence[Sequence[str]]) -> None:
        """The table."""
        said = ", ".join(f"{each.sequences} windows of {name}" for name, each in self.windows.items())
        options = self.options
        print(f"\n{Path(options.model).name}, {self.device}, {options.tokens:,} tokens of training; {said}\n")
        heads = [f"{name} {figure}" for name in self.windows for figure in ("KL", "perplexity")]
        table(["", "parameters", *heads, *self.tasks, "seconds"], rows)


def jobs_of(bench: Bench, jobs: dict[str, Callable[[Path], Path]]) -> None:
    """Do and measure each, and print the table."""
    rows = []
    for name, job in jobs.items():
        if bench.options.only and not any(each in name for each in bench.options.only.split(";")):
            continue
        output = bench.work / name.replace(" ", "-").replace(",", "").replace("/", "-")
        started = time.perf_counter()
        try:
            folder = job(output)
            rows.append(bench.row(name, folder, time.perf_counter() - started))
        except Exception as error:  # the other rows are wanted all the same
            traceback.print_exc()
            rows.append([name, f"failed: {error}"])
    bench.print(rows)


@contextmanager
def working(options: argparse.Namespace) -> Iterator[Path]:
    """The folder that was named, whose packed texts and scores are used again, or one for this run alone."""
    if options.work:
        options.work.mkdir(parents=True, exist_ok=True)
        yield options.work.resolve()
        return
    with tempfile.TemporaryDirectory() as scratch:
        yield Path(scratch)


def heal(options: argparse.Namespace) -> None:
    """Part one."""
    with working(options) as work:
        bench = Bench(options, work)
        context = replace(bench.context, shared=bench.work / "scores")
        shape = {"shape": {"intermediate_size": options.ffn}}
        thorough = {"importance": "greedy", "reconstruct": "submodule"} if options.reconstruct else {}
        solved = partial(prune, shape | thorough, bench.text, context, bench.base)
        cut = partial(prune, shape | {"compensate": False}, bench.text, context, bench.base)
        folders = {"solved": bench.work / "solved-parent", "cut": bench.work / "cut-parent"}
        more = {"target": {"sparsity": options.more, "of": options.of}, "axes": ["ffn", "heads", "layers"]}
        jobs: dict[str, Callable[[Path], Path]] = {
            "base": lambda _: bench.model,
            f"ffn {options.ffn}, solved": lambda _: solved(folders["solved"]),
            "solved, healed by KL": lambda out: bench.train(folders["solved"] / "checkpoint", out, loss="kl"),
            "solved, healed by CE": lambda out: bench.train(folders["solved"] / "checkpoint", out, loss="ce"),
            "cut": lambda _: cut(folders["cut"]),
            "cut, healed by KL": lambda out: bench.train(folders["cut"] / "checkpoint", out, loss="kl"),
            "unpruned, trained by CE": lambda out: bench.train(bench.model, out, loss="ce"),
            f"{100 * options.more:.0f} %, solved": lambda out: prune(more, bench.text, context, bench.base, out),
            f"{100 * options.more:.0f} %, healed by KL": lambda out: bench.train(
                prune(more, bench.text, context, bench.base, out.with_name("more")), out, loss="kl"
            ),
        }
        jobs_of(bench, jobs)


def distill(options: argparse.Namespace) -> None:
    """Part two."""
    with working(options) as work:
        bench = Bench(options, work)
        context = replace(bench.context, shared=bench.work / "scores")
        target = {"target": {"sparsity": 0.5, "of": "layers"}, "axes": ["ffn", "heads", "layers"]}
        parent = bench.work / "student-parent"
        student = partial(bench.train, kind=DistillStage)
        kept = parent / "checkpoint"
        jobs: dict[str, Callable[[Path], Path]] = {
            "base": lambda _: bench.model,
            "pruned": lambda _: prune(target, bench.text, context, bench.base, parent),
            "cross-entropy": lambda out: student(kept, out, losses={"ce": 1.0}),
            "KL, online": lambda out: student(kept, out, losses={"kl": 1.0}),
            "KL, cached": lambda out: student(kept, out, losses={"kl": 1.0}, targets="cached", draws=options.draws),
            "KL, top-k": lambda out: _by_top(options.top, lambda: student(kept, out, losses={"kl": 1.0})),
            "KL, random weights": lambda out: student(_random(kept, out), out, losses={"kl": 1.0}),
        }
        jobs_of(bench, jobs)


def _random(like: Path, output: Path) -> Path:
    """A checkpoint of the same shape with transformers' own initial weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    folder = output.with_name("random-parent")
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(like), dtype=torch.bfloat16)
    model.save_pretrained(folder)
    for file in like.glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder


def _by_top(count: int, train: Callable[[], Path]) -> Path:
    """Train towards the teacher's most likely tokens alone, their probabilities scaled to sum to 1."""
    usual = teachers.online

    def online(*arguments: Any) -> Any:
        teach = usual(*arguments)

        def top(places: Any, inputs: Any) -> Taught:
            taught = teach(places, inputs)
            states, head = taught.states.last, taught.head
            parts = []
            for some in states.split(1024):
                values, ids = (some.float() @ head.weight.float().T).softmax(-1).topk(count)
                parts.append((ids, values / values.sum(-1, keepdim=True)))
            ids, shares = (torch.cat(column) for column in zip(*parts, strict=True))
            entropy = -torch.special.entr(shares).sum(-1).neg()
            return Taught(sampled=Sampled(ids, shares, entropy))

        return top

    teachers.online = online
    try:
        return train()
    finally:
        teachers.online = usual


def read_tasks(folder: Path) -> dict[str, list[tuple[str, list[str], int]]]:
    """Rows of (context, continuations, the right one) of three tasks, worded as lm-eval words them."""
    found: dict[str, list[tuple[str, list[str], int]]] = {}
    rows = [
        (f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}", row["endings"], int(row["label"]))
        for row in _rows(folder, "hellaswag_validation")
    ]
    found["HellaSwag"] = [(_clean(c), [f" {_clean(e)}" for e in choices], right) for c, choices, right in rows][:2000]
    found["ARC-easy"] = [
        (
            f"Question: {row['question']}\nAnswer:",
            [f" {choice}" for choice in row["choices"]["text"]],
            row["choices"]["label"].index(row["answerKey"]),
        )
        for row in _rows(folder, "arc_easy_test")
    ]
    found["PIQA"] = [
        (f"Question: {row['goal']}\nAnswer:", [f" {row['sol1']}", f" {row['sol2']}"], int(row["label"]))
        for row in _rows(folder, "piqa_validation")
    ]
    return found


def _rows(folder: Path, name: str) -> Iterator[dict[str, Any]]:
    with gzip.open(folder / f"{name}.jsonl.gz", "rt", encoding="utf-8") as file:
        yield from map(json.loads, file)


def _clean(text: str) -> str:
    import re

    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


@torch.no_grad()
def score_tasks(
    folder: Path, tokenizer: Any, tasks: dict[str, list[tuple[str, list[str], int]]], context: Context
) -> dict[str, float]:
    """Share of rows in which the right continuation is the likeliest for each of its bytes."""
    if not tasks:
        return {}
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=context.dtype).to(context.device).eval()
    shares = {}
    for name, rows in tasks.items():
        asked = [(c, choice) for c, choices, _ in rows for choice in choices]
        scores = dict(enumerate(_likelihoods(model, tokenizer, asked, context.device)))
        right, at = 0, 0
        for _, choices, label in rows:
            each = [scores[at + n] / len(choice.encode()) for n, choice in enumerate(choices)]
            right += max(range(len(each)), key=each.__getitem__) == label
            at += len(choices)
        shares[name] = right / len(rows)
    del model
    return shares


def _likelihoods(model: Any, tokenizer: Any, asked: Sequence[tuple[str, str]], device: torch.device) -> list[float]:
    """ln p(continuation | context), each."""
    encoded = []
    for number, (before, after) in enumerate(asked):
        front = tokenizer(before)["input_ids"]
        whole = tokenizer(before + after)["input_ids"]
        encoded.append((number, whole, len(front)))
    encoded.sort(key=lambda each: len(each[1]))
    found = [0.0] * len(asked)
    for first in range(0, len(encoded), 64):
        part = encoded[first : first + 64]
        longest = max(len(ids) for _, ids, _ in part)
        tokens = torch.zeros(len(part), longest, dtype=torch.int64)
        for row, (_, ids, _) in enumerate(part):
            tokens[row, : len(ids)] = torch.tensor(ids)
        logits = model(tokens.to(device), use_cache=False).logits
        log_p = torch.log_softmax(logits[:, :-1].float(), -1).gather(-1, tokens[:, 1:, None].to(device))[..., 0].cpu()
        for row, (number, ids, front) in enumerate(part):
            found[number] = float(log_p[row, front - 1 : len(ids) - 1].sum())
    return found


def size(options: argparse.Namespace) -> None:
    """Part three."""
    device = pick_device(distributed.join(options.device))
    leads, devices = distributed.rank() == 0, f"{distributed.world()} x {device.type}"
    large = Shape(
        options.layers, options.hidden, options.intermediate, options.heads, options.kv_heads, options.vocabulary, False
    )
    small = Shape(
        options.student_layers, options.student_hidden, options.student_intermediate, options.student_heads,
        options.student_kv_heads, options.vocabulary, True,
    )  # fmt: skip
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        work = distributed.first(lambda: Path(scratch))
        if leads:
            _write_size(work, {"teacher": large, "student": small}, options.length, device)
        distributed.barrier()
        teacher = Checkpoint(work / "teacher")
        probe = probe_tokens(work / "teacher", False)[None]
        reporter = Reporter(quiet=not options.verbose)
        context = Context(
            device, pick_dtype(device, torch.bfloat16), None, probe, reporter, False, base=teacher, work=work
        )
        text = CalibrationSpec(source=str(work / "text.jsonl"), sequence_length=options.length)
        for batch in options.batches:
            settings = {
                "kind": "distill", "tokens": options.steps * batch * options.length, "batch_size": batch, "held_out": 0,
                "compile": options.compile, "micro_batch": min(batch, options.micro_batch),
                "optimizer": options.optimizer,
                "data": {"source": str(work / "text.jsonl"), "sequence_length": options.length},
            }  # fmt: skip
            spec = DistillStage.model_validate(settings)
            student = Checkpoint(work / "student")
            planned = plan(spec, student, Setting("stages.0", text, (), teacher))
            if planned.problems:
                raise ModelError("; ".join(planned.problems))
            output = work / f"out-{batch}"
            result = run(planned.spec or spec, student, output, context)  # type: ignore[arg-type]
            trained = result.record.trained
            assert trained is not None
            lines = [json.loads(row) for row in (output / "train_log.jsonl").read_text().splitlines()]
            seconds = sorted(row["seconds"] for row in lines if "seconds" in row)[: max(1, len(lines) // 2)]
            pace = batch * options.length / (sum(seconds) / len(seconds))
            used = trained.mfu and trained.tokens_per_second and trained.mfu * pace / trained.tokens_per_second
            peak = f"{(result.record.peak_gpu_memory_bytes or 0) / 1e9:.1f} GB"
            micro = str(min(batch, options.micro_batch))
            rows.append([str(batch), micro, f"{pace:,.0f}", f"{used:.3f}" if used else "-", peak])
            if leads:
                note(" | ".join(rows[-1]))
                shutil.rmtree(output)
        distributed.leave()  # rank 0's folder is needed no more
    if leads:
        print(f"\n{devices}, teacher {large}, student {small}, sequences of {options.length}\n")
        table(["batch", "micro-batch", "tokens/s", "MFU", "peak GPU"], rows)


def _write_size(work: Path, models: dict[str, Shape], length: int, device: torch.device) -> None:
    """Both models with random weights, and a text of numbers."""
    for name, shape in models.items():
        write_model(work / name, shape, device)
        config = json.loads((work / name / "config.json").read_text())
        (work / name / "config.json").write_text(json.dumps(config | {"max_position_embeddings": length}))
    note("the models are written")
    words = torch.randint(0, 4000, (length * 64,), generator=torch.Generator().manual_seed(0))
    line = json.dumps({"text": " ".join(map(str, words.tolist()))})
    (work / "text.jsonl").write_text("\n".join([line] * 40))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(required=True)
    one = parts.add_parser("heal", help="a pruned model, healed")
    one.set_defaults(part=heal)
    one.add_argument("--ffn", type=int, default=1152)
    one.add_argument("--more", type=float, default=0.4, help="share of the parameters that the last rows remove")
    one.add_argument("--of", choices=["all", "layers"], default="all", help="what that is a share of")
    one.add_argument("--reconstruct", action="store_true", help="what is solved, as thoroughly as can be")
    two = parts.add_parser("distill", help="a student of half the size")
    two.set_defaults(part=distill)
    two.add_argument("--draws", type=int, default=64)
    two.add_argument("--top", type=int, default=12)
    for each in (one, two):
        each.add_argument("model", help="checkpoint folder or GGUF file")
        each.add_argument("calibration", help="text or jsonl file, :FIELD behind it where the text is in that one")
        each.add_argument("--text", action="append", required=True, metavar="FILE[=WEIGHT]", help="to train on")
        each.add_argument("--tokens", type=parse_count, default=20_000_000)
        each.add_argument("--rate", type=float)
        each.add_argument("--batch", type=int)
        each.add_argument("--c4", type=Path, metavar="FILE", help="a second text to evaluate on")
        each.add_argument("--tasks", type=Path, metavar="FOLDER", help="with rows of HellaSwag, ARC and PIQA")
        each.add_argument("--windows", type=int, help="of each text; all that it fills")
        each.add_argument("--samples", type=int, default=112)
        each.add_argument("--work", type=Path, metavar="FOLDER", help="kept, so that a further run packs no text again")
        each.add_argument("--only", help="rows whose name has one of these, by semicolons")
    three = parts.add_parser("size", help="tokens a second of large shapes")
    three.set_defaults(part=size)
    three.add_argument("--steps", type=int, default=6)
    three.add_argument("--batches", type=lambda text: [int(n) for n in text.split(",")], default=[16])
    three.add_argument("--micro-batch", type=int, default=8)
    three.add_argument("--optimizer", default="auto")
    for name, default in (
        ("layers", 32), ("hidden", 4096), ("intermediate", 14336), ("heads", 32), ("kv-heads", 8),
        ("vocabulary", 128256), ("student-layers", 24), ("student-hidden", 2048), ("student-intermediate", 5504),
        ("student-heads", 16), ("student-kv-heads", 4),
    ):  # fmt: skip
        three.add_argument(f"--{name}", type=int, default=default)
    for each in (one, two, three):
        each.add_argument("--length", type=int, default=2048)
        each.add_argument("--device", default="auto")
        each.add_argument("--verbose", action="store_true")
        each.add_argument("--compile", action="store_true", help="layers")
    options = parser.parse_args()
    options.part(options)


if __name__ == "__main__":
    main()
