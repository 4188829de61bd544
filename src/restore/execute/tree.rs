//! Owns: files and directories of a restored tree: each is made below an open directory, part by part of its path, and
//! never through a link.
//! Does not own: which they are (`members.rs`), what is in them (`unpack.rs`), when they are durable (`finish.rs`).
//! Everything here blocks.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};

use rustix::fs::{FileType, Gid, Mode, Uid};

use super::error::RestoreError;
use crate::repository::durable::Directory;

/// Directories kept open: files come directory by directory, a few directories at a time.
const OPEN_DIRECTORIES_MAX: usize = 128;
/// Deeper trees are not PostgreSQL's.
const DEPTH_MAX: usize = 64;

/// User and group of everything in the tree; `None`: whoever runs this.
pub type Owner = Option<(Uid, Gid)>;

/// PGDATA, or the place of a tablespace.
#[derive(Debug)]
pub struct Tree {
    root: Arc<Directory>,
    /// For messages, and for nothing else.
    path: PathBuf,
    owner: Owner,
    open: Mutex<HashMap<Vec<u8>, Arc<Directory>>>,
}

/// Private, and readable for the group where the source's was: the only modes PostgreSQL accepts.
pub fn file_mode(mode: u32) -> Mode {
    Mode::from_raw_mode(0o600 | (mode & 0o040))
}

pub fn directory_mode(mode: u32) -> Mode {
    Mode::from_raw_mode(if mode & 0o050 == 0o050 { 0o750 } else { 0o700 })
}

const PRIVATE_FILE: u32 = 0o600;
const PRIVATE_DIRECTORY: u32 = 0o700;

impl Tree {
    pub fn new(root: Directory, path: PathBuf, owner: Owner) -> Tree {
        Tree { root: Arc::new(root), path, owner, open: Mutex::default() }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn owner(&self) -> Owner {
        self.owner
    }

    pub fn root(&self) -> &Directory {
        &self.root
    }

    fn shown(&self, path: &[u8]) -> PathBuf {
        self.path.join(OsStr::from_bytes(path))
    }

    fn fault(&self, operation: &'static str, path: &[u8]) -> impl Fn(io::Error) -> RestoreError {
        let path = self.shown(path);
        move |source| RestoreError::local(operation, &path, source)
    }

    fn cache(&self) -> MutexGuard<'_, HashMap<Vec<u8>, Arc<Directory>>> {
        self.open.lock().expect("no holder panics")
    }

    /// The directory of this path, made with its parents where they are missing. `mode` is what it gets if it is said.
    pub fn directory(&self, path: &[u8], mode: Option<u32>) -> Result<Arc<Directory>, RestoreError> {
        let directory = self.opened(path)?;
        if let Some(mode) = mode
            && directory_mode(mode) != directory_mode(PRIVATE_DIRECTORY)
        {
            directory.set_access(directory_mode(mode), self.owner).map_err(self.fault("set the mode of", path))?;
        }
        Ok(directory)
    }

    fn opened(&self, path: &[u8]) -> Result<Arc<Directory>, RestoreError> {
        if path.is_empty() {
            return Ok(self.root.clone());
        }
        if let Some(known) = self.cache().get(path) {
            return Ok(known.clone());
        }
        let mut current = self.root.clone();
        for (depth, name) in path.split(|&byte| byte == b'/').enumerate() {
            let fault = self.fault("create directory", path);
            if depth >= DEPTH_MAX {
                return Err(fault(io::ErrorKind::InvalidFilename.into()));
            }
            let name = OsStr::from_bytes(name);
            let below = match current.open_child(name) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => self.made(&current, name),
                opened => opened,
            };
            current = Arc::new(below.map_err(fault)?);
        }
        let mut cache = self.cache();
        if cache.len() >= OPEN_DIRECTORIES_MAX {
            cache.clear();
        }
        cache.insert(path.to_vec(), current.clone());
        Ok(current)
    }

    fn made(&self, parent: &Directory, name: &OsStr) -> io::Result<Directory> {
        match parent.make_child(name, directory_mode(PRIVATE_DIRECTORY), self.owner) {
            // Another volume was faster.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => parent.open_child(name),
            made => made,
        }
    }

    /// A new file of this path, open for writing. Whatever file or link has the name is removed first.
    pub fn create(&self, path: &[u8], mode: u32) -> Result<File, RestoreError> {
        let (parent, name) = split(path);
        let directory = self.opened(parent)?;
        let name = OsStr::from_bytes(name);
        let create = || directory.create_plain(name, file_mode(mode), self.owner);
        let created = match create() {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                directory.unlink(name).and_then(|()| create())
            }
            created => created,
        };
        created.map_err(self.fault("create", path))
    }

    /// A new file of this path with this content.
    pub fn put(&self, path: &[u8], content: &[u8]) -> Result<(), RestoreError> {
        let mut file = self.create(path, PRIVATE_FILE)?;
        file.write_all(content).map_err(self.fault("write", path))
    }

    /// The content of a file that is not longer than `most`; `None` where there is no such file.
    pub fn read(&self, path: &[u8], most: u64) -> Result<Option<Vec<u8>>, RestoreError> {
        let (parent, name) = split(path);
        let fault = self.fault("read", path);
        let open = || {
            let mut directory = self.root.open_below(".")?;
            for part in parent.split(|&byte| byte == b'/').filter(|part| !part.is_empty()) {
                directory = directory.open_child(OsStr::from_bytes(part))?;
            }
            directory.open_file(OsStr::from_bytes(name))
        };
        let file = match open() {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            opened => opened.map_err(&fault)?,
        };
        let mut content = Vec::new();
        file.take(most + 1).read_to_end(&mut content).map_err(&fault)?;
        match content.len() as u64 > most {
            true => Err(fault(io::ErrorKind::FileTooLarge.into())),
            false => Ok(Some(content)),
        }
    }

    /// Gives a file the tree's owner that somebody else has written.
    pub fn own(&self, path: &[u8]) -> Result<(), RestoreError> {
        let Some((uid, gid)) = self.owner else { return Ok(()) };
        let (parent, name) = split(path);
        let own = || {
            let file = self.root.open_below(OsStr::from_bytes(if parent.is_empty() { b"." } else { parent }))?;
            let file = file.open_file(OsStr::from_bytes(name))?;
            rustix::fs::fchown(&file, Some(uid), Some(gid)).map_err(io::Error::from)
        };
        own().map_err(self.fault("change the owner of", path))
    }

    /// Makes a symbolic link, in place of any other.
    pub fn link(&self, path: &[u8], target: &Path) -> Result<(), RestoreError> {
        let (parent, name) = split(path);
        let directory = self.opened(parent)?;
        let name = OsStr::from_bytes(name);
        let make = || directory.make_link(name, target, self.owner);
        let made = match make() {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => self.remove(path).map(|()| make())?,
            made => made,
        };
        made.map_err(self.fault("link", path))
    }

    /// Removes whatever has this name, a directory with all below it; what is not there is removed already.
    pub fn remove(&self, path: &[u8]) -> Result<(), RestoreError> {
        let (parent, name) = split(path);
        let directory = match parent.is_empty() {
            true => self.root.clone(),
            false => self.opened(parent)?,
        };
        self.cache().clear();
        remove_below(&directory, OsStr::from_bytes(name), 0).map_err(self.fault("remove", path))
    }
}

/// Removes `name` from a directory. A link is removed, and what it leads to is not touched.
pub fn remove_below(directory: &Directory, name: &OsStr, depth: usize) -> io::Result<()> {
    let stat = match directory.stat_link(name) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        stat => stat?,
    };
    if FileType::from_raw_mode(stat.st_mode) != FileType::Directory {
        return directory.unlink(name);
    }
    if depth >= DEPTH_MAX {
        return Err(io::ErrorKind::InvalidFilename.into());
    }
    let below = directory.open_child(name)?;
    for name in names(&below)? {
        remove_below(&below, OsStr::from_bytes(&name), depth + 1)?;
    }
    directory.remove_empty_directory(name)
}

/// The names in a directory, sorted.
pub fn names(directory: &Directory) -> io::Result<Vec<Vec<u8>>> {
    let mut names = Vec::new();
    for entry in directory.read()? {
        let entry = entry?;
        let name = entry.file_name().to_bytes();
        if name != b"." && name != b".." {
            names.push(name.to_vec());
        }
    }
    names.sort();
    Ok(names)
}

/// Directory and name of a path.
fn split(path: &[u8]) -> (&[u8], &[u8]) {
    match path.iter().rposition(|&byte| byte == b'/') {
        Some(at) => (&path[..at], &path[at + 1..]),
        None => (b"", path),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{MetadataExt, symlink};

    use super::*;

    fn tree(path: &Path) -> Tree {
        Tree::new(Directory::open(path).unwrap(), path.to_path_buf(), None)
    }

    #[test]
    fn files_are_private_and_their_directories_too() {
        let scratch = tempfile::tempdir().unwrap();
        let tree = tree(scratch.path());
        tree.put(b"base/5/1", b"one").unwrap();
        tree.create(b"base/5/2", 0o640).unwrap();
        tree.directory(b"base", Some(0o750)).unwrap();
        let mode = |path: &str| scratch.path().join(path).metadata().unwrap().mode() & 0o7777;
        let modes = ["base", "base/5", "base/5/1", "base/5/2"].map(mode);
        assert_eq!(modes, [0o750, 0o700, 0o600, 0o640]);
        tree.put(b"base/5/1", b"other").unwrap();
        assert_eq!(tree.read(b"base/5/1", 5).unwrap().unwrap(), b"other");
        assert!(tree.read(b"base/5/1", 4).is_err());
        assert_eq!(tree.read(b"base/6/1", 4).unwrap(), None);
        assert_eq!(file_mode(0o7777).as_raw_mode(), 0o640);
    }

    /// Somebody who can write into the tree puts links where files are about to be made.
    #[test]
    fn nothing_is_written_through_a_link() {
        let outside = tempfile::tempdir().unwrap();
        let scratch = tempfile::tempdir().unwrap();
        let tree = tree(scratch.path());
        std::fs::write(outside.path().join("victim"), "kept").unwrap();
        symlink(outside.path(), scratch.path().join("base")).unwrap();
        symlink(outside.path().join("victim"), scratch.path().join("PG_VERSION")).unwrap();
        assert!(tree.put(b"base/evil", b"x").is_err());
        assert!(tree.directory(b"base/evil", None).is_err());
        assert!(tree.read(b"base/victim", 10).is_err());
        tree.put(b"PG_VERSION", b"18\n").unwrap();
        assert!(!scratch.path().join("PG_VERSION").is_symlink());
        tree.remove(b"base").unwrap();
        assert_eq!(names(&Directory::open(outside.path()).unwrap()).unwrap(), [b"victim"]);
        assert_eq!(std::fs::read(outside.path().join("victim")).unwrap(), b"kept");
    }

    #[test]
    fn what_is_removed_is_removed_with_all_below_it() {
        let outside = tempfile::tempdir().unwrap();
        std::fs::write(outside.path().join("kept"), "").unwrap();
        let scratch = tempfile::tempdir().unwrap();
        let tree = tree(scratch.path());
        tree.put(b"a/b/c", b"x").unwrap();
        tree.link(b"a/out", outside.path()).unwrap();
        tree.remove(b"a").unwrap();
        tree.remove(b"a").unwrap();
        assert!(names(tree.root()).unwrap().is_empty() && outside.path().join("kept").exists());
        tree.put(b"a/b/c", b"x").unwrap();
        assert!(scratch.path().join("a/b/c").exists());
    }
}
