# SPDX-License-Identifier: MIT
# Everything that is downloaded or built outside the checkout goes to UCM_CACHE_DIR.
UCM_CACHE_DIR ?= $(HOME)/.cache/ucm-sdk
export UCM_CACHE_DIR
PYTHON ?= python3.11
TOX := $(UCM_CACHE_DIR)/venvs/tox/bin/tox
DEMO := $(UCM_CACHE_DIR)/venvs/demo
DEMO_SGLANG := $(UCM_CACHE_DIR)/venvs/demo-sglang
SDK := $(UCM_CACHE_DIR)/venvs/sdk
LOOPS ?= 100
SECONDS ?= 60
DAMAGES ?= 10000
MODEL := $(UCM_CACHE_DIR)/models/SmolLM2-135M-Instruct
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: help test demo demo-cross demo-prefill-offload demo-window demo-blend demo-pd bench-store eval-sparse crash capacity damage clean install-demo install-demo-sglang install-sdk

help:
	@echo "make test   lint, types, C tests, unit, conformance, documentation and real-engine tests"
	@echo "make demo   serve a model with vLLM, restart it, see the KV come back from the store"
	@echo "make demo-cross  vLLM prefills and SGLang answers from its KV, and the other way round"
	@echo "make demo-prefill-offload  prompts whose KV is many times vLLM's pool"
	@echo "make demo-window  texts twice as long as what the model was trained on"
	@echo "make demo-blend  chunks whose KV was computed elsewhere, in any order"
	@echo "make demo-pd  one engine computes prompts, two others answer, and instances are killed"
	@echo "make bench-store  the file store beside the machine's limits and other stores"
	@echo "make eval-sparse  what each sparse attention method costs in quality, in short"
	@echo "make crash LOOPS=1000  kill writers and a reader again and again, and check what is there"
	@echo "make capacity SECONDS=300   four writers want more room than they may have"
	@echo "make damage DAMAGES=10000   flip, swap, zero and cut off stored bytes, and load"
	@echo "make clean  remove what was built in the checkout"

test: $(TOX)
	$(TOX) run $(TOX_ARGS)

install-demo: $(DEMO)/bin/python
	@echo "installing vLLM and ucm-sdk into $(DEMO); the first time takes a few minutes"
	$(DEMO)/bin/python tools/install_vllm.py
	$(DEMO)/bin/python -m pip install -q --force-reinstall --no-deps ".[vllm]"
	$(DEMO)/bin/python -m pip install -q ".[vllm]" gguf

demo: install-demo
	$(DEMO)/bin/python tools/make_model.py $(MODEL)
	PYTHONSAFEPATH=1 $(DEMO)/bin/python examples/demo_prefix_cache.py $(MODEL)

install-demo-sglang: $(DEMO_SGLANG)/bin/python
	@echo "installing SGLang and ucm-sdk into $(DEMO_SGLANG)"
	$(DEMO_SGLANG)/bin/python tools/install_sglang.py
	$(DEMO_SGLANG)/bin/python -m pip install -q --force-reinstall --no-deps ".[sglang]"
	$(DEMO_SGLANG)/bin/python -m pip install -q ".[sglang]"

demo-cross: install-demo install-demo-sglang
	$(DEMO)/bin/python tools/make_model.py $(MODEL)
	PYTHONSAFEPATH=1 $(DEMO)/bin/python examples/demo_cross.py $(MODEL) \
	  $(DEMO)/bin/python $(DEMO_SGLANG)/bin/python

demo-prefill-offload: install-demo
	$(DEMO)/bin/python tools/make_model.py $(MODEL)
	PYTHONSAFEPATH=1 $(DEMO)/bin/python examples/demo_prefill_offload.py $(MODEL)

demo-window: install-demo
	$(DEMO)/bin/python tools/make_model.py $(MODEL)
	PYTHONSAFEPATH=1 $(DEMO)/bin/python examples/demo_window.py $(MODEL)

demo-blend: install-demo
	$(DEMO)/bin/python tools/make_model.py $(MODEL)
	PYTHONSAFEPATH=1 $(DEMO)/bin/python examples/demo_blend.py $(MODEL)

demo-pd: install-demo install-demo-sglang
	$(DEMO)/bin/python -m pip install -q ".[vllm,proxy]"
	$(DEMO)/bin/python tools/make_model.py $(MODEL)
	PYTHONSAFEPATH=1 $(DEMO)/bin/python examples/demo_pd.py $(MODEL) \
	  $(DEMO)/bin/python $(DEMO_SGLANG)/bin/python

bench-store: install-demo
	$(DEMO)/bin/python -m pip install -q --no-deps lmcache==0.5.6
	$(DEMO)/bin/python benchmarks/bench_store.py

install-sdk: $(SDK)/bin/python
	$(SDK)/bin/python -m pip install -q --force-reinstall --no-deps .
	$(SDK)/bin/python -m pip install -q .

eval-sparse: install-sdk
	$(SDK)/bin/python -m pip install -q ".[eval]" gguf
	$(SDK)/bin/python tools/make_model.py $(MODEL)
	PYTHONSAFEPATH=1 $(SDK)/bin/ucm eval sparse $(MODEL) --tokens 2048 --share kv_head \
	  --output build/eval-sparse.json

crash: install-sdk
	PYTHONSAFEPATH=1 $(SDK)/bin/python tools/crash.py --loops $(LOOPS)

capacity: install-sdk
	PYTHONSAFEPATH=1 $(SDK)/bin/python tools/capacity.py --seconds $(SECONDS)

damage: install-sdk
	$(SDK)/bin/python -m pip install -q pytest pytest-timeout hypothesis
	DAMAGES=$(DAMAGES) PYTHONSAFEPATH=1 $(SDK)/bin/python -m pytest -q tests/stores/test_file_damage.py

$(SDK)/bin/python:
	$(PYTHON) -m venv $(SDK)

$(TOX):
	$(PYTHON) -m venv $(UCM_CACHE_DIR)/venvs/tox
	$(UCM_CACHE_DIR)/venvs/tox/bin/python -m pip install -q "tox>=4.21"

$(DEMO)/bin/python:
	$(PYTHON) -m venv $(DEMO)

$(DEMO_SGLANG)/bin/python:
	$(PYTHON) -m venv $(DEMO_SGLANG)

clean:
	rm -rf build dist
