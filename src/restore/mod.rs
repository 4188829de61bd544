//! Handing WAL and backups back to PostgreSQL.
//!
//! Owns: what can be restored and how (`target`, `plan`), the `restore_command` contract (`wal_get`).
//! Does not own: what the archive holds (`catalog`), how it is decoded (`codec`).

pub mod plan;
pub mod reach;
pub mod target;
pub mod wal_get;
