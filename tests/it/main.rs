//! The integration tests: one binary, so that they link once and share one support module.

mod cli;
mod hostile;
mod servers_start;
mod simulation;
mod slots;
mod store_faults;
mod support;
mod tidy;
mod writers;
