"""The figures of a report as people read them: Markdown, HTML, the model card and the terminal take them from here."""

import math
import re
from dataclasses import dataclass

from compress.records import Interval, Layer, Module, Quality, Report, Speed, Stage
from compress.report.paths import without_folders
from compress.system.units import count, size

Row = tuple[str, str, str, str]
_FASTER = 1.05  # times the base's speed; less is noise


@dataclass(frozen=True)
class MatrixRow:
    """A quantized matrix in the table of layers; `bar` is its place, 0 to 100, on the log scale of output errors."""

    layer: int | None
    name: str
    kind: str
    module: Module
    bar: float


def number(value: float | None) -> str:
    """Three significant digits, a dash for None: 0.0831, 1.2e-05."""
    return "–" if value is None else f"{value:.3g}"


def perplexity(value: float) -> str:
    """Four significant digits at least, two decimals: 17.31, 1204.52."""
    return f"{value:.2f}" if 10 <= value < 1e6 else f"{value:.4g}"


def percent(share: float | None) -> str:
    """A share of one: 86.2 %; three significant digits below 10 %, a dash for None."""
    if share is None:
        return "–"
    return f"{100 * share:.1f} %" if abs(share) >= 0.1 else f"{100 * share:.3g} %"


def change(before: float, after: float) -> str:
    """The relative change with its sign: +9.4 %."""
    return f"{100 * (after / before - 1):+.1f} %" if before else "–"


def points(share: float) -> str:
    """A difference of two shares, with its sign: -1.4 points."""
    return f"{100 * share:+.1f} points"


def interval(bounds: Interval | None, share: bool = False) -> str:
    """A 95 % interval: 0.0794 to 0.0868; as percentages for shares; a dash for None."""
    if bounds is None:
        return "–"
    low, high = bounds
    return f"{percent(low)} to {percent(high)}" if share else f"{number(low)} to {number(high)}"


def duration(seconds: float) -> str:
    """0.8 s, 42 s, 3 min 12 s, 1 h 04 min."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def ratio(report: Report) -> str:
    """How the size on disk changed: 2.92x smaller, unchanged."""
    if f"{report.size_ratio:.2f}" == "1.00":
        return "unchanged"
    if report.size_ratio >= 1:
        return f"{report.size_ratio:.2f}x smaller"
    return f"{1 / report.size_ratio:.2f}x larger" if report.size_ratio > 0 else "–"


def verification(report: Report) -> str:
    """PASS, FAIL or not verified."""
    if report.verified is None:
        return "not verified"
    return "PASS" if report.verified.passed else "FAIL"


def summary_table(report: Report) -> list[Row]:
    """The headline figures: rows of (label, base, compressed, change), for the terminal and the Markdown."""
    verified = report.verified
    loader = f"Opened by {verified.loader}" if verified else "Opened by the stock loader"
    difference = verified.max_logit_difference if verified else None
    note = "" if difference is None else f"largest logit difference {number(difference)}"
    rows = [*size_rows(report), *quality_rows(report), *speed_rows(report)]
    return [*rows, (loader, "", verification(report), note)]


def size_rows(report: Report) -> list[Row]:
    """The rows of the summary that state sizes."""
    base, compressed = report.base, report.compressed
    same = base.parameters == compressed.parameters
    base_bits = f"{8 * base.bytes / base.parameters:.2f}" if base.parameters else "–"
    rows = [
        ("Size on disk", size(base.bytes), size(compressed.bytes), ratio(report)),
        (
            "Parameters",
            count(base.parameters),
            count(compressed.parameters),
            "unchanged" if same else change(base.parameters, compressed.parameters),
        ),
        ("Bits per weight", base_bits, f"{compressed.bits_per_weight:.2f}", ""),
    ]
    if compressed.quantized_bits_per_weight is not None:
        rows.append(("Bits per quantized weight", "", f"{compressed.quantized_bits_per_weight:.2f}", "scales included"))
    return rows


def quality_rows(report: Report) -> list[Row]:
    """The rows of the summary that state accuracy; none without an evaluation."""
    quality = report.quality
    if quality is None:
        return []
    ppl, kl, top1 = quality.perplexity, quality.kl, quality.top1_agreement
    rows = [
        (
            f"Perplexity ({ppl.dataset}, {ppl.sequence_length} tokens)",
            perplexity(ppl.base),
            perplexity(ppl.compressed),
            change(ppl.base, ppl.compressed),
        ),
        ("KL divergence, mean (nats)", "0", number(kl.mean), _ci(kl.ci95)),
        ("KL divergence, 99th percentile", "0", number(kl.p99), ""),
        ("Top-1 agreement", "100 %", percent(top1.mean), _ci(top1.ci95, share=True)),
    ]
    rows += [row for each in report.further for row in _further_rows(each)]
    for name, task in quality.tasks.items():
        rows.append((f"{name} ({task.n:,} items)", percent(task.base), percent(task.compressed), points(task.delta)))
    return rows


def _further_rows(quality: Quality) -> list[Row]:
    """Perplexity and divergence on another text."""
    ppl, kl = quality.perplexity, quality.kl
    where = f"({ppl.dataset}, {ppl.sequence_length} tokens)"
    return [
        (f"Perplexity {where}", perplexity(ppl.base), perplexity(ppl.compressed), change(ppl.base, ppl.compressed)),
        (f"KL divergence {where}", "0", number(kl.mean), _ci(kl.ci95)),
    ]


def speed_rows(report: Report) -> list[Row]:
    """The rows of the summary that state speed and memory on a CPU; none where nothing was measured."""
    speed = report.speed
    if speed is None:
        return []
    rows = [
        (f"{name.capitalize()}, {tokens} tokens (tokens/s)", rate(before), rate(after), _times(before, after))
        for name, tokens, before, after in _paces(speed)
    ]
    base, result = speed.base, speed.compressed
    sizes = {"loaded": (base.loaded_bytes, result.loaded_bytes), "peak": (base.peak_bytes, result.peak_bytes)}
    return rows + [(f"Memory of the process, {when}", size(b), size(r), change(b, r)) for when, (b, r) in sizes.items()]


def _paces(speed: Speed) -> list[tuple[str, int, float, float]]:
    """What was timed, on how many tokens, and the tokens per second of base and result."""
    base, result = speed.base, speed.compressed
    return [
        ("prefill", speed.prompt_tokens, base.prefill_tokens_per_second, result.prefill_tokens_per_second),
        ("decode", speed.new_tokens, base.decode_tokens_per_second, result.decode_tokens_per_second),
    ]


def rate(value: float) -> str:
    """Three digits: 895, 15.0, 5.21."""
    return f"{value:,.{0 if value >= 99.95 else 1 if value >= 9.995 else 2}f}"


def _times(before: float, after: float) -> str:
    return f"{after / before:.2f}x"


def speed_words(report: Report) -> str:
    """That the result is not faster than its base on this CPU, that the figures are doubtful; empty if all is well."""
    speed = report.speed
    if speed is None:
        return ""
    if speed.busy:
        return (
            "These speeds say little, for the machine was busy with other work: run the same command while it is idle."
        )
    paces = _paces(speed)
    slow = [name for name, _, before, after in paces if after < _FASTER * before]
    times = ", ".join(f"{name} {_times(before, after)}" for name, _, before, after in paces)
    where = f" in {slow[0]}" if len(slow) == 1 else ""
    return f"No faster than bf16 on this CPU{where}: {times}." if slow else ""


def speed_protocol(report: Report) -> str:
    """How speed was measured, or why it was not; empty for a run that doesn't measure it."""
    speed = report.speed
    if speed is None:
        return f"Speed was not measured: {report.speed_note}." if report.speed_note else ""
    flags = f", with {', '.join(speed.cpu_flags)}" if speed.cpu_flags else ""
    return (
        f"Speed of transformers in eager mode on {speed.cpu}{flags}; {speed.threads} threads, base in "
        f"{speed.base.dtype}, result in {speed.compressed.dtype}, medians of {speed.rounds} rounds by turns, each in a "
        "process of its own, whose memory includes the libraries'."
    )


def _ci(bounds: Interval | None, share: bool = False) -> str:
    return "" if bounds is None else f"95 %: {interval(bounds, share)}"


def verdict(report: Report) -> str:
    """What came out, in one sentence of plain words."""
    base, compressed, quality = report.base, report.compressed, report.quality
    text = f"The checkpoint is {ratio(report)} than its base ({size(base.bytes)} to {size(compressed.bytes)})"
    if ratio(report) == "unchanged":
        text = f"The checkpoint is as large as its base ({size(compressed.bytes)})"
    if quality is None:
        text += "; what that cost in accuracy was not evaluated"
    else:
        ppl = quality.perplexity
        verb = "rises" if ppl.compressed >= ppl.base else "falls"
        text += (
            f"; perplexity on {ppl.dataset} {verb} from {perplexity(ppl.base)} to {perplexity(ppl.compressed)} "
            f"({change(ppl.base, ppl.compressed)}), its predictions differ by {number(quality.kl.mean)} nats of KL "
            f"divergence, and it ranks the same token first at {percent(quality.top1_agreement.mean)} of positions"
        )
    verified = report.verified
    if verified is None:
        return text + ". The written files were not opened again to verify them."
    if verified.passed:
        also = ""
        if report.compressed.file is not None and report.served is not None and report.served.passed:
            also = f" {report.served.engine} opens {report.compressed.file} and computes the same."
        return text + f". Verified: {verified.loader} opens it and gives what was computed.{also}"
    if verified.max_logit_difference is None:
        return text + f". NOT verified: {verified.loader} can't open it."
    return text + f". NOT verified: opened by {verified.loader}, it differs from what was computed."


def quantized_stage(report: Report) -> Stage | None:
    """The last stage that quantized matrices, whose errors the report shows."""
    stages = [
        each for each in report.stages if any(isinstance(m, Module) for layer in each.layers for m in layer.modules)
    ]
    return stages[-1] if stages else None


def matrices(report: Report) -> list[MatrixRow]:
    """Every quantized matrix in model order; what is outside of the layers comes last."""
    stage = quantized_stage(report)
    if stage is None:
        return []
    layers = sorted(stage.layers, key=lambda layer: math.inf if layer.layer is None else layer.layer)
    pairs = [(layer, module) for layer in layers for module in layer.modules if isinstance(module, Module)]
    logs = [math.log(module.error) for _, module in pairs if module.error]
    low, high = (min(logs), max(logs)) if logs else (0.0, 0.0)
    return [_matrix_row(layer, module, low, high) for layer, module in pairs]


def _matrix_row(layer: Layer, module: Module, low: float, high: float) -> MatrixRow:
    bar = 0.0
    if module.error:
        bar = 100.0 if high == low else 4 + 96 * (math.log(module.error) - low) / (high - low)
    _, found, inside = module.name.partition(f".{layer.layer}.")
    return MatrixRow(layer.layer, inside if found else module.name, kind_of(module.name), module, bar)


def precision(module: Module) -> str:
    """What a matrix became: 4, 4 asym, fp8 dynamic, or int8 static (dynamic 0.12 %) where errors decided."""
    if module.inputs is None:
        return f"{module.bits}{'' if module.symmetric else ' asym'}"
    others = [f"{method} {percent(error)}" for method, error in module.errors.items() if method != module.inputs]
    return f"{module.dtype}{module.bits} {module.inputs}" + (f" ({', '.join(others)})" if others else "")


def kind_of(name: str) -> str:
    """What a matrix is, from its module name: `model.layers.3.mlp.down_proj` is `down`."""
    return re.sub(r"_proj$", "", name.rpartition(".")[2])


def worst(report: Report, most: int = 5) -> list[MatrixRow]:
    """The matrices with the largest output error, largest first."""
    rows = [row for row in matrices(report) if row.module.error is not None]
    return sorted(rows, key=lambda row: -(row.module.error or 0.0))[:most]


def size_parts(report: Report) -> tuple[tuple[float, float], tuple[float, float]] | None:
    """Bytes of (the quantized matrices, all else) in the base and in the compressed checkpoint.

    The base's split assumes one dtype throughout. None where the record can't tell: no quantized matrices, or a
    parameter count that another stage changed.
    """
    base, compressed = report.base, report.compressed
    weights = sum(math.prod(row.module.shape) for row in matrices(report))
    bits = compressed.quantized_bits_per_weight
    if not weights or bits is None or base.parameters != compressed.parameters or weights > base.parameters:
        return None
    before, after = base.bytes * weights / base.parameters, weights * bits / 8
    if after > compressed.bytes:
        return None
    return (before, base.bytes - before), (after, compressed.bytes - after)


def spec_words(stage: Stage) -> str:
    """What the stage was asked to do, in short: method gptq, bits 4, ...; losses without weight are left out."""
    spec = {key: value for key, value in without_folders(stage.spec).items() if key != "kind"}
    if isinstance(losses := spec.get("losses"), dict):
        spec["losses"] = {name: weight for name, weight in losses.items() if weight}
    return _words(spec)


def _words(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(
            _pair(key, inner) for key, inner in value.items() if inner is not None and inner not in ({}, [])
        )
    if isinstance(value, list):
        return " and ".join(f"({_words(inner)})" if isinstance(inner, dict) else _words(inner) for inner in value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) and value >= 10_000 else str(value)


def _pair(key: str, value: object) -> str:
    return f"{key} ({_words(value)})" if isinstance(value, dict) else f"{key} {_words(value)}"
