//! Owns: every object name in a repository, written and read (proto-notes/07-repository-format.md); those of backups
//! and pins in `layout/backups.rs`; any object by its path below its lineage in `layout/parts.rs`.
//! Does not own: what the objects contain.
//! The only place that builds a [`Key`].

mod backups;
mod parts;

use jiff::Timestamp;

use super::Key;
use crate::codec::Form;
use crate::wal::{Lsn, SegmentName, SegmentSize, SystemId, TimelineId};
pub use backups::{
    BackupId, BackupIdError, BackupType, LeaseNumber, PinName, TarStream, VolumeName, parse_tar_stream, parse_volume,
};
pub use parts::Part;

/// The repository's format version; a higher one found in `repository.json` is refused.
pub const FORMAT_VERSION: u32 = 1;

/// `repository.json`, at the root.
pub fn repository() -> Key {
    Key::new("repository.json")
}

/// An object `check` stores and deletes again, to see whether it may. No name a reader looks at.
pub fn probe(random: u32) -> Key {
    Key::new(format!("check-{random:08x}.probe"))
}

/// An object kept for ever, on which is tried whether a store honours conditions on writes. No name a reader looks at.
pub fn conditional_probe() -> Key {
    Key::new("conditional.probe")
}

/// The directory of a cluster. `cluster` is a checked name: `[a-z0-9_]{1,40}`.
pub fn cluster(cluster: &str) -> Key {
    Key::new(cluster)
}

/// What kind of object a name is of, in a word, for counting.
pub fn kind(key: &Key) -> &'static str {
    let path = key.as_str();
    let is_content = path.ends_with(".zst") || path.ends_with(".zst.age");
    match path.contains("/wal/") {
        true if path.contains(".tail/") => "tail",
        true if is_content => "segment",
        true if path.ends_with(".index.json") => "index",
        false if path.contains("/backups/") && is_content => "volume",
        _ => "other",
    }
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
        let lineage = Lineage::new(cluster, SystemId(decimal(id)?), ordinal);
        (lineage.directory_name() == directory).then_some(lineage)
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

    /// The lineage's own directory.
    pub fn directory(&self) -> Key {
        Key::new(format!("{}/{}", self.cluster, self.directory_name()))
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

    fn wal_object(&self, directory: WalDirectory, object: WalObject) -> Key {
        self.key(format_args!("wal/{directory}/{object}"))
    }

    /// A segment has one of its two names, whoever wrote it.
    pub fn segment(&self, name: SegmentName, form: Form) -> Key {
        self.wal_object(WalDirectory::of(name), WalObject::Segment(name, form))
    }

    pub fn tail_directory(&self, name: SegmentName) -> Key {
        self.wal_object(WalDirectory::of(name), WalObject::Tails(name))
    }

    pub fn tail(&self, name: SegmentName, tail: &TailName) -> Key {
        self.key(format_args!("wal/{}/{name}.tail/{tail}", WalDirectory::of(name)))
    }

    pub fn conflict(&self, name: SegmentName, raw_crc32: u32, form: Form) -> Key {
        self.wal_object(WalDirectory::of(name), WalObject::Conflict(name, raw_crc32, form))
    }

    /// Good content for a name whose object is damaged; readers prefer it.
    pub fn repair(&self, name: SegmentName, raw_crc32: u32, form: Form) -> Key {
        self.wal_object(WalDirectory::of(name), WalObject::Repair(name, raw_crc32, form))
    }

    /// Says, until the segment is indexed, what an encrypted object holds whose store cannot keep such a fact with it.
    pub fn raw_marker(&self, name: SegmentName, raw_crc32: u32) -> Key {
        self.wal_object(WalDirectory::of(name), WalObject::RawMarker(name, raw_crc32))
    }

    pub fn index(&self, index: IndexName) -> Key {
        self.wal_object(WalDirectory::of(index.first), WalObject::Index(index))
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
        let plain = name.ends_with(".json") && !name.contains(['/', '\0']);
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
    let digits = name.strip_suffix(".json")?;
    let epoch = decimal(digits).and_then(|n| u32::try_from(n).ok()).map(Epoch)?;
    canonical(epoch, digits)
}

/// What the name of an object in this form ends in.
fn suffix(form: Form) -> &'static str {
    match form {
        Form::Plain => ".zst",
        Form::Encrypted => ".zst.age",
    }
}

/// Takes the form's suffix off a name.
fn split_form(name: &str) -> Option<(&str, Form)> {
    let with = |form: Form| name.strip_suffix(suffix(form)).map(|rest| (rest, form));
    with(Form::Encrypted).or_else(|| with(Form::Plain))
}

/// `<epoch>-<from>-<to>-<crc32>-<last commit µs>.zst[.age]`: the proven raw bytes [from, to) of an unfinished segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TailName {
    pub epoch: Epoch,
    pub from: Lsn,
    pub to: Lsn,
    /// Of the raw bytes.
    pub raw_crc32: u32,
    /// Last commit at or before `to` that the writer knew of, in µs since 1970; `None` is written as 0.
    pub last_commit: Option<Timestamp>,
    pub form: Form,
}

impl TailName {
    /// Reads an object name below a `.tail` directory.
    pub fn parse(name: &str) -> Option<TailName> {
        let (facts, form) = split_form(name)?;
        let mut parts = facts.split('-');
        let mut next = || parts.next();
        let epoch = decimal(next()?).and_then(|n| u32::try_from(n).ok()).map(Epoch)?;
        let from = Lsn(hexadecimal(next()?, 16)?);
        let to = Lsn(hexadecimal(next()?, 16)?);
        let raw_crc32 = hexadecimal(next()?, 8)? as u32;
        let last_commit = match decimal(next()?)? {
            0 => None,
            micros => Some(Timestamp::from_microsecond(i64::try_from(micros).ok()?).ok()?),
        };
        let tail = TailName { epoch, from, to, raw_crc32, last_commit, form };
        if from < to { canonical(tail, name) } else { None }
    }
}

impl std::fmt::Display for TailName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let micros = self.last_commit.map_or(0, |time| time.as_microsecond().max(0));
        let TailName { epoch, from, to, raw_crc32, form, .. } = self;
        write!(f, "{epoch}-{:016X}-{:016X}-{raw_crc32:08x}-{micros}{}", from.0, to.0, suffix(*form))
    }
}

/// `<first>-<last>-<epoch>`: index entries of consecutive segments of one directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct IndexName {
    pub first: SegmentName,
    pub last: SegmentName,
    pub epoch: Epoch,
}

impl IndexName {
    /// Its segments follow one another inside one directory.
    fn is_valid(&self) -> bool {
        self.first <= self.last && WalDirectory::of(self.first) == WalDirectory::of(self.last)
    }
}

impl std::fmt::Display for IndexName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}-{}-{}", self.first, self.last, self.epoch)
    }
}

/// What a name inside a [`WalDirectory`] says it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WalObject {
    Segment(SegmentName, Form),
    /// A directory of tails.
    Tails(SegmentName),
    Index(IndexName),
    Conflict(SegmentName, u32, Form),
    Repair(SegmentName, u32, Form),
    /// An empty object; only writers look at it.
    RawMarker(SegmentName, u32),
}

impl WalObject {
    /// `None` for names of no known form: they are left alone.
    pub fn parse(name: &str) -> Option<WalObject> {
        if let Some(index) = name.strip_suffix(".index.json") {
            let mut parts = index.split('-');
            let first = parts.next()?.parse().ok()?;
            let last = parts.next()?.parse().ok()?;
            let epoch = decimal(parts.next()?).and_then(|n| u32::try_from(n).ok()).map(Epoch)?;
            let index = IndexName { first, last, epoch };
            return if index.is_valid() { canonical(WalObject::Index(index), name) } else { None };
        }
        let (segment, rest) = name.split_once('.')?;
        let segment: SegmentName = segment.parse().ok()?;
        let crc = |text: &str| hexadecimal(text, 8).map(|crc| crc as u32);
        let object = match (rest, split_form(rest)) {
            ("tail", _) => WalObject::Tails(segment),
            ("zst", _) => WalObject::Segment(segment, Form::Plain),
            ("zst.age", _) => WalObject::Segment(segment, Form::Encrypted),
            (_, Some((copy, form))) => match copy.split_once('-')? {
                ("conflict", crc32) => WalObject::Conflict(segment, crc(crc32)?, form),
                ("repair", crc32) => WalObject::Repair(segment, crc(crc32)?, form),
                _ => return None,
            },
            (marker, None) => WalObject::RawMarker(segment, crc(marker.strip_prefix("raw-")?)?),
        };
        canonical(object, name)
    }
}

/// The name inside its [`WalDirectory`].
impl std::fmt::Display for WalObject {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            WalObject::Segment(name, form) => write!(f, "{name}{}", suffix(*form)),
            WalObject::Tails(name) => write!(f, "{name}.tail"),
            WalObject::Index(index) => write!(f, "{index}.index.json"),
            WalObject::Conflict(name, raw_crc32, form) => {
                write!(f, "{name}.conflict-{raw_crc32:08x}{}", suffix(*form))
            }
            WalObject::Repair(name, raw_crc32, form) => write!(f, "{name}.repair-{raw_crc32:08x}{}", suffix(*form)),
            WalObject::RawMarker(name, raw_crc32) => write!(f, "{name}.raw-{raw_crc32:08x}"),
        }
    }
}

/// The name of the segment that holds `lsn`.
pub fn segment_at(timeline: TimelineId, lsn: Lsn, size: SegmentSize) -> SegmentName {
    SegmentName::new(timeline, size.segment_of(lsn), size)
}

/// A name in any other spelling than ours is foreign: the key built from what it says would be another object's.
fn canonical<T: std::fmt::Display>(parsed: T, name: &str) -> Option<T> {
    (parsed.to_string() == name).then_some(parsed)
}

fn decimal(text: &str) -> Option<u64> {
    let plain = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    plain.then(|| text.parse().ok()).flatten()
}

fn hexadecimal(text: &str, digits: usize) -> Option<u64> {
    let plain = text.len() == digits && text.bytes().all(|b| b.is_ascii_hexdigit());
    plain.then(|| u64::from_str_radix(text, 16).ok()).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn lineage() -> Lineage {
        Lineage::new("main", SystemId(7_432_109_876_543_210_123), 1)
    }

    fn segment() -> SegmentName {
        "0000000100000002000000A7".parse().unwrap()
    }

    fn tail() -> TailName {
        TailName {
            epoch: Epoch(3),
            from: Lsn(0x2_A800_0000),
            to: Lsn(0x2_A801_2340),
            raw_crc32: 0x00C0_FFEE,
            last_commit: Some("2026-11-22T11:00:00.123456Z".parse().unwrap()),
            form: Form::Plain,
        }
    }

    /// The format, version 1. These strings never change: archives with them exist.
    #[test]
    fn the_names_of_version_1() {
        let (lineage, segment) = (lineage(), segment());
        let index = IndexName { first: segment, last: SegmentName { low: 0xB6, ..segment }, epoch: Epoch(3) };
        let time = "2026-11-22T11:00:00.000042Z".parse().unwrap();
        assert_eq!(repository().as_str(), "repository.json");
        assert_eq!(cluster("main").as_str(), "main");
        let below = |key: Key| {
            let path = key.as_str().strip_prefix("main/7432109876543210123/").map(str::to_string);
            path.unwrap_or_else(|| panic!("{key} lies outside its lineage"))
        };
        assert_eq!(below(lineage.lineage_json()), "lineage.json");
        assert_eq!(below(lineage.writers()), "writers");
        assert_eq!(below(lineage.writer(Epoch(3))), "writers/0000000003.json");
        assert_eq!(below(lineage.wal()), "wal");
        assert_eq!(below(lineage.history(TimelineId(0x1A))), "wal/0000001A.history");
        assert_eq!(below(lineage.wal_directory(WalDirectory::of(segment))), "wal/0000000100000002");
        assert_eq!(below(lineage.segment(segment, Form::Plain)), "wal/0000000100000002/0000000100000002000000A7.zst");
        assert_eq!(
            below(lineage.segment(segment, Form::Encrypted)),
            "wal/0000000100000002/0000000100000002000000A7.zst.age"
        );
        assert_eq!(
            below(lineage.raw_marker(segment, 0xBEEF)),
            "wal/0000000100000002/0000000100000002000000A7.raw-0000beef"
        );
        assert_eq!(
            below(lineage.tail(segment, &TailName { form: Form::Encrypted, ..tail() })),
            "wal/0000000100000002/0000000100000002000000A7.tail/\
             0000000003-00000002A8000000-00000002A8012340-00c0ffee-1795345200123456.zst.age"
        );
        assert_eq!(below(lineage.tail_directory(segment)), "wal/0000000100000002/0000000100000002000000A7.tail");
        assert_eq!(
            below(lineage.tail(segment, &tail())),
            "wal/0000000100000002/0000000100000002000000A7.tail/\
             0000000003-00000002A8000000-00000002A8012340-00c0ffee-1795345200123456.zst"
        );
        assert_eq!(
            below(lineage.conflict(segment, 0xBEEF, Form::Plain)),
            "wal/0000000100000002/0000000100000002000000A7.conflict-0000beef.zst"
        );
        assert_eq!(
            below(lineage.index(index)),
            "wal/0000000100000002/0000000100000002000000A7-0000000100000002000000B6-0000000003.index.json"
        );
        assert_eq!(below(lineage.ledger()), "ledger");
        assert_eq!(
            below(lineage.ledger_entry(time, "gap-healed", 0xABC)),
            "ledger/20261122T110000.000042Z-gap-healed-00000abc.json"
        );
        assert_eq!(lineage.ledger_object("x.json").map(below), Some("ledger/x.json".to_string()));
        let repair = |form| WalObject::Repair(segment, 0xBEEF, form).to_string();
        assert_eq!(repair(Form::Plain), "0000000100000002000000A7.repair-0000beef.zst");
        assert_eq!(repair(Form::Encrypted), "0000000100000002000000A7.repair-0000beef.zst.age");
        assert_eq!(
            Lineage { ordinal: 2, ..lineage }.lineage_json().as_str(),
            "main/7432109876543210123-2/lineage.json"
        );
    }

    #[test]
    fn every_name_is_read_back() {
        let (lineage, segment) = (lineage(), segment());
        for ordinal in [1, 2, 10, u32::MAX] {
            let lineage = Lineage { ordinal, ..lineage.clone() };
            assert_eq!(Lineage::parse("main", &lineage.directory_name()), Some(lineage));
        }
        assert_eq!(parse_writer(lineage.writer(Epoch(u32::MAX)).file_name()), Some(Epoch(u32::MAX)));
        assert_eq!(parse_history(lineage.history(TimelineId(0x1A)).file_name()), Some(TimelineId(0x1A)));
        let directory = WalDirectory::of(segment);
        assert_eq!(WalDirectory::parse(lineage.wal_directory(directory).file_name()), Some(directory));
        let index = IndexName { first: segment, last: segment, epoch: Epoch(9) };
        for form in [Form::Plain, Form::Encrypted] {
            for (key, object) in [
                (lineage.segment(segment, form), WalObject::Segment(segment, form)),
                (lineage.conflict(segment, 1, form), WalObject::Conflict(segment, 1, form)),
                (lineage.repair(segment, 1, form), WalObject::Repair(segment, 1, form)),
            ] {
                assert_eq!(WalObject::parse(key.file_name()), Some(object));
            }
            let tail = TailName { form, ..tail() };
            assert_eq!(TailName::parse(lineage.tail(segment, &tail).file_name()), Some(tail));
        }
        for (key, object) in [
            (lineage.tail_directory(segment), WalObject::Tails(segment)),
            (lineage.index(index), WalObject::Index(index)),
            (lineage.raw_marker(segment, 1), WalObject::RawMarker(segment, 1)),
        ] {
            assert_eq!(WalObject::parse(key.file_name()), Some(object));
        }
    }

    #[test]
    fn a_tail_without_a_commit_says_zero() {
        let tail = TailName { last_commit: None, ..tail() };
        assert!(tail.to_string().ends_with("-0.zst"));
        assert_eq!(TailName::parse(&tail.to_string()), Some(tail));
    }

    /// Among them other spellings of our own names: what they say is right, but the key built from it is another.
    #[test]
    fn foreign_names_are_left_alone() {
        for name in ["", "-", "7-", "-2", "7-1", "7-0", "7-02", "07", "7-2-3", "x", "7-x", "+7", "18446744073709551616"]
        {
            assert_eq!(Lineage::parse("main", name), None, "{name:?}");
        }
        for name in ["", ".json", "1.json", "00000000001.json", "4294967296.json", "0000000001", "0000000001.json.tmp"]
        {
            assert_eq!(parse_writer(name), None, "{name:?}");
        }
        for name in ["", ".history", "1.history", "0000001a.history", "00000001.history.zst", "+0000001.history"] {
            assert_eq!(parse_history(name), None, "{name:?}");
        }
        for name in ["", "000000010000000", "00000001000000021", "000000010000000a", "+000000100000002"] {
            assert_eq!(WalDirectory::parse(name), None, "{name:?}");
        }
        for name in [
            "0000000100000002000000A7",
            "0000000100000002000000A7.gz",
            "0000000100000002000000A7.age",
            "0000000100000002000000A7.zst.zst",
            "0000000100000002000000A7.zst.age.age",
            "0000000100000002000000A7.zst.age.zst",
            "0000000100000002000000A7.raw-0000beef.zst",
            "0000000100000002000000A7.raw-0000BEEF",
            "0000000100000002000000A7.raw-beef",
            "0000000100000002000000A7.raw",
            "0000000100000002000000A7.conflict-0000beef.age",
            "0000000100000002000000a7.zst",
            "0000000100000002000000A7.partial",
            "0000000100000002000000A7.conflict-0000BEEF.zst",
            "0000000100000002000000A7.conflict-beef.zst",
            "0000000100000002000000A7.conflict-0000beef",
            "0000000100000002000000A7.repaired-0000beef.zst",
            "0000000100000002000000A7.index.json",
            "0000000100000002000000A7-0000000100000002000000B6-3.index.json",
            "0000000100000002000000B6-0000000100000002000000A7-0000000003.index.json",
            "0000000100000002000000A7-0000000100000003000000A7-0000000003.index.json",
            "0000000100000002000000A7-0000000200000002000000B6-0000000003.index.json",
            "0000000100000002000000A7-0000000100000002000000B6-0000000003-1.index.json",
            ".seawall-tmp-0123456789abcdef",
        ] {
            assert_eq!(WalObject::parse(name), None, "{name:?}");
        }
        for name in [
            "0000000003-00000002A8000000-00000002A8012340-00c0ffee-1795345200123456",
            "3-00000002A8000000-00000002A8012340-00c0ffee-1795345200123456.zst",
            "0000000003-00000002a8000000-00000002A8012340-00c0ffee-1795345200123456.zst",
            "0000000003-00000002A8000000-00000002A8012340-00C0FFEE-1795345200123456.zst",
            "0000000003-00000002A8000000-00000002A8012340-00c0ffee-01795345200123456.zst",
            "0000000003-00000002A8000000-00000002A8012340-00c0ffee-1795345200123456-1.zst",
            "0000000003-00000002A8000000-00000002A8012340-00c0ffee-99999999999999999999.zst",
            "0000000003-00000002A8012340-00000002A8012340-00c0ffee-0.zst",
            "0000000003-00000002A8012340-00000002A8000000-00c0ffee-0.zst",
            "0000000003-00000002A8000000-00000002A8012340-00c0ffee-.zst",
        ] {
            assert_eq!(TailName::parse(name), None, "{name:?}");
        }
        for name in ["x", "a/b.json", "../x.json", "\0.json"] {
            assert_eq!(lineage().ledger_object(name), None, "{name:?}");
        }
    }

    fn parse_all(name: &str) {
        let _ = Lineage::parse("main", name);
        let _ = (parse_writer(name), parse_history(name), WalDirectory::parse(name), WalObject::parse(name));
        let _ = (TailName::parse(name), lineage().ledger_object(name));
    }

    /// Names whose length in bytes fits but whose characters do not end where the digits would.
    #[test]
    fn multibyte_names_do_not_panic() {
        for name in ["0000000é0000002", "000é.history", "0000000é0000000200000A7.zst", "é", "0000000é.json", "-é-"]
        {
            parse_all(name);
        }
    }

    prop_compose! {
        fn segments()(timeline in 1u32.., high in any::<u32>(), low in any::<u32>()) -> SegmentName {
            SegmentName { timeline: TimelineId(timeline), high, low }
        }
    }

    prop_compose! {
        fn tails()(
            epoch in any::<u32>(), from in 0..u64::MAX - 1, length in 1u64..1 << 30,
            raw_crc32 in any::<u32>(), micros in 0i64..253_402_207_200_999_999, form in forms(),
        ) -> TailName {
            let last_commit = (micros != 0).then(|| Timestamp::from_microsecond(micros).unwrap());
            let to = Lsn(from.saturating_add(length));
            TailName { epoch: Epoch(epoch), from: Lsn(from), to, raw_crc32, last_commit, form }
        }
    }

    prop_compose! {
        fn indexes()(first in segments(), further in any::<u32>(), epoch in any::<u32>()) -> IndexName {
            let last = SegmentName { low: first.low.saturating_add(further), ..first };
            IndexName { first, last, epoch: Epoch(epoch) }
        }
    }

    fn forms() -> impl Strategy<Value = Form> {
        prop_oneof![Just(Form::Plain), Just(Form::Encrypted)]
    }

    fn wal_objects() -> impl Strategy<Value = WalObject> {
        prop_oneof![
            (segments(), forms()).prop_map(|(name, form)| WalObject::Segment(name, form)),
            segments().prop_map(WalObject::Tails),
            indexes().prop_map(WalObject::Index),
            (segments(), any::<u32>(), forms()).prop_map(|(name, crc, form)| WalObject::Conflict(name, crc, form)),
            (segments(), any::<u32>(), forms()).prop_map(|(name, crc, form)| WalObject::Repair(name, crc, form)),
            (segments(), any::<u32>()).prop_map(|(name, crc)| WalObject::RawMarker(name, crc)),
        ]
    }

    proptest! {
        #[test]
        fn tails_round_trip(tail in tails()) {
            prop_assert_eq!(TailName::parse(&tail.to_string()), Some(tail));
        }

        #[test]
        fn wal_objects_round_trip(object in wal_objects()) {
            prop_assert_eq!(WalObject::parse(&object.to_string()), Some(object));
        }

        /// Two names never mean the same object: what is read is written the same way again.
        #[test]
        fn what_is_read_is_spelled_as_we_spell(object in wal_objects(), at in any::<prop::sample::Index>(), with in "[0-9a-fA-F.-]") {
            let mut name = object.to_string();
            let at = at.index(name.len());
            name.replace_range(at..=at, &with);
            if let Some(read) = WalObject::parse(&name) {
                prop_assert_eq!(read.to_string(), name);
            }
        }

        /// Names as a listing of a damaged or hostile store may give them.
        #[test]
        fn hostile_names_do_not_panic(name in "[0-9A-Fa-f.-]{0,24}(\\PC{0,8}|é|\\.zst|\\.zst\\.age|\\.tail|\\.index\\.json|\\.history)") {
            parse_all(&name);
        }
    }
}
