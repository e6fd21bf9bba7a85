# Every target makes its own virtual environment and installs what it needs.
PYTHON ?= python3
TORCH ?= torch==2.13.0
TRITON ?= triton==3.6.0
OPEN_CLIP = open_clip_torch==3.3.0
OPEN_CLIP_NEEDS = ftfy==6.3.1 regex==2026.11.15 webdataset==1.0.2 pandas==3.1.1
KERNELS = kernels==0.17.2
STACKS = transformers==5.23.0 sentence-transformers==6.2.0 lightning==2.6.6 accelerate==1.15.0 datasets==5.2.0
OLDEST_STACKS = transformers==5.4.0 sentence-transformers==6.2.0 lightning==2.6.6 accelerate==1.15.0 datasets==5.2.0
DOCS = mkdocs-material mkdocstrings-python ruff linkchecker
TOOLS = check-jsonschema zizmor pre-commit
VENV = .venv
DOCS_VENV = .venv-docs
STACKS_VENV = .venv-integrations
NEWEST_VENV = .venv-newest
TOOLS_VENV = .venv-tools
MINUTES = 5
STEPS = 10000
SCHEDULES = 2000
RUN = $(VENV)/bin/python
PRODUCT = tests/core tests/triton_backend tests/distributed
# Triton's kernels in its interpreter.
QUICK_INTERPRETER = HYPOTHESIS_PROFILE=quick TRITON_INTERPRET=1 $(RUN) -m pytest $(PRODUCT) \
	-m "interpreter and not exhaustive" -n 2 --dist loadfile

.PHONY: demo demo-full test test-all test-ci paper fuzz mutations longrun soak-gluon coverage test-integrations test-peers test-newest-triton test-newest-triton-ci environments test-oldest test-newest bench bench-integrations docs lint kernel-hub test-kernel-hub release-check release-ready links-elsewhere lint-github test-oldest-stacks test-newest-stacks test-gpu clean

# Under two minutes on two cores; writes to build/demo. Threads sleep while they wait: where other
# programs run, those that spin would take each other's time, and the fused loss waits most often.
demo demo-full: export OMP_WAIT_POLICY = passive
demo: $(VENV)/ready
	$(RUN) -m examples.emoji

# Some minutes: larger batches. With `--full --record` by hand it replaces what docs/ shows.
demo-full: $(VENV)/ready
	$(RUN) -m examples.emoji --full

# The paper's claims at a small scale: runs what is missing, writes docs/paper.md.
paper: $(VENV)/ready
	$(RUN) -m benchmarks.studies --all

# The product's own tests, in five minutes. What is marked as exhaustive is left out (tests/conftest.py).
test: $(VENV)/ready
	HYPOTHESIS_PROFILE=quick $(RUN) -m pytest $(PRODUCT) -m "not exhaustive" -n 2 --dist loadfile
	$(QUICK_INTERPRETER)

# Everything: those again at full length, the tooling, slices of the soak tests, the studies.
test-all: $(VENV)/ready
	$(RUN) -m pytest -n 2 --dist loadfile
	TRITON_INTERPRET=1 $(RUN) -m pytest -m interpreter -n 2 --dist loadfile

# What .ci/run takes of these: docs/test_suites.md says what holds the facts of the rest.
test-ci: $(VENV)/ready
	$(RUN) -m pytest -m "not beyond_ci" -n 2 --dist loadfile
	TRITON_INTERPRET=1 $(RUN) -m pytest -m "interpreter and not exhaustive" -n 2 --dist loadfile

# The invariants of the loss on random calls, until one does not hold.
fuzz: $(VENV)/ready
	PYTHONPATH=tests $(RUN) -m soak.fuzz --minutes $(MINUTES)

# The package broken on purpose, one line at a time: which test notices.
mutations: $(VENV)/ready
	PYTHONPATH=tests $(RUN) -m soak.mutations

# Steps of changing batch size: neither memory nor errors nor compiled graphs grow.
longrun: $(VENV)/ready
	PYTHONPATH=tests $(RUN) -m soak.longrun --steps $(STEPS)

# The Gluon panel kernel on the emulator, a random order of events each.
soak-gluon: $(VENV)/ready
	PYTHONPATH=tests $(RUN) -m soak.gluon_soak --schedules $(SCHEDULES)

# Of fused_siglip/ and the torch backend, also in the processes that tests start.
coverage: $(VENV)/ready
	$(VENV)/bin/coverage erase
	$(VENV)/bin/coverage run -m pytest
	$(VENV)/bin/coverage combine --quiet
	$(VENV)/bin/coverage report --fail-under=95
	mkdir -p build
	$(VENV)/bin/coverage json --quiet -o build/coverage.json
	$(RUN) -m benchmarks.report.coverage_report build/coverage.json

# The training stacks themselves, each with a tiny model.
test-integrations: VENV = $(STACKS_VENV)
test-integrations: $(STACKS_VENV)/ready
	cd tests/integrations && ../../$(RUN) -m pytest -n 2 --dist loadfile

# The peers' own tests on this loss, from their source distributions; docs/trust.md counts them.
test-peers: VENV = $(STACKS_VENV)
test-peers: $(STACKS_VENV)/peers
	cd tests/peers && ../../$(RUN) sources.py
	cd tests/peers && ../../$(RUN) -m pytest -n 2

# The kernels again, on the newest release of triton: compiled for bf16 (make test-all compiles all of
# them, with the pinned release), and in the interpreter.
test-newest-triton: VENV = $(NEWEST_VENV)
test-newest-triton: $(NEWEST_VENV)/ready
	$(RUN) -m pytest tests/triton_backend/test_triton_compiled.py -k "bfloat16 or variants or masked" -n 2
	$(QUICK_INTERPRETER)

# What .ci/run takes of these.
test-newest-triton-ci: VENV = $(NEWEST_VENV)
test-newest-triton-ci: $(NEWEST_VENV)/ready
	$(RUN) -m pytest tests/triton_backend/test_triton_compiled.py -m "not beyond_ci" \
		-k "bfloat16 and (diagonal or logit-True or tallied) or forward or masked" -n 2
	HYPOTHESIS_PROFILE=quick TRITON_INTERPRET=1 $(RUN) -m pytest tests/triton_backend \
		-m "interpreter and not exhaustive" -k "not dtype1 and not dtype2" -n 2 --dist loadfile

# The ends of what pyproject.toml allows. Both are CUDA builds: gigabytes, minutes to install.
test-oldest: TORCH = torch==2.10.0
test-oldest: TRITON = triton==3.6.0
test-oldest: VENV = .venv-oldest
test-newest: TORCH = torch
test-newest: TRITON = triton
test-newest: VENV = .venv-newest-torch
test-oldest test-newest:
	$(MAKE) VENV=$(VENV) TORCH=$(TORCH) TRITON=$(TRITON) $(VENV)/ready
	$(RUN) -m fused_siglip
	HYPOTHESIS_PROFILE=quick $(RUN) -m pytest tests/core tests/distributed -m "not exhaustive" -n 2 --dist loadfile
	$(QUICK_INTERPRETER)

# The package as a kernel for Hugging Face's `kernels`: docs/kernel_hub.md.
kernel-hub:
	$(PYTHON) .ci/kernel_hub/layout.py build/kernel-hub

# That library loads it. The package itself is not installed there.
test-kernel-hub: VENV = .venv-kernel-hub
test-kernel-hub: .venv-kernel-hub/kernels
	cd tests/kernel_hub && PYTHONDONTWRITEBYTECODE=1 ../../$(RUN) -m pytest -p no:cacheprovider

# What a stranger does on the day of a release, in an empty environment: minutes, gigabytes. The
# distributions that passed go to dist/. PYTHONS: other interpreters, in which the wheel is compiled.
PYTHONS =
release-check:
	$(PYTHON) .ci/release_check.py --torch $(TORCH) --output dist --pythons $(PYTHONS)

# Whether a tag may be published: docs/releasing.md.
TAG = v0.0.0
release-ready:
	$(PYTHON) .ci/release_ready.py $(TAG)

bench: $(VENV)/ready
	$(RUN) -m benchmarks.suites.loss

bench-integrations: VENV = $(STACKS_VENV)
bench-integrations: $(STACKS_VENV)/ready
	PYTHONPATH=tests:tests/integrations $(RUN) -m benchmarks.suites.integrations

# The ends of what the extras of the training stacks allow.
test-oldest-stacks:
	$(MAKE) test-integrations STACKS_VENV=.venv-oldest-stacks STACKS="$(OLDEST_STACKS)" OPEN_CLIP=open_clip_torch==3.0.0
test-newest-stacks:
	$(MAKE) test-integrations STACKS_VENV=.venv-newest-stacks OPEN_CLIP=open_clip_torch \
		STACKS="transformers sentence-transformers lightning accelerate datasets"

# On a GPU, with a CUDA build of torch.
test-gpu: TORCH = torch
test-gpu: TRITON = triton
test-gpu: VENV = .venv-newest-torch
test-gpu:
	$(MAKE) VENV=$(VENV) TORCH=$(TORCH) TRITON=$(TRITON) $(VENV)/ready
	$(RUN) -m fused_siglip --bench --report build/self-check
	$(RUN) -m pytest tests/core tests/triton_backend -m gpu

# The documentation as a site, in build/site, and its links. Nothing is imported: it needs no torch.
docs: $(DOCS_VENV)/ready
	NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/mkdocs build --strict --config-file docs/site/mkdocs.yml
	$(DOCS_VENV)/bin/linkchecker --no-status --no-warnings build/site/index.html

# Needs the network, and fails where somebody else's server does.
links-elsewhere: docs
	$(DOCS_VENV)/bin/linkchecker --no-status --no-warnings --check-extern build/site/index.html

lint: $(VENV)/ready lint-github
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# Workflows, issue forms and the like, against the schemas that the tool brings; offline.
SCHEMA = $(TOOLS_VENV)/bin/check-jsonschema --builtin-schema
lint-github: $(TOOLS_VENV)/ready
	$(SCHEMA) vendor.github-workflows .github/workflows/*.yml
	$(SCHEMA) custom.github-workflows-require-timeout .github/workflows/*.yml
	$(SCHEMA) vendor.github-issue-forms .github/ISSUE_TEMPLATE/bug.yml .github/ISSUE_TEMPLATE/performance.yml
	$(SCHEMA) vendor.github-issue-config .github/ISSUE_TEMPLATE/config.yml
	$(SCHEMA) vendor.dependabot .github/dependabot.yml
	$(SCHEMA) vendor.citation-file-format CITATION.cff
	$(TOOLS_VENV)/bin/pre-commit validate-config .github/pre-commit-config.yaml
	$(TOOLS_VENV)/bin/zizmor --offline --quiet --pedantic .github

clean:
	rm -rf .venv .venv-docs .venv-tools .venv-kernel-hub .venv-oldest-stacks .venv-newest-stacks .venv-integrations .venv-newest .venv-oldest .venv-newest-torch build dist *.egg-info

# torch first and pinned: any other package would bring its own choice. open_clip without its
# dependencies: the tests load its loss, which needs torch alone.
$(VENV)/ready: pyproject.toml setup.py Makefile .ci/constraints.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --quiet --disable-pip-version-check $(TORCH)
	$(@D)/bin/pip install --quiet --disable-pip-version-check -c .ci/constraints.txt $(TRITON) -e .[dev]
	$(@D)/bin/pip install --quiet --disable-pip-version-check --no-deps $(OPEN_CLIP)
	touch $@

# Environments on top of .venv: they hold what differs, and see the rest there. Beside them nothing is
# installed twice, neither torch nor the package.
BELOW = .venv
SITE = -c "import sysconfig; print(sysconfig.get_path('purelib'))"
define on_top
$(PYTHON) -m venv $(@D)
echo "import site; site.addsitedir('$$($(BELOW)/bin/python $(SITE))')" \
	> "$$($(@D)/bin/python $(SITE))/below.pth"
endef

$(NEWEST_VENV)/ready: $(BELOW)/ready
	$(on_top)
	$(@D)/bin/pip install --quiet --disable-pip-version-check --upgrade triton
	touch $@

# torch is named again, so that no stack brings another. timm and torchvision without their
# dependencies: torchvision asks for a torch of its own build.
$(STACKS_VENV)/ready: $(BELOW)/ready
	$(on_top)
	$(@D)/bin/pip install --quiet --disable-pip-version-check -c .ci/constraints.txt $(TORCH) $(STACKS) $(OPEN_CLIP_NEEDS)
	$(@D)/bin/pip install --quiet --disable-pip-version-check --no-deps $(OPEN_CLIP) timm==1.0.31 torchvision==0.28.0
	touch $@

# What transformers' tests import besides.
$(STACKS_VENV)/peers: $(STACKS_VENV)/ready
	$(@D)/bin/pip install --quiet --disable-pip-version-check parameterized==0.9.0
	touch $@

# All that .ci/run needs.
environments: $(VENV)/ready $(STACKS_VENV)/ready $(NEWEST_VENV)/ready $(DOCS_VENV)/ready $(TOOLS_VENV)/ready

.venv-kernel-hub/kernels: Makefile .ci/constraints.txt
	$(PYTHON) -m venv .venv-kernel-hub
	.venv-kernel-hub/bin/pip install --quiet --disable-pip-version-check $(TORCH)
	.venv-kernel-hub/bin/pip install --quiet --disable-pip-version-check -c .ci/constraints.txt $(TORCH) $(KERNELS) pytest
	touch $@

$(TOOLS_VENV)/ready: Makefile .ci/constraints.txt
	$(PYTHON) -m venv $(TOOLS_VENV)
	$(TOOLS_VENV)/bin/pip install --quiet --disable-pip-version-check -c .ci/constraints.txt $(TOOLS)
	touch $@

# The docs extra, without the package itself.
$(DOCS_VENV)/ready: Makefile .ci/constraints.txt
	$(PYTHON) -m venv $(DOCS_VENV)
	$(DOCS_VENV)/bin/pip install --quiet --disable-pip-version-check -c .ci/constraints.txt $(DOCS)
	touch $@
