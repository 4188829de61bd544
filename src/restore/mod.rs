//! Handing WAL and backups back to PostgreSQL.
//!
//! Owns: the `restore_command` contract (`wal_get`).
//! Does not own: what the archive holds (`catalog`), how it is decoded (`codec`).

pub mod wal_get;
