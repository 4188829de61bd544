//! The integration tests: one binary, so that they link once and share one support module.

mod cli;
mod demo;
mod readme;
mod servers_start;
mod simulation;
mod support;
mod tidy;
