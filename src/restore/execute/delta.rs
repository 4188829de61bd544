//! Owns: what of a used directory a restore keeps: the files that are, byte for byte, what the manifest lists. All others
//! are removed.
//! Does not own: whether the directory may be restored into (`ground.rs`). Everything here blocks.

use std::ffi::OsStr;
use std::io::{self, Read};
use std::os::unix::ffi::OsStrExt;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use rustix::fs::{FileType, Mode};

use super::error::RestoreError;
use super::ground::UNFINISHED;
use super::members;
use super::site::{Site, prefix_of};
use super::tree::{Tree, file_mode, names, remove_below};
use crate::catalog::manifest::{ChecksumAlgorithm, FileHasher};
use crate::repository::durable::Directory;

const READ_BYTES: usize = 256 << 10;
const DEPTH_MAX: usize = 64;

/// A file that may be kept: its size is right.
struct Candidate {
    /// `None`: PGDATA.
    tablespace: Option<u32>,
    /// Below the tree.
    path: Vec<u8>,
    index: usize,
}

/// Removes what the manifest does not list, and notes the files that are right.
pub fn keep_what_matches(site: &Site, jobs: usize) -> Result<(), RestoreError> {
    let mut candidates = Vec::new();
    let mut sweep = Sweep { site, tablespace: None, prefix: Vec::new(), candidates: &mut candidates };
    sweep.directory(&site.ground.tree, site.ground.tree.root(), b"", 0)?;
    for (&oid, tree) in &site.tablespaces {
        let mut sweep = Sweep { site, tablespace: Some(oid), prefix: prefix_of(oid), candidates: &mut candidates };
        sweep.directory(tree, tree.root(), b"", 0)?;
    }
    let size = |candidate: &Candidate| site.manifest.files.file(candidate.index).size;
    site.meter.enter(super::Phase::Comparing, candidates.iter().map(size).sum());
    let next = AtomicUsize::new(0);
    let compare = || {
        let mut buffer = vec![0; READ_BYTES];
        while let Some(candidate) = candidates.get(next.fetch_add(1, Ordering::Relaxed)) {
            compare(site, candidate, &mut buffer)?;
        }
        Ok::<_, RestoreError>(())
    };
    thread::scope(|scope| {
        let threads: Vec<_> = (0..jobs).map(|_| scope.spawn(compare)).collect();
        threads.into_iter().try_for_each(|thread| thread.join().expect("comparing does not panic"))
    })
}

struct Sweep<'a> {
    site: &'a Site,
    tablespace: Option<u32>,
    prefix: Vec<u8>,
    candidates: &'a mut Vec<Candidate>,
}

impl Sweep<'_> {
    /// Whether anything is left in the directory.
    fn directory(&mut self, tree: &Tree, at: &Directory, path: &[u8], depth: usize) -> Result<bool, RestoreError> {
        let shown = |path: &[u8]| tree.path().join(OsStr::from_bytes(path));
        let fault = |path: &[u8], source| RestoreError::local("clear", shown(path), source);
        if depth > DEPTH_MAX {
            return Err(fault(path, io::ErrorKind::InvalidFilename.into()));
        }
        let mut is_used = false;
        for name in names(at).map_err(|source| fault(path, source))? {
            let below = if path.is_empty() { name.clone() } else { [path, b"/", name.as_slice()].concat() };
            let name = OsStr::from_bytes(&name);
            let stat = at.stat_link(name).map_err(|source| fault(&below, source))?;
            match self.fate(&below, FileType::from_raw_mode(stat.st_mode), stat.st_nlink, stat.st_size as u64) {
                Found::Candidate(index) => {
                    is_used = true;
                    self.candidates.push(Candidate { tablespace: self.tablespace, path: below, index });
                }
                Found::Left => is_used = true,
                Found::Directory => {
                    let child = at.open_child(name).map_err(|source| fault(&below, source))?;
                    let is_child_used = self.directory(tree, &child, &below, depth + 1)?;
                    match !is_child_used && is_of_database(&below, self.tablespace.is_some()) {
                        true => at.remove_empty_directory(name).map_err(|source| fault(&below, source))?,
                        false => is_used = true,
                    }
                }
                Found::Superfluous => {
                    if FileType::from_raw_mode(stat.st_mode) == FileType::Symlink {
                        tracing::warn!("removing symbolic link {}: the copy has its own", shown(&below).display());
                    }
                    remove_below(at, name, 0).map_err(|source| fault(&below, source))?;
                }
            }
        }
        Ok(is_used)
    }

    fn fate(&self, path: &[u8], kind: FileType, links: u64, bytes: u64) -> Found {
        if self.tablespace.is_none() {
            if path == UNFINISHED.as_bytes() {
                return Found::Left;
            }
            // Links and directories in pg_tblspc were put right before.
            if path.strip_prefix(b"pg_tblspc/").is_some_and(members::is_oid) {
                return Found::Left;
            }
        } else if !path.contains(&b'/') && !self.is_listed_directory(path) {
            // Beside our `PG_<version>` may lie those of other servers.
            return Found::Left;
        }
        let files = &self.site.manifest.files;
        let listed = files.find(&[&self.prefix, path].concat());
        let is_dropped = self.tablespace.is_none() && members::is_dropped(path);
        if kind == FileType::Directory {
            let is_kept = listed.is_none() && (!is_dropped || is_wal_directory(path));
            return if is_kept { Found::Directory } else { Found::Superfluous };
        }
        match listed {
            Some(index) if kind == FileType::RegularFile && !is_dropped => {
                let file = files.file(index);
                // Bytes of which nothing is known, or that somebody else has under another name, are written anew.
                let is_certain = file.checksum.algorithm() != ChecksumAlgorithm::None || file.size == 0;
                let matches = is_certain && links == 1 && bytes == file.size;
                if matches { Found::Candidate(index) } else { Found::Superfluous }
            }
            _ => Found::Superfluous,
        }
    }

    /// Whether the manifest lists anything below this directory of a tablespace.
    fn is_listed_directory(&self, name: &[u8]) -> bool {
        let below = [&self.prefix, name, b"/"].concat();
        self.site.manifest.files.iter().any(|file| file.path.starts_with(&below))
    }
}

enum Found {
    /// File `index` of the manifest, by its size.
    Candidate(usize),
    Directory,
    Left,
    Superfluous,
}

fn is_wal_directory(path: &[u8]) -> bool {
    matches!(path, b"pg_wal/archive_status" | b"pg_wal/summaries")
}

/// `base/<oid>`, `PG_<version>/<oid>`: empty, it is that of a database that was dropped.
fn is_of_database(path: &[u8], is_tablespace: bool) -> bool {
    let mut parts = path.split(|&byte| byte == b'/');
    let (parent, name) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
    (is_tablespace || parent == b"base") && members::is_oid(name) && parts.next().is_none()
}

/// Keeps the file if it has the checksum the manifest lists; removes it otherwise.
fn compare(site: &Site, candidate: &Candidate, buffer: &mut [u8]) -> Result<(), RestoreError> {
    let (tree, _) = site.tree(candidate.tablespace).expect("candidates are of trees there are");
    let path = tree.path().join(OsStr::from_bytes(&candidate.path));
    let expected = site.manifest.files.file(candidate.index);
    let mut checked = || {
        let (parent, name) = match candidate.path.iter().rposition(|&byte| byte == b'/') {
            Some(at) => (&candidate.path[..at], &candidate.path[at + 1..]),
            None => (&b"."[..], candidate.path.as_slice()),
        };
        let directory = tree.root().open_below(OsStr::from_bytes(parent))?;
        let mut file = directory.open_file(OsStr::from_bytes(name))?;
        let mut hasher = FileHasher::new(expected.checksum.algorithm());
        loop {
            match file.read(buffer) {
                Ok(0) => break,
                Ok(count) => {
                    hasher.update(&buffer[..count]);
                    site.meter.add(count as u64);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // A damaged disk: written anew, the file lies elsewhere.
                Err(_) => return directory.unlink(OsStr::from_bytes(name)),
            }
        }
        if expected.size > 0 && hasher.finish() != expected.checksum {
            return directory.unlink(OsStr::from_bytes(name));
        }
        let stat = rustix::fs::fstat(&file)?;
        if let Some((uid, gid)) = tree.owner()
            && (stat.st_uid, stat.st_gid) != (uid.as_raw(), gid.as_raw())
        {
            rustix::fs::fchown(&file, Some(uid), Some(gid))?;
        }
        let mode = file_mode(stat.st_mode);
        if mode != Mode::from_raw_mode(stat.st_mode & 0o7777) {
            rustix::fs::fchmod(&file, mode)?;
        }
        site.accounts.keep(candidate.index);
        Ok(())
    };
    checked().map_err(|source| RestoreError::local("compare", path, source))
}
