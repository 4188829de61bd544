//! WAL held ready ahead of replay, so that most requests of a recovery are one rename (proto-notes/06-timelines.md, "WAL held ready").
//!
//! Owns: the way of a `wal-get --restore ID` that need not look into the archive itself, and the helper that makes it so.
//! Does not own: what the archive holds (`wal_get.rs`), what the restore has planned (`marker.rs`).
//!
//! ```text
//!  PostgreSQL ──%f %p──▶ wal-get ── held ready? check its CRC-32, rename it: done ──────────────▶ pg_wal/RECOVERYXLOG
//!                           │ no                        ▲                                            ▲
//!                           ├── a helper? ask it ───────┤ segments, whole and flushed                │
//!                           │        └────────▶ helper ─┘ answers to everything else ──── rename ────┤
//!                           │ no helper, no answer                                                   │
//!                           └── start one; look into the archive ────────────────────────────────────┘
//! ```
//!
//! The helper is a process of its own that the first request starts. It reads ahead along the path of history, at most
//! so many bytes; sealed segments only: what is unfinished is put together when it is asked for. It answers requests
//! with connections that are warm, and with exactly what `wal-get` would have found. It touches nothing but its own
//! directory, so it may be killed, stopped, or late: `wal-get` does without it.

mod ask;
mod events;
mod handover;
mod helper;
mod life;
pub mod pin;
mod place;
mod serve;
mod source;
mod window;

use std::path::Path;

pub use ask::{Answer, ask, end, is_there};
pub use helper::{LIMIT_BYTES, Options, path_choice, run};
pub use life::Ended;
pub use place::Place;

use super::marker::RestoreId;
use crate::wal::SegmentName;

/// Delivers what is held ready, or what the helper answers. Errors of any kind leave it to the archive itself.
pub fn deliver(id: RestoreId, name: &str, dest: &Path) -> Answer {
    let place = Place::of(id);
    match name.parse::<SegmentName>().map(|name| handover::hand_over(&place, name, dest)) {
        Ok(Ok(true)) => Answer::Delivered,
        _ => ask(&place, name, dest),
    }
}
