//! What others may know of a running agent: metrics, health, status, over HTTP and for reading only.
//!
//! Owns: what follows from the agent's facts (`health`), the shape of `status` (`status`) and of a backup (`backup`), the metrics' values
//! (`exposition`), the HTTP server (`http`) and the client of its `/status` (`client`).
//! Does not own: the facts (`agent/observer.rs`), the metrics' names (`telemetry/meters.rs`).

pub mod backup;
pub mod client;
pub mod exposition;
pub mod health;
pub mod http;
mod process;
pub mod retention;
pub mod status;
