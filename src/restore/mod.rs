//! Handing WAL and backups back to PostgreSQL.
//!
//! Owns: what can be restored (`reach`) and how (`target`, `choose`, `search`, `plan`), single commits (`commits`), carrying it out (`execute`), the
//! `restore_command` contract (`wal_get`), what a restore leaves for it (`marker`), what is fetched ahead of it
//! (`prefetch`).
//! Does not own: what the archive holds (`catalog`), how it is decoded (`codec`).

pub mod choose;
pub mod commits;
pub mod execute;
pub mod marker;
pub mod plan;
pub mod prefetch;
pub mod reach;
pub mod search;
pub mod target;
pub mod wal_get;
