"""How the result fared in a real serving engine, as reports show it."""

from dataclasses import dataclass

from compress.records import Report
from compress.report.figures import Row, change, number, rate
from compress.served_records import Apart, Served
from compress.system.units import size


@dataclass(frozen=True)
class ServedView:
    """The section `As served`.

    Args:
        passed: whether the engine opens the result and computes what our reader does.
        words: what came of it, in a sentence or two.
        protocol: how speed was measured, or why it was not; empty where the result was not opened.
        rows: speed and memory of base and result.
    """

    passed: bool
    words: str
    protocol: str
    rows: list[Row]


def served_view(report: Report) -> ServedView | None:
    """The section, where the recipe has `serve`."""
    served = report.served
    if served is None:
        return None
    return ServedView(served.passed, _words(served), _protocol(served), served_rows(served))


def served_line(report: Report) -> str:
    """The same in one line for the terminal; empty where the recipe has no `serve`."""
    served = report.served
    if served is None:
        return ""
    if not served.opened or served.prompt is None or served.continuation is None:
        return _words(served)
    verb = "opens it and computes the same" if served.passed else "opens it and DIFFERS"
    parts = [served.prompt, served.continuation]
    means = " and ".join(f"{number(part.mean)} (allowed {number(part.tolerance)})" for part in parts)
    line = f"{_engine(served)} {verb}: prompt and continuation differ by {means} nats"
    if served.speed is None:
        return line
    if served.speed.busy:
        return f"{line}; its speed says little, for the machine was busy with other work"
    paces = served.speed.compressed, served.speed.base
    return f"{line}; {' tokens/s, base '.join(rate(pace.decode_tokens_per_second) for pace in paces)}"


def served_rows(served: Served) -> list[Row]:
    """Speed and memory of base and result: rows of (label, base, compressed, change)."""
    speed = served.speed
    if speed is None:
        return []
    base, result = speed.base, speed.compressed
    prefill = base.prefill_tokens_per_second, result.prefill_tokens_per_second
    decode = base.decode_tokens_per_second, result.decode_tokens_per_second
    paces = [("Prefill", speed.prompt_tokens, *prefill), ("Decode", speed.new_tokens, *decode)]
    rows = [
        (f"{what}, {tokens} tokens (tokens/s)", rate(before), rate(after), f"{after / before:.2f}x")
        for what, tokens, before, after in paces
    ]
    sizes = {"loaded": (base.loaded_bytes, result.loaded_bytes), "peak": (base.peak_bytes, result.peak_bytes)}
    return rows + [(f"Memory, {when}", size(b), size(r), change(b, r)) for when, (b, r) in sizes.items()]


def _words(served: Served) -> str:
    if not served.opened:
        asked = f"{_engine(served)} does not open it" if served.version else f"{served.engine} was not asked"
        return f"{asked}: {served.note}"
    if served.prompt is None or served.continuation is None:
        return f"{_engine(served)} opens it, and {served.note}. Do not serve it there."
    what = "computes the same" if served.passed else "DIFFERS by more than rounding explains; do not serve it there"
    return (
        f"{_engine(served)} opens it and {what}. Log-probabilities against those of our reader of the files: "
        f"{_apart('of a prompt', served.prompt)}; {_apart('of its greedy continuation', served.continuation)}. "
        f"{_continued(served)}"
    )


def _engine(served: Served) -> str:
    where = {None: "", "cpu": " on a CPU", "cuda": " on a GPU"}
    return f"{served.engine} {served.version}{where.get(served.device, f' on {served.device}')}"


def _apart(what: str, apart: Apart) -> str:
    return (
        f"{apart.tokens} tokens {what} differ by {number(apart.mean)} nats on average and {number(apart.max)} at most "
        f"(rounding alone makes {number(apart.rounding)} on average; allowed is {number(apart.tolerance)})"
    )


def _continued(served: Served) -> str:
    assert served.continuation is not None
    if served.gap is None:
        return f"All {served.continuation.tokens} tokens of the continuation are those that our reader ranks first."
    return (
        f"The first {served.agreed} tokens of the continuation are those that our reader ranks first; the next is "
        f"{number(served.gap)} nats behind the one that it ranks first there."
    )


def _protocol(served: Served) -> str:
    speed = served.speed
    if speed is None:
        return f"Here {served.note}." if served.opened and served.note and served.prompt else ""
    eagerly = ", eagerly" if served.engine == "vLLM" else ""
    how = f"on {speed.threads} CPU threads{eagerly}" if served.device == "cpu" else "with its defaults"
    times = "one round behind one to warm up" if speed.rounds == 1 else f"medians of {speed.rounds} rounds"
    cache = f" and a cache of {size(speed.cache_bytes)}" if speed.cache_bytes else ""
    busy = " The machine was busy with other work, so these speeds say little." if speed.busy else ""
    return (
        f"Speed of {_engine(served)} in {served.dtype}, one sequence at a time {how}: {times}, each model in "
        f"a process of its own. Memory includes the libraries{cache}.{busy}"
    )
