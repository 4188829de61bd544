//! Seawall: a PostgreSQL WAL-streaming archiver that proves every record before it acknowledges it.
//!
//! # The path of a byte
//!
//! ```text
//!  walsender ──CopyData──▶ replication ──WAL──▶ receiver ──Piece──▶ archiver ──────────▶ archiver ──▶ repository
//!    ▲                     (wire, sans-IO)      (match, prove,      (encode: zstd        (order,      (write once,
//!    │                                           cut into frames)    in parallel)         retry)       durable)
//!    │                                              ▲                                        │             │
//!    └───── standby status ◀── Progress ────────────┴───────────── stored: record end ◀──────┘             ▼
//!                              received ≥ proven ≥ acknowledged                                         catalog
//!                                                                                                          │
//!                     wal-get ◀── the path of history, what counts ◀───────────────────────────────────────┤
//!                     gaps, status ◀── continuity (runs, paths, gaps) ◀────────────────────────────────────┘
//! ```
//!
//! Each repository of a cluster has an archiver of its own behind an outlet, which can leave it behind and take it back;
//! `archiver/repair.rs` copies to it what it missed. Beside them stands the [`spool`]: it takes what memory cannot hold, or
//! everything, and goes into a repository before the next stream begins (`agent/drain.rs`).
//!
//! Read [`receiver`] for the life of a chunk and `archiver/push.rs` for the life of a segment; [`agent`] wires them.
//!
//! # Modules
//!
//! Lowest first, in levels; a module imports from its own level or from one above it in this table
//! (`tests/it/tidy.rs` checks).
//!
//! | module | owns |
//! | --- | --- |
//! | [`wal`] | the WAL format, positions, names, and the proof that bytes are valid WAL (pure) |
//! | [`codec`] | raw WAL to zstd frames and back (pure) |
//! | [`error`], [`secret`], [`telemetry`] | what an error means to who gets it; what is never printed; the log and the metrics |
//! | [`schedule`], [`units`] | when something is due (pure); durations and sizes as people write them (pure) |
//! | | |
//! | [`replication`] | the replication protocol: start-up, commands, streaming |
//! | [`repository`] | objects written once, under names that promise their content |
//! | [`spool`] | WAL on local disk that no repository holds yet |
//! | | |
//! | [`catalog`] | what a lineage holds, read from its objects |
//! | [`continuity`] | runs, paths and gaps (pure) |
//! | [`postgres`] | which servers to try and as whom, by libpq's rules; questions asked in SQL |
//! | | |
//! | [`receiver`] | a chunk's life: match, prove, cut; what is acknowledged |
//! | [`archiver`] | a segment's life: compress, store, index; tails |
//! | [`backup`] | a base backup: verified, cut into volumes, stored |
//! | [`restore`] | what can be restored, restoring it, the `restore_command`, and WAL held ready ahead of it |
//! | [`verify`] | whether a repository holds what it says, and says what it holds |
//! | [`retention`] | what stays, what goes, and why |
//! | | |
//! | [`config`] | what was typed, checked and resolved |
//! | [`monitor`] | what others may know of a running agent: metrics, health, status, HTTP |
//! | [`agent`] | one cluster's agent: connect, decide where to go on, stream, again; its base backups beside that |
//! | [`cli`] | one file for each verb |
//! | [`testkit`] | models of WAL, server and store, for tests and benches; the program never uses it |
//!
//! Services define their own options and do not import one another, with one arrow: `archiver` takes what `receiver`
//! gives (pieces, frontier, memory).
//!
//! # Invariants
//!
//! * Nothing is acknowledged but through `Progress`: durable, contiguous from the archive's start, proven, a record end.
//! * A name appears with its whole content or not at all, and is never given to other content.
//! * Segment, then index entry, then acknowledgement, then deletion (`proto-notes/08-durability.md`).
//! * `wal-get` ends with 0, 1 or 255: 1 only for what the store has shown not to be in the archive.
//! * Bytes from disk or network never panic.
//!
//! # Absences
//!
//! `tests/it/tidy.rs` guards them: no IO, clock, randomness or async in a pure file · no sync or rename outside
//! `repository/durable.rs` · no object name built outside `repository/layout.rs` · no unbounded channel · one address for
//! each third-party crate · no import upward · no file that does not say what it owns · no citation of a note that is not
//! there.
//!
//! The protocol notes (`proto-notes/`) say what all of this rests on.

pub mod agent;
pub mod archiver;
pub mod backup;
pub mod catalog;
pub mod cli;
pub mod codec;
pub mod config;
pub mod continuity;
pub mod error;
pub mod monitor;
pub mod postgres;
pub mod receiver;
pub mod replication;
pub mod repository;
pub mod restore;
pub mod retention;
pub mod schedule;
pub mod secret;
pub mod spool;
pub mod telemetry;
pub mod testkit;
pub mod units;
pub mod verify;
pub mod wal;
