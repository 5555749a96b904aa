# Needs make and Python 3.10 or newer; everything that is installed goes into .venv.
#
#   make test PYTHON=python3.12             another interpreter
#   make test ARGS='-k lease -x -n 0'       more arguments for pytest
#   make demo EPOCHS=20                     a longer example
#   make chaos N=1000 SEED=7                as many runs with faults, from this seed on

PYTHON ?=
ARGS =
EPOCHS = 8
WORKERS = 4
N = 20
SEED = 1

# What a person exports for other work must not reach pip or the programs started here, and no
# test or demonstration may see an account: both run without one.
unexport PYTHONDONTWRITEBYTECODE PYTHONHOME PYTHONINSPECT PYTHONOPTIMIZE PYTHONPATH PYTHONSAFEPATH PYTHONWARNINGS
unexport PIP_NO_BUILD_ISOLATION PIP_NO_DEPS PIP_PREFIX PIP_PYTHON PIP_REQUIRE_HASHES PIP_ROOT PIP_TARGET
unexport $(filter CLOUDRUN_% CLOUDSDK_% GCE_% GCLOUD_% GCP_% GCS_% GOOGLE_% VAST_% VM_%,$(.VARIABLES))
unexport STORAGE_EMULATOR_HOST
export PIP_DISABLE_PIP_VERSION_CHECK = 1
export PIP_USER = 0

.PHONY: help demo test chaos lint bench layers clean again
.NOTPARALLEL:

help: ## this list
	@sed -n 's/^\([a-z]*\):.*## /  make \1	/p' Makefile

demo: .venv/with-nothing ## run the example here, as on a rented machine; needs no account
	@rm -rf build/demo && mkdir -p build/demo && cp -R examples/digits build/demo/
	@find build/demo/digits -type f \( -path '*/model/*' -o -path '*/checkpoint/*' \) ! -name .gitkeep -exec rm -f {} +
	@echo '$$ cd build/demo/digits; cloudrun -e EPOCHS=$(EPOCHS) main.py'
	@top=$$PWD && cd ./build/demo/digits && PATH="$$top/.venv/bin:$$PATH" \
	    CLOUDRUN_BACKEND=local XDG_DATA_HOME="$$top/build/demo/share" XDG_CACHE_HOME="$$top/build/demo/cache" \
	    "$$top/.venv/bin/python" "$$top/.venv/bin/cloudrun" -e EPOCHS=$(EPOCHS) main.py
	@echo '$$ cat model/metrics.json'
	@cat build/demo/digits/model/metrics.json

test: .venv/with-test ## all tests that need no account
	@.venv/bin/python -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

chaos: .venv/with-test ## N runs with faults drawn from SEED; N=100 and more are written to docs/chaos.md
	@.venv/bin/python -m tests.chaos $(N) --seed $(SEED) --jobs $(WORKERS) $(ARGS)

lint: .venv/with-lint ## ruff and strict mypy
	@status=0; \
	.venv/bin/python -m ruff check . || status=1; \
	.venv/bin/python -m ruff format --check . || status=1; \
	.venv/bin/python -m mypy || status=1; \
	exit $$status

bench: .venv/with-test ## each program in bench/, which prints what it measured
	@for program in bench/*.py; do \
	    [ -e "$$program" ] || { echo 'There are no benchmarks in bench/ yet.'; exit 1; }; \
	    echo "$$program"; .venv/bin/python "$$program" $(ARGS) || exit 1; \
	done

layers: .venv/with-test ## put all but one of what ends a bill out of action, in turn, and print who ended it when
	@.venv/bin/python -m pytest -n $(WORKERS) -q --table tests/e2e/test_layers.py $(ARGS)

clean: ## remove all that the other targets made
	rm -rf .venv build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache .coverage .coverage.* htmlcov
	find . -name .git -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

# Editable, so that a change is tested without another install, and with PEP 517, because pip's older
# way writes a bin/cloudrun that imports pkg_resources at each start and needs setuptools in .venv.
define install
@echo 'Installing $(1) into .venv ...'
@.venv/bin/python -m pip install --quiet --use-pep517 --editable '$(1)' || { echo; \
    echo 'pip could not install what cloudrun needs; its own message stands above.' \
        'It needs a network or a mirror (PIP_INDEX_URL). Then run make again.'; exit 1; } >&2
@touch $@
endef

.venv/with-nothing: .venv/made-for setup.cfg setup.py bin/cloudrun
	$(call install,.)

.venv/with-%: .venv/made-for setup.cfg setup.py bin/cloudrun
	$(call install,.[$*])

# Made anew when the checkout has moved (what is installed holds its path) or PYTHON is another one.
ifneq ($(shell cat .venv/made-for 2>/dev/null),$(CURDIR) $(PYTHON))
.venv/made-for: again
endif

.venv/made-for: export MADE_FOR = $(CURDIR) $(PYTHON)
.venv/made-for:
	@if [ -n '$(PYTHON)' ]; then set -- '$(PYTHON)'; \
	else set -- python3 python3.14 python3.13 python3.12 python3.11 python3.10; fi; \
	found=; \
	for python do \
	    if "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then found=$$python; break; fi; \
	done; \
	if [ -z "$$found" ]; then \
	    echo "cloudrun needs Python 3.10 or newer, and $$1 is $$("$$1" -V 2>/dev/null || echo not there)." \
	        'Install one, or say where it is: make PYTHON=/path/to/python3' >&2; exit 1; \
	fi; \
	if ! "$$found" -c 'import ensurepip, venv' 2>/dev/null; then \
	    echo "$$found cannot make virtual environments; on Debian and Ubuntu:" \
	        "apt-get install $$("$$found" -c 'import sys; print("python3.%d-venv" % sys.version_info[1])')" >&2; exit 1; \
	fi; \
	echo "Making .venv with $$("$$found" -V) ($$found)" && \
	"$$found" -m venv --clear .venv && printf '%s\n' "$$MADE_FOR" > .venv/made-for
