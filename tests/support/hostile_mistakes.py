"""What nobody writes by mistake: sizes that no model has, tokenizers that explode, names that steer the terminal."""

import json
from collections.abc import Callable

from desk import RUN, Case, Desk


def sized(key: str, value: object, shown: str, most: str) -> Case:
    line = f"FOLDER/model/config.json: {key}: {shown} is not a whole number from 1 to {most}; download the model again"
    return Case(f"config.json with {key} {shown}", lambda desk: desk.config(**{key: value}), line)


SIZES = [
    sized("hidden_size", -64, "-64", "4,194,304"),
    sized("hidden_size", 10**18, "1000000000000000000", "4,194,304"),
    sized("hidden_size", "64", "'64'", "4,194,304"),
    sized("head_dim", 0, "0", "4,194,304"),
    sized("intermediate_size", [96, -96], "[96, -96]", "4,194,304"),
    sized("num_key_value_heads", 0, "0", "65,536"),
    sized("num_key_value_heads", -1, "-1", "65,536"),
    sized("num_attention_heads", True, "True", "65,536"),
    sized("num_hidden_layers", 10**9, "1000000000", "16,384"),
    sized("num_labels", 10**18, "1000000000000000000", "1,048,576"),
    sized("vocab_size", -5, "-5", "268,435,456"),
    sized("max_position_embeddings", float("nan"), "nan", "1,099,511,627,776"),
    Case(
        "heads that do not share keys and values evenly",
        lambda desk: desk.config(num_attention_heads=4, num_key_value_heads=3),
        "FOLDER/model/config.json: num_key_value_heads: 3 does not divide num_attention_heads: 4; download the model "
        "again",
    ),
    Case(
        "padding token that is none",
        lambda desk: desk.config(pad_token_id=99999),
        "FOLDER/model/config.json: pad_token_id: 99999 is not one of the 4096 tokens; write null or one of them",
    ),
    Case(
        "config.json nested too deeply",
        lambda desk: desk.write("model/config.json", '{"a": ' + "[" * 100_000),
        "FOLDER/model/config.json: not valid JSON (nested too deeply); download the model again",
    ),
    Case(
        "index nested too deeply",
        lambda desk: desk.weight_map("[" * 100_000),
        "FOLDER/model/model.safetensors.index.json: not a valid index (ValueError('nested too deeply')); download the "
        "model again",
    ),
]


def spoiled(name: str, **changes: object) -> Callable[[Desk], list[str]]:
    """Change keys of a JSON file of the model's."""

    def arrange(desk: Desk) -> list[str]:
        content = json.loads(desk.file(f"model/{name}").read_text())
        return desk.write(f"model/{name}", json.dumps(content | changes))

    return arrange


WILD = (
    "FOLDER/model/tokenizer.json: breaks the tokenizers library on a bit of text, for a pattern or a normalizer in it; "
    "download it again"
)
TOKENIZERS = [
    Case(
        "tokenizer with a pattern that backtracks for ever",
        spoiled(
            "tokenizer.json",
            pre_tokenizer={"type": "Split", "pattern": {"Regex": "(x+x+)+y"}, "behavior": "Isolated", "invert": False},
        ),
        WILD,
    ),
    Case(
        "tokenizer that fills all memory",
        spoiled(
            "tokenizer.json",
            padding={"strategy": {"Fixed": 10**11}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
                     "pad_type_id": 0, "pad_token": "x"},
        ),
        WILD,
    ),
    Case(
        "tokenizer whose limit is a text",
        spoiled("tokenizer_config.json", model_max_length="many"),
        "FOLDER/model/tokenizer_config.json: model_max_length: 'many' is not a number; write the most tokens of a "
        "text, or remove it",
    ),
]  # fmt: skip


def inspected(desk: Desk) -> list[str]:
    desk.config(quantization_config=7)
    return ["inspect", "model"]


CASES = [
    Case(
        "inspect a quantization_config that is none",
        inspected,
        "model: quantization_config is no mapping (7); download the model again",
    ),
    *SIZES,
    *TOKENIZERS,
    Case(
        "work folder in the model",
        lambda desk: [*RUN, "--work-dir", "model/work"],
        "--work-dir FOLDER/model/work: lies in the model folder; name another folder",
    ),
    Case(
        "the same, by --dry-run",
        lambda desk: [*RUN, "--work-dir", "model/work", "--dry-run"],
        "--work-dir FOLDER/model/work: lies in the model folder; name another folder",
    ),
    Case(
        "work folder with a name that is too long",
        lambda desk: [*RUN, "--work-dir", "w" * 300, "--dry-run"],
        f"FOLDER/{'w' * 300}: cannot be written (File name too long); choose another --output or --work-dir, or make "
        "it writable",
    ),
    Case(
        "terminal codes and line ends in a name",
        lambda desk: desk.recipe("output: out", 'output: "mo\\e[2Jdel\\n/../model/\\e[1mx"'),
        "recipe.yaml:5: output: mo\\x1b[2Jdel /../model/\\x1b[1mx: lies inside the model folder; name another folder",
    ),
]
