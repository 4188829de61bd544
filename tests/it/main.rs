//! The integration tests: one binary, so that they link once and share one support module.

mod cli;
mod crash;
mod demo;
mod end_to_end;
mod hostile;
mod many;
mod monitoring;
mod readme;
mod servers_start;
mod simulation;
mod slots;
mod store_faults;
mod support;
mod tidy;
mod timelines;
mod trouble;
mod writers;
