//! Owns: the directory of segments held ready, and the names in it.
//! Does not own: what is in the files (`handover.rs`), when the directory is made and removed (`helper.rs`).
//!
//! ```text
//! pg_wal/.seawall-<restore id>/          on the same file system as the destination of every restore_command
//!     <segment>-<crc32>                  a sealed segment, whole and on the disk; the CRC-32 is of its raw bytes
//!     answer-<random>                    what one request was answered with, told to nobody else
//!     .seawall-tmp-<random>              being written
//!     lock, socket, log                  of the one helper
//! ```
//!
//! PostgreSQL leaves names in pg_wal alone that are none of its own, and takes none of them into a base backup.

use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::repository::durable::TEMP_PREFIX;
use crate::restore::marker::RestoreId;
use crate::wal::SegmentName;

const PG_WAL: &str = "pg_wal";
const PREFIX: &str = ".seawall-";
const ANSWER_PREFIX: &str = "answer-";
/// Nobody who was told of an answer needs as long to take it.
const ANSWER_AGE: Duration = Duration::from_secs(60);
pub const LOCK: &str = "lock";
const SOCKET: &str = "socket";
const LOG: &str = "log";

/// The directory of one restore. Relative to the data directory, where PostgreSQL runs its commands: the name of a
/// socket is short.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    directory: PathBuf,
}

impl Place {
    pub fn of(id: RestoreId) -> Place {
        Place { directory: Path::new(PG_WAL).join(format!("{PREFIX}{id}")) }
    }

    #[cfg(test)]
    pub fn at(directory: &Path) -> Place {
        Place { directory: directory.to_path_buf() }
    }

    pub fn path(&self) -> &Path {
        &self.directory
    }

    pub fn socket(&self) -> PathBuf {
        self.directory.join(SOCKET)
    }

    pub fn log(&self) -> PathBuf {
        self.directory.join(LOG)
    }

    pub fn ready(&self, name: SegmentName, raw_crc32: u32) -> PathBuf {
        self.directory.join(format!("{name}-{raw_crc32:08x}"))
    }

    /// A name nobody has been told yet.
    pub fn new_answer(&self) -> String {
        format!("{ANSWER_PREFIX}{:016x}", fastrand::u64(..))
    }

    /// A name out of an answer, which leads nowhere else.
    pub fn answer(&self, name: &str) -> Option<PathBuf> {
        let random = name.strip_prefix(ANSWER_PREFIX)?;
        random.parse::<RestoreId>().is_ok().then(|| self.directory.join(name))
    }

    /// Makes the directory, for its owner alone; it may be there.
    pub fn create(&self) -> io::Result<()> {
        match DirBuilder::new().mode(0o700).create(&self.directory) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            made => made,
        }
    }

    /// Everything held ready. None where there is no directory.
    pub fn all_ready(&self) -> io::Result<Vec<(SegmentName, u32)>> {
        let mut ready = Vec::new();
        for name in names_in(&self.directory)? {
            ready.extend(parse_ready(&name));
        }
        Ok(ready)
    }

    /// What earlier helpers and their requests left: nobody knows of it any more.
    pub fn remove_leftovers(&self) -> io::Result<()> {
        for name in names_in(&self.directory)? {
            if name.starts_with(ANSWER_PREFIX) || name.starts_with(TEMP_PREFIX) {
                remove(&self.directory.join(name))?;
            }
        }
        Ok(())
    }

    /// Answers whose `wal-get` died before it took them.
    pub fn remove_stale_answers(&self) -> io::Result<()> {
        for name in names_in(&self.directory)?.into_iter().filter(|name| name.starts_with(ANSWER_PREFIX)) {
            let path = self.directory.join(name);
            let age = fs::metadata(&path).and_then(|found| found.modified()).ok().and_then(|at| at.elapsed().ok());
            if age.is_some_and(|age| age > ANSWER_AGE) {
                remove(&path)?;
            }
        }
        Ok(())
    }

    /// Removes the directory. The lock goes last: until then no other helper begins here.
    pub fn remove_all(&self) -> io::Result<()> {
        let mut names = names_in(&self.directory)?;
        names.sort_by_key(|name| name == LOCK);
        for name in names {
            remove(&self.directory.join(name))?;
        }
        match fs::remove_dir(&self.directory) {
            // The next helper has begun.
            Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::DirectoryNotEmpty) => Ok(()),
            removed => removed,
        }
    }

    /// The directories of other restores into this data directory: their recovery is over.
    pub fn others(&self) -> io::Result<Vec<Place>> {
        let parent = self.directory.parent().unwrap_or(Path::new("."));
        let is_ours = |name: &String| name.strip_prefix(PREFIX).is_some_and(|id| id.parse::<RestoreId>().is_ok());
        let places = names_in(parent)?.into_iter().filter(is_ours).map(|name| Place { directory: parent.join(name) });
        Ok(places.filter(|place| place != self).collect())
    }
}

/// Reads `<segment>-<crc32>`.
fn parse_ready(name: &str) -> Option<(SegmentName, u32)> {
    let (segment, crc32) = name.split_once('-')?;
    let valid = crc32.len() == 8 && crc32.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
    valid.then(|| Some((segment.parse().ok()?, u32::from_str_radix(crc32, 16).ok()?))).flatten()
}

/// Names that are text; none where there is no directory.
fn names_in(directory: &Path) -> io::Result<Vec<String>> {
    let entries = match fs::read_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        read => read?,
    };
    let mut names = Vec::new();
    for entry in entries {
        names.extend(entry?.file_name().into_string().ok());
    }
    Ok(names)
}

/// Somebody else may be faster.
pub fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        removed => removed,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_whole_segments_are_ready() {
        let directory = tempfile::tempdir().unwrap();
        let place = Place::at(directory.path());
        let name: SegmentName = "000000010000000000000002".parse().unwrap();
        fs::write(place.ready(name, 0xBEEF), "").unwrap();
        let strangers = ["000000010000000000000003", "000000010000000000000003-beef", "x-0000beef", "lock"];
        let leftovers = [place.new_answer(), format!("{TEMP_PREFIX}1")];
        for other in strangers.iter().copied().chain(leftovers.iter().map(String::as_str)) {
            fs::write(directory.path().join(other), "").unwrap();
        }
        assert_eq!(place.all_ready().unwrap(), [(name, 0xBEEF)]);
        place.remove_leftovers().unwrap();
        assert_eq!(names_in(directory.path()).unwrap().len(), 1 + strangers.len());
        place.remove_all().unwrap();
        assert!(!directory.path().exists());
        place.remove_all().unwrap();
        assert_eq!(place.all_ready().unwrap(), []);
    }

    #[test]
    fn an_answer_leads_nowhere_else() {
        let place = Place::of(RestoreId(7));
        assert_eq!(place.socket().to_str(), Some("pg_wal/.seawall-0000000000000007/socket"));
        let name = place.new_answer();
        assert_eq!(place.answer(&name), Some(place.path().join(&name)));
        for other in ["answer-", "answer-../../../../x", "lock", "answer-0/../../../../"] {
            assert_eq!(place.answer(other), None, "{other}");
        }
    }

    #[test]
    fn other_restores_are_found_and_nothing_else_of_pg_wal() {
        let directory = tempfile::tempdir().unwrap();
        let place = |id: u64| Place::at(&directory.path().join(format!("{PREFIX}{}", RestoreId(id))));
        for id in [1, 2] {
            place(id).create().unwrap();
            place(id).create().unwrap();
        }
        for other in [".seawall-x", "archive_status"] {
            fs::create_dir(directory.path().join(other)).unwrap();
        }
        assert_eq!(place(1).others().unwrap(), [place(2)]);
    }
}
