//! Models of the world outside: WAL, a server, a store. Tests, the simulation and the benches share them.
//!
//! Owns: a WAL generator, a model walsender that speaks the wire protocol, a model store with faults.
//! Does not own: anything the program uses; the binary never reaches this module.
#![doc(hidden)]

pub mod store;
pub mod wal_writer;
pub mod walsender;
