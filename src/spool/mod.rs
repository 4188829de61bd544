//! WAL on local disk that no repository holds yet: what memory has no room for, and, with `acknowledge = "spool"`,
//! everything the server was told is durable.
//!
//! Owns: one cluster's directory, its lock and limit; the format of its files; what survives a crash.
//! Does not own: which frames go there and when (`archiver/spooling.rs`), bringing them into the repository
//! (`agent/drain.rs`). Rests on `proto-notes/08-durability.md`. Everything here blocks: call it off the network task.
//!
//! ```text
//! <path>/<cluster>/lock                                        held while an agent runs
//! <path>/<cluster>/<lineage>/spool.json                        whose WAL this is
//!                           /<segment>-<from>.zst              whole frames, contiguous from `from`
//!                           /<segment>-<frame start>.tail.zst  pieces of a frame that is not whole yet
//!                           /….refused                         did not prove; kept, never used
//! ```
//!
//! * Every frame is an ordinary zstd frame with a checksum, and is trusted for that and for the records proven in it,
//!   never for the file's name or length: a crash may leave anything at the end of a file.
//! * A file is removed once the repositories hold its whole segment, contiguously.
//! * A stream begins with an empty directory: what an earlier one left was drained before.

mod error;
mod marker;
mod names;
mod reader;
mod writer;

use std::fs::File;
use std::io::{ErrorKind, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

pub use error::SpoolError;
pub use marker::{Destination, Marker};
pub use names::{Kind, RunName};
pub use reader::RunReader;
pub use writer::{RunWriter, Written};

use crate::repository::durable::{self, Directory, Survives};
use crate::wal::{Lsn, TimelineId};

const LOCK: &str = "lock";
const MARKER: &str = "spool.json";
const MARKER_BYTES_MAX: u64 = 64 << 10;

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SpoolOptions {
    /// All clusters' spools lie below.
    pub path: PathBuf,
    /// What this cluster may use of it.
    pub limit_bytes: u64,
}

/// One cluster's spool, locked against other processes as long as this lives.
#[derive(Debug)]
pub struct Spool {
    directory: Directory,
    path: PathBuf,
    usage: Arc<Usage>,
    /// What speaks against trusting this file system with acknowledged WAL.
    volatile: Option<&'static str>,
    _lock: File,
}

/// How much of its share a cluster's spool uses.
#[derive(Debug)]
pub struct Usage {
    limit_bytes: u64,
    used_bytes: AtomicU64,
}

impl Usage {
    pub fn limit_bytes(&self) -> u64 {
        self.limit_bytes
    }

    pub fn used_bytes(&self) -> u64 {
        self.used_bytes.load(Ordering::Relaxed)
    }

    fn reserve(&self, bytes: u64) -> Result<(), SpoolError> {
        let used_bytes = self.used_bytes();
        if used_bytes + bytes > self.limit_bytes {
            return Err(SpoolError::Full { used_bytes, limit_bytes: self.limit_bytes });
        }
        self.used_bytes.fetch_add(bytes, Ordering::Relaxed);
        Ok(())
    }

    fn release(&self, bytes: u64) {
        self.used_bytes.fetch_sub(bytes, Ordering::Relaxed);
    }
}

impl Spool {
    /// Opens the cluster's directory, which is created where `path` is there, and locks it.
    pub fn open(options: &SpoolOptions, cluster: &str) -> Result<Spool, SpoolError> {
        let opened = match Directory::open(&options.path) {
            // One step only: a missing parent is an unmounted volume.
            Err(error) if error.kind() == ErrorKind::NotFound => create_last_step(&options.path),
            opened => opened,
        };
        let above = opened.map_err(SpoolError::io("open", &options.path))?;
        let path = options.path.join(cluster);
        let directory = above.create_below(cluster).map_err(SpoolError::io("open", &path))?;
        let lock = directory.lock_file(LOCK).map_err(|source| match source.kind() {
            ErrorKind::WouldBlock => SpoolError::Locked { path: path.clone() },
            _ => SpoolError::io("lock", &path)(source),
        })?;
        let volatile = directory.file_system().ok().and_then(|found| why_volatile(found.f_type as u64));
        let usage = Arc::new(Usage { limit_bytes: options.limit_bytes, used_bytes: AtomicU64::new(0) });
        let spool = Spool { directory, path, usage, volatile, _lock: lock };
        spool.count_used()?;
        Ok(spool)
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn usage(&self) -> &Arc<Usage> {
        &self.usage
    }

    /// Why WAL that is only here could be gone although it was synced.
    pub fn volatile(&self) -> Option<&'static str> {
        self.volatile
    }

    /// The lineages that have a directory here.
    pub fn lineages(&self) -> Result<Vec<LineageSpool>, SpoolError> {
        let mut found = Vec::new();
        for (name, is_directory) in names_in(&self.directory, &self.path)? {
            if is_directory {
                found.push(self.open_lineage(&name, false)?);
            }
        }
        Ok(found)
    }

    /// The directory of one lineage, created where it is missing.
    pub fn lineage(&self, directory_name: &str) -> Result<LineageSpool, SpoolError> {
        self.open_lineage(directory_name, true)
    }

    fn open_lineage(&self, name: &str, create: bool) -> Result<LineageSpool, SpoolError> {
        let path = self.path.join(name);
        let opened = if create { self.directory.create_below(name) } else { self.directory.open_below(name) };
        let directory = Arc::new(opened.map_err(SpoolError::io("open", &path))?);
        Ok(LineageSpool { name: name.into(), directory, path: path.into(), usage: self.usage.clone() })
    }

    /// Everything counts, also what was refused: it takes the place all the same.
    fn count_used(&self) -> Result<(), SpoolError> {
        for lineage in self.lineages()? {
            for (name, is_directory) in names_in(&lineage.directory, &lineage.path)? {
                if !is_directory && let Ok(stat) = lineage.directory.stat_link(&name) {
                    self.usage.used_bytes.fetch_add(stat.st_size.unsigned_abs(), Ordering::Relaxed);
                }
            }
        }
        Ok(())
    }
}

fn create_last_step(path: &Path) -> std::io::Result<Directory> {
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else { return Directory::open(path) };
    Directory::open(parent)?.create_below(name)
}

/// Names in a directory, without `.` and `..`, and whether each is a directory; sorted.
fn names_in(directory: &Directory, path: &Path) -> Result<Vec<(String, bool)>, SpoolError> {
    let mut names = Vec::new();
    for entry in directory.read().map_err(SpoolError::io("list", path))? {
        let entry = entry.map_err(|error| SpoolError::io("list", path)(error.into()))?;
        let Ok(name) = entry.file_name().to_str() else { continue };
        if name != "." && name != ".." {
            let is_directory =
                directory.stat_link(name).is_ok_and(|stat| rustix::fs::FileType::from_raw_mode(stat.st_mode).is_dir());
            names.push((name.to_string(), is_directory));
        }
    }
    names.sort();
    Ok(names)
}

/// File systems a synced byte does not survive on, or whose promise is another machine's (statfs(2)).
fn why_volatile(kind: u64) -> Option<&'static str> {
    match kind & 0xFFFF_FFFF {
        0x0102_1994 => Some("it is a tmpfs, which a power loss or a reboot empties"),
        0x8584_58F6 => Some("it is a ramfs, which a power loss or a reboot empties"),
        0x6969 | 0x517B | 0xFF53_4D42 | 0xFE53_4D42 | 0x0102_1997 | 0x00C3_6400 | 0x5346_414F => {
            Some("it is a network file system: its server decides what a sync means, and a lost mount blocks the agent")
        }
        _ => None,
    }
}

/// The directory of one lineage. Clones share it.
#[derive(Clone, Debug)]
pub struct LineageSpool {
    name: Arc<str>,
    directory: Arc<Directory>,
    path: Arc<Path>,
    usage: Arc<Usage>,
}

impl LineageSpool {
    /// The lineage's directory name.
    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn usage(&self) -> &Arc<Usage> {
        &self.usage
    }

    /// Whose WAL this is; `None` before the first stream.
    pub fn marker(&self) -> Result<Option<Marker>, SpoolError> {
        let path = self.path.join(MARKER);
        let file = match self.directory.open_file(MARKER) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            opened => opened.map_err(SpoolError::io("read", &path))?,
        };
        let mut text = Vec::new();
        file.take(MARKER_BYTES_MAX).read_to_end(&mut text).map_err(SpoolError::io("read", &path))?;
        let refuse = |cause: String| SpoolError::Marker { path: path.clone(), cause };
        let value: serde_json::Value = serde_json::from_slice(&text).map_err(|error| refuse(error.to_string()))?;
        let schema = value.get("schema").and_then(serde_json::Value::as_u64);
        if schema.is_some_and(|schema| schema > u64::from(Marker::SCHEMA)) {
            return Err(refuse(format!("schema {} is newer than this version", schema.unwrap_or_default())));
        }
        serde_json::from_value(value).map(Some).map_err(|error| refuse(error.to_string()))
    }

    /// Says whose WAL comes next. Durable before the first byte is.
    pub fn write_marker(&self, marker: &Marker) -> Result<(), SpoolError> {
        let path = self.path.join(MARKER);
        let text = serde_json::to_vec_pretty(marker).expect("a marker is plain data");
        durable::write_file_into_place(&path, Survives::PowerLoss, |file| std::io::Write::write_all(file, &text))
            .map_err(SpoolError::io("write", &path))
    }

    /// The files that hold WAL, in order.
    pub fn runs(&self) -> Result<Vec<RunName>, SpoolError> {
        let names = names_in(&self.directory, &self.path)?;
        let mut runs: Vec<RunName> = names.iter().filter_map(|(name, _)| RunName::parse(name)).collect();
        runs.sort();
        Ok(runs)
    }

    pub fn writer(&self, timeline: TimelineId, size: crate::wal::SegmentSize) -> RunWriter {
        RunWriter::new(self.clone(), timeline, size)
    }

    /// Reads `runs` of one timeline.
    pub fn reader(&self, runs: Vec<RunName>, size: crate::wal::SegmentSize) -> RunReader {
        RunReader::new(self.clone(), runs, size)
    }

    /// Removes a file the repositories no longer need.
    pub fn remove(&self, run: RunName) -> Result<(), SpoolError> {
        let path = self.path.join(run.to_string());
        let bytes = self.directory.stat_link(run.to_string()).map_or(0, |stat| stat.st_size.unsigned_abs());
        match self.directory.unlink(run.to_string()) {
            Err(error) if error.kind() != ErrorKind::NotFound => Err(SpoolError::io("remove", &path)(error)),
            _ => {
                self.usage.release(bytes.min(self.usage.used_bytes()));
                Ok(())
            }
        }
    }

    /// Keeps a file that did not prove out of the way; it goes on counting against the limit.
    pub fn refuse(&self, run: RunName) -> Result<PathBuf, SpoolError> {
        let path = self.path.join(run.to_string());
        for attempt in 0..u32::MAX {
            let other = match attempt {
                0 => format!("{run}{}", names::REFUSED),
                _ => format!("{run}{}{attempt}", names::REFUSED),
            };
            match self.directory.set_aside(run.to_string(), &other) {
                Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
                Err(error) => return Err(SpoolError::io("set aside", &path)(error)),
                Ok(()) => return Ok(self.path.join(other)),
            }
        }
        Err(SpoolError::io("set aside", &path)(ErrorKind::AlreadyExists.into()))
    }
}

/// A file some frames are in. Shared by those who may read them back.
#[derive(Debug)]
pub struct RunFile {
    spool: LineageSpool,
    pub name: RunName,
}

impl RunFile {
    /// Removes the file.
    pub fn remove(&self) -> Result<(), SpoolError> {
        self.spool.remove(self.name)
    }

    /// One frame, as it was written. It is opened for this: a backlog has more files than a process may keep open.
    pub fn read(&self, start: Lsn, offset: u64, bytes: u64, crc32: u32) -> Result<Vec<u8>, SpoolError> {
        let path = || self.spool.path.join(self.name.to_string());
        let read = || {
            let file = self.spool.directory.open_file(self.name.to_string())?;
            let mut content = vec![0; bytes as usize];
            file.read_exact_at(&mut content, offset)?;
            Ok::<_, std::io::Error>(content)
        };
        match read() {
            Ok(content) if crc32fast::hash(&content) == crc32 => Ok(content),
            Err(error) if !matches!(error.kind(), ErrorKind::UnexpectedEof | ErrorKind::NotFound) => {
                Err(SpoolError::io("read", &path())(error))
            }
            _ => Err(SpoolError::Damaged { path: path(), start }),
        }
    }
}

#[cfg(test)]
mod tests;
