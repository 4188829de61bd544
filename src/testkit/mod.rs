//! Models of the world outside: WAL, a server, a store. Tests, the simulation and the benches share them.
//!
//! Owns: a WAL generator, a model walsender that speaks the wire protocol, a model store with faults,
//! and what every store must do.
//! Does not own: anything the program uses; the binary never reaches this module.
#![doc(hidden)]

pub mod conformance;
pub mod logins;
pub mod store;
pub mod wal_writer;
pub mod walsender;
