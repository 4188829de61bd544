//! The integration tests: one binary, so that they link once and share one support module.

mod cli;
mod demo;
mod readme;
mod crash;
mod end_to_end;
mod servers_start;
mod simulation;
mod support;
mod tidy;
mod timelines;
mod trouble;
