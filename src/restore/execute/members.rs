//! Owns: what may be a member of a backup's tar, where it goes, and what of the source a restore leaves out.
//! Does not own: reading tars (`codec::tar`), whether the content is right (the manifest), writing it (`tree.rs`).
//! Pure. Rests on proto-notes/04-base-backup.md.
//!
//! A tar from a server holds plain relative names below PGDATA, or below `PG_<version>` of a tablespace. Whatever
//! else it holds was put there by somebody who wants a restore to write elsewhere.

use std::fmt;

/// Longer names cannot be opened.
const NAME_BYTES_MAX: usize = 255;
const PATH_BYTES_MAX: usize = 1024;

/// What a tar header says a member is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    File,
    Directory,
    Link,
    Other,
}

/// What becomes of a member.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fate {
    /// Written, under this name.
    File(Vec<u8>),
    /// Checked, and not written: it says something about the source that is not so of the copy.
    Dropped(Vec<u8>),
    Directory(Vec<u8>),
    /// Nothing: the restore makes it itself.
    Ours,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refused {
    pub name: String,
    pub fault: &'static str,
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "member {:?} {}", self.name, self.fault)
    }
}

/// Files of the source that say what the source does, at the top of PGDATA. `tablespace_map` is written anew.
const DROPPED: &[&[u8]] = &[
    b"tablespace_map",
    b"recovery.signal",
    b"standby.signal",
    b"postmaster.pid",
    b"postmaster.opts",
    b"backup_manifest",
    b"seawall.restore.json",
    b"seawall.restoring.json",
];
/// Directories that are empty in the copy: the source's slots hold WAL for its standbys, and its WAL comes by
/// `restore_command`.
const EMPTIED: &[&[u8]] = &[b"pg_replslot/", b"pg_wal/"];

/// The fate of a member of PGDATA's tar. `name` as the header has it; a directory's may end in a slash.
pub fn of_base(name: &[u8], kind: Kind) -> Result<Fate, Refused> {
    let path = plain(name, kind)?;
    let below_links = path.strip_prefix(b"pg_tblspc/");
    match (kind, below_links) {
        (Kind::Link | Kind::Directory, Some(oid)) if is_oid(oid) => Ok(Fate::Ours),
        (_, Some(_)) => Err(refused(name, "lies below pg_tblspc: a tablespace has a tar of its own")),
        (Kind::Link | Kind::Other, None) => Err(refused(name, "is neither a file nor a directory")),
        (Kind::Directory, None) => Ok(directory(path)),
        (Kind::File, None) if is_dropped(path) => Ok(Fate::Dropped(path.to_vec())),
        (Kind::File, None) => Ok(Fate::File(path.to_vec())),
    }
}

/// The fate of a member of a tablespace's tar.
pub fn of_tablespace(name: &[u8], kind: Kind) -> Result<Fate, Refused> {
    let path = plain(name, kind)?;
    if !path.starts_with(b"PG_") {
        return Err(refused(name, "does not lie below PG_<version>, as all of a tablespace does"));
    }
    match kind {
        Kind::Directory => Ok(Fate::Directory(path.to_vec())),
        Kind::File => Ok(Fate::File(path.to_vec())),
        Kind::Link | Kind::Other => Err(refused(name, "is neither a file nor a directory")),
    }
}

fn directory(path: &[u8]) -> Fate {
    match EMPTIED.iter().any(|emptied| path.starts_with(emptied)) && !is_kept_below_wal(path) {
        true => Fate::Ours,
        false => Fate::Directory(path.to_vec()),
    }
}

/// Whether a file at this place in the source says nothing that is true of the copy.
pub fn is_dropped(path: &[u8]) -> bool {
    DROPPED.contains(&path) || EMPTIED.iter().any(|emptied| path.starts_with(emptied))
}

/// `archive_status` and `summaries` are there, and empty.
fn is_kept_below_wal(path: &[u8]) -> bool {
    path.strip_prefix(b"pg_wal/").is_some_and(|name| !name.contains(&b'/') && !name.starts_with(b"."))
}

/// Decimal, as a tablespace's directory is named.
pub fn is_oid(name: &[u8]) -> bool {
    (1..=10).contains(&name.len()) && name.iter().all(u8::is_ascii_digit)
}

/// Whether a path is relative and made of plain names only.
pub fn is_plain(path: &[u8]) -> bool {
    fault_of(path).is_none()
}

/// The path of a member, without a directory's slash, and without the `./` of two of them: every server calls them
/// `./pg_wal/archive_status` and `./pg_wal/summaries`.
fn plain(name: &[u8], kind: Kind) -> Result<&[u8], Refused> {
    let path = match kind {
        Kind::Directory => {
            let path = name.strip_suffix(b"/").unwrap_or(name);
            path.strip_prefix(b"./").filter(|path| path.starts_with(b"pg_wal/")).unwrap_or(path)
        }
        Kind::Link => name.strip_suffix(b"/").unwrap_or(name),
        Kind::File | Kind::Other => name,
    };
    match fault_of(path) {
        None => Ok(path),
        Some(fault) => Err(refused(name, fault)),
    }
}

fn fault_of(path: &[u8]) -> Option<&'static str> {
    if path.len() > PATH_BYTES_MAX {
        return Some("has a longer name than a file can have");
    }
    if path.contains(&0) {
        return Some("has a zero byte in its name");
    }
    if path.starts_with(b"/") {
        return Some("has an absolute name");
    }
    path.split(|&byte| byte == b'/').find_map(|part| match part {
        b"" => Some("has an empty part in its name"),
        b"." | b".." => Some("has `.` or `..` in its name"),
        part if part.len() > NAME_BYTES_MAX => Some("has a longer name than a file can have"),
        _ => None,
    })
}

fn refused(name: &[u8], fault: &'static str) -> Refused {
    let shown = &name[..name.len().min(200)];
    Refused { name: String::from_utf8_lossy(shown).into_owned(), fault }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_server_sends_goes_where_it_belongs() {
        let file = |name: &str| Fate::File(name.into());
        let directory = |name: &str| Fate::Directory(name.into());
        let dropped = |name: &str| Fate::Dropped(name.into());
        for (name, kind, fate) in [
            ("base/1/1259", Kind::File, file("base/1/1259")),
            ("global/pg_control", Kind::File, file("global/pg_control")),
            ("base/1/", Kind::Directory, directory("base/1")),
            ("pg_wal/", Kind::Directory, directory("pg_wal")),
            ("pg_wal/archive_status/", Kind::Directory, directory("pg_wal/archive_status")),
            ("./pg_wal/archive_status", Kind::Directory, directory("pg_wal/archive_status")),
            ("pg_wal/summaries", Kind::Directory, directory("pg_wal/summaries")),
            ("pg_wal/.seawall-0000000000000001/", Kind::Directory, Fate::Ours),
            ("pg_replslot/", Kind::Directory, directory("pg_replslot")),
            ("pg_replslot/seawall/", Kind::Directory, Fate::Ours),
            ("pg_replslot/seawall/state", Kind::File, dropped("pg_replslot/seawall/state")),
            ("pg_wal/000000010000000000000001", Kind::File, dropped("pg_wal/000000010000000000000001")),
            ("pg_tblspc/", Kind::Directory, directory("pg_tblspc")),
            ("pg_tblspc/16384/", Kind::Link, Fate::Ours),
            ("pg_tblspc/16384/", Kind::Directory, Fate::Ours),
            ("standby.signal", Kind::File, dropped("standby.signal")),
            ("seawall.restore.json", Kind::File, dropped("seawall.restore.json")),
            ("backup_label", Kind::File, file("backup_label")),
        ] {
            assert_eq!(of_base(name.as_bytes(), kind), Ok(fate), "{name}");
        }
        let name = b"PG_18_202506291/5/16390";
        assert_eq!(of_tablespace(name, Kind::File), Ok(Fate::File(name.to_vec())));
    }

    #[test]
    fn nothing_leads_out() {
        for name in [
            "",
            "/",
            "/etc/passwd",
            "..",
            "../x",
            "base/../../x",
            "base/..",
            "./base",
            "base/.",
            "base//1",
            "base/1//",
            "a\0b",
        ] {
            for kind in [Kind::File, Kind::Directory, Kind::Link, Kind::Other] {
                assert!(of_base(name.as_bytes(), kind).is_err(), "{name:?} {kind:?}");
                assert!(of_tablespace(format!("PG_18_1/{name}/../../../x").as_bytes(), kind).is_err());
            }
        }
        let long = [b"base/".to_vec(), vec![b'x'; 256]].concat();
        assert!(of_base(&long, Kind::File).is_err());
        assert!(of_base(&[b"a/".repeat(600), b"a".to_vec()].concat(), Kind::File).is_err());
        assert!(of_base(b"base/1/", Kind::File).is_err());
        for kind in [Kind::Link, Kind::Other] {
            assert!(of_base(b"base/1/1259", kind).is_err());
            assert!(of_base(b"pg_wal", kind).is_err());
            assert!(of_tablespace(b"PG_18_202506291/5", kind).is_err());
        }
        assert!(of_base(b"pg_tblspc/16384/PG_18_1/5/1", Kind::File).is_err());
        assert!(of_base(b"pg_tblspc/../x", Kind::Link).is_err());
        assert!(of_base(b"pg_tblspc/x", Kind::Link).is_err());
        assert!(of_base(b"pg_tblspc/1", Kind::File).is_err());
        assert!(of_tablespace(b"base/1", Kind::File).is_err());
    }
}
