"""Every mistake that a user can make, how it is made, and the one line that it gets: the table of test_bad_input.py."""

import hostile_mistakes
import mistakes_in_models
import mistakes_in_pruning
import numpy as np
from desk import RUN, Case, Desk
from small_model import write_model

from compress.system.locks import FileLock

RECIPES = (
    "8b_edge, 8b_edge_chain, 8b_fp8_dynamic, 8b_fp8_static_kv, 8b_gguf_q4_k_m, 8b_int4_gptq, 8b_int8_dynamic, "
    "8b_int8_static, 8b_onnx_int4, 8b_prune_20, 8b_prune_35, 8b_to_1.3b_distill, bits_and_sparsity, cpu_int8, "
    "precision_matrix, prune_sweep, quickstart, smollm2_edge_chain, smollm2_gguf_q4_k_m, smollm2_prune_int4"
)
EVAL = ["--sequence-length", "32", "--device", "cpu"]


def validate(arguments: list[str]) -> list[str]:
    return ["validate", arguments[1]]


def mismatched(desk: Desk) -> list[str]:
    write_model(desk.file("other"), vocab_size=4000)
    return ["eval", "model", "other", *EVAL]


def locked(desk: Desk) -> list[str]:
    desk.stack.enter_context(FileLock(desk.file(".out.lock"))).acquire(exclusive=True)
    return RUN


def read_only(desk: Desk) -> list[str]:
    desk.mount("fixed", "ro,size=1m")
    return [*RUN, "--output", "fixed/out"]


def full(desk: Desk) -> list[str]:
    desk.mount("little", "size=400k")
    return [*RUN, "--work-dir", "little/work"]


def not_ours(desk: Desk) -> list[str]:
    desk.file("out").mkdir()
    return desk.write("out/thesis.txt", "years of work")


def short_windows(desk: Desk) -> list[str]:
    desk.write("tiny.txt", "Short.")
    return desk.recipe("evaluate: false", "evaluate: {text: tiny.txt, sequence_length: 32}")


def empty(desk: Desk) -> list[str]:
    desk.file("empty").mkdir()
    return ["verify", "empty"]


def unknown_quantization(desk: Desk) -> list[str]:
    desk.config(quantization_config={"quant_method": "awq"})
    return ["inspect", "model"]


def zero_inputs(desk: Desk) -> list[str]:
    """A model whose second norm gives zeros: so are the inputs of gate_proj and up_proj."""
    desk.weights(model__layers__0__post_attention_layernorm__weight=np.zeros(64, np.float16))
    return desk.eight_bit("method: static\nweight_rounding: rtn")


EIGHT_BITS = [
    Case(
        "method that is none",
        lambda desk: desk.stage("method: dynamik"),
        "recipe.yaml:9: stages.0.method: 'dynamik' is not allowed; use gptq, rtn, dynamic, static or auto "
        "(did you mean dynamic?)",
    ),
    Case(
        "int8 weights with zero points",
        lambda desk: desk.eight_bit("method: dynamic\nsymmetric: false"),
        "recipe.yaml:9: stages.0.symmetric: no runtime loads 8-bit weights with zero points; remove it, or use "
        "method: gptq",
    ),
    Case(
        "blocks of int8",
        lambda desk: desk.eight_bit("method: dynamic\ngranularity: block"),
        "recipe.yaml:9: stages.0.granularity: block is for dtype: fp8; use channel or tensor",
    ),
    Case(
        "blocks that do not divide a width",
        lambda desk: desk.eight_bit("method: dynamic\ndtype: fp8\ngranularity: block"),
        "stages.0.granularity: blocks of 128 do not divide the width 96 of model.layers.*.mlp.down_proj (2 layers); "
        "use channel, or ignore them\nstages.0.granularity: blocks of 128 do not divide the width 64 of … (12 layers); "
        "use channel, or ignore them",
    ),
    Case(
        "key of the other methods",
        lambda desk: desk.eight_bit("method: static\nact_order: true"),
        "recipe.yaml:9: stages.0.act_order: unknown key; use kind, method, dtype, …",
    ),
    Case(
        "groups of 8-bit weights",
        lambda desk: desk.stage("method: static"),
        "recipe.yaml:8: stages.0.group_size: is for bits: 4; with 8 bits a row shares a scale; remove it",
    ),
    Case(
        "4-bit weights with 8-bit inputs in a format that does not hold them",
        lambda desk: desk.eight_bit("method: dynamic\nbits: 4"),
        "recipe.yaml:7: stages.0: bits: 4 with 8-bit inputs needs format: torchao",
    ),
    Case(
        "static scales for torchao",
        lambda desk: desk.eight_bit("method: static\nformat: torchao"),
        "recipe.yaml:9: stages.0.format: torchao holds method: dynamic only; change method, or use compressed-tensors",
    ),
    Case(
        "override of 8 bits that matches nothing",
        lambda desk: desk.eight_bit('method: static\noverrides: {"*.down_prj": {method: dynamic}}'),
        "stages.0: '*.down_prj' matches no linear layer; did you mean down_proj?; there are down_proj, gate_proj, "
        "k_proj, o_proj, q_proj, up_proj, v_proj",
    ),
    Case(
        "static with a calibration text that is not there",
        lambda desk: [*desk.eight_bit("method: static"), "--set", "calibration=general_n"],
        "--set calibration=general_n: calibration: general_n: no such spec; did you mean general_en? (bundled: …)",
    ),
    Case(
        "inputs that are all zero",
        zero_inputs,
        "model.layers.0.mlp.gate_proj, model.layers.0.mlp.up_proj: all inputs are zero on the calibration text, which "
        "gives no scale; add it to ignore, use method: dynamic for it, or calibrate on other text",
        started=True,
    ),
    Case(
        "too little text for a percentile",
        lambda desk: desk.eight_bit("method: static\nobserver: percentile"),
        "model.layers.0.self_attn.q_proj, model.layers.0.self_attn.k_proj, model.layers.0.self_attn.v_proj: observer "
        "percentile: 4,096 calibration values are too few for the 99.99th percentile, which needs 100,000; give more "
        "calibration text, or use observer: minmax",
        started=True,
    ),
]


CASES = [
    # The recipe
    Case(
        "recipe that is not there",
        lambda desk: ["run", "mine.yaml"],
        f"mine.yaml: no such recipe; did you mean recipe.yaml? (bundled: {RECIPES})",
    ),
    Case(
        "misspelt bundled recipe",
        lambda desk: ["run", "quickstrat"],
        f"quickstrat: no such recipe; did you mean quickstart? (bundled: {RECIPES})",
    ),
    Case(
        "misspelt recipe",
        lambda desk: ["run", "recipe.yml"],
        f"recipe.yml: no such recipe; did you mean recipe.yaml? (bundled: {RECIPES})",
    ),
    Case(
        "unknown key", lambda desk: desk.stage("bit: 4"), "recipe.yaml:9: stages.0.bit: unknown key; did you mean bits?"
    ),
    Case(
        "wrong type",
        lambda desk: desk.stage("damp: little"),
        "recipe.yaml:9: stages.0.damp: 'little' is not a number; write one such as 0.01",
    ),
    Case(
        "bits: 5",
        lambda desk: desk.stage("bits: 5"),
        "recipe.yaml:9: stages.0.bits: 5 is not allowed; use 2, 3, 4 or 8",
    ),
    Case(
        "group_size: 100",
        lambda desk: desk.recipe("32\n", "100\n"),
        "recipe.yaml:8: stages.0.group_size: 100 is not allowed; use -1, 32, 64 or 128",
    ),
    Case(
        "two mistakes at once",
        lambda desk: desk.stage("bits: 5\n    bit: 4"),
        "recipe.yaml:9: stages.0.bits: 5 is not allowed; use 2, 3, 4 or 8\nrecipe.yaml:10: stages.0.bit: "
        "unknown key; did you mean bits?",
    ),
    Case(
        "group that does not divide a width",
        lambda desk: desk.recipe("32\n", "64\n"),
        "stages.0.group_size: 64 does not divide the width 96 of model.layers.*.mlp.down_proj (2 layers); use -1 or 32",
    ),
    Case(
        "the same group, by validate",
        lambda desk: validate(desk.recipe("32\n", "64\n")),
        "stages.0.group_size: 64 does not divide the width 96 of model.layers.*.mlp.down_proj (2 layers); use -1 or 32",
    ),
    Case(
        "glob that matches nothing",
        lambda desk: desk.stage('ignore: ["*.down_prj"]'),
        "stages.0: '*.down_prj' matches no linear layer; did you mean down_proj?; there are down_proj, "
        "gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj",
    ),
    Case(
        "everything ignored",
        lambda desk: desk.stage('ignore: ["*"]'),
        "stages.0.ignore: leaves nothing to quantize; remove some of its globs",
    ),
    Case(
        "bad --set",
        lambda desk: [*RUN, "--set", "stages.0.bits"],
        "--set stages.0.bits: is not path=value, such as stages.0.bits=3; write a part that has dots as "
        '["*.down_proj"]',
    ),
    *EIGHT_BITS,
    *mistakes_in_pruning.CASES,
    *mistakes_in_models.CASES,
    *hostile_mistakes.CASES,
    # The text
    Case(
        "calibration file that is not there",
        lambda desk: desk.recipe("text.txt", "txt.txt"),
        "recipe.yaml:3: calibration.source: txt.txt: no such file; did you mean text.txt?",
    ),
    Case(
        "empty calibration file",
        lambda desk: desk.write("text.txt", ""),
        "FOLDER/text.txt: is empty; put text into it or name another file",
    ),
    Case(
        "calibration file not in UTF-8",
        lambda desk: desk.write("text.txt", "na\xefve".encode("latin-1")),
        "FOLDER/text.txt: not UTF-8 at byte 2 (0xef); save the file as UTF-8",
    ),
    Case(
        "fewer tokens than one sequence",
        lambda desk: desk.write("text.txt", "Too short."),
        "FOLDER/text.txt: 4 tokens are fewer than one sequence of 32; add text or use sequence_length: 4",
    ),
    Case(
        "another sha256",
        lambda desk: desk.calibration(f"{{source: text.txt, sha256: {'0a' * 32}, sequence_length: 32}}"),
        "FOLDER/text.txt: sha256 is … and should be "
        "0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a; get the original file again, or "
        "correct sha256 if the change is meant",
    ),
    Case(
        "sequences longer than the model's",
        lambda desk: desk.calibration("{source: text.txt, sequence_length: 4k}"),
        "calibration.sequence_length: 4000 is more than the model's 1024 positions; use at most 1024",
    ),
    Case(
        "calibration text with two licences",
        lambda desk: desk.calibration("{source: text.txt, licence: MIT, license: CC0}"),
        "recipe.yaml:3: calibration.license: is 'CC0' and licence is 'MIT'; keep one",
    ),
    Case(
        "windows longer than the model's, by validate",
        lambda desk: validate(desk.recipe("evaluate: false", "evaluate: {sequence_length: 4096}")),
        "evaluate.sequence_length: 4096 is more than the model's 1024 positions; use at most 1024",
    ),
    Case(
        "evaluation text too short",
        short_windows,
        "FOLDER/tiny.txt: 3 tokens are fewer than one sequence of 32; add text or use sequence_length: 2",
    ),
    # Folders
    Case(
        "output folder that holds something else",
        not_ours,
        "FOLDER/out: exists and was not written by dscompress; choose another --output or remove it",
    ),
    Case(
        "output that is a file",
        lambda desk: [*RUN, "--output", "text.txt"],
        "--output: text.txt: is a file; name a folder that the result may take",
    ),
    Case(
        "output below a file",
        lambda desk: [*RUN, "--output", "text.txt/out"],
        "FOLDER/text.txt: a file is where a folder should be; choose another --output or --work-dir",
    ),
    Case(
        "output where nothing can be made",
        lambda desk: [*RUN, "--output", "/proc/out"],
        "/proc: cannot be written (No such file or directory); choose another --output or --work-dir, or "
        "make it writable",
    ),
    Case(
        "output on a read-only disk",
        read_only,
        "FOLDER/fixed: cannot be written (Read-only file system); choose another --output or --work-dir, or "
        "make it writable",
        mounts=True,
    ),
    Case(
        "work folder below a file",
        lambda desk: [*RUN, "--work-dir", "text.txt/work"],
        "FOLDER/text.txt/work: a file is where a folder should be; choose another --output or --work-dir",
    ),
    Case(
        "work folder in the output",
        lambda desk: [*RUN, "--work-dir", "out/work"],
        "--work-dir FOLDER/out/work: lies in the output folder; name another folder",
    ),
    Case(
        "full disk",
        full,
        "FOLDER/little/work/stages/…: no space left on the disk; free some and run the same command again to continue",
        mounts=True,
        started=True,
    ),
    Case(
        "the same recipe twice at once",
        locked,
        "FOLDER/out: being written by process … since …; wait for that run, or choose another --output",
    ),
    # Devices
    Case(
        "GPU that is not there",
        lambda desk: ["run", "recipe.yaml", "--device", "cuda:99"],
        "--device cuda:99: not there; this machine has …",
    ),
    Case(
        "device that is none",
        lambda desk: ["run", "recipe.yaml", "--device", "gpu"],
        "--device gpu: not there; this machine has …",
    ),
    # Other commands
    Case(
        "verify a folder that is not there",
        lambda desk: ["verify", "results"],
        "results: no such model folder; check the path",
    ),
    Case(
        "verify what is no checkpoint",
        empty,
        "empty: no config.json, so this is no Hugging Face model folder; give one that has it",
    ),
    Case(
        "verify a file",
        lambda desk: ["verify", "text.txt"],
        "text.txt: is a file; give the folder that has config.json and the weights",
    ),
    Case(
        "inspect what is no checkpoint",
        lambda desk: ["inspect", "text.txt"],
        "text.txt: is a file; give the folder that has config.json and the weights",
    ),
    Case(
        "inspect an unknown quantization",
        unknown_quantization,
        "model: quantized as awq, which can't be read here; "
        "readable are compressed-tensors pack-quantized, int-quantized, float-quantized, gptq and torchao",
    ),
    Case(
        "eval with two vocabularies",
        mismatched,
        "other: its vocabulary has 4000 tokens, the base's 4096; nothing to compare",
    ),
    Case(
        "eval of a folder that is not there",
        lambda desk: ["eval", "model", "results", "--device", "cpu"],
        "results: no such model folder; check the path",
    ),
    Case(
        "eval of a base that is not there",
        lambda desk: ["eval", "./base", "model", "--device", "cpu"],
        "model: ./base does not exist; give a model folder, a .gguf file or a hub id",
    ),
    Case(
        "eval on windows that are too long",
        lambda desk: ["eval", "model", "model", "--device", "cpu", "--sequence-length", "2048"],
        "--sequence-length: 2048 is more than the model's 1024 positions; use at most 1024",
    ),
    Case(
        "eval on a text that is not there",
        lambda desk: ["eval", "model", "model", "--text", "t.txt", *EVAL],
        "t.txt: no such file; did you mean text.txt?",
    ),
    Case(
        "eval on a misspelt text",
        lambda desk: ["eval", "model", "model", "--text", "wikitxt2", *EVAL],
        "wikitxt2: no such spec; did you mean wikitext2? (bundled: chat_en, general_en, general_en_small, wikitext2)",
    ),
    Case(
        "cache of a folder without one",
        lambda desk: ["cache", "ls", "model"],
        "model: no work folder of dscompress; give the .dscompress beside an output",
    ),
    Case(
        "cache clean of a folder without one",
        lambda desk: ["cache", "clean"],
        ".dscompress: no work folder of dscompress; give the .dscompress beside an output",
    ),
    Case(
        "recipe to show that is not there",
        lambda desk: ["recipes", "show", "quickstrat"],
        f"quickstrat: no such bundled recipe; did you mean quickstart? (there are {RECIPES})",
    ),
    Case(
        "recipe copied over a file",
        lambda desk: ["recipes", "copy", "quickstart", "recipe.yaml"],
        "recipe.yaml: exists; name another file",
    ),
]
