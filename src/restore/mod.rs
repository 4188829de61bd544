//! Handing WAL and backups back to PostgreSQL.
//!
//! Owns: what can be restored and how (`target`, `plan`), carrying it out (`execute`), what a restore leaves for the
//! recovery that follows (`marker`), the `restore_command` contract (`wal_get`).
//! Does not own: what the archive holds (`catalog`), how it is decoded (`codec`).

pub mod execute;
pub mod marker;
pub mod plan;
pub mod target;
pub mod wal_get;
