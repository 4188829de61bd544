//! Owns: what others may know of what an agent has expired: the facts, and how `status` says them.
//! Does not own: expiring (`agent/expire.rs`).
//! Pure.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

/// Of this agent, since it started.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RetentionFacts {
    /// Whether it expires by itself.
    pub is_automatic: bool,
    /// When it last came to its end.
    pub last_run: Option<Timestamp>,
    /// By that run.
    pub freed_bytes: u64,
    /// What the store would not let go then.
    pub locked_objects: u64,
    pub failures: u64,
    /// Why the last attempt came to nothing, until one succeeds.
    pub failure: Option<String>,
}

/// As `status` says it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RetentionStatus {
    pub last_run: Option<Timestamp>,
    pub freed_bytes: u64,
    pub locked_objects: u64,
    pub failure: Option<String>,
}

impl RetentionFacts {
    /// `None` where it does not expire by itself.
    pub fn to_status(&self) -> Option<RetentionStatus> {
        self.is_automatic.then(|| RetentionStatus {
            last_run: self.last_run,
            freed_bytes: self.freed_bytes,
            locked_objects: self.locked_objects,
            failure: self.failure.clone(),
        })
    }
}
