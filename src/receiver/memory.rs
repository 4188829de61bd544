//! Owns: the budget for encoded frames that are not yet stored, of one cluster.
//! Does not own: the fixed buffers (socket, frames being encoded), which are bounded by their channels.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tokio::sync::Notify;

/// Counts held bytes; clones share the count. The receiver stops reading when it is exhausted and goes on
/// when a quarter is free, so that it does not flutter at the limit.
#[derive(Clone, Debug)]
pub struct MemoryBudget(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    limit_bytes: u64,
    held_bytes: AtomicU64,
    released: Notify,
}

impl MemoryBudget {
    pub fn new(limit_bytes: u64) -> MemoryBudget {
        MemoryBudget(Arc::new(Shared { limit_bytes, held_bytes: AtomicU64::new(0), released: Notify::new() }))
    }

    /// Counts `bytes` until the hold is dropped. Never refuses: what was read has to go somewhere.
    pub fn hold(&self, bytes: u64) -> MemoryHold {
        self.0.held_bytes.fetch_add(bytes, Ordering::Relaxed);
        MemoryHold { budget: self.clone(), bytes }
    }

    pub fn limit_bytes(&self) -> u64 {
        self.0.limit_bytes
    }

    pub fn held_bytes(&self) -> u64 {
        self.0.held_bytes.load(Ordering::Relaxed)
    }

    pub fn is_exhausted(&self) -> bool {
        self.held_bytes() >= self.0.limit_bytes
    }

    pub fn has_room(&self) -> bool {
        self.held_bytes() <= self.room_bytes()
    }

    /// With more than this held there is no room.
    pub fn room_bytes(&self) -> u64 {
        self.0.limit_bytes / 4 * 3
    }

    /// Returns when something was released since the last call (or at once).
    pub async fn released(&self) {
        self.0.released.notified().await;
    }
}

/// Bytes that count against a [`MemoryBudget`].
#[derive(Debug)]
pub struct MemoryHold {
    budget: MemoryBudget,
    bytes: u64,
}

impl Drop for MemoryHold {
    fn drop(&mut self) {
        self.budget.0.held_bytes.fetch_sub(self.bytes, Ordering::Relaxed);
        self.budget.0.released.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reading_stops_at_the_limit_and_goes_on_when_a_quarter_is_free() {
        let budget = MemoryBudget::new(400);
        let first = budget.hold(300);
        assert!(!budget.is_exhausted() && budget.has_room());
        let second = budget.hold(100);
        assert!(budget.is_exhausted());
        drop(second);
        let third = budget.hold(50);
        assert!(!budget.is_exhausted() && !budget.has_room(), "between the marks nothing changes");
        drop((first, third));
        assert_eq!(budget.held_bytes(), 0);
    }
}
