//! Owns: any object of a lineage by its path below it, as facts in the ledger name objects, written and read.
//! Does not own: the names themselves (`layout.rs`, `backups.rs`).

use super::{
    BackupId, Key, Lineage, TailName, VolumeName, WalDirectory, WalObject, parse_history, parse_tar_stream,
    parse_volume,
};
use crate::codec::Form;
use crate::wal::{SegmentName, TimelineId};

/// What an object below a lineage is, by its path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Part {
    /// Directly inside a WAL directory; never [`WalObject::Tails`].
    Wal(WalObject),
    Tail(SegmentName, TailName),
    History(TimelineId),
    Volume(BackupId, VolumeName, Form),
    /// Any other object of a backup.
    Backup(BackupId),
    /// Of no kind that damage can be mended of, or of a newer format.
    Other,
}

impl Part {
    /// `below` is a path below a lineage, as [`Lineage::below`] gives it.
    pub fn parse(below: &str) -> Part {
        let parts: Vec<&str> = below.split('/').collect();
        let found = match parts[..] {
            ["wal", history] => parse_history(history).map(Part::History),
            ["wal", directory, object] => wal(directory, object).map(Part::Wal),
            ["wal", directory, tails, tail] => wal_tail(directory, tails, tail),
            ["backups", id, ..] => id.parse().ok().map(|id| backup(id, &parts[2..])),
            _ => None,
        };
        found.unwrap_or(Part::Other)
    }

    /// The segment whose WAL it holds, or should.
    pub fn segment(&self) -> Option<SegmentName> {
        match self {
            Part::Wal(WalObject::Segment(name, _) | WalObject::Repair(name, ..)) | Part::Tail(name, _) => Some(*name),
            _ => None,
        }
    }

    /// The backup it belongs to.
    pub fn backup(&self) -> Option<BackupId> {
        match self {
            Part::Volume(id, ..) | Part::Backup(id) => Some(*id),
            _ => None,
        }
    }
}

fn wal(directory: &str, object: &str) -> Option<WalObject> {
    let directory = WalDirectory::parse(directory)?;
    let object = WalObject::parse(object)?;
    let (WalObject::Segment(name, _)
    | WalObject::Conflict(name, ..)
    | WalObject::Repair(name, ..)
    | WalObject::RawMarker(name, _)
    | WalObject::Index(super::IndexName { first: name, .. })) = object
    else {
        return None;
    };
    (WalDirectory::of(name) == directory).then_some(object)
}

fn wal_tail(directory: &str, tails: &str, tail: &str) -> Option<Part> {
    let WalObject::Tails(name) = WalObject::parse(tails)? else { return None };
    let tail = TailName::parse(tail)?;
    (WalDirectory::of(name) == WalDirectory::parse(directory)?).then_some(Part::Tail(name, tail))
}

fn backup(id: BackupId, rest: &[&str]) -> Part {
    let volume = match rest {
        [stream, volume] => parse_tar_stream(stream).and_then(|stream| parse_volume(stream, volume)),
        _ => None,
    };
    volume.map_or(Part::Backup(id), |(volume, form)| Part::Volume(id, volume, form))
}

impl Lineage {
    /// The path of one of its objects below it; `None` for any other lineage's.
    pub fn below<'k>(&self, key: &'k Key) -> Option<&'k str> {
        let path = key.as_str().strip_prefix(self.cluster.as_str())?.strip_prefix('/')?;
        path.strip_prefix(self.directory_name().as_str())?.strip_prefix('/')
    }

    /// The object with this path below the lineage; `None` for what no path of ours looks like.
    pub fn object(&self, below: &str) -> Option<Key> {
        let plain = |part: &str| !matches!(part, "" | "." | "..") && !part.contains('\0');
        below.split('/').all(plain).then(|| self.key(format_args!("{below}")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::repository::layout::{Epoch, IndexName, TarStream};
    use crate::wal::{Lsn, SystemId};

    #[test]
    fn paths_below_a_lineage_are_read_back() {
        let lineage = Lineage::new("main", SystemId(7), 2);
        let segment: SegmentName = "0000000100000002000000A7".parse().unwrap();
        let id: BackupId = "20261122T110000Z-full".parse().unwrap();
        let index = IndexName { first: segment, last: segment, epoch: Epoch(1) };
        let (from, to) = (Lsn(0x2_A700_0000), Lsn(0x2_A700_0100));
        let tail = TailName { epoch: Epoch(1), from, to, raw_crc32: 1, last_commit: None, form: Form::Plain };
        let base = VolumeName { stream: TarStream::Base, number: 1 };
        let space = VolumeName { stream: TarStream::Tablespace(16384), number: 2 };
        for (key, part) in [
            (lineage.segment(segment, Form::Encrypted), Part::Wal(WalObject::Segment(segment, Form::Encrypted))),
            (lineage.repair(segment, 9, Form::Plain), Part::Wal(WalObject::Repair(segment, 9, Form::Plain))),
            (lineage.index(index), Part::Wal(WalObject::Index(index))),
            (lineage.tail(segment, &tail), Part::Tail(segment, tail)),
            (lineage.history(TimelineId(2)), Part::History(TimelineId(2))),
            (lineage.volume(id, base, Form::Plain), Part::Volume(id, base, Form::Plain)),
            (lineage.volume(id, space, Form::Encrypted), Part::Volume(id, space, Form::Encrypted)),
            (lineage.backup_manifest(id), Part::Backup(id)),
            (lineage.backup_config(id, "a/b.conf", Form::Plain).unwrap(), Part::Backup(id)),
            (lineage.lineage_json(), Part::Other),
        ] {
            let below = lineage.below(&key).unwrap();
            assert_eq!(Part::parse(below), part, "{key}");
            assert_eq!(lineage.object(below), Some(key));
        }
        assert_eq!(Lineage::new("main", SystemId(7), 1).below(&lineage.lineage_json()), None);
    }

    #[test]
    fn what_is_no_path_of_ours_is_nothing() {
        let lineage = Lineage::new("main", SystemId(7), 1);
        for below in ["", "/", "wal//x", "../other", "wal/./x", "wal/\0"] {
            assert_eq!(lineage.object(below), None, "{below:?}");
        }
        for below in [
            "wal/0000000100000003/0000000100000002000000A7.zst",
            "wal/0000000100000002/0000000100000002000000A7.tail",
            "wal/x",
            "backups/x/base/0001.tar.zst",
            "backups",
            "é/é/é",
        ] {
            assert_eq!(Part::parse(below), Part::Other, "{below}");
        }
    }
}
