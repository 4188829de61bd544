//! Owns: every object name in a repository, written and read (proto-notes/07-repository-format.md).
//! Does not own: what the objects contain.
//! The only file that builds a [`Key`].

use jiff::Timestamp;

use super::Key;
use crate::wal::{Lsn, SegmentName, SegmentSize, SystemId, TimelineId};

/// The repository's format version; a higher one found in `repository.json` is refused.
pub const FORMAT_VERSION: u32 = 1;

/// `repository.json`, at the root.
pub fn repository() -> Key {
    Key::new("repository.json")
}

/// The directory of a cluster. `cluster` is a checked name: `[a-z0-9_]{1,40}`.
pub fn cluster(cluster: &str) -> Key {
    Key::new(cluster)
}

/// A writer's number; a higher one fences a lower one. Ten digits in names, so that names sort.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize)]
#[serde(transparent)]
pub struct Epoch(pub u32);

impl std::fmt::Display for Epoch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:010}", self.0)
    }
}

/// One lineage of one cluster: `<cluster>/<system id>[-<n>]`. Every name below it is built here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lineage {
    pub cluster: String,
    pub system_id: SystemId,
    /// 1 for the first lineage of a system identifier (no suffix), then 2, 3, …
    pub ordinal: u32,
}

impl Lineage {
    pub fn new(cluster: &str, system_id: SystemId, ordinal: u32) -> Lineage {
        assert!(ordinal >= 1, "lineages are counted from 1");
        Lineage { cluster: cluster.to_string(), system_id, ordinal }
    }

    /// Reads a directory name found below a cluster.
    pub fn parse(cluster: &str, directory: &str) -> Option<Lineage> {
        let (id, ordinal) = match directory.split_once('-') {
            None => (directory, 1),
            Some((id, n)) => (id, decimal(n).and_then(|n| u32::try_from(n).ok()).filter(|&n| n >= 2)?),
        };
        Some(Lineage::new(cluster, SystemId(decimal(id)?), ordinal))
    }

    /// `<system id>[-<n>]`
    pub fn directory_name(&self) -> String {
        match self.ordinal {
            1 => self.system_id.to_string(),
            n => format!("{}-{n}", self.system_id),
        }
    }

    fn key(&self, path: std::fmt::Arguments<'_>) -> Key {
        Key::new(format!("{}/{}/{path}", self.cluster, self.directory_name()))
    }

    pub fn lineage_json(&self) -> Key {
        self.key(format_args!("lineage.json"))
    }

    pub fn writers(&self) -> Key {
        self.key(format_args!("writers"))
    }

    pub fn writer(&self, epoch: Epoch) -> Key {
        self.key(format_args!("writers/{epoch}.json"))
    }

    pub fn wal(&self) -> Key {
        self.key(format_args!("wal"))
    }

    pub fn history(&self, timeline: TimelineId) -> Key {
        self.key(format_args!("wal/{:08X}.history", timeline.0))
    }

    pub fn wal_directory(&self, directory: WalDirectory) -> Key {
        self.key(format_args!("wal/{directory}"))
    }

    pub fn segment(&self, name: SegmentName) -> Key {
        self.key(format_args!("wal/{}/{name}.zst", WalDirectory::of(name)))
    }

    pub fn tail_directory(&self, name: SegmentName) -> Key {
        self.key(format_args!("wal/{}/{name}.tail", WalDirectory::of(name)))
    }

    pub fn tail(&self, name: SegmentName, tail: &TailName) -> Key {
        self.key(format_args!("wal/{}/{name}.tail/{tail}.zst", WalDirectory::of(name)))
    }

    pub fn conflict(&self, name: SegmentName, raw_crc32: u32) -> Key {
        self.key(format_args!("wal/{}/{name}.conflict-{raw_crc32:08x}.zst", WalDirectory::of(name)))
    }

    /// Good content for a name whose object is damaged; readers prefer it.
    pub fn repair(&self, name: SegmentName, raw_crc32: u32) -> Key {
        self.key(format_args!("wal/{}/{name}.repair-{raw_crc32:08x}.zst", WalDirectory::of(name)))
    }

    pub fn index(&self, index: IndexName) -> Key {
        self.key(format_args!("wal/{}/{index}.index.json", WalDirectory::of(index.first)))
    }

    pub fn ledger(&self) -> Key {
        self.key(format_args!("ledger"))
    }

    /// `kind` is one of the ledger's own words; `random` keeps two facts of one microsecond apart.
    pub fn ledger_entry(&self, time: Timestamp, kind: &str, random: u32) -> Key {
        let time = time.strftime("%Y%m%dT%H%M%S%.6fZ");
        self.key(format_args!("ledger/{time}-{kind}-{random:08x}.json"))
    }

    /// Any other object directly below the ledger, as listed.
    pub fn ledger_object(&self, name: &str) -> Option<Key> {
        let plain = name.ends_with(".json") && !name.contains('/');
        plain.then(|| self.key(format_args!("ledger/{name}")))
    }
}

/// The kind in `<time>-<kind>-<random>.json`: readers fetch only the facts they need.
pub fn ledger_kind(name: &str) -> Option<&str> {
    let (_time, rest) = name.strip_suffix(".json")?.split_once('-')?;
    Some(rest.rsplit_once('-')?.0)
}

/// A directory of segments: timeline and high word of the LSN, sixteen upper-case hexadecimal digits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct WalDirectory {
    pub timeline: TimelineId,
    pub high: u32,
}

impl WalDirectory {
    pub fn of(name: SegmentName) -> WalDirectory {
        WalDirectory { timeline: name.timeline, high: name.high }
    }

    pub fn parse(name: &str) -> Option<WalDirectory> {
        let valid = name.len() == 16 && name.bytes().all(|b| b.is_ascii_digit() || (b'A'..=b'F').contains(&b));
        let word = |at: usize| u32::from_str_radix(&name[at..at + 8], 16).ok();
        valid.then(|| Some(WalDirectory { timeline: TimelineId(word(0)?), high: word(8)? })).flatten()
    }
}

impl std::fmt::Display for WalDirectory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:08X}{:08X}", self.timeline.0, self.high)
    }
}

/// Reads `0000000N.history`.
pub fn parse_history(name: &str) -> Option<TimelineId> {
    let digits = name.strip_suffix(".history")?;
    let valid = digits.len() == 8 && digits.bytes().all(|b| b.is_ascii_digit() || (b'A'..=b'F').contains(&b));
    valid.then(|| u32::from_str_radix(digits, 16).ok().map(TimelineId)).flatten()
}

/// Reads `<epoch>.json` below `writers/`.
pub fn parse_writer(name: &str) -> Option<Epoch> {
    decimal(name.strip_suffix(".json")?).and_then(|n| u32::try_from(n).ok()).map(Epoch)
}

/// `<epoch>-<from>-<to>-<crc32>-<last commit µs>`: the proven raw bytes [from, to) of an unfinished segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TailName {
    pub epoch: Epoch,
    pub from: Lsn,
    pub to: Lsn,
    /// Of the raw bytes.
    pub raw_crc32: u32,
    /// Last commit at or before `to` that the writer knew of, in µs since 1970; `None` is written as 0.
    pub last_commit: Option<Timestamp>,
}

impl TailName {
    /// Reads an object name below a `.tail` directory.
    pub fn parse(name: &str) -> Option<TailName> {
        let mut parts = name.strip_suffix(".zst")?.split('-');
        let mut next = || parts.next();
        let epoch = decimal(next()?).and_then(|n| u32::try_from(n).ok()).map(Epoch)?;
        let from = Lsn(hexadecimal(next()?, 16)?);
        let to = Lsn(hexadecimal(next()?, 16)?);
        let raw_crc32 = hexadecimal(next()?, 8)? as u32;
        let last_commit = match decimal(next()?)? {
            0 => None,
            micros => Some(Timestamp::from_microsecond(i64::try_from(micros).ok()?).ok()?),
        };
        (next().is_none() && from < to).then_some(TailName { epoch, from, to, raw_crc32, last_commit })
    }
}

impl std::fmt::Display for TailName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let micros = self.last_commit.map_or(0, |time| time.as_microsecond().max(0));
        write!(f, "{}-{:016X}-{:016X}-{:08x}-{micros}", self.epoch, self.from.0, self.to.0, self.raw_crc32)
    }
}

/// `<first>-<last>-<epoch>`: index entries of consecutive segments of one directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IndexName {
    pub first: SegmentName,
    pub last: SegmentName,
    pub epoch: Epoch,
}

impl std::fmt::Display for IndexName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}-{}-{}", self.first, self.last, self.epoch)
    }
}

/// What a name inside a [`WalDirectory`] says it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WalObject {
    Segment(SegmentName),
    /// A directory of tails.
    Tails(SegmentName),
    Index(IndexName),
    Conflict(SegmentName, u32),
    Repair(SegmentName, u32),
}

impl WalObject {
    /// `None` for names of no known form: they are left alone.
    pub fn parse(name: &str) -> Option<WalObject> {
        if let Some(index) = name.strip_suffix(".index.json") {
            let mut parts = index.split('-');
            let first = parts.next()?.parse().ok()?;
            let last = parts.next()?.parse().ok()?;
            let epoch = decimal(parts.next()?).and_then(|n| u32::try_from(n).ok()).map(Epoch)?;
            return parts.next().is_none().then_some(WalObject::Index(IndexName { first, last, epoch }));
        }
        let (segment, rest) = name.split_once('.')?;
        let segment: SegmentName = segment.parse().ok()?;
        let crc = |text: &str| hexadecimal(text.strip_suffix(".zst")?, 8).map(|crc| crc as u32);
        match rest {
            "zst" => Some(WalObject::Segment(segment)),
            "tail" => Some(WalObject::Tails(segment)),
            _ => match rest.split_once('-')? {
                ("conflict", crc32) => Some(WalObject::Conflict(segment, crc(crc32)?)),
                ("repair", crc32) => Some(WalObject::Repair(segment, crc(crc32)?)),
                _ => None,
            },
        }
    }
}

/// The name of the segment that holds `lsn`.
pub fn segment_at(timeline: TimelineId, lsn: Lsn, size: SegmentSize) -> SegmentName {
    SegmentName::new(timeline, size.segment_of(lsn), size)
}

fn decimal(text: &str) -> Option<u64> {
    let plain = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    plain.then(|| text.parse().ok()).flatten()
}

fn hexadecimal(text: &str, digits: usize) -> Option<u64> {
    let plain = text.len() == digits && text.bytes().all(|b| b.is_ascii_hexdigit());
    plain.then(|| u64::from_str_radix(text, 16).ok()).flatten()
}
