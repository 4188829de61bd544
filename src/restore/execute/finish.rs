//! Owns: from files that are all there to a directory a server can be started on: settings, links, the marker,
//! everything on the disk, and `global/pg_control` last of all.
//! Does not own: what the settings say (`settings.rs`, `config.rs`). Everything here blocks.
//!
//! ```text
//! step                                        a crash after it leaves
//! 1 settings, signal file, map, marker        no pg_control: nothing starts; --delta goes on
//! 2 everything durable                        the same
//! 3 rename pg_control, durably                a whole data directory, and a note that is no longer true
//! 4 remove the note, durably                  a whole data directory
//! ```

use std::io::Write;
use std::path::Path;
use std::sync::atomic::Ordering;

use rustix::fs::Mode;

use super::error::RestoreError;
use super::ground::UNFINISHED;
use super::settings::{self, Recovery};
use super::site::{CONTROL, CONTROL_ASIDE, Site};
use super::tablespaces::Place;
use super::tree::Tree;
use crate::repository::durable::Directory;
use crate::restore::marker::{self, RestoreMarker};

const AUTO_CONF: &[u8] = b"postgresql.auto.conf";
const AUTO_CONF_BYTES_MAX: u64 = 16 << 20;
/// What a server expects to be there, empty or not (`initdb`'s `subdirs`); 13 to 18 have the same.
const DIRECTORIES: &[&str] = &[
    "base",
    "global",
    "pg_commit_ts",
    "pg_dynshmem",
    "pg_logical/mappings",
    "pg_logical/snapshots",
    "pg_multixact/members",
    "pg_multixact/offsets",
    "pg_notify",
    "pg_replslot",
    "pg_serial",
    "pg_snapshots",
    "pg_stat",
    "pg_stat_tmp",
    "pg_subtrans",
    "pg_tblspc",
    "pg_twophase",
    "pg_wal/archive_status",
    "pg_xact",
];

/// What is written beside the files of the backup.
#[derive(Debug)]
pub struct Additions {
    pub recovery: Recovery,
    pub places: Vec<Place>,
    pub marker: RestoreMarker,
    /// Configuration that goes into PGDATA: names below it, and content.
    pub files: Vec<(String, Vec<u8>)>,
}

/// The manifest beside the data it describes, as `pg_basebackup` leaves it.
pub fn begin_manifest(site: &Site) -> Result<std::fs::File, RestoreError> {
    site.ground.tree.create(b"backup_manifest", 0o600)
}

pub fn write_manifest(site: &Site, file: &mut std::fs::File, chunk: &[u8]) -> Result<(), RestoreError> {
    let path = site.ground.tree.path().join("backup_manifest");
    file.write_all(chunk).map_err(|source| RestoreError::local("write", path, source))
}

/// Step 1.
pub fn write_additions(site: &Site, additions: &Additions) -> Result<(), RestoreError> {
    let tree = &site.ground.tree;
    for directory in DIRECTORIES {
        tree.directory(directory.as_bytes(), None)?;
    }
    if additions.recovery.server_major >= 17 {
        tree.directory(b"pg_wal/summaries", None)?;
    }
    for (name, content) in &additions.files {
        tree.put(name.as_bytes(), content)?;
    }
    let source = tree.read(AUTO_CONF, AUTO_CONF_BYTES_MAX)?.unwrap_or_default();
    tree.put(AUTO_CONF, &settings::auto_conf(&source, &additions.recovery))?;
    let located = |place: &Place| {
        let location = place.location.as_ref()?;
        Some((place.oid, std::os::unix::ffi::OsStrExt::as_bytes(location.as_os_str()).to_vec()))
    };
    let located: Vec<(u32, Vec<u8>)> = additions.places.iter().filter_map(located).collect();
    if !located.is_empty() {
        let map = settings::tablespace_map(located.iter().map(|(oid, location)| (*oid, location.as_slice())));
        tree.put(b"tablespace_map", &map)?;
    }
    tree.put(if additions.recovery.standby { b"standby.signal" } else { b"recovery.signal" }, b"")?;
    additions.marker.write(tree.path())?;
    tree.own(marker::FILE_NAME.as_bytes())
}

/// Steps 2 to 4. `watched` are directories of all file systems concerned, opened before the first byte was written.
pub fn make_startable(site: &Site, watched: &[Watched]) -> Result<(), RestoreError> {
    let tree = &site.ground.tree;
    let path = tree.path();
    let local = |operation, path: &Path| {
        let path = path.to_path_buf();
        move |source| RestoreError::local(operation, path, source)
    };
    if site.group_reads.load(Ordering::Relaxed) {
        let mode = Mode::from_raw_mode(0o750);
        tree.root().set_access(mode, tree.owner()).map_err(local("set the mode of", path))?;
    }
    for (tree, watched) in std::iter::once(tree).chain(site.tablespaces.values()).zip(watched) {
        tree.root().sync_tree(&watched.0).map_err(local("write out", tree.path()))?;
    }
    let name = |path: &'static [u8]| std::str::from_utf8(&path[b"global/".len()..]).expect("it is ASCII");
    let global = tree.root().open_child("global").map_err(local("open", &path.join("global")))?;
    global
        .put_in_place(name(CONTROL_ASIDE), name(CONTROL))
        .map_err(local("put into place", &path.join("global/pg_control")))?;
    tree.root().remove_files(&[UNFINISHED]).map_err(local("remove", &path.join(UNFINISHED)))
}

/// A file system on which everything that fails to be written is remembered, from when it was opened.
#[derive(Debug)]
pub struct Watched(Directory);

pub fn watch(tree: &Tree) -> Result<Watched, RestoreError> {
    let opened = tree.root().open_below(".");
    opened.map(Watched).map_err(|source| RestoreError::local("open", tree.path(), source))
}
