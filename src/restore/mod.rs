//! Handing WAL and backups back to PostgreSQL.
//!
//! Owns: the `restore_command` contract (`wal_get`), what a restore leaves for it (`marker`), and what is fetched
//! ahead of it (`prefetch`).
//! Does not own: what the archive holds (`catalog`), how it is decoded (`codec`).

pub mod marker;
pub mod prefetch;
pub mod wal_get;
