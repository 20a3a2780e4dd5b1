"""Whether the base that is streamed here is the one that stock transformers opens, asked before anything is computed.

All figures compare the result with the base. A folder that transformers reads otherwise than it is read here would make
every one of them wrong, so its logits on the probe are asked for once, and what is found is kept in the work folder.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import torch

from compress.errors import ModelError, NumericalError, VerificationError
from compress.evaluation.stock import NEW_TOKENS, Answer, Request, asked
from compress.evaluation.verify import stock_refusal, stream_logits, tolerance_of
from compress.loop.context import Context
from compress.loop.finite import all_finite
from compress.loop.stream import LayerStream
from compress.model.checkpoint import Checkpoint
from compress.model.side_files import side_digest
from compress.system import distributed
from compress.system.files import write_text
from compress.system.fingerprint import fingerprint
from compress.system.locks import made_once
from compress.system.machine import versions

CODE_VERSION = 1
_LIBRARIES = ("torch", "transformers")
GENERATION = "generation_config.json"
_BUFFERS = ("inv_freq", "position_ids", "masked_bias")  # that models make themselves, whatever an old file says


def check_base(
    base: Checkpoint, base_id: str, context: Context, cache: Path, prompts: Sequence[str] = (), fresh: bool = False
) -> None:
    """Compare the base, as it is streamed, with stock transformers on the probe; what neither uses is left out of it.

    Args:
        base: a dense model.
        base_id: its fingerprint.
        context: the probe, and where to compute.
        cache: folder of verdicts and texts.
        prompts: to continue in the same breath, for `continuations`.
        fresh: ask again what was asked before.

    Raises:
        ModelError: transformers can't open it, or not generate with it.
        VerificationError: transformers computes something else.
    """
    check_generation_config(base.folder)
    stream = LayerStream(base, context.device, context.dtype, context.trust_remote_code)
    unused = [name for name in stream.unused if not _is_buffer(name, base.tensors[name].dtype)]
    base.leave_out([name for name in stream.unused if name not in unused], "buffers")
    if unused:
        kind = type(stream.model).__name__
        context.reporter.warn(base.leave_out(unused, f"{kind} has no place for {len(unused)} of its tensors"))
    distributed.first(lambda: _compare(base, base_id, stream, context, cache, prompts, fresh))


def _compare(
    base: Checkpoint,
    base_id: str,
    stream: LayerStream,
    context: Context,
    cache: Path,
    prompts: Sequence[str],
    fresh: bool,
) -> None:
    tokens, dtype = context.probe[0], str(context.dtype).removeprefix("torch.")
    where = [tokens.tolist(), dtype, context.device.type, {name: versions().get(name) for name in _LIBRARIES}]
    verdict = cache / f"{fingerprint('base', CODE_VERSION, base_id, side_digest(base.folder), *where)}.json"
    kept = texts_file(cache, base, base_id, prompts, context)
    for file in (verdict, kept) if fresh else ():
        file.unlink(missing_ok=True)
    with made_once(
        verdict, lambda holder: context.reporter.say(f"waiting for {holder}, which opens the same model")
    ) as missing:
        if missing:
            _ask(base, stream, context, list(prompts), kept, verdict)


def _ask(
    base: Checkpoint, stream: LayerStream, context: Context, prompts: list[str], kept: Path, verdict: Path
) -> None:
    """Ask stock transformers, and keep what it says: the verdict, and its texts where they are not there."""
    tokens, dtype = context.probe[0], str(context.dtype).removeprefix("torch.")
    refusal = stock_refusal(base, context.device, context.dtype, context.max_memory)
    if refusal is not None:
        context.reporter.say(f"the base was not compared with stock transformers: {refusal}")
        return
    context.reporter.say("comparing the base with stock transformers")
    wanted = [] if kept.is_file() else prompts
    request = Request(str(base.folder), str(context.device), dtype, tokens.tolist(), wanted, context.trust_remote_code)
    with asked(request) as wait:
        try:
            own = stream_logits(stream, tokens)
        except NumericalError:
            return  # the stage says which tensor it is
        if not all_finite(own):
            return
        answer = wait()
    difference, allowed = _difference(base, answer, own, context)
    if difference is None:
        return
    if wanted:
        write_text(kept, json.dumps(answer.continuations))
    write_text(verdict, json.dumps({"max_logit_difference": difference, "tolerance": allowed}))


def _difference(base: Checkpoint, answer: Answer, own: torch.Tensor, context: Context) -> tuple[float | None, float]:
    """The largest difference of a logit, and the allowed one; None for the first where memory did not suffice."""
    allowed, failure = tolerance_of(own, context.dtype), answer.failure
    if answer.short:
        context.reporter.say(f"the base was not compared with stock transformers: {failure}")
        return None, allowed
    if answer.logits is None:
        raise ModelError(
            f"{base.folder}: transformers can't open this model ({failure}); "
            "mend the folder until AutoModelForCausalLM.from_pretrained does"
        )
    difference = float((answer.logits - own).abs().max())
    if not difference <= allowed:
        raise VerificationError(
            f"{base.folder}: transformers computes other logits from this folder than its tensors give when they are "
            f"streamed (largest difference {difference:.3g}, allowed {allowed:.2g}), so no figure would be right; "
            "save it anew with transformers (from_pretrained, then save_pretrained) and use that folder"
        )
    if failure is not None:
        raise ModelError(
            f"{base.folder}: transformers opens this model and can't generate with it ({failure}); "
            f"mend or remove its {GENERATION}, or set evaluate.prompts: []"
        )
    return difference, allowed


def check_generation_config(folder: Path) -> None:
    """Refuse a generation_config.json that transformers can't load: the result would have it too.

    Raises:
        ModelError: naming what transformers says against it.
    """
    from transformers import GenerationConfig

    file = folder / GENERATION
    if not file.is_file():
        return
    try:
        GenerationConfig.from_pretrained(folder)
    except (ValueError, TypeError, AttributeError, LookupError, OSError) as error:
        reason = (str(error).strip() or repr(error)).splitlines()[0].rstrip(".")
        raise ModelError(f"{file}: transformers refuses it ({reason}); mend or remove it") from error


def continuations(
    checkpoint: Checkpoint, identity: str, prompts: Sequence[str], context: Context, cache: Path
) -> list[str] | str:
    """Continuations of the prompts by stock transformers, asked once for a model and its side files, or why not."""
    kept = texts_file(cache, checkpoint, identity, prompts, context)
    say = context.reporter.say
    with made_once(kept, lambda holder: say(f"waiting for {holder}, which asks the same model")) as missing:
        if not missing:
            texts: list[str] = json.loads(kept.read_text(encoding="utf-8"))
            return texts
        request = Request(
            str(checkpoint.folder), str(context.device), str(context.dtype).removeprefix("torch."),
            prompts=list(prompts), trust_remote_code=context.trust_remote_code,
        )  # fmt: skip
        with asked(request) as wait:
            answer = wait()
        if answer.failure is not None:
            return f"the stock loader failed: {answer.failure}"
        write_text(kept, json.dumps(answer.continuations))
        return answer.continuations


def texts_file(cache: Path, checkpoint: Checkpoint, identity: str, prompts: Sequence[str], context: Context) -> Path:
    """Where continuations are kept: a corrected chat template or generation config makes others."""
    side = side_digest(checkpoint.folder)
    return cache / f"{fingerprint('texts', identity, side, list(prompts), str(context.dtype), NEW_TOKENS)}.json"


def _is_buffer(name: str, dtype: str) -> bool:
    last = name.rpartition(".")[2]
    return last in _BUFFERS or (last == "bias" and dtype in ("BOOL", "U8"))
