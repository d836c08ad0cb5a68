# Two commands do everything: `make demo` and `make test`. Both install what they need first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SUDO := $(shell [ "$$(id -u)" = 0 ] || echo sudo)
# Where no GPU is, torch's own index of wheels without CUDA's gigabytes; `TORCH_INDEX_URL=` asks no index but pip's.
TORCH_INDEX_URL ?= $(if $(wildcard /dev/nvidiactl /dev/dxg),,https://download.pytorch.org/whl/cpu)
DEMO_PACKAGES := rabbitmq-server fonts-nanum fonts-dejavu-core
DEMO_MARKS := /usr/lib/rabbitmq/bin/rabbitmq-server /usr/share/fonts/truetype/nanum
# Debian splits venv off its Python; other Pythons bring it along.
DEMO_PACKAGES += $(shell $(PYTHON) -c 'import ensurepip' 2>/dev/null || echo python3-venv)
# Ubuntu's is a snap: tests with a browser take playwright's own there, or are skipped.
CHROMIUM := $(shell . /etc/os-release; [ "$$ID" = ubuntu ] || echo chromium)
TEST_PACKAGES := prometheus $(CHROMIUM) libimage-exiftool-perl fonts-vlgothic fonts-wqy-microhei libfribidi0
TEST_MARKS := /usr/bin/promtool $(CHROMIUM:%=/usr/bin/%) /usr/bin/exiftool \
	/usr/share/fonts/truetype/vlgothic /usr/share/fonts/truetype/wqy /usr/share/doc/libfribidi0
# RUNLEVEL=1 keeps Debian from starting a broker and a Prometheus of its own: demo and tests run private ones.
APT_INSTALL := $(SUDO) env RUNLEVEL=1 DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends
LANGUAGE_PACKAGES := php-cli php-amqplib ruby ruby-bunny golang-go golang-github-rabbitmq-amqp091-go-dev default-jdk-headless \
	librabbitmq-client-java libjackson2-databind-java
# A file's tests share its world, so a file stays with one process; conftest.py sorts the files. More processes than
# cores: tests wait for servers half of the time.
SHARED_OUT := -n 4 --dist loadfile --no-loadscope-reorder
PYTHON312 ?= python3.12
OUT ?= out/gpu
REHEARSAL := $(CURDIR)/out/gpu-rehearsal
MACHINE_PYTHON ?= $(REHEARSAL)/machine/bin/python
# Hundreds of processes are started; without it (images of Python set it) each would compile what it imports.
unexport PYTHONDONTWRITEBYTECODE
CODE := worker inference watermark clients config examples tests benchmarks

.PHONY: help install demo styles overlays wheel house docs screenshots quick test suite long check coverage outage leaks field languages faults matrix mutations campaign hostile bench recovery bench-gpu gpu-wheels gpu-rehearsal image demo-model clean
.DEFAULT_GOAL := help

help: ## List these targets
	@grep -E '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

install: $(VENV)/.installed ## Make .venv and install what the demo and the tests need

# torch goes first and alone: where no GPU is, any later chance to choose would bring gigabytes of CUDA.
$(VENV)/.demo: pyproject.toml constraints.txt | $(DEMO_MARKS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt \
		$$($(BIN)/python tests/support/torch_index.py "$(TORCH_INDEX_URL)") torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[demo]'
	touch $@

$(VENV)/.installed: $(VENV)/.demo | $(TEST_MARKS)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

$(DEMO_MARKS) &:
	$(SUDO) apt-get update -qq
	$(APT_INSTALL) $(DEMO_PACKAGES) >/dev/null

$(TEST_MARKS) &:
	$(SUDO) apt-get update -qq
	$(APT_INSTALL) $(TEST_PACKAGES) >/dev/null

# The Node that a dev dependency brings: Debian's npm would bring hundreds of packages of its own.
node_modules/.package-lock.json: package.json package-lock.json | install
	PATH="$(CURDIR)/$(BIN):$$PATH" npm ci --ignore-scripts --no-audit --no-fund --silent
	touch $@

demo: $(VENV)/.demo ## Run sixteen jobs for real on this machine; pictures and timeline land in out/
	HF_HUB_OFFLINE=1 $(BIN)/darkroom demo --out out

styles: install ## Eight things, plain and in each style, drawn by a real worker; the sheet lands in out/styles
	HF_HUB_OFFLINE=1 $(BIN)/python -m examples.demo.styles

overlays: install ## Sheets of headlines: places, scripts, grounds and dresses, for the eye; they land in out/overlays
	$(BIN)/python -m examples.overlays out/overlays

wheel: ## Build the wheel, with the demo's model in it, into dist/
	rm -rf build dist
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip wheel --quiet --no-deps --wheel-dir dist .

# mkdocs-material's notice of its successor is not about these pages.
docs: install node_modules/.package-lock.json ## Build the site of docs/ into out/docs; a link that leads nowhere fails it
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	@echo "open out/docs/index.html"

screenshots: install ## Take the pictures of the status page in docs/, of a real worker at work
	HF_HUB_OFFLINE=1 $(BIN)/python -m tests.support.pages.screenshots

check: install ## Style and types
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/mypy

house: install ## The shape of the source beside its goals: sizes, one-caller helpers, suppressions, docstrings (TREE=another checkout, LIST=1)
	$(BIN)/python -m tests.support.house $(if $(LIST),--list) $(TREE)

# What is left out is read from the source: tests/support/quick.py.
quick: install ## Every test that needs no server, no model and no other program, in under a minute
	OMP_NUM_THREADS=1 $(BIN)/pytest --quick -q -n 2 --dist loadfile --no-loadscope-reorder

# mypy keeps one core busy and the other idle, so it runs beside the first tests.
test: install node_modules/.package-lock.json ## Everything, on a real broker, a real object store and real models; and `check`
	@$(MAKE) --no-print-directory --jobs 2 check suite

suite:
	OMP_NUM_THREADS=1 $(BIN)/pytest $(SHARED_OUT)

long: install node_modules/.package-lock.json ## Everything, with the tests that take long, and those of every fault
	OMP_NUM_THREADS=1 LONG=1 $(BIN)/pytest $(SHARED_OUT)

# Killed processes say nothing of what they ran, so the figures are a little low.
coverage: install node_modules/.package-lock.json ## Which branches the tests take, in workers and engines too; the pages land in out/coverage
	rm -f .coverage .coverage.*
	OMP_NUM_THREADS=1 $(BIN)/coverage run -m pytest $(SHARED_OUT)
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage html --quiet --directory out/coverage
	$(BIN)/coverage report --skip-covered

outage: install ## The long form of one test: the backend is down for two minutes
	OMP_NUM_THREADS=1 OUTAGE_SECONDS=120 $(BIN)/pytest tests/live/test_outage.py

leaks: install ## Another that takes long: 300 jobs with 40 adapters in 8 slots, memory and pictures looked at
	OMP_NUM_THREADS=1 LONG=1 LEAK_JOBS=300 $(BIN)/pytest tests/live/test_leaks.py --log-cli-level=WARNING

field: install ## The backend that the worker was made for: its messages, its trainer's folders, its answers and faults
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 LONG=1 FIELD_STYLES=10 $(BIN)/pytest tests/live/test_field.py

languages: install node_modules/.package-lock.json ## The publishers in PHP, Ruby, Go and Java: installs the four by apt and runs them against a real RabbitMQ
	$(SUDO) env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $(LANGUAGE_PACKAGES) >/dev/null
	$(BIN)/pytest tests/examples/test_publishers.py

faults: install ## Every fault on the way to broker, store and backend, and in the process: those too that take long
	OMP_NUM_THREADS=1 LONG=1 $(BIN)/pytest tests/faults/test_proxy.py tests/live/test_faults.py tests/live/test_faults_*.py \
		tests/live/test_leases.py tests/live/drawing/test_batching.py tests/inference/process/test_engine_process.py tests/campaigns/test_campaigns.py

# DEBIAN_MIRROR and UBUNTU_MIRROR are for where their own archives are not reached. MATRIX_MOUNTS (here:there, comma-separated)
# are shown to each root: a /etc/pip.conf, a file for /etc/apt/apt.conf.d, certificates. MACHINES names some of them, FRESH=1 makes all anew.
matrix: install ## As root: the demo, all tests, and those of the broker in their long form, on Debian 13, Ubuntu 24.04 and RabbitMQ 4.3
	$(SUDO) env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends debootstrap >/dev/null
	$(SUDO) env PATH="$$PATH" DEBIAN_MIRROR="$(DEBIAN_MIRROR)" UBUNTU_MIRROR="$(UBUNTU_MIRROR)" MATRIX_MOUNTS="$(MATRIX_MOUNTS)" \
		TORCH_INDEX_URL="$(TORCH_INDEX_URL)" PYTHON312="$(PYTHON312)" $(BIN)/python -m tests.matrix $(if $(FRESH),--fresh) $(MACHINES)

mutations: install ## Take the mechanism behind each row of the fault matrix out of a copy, and see its tests fail
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.mutations

# CAMPAIGN is kill, network, sigterm, outage or storm; without it all of them, one after another. RESUME is a folder below out/.
campaign: install ## Hundreds of jobs while everything fails at random (CAMPAIGN=kill JOBS=1000 ACTIONS=200 WORKERS=2 SEED=1)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.campaigns $(CAMPAIGN) $(if $(JOBS),--jobs $(JOBS)) \
		$(if $(ACTIONS),--actions $(ACTIONS)) $(if $(WORKERS),--workers $(WORKERS)) $(if $(SEED),--seed $(SEED)) \
		$(if $(RESUME),--resume $(RESUME))

hostile: install ## The long form of more: every hostile input, 2000 fuzzed messages through a worker, 200000 with fuzzed properties, 100000 through the decoder
	OMP_NUM_THREADS=1 HOSTILE_VARIANTS=all HOSTILE_FUZZED=2000 $(BIN)/pytest tests/live/test_hostile.py --log-cli-level=WARNING
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m tests.hostile.fuzzing
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.hostile.fuzzed_deliveries

bench: install ## Batching against plain diffusers, what a job costs beyond the bare pipeline, loading, and what previews cost, on the CPU
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.batching --swap --mixed
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.overhead
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.loading
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.previews

recovery: install ## How long it takes until a job is at work again after a part has failed
	$(BIN)/python -m benchmarks.recovery

# Without `install`: a CUDA machine may have no network. It needs torch there and what gpu-wheels fetches.
bench-gpu: ## Everything that is promised of a GPU, measured on one in under eight minutes; figures land in OUT
	$(firstword $(wildcard $(BIN)/python) $(PYTHON)) -m benchmarks.gpu --out $(OUT) --budget 460

# For Python 3.12 on x86-64, whatever runs here. pip takes each of these tags by its exact name.
gpu-wheels: ## Fetch into .whl/ what bench-gpu needs beside torch on a machine without network
	rm -rf .whl
	$(PYTHON) -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
		--platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
		--dest .whl --requirement benchmarks/gpu/wheels.txt
	du -sh .whl

# MACHINE_PYTHON may be the Python of another environment that holds what machine.txt lists; nothing is installed into it.
gpu-rehearsal: gpu-wheels $(if $(filter $(REHEARSAL)/%,$(MACHINE_PYTHON)),$(REHEARSAL)/machine/.installed) ## What bench-gpu does on such a machine, at tiny size on the CPU: a clean export, those wheels alone
	rm -rf $(REHEARSAL)/site $(REHEARSAL)/tree $(REHEARSAL)/results
	mkdir -p $(REHEARSAL)/tree
	git archive HEAD | tar -x -C $(REHEARSAL)/tree
	$(MACHINE_PYTHON) -m pip install --quiet --no-index --no-deps --no-compile --target $(REHEARSAL)/site .whl/*.whl
	cd $(REHEARSAL)/tree && PYTHONPATH=../site:. PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 \
		$(MACHINE_PYTHON) -m benchmarks.gpu --device cpu --size tiny --out ../results

$(REHEARSAL)/machine/.installed: benchmarks/gpu/machine.txt
	$(PYTHON312) -m venv $(REHEARSAL)/machine
	$(REHEARSAL)/machine/bin/pip install --quiet --requirement benchmarks/gpu/machine.txt
	touch $@

# IMAGE_MOUNTS (host:container, comma-separated) are shown to the build's steps: a /etc/pip.conf, a mirror's certificates.
image: install ## As root: build the image without an engine, in chroots, then run `darkroom check` in it (TARGET=cpu, cuda or demo)
	$(SUDO) env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends buildah debootstrap >/dev/null
	$(SUDO) env PATH="$$PATH" IMAGE_MOUNTS="$(IMAGE_MOUNTS)" TORCH_INDEX_URL="$(TORCH_INDEX_URL)" \
		$(BIN)/python -m tests.image $(or $(TARGET),cpu)

# It goes on where it was interrupted. INSTALL=1 copies the result over the bundled model.
demo-model: install ## Make the demo model anew from its pictures, into out/demo_model
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m examples.demo_model.recipe --out out/demo_model $(if $(INSTALL),--install)

clean: ## Remove what the other targets made
	rm -rf $(VENV) node_modules .whl out build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
