# Two commands do everything on a fresh Debian machine with Rust, Python and Node: `make run` and `make test`.

# Builds are kept apart by processor, since the inference kernels are compiled for the one at hand.
CACHE      ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/electron-gateway
CPU        := $(shell (grep -m1 '^flags' /proc/cpuinfo 2>/dev/null || uname -mp) | cksum | cut -d' ' -f1)
export CARGO_TARGET_DIR ?= $(CACHE)/target-$(CPU)
BIN        := $(CARGO_TARGET_DIR)/debug/electron-gateway

.PHONY: run test build tools lint rust-tests client-tests bench compare figures clean

run: build            ## Get the default model, build, and serve on 127.0.0.1:8080.
	$(BIN) serve $(ARGS)

test: lint rust-tests client-tests   ## Formatting, lints, Rust tests, other people's clients.

build: tools
	@echo "Building; the first time takes 15 to 30 minutes on two cores."
	cargo build --locked

# What the build and the tests need besides Rust. Looks first, installs only what is missing.
tools:
	@command -v cargo >/dev/null || { echo "Rust is missing: see https://rustup.rs"; exit 1; }
	@command -v cc >/dev/null && command -v c++ >/dev/null && command -v python3 >/dev/null && python3 -m pip --version >/dev/null 2>&1 \
	  && python3 -m venv --help >/dev/null 2>&1 || \
	  { echo "Installing C and C++ compilers and Python"; apt-get update -qq && \
	    apt-get install -y -qq --no-install-recommends build-essential python3 python3-pip python3-venv; }

lint: tools
	cargo fmt --check
	cargo clippy --locked --all-targets -- --deny warnings
	cargo clippy --locked --no-default-features -- --deny warnings

rust-tests: build
	$(BIN) model pull
	cargo test --locked

client-tests: build
	ELECTRON_GATEWAY_BIN=$(BIN) ELECTRON_CACHE=$(CACHE) tests/clients/run

bench: build          ## The speed figures of the README.
	$(BIN) bench --concurrency 1,4

compare: build        ## What it costs to be in between, by this gateway and by LiteLLM.
	ELECTRON_GATEWAY_BIN=$(BIN) ELECTRON_CACHE=$(CACHE) tests/bench/compare

figures: build        ## The long form of the tests: every figure of the README that is not a speed.
	ELECTRON_LONG=1 cargo test --locked --test electron --test memory -- --nocapture

clean:
	cargo clean
