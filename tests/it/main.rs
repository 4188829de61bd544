//! The integration tests: one binary, so that they link once and share one support module.

mod cli;
mod crash;
mod demo;
mod docker;
mod end_to_end;
mod hostile;
mod readme;
mod s3_conformance;
mod s3_faults;
mod s3_server;
mod servers_start;
mod several;
mod simulation;
mod slots;
mod spool;
mod store_faults;
mod support;
mod synchronous;
mod tidy;
mod timelines;
mod tls;
mod trouble;
mod writers;
