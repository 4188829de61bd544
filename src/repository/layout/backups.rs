//! Owns: the names of backups and pins below a lineage, written and read (proto-notes/07-repository-format.md).
//! Does not own: names of WAL (`layout.rs`), what the objects contain (`catalog::backup`).

use std::fmt;
use std::str::FromStr;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::{Form, Key, Lineage, canonical, decimal, hexadecimal, split_form, suffix};

/// How a backup relates to earlier ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BackupType {
    Full,
    /// Against the latest full one.
    Differential,
    /// Against the latest one of any type.
    Incremental,
}

impl BackupType {
    /// The end of a backup's id.
    fn word(self) -> &'static str {
        match self {
            BackupType::Full => "full",
            BackupType::Differential => "diff",
            BackupType::Incremental => "incr",
        }
    }
}

impl fmt::Display for BackupType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            BackupType::Full => "full",
            BackupType::Differential => "differential",
            BackupType::Incremental => "incremental",
        })
    }
}

/// `20261122T110000Z-full`: when it began, to the second, and its type. Ids sort as the backups began.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BackupId {
    started: Timestamp,
    backup_type: BackupType,
}

impl BackupId {
    /// Two backups that begin in one second: the second one finds the name taken and begins a second later.
    pub fn new(started: Timestamp, backup_type: BackupType) -> BackupId {
        let started = Timestamp::from_second(started.as_second()).expect("it was a timestamp before");
        BackupId { started, backup_type }
    }

    pub fn started(&self) -> Timestamp {
        self.started
    }

    pub fn backup_type(&self) -> BackupType {
        self.backup_type
    }
}

impl fmt::Display for BackupId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.started.strftime("%Y%m%dT%H%M%SZ"), self.backup_type.word())
    }
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("\"{0}\" is not a backup's id; `seawall list` shows them, such as 20261122T110000Z-full")]
pub struct BackupIdError(String);

impl FromStr for BackupId {
    type Err = BackupIdError;

    fn from_str(text: &str) -> Result<BackupId, BackupIdError> {
        let parse = || {
            let (time, word) = text.split_once('-')?;
            let types = [BackupType::Full, BackupType::Differential, BackupType::Incremental];
            let backup_type = types.into_iter().find(|known| known.word() == word)?;
            let time = jiff::civil::DateTime::strptime("%Y%m%dT%H%M%SZ", time).ok()?;
            let started = time.to_zoned(jiff::tz::TimeZone::UTC).ok()?.timestamp();
            canonical(BackupId { started, backup_type }, text)
        };
        parse().ok_or_else(|| BackupIdError(text.to_string()))
    }
}

impl Serialize for BackupId {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for BackupId {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<BackupId, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// Which tar stream of a backup.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum TarStream {
    /// PGDATA.
    Base,
    /// A tablespace, by its OID.
    Tablespace(u32),
}

impl fmt::Display for TarStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            TarStream::Base => f.write_str("base"),
            TarStream::Tablespace(oid) => write!(f, "{oid}"),
        }
    }
}

/// `base/0001.tar.zst[.age]`: a valid tar of whole files.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct VolumeName {
    pub stream: TarStream,
    /// From 1 within its stream.
    pub number: u32,
}

impl fmt::Display for VolumeName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{:04}.tar", self.stream, self.number)
    }
}

/// `pins/<id>-<n>.json`: what must stay. The highest `number` of an id counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PinName {
    /// Random; sixteen hexadecimal digits.
    pub id: u64,
    /// From 1; each renewal, and the release, is the next.
    pub number: u32,
}

impl PinName {
    pub fn parse(name: &str) -> Option<PinName> {
        let (id, number) = name.strip_suffix(".json")?.split_once('-')?;
        let number = decimal(number).and_then(|n| u32::try_from(n).ok()).filter(|&n| n >= 1)?;
        canonical(PinName { id: hexadecimal(id, 16)?, number }, name)
    }
}

impl fmt::Display for PinName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}-{}.json", self.id, self.number)
    }
}

/// `lease/<n>.json`: who may back up and expire; the highest number counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct LeaseNumber(pub u64);

impl LeaseNumber {
    pub fn parse(name: &str) -> Option<LeaseNumber> {
        let number = LeaseNumber(decimal(name.strip_suffix(".json")?)?);
        canonical(number, name.strip_suffix(".json")?)
    }
}

/// Twelve digits, so that names sort.
impl fmt::Display for LeaseNumber {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:012}", self.0)
    }
}

impl Lineage {
    pub fn backups(&self) -> Key {
        self.key(format_args!("backups"))
    }

    pub fn backup(&self, id: BackupId) -> Key {
        self.key(format_args!("backups/{id}"))
    }

    /// The first object of a backup.
    pub fn backup_begin(&self, id: BackupId) -> Key {
        self.key(format_args!("backups/{id}/begin.json"))
    }

    /// The last object of a backup: the commit mark.
    pub fn backup_json(&self, id: BackupId) -> Key {
        self.key(format_args!("backups/{id}/backup.json"))
    }

    /// Outranks `backup.json` for every reader.
    pub fn backup_dead(&self, id: BackupId) -> Key {
        self.key(format_args!("backups/{id}/dead.json"))
    }

    /// PostgreSQL's own, byte for byte; never encrypted: names, sizes and checksums stay readable.
    pub fn backup_manifest(&self, id: BackupId) -> Key {
        self.key(format_args!("backups/{id}/backup_manifest"))
    }

    pub fn volume(&self, id: BackupId, volume: VolumeName, form: Form) -> Key {
        self.key(format_args!("backups/{id}/{volume}{}", suffix(form)))
    }

    /// A configuration file that lives outside PGDATA. `name` is relative, of plain components; `None` otherwise.
    pub fn backup_config(&self, id: BackupId, name: &str, form: Form) -> Option<Key> {
        let plain = |part: &str| !matches!(part, "" | "." | "..") && !part.contains('\0');
        let suffix = match form {
            Form::Plain => "",
            Form::Encrypted => ".age",
        };
        name.split('/').all(plain).then(|| self.key(format_args!("backups/{id}/config/{name}{suffix}")))
    }

    pub fn pins(&self) -> Key {
        self.key(format_args!("pins"))
    }

    pub fn pin(&self, name: PinName) -> Key {
        self.key(format_args!("pins/{name}"))
    }

    pub fn leases(&self) -> Key {
        self.key(format_args!("lease"))
    }

    pub fn lease(&self, number: LeaseNumber) -> Key {
        self.key(format_args!("lease/{number}.json"))
    }
}

/// Reads the name of a stream's directory: `base`, or a tablespace's OID.
pub fn parse_tar_stream(name: &str) -> Option<TarStream> {
    let stream = match name {
        "base" => TarStream::Base,
        oid => TarStream::Tablespace(u32::try_from(decimal(oid)?).ok()?),
    };
    canonical(stream, name)
}

/// Reads `0001.tar.zst[.age]`, a name directly below a stream's directory.
pub fn parse_volume(stream: TarStream, name: &str) -> Option<(VolumeName, Form)> {
    let (rest, form) = split_form(name)?;
    let digits = rest.strip_suffix(".tar")?;
    let number = decimal(digits).and_then(|n| u32::try_from(n).ok()).filter(|&n| n >= 1)?;
    let volume = VolumeName { stream, number };
    (format!("{number:04}") == digits).then_some((volume, form))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wal::SystemId;

    /// The format, version 1. These strings never change: archives with them exist.
    #[test]
    fn the_names_of_version_1() {
        let lineage = Lineage::new("main", SystemId(7), 1);
        let id: BackupId = "20261122T110000Z-full".parse().unwrap();
        let below = |key: Key| key.as_str().strip_prefix("main/7/").unwrap().to_string();
        assert_eq!(below(lineage.backup_begin(id)), "backups/20261122T110000Z-full/begin.json");
        assert_eq!(below(lineage.backup_json(id)), "backups/20261122T110000Z-full/backup.json");
        assert_eq!(below(lineage.backup_dead(id)), "backups/20261122T110000Z-full/dead.json");
        assert_eq!(below(lineage.backup_manifest(id)), "backups/20261122T110000Z-full/backup_manifest");
        let volume = |stream, number| VolumeName { stream, number };
        let base = volume(TarStream::Base, 1);
        assert_eq!(below(lineage.volume(id, base, Form::Plain)), "backups/20261122T110000Z-full/base/0001.tar.zst");
        let other = volume(TarStream::Tablespace(16384), 12345);
        let key = below(lineage.volume(id, other, Form::Encrypted));
        assert_eq!(key, "backups/20261122T110000Z-full/16384/12345.tar.zst.age");
        let config = |name, form| lineage.backup_config(id, name, form).map(below);
        let plain = config("postgresql.conf", Form::Plain);
        assert_eq!(plain.unwrap(), "backups/20261122T110000Z-full/config/postgresql.conf");
        let nested = config("conf.d/a.conf", Form::Encrypted);
        assert_eq!(nested.unwrap(), "backups/20261122T110000Z-full/config/conf.d/a.conf.age");
        assert_eq!(config("../a", Form::Plain), None);
        let pin = PinName { id: 0xBEEF, number: 2 };
        assert_eq!(below(lineage.pin(pin)), "pins/000000000000beef-2.json");
        assert_eq!(PinName::parse("000000000000beef-2.json"), Some(pin));
        assert_eq!(PinName::parse("000000000000beef-02.json"), None);
        assert_eq!(below(lineage.lease(LeaseNumber(7))), "lease/000000000007.json");
        assert_eq!(LeaseNumber::parse("000000000007.json"), Some(LeaseNumber(7)));
        assert_eq!(LeaseNumber::parse("7.json"), None);
    }

    #[test]
    fn ids_and_volumes_are_read_back_and_foreign_names_are_not() {
        for text in ["20261122T110000Z-full", "20261122T235959Z-diff", "20000229T000000Z-incr"] {
            assert_eq!(text.parse::<BackupId>().unwrap().to_string(), text);
        }
        for text in ["", "20261122T110000Z", "20261122T110000Z-copy", "20261131T110000Z-full", "2026112T110000Z-full"] {
            text.parse::<BackupId>().unwrap_err();
        }
        let volume = VolumeName { stream: TarStream::Base, number: 1 };
        assert_eq!(parse_volume(TarStream::Base, "0001.tar.zst"), Some((volume, Form::Plain)));
        assert_eq!(parse_volume(TarStream::Base, "0001.tar.zst.age"), Some((volume, Form::Encrypted)));
        for name in ["0000.tar.zst", "1.tar.zst", "0001.tar", "00001.tar.zst"] {
            assert_eq!(parse_volume(TarStream::Base, name), None, "{name}");
        }
    }
}
