//! Owns: what the volumes of one restore share: where files go, what they must be, which of them are there.
//! Does not own: getting volumes (`copies.rs`), taking them apart (`unpack.rs`).

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

use tokio::sync::watch;

use super::ground::Ground;
use super::tree::Tree;
use super::{Phase, RestoreProgress};
use crate::catalog::manifest::Manifest;

/// `global/pg_control` until everything else is on the disk: without it no server starts.
pub const CONTROL: &[u8] = b"global/pg_control";
pub const CONTROL_ASIDE: &[u8] = b"global/pg_control.seawall";
/// Told of in steps of this many bytes.
const PROGRESS_STEP_BYTES: u64 = 1 << 20;

#[derive(Debug)]
pub struct Site {
    pub ground: Ground,
    pub tablespaces: BTreeMap<u32, Tree>,
    pub manifest: Manifest,
    pub accounts: Accounts,
    pub meter: Meter,
    /// Whether the source lets a group read its files.
    pub group_reads: AtomicBool,
}

impl Site {
    /// The tree of a volume's stream, and what its paths begin with in the manifest.
    pub fn tree(&self, tablespace: Option<u32>) -> Option<(&Tree, Vec<u8>)> {
        match tablespace {
            None => Some((&self.ground.tree, Vec::new())),
            Some(oid) => Some((self.tablespaces.get(&oid)?, prefix_of(oid))),
        }
    }
}

/// What the paths of a tablespace begin with in the manifest.
pub fn prefix_of(oid: u32) -> Vec<u8> {
    format!("pg_tblspc/{oid}/").into_bytes()
}

/// Which files of the manifest are where they belong, and by whom. Every file comes once, from one volume.
#[derive(Debug)]
pub struct Accounts {
    holders: Vec<AtomicU32>,
    attempts: AtomicU32,
}

const NOBODY: u32 = 0;
const KEPT: u32 = 1;

/// One attempt at one volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attempt(u32);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Claim {
    /// To be written.
    Ours,
    /// It was there, and right.
    Kept,
    /// Some volume has brought it already.
    Taken,
}

impl Accounts {
    pub fn new(files: usize) -> Accounts {
        let holders = (0..files).map(|_| AtomicU32::new(NOBODY)).collect();
        Accounts { holders, attempts: AtomicU32::new(KEPT) }
    }

    pub fn attempt(&self) -> Attempt {
        Attempt(self.attempts.fetch_add(1, Ordering::Relaxed) + 1)
    }

    pub fn keep(&self, index: usize) {
        self.holders[index].store(KEPT, Ordering::Relaxed);
    }

    pub fn claim(&self, index: usize, attempt: Attempt) -> Claim {
        match self.holders[index].compare_exchange(NOBODY, attempt.0, Ordering::Relaxed, Ordering::Relaxed) {
            Ok(_) => Claim::Ours,
            Err(KEPT) => Claim::Kept,
            Err(_) => Claim::Taken,
        }
    }

    /// What a failed attempt has written counts for nothing.
    pub fn release(&self, attempt: Attempt) {
        for holder in &self.holders {
            let _ = holder.compare_exchange(attempt.0, NOBODY, Ordering::Relaxed, Ordering::Relaxed);
        }
    }

    pub fn is_there(&self, index: usize) -> bool {
        self.holders[index].load(Ordering::Relaxed) != NOBODY
    }

    pub fn first_missing(&self) -> Option<usize> {
        (0..self.holders.len()).find(|&index| !self.is_there(index))
    }

    pub fn kept_count(&self) -> u64 {
        self.holders.iter().filter(|holder| holder.load(Ordering::Relaxed) == KEPT).count() as u64
    }
}

/// Counts bytes from many threads.
#[derive(Debug)]
pub struct Meter {
    done: AtomicU64,
    told: watch::Sender<RestoreProgress>,
}

impl Meter {
    pub fn new(told: watch::Sender<RestoreProgress>) -> Meter {
        Meter { done: AtomicU64::new(0), told }
    }

    pub fn enter(&self, phase: Phase, bytes_total: u64) {
        self.done.store(0, Ordering::Relaxed);
        self.told.send_replace(RestoreProgress { phase, bytes_total, bytes_done: 0 });
    }

    pub fn add(&self, bytes: u64) {
        let before = self.done.fetch_add(bytes, Ordering::Relaxed);
        let done = before + bytes;
        if before / PROGRESS_STEP_BYTES != done / PROGRESS_STEP_BYTES {
            self.told.send_modify(|progress| progress.bytes_done = progress.bytes_done.max(done));
        }
    }

    /// Takes back what a failed attempt has counted.
    pub fn take_back(&self, bytes: u64) {
        let before = self.done.fetch_sub(bytes, Ordering::Relaxed);
        self.told.send_modify(|progress| progress.bytes_done = before - bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_comes_once() {
        let accounts = Accounts::new(3);
        let [one, other] = [accounts.attempt(), accounts.attempt()];
        accounts.keep(0);
        assert_eq!(accounts.claim(0, one), Claim::Kept);
        assert_eq!(
            [accounts.claim(1, one), accounts.claim(1, one), accounts.claim(1, other)],
            [Claim::Ours, Claim::Taken, Claim::Taken]
        );
        assert_eq!(accounts.claim(2, other), Claim::Ours);
        assert_eq!(accounts.first_missing(), None);
        accounts.release(one);
        assert_eq!((accounts.first_missing(), accounts.kept_count()), (Some(1), 1));
        assert_eq!(accounts.claim(1, accounts.attempt()), Claim::Ours);
    }
}
