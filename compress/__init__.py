"""dscompress: make large language models small enough to ship, and prove what that cost.

The command line calls these, and so can a notebook; examples/ shows how:

    compress.run(recipe, ...)                compress a model, verify the checkpoint, measure what it cost
    compress.evaluate(base, candidate, ...)  perplexity, KL divergence and agreement of any two checkpoints
    compress.sweep(recipe, over=[...], ...)  many recipes that differ in a few values, and what each costs
    compress.compare(results, output, ...)   finished results in one table and one picture
    compress.plan(model, gpu=..., ...)       which precision fits where, before anything is downloaded, and its recipe
    compress.verify(checkpoint, ...)         open it with the stock loader and with ours: what agrees, what differs
    compress.inspect(checkpoint)             what it holds and how it was made
    compress.export(checkpoint, to="gguf")   write it for llama.cpp or ONNX Runtime GenAI, and have that read it

They raise `compress.errors.DscompressError`, whose message is one line for people. Nothing heavy is imported before the
first call.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from compress.footprint.footprint import plan
    from compress.runs.export import export
    from compress.runs.runner import run
    from compress.runs.tools import evaluate, inspect, verify
    from compress.sweeps.driver import sweep
    from compress.sweeps.results import compare

__version__ = "0.1.0"
__all__ = ["compare", "evaluate", "export", "inspect", "plan", "run", "sweep", "verify"]

_WHERE = {
    "run": "runs.runner",
    "evaluate": "runs.tools",
    "inspect": "runs.tools",
    "verify": "runs.tools",
    "sweep": "sweeps.driver",
    "compare": "sweeps.results",
    "export": "runs.export",
    "plan": "footprint.footprint",
}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'compress' has no attribute {name!r}")
    return getattr(import_module(f"compress.{_WHERE[name]}"), name)
