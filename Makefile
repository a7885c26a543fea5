# Everything on a machine that has only Python (3.11 or newer):
#   make demo    the environment, then NFDM trained, measured and sampled on real digits
#   make test    the environment, then the tests
#   make lint    the environment, then formatting, lint and types
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
RUN := runs/demo-$(shell date +%Y%m%d-%H%M%S)
STEPS ?= 600

.PHONY: demo test lint environment
environment: $(READY)

$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (6 GB, a few minutes the first time)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	@touch $(READY)

# Idle threads that spin slow each other down many times over on a shared machine: let them sleep.
demo: export OMP_WAIT_POLICY := passive
demo: $(READY)
	$(BIN)/lightning fit --config configs/digits_nfdm.yaml --trainer.default_root_dir=$(RUN) --trainer.max_steps=$(STEPS)
	$(BIN)/lightning test --config configs/digits_nfdm.yaml --trainer.default_root_dir=$(RUN) --ckpt_path=last
	$(BIN)/lightning sample --ckpt_path=$(RUN)/checkpoints/last.ckpt --trajectories=true
	@echo "samples and trajectories: $(RUN)/samples   training pictures: $(RUN)/pictures   curves: tensorboard --logdir $(RUN)"

test: export OMP_NUM_THREADS := 1
test: $(READY)
	$(BIN)/python -m pytest -n 2 --dist worksteal

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
