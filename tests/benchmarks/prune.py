"""What ways of pruning cost in quality on a small model, and what pruning takes on a large one.

    python tests/benchmarks/prune.py quality MODEL CALIBRATION[:FIELD] [--c4 FILE] [--windows 64]
        [--ffn 1152] [--layers 25] [--heads 6]
    python tests/benchmarks/prune.py size [--layers 8] [--sequences 128] [--ffn 11520] [--max-memory 24GB]

`quality` prunes a folder or GGUF file in several ways, all on the same calibration tokens, and compares each result
with the original on WikiText-2's test text (and C4's validation text). Nothing is shared between rows, so seconds are
those of a run by itself, reading and writing included; the evaluation is not. optipfair, where it can be imported, is
used as its guide says: PPM (called MAW), by weights alone and with activations of calibration text in batches of 8.

`size` takes random weights of Llama-3.1-8B's shape and random tokens. Extrapolated, what is done once counts once.
"""

import argparse
import logging
import math
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from large_model import Shape, write_model
from layers import Phases
from torch import Tensor
from torch.utils.data import DataLoader

from compress.data.calibration import TokenSet, load_calibration, load_windows
from compress.errors import ModelError
from compress.evaluation.compare import compare
from compress.evaluation.verify import probe_tokens
from compress.formats.dequantized import DequantizedCheckpoint
from compress.loop.context import Context
from compress.model.checkpoint import Checkpoint
from compress.model.source import resolve_model
from compress.model.tokenizer import load_tokenizer
from compress.recipe.prune import PatternStage, PruneStage
from compress.recipe.text import CalibrationSpec
from compress.stages import layerwise
from compress.stages.contract import Setting
from compress.stages.prune.plan import plan
from compress.stages.prune.pruning import Pruning
from compress.stages.prune.run import run
from compress.stages.prune.scores import Scores
from compress.system.compute import pick_device, pick_dtype
from compress.system.memory import PeakMemory, resident
from compress.system.progress import Reporter
from compress.system.units import parse_size

SCORES, READ, SOLVE, WRITE = "scores", "read", "prune + compensate", "write"
DEPTH = 32  # of the model that `size` extrapolates to


class Watch(Phases):
    """Phases, and the most memory since `begin`, whoever starts the counters over in between.

    Attributes:
        gpu: bytes allocated on the GPU at most.
        host: bytes resident at most.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.gpu = self.host = 0
        self.wrap(PeakMemory, "__init__", "counters")

    def begin(self) -> None:
        """Start over."""
        PeakMemory(self.device)
        self.seconds.clear()
        self.gpu = self.host = 0

    def wait(self) -> None:
        """Until the device has nothing left to do; notes the peaks."""
        super().wait()
        if self.device.type == "cuda":
            self.gpu = max(self.gpu, torch.cuda.max_memory_allocated(self.device))
        self.host = max(self.host, resident()[1])


def prune(settings: dict[str, Any], text: CalibrationSpec, context: Context, parent: Checkpoint, output: Path) -> Path:
    """Prune by the stage with these settings; returns the checkpoint's folder."""
    spec: PruneStage | PatternStage = (PatternStage if "pattern" in settings else PruneStage)(kind="prune", **settings)
    planned = plan(spec, parent, Setting("stages.0", text))
    if planned.problems:
        raise ModelError("; ".join(planned.problems))
    run(planned.spec or spec, parent, output, context)
    return output / "checkpoint"


def optipfair(ffn: int, tokens: Tensor | None, device: torch.device, parent: Checkpoint, output: Path) -> Path:
    """Prune MLPs to a width by optipfair, by weights alone where there are no tokens [N, S]."""
    logging.basicConfig(level=logging.WARNING)  # importing it would have all libraries say what they do
    from optipfair import prune_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(parent.folder, dtype="auto").to(device)
    width: int = model.config.intermediate_size
    batches: DataLoader[Any] | None = None
    if tokens is not None:
        rows = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in tokens]
        batches = DataLoader(rows, batch_size=8)  # type: ignore[arg-type]
    share = 100 * (width - ffn + 0.5) / width  # it takes so many channels and rounds down
    prune_model(model, "MLP_GLU", "MAW", pruning_percentage=share, dataloader=batches, show_progress=False)
    model.save_pretrained(output)
    return output


def ways(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Settings of the stage, by what the table calls them."""
    ffn = {"shape": {"intermediate_size": options.ffn}}
    layers = {"shape": {"num_hidden_layers": options.layers}}
    heads = {"shape": {"num_attention_heads": options.heads}}
    cut = {"compensate": False}
    greedy = {"importance": "greedy"}
    trained = {"reconstruct": "submodule", "reconstruct_steps": options.steps}
    return {
        "ffn, magnitude": ffn | cut | {"importance": "magnitude"},
        "ffn, activation": ffn | cut | {"importance": "activation"},
        "ffn, fluctuation": ffn | cut | {"importance": "fluctuation"},
        "ffn, activation + compensation": ffn | {"importance": "activation"},
        "ffn, greedy + compensation": ffn | greedy,
        "ffn, greedy + compensation + reconstruction": ffn | greedy | trained,
        "layers": layers | cut,
        "layers + compensation": layers,
        "heads, activation": heads | cut,
        "heads, greedy + compensation": heads | greedy,
        "hidden": {"shape": {"hidden_size": options.hidden_size}} | cut,
        "hidden + compensation": {"shape": {"hidden_size": options.hidden_size}},
    } | {f"2:4, {method}": {"pattern": "2:4", "method": method} for method in ("magnitude", "wanda", "sparsegpt")}


def quality(options: argparse.Namespace) -> None:
    """Measure and print part one."""
    device = pick_device(options.device)
    with tempfile.TemporaryDirectory() as scratch:
        work, watch = Path(scratch), Watch(device)
        model = resolve_model(options.model, None, work, note)
        tokenizer, parent = load_tokenizer(model, False), Checkpoint(model)
        file, _, field = options.calibration.partition(":")
        text = CalibrationSpec(
            source=str(Path(file).resolve()), field=field or None, samples=options.samples,
            sequence_length=options.length,
        )  # fmt: skip
        tokens = load_calibration(text, tokenizer)
        probe = probe_tokens(model, False)[None]
        context = Context(device, pick_dtype(device, torch.bfloat16), tokens, probe, Reporter(quiet=True), False)
        sources = {"WikiText-2": "wikitext2"} | ({"C4": str(options.c4.resolve())} if options.c4 else {})
        windows = {
            name: load_windows(source, tokenizer, sequence_length=options.length, windows=options.windows)
            for name, source in sources.items()
        }
        jobs: dict[str, Callable[[Path], Path]] = {"base": lambda _: model}
        jobs |= {way: partial(prune, settings, text, context, parent) for way, settings in ways(options).items()}
        jobs["optipfair, weights"] = partial(optipfair, options.ffn, None, device, parent)
        jobs["optipfair, weights x activations"] = partial(optipfair, options.ffn, tokens.tokens, device, parent)
        rows = []
        for name, job in jobs.items():
            output = work / "pruned"
            shutil.rmtree(output, ignore_errors=True)
            rows.append([name, *_row(partial(job, output), parent, windows, context, watch, work / "hidden")])
            note(" | ".join(rows[-1]))
    said = ", ".join(f"{each.sequences} windows of {name}" for name, each in windows.items())
    calibrated = f"{tokens.sequences} x {tokens.sequence_length} tokens of {tokens.name}"
    print(f"\n{Path(options.model).name}, {device}, {calibrated}; {said}\n")
    heads = [f"{name} {figure}" for name in windows for figure in ("KL", "perplexity")]
    table(["pruned", "ffn, heads, layers", "parameters", *heads, "seconds", "peak GPU"], rows)


def _row(
    job: Callable[[], Path], parent: Checkpoint, texts: dict[str, TokenSet], context: Context, watch: Watch, cache: Path
) -> list[str]:
    """Sizes, figures on each text and costs of what a job makes; or why it made nothing."""
    watch.begin()
    started = time.perf_counter()
    try:
        result = Checkpoint(job())
    except Exception as error:  # the other rows are wanted all the same
        traceback.print_exc()
        return [f"failed: {str(error).splitlines()[0] if str(error) else type(error).__name__}"]
    watch.wait()
    costs = [f"{time.perf_counter() - started:.1f}", f"{watch.gpu / 1e9:.2f} GB" if watch.gpu else "-"]
    figures = []
    for windows in texts.values():
        one, other = DequantizedCheckpoint(parent), DequantizedCheckpoint(result)
        found = compare(one, other, windows, context, cache, "base")
        figures += [f"{found['kl']['mean']:.4f}", f"{found['perplexity']['compressed']:.2f}"]
    sizes = [str(result.config[key]) for key in ("intermediate_size", "num_attention_heads", "num_hidden_layers")]
    parameters = sum(math.prod(info.shape) for info in result.tensors.values())
    return [", ".join(sizes), f"{parameters / 1e6:.1f}M", *figures, *costs]


def size(options: argparse.Namespace) -> None:
    """Measure and print part two."""
    limit = parse_size(options.max_memory) if options.max_memory else None
    device, layers = pick_device(options.device, limit), options.layers
    shape = Shape(
        layers, options.hidden, options.intermediate, options.heads, options.kv_heads, options.vocabulary, tied=False
    )
    random = torch.Generator().manual_seed(0)
    tokens = TokenSet(
        torch.randint(shape.vocabulary, (options.sequences, options.length), generator=random), "random", "-", None
    )
    text = CalibrationSpec(source="random.txt", samples=options.sequences, sequence_length=options.length)
    watch = Watch(device)
    watch.wrap(Scores, "find", SCORES)
    watch.wrap(Pruning, "load", READ)
    watch.wrap(Pruning, "transform", SOLVE)
    for owner, name in (
        (layerwise._Writer, "write"),
        (layerwise._Writer, "__exit__"),
        (layerwise.Layerwise, "_finish"),
    ):
        watch.wrap(owner, name, WRITE)
    with tempfile.TemporaryDirectory() as scratch:
        model = Path(scratch) / "model"
        write_model(model, shape)
        note("the model is written")
        probe = probe_tokens(model, False)[None]
        dtype = pick_dtype(device, torch.bfloat16)
        context = Context(device, dtype, tokens, probe, Reporter(quiet=True), False, limit)
        settings = {"shape": {"intermediate_size": options.ffn}, "importance": "greedy"}
        watch.begin()
        started = time.perf_counter()
        result = Checkpoint(prune(settings, text, context, Checkpoint(model), Path(scratch) / "pruned"))
        watch.wait()
        whole = time.perf_counter() - started
    total = sum(info.bytes for info in result.tensors.values())
    inside = sum(info.bytes for name, info in result.tensors.items() if name.startswith("model.layers."))
    more = DEPTH / layers
    growth = {SCORES: more, READ: more, SOLVE: more, WRITE: 1 + (more - 1) * inside / total, "once": 1.0}
    taken = {name: watch.seconds[name] for name in (SCORES, READ, SOLVE, WRITE)}
    taken["once"] = whole - sum(taken.values())
    rows = [[n, f"{s:.2f}", f"{s / layers:.3f}", f"{s * growth[n]:.1f}"] for n, s in taken.items()]
    extrapolated = sum(seconds * growth[name] for name, seconds in taken.items())
    rows.append(["whole run", f"{whole:.2f}", f"{whole / layers:.3f}", f"{extrapolated:.1f}"])
    rows.append(["peak GPU memory", f"{watch.gpu / 1e9:.2f} GB" if watch.gpu else "-"])
    rows.append(["peak host memory", f"{watch.host / 1e9:.2f} GB"])
    print(
        f"\n{device}, {layers} layers of hidden size {shape.hidden}, ffn {shape.intermediate} -> {options.ffn}, "
        f"{tokens.sequences} x {tokens.sequence_length} tokens, max_memory {options.max_memory or 'what is free'}\n"
    )
    width = 3 if layers >= DEPTH else 4
    table(["", f"{layers} layers, s", "a layer, s", f"{DEPTH} layers, s"][:width], [row[:width] for row in rows])


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print rows, which may end early."""
    full = [[*row, *[""] * (len(head) - len(row))] for row in rows]
    for cells in (head, ["---"] * len(head), *full):
        print("| " + " | ".join(cells) + " |")


def note(line: str) -> None:
    """Say how far it is."""
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(required=True)
    one = parts.add_parser("quality", help="ways of pruning a small model, compared")
    one.set_defaults(part=quality)
    one.add_argument("model", help="checkpoint folder or GGUF file")
    one.add_argument("calibration", help="text or jsonl file, :FIELD behind it where the text is in that one")
    one.add_argument("--c4", type=Path, metavar="FILE", help="a second text to evaluate on")
    one.add_argument("--windows", type=int, help="of each text; all that it fills")
    one.add_argument("--samples", type=int, default=112)
    one.add_argument("--ffn", type=int, default=1152)
    one.add_argument("--layers", type=int, default=25)
    one.add_argument("--heads", type=int, default=6)
    one.add_argument("--hidden-size", type=int, default=504)
    one.add_argument("--steps", type=int, default=200, help="of the reconstruction")
    two = parts.add_parser("size", help="time and memory on a large model")
    two.set_defaults(part=size)
    two.add_argument("--layers", type=int, default=8)
    two.add_argument("--sequences", type=int, default=128)
    two.add_argument("--ffn", type=int, default=11520)
    two.add_argument("--max-memory", help="such as 24GB")
    for name, default in (
        ("hidden", 4096), ("intermediate", 14336), ("heads", 32), ("kv-heads", 8), ("vocabulary", 128256)
    ):  # fmt: skip
        two.add_argument(f"--{name}", type=int, default=default)
    for each in (one, two):
        each.add_argument("--length", type=int, default=2048)
        each.add_argument("--device", default="auto")
    options = parser.parse_args()
    options.part(options)


if __name__ == "__main__":
    main()
