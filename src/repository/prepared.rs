//! Owns: files made ahead for small objects that somebody waits for: in which directory, when, how many.
//! Does not own: how such a file is made and becomes an object (`durable.rs`), threads (`local.rs`). Pure.
//!
//! Each commit that waits for the archive is a tail of its own. To create its file means to find an inode and blocks for
//! it, and to write what says so: about as much as the content and the name together (a disk with 45 µs for a flush: 0.67
//! ms for a new file, 0.36 for one made ahead). Files are made in the directory the objects go to, because a rename between
//! two directories is durable in both only when both are synced. A file never had a name before: nobody has it open.

use std::time::{Duration, Instant};

use super::durable::PREPARED_BYTES;

/// Made at once. Fewer: the disk is held up more often. More: for longer.
pub const BATCH: usize = 16;
/// New ones are made when no more than these are left: what is put while a batch is made.
const LOW: usize = 8;
/// So many small objects within [`WINDOW`] are synchronous commits: the tails of `tail_interval` are fewer.
const BUSY: u32 = 24;
const WINDOW: Duration = Duration::from_secs(1);
/// After a failure (a full disk, an unusual file system) files are made as they are needed.
const REST: Duration = Duration::from_secs(60);

/// The files of one repository.
#[derive(Debug, Default)]
pub struct Prepared {
    /// The files' directory, relative to the root.
    directory: String,
    names: Vec<String>,
    is_making: bool,
    /// Not before this.
    rests_until: Option<Instant>,
    window: Option<Instant>,
    /// Small objects since `window`.
    puts: u32,
    is_busy: bool,
}

/// Files nobody will use.
#[derive(Debug, PartialEq, Eq)]
pub struct Leftovers {
    pub directory: String,
    pub names: Vec<String>,
}

impl Prepared {
    /// A file for an object of `bytes` in `directory`, if there is one.
    pub fn take(&mut self, directory: &str, bytes: u64, now: Instant) -> Option<String> {
        if bytes > PREPARED_BYTES as u64 {
            return None;
        }
        match self.window {
            Some(since) if now.saturating_duration_since(since) < WINDOW => self.puts += 1,
            _ => {
                self.is_busy = self.puts >= BUSY;
                (self.window, self.puts) = (Some(now), 1);
            }
        }
        self.is_busy |= self.puts >= BUSY;
        if directory != self.directory {
            return None;
        }
        self.names.pop()
    }

    /// Whether files are to be made in `directory` now, by the caller, who says afterwards what came of it
    /// ([`Prepared::made`]).
    pub fn begin_making(&mut self, directory: &str, now: Instant) -> bool {
        let enough = self.directory == directory && self.names.len() > LOW;
        let rests = self.rests_until.is_some_and(|until| now < until);
        if !self.is_busy || self.is_making || enough || rests {
            return false;
        }
        self.is_making = true;
        true
    }

    /// What was made in `directory`, none where it failed; what was left elsewhere.
    pub fn made(&mut self, directory: &str, names: Vec<String>, now: Instant) -> Option<Leftovers> {
        self.is_making = false;
        if names.is_empty() {
            self.rests_until = Some(now + REST);
            return None;
        }
        let elsewhere = (self.directory != directory).then(|| self.give_up());
        self.directory = directory.to_string();
        self.names.extend(names);
        elsewhere.filter(|left| !left.names.is_empty())
    }

    /// Lets go of all files, for somebody to remove.
    pub fn give_up(&mut self) -> Leftovers {
        Leftovers { directory: std::mem::take(&mut self.directory), names: std::mem::take(&mut self.names) }
    }

    pub fn is_for(&self, directory: &str) -> bool {
        !self.names.is_empty() && self.directory == directory
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn busy(directory: &str, now: Instant) -> Prepared {
        let mut prepared = Prepared::default();
        for _ in 0..BUSY {
            assert!(!prepared.begin_making(directory, now));
            assert_eq!(prepared.take(directory, 100, now), None);
        }
        prepared
    }

    #[test]
    fn files_are_made_only_for_many_small_objects_in_a_short_time() {
        let start = Instant::now();
        assert!(busy("a", start).begin_making("a", start));
        let mut slow = Prepared::default();
        for n in 0..10 * BUSY {
            let now = start + n * WINDOW / (BUSY - 2);
            assert_eq!(slow.take("a", 100, now), None);
            assert!(!slow.begin_making("a", now), "put {n}");
        }
        let mut large = Prepared::default();
        for _ in 0..10 * BUSY {
            assert_eq!(large.take("a", PREPARED_BYTES as u64 + 1, start), None);
        }
        assert!(!large.begin_making("a", start));
    }

    #[test]
    fn it_calms_down_when_the_objects_become_few() {
        let start = Instant::now();
        let mut prepared = busy("a", start);
        assert!(prepared.begin_making("a", start));
        prepared.made("a", vec!["1".into()], start);
        for n in 1..4 {
            prepared.take("a", 1, start + n * 2 * WINDOW);
        }
        assert!(!prepared.begin_making("a", start + 8 * WINDOW));
    }

    #[test]
    fn a_file_is_taken_once_and_only_where_it_lies() {
        let now = Instant::now();
        let mut prepared = busy("a", now);
        assert!(prepared.begin_making("a", now) && !prepared.begin_making("a", now), "one at a time");
        assert_eq!(prepared.made("a", vec!["1".into(), "2".into()], now), None);
        assert_eq!(prepared.take("a", PREPARED_BYTES as u64 + 1, now), None);
        assert_eq!(prepared.take("b", 1, now), None);
        assert_eq!(prepared.take("a", 1, now).as_deref(), Some("2"));
        assert!(prepared.begin_making("b", now));
        let left = Leftovers { directory: "a".into(), names: vec!["1".into()] };
        assert_eq!(prepared.made("b", vec!["3".into()], now), Some(left));
        assert_eq!((prepared.take("a", 1, now), prepared.take("b", 1, now).as_deref()), (None, Some("3")));
    }

    #[test]
    fn after_a_failure_it_rests() {
        let now = Instant::now();
        let mut prepared = busy("a", now);
        assert!(prepared.begin_making("a", now));
        assert_eq!(prepared.made("a", Vec::new(), now), None);
        assert!(!prepared.begin_making("a", now) && prepared.begin_making("a", now + REST));
    }
}
