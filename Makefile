# What a fresh machine needs beside this: a Rust toolchain and a C compiler. The PostgreSQL servers
# and the S3 stores install themselves.

CARGO ?= cargo

.PHONY: help demo test bench compare servers

help: ## what can be made
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1\t/' | expand -t 18

demo: servers ## a scratch server: stream, crash the agent, destroy the server, recover to the last commit
	$(CARGO) build --locked --release
	target/release/seawall demo

test: servers ## format, lints, and all tests on every PostgreSQL installed here
	$(CARGO) fmt --check
	$(CARGO) clippy --locked --all-targets -- -D warnings
	$(CARGO) test --locked

bench: ## micro-benchmarks: scan, encode, receive path
	$(CARGO) bench --locked

compare: servers ## side by side with pg_receivewal, zstd and WAL-RUS on real servers and stores (SIZE_GIB, PAIRS, CORPORA)
	$(CARGO) build --locked --release
	PIN=1 benches/compare catchup s3
	PIN=0 benches/compare catchup commits lag idle backup

servers: ## what tests run against: PostgreSQL 13 to 18 into target/servers, an S3 store into target/stores
	tests/servers/install
	tests/stores/install
