//! Which servers to try, as whom, and with which settings: libpq's rules for connection strings.
//!
//! Owns: connection strings and URIs (`syntax`), their keywords (`keywords`), service files (`service`), password
//! files (`passfile`), their precedence (`settings`), TLS (`security`), and how all of it becomes logins (`conninfo`).
//! Does not own: sockets and the protocol (`replication`), which host is followed (`receiver`).
//! Rests on `proto-notes/01-startup.md`, "Password and service files". Everything here is pure: files and variables
//! come in through [`Environment`].

pub mod connect;
mod conninfo;
mod environment;
mod error;
mod keywords;
mod passfile;
mod security;
mod service;
mod settings;
pub mod sql;
mod syntax;

pub use conninfo::{Conninfo, Logins, Purpose, TargetSessionAttrs};
#[cfg(test)]
pub(crate) use environment::MemoryEnvironment;
pub use environment::{Environment, FileContent, SystemEnvironment};
pub use error::{ConninfoError, Origin};
