//! Owns: what is in the place a restore shall write to, whether it may, and the note that it is unfinished.
//! Does not own: where tablespaces go (`tablespaces.rs`), what of it can be kept (`delta.rs`).
//!
//! While `seawall.restoring.json` is there and `global/pg_control` is not, no server can be started on the directory,
//! and `--delta` knows it again.

use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use jiff::Timestamp;
use rustix::fs::{Gid, Mode, Uid};
use rustix::io::Errno;
use rustix::process::Pid;
use serde::{Deserialize, Serialize};

use super::error::RestoreError;
use super::tree::{Owner, Tree, names};
use crate::catalog::backup::TablespaceEntry;
use crate::repository::durable::{self, Directory, Survives};
use crate::repository::layout::BackupId;
use crate::restore::wal_get::read_system_id;
use crate::wal::SystemId;

/// In PGDATA, from before the first change until the last.
pub const UNFINISHED: &str = "seawall.restoring.json";
const NOTE_BYTES_MAX: u64 = 64 << 10;
const PID_FILE_BYTES_MAX: u64 = 64 << 10;
/// Names shown of what is there.
const SHOWN: usize = 5;

/// `seawall.restoring.json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct UnfinishedFile {
    pub schema: u32,
    pub system_id: SystemId,
    pub backup: BackupId,
    pub began: Timestamp,
    /// Where this restore puts them: its own, if it goes on later.
    pub tablespaces: Vec<TablespaceEntry>,
}

/// PGDATA as a restore may use it. Nobody else restores into it while this lives.
#[derive(Debug)]
pub struct Ground {
    pub tree: Tree,
    /// Something is there that --delta may keep.
    pub is_used: bool,
    /// Of the restore that did not end, if there was one.
    pub unfinished: Option<UnfinishedFile>,
    _lock: Option<Directory>,
}

/// Whose the files will be: what is said; else, as root, the owner of an existing PGDATA, or of its parent directory.
pub fn owner(pgdata: &Path, said: Owner) -> Result<Owner, RestoreError> {
    if said.is_some() || !rustix::process::geteuid().is_root() {
        return Ok(said);
    }
    let whose = |path: &Path| {
        let stat = rustix::fs::stat(path).ok()?;
        Some((Uid::from_raw(stat.st_uid), Gid::from_raw(stat.st_gid)))
    };
    let existing = pgdata.ancestors().skip(1).find(|path| path.is_dir()).unwrap_or(Path::new("/"));
    let found = whose(pgdata).filter(|(uid, _)| !uid.is_root()).or_else(|| whose(existing));
    match found {
        Some((uid, gid)) if !uid.is_root() => Ok(Some((uid, gid))),
        _ => Err(RestoreError::RootOwner { parent: existing.to_path_buf() }),
    }
}

/// A child that was forked while the lock was held keeps it until it runs its own program: a moment, not a restore.
fn lock_patiently(root: &Directory) -> io::Result<Directory> {
    const ATTEMPTS: u32 = 20;
    const PAUSE: Duration = Duration::from_millis(50);
    for _ in 1..ATTEMPTS {
        match root.lock() {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => std::thread::sleep(PAUSE),
            locked => return locked,
        }
    }
    root.lock()
}

/// Looks, and changes nothing but that it creates an absent directory.
pub fn take(pgdata: &Path, owner: Owner, system_id: SystemId, delta: bool) -> Result<Ground, RestoreError> {
    let root = open_or_create(pgdata, owner)?;
    let local = |operation| move |source| RestoreError::local(operation, pgdata, source);
    // It goes with the process that holds it: nothing is left over to clean. Where there are no such locks, two
    // restores at once are the operator's to avoid.
    let lock = match lock_patiently(&root) {
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
            return Err(RestoreError::Busy { path: pgdata.to_path_buf() });
        }
        lock => lock.ok(),
    };
    let names = names(&root).map_err(local("list"))?;
    let tree = Tree::new(root, pgdata.to_path_buf(), owner);
    if let Some(pid) = running(&tree)? {
        return Err(RestoreError::Running { path: pgdata.to_path_buf(), pid });
    }
    if !names.is_empty() {
        let found = system_id_of(pgdata)?;
        if let Some(found) = found.filter(|&found| found != system_id) {
            return Err(RestoreError::Foreign { path: pgdata.to_path_buf(), found, expected: system_id });
        }
        if !delta || found.is_none() {
            return Err(RestoreError::NotEmpty { path: pgdata.to_path_buf(), what: described(&tree, &names) });
        }
    }
    let unfinished = unfinished(pgdata)?;
    Ok(Ground { tree, is_used: !names.is_empty(), unfinished, _lock: lock })
}

/// Notes that a restore is at work, then makes what was there impossible to start. Both are durable afterwards.
pub fn begin(ground: &Ground, note: &UnfinishedFile) -> Result<(), RestoreError> {
    let tree = &ground.tree;
    let path = tree.path().to_path_buf();
    let local = |operation, path: PathBuf| move |source| RestoreError::local(operation, path, source);
    let text = serde_json::to_vec_pretty(note).expect("our formats have no failing serializers");
    // In one step: a note that is lost would leave a directory nobody knows any more.
    let place = path.join(UNFINISHED);
    durable::write_file_into_place(&place, Survives::PowerLoss, |file| file.write_all(&text))
        .map_err(local("write", place))?;
    tree.own(UNFINISHED.as_bytes())?;
    tree.root().set_access(Mode::from_raw_mode(0o700), tree.owner()).map_err(local("set the mode of", path.clone()))?;
    let control = path.join("global/pg_control");
    match tree.root().open_child("global") {
        Ok(global) => global.remove_files(&["pg_control"]).map_err(local("remove", control)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(RestoreError::local("open", path.join("global"), error)),
    }
}

/// The directory, which is made, with missing parents, where it is not there.
pub fn open_or_create(path: &Path, owner: Owner) -> Result<Directory, RestoreError> {
    let local = |operation, path: &Path| {
        let path = path.to_path_buf();
        move |source| RestoreError::local(operation, path, source)
    };
    match Directory::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        opened => return opened.map_err(local("open", path)),
    }
    let existing = path.ancestors().skip(1).find(|parent| parent.is_dir()).unwrap_or(Path::new("/"));
    let mut directory = Directory::open(existing).map_err(local("open", existing))?;
    for name in path.strip_prefix(existing).expect("an ancestor is a prefix").components() {
        let made = directory.make_child(name, Mode::from_raw_mode(0o700), owner);
        let below = made.map_err(local("create directory", path))?;
        directory.sync().map_err(local("create directory", path))?;
        directory = below;
    }
    Ok(directory)
}

/// The process that postmaster.pid names, if it is alive.
fn running(tree: &Tree) -> Result<Option<i32>, RestoreError> {
    let Some(content) = tree.read(b"postmaster.pid", PID_FILE_BYTES_MAX)? else { return Ok(None) };
    let first = String::from_utf8_lossy(&content).lines().next().unwrap_or("").trim().to_string();
    // A stand-alone backend writes a negative number.
    let pid = first.parse::<i32>().ok().map(i32::unsigned_abs).and_then(|pid| i32::try_from(pid).ok());
    let Some(pid) = pid.filter(|&pid| pid > 1).and_then(Pid::from_raw) else { return Ok(None) };
    match rustix::process::test_kill_process(pid) {
        Err(Errno::SRCH) => Ok(None),
        _ => Ok(Some(pid.as_raw_nonzero().get())),
    }
}

/// Which system a directory belongs to: by pg_control, or by the note of a restore that did not end.
fn system_id_of(pgdata: &Path) -> Result<Option<SystemId>, RestoreError> {
    match read_system_id(pgdata) {
        Ok(found) => return Ok(Some(found)),
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            return Err(RestoreError::local("read", pgdata.join("global/pg_control"), error));
        }
        Err(_) => {}
    }
    Ok(unfinished(pgdata)?.map(|note| note.system_id))
}

fn unfinished(pgdata: &Path) -> Result<Option<UnfinishedFile>, RestoreError> {
    let tree = |root| Tree::new(root, pgdata.to_path_buf(), None);
    let root = Directory::open(pgdata).map_err(|error| RestoreError::local("open", pgdata, error))?;
    let content = tree(root).read(UNFINISHED.as_bytes(), NOTE_BYTES_MAX)?;
    Ok(content.and_then(|content| serde_json::from_slice(&content).ok()))
}

/// What an operator sees there.
fn described(tree: &Tree, names: &[Vec<u8>]) -> String {
    if let Ok(Some(note)) = unfinished(tree.path()) {
        return format!("an unfinished restore of backup {}, begun {}", note.backup, note.began);
    }
    let version = tree.read(b"PG_VERSION", 64).ok().flatten();
    let version = version.map(|version| String::from_utf8_lossy(&version).trim().to_string());
    if let (Some(version), Ok(Some(system))) = (version, system_id_of(tree.path())) {
        return format!("PostgreSQL {version} data of system {system}");
    }
    let shown: Vec<String> = names.iter().take(SHOWN).map(|name| OsStrExt::from_bytes(name)).map(shown_name).collect();
    let more = if names.len() > SHOWN { ", …" } else { "" };
    format!("{} ({}{more})", counted(names.len()), shown.join(", "))
}

fn counted(count: usize) -> String {
    if count == 1 { "one entry".to_string() } else { format!("{count} entries") }
}

fn shown_name(name: &std::ffi::OsStr) -> String {
    name.to_string_lossy().escape_debug().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    const OURS: SystemId = SystemId(7);

    fn taken(path: &Path, delta: bool) -> Result<Ground, RestoreError> {
        let owner = owner(path, Some((rustix::process::geteuid(), rustix::process::getegid()))).unwrap();
        take(path, owner, OURS, delta)
    }

    fn data_directory(path: &Path, system: u64) {
        std::fs::create_dir_all(path.join("global")).unwrap();
        std::fs::write(path.join("PG_VERSION"), "18\n").unwrap();
        std::fs::write(path.join("global/pg_control"), [&system.to_le_bytes()[..], &[0; 100]].concat()).unwrap();
    }

    fn note() -> UnfinishedFile {
        let began = "2026-11-22T11:00:00Z".parse().unwrap();
        UnfinishedFile {
            schema: 1,
            system_id: OURS,
            backup: "20261122T110000Z-full".parse().unwrap(),
            began,
            tablespaces: Vec::new(),
        }
    }

    #[test]
    fn an_absent_and_an_empty_directory_are_taken() {
        let scratch = tempfile::tempdir().unwrap();
        let path = scratch.path().join("a/b");
        for _ in 0..2 {
            assert!(!taken(&path, false).unwrap().is_used);
        }
    }

    #[test]
    fn what_is_there_is_named_and_kept() {
        let scratch = tempfile::tempdir().unwrap();
        let path = scratch.path();
        std::fs::write(path.join("notes.txt"), "mine").unwrap();
        for delta in [false, true] {
            let error = taken(path, delta).unwrap_err().to_string();
            assert!(error.contains("one entry (notes.txt)"), "{error}");
        }
        data_directory(path, 7);
        let error = taken(path, false).unwrap_err().to_string();
        assert!(error.contains("PostgreSQL 18 data of system 7"), "{error}");
        assert!(taken(path, true).unwrap().is_used);
        data_directory(path, 8);
        for delta in [false, true] {
            assert!(matches!(taken(path, delta), Err(RestoreError::Foreign { found: SystemId(8), .. })));
        }
    }

    #[test]
    fn a_running_server_is_left_alone() {
        let scratch = tempfile::tempdir().unwrap();
        data_directory(scratch.path(), 7);
        let pid_file = scratch.path().join("postmaster.pid");
        let ours = std::process::id();
        for text in [format!("{ours}\n/somewhere\n"), format!("-{ours}\n")] {
            std::fs::write(&pid_file, text).unwrap();
            for delta in [false, true] {
                assert!(matches!(taken(scratch.path(), delta), Err(RestoreError::Running { .. })));
            }
        }
        let mut ended = std::process::Command::new("true").spawn().unwrap();
        ended.wait().unwrap();
        std::fs::write(&pid_file, format!("{}\n", ended.id())).unwrap();
        assert!(taken(scratch.path(), true).unwrap().is_used);
    }

    #[test]
    fn what_was_begun_cannot_be_started_and_is_known_again() {
        let scratch = tempfile::tempdir().unwrap();
        data_directory(scratch.path(), 7);
        begin(&taken(scratch.path(), true).unwrap(), &note()).unwrap();
        assert!(!scratch.path().join("global/pg_control").exists());
        let error = taken(scratch.path(), false).unwrap_err().to_string();
        assert!(error.contains("unfinished restore of backup 20261122T110000Z-full"), "{error}");
        let ground = taken(scratch.path(), true).unwrap();
        assert!(ground.is_used);
        assert!(matches!(taken(scratch.path(), true), Err(RestoreError::Busy { .. })));
    }
}
