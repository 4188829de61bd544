//! Owns: one table of the configuration, read value by value: types, units, and the errors that name key and place.
//! Does not own: what a table must hold (`cluster.rs`, `repository.rs`, `mod.rs`).

use std::path::{Path, PathBuf};
use std::time::Duration;

use super::error::{self, ConfigError, Source};
use super::file::{Table, Value};
use super::reference::Group;
use crate::units::{parse_duration, parse_size};

/// The longest duration a key takes.
const HOUR: Duration = Duration::from_secs(3600);

/// One table with its full name, for errors.
pub(super) struct Section<'a> {
    pub group: Group,
    /// Empty where the group is one table.
    pub name: &'a str,
    pub table: &'a Table,
}

impl Section<'_> {
    pub fn key(&self, key: &str) -> String {
        self.group.path(self.name, key)
    }

    pub fn source(&self, key: &str) -> Source {
        self.table.get(key).map_or(Source::Default, |typed| typed.source.clone())
    }

    pub fn invalid(&self, key: &str, value: Option<&str>, expected: impl Into<String>) -> ConfigError {
        // Long values, and those with blanks or "=", may be something else than meant, such as a connection string.
        let plain =
            |value: &&str| value.len() <= 100 && !value.contains(|c: char| c.is_whitespace() || c == '=' || c == '@');
        ConfigError::Invalid {
            source_place: self.source(key),
            key: self.key(key),
            value: value.filter(plain).map(str::to_string),
            expected: expected.into(),
        }
    }

    pub fn not_available(&self, key: &str, what: impl Into<String>) -> ConfigError {
        ConfigError::NotAvailable { source_place: self.source(key), what: what.into() }
    }

    pub fn needs(&self, key: &str, what: impl Into<String>, needed: impl Into<String>) -> ConfigError {
        ConfigError::Needs { source_place: self.source(key), what: what.into(), needed: needed.into() }
    }

    pub fn text(&self, key: &str) -> Result<Option<&str>, ConfigError> {
        match self.table.get(key).map(|typed| &typed.value) {
            None => Ok(None),
            Some(Value::Text(text)) => Ok(Some(text)),
            Some(other) => Err(self.wrong_type(key, "text in quotes", other)),
        }
    }

    /// `true` or `false`; a variable says it in letters.
    pub fn flag(&self, key: &str) -> Result<Option<bool>, ConfigError> {
        match self.table.get(key).map(|typed| (&typed.value, &typed.source)) {
            None => Ok(None),
            Some((Value::Flag(flag), _)) => Ok(Some(*flag)),
            Some((Value::Text(text), Source::Variable(_))) => match text.parse() {
                Ok(flag) => Ok(Some(flag)),
                Err(_) => Err(self.invalid(key, Some(text), "true or false")),
            },
            Some((other, _)) => Err(self.wrong_type(key, "true or false", other)),
        }
    }

    /// A whole number; a variable says it in digits.
    pub fn number(
        &self,
        key: &str,
        range: std::ops::RangeInclusive<u64>,
        expected: &str,
    ) -> Result<Option<u64>, ConfigError> {
        let (number, shown) = match self.table.get(key).map(|typed| (&typed.value, &typed.source)) {
            None => return Ok(None),
            Some((Value::Integer(integer), _)) => (u64::try_from(*integer).ok(), Some(integer.to_string())),
            Some((Value::Text(text), Source::Variable(_))) => (text.parse().ok(), Some(text.clone())),
            Some((other, _)) => return Err(self.wrong_type(key, expected, other)),
        };
        match number.filter(|number| range.contains(number)) {
            Some(number) => Ok(Some(number)),
            None => Err(self.invalid(key, shown.as_deref(), expected)),
        }
    }

    /// At least one entry.
    pub fn list(&self, key: &str, expected: &str) -> Result<Option<&[String]>, ConfigError> {
        match self.table.get(key).map(|typed| &typed.value) {
            None => Ok(None),
            Some(Value::List(list)) if !list.is_empty() => Ok(Some(list)),
            Some(_) => Err(self.invalid(key, None, expected)),
        }
    }

    fn wrong_type(&self, key: &str, expected: &str, found: &Value) -> ConfigError {
        let example = self.group.find(key).map_or("", |(_, doc)| doc.example);
        self.invalid(key, None, format!("{expected}, such as {example}, not {}", found.kind()))
    }

    pub fn duration(&self, key: &str, default: Duration, min: Duration, range: &str) -> Result<Duration, ConfigError> {
        let Some(text) = self.text(key)? else { return Ok(default) };
        let parsed = parse_duration(text).filter(|duration| (min..=HOUR).contains(duration));
        parsed.ok_or_else(|| self.invalid(key, Some(text), error::expected_duration(range)))
    }

    pub fn size(&self, key: &str, default: u64, min: u64, range: &str) -> Result<u64, ConfigError> {
        let Some(text) = self.text(key)? else { return Ok(default) };
        let parsed = parse_size(text).filter(|&bytes| bytes >= min);
        parsed.ok_or_else(|| self.invalid(key, Some(text), error::expected_size(range)))
    }

    pub fn path(&self, key: &str) -> Result<Option<PathBuf>, ConfigError> {
        let Some(text) = self.text(key)? else { return Ok(None) };
        if !Path::new(text).is_absolute() || text.contains('\0') {
            let example = self.group.find(key).map_or("", |(_, doc)| doc.example);
            return Err(self.invalid(key, Some(text), format!("an absolute path, such as {example}")));
        }
        Ok(Some(PathBuf::from(text)))
    }

    /// A word made of these characters only.
    pub fn word(&self, key: &str, allowed: fn(u8) -> bool, expected: &str) -> Result<Option<String>, ConfigError> {
        const BYTES_MAX: usize = 256;
        let Some(text) = self.text(key)? else { return Ok(None) };
        if text.is_empty() || text.len() > BYTES_MAX || !text.bytes().all(allowed) {
            return Err(self.invalid(key, Some(text), expected));
        }
        Ok(Some(text.to_string()))
    }
}
