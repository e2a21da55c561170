# make demo          the whole method on drawn scenes, minutes on two cores
# make test          the tests
# make bench         timings: kernels, training step, loader
# make map           the README's map of equations
# make walkthrough   the page beside the paper
# make clean         delete the environment and generated data; runs stay
PY := .venv/bin/python
PYTHON ?= python3
DEMO := --data scenes --ratio 0.1 --train-images 1000 --epochs 30 --eval-every 10

.PHONY: demo test bench map walkthrough clean

.venv/done: requirements.txt
	$(PYTHON) -c 'import sys; v = sys.version.split()[0]; \
	    assert sys.version_info >= (3, 10), f"Python 3.10 or newer is needed, this is {v}"'
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --disable-pip-version-check -r requirements.txt
	touch .venv/done

demo: .venv/done
	rm -rf runs/demo-dualcoop runs/demo
	$(PY) train.py $(DEMO) --matching dualcoop --out runs/demo-dualcoop
	$(PY) train.py $(DEMO) --out runs/demo
	$(PY) eval.py runs/demo-dualcoop --compare runs/demo
	@echo "look at runs/demo/regions.png, then open docs/walkthrough.html: the paper beside the code"

test: .venv/done
	$(PY) -m pytest -q -n auto --maxprocesses 8 --dist worksteal tests

walkthrough: .venv/done
	$(PY) -m paper.walkthrough

map: .venv/done
	$(PY) -m tools.equation_map
	$(PY) -m paper.walkthrough --text

bench: .venv/done
	$(PY) -m pytest -q -s tests/bench_*.py

clean:
	rm -rf .venv generated
